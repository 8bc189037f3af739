import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import TrainingArguments

from recllm import files
from recllm.errors import UserError
from recllm.model.adapter import accepts_history, build_adapter, load_adapter
from recllm.model.gate import load_balancing_loss
from recllm.model.sequence_encoder import SASRec
from recllm.recipe import AdapterSection
from recllm.train import engines
from recllm.train.collator import COLUMNS, IGNORE, Collator, TokenizedExamples, tokenize, without_loss
from recllm.train.trainer import (
    GATE,
    MARKER,
    AdapterTrainer,
    EpochSampler,
    completion_loss,
    gate_statistics,
    last_checkpoint,
    rotate,
)

SECTION = AdapterSection(r=4, num_experts=2)


@pytest.fixture(scope="module")
def examples(dataset, tiny_tokenizer) -> TokenizedExamples:
    return tokenize(dataset.examples("train", COLUMNS).slice(0, 24).to_batches(), tiny_tokenizer, 512)


def make_trainer(tiny_llama, dataset, examples, folder: Path, method: str = "ilora", **arguments) -> AdapterTrainer:
    torch.manual_seed(0)
    encoder = SASRec(num_items=dataset.num_items, hidden_size=8, num_layers=1, num_heads=1, max_items=12).eval()
    section = SECTION.model_copy(update={"method": method})
    model = build_adapter(tiny_llama(), section, encoder if method == "ilora" else None)
    balance = arguments.pop("balance", 0.0)
    options = {"max_steps": 1, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "report_to": "none"}
    options |= {"logging_steps": 1, "disable_tqdm": True, "lr_scheduler_type": "constant", "use_cpu": True, **arguments}
    own = {"learning_rates": {GATE: 0.5}, "fingerprint": "mine", "balance": balance} if method == "ilora" else {}
    return AdapterTrainer(
        model=model,
        args=TrainingArguments(output_dir=str(folder), remove_unused_columns=False, **options),
        data_collator=Collator(2, dataset if method == "ilora" else None, 12),
        train_dataset=examples,
        eval_dataset=examples,
        **own,
    )


