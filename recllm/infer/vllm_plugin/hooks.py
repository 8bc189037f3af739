"""What the plugin changes in vLLM, and the check that it is the vLLM it was written for. Imports vLLM."""

import copy
import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import vllm
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version
from vllm.exceptions import VLLMValidationError
from vllm.pooling_params import PoolingParams
from vllm.sampling_params import SamplingParams

from recllm import __version__
from recllm.infer.vllm_plugin import PER_LAYER, SUPPORTED, gates

# (module, name): parameters, those that the hooks pass or read, in order. A module that needs a GPU has its own table.
HOOKED: dict[tuple[str, str], tuple[str, ...]] = {
    ("vllm.v1.engine.input_processor", "InputProcessor.process_inputs"): (
        "self", "request_id", "prompt", "params", "supported_tasks", "arrival_time", "lora_request",
    ),
    ("vllm.entrypoints.serve.engine.serving", "BaseServing._maybe_get_adapters"): ("self", "request"),
    ("vllm.entrypoints.openai.models.serving", "OpenAIServingModels.model_name"): ("self", "lora_request"),
    ("vllm.v1.core.kv_cache_utils", "_gen_lora_extra_hash_keys"): ("request",),
    ("vllm.v1.core.kv_cache_utils", "generate_block_hash_extra_keys"): (
        "request", "start_token_idx", "end_token_idx", "start_mm_idx",
    ),
    ("vllm.lora.punica_wrapper.punica_selector", "get_punica_wrapper"): ("args", "kwargs"),
    ("vllm.lora.model_manager", "LoRAModelManager._create_lora_modules"): ("self",),
    ("vllm.lora.worker_manager", "WorkerLoRAManager._load_adapter"): ("self", "lora_request"),
    ("vllm.lora.punica_wrapper.punica_base", "PunicaWrapperBase.add_expand"): (
        "self", "y", "x", "lora_b_stacked", "output_slices", "offset_start", "add_inputs",
    ),
    ("vllm.lora.punica_wrapper.punica_cpu", "PunicaWrapperCPU.add_lora_linear"): (
        "self", "y", "x", "lora_a_stacked", "lora_b_stacked", "scale", "output_slices", "buffer",
    ),
    ("vllm.lora.punica_wrapper.punica_gpu", "PunicaWrapperGPU.add_expand"): (
        "self", "y", "x", "lora_b_stacked", "output_slices", "offset_start", "add_inputs",
    ),
    ("vllm.v1.worker.lora_model_runner_mixin", "LoRAModelRunnerMixin.set_active_loras"): (
        "self", "input_batch", "num_scheduled_tokens", "num_sampled_tokens", "mapping_type",
    ),
    ("vllm.v1.worker.gpu.lora_utils", "LoraState.make_lora_inputs"): (
        "self", "req_ids", "idx_mapping", "num_scheduled_tokens",
    ),
    ("vllm.v1.sample.sampler", "Sampler.forward"): ("self", "logits", "sampling_metadata"),
    ("vllm.v1.sample.sampler", "Sampler.gather_specific_token_logprobs"): (
        "self", "logprobs", "logprob_token_ids", "sampled",
    ),
    ("vllm.v1.sample.sampler", "Sampler.gather_logprobs"): ("logprobs", "num_logprobs", "token_ids"),
}  # fmt: skip
HOOKED_ON_GPU: dict[tuple[str, str], tuple[str, ...]] = {  # model runner V2: its module imports with Triton only
    ("vllm.v1.worker.gpu.model_runner", "GPUModelRunner.add_requests"): ("self", "scheduler_output"),
    ("vllm.v1.worker.gpu.model_runner", "GPUModelRunner._set_active_loras"): (
        "self",
        "prompt_lora_mapping",
        "token_lora_mapping",
        "lora_requests",
    ),
}
WRAPPERS = {"PunicaWrapperCPU": "GatedPunicaCPU", "PunicaWrapperGPU": "GatedPunicaGPU"}


class InvalidGate(VLLMValidationError, ValueError):
    """A request whose gate cannot be applied: HTTP 400, a ValueError in Python."""


# ---- is it the right vLLM? ----


