"""A quantised base model: bitsandbytes has CPU kernels, so these run everywhere that it is installed."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from recllm.errors import UserError
from recllm.model import base_model as base_models
from recllm.model.adapter import build_adapter, fit_gate_statistics, load_adapter, save_adapter
from recllm.model.base_model import load_base_model, prepare_for_training
from recllm.model.export import export_user_adapter
from recllm.recipe import AdapterSection, ModelSection

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed (extra quant)"
)
SECTION = AdapterSection(r=8, num_experts=4)


@pytest.fixture
def folder(tmp_path: Path, tiny_llama: Any, tiny_tokenizer: Any) -> Path:
    """A tiny Llama of width 64: bitsandbytes' CPU kernel reads blocks of so many."""
    tiny_llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def load(folder: Path) -> Any:
    """load("4bit"): that Llama, quantised while it is read."""
    return lambda bits: load_base_model(ModelSection(name_or_path=str(folder), dtype="float32", quantization=bits))[0]


def _train(model: Any, tokens: torch.Tensor, given: dict[str, Any], steps: int, learning_rate: float) -> list[float]:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens, **given).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    model.eval()
    return losses


def _logits(model: Any, tokens: torch.Tensor, **given: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=tokens, **given).logits


@needs_bitsandbytes
@pytest.mark.parametrize("bits", ["4bit", "8bit"])
@pytest.mark.parametrize("method", ["ilora", "soft_token"])
def test_it_trains_saves_and_reloads(
    load: Any, encoder: Any, tmp_path: Path, tokens: torch.Tensor, histories: torch.Tensor, bits: str, method: str
) -> None:
    section = SECTION.model_copy(update={"method": method})
    model = build_adapter(prepare_for_training(load(bits)), section, encoder())
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    assert type(layer.base_layer).__name__ == {"4bit": "Linear4bit", "8bit": "Linear8bitLt"}[bits]
    fit_gate_statistics(model, encoder()(torch.arange(20)[:, None]).detach())
    losses = _train(model, tokens, {"history_items": histories}, steps=12, learning_rate=1e-2)
    assert all(loss < float("inf") for loss in losses)
    assert losses[-1] < losses[0]
    read = model.base_model.gate["default"].output.weight if method == "ilora" else None
    read = model.base_model.soft_token["default"].projection if read is None else read
    assert read.grad.abs().max() > 0
    save_adapter(model, tmp_path / "adapter")
    expected = _logits(model, tokens, history_items=histories)
    loaded = load_adapter(prepare_for_training(load(bits)), tmp_path / "adapter")  # the same kernels: the same numbers
    torch.testing.assert_close(_logits(loaded, tokens, history_items=histories), expected, rtol=1e-4, atol=1e-4)
    swapped = _logits(loaded, tokens, history_items=histories.flip(0))
    assert (swapped - expected).abs().max() > 0.01


@needs_bitsandbytes
@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_the_invariants_hold_on_a_quantised_base(
    load: Any, encoder: Any, randomise: Any, tmp_path: Path, tokens: torch.Tensor, histories: torch.Tensor, bits: str
) -> None:
    model = build_adapter(load(bits), SECTION, encoder()).eval()
    randomise(model, 0)
    save_adapter(model, tmp_path / "adapter")
    stock = PeftModel.from_pretrained(load(bits), str(tmp_path / "adapter"))
    uniform = torch.full((3, 4), 1 / 4)
    # the CPU's 4-bit kernel computes in bf16: the base model's own logits (of order 10) carry such noise
    close = {"rtol": 1e-3, "atol": 1e-3} if bits == "8bit" else {"rtol": 0, "atol": 0.15}
    torch.testing.assert_close(_logits(stock, tokens), _logits(model, tokens, gate_weights=uniform), **close)
    together = _logits(model, tokens, history_items=histories)
    weights = model.base_model.gate_weights(histories).detach()
    assert (together[0] - _logits(model, tokens, history_items=histories.flip(0))[0]).abs().max() > 1
    for user in range(2):
        export_user_adapter(model, weights[user], tmp_path / "user")
        one = PeftModel.from_pretrained(load(bits), str(tmp_path / "user"))
        # the whole batch, because 8bit looks for outliers in all of it
        torch.testing.assert_close(
            _logits(one, tokens)[user], _logits(model, tokens, gate_weights=weights[user].expand(3, -1))[user], **close
        )
        if bits == "4bit":
            torch.testing.assert_close(_logits(one, tokens)[user], together[user], **close)
    made = model.generate(input_ids=tokens, history_items=histories, max_new_tokens=4, do_sample=False)
    assert made.shape[0] == 3


