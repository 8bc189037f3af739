"""The converter's heart: a pure function from a batch of user sequences to a batch of examples.

An Arrow RecordBatch of schema.SEQUENCES (with the users' texts as a further column `user` if templates show them, and
of event logs a column for each attribute) and a `Converter` enter; a RecordBatch of schema.EXAMPLES with a further
column `split` leaves. A user's examples depend on this user's row only: any partitioning gives the same examples.
Everything is columnar but the Jinja call itself.
"""

import dataclasses
import functools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from recllm import schema
from recllm.convert.actions import ACTION
from recllm.convert.events import NO, YES, Events
from recllm.convert.knowledge import Ages, Knowledge, Moments, Shown
from recllm.convert.targets import (
    PHRASING_SALT,
    START_SALT,
    WITHOUT_RATIONALE,
    Dates,
    Groups,
    Ints,
    Sequences,
    Targets,
    choose,
    find_dates,
    find_outcomes,
    find_targets,
    ranges,
)
from recllm.convert.templates import ACTION_TASKS, BANK_TASKS, GRAPH_TASKS, RANK_ASSETS, Template, render_rows
from recllm.data.candidates import CandidateSampler, Taken
from recllm.data.prices import DAY_S
from recllm.data.randomness import mix

OUTPUT = schema.EXAMPLES.append(pa.field("split", pa.string(), nullable=False))
GRAPH_SALT = 4  # beside those of targets.py
# Tasks whose subgraph lies around the item that the prompt names, too
AROUND_THE_ASKED = ("like", "action_on_item", "explain")
PIECE = 8192  # examples whose text is in memory at once: about 10 MiB
PIECE_TEXT = 1 << 27  # bytes that attributes of events, which may be whole pages, may add to a piece on average

NONE = {"user": "", "graph": ""}  # the variables where the recipe has no prompt.user, and no graph

Slot = tuple[str, pa.StringArray, npt.NDArray[np.bool_]]  # role, contents (N,), which examples have it (N,)


@dataclasses.dataclass(frozen=True)
class Task:
    """One entry of the recipe's `tasks` with its template. `name` begins the example ids and is unique."""

    name: str
    task: str
    template: Template
    dense_window: int = 0
    max_train_targets: int | None = None
    dense_start: str = "first"
    relations: tuple[str, ...] = ()
    within_session: bool = False  # what the prompt lists is of the target's session
    positive: tuple[str, ...] = ()  # outcome
    after: int = 0  # outcome
    fields: tuple[tuple[str, str], ...] = ()  # next_event: keys of the answer → attribute, or item
    rationale: str | None = None  # attribute

    @functools.cached_property
    def uses(self) -> set[str]:
        """The variables of its template."""
        return self.template.uses(self.dense_window > 0)


@dataclasses.dataclass(frozen=True)
class Converter:
    """All that converting needs beside the sequences; travels to worker processes."""

    tasks: tuple[Task, ...]
    texts: pa.StringArray  # (num_items,) the text of each item
    sampler: CandidateSampler | None  # None: no task has candidates
    prompt_max_items: int
    seed: int
    before_list: bool = False  # history.gate
    knowledge: Knowledge | None = None
    lookback_days: int = 0  # finance, of rank_assets
    events: Events | None = None  # of an event dataset


def convert_batch(batch: pa.RecordBatch, converter: Converter) -> pa.RecordBatch:
    """All examples of the users in `batch`: (sequences) → (examples and their split).

    For engines that map batches (Ray Data, Spark); `iterate_examples` gives the same rows in bounded pieces.
    """
    pieces = [piece for _, _, piece in iterate_examples(batch, converter)]
    return pa.Table.from_batches(pieces, OUTPUT).combine_chunks().to_batches()[0] if pieces else _nothing()


def _nothing() -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays([pa.array([], field.type) for field in OUTPUT], schema=OUTPUT)


