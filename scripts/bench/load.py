"""A server under load, over loopback: milliseconds a request at 1, 8 and 32 clients, and what the gateway adds.

    python scripts/bench/load.py [--adapter FOLDER] [--clients 1 8 32] [--seconds 6]

Starts `recllm serve` and asks it in four ways: a chat through the gateway with `user_history`; the same request
straight to vLLM, with the gate already in it; /v1/recommend over the whole catalogue; and /v1/recommend with 20
candidates. Each of so many clients asks again as soon as it is answered, for some seconds; what is not answered a while
later is given up and counted as `unfinished`. Every user has a history and a prompt of their own. Each case prints a
line; the last line is one JSON object with all of them.

`gateway_overhead_ms_p50` compares one client's requests for one token, gateway and vLLM in turn: the difference of the
medians. The prompt is short, because the figure is as noisy as vLLM is slow; take a small model where the machine is
busy. Without --adapter a random one is made, on SmolLM2-135M and MovieLens-100K: what it says is noise, and takes as
long. The load is made on the same machine and takes its share of it.
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import psutil
import torch

from recllm.data.dataset import Dataset
from recllm.infer.vllm_plugin.gates import GATE_WEIGHTS
from recllm.model.user_gate import UserGate
from recllm.serve.vllm_process import free_port

NAME = "recllm"
START_S = 300
GRACE_S = 30  # for answers that are still under way when a case is over
USERS, ITEMS_OF_A_USER = 64, 20
CANDIDATES = 20

Request = tuple[str, dict[str, Any]]  # path, body


class Target(NamedTuple):
    """Where requests go."""

    address: str
    key: str | None = None

    @property
    def _headers(self) -> dict[str, str]:
        return {} if self.key is None else {"authorization": f"Bearer {self.key}"}

    def client(self) -> httpx.Client:
        """For one request after the other."""
        return httpx.Client(base_url=self.address, headers=self._headers, timeout=300, trust_env=False)

    def many_clients(self) -> httpx.AsyncClient:
        """For requests at once: a pool of as many connections."""
        pool = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        return httpx.AsyncClient(
            base_url=self.address, headers=self._headers, limits=pool, timeout=300, trust_env=False
        )


def main() -> None:
    """Start, measure every case, stop, and print."""
    arguments = _arguments()
    with tempfile.TemporaryDirectory(prefix="recllm-load-") as scratch:
        adapter = arguments.adapter or random_adapter(arguments.model, Path(scratch))
        with Serving(adapter, arguments, Path(scratch)) as serving:
            users = make_users(adapter, arguments)
            line = {
                "bench": "load",
                "adapter": str(arguments.adapter or "random"),
                "dtype": arguments.dtype,
                "device": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu",
                "cores": len(os.sched_getaffinity(0)),
                "load_average_before": round(os.getloadavg()[0], 1),
                "max_tokens": arguments.max_tokens,
                "recommend_k": arguments.k,
                "recommend_width": arguments.width,
                "start_s": round(serving.start_s, 1),
                **asyncio.run(measure(serving, users, arguments)),
            }
    print(json.dumps(line))


# ---- the server ----


class Serving:
    """`recllm serve` as a process, and the vLLM behind it."""

    def __init__(self, adapter: Path, arguments: argparse.Namespace, scratch: Path) -> None:
        port = free_port("127.0.0.1")
        self.gateway, self.log = Target(f"http://127.0.0.1:{port}"), scratch / "vllm.log"
        words = [sys.executable, "-m", "recllm.cli", "serve", str(adapter), "--name", NAME, "--port", str(port)]
        words += [
            "--dtype",
            arguments.dtype,
            "--max-model-len",
            str(arguments.max_model_len),
            "--vllm-log",
            str(self.log),
        ]
        words += [] if arguments.model is None else ["--model", arguments.model]
        self.words, self.start_s = words, 0.0

    def __enter__(self) -> "Serving":
        started = time.monotonic()
        self.process = subprocess.Popen(self.words)
        while time.monotonic() - started < START_S and self.process.poll() is None:
            try:
                if httpx.get(f"{self.gateway.address}/ready", timeout=5).status_code == 200:
                    self.start_s = time.monotonic() - started
                    return self
            except httpx.TransportError:
                pass
            time.sleep(0.3)
        self.__exit__()
        raise SystemExit("the server has not started: see what it says above")

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.terminate()
        self.process.wait(60)

    @property
    def vllm(self) -> Target:
        """vLLM's own server, which asks for the key that the gateway gave it."""
        child = next(
            p for p in psutil.Process(self.process.pid).children() if "recllm.serve.vllm_server" in p.cmdline()
        )
        words = child.cmdline()
        return Target(f"http://127.0.0.1:{words[words.index('--port') + 1]}", child.environ()["VLLM_API_KEY"])


