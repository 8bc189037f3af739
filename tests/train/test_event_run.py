"""A log of events, converted: the encoder reads it, and an adapter is trained on what people do next and why."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from recllm.convert.pipeline import convert
from recllm.data.dataset import Dataset
from recllm.model.adapter import load_adapter
from recllm.model.base_model import load_base_model
from recllm.model.export import gates_of
from recllm.model.sequence_encoder import load_encoder
from recllm.model.user_gate import UserGate
from recllm.recipe import Recipe
from recllm.train import finetune
from recllm.train.collator import WEIGHED, Collator, tokenize
from recllm.train.encoder import fit_encoder

from .conftest import recipe_of

ACTIONS = {"view": "view", "cart": "add to cart", "buy": "buy"}
REASONS = {"view": "I look", "cart": "I want it", "buy": "it is cheap"}


def write_events(folder: Path) -> None:
    """30 users with 3 sessions of 5 events: views of a ring of items, then into the cart; a third ends with a purchase.

    A purchase has no item. Every event but a session's second says why.
    """
    lines = ["user_id,item_id,timestamp,action,session_id,why"]
    for user in range(30):
        for session in range(3):
            for place in range(5):
                action = "view" if place < 3 else ("cart" if place == 3 or (user + session) % 3 else "buy")
                item = "" if action == "buy" else f"i{(user + place) % 6}"
                why = REASONS[action] if place != 1 else ""
                seconds = 1_700_000_000 + 86_400 * session + 60 * place + user
                lines.append(f"u{user},{item},{seconds},{action},s{user}-{session},{why}")
    (folder / "log.csv").write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, long_model_folder: Path) -> tuple[Recipe, Dataset, Path]:
    """The recipe, its dataset and the folder of its encoder."""
    folder = tmp_path_factory.mktemp("events")
    write_events(folder)
    changes: dict[str, Any] = {
        "data": {"interactions": {"path": str(folder / "log.csv")}},
        "actions": {"words": ACTIONS, "without_item": ["buy"], "attributes": ["why"]},
        "protocol": {
            "name": "sessions",
            "split": {"method": "session_holdout", "targets": "all"},
            "candidates": {"count": 2},
        },
        "tasks": [{"task": "next_action", "template": "next_action/events", "rationale": "why"}],
        "loss": {"rationale_weight": 0.25, "class_weights": "balanced", "dro": {"groups": "action", "step_size": 0.1}},
        "model": {"name_or_path": str(long_model_folder), "dtype": "float32"},
        "train": recipe_of(folder).train | {"max_steps": 4, "per_device_train_batch_size": 2},
    }
    recipe = recipe_of(folder, **changes)
    convert(recipe, folder / "dataset", workers=1)
    dataset = Dataset.open(folder / "dataset")
    fit_encoder(dataset, recipe.encoder, recipe.history.max_items, recipe.seed, folder / "encoder")
    return recipe, dataset, folder / "encoder"


def test_the_encoder_reads_the_log(run):
    _, dataset, folder = run
    info = load_encoder(folder)[1]
    assert (info["num_items"], info["num_actions"]) == (6, 3)
    assert info["vocabulary_sha256"] == dataset.vocabulary_sha256
    metrics = info["metrics"]
    assert metrics["nats"] >= metrics["action_nats"] > 0
    assert {"action_accuracy", "macro_recall", "ndcg@10", "popularity_action_nats", "popularity_ndcg@10"} <= set(
        metrics
    )


def test_an_adapter_is_trained_with_classes_rationales_and_groups(run, tmp_path):
    recipe, dataset, encoder_folder = run
    output = finetune.train(recipe, dataset.folder, encoder_folder, tmp_path / "adapter")
    first, *log = json.loads((output / "training_log.json").read_text())
    labels = dataset.examples("train", ["label"])["label"].to_pylist()
    for label in ACTIONS:
        weight = len(labels) / (3 * labels.count(label))
        assert first[f"class_weight/next_action/{label}"] == pytest.approx(weight)
    groups = json.loads((output / "dro.json").read_text())
    assert sorted(groups["groups"]) == sorted(f"next_action/{label}" for label in ACTIONS)
    assert sum(log[3][f"dro_weight/{name}"] for name in groups["groups"]) == pytest.approx(1)
    assert np.ptp(groups["log_weights"]) > 0
    # the gate of the saved adapter reads codes, by whichever door
    model = load_adapter(load_base_model(recipe.model)[0], output)
    torch.nn.init.normal_(model.base_model.gate["default"].output.weight)
    ends = [12, 7]
    gates = gates_of(model, dataset, [0, 1], ends, 12)
    codes = [dataset.read(user, end, 12) for user, end in enumerate(ends)]
    assert codes[0].dtype == np.int64
    with torch.no_grad():
        expected = torch.cat([model.base_model.gate_weights(torch.from_numpy(row)[None]) for row in codes])
    torch.testing.assert_close(gates, expected, rtol=1e-4, atol=1e-5)
    assert UserGate.load(output).weights(codes).shape == (2, 2)


def test_tokens_of_a_reason_are_those_of_its_line(run, tiny_tokenizer):
    _, dataset, _ = run
    for split, reasons in (("train", {*REASONS.values()}), ("valid", {*REASONS.values(), None})):
        examples = tokenize(dataset.example_batches(split, WEIGHED), tiny_tokenizer, 4096)
        told = dataset.examples(split, ["label", "rationale"]).to_pylist()
        assert {row["rationale"] for row in told} == reasons  # training leaves out what has none
        for number, row in enumerate(told):
            reason = 0 if row["rationale"] is None else len(row["rationale"] + "\n")  # a token a byte
            assert examples.told.rationale_tokens[number] == reason
            assert examples.completion_tokens[number] == reason + len(ACTIONS[row["label"]]) + 1


def test_a_joint_encoder_reads_codes_in_its_batches(run, tmp_path):
    recipe, dataset, encoder_folder = run
    section = recipe.encoder.model_copy(update={"joint_learning_rate": 0.02})
    joint = recipe.model_copy(update={"encoder": section, "train": recipe.train | {"max_steps": 5}})
    output = finetune.train(joint, dataset.folder, encoder_folder, tmp_path / "adapter")
    before, after = (load_file(f / "encoder.safetensors") for f in (encoder_folder, output / "sequence_encoder"))
    for name in ("action_embedding.weight", "item_embedding.weight"):
        assert not torch.equal(before[name], after[name])
    assert torch.equal(before["action_bias"], after["action_bias"])  # in no representation: it would have no gradient
    rows = tokenize(dataset.examples("train").slice(0, 3).to_batches(), load_base_model(recipe.model)[1], 4096)
    batch = Collator(0, dataset, 12)([rows[number] for number in range(3)])
    for number in range(3):
        read = dataset.read(int(rows.user_indices[number]), int(rows.gate_ends[number]), 12)
        assert batch["history_items"][number][-len(read) :].tolist() == read.tolist()