def trainable(trainer: AdapterTrainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def test_completion_loss_is_the_shifted_cross_entropy_over_labels():
    logits = torch.zeros(1, 3, 4)  # the last 3 positions of 5; uniform over 4 tokens
    labels = torch.tensor([[IGNORE, IGNORE, IGNORE, 1, 2]])
    total, count = completion_loss(logits.bfloat16(), labels)
    assert count == 2
    assert total.item() == pytest.approx(2 * math.log(4))
    assert total.dtype == torch.float32


def test_loss_equals_the_full_forward_with_labels(tiny_llama, dataset, examples, tmp_path):
    trainer = make_trainer(tiny_llama, dataset, examples, tmp_path, "lora")
    batch = trainer.data_collator([examples[i] for i in range(5)])
    model = trainer.model.eval()
    full = model(**{k: v for k, v in batch.items() if k != "logits_to_keep"}).loss
    torch.testing.assert_close(trainer.compute_loss(model, batch), full)


def test_the_head_runs_only_where_there_is_loss(tiny_llama, dataset, examples, tmp_path):
    trainer = make_trainer(tiny_llama, dataset, examples, tmp_path)
    batch = trainer.data_collator([examples[i] for i in range(5)])
    _, outputs = trainer.compute_loss(trainer.model.eval(), batch, return_outputs=True)
    longest = int((batch["labels"] != IGNORE).sum(1).max())
    assert outputs.logits.shape[1] == longest + 1 < batch["input_ids"].shape[1]


@pytest.mark.parametrize("method", ["lora", "ilora"])
def test_accumulating_4_times_2_rows_is_the_step_of_8_rows(tiny_llama, dataset, examples, tmp_path, method):
    """Completions differ in length: a mean of micro-batch means would be another loss and another gradient."""
    ends = []
    for batch, accumulation in ((8, 1), (2, 4)):
        sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        trainer = make_trainer(tiny_llama, dataset, examples, tmp_path, method, optim="sgd", max_grad_norm=0.0, **sizes)
        with torch.no_grad():  # B = 0 would make the gate's gradient exactly zero
            for name, p in trainer.model.named_parameters():
                if "lora_B" in name:
                    p.copy_(torch.linspace(-0.1, 0.1, p.numel()).view_as(p))
        trainer.train()
        ends.append((trainer.state.log_history[0]["loss"], trainable(trainer)))
    assert ends[0][0] == pytest.approx(ends[1][0], rel=1e-5)
    for name, value in ends[0][1].items():
        torch.testing.assert_close(value, ends[1][1][name], rtol=1e-4, atol=1e-6)


def test_the_gate_has_its_own_learning_rate(tiny_llama, dataset, examples, tmp_path):
    trainer = make_trainer(tiny_llama, dataset, examples, tmp_path)
    optimizer = trainer.create_optimizer()
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    rates = {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert {name for name, rate in rates.items() if rate == 0.5} == {
        "base_model.gate.default.output.weight",
        "base_model.gate.default.output.bias",
    }
    assert {rate for name, rate in rates.items() if "lora_" in name} == {1e-2}
    assert set(rates) == set(trainable(trainer))
    assert any("gate_proj.lora_A" in name for name in rates)  # a Llama's own gate_proj is not the gate


def test_it_logs_padding_and_gate(tiny_llama, dataset, examples, tmp_path):
    trainer = make_trainer(tiny_llama, dataset, examples, tmp_path)
    trainer.train()
    entry = trainer.state.log_history[0]
    assert entry["gate_entropy"] == pytest.approx(math.log(2), abs=1e-3)  # B was 0: the gate has not moved yet
    assert entry["expert_0"] + entry["expert_1"] == pytest.approx(1)
    indices = list(iter(trainer._get_train_sampler()))[:8]
    lengths = examples.lengths[indices]
    assert entry["padding_share"] == pytest.approx(1 - lengths.sum() / (8 * lengths.max()))


def lean(trainer: AdapterTrainer, bias: list[float]) -> None:
    """Have the gate prefer an expert for everybody."""
    with torch.no_grad():
        trainer.model.base_model.gate["default"].output.bias.copy_(torch.tensor(bias))


def test_the_balance_loss_is_a_mean_over_accumulated_batches(tiny_llama, dataset, examples, tmp_path):
    """A gate that gives everybody (0.9, 0.1): 2 · (0.9² + 0.1²) − 1 = 0.64, however the step is cut."""
    losses = {}
    for balance in (0.0, 3.0):
        for batch, accumulation in ((8, 1), (2, 4)):
            sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
            trainer = make_trainer(tiny_llama, dataset, examples, tmp_path, balance=balance, **sizes)
            lean(trainer, [math.log(9), 0.0])
            trainer.data_collator.histories = None  # rather carried by the rows: none is empty then
            examples.give("representation", np.ones((len(examples), 8), dtype=np.float32))
            trainer.train()
            losses[balance, batch] = trainer.state.log_history[0]["loss"]
            if balance:
                assert trainer.state.log_history[0]["gate_balance_loss"] == pytest.approx(0.64, abs=1e-4)
    examples.argument = None
    for batch in (8, 2):
        assert losses[3.0, batch] - losses[0.0, batch] == pytest.approx(3 * 0.64, abs=1e-3)


def test_the_balance_loss_of_a_step_does_not_depend_on_its_cut(tiny_llama, dataset, examples, tmp_path):
    """Rows that prefer an expert each are balanced together; the mean over micro-batches of two rows is not 0."""
    weights = np.random.default_rng(0).dirichlet([0.3, 0.3], len(examples)).astype(np.float32)
    examples.give("gate_weights", weights)
    found = []
    for batch, accumulation in ((8, 1), (2, 4)):
        sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        trainer = make_trainer(tiny_llama, dataset, examples, tmp_path, balance=1.0, **sizes)
        trainer.data_collator.histories = None
        trainer.train()
        found.append(trainer.state.log_history[0]["gate_balance_loss"])
    examples.argument = None
    rows = weights[list(iter(trainer._get_train_sampler()))[:8]]
    assert found == pytest.approx([float(load_balancing_loss(torch.from_numpy(rows)))] * 2, abs=1e-5)


def test_balance_of_single_rows_is_refused(tiny_llama, dataset, examples, tmp_path):
    sizes = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}
    with pytest.raises(UserError, match=r"balance=1 with one row .*set train\.per_device_train_batch_size"):
        make_trainer(tiny_llama, dataset, examples, tmp_path, balance=1.0, **sizes)


def test_what_is_kept_between_logs_is_bounded(tiny_llama, dataset, examples, tmp_path, monkeypatch):
    monkeypatch.setattr("recllm.train.trainer.GATE_ROWS", 16, raising=False)
    trainer = make_trainer(tiny_llama, dataset, examples, tmp_path, max_steps=9, logging_strategy="no", balance=1.0)
    trainer.train()
    assert [len(kept) for kept in vars(trainer._seen).values() if isinstance(kept, list)] == [2]
    assert trainer._seen.gate_rows == 16
    found = trainer._over_all_processes(trainer._seen)
    assert 0 < found["padding_share"] < 1
    assert found["expert_0"] + found["expert_1"] == pytest.approx(1)


def test_a_collapsed_gate_is_told_of_once(tiny_llama, dataset, examples, tmp_path, capsys):
    trainer = make_trainer(tiny_llama, dataset, examples, tmp_path, max_steps=9, logging_steps=3)
    lean(trainer, [10.0, -10.0])
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["gate_use_collapsed"] for entry in logged] == [1.0, 1.0, 1.0]
    assert capsys.readouterr().err.count("the gate has collapsed at step 3: the strongest expert has 1.00") == 1
    even = make_trainer(tiny_llama, dataset, examples, tmp_path, max_steps=3, logging_steps=3, optim="sgd")
    even.train()
    assert even.state.log_history[0]["gate_use_collapsed"] == 0.0
    assert "collapsed" not in capsys.readouterr().err


