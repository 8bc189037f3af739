"""Templates: versioned YAML files of phrasings in Jinja, rendered in a sandbox.

The name or path of a template and a task enter; a `Template` leaves whose phrasings render to chat messages.
All that can be wrong with a template is found when it is loaded, before any work.
"""

import dataclasses
import difflib
import functools
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jinja2 import StrictUndefined, TemplateError, TemplateSyntaxError, meta
from jinja2 import Template as JinjaTemplate
from jinja2.sandbox import ImmutableSandboxedEnvironment
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from recllm import assets, files
from recllm.errors import UserError
from recllm.recipe import GraphFormat

_USER = {
    "user": "the user as prompt.user writes it; empty without",
    "graph": "the graph around the user's items (like, action_on_item, explain: and the target); empty without one",
}
# Of the tasks about actions. A session is shown as prompt.event writes each of its events
_SESSION = {
    "events": "the last events of the session, oldest first, one a line",
    "num_events": "how many these are",
    "earlier": "events before the session, as many as prompt.max_items leaves; empty at the user's first session",
    "context": 'what is known in advance of the event that is asked about, one "name: text" a line; may be empty',
    "rationale": "says something if a line that gives the reason comes before the answer, else empty",
    **_USER,
}
_CHOICES = "the words of all actions, with commas between them"
# What a template of each task may use: plain values, so that rendering a row costs a few microseconds.
VARIABLES: dict[str, dict[str, str]] = {
    "next_item": {
        "history": "the last items, oldest first, one a line",
        "num_history": "how many these are",
        **_USER,
    },
    "next_item_among": {
        "history": "the last items, oldest first, one a line",
        "num_history": "how many these are",
        **_USER,
        "candidates": "the candidates, one a line",
        "candidate_paths": "the same, each with the path of the graph that leads to it from the history",
        "num_candidates": "how many these are",
    },
    "like": {
        "history": "the last items, oldest first, one a line",
        "answered_history": 'the same, each with its answer: "Heat (1995): Yes"',
        "num_history": "how many these are",
        **_USER,
        "target": "the item that is asked about",
    },
    "item_to_attribute": {
        "user": _USER["user"],  # no subgraph: it might hold the answer
        "target": "the item that is asked about",
        "relation": "the relation whose other end is asked for",
        "choices": "the right answer and wrong ones, one a line",
    },
    "attribute_to_item": {
        "user": _USER["user"],
        "attributes": "what is known of the item, one relation a line",
    },
    "explain": {
        "history": "the last items, oldest first, one a line",
        "num_history": "how many these are",
        **_USER,
        "target": "the item that is explained",
    },
    "assets": {
        "history": "the last assets, oldest first, one a line",
        "num_history": "how many these are",
        **_USER,
        "ledger": "the same as transactions, one a line: date, side, asset, units, value",
        "date": "the day on which the question is asked: 2021-01-04",
        "days": "how many days the question looks ahead",
    },
    "rank_assets": {
        "history": "the last assets, oldest first, one a line",
        "num_history": "how many these are",
        **_USER,
        "ledger": "the same as transactions, one a line: date, side, asset, units, value",
        "date": "the day on which the question is asked: 2021-01-04",
        "days": "how many days the question looks ahead",
        "candidates": "the candidates, one a line, each with what its prices did: mean return, variance, drawdown",
        "num_candidates": "how many these are",
        "lookback": "of how many days before the date these prices are",
    },
    "next_action": {**_SESSION, "choices": _CHOICES},
    "next_event": {**_SESSION, "choices": _CHOICES, "keys": "the keys of the JSON object, with commas between them"},
    "outcome": {**_SESSION},
    "action_on_item": {
        "answered_history": 'the last items, oldest first, each with what was done: "Heat (1995): 4 or 5 stars"',
        "num_history": "how many these are",
        "events": "the last events, oldest first, one a line; within_session: of the session",
        "num_events": "how many these are",
        "target": "the item that is asked about",
        "choices": _CHOICES,
        "context": _SESSION["context"],
        "rationale": _SESSION["rationale"],
        **_USER,
    },
}
ASSETS, RANK_ASSETS = "assets", "rank_assets"
BANK_TASKS = (ASSETS, RANK_ASSETS)  # what they ask is in a bank's data
GRAPH_TASKS = ("item_to_attribute", "attribute_to_item", "explain")  # what they ask is in the graph
GRAPH_VARIABLES = ("graph", "candidate_paths")
ACTION_TASKS = ("next_action", "next_event", "outcome", "action_on_item")  # what they ask is in a log of events
_ANSWERED = ("like", "outcome")  # tasks whose templates have the words of the answers
_MAY_BE_EMPTY = ("earlier", "context", "rationale")
_DUMMY = {"num_history": 2, "num_candidates": 2, "days": 180, "lookback": 70, "num_events": 2}


