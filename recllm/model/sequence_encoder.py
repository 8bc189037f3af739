"""SASRec: what a user did → one vector, and a score for every item.

Item indices (B, L) enter: oldest first, padded on the LEFT with -1. A representation (B, D) of each history leaves: it
guides the gate, and its scores are the SASRec baseline.

Source: Kang & McAuley, "Self-Attentive Sequential Recommendation", ICDM 2018: item embedding plus learned position
(eq. 1), causal self-attention (eq. 2 to 4) and a point-wise feed-forward of the same width (eq. 5), scores by the tied
item embedding (section III-E). The layer norm stands before each block, as in the authors' code, and once at the end.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

from recllm.errors import UserError
from recllm.files import read_json, replacing_folder, write_json

PADDING = -1
WEIGHTS, SIZES = "encoder.safetensors", "encoder.json"


class SASRec(nn.Module):
    """The sequence encoder. D is `hidden_size`.

    Positions are counted from the newest item (0) backwards, so that neither left padding nor cutting a long history to
    its last `max_items` changes what a state sees.
    """

    def __init__(
        self,
        num_items: int,
        hidden_size: int = 64,
        num_layers: int = 2,
        num_heads: int = 2,
        dropout: float = 0.2,
        max_items: int = 200,
    ) -> None:
        super().__init__()
        if hidden_size % num_heads:
            raise UserError(
                f"encoder.hidden_size={hidden_size} does not split into num_heads={num_heads} equal heads: "
                f"take a multiple of {num_heads}"
            )
        self.num_items, self.hidden_size, self.num_layers = num_items, hidden_size, num_layers
        self.num_heads, self.dropout, self.max_items = num_heads, dropout, max_items
        self.vocabulary_sha256: str | None = None  # of the item vocabulary it was fitted on; load_encoder sets it
        self.item_embedding = nn.Embedding(num_items, hidden_size)
        self.position_embedding = nn.Embedding(max_items, hidden_size)
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads, dropout) for _ in range(num_layers))
        self.norm = nn.LayerNorm(hidden_size)
        for embedding in (self.item_embedding, self.position_embedding):
            nn.init.normal_(embedding.weight, std=0.02)  # with the final norm: first scores have deviation 0.02 √D

    def forward(self, items: torch.Tensor) -> torch.Tensor:
        """Representation of each history: the state of its newest item. (B, L) → (B, D); an empty row gives zeros."""
        if items.shape[1] == 0:
            return self.item_embedding.weight.new_zeros(items.shape[0], self.hidden_size)
        return self.states(items)[:, -1]

    def states(self, items: torch.Tensor) -> torch.Tensor:
        """The state after each item. (B, L) → (B, min(L, max_items), D); padding gives zeros.

        A history longer than `max_items` is cut to its newest items.

        Raises:
            UserError: an item index outside the vocabulary (seen on the CPU only; a GPU asserts).
        """
        self._check(items)
        items = items[:, -self.max_items :]
        real = items != PADDING  # (B, L)
        from_newest = torch.arange(items.shape[1] - 1, -1, -1, device=items.device)
        # √D: the scale that the item embedding has against the position in the paper's code
        x = self.item_embedding(items.clamp(min=0)) * self.hidden_size**0.5 + self.position_embedding(from_newest)
        x = functional.dropout(x, self.dropout, self.training)
        mask = attention_mask(real)
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x) * real.unsqueeze(-1)

    def scores(self, representation: torch.Tensor) -> torch.Tensor:
        """Score of every item after a history. (…, D) → (…, num_items)."""
        return representation @ self.item_embedding.weight.T

    def _check(self, items: torch.Tensor) -> None:
        if items.is_cpu and items.numel() and not (int(items.min()) >= -1 and int(items.max()) < self.num_items):
            raise UserError(
                f"item indices from {int(items.min())} to {int(items.max())} are outside the encoder's vocabulary of "
                f"{self.num_items} items (-1 is padding): use the dataset that the encoder was fitted on"
            )


class Block(nn.Module):
    """Causal self-attention and a point-wise feed-forward, each with a layer norm before and a residual around it."""

    def __init__(self, hidden_size: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.attention_norm, self.feed_forward_norm = nn.LayerNorm(hidden_size), nn.LayerNorm(hidden_size)
        self.query_key_value = nn.Linear(hidden_size, 3 * hidden_size)
        self.attention_output = nn.Linear(hidden_size, hidden_size)
        self.inner, self.outer = nn.Linear(hidden_size, hidden_size), nn.Linear(hidden_size, hidden_size)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """(B, L, D), (B, 1, L, L) → (B, L, D)."""
        x = x + self._drop(self._attend(self.attention_norm(x), mask))
        inner = self._drop(functional.relu(self.inner(self.feed_forward_norm(x))))
        return x + self._drop(self.outer(inner))

    def _attend(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        heads = self.query_key_value(x).view(batch, length, 3, self.num_heads, width // self.num_heads)
        query, key, value = heads.permute(2, 0, 3, 1, 4)  # each (B, heads, L, D / heads)
        dropout = self.dropout if self.training else 0.0
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
        return self.attention_output(mixed.transpose(1, 2).reshape(batch, length, width))

    def _drop(self, x: torch.Tensor) -> torch.Tensor:
        return functional.dropout(x, self.dropout, self.training)


def attention_mask(real: torch.Tensor) -> torch.Tensor:
    """(B, L) → (B, 1, L, L), True where a position (third axis) may look (fourth axis): back, and not at padding.

    Every position may look at itself: a row of padding would otherwise have a softmax over nothing, which is NaN.
    """
    length = real.shape[1]
    back = torch.ones(length, length, dtype=torch.bool, device=real.device).tril()
    itself = torch.eye(length, dtype=torch.bool, device=real.device)
    return ((back & real.unsqueeze(1)) | itself).unsqueeze(1)


def save_encoder(encoder: SASRec, folder: Path, vocabulary_sha256: str, extra: dict[str, Any]) -> None:
    """Write the encoder as a folder: encoder.safetensors, and encoder.json with its sizes, vocabulary and `extra`."""
    with replacing_folder(Path(folder)) as staging:
        write_encoder(encoder.state_dict(), describe(encoder, vocabulary_sha256) | extra, staging)


def write_encoder(weights: dict[str, torch.Tensor], info: dict[str, Any], folder: Path) -> None:
    """The two files of an encoder, into an existing folder that the caller moves into place."""
    # clone: safetensors refuses tensors that share memory
    save_file({name: value.detach().cpu().clone() for name, value in weights.items()}, folder / WEIGHTS)
    (folder / WEIGHTS).chmod(0o644)  # safetensors makes 0600
    write_json(folder / SIZES, info)


def describe(encoder: SASRec, vocabulary_sha256: str | None) -> dict[str, Any]:
    """What encoder.json says of an encoder: enough to build it again."""
    sizes = ("num_items", "hidden_size", "num_layers", "num_heads", "dropout", "max_items")
    return {"type": "sasrec", "vocabulary_sha256": vocabulary_sha256} | {name: getattr(encoder, name) for name in sizes}


def load_encoder(folder: Path) -> tuple[SASRec, dict[str, Any]]:
    """The encoder of a folder, in eval mode on the CPU, and what its encoder.json says (sizes, metrics, …).

    Raises:
        UserError: a file is missing, truncated or does not fit the other.
    """
    folder = Path(folder)
    info = read_json(folder / SIZES, "the sizes of a sequence encoder")
    try:
        encoder = SASRec(
            **{k: info[k] for k in ("num_items", "hidden_size", "num_layers", "num_heads", "dropout", "max_items")}
        )
    except KeyError as missing:
        raise UserError(f"{folder / SIZES}: no {missing}, a sequence encoder needs it: fit the encoder again") from None
    encoder.vocabulary_sha256 = info.get("vocabulary_sha256")
    weights = read_tensors(folder / WEIGHTS, "the weights of a sequence encoder")
    try:
        encoder.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"{folder / WEIGHTS} does not fit {SIZES} beside it ({error}): fit the encoder again") from None
    return encoder.eval(), info


def read_tensors(path: Path, what: str) -> dict[str, torch.Tensor]:
    """Tensors of a safetensors file, on the CPU.

    Raises:
        UserError: the file is missing or truncated.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist: it should hold {what}. Run the stage that writes it again")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{path} is damaged ({error}); it should hold {what}. Run the stage that writes it again"
        ) from None
