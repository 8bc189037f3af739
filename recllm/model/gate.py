"""The gate: what a sequence encoder says of a user → how much of each expert this user gets.

Representations (B, D) enter; weights (B, K) leave, float32, each row a point of the simplex.

    z = (e − mean) / deviation          statistics of the training examples, saved with the gate
    g = softmax(gate(z) / temperature)  Instance-wise LoRA: Kong et al., NeurIPS 2024, eq. 7

Two things that the released code of this method does are not done here: batch normalisation (a user's weights would
depend on who else is in the batch) and raw representations (SASRec states share a large common component, on which
the softmax collapses to one expert within some fifty steps). A row of zeros is an empty history: it gets exactly 1/K,
the plain LoRA, because there is nothing to adapt to.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from recllm.errors import UserError

MIN_DEVIATION = 1e-6  # below it a dimension is constant: it is centred, not blown up


class Gate(nn.Module):
    """Standardise → linear layer or MLP → softmax with temperature. D: representation_size, K: num_experts."""

    mean: torch.Tensor  # (D,)
    deviation: torch.Tensor  # (D,)

    def __init__(
        self, representation_size: int, num_experts: int, hidden_size: int = 0, temperature: float = 1.0
    ) -> None:
        super().__init__()
        self.representation_size, self.num_experts = representation_size, num_experts
        self.hidden_size, self.temperature = hidden_size, temperature
        self.hidden = Float32Linear(representation_size, hidden_size) if hidden_size else None
        self.output = Float32Linear(hidden_size or representation_size, num_experts)
        # Zero: training starts at the plain LoRA for every user and no expert is ahead by chance. The experts still
        # part, because their A and B are drawn apart: only equal experts would keep the gate's gradient at zero.
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)
        self.register_buffer("mean", torch.zeros(representation_size))
        self.register_buffer("deviation", torch.ones(representation_size))

    def forward(self, representation: torch.Tensor) -> torch.Tensor:
        """(B, D) → (B, K), rows sum to 1; rows of zeros (empty histories) get exactly 1/K."""
        with torch.autocast(representation.device.type, enabled=False):
            representation = representation.float()
            x = (representation - self.mean) / self.deviation
            if self.hidden is not None:
                x = functional.gelu(self.hidden(x))
            weights = torch.softmax(self.output(x) / self.temperature, dim=-1)  # (B, K)
        empty = (representation == 0).all(dim=-1, keepdim=True)  # (B, 1)
        return torch.where(empty, 1 / self.num_experts, weights)

    @torch.no_grad()
    def fit_statistics(self, representations: torch.Tensor) -> None:
        """Set mean and deviation from the representations (N, D) of the training examples, without empty histories.

        Raises:
            UserError: fewer than two histories, or a representation that is not finite.
        """
        kept = representations[(representations != 0).any(dim=-1)].double().cpu()
        if len(kept) < 2 or not torch.isfinite(kept).all():
            raise UserError(
                f"{len(kept)} non-empty histories, finite: {bool(torch.isfinite(kept).all())}; the gate's statistics "
                "need at least 2 finite ones: check the dataset's history and the sequence encoder"
            )
        deviation = kept.std(dim=0, correction=0)
        self.mean.copy_(kept.mean(dim=0))
        self.deviation.copy_(torch.where(deviation > MIN_DEVIATION, deviation, 1.0))

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """Moves with the model but keeps mean and deviation in float32: half precision would eat the difference."""
        before = {"mean": self.mean, "deviation": self.deviation}
        super()._apply(fn, recurse)
        for name, value in before.items():
            moved = getattr(self, name)
            if moved.dtype != torch.float32:
                setattr(self, name, value.to(moved.device))
        return self


class Float32Linear(nn.Linear):
    """A linear layer that computes in float32, whatever its parameters were cast to (bf16 engines cast all)."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(B, in) → (B, out), float32."""
        return functional.linear(input.float(), self.weight.float(), self.bias.float())
