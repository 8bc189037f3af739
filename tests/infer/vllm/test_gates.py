"""Gates from what a client sends to factors, without vLLM."""

import base64
import json
import math
from decimal import Decimal

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from recllm.infer.vllm_plugin import gate_layers, gates
from recllm.infer.vllm_plugin.gates import (
    Factors,
    GateError,
    Shape,
    digest,
    factors_of,
    name_with_gate,
    split_name,
    unpack,
)
from recllm.model.gate import rank_factor

SHARED = Shape("softmax", 4, 8, None)
SIGMOID = Shape("sigmoid", 8, 8, None)
LAYERED = Shape("softmax", 2, 6, 3)
SHAPES = [SHARED, SIGMOID, LAYERED, Shape("softmax", 1, 1, None), Shape("sigmoid", 2, 2, 2), Shape("softmax", 3, 12, 1)]
HUGE = 10**400  # no float


def row(shape):
    """One gate, of one layer or of all."""
    weights = st.lists(st.floats(0, 1), min_size=shape.num_experts, max_size=shape.num_experts)
    if shape.gate_type == "sigmoid":
        return weights
    return weights.filter(lambda values: sum(values) > 0.1).map(lambda values: [v / sum(values) for v in values])


def nested(shape):
    """Gates as recllm gives them: K numbers, or a list of K numbers a layer."""
    return row(shape) if shape.layers is None else st.lists(row(shape), min_size=shape.layers, max_size=shape.layers)


shapes_with_gates = st.sampled_from(SHAPES).flatmap(lambda shape: st.tuples(st.just(shape), nested(shape)))
shapes_with_two = st.sampled_from(SHAPES).flatmap(lambda shape: st.tuples(st.just(shape), nested(shape), nested(shape)))
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.binary(), st.complex_numbers(), st.just(HUGE)
)
junk = st.recursive(
    scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner, inner)
)
no_weights = st.one_of(
    st.none(), st.booleans(), st.text(), st.binary(), st.just([0.5]), st.just({}), st.floats(max_value=-1e-9),
    st.sampled_from([math.nan, math.inf, -math.inf, HUGE, -HUGE, 10**5000, -1, Decimal("0.5"), np.float32(0.5)]),
)  # fmt: skip


def flat_of(weights):
    return [v for part in weights for v in part] if weights and isinstance(weights[0], list) else weights


def is_gate(value, shape):
    """Said once more, by hand: whether a value is a gate of this shape."""
    if not isinstance(value, (list, tuple)):
        return False
    if shape.layers and value and all(isinstance(part, (list, tuple)) for part in value):
        if any(len(part) != shape.num_experts for part in value):
            return False
        value = [v for part in value for v in part]
    if len(value) != (shape.layers or 1) * shape.num_experts:
        return False
    if any(isinstance(v, bool) or not isinstance(v, (int, float)) for v in value):
        return False
    if any(not 0 <= v < 2 for v in value):  # NaN neither
        return False
    rows = np.array(value, dtype=float).reshape(-1, shape.num_experts)
    return bool(rows.max() <= 1.001 if shape.gate_type == "sigmoid" else (abs(rows.sum(1) - 1) <= 1e-3).all())


# ---- what is a gate ----


@given(shapes_with_gates)
def test_factors_are_those_of_the_model(drawn):
    shape, weights = drawn
    expected = rank_factor(torch.tensor(weights), shape.r, shape.gate_type).reshape(shape.rows, shape.r)
    assert factors_of(weights, shape).values == pytest.approx(expected.numpy(), abs=1e-6)


def test_factors_by_hand():
    assert factors_of([0.5, 0.25, 0.25, 0], SHARED).values.tolist() == [
        [4 * g for g in (0.5, 0.5, 0.25, 0.25, 0.25, 0.25, 0, 0)]
    ]
    assert factors_of([0.5] * 8, SIGMOID).values.tolist() == [[2 * 0.5] * 8]
    assert factors_of([[1, 0], [0.5, 0.5], [0, 1]], LAYERED).values.tolist() == [
        [2, 2, 2, 0, 0, 0],
        [1, 1, 1, 1, 1, 1],
        [0, 0, 0, 2, 2, 2],
    ]


