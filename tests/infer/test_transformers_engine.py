import numpy as np
import pytest
import torch

from recllm.errors import UserError
from recllm.infer.tokens import continued
from recllm.infer.transformers_engine import TransformersEngine, build_trie, takes_tree_mask
from recllm.model.adapter import build_adapter, fit_gate_statistics
from recllm.model.chat import answer_ids, encode, prompt_ids
from recllm.model.sequence_encoder import SASRec
from recllm.recipe import AdapterSection

PROMPTS = [
    [{"role": "user", "content": "hello"}],
    [{"role": "user", "content": "list"}, {"role": "assistant", "content": "Heat\nSpeed\n"}],
    [{"role": "system", "content": "be brief"}, {"role": "user", "content": "a prompt that is much longer"}],
]
ANSWERS = [["Heat", "Heat 2", "X"], ["Heat\n", "Heat 2\n", "Up\n"], ["H", "He", "Heap"]]
HISTORIES = [np.array([1, 2, 3]), np.array([], dtype=np.int32), np.array([7])]
TOLERANCE = 1e-4  # nats, fp32


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def gated(tiny_llama):
    torch.manual_seed(0)
    encoder = SASRec(20, 16, num_layers=1, max_items=8).eval()
    model = build_adapter(tiny_llama(), AdapterSection(r=8, num_experts=4), encoder).eval()
    fit_gate_statistics(model, encoder(torch.arange(20)[:, None]).detach())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "gate." in name:
                parameter.normal_(std=0.5)
    return model


@torch.no_grad()
def one_by_one(model, tokenizer, prompt, answer, **gates):
    """What scoring means: one plain forward over prompt and answer, in full."""
    begin, end = prompt_ids(tokenizer, prompt), answer_ids(tokenizer, answer)
    logits = model(input_ids=torch.tensor([begin + end]), **gates).logits[0, len(begin) - 1 : -1]
    return logits.double().log_softmax(-1)[torch.arange(len(end)), torch.tensor(end)].sum().item()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_scores_equal_one_full_forward_for_each_answer(tiny_llama, tiny_tokenizer, attention):
    model = tiny_llama(attn_implementation=attention)
    scores = TransformersEngine(model, tiny_tokenizer, batch_size=3).score(PROMPTS, ANSWERS)
    expected = [[one_by_one(model, tiny_tokenizer, p, a) for a in row] for p, row in zip(PROMPTS, ANSWERS)]
    assert scores == pytest.approx(np.array(expected), abs=TOLERANCE)


def test_gated_scores_equal_one_full_forward_for_each_answer(gated, tiny_tokenizer):
    scores = TransformersEngine(gated, tiny_tokenizer, batch_size=3).score(PROMPTS, ANSWERS, HISTORIES)
    expected = []
    for prompt, answers, history in zip(PROMPTS, ANSWERS, HISTORIES):
        items = torch.tensor([[-1, *history.tolist()]])
        expected.append([one_by_one(gated, tiny_tokenizer, prompt, a, history_items=items) for a in answers])
    assert scores == pytest.approx(np.array(expected), abs=TOLERANCE)


def test_gate_weights_equal_the_histories_they_come_from(gated, tiny_tokenizer):
    engine = TransformersEngine(gated, tiny_tokenizer, batch_size=2)
    items = torch.tensor([[1, 2, 3], [-1, -1, -1], [-1, -1, 7]])
    weights = gated.base_model.gate_weights(items).detach().numpy()
    by_weights = engine.score(PROMPTS, ANSWERS, gate_weights=weights)
    assert by_weights == pytest.approx(engine.score(PROMPTS, ANSWERS, HISTORIES), abs=TOLERANCE)
    swapped = engine.score(PROMPTS, ANSWERS, gate_weights=weights[[2, 0, 1]])
    assert np.abs(swapped - by_weights).max() > 0.1  # the gate of the row decides, not its place


@pytest.mark.parametrize("share_prompts", [True, False])
def test_a_batch_equals_single_rows(gated, tiny_tokenizer, share_prompts):
    together = TransformersEngine(gated, tiny_tokenizer, 8, share_prompts).score(PROMPTS, ANSWERS, HISTORIES)
    engine = TransformersEngine(gated, tiny_tokenizer, 1, share_prompts)
    single = [engine.score([p], [a], [h])[0] for p, a, h in zip(PROMPTS, ANSWERS, HISTORIES)]
    assert together == pytest.approx(np.array(single), abs=TOLERANCE)


