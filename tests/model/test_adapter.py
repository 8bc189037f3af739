import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from recllm import files
from recllm.errors import UserError
from recllm.model.adapter import (
    accepts_history,
    build_adapter,
    check_vocabulary,
    gate_weights,
    load_adapter,
    load_weights,
    save_adapter,
    weights_sha256,
)
from recllm.recipe import AdapterSection, GateSection


def _logits(model: Any, tokens: torch.Tensor, **gates: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=tokens, **gates).logits


@pytest.fixture
def saved(adapter: Any, tmp_path: Path) -> Path:
    """The folder of a trained-looking instance-wise adapter."""
    model = adapter()
    model.base_model.sequence_encoder["default"].vocabulary_sha256 = "v" * 64
    save_adapter(model, tmp_path / "adapter")
    return tmp_path / "adapter"


def _edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ---- round trips ----


GATES = {
    "softmax": GateSection(),
    "mlp": GateSection(hidden_size=6, temperature=0.7),
    "top_k": GateSection(top_k=2),
    "sigmoid": GateSection(type="sigmoid"),
    "per_layer": GateSection(per_layer=True, top_k=3),
    "sigmoid_per_layer": GateSection(type="sigmoid", per_layer=True, hidden_size=6),
}


@pytest.fixture(params=GATES.values(), ids=GATES.keys())
def gate(request: Any) -> GateSection:
    """Each kind of gate."""
    return request.param