def test_statistics_of_sigmoid_and_layered_gates():
    layered = gate_statistics(torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [1.0, 0.0]]]))
    assert layered == {"gate_entropy": 0.0, "expert_0": 0.75, "expert_1": 0.25}
    sigmoid = gate_statistics(torch.full((3, 4), 0.5))
    assert sigmoid["gate_entropy"] == pytest.approx(math.log(4))
    assert sigmoid["expert_3"] == 0.5


def test_an_example_without_loss_adds_nothing(tiny_llama, dataset, examples, tmp_path):
    trainer = make_trainer(tiny_llama, dataset, examples, tmp_path)
    model = trainer.model.train()
    plain = trainer.compute_loss(model, trainer.data_collator([examples[3]]))
    filled = trainer.compute_loss(model, trainer.data_collator([examples[3], examples[without_loss(5)]]))
    torch.testing.assert_close(filled, plain)
    assert [len(gates) for gates in trainer._seen.gates] == [1, 1]  # nor to the gate's statistics
    nothing = trainer.compute_loss(model, trainer.data_collator([examples[without_loss(5)]]))
    assert nothing.item() == 0
    nothing.backward()
    assert all(not p.grad.any() for p in trainer.model.parameters() if p.grad is not None)


def test_another_engine_than_the_launch_asks_for_is_refused():
    class DeepSpeedEngine(torch.nn.Module):
        def zero_optimization_stage(self) -> int:
            return 2

    engines.check_engine("ZeRO-2", DeepSpeedEngine())
    engines.check_engine("one process", torch.nn.Linear(1, 1))
    for asked, wrapped in (
        ("ZeRO-3", DeepSpeedEngine()),
        ("ZeRO-2", torch.nn.Linear(1, 1)),
        ("DDP", DeepSpeedEngine()),
    ):
        with pytest.raises(UserError, match=f"the launch asks for {asked}, but"):
            engines.check_engine(asked, wrapped)


