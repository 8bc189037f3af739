"""The gateway before a stand-in for vLLM: what goes on to it, what comes back, what is refused, what is counted."""

import asyncio
import contextlib
import json
import re
import time

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="the server needs the extra `serve`")
pytest.importorskip("prometheus_client", reason="the server needs the extra `serve`")

import httpx
from hypothesis import given, settings
from hypothesis import strategies as st
from stand_in import KEY, Stub, error_of, running

from recllm.model.user_gate import UserGate
from recllm.serve.adapter import open_adapter
from recllm.serve.front_door import Limits
from recllm.serve.gate_cache import ENTRY_BYTES, GateCache
from recllm.serve.gateway import Upstream, create_app

CHAT = {"model": "recllm", "messages": [{"role": "user", "content": "hi"}]}


@contextlib.asynccontextmanager
async def gateway(adapter, stub, limits=None, key=None, cache=None):
    """A client of the gateway, in this process."""
    vllm = httpx.AsyncClient(transport=httpx.ASGITransport(app=stub.app), base_url="http://vllm")
    upstream = Upstream(vllm, KEY)
    upstream.problem = None
    app = create_app(adapter, "recllm", upstream, limits, key, cache)
    async with vllm, httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://gateway") as client:
        client.upstream = upstream
        yield client


def ask(adapter, stub, *requests, limits=None, key=None, cache=None):
    """Answers to (method, path, options), one after the other."""

    async def go():
        async with gateway(adapter, stub, limits, key, cache) as client:
            return [await client.request(method, path, **options) for method, path, options in requests]

    return asyncio.run(go())


def recommend(**document):
    return "POST", "/v1/recommend", {"json": document}


def chat(**document):
    return "POST", "/v1/chat/completions", {"json": CHAT | document}


def number(metrics: str, name: str) -> float:
    """A figure of /metrics."""
    return float(re.search(rf"^{re.escape(name)} (\S+)$", metrics, re.MULTILINE)[1])


# ---- what vLLM is asked ----


def test_a_ranking_is_asked_for_with_prompt_gate_and_exclusions(adapter, stub):
    items = [3, 5, 9, 12, 1, 7, 8, 2]
    ids = [adapter.catalogue.ids[item] for item in items]
    (answer,) = ask(adapter, stub, recommend(history=ids, k=4, user="u1"))
    assert answer.status_code == 200
    (asked,) = stub.asked
    assert asked["_key"] == f"Bearer {KEY}"
    assert asked["prompt_token_ids"] == adapter.prompt(items, "u1", "")
    expected = UserGate.load(adapter.folder).weights([np.array(items[-6:])])  # history.max_items
    np.testing.assert_allclose(asked["gate_weights"], expected[0], rtol=1e-6)
    assert asked["excluded"] == sorted(items)
    assert (asked["k"], asked["width"]) == (4, 10 * 4)
    document = answer.json()
    assert [item["item_id"] for item in document["items"]] == adapter.catalogue.ids[:4]
    assert [item["title"] for item in document["items"]] == adapter.catalogue.texts[:4]
    assert [item["score"] for item in document["items"]] == [0, -1, -2, -3]
    assert document["gate"] == {"source": "history", "items": 6, "reads": "all"}
    assert document["unknown_items"] == []
    assert "unknown_candidates" not in document


def test_exclusion_can_be_switched_off_and_width_is_given(adapter, stub):
    ask(adapter, stub, recommend(history=["i1"], k=4, width=77, exclude_history=False))
    assert stub.asked[0]["excluded"] == []
    assert stub.asked[0]["width"] == 77


def test_candidates_go_on_as_items_and_unknown_ones_are_told(adapter, stub):
    index = {item_id: place for place, item_id in enumerate(adapter.catalogue.ids)}
    (answer,) = ask(adapter, stub, recommend(history=["i1"], candidates=["i7", "Film 9", "no", {"title": "i7"}]))
    assert stub.asked[0]["candidates"] == [index["i7"], index["i9"]]
    assert "excluded" not in stub.asked[0]
    assert answer.json()["unknown_candidates"] == ["no", "i7"]
    assert answer.json()["width"] is None


