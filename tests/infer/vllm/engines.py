"""What the tests of this folder let vLLM's engines do. Each engine needs a process of its own:

    python engines.py NAME FOLDER OUT

NAME is one of PROCESSES; FOLDER holds model/ and the adapters. OUT/figures.json says what each case measured, or why it
failed (a file: workers write to stdout as they end); a case's arrays are in OUT/CASE.npz. Nothing is compared here with
what another process says: that is for the tests.
"""

import json
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NUMBERS = {name: number for number, name in enumerate(("ad", "ad2", "sigmoid", "layered", "plain"), start=1)}
K = {"ad": 4, "ad2": 3, "sigmoid": 8, "layered": 4}
LAYERS = 2  # of the tiny Llama
VOCABULARY = 259


class Asked(NamedTuple):
    """A request."""

    adapter: str | None
    gate: Any
    prompt: list[int]


class Engine:
    """An engine with the adapters of a folder, and the arrays that its cases leave."""

    def __init__(self, folder: Path, out: Path, **options: Any) -> None:
        from vllm import LLM

        self.folder, self.out = folder, out
        settings: dict[str, Any] = {
            "dtype": "float32",
            "max_model_len": 256,
            "max_num_seqs": 16,
            "max_num_batched_tokens": 64,  # prompts are longer: they come in chunks
            "block_size": 32,
            "num_gpu_blocks_override": 64,  # requests that grow may be thrown out
            "enable_prefix_caching": True,
            "enable_lora": True,
            "max_loras": 4,
            "max_lora_rank": 16,  # the adapters' are 8 and 12
            "lora_target_modules": MODULES,
            "max_logprobs": -1,
            "logprobs_mode": "raw_logits",
        }
        self.llm: Any = LLM(str(folder / "model"), **settings | options)

    def lora(self, adapter: str | None) -> Any:
        """The adapter, as requests name it."""
        from vllm.lora.request import LoRARequest

        return adapter and LoRARequest(adapter, NUMBERS[adapter], str(self.folder / adapter))

    def run(self, requests: Sequence[Asked], max_tokens: int = 4, **options: Any) -> list[Any]:
        """The answers to requests that come at once."""
        return self.llm.generate(  # type: ignore[no-any-return]
            [{"prompt_token_ids": asked.prompt} for asked in requests],
            [parameters(asked.gate, max_tokens=max_tokens, **options) for asked in requests],
            lora_request=[self.lora(asked.adapter) for asked in requests],
            use_tqdm=False,
        )

    def fresh(self) -> None:
        """Forget the keys and values of all requests."""
        assert self.llm.reset_prefix_cache()

    def by_runs(self, on: bool) -> None:
        """vLLM's own kernels for LoRAs, as on a GPU, or the CPU's way by stretches of tokens."""
        for wrapper in self.llm.collective_rpc(_kernels):
            wrapper.by_runs = on


def _kernels(worker: Any) -> Any:
    from recllm.infer.vllm_plugin.hooks import language_kernels

    return language_kernels(worker.model_runner.lora_manager._adapter_manager)


def parameters(gate: Any, **options: Any) -> Any:
    """Greedy sampling parameters with a gate, and the logits of all tokens at each position."""
    from vllm import SamplingParams

    extra = {"extra_args": {"gate_weights": gate}} if gate is not None else {}
    return SamplingParams(
        **{"temperature": 0, "logprobs": -1, "ignore_eos": True, "detokenize": False} | extra | options
    )


def logits(output: Any) -> npt.NDArray[np.float32]:
    """(tokens, V) of an answer."""
    steps = output.outputs[0].logprobs
    return np.array([[step[token].logprob for token in range(len(step))] for step in steps], dtype=np.float32)


def told(requests: Sequence[Asked], outputs: Sequence[Any]) -> list[dict[str, Any]]:
    """Requests and their answers, without the logits."""
    return [
        asked._asdict() | {"tokens": list(output.outputs[0].token_ids), "cached": output.num_cached_tokens}
        for asked, output in zip(requests, outputs, strict=True)
    ]


def keep(place: Path, **runs: Sequence[Any]) -> None:
    """The logits of named runs, as NAME.NUMBER."""
    arrays: dict[str, Any] = {f"{name}.{i}": logits(one) for name, run in runs.items() for i, one in enumerate(run)}
    np.savez(place, **arrays)


# ---- requests ----


def tokens(rng: np.random.Generator, count: int, vocabulary: int = VOCABULARY) -> list[int]:
    """A random prompt."""
    return [int(token) for token in rng.integers(3, vocabulary, count)]