def test_deepspeed_computes_in_bf16_without_casting_the_adapter():
    config = {"bf16": {"enabled": True}, "fp16": {"enabled": False}}
    engines.keep_adapter_fp32(config)
    assert not config["bf16"]["enabled"]
    assert config["torch_autocast"]["enabled"]
    assert config["torch_autocast"]["dtype"] == "bfloat16"
    plain = {"bf16": {"enabled": "False"}}
    engines.keep_adapter_fp32(plain)
    assert "torch_autocast" not in plain
    engines.keep_adapter_fp32(plain, torch.bfloat16)  # of the recipe's own accord
    assert plain["torch_autocast"]["dtype"] == "bfloat16"
    arguments = SimpleNamespace(deepspeed_plugin=SimpleNamespace(deepspeed_config={"fp16": {"enabled": True}}))
    with pytest.raises(UserError, match="fp16 is not supported with DeepSpeed"):
        engines.asked_engine(arguments)


def test_fsdp_of_version_1_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    assert engines.asked_engine(arguments) == "FSDP2"
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(UserError, match=r"FSDP version 1 is not supported: take fsdp2\.yaml"):
        engines.asked_engine(arguments)


def test_a_loss_that_is_not_finite_stops_the_run(tiny_llama, dataset, examples, tmp_path):
    trainer = make_trainer(tiny_llama, dataset, examples, tmp_path, logging_nan_inf_filter=False)
    with torch.no_grad():
        next(p for p in trainer.model.parameters() if p.requires_grad).fill_(float("nan"))
    with pytest.raises(UserError, match=r"loss is nan at step 1: lower train\.learning_rate"):
        trainer.train()


def test_the_order_hangs_on_seed_and_epoch_only():
    lengths, epoch = np.arange(40) % 7, [0]
    sampler = EpochSampler(lengths, 4, seed=3, epoch=lambda: epoch[0])
    first = list(sampler)
    torch.rand(100)  # the global generator is not read
    assert list(sampler) == first
    assert sorted(first) == list(range(40))
    epoch[0] = 1
    assert list(sampler) != first
    assert list(EpochSampler(lengths, 4, seed=4, epoch=lambda: 0)) != first


@pytest.mark.parametrize("group", [0, 6])
def test_the_order_is_filled_up_with_examples_without_loss(group):
    lengths = np.arange(20) % 7
    plain = list(EpochSampler(lengths, group, seed=3, epoch=lambda: 1))
    filled = EpochSampler(lengths, group, seed=3, epoch=lambda: 1, whole=6)
    order = list(filled)
    assert len(order) == len(filled) == 24
    assert order[:20] == plain
    assert order[20:] == [without_loss(plain[-1])] * 4


def test_grouping_by_length_pads_less():
    lengths = np.random.default_rng(0).integers(5, 100, size=400)

    def padding(group: int) -> float:
        order = list(EpochSampler(lengths, group, 0, lambda: 0))
        batches = lengths[order].reshape(-1, 8)
        return 1 - lengths.sum() / (8 * batches.max(1).sum())

    assert padding(8) < 0.3 * padding(0)


