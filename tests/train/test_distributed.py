"""Every way of training, with the engine that it says: two CPU processes against a single one."""

import functools
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from recllm.data.dataset import Dataset
from recllm.recipe import EncoderSection
from recllm.train.encoder import fit_encoder

from .conftest import recipe_of
from .on_cpu import ROOT, Worlds, environment

CONFIGS = ROOT / "accelerate_configs"
ENGINES = {  # config → what must have wrapped the model: class, ZeRO stage, where ZeRO-3 keeps idle weights
    "ddp": ("DistributedDataParallel", None, None),
    "zero1": ("DeepSpeedEngine", 1, None),
    "zero2": ("DeepSpeedEngine", 2, None),
    "zero3": ("DeepSpeedEngine", 3, "none"),
    "zero3_offload": ("DeepSpeedEngine", 3, "cpu"),
    "fsdp2": ("FSDPModule", None, None),
}
STEPS = 6
SMALL = 2 * 2 * 2  # rows of a step: processes, accumulated batches, rows of a batch


@pytest.fixture(scope="module")
def worlds() -> Iterator[Worlds]:
    pytest.importorskip("deepspeed", reason="needs the extra deepspeed, which `make test` installs")
    with Worlds() as worlds:
        yield worlds


@functools.cache
def build_cpu_adam() -> None:
    """DeepSpeed compiles it where it is first used: minutes on a busy machine, which are not the training's."""
    build = "from deepspeed.ops.op_builder import CPUAdamBuilder; CPUAdamBuilder().load(verbose=False)"
    subprocess.run([sys.executable, "-c", build], env=environment(), check=True, capture_output=True, timeout=550)


class Runs:
    """Starts trainings of one recipe and keeps those that several tests compare with."""

    def __init__(self, worlds: Worlds, folder: Path, job: dict[str, Any]) -> None:
        self.worlds, self.folder, self.job = worlds, folder, job
        self.kept: dict[str, tuple[dict[str, Any], Path]] = {}

    def __call__(self, name: str, config: str, *overrides: str, rows: int = SMALL, **options: Any) -> Any:
        """The result and the adapter folder; a name that ran before is not run again."""
        if name not in self.kept:
            output = self.folder / name / "adapter"
            self.kept[name] = (self.start(output, config, *overrides, rows=rows, **options), output)
        return self.kept[name]

    def start(self, output: Path, config: str, *overrides: str, rows: int = SMALL, **options: Any) -> dict[str, Any]:
        if config == "zero3_offload":
            build_cpu_adam()
        processes = options.pop("processes", 1 if config == "single" else 2)
        batch = f"train.per_device_train_batch_size={rows // (2 * processes)}"
        job = self.job | {"config": f"{config}.yaml", "processes": processes, "output": output} | options
        return self.worlds.run(**job, overrides=[batch, *overrides])


@pytest.fixture(scope="module")
def runs(worlds: Worlds, dataset: Dataset, log_folder: Path, tiny_model_folder: Path, tmp_path_factory) -> Runs:
    folder = tmp_path_factory.mktemp("worlds")
    encoder = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "batch_size": 16, "max_epochs": 3, "dropout": 0.0}
    train = {
        "max_steps": STEPS,
        "gradient_accumulation_steps": 2,
        "learning_rate": 0.01,
        "logging_steps": 1,
        "save_steps": 2,
        "report_to": "none",
    }
    model = {"name_or_path": str(tiny_model_folder), "dtype": "float32"}
    recipe = recipe_of(log_folder, train=train, model=model, encoder=encoder)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    fit_encoder(dataset, EncoderSection(**encoder), 12, 0, folder / "encoder")
    job = {"recipe": folder / "recipe.yaml", "dataset": dataset.folder, "encoder": folder / "encoder"}
    return Runs(worlds, folder, job)


def assert_engine(result: dict[str, Any], config: str) -> None:
    """accelerate trains as DDP, silently, where it has no DeepSpeed or FSDP: so by class, on every rank."""
    name, stage, offload = ENGINES[config]
    assert result["codes"] == [0, 0], result["log"]
    for rank in result["ranks"]:
        assert name in rank["bases"], rank["bases"]
        assert ("DistributedDataParallel" in rank["bases"]) == (config == "ddp")
        assert rank.get("stage") == stage
        assert offload is None or rank["offload"] == offload


def assert_checkpointing(result: dict[str, Any], steps: int, on: bool) -> None:
    """Whether layers ran once more in the backward passes, on every rank: equal losses cannot tell."""
    batches = 2 * steps  # two accumulated batches are a step
    for rank in result["ranks"]:
        assert rank["forwards"] == {"embedding": batches, "layer": batches * (2 if on else 1)}