def test_the_way_without_shared_prompts_gives_the_same_scores(gated, tiny_tokenizer):
    shared = TransformersEngine(gated, tiny_tokenizer, 2).score(PROMPTS, ANSWERS, HISTORIES)
    separate = TransformersEngine(gated, tiny_tokenizer, 2, share_prompts=False).score(PROMPTS, ANSWERS, HISTORIES)
    assert shared == pytest.approx(separate, abs=TOLERANCE)


# ---- in one forward ----

ACTIONS = ["add to cart", "add to list", "add", "buy", "b", "leave"]  # several tokens each, some begin alike
TOGETHER = [ACTIONS, ["view\n", "view all\n"], ACTIONS]
METHODS = {"ilora": {"r": 8, "num_experts": 4}, "soft_token": {"r": 8}, "lora": {"r": 8}}
CLOSE = 1e-5  # nats, of answers of 3 to 12 tokens, fp32


@pytest.fixture(params=METHODS)
def adapted(request, tiny_llama):
    """A model with each kind of adapter and random weights, and what its prompts are given."""
    torch.manual_seed(0)
    encoder = None if request.param == "lora" else SASRec(20, 16, num_layers=1, max_items=8).eval()
    section = AdapterSection(method=request.param, **METHODS[request.param])
    model = build_adapter(tiny_llama(initializer_range=0.1), section, encoder).eval()
    if encoder is not None:
        fit_gate_statistics(model, encoder(torch.arange(20)[:, None]).detach())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("lora_", "gate.", "soft_token.")):
                parameter.normal_(std=0.2)
    return model, None if encoder is None else HISTORIES


def forwards(model):
    """A list that grows by one with each forward of the model."""
    seen = []
    decoder = model.get_base_model() if hasattr(model, "get_base_model") else model
    decoder.register_forward_hook(lambda _, __, output: seen.append(tuple(output.logits.shape)))
    return seen


@pytest.mark.parametrize("answers", [ANSWERS, TOGETHER], ids=["each its own", "beginnings shared"])
def test_one_forward_gives_the_scores_of_two_and_of_one_an_answer(adapted, tiny_tokenizer, answers):
    model, histories = adapted
    engine = TransformersEngine(model, tiny_tokenizer, 3)
    scores = engine.score(PROMPTS, answers, histories, one_forward=True)
    assert scores == pytest.approx(engine.score(PROMPTS, answers, histories), abs=CLOSE, nan_ok=True)
    separate = TransformersEngine(model, tiny_tokenizer, 3, share_prompts=False).score(PROMPTS, answers, histories)
    assert scores == pytest.approx(separate, abs=CLOSE, nan_ok=True)
    for row, (prompt, texts) in enumerate(zip(PROMPTS, answers)):
        given = {} if histories is None else {"history_items": torch.tensor([[-1, *histories[row].tolist()]])}
        expected = [one_by_one(model, tiny_tokenizer, prompt, text, **given) for text in texts]
        assert scores[row, : len(texts)] == pytest.approx(expected, abs=CLOSE)


def test_one_forward_with_eager_attention(tiny_llama, tiny_tokenizer):
    model = tiny_llama(attn_implementation="eager", initializer_range=0.1)
    scores = TransformersEngine(model, tiny_tokenizer, 3).score(PROMPTS, ANSWERS, one_forward=True)
    expected = [[one_by_one(model, tiny_tokenizer, p, a) for a in row] for p, row in zip(PROMPTS, ANSWERS)]
    assert scores == pytest.approx(np.array(expected), abs=CLOSE)


@pytest.mark.parametrize("count", [1, 2, 19])
def test_a_batch_is_one_forward_whatever_the_number_of_answers(adapted, tiny_tokenizer, count):
    model, histories = adapted
    seen = forwards(model)
    answers = [[f"action number {i}" for i in range(count)]] * 3
    TransformersEngine(model, tiny_tokenizer, 3).score(PROMPTS, answers, histories, one_forward=True)
    assert len(seen) == 1
    shared = len("action number ")  # tokens, a byte each: read once; then a node a digit but the last before eos
    assert seen[0][:2] == (3, 1 + shared + min(count, 10) + max(0, count - 10))
    seen.clear()
    TransformersEngine(model, tiny_tokenizer, 2).score(PROMPTS, answers, histories, one_forward=True)
    assert len(seen) == 2  # batches of two and of one
    seen.clear()
    TransformersEngine(model, tiny_tokenizer, 3).score(PROMPTS, answers, histories)
    assert len(seen) == 2  # the prompts, then their answers


