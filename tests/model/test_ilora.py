import copy
import pickle
from collections import Counter
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from peft.tuners.lora.layer import LoraLayer
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from transformers import GenerationConfig

from recllm.errors import UserError
from recllm.model.adapter import build_adapter, gate_weights, load_adapter, save_adapter
from recllm.model.gate import Gate
from recllm.model.ilora import DECODER_LAYER, ILoraConfig
from recllm.recipe import AdapterSection

MASK = torch.tensor([[1] * 7, [0, 0] + [1] * 5, [0] + [1] * 6])
# Sums in another order differ in the last bits of fp32; logits here are of order 10.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def _logits(model: Any, tokens: torch.Tensor, **gates: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens, attention_mask=MASK[: len(tokens)], **gates).logits


def _layers(model: Any) -> list[LoraLayer]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def _plain_twin(model: Any, tiny_llama: Any, **section: Any) -> Any:
    """A stock PEFT LoRA with the same A and B."""
    twin = build_adapter(tiny_llama(), AdapterSection(**{"method": "lora", "r": 8, "lora_alpha": 16} | section)).eval()
    with torch.no_grad():
        for ours, theirs in zip(_layers(model), _layers(twin)):
            theirs.lora_A["default"].weight.copy_(ours.lora_A["default"].weight)
            theirs.lora_B["default"].weight.copy_(ours.lora_B["default"].weight)
    return twin


GATES: dict[str, dict[str, Any]] = {
    "softmax": {},
    "mlp": {"hidden_size": 5, "temperature": 0.5},
    "top_k": {"top_k": 2},
    "sigmoid": {"type": "sigmoid"},
    "per_layer": {"per_layer": True},
    "top_k_per_layer": {"top_k": 2, "per_layer": True, "hidden_size": 5},
    "sigmoid_per_layer": {"type": "sigmoid", "per_layer": True},
}


@pytest.fixture(params=GATES.values(), ids=GATES.keys())
def gate(request: Any) -> dict[str, Any]:
    """Each kind of gate, as the recipe's gate section says it."""
    return request.param


def _uniform(model: Any, rows: int = 3) -> torch.Tensor:
    own = model.base_model.gate["default"]
    return torch.full((rows, *own.shape), own.uniform)


def _layer_of(name: str) -> int:
    return int(name.split("layers.")[1].split(".")[0])


def _user_factor(weights: torch.Tensor, gate: dict[str, Any], layer: int) -> torch.Tensor:
    """One user's factor of A x in a decoder layer, written out: (8,)."""
    weights = weights[layer] if gate.get("per_layer") else weights
    return 2 * weights if gate.get("type") == "sigmoid" else (4 * weights).repeat_interleave(2)


# ---- the invariants of the method ----


def test_uniform_gates_of_every_kind_are_plain_lora_exactly(
    adapter: Any, tiny_llama: Any, tokens: torch.Tensor, gate: dict[str, Any]
) -> None:
    model = adapter(gate=gate)
    expected = _logits(_plain_twin(model, tiny_llama), tokens)
    assert torch.equal(_logits(model, tokens, gate_weights=_uniform(model)), expected)
    start = adapter(gate=gate, trained=False)  # the gate's start is uniform for everybody, with top_k too
    representation = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(start.base_model.gate_weights(representation=representation), _uniform(start))


@pytest.mark.parametrize("num_experts", [1, 2, 4, 8])
def test_uniform_gates_are_plain_lora_exactly(
    adapter: Any, tiny_llama: Any, tokens: torch.Tensor, num_experts: int
) -> None:
    model = adapter(num_experts=num_experts)
    uniform = torch.full((3, num_experts), 1 / num_experts)
    # bit by bit: alpha / r = 2 is a power of two, so it may stand before or after B
    assert torch.equal(_logits(model, tokens, gate_weights=uniform), _logits(_plain_twin(model, tiny_llama), tokens))


def test_uniform_gates_are_plain_lora_with_any_scaling(adapter: Any, tiny_llama: Any, tokens: torch.Tensor) -> None:
    model = adapter(r=12, lora_alpha=17, num_experts=3)
    plain = _logits(_plain_twin(model, tiny_llama, r=12, lora_alpha=17), tokens)
    torch.testing.assert_close(_logits(model, tokens, gate_weights=torch.full((3, 3), 1 / 3)), plain, **CLOSE)


def test_layers_with_a_scaling_of_their_own_keep_it(adapter: Any, tiny_llama: Any, tokens: torch.Tensor) -> None:
    model = adapter()
    plain = _plain_twin(model, tiny_llama)
    before = _logits(plain, tokens)
    for one in (model, plain):
        for name, module in one.named_modules():
            if isinstance(module, LoraLayer) and _layer_of(name) == 1:
                module.scale_layer(4.0)
    expected = _logits(plain, tokens)
    assert (expected - before).abs().max() > 0.1
    assert torch.equal(_logits(model, tokens, gate_weights=_uniform(model)), expected)


