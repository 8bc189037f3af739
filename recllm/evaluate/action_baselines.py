"""Baselines of the tasks about actions: what every report sets beside the model.

A log of events and what was asked in training enter; a `Baseline` leaves, a function from questions to probabilities of
the classes (N, C). Fitted on what convert makes training examples of, and on all of it (`max_train_targets` cuts the
language model's share, not theirs); what is seen of a question lies before its position. Imports without torch.

C classes: actions, or yes and no of outcome. n questions of training, N of those asked.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from recllm import schema
from recllm.convert.targets import Groups, Sequences, find_outcomes, find_targets
from recllm.data.dataset import Dataset
from recllm.errors import UserError
from recllm.evaluate.baselines import Examples, load_fitted
from recllm.recipe import TaskSection

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

LAST_ACTIONS = 3  # that boosted trees see one by one
MAX_CATEGORIES = 255  # of a column of boosted trees: scikit-learn's bins; a column with more counts as numbers
MAX_TREE_QUESTIONS = 200_000  # of training that boosted trees are fitted on, chosen by seed
TREE_ROUNDS, FEW_TREE_ROUNDS = 300, 60  # at most, with early stopping; of data that is too small for it
MIN_TO_STOP_EARLY, MIN_OF_CLASS = 2000, 20
FLOOR = 1e-6  # of a probability of boosted trees


class Log(NamedTuple):
    """An event log as flat arrays. P positions."""

    sequences: Sequences
    actions: Integers  # (P,) numbers of the actions
    labels: list[str]  # of the actions
    observed: Mapping[str, Integers] = {}  # by attribute that is known before the action: (P,) its value, -1 where none

    @classmethod
    def of(cls, dataset: Dataset) -> "Log":
        """Of an event dataset."""
        found, labels = dataset.sequences, list(dataset.actions)
        numbers = np.asarray(found.actions, np.int64)
        users = np.arange(found.num_users, dtype=np.int32)
        sequences = Sequences(
            offsets=found.offsets,
            items=np.asarray(found.items),
            timestamps=np.asarray(found.timestamps),
            splits=np.asarray(found.splits),
            actions=pa.DictionaryArray.from_arrays(pa.array(found.actions), pa.array(labels, pa.string())),
            user_index=users,
            user_key=found.user_keys,
            user_id=pa.nulls(len(users), pa.string()),
            sessions=np.asarray(found.sessions),
        )
        return cls(sequences, numbers, labels, _observed(dataset))


def _observed(dataset: Dataset) -> dict[str, Integers]:
    """Of each attribute in actions.observed the value at every position (P,), as `categories` numbers them."""
    section = dataset.manifest.get("recipe", {}).get("actions") or {}
    in_training = dataset.sequences.splits == schema.TRAIN
    return {
        name: categories(dataset.attribute_batches(name), in_training) for name in list(section.get("observed") or [])
    }


def categories(batches: Iterable[pa.StringArray], in_training: npt.NDArray[np.bool_]) -> Integers:
    """Texts (P,), in batches, as numbers: those that are most frequent in training, 0 the most frequent; blank are -1.

    MAX_CATEGORIES at most; if there are more, the last number stands for all rarer ones together, and for what
    training does not have. Of equally frequent ones the first in the log comes first.

    Texts may be long, so that of each no more is kept than 8 bytes, a hash. Two that share one would count as the same;
    that any do among a hundred million different ones has a chance of 3 in 10,000.

    >>> categories([pa.array(["b", "a", ""]), pa.array(["b", "c"])], np.array([True, True, True, True, False])).tolist()
    [0, 1, -1, 0, 2]
    """
    hashed = np.zeros(len(in_training), np.uint64)
    blank = np.ones(len(in_training), bool)
    begin = 0
    for batch in batches:
        texts = pl.Series(batch)
        end = begin + len(texts)
        hashed[begin:end] = texts.hash(seed=0).to_numpy()
        blank[begin:end] = texts.fill_null("").str.len_bytes().to_numpy() == 0
        begin = end
    if begin != len(in_training):
        raise ValueError(f"{begin} texts of {len(in_training)} positions: one of each is expected")
    known = np.flatnonzero(in_training & ~blank)
    kinds, first, counts = np.unique(hashed[known], return_index=True, return_counts=True)
    kept = np.lexsort((first, -counts))[: MAX_CATEGORIES - 1]
    ascending = np.argsort(kinds[kept])
    if not len(kept):
        return np.where(blank, -1, 0)
    place = np.minimum(np.searchsorted(kinds[kept][ascending], hashed), len(kept) - 1)
    is_kept = kinds[kept][ascending][place] == hashed
    return np.asarray(np.where(blank, -1, np.where(is_kept, ascending[place], len(kept))))


class Asked(NamedTuple):
    """Questions, each about the event at a flat position, or what follows from there: earlier events may be seen."""

    flat: Integers  # (N,)
    user: Integers  # (N,)

    @classmethod
    def of(cls, log: Log, examples: Examples) -> "Asked":
        """Of the examples of a dataset."""
        user = examples.user_index.astype(np.int64)
        return cls(log.sequences.offsets[user] + examples.history_end, user)


class Training(NamedTuple):
    """Questions of training with their answers."""

    asked: Asked  # n
    label: Integers  # (n,)
    classes: int  # C


Baseline = Callable[[Asked], Floats]  # N questions → (N, C)


def training_of(log: Log, section: TaskSection, labels: Sequence[str]) -> Training:
    """What a task asks in training, by convert's own rules; `labels` (C,) are its classes."""
    sequences, code = log.sequences, schema.SPLIT_CODES["train"]
    if section.task == "outcome":
        found = find_outcomes(sequences, code, section.positive, section.after)
        assert found.yes is not None
        label = np.where(found.yes, labels.index("yes"), labels.index("no"))
    else:
        on_item = section.task == "action_on_item"
        within = section.within_session or not on_item
        found = find_targets(sequences, code, needs_item=on_item, within_session=within)
        label = log.actions[sequences.offsets[found.row] + found.start]
    asked = Asked(sequences.offsets[found.row] + found.start, found.row.astype(np.int64))
    return Training(asked, label.astype(np.int64), len(labels))