def test_an_answers_last_token_is_never_read(tiny_llama, tiny_tokenizer):
    model, read = tiny_llama(), []
    model.get_input_embeddings().register_forward_hook(lambda _, args, __: read.append(args[0].tolist()))
    (prompt,) = prompts = [[{"role": "user", "content": "hello"}]]
    TransformersEngine(model, tiny_tokenizer, 1).score(prompts, [["x", "y\n"]], one_forward=True)
    (x,), (y, _) = answer_ids(tiny_tokenizer, "x")[:-1], answer_ids(tiny_tokenizer, "y\n")
    assert read == [[[*prompt_ids(tiny_tokenizer, prompt), x, y]]]


def test_batches_of_one_forward_are_cut_by_the_memory_for_their_mask(tiny_llama, tiny_tokenizer):
    model = tiny_llama()
    seen = forwards(model)
    engine = TransformersEngine(model, tiny_tokenizer, 4)
    prompts = [[{"role": "user", "content": "x" * 200}]] * 4
    whole = engine.score(prompts, [["ab", "c"]] * 4, one_forward=True)
    assert len(seen) == 1
    seen.clear()
    row = len(prompt_ids(tiny_tokenizer, prompts[0])) + 3 + 2  # with the tokens of both answers: none is left out
    engine._logits_bytes = 2 * row**2 * (4 + 2)  # two rows: numbers of the mask, and it as booleans twice
    np.testing.assert_allclose(engine.score(prompts, [["ab", "c"]] * 4, one_forward=True), whole, atol=CLOSE)
    assert len(seen) == 2
    seen.clear()
    engine._logits_bytes -= 1
    engine.score(prompts, [["ab", "c"]] * 4, one_forward=True)
    assert len(seen) == 4


def test_one_forward_is_refused_where_attention_takes_no_such_mask(tiny_llama, tiny_tokenizer):
    model = tiny_llama()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UserError, match=r"flash_attention_2: set model\.attn_implementation to sdpa"):
        TransformersEngine(model, tiny_tokenizer, 1).score(PROMPTS, ANSWERS, one_forward=True)
    model = tiny_llama()
    seen = forwards(model)
    TransformersEngine(model, tiny_tokenizer, 1, share_prompts=False).score(PROMPTS, ANSWERS, one_forward=True)
    assert len(seen) == 3 * 3  # asked for: a row an answer


# ---- many answers ----


def test_many_answers_are_cut_by_the_memory_for_their_logits(tiny_llama, tiny_tokenizer, monkeypatch):
    engine = TransformersEngine(tiny_llama(), tiny_tokenizer, 2)
    answers = ["abc\n", "abcd\n", "a\n", "abcdefghijkl\n", "b\n"]  # 4, 5, 2, 13 and 2 tokens
    assert engine.parts(answers) == [slice(0, 5)]
    engine._logits_bytes = 4 * 259 * 11
    assert engine.parts(answers) == [slice(0, 3), slice(3, 4), slice(4, 5)]  # one that is too long stands alone
    whole = engine.score(PROMPTS[:1], [answers])
    parts = [engine.score(PROMPTS[:1], [answers[part]]) for part in engine.parts(answers)]
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, atol=1e-4)


def test_a_prompt_is_read_once_for_all_answers(tiny_llama, tiny_tokenizer):
    model, read = tiny_llama(), []
    model.get_input_embeddings().register_forward_hook(lambda _, args, __: read.append(args[0].numel()))
    prompt = [{"role": "user", "content": "x" * 300}]
    answers = [f"{letter}bcdef" for letter in "abcdefghijklmnopqrst"]  # 20 answers, 6 tokens and eos each
    TransformersEngine(model, tiny_tokenizer, 1).score([prompt], [answers])
    assert sum(read) == len(prompt_ids(tiny_tokenizer, prompt)) + 20 * 6


def test_equal_beginnings_are_read_once():
    trie = build_trie(9, [[5, 6, 1], [5, 6, 7, 1], [8, 1]])
    assert trie.tokens.tolist() == [9, 5, 6, 7, 8]
    assert trie.depths.tolist() == [0, 1, 2, 3, 1]
    assert trie.visible[3].tolist() == [True, True, True, True, False]
    assert trie.visible[4].tolist() == [True, False, False, False, True]