def test_gradients_of_all_layers_meet_in_float32(adapter: Any) -> None:
    """In bf16 the small ones would be lost beside a large one: 1 + 1/512 is 1 there."""
    tuner = adapter().base_model
    weights = torch.full((2, 4), 1 / 4, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        first, *others = tuner._rows({"gate_weights": weights})["default"].factors
    assert first.dtype == torch.bfloat16
    assert len(others) == 2 * 7 - 1  # all linear modules of two decoder layers
    (first.float().sum() + sum(factor.float().sum() for factor in others) / 512).backward()
    scaling, num_experts, ranks = 16 / 8, 4, 2
    assert torch.equal(weights.grad, torch.full((2, 4), scaling * num_experts * ranks * (1 + len(others) / 512)))


def test_one_expert_is_plain_lora(adapter: Any, tiny_llama: Any, tokens: torch.Tensor, histories: torch.Tensor) -> None:
    model = adapter(num_experts=1)
    assert torch.equal(_logits(model, tokens, history_items=histories), _logits(_plain_twin(model, tiny_llama), tokens))


def test_an_empty_history_is_plain_lora_exactly(
    adapter: Any, tiny_llama: Any, tokens: torch.Tensor, histories: torch.Tensor, gate: dict[str, Any]
) -> None:
    model = adapter(gate=gate)
    twin = _plain_twin(model, tiny_llama)
    assert torch.equal(_logits(model, tokens, history_items=histories)[2], _logits(twin, tokens)[2])


def test_b_of_zero_is_the_base_model(
    adapter: Any, tiny_llama: Any, tokens: torch.Tensor, histories: torch.Tensor, gate: dict[str, Any]
) -> None:
    model = adapter(trained=False, gate=gate)
    assert torch.equal(_logits(model, tokens, history_items=histories), _logits(tiny_llama(), tokens))


def test_users_differ(adapter: Any, tokens: torch.Tensor, histories: torch.Tensor, gate: dict[str, Any]) -> None:
    model, same = adapter(gate=gate), tokens[:1].expand(3, -1)
    with torch.no_grad():
        logits = model(input_ids=same, history_items=histories).logits
    assert not torch.allclose(logits[0], logits[1], atol=1e-2)
    assert not torch.allclose(logits[0], logits[2], atol=1e-2)


def test_one_gate_folded_into_b_is_that_users_model(
    adapter: Any, tiny_llama: Any, tokens: torch.Tensor, histories: torch.Tensor, gate: dict[str, Any]
) -> None:
    model = adapter(gate=gate)
    weights = gate_weights(model, histories).detach()
    together = _logits(model, tokens, history_items=histories)
    for user in range(3):
        twin = _plain_twin(model, tiny_llama)
        with torch.no_grad():
            for name, module in twin.named_modules():
                if isinstance(module, LoraLayer):
                    module.lora_B["default"].weight *= _user_factor(weights[user], gate, _layer_of(name))
        # merged: the oracle is an ordinary Llama without any adapter code
        torch.testing.assert_close(together[user], _logits(twin.merge_and_unload(), tokens)[user], **CLOSE)


def test_the_fused_layer_equals_a_loop_over_experts(adapter: Any, gate: dict[str, Any]) -> None:
    model = adapter(gate=gate)
    layer = _layers(model)[-1]  # down_proj of decoder layer 1
    x, weights = torch.randn(3, 5, 64), torch.rand(_uniform(model).shape)
    own = weights[:, 1] if gate.get("per_layer") else weights  # (3, K)
    num_experts = own.shape[1]
    factor, rank = (2, 1) if gate.get("type") == "sigmoid" else (num_experts, 8 // num_experts)
    expected = layer.base_layer(x)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight  # (8, 64), (32, 8)
    for expert in range(num_experts):
        rows = slice(rank * expert, rank * (expert + 1))
        expected = expected + factor * (16 / 8) * own[:, expert, None, None] * (x @ a[rows].T @ b[:, rows].T)
    seen: list[torch.Tensor] = []
    handle = layer.register_forward_pre_hook(lambda module, args: (x,))
    capture = layer.register_forward_hook(lambda module, args, output: seen.append(output))
    hidden = torch.zeros(3, 5, dtype=torch.long)
    with torch.no_grad():
        model(input_ids=hidden, gate_weights=weights)
    handle.remove()
    capture.remove()
    torch.testing.assert_close(seen[0], expected, **CLOSE)


def test_each_decoder_layer_has_its_own_row(adapter: Any, tokens: torch.Tensor) -> None:
    model = adapter(gate={"per_layer": True})
    weights = torch.zeros(3, 2, 4)
    weights[:, 1, 2] = 1.0  # the third expert alone, of decoder layer 1 alone
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, LoraLayer):
                expert = torch.zeros(8)
                expert[4:6] = 4.0 if _layer_of(name) == 1 else 0.0
                module.full = module.lora_B["default"].weight.clone()
                module.lora_B["default"].weight *= expert
        expected = _logits(model, tokens, gate_weights=_uniform(model))
        for module in _layers(model):
            module.lora_B["default"].weight.copy_(module.full)
    torch.testing.assert_close(_logits(model, tokens, gate_weights=weights), expected, **CLOSE)


def test_batch_equals_single_rows(
    adapter: Any, tokens: torch.Tensor, histories: torch.Tensor, gate: dict[str, Any]
) -> None:
    model = adapter(gate=gate)
    together = _logits(model, tokens, history_items=histories)
    for row in range(3):
        real = MASK[row].bool()
        with torch.no_grad():
            alone = model(input_ids=tokens[row : row + 1, real], history_items=histories[row : row + 1]).logits
        torch.testing.assert_close(together[row, real], alone[0], **CLOSE)


def test_cached_decoding_equals_uncached(
    adapter: Any, tokens: torch.Tensor, histories: torch.Tensor, gate: dict[str, Any]
) -> None:
    model = adapter(gate=gate)
    options = {"input_ids": tokens, "attention_mask": MASK, "history_items": histories, "max_new_tokens": 12}
    options |= {"do_sample": False, "eos_token_id": None}
    cached, uncached = (model.generate(use_cache=flag, **options) for flag in (True, False))
    assert torch.equal(cached, uncached)
    with torch.no_grad():
        base = model(input_ids=tokens[:, :4], history_items=histories, use_cache=True)
        step = model(input_ids=tokens[:, 4:], history_items=histories, past_key_values=base.past_key_values).logits
        whole = model(input_ids=tokens, history_items=histories).logits
    torch.testing.assert_close(step, whole[:, 4:], **CLOSE)


# ---- training ----


def _gradients(model: Any, tokens: torch.Tensor, histories: torch.Tensor) -> dict[str, torch.Tensor]:
    model.train()
    model.zero_grad()
    # Two forwards before one backward: each recomputation must see the gates of its own forward, not the last one's
    first = model(input_ids=tokens, labels=tokens.clone(), history_items=histories).loss
    second = model(input_ids=tokens.flip(0), labels=tokens.flip(0), history_items=histories.roll(1, 0)).loss
    (first + 2 * second).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return found | {"loss": (first + 2 * second).detach()}


def test_checkpointing_on_equals_off(
    adapter: Any, tokens: torch.Tensor, histories: torch.Tensor, gate: dict[str, Any]
) -> None:
    model = adapter(gate=gate)
    plain = _gradients(model, tokens, histories)
    model.gradient_checkpointing_enable()
    checkpointed = _gradients(model, tokens, histories)
    assert plain.keys() == checkpointed.keys()
    assert any("gate" in name and grad.abs().max() > 0 for name, grad in plain.items())
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, msg=lambda text, name=name: f"{name}: {text}")