def softmax(rng: np.random.Generator, count: int) -> list[float]:
    """A random gate far from the uniform one."""
    weights = np.exp(2 * rng.normal(size=count))
    return [float(weight) for weight in weights / weights.sum()]


def a_gate(rng: np.random.Generator, adapter: str | None) -> Any:
    """A random gate that fits an adapter; None where it has none."""
    if adapter not in K:
        return None
    if adapter == "sigmoid":
        return [float(weight) for weight in rng.random(K[adapter])]
    if adapter == "layered":
        return [softmax(rng, K[adapter]) for _ in range(LAYERS)]
    return softmax(rng, K[adapter])


def mixed_requests(vocabulary: int = VOCABULARY, sigmoid: bool = True) -> list[Asked]:
    """Gates of all kinds, adapters without a gate, a plain LoRA and the base model, for prompts that begin alike."""
    rng = np.random.default_rng(0)
    kinds: list[tuple[str | None, Any]] = [("ad", softmax(rng, 4)) for _ in range(5)]
    kinds += [("ad", [0.0, 0.0, 1.0, 0.0]), ("ad", [0.25] * 4), ("ad", None), ("plain", None), (None, None)]
    kinds += [("ad2", softmax(rng, 3)), ("ad2", softmax(rng, 3))]
    if sigmoid:
        kinds += [("sigmoid", a_gate(rng, "sigmoid")), ("sigmoid", [0.0, 1.0] * 4), ("sigmoid", None)]
    common = tokens(rng, 120, vocabulary)
    return [Asked(adapter, gate, common[: 100 + i % 3 * 7]) for i, (adapter, gate) in enumerate(kinds)]


# ---- one gate for all layers ----


def plain_answers(engine: Engine) -> dict[str, Any]:
    """What a plain LoRA and the base model say, before the engine has met an instance-wise adapter."""
    rng = np.random.default_rng(1)
    requests = [Asked("plain" if i % 2 else None, None, tokens(rng, 60 + 9 * i)) for i in range(6)]
    outputs = engine.run(requests)
    engine.fresh()
    keep(engine.out / "plain_answers.npz", first=outputs)
    return {"requests": told(requests, outputs), "kernels": type(engine.llm.collective_rpc(_kernels)[0]).__name__}


def mixed(engine: Engine) -> dict[str, Any]:
    """All kinds of requests at once: from nothing, from the prefix cache, by vLLM's own LoRA kernels."""
    requests = mixed_requests()
    first, again = engine.run(requests), engine.run(requests)
    own = []
    if hasattr(engine.llm.collective_rpc(_kernels)[0], "by_runs"):
        engine.fresh()
        engine.by_runs(False)
        own = engine.run(
            [asked for asked in requests if asked.adapter]
        )  # of no LoRA they take the last where all are full
        engine.by_runs(True)
    engine.fresh()
    keep(engine.out / "mixed.npz", first=first, again=again, own=own)
    own_requests = [asked for asked in requests if asked.adapter]
    several = engine.run([requests[0]], n=2, temperature=1, top_k=1)[0].outputs
    return {
        "first": told(requests, first),
        "again": told(requests, again),
        "own": told(own_requests, own) if own else [],
        "n": [list(output.token_ids) for output in several],
    }


def every_position(engine: Engine) -> dict[str, Any]:
    """The logit of each token of a prompt, in chunks of the prompt; without the first, which nothing predicts."""
    engine.fresh()
    requests = mixed_requests()[:3]
    outputs = engine.run(requests, max_tokens=1, prompt_logprobs=0)
    engine.fresh()
    seen = [
        [step[token].logprob for step, token in zip(output.prompt_logprobs[1:], asked.prompt[1:], strict=True)]
        for asked, output in zip(requests, outputs, strict=True)
    ]
    return {"requests": told(requests, outputs), "logits": seen}


@contextmanager
def without_locks(key: bool, salt: bool) -> Iterator[None]:
    """Leave out what keeps the cache of different gates apart: the gate in each block's key, the salt, or both."""
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.engine.input_processor import InputProcessor

    own_keys, own_inputs = kv_cache_utils._gen_lora_extra_hash_keys, InputProcessor.process_inputs

    def unsalted(*arguments: Any, **options: Any) -> Any:
        request = own_inputs(*arguments, **options)
        assert request.cache_salt is not None
        request.cache_salt = None
        return request

    if key:
        kv_cache_utils._gen_lora_extra_hash_keys = own_keys.__wrapped__  # type: ignore[attr-defined]
    if salt:
        InputProcessor.process_inputs = unsalted  # type: ignore[method-assign]
    try:
        yield
    finally:
        kv_cache_utils._gen_lora_extra_hash_keys = own_keys
        InputProcessor.process_inputs = own_inputs  # type: ignore[method-assign]


