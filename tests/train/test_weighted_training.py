"""Training where not every token counts the same: classes, rationales, groups."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import TrainingArguments

from recllm.errors import UserError
from recllm.model.adapter import build_adapter
from recllm.recipe import AdapterSection, DroSection, LossSection
from recllm.train.collator import IGNORE, Collator, TokenizedExamples
from recllm.train.dro import DRO, GroupDro
from recllm.train.trainer import AdapterTrainer, last_checkpoint
from recllm.train.weights import action_groups, token_weights

from .conftest import tokenized

DRO_SECTION = LossSection(rationale_weight=0.5, dro=DroSection(groups="action", step_size=0.3))


def mixed(tokenizer: Any) -> TokenizedExamples:
    """24 examples: of six the fifth is a purchase, which says why, and the sixth leaves."""
    view = {"answer": "view"}
    buy, leave = {"answer": "buy", "rationale": "it is cheap"}, {"answer": "leave", "rationale": "dear"}
    return tokenized([view, view, view, view, buy, leave] * 4, tokenizer)


def make_trainer(
    base_model: Any, examples: TokenizedExamples, folder: Path, section: LossSection | None = None, **arguments: Any
) -> AdapterTrainer:
    torch.manual_seed(0)
    model = build_adapter(base_model, AdapterSection(method="lora", r=4))
    options = {"max_steps": 1, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "report_to": "none"}
    options |= {"logging_steps": 1, "disable_tqdm": True, "lr_scheduler_type": "constant", "use_cpu": True, **arguments}
    weights, dro = None, None
    examples.numbered = section is not None
    if section is not None:
        weights, _ = token_weights(section, examples)
        if section.dro is not None:
            numbers, groups = action_groups(section, weights, examples)
            weights = weights._replace(groups=torch.from_numpy(numbers))
            dro = GroupDro(groups, section.dro.step_size)
    return AdapterTrainer(
        model=model,
        args=TrainingArguments(output_dir=str(folder), remove_unused_columns=False, **options),
        data_collator=Collator(2),
        train_dataset=examples,
        eval_dataset=examples,
        fingerprint="mine",
        weights=weights,
        dro=dro,
        first_log={"class_weight/next_action/buy": 2.0},
    )


def trainable(trainer: AdapterTrainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def nats_of(trainer: AdapterTrainer, batch: dict[str, Any]) -> list[list[float]]:
    """Of each example its completion's tokens, by another way than the trainer's."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}
    log_p = functional.log_softmax(trainer.model(**inputs).logits[:, :-1], dim=-1)
    own = -log_p.gather(-1, inputs["input_ids"][:, 1:, None]).squeeze(-1)
    return [row[label != IGNORE].tolist() for row, label in zip(own, batch["labels"][:, 1:])]


def test_tokens_count_by_class_and_by_place(tiny_llama, tiny_tokenizer, tmp_path):
    """In the batch view, view, buy (with a rationale of 12 tokens); balanced over 16, 4 and 4 of 24 examples."""
    section = LossSection(rationale_weight=0.5, answer_weight=2.0, class_weights="balanced")
    examples = mixed(tiny_tokenizer)
    trainer = make_trainer(tiny_llama(), examples, tmp_path, section)
    batch = trainer.data_collator([examples[2], examples[3], examples[4]])
    nats = nats_of(trainer, batch)
    view, buy, told = 24 / (3 * 16), 24 / (3 * 4), len("it is cheap\n")
    weights = [[2 * view] * len(nats[0]), [2 * view] * len(nats[1])]
    weights.append([0.5 * buy] * told + [2 * buy] * (len(nats[2]) - told))
    total = sum(w * n for ws, ns in zip(weights, nats) for w, n in zip(ws, ns))
    loss = trainer.compute_loss(trainer.model.train(), batch)
    assert loss.item() == pytest.approx(total / sum(map(sum, weights)), rel=1e-5)


