from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from recllm.errors import UserError
from recllm.model.chat import answer_ids, completion_ids, encode, line_ids, prompt_ids

USER = {"role": "user", "content": "What next?"}
TITLES = ["Toy Story!", "Alien", "2001: A Space Odyssey", "Se7en", " Heat", "Airplane!"]

# The split patterns that decide what may be merged. Llama 3's lets punctuation take the newlines after it ("!\n").
PATTERNS = {
    "smollm2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "llama3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
}


def _bpe(pattern: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on lists of titles, so that it has every merge across newlines that it can."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["\n".join(TITLES[i:] + TITLES[:i]) + "!\n\n" for i in range(6)] * 20, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>")
    fast.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return fast


@pytest.fixture(scope="module", params=sorted(PATTERNS))
def bpe(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return _bpe(PATTERNS[request.param])


def test_the_llama3_pattern_does_merge_across_the_newline() -> None:
    # what the line-by-line rule is for: without it this test's tokenizer gives a title other tokens inside a list
    tokenizer = _bpe(PATTERNS["llama3"])
    assert any(t.endswith("!Ċ") for t in tokenizer.tokenize("Airplane!\nAlien"))
    whole = tokenizer("Airplane!\n\nAlien", add_special_tokens=False)["input_ids"]
    assert whole != line_ids(tokenizer, "Airplane!\n\nAlien")


def _dense(titles: list[str], shown: int) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """An evaluation prompt: `shown` titles as an unfinished answer, the next as its continuation."""
    prompt = [USER]
    if shown:
        prompt = [USER, {"role": "assistant", "content": "".join(f"{t}\n" for t in titles[:shown])}]
    return prompt, [{"role": "assistant", "content": f"{titles[shown]}\n"}]


title = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\n"), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(titles=st.lists(st.sampled_from(TITLES) | title, min_size=1, max_size=6), data=st.data())
def test_a_window_and_every_evaluation_prompt_of_it_have_the_same_tokens(
    bpe: PreTrainedTokenizerFast, titles: list[str], data: Any
) -> None:
    window = encode(bpe, [USER], [{"role": "assistant", "content": "".join(f"{t}\n" for t in titles)}])
    shown = data.draw(st.integers(0, len(titles) - 1))
    prompt, completion = encode(bpe, *_dense(titles, shown))
    whole = window[0] + window[1]
    assert prompt + completion == whole[: len(prompt) + len(completion)]
    rest = "".join(f"{t}\n" for t in titles[shown + 1 :])
    assert whole[len(prompt) + len(completion) :] == line_ids(bpe, rest)


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(blacklist_categories=["Cs"]), max_size=40))
def test_lines_say_what_the_text_says(bpe: PreTrainedTokenizerFast, text: str) -> None:
    assert bpe.decode(line_ids(bpe, text), clean_up_tokenization_spaces=False) == text


def test_terminators(tiny_tokenizer: Any) -> None:
    eos = tiny_tokenizer.eos_token_id
    assert answer_ids(tiny_tokenizer, "Alien")[-1] == eos
    listed = answer_ids(tiny_tokenizer, "Alien\nHeat\n")
    assert eos not in listed
    assert tiny_tokenizer.decode(listed) == "Alien\nHeat\n"
    assert answer_ids(tiny_tokenizer, "Alien\n") == line_ids(tiny_tokenizer, "Alien") + line_ids(tiny_tokenizer, "\n")


def test_prompt_is_the_template_and_the_unfinished_answer(tiny_tokenizer: Any) -> None:
    begun = {"role": "assistant", "content": "Alien\n"}
    text = tiny_tokenizer.decode(prompt_ids(tiny_tokenizer, [USER, begun]))
    assert text == "<|im_start|>user\nWhat next?<|im_end|>\n<|im_start|>assistant\nAlien\n"
    assert tiny_tokenizer.bos_token_id in prompt_ids(tiny_tokenizer, [USER])  # control tokens, not their letters


def test_without_a_chat_template_the_contents_are_plain_lines(tiny_tokenizer: Any) -> None:
    plain = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer._tokenizer, eos_token="<|im_end|>")
    prompt = [{"role": "system", "content": "Films."}, USER, {"role": "assistant", "content": "Alien\n"}]
    assert plain.decode(prompt_ids(plain, prompt)) == "Films.\nWhat next?\nAlien\n"


@pytest.mark.parametrize(
    ("prompt", "completion", "words"),
    [
        ([], "Alien", "at least one message"),
        ([{"role": "assistant", "content": "Alien\n"}], "Heat\n", "at least one message"),
        ([{"role": "user"}], "Alien", "content"),
        ([USER, {"role": "assistant", "content": "Alien\n"}], "Heat", "newline"),
    ],
)
def test_bad_messages(tiny_tokenizer: Any, prompt: list[dict[str, str]], completion: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        encode(tiny_tokenizer, prompt, [{"role": "assistant", "content": completion}])


def test_a_completion_is_one_assistant_message(tiny_tokenizer: Any) -> None:
    for completion in ([], [USER], [{"role": "assistant", "content": "a"}] * 2):
        with pytest.raises(UserError, match="exactly one"):
            completion_ids(tiny_tokenizer, [USER], completion)


def test_no_eos_token(tiny_tokenizer: Any) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer._tokenizer)
    with pytest.raises(UserError, match="no eos token"):
        answer_ids(bare, "Alien")
    assert answer_ids(bare, "Alien\n")