def test_cold_start(adapter, stub):
    """What is unknown is left out of gate and prompt; nothing known is the plain LoRA."""
    known, mixed, unknown, empty = ask(
        adapter,
        stub,
        recommend(history=["i1", "i2"]),
        recommend(history=["x", "i1", "i2"]),
        recommend(history=["x", 99]),
        recommend(history=[]),
    )
    assert stub.asked[0]["prompt_token_ids"] == stub.asked[1]["prompt_token_ids"]
    assert stub.asked[0]["gate_weights"] == stub.asked[1]["gate_weights"]
    assert mixed.json()["unknown_items"] == ["x"]
    assert mixed.json()["gate"]["items"] == 2
    assert unknown.json()["unknown_items"] == ["x", "99"]
    assert stub.asked[2]["gate_weights"] is None
    assert stub.asked[2]["prompt_token_ids"] == stub.asked[3]["prompt_token_ids"]
    assert unknown.json()["gate"] == {"source": "uniform", "items": 0, "reads": "all"}
    assert empty.json()["unknown_items"] == []
    assert known.json()["gate"]["source"] == "history"


def test_user_history_becomes_the_gate_of_a_chat(adapter, stub):
    (answer,) = ask(adapter, stub, chat(user_history=["i1", "nope", "i2"], vllm_xargs={"other": 1}, temperature=0))
    (asked,) = stub.asked
    items = [adapter.catalogue.item(name, None) for name in ("i1", "i2")]
    assert asked["vllm_xargs"] == {"other": 1, "gate_weights": adapter.weights(np.array(items))}
    assert "user_history" not in asked
    assert asked["temperature"] == 0
    assert asked["messages"] == CHAT["messages"]
    assert answer.headers["x-recllm-gate"] == "history"
    assert answer.headers["x-recllm-gate-items"] == "2"
    assert json.loads(answer.headers["x-recllm-unknown-items"]) == ["nope"]
    assert answer.headers["x-request-id"] == "its-own"


def test_events_become_the_gate_of_a_chat(events_folder, stub):
    adapter = open_adapter(events_folder)
    history = [
        {"action": "view", "item_id": "i1"},
        {"action": "buy", "item_id": "nope"},
        {"action": "view"},
        {"action": "buy", "item_id": "i2"},
    ]
    answer, bare, ranked = ask(
        adapter, stub, chat(user_history=history), chat(user_history=["i1"]), recommend(history=["i1"])
    )
    (asked,) = stub.asked
    one, two = (adapter.catalogue.item(name, None) for name in ("i1", "i2"))
    codes = np.array([one + 1, 0, two + 1 + (40 + 1) * 1])  # (item + 1) + (40 items + 1) · action
    expected = UserGate.load(events_folder).weights([codes])[0]
    np.testing.assert_allclose(asked["vllm_xargs"]["gate_weights"], expected, rtol=1e-6)
    assert answer.headers["x-recllm-gate-items"] == "3"
    assert json.loads(answer.headers["x-recllm-unknown-items"]) == ["nope"]
    assert bare.status_code == 400
    assert "an event is expected" in error_of(bare)["message"]
    assert ranked.status_code == 404
    assert "reads events" in error_of(ranked)["message"]


def test_a_chat_without_user_history_goes_on_byte_for_byte(adapter, stub):
    body = b'{"model":"recllm",  "messages": [], "x": 1.0e0}'
    (answer,) = ask(adapter, stub, ("POST", "/v1/completions", {"content": body}))
    assert answer.status_code == 200
    assert stub.asked[0]["_path"] == "/v1/completions"
    assert "x-recllm-gate" not in answer.headers
    assert stub.asked[0]["x"] == 1