def iterate_examples(
    batch: pa.RecordBatch, converter: Converter, tally: Counter[str] | None = None
) -> Iterator[tuple[str, str, pa.RecordBatch]]:
    """(split, task name, at most PIECE of their examples) over splits, tasks and users, in this order.

    `tally` is told what of the graph they show, and why sessions have none: counts by "split/task name/what".
    """
    sequences = Sequences.of(batch)
    taken, lines = _taken(sequences, converter.sampler), _lines(sequences, converter)
    size = _piece_size(sequences, converter.prompt_max_items)
    tally = Counter() if tally is None else tally
    for split in schema.SPLITS:
        for task in converter.tasks:
            targets = targets_of(sequences, task, split, converter)
            tally.update({f"{split}/{task.name}/{why}": count for why, count in targets.left_out.items()})
            for part in targets.pieces(size):
                piece = _Piece.of(sequences, taken, lines, part, task, split, converter)
                told = Counter[str]()
                piece = _answerable(piece, told)
                if len(piece):
                    yield split, task.name, _examples(piece, told)
                tally.update({f"{split}/{task.name}/{what}": count for what, count in told.items()})


def _taken(sequences: Sequences, sampler: CandidateSampler | None) -> Taken:
    """What the users of a batch had, for the candidates."""
    if sampler is None:
        return np.empty(0, np.int64)
    if sequences.has_item.all():
        return sampler.taken(sequences.offsets, sequences.items)
    items = np.concatenate([[0], np.cumsum(sequences.has_item)])
    return sampler.taken(items[sequences.offsets], sequences.items[sequences.has_item])


