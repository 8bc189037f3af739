"""The method and a whole run on a GPU: devices, half precision, compiled kernels, CUDA's random states, quantisation.

    python3 -m pytest -q tests/test_gpu.py -m gpu

takes a minute or so on one GPU; without one everything here is skipped. What the method promises is tested on the CPU
(tests/model/test_ilora.py and its neighbours). Here it is asked once more, briefly, of the kernels that run elsewhere.
"""

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft.tuners.lora.layer import LoraLayer
from transformers import TrainerCallback

from recllm import stages
from recllm.errors import UserError
from recllm.infer.transformers_engine import TransformersEngine
from recllm.model.adapter import build_adapter, fit_gate_statistics, gate_weights, load_adapter, save_adapter
from recllm.model.base_model import load_base_model, prepare_for_training
from recllm.model.sequence_encoder import Gru4Rec, SASRec, encode_histories
from recllm.recipe import AdapterSection, ModelSection, load_recipe
from recllm.train import finetune
from recllm.train.trainer import without_cudnn_attention

ROOT = Path(__file__).resolve().parent.parent
DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device"),
]

NUM_ITEMS, USERS, LENGTH = 20, 3, 48
SIZES = {"hidden_size": 128, "intermediate_size": 256, "initializer_range": 0.1}  # heads of 32: all attention kernels
TOKENS = torch.randint(3, 259, (USERS, LENGTH), generator=torch.Generator().manual_seed(0))
MASK = (torch.arange(LENGTH) >= torch.tensor([[0], [9], [2]])).long()  # padded on the left
HISTORIES = torch.tensor([[1, 2, 3, 4, 5], [-1, -1, -1, 9, 17], [-1, -1, -1, -1, -1]])  # full, short, empty
CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # of fp32 logits, which are of order 1; TF32 would be a hundred times further away

GATES: dict[str, dict[str, Any]] = {
    "softmax": {},
    "top_k_per_layer": {"top_k": 2, "per_layer": True, "hidden_size": 5},
    "sigmoid": {"type": "sigmoid"},
}


@pytest.fixture(params=GATES.values(), ids=GATES.keys())
def gate(request: Any) -> dict[str, Any]:
    """Kinds of gates, as the recipe's gate section says them."""
    return request.param


@pytest.fixture(autouse=True)
def _fp32_is_fp32() -> Iterator[None]:
    """No TF32: its ten bits of mantissa would hide what is looked for."""
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = False
    yield
    for backend, allowed in zip(backends, before):
        backend.allow_tf32 = allowed


@pytest.fixture
def adapted(tiny_llama: Any) -> Callable[..., Any]:
    """adapted(trained=True, **section): a small Llama with an adapter, fp32, on the CPU; trained: noise as A, B, gate.

    As after training, the adapter's share of a layer is a fraction of the base model's and no expert has all of a user.
    With more noise rounding would be magnified from layer to layer, and differently under every gate.
    """

    def build(trained: bool = True, **section: Any) -> Any:
        torch.manual_seed(0)
        encoder = SASRec(NUM_ITEMS, 16, max_items=8).eval()
        section = {"r": 8, "lora_alpha": 16, "num_experts": 4} | section
        model = build_adapter(tiny_llama(**SIZES), AdapterSection(**section), encoder).eval()
        fit_gate_statistics(model, encoder(torch.arange(NUM_ITEMS)[:, None]).detach())
        if trained:
            _randomise(model)
        return model

    return build


@torch.no_grad()
def _randomise(model: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
        elif name.startswith(("base_model.gate.", "base_model.soft_token.")):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)


@pytest.fixture
def plain(tiny_llama: Any) -> Callable[..., Any]:
    """plain(model, weights=None, gate=None): a stock LoRA with the model's A and B; one user's gate folded into B."""

    def build(model: Any, weights: torch.Tensor | None = None, gate: Any = None) -> Any:
        twin = build_adapter(tiny_llama(**SIZES), AdapterSection(method="lora", r=8, lora_alpha=16)).eval()
        with torch.no_grad():
            for (name, ours), (_, theirs) in zip(_layers(model), _layers(twin), strict=True):
                theirs.lora_A["default"].weight.copy_(ours.lora_A["default"].weight)
                theirs.lora_B["default"].weight.copy_(ours.lora_B["default"].weight)
                if weights is not None:
                    theirs.lora_B["default"].weight *= _factor(weights.cpu(), gate, name)
        return twin

    return build


