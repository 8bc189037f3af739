"""vLLM's engine with the plugin against Transformers: merged weights of each request's gate, the gate's own code."""

import json

import numpy as np
import pytest

APART = 2e-4  # of fp32 logits, whose deviation is about 1


def compare(reference, case, arrays, run, given):
    """The largest difference from the reference over prefill and decoding; every argmax must be the same."""
    worst = 0.0
    for i, asked in enumerate(given):
        ids = [*asked["prompt"], *asked["tokens"][:-1]]
        expected = reference.logits(asked["adapter"], asked["gate"], ids)[len(asked["prompt"]) - 1 :]
        if case == "mixed_layers":  # this engine gives log-probabilities
            shifted = expected - expected.max(-1, keepdims=True)
            expected = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
        assert arrays[f"{run}.{i}"].shape == expected.shape
        assert asked["tokens"] == expected.argmax(-1).tolist(), (run, asked["adapter"], asked["gate"])
        worst = max(worst, float(np.abs(arrays[f"{run}.{i}"] - expected).max()))
    print(f"{case}, {run}: logits {worst:.1e} apart over {len(given)} requests")
    return worst


# ---- gates of all kinds in one engine ----


@pytest.mark.parametrize("run", ["first", "again", "own"])
def test_mixed_requests_get_the_logits_of_their_own_merged_weights(shared, reference, run):
    given = shared["mixed"][run]
    kinds = {(asked["adapter"], asked["gate"] is not None) for asked in given}
    gated = {("ad", True), ("ad", False), ("ad2", True), ("sigmoid", True), ("sigmoid", False), ("plain", False)}
    assert kinds == (gated if run == "own" else gated | {(None, False)})  # own: vLLM's kernels, as on a GPU
    assert len({json.dumps(asked["gate"]) for asked in given}) == 12
    assert compare(reference, "mixed", shared.arrays("mixed"), run, given) < APART


def test_mixed_requests_get_the_logits_of_the_gate_itself(shared, reference):
    arrays, compared = shared.arrays("mixed"), 0
    for i, asked in enumerate(shared["mixed"]["first"]):
        if asked["gate"] is not None:
            ids = [*asked["prompt"], *asked["tokens"][:-1]]
            expected = reference.gated_logits(asked["adapter"], asked["gate"], ids)[len(asked["prompt"]) - 1 :]
            assert np.abs(arrays[f"first.{i}"] - expected).max() < APART
            compared += 1
    assert compared == 11


def test_gates_differ_visibly(shared):
    arrays = shared.arrays("mixed")
    alike = [i for i, asked in enumerate(shared["mixed"]["first"]) if asked["adapter"] == "ad" and i % 3 == 0]
    assert len(alike) == 3
    assert np.abs(arrays[f"first.{alike[0]}"][0] - arrays[f"first.{alike[1]}"][0]).max() > 0.3


def test_prompts_come_in_chunks_and_again_from_the_cache(shared):
    assert all(len(asked["prompt"]) > 64 for asked in shared["mixed"]["first"])  # max_num_batched_tokens
    assert [asked["cached"] for asked in shared["mixed"]["first"]] == [0] * 15
    assert [asked["cached"] for asked in shared["mixed"]["again"]] == [96] * 15  # three whole blocks of 32


def test_copies_of_one_request_have_its_gate(shared, reference):
    asked = shared["mixed"]["first"][0]
    assert shared["mixed"]["n"] == [asked["tokens"]] * 2


def test_every_position_of_a_prompt_has_its_gate(shared, reference):
    case = shared["every_position"]
    for asked, seen in zip(case["requests"], case["logits"], strict=True):
        expected = reference.logits(asked["adapter"], asked["gate"], asked["prompt"])
        own = expected[np.arange(len(seen)), asked["prompt"][1:]]
        assert len(seen) == len(asked["prompt"]) - 1 >= 99
        assert np.abs(own - seen).max() < APART


# ---- keys and values ----


def test_keys_and_values_never_cross_gates(shared):
    same_and_other = {lock: cached for lock, cached in shared["locks"].items() if "," not in lock}
    assert same_and_other == {"both": [0, 96, 0], "key": [0, 96, 0], "salt": [0, 96, 0], "none": [0, 96, 96]}


def test_a_request_without_a_gate_shares_nothing_with_gates_not_even_the_uniform_one(shared):
    assert shared["locks"]["gate, none, uniform, none"] == [0, 0, 0, 96]


# ---- many at once ----


def test_64_requests_at_once_give_what_they_give_one_by_one(shared):
    case = shared["concurrent"]
    assert case["requests"] == case["same"] == 64
    assert case["apart"] < APART


