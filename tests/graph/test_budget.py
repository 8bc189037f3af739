import pickle
from functools import cache

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from recllm.data import offline
from recllm.graph import verbalise
from recllm.graph.budget import Budget, is_additive
from recllm.graph.store import ALWAYS
from recllm.graph.subgraphs import Subgraphs
from recllm.graph.verbalise import STYLES, Verbaliser

from .test_verbalise import FILMS, HEAT, VERBS, cases, subgraphs_of, written_by

LINES = [
    "Heat: directed by Michael Mann; has genre Crime, Drama", "Michael Mann directed Heat and The Insider (1999).",
    '(Heat, directed by, Michael Mann) ("Crouching Tiger, Hidden Dragon", has genre, Drama)', "It's in the 90s, isn't",
    '{"@id": "#Heat", "has_genre": [{"@id": "#Crime"}, {"@id": "#Drama"}]},', "<#Heat> <#genre> <#Crime>, <#Drama>.",
]  # fmt: skip
LLAMA_3 = (  # its pattern, which is GPT-4's with other letters
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def trained(model, trainer, pre_tokenizer=None, normalizer=None):
    tokenizer = Tokenizer(model)
    if normalizer:
        tokenizer.normalizer = normalizer
    if pre_tokenizer:
        tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.train_from_iterator(LINES * 4, trainer)
    return tokenizer


def bpe_trainer(size, alphabet=()):
    options = {"special_tokens": ["<unk>"], "show_progress": False}
    return trainers.BpeTrainer(vocab_size=size, initial_alphabet=list(alphabet), **options)


def byte_level():
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return trained(models.BPE(), bpe_trainer(400, alphabet), pre_tokenizers.ByteLevel(add_prefix_space=False))


def llama_3():
    split = pre_tokenizers.Split(Regex(LLAMA_3), behavior="isolated")
    both = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    return trained(models.BPE(), bpe_trainer(400, pre_tokenizers.ByteLevel.alphabet()), both)


def metaspace():
    return trained(models.BPE(unk_token="<unk>"), bpe_trainer(200), pre_tokenizers.Metaspace())


def llama_2():
    """Blanks as "▁", one at the front, and no pre-tokenizer: only the vocabulary keeps tokens from spanning words."""
    tokenizer = metaspace()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([])
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return tokenizer


def unigram():
    trainer = trainers.UnigramTrainer(vocab_size=120, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False)
    return trained(models.Unigram(), trainer, pre_tokenizers.Metaspace())


def word_piece():
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[UNK]"], show_progress=False)
    bert = pre_tokenizers.BertPreTokenizer()
    return trained(models.WordPiece(unk_token="[UNK]"), trainer, bert, normalizers.BertNormalizer())


def spanning():
    """Trained without cutting at blanks: has tokens such as "directed by"."""
    return trained(models.BPE(unk_token="<unk>"), bpe_trainer(300))


def smollm2():
    found = sorted(offline.cache().glob("smollm2-135m-instruct-*-bf16/tokenizer.json"))
    if not found:
        pytest.skip("the small model is not in the cache yet")
    return Tokenizer.from_file(str(found[0]))


ADDITIVE = [byte_level, llama_3, metaspace, llama_2, unigram, word_piece, smollm2]
TOKENIZERS = [*ADDITIVE, spanning]
FORMATS = sorted(STYLES)


@cache
def made(make):
    return make()


def fit(subgraphs, verbaliser, budget, tokenizer):
    return Budget(verbaliser, tokenizer, budget).fit(subgraphs)


def length(tokenizer, text):
    return len(tokenizer.encode(text, add_special_tokens=False))


def plain_fit(verbaliser, tokenizer, budget, prompt):
    """Which triples are kept: best first, each whose text with those before it is within the budget."""
    kept = []
    for place in range(len(prompt)):
        alone = subgraphs_of([[prompt[number] for number in [*kept, place]]])
        (text,) = written_by(verbaliser, alone)
        (before,) = written_by(verbaliser, subgraphs_of([[prompt[number] for number in kept]]))
        if text != before and length(tokenizer, text) <= budget:
            kept.append(place)
    return kept


@pytest.mark.parametrize("make", TOKENIZERS)
@settings(max_examples=25, deadline=None)
@given(format=st.sampled_from(FORMATS), case=cases(), budget=st.integers(1, 90), dates=st.booleans())
def test_within_budget_whole_triples_and_counted_exactly(make, format, case, budget, dates):
    entities, relations, prompts = case
    verbaliser, tokenizer = Verbaliser(entities, relations, format, dates=dates), made(make)
    fitted = fit(subgraphs_of(prompts), verbaliser, budget, tokenizer)
    assert fitted.tokens.tolist() == [length(tokenizer, text) for text in fitted.texts]
    assert fitted.tokens.max(initial=0) <= budget
    assert fitted.texts == written_by(verbaliser, subgraphs_of(prompts), fitted.is_kept)
    kept = np.split(fitted.is_kept, np.cumsum([len(prompt) for prompt in prompts]))[: len(prompts)]
    assert fitted.kept.tolist() == [chosen.sum() for chosen in kept]
    assert fitted.num_too_small == sum(len(prompt) > 0 and not chosen.any() for prompt, chosen in zip(prompts, kept))


@pytest.mark.parametrize("make", ADDITIVE)
@settings(max_examples=25, deadline=None)
@given(format=st.sampled_from(FORMATS), case=cases(), budget=st.integers(1, 90), dates=st.booleans())
def test_best_first_each_that_fits(make, format, case, budget, dates):
    entities, relations, prompts = case
    verbaliser, tokenizer = Verbaliser(entities, relations, format, dates=dates), made(make)
    budgeted = Budget(verbaliser, tokenizer, budget)
    assert budgeted.is_additive
    is_kept = budgeted.fit(subgraphs_of(prompts)).is_kept
    expected = [plain_fit(verbaliser, tokenizer, budget, prompt) for prompt in prompts]
    begins = np.cumsum([0, *map(len, prompts)])
    assert np.flatnonzero(is_kept).tolist() == [begins[n] + place for n, kept in enumerate(expected) for place in kept]


@pytest.mark.parametrize("make", ADDITIVE)
def test_additive(make):
    assert is_additive(made(make))


def test_not_additive():
    assert not is_additive(made(spanning))
    added = byte_level()
    added.add_tokens(["by Michael"])
    assert not is_additive(added)


def test_a_tokenizer_that_joins_over_blanks_without_a_token_that_shows_it():
    """Blanks taken out: "a b" is the word "ab"."""
    tokenizer = word_piece()
    tokenizer.normalizer = normalizers.Replace(" ", "")
    assert not is_additive(tokenizer)


# ---- by hand ----


def test_a_triple_too_long_is_passed_over_and_a_shorter_one_taken():
    tokenizer = made(word_piece)
    verbaliser = Verbaliser([*FILMS, "a name that has far more words in it than all others have"], VERBS)
    prompt = [HEAT[0], (0, 1, 5, ALWAYS), HEAT[3]]
    budget = length(tokenizer, "Heat: has genre Crime, Drama")
    fitted = fit(subgraphs_of([prompt]), verbaliser, budget, tokenizer)
    assert fitted.texts == ["Heat: has genre Crime, Drama"]
    assert fitted.is_kept.tolist() == [True, False, True]
    assert fitted.tokens.tolist() == [budget]


def test_a_budget_too_small_for_one_triple():
    fitted = fit(subgraphs_of([HEAT, [], HEAT[:1]]), Verbaliser(FILMS, VERBS), 2, made(byte_level))
    assert fitted.texts == ["", "", ""]
    assert fitted.kept.tolist() == fitted.tokens.tolist() == [0, 0, 0]
    assert fitted.num_too_small == 2  # the second has nothing to show


def test_no_prompts():
    fitted = fit(subgraphs_of([]), Verbaliser(FILMS, VERBS), 9, made(byte_level))
    assert fitted.texts == []
    assert fit(subgraphs_of([[]]), Verbaliser([], []), 9, made(byte_level)).texts == [""]


def test_padding_and_truncation_of_a_tokenizer_are_not_counted():
    tokenizer = byte_level()
    tokenizer.enable_padding(length=50)
    tokenizer.enable_truncation(3)
    plain = fit(subgraphs_of([HEAT]), Verbaliser(FILMS, VERBS), 90, made(byte_level))
    assert fit(subgraphs_of([HEAT]), Verbaliser(FILMS, VERBS), 90, tokenizer).tokens.tolist() == plain.tokens.tolist()
    assert tokenizer.padding is not None


# ---- many batches, other processes ----


@pytest.mark.parametrize("most_pieces", [1, 1000])
@settings(max_examples=15, deadline=None)
@given(case=cases(), others=st.lists(st.integers(0, 3), max_size=3))
def test_what_was_counted_before_changes_nothing(most_pieces, case, others):
    entities, relations, prompts = case
    expected = fit(subgraphs_of(prompts), Verbaliser(entities, relations, dates=True), 40, made(byte_level))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verbalise, "MOST_PIECES", most_pieces)
        budget = Budget(Verbaliser(entities, relations, dates=True), made(byte_level), 40)
        for number in others:
            budget.fit(subgraphs_of(prompts[number:]))
        assert same(budget.fit(subgraphs_of(prompts)), expected)


