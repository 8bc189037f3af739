"""The plugin's parts that need no engine, for `engines.py` to run in a process with vLLM, whose plugin is off.

Each function checks its part and returns how much it checked. Without a GPU nothing here runs CUDA, Triton or captured
graphs: the GPU's kernels (GatedPunicaGPU), the pinned buffers and their CUDA events, asynchronous scheduling (vLLM has
it off on CPUs) and a whole step of model runner V2 are not run. What of them is ordinary Python is: the V2 hooks are
driven through the real classes with stand-ins for what the GPU would do, the turns of the two buffers with stand-ins
for CUDA's events.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import numpy.typing as npt

MAX_TOKENS, MAX_REQUESTS, MAX_RANK, LAYERS = 24, 6, 8, 3


def a_gate(rng: np.random.Generator, rows: int, rank: int) -> Any:
    """Factors as the worker gets them."""
    from recllm.infer.vllm_plugin.gates import Factors

    return Factors(rng.uniform(0, 4, (rows, rank)).astype(np.float32)).packed()


def token_by_token(layers: int, step: list[tuple[Any, int]]) -> npt.NDArray[np.float32]:
    """(layers, MAX_TOKENS, MAX_RANK): what every token's activations are multiplied by, written one by one."""
    from recllm.infer.vllm_plugin.gates import unpack

    expected = np.ones((layers, MAX_TOKENS, MAX_RANK), dtype=np.float32)
    token = 0
    for gate, count in step:
        for _ in range(count):
            if gate is not None:
                rows = unpack(gate)
                for layer in range(layers):
                    expected[layer, token, : rows.shape[1]] = rows[layer if len(rows) > 1 else 0]
            token += 1
    return expected


# ---- is it the right vLLM? ----


def _refusal() -> str:
    from recllm.infer.vllm_plugin import hooks

    try:
        hooks.check()
    except RuntimeError as error:
        return str(error)
    return ""


def versions() -> dict[str, Any]:
    """What `check` says of other versions of vLLM, and of this one; and what vLLM makes of a refusal."""
    import vllm
    from vllm import plugins
    from vllm.v1.core import kv_cache_utils

    own, said = vllm.__version__, {"own": _refusal()}
    loaded, settings = plugins.plugins_loaded, plugins.envs
    try:
        for version in ("0.31.4", "0.33.0", "1.0.0", "0.32.0rc1", "0.32.7+cu129", "dev"):
            vllm.__version__ = version
            said[version] = _refusal()
        vllm.__version__, plugins.plugins_loaded = "0.99.0", False
        plugins.envs = SimpleNamespace(VLLM_PLUGINS=None)  # type: ignore[assignment]  # in this process it is off
        try:
            plugins.load_general_plugins()
            said["start"] = "started"
        except RuntimeError as error:
            said["start"] = str(error)
    finally:
        vllm.__version__, plugins.plugins_loaded, plugins.envs = own, loaded, settings
    hooked = hasattr(kv_cache_utils._gen_lora_extra_hash_keys, "__wrapped__")
    return {"said": said, "vllm": own, "hooked": hooked}


@contextmanager
def replaced(module: str, name: str, value: Any) -> Iterator[bool]:
    """A symbol of vLLM by another, or without it; whether there is one still, that was inherited."""
    import functools
    import importlib

    *path, last = name.split(".")
    owner: Any = functools.reduce(getattr, path, importlib.import_module(module))
    own = owner.__dict__.get(last)
    if value is not None:
        setattr(owner, last, value)
    elif own is not None:
        delattr(owner, last)
    try:
        yield hasattr(owner, last)
    finally:
        if own is not None:
            setattr(owner, last, own)
        elif value is not None:
            delattr(owner, last)


def symbols() -> dict[str, Any]:
    """What `check` says where a symbol is missing or has other parameters, for each that is hooked."""
    from recllm.infer.vllm_plugin import hooks

    whole = hooks.HOOKED | hooks.HOOKED_ON_GPU  # the latter's module imports without Triton as well
    kept = dict(hooks.HOOKED)
    hooks.HOOKED.update(hooks.HOOKED_ON_GPU)
    named: dict[str, list[str]] = {}
    try:
        said = _refusal()
        for module, name in whole:
            named[f"{module}.{name}"] = []
            for value in (lambda other: None, None):
                with replaced(module, name, value) as there:
                    named[f"{module}.{name}"].append("inherited" if there and value is None else _refusal())
    finally:
        hooks.HOOKED.clear()
        hooks.HOOKED.update(kept)
    return {"whole": said, "named": named}