# ---- counting ----


def frequencies(training: Training) -> Floats:
    """(C,): (n_c + 1) / (n + C), by the rule of succession, so that nothing is impossible (Laplace 1814)."""
    counts = np.bincount(training.label, minlength=training.classes)
    return np.asarray((counts + 1) / (counts.sum() + training.classes))


def constant(training: Training) -> Baseline:
    """The most frequent answer of training, for everybody; its probabilities are the shares of training."""
    share = frequencies(training)
    return lambda asked: np.tile(share, (len(asked.flat), 1))


def most_frequent_of(group: Callable[[Asked], Integers], training: Training) -> Baseline:
    """Each group's most frequent answer of training: P(c) = (n_gc + share_c) / (n_g + 1), shares as of `constant`.

    Among equally frequent answers, and of groups that training does not know, the answer that is more frequent overall
    is the likelier one, as a share is less than one count.
    """
    share, groups = frequencies(training), group(training.asked)
    size = int(groups.max(initial=-1)) + 1
    counts = np.zeros((size + 1, training.classes))  # the last row is of groups that are not known
    np.add.at(counts, (groups, training.label), 1)

    def predict(asked: Asked) -> Floats:
        found = counts[np.where(group(asked) < size, group(asked), size)]
        return np.asarray((found + share) / (found.sum(axis=1, keepdims=True) + 1))

    return predict


def of_user(asked: Asked) -> Integers:
    """The user of each question (N,)."""
    return asked.user


