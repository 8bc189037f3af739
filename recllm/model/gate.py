"""The gate: what a sequence encoder says of a user → how much of each expert this user gets.

Representations (B, D) enter; weights leave, float32: (B, K), or (B, layers, K) with one gate for each decoder layer.

    z = (e − mean) / deviation             statistics of the training examples, saved with the gate
    g = softmax(gate(z) / temperature)     over K experts, or its top k (Instance-wise LoRA: Kong et al. 2024, eq. 7)
    g = sigmoid(gate(z) / temperature)     or one for each rank, K = R

Two things that the released code of this method does are not done here: batch normalisation (a user's weights would
depend on who else is in the batch) and raw representations (SASRec states share a large common component, on which
the softmax collapses to one expert within some fifty steps). A row of zeros is an empty history: it gets exactly the
uniform weights, 1/K (of a sigmoid 1/2), which is the plain LoRA, because there is nothing to adapt to.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from recllm.errors import UserError

MIN_DEVIATION = 1e-6  # below it a dimension is constant: it is centred, not blown up


class Standardised(nn.Module):
    """A module that reads representations (…, D) standardised: by the mean and deviation of the training examples."""

    mean: torch.Tensor  # (D,)
    deviation: torch.Tensor  # (D,)

    def __init__(self, representation_size: int) -> None:
        super().__init__()
        self.representation_size = representation_size
        self.register_buffer("mean", torch.zeros(representation_size))
        self.register_buffer("deviation", torch.ones(representation_size))

    def standardise(self, representation: torch.Tensor) -> torch.Tensor:
        """(…, D) → (…, D), float32: (e − mean) / deviation."""
        return (representation.float() - self.mean) / self.deviation

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


class Gate(Standardised):
    """Standardise → linear layer or MLP → softmax over experts, or sigmoid a rank, with temperature.

    D: representation_size, K: num_experts. With `num_layers` there is one gate for each decoder layer: an MLP's hidden
    layer is shared by them, the output layer has (layers · K) rows. `top_k` keeps the k largest experts, renormalised;
    experts tied with the k-th are kept too, so that at the start, where all are tied, every user has all of them.
    """

    def __init__(
        self,
        representation_size: int,
        num_experts: int,
        hidden_size: int = 0,
        temperature: float = 1.0,
        gate_type: str = "softmax",
        top_k: int | None = None,
        num_layers: int | None = None,
    ) -> None:
        super().__init__(representation_size)
        self.num_experts, self.gate_type, self.top_k, self.num_layers = num_experts, gate_type, top_k, num_layers
        self.hidden_size, self.temperature = hidden_size, temperature
        self.hidden = Float32Linear(representation_size, hidden_size) if hidden_size else None
        self.output = Float32Linear(hidden_size or representation_size, num_experts * (num_layers or 1))
        # Zero: training starts at the plain LoRA for every user and no expert is ahead by chance. The experts still
        # part, because their A and B are drawn apart: only equal experts would keep the gate's gradient at zero.
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one user's weights: (K,), or (layers, K)."""
        return (self.num_experts,) if self.num_layers is None else (self.num_layers, self.num_experts)

    @property
    def uniform(self) -> float:
        """The weight of each expert that makes the plain LoRA: 1/K of a softmax, 1/2 of a sigmoid."""
        return 0.5 if self.gate_type == "sigmoid" else 1 / self.num_experts

    def forward(self, representation: torch.Tensor) -> torch.Tensor:
        """(B, D) → (B, K) or (B, layers, K), float32; rows of zeros (empty histories) get exactly the uniform weights.

        A softmax's last dimension sums to 1; a sigmoid's weights lie each in (0, 1).
        """
        with torch.autocast(representation.device.type, enabled=False):
            x = self.standardise(representation)
            if self.hidden is not None:
                x = functional.gelu(self.hidden(x))
            logits = (self.output(x) / self.temperature).unflatten(-1, self.shape)
            weights = torch.sigmoid(logits) if self.gate_type == "sigmoid" else softmax(logits, self.top_k)
        empty = (representation == 0).all(dim=-1)  # (B,)
        return torch.where(empty.view(-1, *(1 for _ in self.shape)), self.uniform, weights)


def softmax(logits: torch.Tensor, top_k: int | None = None) -> torch.Tensor:
    """Softmax over the last dimension, or over its `top_k` largest and what is tied with them: the others get 0.

    Only the kept ones have a gradient (Shazeer et al., "Outrageously Large Neural Networks", ICLR 2017, eq. 3 and 5,
    without its noise).
    """
    if top_k is not None and top_k < logits.shape[-1]:
        smallest_kept = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < smallest_kept, -math.inf)
    return torch.softmax(logits, dim=-1)