# ---- the front end ----


def front_end() -> dict[str, Any]:
    """What becomes of requests before the engine sees them; the caller's own objects stay as they are."""
    from vllm import PoolingParams, SamplingParams
    from vllm.exceptions import VLLMValidationError
    from vllm.lora.request import LoRARequest

    from recllm.infer.vllm_plugin import gated_lora_request, gates, hooks

    gate, folder = [0.5, 0.25, 0.125, 0.125], str(Path("ad").resolve())  # processes run in the folder of adapters
    lora, params = LoRARequest("ad", 1, folder), SamplingParams(extra_args={"gate_weights": gate, "other": 1})
    gated = gated_lora_request(lora, gate)
    expected = gates.factors_of(gate, gates.Shape("softmax", 4, 8, None))

    sent, plain, digest = hooks.prepare(params, lora, 1)
    assert sent.extra_args == {"other": 1, gates.FACTORS: expected.packed()}
    assert (plain, digest) == (lora, expected.digest)
    assert params.extra_args == {"gate_weights": gate, "other": 1}

    bare = SamplingParams()
    sent, plain, digest = hooks.prepare(bare, gated, 1)
    assert sent.extra_args == {gates.FACTORS: expected.packed()}
    assert (plain.lora_name, plain.lora_int_id, plain.lora_path, digest) == ("ad", 1, folder, expected.digest)
    assert gates.NAME_TAG in gated.lora_name
    assert bare.extra_args is None
    assert lora.lora_name == "ad"

    untouched = 0
    without: list[Any] = [SamplingParams(), SamplingParams(extra_args={"other": 1}), PoolingParams(task="embed")]
    for request in without:
        for adapter in (lora, None):
            found = hooks.prepare(request, adapter, 1)
            assert found[0] is request
            assert found[1] is adapter
            assert found[2] is None
            untouched += 1

    def refusal(params: Any, lora: Any) -> str:
        try:
            hooks.prepare(params, lora, 1)
        except hooks.InvalidGate as error:
            assert isinstance(error, ValueError)  # in Python  # noqa: PT017
            assert isinstance(error, VLLMValidationError)  # HTTP 400  # noqa: PT017
            return str(error)
        return ""

    asked = SamplingParams(extra_args={"gate_weights": gate})
    said = {
        "pooling": refusal(PoolingParams(task="embed", extra_kwargs={"gate_weights": gate}), lora),
        "pooling, by name": refusal(PoolingParams(task="embed"), gated),
        "pooling, internal": refusal(PoolingParams(task="embed", extra_kwargs={gates.FACTORS: 1}), lora),
        "both": refusal(asked, gated),
    }
    own = hooks._stock_kernels
    hooks._stock_kernels = lambda: "PunicaWrapperXPU"  # type: ignore[assignment]
    try:
        said["platform"] = refusal(asked, lora)
        assert refusal(SamplingParams(), lora) == ""
    finally:
        hooks._stock_kernels = own
    return {"said": said, "untouched": untouched}


# ---- the factors of a step ----


