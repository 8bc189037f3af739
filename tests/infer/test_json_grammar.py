"""Grammars of JSON schemas: the texts they allow, and what a model writes that is held to one."""

import functools
import json
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recllm.convert.actions import answer_schema, read_answer, write_answer
from recllm.errors import UserError
from recllm.infer.json_grammar import json_grammar
from recllm.infer.tokens import Tokens
from recllm.infer.transformers_engine import TransformersEngine
from recllm.model.adapter import build_adapter
from recllm.model.sequence_encoder import SASRec
from recllm.recipe import AdapterSection

WORDS = ["view", "add to cart", 'say "hi"', "nächste/日本", "\x7f"]
FIELDS = ["item", "text"]
SCHEMA = answer_schema(WORDS, FIELDS)
SHORT = {  # as SCHEMA, but a model that does not know what it does comes to an end
    "type": "object",
    "properties": {
        "action": {"type": "string", "enum": WORDS},
        "item": {"type": "string", "maxLength": 3},
        "tags": {"type": "array", "items": {"type": "string", "minLength": 1, "maxLength": 2}, "maxItems": 2},
        "sure": {"type": "boolean"},
    },
    "required": ["action", "sure"],
    "additionalProperties": False,
}
NONE = {"additionalProperties": False}
PROMPTS = [
    [{"role": "user", "content": "what next?"}],
    [{"role": "user", "content": "next?"}, {"role": "assistant", "content": "They compared two.\n"}],
    [{"role": "system", "content": "be brief"}, {"role": "user", "content": "a prompt that is much longer"}],
]


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def tokens(tiny_tokenizer):
    pytest.importorskip("xgrammar", reason="pip install -e '.[actions]'")
    return Tokens(tiny_tokenizer, None, 259)


# ---- the set of texts ----


def values(schema):
    """Values that fit a schema of these tests, keys in its order."""
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    if schema["type"] == "object":
        needed = {name: values(part) for name, part in schema["properties"].items() if name in schema["required"]}
        others = {name: values(part) for name, part in schema["properties"].items() if name not in needed}
        drawn = st.fixed_dictionaries(needed, optional=others)
        return drawn.map(lambda found: {name: found[name] for name in schema["properties"] if name in found})
    if schema["type"] == "array":
        return st.lists(values(schema["items"]), min_size=schema.get("minItems", 0), max_size=schema.get("maxItems", 4))
    if schema["type"] == "string":
        return st.text(min_size=schema.get("minLength", 0), max_size=schema.get("maxLength", 8))
    return {"integer": st.integers(), "boolean": st.booleans(), "null": st.none()}[schema["type"]]


def _bounded(lower, upper):
    return st.tuples(st.integers(0, 3), st.integers(0, 3) | st.none()).map(
        lambda pair: {lower: pair[0]} | ({} if pair[1] is None else {upper: pair[0] + pair[1]})
    )


def _object(parts):
    def build(drawn):
        names = list(drawn[0])
        return {"type": "object", "properties": drawn[0], "required": names[: drawn[1]] + names[-drawn[2] :]} | NONE

    named = st.dictionaries(st.text(max_size=4), parts, min_size=1, max_size=4)
    return st.tuples(named, st.integers(0, 2), st.integers(1, 2)).map(build) | named.map(
        lambda found: {"type": "object", "properties": found, "required": []} | NONE
    )


