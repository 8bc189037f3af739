import json

import polars as pl
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from recllm.convert.titles import item_texts, neutralise, tokenizer_special_tokens, user_texts
from recllm.errors import UserError

SMOLLM2 = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<reponame>", "<file_sep>", "<filename>",
    "<gh_stars>", "<issue_start>", "<issue_comment>", "<issue_closed>", "<jupyter_start>", "<jupyter_text>",
    "<jupyter_code>", "<jupyter_output>", "<jupyter_script>", "<empty_output>",
]  # fmt: skip
PUBLISHED = [
    *("<s>", "</s>", "<unk>", "[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"),  # Llama 2, Mistral
    *("[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[IMG]"),
    *("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[THINK]", "[PREFIX]", "[SUFFIX]", "[MIDDLE]"),
    *("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|python_tag|>"),  # Llama 3
    *("<|vision_start|>", "<|fim_prefix|>", "<tool_call>", "</tool_call>", "<think>", "</think>"),  # Qwen
    *("<bos>", "<eos>", "<pad>", "<start_of_turn>", "<end_of_turn>", "<unused0>", "<mask>", "<2mass>"),  # Gemma
    *("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|placeholder1|>", "<|dummy_0|>"),  # Phi
    *("<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"),  # DeepSeek
    *("[CLS]", "[SEP]", "[PAD]", "[UNK]", "[MASK]", "[gMASK]", "[BOS]", "[EOS]", "[UNUSED_TOKEN_146]", "[unused1]"),
    *("<extra_id_0>", "<0x0A>", "<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|channel|>", "<|message|>"),
]
TOKENS = SMOLLM2 + PUBLISHED
INVISIBLE = ["\u200b", "\u200c", "\u200d", "\u202e", "\ufeff", "\x00", "\n", "\r", "\u2028", "\t", " "]


def hostile_texts() -> st.SearchStrategy[str]:
    """Tokens, halves of tokens, separators and ordinary text in any order."""
    token = st.sampled_from(TOKENS)
    half = st.tuples(token, st.integers(0, 12)).map(lambda pair: pair[0][: pair[1]])
    rest = st.tuples(token, st.integers(0, 12)).map(lambda pair: pair[0][pair[1] :])
    pieces = st.one_of(token, half, rest, st.sampled_from(INVISIBLE), st.text(max_size=8))
    return st.lists(pieces, max_size=8).map("".join)


@pytest.mark.parametrize("token", TOKENS)
def test_each_published_token_is_broken(token):
    assert token not in neutralise(f"Heat {token} (1995)")
    assert token not in neutralise(token)


@settings(max_examples=500, deadline=None)
@given(hostile_texts())
@example("<|im_<|im_start|>start|>")
@example("<\u200b|im_end|\u200b>")
@example("[IN\nST]")
@example("<|im_end|\x00>")
@example("[\u200bINST]")
@example("<\u200d|im_\u200cend|>")
@example("[\u200dINST]")
@example("<3م\u200cم>")
@example("م\u200c<|im_end|>\u200cم")
def test_no_token_survives_any_surrounding_and_twice_is_once(text):
    line = neutralise(text)
    assert [token for token in TOKENS if token in line] == []
    assert [token for token in TOKENS if token in line.replace("\u200c", "").replace("\u200d", "")] == []
    assert len(line.splitlines()) <= 1
    assert neutralise(line) == line


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.text("ab#{} می\u200c", min_size=1, max_size=4).filter(str.strip), max_size=4),
    st.text("ab#{} می\u200c\u200d", max_size=20),
)
@example(["می"], "م\u200cی")
@example(["م\u200cی"], "م\u200cی")
@example(["b"], "bم\u200cیb\u200dب")
def test_any_token_of_the_users_tokenizer_is_broken(tokens, text):
    line = neutralise(text, tokens)
    assert [token for token in tokens if token in line] == []
    assert [token for token in tokens if token in line.replace("\u200c", "").replace("\u200d", "")] == []
    assert neutralise(line, tokens) == line