def test_the_length_of_a_batch_says_nothing_of_its_step():
    """transformers' order: every 50th batch holds the shortest, which in dense data have no history."""
    lengths = np.random.default_rng(0).integers(5, 100, size=8 * 50 * 12 + 3)
    correlations, first = [], []
    for epoch in range(6):
        order = list(EpochSampler(lengths, 8, 0, lambda epoch=epoch: epoch))
        assert sorted(order) == list(range(len(lengths)))
        batches = lengths[order[: len(lengths) // 8 * 8]].reshape(-1, 8).mean(1)
        steps = np.arange(len(batches))
        correlations.append([abs(np.corrcoef(batches, place)[0, 1]) for place in (steps, steps % 50)])
        first.append(lengths[order[:8]].max())
        assert np.std(lengths[order[8:16]]) < 5  # like lengths together
    assert np.max(correlations) < 0.15  # sorted in stretches of 50: above 0.9 with the step modulo 50
    assert first[0] == 99  # the longest first, once
    assert min(first[1:]) < 90


def test_the_remainder_is_not_always_the_shortest():
    lengths = np.arange(43)
    last = {tuple(sorted(list(EpochSampler(lengths, 8, 0, lambda e=e: e))[-3:])) for e in range(5)}
    assert len(last) == 5
    assert sorted(EpochSampler(np.arange(3), 8, 0, lambda: 0)) == [0, 1, 2]  # less than one batch


def test_eval_loss_is_a_mean_over_tokens(tiny_llama, dataset, examples, tmp_path):
    trainer = make_trainer(tiny_llama, dataset, examples, tmp_path, per_device_eval_batch_size=5)
    found = trainer.evaluate(examples)["eval_loss"]
    batch = trainer.data_collator([examples[i] for i in range(len(examples))])
    model = trainer.model.eval()
    total, count = completion_loss(model(**{k: v for k, v in batch.items() if k != "labels"}).logits, batch["labels"])
    assert found == pytest.approx(float(total) / count, rel=1e-5)
    means = [trainer.compute_loss(model, trainer.data_collator([examples[i]])).item() for i in range(len(examples))]
    assert found != pytest.approx(np.mean(means), rel=1e-4)  # completions differ in length


def test_saving_a_checkpoint_leaves_the_files_of_other_processes(tiny_llama, dataset, examples, tmp_path):
    trainer = make_trainer(tiny_llama, dataset, examples, tmp_path)
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "rng_state_1.pth").write_bytes(b"state")
    (tmp_path / "checkpoint-1" / MARKER).write_text("{}")  # of a run that was there before
    trainer.save_model(str(tmp_path / "checkpoint-1"))
    assert (tmp_path / "checkpoint-1" / "rng_state_1.pth").read_bytes() == b"state"
    assert (tmp_path / "checkpoint-1" / "gate.safetensors").is_file()
    assert not (tmp_path / "checkpoint-1" / MARKER).exists()


def test_every_checkpoint_is_an_adapter(tiny_llama, dataset, examples, tmp_path):
    trainer = make_trainer(tiny_llama, dataset, examples, tmp_path, max_steps=2, save_steps=1)
    trainer.train()
    folder = tmp_path / "checkpoint-2"
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", MARKER} <= {
        path.name for path in folder.iterdir()
    }
    loaded = load_adapter(tiny_llama(), folder)
    assert accepts_history(loaded)
    batch = trainer.data_collator([examples[0], examples[1]])
    expected = trainer.compute_loss(trainer.model.eval(), batch)
    torch.testing.assert_close(trainer.compute_loss(loaded.eval(), batch), expected)


BEST = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "greater_is_better": True}
MANY = {"max_steps": 4, "save_steps": 1} | BEST  # the best one is the one of the largest loss, here the first


def test_the_best_checkpoint_is_found_where_the_run_was_moved_to(tiny_llama, dataset, examples, tmp_path):
    make_trainer(tiny_llama, dataset, examples, tmp_path / "there", **MANY).train()
    (tmp_path / "there").rename(tmp_path / "here")
    moved = make_trainer(tiny_llama, dataset, examples, tmp_path / "here", **MANY)
    moved.train(resume_from_checkpoint=str(tmp_path / "here" / "checkpoint-4"))
    assert moved.state.global_step == 4  # it was finished
    assert moved.state.best_model_checkpoint == str(tmp_path / "here" / "checkpoint-1")
    best = load_adapter(tiny_llama(), tmp_path / "here" / "checkpoint-1").state_dict()
    last = load_adapter(tiny_llama(), tmp_path / "here" / "checkpoint-4").state_dict()
    lora = {name: value for name, value in trainable(moved).items() if "lora_B" in name}
    assert lora
    assert all(torch.equal(value, best[name]) for name, value in lora.items())
    assert not all(torch.equal(value, last[name]) for name, value in lora.items())