@pytest.mark.parametrize("name", ["default", "other"])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_saved_and_loaded_under_any_name_gives_the_same_logits(
    adapter: Any, tiny_llama: Any, tmp_path: Path, tokens: torch.Tensor, histories: torch.Tensor, name: str,
    gate: GateSection, low_cpu_mem_usage: bool,
) -> None:  # fmt: skip
    model = adapter(gate=gate)
    save_adapter(model, tmp_path / "adapter")
    loaded = load_adapter(tiny_llama(), tmp_path / "adapter", adapter_name=name, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(gate_weights(loaded, histories), gate_weights(model, histories))
    assert torch.equal(
        _logits(loaded, tokens, history_items=histories), _logits(model, tokens, history_items=histories)
    )
    assert not any(p.requires_grad for p in loaded.parameters())
    assert not loaded.training


def test_an_adapter_saved_under_another_name_is_the_same_folder(adapter: Any, tmp_path: Path) -> None:
    for name in ("default", "other"):
        save_adapter(adapter(name=name), tmp_path / name, adapter_name=name)
    assert files.sha256_of(tmp_path / "default") == files.sha256_of(tmp_path / "other")


def test_one_of_two_adapters_is_saved(adapter: Any, tmp_path: Path) -> None:
    both = adapter(seed=5, name="second", base_model=adapter(seed=0, name="first"))
    save_adapter(both, tmp_path / "both", adapter_name="second")
    save_adapter(adapter(seed=5), tmp_path / "alone")
    assert files.sha256_of(tmp_path / "both") == files.sha256_of(tmp_path / "alone")


def test_loaded_for_training(saved: Path, tiny_llama: Any, tokens: torch.Tensor, histories: torch.Tensor) -> None:
    model = load_adapter(tiny_llama(), saved, is_trainable=True)
    assert model.training
    model(input_ids=tokens, labels=tokens, history_items=histories).loss.backward()
    assert model.base_model.gate["default"].output.weight.grad.abs().max() > 0


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_further_adapter_joins_a_model(
    saved: Path, adapter: Any, tmp_path: Path, tokens: torch.Tensor, histories: torch.Tensor, gate: GateSection,
    low_cpu_mem_usage: bool,
) -> None:  # fmt: skip
    save_adapter(adapter(seed=5, gate=gate), tmp_path / "second")
    model = adapter()
    expected = _logits(model, tokens, history_items=histories)
    load_adapter(model, tmp_path / "second", adapter_name="second", low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(_logits(model, tokens, history_items=histories), expected)  # the first stays active …
    assert model.base_model.gate["default"].output.weight.requires_grad  # … and trainable
    model.set_adapter("second")
    alone = adapter(seed=5, gate=gate)
    assert torch.equal(_logits(model, tokens, history_items=histories), _logits(alone, tokens, history_items=histories))
    assert not any(p.is_meta for p in model.parameters())


def test_stock_peft_loads_it_as_the_lora_under_uniform_gates(
    saved: Path, adapter: Any, tiny_llama: Any, tokens: torch.Tensor
) -> None:
    stock = PeftModel.from_pretrained(tiny_llama(), str(saved))
    uniform = torch.full((3, 4), 1 / 4)
    assert torch.equal(_logits(stock, tokens), _logits(adapter(), tokens, gate_weights=uniform))
    assert all(".lora_A." in key or ".lora_B." in key for key in load_file(saved / "adapter_model.safetensors"))


def test_plain_lora(adapter: Any, tiny_llama: Any, tmp_path: Path, tokens: torch.Tensor) -> None:
    model = adapter(method="lora")
    save_adapter(model, tmp_path / "adapter")
    assert {f.name for f in (tmp_path / "adapter").iterdir()} == {
        "adapter_model.safetensors", "adapter_config.json", "base_model.json",
    }  # fmt: skip
    loaded = load_adapter(tiny_llama(), tmp_path / "adapter")
    assert torch.equal(_logits(loaded, tokens), _logits(model, tokens))


def test_a_folder_of_stock_peft_loads(adapter: Any, tiny_llama: Any, tmp_path: Path, tokens: torch.Tensor) -> None:
    model = adapter(method="lora")
    model.save_pretrained(tmp_path / "stock")
    assert torch.equal(_logits(load_adapter(tiny_llama(), tmp_path / "stock"), tokens), _logits(model, tokens))


@pytest.mark.parametrize("method", ["ilora", "soft_token"])
@pytest.mark.parametrize("name", ["default", "other"])
def test_what_save_pretrained_writes_comes_back_by_from_pretrained(
    adapter: Any, encoder: Any, tiny_llama: Any, tmp_path: Path, tokens: torch.Tensor, histories: torch.Tensor,
    method: str, name: str,
) -> None:  # fmt: skip
    """LoRA and gate do, under any name; of the encoder there are weights alone, and nothing that they belong to."""
    model = adapter(method=method, name=name)
    model.save_pretrained(tmp_path)
    folder = tmp_path if name == "default" else tmp_path / name  # PEFT's rule
    representation = model.base_model.represent(histories)
    expected = _logits(model, tokens, representation=representation)
    assert not torch.allclose(expected, _logits(tiny_llama(), tokens), atol=1e-2)
    assert not torch.allclose(expected, _logits(model, tokens, representation=representation.flip(0)), atol=1e-2)
    for loaded_as in ("default", "another"):
        loaded = PeftModel.from_pretrained(tiny_llama(), folder, adapter_name=loaded_as)
        assert torch.equal(_logits(loaded, tokens, representation=representation), expected)

    with pytest.raises(
        UserError, match=r"so save_pretrained wrote this folder, .*model\.adapter\.save_adapter\(model, folder\)"
    ):
        load_adapter(tiny_llama(), folder)
    loaded.base_model.set_encoder(encoder(), loaded_as)  # what the error says, step by step
    save_adapter(loaded, tmp_path / "whole", adapter_name=loaded_as)
    again = load_adapter(tiny_llama(), tmp_path / "whole")
    assert torch.equal(_logits(again, tokens, history_items=histories), _logits(model, tokens, history_items=histories))


def test_adapters_of_other_kinds_are_peft_s(saved: Path, tiny_llama: Any) -> None:
    _edit(saved / "adapter_config.json", peft_type="IA3")
    with pytest.raises(UserError, match=r'peft_type is "IA3", .* load this one with PEFT'):
        load_adapter(tiny_llama(), saved)


def test_what_is_in_the_folder(saved: Path, adapter: Any, tmp_path: Path) -> None:
    assert json.loads((saved / "ilora.json").read_text()) == {
        "format_version": 1, "num_experts": 4, "r": 8, "lora_alpha": 16, "scaling": 16 / 8, "representation_size": 16,
        "gate_hidden_size": 0, "gate_temperature": 1.0, "gate_type": "softmax", "gate_top_k": None,
        "gate_per_layer": False, "vocabulary_sha256": "v" * 64, "history_max_items": 8,
    }  # fmt: skip
    (tmp_path / "items").write_bytes(b"parquet")
    save_adapter(adapter(), saved, items=tmp_path / "items", manifest={"seed": 0}, card="# A card\n")
    assert (saved / "items.parquet").read_bytes() == b"parquet"
    assert json.loads((saved / "manifest.json").read_text()) == {"seed": 0}
    assert (saved / "README.md").read_text() == "# A card\n"


def test_a_folder_from_before_there_were_kinds_of_gates_loads(
    saved: Path, adapter: Any, tiny_llama: Any, tokens: torch.Tensor, histories: torch.Tensor
) -> None:
    document = json.loads((saved / "ilora.json").read_text())
    kinds = ("gate_type", "gate_top_k", "gate_per_layer")
    (saved / "ilora.json").write_text(json.dumps({k: v for k, v in document.items() if k not in kinds}))
    loaded = load_adapter(tiny_llama(), saved)
    config = loaded.peft_config["default"]
    assert [getattr(config, kind) for kind in kinds] == ["softmax", None, False]
    assert torch.equal(
        _logits(loaded, tokens, history_items=histories), _logits(adapter(), tokens, history_items=histories)
    )


def test_stock_peft_loads_every_kind(
    adapter: Any, tiny_llama: Any, tmp_path: Path, tokens: torch.Tensor, gate: GateSection
) -> None:
    model = adapter(gate=gate)
    save_adapter(model, tmp_path / "adapter")
    stock = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "adapter"))
    own = model.base_model.gate["default"]
    uniform = torch.full((3, *own.shape), own.uniform)
    assert torch.equal(_logits(stock, tokens), _logits(model, tokens, gate_weights=uniform))