@given(shapes_with_gates)
def test_lists_tuples_arrays_and_one_flat_list_are_the_same_gate(drawn):
    shape, weights = drawn
    expected = factors_of(weights, shape)
    for same in (
        flat_of(weights),
        tuple(flat_of(weights)),
        np.array(weights),
        np.array(weights, dtype=np.float64).ravel(),
    ):
        assert factors_of(same, shape).digest == expected.digest


# ---- what is none ----


@given(st.sampled_from(SHAPES), junk)
def test_whatever_is_no_gate_is_an_error_that_says_what_is_expected(shape, value):
    assume(not is_gate(value, shape))
    with pytest.raises(GateError, match=r"(?s)gate_weights .* expected") as error:
        factors_of(value, shape)
    assert len(str(error.value)) < 250


@given(shapes_with_gates, st.data(), no_weights)
def test_one_bad_number_spoils_a_gate(drawn, data, bad):
    shape, weights = drawn
    flat = list(flat_of(weights))
    flat[data.draw(st.integers(0, len(flat) - 1))] = bad
    with pytest.raises(GateError, match=r"(?s)gate_weights holds .* expected"):
        factors_of(flat, shape)


@given(st.sampled_from(SHAPES), st.integers(0, 60))
def test_other_lengths_are_named_with_the_right_one(shape, count):
    wanted = shape.rows * shape.num_experts
    assume(count != wanted)
    with pytest.raises(GateError) as error:
        factors_of([1 / shape.num_experts] * count, shape)
    assert f"has {count} numbers" in str(error.value)
    assert f"{shape.num_experts} numbers" in str(error.value)