@pytest.mark.parametrize(
    ("damage", "reason"),
    [(shutil.rmtree, "it is missing"), (lambda folder: (folder / MARKER).unlink(), "it was cut off")],
)
def test_a_best_checkpoint_that_is_gone_is_an_error(tiny_llama, dataset, examples, tmp_path, damage, reason):
    make_trainer(tiny_llama, dataset, examples, tmp_path, **MANY).train()
    damage(tmp_path / "checkpoint-1")
    trainer = make_trainer(tiny_llama, dataset, examples, tmp_path, **MANY)
    with pytest.raises(UserError, match=f"checkpoint-1 is the best checkpoint so far, .* but {reason}"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_an_older_checkpoint_stays_until_the_next_one_is_complete(tiny_llama, dataset, examples, tmp_path, monkeypatch):
    write = files.write_json

    def full_disk(path: Path, document: object) -> None:
        if path.parent.name == "checkpoint-2":
            raise OSError("no space left")
        write(path, document)

    for name in ("checkpoint-best", "checkpoint-4.bak"):
        (tmp_path / name).mkdir()
    arguments = {"max_steps": 3, "save_steps": 1, "save_total_limit": 1}
    monkeypatch.setattr("recllm.train.trainer.files.write_json", full_disk)
    with pytest.raises(OSError, match="no space left"):
        make_trainer(tiny_llama, dataset, examples, tmp_path, **arguments).train()
    with pytest.warns(UserWarning, match="checkpoint-2 is passed over"):
        kept = last_checkpoint(tmp_path, "mine")
    assert kept == tmp_path / "checkpoint-1"
    monkeypatch.setattr("recllm.train.trainer.files.write_json", write)
    make_trainer(tiny_llama, dataset, examples, tmp_path, **arguments).train(resume_from_checkpoint=str(kept))
    left = {path.name for path in tmp_path.glob("checkpoint-*")}
    assert left == {"checkpoint-3", "checkpoint-best", "checkpoint-4.bak"}  # nobody else's folder is deleted


def test_rotation_keeps_the_best_and_the_newest(tmp_path):
    for step in (1, 2, 3, 4):
        complete(tmp_path, step)
    (tmp_path / "checkpoint-9").mkdir()  # passed over on resuming: cut off while being written
    rotate(tmp_path / "checkpoint-4", 3, tmp_path / "checkpoint-1")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-3", "checkpoint-4"]
    rotate(tmp_path / "checkpoint-4", None, None)
    rotate(tmp_path / "checkpoint-4", 1, tmp_path / "checkpoint-1")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-4"]


def test_a_resumed_run_logs_and_saves_as_often_as_it_says_now(tiny_llama, dataset, examples, tmp_path):
    make_trainer(tiny_llama, dataset, examples, tmp_path, max_steps=1, save_steps=1).train()
    trainer = make_trainer(tiny_llama, dataset, examples, tmp_path, max_steps=4, save_steps=3, logging_steps=2)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-1", "checkpoint-3", "checkpoint-4"}
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [1, 2, 4]


def test_a_finished_run_is_not_trained_further(tiny_llama, dataset, examples, tmp_path):
    make_trainer(tiny_llama, dataset, examples, tmp_path, max_steps=2, save_steps=1).train()
    again = make_trainer(tiny_llama, dataset, examples, tmp_path, max_steps=2, save_steps=1)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.state.global_step == 2
    saved = load_adapter(tiny_llama(), tmp_path / "checkpoint-2").state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in trainable(again).items() if "lora_" in name)


def complete(folder: Path, step: int, fingerprint: str = "mine") -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir()
    for name in ("weights", "optimizer.pt", "scheduler.pt", "trainer_state.json", "rng_state.pth"):
        (checkpoint / name).write_bytes(b"12345")
    seal(checkpoint, fingerprint)
    return checkpoint


