"""vLLM's OpenAI server with the plugin, as its own processes and over HTTP, against Transformers."""

import math
import signal
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from recllm.infer.json_grammar import json_grammar
from recllm.infer.transformers_engine import TransformersEngine

APART = 2e-4  # nats
GATES = [[0.7, 0.1, 0.1, 0.1], [0.05, 0.05, 0.85, 0.05]]
HALF = [1.0, 0.0, 1.0, 0.25, 0.5, 0.75, 0.0, 1.0]  # of the sigmoid gate
PROMPT = [int(token) for token in np.random.default_rng(0).integers(3, 259, 90)]
BAD = {
    "length": [0.5, 0.5],
    "sum": [0.5, 0.5, 0.5, 0.5],
    "NaN": [math.nan, 0.5, 0.25, 0.25],
    "infinity": [math.inf, 0, 0, 0],
    "negative": [1.5, -0.5, 0, 0],
    "words": ["0.25", "0.25", "0.25", "0.25"],
    "no list": 0.25,
    "text": "[0.25, 0.25, 0.25, 0.25]",
    "huge": [10**400, 0, 0, 0],
    "empty": [],
    "long": [0.25] * 100_000,
}


def completion(server, gate, model="ad", **options):
    extra = {} if gate is None else {"vllm_xargs": {"gate_weights": gate}}
    document = {"model": model, "prompt": PROMPT, "max_tokens": 6, "temperature": 0, "ignore_eos": True}
    return server.post("/v1/completions", document | extra | options)


def answer(server, gate, model="ad", **options):
    said = completion(server, gate, model, logprobs=1, return_token_ids=True, **options)
    assert said.status == 200, said
    return said.body["choices"][0]


@pytest.mark.parametrize(
    ("model", "gate"),
    [("ad", GATES[0]), ("ad", GATES[1]), ("ad", None), ("sigmoid", HALF), ("plain", None), ("base", None)],
)
def test_answers_are_those_of_the_merged_weights(server, reference, model, gate):
    said, name = answer(server, gate, model), None if model == "base" else model
    assert said["token_ids"] == reference.greedy(name, gate, PROMPT, 6)
    logits = reference.logits(name, gate, PROMPT + said["token_ids"][:-1])[len(PROMPT) - 1 :].astype(np.float64)
    nats = logits.max(-1) - np.log(np.exp(logits).sum(-1))
    assert said["logprobs"]["token_logprobs"] == pytest.approx(nats.tolist(), abs=APART)


def test_gates_change_the_answer(server):
    assert len({answer(server, gate)["text"] for gate in (*GATES, None)}) == 3


def test_chats_take_gates_too(server, reference, tiny_tokenizer):
    messages = [{"role": "user", "content": "what next?"}]
    ids = tiny_tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    for gate in GATES:
        document = {"model": "ad", "messages": messages, "max_tokens": 5, "temperature": 0, "ignore_eos": True}
        document |= {"vllm_xargs": {"gate_weights": gate}, "return_token_ids": True}
        said = server.post("/v1/chat/completions", document)
        assert said.status == 200, said
        assert said.body["choices"][0]["token_ids"] == reference.greedy("ad", gate, ids, 5)