def random_adapter(model: str | None, scratch: Path) -> Path:
    """An instance-wise adapter whose numbers are random, for MovieLens-100K."""
    from recllm.convert.pipeline import convert
    from recllm.model.adapter import build_adapter, fit_gate_statistics, save_adapter
    from recllm.model.base_model import load_base_model
    from recllm.model.sequence_encoder import SASRec
    from recllm.recipe import load_recipe

    recipe = load_recipe("movielens/next_item_ilora", [] if model is None else [f"model.name_or_path={model}"])
    manifest = convert(recipe, scratch / "dataset")
    items = manifest["counts"]["items"]
    torch.manual_seed(0)
    encoder = SASRec(items, 64, max_items=recipe.history.max_items).eval()
    encoder.vocabulary_sha256 = manifest["items_sha256"]
    adapter = build_adapter(load_base_model(recipe.model)[0], recipe.adapter, encoder)
    fit_gate_statistics(adapter, encoder(torch.arange(items)[:, None]))
    with torch.no_grad():
        for name, weights in adapter.named_parameters():
            if "lora_B" in name or name.startswith("base_model.gate."):
                weights.copy_(torch.randn(weights.shape) * 0.02)
    save_adapter(adapter, scratch / "adapter", items=scratch / "dataset" / "items.parquet", manifest=manifest)
    return scratch / "adapter"


# ---- what is asked ----


class User(NamedTuple):
    """One user's requests."""

    chat: dict[str, Any]  # without a gate
    history: list[str]  # item ids
    gate: list[float]
    candidates: list[str]


def make_users(adapter: Path, arguments: argparse.Namespace) -> list[User]:
    """Histories drawn by seed."""
    dataset, rng = Dataset.open(adapter), np.random.default_rng(arguments.seed)
    ids = dataset.items["item_id"].to_pylist()
    gate, longest = UserGate.load(adapter), int(dataset.manifest["history_max_items"])
    users = []
    for _ in range(USERS):
        items = rng.choice(len(ids), ITEMS_OF_A_USER + CANDIDATES, replace=False)
        own, others = items[:ITEMS_OF_A_USER], items[ITEMS_OF_A_USER:]
        listed = "\n".join(dataset.titles[item] for item in own[-10:])
        content = f"I watched these films, oldest first:\n{listed}\n\nWhich film do I watch next? Its title only."
        chat = {"model": NAME, "messages": [{"role": "user", "content": content}], "temperature": 0, "ignore_eos": True}
        weights = gate.weights([own[-longest:]])[0].ravel().tolist()
        users.append(User(chat, [ids[item] for item in own], weights, [ids[item] for item in others]))
    return users


def chat_gateway(user: User, arguments: argparse.Namespace) -> Request:
    """A chat with the user's history."""
    return "/v1/chat/completions", user.chat | {"max_tokens": arguments.max_tokens, "user_history": user.history}


def chat_direct(user: User, arguments: argparse.Namespace) -> Request:
    """The same as the gateway asks vLLM."""
    gate = {GATE_WEIGHTS: user.gate}
    return "/v1/chat/completions", user.chat | {"max_tokens": arguments.max_tokens, "vllm_xargs": gate}


def recommend(user: User, arguments: argparse.Namespace) -> Request:
    """The whole catalogue."""
    return "/v1/recommend", {"history": user.history, "k": arguments.k, "width": arguments.width}


def recommend_among(user: User, _: argparse.Namespace) -> Request:
    """Some candidates."""
    return "/v1/recommend", {"history": user.history, "candidates": user.candidates}