def seal(checkpoint: Path, fingerprint: str = "mine", processes: int = 1, engine: str = "one process") -> None:
    sizes = {path.name: path.stat().st_size for path in checkpoint.iterdir() if path.name != MARKER}
    launch = {"processes": processes, "engine": engine}
    (checkpoint / MARKER).write_text(json.dumps({"fingerprint": fingerprint, **launch, "files": sizes}))


def test_the_newest_complete_checkpoint_is_taken(tmp_path):
    complete(tmp_path, 9)
    assert last_checkpoint(tmp_path, "mine") == tmp_path / "checkpoint-9"
    newest = complete(tmp_path, 10)
    assert last_checkpoint(tmp_path, "mine") == newest  # by number, not by name
    assert last_checkpoint(tmp_path / "absent", "mine") is None


def test_other_folders_beside_the_checkpoints_do_not_count(tmp_path):
    for name in ("checkpoint-best", "checkpoint-4.bak", "checkpoint-"):
        (tmp_path / name).mkdir()
    assert last_checkpoint(tmp_path, "mine") is None
    checkpoint = complete(tmp_path, 1)
    assert last_checkpoint(tmp_path, "mine") == checkpoint


def test_a_checkpoint_of_another_mixed_precision_is_an_error(tmp_path):
    checkpoint = complete(tmp_path, 1)
    assert last_checkpoint(tmp_path, "mine", precision="bf16") == checkpoint  # of an earlier version: it says nothing
    marker = json.loads((checkpoint / MARKER).read_text())
    (checkpoint / MARKER).write_text(json.dumps(marker | {"precision": "bf16"}))
    assert last_checkpoint(tmp_path, "mine", precision="bf16") == checkpoint
    with pytest.raises(UserError, match="with mixed precision bf16, this run has no: launch as then"):
        last_checkpoint(tmp_path, "mine")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: (folder / MARKER).unlink(), "cut off"),
        (lambda folder: (folder / "weights").write_bytes(b"123"), "other sizes"),
        (lambda folder: (folder / "weights").unlink(), "other sizes"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_and_said(tmp_path, damage, reason):
    complete(tmp_path, 1)
    damage(complete(tmp_path, 2))
    with pytest.warns(UserWarning, match=rf"checkpoint-2 is passed over: .*{reason}"):
        assert last_checkpoint(tmp_path, "mine") == tmp_path / "checkpoint-1"


def test_a_checkpoint_of_another_run_is_passed_over(tmp_path):
    complete(tmp_path, 1, "other")
    with pytest.warns(UserWarning, match="another recipe, dataset or encoder"):
        assert last_checkpoint(tmp_path, "mine") is None


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "trainer_state.json", "rng_state.pth"])
def test_a_checkpoint_that_cannot_be_resumed_exactly_is_passed_over(tmp_path, name):
    checkpoint = complete(tmp_path, 1)
    (checkpoint / name).unlink()
    seal(checkpoint)
    with pytest.warns(UserWarning, match=f"has no {name}"):
        assert last_checkpoint(tmp_path, "mine") is None


def test_every_process_needs_its_random_state(tmp_path):
    checkpoint = complete(tmp_path, 1)
    (checkpoint / "rng_state.pth").rename(checkpoint / "rng_state_0.pth")
    seal(checkpoint, processes=2, engine="DDP")
    with pytest.warns(UserWarning, match=r"has no rng_state_1\.pth"):
        assert last_checkpoint(tmp_path, "mine", 2, "DDP") is None
    (checkpoint / "rng_state_1.pth").touch()
    seal(checkpoint, processes=2, engine="DDP")
    assert last_checkpoint(tmp_path, "mine", 2, "DDP") == checkpoint


@pytest.mark.parametrize("launch", [(2, "DDP"), (1, "ZeRO-2")])
def test_a_checkpoint_of_another_launch_is_an_error(tmp_path, launch):
    complete(tmp_path, 1)
    with pytest.raises(
        UserError, match=rf"by 1 processes under one process, this run has {launch[0]} under {launch[1]}"
    ):
        last_checkpoint(tmp_path, "mine", *launch)
    assert last_checkpoint(tmp_path / "elsewhere", "mine", *launch) is None
