"""What every sequence encoder is: a module from histories to one vector a user, and from there to a score an item.

Item indices (B, L) enter: oldest first, padded on the LEFT with -1. States (B, L, D) and representations (B, D) leave.
"""

from typing import Any

import torch
from torch import nn

from recllm.errors import UserError

PADDING = -1


class SequenceEncoder(nn.Module):
    """The interface, and what all encoders share. D is `hidden_size`.

    An encoder has a module `item_embedding`: called with item indices it gives their vectors (…, D), and its `weight`
    is the table of all (num_items, D), to which the scores are tied. It implements `_states`, `numbers_a_row`, and
    names in SIZES the arguments of its constructor, which are attributes too.
    """

    # As encoder.type in a recipe and "type" in encoder.json
    type: str  # type: ignore[assignment]  # hides Module.type(dtype), a cast that .to(dtype) does too
    SIZES: tuple[str, ...]
    num_items: int
    hidden_size: int
    max_items: int  # a longer history is cut to its newest max_items items
    vocabulary_sha256: str | None = None  # of the item vocabulary it was fitted on; load_encoder sets it
    item_embedding: Any

    def forward(self, items: torch.Tensor) -> torch.Tensor:
        """Representation of each history: the state of its newest item. (B, L) → (B, D); an empty row gives zeros.

        Raises:
            UserError: an item index outside the vocabulary (seen on the CPU only; a GPU asserts).
        """
        self.check(items)
        if items.shape[1] == 0:
            return next(self.parameters()).new_zeros(items.shape[0], self.hidden_size)
        return self._states(items[:, -self.reach :])[:, -1]

    def states(self, items: torch.Tensor) -> torch.Tensor:
        """The state after each item. (B, L) → (B, min(L, max_items), D); padding gives zeros. Errors as forward()."""
        self.check(items)
        return self._states(items[:, -self.max_items :])

    def scores(self, representation: torch.Tensor) -> torch.Tensor:
        """Score of every item after a history. (…, D) → (…, num_items)."""
        return representation @ self.item_embedding.weight.T

    def sizes(self) -> dict[str, Any]:
        """Arguments that build an encoder of the same shape."""
        return {name: getattr(self, name) for name in self.SIZES}

    @property
    def reach(self) -> int:
        """On how many of the newest items a representation can hang: more need not be read."""
        return self.max_items

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def numbers_a_row(self, length: int) -> int:
        """About how many numbers a forward over one history of this length holds at once: what sizes a batch."""
        raise NotImplementedError  # each encoder's own, see the class

    def _states(self, items: torch.Tensor) -> torch.Tensor:
        """(B, L) of at most max_items → (B, L, D), with zeros at padding."""
        raise NotImplementedError  # each encoder's own, see the class

    def check(self, items: torch.Tensor) -> None:
        """Refuse item indices outside the vocabulary, where looking costs nothing (on the CPU, not compiled)."""
        if torch.compiler.is_compiling():
            return
        if items.is_cpu and items.numel() and not (int(items.min()) >= PADDING and int(items.max()) < self.num_items):
            raise out_of_vocabulary(int(items.min()), int(items.max()), self.num_items)


def out_of_vocabulary(lowest: int, highest: int, num_items: int) -> UserError:
    """The error for item indices that the encoder has no vector for."""
    return UserError(
        f"item indices from {lowest} to {highest} are outside the encoder's vocabulary of {num_items} items "
        "(-1 is padding): use the dataset that the encoder was fitted on"
    )
