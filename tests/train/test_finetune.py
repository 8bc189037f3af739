import json
import os
import platform
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file, save_file

from recllm import files
from recllm.convert.pipeline import convert
from recllm.data.dataset import Dataset
from recllm.errors import UserError
from recllm.model.adapter import load_adapter
from recllm.model.base_model import load_base_model
from recllm.model.sequence_encoder import load_encoder
from recllm.recipe import LossSection, Recipe
from recllm.train import finetune, representations, streaming
from recllm.train.collator import COLUMNS, WEIGHED, TokenizedExamples, tokenize
from recllm.train.encoder import fit_encoder
from recllm.train.finetune import train, training_arguments
from recllm.train.representations import representation_table, statistics_examples
from recllm.train.trainer import AdapterTrainer

from .conftest import recipe_of
from .on_cpu import count_forwards

ROOT = Path(__file__).resolve().parents[2]
TENSORS = ("adapter_model.safetensors", "gate.safetensors")


@pytest.fixture(scope="module")
def encoder_folder(dataset: Dataset, log_folder: Path) -> Path:
    folder = log_folder / "run" / "encoder"
    recipe = recipe_of(log_folder)
    fit_encoder(dataset, recipe.encoder, recipe.history.max_items, recipe.seed, folder)
    return folder


@pytest.fixture
def make_recipe(log_folder: Path, tiny_model_folder: Path):
    def make(**changes: Any) -> Recipe:
        train_section = recipe_of(log_folder).train | changes.pop("train", {})
        model = {"name_or_path": str(tiny_model_folder), "dtype": changes.pop("dtype", "float32")}
        return recipe_of(log_folder, model=model, train=train_section, **changes)

    return make


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {f"{name}:{key}": t for name in TENSORS for key, t in load_file(folder / name).items()}


def assert_same_weights(first: Path, second: Path) -> None:
    one, two = tensors(first), tensors(second)
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], rtol=0, atol=1e-6)


# ---- a whole run ----


def test_a_run_writes_an_adapter_that_learned_and_that_stock_peft_loads(
    dataset, encoder_folder, make_recipe, tmp_path, tiny_llama
):
    recipe = make_recipe(train={"max_steps": 30, "save_steps": 10})
    output = train(recipe, dataset.folder, encoder_folder, tmp_path / "adapter")
    expected = {"items.parquet", "manifest.json", "README.md", "training_log.json", "ilora.json", "sequence_encoder"}
    assert expected <= {path.name for path in output.iterdir()}
    losses = [entry["loss"] for entry in json.loads((output / "training_log.json").read_text()) if "loss" in entry]
    assert losses[-1] < losses[0] - 0.5
    assert not (tmp_path / "checkpoints").exists()
    gate = load_file(output / "gate.safetensors")
    assert gate["output.weight"].abs().max() > 0  # zero at the start: it was trained
    assert gate["mean"].abs().max() > 0  # zero at the start: statistics of the training examples
    assert torch.equal(gate["deviation"] > 0, torch.ones(16, dtype=torch.bool))
    stock = PeftModel.from_pretrained(tiny_llama(), output)
    assert stock.peft_config["default"].peft_type.value == "LORA"


def test_gate_statistics_are_those_of_the_training_histories(dataset, encoder_folder, make_recipe, tmp_path):
    output = train(make_recipe(train={"max_steps": 1}), dataset.folder, encoder_folder, tmp_path / "adapter")
    encoder, _ = load_encoder(encoder_folder)
    states = []
    for example in dataset.examples("train").to_pylist():
        history = dataset.history(example["user_index"], example["gate_end"], 12)
        if len(history):  # an empty history has a uniform gate whatever the statistics are
            states.append(encoder(torch.tensor(history).long()[None]).detach())
    rows = torch.cat(states)
    assert 0 < len(rows) < dataset.examples("train").num_rows
    gate = load_file(output / "gate.safetensors")
    torch.testing.assert_close(gate["mean"], rows.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gate["deviation"], rows.std(0, correction=0), rtol=1e-3, atol=1e-5)


def test_plain_lora_needs_no_encoder(dataset, make_recipe, tmp_path):
    recipe = make_recipe(adapter={"method": "lora", "r": 4})
    output = train(recipe, dataset.folder, tmp_path / "no-encoder", tmp_path / "adapter")
    assert not (output / "gate.safetensors").exists()
    loaded = load_adapter(load_base_model(recipe.model)[0], output)
    assert max(float(p.abs().max()) for name, p in loaded.named_parameters() if "lora_B" in name) > 0