def test_unknown_users_of_a_chat_are_the_plain_lora(adapter, stub):
    answers = ask(adapter, stub, chat(user_history=["ünk\x7f\r\nno" * 50] * 30), chat(user_history=[]))
    assert all("vllm_xargs" not in asked for asked in stub.asked)
    assert [answer.headers["x-recllm-gate"] for answer in answers] == ["uniform"] * 2
    assert answers[0].headers["x-recllm-unknown-count"] == "30"
    header = answers[0].headers["x-recllm-unknown-items"]
    assert all(" " <= character <= "~" for character in header)
    told = json.loads(header)
    assert len(told) == 20
    assert {len(name) for name in told} == {100}


def test_a_plain_lora_has_no_gate(world, stub):
    plain = open_adapter(world.lora)
    ranked, told, refused = ask(plain, stub, recommend(history=["i1"]), chat(), chat(user_history=["i1"]))
    assert ranked.json()["gate"] == {"source": "none", "items": 0, "reads": None}
    assert stub.asked[0]["gate_weights"] is None
    assert told.status_code == 200
    assert refused.status_code == 400
    assert "plain LoRA without a gate" in error_of(refused)["message"]


def test_a_lora_of_stock_peft_chats_only(world, stub, tmp_path):
    import shutil

    shutil.copytree(world.lora, tmp_path / "stock")
    for name in ("items.parquet", "manifest.json"):
        (tmp_path / "stock" / name).unlink()
    stock = open_adapter(tmp_path / "stock")
    told, refused = ask(stock, stub, chat(), recommend(history=["i1"]))
    assert told.status_code == 200
    assert refused.status_code == 404
    assert "not trained on next_item" in error_of(refused)["message"]


# ---- refused ----


@pytest.mark.parametrize(
    ("request_", "status", "param", "text"),
    [
        (recommend(), 400, "history", "history is missing"),
        (recommend(history=["i1"], k=0), 400, "k", "k is 0, an integer from 1 to 200 is expected"),
        (recommend(history=["i1"] * 11), 400, "history", "at most 10 are expected"),
        (recommend(history=["i1"], model="other"), 400, "model", '"recllm" is expected'),
        (recommend(history=["i1"], candidates=["x", "y"]), 400, "candidates", "2 unknown items, at least 1 known"),
        (("POST", "/v1/recommend", {"content": b"{"}), 400, "body", "no JSON"),
        (("POST", "/v1/chat/completions", {"content": b"[]"}), 400, "body", "a JSON object is expected"),
        (chat(user_history="i1"), 400, "user_history", "a list of item ids"),
        (chat(user_history=None), 400, "user_history", "user_history is missing"),
        (chat(user_history=[{"item_id": "a", "timestamp": "x"}]), 400, "user_history[0].timestamp", "seconds"),
        (chat(user_history=["i1"], model="recllm-base"), 400, "model", 'the adapter "recllm" is expected'),
        (chat(user_history=["i1"], vllm_xargs=[]), 400, "vllm_xargs", "an object is expected"),
        (chat(user_history=["i1"], vllm_xargs={"gate_weights": [1]}), 400, "user_history", "one of them is expected"),
        (chat(logprobs=True, top_logprobs=21), 400, "top_logprobs", "top_logprobs is 21, 0 to 20 is expected"),
        (("POST", "/v1/completions", {"json": {"prompt": "", "logprobs": -1}}), 400, "logprobs", "0 to 20"),
        (chat(prompt_logprobs=1e9), 400, "prompt_logprobs", "0 to 20"),
        (("POST", "/v1/recommend", {"content": b" " * 3000}), 413, "body", "3000 bytes, at most 2000 are expected"),
        (("GET", "/v1/embeddings", {}), 404, None, "/v1/embeddings is no route of this server"),
        (("GET", "/v1/recommend", {}), 405, None, "does not take GET"),
    ],
)
def test_what_is_wrong_is_named(adapter, stub, request_, status, param, text):
    (answer,) = ask(adapter, stub, request_, limits=Limits(body=2000, history=10))
    assert answer.status_code == status
    error = error_of(answer)
    assert text in error["message"]
    assert error["param"] == param
    assert stub.asked == []


