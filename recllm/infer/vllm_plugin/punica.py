"""vLLM's LoRA kernels with a gate between shrink and expand.

Per step, the factors of the batch's requests enter (`StepGates.write`); in every LoRA layer the activations A x of each
token, (slices, tokens, rank), are multiplied by its request's row before they are expanded by B. The hook is
`add_expand`: all ways of vLLM's tensor parallelism call it with the whole rank. Imports vLLM.

The factors stand in one buffer of fixed address, ones where nothing is gated, so that captured CUDA graphs and compiled
code read what the current step wrote. What the host writes is double-buffered: a copy that is still under way is never
overwritten (asynchronous scheduling prepares a step while the last one runs).
"""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU

from recllm.infer.vllm_plugin.gates import unpack

LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|block)\.(\d+)\.")  # in a module's name, as model/ilora.py's

Packed = Sequence[Any]  # the factors of one request, as `Factors.packed` made them


class StepGates:
    """The factors of a step's tokens.

    Args:
        layers: decoder layers where gates a layer are served, 1 where all gates are shared.
        max_tokens, max_requests: the most in a step.
        max_rank: of the engine's LoRA slots.
        device: where the model runs.
    """

    def __init__(self, layers: int, max_tokens: int, max_requests: int, max_rank: int, device: torch.device) -> None:
        self.layers, self.device = layers, torch.device(device)
        self.factors = torch.ones(layers, max_tokens, max_rank, dtype=torch.float32, device=device)
        self.gated_tokens = 0  # the first so many rows of factors may differ from 1
        self.gated_steps = 0  # in which gates were written, since the start
        self.version = 0  # of the factors
        on_gpu = self.device.type != "cpu"
        self._rows = [torch.ones(max_requests, layers, max_rank, pin_memory=on_gpu) for _ in range(1 + on_gpu)]
        self._owners = [torch.zeros(max_tokens, dtype=torch.int64, pin_memory=on_gpu) for _ in range(1 + on_gpu)]
        self._copied: list[Any] = [None, None]  # CUDA events: when the buffers of that number may be written again
        self._turn = 0
        self._step: tuple[list[Packed | None], list[int]] | None = None  # gates and counts of the last one

    def write(self, gates: Sequence[Packed | None], counts: npt.NDArray[np.integer]) -> None:
        """The gate of each request of the step, None for those without, and how many tokens it has.

        A step with the gates and counts of the last one (decoding goes on) changes nothing.
        """
        step = list(gates), counts.tolist()  # compared by identity first: a request's gate stays one object
        if step == self._step:
            return
        self._step = step
        self.version += 1
        tokens = int(counts.sum())
        if not any(gate is not None for gate in gates):
            if self.gated_tokens:
                self.factors[:, : self.gated_tokens].fill_(1.0)
                self.gated_tokens = 0
            return
        self.gated_steps += 1
        host, owners = self._next_buffers()
        rows = host.numpy()[: len(gates)]  # (requests, layers, rank)
        rows.fill(1.0)
        for row, gate in zip(rows, gates):
            if gate is not None:
                factors = unpack(gate)
                row[:, : factors.shape[1]] = factors
        owners.numpy()[:tokens] = np.repeat(np.arange(len(gates)), counts)
        used = host[: len(gates)].to(self.device, non_blocking=True)
        index = owners[:tokens].to(self.device, non_blocking=True)
        self._mark_copied()
        for layer in range(self.layers):
            torch.index_select(used[:, layer], 0, index, out=self.factors[layer, :tokens])
        if self.gated_tokens > tokens:
            self.factors[:, tokens : self.gated_tokens].fill_(1.0)
        self.gated_tokens = tokens

    def _next_buffers(self) -> tuple[torch.Tensor, torch.Tensor]:
        self._turn = (self._turn + 1) % len(self._rows)
        if self._copied[self._turn] is not None:
            self._copied[self._turn].synchronize()
        return self._rows[self._turn], self._owners[self._turn]

    def _mark_copied(self) -> None:
        if self.device.type == "cuda":
            if self._copied[self._turn] is None:
                self._copied[self._turn] = torch.cuda.Event()
            self._copied[self._turn].record()


class Gated:
    """What both kernels share: the step's gates, and a view of themselves for each decoder layer."""

    gates: StepGates

    def of_layer(self, layer: int) -> "LayerView":
        """The same kernels, as a module of that decoder layer calls them."""
        return LayerView(self, layer)

    def expand_gated(self, layer: int, *arguments: Any, **options: Any) -> None:
        """`add_expand` with the factors of a layer."""
        raise NotImplementedError  # each kernel's own, see the classes below

    def add_expand(self, *arguments: Any, **options: Any) -> None:
        """With the factors of all layers, or without any where each layer has its own and this module is in none."""
        if self.gates.layers == 1:
            self.expand_gated(0, *arguments, **options)
        else:
            super().add_expand(*arguments, **options)  # type: ignore[misc]  # the kernel, of which this is a mixin


class LayerView:
    """A wrapper as one decoder layer's modules see it: everything is the wrapper's, but the factors are its layer's."""

    def __init__(self, wrapper: Any, layer: int) -> None:
        self._wrapper, self._layer, self._kind = wrapper, layer, type(wrapper)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapper, name)

    def add_expand(self, *arguments: Any, **options: Any) -> None:
        """`add_expand` with this layer's factors."""
        self._wrapper.expand_gated(self._layer, *arguments, **options)

    def add_lora_linear(self, *arguments: Any, **options: Any) -> None:
        """The wrapper's own, which calls add_expand: with this view in its place."""
        self._kind.add_lora_linear(self, *arguments, **options)

    def linear_gated(self, _: int | None, *arguments: Any) -> None:
        """The CPU's way by stretches, with this layer's factors."""
        self._wrapper.linear_gated(self._layer, *arguments)