def locks(engine: Engine) -> dict[str, Any]:
    """Cached tokens of the same gate and of another, with both locks, each by itself, and none."""
    rng = np.random.default_rng(2)
    prompt, mine, other = tokens(rng, 100), softmax(rng, 4), softmax(rng, 4)
    cached = {}
    for name, key, salt in (("both", False, False), ("key", False, True), ("salt", True, False), ("none", True, True)):
        engine.fresh()
        with without_locks(key, salt):
            runs = [engine.run([Asked("ad", gate, prompt)], max_tokens=1)[0] for gate in (mine, mine, other)]
        cached[name] = [run.num_cached_tokens for run in runs]
    engine.fresh()
    runs = [engine.run([Asked("ad", gate, prompt)], max_tokens=1)[0] for gate in (mine, None, [0.25] * 4, None)]
    cached["gate, none, uniform, none"] = [run.num_cached_tokens for run in runs]
    engine.fresh()
    return cached


def concurrent(engine: Engine) -> dict[str, Any]:
    """64 mixed requests, one by one and all at once; figures by how far the logits are apart."""
    rng = np.random.default_rng(3)
    kinds = ("ad", "ad", "ad2", "sigmoid", "plain", None)
    requests = []
    for i in range(64):
        adapter = kinds[i % len(kinds)]
        gate = None if i % 11 == 0 else a_gate(rng, adapter)
        requests.append(Asked(adapter, gate, tokens(rng, int(rng.integers(20, 90)))))
    engine.fresh()
    alone = [engine.run([asked], max_tokens=3)[0] for asked in requests]
    engine.fresh()
    together = engine.run(requests, max_tokens=3)
    engine.fresh()
    return _apart(alone, together)


LOGPROBS = ({"logprobs": 5}, {"logprob_token_ids": [3, 7, 200]}, {"logprobs": 0}, {"logprob_token_ids": [*range(100)]},
            {"logprobs": -1}, {"logprobs": None})  # fmt: skip


def logprobs_apart(engine: Engine) -> dict[str, Any]:
    """Requests that ask for tokens by name beside others that ask for the likeliest: (tokens, largest difference)."""
    rng = np.random.default_rng(9)
    prompts = [{"prompt_token_ids": tokens(rng, 40)} for _ in LOGPROBS]
    params = [parameters(None, max_tokens=3, **({"logprobs": None} | asked)) for asked in LOGPROBS]
    engine.fresh()
    alone = [engine.llm.generate([one], [own], use_tqdm=False)[0] for one, own in zip(prompts, params, strict=True)]
    engine.fresh()
    together = engine.llm.generate(prompts, params, use_tqdm=False)
    engine.fresh()
    found = []
    for one, other in zip(alone, together, strict=True):
        mine, theirs = one.outputs[0].logprobs or [], other.outputs[0].logprobs or []
        same = [a.keys() == b.keys() for a, b in zip(mine, theirs, strict=True)]
        apart = [
            abs(a[token].logprob - b[token].logprob) for a, b in zip(mine, theirs) for token in a.keys() & b.keys()
        ]
        found.append({"tokens": [len(step) for step in theirs], "same": all(same), "apart": max(apart, default=0.0)})
    return {"requests": found}


def preempted(engine: Engine) -> dict[str, Any]:
    """16 requests that outgrow the cache: some are thrown out and come back."""
    from vllm.v1.core.sched.scheduler import Scheduler

    rng = np.random.default_rng(4)
    requests = [Asked("ad" if i % 4 else None, None, tokens(rng, 120)) for i in range(16)]
    requests = [asked._replace(gate=a_gate(rng, asked.adapter)) for asked in requests]
    thrown = Counter[str]()
    own = Scheduler._preempt_request

    def counted(self: Any, request: Any, *rest: Any, **options: Any) -> Any:
        thrown["out"] += 1
        return own(self, request, *rest, **options)

    Scheduler._preempt_request = counted  # type: ignore[method-assign]
    try:
        engine.fresh()
        together = engine.run(requests, max_tokens=48)
    finally:
        Scheduler._preempt_request = own  # type: ignore[method-assign]
    alone = []
    for asked in requests:
        engine.fresh()
        alone.append(engine.run([asked], max_tokens=48)[0])
    engine.fresh()
    return _apart(alone, together) | {"thrown_out": thrown["out"]}