def rank_factor(weights: torch.Tensor, r: int, gate_type: str = "softmax") -> torch.Tensor:
    """What a gate's weights multiply A x by: (…, K) → (…, R), float32; all ones where the weights are uniform.

    softmax: K · repeat(g, R/K), the experts being equal stretches of the rank. sigmoid: 2 · g, with K = R.
    """
    if gate_type == "sigmoid":
        return 2 * weights.float()
    num_experts = weights.shape[-1]
    return (weights.float() * num_experts).repeat_interleave(r // num_experts, dim=-1)


def check_finite(rows: torch.Tensor, what: str) -> None:
    """Refuse rows (B, …) with NaN or infinity.

    Raises:
        UserError: names the first such row.
    """
    finite = torch.isfinite(rows).flatten(1).all(dim=1)  # (B,)
    if not finite.all():
        row = int((~finite).nonzero()[0])
        raise UserError(
            f"{what}: row {row} of {len(rows)} is not finite ({int((~finite).sum())} such rows): finite numbers are "
            "expected, check the sequence encoder, the gate and where the rows come from"
        )


class Float32Linear(nn.Linear):
    """A linear layer that computes in float32, whatever its parameters were cast to (bf16 engines cast all)."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(B, in) → (B, out), float32."""
        return functional.linear(input.float(), self.weight.float(), self.bias.float())


# ---- are all experts used? ----


def load_balancing_loss(weights: torch.Tensor) -> torch.Tensor:
    """How unevenly a batch uses the experts: a scalar, 0 where each has the same weight on average, K − 1 at most.

    The squared coefficient of variation of the experts' mean weights m over the batch, mean(m²) / mean(m)² − 1 (the
    importance loss of Shazeer et al., ICLR 2017, eq. 6 and 7); for a softmax that is K · Σ m² − 1. A gate a layer gives
    the mean over layers. Single users may still prefer one expert each: only their mean is pulled to be even.

    Args:
        weights: (B, K) or (B, layers, K), as the gate gives them.
    """
    mean = weights.float().mean(dim=0)  # (K,) or (layers, K)
    return (mean.square().mean(dim=-1) / mean.mean(dim=-1).square() - 1).mean()


STUCK_BELOW, STUCK_ABOVE = 0.1, 0.9


@torch.no_grad()
def collapse(weights: torch.Tensor) -> dict[str, Any]:
    """Whether a gate still uses its experts, from the weights of many users: a small document for logs and reports.

    Users whose weights are all equal (empty histories, an untrained gate) do not count. Of a gate a layer each number
    is the mean over layers. The keys:

        num_users          users that count
        entropy            of the experts' shares of the mean weight, as a share of log K: 1 is even use, 0 one expert
        largest_mean       largest share of the mean weight that one expert has
        top_expert_share   share of users whose strongest expert is the most common strongest one
        stuck_experts      share of experts that are the same for nearly everybody: mean weight below 0.1 of the uniform
                           one (nobody uses it), or above 0.9 (all have it in full)
        collapsed_layers   share of layers with largest_mean > 0.9 or stuck_experts >= 1/2; a shared gate is one layer
        collapsed          collapsed_layers >= 1/2; never with one expert

    On raw SASRec states a softmax gate came to a largest_mean of 0.98. A sigmoid gate that saturates alike for all, and
    a top-k gate that picks the same experts for all, show in stuck_experts.

    Args:
        weights: (N, K) or (N, layers, K).

    Raises:
        UserError: weights that are not finite.
    """
    check_finite(weights, "gate_weights")
    weights = weights.float() if weights.dim() == 3 else weights.float().unsqueeze(1)  # (N, layers, K)
    num_experts = weights.shape[-1]
    weights = weights[(weights.amax(-1) > weights.amin(-1)).any(-1)]
    if num_experts < 2 or not len(weights):
        even = {"entropy": 1.0, "largest_mean": 1 / num_experts, "top_expert_share": 1 / num_experts}
        return {"num_users": len(weights)} | even | {"stuck_experts": 0.0, "collapsed_layers": 0.0, "collapsed": False}
    # the rows of a softmax sum to 1, those of a sigmoid do so at most by chance
    is_softmax = bool((weights.sum(-1) - 1).abs().max() < 1e-3)
    uniform = 1 / num_experts if is_softmax else 0.5
    mean = weights.mean(0)  # (layers, K)
    shares = mean / mean.sum(-1, keepdim=True)
    strongest = functional.one_hot(weights.argmax(-1), num_experts).float().mean(0)  # (layers, K)
    largest = shares.amax(-1)  # (layers,)
    stuck = ((mean < STUCK_BELOW * uniform) | (mean > STUCK_ABOVE)).float().mean(-1)  # (layers,)
    collapsed = ((largest > STUCK_ABOVE) | (stuck >= 0.5)).float().mean().item()
    return {
        "num_users": len(weights),
        "entropy": torch.special.entr(shares).sum(-1).mean().item() / math.log(num_experts),
        "largest_mean": largest.mean().item(),
        "top_expert_share": strongest.amax(-1).mean().item(),
        "stuck_experts": stuck.mean().item(),
        "collapsed_layers": collapsed,
        "collapsed": collapsed >= 0.5,
    }