class Phrasing(BaseModel):
    """One wording: the system and user messages, and for dense windows the user message before the list."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    user: str
    system: str | None = None
    window: str | None = None  # uses no variable but `user` and `graph`: the list that continues it is the answer


class _Document(BaseModel):
    """The YAML file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str  # name@version: raise the version with every change of the text
    task: str
    description: str = ""
    phrasings: list[Phrasing] = Field(min_length=1)
    answers: dict[str, str] = {}  # closed tasks: label → the words of the answer
    graph_format: GraphFormat | None = None  # how this wording writes a subgraph; None: as the recipe's graph says


@dataclasses.dataclass(frozen=True)
class Template:
    """A loaded template. Holds only text, so that it travels to worker processes."""

    name: str
    id: str
    task: str
    sha256: str  # of the file's bytes
    phrasings: tuple[Phrasing, ...]
    answers: dict[str, str]
    graph_format: GraphFormat | None = None

    def uses(self, dense: bool) -> set[str]:
        """The variables of the texts that examples are made of."""
        texts = [text for p in self.phrasings for text in (p.system, p.window if dense else p.user) if text is not None]
        return set().union(*(meta.find_undeclared_variables(environment().parse(text)) for text in texts))


def load_template(name: str | Path, task: str, dense: bool = False) -> Template:
    """Read a template by shipped name or path for a task and check it to the end.

    Raises:
        UserError: unknown name or key, another task, undefined variable, broken Jinja; `dense` without a `window`;
            `answers` that are missing, out of place or all the same.
    """
    path = assets.find("prompts", name)
    document = _read(path)
    if document.task != task:
        shipped = [entry for entry in assets.names("prompts") if entry.startswith(f"{task}/")]
        raise UserError(
            f'template "{name}" is for the task "{document.task}", the recipe uses it for "{task}": '
            f"take one of {', '.join(shipped) or 'your own'}"
        )
    for number, phrasing in enumerate(document.phrasings):
        _check(phrasing, task, dense, f'template "{name}", phrasing {number + 1}')
    if (task in _ANSWERED) != bool(document.answers):
        raise UserError(
            f'template "{name}": `answers` (label: words) belongs to the tasks {" and ".join(_ANSWERED)}, and only to '
            "them"
        )
    if task == "outcome" and set(document.answers) != {"yes", "no"}:
        raise UserError(
            f'template "{name}": `answers` has the labels {", ".join(document.answers)}, an outcome is "yes" or "no": '
            'write answers: {"yes": …, "no": …}, in quotes'
        )
    if document.answers and len({words.strip() for words in document.answers.values()}) < 2:
        raise UserError(
            f'template "{name}": `answers` has the words {list(document.answers.values())}, at least two different '
            "ones are needed to tell the labels apart: give every label its words"
        )
    return Template(
        str(name),
        document.id,
        task,
        files.sha256_of(path),
        tuple(document.phrasings),
        dict(document.answers),
        document.graph_format,
    )