def test_a_body_without_a_length_is_cut_off(adapter, stub):
    async def parts():
        for _ in range(100):
            yield b" " * 1000

    (answer,) = ask(adapter, stub, ("POST", "/v1/recommend", {"content": parts()}), limits=Limits(body=2000))
    assert answer.status_code == 413
    assert "over 2000 bytes" in error_of(answer)["message"]


def test_a_body_that_does_not_arrive(adapter, stub):
    async def parts():
        yield b"{"
        await asyncio.sleep(5)

    (answer,) = ask(adapter, stub, ("POST", "/v1/recommend", {"content": parts()}), limits=Limits(body_s=0.1))
    assert answer.status_code == 408
    assert "0.1 s" in error_of(answer)["message"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["i1", "Film 2"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=6,
)
FIELDS = ["history", "user_history", "k", "width", "candidates", "user", "user_text", "model", "vllm_xargs", "stream"]


@given(st.lists(st.tuples(st.booleans(), st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=5)), min_size=20))
@settings(max_examples=12, deadline=None)
def test_nothing_that_is_sent_is_an_error_of_the_server(world, documents):
    requests = []
    for ranks, document in documents:
        path = "/v1/recommend" if ranks else "/v1/chat/completions"
        requests.append(("POST", path, {"content": json.dumps(document).encode()}))
    for answer in ask(open_adapter(world.ilora), Stub(), *requests):
        assert answer.status_code in (200, 400)
        if answer.status_code == 400:
            assert error_of(answer)["param"]


@pytest.mark.parametrize(
    ("header", "status"),
    [
        (None, 401),
        ("Bearer wrong", 401),
        ("Bearer ", 401),
        ("sesame", 401),
        ("Basic sesame", 401),
        ("Bearer sesame2", 401),
        ("Bearer sésame", 401),
        ("Bearer sesame", 200),
        ("bearer sesame", 200),
    ],
)
def test_the_key(adapter, stub, header, status):
    headers = {} if header is None else {"authorization": header.encode()}
    requests = [
        ("GET", "/v1/models", {"headers": headers}),
        ("POST", "/v1/chat/completions", {"headers": headers, "json": CHAT}),
    ]
    for answer in ask(adapter, stub, *requests, key="sesame"):
        assert answer.status_code == status
        if status == 401:
            assert answer.headers["www-authenticate"] == "Bearer"
            assert "sesame" not in answer.text
    assert all(asked["_key"] == f"Bearer {KEY}" for asked in stub.asked)  # vLLM never sees a client's key
    probes = ask(adapter, stub, ("GET", "/health", {}), ("GET", "/ready", {}), ("GET", "/metrics", {}), key="sesame")
    assert [answer.status_code for answer in probes] == [200] * 3


# ---- states, saturation, vLLM's failures ----


def test_health_and_readiness(adapter, stub):
    async def go():
        async with gateway(adapter, stub) as client:
            client.upstream.problem = "vLLM is starting"
            starting = [await client.get(path) for path in ("/health", "/ready", "/v1/models")]
            client.upstream.problem = None
            up = [await client.get(path) for path in ("/health", "/ready", "/v1/models")]
            stub.healthy = False
            return starting, up, await client.get("/ready")

    starting, up, ill = asyncio.run(go())
    assert [answer.status_code for answer in starting] == [200, 503, 503]
    assert error_of(starting[1])["message"] == "vLLM is starting"
    assert int(starting[2].headers["retry-after"]) >= 1
    assert [answer.status_code for answer in up] == [200, 200, 200]
    assert ill.status_code == 503