def test_evaluation_passes_through_and_tensorboard_is_the_default(dataset, encoder_folder, make_recipe, tmp_path):
    recipe = make_recipe(train={"eval_strategy": "steps", "eval_steps": 3})
    del recipe.train["report_to"]
    output = train(recipe, dataset.folder, encoder_folder, tmp_path / "adapter")
    log = json.loads((output / "training_log.json").read_text())
    assert [entry["step"] for entry in log if "eval_loss" in entry] == [3, 6]
    assert list((tmp_path / "logs").glob("events.out.tfevents.*"))


@pytest.mark.parametrize(
    ("dtype", "own", "expected"),
    [
        ("bfloat16", {}, torch.bfloat16),
        ("float32", {}, torch.float32),
        ("bfloat16", {"bf16": False}, torch.float32),
        ("bfloat16", {"bf16": True, "use_cpu": True}, torch.bfloat16),
    ],
)
def test_the_adapter_computes_in_the_base_models_precision(
    dataset, encoder_folder, make_recipe, tmp_path, monkeypatch, dtype, own, expected
):
    seen, forward = set(), torch.nn.Linear.forward

    def watched(self, x):
        y = forward(self, x)
        if self.out_features == 4 and self.training and torch.is_grad_enabled():  # lora_A: r = 4
            seen.add((x.dtype, y.dtype, self.weight.dtype))
        return y

    monkeypatch.setattr(torch.nn.Linear, "forward", watched)
    recipe = make_recipe(train={"max_steps": 2} | own, dtype=dtype)
    assert recipe.adapter.r == 4
    train(recipe, dataset.folder, encoder_folder, tmp_path / "adapter")
    assert seen == {(expected, expected, torch.float32)}


def test_training_keeps_off_cudnn_attention_and_leaves_the_setting_as_it_was(
    dataset, encoder_folder, make_recipe, tmp_path, monkeypatch
):
    """Its backward pass gives NaN for some lengths on Hopper GPUs; the setting exists without a GPU too."""
    seen, forward = set(), AdapterTrainer.compute_loss

    def watched(self, *args, **kwargs):
        seen.add(torch.backends.cuda.cudnn_sdp_enabled())
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(AdapterTrainer, "compute_loss", watched)
    assert torch.backends.cuda.cudnn_sdp_enabled()
    train(make_recipe(train={"max_steps": 2}), dataset.folder, encoder_folder, tmp_path / "adapter")
    assert seen == {False}
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_a_bf16_base_model_learns_and_its_adapter_comes_back(dataset, encoder_folder, make_recipe, tmp_path):
    recipe = make_recipe(train={"max_steps": 30, "bf16": True, "use_cpu": True}, dtype="bfloat16")
    output = train(recipe, dataset.folder, encoder_folder, tmp_path / "adapter")
    losses = [entry["loss"] for entry in json.loads((output / "training_log.json").read_text()) if "loss" in entry]
    assert losses[-1] < losses[0] - 0.5
    assert {value.dtype for value in tensors(output).values()} == {torch.float32}
    base_model, _ = load_base_model(recipe.model)
    assert next(base_model.parameters()).dtype == torch.bfloat16
    loaded = load_adapter(base_model, output)
    own = {name: value for name, value in loaded.state_dict().items() if "lora_B" in name}
    saved = load_file(output / "adapter_model.safetensors")
    assert own
    assert all(
        torch.equal(own[name.replace(".weight", ".default.weight")], saved[name]) for name in saved if "lora_B" in name
    )


def test_gradient_checkpointing_gives_the_same_weights(dataset, encoder_folder, make_recipe, tmp_path, monkeypatch):
    counts, make = [], finetune.make_trainer

    def counted(*args, **kwargs):
        trainer = make(*args, **kwargs)
        counts.append(count_forwards(trainer.model))
        return trainer

    monkeypatch.setattr(finetune, "make_trainer", counted)
    train(make_recipe(), dataset.folder, encoder_folder, tmp_path / "plain" / "adapter")
    recipe = make_recipe(train={"gradient_checkpointing": True})
    train(recipe, dataset.folder, encoder_folder, tmp_path / "checkpointed" / "adapter")
    plain, checkpointed = counts
    assert plain == {"embedding": 6, "layer": 6}  # max_steps
    assert checkpointed == {"embedding": 6, "layer": 2 * 6}  # each layer once more in each backward pass
    assert_same_weights(tmp_path / "plain" / "adapter", tmp_path / "checkpointed" / "adapter")


def test_an_adapter_that_reloads_differently_is_not_moved_into_place(
    dataset, encoder_folder, make_recipe, tmp_path, monkeypatch
):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "old").touch()

    def damaged(model, folder, **kwargs):
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name.endswith("lora_B.default.weight"):
                    p.add_(0.01)
        save(model, folder, **kwargs)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name.endswith("lora_B.default.weight"):
                    p.sub_(0.01)

    save = finetune.save_adapter
    monkeypatch.setattr(finetune, "save_adapter", damaged)
    with pytest.raises(UserError, match="other logits than the trained one"):
        train(make_recipe(train={"max_steps": 1}), dataset.folder, encoder_folder, tmp_path / "adapter")
    assert [path.name for path in (tmp_path / "adapter").iterdir()] == ["old"]