@needs_bitsandbytes
@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_widths_that_are_no_multiple_of_the_kernels_blocks(
    tiny_model_folder: Path, tokens: torch.Tensor, bits: str
) -> None:
    section = ModelSection(name_or_path=str(tiny_model_folder), dtype="float32", quantization=bits)
    assert torch.isfinite(_logits(load_base_model(section)[0], tokens)).all()


@needs_bitsandbytes
@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_an_evaluation_amid_training_leaves_the_gradients_as_they_were(
    load: Any, encoder: Any, randomise: Any, tokens: torch.Tensor, histories: torch.Tensor, bits: str
) -> None:
    model = build_adapter(prepare_for_training(load(bits)), SECTION, encoder())
    randomise(model, 0)
    gradients = []
    for _ in range(2):
        model.train().zero_grad()
        model(input_ids=tokens, labels=tokens, history_items=histories).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        _logits(model, tokens, history_items=histories)
    assert min(float(gradient.abs().max()) for name, gradient in gradients[0].items() if "gate" not in name) > 0
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=lambda text, name=name: f"{name}: {text}")


@needs_bitsandbytes
def test_what_is_quantised(load: Any) -> None:
    model = load("4bit")
    config = model.config.quantization_config
    assert (config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant) == ("nf4", True)
    assert config.bnb_4bit_compute_dtype == torch.float32
    assert model.get_input_embeddings().weight.dtype == torch.float32
    assert model.model.layers[1].mlp.down_proj.weight.dtype == torch.uint8


@needs_bitsandbytes
def test_prepared_for_training_norms_and_embeddings_are_float32(folder: Path) -> None:
    section = ModelSection(name_or_path=str(folder), dtype="bfloat16", quantization="4bit")
    model = prepare_for_training(load_base_model(section)[0])
    assert {p.dtype for p in model.parameters()} == {torch.float32, torch.uint8}
    plain = load_base_model(section.model_copy(update={"quantization": None}))[0]
    assert prepare_for_training(plain) is plain
    assert {p.dtype for p in plain.parameters()} == {torch.bfloat16}


def test_without_bitsandbytes_the_extra_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_models.importlib.util, "find_spec", lambda name: None)
    section = ModelSection(name_or_path=str(folder), quantization="4bit")
    with pytest.raises(UserError, match=r"pip install \"recllm\[quant\]\""):
        load_base_model(section)


@needs_bitsandbytes
@pytest.mark.slow
@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_smollm2(smollm2: str, encoder: Any, tmp_path: Path, bits: str) -> None:
    section = ModelSection(name_or_path=smollm2, quantization=bits)
    base_model, tokenizer = load_base_model(section)
    model = build_adapter(prepare_for_training(base_model), SECTION, encoder())
    fit_gate_statistics(model, encoder()(torch.arange(20)[:, None]).detach())
    batch = tokenizer(["The next film is Alien (1979)\nHeat (1995)\n"] * 2, return_tensors="pt")
    given = {"history_items": torch.tensor([[1, 2, 3], [-1, 7, 9]]), "attention_mask": batch["attention_mask"]}
    losses = _train(model, batch["input_ids"], given, steps=4, learning_rate=2e-3)
    assert losses[-1] < losses[0] < 10
    assert model.base_model.gate["default"].output.weight.grad.abs().max() > 0
    save_adapter(model, tmp_path / "adapter")
    loaded = load_adapter(prepare_for_training(load_base_model(section)[0]), tmp_path / "adapter")
    expected = _logits(model, batch["input_ids"], **given)
    torch.testing.assert_close(_logits(loaded, batch["input_ids"], **given), expected, rtol=1e-3, atol=1e-2)