def test_saturation(adapter, stub):
    stub.delay_s = 0.3

    async def go():
        async with gateway(adapter, stub, Limits(concurrency=2)) as client:
            many = await asyncio.gather(*(client.post("/v1/recommend", json={"history": ["i1"]}) for _ in range(5)))
            probe = client.get("/health")
            after = await client.post("/v1/recommend", json={"history": ["i1"]})
            return many, await probe, after, (await client.get("/metrics")).text

    many, probe, after, metrics = asyncio.run(go())
    assert sorted(answer.status_code for answer in many) == [200, 200, 503, 503, 503]
    refused = next(answer for answer in many if answer.status_code == 503)
    assert refused.headers["retry-after"] == "1"
    assert "2 requests are in work, which is this server's limit" in error_of(refused)["message"]
    assert probe.status_code == after.status_code == 200
    assert number(metrics, "recllm_saturated_total") == 3
    assert number(metrics, "recllm_in_flight") == 0
    assert number(metrics, "recllm_concurrency_limit") == 2
    assert number(metrics, 'recllm_requests_total{route="/v1/recommend",status="503"}') == 3
    assert number(metrics, 'recllm_requests_total{route="/v1/recommend",status="200"}') == 3


def test_what_vllm_refuses(adapter, stub):
    stub.status = 400
    told, passed = ask(adapter, stub, recommend(history=["i1"]), chat())
    assert told.status_code == 400
    assert error_of(told)["message"] == "not today"
    assert passed.status_code == 400
    stub.status = 500
    told, passed = ask(adapter, stub, recommend(history=["i1"]), chat())
    assert told.status_code == 502
    assert passed.status_code == 500  # as it comes
    stub.status, stub.delay_s = 200, 1
    with running(stub.app) as (address, _):
        answers = asyncio.run(_direct(adapter, address, Limits(answer_s=0.1)))
    assert [answer.status_code for answer in answers] == [504, 504]
    answers = asyncio.run(_direct(adapter, address, Limits()))  # nobody listens now
    assert [answer.status_code for answer in answers] == [503, 503]
    assert all("retry-after" in answer.headers for answer in answers)


async def _direct(adapter, address, limits):
    async with httpx.AsyncClient(base_url=address) as vllm:
        upstream = Upstream(vllm)
        upstream.problem = None
        app = create_app(adapter, "recllm", upstream, limits)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://gateway") as client:
            return [
                await client.request(method, path, **options)
                for method, path, options in (recommend(history=["i1"]), chat())
            ]


# ---- streams, clients that go away, draining: over real sockets ----


@contextlib.contextmanager
def real(adapter, stub, limits=None):
    """The gateway and the stub, each behind a socket."""
    with running(stub.app, timeout_graceful_shutdown=1) as (address, _):
        vllm = httpx.AsyncClient(base_url=address)
        upstream = Upstream(vllm, KEY)
        upstream.problem = None
        app = create_app(adapter, "recllm", upstream, limits)
        with running(app, timeout_graceful_shutdown=10) as (own, server):
            yield own, server


def test_a_stream_passes_as_it_comes(adapter, stub):
    stub.delay_s = 0.4
    stub.parts = [f"data: {number}\n\n" for number in range(3)]
    with (
        real(adapter, stub) as (address, _),
        httpx.stream(
            "POST", f"{address}/v1/chat/completions", json=CHAT | {"stream": True, "user_history": ["i1"]}
        ) as answer,
    ):
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["x-recllm-gate"] == "history"
        arrived = [(part, time.monotonic()) for part in answer.iter_text()]
    assert "".join(part for part, _ in arrived) == "".join(stub.parts)
    assert arrived[-1][1] - arrived[0][1] > 1.5 * stub.delay_s  # not collected first


