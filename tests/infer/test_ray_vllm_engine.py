"""What the engine over replicas cuts up and puts together, and what a replica refuses to start with.

No Ray and no vLLM here: tests/infer/test_replicas.py has the one, tests/evaluate/test_vllm_evaluation.py both.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recllm import files
from recllm.errors import UserError
from recllm.infer.beams import Ranking
from recllm.infer.ray_vllm_engine import RayVllmEngine, _base_model_hash, start_vllm
from recllm.infer.tokens import Generation, Tokens
from recllm.recipe import ModelSection

PROMPTS = [[{"role": "user", "content": str(number)}] for number in range(5)]
GATES = np.arange(10).reshape(5, 2) / 10


class Engine:
    """Answers tell the prompt's number, and what came with it."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def score(self, prompts, answers, gate_weights, length_normalised) -> np.ndarray:
        scores = np.full((len(prompts), max(map(len, answers))), np.nan)
        for row, (prompt, texts) in enumerate(zip(prompts, answers, strict=True)):
            gate = 0 if gate_weights is None else gate_weights[row, 1]
            scores[row, : len(texts)] = [int(prompt[0]["content"]) + len(text) + gate for text in texts]
        return -scores if length_normalised else scores

    def rank_titles(self, prompts, trie, width, k, excluded, gate_weights, length_normalised) -> list[Ranking]:
        assert (trie, width, k, length_normalised) == ("trie", 7, 3, True)
        assert gate_weights is None
        return [Ranking(np.array(out), np.array([]), True) for _, out in zip(prompts, excluded, strict=True)]

    def generate(self, prompts, gate_weights, max_new_tokens, listed, json_schema) -> list[Generation]:
        texts = [f"{prompt[0]['content']} {max_new_tokens} {json_schema} {self.folder}" for prompt in prompts]
        return [Generation(text, is_listed) for text, is_listed in zip(texts, listed, strict=True)]


class Two:
    """In place of `Replicas`: chunks of two prompts, answered here."""

    def spans(self, count: int) -> list[slice]:
        return [slice(start, min(start + 2, count)) for start in range(0, count, 2)]

    def ask(self, folder, method, chunks, shared, progress, total) -> list[Any]:
        assert (progress, total) == ("asking", 5)
        found = [getattr(Engine(folder), method)(**chunk, **(shared or {})) for chunk in chunks]
        assert [len(part) for part in found] == [2, 2, 1]
        return found


@pytest.fixture
def engine(tiny_tokenizer) -> RayVllmEngine:
    return RayVllmEngine(Two(), Tokens(tiny_tokenizer, None, 259))  # type: ignore[arg-type]


def test_scores_keep_their_prompts_answers_and_gates(engine):
    answers = [["a"], ["a", "bb"], ["a", "bb", "ccc"], ["a"], ["a"]]
    found = engine.score(PROMPTS, answers, GATES, progress="asking")
    expected = np.full((5, 3), np.nan)
    for row, texts in enumerate(answers):
        expected[row, : len(texts)] = [row + len(text) + (2 * row + 1) / 10 for text in texts]
    np.testing.assert_allclose(found, expected)
    np.testing.assert_allclose(engine.score(PROMPTS, answers, GATES, True, "asking"), -expected)
    with pytest.raises(ValueError, match="4 gate_weights for 5 prompts"):
        engine.score(PROMPTS, answers, GATES[1:], progress="asking")


def test_rankings_and_answers_come_in_the_order_of_the_prompts(engine):
    excluded = [[number] for number in range(5)]
    ranked = engine.rank_titles(PROMPTS, "trie", 7, 3, excluded, length_normalised=True, progress="asking")
    assert [ranking.titles.tolist() for ranking in ranked] == excluded
    listed = [True, False, False, True, True]
    written = engine.generate(PROMPTS, None, 9, listed, "asking", {"type": "string"})
    assert written == [Generation(f"{n} 9 {{'type': 'string'}} None", listed[n]) for n in range(5)]


def test_a_replica_starts_with_the_driver_s_model_and_adapters_only(tmp_path, tiny_model_folder):
    section, adapter = ModelSection(name_or_path=str(tiny_model_folder), dtype="float32"), tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    theirs = {str(adapter): files.sha256_of(adapter)}
    (adapter / "adapter_config.json").write_text("{ }")
    with pytest.raises(UserError, match="adapter holds another adapter here"):
        start_vllm(section, [adapter], 100, _base_model_hash(section), theirs)
    with pytest.raises(UserError, match="absent holds no adapter here"):
        start_vllm(section, [adapter], 100, _base_model_hash(section), {str(tmp_path / "absent"): ""})
    with pytest.raises(UserError, match="is another base model here"):
        start_vllm(section, [], 100, _base_model_hash(ModelSection(name_or_path="some/name")), {})


def test_a_base_model_is_known_by_its_files(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"1234")
    section = ModelSection(name_or_path=str(tmp_path))
    before = _base_model_hash(section)
    assert _base_model_hash(section) == before
    (tmp_path / "model.safetensors").write_bytes(b"12345")
    assert _base_model_hash(section) != before