def of_item(log: Log) -> Callable[[Asked], Integers]:
    """The item of each question (N,)."""
    return lambda asked: log.sequences.items[asked.flat].astype(np.int64)


# ---- the event before ----


def last_actions(log: Log, asked: Asked, groups: Groups, back: int = 1) -> Integers:
    """The action of the `back`-th event before in the same group, (N,); -1 where there is none."""
    place = groups.place[asked.flat] - back
    known = place >= groups.begin[asked.flat]
    return np.where(known, log.actions[groups.order[np.maximum(place, 0)]], -1)


def action_before(log: Log, asked: Asked, section: TaskSection) -> Integers:
    """The action that the one asked about follows, (N,), of the events before that the task goes by; -1 at the first.

    The events of the session. Of action_on_item those with an item, as its prompts list them: an action that never has
    an item is no answer to it. They are the user's, across sessions, unless the task asks within sessions; where a log
    has no sessions a user is one.
    """
    sequences, on_item = log.sequences, section.task == "action_on_item"
    groups = sequences.by_session if section.within_session or not on_item else sequences.by_user
    counted = sequences.has_item if on_item else np.ones(len(log.actions), dtype=bool)
    offsets, flat = groups.last(asked.flat, counted, 1)
    found = np.full(len(asked.flat), -1)
    found[np.diff(offsets) > 0] = log.actions[flat]
    return found


def last_action(log: Log, training: Training, section: TaskSection) -> Baseline:
    """The last action again, `action_before`. Its ones and zeros are no probabilities; first events get `constant`."""
    share = frequencies(training)

    def predict(asked: Asked) -> Floats:
        last = action_before(log, asked, section)
        return np.where((last >= 0)[:, None], np.eye(training.classes)[last], share)

    return predict


def markov(log: Log, training: Training, section: TaskSection) -> Baseline:
    """A first-order Markov chain: P(c | a) = (n_ac + share_c) / (n_a + 1), a as of `action_before`.

    Steps into what training asks about are counted, n_ac; the first events, which follow nothing, have a row too.
    """
    last = action_before(log, training.asked, section)
    share = frequencies(training)
    counts = np.zeros((len(log.labels) + 1, training.classes))  # the last row, -1, is of first events
    np.add.at(counts, (last, training.label), 1)
    table = (counts + share) / (counts.sum(axis=1, keepdims=True) + 1)
    return lambda asked: np.asarray(table[action_before(log, asked, section)])


def markov_outcome(log: Log, positive: Sequence[str], yes: int) -> Baseline:
    """The chain run until a positive action or the end of the session: which comes first? (N, 2), column `yes` is yes.

    With P the smoothed transitions between actions and to the end, of sessions that lie in training as a whole, the
    probabilities h of reaching a positive action solve h = Q h + r (Kemeny & Snell 1960, §3.3): Q is P between actions
    that are not positive, r the step to a positive one. What is asked about is known to go on, as shorter sessions are
    not asked about: from the last action a it is Σ_j P(a → j) h_j / (1 − P(a → end)), with h = 1 of positive actions.
    """
    sequences, end = log.sequences, len(log.labels)
    counts = _steps(log)
    share = (counts.sum(axis=0) + 1) / (counts.sum() + end + 1)
    step = (counts + share) / (counts.sum(axis=1, keepdims=True) + 1)  # (A, A + 1), the last column is the end
    good = np.isin(log.labels, list(positive))
    reach = np.ones(end)
    between = step[:, :end][np.ix_(~good, ~good)]
    reach[~good] = np.linalg.solve(np.eye(len(between)) - between, step[:, :end][np.ix_(~good, good)].sum(axis=1))

    going_on = step[:, :end] @ reach / step[:, :end].sum(axis=1)

    def predict(asked: Asked) -> Floats:
        chance = going_on[last_actions(log, asked, sequences.by_session)]
        columns = (chance, 1 - chance) if yes == 0 else (1 - chance, chance)
        return np.stack(columns, axis=1)

    return predict