@pytest.mark.parametrize(
    ("weights", "shape", "words"),
    [
        (0.5, SHARED, "gate_weights is 0.5, a list of 4 numbers is expected"),
        ("0.25", SHARED, "gate_weights is '0.25', a list of 4 numbers is expected"),
        ({"a": 1}, SHARED, "gate_weights is {'a': 1}, a list of 4 numbers is expected"),
        ([1, 0], SHARED, "gate_weights has 2 numbers, a list of 4 numbers is expected"),
        ([[1, 0, 0, 0]], SHARED, "gate_weights has 1 numbers, a list of 4 numbers is expected"),
        ([1, 0, 0, "0"], SHARED, "gate_weights holds '0', a number is expected"),
        ([1, 0, 0, True], SHARED, "gate_weights holds True, a number is expected"),
        ([1, 0, 0, math.nan], SHARED, "gate_weights holds nan, finite numbers of at least 0 are expected"),
        ([1, 0, 0, -0.5], SHARED, "gate_weights holds -0.5, finite numbers of at least 0 are expected"),
        ([10**5000, 0, 0, 0], SHARED, "gate_weights holds a huge int, finite numbers of at least 0 are expected"),
        ([1, 1, 0, 0], SHARED, "gate_weights sum to 2, 1 is expected"),
        ([1e308, 1e308, 0, 0], SHARED, "gate_weights sum to 2e+308"),
        ([0] * 7 + [1.5], SIGMOID, "gate_weights holds 1.5, at most 1 is expected of a sigmoid gate's weights"),
        ([1, 0], LAYERED, "3 lists of 2 numbers, or one list of all of them is expected"),
        ([[1, 0], [1, 0]], LAYERED, "gate_weights has 4 numbers"),
        ([[1, 0], [1, 0], [1]], LAYERED, "gate_weights has rows of [1, 2] numbers"),
        ([[1, 0], [1, 1], [1, 0]], LAYERED, "gate_weights of layer 1 sum to 2, 1 is expected"),
        ([[1, 0], 0.5, 0.5, [0, 1]], LAYERED, "gate_weights has 4 numbers"),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_errors_name_value_and_expectation(weights, shape, words):
    with pytest.raises(GateError) as error:
        factors_of(weights, shape)
    assert words.replace("2e+308", "inf") in str(error.value)


def test_values_of_any_depth_and_length_have_short_errors():
    deep = 1.0
    for _ in range(50_000):
        deep = [deep]
    for weights in (deep, [deep, 0, 0, 0], [0.25] * 1_000_000, "x" * 1_000_000, [["x" * 10_000] * 10_000, 0, 0, 0]):
        with pytest.raises(GateError) as error:
            factors_of(weights, SHARED)
        assert len(str(error.value)) < 150


# ---- hashes and transport ----


@given(shapes_with_gates)
def test_what_is_packed_is_unpacked(drawn):
    shape, weights = drawn
    factors = factors_of(weights, shape)
    assert np.array_equal(unpack(factors.packed()), factors.values)
    assert unpack(factors.packed()).dtype == np.float32
    assert unpack(factors.packed()).shape == (shape.rows, shape.r)


@given(shapes_with_two)
def test_hashes_are_equal_where_the_numbers_are_and_nowhere_else(drawn):
    shape, *both = drawn
    a, b = (factors_of(weights, shape) for weights in both)
    assert (a.digest == b.digest) == np.array_equal(a.values, b.values)
    assert a.digest == factors_of(both[0], shape).digest == digest(a.packed())


def test_the_smallest_difference_is_another_hash_and_a_signed_zero_none():
    values = np.ones((2, 4), dtype=np.float32)
    other = values.copy()
    other[1, 3] = np.nextafter(np.float32(1), np.float32(2))
    assert Factors(values).digest != Factors(other).digest
    assert factors_of([1, 0.0, 0, 0], SHARED).digest == factors_of([1, -0.0, 0, 0], SHARED).digest


def test_the_same_bytes_in_another_form_are_another_hash():
    flat = np.arange(8, dtype=np.float32)
    forms = {Factors(flat.reshape(form)).digest for form in ((1, 8), (2, 4), (4, 2), (8, 1))}
    assert len(forms) == 4


def test_no_gate_is_packed_as_none():
    assert gates.packed_of(None) is gates.packed_of({}) is gates.packed_of({"gate_weights": [1]}) is None
    packed = factors_of([1, 0, 0, 0], SHARED).packed()
    assert gates.packed_of({gates.FACTORS: packed, "other": 1}) is packed


# ---- in a LoRA's name ----


@given(st.text().filter(lambda name: gates.NAME_TAG not in name), shapes_with_gates)
def test_a_gate_in_a_name_comes_out_as_it_went_in(name, drawn):
    shape, weights = drawn
    assert split_name(name_with_gate(name, weights)) == (name, weights)
    for same in (np.array(weights), torch.tensor(weights, dtype=torch.float64)):
        assert split_name(name_with_gate(name, same)) == (name, weights)
    rows = [np.float64(v) for v in flat_of(weights)]
    assert factors_of(split_name(name_with_gate(name, rows))[1], shape).digest == factors_of(weights, shape).digest


@given(junk)
def test_what_is_no_gate_is_none_in_a_name_either(value):
    assume(not is_gate(value, SHARED))
    with pytest.raises(GateError, match="gate"):
        factors_of(split_name(name_with_gate("mine", value))[1], SHARED)


@pytest.mark.parametrize("value", [["0.25"] * 4, [True, False, False, False], [None, 0.5, 0.25, 0.25], "0.5"])
def test_a_name_makes_no_numbers_of_other_things(value):
    with pytest.raises(GateError, match="number"):
        factors_of(split_name(name_with_gate("mine", value))[1], SHARED)


@given(st.text())
def test_names_without_a_gate_stay_as_they_are(name):
    assume(gates.NAME_TAG not in name)
    assert split_name(name) == (name, None)


damage = st.one_of(
    st.text(),
    st.binary().map(lambda data: base64.urlsafe_b64encode(data).decode()),
    junk.map(lambda value: base64.urlsafe_b64encode(repr(value)[:99].encode("utf-8", "replace")).decode()),
    st.sampled_from(
        [base64.b64encode(text.encode()).decode() for text in ("", "null", "[0.5", "[" * 100_000, "9" * 5000)]
    ),
)


@given(damage)
def test_a_damaged_name_is_an_error_or_no_gate(coded):
    try:
        name, weights = split_name(f"mine{gates.NAME_TAG}{coded}")
    except GateError as error:
        assert "damaged gate" in str(error)  # noqa: PT017
        assert "gated_lora_request" in str(error)  # noqa: PT017
        return
    assert name == "mine"
    assert weights is not None
    if not is_gate(weights, SHARED):
        with pytest.raises(GateError, match="gate_weights"):
            factors_of(weights, SHARED)


@given(shapes_with_gates, st.data())
def test_a_name_that_lost_letters_is_never_another_gate(drawn, data):
    shape, weights = drawn
    name = name_with_gate("mine", weights)
    start = len("mine") + len(gates.NAME_TAG)
    place = data.draw(st.integers(start, len(name) - 1))
    letter = data.draw(st.sampled_from("!*~ \n."))
    for changed in (name[:place], name[:place] + letter + name[place:], name[:place] + letter + name[place + 1 :]):
        with pytest.raises(GateError):
            factors_of(split_name(changed)[1], shape)


# ---- adapters' folders ----


def write(folder, ilora=None, lora=None, base=None):
    folder.mkdir(exist_ok=True)
    documents = {
        "ilora.json": {"num_experts": 4, "r": 8, "gate_type": "softmax", "gate_per_layer": False} | (ilora or {}),
        "adapter_config.json": {"r": 8, "target_modules": ["q_proj"]} | (lora or {}),
        "base_model.json": {"num_hidden_layers": 3} | (base or {}),
    }
    for name, document in documents.items():
        (folder / name).write_text(json.dumps(document))
    return folder


def test_shapes_are_read_from_the_adapters_folder(tmp_path):
    assert gates.shape_of(write(tmp_path / "a")) == SHARED
    assert gates.shape_of(write(tmp_path / "b", {"gate_type": "sigmoid", "num_experts": 8})) == SIGMOID
    assert gates.shape_of(write(tmp_path / "c", {"gate_per_layer": True})) == Shape("softmax", 4, 8, 3)
    assert gates.has_gate(tmp_path / "a")


def test_a_folder_without_a_gate_is_a_plain_lora(tmp_path):
    assert gates.shape_of(tmp_path) is None
    assert gates.shape_of(tmp_path / "absent") is None
    assert not gates.has_gate(tmp_path)


def test_a_folder_of_before_there_were_kinds_of_gates(tmp_path):
    folder = write(tmp_path / "a")
    (folder / "ilora.json").write_text('{"num_experts": 4, "r": 8}')
    assert gates.shape_of(folder) == SHARED


@pytest.mark.parametrize("name", ["ilora.json", "adapter_config.json", "base_model.json"])
@pytest.mark.parametrize(
    "text", ["", "[]", "3", "null", '{"num_experts": "x", "r": [], "num_hidden_layers": {}}', "\xff"]
)
def test_damaged_folders_are_errors_that_name_the_file(tmp_path, name, text):
    folder = write(tmp_path / "a", {"gate_per_layer": True})
    (folder / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(GateError, match=r"ilora\.json.*copy the adapter's folder again"):
        gates.shape_of(folder)


@pytest.mark.parametrize(
    "documents",
    [
        {"ilora": {"num_experts": 3}},
        {"ilora": {"num_experts": 0}},
        {"ilora": {"num_experts": -4}},
        {"ilora": {"r": 16}},
        {"ilora": {"r": 0}, "lora": {"r": 0}},
        {"ilora": {"gate_type": "tanh"}},
        {"ilora": {"gate_type": "sigmoid"}},
        {"ilora": {"gate_per_layer": True}, "base": {"num_hidden_layers": 0}},
        {"ilora": {"gate_per_layer": True}, "base": {"num_hidden_layers": -1}},
        {"ilora": {"num_experts": math.inf}},
    ],
)
def test_shapes_that_are_no_gates_are_errors(tmp_path, documents):
    with pytest.raises(GateError, match="copy the adapter's folder again"):
        gates.shape_of(write(tmp_path / "a", **documents))


@pytest.mark.parametrize("trained", [["q_proj", "lm_head"], r".*(q_proj|lm_head)"])
def test_a_lora_of_the_head_is_refused_as_no_gate_reaches_it(tmp_path, trained):
    with pytest.raises(GateError, match="lm_head"):
        gates.shape_of(write(tmp_path / "a", lora={"target_modules": trained}))


@pytest.mark.parametrize("text", ["0", "-1", "two", "", "1.5", "²"])
def test_the_number_of_layers_is_a_positive_number(monkeypatch, text):
    monkeypatch.setenv("RECLLM_GATE_LAYERS", text)
    with pytest.raises(RuntimeError, match="RECLLM_GATE_LAYERS"):
        gate_layers()


def test_gates_are_shared_where_nothing_is_said(monkeypatch):
    monkeypatch.delenv("RECLLM_GATE_LAYERS", raising=False)
    assert gate_layers() == 1
    monkeypatch.setenv("RECLLM_GATE_LAYERS", "24")
    assert gate_layers() == 24