def test_groups_count_by_weight_over_share(tiny_llama, tiny_tokenizer, tmp_path):
    examples = mixed(tiny_tokenizer)
    trainer = make_trainer(tiny_llama(), examples, tmp_path, DRO_SECTION)
    batch = trainer.data_collator([examples[3], examples[4]])  # view and buy
    nats = nats_of(trainer, batch)
    sums = {"view": 16 * 5, "buy": 4 * (12 * 0.5 + 4), "leave": 4 * (5 * 0.5 + 6)}  # tokens of "…\n" count half
    shares = {name: value / sum(sums.values()) for name, value in sums.items()}
    weights = [[1.0] * 5, [0.5] * 12 + [1.0] * 4]
    parts = [sum(w * n for w, n in zip(ws, ns)) for ws, ns in zip(weights, nats)]
    expected = (1 / 3 / shares["view"] * parts[0] + 1 / 3 / shares["buy"] * parts[1]) / (5 + 10)
    loss = trainer.compute_loss(trainer.model.train(), batch)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_an_epoch_is_the_weighted_mean_of_the_groups_however_it_is_cut(tiny_llama, tiny_tokenizer, tmp_path):
    """Σ q ℓ over the groups; in batches of two most have no purchase at all."""
    examples = mixed(tiny_tokenizer)
    trainer = make_trainer(tiny_llama(), examples, tmp_path, DRO_SECTION)
    whole = trainer.data_collator([examples[number] for number in range(24)])
    nats = nats_of(trainer, whole)
    losses = []
    for first, told in ((0, 0), (4, 12), (5, 5)):  # the first of each group, whose examples are all alike
        weights = [0.5] * told + [1.0] * (len(nats[first]) - told)
        losses.append(sum(w * n for w, n in zip(weights, nats[first])) / sum(weights))
    loss = trainer.compute_loss(trainer.model.train(), whole)
    assert loss.item() == pytest.approx(sum(losses) / 3, rel=1e-5)
    pairs = [trainer.data_collator([examples[n], examples[n + 1]]) for n in range(0, 24, 2)]
    trainer._step_weight = sum(trainer._weight_of(trainer.weights, batch) for batch in pairs)
    parts = [trainer.compute_loss(trainer.model, batch, num_items_in_batch=1).item() for batch in pairs]
    assert sum(parts) == pytest.approx(sum(losses) / 3, rel=1e-5)


def test_weights_of_1_are_the_plain_loss(tiny_llama, tiny_tokenizer, tmp_path):
    examples, losses = mixed(tiny_tokenizer), []
    for section in (None, LossSection()):
        trainer = make_trainer(tiny_llama(), examples, tmp_path, section, max_steps=4, optim="sgd")
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][-1] < losses[0][0]


def test_an_evaluation_tells_the_plain_mean(tiny_llama, tiny_tokenizer, tmp_path):
    examples = mixed(tiny_tokenizer)
    found = [
        make_trainer(tiny_llama(), examples, tmp_path, section).evaluate(examples)["eval_loss"]
        for section in (None, DRO_SECTION)
    ]
    assert found[0] == found[1]


def test_a_step_does_not_depend_on_its_cut(tiny_llama, tiny_tokenizer, tmp_path):
    ends = []
    for batch, accumulation in ((8, 1), (2, 4)):
        sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation, "max_steps": 5}
        examples = mixed(tiny_tokenizer)
        trainer = make_trainer(tiny_llama(), examples, tmp_path, DRO_SECTION, optim="sgd", max_grad_norm=0.0, **sizes)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        ends.append((losses, trainer.dro.log_weights, trainable(trainer)))
    assert ends[0][0] == pytest.approx(ends[1][0], rel=1e-4)
    np.testing.assert_allclose(ends[0][1], ends[1][1], rtol=1e-4)
    assert np.ptp(ends[0][1]) > 0.1  # they have moved
    for name, value in ends[0][2].items():
        torch.testing.assert_close(value, ends[1][2][name], rtol=1e-3, atol=1e-6)