def test_statistics_survive_saving(saved: Path, adapter: Any) -> None:
    # the released code loses the buffers of its normalisation on save
    gate, weights = adapter().base_model.gate["default"], load_file(saved / "gate.safetensors")
    assert gate.mean.abs().max() > 0
    assert torch.equal(weights["mean"], gate.mean)
    assert torch.equal(weights["deviation"], gate.deviation)


def test_weights_load_in_place(saved: Path, adapter: Any, tokens: torch.Tensor, histories: torch.Tensor) -> None:
    model = adapter(seed=5)
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    load_weights(model, saved)
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == before  # an optimizer still holds them
    assert torch.equal(
        _logits(model, tokens, history_items=histories), _logits(adapter(), tokens, history_items=histories)
    )


# ---- what a model is ----


def test_accepts_history(adapter: Any, tiny_llama: Any) -> None:
    model = adapter(num_experts=2)
    assert accepts_history(model)
    assert not accepts_history(adapter(method="lora"))
    assert not accepts_history(tiny_llama())
    with pytest.raises(ValueError, match="no gate"):
        gate_weights(adapter(method="lora"), torch.zeros(1, 1, dtype=torch.long))


def test_ilora_needs_an_encoder(tiny_llama: Any) -> None:
    with pytest.raises(UserError, match="sequence encoder"):
        build_adapter(tiny_llama(), AdapterSection())


def test_unknown_target_modules(adapter: Any) -> None:
    with pytest.raises(UserError, match="no_such_module"):
        adapter(target_modules=["no_such_module"])


# ---- what is not written ----


def test_an_empty_tensor_is_not_saved(saved: Path, adapter: Any) -> None:
    # a sharded model's own state dict: ZeRO-3 leaves (0,) where the weights are
    before, model = files.sha256_of(saved), adapter()
    sharded = {name: torch.empty(0) if "lora_A" in name else value for name, value in model.state_dict().items()}
    with pytest.raises(UserError, match="empty"):
        save_adapter(model, saved, state_dict=sharded)
    with pytest.raises(UserError, match="empty"):
        save_adapter(model, saved, state_dict={})
    assert files.sha256_of(saved) == before


