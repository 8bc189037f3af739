from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recllm.errors import UserError
from recllm.model.chat import encode
from recllm.recipe import DroSection, LossSection, TaskSection
from recllm.train import weights as module
from recllm.train.weights import (
    action_groups,
    check_tasks,
    class_weights,
    token_weights,
    user_groups,
    weighs,
    weights_by_class,
)

from .conftest import answers, recipe_of, tokenized

EQUAL = DroSection(groups="action")


# ---- classes ----


def test_balanced_and_effective_weights_are_1_on_average():
    counts = np.array([90, 9, 1])
    balanced = class_weights(counts, LossSection(class_weights="balanced"))
    assert balanced.tolist() == pytest.approx([100 / (3 * 90), 100 / (3 * 9), 100 / (3 * 1)])
    assert (balanced * counts).sum() == pytest.approx(100)
    effective = class_weights(np.array([1, 3]), LossSection(class_weights="effective", class_beta=0.5))
    one, three = (1 - 0.5) / (1 - 0.5), (1 - 0.5) / (1 - 0.5**3)
    scale = 4 / (1 * one + 3 * three)
    assert effective.tolist() == pytest.approx([one * scale, three * scale])
    assert class_weights(counts, LossSection()).tolist() == [1, 1, 1]


def test_effective_weights_lie_between_plain_and_balanced_ones():
    counts = np.array([1000, 10])
    nearly_plain = class_weights(counts, LossSection(class_weights="effective", class_beta=1e-6))
    assert nearly_plain.tolist() == pytest.approx([1, 1], rel=1e-4)
    nearly_balanced = class_weights(counts, LossSection(class_weights="effective", class_beta=1 - 1e-12))
    assert nearly_balanced.tolist() == pytest.approx([1010 / 2000, 1010 / 20], rel=1e-4)


def test_classes_are_weighed_within_their_task(tiny_tokenizer):
    rows = answers("view", "view", "view", "buy") + answers("yes", "no", task="outcome")
    section = LossSection(class_weights="balanced")
    examples = tokenized(rows, tiny_tokenizer)
    assert weights_by_class(examples.told, section) == {
        "next_action/view": pytest.approx(4 / (2 * 3)),
        "next_action/buy": pytest.approx(4 / (2 * 1)),
        "outcome/yes": 1.0,
        "outcome/no": 1.0,
    }
    weights, by_class = token_weights(section, examples)
    assert weights.answer.tolist() == pytest.approx([2 / 3, 2 / 3, 2 / 3, 2, 1, 1])
    assert by_class["next_action/buy"] == 2
    assert token_weights(LossSection(answer_weight=3, rationale_weight=2), examples)[1] == {}


# ---- rationales ----


def test_the_tokens_of_a_rationale_end_with_its_line(tiny_tokenizer):
    rows = [{"answer": "buy", "rationale": "cheap"}, {"answer": "view"}]
    examples = tokenized(rows, tiny_tokenizer)
    assert examples.told.rationale_tokens.tolist() == [len("cheap\n"), 0]  # a token a byte
    prompt, message = [{"role": "user", "content": "next?"}], {"role": "assistant", "content": "cheap\nbuy"}
    _, completion = encode(tiny_tokenizer, prompt, [message])
    assert examples.completion_tokens.tolist() == [len(completion), len("view") + 1]
    weights, _ = token_weights(LossSection(rationale_weight=0.25, answer_weight=2), examples)
    row, places = torch.zeros(len(completion), dtype=torch.int64), torch.arange(len(completion))
    assert weights.of(row, places).tolist() == [0.25] * 6 + [2.0] * 4  # "buy" and its terminator
    sums = weights.sums(torch.tensor([0, 1, 0]), torch.tensor([10, 5, 0]))  # the last: without loss
    assert sums.tolist() == [6 * 0.25 + 4 * 2, 5 * 2, 0]


def test_a_completion_that_does_not_begin_with_its_rationale_is_refused(tiny_tokenizer):
    with pytest.raises(UserError, match='example e0: its completion does not begin with the line "cheap"'):
        tokenized([{"answer": "buy", "rationale": "cheap", "text": "cheap: buy"}], tiny_tokenizer)


def test_nothing_to_learn_is_refused(tiny_tokenizer):
    examples = tokenized(answers("buy", "view"), tiny_tokenizer)
    with pytest.raises(UserError, match="no token of the training examples counts"):
        token_weights(LossSection(answer_weight=0), examples)


def test_equal_weights_are_the_plain_mean():
    assert not weighs(LossSection())
    assert not weighs(LossSection(rationale_weight=0.5, answer_weight=0.5))
    for changed in ({"rationale_weight": 0.5}, {"class_weights": "balanced"}, {"dro": EQUAL}):
        assert weighs(LossSection(**changed))


# ---- refused by the recipe alone ----