def test_checkpointing_is_really_on(adapter: Any, tokens: torch.Tensor, histories: torch.Tensor) -> None:
    model, calls = adapter(), []
    _layers(model)[0].register_forward_hook(lambda *_: calls.append(1))
    model.gradient_checkpointing_enable()
    _gradients(model, tokens, histories)
    assert len(calls) == 2 * 2  # each of two forwards ran once more in backward


def test_a_graph_can_be_walked_back_twice(adapter: Any, tokens: torch.Tensor, histories: torch.Tensor) -> None:
    model = adapter().train()
    model.gradient_checkpointing_enable()
    loss = model(input_ids=tokens, labels=tokens, history_items=histories).loss
    weight = model.base_model.gate["default"].output.weight
    once = torch.autograd.grad(loss, weight, retain_graph=True)[0]
    assert torch.equal(once, torch.autograd.grad(loss, weight)[0])


def test_checkpointing_switched_on_before_the_adapter(
    tiny_llama: Any, encoder: Any, tokens: torch.Tensor, histories: torch.Tensor
) -> None:
    base_model = tiny_llama()
    base_model.gradient_checkpointing_enable()
    model = build_adapter(base_model, AdapterSection(), encoder()).train()
    model(input_ids=tokens, labels=tokens, history_items=histories).loss.backward()


def test_reentrant_checkpointing_is_refused(adapter: Any) -> None:
    with pytest.raises(UserError, match="use_reentrant"):
        adapter().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})


def test_the_gate_has_no_gradient_on_the_first_step_and_one_on_the_second(
    adapter: Any, tokens: torch.Tensor, histories: torch.Tensor, gate: dict[str, Any]
) -> None:
    model = adapter(trained=False, gate=gate).train()
    weight = model.base_model.gate["default"].output.weight
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(input_ids=tokens, labels=tokens, history_items=histories).loss.backward()
    assert torch.equal(weight.grad, torch.zeros_like(weight))  # B is zero, so nothing reaches the gate
    optimizer.step()
    optimizer.zero_grad()
    model(input_ids=tokens, labels=tokens, history_items=histories).loss.backward()
    assert (weight.grad.abs().amax(1) > 0).all()  # every expert: with top_k too, all are tied at the start


def test_what_is_trained(adapter: Any) -> None:
    trained = {name for name, p in adapter().named_parameters() if p.requires_grad}
    assert all("lora_" in name or name.startswith("base_model.gate.default.") for name in trained)
    assert "base_model.gate.default.output.weight" in trained
    assert not any("sequence_encoder" in name for name in trained)


def test_a_frozen_encoder_has_no_dropout_in_training(adapter: Any, histories: torch.Tensor) -> None:
    model = adapter().train()
    assert model.base_model.gate["default"].training
    assert not model.base_model.sequence_encoder["default"].training
    assert torch.equal(gate_weights(model, histories), gate_weights(model, histories))


def test_an_encoder_can_be_trained_along(
    adapter: Any, encoder: Any, tokens: torch.Tensor, histories: torch.Tensor
) -> None:
    model = adapter()
    model.base_model.set_encoder(encoder(dropout=0.0), "default", trainable=True)
    model.train()(input_ids=tokens, labels=tokens, history_items=histories).loss.backward()
    assert model.base_model.sequence_encoder["default"].item_embedding.weight.grad.abs().max() > 0