def check() -> None:
    """Refuse a vLLM that the hooks were not written for.

    Raises:
        RuntimeError: its version, or a symbol that is missing or has other parameters.
    """
    try:
        supported = SpecifierSet(SUPPORTED).contains(Version(vllm.__version__).base_version)
    except InvalidVersion:  # "dev": a source tree that was never built
        supported = False
    if not supported:
        raise RuntimeError(_refusal(f"it supports vLLM {SUPPORTED}"))
    table = HOOKED | (HOOKED_ON_GPU if has_triton() else {})
    if problems := [text for place, wanted in table.items() if (text := _difference(*place, wanted))]:
        raise RuntimeError(_refusal("; ".join(problems)))


def has_triton() -> bool:
    """Whether model runner V2 can be imported here."""
    from vllm.triton_utils import HAS_TRITON

    return bool(HAS_TRITON)


def _refusal(why: str) -> str:
    return (
        f"recllm {__version__}'s plugin cannot gate the LoRAs of vLLM {vllm.__version__}: {why}. Install a vLLM "
        f"{SUPPORTED}, or keep the plugin off with VLLM_PLUGINS= (empty) where you do not serve instance-wise adapters"
    )


def _difference(module: str, name: str, wanted: tuple[str, ...]) -> str | None:
    """What is wrong with a symbol; None where it is as expected."""
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        return f"{module}.{name} is missing ({error})"
    parameters = tuple(inspect.signature(found).parameters)
    if parameters[: len(wanted)] != wanted:
        return f"{module}.{name} takes {parameters}, {wanted} is expected"
    return None


# ---- hooked ----


def install(layers: int, cpu_runs: bool) -> None:
    """Put all hooks in place."""
    _hook_front_end(layers)
    _hook_cache_keys()
    _hook_kernels(layers, cpu_runs)
    _hook_runner()
    _hook_sampler()
    if has_triton():
        _hook_runner_v2()