@pytest.mark.parametrize(
    ("loss", "key"),
    [
        ({"class_weights": "effective"}, r"loss\.class_weights=effective"),
        ({"dro": {"groups": "action"}}, r"loss\.dro\.groups=action"),
    ],
)
def test_tasks_without_classes_are_named(loss: dict[str, Any], key: str):
    tasks = [{"task": "like", "template": "like/items"}, {"task": "next_item", "template": "next_item/films"}]
    recipe = recipe_of(Path("unused"), tasks=tasks, loss=loss)
    with pytest.raises(UserError, match=rf"{key} goes by the label .* those of the task next_item have none"):
        check_tasks(recipe)
    check_tasks(recipe.model_copy(update={"tasks": [TaskSection.model_validate(tasks[0])]}))
    check_tasks(recipe_of(Path("unused"), tasks=tasks, loss={"dro": {"groups": "user_cluster"}}))


def test_weights_of_rationales_need_a_task_that_has_some():
    loss = {"rationale_weight": 0.5}
    with pytest.raises(UserError, match="no task has a rationale"):
        check_tasks(recipe_of(Path("unused"), loss=loss))
    tasks = [{"task": "next_action", "template": "next_action/events", "rationale": "why"}]
    check_tasks(recipe_of(Path("unused"), loss=loss, tasks=tasks))


def test_examples_without_a_class_are_refused(tiny_tokenizer):
    examples = tokenized([{"answer": "Heat\n", "task": "next_item", "label": None}, *answers("buy")], tiny_tokenizer)
    with pytest.raises(UserError, match="those of the task next_item have none"):
        token_weights(LossSection(class_weights="balanced"), examples)
    section = LossSection(dro=EQUAL)
    with pytest.raises(UserError, match="those of the task next_item have none"):
        action_groups(section, token_weights(section, examples)[0], examples)


# ---- groups ----


def test_groups_are_classes_with_their_share_of_the_weight(tiny_tokenizer):
    """Shares are of tokens: "view" has 4 and its terminator, "buy" 3 and its own."""
    examples = tokenized(answers("view", "buy", "view"), tiny_tokenizer)
    section = LossSection(dro=EQUAL)
    numbers, groups = action_groups(section, token_weights(section, examples)[0], examples)
    assert groups.names == ["next_action/view", "next_action/buy"]
    assert numbers.tolist() == [0, 1, 0]
    assert groups.shares.tolist() == pytest.approx([10 / 14, 4 / 14])


def test_a_single_group_is_refused(tiny_tokenizer):
    examples = tokenized(answers("view", "view"), tiny_tokenizer)
    section = LossSection(dro=EQUAL)
    with pytest.raises(UserError, match="only one group, next_action/view"):
        action_groups(section, token_weights(section, examples)[0], examples)


def test_a_group_none_of_whose_tokens_counts_is_refused(tiny_tokenizer):
    examples = tokenized([{"answer": "buy", "rationale": "cheap"}, {"answer": "view"}], tiny_tokenizer)
    section = LossSection(answer_weight=0, dro=EQUAL)
    with pytest.raises(UserError, match="the group next_action/view counts 0"):
        action_groups(section, token_weights(section, examples)[0], examples)


def test_groups_of_users_are_clusters_of_representations(tiny_tokenizer, monkeypatch):
    examples = tokenized(answers(*["buy"] * 7), tiny_tokenizer)
    section = LossSection(dro=DroSection(groups="user_cluster", clusters=2))
    table = np.array([[0, 0], [10, 10], [0, 1], [10, 11], [0, 0.5], [10, 10], [1, 0]], dtype=np.float32)
    weights = token_weights(section, examples)[0]
    numbers, groups = user_groups(section, weights, examples, table, seed=0)
    assert numbers.tolist() == [0, 1, 0, 1, 0, 1, 0]  # the largest cluster first
    assert groups.names == ["cluster_0", "cluster_1"]
    assert groups.shares.tolist() == pytest.approx([4 / 7, 3 / 7])
    assert groups.centres is not None
    np.testing.assert_allclose(groups.centres, [[0.25, 0.375], [10, 31 / 3]])
    centres = groups.centres[::-1].copy()  # of a run that goes on: they are taken as they are
    monkeypatch.setattr(module, "PIECE", 3)
    assert user_groups(section, weights, examples, table, 1, centres)[0].tolist() == [1, 0, 1, 0, 1, 0, 1]
    monkeypatch.setattr(module, "CLUSTER_EXAMPLES", 4)  # centres of a seeded choice
    again = [user_groups(section, weights, examples, table, seed)[1].centres for seed in (2, 2)]
    np.testing.assert_array_equal(*again)
    with pytest.raises(UserError, match="only one group, cluster_0"):
        user_groups(section, weights, examples, np.zeros((7, 2), np.float32), seed=0)