def test_bf16_base_keeps_gate_and_encoder_in_fp32(
    tiny_llama: Any, encoder: Any, tokens: torch.Tensor, histories: torch.Tensor, gate: dict[str, Any]
) -> None:
    model = build_adapter(tiny_llama().to(torch.bfloat16), AdapterSection(gate=gate), encoder())
    tuner = model.base_model
    assert {p.dtype for p in [*tuner.gate.parameters(), *tuner.sequence_encoder.parameters()]} == {torch.float32}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = gate_weights(model, histories)
        loss = model(input_ids=tokens, labels=tokens, history_items=histories).loss
    assert torch.equal(inside, gate_weights(model, histories))
    loss.backward()
    assert tuner.gate["default"].output.weight.grad.dtype == torch.float32


def test_a_bf16_model_under_uniform_gates_is_plain_lora_exactly(
    adapter: Any, tiny_llama: Any, tokens: torch.Tensor, histories: torch.Tensor, gate: dict[str, Any]
) -> None:
    """No autocast: the base model in bf16, and the LoRA too, as engines cast it."""
    model = adapter(gate=gate)
    fp32 = _logits(model, tokens, history_items=histories)
    twin = _plain_twin(model, tiny_llama).to(torch.bfloat16)
    model.to(torch.bfloat16)
    assert torch.equal(_logits(model, tokens, gate_weights=_uniform(model)), _logits(twin, tokens))
    real = MASK.bool()
    bf16 = _logits(model, tokens, history_items=histories).float()
    assert (bf16 - fp32)[real].norm() / fp32[real].norm() < 0.1


# ---- generate ----


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}])
def test_beams_see_their_own_users_gate(
    adapter: Any, tokens: torch.Tensor, histories: torch.Tensor, options: dict[str, int], gate: dict[str, Any]
) -> None:
    model = adapter(gate=gate)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None} | options
    together = model.generate(input_ids=tokens, attention_mask=MASK, history_items=histories, **options)
    copies = options.get("num_return_sequences", 1)
    for row in range(3):
        alone = model.generate(
            input_ids=tokens[row : row + 1], attention_mask=MASK[row : row + 1],
            history_items=histories[row : row + 1], **options,
        )  # fmt: skip
        assert torch.equal(together[row * copies : (row + 1) * copies], alone)


def test_sampled_copies_repeat_the_gate(adapter: Any, tokens: torch.Tensor, histories: torch.Tensor) -> None:
    model = adapter()
    options = {"max_new_tokens": 3, "do_sample": True, "num_return_sequences": 2}
    assert model.generate(input_ids=tokens, history_items=histories, **options).shape[0] == 3 * 2
    config = copy.deepcopy(model.generation_config)
    config.update(**options)
    assert model.generate(input_ids=tokens, history_items=histories, generation_config=config).shape[0] == 3 * 2


def test_what_a_passed_config_leaves_open_the_models_own_fills(
    adapter: Any, tokens: torch.Tensor, histories: torch.Tensor
) -> None:
    model = adapter()
    expected = model.generate(
        input_ids=tokens, history_items=histories, num_beams=3, max_new_tokens=4, do_sample=False, eos_token_id=None
    )
    model.generation_config.num_beams = 3
    config = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert config.num_beams is None
    found = model.generate(input_ids=tokens, history_items=histories, generation_config=config)
    assert torch.equal(found, expected)
    config.num_beams = 1  # said, so not filled
    assert model.generate(input_ids=tokens, history_items=histories, generation_config=config).shape[0] == 3


def test_sampling_sees_each_users_gate(
    adapter: Any, tokens: torch.Tensor, histories: torch.Tensor, gate: dict[str, Any]
) -> None:
    model, same = adapter(gate=gate), tokens[:1].expand(3, -1)
    options = {"max_new_tokens": 5, "do_sample": True, "top_k": 1, "eos_token_id": None}  # so that it can be foretold
    together = model.generate(input_ids=same, history_items=histories, num_return_sequences=2, **options)
    for row in range(3):
        alone = model.generate(input_ids=same[:1], history_items=histories[row : row + 1], **options)
        assert torch.equal(together[2 * row : 2 * row + 2], alone.expand(2, -1))
    assert len({tuple(row) for row in together.tolist()}) > 1


# ---- the weights of the last forward ----


def test_a_loss_on_the_gate_reaches_it(
    adapter: Any, tokens: torch.Tensor, histories: torch.Tensor, gate: dict[str, Any]
) -> None:
    model = adapter(gate=gate).train()
    model.gradient_checkpointing_enable()
    model(input_ids=tokens, labels=tokens, history_items=histories)
    weights = model.base_model.gate_rows.weights["default"]
    assert torch.equal(weights, gate_weights(model, histories))
    assert model.base_model.gate_rows.by_adapter == {}
    (weights * torch.rand(weights.shape)).sum().backward()
    assert model.base_model.gate["default"].output.weight.grad.abs().max() > 0
    with model.disable_adapter():
        model(input_ids=tokens)
    assert model.base_model.gate_rows.weights == {}  # of this forward there are none


# ---- compiled ----


@pytest.fixture
def _fresh_compiler() -> Any:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