def test_an_example_without_loss_adds_nothing_to_its_group(tiny_llama, tiny_tokenizer, tmp_path):
    examples = mixed(tiny_tokenizer)
    trainer = make_trainer(tiny_llama(), examples, tmp_path, DRO_SECTION)
    plain, filled = (trainer.data_collator([examples[4], *more]) for more in ([], [examples[~5]]))
    for batch in (plain, filled):
        assert trainer._weight_of(trainer.weights, batch).item() == 12 * 0.5 + 4
    losses = [trainer.compute_loss(trainer.model.train(), batch).item() for batch in (plain, filled)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    trainer._step_groups = None
    nothing = trainer.compute_loss(trainer.model, trainer.data_collator([examples[~4]]))
    nothing.backward()
    assert nothing.item() == 0
    assert trainer._step_groups.abs().sum() == 0


def test_groups_and_classes_are_logged(tiny_llama, tiny_tokenizer, tmp_path):
    trainer = make_trainer(tiny_llama(), mixed(tiny_tokenizer), tmp_path, DRO_SECTION, max_steps=3, logging_steps=3)
    trainer.train()
    first, entry = trainer.state.log_history[:2]
    assert first == {"class_weight/next_action/buy": 2.0, "epoch": 0.0, "step": 0}
    names = ("next_action/view", "next_action/buy", "next_action/leave")
    assert sum(entry[f"dro_weight/{name}"] for name in names) == pytest.approx(1)
    assert all(0 < entry[f"dro_loss/{name}"] < 20 for name in names)  # 24 examples in three steps: all were met


def test_a_resumed_run_goes_on_with_its_groups(tiny_llama, tiny_tokenizer, tmp_path):
    """8 rows a step: the epoch ends with step 3."""
    steps = {"max_steps": 6, "save_steps": 2}
    whole = make_trainer(tiny_llama(), mixed(tiny_tokenizer), tmp_path / "whole", DRO_SECTION, **steps)
    whole.train()
    half = make_trainer(tiny_llama(), mixed(tiny_tokenizer), tmp_path / "half", DRO_SECTION, save_steps=2, max_steps=2)
    half.train()
    checkpoint = last_checkpoint(tmp_path / "half", "mine")
    saved = json.loads((checkpoint / DRO).read_text())
    assert saved["log_weights"] == half.dro.log_weights.tolist()
    rest = make_trainer(tiny_llama(), mixed(tiny_tokenizer), tmp_path / "half", DRO_SECTION, **steps)
    rest.train(resume_from_checkpoint=str(checkpoint))
    assert rest.dro.log_weights.tolist() == whole.dro.log_weights.tolist()
    assert rest.dro.losses.tolist() == whole.dro.losses.tolist()
    assert half.dro.log_weights.tolist() != whole.dro.log_weights.tolist()
    ours, theirs = trainable(rest), trainable(whole)
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    history = rest.state.log_history
    assert [entry["step"] for entry in history if "class_weight/next_action/buy" in entry] == [0]
    assert [entry["step"] for entry in history if "loss" in entry] == list(range(1, 7))
    (checkpoint / DRO).unlink()
    with pytest.raises(UserError, match=r"dro\.json does not exist"):
        rest.train(resume_from_checkpoint=str(checkpoint))


# ---- what it is for ----


def ambiguous(tokenizer: Any) -> TokenizedExamples:
    """Of 100 examples 60 are asked "a" and view; of 40 that are asked "b" 24 view and 16 buy.

    So viewing is the likelier answer to both, although a purchase is likelier after "b" than elsewhere.
    """
    rows = [{"answer": "view", "prompt": "a"}] * 60
    rows += [{"answer": answer, "prompt": "b"} for answer in ["view"] * 24 + ["buy"] * 16]
    return tokenized(rows, tokenizer)


def answer_to(trainer: AdapterTrainer, examples: TokenizedExamples, row: int) -> str:
    """The first letter that the model would give to an example's prompt."""
    tokens = torch.from_numpy(examples[row].input_ids[: -int(examples.completion_tokens[row])].astype(np.int64))[None]
    with torch.no_grad():
        log_p = trainer.model.eval()(input_ids=tokens).logits[0, -1]
    first = {answer: int(examples[n].input_ids[-int(examples.completion_tokens[n])]) for answer, n in NUMBERS.items()}
    return max(first, key=lambda answer: float(log_p[first[answer]]))


NUMBERS = {"view": 0, "buy": 99}  # examples that give these answers


@pytest.mark.parametrize(
    ("section", "said"),
    [
        (None, "view"),
        (LossSection(class_weights="balanced"), "buy"),
        (LossSection(dro=DroSection(groups="action", step_size=0.05)), "buy"),
    ],
)
def test_plain_training_ignores_a_rare_class_and_weights_do_not(
    tiny_llama, tiny_tokenizer, tmp_path, section: LossSection | None, said: str
):
    """Balanced, the 16 purchases count 100 / (2 · 16) and the 84 views 100 / (2 · 84): asked "b", 50 against 14."""
    examples = ambiguous(tiny_tokenizer)
    options = {"max_steps": 60, "per_device_train_batch_size": 20, "logging_steps": 60}
    trainer = make_trainer(tiny_llama(), examples, tmp_path, section, **options)
    trainer.train()
    assert answer_to(trainer, examples, 0) == "view"
    assert answer_to(trainer, examples, 99) == said