def _apart(alone: Sequence[Any], together: Sequence[Any]) -> dict[str, Any]:
    pairs = list(zip(alone, together, strict=True))
    same = [list(a.outputs[0].token_ids) == list(b.outputs[0].token_ids) for a, b in pairs]
    return {
        "requests": len(pairs),
        "same": sum(same),
        "apart": max(float(abs(logits(a) - logits(b)).max()) for a, b in pairs),
    }


def malformed(engine: Engine) -> dict[str, Any]:
    """A thousand requests that cannot be served; before and after them, and between, some that can."""
    import malformed as bad
    from hypothesis import HealthCheck, given, settings

    rng = np.random.default_rng(5)
    good = Asked("ad", softmax(rng, 4), tokens(rng, 100))
    several = [
        Asked(name, a_gate(rng, name), tokens(rng, 90)) for name in ("ad", "ad2", "plain", "sigmoid", None, "ad")
    ]
    engine.fresh()
    before = engine.run([good])[0]
    undisturbed = _stepwise(engine, several, lambda: None)
    refused = Counter[str]()

    @settings(
        max_examples=1200, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    @given(bad.requests())
    def refuse(request: bad.Bad) -> None:
        refused[_refuse(engine, request, good.prompt)] += 1

    refuse()
    for request in bad.EXTREMES:
        refused[_refuse(engine, request, good.prompt)] += 1
    extremes = iter(bad.EXTREMES * 50)
    waiting = engine.llm.llm_engine.has_unfinished_requests()
    disturbed = _stepwise(engine, several, lambda: _refuse(engine, next(extremes), good.prompt))
    engine.fresh()
    after = engine.run([good])[0]
    return {
        "refused": refused,
        "waiting": waiting,
        "same_after": bool(np.array_equal(logits(before), logits(after))),
        "same_between": all(np.array_equal(logits(a), logits(b)) for a, b in zip(undisturbed, disturbed, strict=True)),
        "served_between": len(disturbed),
        "refused_between": len(bad.EXTREMES) * 50 - len(list(extremes)),
    }


def _refuse(engine: Engine, request: Any, prompt: list[int]) -> str:
    """Send what must be refused by a ValueError that says what is wrong; the kind of what was refused."""
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    try:
        params = SamplingParams(max_tokens=2, extra_args=request.extra_args)
    except VLLMValidationError as error:
        return str(error)
    try:
        lora = request.lora(engine.lora(request.adapter))
        engine.llm.generate({"prompt_token_ids": prompt}, params, lora_request=lora, use_tqdm=False)
    except ValueError as error:
        said = str(error)
    else:
        raise AssertionError(f"it was served: {request}")
    assert "gate" in said, (request.kind, said)
    assert len(said) < 400, (request.kind, len(said))
    return str(request.kind)


def _stepwise(engine: Engine, requests: Sequence[Asked], between: Callable[[], Any]) -> list[Any]:
    """The answers to requests, with something done between any two steps of the engine."""
    engine.fresh()
    core = engine.llm.llm_engine
    for i, asked in enumerate(requests):
        options = {"lora_request": engine.lora(asked.adapter)}
        core.add_request(str(i), {"prompt_token_ids": asked.prompt}, parameters(asked.gate, max_tokens=4), **options)
        between()
    done: dict[str, Any] = {}
    while core.has_unfinished_requests():
        done |= {output.request_id: output for output in core.step() if output.finished}
        if len(done) < len(requests):
            between()
    return [done[str(i)] for i in range(len(requests))]


def needs_layers(engine: Engine) -> dict[str, Any]:
    """An adapter with a gate a layer, where the engine keeps one row of factors."""
    rng = np.random.default_rng(6)
    try:
        engine.run([Asked("layered", a_gate(rng, "layered"), tokens(rng, 40))])
    except ValueError as error:
        return {"said": str(error)}
    return {"said": "served"}


# ---- a gate a layer ----


def mixed_layers(engine: Engine) -> dict[str, Any]:
    """Gates a layer, nested and in one list, beside shared gates and none."""
    rng = np.random.default_rng(7)
    kinds: list[tuple[str | None, Any]] = [("layered", a_gate(rng, "layered")) for _ in range(4)]
    kinds += [("layered", [[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]]), ("layered", None)]
    kinds += [("ad", softmax(rng, 4)), ("ad", softmax(rng, 4)), ("plain", None), (None, None)]
    common = tokens(rng, 110)
    requests = [Asked(adapter, gate, common[: 90 + i]) for i, (adapter, gate) in enumerate(kinds)]
    flat = [asked._replace(gate=[weight for row in asked.gate for weight in row]) for asked in requests[:5]]
    first, again = engine.run(requests), engine.run(flat)
    engine.fresh()
    engine.by_runs(False)
    own = engine.run(requests)
    engine.by_runs(True)
    engine.fresh()
    keep(engine.out / "mixed_layers.npz", first=first, again=again, own=own)
    return {"first": told(requests, first), "again": told(requests[:5], again), "own": told(requests, own)}


def beams(engine: Engine) -> dict[str, Any]:
    """Beam searches with gates in the LoRA's name, all at once."""
    from vllm.sampling_params import BeamSearchParams

    from recllm.infer.vllm_plugin import gated_lora_request

    rng = np.random.default_rng(8)
    prompt = tokens(rng, 70)
    kinds = [(name, a_gate(rng, name)) for name in ("ad", "ad", "layered", "layered", "plain")]
    requests = [Asked(adapter, gate, prompt) for adapter, gate in kinds]
    loras = [engine.lora(asked.adapter) for asked in requests]
    gated = [
        lora if asked.gate is None else gated_lora_request(lora, asked.gate) for asked, lora in zip(requests, loras)
    ]
    found = engine.llm.beam_search(
        [{"prompt_token_ids": prompt}] * len(requests),
        BeamSearchParams(beam_width=3, max_tokens=4, ignore_eos=True),
        lora_request=gated,
    )
    engine.fresh()
    ends = [[beam.tokens[len(prompt) :] for beam in output.sequences] for output in found]
    return {"searches": [asked._asdict() | {"beams": end} for asked, end in zip(requests, ends, strict=True)]}


# ---- answers under a JSON schema ----


class Own(Engine):
    """The engine as recllm starts it."""

    def __init__(self, folder: Path, out: Path) -> None:
        from recllm.infer.vllm_engine import VllmModel
        from recllm.recipe import ModelSection

        self.folder, self.out = folder, out
        section = ModelSection(name_or_path=str(folder / "model"), dtype="float32")
        self.model = VllmModel(section, [folder / "ad", folder / "plain"], longest=256)
        self.llm = self.model.llm

    def ask(self, adapter: str | None) -> Any:
        """With an adapter, or none."""
        from recllm.infer.vllm_engine import VllmEngine

        return VllmEngine(self.model, None if adapter is None else self.folder / adapter)


HELD_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "action": {"type": "string", "enum": ["view", "add to cart", 'say "hi"', "nächste/日本"]},
        "item": {"type": "string", "maxLength": 3},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 2}, "maxItems": 2},
        "sure": {"type": "boolean"},
    },
    "required": ["action", "sure"],
    "additionalProperties": False,
}
HELD_TOKENS = 100  # enough for any of them