FEW = ["q_proj", "down_proj"]  # modules with a LoRA: tracing takes its time


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("argument", ["history_items", "representation", "gate_weights"])
def test_compiled_in_one_graph(adapter: Any, tokens: torch.Tensor, histories: torch.Tensor, argument: str) -> None:
    _check_compiled(adapter(target_modules=FEW), tokens, histories, argument)


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("kind", ["top_k_per_layer", "sigmoid"])  # between them they pass every line
def test_other_gates_compile_in_one_graph(
    adapter: Any, tokens: torch.Tensor, histories: torch.Tensor, kind: str
) -> None:
    _check_compiled(adapter(gate=GATES[kind], target_modules=FEW), tokens, histories, "representation")


def _check_compiled(model: Any, tokens: torch.Tensor, histories: torch.Tensor, argument: str) -> None:
    tuner = model.base_model
    given = {
        "history_items": histories,
        "representation": tuner.represent(histories).detach(),
        "gate_weights": gate_weights(model, histories).detach(),
    }[argument]
    compiled = torch.compile(model, fullgraph=True, backend="eager")  # fullgraph: a graph break is an error
    for value in (given, given.roll(1, 0)):  # rows are inputs of the graph, not constants in it
        expected, weights = model(input_ids=tokens, **{argument: value}).logits, tuner.gate_rows.weights["default"]
        torch.testing.assert_close(compiled(input_ids=tokens, **{argument: value}).logits, expected, **CLOSE)
        torch.testing.assert_close(tuner.gate_rows.weights["default"], weights)
        assert tuner.gate_rows.weights["default"].requires_grad == (argument != "gate_weights")


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["softmax", "per_layer"])
def test_compiled_training_is_one_graph_forward_and_one_backward(
    adapter: Any, tiny_llama: Any, tokens: torch.Tensor, histories: torch.Tensor, kind: str, checkpointing: bool
) -> None:
    model = adapter(gate=GATES[kind], target_modules=["q_proj"], base_model=tiny_llama(num_hidden_layers=2))
    model.config.use_cache = False
    expected, graphs = _gradients(model, tokens, histories), Counter[str]()
    if checkpointing:
        model.gradient_checkpointing_enable()
    backend = aot_autograd(fw_compiler=_counting(graphs, "forward"), bw_compiler=_counting(graphs, "backward"))
    found = _gradients(torch.compile(model, fullgraph=True, backend=backend), tokens, histories)
    assert graphs == {"forward": 1, "backward": 1}  # of both forwards of `_gradients`: rows are inputs
    assert not counters["graph_break"]
    assert any("gate" in name and gradient.abs().max() > 0 for name, gradient in expected.items())
    for name, gradient in expected.items():
        actual = found[name if name == "loss" else f"_orig_mod.{name}"]
        torch.testing.assert_close(actual, gradient, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


def _counting(graphs: Counter[str], which: str) -> Any:
    """A compiler that runs a graph as it is and counts it."""

    def compiler(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs[which] += 1
        return make_boxed_func(graph.forward)

    return compiler


# ---- several adapters, none ----


def test_disabled_it_is_the_base_model_and_needs_no_gate(
    adapter: Any, tiny_llama: Any, tokens: torch.Tensor, histories: torch.Tensor
) -> None:
    model, base = adapter(), _logits(tiny_llama(), tokens)
    with model.disable_adapter():
        assert torch.equal(_logits(model, tokens), base)
        assert torch.equal(_logits(model, tokens, history_items=histories), base)
    assert not torch.allclose(_logits(model, tokens, history_items=histories), base)


def test_two_adapters_in_one_model(adapter: Any, tokens: torch.Tensor, histories: torch.Tensor) -> None:
    alone = [_logits(adapter(seed=s), tokens, history_items=histories) for s in (0, 5)]
    both = adapter(seed=0, name="first")
    both = adapter(seed=5, name="second", base_model=both)
    for name, expected in zip(("first", "second", "first"), (alone[0], alone[1], alone[0])):
        both.set_adapter(name)
        assert torch.equal(_logits(both, tokens, history_items=histories), expected)
        trained = {key for key, p in both.named_parameters() if p.requires_grad}
        assert trained
        assert all(f".{name}." in key for key in trained)
    assert not torch.allclose(*alone)
    both.delete_adapter("first")
    assert list(both.base_model.gate) == list(both.base_model.sequence_encoder) == ["second"]
    assert torch.equal(_logits(both, tokens, history_items=histories), alone[1])


def test_adapters_with_other_kinds_of_gates_in_one_model(
    adapter: Any, tokens: torch.Tensor, histories: torch.Tensor, gate: dict[str, Any]
) -> None:
    shared, alone = (_logits(adapter(seed=s, gate=g), tokens, history_items=histories) for s, g in ((0, {}), (5, gate)))
    both = adapter(seed=5, name="second", gate=gate, base_model=adapter(seed=0, name="first"))
    for name, expected in (("first", shared), ("second", alone), ("first", shared)):
        both.set_adapter(name)
        assert torch.equal(_logits(both, tokens, history_items=histories), expected)
    both.base_model.set_adapter(["first", "second"])  # at once: each layer adds both, each with its own gate
    together = _logits(both, tokens, history_items=histories)
    weights = both.base_model.gate_rows.weights
    for name in ("first", "second"):
        assert torch.equal(weights[name], both.base_model.gate_weights(histories, adapter_name=name))
    both.base_model.set_adapter(["second", "first"])
    torch.testing.assert_close(_logits(both, tokens, history_items=histories), together, **CLOSE)
    assert not torch.allclose(together, shared, atol=1e-2)
    assert not torch.allclose(together, alone, atol=1e-2)


def test_models_do_not_share_gates(adapter: Any, tokens: torch.Tensor, histories: torch.Tensor) -> None:
    # the released code hands gates over in a global list
    first, second = adapter(), adapter()
    leaked: list[str] = []

    def call_the_other(*_: Any) -> None:
        with pytest.raises(RuntimeError, match="without gates"):
            second(input_ids=tokens)
        leaked.append("called")

    _layers(first)[0].register_forward_hook(call_the_other)
    first(input_ids=tokens, history_items=histories)
    assert leaked == ["called"]


def test_a_copy_has_its_own_gates(adapter: Any, tokens: torch.Tensor, histories: torch.Tensor) -> None:
    model = adapter()
    twin = copy.deepcopy(model)
    assert twin.base_model.gate_rows is not model.base_model.gate_rows
    expected = _logits(model, tokens, history_items=histories)
    assert torch.equal(_logits(twin, tokens, history_items=histories), expected)


def test_a_copy_after_training_with_checkpointing_has_its_own_gates(
    adapter: Any, tokens: torch.Tensor, histories: torch.Tensor
) -> None:
    model = adapter().train()
    model.gradient_checkpointing_enable()
    model(
        input_ids=tokens, labels=tokens, history_items=histories
    )  # leaves weights inside a graph, which none can copy
    twin = copy.deepcopy(model)
    assert twin.base_model.gate_rows.weights == {}
    expected, found = (_gradients(m, tokens, histories) for m in (model, twin))
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)
    assert pickle.loads(pickle.dumps(model.base_model.gate_rows)).by_adapter == {}


def test_replicas_of_data_parallel_are_refused(adapter: Any, tokens: torch.Tensor, histories: torch.Tensor) -> None:
    # its threads would write the gates of several parts of a batch into one place
    replica = adapter().base_model._replicate_for_data_parallel()
    with pytest.raises(UserError, match="accelerate launch"):
        replica(input_ids=tokens, history_items=histories)


def test_an_error_inside_leaves_no_gates_behind(adapter: Any, tokens: torch.Tensor, histories: torch.Tensor) -> None:
    model = adapter()
    with pytest.raises(RuntimeError, match="one row for each"):
        model(input_ids=tokens[:2], history_items=histories)
    with pytest.raises(RuntimeError, match="without gates"):
        model(input_ids=tokens)


# ---- refusals ----


def test_without_a_gate_the_arguments_are_named(adapter: Any, tokens: torch.Tensor) -> None:
    for call in (adapter().forward, adapter().generate):
        with pytest.raises(RuntimeError, match=r"history_items=, representation= or gate_weights="):
            call(input_ids=tokens)


def test_packed_rows_are_refused(adapter: Any, tokens: torch.Tensor, histories: torch.Tensor) -> None:
    with pytest.raises(RuntimeError, match="Packed"):
        adapter()(input_ids=tokens.reshape(1, -1), history_items=histories)
    with pytest.raises(RuntimeError, match="packed"):
        adapter()(input_ids=tokens[:1], history_items=histories[:1], cu_seq_lens_q=torch.tensor([0, 3, 7]))


def test_rows_packed_by_positions_alone_are_refused(
    adapter: Any, tokens: torch.Tensor, histories: torch.Tensor
) -> None:
    """Without a cache transformers keeps the sequences of a row apart; all of them would get the row's one gate."""
    model, ones = adapter(), torch.ones(2, 7, dtype=torch.long)
    given = {"input_ids": tokens[:2], "history_items": histories[:2], "use_cache": False}
    packed = torch.tensor([[0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 0, 1, 2, 3]])  # a second user in the second row
    for more in ({}, {"attention_mask": ones}, {"attention_mask": ones.bool()}):
        for training in (False, True):
            with pytest.raises(RuntimeError, match=r"position_ids of row 1 of 2 begin anew .* one user a row"):
                model.train(training)(position_ids=packed, **given, **more)
    with pytest.raises(RuntimeError, match="packed"):
        model.eval().generate(position_ids=packed, attention_mask=ones, max_new_tokens=1, **given)
    with pytest.raises(RuntimeError, match="row 0 of 1"):  # one line of positions for all rows
        model(position_ids=packed[1:], **given)


def test_positions_that_do_not_fall_are_not_taken_for_packing(
    adapter: Any, tokens: torch.Tensor, histories: torch.Tensor
) -> None:
    model = adapter()
    given = {"input_ids": tokens, "history_items": histories}
    expected = _logits(model, tokens, history_items=histories)
    for padding in (0, 1, 9):  # what stands where the mask is 0 says nothing
        positions = (MASK.cumsum(-1) - 1).masked_fill(MASK == 0, padding)
        with torch.no_grad():
            found = model(attention_mask=MASK, position_ids=positions, use_cache=False, **given).logits
        torch.testing.assert_close(found[MASK.bool()], expected[MASK.bool()], **CLOSE)
    with torch.no_grad():  # with a cache the new tokens' positions begin above 0, and the mask is wider than they are
        positions = (MASK.cumsum(-1) - 1).clamp(min=0)
        first = {"attention_mask": MASK[:, :4], "position_ids": positions[:, :4]}
        cache = model(input_ids=tokens[:, :4], history_items=histories, use_cache=True, **first).past_key_values
        rest = {"attention_mask": MASK, "position_ids": positions[:, 4:], "past_key_values": cache}
        step = model(input_ids=tokens[:, 4:], history_items=histories, **rest).logits
    torch.testing.assert_close(step, expected[:, 4:], **CLOSE)
    options = {"attention_mask": MASK, "max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(**given, **options), model.generate(position_ids=positions, **given, **options))


def test_a_trie_of_one_user_is_not_taken_for_packing(
    adapter: Any, tokens: torch.Tensor, histories: torch.Tensor
) -> None:
    """Two answers after one prompt share positions; a mask of four dimensions keeps them apart."""
    model, given = adapter(), {"history_items": histories[:1]}
    row, positions = tokens[:1], torch.tensor([[0, 1, 2, 3, 4, 3, 4]])
    sees = torch.ones(7, 7).tril().bool()
    sees[5:, 3:5] = False  # the second answer does not see the first
    mask = torch.zeros(1, 1, 7, 7).masked_fill(~sees, torch.finfo(torch.float32).min)
    with torch.no_grad():
        both = model(input_ids=row, attention_mask=mask, position_ids=positions, **given).logits[:, 5:]
        alone = model(input_ids=row[:, [0, 1, 2, 5, 6]], **given).logits[:, 3:]
    torch.testing.assert_close(both, alone, **CLOSE)


def test_arguments_of_a_wrong_shape(
    adapter: Any, tokens: torch.Tensor, histories: torch.Tensor, gate: dict[str, Any]
) -> None:
    model = adapter(gate=gate)
    shape = model.base_model.gate["default"].shape
    wanted = rf"\(B, {', '.join(map(str, shape))}\)"
    for wrong in ((3, 5), (3, 2, 5), (3, 3, 4), (3,), (*shape,), (3, 1, *shape), (3, *shape, 1)):
        if wrong != (3, *shape):
            with pytest.raises(ValueError, match=wanted):
                model(input_ids=tokens, gate_weights=torch.rand(wrong))
    with pytest.raises(ValueError, match=r"\(B, 16\)"):
        model(input_ids=tokens, representation=torch.rand(3, 5))
    with pytest.raises(ValueError, match="pass one of"):
        model(input_ids=tokens, history_items=histories, gate_weights=torch.rand(3, *shape))
    with pytest.raises(RuntimeError, match="one row for each of 2"):
        model(input_ids=tokens, gate_weights=torch.rand(2, *shape))


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_rows_that_are_not_finite_are_refused(
    adapter: Any, tokens: torch.Tensor, gate: dict[str, Any], number: float
) -> None:
    model = adapter(gate=gate)
    representation, weights = torch.rand(3, 16), _uniform(model)
    representation[1, 3] = weights[2, ..., 0] = number
    for call in (model.forward, model.generate):
        with pytest.raises(UserError, match="representation: row 1 of 3"):
            call(input_ids=tokens, representation=representation)
        with pytest.raises(UserError, match="gate_weights: row 2 of 3"):
            call(input_ids=tokens, gate_weights=weights)
    torch.nn.init.constant_(model.base_model.gate["default"].output.bias, float("nan"))
    with pytest.raises(UserError, match="gate_weights: row 0 of 3"):  # a gate that has blown up
        model.train()(input_ids=tokens, representation=torch.rand(3, 16))


def test_representation_and_weights_are_the_histories(
    adapter: Any, tokens: torch.Tensor, histories: torch.Tensor, gate: dict[str, Any]
) -> None:
    model = adapter(gate=gate)
    expected = _logits(model, tokens, history_items=histories)
    representation = model.base_model.represent(histories)
    assert torch.equal(_logits(model, tokens, representation=representation), expected)
    assert torch.equal(_logits(model, tokens, gate_weights=gate_weights(model, histories)), expected)


def test_merging_is_refused(adapter: Any, tokens: torch.Tensor, histories: torch.Tensor) -> None:
    model = adapter()
    before = _logits(model, tokens, history_items=histories)
    for merge in (model.merge_adapter, model.merge_and_unload, lambda: model.merge_and_unload(safe_merge=True)):
        with pytest.raises(UserError, match="export_user_adapter"):
            merge()
    assert torch.equal(_logits(model, tokens, history_items=histories), before)
    with pytest.raises(UserError, match="combined"):
        model.add_weighted_adapter(["default"], [1.0], "sum")


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True}, {"rank_pattern": {"q_proj": 4}}, {"alora_invocation_tokens": [1]}, {"lora_bias": True},
        {"modules_to_save": ["lm_head"]}, {"bias": "all"}, {"trainable_token_indices": [1]},
    ],
    ids=lambda options: next(iter(options)),
)  # fmt: skip
def test_config_refuses_what_changes_the_formula(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(options))):
        ILoraConfig(r=8, num_experts=4, target_modules=["q_proj"], **options)