def _layers(model: Any) -> list[tuple[str, LoraLayer]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]


def _factor(weights: torch.Tensor, gate: dict[str, Any], name: str) -> torch.Tensor:
    """What one user's weights multiply A x by in the layer of that name, written out: (8,)."""
    weights = weights[int(name.split("layers.")[1].split(".")[0])] if gate.get("per_layer") else weights
    return 2 * weights if gate.get("type") == "sigmoid" else (4 * weights).repeat_interleave(2)


def _uniform(model: Any) -> torch.Tensor:
    own = model.base_model.gate["default"]
    return torch.full((USERS, *own.shape), own.uniform)


@torch.no_grad()
def _logits(model: Any, **given: Any) -> torch.Tensor:
    """(USERS, LENGTH, V) fp32 on the CPU, zero at padding."""
    device = next(model.parameters()).device
    inputs = {name: value.to(device) for name, value in {"input_ids": TOKENS, "attention_mask": MASK, **given}.items()}
    return torch.where(MASK[..., None].bool(), model(**inputs).logits.float().cpu(), 0.0)


def _error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative, in the Frobenius norm."""
    return float((found.double() - exact.double()).norm() / exact.double().norm())


# ---- fp32: the numbers of the CPU ----


@pytest.mark.parametrize("method", ["ilora", "soft_token"])
def test_logits_are_those_of_the_cpu(adapted: Any, method: str) -> None:
    model = adapted(method=method)
    expected = _logits(model, history_items=HISTORIES)
    torch.testing.assert_close(_logits(model.to(DEVICE), history_items=HISTORIES), expected, **CLOSE)


def test_one_gate_folded_into_b_is_that_users_output_in_a_batch(adapted: Any, plain: Any, gate: dict[str, Any]) -> None:
    model = adapted(gate=gate)
    on_the_cpu = _logits(model, history_items=HISTORIES)
    model.to(DEVICE)
    weights, together = gate_weights(model, HISTORIES).detach(), _logits(model, history_items=HISTORIES)
    torch.testing.assert_close(together, on_the_cpu, **CLOSE)
    for user in range(USERS):
        merged = plain(model, weights[user], gate).to(DEVICE).merge_and_unload()  # no adapter code is left in it
        torch.testing.assert_close(_logits(merged)[user], together[user], **CLOSE)
    other = _logits(model, history_items=HISTORIES.flip(0))
    assert (other - together)[0].abs().max() > 0.1  # the gate matters far more than the tolerance


def test_what_the_gate_reads_may_lie_on_the_cpu(adapted: Any, gate: dict[str, Any]) -> None:
    model = adapted(gate=gate).to(DEVICE)
    expected = _logits(model, history_items=HISTORIES)
    inputs = {"input_ids": TOKENS.to(DEVICE), "attention_mask": MASK.to(DEVICE)}
    given = {
        "history_items": HISTORIES,
        "representation": model.base_model.represent(HISTORIES).detach().cpu(),
        "gate_weights": gate_weights(model, HISTORIES).detach().cpu(),
    }
    for name, value in given.items():
        with torch.no_grad():
            found = model(**inputs, **{name: value}).logits.cpu()
        assert torch.equal(torch.where(MASK[..., None].bool(), found, 0.0), expected), name


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_saved_adapter_comes_back_onto_the_gpu(
    adapted: Any, tiny_llama: Any, tmp_path: Path, low_cpu_mem_usage: bool
) -> None:
    model = adapted().to(DEVICE)
    save_adapter(model, tmp_path / "adapter")
    base_model = tiny_llama(**SIZES).to(DEVICE)
    loaded = load_adapter(base_model, tmp_path / "adapter", low_cpu_mem_usage=low_cpu_mem_usage)
    assert {parameter.device.type for parameter in loaded.parameters()} == {DEVICE}
    assert torch.equal(_logits(loaded, history_items=HISTORIES), _logits(model, history_items=HISTORIES))


@pytest.mark.parametrize(
    "encoder",
    [
        lambda: SASRec(NUM_ITEMS, 16, max_items=80, dropout=0.2),
        lambda: SASRec(NUM_ITEMS, 16, max_items=80, dropout=0.2, window=8),
        lambda: Gru4Rec(NUM_ITEMS, 16, max_items=80, dropout=0.2),
    ],
    ids=["sasrec", "windowed", "gru4rec"],
)
def test_histories_are_encoded_as_on_the_cpu(encoder: Any) -> None:
    torch.manual_seed(0)
    built = encoder()
    drawn = np.random.default_rng(0)
    histories = [drawn.integers(NUM_ITEMS, size=length) for length in (70, 33, 1, 0)]
    expected = encode_histories(built, histories)
    found = encode_histories(built, histories, device=DEVICE)
    torch.testing.assert_close(found, expected, **CLOSE)
    assert (built.device.type, built.training) == ("cpu", True)  # as it was


def test_a_broken_representation_stays_in_its_row_while_training(adapted: Any) -> None:
    """Training on a GPU does not look for NaN, which would make it wait; elsewhere it is an error."""
    model = adapted().to(DEVICE)
    given = {"representation": model.base_model.represent(HISTORIES).detach().clone()}
    expected = _logits(model, **given)
    given["representation"][1, 3] = float("nan")
    with pytest.raises(UserError, match="representation: row 1 of 3"):
        _logits(model, **given)
    found = _logits(model.train(), **given)
    assert torch.equal(found[[0, 2]], expected[[0, 2]])
    assert found[1, -1].isnan().all()


# ---- half precision ----


@torch.no_grad()
def _half(model: Any, precision: str) -> Any:
    """fp32: as it is. cast: all bf16, as engines may do. base, autocast: the adapter stays fp32, as in recllm."""
    if precision == "cast":
        return model.to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if precision != "fp32" and name.startswith("base_model.model.") and "lora_" not in name:
            parameter.data = parameter.data.to(torch.bfloat16)
    return model


def _autocast(precision: str) -> Any:
    return torch.autocast(DEVICE, torch.bfloat16) if precision == "autocast" else contextlib.nullcontext()


@pytest.mark.parametrize("precision", ["fp32", "cast", "base", "autocast"])
def test_uniform_gates_are_plain_lora_bit_for_bit(
    adapted: Any, plain: Any, gate: dict[str, Any], precision: str
) -> None:
    model = adapted(gate=gate)
    twin = _half(plain(model).to(DEVICE), precision)
    model = _half(model.to(DEVICE), precision)
    own = model.base_model.gate["default"]
    assert (own.mean.dtype, own.mean.device.type) == (torch.float32, DEVICE)
    with _autocast(precision):
        expected = _logits(twin)
        assert torch.equal(_logits(model, gate_weights=_uniform(model)), expected)
        gated = _logits(model, history_items=HISTORIES)
    assert torch.equal(gated[2], expected[2])  # an empty history
    assert not torch.equal(gated[0], expected[0])


@pytest.mark.parametrize("precision", ["base", "autocast"])
def test_bf16_costs_a_gated_model_no_more_than_a_plain_lora(
    adapted: Any, plain: Any, gate: dict[str, Any], precision: str
) -> None:
    """The bound measures itself: plain LoRAs in bf16 against their own fp32, on the same kernels.

    There are two: the LoRA under uniform gates, and that with the user's gate folded into B, which is the same function
    as the gated model and so magnifies rounding as much.
    """
    model = adapted(gate=gate).to(DEVICE)
    weights = gate_weights(model, HISTORIES).detach()
    folded = [plain(model, weights[user], gate).to(DEVICE) for user in range(USERS)]
    uniform = plain(model).to(DEVICE)

    def outputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        gated = _logits(model, history_items=HISTORIES)
        return gated, torch.stack([_logits(twin)[user] for user, twin in enumerate(folded)]), _logits(uniform)

    exact = outputs()
    for module in (model, uniform, *folded):
        _half(module, precision)
    with _autocast(precision):
        gated, own, same = (_error(found, fp32) for found, fp32 in zip(outputs(), exact))
        swapped = _logits(model, history_items=HISTORIES.flip(0))
    assert own > 1e-4  # it is bf16 indeed
    assert gated < 1.5 * own
    assert gated < 1.5 * same
    assert _error(swapped, exact[0]) > 5 * gated  # another user's gate is no rounding


# ---- gradients ----


def _gradients(model: Any, precision: str = "fp32") -> dict[str, torch.Tensor]:
    model.train().zero_grad()
    torch.manual_seed(7)  # of dropout
    tokens, histories = TOKENS.to(DEVICE), HISTORIES.to(DEVICE)
    with _autocast(precision):
        # Two forwards before one backward: a recomputation must see the gates and the dropout of its own forward
        first = model(input_ids=tokens, labels=tokens, history_items=histories).loss
        second = model(input_ids=tokens.flip(0), labels=tokens.flip(0), history_items=histories.roll(1, 0)).loss
    (first + 2 * second).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("precision", ["fp32", "autocast"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradients_with_checkpointing_are_those_without(adapted: Any, precision: str, dropout: float) -> None:
    model = _half(adapted(lora_dropout=dropout).to(DEVICE), precision)
    plain = _gradients(model, precision)
    model.gradient_checkpointing_enable()
    recomputed = []
    _layers(model)[0][1].register_forward_hook(lambda *_: recomputed.append(1))
    checkpointed = _gradients(model, precision)
    assert len(recomputed) == 4  # two forwards, each run once more
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        assert gradient.norm() > 0, name
        assert _error(checkpointed[name], gradient) < (1e-5 if precision == "fp32" else 1e-2), name


def test_gradients_are_those_of_the_cpu(adapted: Any, gate: dict[str, Any]) -> None:
    model = adapted(gate=gate).train()
    model(input_ids=TOKENS, labels=TOKENS, history_items=HISTORIES).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.to(DEVICE).zero_grad()
    tokens = TOKENS.to(DEVICE)
    model(input_ids=tokens, labels=tokens, history_items=HISTORIES.to(DEVICE)).loss.backward()
    found = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert _error(found[name], gradient) < 1e-4, name


def test_under_autocast_every_trained_tensor_has_an_fp32_gradient_from_the_second_step_on(adapted: Any) -> None:
    model = _half(adapted(trained=False).to(DEVICE), "autocast")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    for _ in range(2):  # B starts at zero, so that the first step reaches B alone
        found = _gradients(model, "autocast")
        optimizer.step()
    assert found.keys() == trained.keys()
    assert any("gate" in name for name in found)
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32, name
        assert torch.isfinite(gradient).all(), name
        assert gradient.abs().max() > 0, name


# ---- generating and scoring ----


@pytest.mark.parametrize("options", [{}, {"num_beams": 3, "num_return_sequences": 2}], ids=["greedy", "beams"])
def test_each_prompt_is_continued_under_its_own_users_gate(
    adapted: Any, options: dict[str, int], gate: dict[str, Any]
) -> None:
    model = adapted(gate=gate).to(DEVICE)
    prompts = TOKENS[:1].expand(USERS, -1).to(DEVICE)  # the same for all: they differ by their gates alone
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None} | options
    histories = HISTORIES.to(DEVICE)
    together = model.generate(input_ids=prompts, history_items=histories, **options).reshape(USERS, -1)
    for user in range(USERS):
        alone = model.generate(input_ids=prompts[:1], history_items=histories[user : user + 1], **options)
        assert torch.equal(together[user], alone.flatten()), f"user {user}"
    assert len({tuple(row) for row in together.tolist()}) > 1


PROMPTS = [
    [{"role": "user", "content": "hello"}],
    [{"role": "user", "content": "list"}, {"role": "assistant", "content": "Heat\nSpeed\n"}],
    [{"role": "system", "content": "be brief"}, {"role": "user", "content": "a prompt that is much longer"}],
]
ANSWERS = [["Heat", "Heat 2", "X"], ["Heat\n", "Heat 2\n", "Up\n"], ["H", "He", "Heap"]]
READ = [np.array([1, 2, 3]), np.array([9, 17]), np.array([], dtype=np.int32)]


def test_scores_from_shared_prompts_are_those_of_separate_ones(adapted: Any, tiny_tokenizer: Any) -> None:
    model = adapted()
    on_the_cpu = TransformersEngine(model, tiny_tokenizer, 3).score(PROMPTS, ANSWERS, READ)
    model.to(DEVICE)
    shared = TransformersEngine(model, tiny_tokenizer, 3).score(PROMPTS, ANSWERS, READ)
    separate = TransformersEngine(model, tiny_tokenizer, 4, share_prompts=False).score(PROMPTS, ANSWERS, READ)
    assert shared == pytest.approx(separate, abs=1e-4)
    assert shared == pytest.approx(on_the_cpu, abs=1e-4)
    swapped = TransformersEngine(model, tiny_tokenizer, 3).score(PROMPTS, ANSWERS, READ[::-1])
    assert np.abs(swapped - shared)[0].max() > 0.05  # the history counts far more than the tolerance
    _half(model, "base")
    shared_bf16 = TransformersEngine(model, tiny_tokenizer, 3).score(PROMPTS, ANSWERS, READ)
    separate_bf16 = TransformersEngine(model, tiny_tokenizer, 4, share_prompts=False).score(PROMPTS, ANSWERS, READ)
    rounding = np.abs(separate_bf16 - separate).max()
    assert np.abs(shared_bf16 - separate).max() < 3 * rounding


def test_texts_of_a_padded_batch_are_those_of_single_prompts(adapted: Any, tiny_tokenizer: Any) -> None:
    model = adapted().to(DEVICE)
    together = TransformersEngine(model, tiny_tokenizer, 3).generate(PROMPTS, READ, max_new_tokens=12)
    engine = TransformersEngine(model, tiny_tokenizer, 1)
    assert together == [engine.generate([p], [h], max_new_tokens=12)[0] for p, h in zip(PROMPTS, READ)]


# ---- training runs ----


class Interrupted(Exception):
    """What stops a run in the middle."""


class Run:
    """Trainings of one recipe over one converted log and one encoder."""

    def __init__(self, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.recipe, self.devices = recipe, []
        self.stop_at: int | None = None
        for stage, options in (("convert", {"workers": 1}), ("encoder", {})):
            stages.run_stage(load_recipe(recipe), stage, **options)
        make = finetune.make_trainer

        def watched(*args: Any, **kwargs: Any) -> Any:
            trainer, run = make(*args, **kwargs), self

            class Stop(TrainerCallback):
                def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                    run.devices.append(next(trainer.model.parameters()).device.type)
                    if state.global_step == run.stop_at:
                        raise Interrupted

            trainer.add_callback(Stop())
            return trainer

        monkeypatch.setattr(finetune, "make_trainer", watched)

    def train(self, name: str, *overrides: str) -> list[float]:
        """The losses of the run."""
        recipe = load_recipe(self.recipe, overrides)
        self.devices.clear()
        folder = finetune.train(
            recipe, recipe.output / "dataset", recipe.output / "encoder", recipe.output / name / "adapter"
        )
        return _losses(folder)


def _losses(adapter: Path) -> list[float]:
    return [entry["loss"] for entry in json.loads((adapter / "training_log.json").read_text()) if "loss" in entry]


@pytest.fixture
def run(tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    pytest.importorskip("polars", reason="polars is not installed, convert reads logs with it")
    return Run(tiny_recipe, monkeypatch)


LEARNING = ("train.max_steps=8", "train.logging_steps=1", "train.learning_rate=0.01", "adapter.gate.learning_rate=0.05")


def test_losses_of_a_run_are_those_of_the_cpu(run: Run) -> None:
    overrides = (*LEARNING, "adapter.gate.balance=0.01")
    on_the_gpu = run.train("gpu", *overrides)
    assert set(run.devices) == {DEVICE}
    on_the_cpu = run.train("cpu", *overrides, "train.use_cpu=true")
    assert set(run.devices) == {"cpu"}
    assert len(on_the_gpu) == 8
    assert on_the_gpu[-1] < on_the_gpu[0] - 0.1
    assert on_the_gpu == pytest.approx(on_the_cpu, rel=1e-3)


def test_an_interrupted_run_goes_on_with_the_dropout_of_an_uninterrupted_one(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = (*LEARNING, "train.save_steps=4", "adapter.lora_dropout=0.5")  # masks are CUDA's random numbers
    whole = run.train("whole", *overrides)
    run.stop_at = 6
    with pytest.raises(Interrupted):
        run.train("interrupted", *overrides)
    run.stop_at = None
    assert run.train("interrupted", *overrides) == pytest.approx(whole, rel=1e-4)
    assert len(run.devices) == 4
    assert "checkpoint-4" in capsys.readouterr().err


needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed (extra quant)"
)


@pytest.mark.parametrize(
    "quantization",
    [None, pytest.param("4bit", marks=needs_bitsandbytes), pytest.param("8bit", marks=needs_bitsandbytes)],
)
def test_a_bf16_run_trains_saves_and_evaluates(run: Run, tiny_recipe: Path, quantization: str | None) -> None:
    overrides = [*LEARNING, "train.bf16=true", "train.gradient_checkpointing=true", "model.dtype=bfloat16"]
    overrides += ["evaluate.max_examples=8", "protocol.decoding.max_new_tokens=4"]
    overrides += [f"model.quantization={quantization}"] if quantization else []
    recipe = load_recipe(tiny_recipe, overrides)
    stages.run_stage(recipe, "train")  # reloads what it saved and compares
    assert set(run.devices) == {DEVICE}
    losses = _losses(recipe.output / "adapter")
    assert losses[-1] < losses[0] - 0.1
    stages.run_stage(recipe, "evaluate")
    report = json.loads((recipe.output / "report" / "metrics.json").read_text())
    nats = {system["name"]: system["metrics"]["nats"] for system in report["systems"] if "nats" in system["metrics"]}
    assert nats["ilora"]["value"] < nats["base_model"]["value"] - 1


@needs_bitsandbytes
@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_a_quantised_base_passes_gradients_to_the_gate_and_comes_back(
    tiny_llama: Any, tiny_tokenizer: Any, tmp_path: Path, bits: str
) -> None:
    tiny_llama(**SIZES).save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    section = ModelSection(name_or_path=str(tmp_path / "model"), dtype="float32", quantization=bits)
    torch.manual_seed(0)
    encoder = SASRec(NUM_ITEMS, 16, max_items=8).eval()
    model = build_adapter(prepare_for_training(load_base_model(section)[0]), AdapterSection(), encoder)
    assert {parameter.device.type for parameter in model.parameters()} == {DEVICE}
    fit_gate_statistics(model, encoder(torch.arange(NUM_ITEMS, device=encoder.device)[:, None]).detach())
    _randomise(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    gradients = _gradients(model)
    assert any("gate" in name for name in gradients)
    for name, gradient in gradients.items():
        assert torch.isfinite(gradient).all(), name
        assert gradient.abs().max() > 0, name
    optimizer.step()
    save_adapter(model.eval(), tmp_path / "adapter")
    expected = _logits(model, history_items=HISTORIES)
    loaded = load_adapter(prepare_for_training(load_base_model(section)[0]), tmp_path / "adapter")
    found = _logits(loaded, history_items=HISTORIES)
    assert _error(found, expected) < 1e-3
    assert _error(_logits(loaded, history_items=HISTORIES.flip(0)), expected) > 0.02


# ---- last, for they take longest ----


def test_compiled_in_one_graph_it_gives_the_same(adapted: Any) -> None:
    model = adapted(target_modules=["q_proj", "down_proj"]).to(DEVICE)  # few: compiling takes its time
    torch._dynamo.reset()
    try:
        compiled = torch.compile(model, fullgraph=True)  # a graph break is an error
        for histories in (HISTORIES, HISTORIES.roll(1, 0)):  # gates are inputs of the graph, not constants in it
            expected = _logits(model, history_items=histories)
            torch.testing.assert_close(_logits(compiled, history_items=histories), expected, **CLOSE)
    finally:
        torch._dynamo.reset()


def test_fsdp2_on_one_gpu_trains_as_one_process_does(run: Run, tiny_recipe: Path) -> None:
    """The command that accelerate_configs/fsdp2.yaml gives, with a single process: its engine is FSDP2 all the same."""
    alone = run.train("alone", *LEARNING)
    launch = ["--config_file", str(ROOT / "accelerate_configs" / "fsdp2.yaml"), "--num_processes", "1"]
    launch += ["--main_process_port", "0", str(ROOT / "scripts" / "train.py"), str(tiny_recipe), *LEARNING]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "NCCL_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *launch, "train.save_total_limit=1"],
        env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    output = load_recipe(tiny_recipe).output
    (marker,) = output.glob("checkpoints/checkpoint-*/checkpoint.json")
    assert json.loads(marker.read_text())["engine"] == "FSDP2"
    assert _losses(output / "adapter") == pytest.approx(alone, rel=1e-3)


def test_attention_in_training_has_finite_gradients_at_every_length() -> None:
    """cuDNN's kernel has not at 64, 192, … tokens with a mask and scores far below zero (trainer.py says more)."""
    for length in (63, 64, 65, 192):
        q, k, v = (torch.randn(1, 1, length, 64, device=DEVICE, dtype=torch.bfloat16) * 0.1 for _ in range(3))
        q[..., 0], k[..., 0] = 1.0, -960.0  # every score about -120
        q.requires_grad_()
        mask = torch.ones(length, length, dtype=torch.bool, device=DEVICE).tril()[None, None]
        with without_cudnn_attention():
            torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).sum().backward()
        assert torch.isfinite(q.grad).all(), length