def _wrap(owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace owner.name by make(the old one)."""
    old = getattr(owner, name)
    setattr(owner, name, functools.wraps(old)(make(old)))


def _hook_front_end(layers: int) -> None:
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels
    from vllm.entrypoints.serve.engine.serving import BaseServing
    from vllm.v1.engine.input_processor import InputProcessor

    def process_inputs(old: Callable[..., Any]) -> Callable[..., Any]:
        def hooked(
            self: Any, request_id: str, prompt: Any, params: Any, supported_tasks: Any,
            arrival_time: float | None = None, lora_request: Any = None, *rest: Any, **options: Any,
        ) -> Any:  # fmt: skip
            params, lora_request, digest = prepare(params, lora_request, layers)
            request = old(
                self, request_id, prompt, params, supported_tasks, arrival_time, lora_request, *rest, **options
            )
            if digest is not None:  # the second lock beside the blocks' own keys
                request.cache_salt = f"{request.cache_salt or ''}|gate:{digest}"
            return request

        return hooked

    def maybe_get_adapters(old: Callable[..., Any]) -> Callable[..., Any]:
        def hooked(self: Any, request: Any, *rest: Any, **options: Any) -> Any:
            return carried_by_name(old(self, request, *rest, **options), request)

        return hooked

    def model_name(old: Callable[..., Any]) -> Callable[..., Any]:
        def hooked(self: Any, *arguments: Any, **options: Any) -> Any:
            return old(self, *arguments, **options).partition(gates.NAME_TAG)[0]  # what the answer calls the model

        return hooked

    _wrap(InputProcessor, "process_inputs", process_inputs)
    _wrap(BaseServing, "_maybe_get_adapters", maybe_get_adapters)
    _wrap(OpenAIServingModels, "model_name", model_name)


def prepare(params: Any, lora_request: Any, layers: int) -> tuple[Any, Any, str | None]:
    """A request as the engine is to see it: params with factors in place of the gate, the plain LoRA, the gate's hash.

    Raises:
        InvalidGate: a gate that cannot be applied to this request.
    """
    try:
        return _prepare(params, lora_request, layers)
    except gates.GateError as error:
        raise InvalidGate(str(error)) from None


def _prepare(params: Any, lora_request: Any, layers: int) -> tuple[Any, Any, str | None]:
    extra = (params.extra_kwargs if isinstance(params, PoolingParams) else getattr(params, "extra_args", None)) or {}
    if not isinstance(extra, Mapping):
        raise gates.GateError(f"extra_args is a {type(extra).__name__}, a dict with {gates.GATE_WEIGHTS} is expected")
    if gates.FACTORS in extra:
        raise gates.GateError(f"{gates.FACTORS} is the engine's own: send {gates.GATE_WEIGHTS}")
    weights = extra.get(gates.GATE_WEIGHTS)
    if lora_request is not None and gates.NAME_TAG in lora_request.lora_name:
        name, carried = gates.split_name(lora_request.lora_name)
        lora_request = copy.copy(lora_request)
        lora_request.lora_name = name
        if gates.GATE_WEIGHTS in extra:
            raise gates.GateError(f"two gates, one in {gates.GATE_WEIGHTS} and one in the LoRA's name: send one")
        weights = carried
    if weights is None:
        if gates.GATE_WEIGHTS in extra:
            raise gates.GateError(f"{gates.GATE_WEIGHTS} is null: leave it out, or send the gate")
        return params, lora_request, None
    if not isinstance(params, SamplingParams):
        raise gates.GateError(f"{gates.GATE_WEIGHTS} in a pooling request: gates are for generation")
    factors = gates.factors_of(weights, _shape(lora_request, layers))
    params = copy.copy(params)  # the caller's may be shared between requests
    kept = {key: value for key, value in extra.items() if key != gates.GATE_WEIGHTS}
    params.extra_args = kept | {gates.FACTORS: factors.packed()}
    return params, lora_request, factors.digest


def _shape(lora_request: Any, layers: int) -> gates.Shape:
    if (kernels := _stock_kernels()) not in WRAPPERS:
        raise gates.GateError(f"{gates.GATE_WEIGHTS}: recllm cannot gate LoRAs by {kernels}, on this platform")
    if lora_request is None:
        raise gates.GateError(f"{gates.GATE_WEIGHTS} for the base model: name an instance-wise adapter as the model")
    shape = gates.shape_of(_folder(lora_request.lora_path))
    if shape is None:
        raise gates.GateError(
            f"{gates.GATE_WEIGHTS} for {lora_request.lora_name}, a plain LoRA: it has no gate, send the request without"
        )
    if shape.layers is not None and shape.layers != layers:
        raise gates.GateError(
            f"{lora_request.lora_name} has a gate a layer, {shape.layers} of them, and this server keeps factors of "
            f"{layers}: start it with {PER_LAYER}={shape.layers}"
        )
    return shape


@functools.lru_cache(maxsize=256)
def _folder(lora_path: str) -> str:
    """Where the adapter lies; a name of a hub is resolved as vLLM's worker does."""
    from vllm.lora.utils import get_adapter_absolute_path

    return str(get_adapter_absolute_path(lora_path))


def carried_by_name(lora_request: Any, request: Any) -> Any:
    """For a beam search over HTTP: the LoRA with the gate in its name, as beam search drops vllm_xargs.

    Raises:
        InvalidGate: a gate and no adapter to carry it, or what can be no gate.
    """
    extra = getattr(request, "vllm_xargs", None)
    if not getattr(request, "use_beam_search", False) or not extra or gates.GATE_WEIGHTS not in extra:
        return lora_request
    if lora_request is None:
        raise InvalidGate(f"{gates.GATE_WEIGHTS} for the base model: name an instance-wise adapter as the model")
    carried = copy.copy(lora_request)
    try:
        carried.lora_name = gates.name_with_gate(lora_request.lora_name, extra[gates.GATE_WEIGHTS])
    except gates.GateError as error:
        raise InvalidGate(str(error)) from None
    return carried


def _hook_cache_keys() -> None:
    from vllm.v1.core import kv_cache_utils

    def extra_hash_keys(old: Callable[..., Any]) -> Callable[..., Any]:
        def hooked(request: Any) -> Any:
            packed = gates.packed_of(getattr(request.sampling_params, "extra_args", None))
            if packed is None:
                return old(request)
            return [*old(request), (gates.FACTORS, gates.digest(packed))]

        return hooked

    _wrap(kv_cache_utils, "_gen_lora_extra_hash_keys", extra_hash_keys)


@functools.lru_cache(maxsize=1)
def _stock_kernels() -> str:
    """Class of the LoRA kernels of this platform."""
    from vllm.platforms import current_platform

    return str(current_platform.get_punica_wrapper()).rpartition(".")[2]


def _hook_kernels(layers: int, cpu_runs: bool) -> None:
    from vllm.lora import model_manager
    from vllm.lora.worker_manager import WorkerLoRAManager

    def get_punica_wrapper(old: Callable[..., Any]) -> Callable[..., Any]:
        def hooked(*arguments: Any, **options: Any) -> Any:
            from recllm.infer.vllm_plugin import punica

            if (stock := _stock_kernels()) not in WRAPPERS:
                return old(*arguments, **options)  # the front end refuses gates
            kind: Any = getattr(punica, WRAPPERS[stock])
            own = {"by_runs": cpu_runs} if kind is punica.GatedPunicaCPU else {}
            return kind(*arguments, layers=layers, **own, **options)

        return hooked

    def create_lora_modules(old: Callable[..., Any]) -> Callable[..., Any]:
        def hooked(self: Any) -> None:
            old(self)
            if layers > 1:
                give_views(self.modules, language_kernels(self), layers)

        return hooked

    def load_adapter(old: Callable[..., Any]) -> Callable[..., Any]:
        def hooked(self: Any, lora_request: Any) -> Any:
            lora = old(self, lora_request)
            wrapper = language_kernels(self._adapter_manager)
            if hasattr(wrapper, "by_runs") and gates.has_gate(_folder(lora_request.lora_path)):
                wrapper.by_runs = True
            return lora

        return hooked

    _wrap(model_manager, "get_punica_wrapper", get_punica_wrapper)
    _wrap(model_manager.LoRAModelManager, "_create_lora_modules", create_lora_modules)
    _wrap(WorkerLoRAManager, "_load_adapter", load_adapter)


def give_views(modules: Mapping[str, Any], wrapper: Any, layers: int) -> None:
    """The LoRA modules of each decoder layer get that layer's view of the language model's kernels.

    Raises:
        RuntimeError: the model has more decoder layers than factors are kept for.
    """
    from recllm.infer.vllm_plugin import punica

    if not isinstance(wrapper, punica.Gated):
        return
    for name, module in modules.items():
        found = punica.LAYER.search(name)
        if found is None or module.punica_wrapper is not wrapper:
            continue
        if int(found[1]) >= layers:
            raise RuntimeError(f"{PER_LAYER}={layers}, and the model has {name}: set it to its number of layers")
        module.set_mapping(wrapper.of_layer(int(found[1])))


# ---- the worker, once a step ----


def language_kernels(manager: Any) -> Any:
    """The LoRA kernels of the language model, of vLLM's LoRAModelManager: those that are made first."""
    return next(iter(manager.punica_wrapper_mapping.values()))


def write_gates(manager: Any, packed: list[Any], counts: Any) -> None:
    """The factors of a step's requests, to the language model's kernels.

    Args:
        manager: vLLM's LoRAModelManager.
        packed: of each request, in the batch's order; None where it has no gate.
        counts: tokens of each in this step.
    """
    from recllm.infer.vllm_plugin.punica import Gated

    wrapper = language_kernels(manager)
    if isinstance(wrapper, Gated):
        wrapper.gates.write(packed, counts)


def _packed(sampling_params: Any) -> list[Any] | None:
    return gates.packed_of(getattr(sampling_params, "extra_args", None))


def _hook_runner() -> None:
    from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

    def set_active_loras(old: Callable[..., Any]) -> Callable[..., Any]:
        def hooked(self: Any, input_batch: Any, num_scheduled_tokens: Any, *rest: Any, **options: Any) -> Any:
            result = old(self, input_batch, num_scheduled_tokens, *rest, **options)
            packed = [_packed(self.requests[name].sampling_params) for name in input_batch.req_ids]
            write_gates(self.lora_manager._adapter_manager, packed, num_scheduled_tokens)
            return result

        return hooked

    _wrap(LoRAModelRunnerMixin, "set_active_loras", set_active_loras)


def _hook_sampler() -> None:
    """Model runner V1: where one request of a step asks for tokens by name, vLLM gives the others no likeliest tokens.

    Their answers would hold the sampled token alone. Ranking asks for tokens by name, so each gets what it asked for.
    Model runner V2 keeps them apart itself.
    """
    from vllm.v1.sample.sampler import Sampler

    def forward(old: Callable[..., Any]) -> Callable[..., Any]:
        def hooked(self: Any, logits: Any, sampling_metadata: Any, *rest: Any, **options: Any) -> Any:
            self.recllm_num_logprobs = sampling_metadata.max_num_logprobs
            return old(self, logits, sampling_metadata, *rest, **options)

        return hooked

    def gather_specific_token_logprobs(old: Callable[..., Any]) -> Callable[..., Any]:
        def hooked(self: Any, logprobs: Any, logprob_token_ids: Any, sampled: Any) -> Any:
            named, most = old(self, logprobs, logprob_token_ids, sampled), self.recllm_num_logprobs
            if named is None or most is None or len(logprob_token_ids) == len(logprobs):
                return named
            return by_row(named, self.gather_logprobs(logprobs, most, token_ids=sampled), list(logprob_token_ids))

        return hooked

    _wrap(Sampler, "forward", forward)
    _wrap(Sampler, "gather_specific_token_logprobs", gather_specific_token_logprobs)


def by_row(named: Any, likeliest: Any, rows: list[int]) -> Any:
    """LogprobsTensors of one step: `named` in those rows, `likeliest` in the others, as wide as the wider."""
    import torch

    ids, values = named.logprob_token_ids, named.logprobs
    width = max(ids.shape[1], likeliest.logprobs.shape[1])

    def widened(table: Any, fill: float) -> Any:
        return torch.nn.functional.pad(table, (0, width - table.shape[1]), value=fill)

    is_named = torch.zeros(len(ids), 1, dtype=torch.bool, device=ids.device)
    is_named[rows] = True
    return named._replace(
        logprob_token_ids=torch.where(is_named, widened(ids, 0), widened(likeliest.logprob_token_ids, 0)),
        logprobs=torch.where(is_named, widened(values, -torch.inf), widened(likeliest.logprobs, -torch.inf)),
    )


def _hook_runner_v2() -> None:
    """Model runner V2 keeps no sampling parameters by request: the gates are noted as requests come."""
    from vllm.v1.worker.gpu.lora_utils import LoraState
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    def add_requests(old: Callable[..., Any]) -> Callable[..., Any]:
        def hooked(self: Any, scheduler_output: Any) -> Any:
            note_gates(self.lora_state, scheduler_output)
            return old(self, scheduler_output)

        return hooked

    def set_active_loras(old: Callable[..., Any]) -> Callable[..., Any]:
        def hooked(self: Any, *arguments: Any, **options: Any) -> Any:
            result = old(self, *arguments, **options)
            step, self.lora_state.recllm_step = getattr(self.lora_state, "recllm_step", None), None
            if step is not None:  # None: a dummy run
                write_gates(self.lora_manager._adapter_manager, *step)
            return result

        return hooked

    _wrap(LoraState, "make_lora_inputs", step_noted)
    _wrap(GPUModelRunner, "add_requests", add_requests)
    _wrap(GPUModelRunner, "_set_active_loras", set_active_loras)


def note_gates(lora_state: Any, scheduler_output: Any) -> None:
    """Remember the gates of new requests until they are removed from `lora_state`."""
    known: dict[str, Any] = lora_state.__dict__.setdefault("recllm_gates", {})
    for name in scheduler_output.finished_req_ids:  # first: a new request may have the name of one that is done
        known.pop(name, None)
    for new in scheduler_output.scheduled_new_reqs:
        known.pop(new.req_id, None)
        if (packed := _packed(new.sampling_params)) is not None:
            known[new.req_id] = packed


def step_noted(old: Callable[..., Any]) -> Callable[..., Any]:
    """LoraState.make_lora_inputs, which also notes the step's gates and token counts."""

    def hooked(self: Any, req_ids: Any, idx_mapping: Any, num_scheduled_tokens: Any) -> Any:
        known = getattr(self, "recllm_gates", {})
        self.recllm_step = [known.get(name) for name in req_ids], num_scheduled_tokens
        return old(self, req_ids, idx_mapping, num_scheduled_tokens)

    return hooked