@pytest.mark.parametrize("options", [{}, {"gate_top_k": 2}, {"gate_per_layer": True}])
def test_config_refuses_ranks_that_do_not_split(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="r=6 does not split into num_experts=4"):
        ILoraConfig(r=6, num_experts=4, **options)


def test_a_sigmoid_has_as_many_experts_as_ranks(adapter: Any) -> None:
    assert ILoraConfig(r=6, num_experts=4, gate_type="sigmoid").num_experts == 6
    assert adapter(r=6, num_experts=4, gate={"type": "sigmoid"}).base_model.gate["default"].shape == (6,)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gate_type": "tanh"}, "'tanh' is unknown"), ({"gate_temperature": 0.0}, "gate_temperature=0.0"),
        ({"gate_top_k": 0}, "gate_top_k=0"), ({"gate_top_k": 5}, "gate_top_k=5 .* num_experts=4"),
        ({"gate_top_k": 2, "gate_type": "sigmoid"}, "softmax"), ({"gate_top_k": 1}, "no gradient reaches the gate"),
    ],
)  # fmt: skip
def test_config_refuses_gates_that_cannot_be(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        ILoraConfig(r=8, num_experts=4, **options)
    assert ILoraConfig(r=8, num_experts=1, gate_top_k=1).gate_top_k == 1


def test_a_gate_a_layer_needs_numbered_layers(adapter: Any, tokens: torch.Tensor, histories: torch.Tensor) -> None:
    with pytest.raises(UserError, match="lm_head, which lies in none of the 2 decoder layers"):
        adapter(gate={"per_layer": True}, target_modules=["q_proj", "lm_head"])
    model = adapter()
    expected = _logits(model, tokens, history_items=histories)
    with pytest.raises(UserError, match="lm_head"):  # the adapter that was there goes on
        adapter(gate={"per_layer": True}, target_modules=["q_proj", "lm_head"], base_model=model, name="second")
    assert torch.equal(_logits(model, tokens, history_items=histories), expected)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.7.self_attn.q_proj", 7), ("transformer.h.3.mlp.fc_in", 3), ("model.decoder.block.0.fc", 0),
        ("model.language_model.layers.2.mlp.experts.5.up_proj", 2),
    ],
)  # fmt: skip
def test_the_decoder_layer_stands_in_a_modules_name(name: str, layer: int) -> None:
    found = DECODER_LAYER.search(name)
    assert found is not None
    assert int(found[1]) == layer


