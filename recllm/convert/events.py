"""How events are written: a line each for prompts, and what the answers of action tasks say.

A batch of sequences, the positions of examples and the recipe's words enter; texts leave, of which nothing can break
out of the prompt. What is known of an event in advance is apart from the rest (`context`), so that no prompt shows more
of the event that is asked about.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jinja2 import meta

from recllm import schema
from recllm.convert.actions import ACTION, write_answer
from recllm.convert.targets import Ints, Sequences
from recllm.convert.templates import ACTION_TASKS, compile_checked, environment, render_rows
from recllm.convert.titles import neutralise
from recllm.errors import UserError
from recllm.recipe import PromptSection, Recipe, TaskSection

ITEM, PAUSE = "item", "pause_s"
BUILT_IN = (ACTION, ITEM, PAUSE)  # variables of prompt.event; no attribute is called so (recipe.py)
YES, NO = "yes", "no"  # labels of the task outcome
_LARGEST = 2**62  # of numbers that stand for several texts


@dataclasses.dataclass(frozen=True)
class Events:
    """The words of an event dataset; travels to worker processes. P positions of a batch, N examples."""

    words: Mapping[str, str]  # label → words, in the order of action numbers
    line: str  # prompt.event
    attributes: tuple[str, ...] = ()  # that `line` shows
    shows_pause: bool = False
    observed: tuple[str, ...] = ()
    special_tokens: tuple[str, ...] = ()  # that no text may hold

    @classmethod
    def of(cls, recipe: Recipe, special_tokens: Sequence[str] = ()) -> "Events":
        """Those of a recipe with `actions`.

        Raises:
            UserError: prompt.event that is broken or names what events do not have; words that hold a control token.
        """
        section = recipe.actions
        assert section is not None
        for label, words in section.words.items():
            if neutralise(words, special_tokens) != words:
                raise UserError(
                    f'actions.words: "{words}" of the action "{label}" holds what chat formats or this tokenizer use '
                    "as a control token: choose other words"
                )
        uses = _used(recipe.prompt, section.attributes)
        attributes = tuple(name for name in section.attributes if name in uses)
        line = recipe.prompt.event
        return cls(dict(section.words), line, attributes, PAUSE in uses, tuple(section.observed), tuple(special_tokens))

    def numbers(self, labels: pa.StringArray | None) -> pa.Int32Array:
        """The numbers of actions."""
        assert labels is not None  # an event dataset has them
        return pc.index_in(labels, pa.array(list(self.words)))

    def spoken(self, sequences: Sequences, flat: Ints) -> pa.StringArray:
        """The words of the actions at flat positions."""
        assert sequences.actions is not None  # as above
        return pa.array(list(self.words.values())).take(self.numbers(sequences.actions.take(pa.array(flat))))

    def lines(self, sequences: Sequences, texts: pa.StringArray) -> pa.StringArray:
        """(P,) each event as one line; events that are alike are written once. `texts` (num_items,) of the items.

        Raises:
            UserError: prompt.event fails on an event, or leaves nothing of it.
        """
        pauses = _pauses(sequences) if self.shows_pause else None
        kinds = _Kinds(self.numbers(sequences.actions).to_numpy().astype(np.int64))
        kinds.add(sequences.items.astype(np.int64) + 1, len(texts) + 1)
        if pauses is not None:
            kinds.add(pauses + 1, int(pauses.max(initial=0)) + 2)
        for name in self.attributes:
            encoded = sequences.attributes[name].dictionary_encode()
            kinds.add(encoded.indices.to_numpy().astype(np.int64), len(encoded.dictionary))
        first, kind = kinds.different()
        columns = {
            ACTION: self.spoken(sequences, first).to_pylist(),
            ITEM: item_texts_at(sequences, texts, first).to_pylist(),
        }
        if pauses is not None:
            columns[PAUSE] = ["" if pause < 0 else pause for pause in pauses[first].tolist()]
        for name in self.attributes:
            columns[name] = sequences.attributes[name].take(pa.array(first)).to_pylist()
        rendered = render_rows([self.line], [0] * len(first), columns)
        written = [neutralise(line, self.special_tokens) for line in rendered]
        if "" in written:
            words = columns[ACTION][written.index("")]
            raise UserError(
                f'prompt.event ("{self.line}") leaves nothing of an event with the action "{words}": let it write the '
                "action"
            )
        return pa.array(written, pa.string()).take(pa.array(kind))

    def clean(self, sequences: Sequences, name: str, flat: Ints) -> pa.StringArray:
        """An attribute at flat positions, on one line and without control tokens; "" where it is blank."""
        found = sequences.attributes[name].take(pa.array(flat)).dictionary_encode()
        texts = [neutralise(text, self.special_tokens) for text in found.dictionary.to_pylist()]
        return pa.array(texts, pa.string()).take(found.indices)

    def context(self, sequences: Sequences, flat: Ints) -> pa.StringArray:
        """What is known in advance of the events at flat positions: "NAME: text", one a line, without blank ones."""
        lines = [pa.array([""]).take(pa.array(np.zeros(len(flat), np.int64)))]
        for name in self.observed:
            found = self.clean(sequences, name, flat)
            line = pc.binary_join_element_wise(f"{name}: ", found, "\n", "")
            lines.append(pc.if_else(pc.equal(found, ""), "", line))
        return pc.utf8_rtrim(pc.binary_join_element_wise(*lines, ""), "\n")

    def answers(
        self, sequences: Sequences, texts: pa.StringArray, flat: Ints, fields: Mapping[str, str]
    ) -> pa.StringArray:
        """The events at flat positions as JSON; `fields`: key → attribute, or item."""
        columns = [
            item_texts_at(sequences, texts, flat) if source == ITEM else self.clean(sequences, source, flat)
            for source in fields.values()
        ]
        rows = zip(self.spoken(sequences, flat).to_pylist(), *(column.to_pylist() for column in columns))
        return pa.array([write_answer(words, dict(zip(fields, values))) for words, *values in rows], pa.string())


def item_texts_at(sequences: Sequences, texts: pa.StringArray, flat: Ints) -> pa.StringArray:
    """Item texts at flat positions; "" where an event has no item."""
    items = sequences.items[flat]
    return pc.fill_null(texts.take(pa.array(items, mask=items == schema.NO_ITEM)), "")


def _pauses(sequences: Sequences) -> Ints:
    """(P,) whole seconds since the event before in the session; -1 at its first."""
    groups = sequences.by_session
    gaps = np.diff(sequences.timestamps[groups.order], prepend=0)[groups.place]
    return np.where(groups.place == groups.begin, -1, gaps)


class _Kinds:
    """Positions that agree in several columns of small numbers get one number."""

    def __init__(self, numbers: Ints) -> None:
        self.keys, self.size = numbers, int(numbers.max(initial=0)) + 1

    def add(self, numbers: Ints, size: int) -> None:
        """A further column with values 0..size - 1."""
        if self.size * size > _LARGEST:
            _, self.keys = self.different()
            self.size = int(self.keys.max(initial=0)) + 1
        self.keys, self.size = self.keys * size + numbers, self.size * size

    def different(self) -> tuple[Ints, Ints]:
        """The first position of each kind, and each position's kind."""
        kind = pa.array(self.keys).dictionary_encode().indices.to_numpy().astype(np.int64)  # numbered as they come
        first = np.flatnonzero(np.diff(np.maximum.accumulate(kind), prepend=-1) > 0)
        return first, kind


