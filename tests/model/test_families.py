"""Instance-wise LoRA on all linear modules of the families of decoders, and what is refused with its reason."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer

from recllm.errors import UserError
from recllm.model.adapter import build_adapter, load_adapter, save_adapter
from recllm.model.export import export_user_adapter
from recllm.model.ilora import ILoraConfig
from recllm.model.servable import servability
from recllm.recipe import AdapterSection, GateSection

CLOSE = {"rtol": 1e-4, "atol": 2e-4}  # fp32, logits of order 10
SIZES: dict[str, Any] = {
    "vocab_size": 259, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
    "initializer_range": 0.2,
}  # fmt: skip
HEADS = {"head_dim": 8}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {}, "Mistral": {"sliding_window": None}, "Qwen2": {}, "Qwen3": HEADS, "Gemma": HEADS,
    "Gemma2": HEADS | {"query_pre_attn_scalar": 8}, "Gemma3": HEADS | {"query_pre_attn_scalar": 8}, "Phi3": {},
    "Granite": {},
}  # fmt: skip


def _base(family: str, **more: Any) -> Any:
    names = {"Gemma3": "Gemma3TextConfig"}
    config_class = getattr(transformers, names.get(family, f"{family}Config"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = config_class(**SIZES | FAMILIES.get(family, {}) | more)
        config.architectures = [f"{family}ForCausalLM"]
        return getattr(transformers, f"{family}ForCausalLM")(config).to(torch.float32).eval()


def _logits(model: Any, tokens: torch.Tensor, **given: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens, **given).logits


@pytest.mark.parametrize("per_layer", [False, True], ids=["shared", "per layer"])
@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_modules_of_a_family(
    family: str, per_layer: bool, encoder: Any, randomise: Any, tmp_path: Path, tokens: torch.Tensor,
    histories: torch.Tensor,
) -> None:  # fmt: skip
    base = _base(family)
    linear = {name for name, m in base.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"}
    model = build_adapter(base, AdapterSection(gate=GateSection(per_layer=per_layer)), encoder()).eval()
    randomise(model, 0)
    adapted = {name for name, m in model.get_base_model().named_modules() if isinstance(m, LoraLayer)}
    assert adapted == linear
    assert servability(model.config, model.peft_config["default"]) == []

    # uniform gates are the plain LoRA of the same weights, as stock PEFT computes it
    save_adapter(model, tmp_path / "adapter")
    stock = PeftModel.from_pretrained(_base(family), str(tmp_path / "adapter")).eval()
    uniform = torch.full((3, 2, 4) if per_layer else (3, 4), 1 / 4)
    torch.testing.assert_close(_logits(model, tokens, gate_weights=uniform), _logits(stock, tokens), **CLOSE)

    # a user's gate folded into B, and merged into the weights, is that user's output
    together = _logits(model, tokens, history_items=histories)
    weights = model.base_model.gate_weights(histories).detach()
    export_user_adapter(model, weights[0], tmp_path / "user")
    merged = PeftModel.from_pretrained(_base(family), str(tmp_path / "user")).merge_and_unload().eval()
    torch.testing.assert_close(together[0], _logits(merged, tokens)[0], **CLOSE)
    assert not torch.allclose(together[1], _logits(merged, tokens)[1], atol=1e-2)

    # generation, cached, continues as the merged model does; reloaded it is the same
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    made = model.generate(input_ids=tokens, history_items=histories, **options)
    assert torch.equal(made[:1], merged.generate(input_ids=tokens[:1], **options))
    loaded = load_adapter(_base(family), tmp_path / "adapter")
    assert torch.equal(_logits(loaded, tokens, history_items=histories), together)


@pytest.mark.parametrize("family", ["Llama", "Gemma", "Gemma2", "Gemma3", "Granite", "Qwen3"])
def test_the_soft_token_has_an_embeddings_length_in_every_family(
    family: str, encoder: Any, randomise: Any, tokens: torch.Tensor, histories: torch.Tensor
) -> None:
    model = build_adapter(_base(family), AdapterSection(method="soft_token"), encoder()).eval()
    randomise(model, 0)
    token = model.base_model.soft_token["default"]
    torch.nn.init.normal_(token.projection)
    added = token(torch.randn(200, 16)).detach().norm(dim=1).mean()
    embedded = model.get_input_embeddings()(torch.arange(259)).detach().norm(dim=1).mean()
    assert float(added / embedded) == pytest.approx(1, abs=0.3)
    logits = _logits(model, tokens, history_items=histories)
    assert not torch.allclose(logits, _logits(model, tokens, history_items=histories.flip(0)), atol=1e-2)


@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Gemma3"])
def test_compiled_without_a_graph_break(
    family: str, encoder: Any, randomise: Any, tokens: torch.Tensor, histories: torch.Tensor
) -> None:
    model = build_adapter(_base(family), AdapterSection(), encoder()).eval()
    randomise(model, 0)
    weights = model.base_model.gate_weights(histories).detach()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for given in (weights, weights.flip(0)):  # the graph is not tied to the gates it was traced with
        expected = _logits(model, tokens, gate_weights=given)
        torch.testing.assert_close(_logits(compiled, tokens, gate_weights=given), expected, **CLOSE)
    representation = model.base_model.represent(histories)
    expected = _logits(model, tokens, representation=representation)
    torch.testing.assert_close(_logits(compiled, tokens, representation=representation), expected, **CLOSE)


def test_compiled_it_trains(encoder: Any, randomise: Any, tokens: torch.Tensor, histories: torch.Tensor) -> None:
    model = build_adapter(_base("Llama"), AdapterSection(), encoder()).train()
    randomise(model, 0)
    representation, gradients = model.base_model.represent(histories).detach(), []
    for run in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        logits = run(input_ids=tokens, representation=representation).logits
        logits.float().log_softmax(-1)[..., 5].mean().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0]["base_model.gate.default.output.weight"].abs().max() > 0
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-5)


# ---- what is refused ----

MOE = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


@pytest.mark.parametrize("family", ["Mixtral", "Qwen3Moe"])
def test_fused_experts_are_refused_and_attention_goes(
    family: str, encoder: Any, randomise: Any, tokens: torch.Tensor, histories: torch.Tensor
) -> None:
    parameters = [name for name, _ in _base(family, **MOE).named_parameters() if ".experts." in name]
    assert parameters  # fused: parameters, not linear layers
    with pytest.raises(
        UserError, match=r"target_parameters=.*experts of a mixture-of-experts layer see tokens without"
    ):
        ILoraConfig(target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"])
    section = AdapterSection(target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    model = build_adapter(_base(family, **MOE), section, encoder()).eval()
    randomise(model, 0)
    assert servability(model.config, model.peft_config["default"]) == []
    together = _logits(model, tokens, history_items=histories)
    alone = torch.cat([_logits(model, tokens[r : r + 1], history_items=histories[r : r + 1]) for r in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", ["Mixtral", "Qwen3Moe"])
def test_all_linear_of_a_mixture_never_reaches_an_expert(family: str, encoder: Any) -> None:
    """Where PEFT takes more than attention, a layer that sees tokens without their rows says so."""
    model = build_adapter(_base(family, **MOE), AdapterSection(), encoder())
    adapted = [name for name, m in model.get_base_model().named_modules() if isinstance(m, LoraLayer)]
    assert not any("experts" in name for name in adapted)


def test_a_layer_that_sees_tokens_without_their_rows_says_so(encoder: Any) -> None:
    model = build_adapter(_base("Llama"), AdapterSection(), encoder())
    layer = model.get_base_model().model.layers[0].mlp.down_proj
    flattened = torch.nn.Module.register_forward_pre_hook(layer, lambda _, args: (args[0].flatten(0, 1),))
    with pytest.raises(RuntimeError, match="do not have one row for each of 3 gates"):
        model(input_ids=torch.ones(3, 4, dtype=torch.long), history_items=torch.ones(3, 1, dtype=torch.long))
    flattened.remove()


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"use_dora": True}, "replaces the LoRA layer's formula"), ({"rank_pattern": {"q_proj": 4}}, "the same r")],
    ids=["dora", "rank_pattern"],
)
def test_what_changes_the_formula_is_refused_with_the_reason(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        ILoraConfig(r=8, num_experts=4, target_modules="all-linear", **options)


def test_get_peft_model_takes_the_config_as_any_other(tokens: torch.Tensor) -> None:
    config = ILoraConfig(r=8, num_experts=4, target_modules="all-linear", representation_size=16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = get_peft_model(_base("Llama"), config)
    plain = get_peft_model(_base("Llama"), LoraConfig(r=8, target_modules="all-linear"))
    gate = sum(p.numel() for p in model.base_model.gate.parameters())
    assert model.get_nb_trainable_parameters()[0] == plain.get_nb_trainable_parameters()[0] + gate
