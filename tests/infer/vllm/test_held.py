"""Answers that vLLM holds to a JSON schema, with gates, against Transformers under the same schema."""

import json

import numpy as np
import pytest
import torch

from recllm.infer.tokens import Tokens
from recllm.infer.transformers_engine import TransformersEngine

APART = 1e-3  # nats, of whole labels in fp32


@pytest.fixture(scope="module")
def expected(held, reference, tiny_tokenizer):
    """What Transformers writes under the schema, by adapter."""
    torch.set_num_threads(1)
    case = held["held"]
    asked = {"max_new_tokens": case["max_new_tokens"], "json_schema": case["json_schema"]}
    models = {"ad": reference.gated("ad"), "plain": reference.merged("plain", None), "base": reference.base()}
    return {
        name: TransformersEngine(model, tiny_tokenizer, 9).generate(
            case["prompts"], gate_weights=np.array(case["gates"]) if name == "ad" else None, **asked
        )
        for name, model in models.items()
    }


@pytest.mark.parametrize("run", ["ad", "again", "plain", "base"])
def test_answers_under_a_schema_are_those_of_transformers(held, expected, run):
    answers = [tuple(answer) for answer in held["held"]["found"][run]]
    assert answers == expected["ad" if run == "again" else run]
    assert all(finished for _, finished in answers)


def test_every_answer_parses_and_fits(held):
    jsonschema = pytest.importorskip("jsonschema")
    texts = [text for run in ("ad", "plain", "base") for text, _ in held["held"]["found"][run]]
    for text in texts:
        value = json.loads(text)
        jsonschema.Draft202012Validator(held["held"]["json_schema"]).validate(value)
        assert json.dumps(value, ensure_ascii=False) == text
    assert len(set(texts)) > 5


def test_gates_decide_under_a_schema_too(held):
    found = held["held"]["found"]
    assert found["ad"] != found["base"]


def test_an_answer_that_the_limit_cuts_is_not_finished(held):
    found = held["held"]["found"]
    for (cut, finished), (whole, _) in zip(found["cut"], found["base"], strict=True):
        assert not finished
        assert cut == whole.encode()[:15].decode(errors="replace")


def test_held_and_free_requests_of_one_step_leave_each_other_alone(held, tiny_tokenizer):
    case, tokens = held["held"], Tokens(tiny_tokenizer, 256, 259)
    grammar = tokens.grammar(case["json_schema"])
    for i, ids in enumerate(case["beside"]):
        if i % 2:
            assert list(tokens.read_held(ids, grammar)) == case["found"]["ad"][i]
        else:
            assert list(tokens.read(ids, listed=False)) == case["free"][i]
            assert not case["free"][i][0].startswith("{")


def test_labels_are_scored_as_in_one_forward_of_transformers(held, reference, tiny_tokenizer):
    engine, case = TransformersEngine(reference.gated("ad"), tiny_tokenizer, 9), held["held"]
    given = [case["labels"]] * len(case["prompts"])
    scores = engine.score(case["prompts"], given, gate_weights=np.array(case["gates"]), one_forward=True)
    assert np.array(case["scores"]) == pytest.approx(scores, abs=APART)


def test_a_bad_schema_is_found_before_vllm_is_asked(held):
    assert 'has the keyword "pattern"' in held["held"]["refused"]