CASES: dict[str, Callable[[User, argparse.Namespace], Request]] = {
    "chat_gateway": chat_gateway,
    "chat_direct": chat_direct,
    "recommend": recommend,
    "recommend_candidates": recommend_among,
}


# ---- measured ----


async def measure(serving: Serving, users: list[User], arguments: argparse.Namespace) -> dict[str, Any]:
    """The overhead, then every case at every number of clients."""
    found: dict[str, Any] = overhead(serving, users, arguments)
    print(f"gateway overhead: {json.dumps(found)}", flush=True)
    found["clients"] = {}
    for count in arguments.clients:
        cases = {}
        for name, make in CASES.items():
            target = serving.vllm if name == "chat_direct" else serving.gateway
            cases[name] = await load(target, [make(user, arguments) for user in users], count, arguments.seconds)
            print(f"{count} clients, {name}: {json.dumps(cases[name])}", flush=True)
        found["clients"][count] = cases
    return found


def overhead(serving: Serving, users: list[User], arguments: argparse.Namespace) -> dict[str, Any]:
    """One client, one token a request, the two ways in turn, after both have seen every request once."""
    one = argparse.Namespace(**vars(arguments) | {"max_tokens": 1})
    times: dict[str, list[float]] = {"gateway": [], "direct": []}
    short = {"messages": [{"role": "user", "content": "Next?"}]}  # the less vLLM has to do, the less noise
    few = [user._replace(chat=user.chat | short) for user in users[:8]]
    with serving.gateway.client() as gateway, serving.vllm.client() as vllm:
        for number in range(len(few) + arguments.pairs):
            user = few[number % len(few)]
            ways = [("gateway", gateway, chat_gateway(user, one)), ("direct", vllm, chat_direct(user, one))]
            for name, client, (path, body) in ways if number % 2 else ways[::-1]:
                started = time.perf_counter()
                client.post(path, json=body).raise_for_status()
                if number >= len(few):
                    times[name].append(1e3 * (time.perf_counter() - started))
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "gateway_overhead_ms_p50": round(medians["gateway"] - medians["direct"], 2),
        "gateway_ms_p50": round(medians["gateway"], 2),
        "direct_ms_p50": round(medians["direct"], 2),
        "pairs": arguments.pairs,
    }


async def load(target: Target, requests: list[Request], clients: int, seconds: float) -> dict[str, Any]:
    """So many clients that ask again as soon as they are answered."""
    times, errors = list[float](), Counter[str]()
    started = time.perf_counter()
    until = started + seconds

    async def ask(client: httpx.AsyncClient, number: int) -> None:
        while time.perf_counter() < until:
            path, body = requests[number % len(requests)]
            number += clients
            asked = time.perf_counter()
            try:
                answer = await client.post(path, json=body)
                problem = None if answer.status_code == 200 else f"{answer.status_code}: {answer.text[:300]}"
            except httpx.HTTPError as error:
                problem = repr(error)
            if problem is None:
                times.append(1e3 * (time.perf_counter() - asked))
            else:
                errors[problem] += 1

    async with target.many_clients() as client:
        tasks = [asyncio.create_task(ask(client, number)) for number in range(clients)]
        _, pending = await asyncio.wait(tasks, timeout=seconds + GRACE_S)
        for task in pending:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    taken = time.perf_counter() - started
    found: dict[str, Any] = {"requests": len(times), "errors": errors.total(), "unfinished": len(pending)}
    if errors:
        found["what"] = dict(errors)
    if times:
        p50, p99 = np.percentile(times, [50, 99])
        found |= {"p50_ms": round(p50, 1), "p99_ms": round(p99, 1), "per_s": round(len(times) / taken, 2)}
    return found


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", type=Path, help="an instance-wise adapter; default: a random one")
    parser.add_argument("--model", help="base model; default: the adapter's")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--max-model-len", type=int, default=1024)
    parser.add_argument("--clients", type=int, nargs="*", default=[1, 8, 32], help="none: the overhead alone")
    parser.add_argument("--seconds", type=float, default=6.0, help="of a case")
    parser.add_argument("--max-tokens", type=int, default=8, help="of a chat")
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--width", type=int, default=20, help="of /v1/recommend's beam; the server's default is 100")
    parser.add_argument("--pairs", type=int, default=200, help="of requests that compare gateway and vLLM")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