def damage(folder: Path, name: str) -> None:
    weights = load_file(folder / name)
    save_file({key: value + 0.05 * torch.randn_like(value) for key, value in weights.items()}, folder / name)


@pytest.mark.parametrize(
    "name", ["gate.safetensors", "sequence_encoder/encoder.safetensors", "adapter_model.safetensors"]
)
def test_every_damaged_file_fails_the_check(dataset, encoder_folder, make_recipe, tmp_path, monkeypatch, name):
    def damaged(model, folder, **kwargs):
        save(model, folder, **kwargs)
        damage(folder, name)

    save = finetune.save_adapter
    monkeypatch.setattr(finetune, "save_adapter", damaged)
    with pytest.raises(UserError, match="other logits than the trained one"):
        train(make_recipe(), dataset.folder, encoder_folder, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_gate_statistics_of_many_examples_are_those_of_a_seeded_sample(monkeypatch):
    ends = np.array([0, 3, 4, 5, 0, 2])
    examples = TokenizedExamples(np.empty(0, np.int32), np.zeros(6, int), np.zeros(6, int), np.arange(6), ends)

    def chosen(seed: int) -> list[int]:
        return statistics_examples(examples, seed).tolist()

    assert chosen(0) == [1, 2, 3, 5]  # those with a history
    monkeypatch.setattr(representations, "STATISTICS_HISTORIES", 2)
    assert len(chosen(0)) == 2
    assert chosen(0) == chosen(0)
    assert any(chosen(0) != chosen(seed) for seed in range(1, 6))


# ---- what the gate reads ----


def read_by_the_model(monkeypatch) -> list[dict[str, Any]]:
    """Arguments of the model's forwards, one a micro-batch of training."""
    found, compute = [], finetune.AdapterTrainer.compute_loss

    def watched(self, model, inputs, *args, **kwargs):
        found.append(dict(inputs))
        return compute(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(finetune.AdapterTrainer, "compute_loss", watched)
    return found


def test_a_frozen_encoder_runs_once_before_training(dataset, encoder_folder, make_recipe, tmp_path, monkeypatch):
    read = read_by_the_model(monkeypatch)
    train(make_recipe(), dataset.folder, encoder_folder, tmp_path / "table" / "adapter")
    encoder, _ = load_encoder(encoder_folder)
    assert read
    assert all(batch["representation"].shape == (4, 16) and "history_items" not in batch for batch in read)

    def nothing(recipe, model, *args):
        model.base_model.set_encoder(encoder, "default")

    monkeypatch.setattr(finetune, "give_gate_inputs", nothing)
    read.clear()
    train(make_recipe(), dataset.folder, encoder_folder, tmp_path / "histories" / "adapter")
    assert all("history_items" in batch for batch in read)
    assert_same_weights(tmp_path / "table" / "adapter", tmp_path / "histories" / "adapter")


def test_a_large_table_is_a_file_that_nothing_is_left_of(
    dataset, encoder_folder, tmp_path, tiny_tokenizer, monkeypatch
):
    encoder, _ = load_encoder(encoder_folder)
    examples = tokenize(dataset.example_batches("train", COLUMNS), tiny_tokenizer, 512)
    arguments = (encoder, dataset, examples, 12, tmp_path / "run", torch.device("cpu"))
    small = representation_table(*arguments)
    assert not isinstance(small, np.memmap)
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(representations, "IN_MEMORY", 0)
    monkeypatch.setattr(representations, "AT_ONCE", 7)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / f".representations-{platform.node()}-1.npy").touch()  # of a run that was killed
    mapped = representation_table(*arguments)
    assert isinstance(mapped, np.memmap)
    assert list((tmp_path / "run").iterdir()) == []
    np.testing.assert_allclose(mapped, small, atol=1e-6)
    for number in (0, 5, len(examples) - 1):
        history = dataset.history(int(examples.user_indices[number]), int(examples.gate_ends[number]), 12)
        alone = encoder(torch.tensor(history).long()[None])[0].detach().numpy() if len(history) else np.zeros(16)
        np.testing.assert_allclose(small[number], alone, atol=1e-5)


def test_the_processes_of_a_machine_share_the_work(dataset, encoder_folder, tmp_path, tiny_tokenizer, monkeypatch):
    """Three processes on two machines that share the folder; each as a thread here."""
    encoder, _ = load_encoder(encoder_folder)
    examples = tokenize(dataset.example_batches("train", COLUMNS), tiny_tokenizer, 512)
    whole = representation_table(encoder, dataset, examples, 12, tmp_path, torch.device("cpu"))
    local, barrier, own = [0, 1, 0], threading.Barrier(3, timeout=60), threading.local()
    encode, encoded = representations.encode_examples, dict.fromkeys(range(3), 0)

    def state() -> SimpleNamespace:
        process, here = own.process, local[own.process]
        firsts = {"is_main_process": process == 0, "is_local_main_process": here == 0}
        places = {"process_index": process, "local_process_index": here, "num_processes": 3}
        return SimpleNamespace(**firsts, **places, wait_for_everyone=barrier.wait)

    def counted(encoder, dataset, examples, chosen, *args):
        encoded[own.process] += len(chosen)
        return encode(encoder, dataset, examples, chosen, *args)

    def run(process: int) -> np.ndarray:
        own.process = process
        table = representation_table(encoder, dataset, examples, 12, tmp_path / "run", torch.device("cpu"))
        return np.array(table)

    monkeypatch.setattr(representations, "PartialState", state)
    monkeypatch.setattr(representations, "gather_object", lambda _: local, raising=False)
    monkeypatch.setattr(representations, "encode_examples", counted)
    with ThreadPoolExecutor(3) as pool:
        tables = list(pool.map(run, range(3)))
    for table in tables:
        np.testing.assert_allclose(table, whole, atol=1e-6)
    assert list(encoded.values()) == [len(examples) // 2, len(examples) - len(examples) // 2, len(examples)]
    assert list((tmp_path / "run").iterdir()) == []


def test_a_control_gives_its_own_gate_weights(dataset, encoder_folder, make_recipe, tmp_path, monkeypatch):
    read = read_by_the_model(monkeypatch)
    rows = dataset.examples("train").num_rows
    table = np.random.default_rng(0).dirichlet(np.ones(2), rows).astype(np.float32)
    given = {"gate_weights": table}
    output = train(make_recipe(), dataset.folder, encoder_folder, tmp_path / "adapter", gate_inputs=given)
    known = {tuple(row) for row in table.tolist()}
    assert {tuple(row) for batch in read for row in batch["gate_weights"].tolist()} <= known
    assert load_file(output / "gate.safetensors")["output.weight"].abs().max() == 0  # not trained
    with pytest.raises(UserError, match=rf"gate_weights has {rows - 1} rows, the examples are {rows}"):
        train(make_recipe(), dataset.folder, encoder_folder, tmp_path / "a", gate_inputs={"gate_weights": table[1:]})
    recipe = make_recipe(train={"eval_strategy": "steps"})
    with pytest.raises(UserError, match=r"without train\.eval_strategy"):
        train(recipe, dataset.folder, encoder_folder, tmp_path / "b", gate_inputs=given)


def test_a_jointly_trained_encoder_has_its_own_rate_and_is_saved(dataset, encoder_folder, make_recipe, tmp_path):
    section = {**recipe_of(Path("unused")).encoder.model_dump(), "joint_learning_rate": 0.02}
    rates = {}

    make = finetune.make_trainer

    def watched(*args):
        trainer = make(*args)
        names = {id(p): name for name, p in trainer.model.named_parameters()}
        for group in trainer.create_optimizer().param_groups:
            rates.update({names[id(p)]: group["lr"] for p in group["params"]})
        return trainer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune, "make_trainer", watched)
        output = train(make_recipe(encoder=section), dataset.folder, encoder_folder, tmp_path / "adapter")
    assert {rate for name, rate in rates.items() if "base_model.sequence_encoder." in name} == {0.02}
    assert {rate for name, rate in rates.items() if "base_model.gate." in name} == {0.05}
    assert {rate for name, rate in rates.items() if "lora_" in name} == {0.01}
    before, after = load_encoder(encoder_folder)[0], load_encoder(output / "sequence_encoder")[0]
    assert not torch.equal(before.item_embedding.weight, after.item_embedding.weight)
    assert after.vocabulary_sha256 == dataset.vocabulary_sha256


def test_a_soft_token_has_the_gates_rate_and_is_saved(dataset, encoder_folder, make_recipe, tmp_path, monkeypatch):
    read = read_by_the_model(monkeypatch)
    adapter = {"method": "soft_token", "r": 4, "gate": {"learning_rate": 0.05}}
    recipe = make_recipe(adapter=adapter, train={"max_steps": 30})
    assert finetune.own_learning_rates(recipe) == {"base_model.soft_token.": 0.05}
    output = train(recipe, dataset.folder, encoder_folder, tmp_path / "adapter")
    assert all(batch["representation"].shape == (4, 16) for batch in read)
    log = [e for e in json.loads((output / "training_log.json").read_text()) if "loss" in e]
    assert log[-1]["loss"] < log[0]["loss"] - 0.5
    assert "gate_entropy" not in log[0]
    token = load_file(output / "soft_token.safetensors")
    assert token["projection"].abs().max() > 0
    assert token["mean"].abs().max() > 0


# ---- what tokens count ----

CLUSTERS = {"dro": {"groups": "user_cluster", "clusters": 3, "step_size": 0.5}}


def test_groups_of_users_are_saved_with_a_plain_lora(dataset, encoder_folder, make_recipe, tmp_path):
    recipe = make_recipe(adapter={"method": "lora", "r": 4}, loss=CLUSTERS, train={"max_steps": 8})
    with pytest.raises(UserError, match=r"encoder\.json"):
        train(recipe, dataset.folder, tmp_path / "no-encoder", tmp_path / "adapter")
    output = train(recipe, dataset.folder, encoder_folder, tmp_path / "adapter")
    saved = json.loads((output / "dro.json").read_text())
    assert saved["groups"] == ["cluster_0", "cluster_1", "cluster_2"]
    assert np.array(saved["centres"]).shape == (3, 16)
    assert sum(saved["shares"]) == pytest.approx(1)
    assert sorted(saved["shares"], reverse=True)[0] == saved["shares"][0]
    assert max(saved["weights"]) > 0.34
    log = [entry for entry in json.loads((output / "training_log.json").read_text()) if "loss" in entry]
    assert [log[-1][f"dro_weight/cluster_{number}"] for number in range(3)] == pytest.approx(saved["weights"])
    assert log[-1]["loss"] < log[0]["loss"] - 0.5
    assert '"user_cluster"' in (output / "README.md").read_text()
    examples = tokenize(dataset.example_batches("train", WEIGHED), load_base_model(recipe.model)[1], 512)
    encoder = load_encoder(encoder_folder)[0]
    centres = np.array(saved["centres"])[[2, 0, 1]]
    files.write_json(tmp_path / "checkpoint" / "dro.json", saved | {"centres": centres.tolist()})
    paths = (encoder_folder, tmp_path / "adapter", str(tmp_path / "checkpoint"))
    again = finetune.weigh(recipe, dataset, examples, encoder, *paths)  # a run that goes on
    assert again.dro.groups.shares.tolist() == pytest.approx([saved["shares"][number] for number in (2, 0, 1)])


@pytest.fixture(scope="module")
def liked(log_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Dataset, dict[str, Any]]:
    """The same log with ratings, of which one in six is bad; and the sections of its recipe."""
    folder = tmp_path_factory.mktemp("liked")
    lines = (log_folder / "log.csv").read_text().splitlines()[1:]
    rated = [f"{line},{1 if number % 6 == 0 else 5}" for number, line in enumerate(lines)]
    (folder / "log.csv").write_text("\n".join(["user_id,item_id,timestamp,rating", *rated]) + "\n")
    data = {"interactions": {"path": str(folder / "log.csv")}, "items": {"path": str(log_folder / "items.csv")}}
    changes = {"data": data, "filter": {"like_at": 4}, "tasks": [{"task": "like", "template": "like/items"}]}
    convert(recipe_of(folder, **changes), folder / "dataset", workers=1)
    return Dataset.open(folder / "dataset"), changes


def test_classes_of_another_task_are_weighed_and_are_groups(liked, encoder_folder, make_recipe, tmp_path):
    dataset, changes = liked
    loss = {"class_weights": "balanced", "dro": {"groups": "action"}}
    recipe = make_recipe(**changes, loss=loss, train={"max_steps": 2}, adapter={"method": "lora", "r": 4})
    output = train(recipe, dataset.folder, encoder_folder, tmp_path / "adapter")
    first, entry = json.loads((output / "training_log.json").read_text())[:2]
    labels = dataset.examples("train", ["label"])["label"].to_pylist()
    for label in ("like", "dislike"):
        assert first[f"class_weight/like/{label}"] == pytest.approx(len(labels) / (2 * labels.count(label)))
        assert f"dro_weight/like/{label}" in entry
    assert finetune.fingerprint_of(recipe, dataset, encoder_folder) != finetune.fingerprint_of(
        recipe.model_copy(update={"loss": LossSection(class_weights="balanced")}), dataset, encoder_folder
    )


def test_plain_lora_has_no_rates_of_its_own(make_recipe):
    recipe = make_recipe(adapter={"method": "lora", "r": 4, "gate": {"learning_rate": 0.05}})
    assert finetune.own_learning_rates(recipe) == {}


# ---- refused before long work ----


@pytest.fixture
def no_long_work(monkeypatch):
    def forbidden(*_):
        raise AssertionError("the base model was loaded")

    monkeypatch.setattr(finetune, "load_base_model", forbidden)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": {"learning_rat": 1e-3}}, 'no argument "learning_rat", did you mean "learning_rate"'),
        ({"train": {"output_dir": "elsewhere"}}, r"train\.output_dir may not be set: .*set output_dir at the top"),
        ({"train": {"remove_unused_columns": True}}, "remove_unused_columns may not be set"),
        ({"train": {"save_only_model": True}}, r"save_only_model may not be set: .*resumed"),
        ({"train": {"ignore_data_skip": True}}, "ignore_data_skip may not be set"),
        ({"train": {"lr_scheduler_type": "cosinus"}}, "cosinus"),
        ({"history": {"max_items": 13}}, r"history\.max_items=12, the recipe has 13: run `recllm convert`"),
        ({"history": {"max_items": 12, "gate": "before_list"}}, r"history\.gate=all, the recipe has before_list"),
        ({"prompt": {"max_items": 5}}, r"prompt\.max_items=4, the recipe has 5"),
        ({"tasks": [{"task": "next_item", "template": "next_item/items", "dense_window": 4}]}, "template-mismatch"),
        (
            {"loss": {"class_weights": "balanced"}},
            r"loss\.class_weights=balanced .* those of the task next_item have none",
        ),
        ({"loss": {"answer_weight": 0}}, "no task has a rationale"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_model_is_loaded(
    dataset, encoder_folder, make_recipe, tmp_path, no_long_work, changes, message
):
    with pytest.raises(UserError, match=message):
        train(make_recipe(**changes), dataset.folder, encoder_folder, tmp_path / "adapter")


def test_unknown_target_modules_are_refused_before_tokenising(
    dataset, encoder_folder, make_recipe, tmp_path, monkeypatch
):
    monkeypatch.setattr(finetune, "tokenize", lambda *_: pytest.fail("tokenised"))
    recipe = make_recipe(adapter={"r": 4, "num_experts": 2, "target_modules": ["no_such_module"]})
    with pytest.raises(UserError, match="no_such_module"):
        train(recipe, dataset.folder, encoder_folder, tmp_path / "adapter")


def test_valid_examples_are_tokenised_before_gate_statistics(
    dataset, encoder_folder, make_recipe, tmp_path, monkeypatch
):
    longest = max(len(row["prompt"][-1]["content"]) for row in dataset.examples("valid", ["prompt"]).to_pylist())
    assert longest  # valid prompts continue a list
    monkeypatch.setattr(finetune, "give_gate_inputs", lambda *_: pytest.fail("gate inputs"))

    def too_long(batches, tokenizer, max_tokens, split, total):
        return tokenize(batches, tokenizer, 10 if split == "valid" else max_tokens, split, total)

    tokenize = finetune.tokenize
    monkeypatch.setattr(finetune, "tokenize", too_long)
    with pytest.raises(UserError, match='"valid" examples are longer'):
        train(make_recipe(train={"eval_strategy": "steps"}), dataset.folder, encoder_folder, tmp_path / "adapter")


def test_another_template_can_be_allowed(dataset, encoder_folder, make_recipe, tmp_path, capsys):
    tasks = [{"task": "next_item", "template": "next_item/items", "dense_window": 4}]
    recipe = make_recipe(tasks=tasks, train={"max_steps": 1})
    train(recipe, dataset.folder, encoder_folder, tmp_path / "adapter", allow_template_mismatch=True)
    assert "next_item/films@1" in capsys.readouterr().err


def test_an_encoder_of_another_vocabulary_is_refused(dataset, encoder_folder, make_recipe, tmp_path, no_long_work):
    info = json.loads((encoder_folder / "encoder.json").read_text()) | {"vocabulary_sha256": "0" * 64}
    other = tmp_path / "encoder"
    other.mkdir()
    (other / "encoder.json").write_text(json.dumps(info))
    (other / "encoder.safetensors").write_bytes((encoder_folder / "encoder.safetensors").read_bytes())
    with pytest.raises(UserError, match="fitted on the vocabulary 000000000000"):
        train(make_recipe(), dataset.folder, other, tmp_path / "adapter")


def test_yaml_numbers_without_a_point_are_numbers(make_recipe, tmp_path):
    recipe = make_recipe(train=yaml.safe_load("{learning_rate: 1e-4}"))
    assert recipe.train["learning_rate"] == "1e-4"
    assert training_arguments(recipe, tmp_path).learning_rate == 1e-4


def test_the_cpu_is_not_forced(make_recipe, tmp_path):
    assert not training_arguments(make_recipe(), tmp_path).use_cpu


# ---- killed and resumed ----

RUN = """
import os, signal, sys
from pathlib import Path
from recllm.recipe import load_recipe
from recllm.train import finetune
from transformers import TrainerCallback

class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == int(sys.argv[5]):
            os.kill(os.getpid(), signal.SIGKILL)

make = finetune.make_trainer
def with_kill(*args):
    trainer = make(*args)
    trainer.add_callback(Kill())
    return trainer
finetune.make_trainer = with_kill
finetune.train(load_recipe(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]))
"""


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


def write_recipe(recipe: Recipe, path: Path) -> Path:
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    return path


@pytest.mark.parametrize("kill_at", [5, 18])
def test_a_run_killed_in_the_middle_ends_with_the_same_weights(dataset, encoder_folder, make_recipe, tmp_path, kill_at):
    """Dropout and shuffling draw random numbers; 13 steps are an epoch, so 18 goes on from 16 in the second one."""
    sizes = {"max_steps": 20, "per_device_train_batch_size": 12, "save_steps": 4, "lr_scheduler_type": "cosine"}
    adapter = {"r": 4, "num_experts": 2, "lora_dropout": 0.1, "gate": {"learning_rate": 0.05}}
    recipe = make_recipe(train=sizes, adapter=adapter)
    path = write_recipe(recipe, tmp_path / "recipe.yaml")

    def run(output: Path, step: int) -> "subprocess.CompletedProcess[str]":
        arguments = [str(path), str(dataset.folder), str(encoder_folder), str(output), str(step)]
        return subprocess.run(
            [sys.executable, "-c", RUN, *arguments], env=environment(), capture_output=True, text=True, check=False
        )

    killed = run(tmp_path / "killed" / "adapter", kill_at)
    assert killed.returncode == -9, killed.stderr
    assert not (tmp_path / "killed" / "adapter").exists()
    last = kill_at // 4 * 4
    checkpoint = tmp_path / "killed" / "checkpoints" / f"checkpoint-{last}"
    assert checkpoint.is_dir()
    half_written = tmp_path / "killed" / "checkpoints" / "checkpoint-99"  # as a kill during a write leaves it
    half_written.mkdir()
    (half_written / "adapter_model.safetensors").write_bytes(b"\0" * 10)

    resumed = run(tmp_path / "killed" / "adapter", -1)
    assert resumed.returncode == 0, resumed.stderr
    assert f"going on from {checkpoint}" in resumed.stderr
    assert "checkpoint-99 is passed over: it was cut off" in resumed.stderr
    train(recipe, dataset.folder, encoder_folder, tmp_path / "whole" / "adapter")
    assert_same_weights(tmp_path / "killed" / "adapter", tmp_path / "whole" / "adapter")
    assert logged_steps(tmp_path / "killed") == logged_steps(tmp_path / "whole") == list(range(1, 21))


def logged_steps(run: Path) -> list[int]:
    log = json.loads((run / "adapter" / "training_log.json").read_text())
    return [entry["step"] for entry in log if "loss" in entry]


def test_another_recipe_does_not_resume_and_the_old_checkpoints_are_kept_once(tmp_path, capsys):
    folder = tmp_path / "checkpoints"

    def checkpoint(step: int, fingerprint: str) -> Path:
        made = folder / f"checkpoint-{step}"
        made.mkdir(parents=True)
        names = ("optimizer.pt", "scheduler.pt", "trainer_state.json", "rng_state.pth")
        for name in names:
            (made / name).touch()
        marker = {"fingerprint": fingerprint, "processes": 1, "engine": "one process", "files": dict.fromkeys(names, 0)}
        files.write_json(made / "checkpoint.json", marker)
        return made

    mine = checkpoint(3, "mine")
    assert finetune._resume_from(folder, "mine", resume=True) == str(mine)
    with pytest.warns(UserWarning, match="another recipe"):
        assert finetune._resume_from(folder, "other", resume=True) is None
    # in place its checkpoints would count as ours, and the oldest of ours be deleted first
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints.old"]
    assert (tmp_path / "checkpoints.old" / "checkpoint-3" / "optimizer.pt").exists()
    assert f"kept in {folder}.old" in capsys.readouterr().err
    checkpoint(5, "other")
    assert finetune._resume_from(folder, "other", resume=False) is None
    assert [path.name for path in (tmp_path / "checkpoints.old").iterdir()] == ["checkpoint-5"]
    assert finetune._resume_from(folder, "other", resume=True) is None  # nothing there, nothing moved
    assert (tmp_path / "checkpoints.old" / "checkpoint-5").exists()


def test_what_does_not_touch_the_weights_does_not_bar_resuming(dataset, encoder_folder, make_recipe, log_folder):
    def fingerprint(**section: Any) -> str:
        return finetune.fingerprint_of(make_recipe(train=section), dataset, encoder_folder)

    harmless = {"logging_steps": 7, "report_to": "tensorboard", "run_name": "x", "save_steps": 3, "disable_tqdm": True}
    harmless |= {"ddp_timeout": 60, "dataloader_num_workers": 2, "dataloader_pin_memory": False, "save_total_limit": 5}
    assert fingerprint(**harmless) == fingerprint()
    for key, value in {"learning_rate": 0.5, "max_steps": 7, "eval_strategy": "steps", "bf16": True}.items():
        assert fingerprint(**{key: value}) != fingerprint(), key
    best = {"load_best_model_at_end": True, "eval_strategy": "steps"}
    assert fingerprint(**best, save_steps=3) != fingerprint(**best, save_steps=4)  # which checkpoint is the best one
    changed = make_recipe(encoder=recipe_of(log_folder).encoder.model_dump() | {"joint_learning_rate": 0.1})
    assert finetune.fingerprint_of(changed, dataset, encoder_folder) != fingerprint()
    tables = [{"gate_weights": np.full((3, 2), value)} for value in (0.5, 0.4)]
    given = [finetune.fingerprint_of(make_recipe(), dataset, encoder_folder, table) for table in tables]
    assert len({fingerprint(), *given}) == 3


def test_a_run_that_streams_resumes_with_its_own_buffer_only(dataset, encoder_folder, make_recipe, monkeypatch):
    """Where a resumed epoch goes on is counted in buffers: with others rows would come twice, and some never."""

    def fingerprint(**section: Any) -> str:
        return finetune.fingerprint_of(make_recipe(train=section), dataset, encoder_folder)

    default, plain = fingerprint(streaming=True), fingerprint()
    assert fingerprint(streaming=True, buffer_size=streaming.BUFFER_SIZE) == default
    assert fingerprint(streaming=True, buffer_size=None) == default
    assert fingerprint(streaming=True, buffer_size=64) != default
    monkeypatch.setattr(streaming, "BUFFER_SIZE", 64)  # of another version
    assert fingerprint(streaming=True) == fingerprint(streaming=True, buffer_size=64) != default
    assert fingerprint() == plain


def test_a_resumed_run_takes_the_gate_statistics_of_its_checkpoint(
    dataset, encoder_folder, make_recipe, tmp_path, monkeypatch
):
    # the checkpoints stay; a schedule that ends at 0 would hide a step too many
    recipe = make_recipe(train={"save_steps": 4, "save_total_limit": 2, "lr_scheduler_type": "constant"})
    train(recipe, dataset.folder, encoder_folder, tmp_path / "adapter")
    before = tensors(tmp_path / "adapter")
    monkeypatch.setattr(finetune, "fit_gate_statistics", lambda *_: pytest.fail("computed again"))
    train(recipe, dataset.folder, encoder_folder, tmp_path / "adapter")
    after = tensors(tmp_path / "adapter")
    assert before["gate.safetensors:mean"].abs().max() > 0
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_base_model_of_other_weights_under_the_same_name_is_refused(
    dataset, encoder_folder, make_recipe, tiny_model_folder, tmp_path
):
    base = shutil.copytree(tiny_model_folder, tmp_path / "base")
    made = make_recipe(train={"save_steps": 2, "save_total_limit": 2})
    recipe = made.model_copy(update={"model": made.model.model_copy(update={"name_or_path": str(base)})})
    train(recipe, dataset.folder, encoder_folder, tmp_path / "adapter")
    weights = load_file(base / "model.safetensors")
    save_file({name: value * 1.1 for name, value in weights.items()}, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="of the same sizes, but with other weights"):
        train(recipe, dataset.folder, encoder_folder, tmp_path / "adapter")


def test_accelerate_launch_is_the_same_run(dataset, encoder_folder, make_recipe, tmp_path):
    """`accelerate launch scripts/train.py RECIPE` and `recllm train RECIPE`, each in its own process."""
    commands = {
        "launched": [
            *("-m", "accelerate.commands.launch", "--config_file", "accelerate_configs/single.yaml"),
            "scripts/train.py",
        ],
        "direct": ["-m", "recllm.cli", "train"],
    }
    for name, command in commands.items():
        recipe = make_recipe(output_dir=str(tmp_path / name))
        recipe.output.mkdir()
        (recipe.output / "dataset").symlink_to(dataset.folder)
        path = write_recipe(recipe, tmp_path / f"{name}.yaml")
        done = subprocess.run(
            [sys.executable, *command, str(path)],
            cwd=ROOT, env=environment(), capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert_same_weights(tmp_path / "launched" / "adapter", tmp_path / "direct" / "adapter")