def _used(prompt: PromptSection, attributes: Sequence[str]) -> set[str]:
    """The variables of prompt.event."""
    compile_checked(prompt.event, {*BUILT_IN, *attributes}, "prompt.event", "variable of events")
    return meta.find_undeclared_variables(environment().parse(prompt.event))


# ---- tasks that do not fit their recipe ----


def check_events(entry: TaskSection, recipe: Recipe) -> None:
    """Refuse an entry of `tasks` that asks about actions in a way which its recipe does not provide for.

    Raises:
        UserError: what does not fit, what would, and what to change.
    """
    if entry.task in ACTION_TASKS and recipe.actions is None:
        raise UserError(
            f"the task {entry.task} asks about actions, and the recipe has none: add `actions`, with the words of each"
        )
    _check_targets(entry, recipe)
    for name, check in _CHECKS.items():
        check(entry, recipe, f"task {entry.task} has {name}={getattr(entry, name)!r}")


def _check_within(entry: TaskSection, _: Recipe, found: str) -> None:
    if entry.within_session and entry.task not in ("next_item", "next_item_among", *ACTION_TASKS):
        raise UserError(f"{found}: next_item, next_item_among and action_on_item can ask so, leave it out")


def _check_targets(entry: TaskSection, recipe: Recipe) -> None:
    """One position a user, where a held-out session begins, is what a task within sessions never asks about."""
    split = recipe.protocol.split
    holds_out_sessions = split.whole_sessions or split.method == "session_holdout"
    within = entry.within_session or entry.task in ("next_action", "next_event")
    if within and holds_out_sessions and split.targets == "first":
        raise UserError(
            f"the task {entry.task} asks within sessions and never about a session's first event, "
            f"protocol.split.targets is first, and with {'whole_sessions' if split.whole_sessions else split.method} "
            "the first position of a user that is held out may be just that: set it to all"
        )


