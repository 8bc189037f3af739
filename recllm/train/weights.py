"""What a token of a completion counts in the loss, where not all count the same.

The recipe's loss section and tokenised examples enter. `TokenWeights` leave: for each example the weight of a token of
its rationale and of every other token, which are those of the section times the weight of the example's class; and,
for group distributionally robust optimisation (dro.py), the group of each example.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from recllm.convert.templates import ACTION_TASKS
from recllm.errors import UserError
from recllm.model.export import assign, cluster
from recllm.recipe import LossSection, Recipe
from recllm.train.collator import TokenizedExamples, Told
from recllm.train.dro import Groups

CLASSED = ("like", *ACTION_TASKS)  # tasks whose label is one of a few
CLUSTER_EXAMPLES = 20_000  # the centres of so many representations are as good as those of all
PIECE = 1 << 16  # representations that are told their cluster together
Array = npt.NDArray[Any]


class TokenWeights(NamedTuple):
    """What the tokens of N examples count: each (N,), on one device."""

    rationale_tokens: torch.Tensor  # int64: how many of a completion's tokens, from its first, are its rationale
    rationale: torch.Tensor  # float32: what each of them counts
    answer: torch.Tensor  # float32: what each other token of the completion counts
    groups: torch.Tensor | None = None  # int64

    def of(self, rows: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Weights (M,) of tokens, float32: of example `rows` (M,), at `places` (M,) of its completion."""
        inside = places < self.rationale_tokens[rows]
        return torch.where(inside, self.rationale[rows], self.answer[rows])

    def sums(self, rows: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Summed weight (M,) of the first `tokens` (M,) of the completions of examples `rows` (M,), float64."""
        inside = torch.minimum(self.rationale_tokens[rows], tokens)
        return inside * self.rationale[rows].double() + (tokens - inside) * self.answer[rows].double()

    def to(self, device: torch.device | str) -> "TokenWeights":
        """The same on another device."""
        return TokenWeights(*(None if part is None else part.to(device) for part in self))  # type: ignore[arg-type]


def weighs(section: LossSection) -> bool:
    """Whether the section asks for more than the plain mean over all tokens."""
    alike = section.rationale_weight == section.answer_weight
    return not alike or section.class_weights != "none" or section.dro is not None


def needs_classes(section: LossSection) -> str | None:
    """The key of the section that needs a class for every example, None where none does."""
    if section.class_weights != "none":
        return f"class_weights={section.class_weights}"
    return "dro.groups=action" if section.dro is not None and section.dro.groups == "action" else None


def check_tasks(recipe: Recipe) -> None:
    """Refuse a loss that the recipe's tasks cannot have.

    Raises:
        UserError: classes are asked for, and a task has none; rationales are to count otherwise, and no task has any.
    """
    key, section = needs_classes(recipe.loss), recipe.loss
    if key is not None and (without := [task.task for task in recipe.tasks if task.task not in CLASSED]):
        raise _no_classes(key, without[0])
    alike = section.rationale_weight == section.answer_weight
    if not alike and not any(task.rationale for task in recipe.tasks):
        raise UserError(
            f"loss.rationale_weight={section.rationale_weight:g} and loss.answer_weight={section.answer_weight:g}, but "
            "no task has a rationale: set tasks.….rationale, or leave the weights out"
        )


def _no_classes(key: str, task: str) -> UserError:
    return UserError(
        f"loss.{key} goes by the label of an example, and those of the task {task} have none of a few: it is for the "
        f"tasks {', '.join(CLASSED)}; take that task out, or for dro set groups=user_cluster"
    )


# ---- classes ----


def class_weights(counts: Array, section: LossSection) -> Array:
    """Weights of C classes with `counts` (C,) examples each, so that an example weighs 1 on average.

    balanced: N / (C · n_c). effective: (1 - β) / (1 - β^n_c), the inverse of the effective number of examples (Cui et
    al., "Class-Balanced Loss Based on Effective Number of Samples", CVPR 2019, equation 2), then scaled.

    >>> class_weights(np.array([1, 3]), LossSection(class_weights="balanced")).tolist()  # 4 / (2 · 1), 4 / (2 · 3)
    [2.0, 0.6666666666666666]
    """
    counts = np.asarray(counts, dtype=np.float64)
    if section.class_weights == "none":
        return np.ones(len(counts))
    if section.class_weights == "balanced":
        return counts.sum() / (len(counts) * counts)
    beta = section.class_beta
    weights = (1 - beta) / -np.expm1(counts * np.log(beta))  # expm1: 1 - β^n of a β next to 1 keeps its digits
    return weights * counts.sum() / (weights * counts).sum()


def weights_by_class(told: Told, section: LossSection) -> dict[str, float]:
    """Class → its weight, over the training examples of its task; a class is called "task/label".

    Raises:
        UserError: a task whose examples have no class.
    """
    names, counts = class_names(told, f"class_weights={section.class_weights}"), _counts(told)
    tasks = np.array([task for task, _ in told.kinds])
    found = np.empty(len(names))
    for task in np.unique(tasks):
        own = tasks == task
        found[own] = class_weights(counts[own], section)
    return dict(zip(names, found.tolist()))


def class_names(told: Told, key: str) -> list[str]:
    """Name of each kind, "task/label"; `key` is what asks for classes.

    Raises:
        UserError: a task whose examples have no class.
    """
    if without := [task for task, label in told.kinds if label is None or task not in CLASSED]:
        raise _no_classes(key, without[0])
    return [f"{task}/{label}" for task, label in told.kinds]


def _counts(told: Told) -> Array:
    return np.bincount(told.kind_numbers, minlength=len(told.kinds))


# ---- weights ----


def token_weights(section: LossSection, examples: TokenizedExamples) -> tuple[TokenWeights, dict[str, float]]:
    """Weights of the examples' tokens, without groups, and those of the classes; none without class_weights.

    Raises:
        UserError: no token counts at all, or as `weights_by_class`.
    """
    told = _told(examples)
    by_class, of_example = dict[str, float](), np.ones(len(examples))
    if section.class_weights != "none":
        by_class = weights_by_class(told, section)
        of_example = np.array(list(by_class.values()))[told.kind_numbers]
    parts = (section.rationale_weight * of_example, section.answer_weight * of_example)
    weights = TokenWeights(
        torch.from_numpy(told.rationale_tokens.copy()), *(torch.from_numpy(part).float() for part in parts)
    )
    if not float(_example_sums(weights, examples).sum()):
        raise UserError(
            f"loss.rationale_weight={section.rationale_weight:g} and loss.answer_weight={section.answer_weight:g}: no "
            "token of the training examples counts, so nothing would be learnt: no example has a rationale"
        )
    return weights, by_class


def _told(examples: TokenizedExamples) -> Told:
    if examples.told is None:
        raise ValueError("the examples were tokenised without the columns WEIGHED, which say what they are")
    return examples.told


def _example_sums(weights: TokenWeights, examples: TokenizedExamples) -> torch.Tensor:
    """Summed weight of each example's completion, (N,)."""
    return weights.sums(torch.arange(len(examples)), torch.from_numpy(examples.completion_tokens.copy()))


# ---- groups ----


def action_groups(section: LossSection, weights: TokenWeights, examples: TokenizedExamples) -> tuple[Array, Groups]:
    """The group of each example (N,) by its class, and the groups.

    Raises:
        UserError: a task without classes; fewer than two classes; a class none of whose tokens counts.
    """
    told = _told(examples)
    numbers = told.kind_numbers.astype(np.int64)
    return numbers, _groups(section, class_names(told, "dro.groups=action"), numbers, weights, examples)


def user_groups(
    section: LossSection,
    weights: TokenWeights,
    examples: TokenizedExamples,
    representations: Array,
    seed: int,
    centres: Array | None = None,
) -> tuple[Array, Groups]:
    """The group of each example (N,) by what the sequence encoder says of its history, and the groups.

    Args:
        section: says how many clusters; there are fewer where fewer representations differ.
        weights: of the examples' tokens.
        examples: N of them.
        representations: (N, D), of the first process; the others take what it finds.
        seed: of k-means, and of the choice of CLUSTER_EXAMPLES.
        centres: (G, D) of a run that goes on; None: they are found now.

    Raises:
        UserError: fewer than two clusters; a cluster none of whose tokens counts.
    """
    assert section.dro is not None
    shared: list[Any] = [None]
    if PartialState().is_main_process:
        if centres is None:
            centres = _centres(representations, section.dro.clusters, seed)
        pieces = [representations[start : start + PIECE] for start in range(0, len(representations), PIECE)]
        shared = [(centres, np.concatenate([assign(np.asarray(piece, np.float64), centres) for piece in pieces]))]
    centres, numbers = broadcast_object_list(shared)[0]
    assert centres is not None
    names = [f"cluster_{number}" for number in range(len(centres))]
    return numbers, _groups(section, names, numbers, weights, examples)._replace(centres=centres)


def _centres(representations: Array, clusters: int, seed: int) -> Array:
    chosen = np.arange(len(representations))
    if len(chosen) > CLUSTER_EXAMPLES:
        chosen = np.sort(np.random.default_rng([seed, 0]).choice(chosen, CLUSTER_EXAMPLES, replace=False))
    return cluster(np.asarray(representations[chosen], dtype=np.float64), clusters, seed)[0]


def _groups(
    section: LossSection, names: list[str], numbers: Array, weights: TokenWeights, examples: TokenizedExamples
) -> Groups:
    assert section.dro is not None
    sums = np.bincount(numbers, weights=_example_sums(weights, examples).numpy(), minlength=len(names))
    if len(names) < 2 or not sums.all():
        found = f"only one group, {names[0]}" if len(names) < 2 else f"the group {names[int(sums.argmin())]} counts 0"
        raise UserError(
            f"loss.dro.groups={section.dro.groups}: of the training examples {found}: two groups or more, each with "
            "tokens that count, are expected: leave loss.dro out"
        )
    return Groups(names, sums / sums.sum())