@pytest.mark.parametrize("streams", [False, True])
def test_a_client_that_goes_away_takes_its_request_along(adapter, stub, streams):
    stub.delay_s = 20
    with real(adapter, stub) as (address, _):
        for path, document in (("chat/completions", CHAT | {"stream": streams}), ("recommend", {"history": ["i1"]})):
            with (
                pytest.raises(httpx.ReadTimeout),
                httpx.stream("POST", f"{address}/v1/{path}", json=document, timeout=0.5) as answer,
            ):
                answer.read()
        until = time.monotonic() + 10
        while "recllm_in_flight 0" not in httpx.get(f"{address}/metrics").text and time.monotonic() < until:
            time.sleep(0.05)
        while stub.aborted < 2 and time.monotonic() < until:
            time.sleep(0.05)
        metrics = httpx.get(f"{address}/metrics").text
        assert number(metrics, "recllm_in_flight") == 0
        assert number(metrics, 'recllm_requests_total{route="/v1/recommend",status="499"}') == 1
    assert stub.aborted == 2


def test_a_stop_answers_what_was_taken(adapter, stub):
    stub.delay_s = 1
    with real(adapter, stub) as (address, server):

        async def go():
            async with httpx.AsyncClient(base_url=address) as client:
                taken = asyncio.gather(
                    client.post("/v1/recommend", json={"history": ["i1"]}),
                    client.post("/v1/chat/completions", json=CHAT),
                )
                while len(stub.asked) < 2:
                    await asyncio.sleep(0.02)
                server.should_exit = True
                await asyncio.sleep(0.4)
                with pytest.raises(httpx.ConnectError):
                    async with httpx.AsyncClient(base_url=address) as late:
                        await late.get("/health")
                return await taken

        assert [answer.status_code for answer in asyncio.run(go())] == [200, 200]


# ---- cache and metrics ----


def test_the_cache_is_bounded_and_counted(adapter, stub):
    entry = 4 * 8 + ENTRY_BYTES  # a gate of 4 experts
    histories = [[f"i{number}"] for number in range(5)]
    requests = [recommend(history=history) for history in [*histories, histories[-1], histories[0]]]
    *_, metrics = ask(adapter, stub, *requests, ("GET", "/metrics", {}), cache=GateCache(3 * entry))
    assert stub.asked[4]["gate_weights"] == stub.asked[5]["gate_weights"] != stub.asked[6]["gate_weights"]
    text = metrics.text
    assert number(text, "recllm_cache_hits_total") == 1
    assert number(text, "recllm_cache_misses_total") == 5 + 1  # the first was forgotten
    assert number(text, "recllm_cache_entries") == 3
    assert number(text, "recllm_cache_bytes") <= number(text, "recllm_cache_limit_bytes") == 3 * entry
    assert number(text, 'recllm_gates_total{source="history"}') == len(requests)
    assert metrics.headers["content-type"].startswith("text/plain; version=0.0.4")


def test_what_the_cache_takes_is_measured():
    import tracemalloc

    tracemalloc.start()
    cache = GateCache()
    for number in range(5000):
        cache.put(np.array([number]), [0.25] * 4)
    taken = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert 0.5 * cache.num_bytes < taken < 1.1 * cache.num_bytes
    small = GateCache(0)
    small.put(np.array([1]), [0.25] * 4)
    assert (len(small), small.num_bytes, small.get(np.array([1]))) == (0, 0, None)


def test_requests_are_counted_by_route_and_status(adapter, stub):
    requests = [recommend(history=["i1", "x", "y"]), recommend(), ("GET", "/anything", {}), ("GET", "/other/thing", {})]
    *_, metrics = ask(adapter, stub, *requests, ("GET", "/metrics", {}))
    text = metrics.text
    assert number(text, 'recllm_requests_total{route="/v1/recommend",status="200"}') == 1
    assert number(text, 'recllm_requests_total{route="/v1/recommend",status="400"}') == 1
    assert number(text, 'recllm_requests_total{route="other",status="404"}') == 2  # no label a path
    assert number(text, 'recllm_request_seconds_count{route="/v1/recommend"}') == 2
    assert number(text, "recllm_unknown_items_total") == 2
    assert number(text, "recllm_ready") == 1