def tensors(adapter: Path) -> dict[str, torch.Tensor]:
    """Of all its files: LoRA, gate or soft token, encoder."""
    paths = adapter.rglob("*.safetensors")
    return {f"{path.relative_to(adapter)}:{name}": value for path in paths for name, value in load_file(path).items()}


def assert_same_weights(first: Path, second: Path, atol: float) -> None:
    one, two = tensors(first), tensors(second)
    assert {name: value.shape for name, value in one.items()} == {name: value.shape for name, value in two.items()}
    assert min(value.numel() for value in one.values()) > 0
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


def log_of(adapter: Path) -> list[dict[str, float]]:
    return json.loads((adapter / "training_log.json").read_text())


def logged(adapter: Path) -> list[dict[str, float]]:
    return [entry for entry in log_of(adapter) if "loss" in entry]


def assert_same_losses(first: Path, second: Path) -> None:
    one, two = logged(first), logged(second)
    assert [entry["step"] for entry in one] == [entry["step"] for entry in two]
    assert [entry["loss"] for entry in one] == pytest.approx([entry["loss"] for entry in two], rel=1e-5)
    assert two[-1]["loss"] < two[0]["loss"] - 0.5  # it learned: else equal losses would say little


@pytest.mark.parametrize("config", ENGINES)
def test_two_processes_train_to_the_losses_of_one(runs: Runs, config: str):
    single, expected = runs("single", "single")
    assert single["codes"] == [0], single["log"]
    assert single["ranks"][0]["engine"] == "PeftModelForCausalLM"
    result, adapter = runs(config, config)
    assert_engine(result, config)
    assert_same_losses(adapter, expected)
    assert_same_weights(adapter, expected, atol=2e-4)  # Adam turns rounding of tiny gradients into more
    assert {"gate.safetensors", "adapter_model.safetensors", "ilora.json", "items.parquet"} <= set(names(adapter))
    for entry, single_entry in zip(logged(adapter), logged(expected), strict=True):  # over all ranks, not the first
        for key in ("gate_entropy", "expert_0", "gate_use_top_expert_share"):
            assert entry[key] == pytest.approx(single_entry[key], abs=1e-4)


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


@pytest.mark.parametrize("config", ENGINES)
def test_killed_and_resumed_with_gradient_checkpointing_it_ends_with_the_same_weights(runs: Runs, config: str):
    """As uninterrupted without checkpointing: recomputation must see the gates, the resumed run all of its state."""
    uninterrupted, whole = runs(config, config)
    assert_engine(uninterrupted, config)
    assert_checkpointing(uninterrupted, STEPS, on=False)
    output = runs.folder / f"{config}-killed" / "adapter"
    checkpointing = "train.gradient_checkpointing=true"
    killed = runs.start(output, config, checkpointing, kill_at=5)
    assert killed["codes"][0] == -9
    assert not output.exists()
    assert (output.parent / "checkpoints" / "checkpoint-4" / "checkpoint.json").is_file()
    resumed = runs.start(output, config, checkpointing)
    assert_engine(resumed, config)
    assert_checkpointing(resumed, STEPS - 4, on=True)
    assert re.search(r"going on from \S+checkpoint-4", resumed["log"])
    assert len(resumed["ranks"][0]["losses"]) == STEPS - 4
    assert_same_losses(output, whole)
    assert_same_weights(output, whole, atol=1e-5)


ASKED = ["train.bf16=true", "train.use_cpu=true"]
BF16 = ["model.dtype=bfloat16", "train.max_steps=2"]  # on such a base model bf16 arithmetic is the default


@pytest.mark.parametrize(
    ("config", "asked"),
    [
        (config, asked)
        for config in ENGINES
        for asked in (ASKED, [])
        if config != "zero3_offload" and not (config == "fsdp2" and asked)
    ],
)
def test_in_bf16_the_adapter_stays_fp32(runs: Runs, config: str, asked: list[str]):
    """DeepSpeed's own bf16 mode casts the adapter, which then is another one than what load_adapter rebuilds."""
    result, adapter = runs(f"{config}-bf16-{bool(asked)}", config, *BF16, *asked)
    assert_engine(result, config)
    _, expected = runs("ddp-bf16-True", "ddp", *BF16, *ASKED)
    assert {value.dtype for value in tensors(adapter).values()} == {torch.float32}
    assert [e["loss"] for e in logged(adapter)] == pytest.approx([e["loss"] for e in logged(expected)], rel=1e-3)
    lora = [value for name, value in tensors(adapter).items() if "lora_B" in name]
    assert not all(torch.equal(value, value.bfloat16().float()) for value in lora)  # nor was it rounded on the way
    _, plain = runs("ddp-bf16-off", "ddp", *BF16, "train.bf16=false")
    assert [e["loss"] for e in logged(adapter)] != [e["loss"] for e in logged(plain)]  # that adapter computes in fp32


