"""SASRec: self-attention over the history, over all of it or within a window.

Item indices or event codes (B, L) enter: oldest first, padded on the LEFT with -1. States (B, L, D) leave.

Source: Kang & McAuley, "Self-Attentive Sequential Recommendation", ICDM 2018: item embedding plus learned position
(eq. 1), causal self-attention (eq. 2 to 4) and a point-wise feed-forward of the same width (eq. 5), scores by the tied
item embedding (section III-E). The layer norm stands before each block, as in the authors' code, and once at the end.

With `window` = w > 0 a state attends to itself and at most w items before it in each layer (Beltagy et al.,
"Longformer", 2020, section 3.1, here causal). Computed in chunks: time and memory O(L · w) in place of O(L²).
"""

import functools
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

from recllm.errors import UserError
from recllm.model.encoders.interface import PADDING, SequenceEncoder, item_table

MIN_CHUNK = 32  # smaller chunks of a narrow window would be mostly overhead
Attention = Callable[..., torch.Tensor]  # query, key, value (B, heads, L, D / heads), dropout → the same shape


class SASRec(SequenceEncoder):
    """The encoder. Positions are counted from the newest item (0) backwards.

    So neither left padding nor cutting a long history to its last `max_items` changes what a state sees. With a window
    a representation hangs on the newest num_layers · window + 1 items (`reach`): farther items are not read, have no
    position of their own, and `states` gives them the last one.
    """

    type = "sasrec"
    SIZES: tuple[str, ...] = (
        "num_items",
        "hidden_size",
        "num_layers",
        "num_heads",
        "dropout",
        "max_items",
        "window",
        "num_actions",
    )

    def __init__(
        self,
        num_items: int,
        hidden_size: int = 64,
        num_layers: int = 2,
        num_heads: int = 2,
        dropout: float = 0.2,
        max_items: int = 200,
        window: int = 0,
        num_actions: int = 0,
        item_embedding: nn.Module | None = None,
    ) -> None:
        """`item_embedding` takes the place of the learned vectors (see SequenceEncoder), of length about 1 at first."""
        super().__init__()
        if hidden_size % num_heads:
            raise UserError(
                f"encoder.hidden_size={hidden_size} does not split into num_heads={num_heads} equal heads: "
                f"take a multiple of {num_heads}"
            )
        self.num_items, self.hidden_size, self.num_layers = num_items, hidden_size, num_layers
        self.num_heads, self.dropout, self.max_items, self.window = num_heads, dropout, max_items, window
        self.item_embedding = item_table(num_items, hidden_size) if item_embedding is None else item_embedding
        self.position_embedding = nn.Embedding(self.reach, hidden_size)
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads, dropout) for _ in range(num_layers))
        self.norm = nn.LayerNorm(hidden_size)
        for embedding in (self.item_embedding, self.position_embedding):
            if isinstance(embedding, nn.Embedding):  # with the final norm: first scores have deviation 0.02 √D
                nn.init.normal_(embedding.weight, std=0.02)
        self._add_actions(num_actions, 0.02 if item_embedding is None else hidden_size**-0.5)

    @property
    def reach(self) -> int:
        """max_items, or with a window what the layers can hand on from window to window."""
        return min(self.max_items, self.num_layers * self.window + 1) if self.window else self.max_items

    def numbers_a_row(self, length: int) -> int:
        """Activations and attention: quadratic in the length without a window, linear with one."""
        seen = min(length, 2 * max(self.window, MIN_CHUNK)) if self.window else length
        return length * (8 * self.hidden_size + self.num_heads * seen)

    def _states(self, items: torch.Tensor) -> torch.Tensor:
        real = items != PADDING  # (B, L)
        from_newest = torch.arange(items.shape[1] - 1, -1, -1, device=items.device).clamp(max=self.reach - 1)
        # √D: the scale that the item embedding has against the position in the paper's code
        x = self.embed(items) * self.hidden_size**0.5 + self.position_embedding(from_newest)
        x = functional.dropout(x, self.dropout, self.training)
        attention = attention_over(real, self.window)
        for block in self.blocks:
            x = block(x, attention)
        return self.norm(x) * real.unsqueeze(-1)


