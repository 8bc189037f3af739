"""What every sequence encoder is: a module from histories to one vector a user, and from there to a score an item.

Item indices (B, L) enter, or event codes: oldest first, padded on the LEFT with -1. States (B, L, D) and
representations (B, D) leave.

An event is an action, with an item or without. Its code is (item + 1) + (num_items + 1) · action, item = -1 for none
(recllm/schema.py, `event_codes`); its vector is the sum of the vectors of its action and its item.
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
    names in SIZES the arguments of its constructor, which are attributes too. With `num_actions` > 0 it reads event
    codes in place of item indices, and scores actions too; it may then do without items (num_items = 0).
    """

    # As encoder.type in a recipe and "type" in encoder.json
    type: str  # type: ignore[assignment]  # hides Module.type(dtype), a cast that .to(dtype) does too
    SIZES: tuple[str, ...]
    num_items: int
    num_actions: int  # 0: it reads item indices
    hidden_size: int
    max_items: int  # a longer history is cut to its newest max_items items, or events
    vocabulary_sha256: str | None = None  # of the vocabulary it was fitted on; load_encoder sets it
    item_embedding: Any
    action_embedding: nn.Embedding  # (num_actions, D); this and the next with num_actions > 0 only
    action_bias: nn.Parameter  # (num_actions,)

    def forward(self, items: torch.Tensor) -> torch.Tensor:
        """Representation of each history: the state of its newest item. (B, L) → (B, D); an empty row gives zeros.

        Raises:
            UserError: an item index or event code outside the vocabulary (seen on the CPU only; a GPU asserts).
        """
        self.check(items)
        if items.shape[1] == 0:
            return next(self.parameters()).new_zeros(items.shape[0], self.hidden_size)
        return self._states(items[:, -self.reach :])[:, -1]

    def states(self, items: torch.Tensor) -> torch.Tensor:
        """The state after each item. (B, L) → (B, min(L, max_items), D); padding gives zeros. Errors as forward()."""
        self.check(items)
        return self._states(items[:, -self.max_items :])

    def embed(self, read: torch.Tensor) -> torch.Tensor:
        """Vectors of item indices or event codes: (…) → (…, D). Padding gives some vector or other."""
        known = read.clamp(min=0)
        if not self.num_actions:
            return self.item_embedding(known)
        vectors = self.action_embedding(known // (self.num_items + 1))
        if self.num_items:
            items = known % (self.num_items + 1) - 1
            vectors = vectors + self.item_embedding(items.clamp(min=0)) * (items >= 0).unsqueeze(-1)
        return vectors

    def scores(self, representation: torch.Tensor) -> torch.Tensor:
        """Score of every item after a history. (…, D) → (…, num_items)."""
        if not self.num_items:
            return representation.new_empty(*representation.shape[:-1], 0)
        return representation @ self.item_embedding.weight.T

    def action_scores(self, representation: torch.Tensor) -> torch.Tensor:
        """Score of every action after a history, tied to what is read. (…, D) → (…, num_actions).

        Raises:
            ValueError: the encoder reads items alone.
        """
        if not self.num_actions:
            raise ValueError(f"this {self.type} encoder has no actions: fit it on an event dataset")
        return representation @ self.action_embedding.weight.T + self.action_bias

    def sizes(self) -> dict[str, Any]:
        """Arguments that build an encoder of the same shape."""
        return {name: getattr(self, name) for name in self.SIZES}

    @property
    def vocabulary_size(self) -> int:
        """What is read lies in 0 … vocabulary_size - 1: item indices, or event codes."""
        return (self.num_items + 1) * self.num_actions if self.num_actions else self.num_items

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

    def _add_actions(self, num_actions: int, deviation: float = 0.02) -> None:
        """For constructors, as their last line: an encoder without actions then draws what it always drew.

        `deviation` is that of the items' vectors: of a sum the smaller part would be learnt late.
        """
        self.num_actions = num_actions
        if num_actions:
            self.action_embedding = nn.Embedding(num_actions, self.hidden_size)
            nn.init.normal_(self.action_embedding.weight, std=deviation)
            self.action_bias = nn.Parameter(torch.zeros(num_actions))

    def check(self, items: torch.Tensor) -> None:
        """Refuse what lies outside the vocabulary, where looking costs nothing (on the CPU, not compiled)."""
        if torch.compiler.is_compiling() or not items.is_cpu or not items.numel():
            return
        lowest, highest = int(items.min()), int(items.max())
        if not (lowest >= PADDING and highest < self.vocabulary_size):
            raise out_of_vocabulary(lowest, highest, self)


class NoItems(nn.Module):
    """The item embedding of an encoder of actions alone. No empty parameter: one reads as a shard that is missing."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.hidden_size = hidden_size

    @property
    def weight(self) -> torch.Tensor:
        """(0, D), on the CPU."""
        return torch.empty(0, self.hidden_size)


def item_table(num_items: int, hidden_size: int) -> nn.Module:
    """Learned vectors of items, (num_items, D)."""
    return nn.Embedding(num_items, hidden_size) if num_items else NoItems(hidden_size)


def out_of_vocabulary(lowest: int, highest: int, encoder: SequenceEncoder) -> UserError:
    """The error for item indices or event codes that the encoder has no vector for."""
    what, of = "item indices", f"{encoder.num_items} items"
    if encoder.num_actions:
        what, of = "event codes", f"{of} and {encoder.num_actions} actions, which is 0 to {encoder.vocabulary_size - 1}"
    return UserError(
        f"{what} from {lowest} to {highest} are outside the encoder's vocabulary of {of} (-1 is padding): use the "
        "dataset that the encoder was fitted on"
    )