@pytest.mark.parametrize("make", [byte_level, spanning])
def test_a_budget_pickles_without_what_it_counted(make):
    names = pa.array([f"entity of number {number}" for number in range(20_000)])
    budget = Budget(Verbaliser(names, VERBS), made(make), 60)
    triples = subgraphs_of([[(number, number % 2, number + 1, ALWAYS) for number in range(0, 900, 3)]])
    fitted = budget.fit(triples)
    pickled = pickle.dumps(budget)
    assert len(pickled) < 1.2 * names.nbytes + 2 * len(made(make).to_str())
    assert same(pickle.loads(pickled).fit(triples), fitted)


def same(one, other):
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


# ---- real names ----


@pytest.mark.shared
@pytest.mark.parametrize("format", FORMATS)
def test_sums_are_the_tokens_of_texts_on_dbpedia(shared_data, format):
    folder = shared_data / "ml-1m-dbpedia"
    entities = pl.read_csv(folder / "e_map.txt", separator="\t", quote_char=None).sort("eid")
    relations = pl.read_csv(folder / "r_map.txt", separator="\t", quote_char=None)
    triples = pl.read_csv(folder / "kg_final.txt", separator="\t").sample(20_000, seed=0).sort("entity_head")
    names = [name.replace("_", " ") for name in entities["name"]]
    verbs = [name.replace("_", " ") for name in relations["name"]]
    ids = (triples[name].to_numpy().astype(np.int32) for name in ("entity_head", "relation", "entity_tail"))
    times = np.where(np.arange(len(triples)) % 3, ALWAYS, np.arange(len(triples)) * 86_400)
    scores, hops = np.ones(len(triples), dtype=np.float32), np.ones(len(triples), dtype=np.int8)
    subgraphs = Subgraphs(np.arange(0, len(triples) + 1, 50), *ids, times, scores, hops)
    budget = Budget(Verbaliser(names, verbs, format, dates=True), made(smollm2), 256)
    assert budget.is_additive
    fitted = budget.fit(subgraphs)
    assert fitted.tokens.tolist() == [length(made(smollm2), text) for text in fitted.texts]
    assert fitted.tokens.min() > 200
    assert fitted.tokens.max() <= 256