def test_no_decoder_layer_in_a_name() -> None:
    assert not any(
        DECODER_LAYER.search(name) for name in ("lm_head", "model.layers", "mlp.experts.3.up", "xlayers.1.q")
    )


def test_embeddings_are_refused(tiny_llama: Any, encoder: Any) -> None:
    with pytest.raises(UserError, match="embed_tokens"):
        build_adapter(tiny_llama(), AdapterSection(target_modules=["embed_tokens", "q_proj"]), encoder())


def test_mixed_adapter_names_are_refused(adapter: Any, tokens: torch.Tensor, histories: torch.Tensor) -> None:
    with pytest.raises(UserError, match="adapter_names"):
        adapter()(input_ids=tokens, history_items=histories, adapter_names=["default"] * 3)


def test_an_encoder_of_another_width_is_refused(adapter: Any, encoder: Any) -> None:
    with pytest.raises(UserError, match="8 numbers a user, the gate reads 16"):
        adapter().base_model.set_encoder(encoder(hidden_size=8), "default")


def test_without_an_encoder_history_items_are_refused(
    tiny_llama: Any, tokens: torch.Tensor, histories: torch.Tensor
) -> None:
    from peft import get_peft_model

    config = ILoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", representation_size=16)
    model = get_peft_model(tiny_llama(), config)
    with pytest.raises(ValueError, match="no sequence encoder"):
        model(input_ids=tokens, history_items=histories)
    model(input_ids=tokens, representation=torch.rand(3, 16))