def held_prompts() -> list[list[dict[str, str]]]:
    """Chats that begin alike, some with an answer that has begun."""
    begun = [{"role": "assistant", "content": "They compared two.\n"}]
    return [
        [{"role": "user", "content": f"{'a shop. ' * 8}What does user {i} do next?"}, *(begun if i % 3 == 0 else [])]
        for i in range(9)
    ]


def held_gates() -> npt.NDArray[np.float64]:
    """(9, K) of the adapter."""
    rng = np.random.default_rng(11)
    return np.array([softmax(rng, 4) for _ in held_prompts()])


LABELS = ["view", "add to cart", "add to list", "buy"]


def held(engine: Own) -> dict[str, Any]:
    """Answers under a schema: each adapter and none, again from the cache, cut off, and beside free ones."""
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    prompts, gates, found = held_prompts(), held_gates(), {}
    own = {"max_new_tokens": HELD_TOKENS, "json_schema": HELD_SCHEMA}
    found["ad"] = engine.ask("ad").generate(prompts, gate_weights=gates, **own)
    found["again"] = engine.ask("ad").generate(prompts, gate_weights=gates, **own)
    found["plain"] = engine.ask("plain").generate(prompts, **own)
    found["base"] = engine.ask(None).generate(prompts, **own)
    found["cut"] = engine.ask(None).generate(prompts, **own | {"max_new_tokens": 15})
    scores = engine.ask("ad").score(prompts, [LABELS] * len(prompts), gate_weights=gates)
    grammar = engine.model.tokens.grammar(HELD_SCHEMA)
    rows = engine.model.tokens.for_generation(prompts, HELD_TOKENS)
    params = [
        SamplingParams(
            temperature=0,
            max_tokens=HELD_TOKENS,
            extra_args={"gate_weights": gate.tolist()},
            structured_outputs=StructuredOutputsParams(grammar=grammar.text) if i % 2 else None,
        )
        for i, gate in enumerate(gates)
    ]
    given = [{"prompt_token_ids": row} for row in rows]
    mixed = engine.llm.generate(given, params, lora_request=engine.lora("ad"), use_tqdm=False)
    beside = [list(output.outputs[0].token_ids) for output in mixed]
    free = engine.ask("ad").generate(prompts, gate_weights=gates, max_new_tokens=HELD_TOKENS, listed=[False] * 9)
    asked = {"prompts": prompts, "gates": gates.tolist(), "labels": LABELS, **own}
    return asked | {"found": found, "scores": scores.tolist(), "beside": beside, "free": free} | _refused(engine)