def test_length_normalised_is_the_mean_over_tokens_with_terminator(tiny_llama, tiny_tokenizer):
    engine = TransformersEngine(tiny_llama(), tiny_tokenizer, 3)
    tokens = engine.num_tokens(ANSWERS)
    assert tokens[0].tolist() == [4 + 1, 6 + 1, 1 + 1]  # one token a byte, and eos
    assert tokens[1].tolist() == [4 + 1, 6 + 1, 2 + 1]  # and the newline
    mean = engine.score(PROMPTS, ANSWERS, length_normalised=True)
    assert mean == pytest.approx(engine.score(PROMPTS, ANSWERS) / tokens)


def test_a_shorter_list_of_answers_leaves_nan(tiny_llama, tiny_tokenizer):
    scores = TransformersEngine(tiny_llama(), tiny_tokenizer, 2).score(PROMPTS[:2], [["a", "b"], ["c\n"]])
    assert np.isnan(scores).tolist() == [[False, False], [False, True]]


def test_generation_is_the_same_for_single_rows_and_a_padded_batch(gated, tiny_tokenizer):
    together = TransformersEngine(gated, tiny_tokenizer, 3).generate(PROMPTS, HISTORIES, max_new_tokens=12)
    engine = TransformersEngine(gated, tiny_tokenizer, 1)
    assert together == [engine.generate([p], [h], max_new_tokens=12)[0] for p, h in zip(PROMPTS, HISTORIES)]


def speak(model, tokenizer, text):
    """Make the model say `text`, byte by byte, whatever it is asked, and then again."""
    ids = answer_ids(tokenizer, text)
    original, spoken = model.forward, []

    def forward(*args, **kwargs):
        output = original(*args, **kwargs)
        output.logits[:, -1] = 0
        output.logits[:, -1, ids[len(spoken) % len(ids)]] = 50
        spoken.append(1)
        return output

    model.forward = forward
    return model


@pytest.mark.parametrize("adapted", [False, True])
def test_greedy_is_greedy_whatever_the_model_has_settled(tiny_llama, gated, tiny_tokenizer, adapted):
    model = gated if adapted else tiny_llama()
    engine = TransformersEngine(model, tiny_tokenizer, 3)
    histories = HISTORIES if adapted else None
    before = engine.generate(PROMPTS, histories, max_new_tokens=12)
    owner = model.get_base_model() if adapted else model
    settled = owner.generation_config
    settled.repetition_penalty, settled.num_beams, settled.suppress_tokens = 5.0, 2, list(range(3, 100))
    assert engine.generate(PROMPTS, histories, max_new_tokens=12) == before
    assert owner.generation_config is settled


def test_a_listed_answer_stops_at_the_newline(tiny_llama, tiny_tokenizer):
    model = speak(tiny_llama(), tiny_tokenizer, "Up\n")
    (made,) = TransformersEngine(model, tiny_tokenizer, 1).generate(PROMPTS[1:2], max_new_tokens=8)
    assert made == ("Up", True)


def test_an_ordinary_answer_stops_at_eos_only(tiny_llama, tiny_tokenizer):
    model = speak(tiny_llama(), tiny_tokenizer, "Up")
    (made,) = TransformersEngine(model, tiny_tokenizer, 1).generate(PROMPTS[:1], max_new_tokens=8)
    assert made == ("Up", True)


def test_an_answer_that_reaches_the_limit_is_not_finished(tiny_llama, tiny_tokenizer):
    model = speak(tiny_llama(), tiny_tokenizer, "Upwards\n")
    (made,) = TransformersEngine(model, tiny_tokenizer, 1).generate(PROMPTS[1:2], max_new_tokens=4)
    assert made == ("Upwa", False)


def test_what_no_tree_mask_can_say_takes_the_other_way(tiny_llama, tiny_tokenizer):
    model = tiny_llama()
    assert takes_tree_mask(model.config)
    model.config.layer_types = ["full_attention", "sliding_attention"]
    assert not takes_tree_mask(model.config)
    assert not TransformersEngine(model, tiny_tokenizer, 1).share_prompts
    with pytest.raises(UserError, match=r"set model\.attn_implementation to sdpa"):
        TransformersEngine(model, tiny_tokenizer, 1, share_prompts=True)