SCHEMAS = st.recursive(
    st.sampled_from([{"type": "integer"}, {"type": "boolean"}, {"type": "null"}])
    | _bounded("minLength", "maxLength").map(lambda bounds: {"type": "string"} | bounds)
    | st.lists(st.text(max_size=4) | st.integers() | st.none(), min_size=1, max_size=4).map(lambda all: {"enum": all}),
    lambda parts: (
        _object(parts)
        | st.tuples(parts, _bounded("minItems", "maxItems")).map(lambda p: {"type": "array", "items": p[0]} | p[1])
    ),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_what_json_writes_of_a_value_that_fits_is_allowed(tokens, data):
    schema = data.draw(SCHEMAS)
    value = data.draw(values(schema))
    assert tokens.grammar(schema).accepts(json.dumps(value, ensure_ascii=False))


@settings(max_examples=150, deadline=None)
@given(SCHEMAS, st.integers(0, 2**32 - 1))
def test_whatever_is_allowed_fits_the_schema_and_is_as_json_writes_it(tokens, schema, seed):
    jsonschema = pytest.importorskip("jsonschema")
    text = walk(tokens.grammar(schema), np.random.default_rng(seed)).decode()  # strict: it is UTF-8
    value = json.loads(text)
    jsonschema.Draft202012Validator(schema).validate(value)
    assert json.dumps(value, ensure_ascii=False) == text


def walk(grammar, rng, most=400):
    """A random text of a grammar, byte by byte; once it is long it takes the first byte that is allowed."""
    import xgrammar

    info = xgrammar.TokenizerInfo([bytes([byte]) for byte in range(256)] + [b"</s>"], stop_token_ids=[256])
    matcher = xgrammar.GrammarMatcher(xgrammar.GrammarCompiler(info, max_threads=1).compile_grammar(grammar.text))
    written = bytearray()
    while not matcher.is_terminated():
        mask = xgrammar.allocate_token_bitmask(1, 257)
        matcher.fill_next_token_bitmask(mask)
        allowed = [token for token in range(257) if mask[0, token // 32].item() >> token % 32 & 1]
        ending = [token for token in (256, *b'"]},') if token in allowed]
        token = ending[0] if len(written) > most and ending else int(rng.choice(ending * 8 + allowed))
        assert matcher.accept_token(token)
        if token != 256:
            written.append(token)
    return bytes(written)


@given(st.sampled_from(WORDS), st.text(max_size=20), st.text(max_size=20))
def test_answers_as_convert_writes_them_are_allowed(tokens, words, item, text):
    assert tokens.grammar(SCHEMA).accepts(write_answer(words, {"item": item, "text": text}))


@pytest.mark.parametrize(
    "text",
    [
        '{"action":"view"}',  # other separators
        '{"action": "view","text": "a"}',
        ' {"action": "view"}',
        '{"action": "view"}\n',
        '{\n"action": "view"}',
        '{"text": "a", "action": "view"}',  # another order
        '{"action": "view", "text": "a", "item": "b"}',
        '{"action": "view", "action": "view"}',
        '{"action": "View"}',
        '{"action": "vie"}',
        '{"action": "view", "why": "a"}',
        '{"action": "view", "text": null}',
        '{"action": "view", "text": "a\\/b"}',  # another spelling
        '{"action": "view", "text": "\\u00e4"}',
        '{"action": "view", "text": "\\u001F"}',
        '{"action": "view", "text": "\\ud800"}',  # half a pair
        '{"action": "view", "text": "a\nb"}',
        '{"action": "view", "text": "a',
        "{}",
        "",
    ],
)
def test_no_other_text_is_allowed(tokens, text):
    assert not tokens.grammar(SCHEMA).accepts(text)


@pytest.mark.parametrize("upper", [False, True])
def test_a_control_is_written_as_json_writes_it_and_no_other_way(tokens, upper):
    """\\b \\t \\n \\f \\r have letters; of the others only the small hexadecimal digits."""
    for code in range(0x80):
        spelt = f"\\u{code:04X}" if upper else f"\\u{code:04x}"
        own = json.dumps(chr(code), ensure_ascii=False)
        assert tokens.grammar({"type": "string"}).accepts(own)
        assert tokens.grammar({"type": "string"}).accepts(f'"{spelt}"') == (f'"{spelt}"' == own), spelt


def test_bytes_that_are_no_text_are_not_allowed(tokens):
    matcher = tokens.grammar(SCHEMA).matcher()
    assert matcher.accept_string('{"action": "view", "text": "')
    for raw in (b"\xff", b"\xc0\xa2", b"\xed\xa0\x80", b"\xf4\x90\x80\x80"):
        assert not matcher.accept_string(raw)
    assert matcher.accept_string('ä日\U0001f600"}')


# ---- what is refused ----


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({}, r"json_schema\.type is null"),
        ({"type": "number"}, r'json_schema\.type is "number": one of object, array'),
        ({"type": ["string", "null"]}, "json_schema.type is"),
        ({"anyOf": [{"type": "null"}]}, "json_schema.type is null"),
        ({"type": "string", "pattern": "a+"}, 'json_schema has the keyword "pattern", which the grammar cannot keep'),
        ({"type": "string", "enum": ["a"], "maxLength": 1}, 'keyword "maxLength"'),
        ({"type": "array", "items": {"type": "null"}, "uniqueItems": True}, 'keyword "uniqueItems"'),
        ({"type": "array"}, "json_schema.items is null"),
        ({"type": "object", "properties": {}}, "lets further keys be"),
        ({"type": "object", "properties": [], **NONE}, r"json_schema\.properties is \[\]"),
        ({"type": "object", "properties": {"a": True}, **NONE}, r"json_schema\.properties\.a is true"),
        ({"type": "object", "properties": {}, "required": ["a"], **NONE}, r'json_schema\.required is \["a"\]'),
        ({"type": "object", "properties": {"a": {"type": "date"}}, **NONE}, r"json_schema\.properties\.a\.type"),
        ({"enum": []}, r"json_schema\.enum is \[\]"),
        ({"enum": "view"}, "a list of at least one value"),
        ({"type": "string", "enum": [1]}, "json_schema has the value 1, its type is"),
        ({"type": "integer", "const": True}, "json_schema has the value true"),
        ({"enum": [float("nan")]}, "no JSON"),
        ({"enum": ["\ud800"]}, "no JSON"),
        ({"type": "string", "minLength": 3, "maxLength": 2}, "0 ≤ minLength ≤ maxLength is expected, not 3 and 2"),
        ({"type": "array", "items": {"type": "null"}, "minItems": -1}, "minItems"),
        ("null", "json_schema is"),
    ],
)
def test_what_the_grammar_cannot_keep_is_an_error_with_its_place(schema, words):
    with pytest.raises(UserError, match=words):
        json_grammar(schema)


@pytest.fixture
def mute(tiny_llama, tiny_tokenizer):
    """An engine whose model fails when it is asked: errors have to come before."""
    model = tiny_llama()
    model.forward = None
    return TransformersEngine(model, tiny_tokenizer, 2)


def test_a_bad_schema_is_found_before_the_model_is_asked(mute):
    with pytest.raises(UserError, match='keyword "pattern"'):
        mute.generate(PROMPTS, json_schema={"type": "string", "pattern": "a"})
    with pytest.raises(UserError, match='keyword "pattern"'):
        mute.check(PROMPTS, [["a"]] * 3, json_schema={"type": "string", "pattern": "a"})


def test_what_xgrammar_refuses_is_named(mute, tokens):
    with pytest.raises(UserError, match=r"xgrammar refuses the JSON schema .*'maxLength': 1000000000000"):
        mute.generate(PROMPTS, json_schema={"type": "string", "maxLength": 10**12})


def test_without_xgrammar_the_error_says_what_to_install(mute, monkeypatch):
    monkeypatch.setitem(sys.modules, "xgrammar", None)
    with pytest.raises(UserError, match=r'pip install "recllm\[actions\]"'):
        mute.generate(PROMPTS, json_schema=SCHEMA)


def test_a_tokenizer_without_an_end_is_refused(tiny_tokenizer, tokens):
    import copy

    endless = copy.deepcopy(tiny_tokenizer)
    endless.eos_token = None
    with pytest.raises(UserError, match="no eos token to end an answer with"):
        Tokens(endless, None, 259).grammar(SCHEMA)


def test_a_schema_is_compiled_once_for_a_tokenizer(tiny_tokenizer, tokens, monkeypatch):
    import copy

    import xgrammar

    made = []
    original = xgrammar.GrammarCompiler.__init__
    monkeypatch.setattr(
        xgrammar.GrammarCompiler, "__init__", lambda self, *a, **k: (made.append(k), original(self, *a, **k))[1]
    )
    another = copy.deepcopy(tiny_tokenizer)
    grammars = [Tokens(another, None, 259).grammar(SCHEMA) for _ in range(3)]
    assert len(made) == 1
    assert made[0].get("cache_enabled", True)  # xgrammar remembers what it has compiled
    assert len({grammar.text for grammar in grammars}) == 1


# ---- what models write ----


def lively(tiny_llama, seed, **config):
    """A random tiny Llama whose logits are far apart, so that its texts differ."""
    return tiny_llama(seed, initializer_range=0.5, **config)


@pytest.mark.parametrize("seed", range(8))
def test_whatever_a_random_model_writes_parses_and_fits(tokens, tiny_llama, tiny_tokenizer, seed):
    jsonschema = pytest.importorskip("jsonschema")
    engine = TransformersEngine(lively(tiny_llama, seed), tiny_tokenizer, 3)
    made = engine.generate(PROMPTS, max_new_tokens=120, json_schema=SHORT)
    assert all(answer.finished for answer in made)
    for text, _ in made:
        value = json.loads(text)
        jsonschema.Draft202012Validator(SHORT).validate(value)
        assert json.dumps(value, ensure_ascii=False) == text
    free = engine.generate(PROMPTS, max_new_tokens=30)
    assert not any(text.startswith('{"action": ') for text, _ in free)  # it was the schema that made them so


def test_answers_under_the_schema_of_actions_are_read_or_unfinished(tokens, tiny_llama, tiny_tokenizer):
    readings = []
    for seed in range(6):
        engine = TransformersEngine(lively(tiny_llama, seed), tiny_tokenizer, 3)
        for text, finished in engine.generate(PROMPTS, max_new_tokens=100, json_schema=SCHEMA):
            readings.append(read_answer(text, finished, WORDS, FIELDS).reason)
    assert set(readings) <= {"", "unfinished"}
    assert "" in readings


def test_an_object_that_the_limit_cuts_is_not_finished(tokens, tiny_llama, tiny_tokenizer):
    engine = TransformersEngine(lively(tiny_llama, 0), tiny_tokenizer, 3)
    (whole, _), *_ = engine.generate(PROMPTS[:1], max_new_tokens=120, json_schema=SHORT)
    length = len(whole.encode())  # a token a byte, and eos
    for limit in (3, length - 1, length):
        assert engine.generate(PROMPTS[:1], max_new_tokens=limit, json_schema=SHORT) == [
            (whole.encode()[:limit].decode(errors="replace"), False)
        ]
    assert engine.generate(PROMPTS[:1], max_new_tokens=length + 1, json_schema=SHORT) == [(whole, True)]


def test_each_row_of_a_batch_has_its_own_place_in_the_grammar_and_its_own_gate(tokens, tiny_llama, tiny_tokenizer):
    torch.manual_seed(0)
    model = build_adapter(tiny_llama(), AdapterSection(r=8, num_experts=4), SASRec(20, 16, max_items=8).eval()).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.5)
    asked = {"max_new_tokens": 80, "json_schema": SHORT}
    prompts, gates = PROMPTS * 2, np.eye(4)[[0, 2, 3, 1, 0, 2]]
    together = TransformersEngine(model, tiny_tokenizer, 6).generate(prompts, gate_weights=gates, **asked)
    engine = TransformersEngine(model, tiny_tokenizer, 1)
    alone = [engine.generate([prompts[i]], gate_weights=gates[[i]], **asked)[0] for i in range(6)]
    assert together == alone
    assert any(together[i] != together[i + 3] for i in range(3))  # the same prompt with another gate
    assert len({len(text) for text, _ in together}) > 1  # rows that end sooner are left alone