class Block(nn.Module):
    """Causal self-attention and a point-wise feed-forward, each with a layer norm before and a residual around it."""

    def __init__(self, hidden_size: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.attention_norm, self.feed_forward_norm = nn.LayerNorm(hidden_size), nn.LayerNorm(hidden_size)
        self.query_key_value = nn.Linear(hidden_size, 3 * hidden_size)
        self.attention_output = nn.Linear(hidden_size, hidden_size)
        self.inner, self.outer = nn.Linear(hidden_size, hidden_size), nn.Linear(hidden_size, hidden_size)

    def forward(self, x: torch.Tensor, attention: Attention) -> torch.Tensor:
        """(B, L, D) → (B, L, D)."""
        x = x + self._drop(self._attend(self.attention_norm(x), attention))
        inner = self._drop(functional.relu(self.inner(self.feed_forward_norm(x))))
        return x + self._drop(self.outer(inner))

    def _attend(self, x: torch.Tensor, attention: Attention) -> torch.Tensor:
        batch, length, width = x.shape
        heads = self.query_key_value(x).view(batch, length, 3, self.num_heads, width // self.num_heads)
        query, key, value = heads.permute(2, 0, 3, 1, 4)  # each (B, heads, L, D / heads)
        mixed = attention(query, key, value, dropout_p=self.dropout if self.training else 0.0)
        return self.attention_output(mixed.transpose(1, 2).reshape(batch, length, width))

    def _drop(self, x: torch.Tensor) -> torch.Tensor:
        return functional.dropout(x, self.dropout, self.training)


def attention_over(real: torch.Tensor, window: int) -> Attention:
    """The attention of histories whose real positions are given (B, L): all at once, or in chunks of a window."""
    if not window or real.shape[1] <= window + 1:  # so short that the window cuts nothing off
        return functools.partial(functional.scaled_dot_product_attention, attn_mask=attention_mask(real))
    return functools.partial(windowed_attention, mask=window_mask(real, window), window=window)


def attention_mask(real: torch.Tensor, window: int = 0) -> torch.Tensor:
    """(B, L) → (B, 1, L, L), True where a position (third axis) may look (fourth axis): back, and not at padding.

    Every position may look at itself: a row of padding would otherwise have a softmax over nothing, which is NaN.
    """
    length = real.shape[1]
    back = torch.ones(length, length, dtype=torch.bool, device=real.device).tril()
    if window:
        back = back.triu(-window)
    itself = torch.eye(length, dtype=torch.bool, device=real.device)
    return ((back & real.unsqueeze(1)) | itself).unsqueeze(1)


def window_mask(real: torch.Tensor, window: int) -> torch.Tensor:
    """(B, L) → (B · n, 1, C, w + C): `attention_mask` of n chunks of C queries over the w keys before and their own."""
    chunk = max(window, MIN_CHUNK)
    front = -real.shape[1] % chunk + window
    keys = functional.pad(real, (front, 0)).unfold(1, window + chunk, chunk).flatten(0, 1)  # (B · n, w + C)
    # query i is key i + w of its chunk and sees keys i … i + w
    band = torch.ones(chunk, window + chunk, dtype=torch.bool, device=real.device).triu().tril(window)
    itself = band & band.new_ones(band.shape).triu(window)
    return ((band & keys.unsqueeze(1)) | itself).unsqueeze(1)


def windowed_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, mask: torch.Tensor, window: int, dropout_p: float
) -> torch.Tensor:
    """Attention of each position to itself and the `window` before it: (B, heads, L, d) each → (B, heads, L, d)."""
    batch, heads, length, width = query.shape
    chunk = max(window, MIN_CHUNK)
    front = -length % chunk  # whole chunks: padding on the left, as everywhere

    def chunks(x: torch.Tensor, before: int) -> torch.Tensor:
        """(B, heads, L, d) → (B · n, heads, before + C, d)."""
        padded = functional.pad(x, (0, 0, front + before, 0)).unfold(2, before + chunk, chunk)  # (B, heads, n, d, …)
        return padded.permute(0, 2, 1, 4, 3).flatten(0, 1)

    mixed = functional.scaled_dot_product_attention(
        chunks(query, 0), chunks(key, window), chunks(value, window), attn_mask=mask, dropout_p=dropout_p
    )
    return mixed.unflatten(0, (batch, -1)).transpose(1, 2).reshape(batch, heads, -1, width)[:, :, front:]