def test_too_long_a_prompt_is_refused_and_never_cut(tiny_llama, tiny_tokenizer):
    prompt = [{"role": "user", "content": "x" * 600}]
    with pytest.raises(UserError, match="the model reads at most 512"):
        TransformersEngine(tiny_llama(), tiny_tokenizer, 1).score([prompt], [["a"]])


def test_check_finds_what_scoring_and_generating_would_refuse(tiny_llama, tiny_tokenizer):
    engine = TransformersEngine(tiny_llama(), tiny_tokenizer, 1)
    short, long = [{"role": "user", "content": "x"}], [{"role": "user", "content": "x" * 400}]
    engine.check([short, long], [["a"], ["a"]], max_new_tokens=300, num_generated=1)
    with pytest.raises(UserError, match=r"prompt 1 .*the model reads at most 512: lower prompt.max_items"):
        engine.check([short, long], [["a"], ["a" * 100]])
    with pytest.raises(UserError, match=r"prompt 1 .*lower protocol.decoding.max_new_tokens \(300 of them\)"):
        engine.check([short, long], [["a"], ["a"]], max_new_tokens=300, num_generated=2)


def test_a_prompt_without_answers_is_refused(tiny_llama, tiny_tokenizer):
    with pytest.raises(UserError, match="0 answers"):
        TransformersEngine(tiny_llama(), tiny_tokenizer, 1).score(PROMPTS[:1], [[]])


def test_an_instance_wise_adapter_without_histories_is_refused(gated, tiny_tokenizer):
    with pytest.raises(UserError, match="representations or gate weights"):
        TransformersEngine(gated, tiny_tokenizer, 1).score(PROMPTS, ANSWERS)


# ---- an answer behind a rationale ----

RATIONALES = ["They compared two. So!", "", 'Heat 2 is "dear"']
LABELS = [["view", "add to cart", "add to list"]] * 3


def test_a_prompt_goes_on_with_its_line_exactly_as_in_training(tiny_tokenizer):
    prompts = [PROMPTS[0], PROMPTS[2]]
    for prompt, longer, line in zip(prompts, continued(prompts, RATIONALES[1:]), RATIONALES[1:]):
        trained = encode(tiny_tokenizer, prompt, [{"role": "assistant", "content": f"{line}\nadd to cart"}])
        asked = prompt_ids(tiny_tokenizer, longer), answer_ids(tiny_tokenizer, "add to cart")
        assert asked[0] + asked[1] == trained[0] + trained[1]
        assert longer[:-1] == prompt
    (listed,) = continued([PROMPTS[1]], ["Up"])
    assert listed == [PROMPTS[1][0], {"role": "assistant", "content": "Heat\nSpeed\nUp\n"}]
    assert PROMPTS[1][-1]["content"] == "Heat\nSpeed\n"  # the prompt given is left as it was


@pytest.mark.parametrize("one_forward", [False, True])
def test_labels_behind_a_rationale_are_scored_as_the_whole_answer(adapted, tiny_tokenizer, one_forward):
    model, histories = adapted
    engine = TransformersEngine(model, tiny_tokenizer, 3)
    lines = engine.score(PROMPTS, [[f"{line}\n"] for line in RATIONALES], histories)
    labels = engine.score(continued(PROMPTS, RATIONALES), LABELS, histories, one_forward=one_forward)
    for row, (prompt, line) in enumerate(zip(PROMPTS, RATIONALES)):
        given = {} if histories is None else {"history_items": torch.tensor([[-1, *histories[row].tolist()]])}
        whole = [one_by_one(model, tiny_tokenizer, prompt, f"{line}\n{label}", **given) for label in LABELS[row]]
        assert lines[row, 0] + labels[row] == pytest.approx(whole, abs=3 * CLOSE)


def test_what_was_generated_is_continued_with_the_tokens_that_were_generated(tiny_llama, tiny_tokenizer):
    model = speak(tiny_llama(), tiny_tokenizer, "They saw it.\n")
    engine = TransformersEngine(model, tiny_tokenizer, 1)
    (made,) = engine.generate(PROMPTS[:1], max_new_tokens=20, listed=[True])
    assert made == ("They saw it.", True)
    (longer,) = continued(PROMPTS[:1], [made.text])
    assert prompt_ids(tiny_tokenizer, longer) == prompt_ids(tiny_tokenizer, PROMPTS[0]) + answer_ids(
        tiny_tokenizer, "They saw it.\n"
    )