def step_gates() -> dict[str, Any]:
    """Random steps, each compared with factors that are written token by token; how many, and how many were skipped."""
    import torch
    from hypothesis import given, settings
    from hypothesis import strategies as st

    from recllm.infer.vllm_plugin.punica import StepGates

    rng = np.random.default_rng(0)
    pools = {
        1: [a_gate(rng, 1, rank) for rank in (4, 8, 8)],
        LAYERS: [a_gate(rng, rows, 8) for rows in (1, LAYERS, LAYERS)],
    }
    request = st.tuples(st.sampled_from([None, 0, 1, 2]), st.integers(1, MAX_TOKENS // MAX_REQUESTS))
    step = st.lists(request, max_size=MAX_REQUESTS)
    change = st.sampled_from(["new", "same", "equal", "gates"])
    seen = {"steps": 0, "unchanged": 0, "same counts, other gates": 0, "gated": 0, "fewer": 0}

    @settings(max_examples=300, deadline=None, database=None, derandomize=True)
    @given(st.sampled_from([1, LAYERS]), st.lists(st.tuples(change, step, st.integers(1, 3)), min_size=2, max_size=12))
    def run(layers: int, steps: list[tuple[str, list[tuple[int | None, int]], int]]) -> None:
        gates = StepGates(layers, MAX_TOKENS, MAX_REQUESTS, MAX_RANK, torch.device("cpu"))
        place, last = gates.factors.data_ptr(), list[tuple[Any, int]]()
        for kind, fresh, turn in steps:
            now = [(None if pick is None else pools[layers][pick], count) for pick, count in fresh]
            if kind == "same":
                now = last
            elif kind == "equal":  # other objects with the same numbers: a request that came over a wire again
                now = [(gate and [gate[0], bytes(bytearray(gate[1]))], count) for gate, count in last]
            elif kind == "gates":  # the same requests, by their names and counts, with other gates
                now = [(pools[layers][(i + turn) % 3], count) for i, (_, count) in enumerate(last)]
            version = gates.factors._version
            gates.write([gate for gate, _ in now], np.array([count for _, count in now], dtype=np.int32))
            assert gates.factors.data_ptr() == place
            assert np.array_equal(gates.factors.numpy(), token_by_token(layers, now)), (kind, now, last)
            if now == last and last:
                assert gates.factors._version == version
                seen["unchanged"] += 1
            seen["steps"] += 1
            seen["gated"] += any(gate is not None for gate, _ in now)
            seen["same counts, other gates"] += now != last and [n for _, n in now] == [n for _, n in last] != []
            seen["fewer"] += sum(n for _, n in now) < sum(n for _, n in last)
            last = now

    run()
    return seen


def two_buffers() -> dict[str, Any]:
    """As on a GPU: a buffer that may still be copied is not written, and each is waited for before it is again."""
    import torch

    from recllm.infer.vllm_plugin.punica import StepGates

    waited: list[int] = []
    gates = StepGates(1, MAX_TOKENS, MAX_REQUESTS, MAX_RANK, torch.device("cpu"))
    gates._rows.append(gates._rows[0].clone())
    gates._owners.append(gates._owners[0].clone())
    gates._copied = [SimpleNamespace(synchronize=lambda turn=turn: waited.append(turn)) for turn in range(2)]
    rng = np.random.default_rng(1)
    kept = 0
    for _ in range(6):
        before = [rows.clone() for rows in gates._rows]
        turn = gates._turn  # of the step that may still be under way
        gates.write([a_gate(rng, 1, 8)] * 2, np.array([3, 2]))
        assert torch.equal(gates._rows[turn], before[turn])
        assert not torch.equal(gates._rows[1 - turn], before[1 - turn])
        assert waited[-1] == 1 - turn
        kept += 1
    return {"kept": kept, "waited": waited}


# ---- the CPU's kernels ----


def _wrapper(layers: int, by_runs: bool) -> Any:
    from recllm.infer.vllm_plugin.punica import GatedPunicaCPU

    config = SimpleNamespace(max_lora_rank=MAX_RANK)
    return GatedPunicaCPU(MAX_TOKENS, MAX_REQUESTS, "cpu", layers=layers, by_runs=by_runs, lora_config=config)


def _map(wrapper: Any, ids: list[int], slots: list[int | None]) -> None:
    """Tell the kernels which LoRA each token has; 0 is none."""
    from vllm.lora.layers import LoRAMapping

    wrapper.update_metadata(LoRAMapping(tuple(ids), tuple(ids[:1]), is_prefill=True), slots, len(slots) + 1, 100)


def kernels() -> dict[str, Any]:
    """A layer's output by every way through the kernels, against the formula token by token; the largest error."""
    import torch

    generator, rng = torch.Generator().manual_seed(0), np.random.default_rng(2)

    def noise(*shape: int) -> Any:
        return torch.randn(shape, generator=generator)

    slots, ids = [11, 22, None], [11] * 5 + [0] * 3 + [22] * 4 + [11] * 2
    counts = [5, 3, 4, 2]
    a = tuple(noise(3, 1, MAX_RANK, 16) for _ in range(2))
    b = tuple(noise(3, 1, width, MAX_RANK) for width in (6, 10))
    for stacked in (*a, *b):
        stacked[2] = 0  # an empty slot
    x, base, errors, uneven = noise(len(ids), 16), noise(len(ids), 16), {}, 0
    for layers in (1, LAYERS):
        packed = [a_gate(rng, layers, 8), None, a_gate(rng, 1, 4), a_gate(rng, layers, 8)]
        factors = torch.from_numpy(token_by_token(layers, list(zip(packed, counts))))
        uneven += len({float(value) for value in factors[0, :, 0]}) > 2
        for layer in [None, *range(layers)]:
            expected = base.clone()
            for token, lora in enumerate(ids):
                if lora == 0:
                    continue
                row = factors[layer or 0, token] if layers == 1 or layer is not None else torch.ones(MAX_RANK)
                slot = slots.index(lora)
                expected[token] += torch.cat([b[i][slot, 0] @ (row * (a[i][slot, 0] @ x[token])) for i in range(2)])
            for way in ("own", "runs", "sharded", "runs, late"):
                wrapper = _wrapper(layers, by_runs=way == "runs")
                _map(wrapper, ids, slots)
                wrapper.gates.write(packed, np.array(counts))
                wrapper.by_runs = way.startswith("runs")  # late: while a step with these tokens is under way
                view = wrapper if layer is None else wrapper.of_layer(layer)
                y = base.clone()
                if way == "sharded":  # its layers gather the whole rank between the two, in one tensor
                    buffers = torch.zeros(2, len(ids), MAX_RANK)
                    view.add_shrink(buffers, x, a, 1.0)
                    view.add_expand(y, buffers, b, (6, 10), offset_start=0, add_input=True)
                else:
                    view.add_lora_linear(y, x, a, b, 1.0, (6, 10))
                errors[f"{way}, layer {layer} of {layers}"] = float((y - expected).abs().max())
    return {"errors": errors, "uneven": uneven}


def views() -> dict[str, Any]:
    """Which modules get the view of which layer, and what is said of a model with more layers than factors."""
    from recllm.infer.vllm_plugin import hooks, punica
    from recllm.model.ilora import DECODER_LAYER

    class Module:
        def __init__(self, wrapper: Any) -> None:
            self.punica_wrapper = wrapper

        def set_mapping(self, wrapper: Any) -> None:
            self.punica_wrapper = wrapper

    language, tower = _wrapper(2, False), _wrapper(2, False)
    names = ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj", "transformer.h.1.attn.c_attn", "model.proj"]
    modules = {name: Module(language) for name in names} | {"vision.layers.7.mlp": Module(tower)}
    hooks.give_views(modules, language, 2)
    given = {name: getattr(module.punica_wrapper, "_layer", None) for name, module in modules.items()}
    try:
        hooks.give_views({"model.layers.2.mlp.up_proj": Module(language)}, language, 2)
        said = "started"
    except RuntimeError as error:
        said = str(error)
    return {"given": given, "said": said, "same_names": punica.LAYER.pattern == DECODER_LAYER.pattern}


# ---- model runner V2 ----


class _Runner:
    """The V2 runner's own add_requests and _set_active_loras, hooked, over stand-ins for what lies on the GPU."""

    def __init__(self, kind: Any, wrapper: Any) -> None:
        from vllm.v1.worker.gpu.lora_utils import LoraState

        self.kind, self.wrapper = kind, wrapper
        self.runner = object.__new__(kind)
        for name in ("req_states", "block_tables", "model_state", "sampler", "prompt_logprobs_worker"):
            setattr(self.runner, name, MagicMock())
        for name in ("pooling_runner", "encoder_cache", "adaptive_verification", "pp_handler"):
            setattr(self.runner, name, None)
        self.runner.is_last_pp_rank = True
        self.runner.lora_state = LoraState(MAX_REQUESTS)
        self.runner.lora_manager = MagicMock()
        self.runner.lora_manager._adapter_manager.punica_wrapper_mapping = {"": wrapper}
        self.places: dict[str, int] = {}
        self.runner.req_states.req_id_to_index = self.places
        self.runner.req_states.add_request = lambda req_id, **_: self.places.update({req_id: self._free_place()})
        self.runner.req_states.remove_request = lambda name: self.places.pop(name, None)

    def _free_place(self) -> int:
        return next(place for place in range(MAX_REQUESTS) if place not in self.places.values())

    def step(self, new: dict[str, Any], counts: dict[str, int], finished: set[str], preempted: set[str]) -> None:
        """What execute_model does of a step before the model runs, in its order."""
        from vllm.sampling_params import SamplingParams

        news = []
        for name, gate in new.items():
            params = SamplingParams(extra_args={"recllm_gate_factors": gate} if gate is not None else None)
            news.append(MagicMock(req_id=name, sampling_params=params, lora_request=None, prompt_len=1))
        output = SimpleNamespace(scheduled_new_reqs=news, finished_req_ids=finished, preempted_req_ids=preempted)
        self.kind.finish_requests(self.runner, output)
        self.kind.add_requests(self.runner, output)
        if not counts:
            return
        numbers = np.array(list(counts.values()), dtype=np.int32)
        inputs = self.runner.lora_state.make_lora_inputs(
            list(counts), np.array([self.places[name] for name in counts]), numbers
        )
        self.runner._set_active_loras(*inputs)

    def dummy(self) -> None:
        """A dummy run sets LoRAs without requests."""
        self.runner._set_active_loras((1,), (1,) * 4, set())


def runner_v2() -> dict[str, Any]:
    """Random lives of requests through model runner V2; each step's factors against those token by token."""
    from vllm.v1.worker.gpu.lora_utils import LoraState
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    from recllm.infer.vllm_plugin import hooks

    own = LoraState.make_lora_inputs, GPUModelRunner.add_requests, GPUModelRunner._set_active_loras
    hooks._hook_runner_v2()
    rng = np.random.default_rng(3)
    seen = {"steps": 0, "gated": 0, "finished": 0, "preempted": 0, "names used again": 0, "dummies": 0}
    try:
        for _ in range(40):
            life(_Runner(GPUModelRunner, _wrapper(1, False)), rng, seen)
    finally:
        LoraState.make_lora_inputs, GPUModelRunner.add_requests = own[:2]  # type: ignore[method-assign]
        del GPUModelRunner._set_active_loras  # it was inherited
    assert GPUModelRunner._set_active_loras is own[2]
    return seen


def life(runner: _Runner, rng: np.random.Generator, seen: dict[str, int]) -> None:
    """Some steps: requests come, run on, are thrown out and come back, end; a new one may take an ended one's name."""
    running: dict[str, Any] = {}
    waiting: dict[str, Any] = {}
    for _ in range(12):
        finished = {name for name in running if rng.random() < 0.2}
        preempted = {name for name in running if name not in finished and rng.random() < 0.15}
        waiting |= {name: running[name] for name in preempted}
        running = {name: gate for name, gate in running.items() if name not in finished | preempted}
        back = {name: gate for name, gate in waiting.items() if name not in preempted and rng.random() < 0.5}
        waiting = {name: gate for name, gate in waiting.items() if name not in back}
        free = [f"r{i}" for i in range(MAX_REQUESTS) if f"r{i}" not in running | waiting | back]
        fresh = {name: a_gate(rng, 1, 8) if rng.random() < 0.6 else None for name in free if rng.random() < 0.4}
        running |= back | fresh
        counts = {name: int(rng.integers(1, MAX_TOKENS // MAX_REQUESTS + 1)) for name in running if rng.random() < 0.9}
        runner.step(back | fresh, counts, finished, preempted)
        seen["names used again"] += len(finished & fresh.keys())
        if rng.random() < 0.2:
            runner.dummy()
            seen["dummies"] += 1
        if counts:
            step = [(running[name], count) for name, count in counts.items()]
            assert np.array_equal(runner.wrapper.gates.factors.numpy(), token_by_token(1, step))
            seen["steps"] += 1
            seen["gated"] += any(gate is not None for gate, _ in step)
        seen["finished"] += len(finished)
        seen["preempted"] += len(preempted)
    known = runner.runner.lora_state.recllm_gates
    assert known.keys() <= {name for name, gate in (running | waiting).items() if gate is not None}