SCHEMA = {
    "type": "object",
    "properties": {"action": {"enum": ["view", "add to cart", "buy"]}, "item": {"type": "string", "maxLength": 4}},
    "required": ["action", "item"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("gate", GATES)
def test_gates_and_structured_outputs_go_together(server, reference, tiny_tokenizer, gate):
    messages = [{"role": "user", "content": "what next?"}]
    engine = TransformersEngine(reference.gated("ad"), tiny_tokenizer, 1)
    ((expected, finished),) = engine.generate(
        [messages], gate_weights=np.array([gate]), max_new_tokens=80, json_schema=SCHEMA
    )
    assert finished
    document = {"model": "ad", "messages": messages, "max_tokens": 80, "temperature": 0}
    document["vllm_xargs"] = {"gate_weights": gate}
    said = server.post("/v1/chat/completions", document | {"structured_outputs": {"grammar": json_grammar(SCHEMA)}})
    assert said.status == 200, said
    assert said.body["choices"][0]["message"]["content"] == expected
    asked = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}
    said = server.post("/v1/chat/completions", document | {"response_format": asked})
    assert said.status == 200, said
    # vLLM's own grammar of the schema lets blanks stand between, endlessly: this model writes little else
    text = "".join(said.body["choices"][0]["message"]["content"].split())
    assert text
    assert text[:11] == '{"action":"'[: len(text)]


def test_the_cache_is_read_by_the_same_gate_only(server):
    cached = []
    for gate in ([0.4, 0.3, 0.2, 0.1], [0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]):
        usage = completion(server, gate).body["usage"]
        details = usage["prompt_tokens_details"]
        cached.append(details["cached_tokens"] if details else 0)
    assert cached == [0, 64, 0]


def test_requests_at_once_get_what_they_get_one_by_one(server):
    asked = [("ad", GATES[0]), ("ad", GATES[1]), ("ad", None), ("sigmoid", HALF), ("plain", None), ("base", None)] * 4
    alone = [answer(server, gate, model)["token_ids"] for model, gate in asked]
    with ThreadPoolExecutor(len(asked)) as pool:
        together = pool.map(lambda pair: answer(server, pair[1], pair[0])["token_ids"], asked)
    assert list(together) == alone


def test_beam_search_is_that_of_the_gate(server, reference):
    seen = []
    for gate in GATES:
        said = completion(server, gate, use_beam_search=True, n=3, max_tokens=4, return_token_ids=True)
        assert said.status == 200, said
        assert said.body["model"] == "ad"  # not the name that the gate rides in
        found = [choice["token_ids"] for choice in said.body["choices"]]
        assert found == reference.beams("ad", gate, PROMPT, width=3, count=4)
        seen.append(found)
    assert seen[0] != seen[1]


@pytest.mark.parametrize("beams", [{}, {"use_beam_search": True, "n": 2}], ids=["sampled", "beams"])
@pytest.mark.parametrize("kind", BAD)
def test_bad_gates_are_bad_requests_and_nothing_else_happens(server, kind, beams):
    before = answer(server, GATES[0])["token_ids"]
    said = completion(server, BAD[kind], **beams)
    assert said.status == 400
    assert "gate_weights" in said.said or kind == "huge"  # vLLM's own answer to integers that it cannot carry
    assert len(said.said) < 400
    assert server.get("/health").status == 200
    assert answer(server, GATES[0])["token_ids"] == before


@pytest.mark.parametrize("beams", [{}, {"use_beam_search": True, "n": 2}], ids=["sampled", "beams"])
@pytest.mark.parametrize(("model", "words"), [("plain", "a plain LoRA"), ("base", "for the base model")])
def test_gates_for_models_without_gates_are_bad_requests(server, model, words, beams):
    said = completion(server, GATES[0], model, **beams)
    assert said.status == 400
    assert words in said.said
    assert answer(server, None, model)["token_ids"]


def test_bad_gates_of_chats_are_bad_requests(server):
    document = {"model": "ad", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
    for beams in ({}, {"use_beam_search": True, "n": 2}):
        said = server.post("/v1/chat/completions", document | beams | {"vllm_xargs": {"gate_weights": [1.0, 1.0]}})
        assert said.status == 400
        assert "gate_weights has 2 numbers, a list of 4 numbers is expected" in said.said


def test_the_engines_own_key_is_not_the_clients(server):
    for value in ([1, "AACAPwAAgD8="], "AACAPwAAgD8="):
        said = completion(server, None, vllm_xargs={"recllm_gate_factors": value})
        assert said.status == 400
        assert "recllm_gate_factors is the engine's own" in said.said
    assert server.get("/health").status == 200


def test_the_server_lists_plain_names_and_ends_when_asked_to(server):
    assert [model["id"] for model in server.get("/v1/models").body["data"]] == ["base", "ad", "sigmoid", "plain"]
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(60) == 0
