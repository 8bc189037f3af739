"""The plugin's parts with vLLM's own classes; `parts.py` says what only a GPU could show."""

from recllm import __version__
from recllm.infer.vllm_plugin import SUPPORTED

CLOSE = 1e-4  # of outputs that are of order 50, fp32


def test_other_versions_of_vllm_are_refused_by_both_names(stock):
    said = stock["versions"]["said"]
    assert said["own"] == ""
    assert said["0.32.0rc1"] == said["0.32.7+cu129"] == ""
    for version in ("0.31.4", "0.33.0", "1.0.0", "dev"):
        assert f"recllm {__version__}" in said[version]
        assert f"vLLM {version}:" in said[version]
        assert SUPPORTED in said[version]


def test_vllm_does_not_start_with_a_plugin_that_refuses_it(stock):
    said = stock["versions"]["said"]["start"]
    assert f"recllm {__version__}" in said
    assert "vLLM 0.99.0" in said
    assert not stock["versions"]["hooked"]  # nothing was touched


def test_every_hooked_symbol_is_named_where_it_is_missing_or_has_changed(stock):
    vllm, case = stock["versions"]["vllm"], stock["symbols"]
    assert case["whole"] == ""
    assert len(case["named"]) >= 15
    inherited = set()
    for symbol, (changed, gone) in case["named"].items():
        assert f"{symbol} takes ('other',), (" in changed
        assert f"recllm {__version__}" in changed
        assert f"vLLM {vllm}" in changed
        if gone == "inherited":
            inherited.add(symbol.rpartition(".")[2])
        else:
            assert f"{symbol} is missing" in gone
    assert inherited == {
        "add_expand",
        "add_lora_linear",
        "_set_active_loras",
        "forward",
    }  # from a base class, if their own is gone


def test_the_front_end_changes_nothing_that_a_caller_holds_and_nothing_without_a_gate(stock):
    case = stock["front_end"]
    assert case["untouched"] == 6
    for kind in ("pooling", "pooling, by name"):
        assert "gates are for generation" in case["said"][kind]
    assert "the engine's own" in case["said"]["pooling, internal"]
    assert "send one" in case["said"]["both"]
    assert "recllm cannot gate LoRAs by PunicaWrapperXPU" in case["said"]["platform"]


def test_factors_are_those_of_each_token_whatever_the_step_before_was(stock):
    case = stock["step_gates"]
    assert case["steps"] > 1000
    assert min(case["unchanged"], case["same counts, other gates"], case["gated"], case["fewer"]) > 50


def test_a_buffer_that_may_be_under_way_is_waited_for(stock):
    assert stock["two_buffers"] == {"kept": 6, "waited": [1, 0, 1, 0, 1, 0]}


def test_all_ways_through_the_kernels_are_the_formula(stock):
    errors = stock["kernels"]["errors"]
    assert len(errors) == 4 * (2 + 4)  # ways, and the layers: none and one; none and three
    assert stock["kernels"]["uneven"] == 2
    assert max(errors.values()) < CLOSE


def test_modules_get_the_factors_of_their_layer(stock):
    assert stock["views"]["given"] == {
        "model.layers.0.mlp.up_proj": 0,
        "model.layers.1.mlp.up_proj": 1,
        "transformer.h.1.attn.c_attn": 1,
        "model.proj": None,
        "vision.layers.7.mlp": None,
    }
    assert stock["views"]["same_names"]


def test_a_model_with_more_layers_than_factors_does_not_start(stock):
    assert "RECLLM_GATE_LAYERS=2" in stock["views"]["said"]
    assert "model.layers.2.mlp.up_proj" in stock["views"]["said"]


def test_model_runner_v2_gives_every_step_the_gates_of_its_requests(stock):
    case = stock["runner_v2"]
    assert case["steps"] > 300
    assert min(case["gated"], case["finished"], case["preempted"], case["names used again"], case["dummies"]) > 50