def test_gathered_weights_are_saved_in_place_of_the_models(saved: Path, adapter: Any, tmp_path: Path) -> None:
    save_adapter(adapter(seed=5), tmp_path / "gathered", state_dict=adapter().state_dict())
    for name in ("adapter_model.safetensors", "gate.safetensors", "sequence_encoder/encoder.safetensors"):
        assert (tmp_path / "gathered" / name).read_bytes() == (saved / name).read_bytes()


def test_nan_is_not_saved(saved: Path, adapter: Any) -> None:
    before, model = files.sha256_of(saved), adapter()
    torch.nn.init.constant_(model.base_model.gate["default"].output.bias, float("nan"))
    with pytest.raises(UserError, match="not finite"):
        save_adapter(model, saved)
    assert files.sha256_of(saved) == before


def test_a_failing_write_leaves_the_old_folder(saved: Path, adapter: Any) -> None:
    before = files.sha256_of(saved)
    with pytest.raises(FileNotFoundError):
        save_adapter(adapter(seed=5), saved, items=saved / "absent.parquet")
    assert files.sha256_of(saved) == before
    assert [p.name for p in saved.parent.iterdir()] == ["adapter"]


# ---- what is not loaded ----


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_hidden_layers": 3}, "num_hidden_layers 2 .given: 3"),
        ({"hidden_size": 64}, "hidden_size 32 .given: 64"),
        ({"vocab_size": 300}, "vocab_size 259 .given: 300"),
    ],
)
def test_another_base_model_is_refused(saved: Path, tiny_llama: Any, change: dict[str, int], words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_adapter(tiny_llama(**change), saved)


def test_a_base_model_of_the_same_sizes_with_other_weights_is_refused(saved: Path, tiny_llama: Any) -> None:
    other = tiny_llama(seed=1)
    other.name_or_path = "the-other"
    _edit(saved / "base_model.json", name_or_path="its-own")
    with pytest.raises(UserError, match=r"adapter for its-own .*, the base model given is the-other .*other weights"):
        load_adapter(other, saved)
    _edit(saved / "base_model.json", sampled_weights_sha256=None)  # saved where no fingerprint could be taken
    load_adapter(other, saved)


def test_the_fingerprint_is_of_the_weights_not_of_their_type(tiny_llama: Any, adapter: Any) -> None:
    base = tiny_llama().to(torch.bfloat16)
    expected = weights_sha256(base)
    assert expected == weights_sha256(tiny_llama()) == weights_sha256(base.to(torch.float32))
    assert expected == weights_sha256(
        adapter(method="lora", target_modules=["embed_tokens", "q_proj"]).get_base_model()
    )
    changed = tiny_llama()
    with torch.no_grad():
        changed.model.norm.weight[3] += 0.5
    assert weights_sha256(changed) != expected
    assert weights_sha256(tiny_llama(seed=1)) != expected


def test_the_fingerprint_sees_every_weight_matrix(tiny_llama: Any) -> None:
    expected = weights_sha256(tiny_llama())
    for name, _ in tiny_llama().named_parameters():
        changed = tiny_llama()
        with torch.no_grad():
            changed.get_parameter(name).mul_(1.5)  # as merging a LoRA into one kind of layer does
        assert weights_sha256(changed) != expected, name


def test_no_fingerprint_of_weights_that_are_not_here_or_not_exact(saved: Path, tiny_llama: Any) -> None:
    quantised = tiny_llama(seed=1)
    quantised.is_quantized = True
    for base_model in (tiny_llama().to("meta"), tiny_llama(seed=1).half(), quantised):
        assert weights_sha256(base_model) is None
    load_adapter(quantised, saved)  # sizes decide


def test_another_base_model_is_refused_by_shapes_alone(saved: Path, tiny_llama: Any) -> None:
    (saved / "base_model.json").unlink()
    with pytest.raises(UserError, match="another base model"):
        load_adapter(tiny_llama(num_hidden_layers=1), saved)
    with pytest.raises(UserError, match="another base model"):
        load_adapter(tiny_llama(hidden_size=64), saved)


@pytest.mark.parametrize(
    "name",
    ["adapter_model.safetensors", "gate.safetensors", "sequence_encoder/encoder.safetensors", "adapter_config.json",
     "sequence_encoder/encoder.json", "ilora.json"],
)  # fmt: skip
def test_truncated_and_missing_files(saved: Path, tiny_llama: Any, name: str) -> None:
    path = saved / name
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=path.name):
        load_adapter(tiny_llama(), saved)
    path.unlink()
    if name != "ilora.json":  # without it the folder is that of a plain LoRA
        with pytest.raises(UserError, match=path.name):
            load_adapter(tiny_llama(), saved)