def test_each_request_of_a_step_gets_the_log_probabilities_that_it_asked_for(shared):
    """vLLM's own sampler gives those that asked for the likeliest tokens none where others name theirs."""
    likeliest, named, sampled, many, everything, nothing = shared["logprobs_apart"]["requests"]
    for case in (likeliest, named, sampled, many, everything, nothing):
        assert case["same"]
        assert case["apart"] < APART
    assert all(5 <= count <= 6 for count in likeliest["tokens"])  # and the sampled one
    assert all(3 <= count <= 4 for count in named["tokens"])
    assert sampled["tokens"] == [1, 1, 1]
    assert all(100 <= count <= 101 for count in many["tokens"])
    assert everything["tokens"] == [259] * 3
    assert nothing["tokens"] == []


def test_requests_that_are_thrown_out_come_back_with_their_gates(shared):
    case = shared["preempted"]
    assert case["thrown_out"] > 0
    assert case["requests"] == case["same"] == 16
    assert case["apart"] < APART


# ---- what cannot be served ----


def test_a_thousand_malformed_requests_are_refused_and_leave_the_engine_as_it_was(shared):
    case = shared["malformed"]
    by_plugin = {kind: count for kind, count in case["refused"].items() if not kind.startswith("extra_args integers")}
    assert sum(by_plugin.values()) >= 1000
    kinds = {"length", "long", "sum", "number", "no list", "junk", "nested"}
    kinds |= {f"{kind}, by name" for kind in kinds} | {"damaged name", "no gate in the name", "null", "internal key"}
    kinds |= {"two gates", "gate for plain", "gate for None", "gate for plain, by name", "above 1", "extra_args"}
    assert kinds <= by_plugin.keys()
    assert not case["waiting"]
    assert case["same_after"]


def test_malformed_requests_leave_those_under_way_as_they_are(shared):
    case = shared["malformed"]
    assert case["served_between"] == 6
    assert case["refused_between"] > 10
    assert case["same_between"]


def test_gates_a_layer_need_an_engine_that_keeps_them(shared):
    assert "layered has a gate a layer, 2 of them" in shared["needs_layers"]["said"]
    assert "RECLLM_GATE_LAYERS=2" in shared["needs_layers"]["said"]


# ---- without gated adapters ----


def test_the_plugin_changes_no_bit_of_plain_loras_and_the_base_model(shared, stock):
    on, off = shared["plain_answers"], stock["plain_answers"]
    assert on["kernels"] != off["kernels"]  # the plugin was there, and was not
    assert on["requests"] == off["requests"]
    assert {asked["adapter"] for asked in on["requests"]} == {"plain", None}
    ours, theirs = shared.arrays("plain_answers"), stock.arrays("plain_answers")
    assert ours.keys() == theirs.keys()
    assert len(ours) == 6
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


# ---- a gate a layer ----


@pytest.mark.parametrize("run", ["first", "again", "own"])
def test_gates_a_layer_get_the_logits_of_their_own_merged_weights(layered, reference, run):
    given = layered["mixed_layers"][run]
    assert sum(asked["adapter"] == "layered" for asked in given) == {"first": 6, "again": 5, "own": 6}[run]
    assert compare(reference, "mixed_layers", layered.arrays("mixed_layers"), run, given) < APART


def test_gates_in_one_list_are_those_in_nested_lists(layered):
    assert [asked["cached"] for asked in layered["mixed_layers"]["again"]] == [64] * 5


def test_beam_search_is_that_of_the_merged_weights(layered, reference):
    searches = layered["beams"]["searches"]
    assert [search["adapter"] for search in searches] == ["ad", "ad", "layered", "layered", "plain"]
    for search in searches:
        asked = (search["adapter"], search["gate"], search["prompt"])
        assert search["beams"] == reference.beams(*asked, width=3, count=4)
    assert len({json.dumps(search["beams"]) for search in searches}) == 5


# ---- two workers with half of every LoRA each ----


@pytest.mark.parametrize("run", ["first", "again"])
def test_sharded_loras_get_the_logits_of_their_own_merged_weights(sharded, reference, run):
    case = sharded["sharded"]
    assert len(case["layers"]) == 2
    assert all("Sharded" in kind for kinds in case["layers"] for kind in kinds)
    assert [report["kernels"] for report in case["reports"]] == ["GatedPunicaCPU"] * 2
    assert all(report["gated_steps"] > 10 for report in case["reports"])
    assert compare(reference, "sharded", sharded.arrays("sharded"), run, case[run]) < APART
    assert {asked["cached"] for asked in case[run]} == ({0} if run == "first" else {96})


# ---- the real small model ----


@pytest.mark.slow
@pytest.mark.parametrize("run", ["first", "again"])
def test_smollm2_gets_the_logits_of_its_merged_weights(real, real_reference, run):
    given = real["real"][run]
    assert {asked["adapter"] for asked in given} == {"ad", "ad2", "plain", None}
    assert compare(real_reference, "real", real.arrays("real"), run, given) < APART