def _refused(engine: Own) -> dict[str, Any]:
    from recllm.errors import UserError

    before = engine.llm.llm_engine.has_unfinished_requests()
    try:
        engine.ask(None).generate(held_prompts(), json_schema={"type": "string", "pattern": "a"})
    except UserError as error:
        assert before == engine.llm.llm_engine.has_unfinished_requests()
        return {"refused": str(error)}
    return {"refused": "served"}


# ---- other engines ----


def sharded(engine: Engine) -> dict[str, Any]:
    """Two workers, each with half of every LoRA; gates reach them from this process."""
    requests = mixed_requests()
    first, again = engine.run(requests), engine.run(requests)
    keep(engine.out / "sharded.npz", first=first, again=again)
    layers = engine.llm.collective_rpc(_lora_classes)
    reports = engine.llm.collective_rpc("recllm_gates")
    return {"first": told(requests, first), "again": told(requests, again), "layers": layers, "reports": reports}


def _lora_classes(worker: Any) -> list[str]:
    modules = worker.model_runner.lora_manager._adapter_manager.modules.values()
    return sorted({type(module).__name__ for module in modules})


def real(engine: Engine) -> dict[str, Any]:
    """SmolLM2 with two instance-wise adapters and a plain one."""
    requests = mixed_requests(40_000, sigmoid=False)[3:]
    first, again = engine.run(requests, max_tokens=3), engine.run(requests, max_tokens=3)
    keep(engine.out / "real.npz", first=first, again=again)
    return {"first": told(requests, first), "again": told(requests, again)}


def _parts(name: str) -> Callable[[Engine], dict[str, Any]]:
    def case(_: Engine) -> dict[str, Any]:
        import parts

        return getattr(parts, name)()  # type: ignore[no-any-return]

    case.__name__ = name
    return case


SHARDED = {
    "tensor_parallel_size": 2,
    "fully_sharded_loras": True,
    "max_loras": 5,  # one more than there are: vLLM's own CPU kernels need an empty slot for requests without a LoRA
    "worker_extension_cls": "recllm.infer.vllm_plugin.worker.GateReport",
}
PROCESSES: dict[str, tuple[dict[str, Any], list[Callable[[Any], dict[str, Any]]]]] = {
    "stock": (
        {},
        [
            plain_answers,
            *map(
                _parts,
                ("versions", "symbols", "front_end", "step_gates", "two_buffers", "kernels", "views", "runner_v2"),
            ),
        ],
    ),
    "shared": (
        {},
        [plain_answers, mixed, every_position, locks, concurrent, logprobs_apart, preempted, malformed, needs_layers],
    ),
    "held": ({}, [held]),
    "layered": ({"logprobs_mode": "raw_logprobs"}, [mixed_layers, beams]),
    "sharded": (SHARDED, [sharded]),
    "real": ({"num_gpu_blocks_override": 200}, [real]),
}


def main(name: str, folder: str, out: str) -> None:
    """Run the cases of a process, write their figures."""
    options, cases = PROCESSES[name]
    engine = Own(Path(folder), Path(out)) if name == "held" else Engine(Path(folder), Path(out), **options)
    figures: dict[str, Any] = {}
    for case in cases:
        try:
            figures[case.__name__] = case(engine)
        except Exception:
            figures[case.__name__] = {"failed": traceback.format_exc()}
    (Path(out) / "figures.json").write_text(json.dumps(figures))


if __name__ == "__main__":
    main(*sys.argv[1:])
