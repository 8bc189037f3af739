"""Baselines: what every report sets beside the model, on the same frozen candidates.

A dataset enters, and for the sequence encoder its folder. A `Scorer` leaves: examples → a score for every item of
the catalogue, from which candidates are read off and the full catalogue is ranked. Only training interactions are
counted (`training_interactions`); the history before the cut-off of an example is given to all alike.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from scipy import sparse

from recllm.data.dataset import Dataset
from recllm.data.randomness import mix, text_keys, uniform
from recllm.errors import UserError
from recllm.evaluate import metrics
from recllm.schema import NO_ITEM, TRAIN

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

WINDOW = 10  # item_to_item: steps between two items of a pair, and items of the history that are looked at
_CHUNK = 16_000_000  # entries of a score matrix held at once: 128 MB


class Examples(NamedTuple):
    """What a baseline may see of examples: never the target."""

    example_ids: list[str]
    user_index: npt.NDArray[np.int32]  # (N,)
    history_end: npt.NDArray[np.int32]  # (N,) baselines read everything before it
    gate_end: npt.NDArray[np.int32]  # (N,) gates and soft tokens do before this

    @classmethod
    def of(cls, table: pa.Table) -> "Examples":
        """From a table of schema.EXAMPLES."""
        columns = (table[name].to_numpy().astype(np.int32) for name in ("user_index", "history_end", "gate_end"))
        return cls(table["example_id"].to_pylist(), *columns)

    def part(self, rows: slice) -> "Examples":
        """Some consecutive examples."""
        return Examples(self.example_ids[rows], self.user_index[rows], self.history_end[rows], self.gate_end[rows])


Scorer = Callable[[Examples], Floats]  # (B examples) → (B, num_items)


def training_interactions(dataset: Dataset) -> npt.NDArray[np.bool_]:
    """Which positions of the sequences (P,) are training's: those that the split calls TRAIN, and no others.

    An unused position may belong to a held-out session or follow one: that is not training, whatever the split.
    """
    return np.asarray(dataset.sequences.splits) == TRAIN


def item_counts(dataset: Dataset) -> Integers:
    """How often each item occurs in training, (num_items,)."""
    items = np.asarray(dataset.sequences.items)[training_interactions(dataset)]
    return np.bincount(items[items != NO_ITEM], minlength=dataset.num_items).astype(np.int64)


def random(dataset: Dataset, seed: int) -> Scorer:
    """Uniform numbers, each a function of (seed, example, item): neither row order nor batching changes them."""
    items = np.arange(dataset.num_items)

    def score(examples: Examples) -> Floats:
        return uniform(mix(seed, text_keys(examples.example_ids)[:, None], items[None, :]))

    return score


def popularity(dataset: Dataset) -> Scorer:
    """score(i) = number of training interactions with i, the same for everybody."""
    counts = item_counts(dataset).astype(np.float64)
    return lambda examples: np.broadcast_to(counts, (len(examples.example_ids), len(counts)))


def item_to_item(dataset: Dataset, window: int = WINDOW) -> Scorer:
    """Item-to-item transitions with decay: sequential rules (Ludewig & Jannach 2018, "SR"), weighted by rarity.

        T(i, j)  = Σ over training pairs (i, then j, d ≤ window steps later, j ≠ i) of 1 / d
        score(j) = Σ_{n=1..window} 1 / n · T(h_n, j) / √(count(h_n) · count(j))  +  ε · count(j) / Σ count

    with h_n the n-th newest item of the history and counts of training. The root is the cosine's: without it the most
    popular items follow everything. ε = 1e-6 lets popularity order only what no transition reaches.
    """
    counts = item_counts(dataset).astype(np.float64)
    transitions = _transitions(dataset, window)
    scale = 1 / np.sqrt(np.maximum(counts, 1))
    cosine = sparse.diags_array(scale) @ transitions @ sparse.diags_array(scale)
    prior = 1e-6 * counts / max(1.0, counts.sum())

    def score(examples: Examples) -> Floats:
        recent = [_history(dataset, u, e, window) for u, e in zip(examples.user_index, examples.history_end)]
        rows = np.repeat(np.arange(len(recent)), [len(items) for items in recent])
        weights = np.concatenate([1 / np.arange(len(items), 0, -1) for items in recent] or [np.empty(0)])
        columns = np.concatenate([*recent, np.empty(0, np.int32)]).astype(np.int64)
        weighted = sparse.csr_array((weights, (rows, columns)), shape=(len(recent), dataset.num_items))
        return np.asarray((weighted @ cosine).toarray() + prior)

    return score


def sequence_encoder(dataset: Dataset, encoder_folder: Path, batch_size: int = 256) -> tuple[str, Scorer]:
    """The type of the fitted sequence encoder (sasrec, gru4rec, content) and its scores of the whole catalogue.

    It reads the last `max_items` of the history.

    Raises:
        UserError: an encoder of another item vocabulary.
    """
    import torch

    from recllm.model.sequence_encoder import encode_histories

    encoder = load_fitted(dataset, encoder_folder)

    @torch.inference_mode()
    def score(examples: Examples) -> Floats:
        pairs = zip(examples.user_index, examples.history_end)
        histories = [dataset.read(int(user), int(end), encoder.max_items) for user, end in pairs]
        states = encode_histories(encoder, histories, batch_size).to(encoder.device)
        return np.asarray(encoder.scores(states).double().cpu().numpy())

    return encoder.type, score


def load_fitted(dataset: Dataset, encoder_folder: Path) -> Any:
    """The fitted encoder in eval mode, on the GPU where there is one; it must be of this dataset's vocabulary.

    Raises:
        UserError: an encoder of another vocabulary.
    """
    import torch

    from recllm.model.sequence_encoder import load_encoder

    encoder, info = load_encoder(encoder_folder)
    if info["vocabulary_sha256"] != dataset.vocabulary_sha256:
        raise UserError(
            f"{encoder_folder} was fitted on the vocabulary {str(info['vocabulary_sha256'])[:12]}…, "
            f"{dataset.folder} has {dataset.vocabulary_sha256[:12]}…: fit it again on this dataset (`recllm train`)"
        )
    return encoder.to(torch.device("cuda" if torch.cuda.is_available() else "cpu")).eval()


def score_examples(
    score: Scorer,
    dataset: Dataset,
    examples: Examples,
    candidates: Integers,
    target: Integers,
    full_catalogue: bool,
    exclude_history: bool,
    top: int = 0,
) -> tuple[Floats, Integers | None, Integers | None]:
    """Scores of frozen candidates (N, C), the rank (N,) of each target among all items where `full_catalogue`, and the
    first `top` items of all (N, top) where that is not 0, NO_ITEM behind the last.

    Chunk by chunk, so that an example's catalogue is scored once for all. Ranks are pessimistic; `exclude_history`
    leaves the items of the history unranked, but never the target, also where the user had it before; among the first
    items the target is one like any other.
    """
    scores, ranked = [np.empty((0, candidates.shape[1]))], [np.empty(0, np.int64)]
    firsts = [np.empty((0, top), np.int64)]
    for rows in _chunks(len(examples.example_ids), dataset.num_items):
        part = examples.part(rows)
        table = score(part)  # (B, num_items)
        scores.append(np.take_along_axis(table, candidates[rows], axis=1))
        if not full_catalogue and not top:
            continue
        excluded = in_history(dataset, part.user_index, part.history_end) if exclude_history else None
        if full_catalogue:
            ranked.append(metrics.ranks(table, target[rows], excluded))
        if top:
            firsts.append(_first_items(table, np.ones(table.shape, bool) if excluded is None else ~excluded, top))
    return (
        np.concatenate(scores),
        np.concatenate(ranked) if full_catalogue else None,
        np.concatenate(firsts) if top else None,
    )


def best_items(
    score: Scorer, dataset: Dataset, examples: Examples, allowed: npt.NDArray[np.bool_], count: int
) -> Integers:
    """(N, count) the items with the highest scores among those allowed (N, num_items), NO_ITEM behind the last.

    Of equal scores the lower item_index comes first.
    """
    found = [np.empty((0, count), np.int64)]
    for rows in _chunks(len(examples.example_ids), dataset.num_items):
        found.append(_first_items(score(examples.part(rows)), allowed[rows], count))
    return np.concatenate(found)


def _first_items(scores: Floats, allowed: npt.NDArray[np.bool_], count: int) -> Integers:
    """(B, count) the allowed items with the highest scores (B, num_items), NO_ITEM behind the last."""
    table = np.where(allowed, scores, -np.inf)
    best = np.argsort(-table, axis=1, kind="stable")[:, :count]
    best = np.where(np.take_along_axis(allowed, best, axis=1), best, NO_ITEM)
    return np.pad(best, ((0, 0), (0, count - best.shape[1])), constant_values=NO_ITEM)


def in_history(
    dataset: Dataset, user_index: npt.NDArray[np.int32], history_end: npt.NDArray[np.int32]
) -> npt.NDArray[np.bool_]:
    """(B, num_items): items that each user (B,) had before the position history_end (B,)."""
    had = np.zeros((len(user_index), dataset.num_items), dtype=bool)
    for line, user, end in zip(had, user_index, history_end):
        line[_history(dataset, user, end, int(end))] = True
    return had


def most_frequent_label(labels: Sequence[str], answers: Sequence[str]) -> str:
    """The constant action: the label that occurs most in training; the first of `answers` among equals.

    >>> most_frequent_label(["like", "dislike", "like"], ["like", "dislike"])
    'like'
    """
    return max(answers, key=[*labels].count)


def user_labels(
    labels: Sequence[str], users: Sequence[int], wanted: Sequence[int], answers: Sequence[str]
) -> list[str]:
    """Each wanted user's most frequent training label; the constant action for a user without, or among equals.

    >>> user_labels(["like", "like", "dislike"], [1, 1, 2], [2, 3], ["like", "dislike"])
    ['dislike', 'like']
    """
    constant = most_frequent_label(labels, answers)
    counts = np.zeros((max([*users, *wanted], default=0) + 1, len(answers)), dtype=np.int64)
    places = [answers.index(label) for label in labels]
    np.add.at(counts, (np.asarray(users, dtype=np.int64), np.asarray(places, dtype=np.int64)), 1)
    counts = 2 * counts + (np.asarray(answers) == constant)  # the constant wins among equals, and nowhere else
    return [answers[int(place)] for place in counts[np.asarray(wanted, dtype=np.int64)].argmax(axis=1)]


def _history(dataset: Dataset, user: int, end: int, max_items: int) -> npt.NDArray[np.int32]:
    return dataset.history(int(user), int(end), max_items)


def _transitions(dataset: Dataset, window: int) -> sparse.csr_array:
    """Σ 1 / d over training pairs that are d ≤ window steps apart, (num_items, num_items)."""
    sequences = dataset.sequences
    read = training_interactions(dataset) & (np.asarray(sequences.items) != NO_ITEM)
    items = np.asarray(sequences.items)[read].astype(np.int64)
    user = np.repeat(np.arange(sequences.num_users), np.diff(sequences.offsets))[read]
    total = sparse.csr_array((dataset.num_items, dataset.num_items))
    for step in range(1, window + 1):
        pairs = (user[:-step] == user[step:]) & (items[:-step] != items[step:])
        before, after = items[:-step][pairs], items[step:][pairs]
        counted = sparse.coo_array((np.ones(len(before)), (before, after)), shape=total.shape)
        total = total + counted.tocsr() / step
    return total


def _chunks(count: int, width: int) -> list[slice]:
    step = max(1, _CHUNK // max(1, width))
    return [slice(start, min(count, start + step)) for start in range(0, count, step)]