def _piece_size(sequences: Sequences, shown: int) -> int:
    """How many examples are made together, each of which shows so many events and what is known of one more."""
    text = sum(column.nbytes for column in sequences.attributes.values())
    return max(1, min(PIECE, PIECE_TEXT * len(sequences.items) // max(1, text * (shown + 1))))


def _lines(sequences: Sequences, converter: Converter) -> pa.StringArray | None:
    """(P,) the batch's events as prompts show them, if any does."""
    shown = any(task.task in ACTION_TASKS and task.uses & {"events", "earlier"} for task in converter.tasks)
    return converter.events.lines(sequences, converter.texts) if shown and converter.events is not None else None


def targets_of(sequences: Sequences, task: Task, split: str, converter: Converter) -> Targets:
    """What becomes the examples of a task and split.

    A training prompt that asks for a rationale must be answered with one: where the log has none, the event is left out
    before max_train_targets chooses, and counted. In valid and test such events stay: evaluation has the model write
    its own rationale and scores the answer after it.
    """
    if split != "train" or task.rationale is None:
        return _found(sequences, task, split, task.max_train_targets, converter.seed)
    found = _found(sequences, task, split, None, converter.seed)
    texts = _rationales(sequences, task, converter, sequences.offsets[found.row] + found.start)
    left_out = {**found.left_out, WITHOUT_RATIONALE: texts.null_count}
    found = dataclasses.replace(found.take(texts.is_valid().to_numpy(zero_copy_only=False)), left_out=left_out)
    most = task.max_train_targets
    return found if most is None else choose(found, sequences.user_key, most, converter.seed)


def _found(sequences: Sequences, task: Task, split: str, most: int | None, seed: int) -> Targets:
    code = schema.SPLIT_CODES[split]
    if task.task == "outcome":
        return find_outcomes(sequences, code, task.positive, task.after, most, seed)
    if task.task in BANK_TASKS:
        return find_dates(sequences, task.task, code, most, seed)
    return find_targets(
        sequences,
        code,
        dense_window=task.dense_window,
        needs_action=task.task == "like",
        needs_item=task.task not in ("next_action", "next_event"),
        within_session=task.within_session,
        max_train_targets=most,
        seed=seed,
    )


def draws_candidates(task: Task, split: str) -> bool:
    """Whether the sampler draws candidates of a task and split; those of rank_assets come with its dates."""
    if task.task in ("item_to_attribute", "explain", *BANK_TASKS, *ACTION_TASKS):
        return False
    return split != "train" or task.task == "next_item_among"


@dataclasses.dataclass(frozen=True)
class _Piece:
    """Examples of one task and split that are made together. N is their number."""

    sequences: Sequences
    taken: Taken  # what the batch's users had, for the candidates
    lines: pa.StringArray | None  # (P,) the batch's events, if prompts show them
    targets: Targets
    task: Task
    split: str
    converter: Converter
    window: Ints | None = None  # (N,) the positions at which training windows begin
    asked: "_Asked | None" = None  # of the tasks that the graph or a bank asks

    @classmethod
    def of(
        cls,
        sequences: Sequences,
        taken: Taken,
        lines: pa.StringArray | None,
        targets: Targets,
        task: Task,
        split: str,
        converter: Converter,
    ) -> "_Piece":
        """With the beginnings of training windows, of which the first titles may carry no loss."""
        window = targets.start if task.dense_window and split == "train" else None
        piece = cls(sequences, taken, lines, targets, task, split, converter, window)
        if window is None or task.dense_start != "random":
            return piece
        offsets, flat = piece.learnt
        skipped = (piece.draw(START_SALT) % np.diff(offsets).astype(np.uint64)).astype(np.int64)
        start = flat[offsets[:-1] + skipped] - piece.begin
        return dataclasses.replace(piece, targets=dataclasses.replace(targets, start=start))

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def begin(self) -> Ints:
        """(N,) where the example's user begins in the flat arrays."""
        return self.sequences.offsets[self.targets.row]

    @property
    def end(self) -> Ints:
        """(N,) the flat positions of the targets, of windows their first."""
        return self.begin + self.targets.start

    @functools.cached_property
    def shown(self) -> tuple[Ints, Ints]:
        """Offsets (N + 1,) and flat positions of what prompts list: the last items, of windows those without loss."""
        if self.window is not None:
            return self._titles(self.begin + self.window, self.end, with_last=False)
        most = self.converter.prompt_max_items
        if self.side_by_side:
            return ranges(np.maximum(self.begin, self.end - most), self.end)
        return self.groups.last(self.end, self.sequences.has_item, most)

    @property
    def learnt(self) -> tuple[Ints, Ints]:
        """Offsets (N + 1,) and flat positions of what completions name: the target, of windows all from `start` on."""
        return self._titles(self.end, self.begin + self.targets.stop - 1)

    def _titles(self, first: Ints, last: Ints, with_last: bool = True) -> tuple[Ints, Ints]:
        """Offsets (N + 1,) and flat positions of the items of a group from `first` to `last` (N,)."""
        if self.side_by_side:
            return ranges(first, last + with_last)
        return self.groups.between(first, last, self.sequences.has_item, with_last)

    @property
    def side_by_side(self) -> bool:
        """Whether all positions of a user have items that prompts may show: those of a stretch need no search."""
        return not self.task.within_session and bool(self.sequences.has_item.all())

    @functools.cached_property
    def listed(self) -> Ints:
        """(N,) the position from which the prompt lists items; that of the target where it lists none."""
        offsets, flat = self.shown
        first = np.append(flat, 0)[offsets[:-1]]
        return np.where(np.diff(offsets) > 0, first - self.begin, self.targets.start)

    @property
    def groups(self) -> Groups:
        """What prompts show is of the target's group."""
        return self.sequences.by_session if self.task.within_session else self.sequences.by_user

    def texts(self, flat: Ints) -> pa.StringArray:
        """Item texts at flat positions."""
        return self.converter.texts.take(pa.array(self.sequences.items[flat]))

    @property
    def dated(self) -> tuple[Dates, Ints] | None:
        """Of a bank's tasks the batch's dates, and which of them the examples have (N,)."""
        dates, chosen = self.sequences.dates, self.targets.date
        return None if dates is None or chosen is None else (dates, chosen)

    @property
    def cutoffs(self) -> Ints:
        """(N,) no triple that a prompt shows is of this second or later: the target's time, or the date."""
        if self.dated is not None:
            dates, chosen = self.dated
            return dates.cutoff[chosen]
        return self.sequences.timestamps[self.end]

    @property
    def older(self) -> Ints:
        """(N,) flat positions up to which the users' items are older than the cut-off, ties of the second left out."""
        end = self.end
        return end if self.dated is not None else np.maximum(self.sequences.first_of_second[end], self.begin)

    def moments(self) -> Moments:
        """What the graph starts from: the newest items that are older than the cut-off.

        An explanation starts from what its prompt lists. Where a prompt names the item that it asks about, the subgraph
        lies around that too.
        """
        end, asked = self.older, None
        most = 0 if self.converter.knowledge is None else self.converter.knowledge.section.retrieval.max_items
        first = self.begin
        if self.task.task == "explain":
            first = first + self.listed
        if self.task.task in AROUND_THE_ASKED:
            asked = self.sequences.items[self.end]
        if self.sequences.has_item.all():
            offsets, flat = ranges(np.minimum(np.maximum(first, end - most), end), end)
        else:
            offsets, flat = self.sequences.by_user.last(end, self.sequences.has_item, most)
            kept = flat >= np.repeat(first, np.diff(offsets))
            offsets, flat = np.concatenate([[0], np.cumsum(kept)])[offsets], flat[kept]
        return Moments(offsets, self.sequences.items[flat], self.cutoffs, self.draw(GRAPH_SALT), asked)

    def draw(self, salt: int) -> npt.NDArray[np.uint64]:
        """(N,) random keys of the examples, one set a salt."""
        user_key = self.sequences.user_key[self.targets.row]
        return mix(self.converter.seed, salt, user_key, self.targets.start)


@dataclasses.dataclass(frozen=True)
class _Asked:
    """What the graph or a bank asks in each of N examples."""

    variables: dict[str, list[Any]]  # of the template
    answers: pa.StringArray | None  # None: the target's text
    choices: pa.ListArray | None  # None: the answers are not among given ones
    target: pa.Int32Array | None = None  # of a bank's tasks, null where a list is asked for
    candidates: pa.ListArray | None = None  # of a bank's tasks


def _answerable(piece: _Piece, told: Counter[str]) -> _Piece:
    """Without the examples about which the graph has nothing to ask; they are counted as left out."""
    if piece.dated is not None:
        return dataclasses.replace(piece, asked=_asked_on(piece, *piece.dated))
    if piece.task.task not in GRAPH_TASKS:
        return piece
    knowledge, moments = piece.converter.knowledge, piece.moments()
    assert knowledge is not None  # the pipeline refuses these tasks without a graph
    items = piece.sequences.items[piece.end]
    relations, found, ages = piece.task.relations, list[Any](), Ages()
    if piece.task.task == "item_to_attribute":
        assert piece.converter.sampler is not None  # the pipeline gives one
        found, ages = knowledge.questions(items, moments, relations, piece.converter.sampler.section.count)
    elif piece.task.task == "attribute_to_item":
        found, ages = knowledge.descriptions(items, moments, relations)
    else:
        found, ages = knowledge.explained(moments, items)
    _tell(told, ages)
    kept = np.array([one is not None for one in found], dtype=bool)
    told["left_out"] += int((~kept).sum())
    asked = _asked(piece.task.task, [one for one in found if one is not None])
    return dataclasses.replace(piece, targets=piece.targets.take(kept), asked=asked)


def _asked_on(piece: _Piece, dates: Dates, chosen: Ints) -> _Asked:
    """The date, the window behind it and the newest lines of the ledger before it; of rank_assets the candidates."""
    lines = piece.sequences.ledger
    assert lines is not None  # comes with the dates
    begin = lines.offsets.to_numpy().astype(np.int64)[piece.targets.row]
    offsets, flat = ranges(begin + piece.listed, begin + piece.targets.start)
    variables = {
        "date": np.datetime_as_string(dates.cutoff[chosen].astype("datetime64[s]"), unit="D").tolist(),
        "days": ((dates.window_end[chosen] - dates.cutoff[chosen]) // DAY_S).tolist(),
        "ledger": _joined(lines.values.take(pa.array(flat)), offsets).to_pylist(),
    }
    answers, target, candidates, shown = (
        column.take(pa.array(chosen)) for column in (dates.answer, dates.target, dates.candidates, dates.shown)
    )
    if piece.task.task == RANK_ASSETS:
        variables |= {"candidates": shown.to_pylist(), "num_candidates": candidates.value_lengths().to_pylist()}
        variables["lookback"] = [piece.converter.lookback_days] * len(piece)
    return _Asked(variables, answers, None, target, candidates)


def _asked(task: str, found: list[Any]) -> _Asked:
    if task == "attribute_to_item":
        return _Asked({"attributes": found}, None, None)
    if task == "explain":
        return _Asked({}, pa.array(found, pa.string()), None)
    variables = {
        "relation": [question.relation for question in found],
        "choices": ["\n".join(question.choices) for question in found],
    }
    choices = pa.array([question.choices for question in found], pa.list_(pa.string()))
    return _Asked(variables, pa.array([question.answer for question in found], pa.string()), choices)


def _examples(piece: _Piece, told: Counter[str]) -> pa.RecordBatch:
    sequences, targets, task = piece.sequences, piece.targets, piece.task
    last = piece.begin + targets.stop - 1
    target = sequences.items[last]
    label = _labels(sequences, last) if task.task == "like" else None
    if task.task in ACTION_TASKS:
        label = _action_labels(piece)
    choices, rationale = None, _rationale(piece)
    if rationale is not None:  # in training there is one everywhere: see targets_of
        told[WITHOUT_RATIONALE] += rationale.null_count
    if piece.asked is not None:
        label, choices = piece.asked.answers, piece.asked.choices
    candidates = _candidates(piece, target) if draws_candidates(task, piece.split) else None
    columns = {
        "example_id": _ids(piece),
        "task": _repeat(task.task, len(piece)),
        "user_index": pa.array(sequences.user_index[targets.row]),
        "history_end": pa.array(targets.start.astype(np.int32)),
        "gate_end": pa.array(_gate_ends(piece).astype(np.int32)),
        "timestamp": pa.array(piece.cutoffs),  # of a window its beginning
        "prompt": _prompt(piece, candidates, told),
        "completion": _completion(piece, label, rationale),
        "target": _targets(piece, target) if piece.asked is None or piece.dated is None else piece.asked.target,
        "candidates": _candidate_lists(piece, candidates),
        "label": pa.nulls(len(piece), pa.string()) if label is None else label,
        "choices": pa.nulls(len(piece), pa.list_(pa.string())) if choices is None else choices,
        "relation": _relations(piece),
        "session": _session(piece, last),
        "rationale": pa.nulls(len(piece), pa.string()) if rationale is None else rationale,
        "split": _repeat(piece.split, len(piece)),
    }
    return pa.RecordBatch.from_arrays([columns[name] for name in OUTPUT.names], schema=OUTPUT)


def _relations(piece: _Piece) -> pa.StringArray:
    """(N,) what questions about items ask for; null of other tasks."""
    names = None if piece.asked is None else piece.asked.variables.get("relation")
    return pa.nulls(len(piece), pa.string()) if names is None else pa.array(names, pa.string())


def _gate_ends(piece: _Piece) -> Ints:
    """(N,) where the histories that the gate reads end: at the target, or before the list that the prompt begins."""
    return piece.listed if piece.converter.before_list and piece.task.dense_window else piece.targets.start


def _candidates(piece: _Piece, target: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """(N, count) item indices, the target among them, nothing else of the user's whole sequence.

    Keyed by (candidates.seed, user, position): the tasks of a recipe share the candidates of a position.
    """
    sampler, targets = piece.converter.sampler, piece.targets
    assert sampler is not None  # the pipeline gives one
    keys = mix(sampler.section.seed, piece.sequences.user_key[targets.row], targets.stop - 1)
    return sampler.draw(keys, target, targets.row, piece.taken)


def _ids(piece: _Piece) -> pa.StringArray:
    users = piece.sequences.user_id.take(pa.array(piece.targets.row))
    positions = pa.array(piece.targets.start).cast(pa.string())
    if piece.dated is not None and piece.asked is not None:
        positions = pa.array(piece.asked.variables["date"], pa.string())
    return pc.binary_join_element_wise(piece.task.name, users, positions, "/")


def _repeat(text: str, count: int) -> pa.StringArray:
    return pa.array([text]).take(pa.array(np.zeros(count, np.int32)))


def _candidate_lists(piece: _Piece, drawn: npt.NDArray[np.int32] | None) -> pa.ListArray:
    """(N,) as they were drawn, or as a bank's dates have them; null elsewhere."""
    if piece.asked is not None and piece.asked.candidates is not None:
        return piece.asked.candidates
    return pa.nulls(len(piece), pa.list_(pa.int32())) if drawn is None else _lists(drawn)


def _lists(matrix: npt.NDArray[np.int32]) -> pa.ListArray:
    rows, count = matrix.shape
    return pa.ListArray.from_arrays(pa.array(np.arange(rows + 1, dtype=np.int32) * count), pa.array(matrix.ravel()))


def _labels(sequences: Sequences, flat: Ints) -> pa.StringArray:
    assert sequences.actions is not None  # the pipeline refuses the task like without actions
    return sequences.actions.take(pa.array(flat))


def _joined(texts: pa.StringArray, offsets: Ints) -> pa.StringArray:
    """Consecutive `texts` joined by newline: (sum of lengths,) → (N,)."""
    return pc.binary_join(pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), texts), "\n")


def _prompt(piece: _Piece, candidates: npt.NDArray[np.int32] | None, told: Counter[str]) -> pa.ListArray:
    """Chat messages: (system,) user, and for what continues a dense list the unfinished answer."""
    phrasings, dense = piece.task.template.phrasings, piece.task.dense_window > 0
    choice = (piece.draw(PHRASING_SALT) % np.uint64(len(phrasings))).astype(np.int64)
    shown = piece.shown
    variables = {} if dense else _variables(piece, candidates)
    if piece.sequences.user is not None:
        variables["user"] = piece.sequences.user.take(pa.array(piece.targets.row)).to_pylist()
    variables |= _from_graph(piece, candidates, told)
    constants = _constants(piece)
    users = _render([(p.window if dense else p.user) or "" for p in phrasings], choice, variables, constants)
    slots: list[Slot] = [("user", users, np.ones(len(piece), bool))]
    if any(p.system is not None for p in phrasings):
        systems = _render([p.system or "" for p in phrasings], choice, variables, constants)
        slots.insert(0, ("system", systems, np.array([p.system is not None for p in phrasings])[choice]))
    if dense:
        begun = pc.binary_join_element_wise(_joined(piece.texts(shown[1]), shown[0]), "", "\n")
        slots.append(("assistant", begun, np.diff(shown[0]) > 0))
    return _messages(slots)


def _from_graph(piece: _Piece, candidates: npt.NDArray[np.int32] | None, told: Counter[str]) -> dict[str, list[Any]]:
    """The variables that the graph fills, of those that the template uses; and what was shown, for the manifest."""
    knowledge, uses, variables = piece.converter.knowledge, piece.task.uses, dict[str, list[Any]]()
    if knowledge is None:
        if "candidate_paths" in uses and candidates is not None:
            variables["candidate_paths"] = _candidate_lines(piece, candidates)
        return variables
    left = np.full(len(piece), knowledge.section.budget)
    if "graph" in uses:
        most = knowledge.section.budget // (2 if "candidate_paths" in uses else 1)  # paths get what it leaves
        shown = knowledge.shown(piece.moments(), piece.task.template.graph_format, max(most, 1))
        variables["graph"], left = shown.texts, left - shown.tokens
        _tell_shown(told, shown, piece)
    if "candidate_paths" in uses and candidates is not None:
        variables["candidate_paths"], ages = knowledge.led_to(piece.moments(), candidates, left)
        _tell(told, ages)
    return variables


def _tell_shown(told: Counter[str], shown: Shown, piece: _Piece) -> None:
    told.update(
        with_graph=int((shown.triples > 0).sum()),
        without_graph=int((shown.triples == 0).sum()),
        budget_too_small=shown.too_small,
        triples=int(shown.triples.sum()),
        tokens=int(shown.tokens.sum()),
        with_items_of_the_cutoff_second=int((piece.older < piece.end).sum()),
    )
    _tell(told, shown.ages)


def _tell(told: Counter[str], ages: Ages) -> None:
    told.update(timed_triples=ages.timed, not_older_than_cutoff=ages.not_older)


def _candidate_lines(piece: _Piece, candidates: npt.NDArray[np.int32]) -> list[Any]:
    rows, count = candidates.shape
    listed = piece.converter.texts.take(pa.array(candidates.ravel()))
    return list(_joined(listed, np.arange(rows + 1) * count).to_pylist())


def _render(
    sources: list[str], choice: Ints, variables: dict[str, list[Any]], constants: dict[str, str]
) -> pa.StringArray:
    if not variables:  # constant texts are rendered once
        return pa.array(render_rows(sources, range(len(sources)), {}, constants), pa.string()).take(pa.array(choice))
    return pa.array(render_rows(sources, choice.tolist(), variables, constants), pa.string())


def _constants(piece: _Piece) -> dict[str, str]:
    """The variables that are the same in all examples of a task."""
    events, task = piece.converter.events, piece.task
    if events is None or task.task not in ACTION_TASKS:
        return NONE
    keys = ", ".join([ACTION, *dict(task.fields)])
    return {**NONE, "choices": ", ".join(events.words.values()), "keys": keys, "rationale": task.rationale or ""}


def _variables(piece: _Piece, candidates: npt.NDArray[np.int32] | None) -> dict[str, list[Any]]:
    """The template variables of templates.VARIABLES but `user` and constants, one value an example."""
    if piece.task.task in ACTION_TASKS:
        return _event_variables(piece)
    offsets, flat = piece.shown
    texts = piece.texts(flat)
    variables: dict[str, list[Any]] = {
        "history": _joined(texts, offsets).to_pylist(),
        "num_history": np.diff(offsets).tolist(),
    }
    if piece.task.task == "like":
        answered = _answered(texts, _labels(piece.sequences, flat), piece.task.template.answers)
        variables["answered_history"] = _joined(answered, offsets).to_pylist()
    if piece.task.task in ("like", "item_to_attribute", "explain"):
        variables["target"] = piece.texts(piece.end).to_pylist()
    if piece.task.task == "next_item_among" and candidates is not None:
        variables["candidates"] = _candidate_lines(piece, candidates)
        variables["num_candidates"] = [candidates.shape[1]] * len(candidates)
    if piece.asked is not None:
        variables |= piece.asked.variables
    return variables


def _event_variables(piece: _Piece) -> dict[str, list[Any]]:
    """Those of the tasks about actions, of which only what the template uses is made."""
    events, sequences, uses = piece.converter.events, piece.sequences, piece.task.uses
    assert events is not None  # the pipeline refuses these tasks without actions
    variables: dict[str, list[Any]] = {}
    most, all_of_them = piece.converter.prompt_max_items, np.ones(len(sequences.items), dtype=bool)
    if piece.lines is not None and uses & {"events", "num_events", "earlier"}:
        offsets, flat = piece.groups.last(piece.end, all_of_them, most)
        variables["events"] = _joined(piece.lines.take(pa.array(flat)), offsets).to_pylist()
        variables["num_events"] = np.diff(offsets).tolist()
        if "earlier" in uses:
            begin = piece.groups.order[piece.groups.begin[piece.end]]
            offsets, flat = sequences.by_user.last(begin, all_of_them, most - np.diff(offsets))
            variables["earlier"] = _joined(piece.lines.take(pa.array(flat)), offsets).to_pylist()
    if uses & {"answered_history", "num_history"}:
        offsets, flat = piece.shown
        answered = pc.binary_join_element_wise(piece.texts(flat), events.spoken(sequences, flat), ": ")
        variables["answered_history"] = _joined(answered, offsets).to_pylist()
        variables["num_history"] = np.diff(offsets).tolist()
    if piece.task.task == "action_on_item":
        variables["target"] = piece.texts(piece.end).to_pylist()
    if "context" in uses:
        variables["context"] = events.context(sequences, piece.end).to_pylist()
    return variables


def _answered(texts: pa.StringArray, labels: pa.StringArray, answers: dict[str, str]) -> pa.StringArray:
    """ "Heat (1995): Yes"; an item without a label stands alone."""
    return pc.coalesce(pc.binary_join_element_wise(texts, _words(labels, answers), ": "), texts)


def _words(labels: pa.StringArray, answers: dict[str, str]) -> pa.StringArray:
    return pa.array(list(answers.values())).take(pc.index_in(labels, pa.array(list(answers))))


def _completion(piece: _Piece, label: pa.StringArray | None, rationale: pa.StringArray | None) -> pa.ListArray:
    """One assistant message. Titles of a dense list end in a newline each, an ordinary answer has none."""
    if piece.task.task in ACTION_TASKS:
        text = _action_answers(piece, label)
        if rationale is not None:
            text = pc.coalesce(pc.binary_join_element_wise(rationale, text, "\n"), text)
    elif label is not None:
        text = label if piece.asked is not None else _words(label, piece.task.template.answers)
    else:
        offsets, flat = piece.learnt
        text = _joined(piece.texts(flat), offsets)
        if piece.task.dense_window:
            text = pc.binary_join_element_wise(text, "", "\n")
    return _messages([("assistant", text, np.ones(len(piece), bool))])


def _action_answers(piece: _Piece, label: pa.StringArray | None) -> pa.StringArray:
    """The last line of the completions of the tasks about actions."""
    events, task = piece.converter.events, piece.task
    assert events is not None  # the pipeline refuses these tasks without actions
    if task.task == "outcome":
        return _words(label, task.template.answers)
    if task.task == "next_event":
        return events.answers(piece.sequences, piece.converter.texts, piece.end, dict(task.fields))
    return events.spoken(piece.sequences, piece.end)


def _action_labels(piece: _Piece) -> pa.StringArray:
    """What the tasks about actions ask: the target's action, or whether its session comes to one."""
    if piece.targets.yes is not None:
        return pa.array([NO, YES]).take(pa.array(piece.targets.yes.astype(np.int8)))
    return _labels(piece.sequences, piece.end)


def _rationale(piece: _Piece) -> pa.StringArray | None:
    """(N,) the line that a completion begins with, null where the log has none; None if the task asks for none."""
    if piece.task.rationale is None:
        return None
    return _rationales(piece.sequences, piece.task, piece.converter, piece.end)


def _rationales(sequences: Sequences, task: Task, converter: Converter, flat: Ints) -> pa.StringArray:
    """(N,) the rationales of flat positions as completions begin with them; null where nothing is left of one."""
    assert converter.events is not None  # check_events refuses a rationale without actions
    assert task.rationale is not None  # callers look first
    found = converter.events.clean(sequences, task.rationale, flat)
    return pc.if_else(pc.equal(found, ""), pa.scalar(None, pa.string()), found)


def _targets(piece: _Piece, target: npt.NDArray[np.int32]) -> pa.Int32Array:
    """(N,) null where an event has no item, and where it is not one event that is asked about."""
    if piece.task.task == "outcome":
        return pa.nulls(len(piece), pa.int32())
    return pa.array(target, mask=target == schema.NO_ITEM)


def _session(piece: _Piece, flat: Ints) -> pa.Int32Array:
    """(N,) the sessions of the flat positions; null where none is asked about, nor events."""
    sessions = piece.sequences.sessions
    if sessions is None or (piece.converter.events is None and not piece.task.within_session):
        return pa.nulls(len(piece), pa.int32())
    return pa.array(sessions[flat])


def _messages(slots: list[Slot]) -> pa.ListArray:
    """Lists of {role, content}: each example has the messages of its present slots, in the order of the slots."""
    present = np.stack([mask for _, _, mask in slots], axis=1)  # (N, slots)
    offsets = np.concatenate([[0], np.cumsum(present.sum(axis=1))]).astype(np.int32)
    rows, slot = np.nonzero(present)
    contents = slots[0][1]
    if len(slots) > 1:
        contents = pa.concat_arrays([content for _, content, _ in slots]).take(pa.array(slot * len(present) + rows))
    roles = pa.array([role for role, _, _ in slots]).take(pa.array(slot))
    values = pa.StructArray.from_arrays([roles, contents], fields=list(schema.MESSAGES.value_type))
    return pa.ListArray.from_arrays(pa.array(offsets), values, type=schema.MESSAGES)