def _read(path: Path) -> _Document:
    try:
        return _Document.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML ({error}): mend the template") from None
    except ValidationError as error:
        entry = error.errors()[0]
        place = ".".join(str(part) for part in entry["loc"]) or "the file"
        known = f"{', '.join(_Document.model_fields)}; in phrasings {', '.join(Phrasing.model_fields)}"
        raise UserError(f"{path}: {place}: {entry['msg']}. Known keys: {known}") from None


def _check(phrasing: Phrasing, task: str, dense: bool, where: str) -> None:
    known = set(VARIABLES[task])
    _try(phrasing.user, known, where)
    if phrasing.system is not None:  # also stands before a dense window
        _try(phrasing.system, set(_USER) if dense else known, f"{where}, system")
    if phrasing.window is not None:
        _try(phrasing.window, set(_USER), f"{where}, window")
    elif dense:
        raise UserError(f"{where} has no `window` text: dense_window needs one in every phrasing, or set it to 0")


def _try(source: str, known: set[str], where: str) -> None:
    """Compile and render, with a text about the user and a graph, and without."""
    template = compile_checked(source, known, where)
    dummy = {name: _DUMMY.get(name, f"a {name}") for name in sorted(known)}
    for user, graph, rest in itertools.product(("a user", ""), ("a graph", ""), ({}, dict.fromkeys(_MAY_BE_EMPTY, ""))):
        render(template, {**dummy, **rest, "user": user, "graph": graph}, where)


@functools.cache
def environment() -> ImmutableSandboxedEnvironment:
    """The sandbox: no attribute tricks, nothing mutable, an undefined variable is an error, no HTML escaping."""
    return ImmutableSandboxedEnvironment(undefined=StrictUndefined, autoescape=False)


@functools.lru_cache(maxsize=256)
def compiled(source: str) -> JinjaTemplate:
    """Compile once a process."""
    return environment().from_string(source)


def compile_checked(source: str, known: set[str], where: str, kind: str = "variable") -> JinjaTemplate:
    """Compile `source`; a syntax error or a variable outside `known` is a UserError that names both."""
    try:
        used = meta.find_undeclared_variables(environment().parse(source))
        template = compiled(source)
    except TemplateSyntaxError as error:
        raise UserError(f"{where}, line {error.lineno}: {error.message}. Mend the Jinja text") from None
    for name in sorted(used - known):
        close = difflib.get_close_matches(name, known, n=1)
        hint = f'did you mean "{close[0]}"? ' if close else ""
        raise UserError(f'{where}: "{name}" is no {kind}. {hint}Known: {", ".join(sorted(known)) or "none"}')
    return template


def render(template: JinjaTemplate, variables: Mapping[str, Any], where: str) -> str:
    """Render with a readable error."""
    try:
        return template.render(variables)
    except (TemplateError, TypeError, LookupError, ValueError, ArithmeticError) as error:
        raise UserError(f"{where}: {error}. Known variables: {', '.join(variables) or 'none'}") from None


def render_rows(
    sources: Sequence[str],
    choice: Sequence[int],
    columns: Mapping[str, Sequence[Any]],
    constants: Mapping[str, Any] | None = None,
) -> list[str]:
    """Row i of `columns` rendered with `sources[choice[i]]`: what `Template.render` gives, at a quarter of its time.

    `constants` are variables that are the same in all rows; a column of that name goes before. The saving: the
    variables become the context themselves instead of being copied into a fresh one. Raises UserError where a template
    fails on a row, such as one that asks for a fifth line of a history of three.
    """
    names, shared = list(columns), {**environment().globals, **(constants or {})}
    parts = [(template.root_render_func, template.new_context) for template in map(compiled, sources)]
    rows = []
    try:
        for number, *values in zip(choice, *columns.values(), strict=True):
            body, new_context = parts[number]
            rows.append("".join(body(new_context({**shared, **dict(zip(names, values))}, shared=True))))
    except (TemplateError, TypeError, LookupError, ValueError, ArithmeticError) as error:
        raise UserError(
            f"phrasing {sources[number]!r} fails on an example ({error}): make it fit every history"
        ) from None
    return rows