def test_a_row_whose_logits_are_nan_ends_unfinished(tokens, tiny_llama, tiny_tokenizer):
    """From the sixth token on the first row of the batch says nothing; the others are as they are without it."""
    model = lively(tiny_llama, 0)
    whole = TransformersEngine(model, tiny_tokenizer, 3).generate(PROMPTS, max_new_tokens=120, json_schema=SHORT)
    original, calls = model.forward, []

    @functools.wraps(original)
    def forward(*args, **kwargs):
        found = original(*args, **kwargs)
        calls.append(1)
        if len(calls) > 5:
            found.logits[0] = torch.nan
        return found

    model.forward = forward
    made = TransformersEngine(model, tiny_tokenizer, 3).generate(PROMPTS, max_new_tokens=120, json_schema=SHORT)
    (differs,) = [row for row in range(3) if made[row] != whole[row]]
    assert made[differs] == (whole[differs].text[:5], False)
    assert read_answer(*made[differs], WORDS, FIELDS).reason == "unfinished"


def test_it_takes_the_likeliest_of_what_is_allowed(tokens, tiny_llama, tiny_tokenizer):
    """Step by step by hand: where the model's own choice is allowed it stays, else the best allowed one stands."""
    model = lively(tiny_llama, 1)
    engine = TransformersEngine(model, tiny_tokenizer, 1)
    ((text, finished),) = engine.generate(PROMPTS[:1], max_new_tokens=120, json_schema=SHORT)
    assert finished
    (row,) = tokens.for_generation(PROMPTS[:1], 0)
    grammar, written, own = tokens.grammar(SHORT), [], 0
    for byte in [*(int(t) for t in tiny_tokenizer(text, add_special_tokens=False)["input_ids"]), 2]:
        with torch.no_grad():
            order = model(torch.tensor([row + written])).logits[0, -1].argsort(descending=True).tolist()
        matcher = grammar.matcher()
        assert all(matcher.accept_token(token) for token in written)
        best = next(token for token in order if matcher.fork().accept_token(token))
        assert best == byte
        own += best == order[0]
        written.append(byte)
    assert 0 < own < len(written)