class GatedPunicaCPU(Gated, PunicaWrapperCPU):
    """On a CPU, where LoRA layers are never compiled (vLLM runs them eagerly).

    vLLM's own kernels gather an A and a B for every token, which costs more than the base model, and where all slots
    are taken they give requests without a LoRA that of the last slot (index -1). Neighbouring tokens mostly have the
    same LoRA: `by_runs` a stretch of them is one product, in the model's dtype. It is on as soon as a gated adapter is
    loaded; until then everything is vLLM's own.
    """

    def __init__(
        self, max_num_batched_tokens: int, max_batches: int, device: Any, *, layers: int, by_runs: bool, **options: Any
    ) -> None:
        PunicaWrapperCPU.__init__(self, max_num_batched_tokens, max_batches, device, **options)
        rank = options["lora_config"].max_lora_rank
        self.gates = StepGates(layers, max_num_batched_tokens, max_batches, rank, device)
        self.by_runs, self._runs = by_runs, list[tuple[int, int, int]]()
        self._runs_known = True  # none, before the first step
        self._factors: dict[int, list[torch.Tensor]] = {}  # by layer, of the stretches
        self._factors_version = 0

    def update_metadata(self, *arguments: Any, **options: Any) -> None:
        """As vLLM's; the stretches of tokens with one LoRA are others now."""
        super().update_metadata(*arguments, **options)
        self._runs_known = False

    def runs(self) -> list[tuple[int, int, int]]:
        """Stretches of the step's tokens with one LoRA: (first token, one behind, LoRA slot)."""
        if not self._runs_known:
            slots, lengths = torch.unique_consecutive(self.token_lora_indices, return_counts=True)
            ends = np.cumsum(lengths.numpy()).tolist()
            self._runs = [run for run in zip([0, *ends[:-1]], ends, slots.tolist()) if run[2] >= 0]
            self._runs_known, self._factors = True, {}
        return self._runs

    def linear_gated(
        self, layer: int | None, y: Any, x: Any, a_stacked: Any, b_stacked: Any, scale: float, slices: Any
    ) -> None:
        """`add_lora_linear` stretch by stretch; `layer` of the factors, None: no gate reaches this module."""
        y, x = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
        runs, factors = self.runs(), None
        if layer is not None and self.gates.gated_tokens:
            factors = self._run_factors(layer, x.dtype)
        for place, (start, end, slot) in enumerate(runs):
            offset = 0
            for a, b, width in zip(a_stacked, b_stacked, slices):
                shrunk = x[start:end] @ a[slot, 0].t()  # (tokens, rank)
                if factors is not None:
                    shrunk *= factors[place]
                y[start:end, offset : offset + width].addmm_(shrunk, b[slot, 0].t(), alpha=scale)
                offset += width

    def _run_factors(self, layer: int, dtype: torch.dtype) -> list[torch.Tensor]:
        """A layer's factors by stretch, in the model's dtype: made once a step, as training makes them (ilora.Rows)."""
        if self._factors_version != self.gates.version:
            self._factors, self._factors_version = {}, self.gates.version
        if layer not in self._factors:
            rows = self.gates.factors[layer, : self.gates.gated_tokens].to(dtype)
            self._factors[layer] = [rows[start:end] for start, end, _ in self._runs]
        return self._factors[layer]

    def add_lora_linear(
        self, y: Any, x: Any, lora_a_stacked: Any, lora_b_stacked: Any, scale: float, output_slices: Any, **options: Any
    ) -> None:
        """By stretches where asked for, else as vLLM's."""
        arguments = (y, x, lora_a_stacked, lora_b_stacked, scale, output_slices)
        if self.by_runs and options.get("buffer") is None and options.get("add_inputs", True):
            self.linear_gated(0 if self.gates.layers == 1 else None, *arguments)
        else:
            PunicaWrapperCPU.add_lora_linear(self, *arguments, **options)

    def expand_gated(self, layer: int, y: Any, x: Any, *arguments: Any, **options: Any) -> None:
        """`add_expand`; x are the activations of each slice, (tokens, rank)."""
        if self.gates.gated_tokens:
            for part in x:
                part.mul_(self.gates.factors[layer, : part.shape[0], : part.shape[1]])
        PunicaWrapperCPU.add_expand(self, y, x, *arguments, **options)


class GatedPunicaGPU(Gated, PunicaWrapperGPU):  # type: ignore[misc]  # final to type checkers only
    """On a GPU. The product is always there, with ones where nothing is gated: captured graphs cannot branch."""

    def __init__(self, max_num_batched_tokens: int, max_batches: int, device: Any, *, layers: int, **options: Any):
        PunicaWrapperGPU.__init__(self, max_num_batched_tokens, max_batches, device, **options)
        rank = options["lora_config"].max_lora_rank
        self.gates = StepGates(layers, max_num_batched_tokens, max_batches, rank, device)

    def expand_gated(self, layer: int, y: Any, x: Any, *arguments: Any, **options: Any) -> None:
        """`add_expand`; x is (slices, tokens, rank), float32."""
        x.mul_(self.gates.factors[layer, : x.shape[1], : x.shape[2]])
        PunicaWrapperGPU.add_expand(self, y, x, *arguments, **options)