def _steps(log: Log) -> Floats:
    """(A, A + 1): steps from action to action of training, and to the end of a session; whole sessions of training."""
    sequences, groups = log.sequences, log.sequences.by_session
    train = (sequences.splits == schema.TRAIN)[groups.order]  # in the order of sessions
    begin, end = groups.begin[groups.order], groups.end[groups.order]
    inside = np.concatenate([[0], np.cumsum(train)])
    whole = inside[end] - inside[begin] == end - begin
    place, action = np.arange(len(end)), log.actions[groups.order]
    following = np.where(place + 1 < end, action[np.minimum(place + 1, len(place) - 1)], len(log.labels))
    counts = np.zeros((len(log.labels), len(log.labels) + 1))
    np.add.at(counts, (action[whole], following[whole]), 1)
    return counts


# ---- boosted trees ----


def features(log: Log, asked: Asked, within_session: bool) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """What boosted trees see of questions (N, F), and which columns are categories (F,); NaN where there is nothing.

    Of the events before in the session (of the user, where it is not asked within sessions): the count of each action,
    the last three actions, their number, seconds between the last two and on average, the hour (UTC) of the last one;
    and the number of all events of the user before. Of the event that is asked about what `log.observed` says, which is
    known before its action. Of nothing newer.
    """
    sequences = log.sequences
    groups = sequences.by_session if within_session else sequences.by_user
    place, begin = groups.place[asked.flat], groups.begin[asked.flat]
    number = place - begin
    counts = _counts(log.actions[groups.order], len(log.labels), begin, place)
    last = [last_actions(log, asked, groups, back) for back in range(1, LAST_ACTIONS + 1)]
    time = sequences.timestamps[groups.order]
    newest, before = time[np.maximum(place - 1, 0)], time[np.maximum(place - 2, 0)]
    pause = np.where(number >= 2, newest - before, np.nan)
    mean_pause = np.where(number >= 2, (newest - time[begin]) / np.maximum(number - 1, 1), np.nan)
    hour = np.where(number >= 1, newest // 3600 % 24, np.nan)
    position = asked.flat - sequences.offsets[asked.user]
    plain = [number, pause, mean_pause, hour, position]
    seen = [column[asked.flat] for column in log.observed.values()]
    shown = [np.where(one >= 0, one, np.nan) for one in (*last, *seen)]
    columns = [counts, *(one[:, None] for one in (*shown[:LAST_ACTIONS], *plain, *shown[LAST_ACTIONS:]))]
    few = len(log.labels) <= MAX_CATEGORIES  # otherwise the actions' numbers, in the order of the recipe
    are_categories = [False] * counts.shape[1] + [few] * LAST_ACTIONS + [False] * len(plain) + [True] * len(seen)
    return np.concatenate(columns, axis=1), np.array(are_categories)


def item_features(log: Log, asked: Asked) -> Floats:
    """How often each action was done on the item of a question in training before it, (N, A)."""
    sequences = log.sequences
    items, times = sequences.items.astype(np.int64), sequences.timestamps
    _, moment = np.unique(times, return_inverse=True)
    key = items * (int(moment.max(initial=0)) + 1) + moment  # by item, then by time
    known = np.flatnonzero((sequences.splits == schema.TRAIN) & sequences.has_item)
    known = known[np.argsort(key[known], kind="stable")]
    own, first = key[asked.flat], items[asked.flat] * (int(moment.max(initial=0)) + 1)
    begin, end = (np.searchsorted(key[known], edge, side="left") for edge in (first, own))
    return _counts(log.actions[known], len(log.labels), begin, end)


def _counts(actions: Integers, classes: int, begin: Integers, end: Integers) -> Floats:
    """How often each action stands in actions[begin:end], (N, A), for each pair of begin and end (N,)."""
    found = np.empty((len(begin), classes))
    for action in range(classes):  # one at a time: a table of all positions and actions may not fit the memory
        before = np.concatenate([[0], np.cumsum(actions == action)])
        found[:, action] = before[end] - before[begin]
    return found


def boosted_trees(log: Log, training: Training, section: TaskSection, seed: int) -> Baseline:
    """Gradient-boosted trees on session features (Friedman 2001; scikit-learn's HistGradientBoostingClassifier).

    Fitted on MAX_TREE_QUESTIONS of training at most, chosen by seed. A tenth of these decides when to stop, where there
    are MIN_TO_STOP_EARLY and MIN_OF_CLASS of each class; otherwise FEW_TREE_ROUNDS are made. A class that training does
    not have gets FLOOR; with fewer than two classes the baseline is `constant`.

    Raises:
        UserError: scikit-learn is not installed.
    """
    try:
        from sklearn.ensemble import HistGradientBoostingClassifier
    except ImportError:
        raise UserError(
            'evaluate.action_baselines: boosted_trees needs scikit-learn, run `pip install "recllm[actions]"` or take '
            "it out"
        ) from None
    on_item = section.task == "action_on_item"
    within = section.within_session or not on_item

    def seen(asked: Asked) -> tuple[Floats, npt.NDArray[np.bool_]]:
        found, are_categories = features(log, asked, within)
        if not on_item:
            return found, are_categories
        of_items = item_features(log, asked)
        return np.concatenate([found, of_items], axis=1), np.append(are_categories, [False] * of_items.shape[1])

    rows = np.arange(len(training.label))
    if len(rows) > MAX_TREE_QUESTIONS:
        rows = np.sort(np.random.default_rng(seed).choice(rows, MAX_TREE_QUESTIONS, replace=False))
    label, counts = training.label[rows], np.bincount(training.label[rows], minlength=training.classes)
    if (counts > 0).sum() < 2:
        return constant(training)
    table, are_categories = seen(Asked(training.asked.flat[rows], training.asked.user[rows]))
    kept = ~np.isnan(table).all(axis=0)  # scikit-learn fails on a column without a value: pauses of sessions of two
    stops = len(rows) >= MIN_TO_STOP_EARLY and counts[counts > 0].min() >= MIN_OF_CLASS
    model = HistGradientBoostingClassifier(
        max_iter=TREE_ROUNDS if stops else FEW_TREE_ROUNDS,
        early_stopping=bool(stops),
        categorical_features=are_categories[kept],
        random_state=seed,
    ).fit(table[:, kept], label)

    def predict(asked: Asked) -> Floats:
        found = np.full((len(asked.flat), training.classes), FLOOR)
        if len(found):
            found[:, model.classes_] = np.maximum(model.predict_proba(seen(asked)[0][:, kept]), FLOOR)
        return np.asarray(found / found.sum(axis=1, keepdims=True))

    return predict


# ---- the sequence encoder ----


def sequence_encoder(dataset: Dataset, encoder_folder: Path, log: Log, batch_size: int = 256) -> tuple[str, Baseline]:
    """The type of the fitted encoder, and its probabilities of the next action after all that the user did before.

    Raises:
        UserError: an encoder of another vocabulary, or one that reads items alone.
    """
    import torch

    from recllm.model.sequence_encoder import encode_histories

    encoder = load_fitted(dataset, encoder_folder)
    if not encoder.num_actions:
        raise UserError(f"{encoder_folder} holds an encoder without actions: fit it on {dataset.folder}")

    @torch.inference_mode()
    def predict(asked: Asked) -> Floats:
        ends = asked.flat - log.sequences.offsets[asked.user]
        histories = [dataset.read(int(u), int(e), encoder.max_items) for u, e in zip(asked.user, ends)]
        states = encode_histories(encoder, histories, batch_size).to(encoder.device)
        return np.asarray(encoder.action_scores(states).double().softmax(dim=-1).cpu().numpy())

    return encoder.type, predict