def test_a_model_wider_than_its_tokenizer_writes_none_of_the_padding(tokens, tiny_llama, tiny_tokenizer):
    engine = TransformersEngine(lively(tiny_llama, 3, vocab_size=293), tiny_tokenizer, 3)
    made = engine.generate(PROMPTS, max_new_tokens=120, json_schema=SHORT)
    assert all(finished and json.loads(text) for text, finished in made)


def test_a_special_token_within_a_string_is_the_text_that_it_is(tokens):
    begin, end = (tokens.tokenizer.convert_tokens_to_ids(name) for name in ("<|im_start|>", "<|im_end|>"))
    before, after = (tokens.tokenizer(text)["input_ids"] for text in ('{"action": "view", "text": "', '"}'))
    made = tokens.read_held([*before, begin, *after, end], tokens.grammar(SCHEMA))
    assert made == ('{"action": "view", "text": "<|im_start|>"}', True)


def test_a_text_outside_the_grammar_is_an_error_and_no_answer(tokens):
    end = tokens.tokenizer.eos_token_id
    with pytest.raises(RuntimeError, match="which its JSON schema does not allow"):
        tokens.read_held([*tokens.tokenizer('{"action": "vie"}')["input_ids"], end], tokens.grammar(SCHEMA))


def test_words_that_the_tokenizer_cannot_write_are_an_error(tokens, tiny_llama, tiny_tokenizer):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ascii_only = {chr(code): code for code in range(33, 127)} | {"Ġ": 127, "<end>": 128}
    own = Tokenizer(models.BPE(vocab=ascii_only, merges=[]))
    own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, eos_token="<end>", pad_token="<end>")
    engine = TransformersEngine(tiny_llama(vocab_size=129), tokenizer, 1)
    assert engine.generate(PROMPTS[:1], json_schema={"enum": ["yes"]}) == [('"yes"', True)]
    with pytest.raises(UserError, match="no token of the tokenizer goes on"):
        engine.generate(PROMPTS[:1], json_schema={"enum": ["日本"]})


@pytest.fixture(scope="module")
def pieces():
    """A tokenizer of Llama 2's kind: "▁" for a blank, bytes as pieces, and a decoder that tidies blanks up."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *map(chr, range(33, 127))]
    vocabulary = {name: place for place, name in enumerate([*names, "▁a", "▁{", '":'])}
    merges = [("▁", "a"), ("▁", "{"), ('"', ":")]
    own = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>"))
    own.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    own.decoder = decoders.Sequence(steps)
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=own, clean_up_tokenization_spaces=True, **names)


def test_a_tokenizer_of_pieces_is_held_and_read_letter_by_letter(tokens, pieces, tiny_llama):
    schema = {"type": "object", "properties": {"a": {"enum": ["a , b 's", "日本"]}, "b": SHORT["properties"]["item"]}}
    schema |= {"required": ["a", "b"]} | NONE
    texts = []
    for seed in range(4):
        model = lively(tiny_llama, seed, vocab_size=len(pieces) + 7)
        texts += TransformersEngine(model, pieces, 3).generate(PROMPTS, max_new_tokens=100, json_schema=schema)
    assert all(finished for _, finished in texts)
    assert {json.loads(text)["a"] for text, _ in texts} == {"a , b 's", "日本"}