@pytest.mark.parametrize("config", ["ddp", "zero3", "fsdp2"])
def test_the_balance_loss_is_that_of_the_whole_step(runs: Runs, config: str):
    """Each process alone would pull its own rows, whose gates differ, to be balanced."""
    balance = ["adapter.gate.balance=2.0", "train.gradient_accumulation_steps=1"]
    _, expected = runs("single-balance", "single", *balance, rows=SMALL)
    result, adapter = runs(f"{config}-balance", config, *balance, rows=SMALL)
    assert_engine(result, config)
    assert_same_losses(adapter, expected)
    found, wanted = ([e["gate_balance_loss"] for e in logged(a)] for a in (adapter, expected))
    assert found == pytest.approx(wanted, rel=1e-3, abs=1e-5)
    assert max(wanted) > 1e-3
    assert_same_weights(adapter, expected, atol=2e-4)


@pytest.mark.parametrize("config", ["ddp", "zero3", "fsdp2"])
def test_groups_are_those_of_the_whole_step(runs: Runs, config: str):
    """Each process alone would know the losses of its own rows only, and weigh groups by them."""
    dro = ["loss.dro={groups: user_cluster, clusters: 3, step_size: 0.3}"]
    _, expected = runs("single-dro", "single", *dro)
    result, adapter = runs(f"{config}-dro", config, *dro)
    assert_engine(result, config)
    assert_same_losses(adapter, expected)
    assert_same_weights(adapter, expected, atol=5e-4)
    found, wanted = (json.loads((a / "dro.json").read_text()) for a in (adapter, expected))
    assert found["weights"] == pytest.approx(wanted["weights"], abs=1e-4)
    assert max(wanted["weights"]) > min(wanted["weights"]) + 0.05
    for entry, single_entry in zip(logged(adapter), logged(expected), strict=True):
        keys = [key for key in single_entry if key.startswith("dro_")]
        assert len(keys) > 3
        assert [entry[key] for key in keys] == pytest.approx([single_entry[key] for key in keys], rel=1e-3)


@pytest.mark.parametrize("config", ["ddp", "zero3", "fsdp2"])
def test_an_encoder_trained_jointly(runs: Runs, config: str):
    joint = "encoder.joint_learning_rate=0.02"
    _, expected = runs("single-joint", "single", joint)
    result, adapter = runs(f"{config}-joint", config, joint)
    assert_engine(result, config)
    assert_same_losses(adapter, expected)
    assert_same_weights(adapter, expected, atol=5e-4)
    before = load_file(runs.folder / "encoder" / "encoder.safetensors")
    after = load_file(adapter / "sequence_encoder" / "encoder.safetensors")
    assert all(not torch.equal(before[name], after[name]) for name in ("item_embedding.weight", "norm.weight"))
    frozen = load_file(runs("single", "single")[1] / "sequence_encoder" / "encoder.safetensors")
    assert all(torch.equal(before[name], value) for name, value in frozen.items())


@pytest.mark.parametrize(("method", "config"), [("soft_token", "zero3"), ("soft_token", "fsdp2"), ("lora", "zero3")])
def test_the_other_methods(runs: Runs, method: str, config: str):
    override = f"adapter.method={method}"
    _, expected = runs(f"single-{method}", "single", override)
    result, adapter = runs(f"{config}-{method}", config, override)
    assert_engine(result, config)
    assert_same_losses(adapter, expected)
    assert_same_weights(adapter, expected, atol=2e-4)
    assert not any("gate_entropy" in entry for entry in logged(adapter))


@pytest.mark.parametrize("config", ["ddp", "zero3", "fsdp2"])
def test_evaluation_counts_every_example_once_and_the_best_checkpoint_comes_back(runs: Runs, config: str):
    """The best one is the one of the largest loss, here the first."""
    evaluate = ["train.eval_strategy=steps", "train.eval_steps=2", "train.load_best_model_at_end=true"]
    evaluate += ["train.greater_is_better=true", "train.per_device_eval_batch_size=5"]
    _, expected = runs("single-best", "single", *evaluate)
    result, adapter = runs(f"{config}-best", config, *evaluate)
    assert_engine(result, config)
    found, wanted = ([e["eval_loss"] for e in log_of(a) if "eval_loss" in e] for a in (adapter, expected))
    assert found == pytest.approx(wanted, rel=1e-5)
    assert sorted(found, reverse=True) == found
    assert_same_weights(adapter, expected, atol=1e-4)
    last = runs(config, config)[1]
    assert any(not torch.allclose(value, tensors(last)[name]) for name, value in tensors(adapter).items())


