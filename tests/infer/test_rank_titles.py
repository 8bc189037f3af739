"""Ranking a whole catalogue with a model: the tiny random Llama, plain and with adapters that read histories."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from recllm.errors import UserError
from recllm.infer.item_trie import ItemTrie, catalogue_trie
from recllm.infer.transformers_engine import TransformersEngine
from recllm.model.adapter import build_adapter, fit_gate_statistics
from recllm.model.chat import prompt_ids
from recllm.model.sequence_encoder import SASRec
from recllm.recipe import AdapterSection

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = [
    [{"role": "user", "content": "list"}, {"role": "assistant", "content": "Heat\nSpeed\n"}],
    [{"role": "user", "content": "a prompt that is longer"}, {"role": "assistant", "content": ""}],
    [{"role": "user", "content": "x"}, {"role": "assistant", "content": "Up\n"}],
]
TEXTS = ["Heat", "Heat 2", "He", "Up", "Heat", "Upwards", "Speed", "X", "Spy", "Amélie"]  # two items are "Heat"
DIFFERENT = list(dict.fromkeys(TEXTS))  # in the order of the trie's title numbers
HISTORIES = [np.array([1, 2, 3]), np.array([], dtype=np.int32), np.array([7])]
TOLERANCE = 1e-4  # nats, fp32


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def adapted(tiny_llama):
    """adapted(method): an adapter that reads histories, with random weights."""

    def build(method):
        torch.manual_seed(0)
        encoder = SASRec(20, 16, num_layers=1, max_items=8).eval()
        model = build_adapter(tiny_llama(), AdapterSection(method=method, r=8, num_experts=4), encoder).eval()
        fit_gate_statistics(model, encoder(torch.arange(20)[:, None]).detach())
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if any(part in name for part in ("lora_", "gate.", "soft_token.")):
                    parameter.normal_(std=0.5)
        return model

    return build


@pytest.fixture
def trie(tiny_tokenizer):
    return catalogue_trie(tiny_tokenizer, TEXTS, "\n")


def score_all(engine, mean=False, **given):
    """(N, S): every title scored by itself."""
    answers = [[f"{text}\n" for text in DIFFERENT]] * len(PROMPTS)
    return engine.score(PROMPTS, answers, length_normalised=mean, **given)


def assert_ranks(rankings, scores):
    """The rankings are those of scores (N, S), with these scores."""
    for ranking, row in zip(rankings, scores, strict=True):
        assert ranking.titles.tolist() == np.argsort(-row)[: len(ranking.titles)].tolist()
        assert ranking.scores == pytest.approx(row[ranking.titles], abs=TOLERANCE)


def assert_equal(rankings, others):
    for ranking, other in zip(rankings, others, strict=True):
        assert ranking.titles.tolist() == other.titles.tolist()
        assert ranking.scores == pytest.approx(other.scores, abs=TOLERANCE)


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_full_width_equals_scoring_every_title(tiny_llama, tiny_tokenizer, trie, attention, mean):
    engine = TransformersEngine(tiny_llama(attn_implementation=attention), tiny_tokenizer, batch_size=2)
    rankings = engine.rank_titles(PROMPTS, trie, trie.num_titles, length_normalised=mean)
    assert [len(ranking.titles) for ranking in rankings] == [len(DIFFERENT)] * 3
    assert_ranks(rankings, score_all(engine, mean))


@pytest.mark.parametrize("method", ["ilora", "soft_token"])
def test_each_row_uses_its_own_gate_or_token(adapted, tiny_tokenizer, trie, method):
    engine = TransformersEngine(adapted(method), tiny_tokenizer, batch_size=3)
    scores = score_all(engine, histories=HISTORIES)
    assert_ranks(engine.rank_titles(PROMPTS, trie, trie.num_titles, histories=HISTORIES), scores)
    others = score_all(engine, histories=HISTORIES[::-1])
    assert np.abs(scores - others)[[0, 2]].max(axis=1).min() > 0.1
    assert_ranks(engine.rank_titles(PROMPTS, trie, trie.num_titles, histories=HISTORIES[::-1]), others)


@pytest.mark.parametrize("mean", [False, True])
def test_shared_equals_separate_at_any_width(adapted, tiny_tokenizer, trie, mean):
    model = adapted("ilora")
    shared = TransformersEngine(model, tiny_tokenizer, 3)
    separate = TransformersEngine(model, tiny_tokenizer, 2, share_prompts=False)
    for width in (1, 2, 4, trie.num_titles):
        rankings = shared.rank_titles(PROMPTS, trie, width, 3, histories=HISTORIES, length_normalised=mean)
        assert 1 <= min(len(ranking.titles) for ranking in rankings) <= 3
        assert_equal(
            rankings, separate.rank_titles(PROMPTS, trie, width, 3, histories=HISTORIES, length_normalised=mean)
        )


@pytest.mark.parametrize("share_prompts", [True, False])
def test_a_batch_equals_single_rows(adapted, tiny_tokenizer, trie, share_prompts):
    model = adapted("ilora")
    together = TransformersEngine(model, tiny_tokenizer, 8, share_prompts)
    one = TransformersEngine(model, tiny_tokenizer, 1, share_prompts)
    excluded = [[0, 4], [], [3]]
    single = [
        one.rank_titles([p], trie, 3, excluded=[items], histories=[history])[0]
        for p, items, history in zip(PROMPTS, excluded, HISTORIES)
    ]
    assert_equal(together.rank_titles(PROMPTS, trie, 3, excluded=excluded, histories=HISTORIES), single)


@pytest.mark.parametrize("share_prompts", [True, False])
def test_excluded_items_never_come_back(tiny_llama, tiny_tokenizer, trie, share_prompts):
    engine = TransformersEngine(tiny_llama(), tiny_tokenizer, 3, share_prompts)
    excluded = [[0, 4, 1], [0], np.arange(1, 10)]  # both "Heat" and "Heat 2"; one "Heat"; all but item 0
    rankings = engine.rank_titles(PROMPTS, trie, trie.num_titles, excluded=excluded)
    found = [{DIFFERENT[title] for title in ranking.titles} for ranking in rankings]
    assert found == [set(DIFFERENT) - {"Heat", "Heat 2"}, set(DIFFERENT), {"Heat"}]
    scores = score_all(engine)
    scores[0, :2], scores[2, 1:] = -np.inf, -np.inf
    assert_ranks(rankings, scores)


def test_nothing_left_is_an_error_before_anything_is_read(tiny_llama, tiny_tokenizer, trie):
    model = tiny_llama()
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model was asked"))
    engine = TransformersEngine(model, tiny_tokenizer, 1)
    with pytest.raises(UserError, match="prompt 1: all 9 titles are excluded"):
        engine.rank_titles(PROMPTS, trie, 3, excluded=[[], range(10), []])
    with pytest.raises(ValueError, match="2 arrays of excluded items for 3 prompts"):
        engine.rank_titles(PROMPTS, trie, 3, excluded=[[], []])


def test_prompt_and_tree_are_read_once(tiny_llama, tiny_tokenizer, trie):
    model, read = tiny_llama(), []
    model.get_input_embeddings().register_forward_hook(lambda _, args, __: read.append(args[0].numel()))
    TransformersEngine(model, tiny_tokenizer, 1).rank_titles(PROMPTS[:1], trie, trie.num_titles)
    inner = trie.num_nodes - 1 - trie.num_titles  # without the root, which is the prompt's last token, and the leaves
    assert sum(read) == len(prompt_ids(tiny_tokenizer, PROMPTS[0])) + inner


def test_logits_stay_within_their_memory(tiny_llama, tiny_tokenizer, trie):
    model, made = tiny_llama(), []
    engine = TransformersEngine(model, tiny_tokenizer, 3)
    whole = engine.rank_titles(PROMPTS, trie, trie.num_titles)
    engine._logits_bytes = 4 * 259 * 2  # two rows of logits: a prompt alone, its frontier in pairs
    model.lm_head.register_forward_hook(lambda _, __, output: made.append(tuple(output.shape)))
    assert_equal(engine.rank_titles(PROMPTS, trie, trie.num_titles), whole)
    assert {shape[:2] for shape in made} == {(1, 1), (1, 2)}


def test_a_prompt_of_one_token(tiny_llama, tiny_tokenizer, trie):
    plain = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer.backend_tokenizer, eos_token="<|im_end|>")
    prompt = [{"role": "user", "content": ""}]
    assert len(prompt_ids(plain, prompt)) == 1
    engine = TransformersEngine(tiny_llama(), plain, 2)
    scores = engine.score([prompt], [[f"{text}\n" for text in DIFFERENT]])
    assert_ranks(engine.rank_titles([prompt], trie, trie.num_titles), scores)


def test_too_long_a_prompt_is_refused_with_the_longest_title(tiny_llama, tiny_tokenizer, trie):
    engine = TransformersEngine(tiny_llama(), tiny_tokenizer, 1)
    room = 512 - trie.depth - len(prompt_ids(tiny_tokenizer, [{"role": "user", "content": ""}]))
    for ask in (engine.check_ranking, lambda prompts, trie: engine.rank_titles(prompts, trie, 1)):
        ask([[{"role": "user", "content": "x" * room}]], trie)
        with pytest.raises(UserError, match="prompt 1 with its answer has 513 tokens, the model reads at most 512"):
            ask([PROMPTS[0], [{"role": "user", "content": "x" * (room + 1)}]], trie)


def test_a_trie_of_another_tokenizer_is_refused(tiny_llama, tiny_tokenizer):
    engine = TransformersEngine(tiny_llama(), tiny_tokenizer, 1)
    with pytest.raises(UserError, match="token 259, the model knows 0 to 258"):
        engine.check_ranking(PROMPTS, ItemTrie.build([[258], [259]]))


def test_bench_compares_every_width_with_the_exhaustive_ranking(tiny_model_folder, movielens):
    command = [sys.executable, str(ROOT / "scripts" / "bench" / "beam.py"), "--model", str(tiny_model_folder)]
    command += ["--prompts", "1", "--k", "1", "--widths", "1", "100"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    line = json.loads(done.stdout.splitlines()[-1])
    assert line["titles"] == 1659
    assert line["widths"]["100"]["recall"] == line["widths"]["100"]["top_1"] == 1.0
    assert line["exhaustive_s_per_prompt"] > 0
