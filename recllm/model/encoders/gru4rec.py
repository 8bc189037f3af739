"""GRU4Rec: a recurrent state that is carried from item to item, so its cost is linear in the length of a history.

Item indices or event codes (B, L) enter: oldest first, padded on the LEFT with -1. States (B, L, D) leave.

Source: Hidasi et al., "Session-based Recommendations with Recurrent Neural Networks", ICLR 2016: item embedding, GRU
layers, a score for every item from the last state (figure 1). Here the scores are tied to the item embedding, as in the
authors' later code (`constrained_embedding`), and a layer norm gives them the scale that SASRec's have.
"""

import math

import torch
from torch import nn
from torch.nn import functional

from recllm.model.encoders.interface import PADDING, SequenceEncoder, item_table


class Gru4Rec(SequenceEncoder):
    """The encoder: reads all of the newest `max_items` items, however many they are."""

    type = "gru4rec"
    SIZES: tuple[str, ...] = ("num_items", "hidden_size", "num_layers", "dropout", "max_items", "num_actions")

    def __init__(
        self,
        num_items: int,
        hidden_size: int = 64,
        num_layers: int = 2,
        dropout: float = 0.2,
        max_items: int = 200,
        num_actions: int = 0,
    ) -> None:
        super().__init__()
        self.num_items, self.hidden_size, self.num_layers = num_items, hidden_size, num_layers
        self.dropout, self.max_items = dropout, max_items
        self.item_embedding = item_table(num_items, hidden_size)
        if num_items:
            nn.init.normal_(self.item_embedding.weight, std=0.02)
        between = dropout if num_layers > 1 else 0.0
        self.gru = nn.GRU(hidden_size, hidden_size, num_layers, batch_first=True, dropout=between)
        self.norm = nn.LayerNorm(hidden_size)
        self._spread_time_scales()
        self._add_actions(num_actions)

    @torch.no_grad()
    def _spread_time_scales(self) -> None:
        """Let units forget over 1 … max_items steps, evenly on a log scale; by chance all would within a few steps.

        A unit keeps the share σ(b) of its state a step, so b = log(T) lets it last for about T steps (Tallec &
        Ollivier, "Can recurrent neural networks warp time?", ICLR 2018, the chrono initialisation; T uniform there).
        """
        for layer in range(self.num_layers):
            keep = slice(self.hidden_size, 2 * self.hidden_size)  # torch's order of gates: reset, update, new
            getattr(self.gru, f"bias_ih_l{layer}")[keep].uniform_(0.0, math.log(max(self.max_items, 2)))
            getattr(self.gru, f"bias_hh_l{layer}")[keep].zero_()

    def numbers_a_row(self, length: int) -> int:
        """Linear in the length: inputs, gates and states of a layer."""
        return length * 8 * self.hidden_size

    def _states(self, items: torch.Tensor) -> torch.Tensor:
        # A recurrence runs through left padding; behind the history it does no harm. So: to the left, run, and back.
        real = items != PADDING  # (B, L)
        steps = torch.arange(items.shape[1], device=items.device)
        shift = (~real).sum(dim=1, keepdim=True)  # (B, 1)
        shifted = items.gather(1, (steps + shift).clamp(max=items.shape[1] - 1))
        x = self.embed(shifted) * self.hidden_size**0.5
        states, _ = self.gru(functional.dropout(x, self.dropout, self.training))  # (B, L, D)
        back = (steps - shift).clamp(min=0).unsqueeze(-1).expand_as(states)
        states = functional.dropout(states.gather(1, back), self.dropout, self.training)
        return self.norm(states) * real.unsqueeze(-1)