def test_an_epoch_reads_every_example_once_in_the_same_batches_for_any_number_of_processes(runs: Runs):
    """148 examples in steps of 36: of the last four rows one rank gets none, and has as many batches all the same."""
    epoch = ["train.max_steps=-1", "train.num_train_epochs=1", 'train.save_strategy="no"']
    _, one_adapter = runs("single-epoch", "single", *epoch, rows=36)
    result, two_adapter = runs("ddp-epoch", "ddp", *epoch, rows=36)
    assert_engine(result, "ddp")
    # but for the last batch, which checks the saved adapter
    one, first, second = (
        rank["rows"][:-1] for name in ("single", "ddp") for rank in runs.kept[f"{name}-epoch"][0]["ranks"]
    )
    assert len(first) == len(second) == len(one)
    assert (len(first[-1]), len(second[-1])) == (4, 0)
    assert len(flat(one)) == len(set(flat(one))) == Dataset.open(runs.job["dataset"]).examples("train").num_rows == 148
    assert not set(flat(first)) & set(flat(second))
    assert sorted(flat(first) + flat(second)) == sorted(flat(one))
    for step in range(0, len(one), 2):  # two accumulated batches are a step
        there = flat(first[step : step + 2]) + flat(second[step : step + 2])
        assert sorted(there) == sorted(flat(one[step : step + 2]))
    assert_same_losses(two_adapter, one_adapter)


def flat(batches: list[list[list[int]]]) -> list[tuple[int, ...]]:
    return [tuple(row) for batch in batches for row in batch]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("single", r"checkpoint-\d was written by 2 processes under DDP, this run has 1 under one process"),
        ("zero2", r"checkpoint-\d was written by 2 processes under DDP, this run has 2 under ZeRO-2"),
    ],
)
def test_a_checkpoint_of_another_launch_is_an_error(runs: Runs, tmp_path: Path, config: str, message: str):
    """Beginning afresh would throw away what a run of days has reached, only because it was launched otherwise."""
    keep = "train.save_total_limit=1"  # checkpoints stay
    runs("ddp-kept", "ddp", keep)
    shutil.copytree(runs.folder / "ddp-kept" / "checkpoints", tmp_path / "checkpoints")
    rows = SMALL if config != "single" else SMALL // 2  # the same recipe, word for word
    result = runs.start(tmp_path / "adapter", config, keep, rows=rows)
    assert 1 in result["codes"]
    assert re.search(message, result["log"]), result["log"][-2000:]
    assert (tmp_path / "checkpoints" / f"checkpoint-{STEPS}").is_dir()
    assert not result["ranks"][0].get("losses")


def test_falling_back_to_another_engine_is_an_error(runs: Runs, tmp_path: Path):
    """accelerate as it is: asked for FSDP2 over CPU processes, it trains as DDP without a word."""
    result = runs.start(tmp_path / "adapter", "fsdp2", "train.use_cpu=true", shim=False)
    assert 1 in result["codes"]
    assert "the launch asks for FSDP2, but accelerate has wrapped the model with DDP" in result["log"]
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("config", ["ddp", "zero2"])
def test_processes_that_were_not_joined_are_an_error(runs: Runs, tmp_path: Path, config: str):
    """What `accelerate launch --config_file ddp.yaml` does on a machine without GPUs: each process trains alone."""
    result = runs.start(tmp_path / "adapter", config, shim=False)
    assert 1 in result["codes"]
    assert "2 processes were launched, but accelerate joined 1" in result["log"]


@pytest.mark.parametrize("config", ["ddp", "zero1"])
def test_cpu_processes_need_no_shim_where_the_recipe_asks_for_them(runs: Runs, config: str):
    result, adapter = runs(f"{config}-plain", config, "train.use_cpu=true", shim=False)
    assert_engine(result, config)
    assert_same_losses(adapter, runs("single", "single")[1])


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_names_its_command_and_is_one_of_accelerates(path: Path):
    from accelerate.commands.config.config_args import load_config_from_file

    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any(f"accelerate launch --config_file accelerate_configs/{path.name} " in line for line in header)
    config = load_config_from_file(str(path))
    kind = {"single": "NO", "ddp": "MULTI_GPU", "fsdp2": "FSDP"}.get(path.stem.removeprefix("multinode_"), "DEEPSPEED")
    assert config.distributed_type.value == kind
    if stage := re.search(r"zero(\d)", path.stem):
        assert config.deepspeed_config["zero_stage"] == int(stage[1])
    assert np.isin(path.stem.removeprefix("multinode_"), [*ENGINES, "single"])