def test_gates_and_encoders_are_submodules(adapter: Any) -> None:
    # so that DDP, ZeRO and FSDP see their parameters
    modules = dict(adapter().named_modules())
    assert isinstance(modules["base_model.gate.default"], Gate)
    assert "base_model.sequence_encoder.default" in modules


# ---- the real small model ----


@pytest.mark.slow
def test_merged_per_user_oracle_on_smollm2(smollm2: str, encoder: Any, randomise: Any, tmp_path: Any) -> None:
    from recllm.model.base_model import load_base_model
    from recllm.model.export import export_user_adapter
    from recllm.recipe import ModelSection

    section = ModelSection(name_or_path=smollm2, dtype="float32")
    base_model, tokenizer = load_base_model(section)
    model = build_adapter(base_model, AdapterSection(), encoder()).eval()
    randomise(model, 0)
    with torch.no_grad():
        for layer in _layers(
            model
        ):  # of a trained adapter's size: with more the logits are noise that magnifies rounding
            layer.lora_B["default"].weight *= 0.05
    items = torch.tensor([[1, 2, 3], [-1, 7, 9]])
    weights = gate_weights(model, items).detach()
    assert (weights[0] - weights[1]).abs().max() > 0.05
    texts = ["The next film is Alien (1979)\nHeat (1995)\n", "Recommend something quiet."]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    with torch.no_grad():
        together = model(**batch, history_items=items).logits
    save_adapter(model, tmp_path / "adapter")
    for user in range(2):
        export_user_adapter(model, weights[user], tmp_path / "user")
        plain = load_adapter(load_base_model(section)[0], tmp_path / "user").merge_and_unload()
        with torch.no_grad():
            expected = plain(**batch).logits[user]
        real = batch["attention_mask"][user].bool()
        with torch.no_grad():
            swapped = model(**batch, history_items=items.flip(0)).logits[user]
        assert (together[user] - swapped)[real].abs().max() > 0.1  # the gate matters far more than the tolerance
        error = (together[user] - expected)[real].abs().max() / expected[real].abs().max()
        assert error < 1e-4