@pytest.mark.parametrize(
    "title",
    [
        "Heat (1995)", "M*A*S*H", "[REC]", "[REC] 2", "I <3 Huckabees", "1 < 2 > 0", "Se7en", "$ & ¢", "Amélie",
        "千と千尋の神隠し", "Что? Где? Когда?", "Face/Off", "{{ title }}", "Alien³", "Love -> Hate",
        "Tom & Jerry [Uncut]", "می\u200cخواهم", "Family 👨\u200d👩\u200d👧", "❤️\u200d🔥", "क्\u200dष <3",
    ],
)  # fmt: skip
def test_ordinary_titles_stay_as_they_are(title):
    assert neutralise(title) == title


def test_lines_and_invisible_characters_go():
    assert neutralise(" Heat\n\n(1995)\u200b\u202e\x07 ") == "Heat (1995)"


@pytest.mark.parametrize(
    "place", ["{}می", "می{}", "می {}خواهم", "a{}b", "1{}2", "<{}م", "م{}>", "م{}|", "[{}م", "م{}{}م"]
)
@pytest.mark.parametrize("joiner", ["\u200c", "\u200d"])
def test_joiners_go_where_they_join_nothing(place, joiner):
    assert joiner not in neutralise(place.replace("{}", joiner))


def test_user_text_is_rendered_from_attributes_and_neutralised():
    users = pl.DataFrame({"user_index": [0, 1], "user_id": ["a", "b"], "age": ["30", None], "job": ["<|im_end|>", "x"]})
    texts = user_texts(users, "{{ job }}{% if age %}, {{ age }} years{% endif %}\n")
    assert texts == ["‹|im_end|>, 30 years", "x"]
    with pytest.raises(UserError, match=r'prompt.user: "jbo" is no column of the users.*did you mean "job"'):
        user_texts(users, "{{ jbo }}")
    with pytest.raises(UserError, match=r'prompt.user: "user_index" is no column'):
        user_texts(users, "{{ user_index }}")
    with pytest.raises(UserError, match=r'prompt.user fails on user "b"'):
        user_texts(users, "{{ 60 // (age | int) }}")


def test_item_text_is_rendered_from_attributes():
    items = pl.DataFrame({"item_index": [0, 1], "item_id": ["a", "b"], "title": ["Heat", "<s>"], "year": [1995, None]})
    texts = item_texts(items, "{{ title }}{% if year %} ({{ year }}){% endif %}")
    assert texts == ["Heat (1995)", "‹s>"]


def test_title_with_jinja_is_not_executed():
    items = pl.DataFrame({"item_index": [0], "item_id": ["a"], "title": ["{{ 7 * 7 }}"]})
    assert item_texts(items, "{{ title }}") == ["{{ 7 * 7 }}"]


def test_unknown_attribute_names_the_known_ones():
    items = pl.DataFrame({"item_index": [0], "item_id": ["a"], "title": ["Heat"], "release_year": ["1995"]})
    with pytest.raises(UserError, match=r'"releaseyear" is no column.*did you mean "release_year".*Known: .*title'):
        item_texts(items, "{{ title }} {{ releaseyear }}")


def test_item_without_anything_readable_is_an_error():
    items = pl.DataFrame({"item_index": [0], "item_id": ["a17"], "title": ["\u200b \n"]})
    with pytest.raises(UserError, match="a17"):
        item_texts(items, "{{ title }}")


def test_special_tokens_come_from_the_tokenizer_file(tmp_path):
    added = [{"content": "§end§", "special": True}, {"content": "plain", "special": False}]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    tokens = tokenizer_special_tokens(str(tmp_path))
    assert tokens == ("§end§",)
    assert neutralise("The §end§", tokens) == "The § end§"
    assert tokenizer_special_tokens("some/hub-name") == ()


@pytest.mark.slow
def test_hostile_titles_add_no_special_token(smollm2):
    from recllm.model.base_model import load_tokenizer

    tokenizer = load_tokenizer(smollm2)
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    tokens = [str(token) for token in tokenizer.added_tokens_decoder.values()]
    assert {"<|im_start|>", "<|im_end|>"} <= set(tokens)

    def special_count(title: str) -> int:
        message = {"role": "user", "content": f"Films:\n{title}\n\nWhich next?"}
        text = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
        return sum(token in special for token in tokenizer(text, add_special_tokens=False).input_ids)

    assert special_count("x <|im_end|>") == special_count("Heat") + 1  # the check sees what is not neutralised
    for token in tokens + PUBLISHED:
        for title in (token, f"Heat {token} 2", f"{token[:3]}{token}{token[3:]}"):
            assert special_count(neutralise(title)) == special_count("Heat"), title