def test_a_lost_ilora_json_is_not_taken_for_a_plain_lora(saved: Path, tiny_llama: Any) -> None:
    (saved / "ilora.json").unlink()
    with pytest.raises(UserError, match=r"ilora\.json"):
        load_adapter(tiny_llama(), saved)


def test_a_lost_encoder_is_said(saved: Path, tiny_llama: Any) -> None:
    shutil.rmtree(saved / "sequence_encoder")
    with pytest.raises(UserError, match="encoder"):
        load_adapter(tiny_llama(), saved)


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"num_experts": 3}, "r=8 does not split into num_experts=3"), ({"r": 16}, "r is 16"),
     ({"scaling": 1.0}, "scaling is 1"), ({"lora_alpha": 8}, "lora_alpha is 8"),
     ({"format_version": 2}, "format_version is 2"), ({"num_experts": None}, "num_experts"),
     ({"representation_size": 8}, "16 numbers a user"), ({"gate_type": "tanh"}, "'tanh' is unknown"),
     ({"gate_type": None}, "gate_type is None"), ({"gate_top_k": 2.5}, "gate_top_k is 2.5"),
     ({"gate_top_k": 9}, "gate_top_k=9"), ({"gate_per_layer": "yes"}, "gate_per_layer is 'yes'"),
     ({"gate_type": "sigmoid"}, "num_experts is 4, a sigmoid gate has one for each rank, 8"),
     ({"gate_per_layer": True}, r"gate.output.bias has shape \(4,\), the model needs \(8,\)")],
)  # fmt: skip
def test_ilora_json_that_does_not_fit(saved: Path, tiny_llama: Any, changes: dict[str, Any], words: str) -> None:
    _edit(saved / "ilora.json", **changes)
    with pytest.raises(UserError, match=words):
        load_adapter(tiny_llama(), saved)


def test_other_tensors_than_the_models(saved: Path, tiny_llama: Any) -> None:
    weights = load_file(saved / "adapter_model.safetensors")
    name = sorted(weights)[0]
    save_file({k: v for k, v in weights.items() if k != name}, saved / "adapter_model.safetensors")
    with pytest.raises(UserError, match="1 tensors of the model's adapter are missing"):
        load_adapter(tiny_llama(), saved)


def test_no_folder(tiny_llama: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load_adapter(tiny_llama(), tmp_path / "absent")


def test_another_vocabulary(saved: Path, adapter: Any, tmp_path: Path) -> None:
    check_vocabulary(saved, "v" * 64)
    with pytest.raises(UserError, match="wwww"):
        check_vocabulary(saved, "w" * 64)
    save_adapter(adapter(method="lora"), tmp_path / "plain")
    check_vocabulary(tmp_path / "plain", "w" * 64)  # a plain LoRA holds no item indices


def test_a_training_step_copies_no_weights_of_the_head(adapter: Any, tokens: torch.Tensor) -> None:
    """Torch expands them over the batch where the head reads a slice of the hidden states and gradients are on."""

    class Products(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.shapes: list[tuple[int, ...]] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten.bmm.default:
                self.shapes += [tuple(value.shape) for value in args]
            return func(*args, **(kwargs or {}))

    for method in ("ilora", "lora"):
        model = adapter(method=method).train()
        given = {"gate_weights": torch.full((3, 4), 1 / 4)} if method == "ilora" else {}
        with Products() as products:
            logits = model(input_ids=tokens, logits_to_keep=4, **given).logits
            logits.sum().backward()
        assert logits.shape == (3, 4, 259)
        assert not [shape for shape in products.shapes if 259 in shape]