def _check_positive(entry: TaskSection, recipe: Recipe, found: str) -> None:
    if entry.task != "outcome":
        if entry.positive:
            raise UserError(f"{found}, which only outcome reads: leave it out")
        return
    words = recipe.actions.words if recipe.actions else {}
    if unknown := [label for label in entry.positive if label not in words]:
        raise UserError(f'{found}: "{unknown[0]}" is no action, known are {", ".join(words)}')
    if not entry.positive or set(entry.positive) == set(words):
        raise UserError(
            f"{found}: name the actions of which one makes the answer yes, some of {', '.join(words)}, but not all"
        )
    split = recipe.protocol.split
    if split.targets != "all":
        raise UserError(
            f"the task outcome asks once a session, protocol.split.targets is {split.targets}: set it to all"
        )


def _check_after(entry: TaskSection, _: Recipe, found: str) -> None:
    if entry.task != "outcome" and entry.after != TaskSection.model_fields["after"].default:
        raise UserError(f"{found}, which only outcome reads: leave it out")


def _check_fields(entry: TaskSection, recipe: Recipe, found: str) -> None:
    if entry.fields and entry.task != "next_event":
        raise UserError(f"{found}, which only next_event reads: leave it out")
    for key, source in entry.fields.items():
        if key == ACTION or not key.strip():
            raise UserError(f'{found}: "{key}" is no key of a further field, choose another ("{ACTION}" is the action)')
        if source != ITEM:
            _check_attribute(source, recipe, f"{found}: {key}")


def _check_rationale(entry: TaskSection, recipe: Recipe, found: str) -> None:
    if entry.rationale is None:
        return
    if entry.task not in ACTION_TASKS:
        raise UserError(f"{found}, which {', '.join(ACTION_TASKS)} read: leave it out")
    _check_attribute(entry.rationale, recipe, found)
    if entry.rationale in entry.fields.values():
        raise UserError(f"{found}, and fields asks for it too: take it out of one of them")


def _check_attribute(name: str, recipe: Recipe, found: str) -> None:
    section = recipe.actions
    if section is None or name not in section.attributes:
        known = ", ".join(section.attributes) if section else ""
        raise UserError(f'{found} names "{name}", actions.attributes has {known or "none"}: add it there')
    if name in section.observed:
        raise UserError(
            f'{found} asks for "{name}", which prompts show: it is known in advance by actions.observed. Take it out '
            "of one of them"
        )


_CHECKS: dict[str, Callable[[TaskSection, Recipe, str], None]] = {
    "within_session": _check_within,
    "positive": _check_positive,
    "after": _check_after,
    "fields": _check_fields,
    "rationale": _check_rationale,
}
