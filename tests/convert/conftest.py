"""Small logs that the tests of this room share."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from recllm import schema
from recllm.convert.events import Events
from recllm.convert.examples import Converter, Task
from recllm.convert.templates import load_template
from recllm.data.candidates import CandidateSampler
from recllm.data.randomness import text_keys
from recllm.recipe import CandidatesSection, Recipe

NUM_ITEMS = 60


@pytest.fixture(scope="session")
def make_batch() -> Callable[..., pa.RecordBatch]:
    """Users given as lists of (item, timestamp, split code[, action]) become a batch of schema.SEQUENCES."""

    def make(users: dict[str, list[tuple]]) -> pa.RecordBatch:
        rows = [
            {
                "user_index": number,
                "user_id": user,
                "user_key": int(text_keys([user])[0]),
                "items": [event[0] for event in events],
                "timestamps": [event[1] for event in events],
                "splits": [event[2] for event in events],
                "actions": [event[3] for event in events] if events and len(events[0]) > 3 else None,
                "sessions": None,
            }
            for number, (user, events) in enumerate(users.items())
        ]
        return pa.RecordBatch.from_pylist(rows, schema=schema.SEQUENCES)

    return make


@pytest.fixture(scope="session")
def make_converter() -> Callable[..., Converter]:
    """A converter over NUM_ITEMS items called "Item 0", "Item 1", …"""

    def make(task: str = "next_item", template: str = "next_item/films", **changes: object) -> Converter:
        shape = {
            key: changes.pop(key) for key in ("dense_window", "max_train_targets", "dense_start") if key in changes
        }
        loaded = load_template(template, task, dense=bool(shape.get("dense_window")))
        settings: dict = {"prompt_max_items": 3, "seed": 0, **changes}
        return Converter(
            tasks=(Task(task, task, loaded, **shape),),
            texts=pa.array([f"Item {number}" for number in range(NUM_ITEMS)]),
            sampler=CandidateSampler(NUM_ITEMS, np.ones(NUM_ITEMS, np.int64), CandidatesSection(count=5)),
            **settings,
        )

    return make


@pytest.fixture(scope="session")
def many_users(make_batch) -> pa.RecordBatch:
    """37 users with 4 to 30 interactions, actions among them; the last is test, the one before valid."""
    generator = np.random.default_rng(7)
    users = {}
    for number in range(37):
        length = int(generator.integers(4, 31))
        items = generator.permutation(NUM_ITEMS)[:length]
        times = np.sort(generator.integers(0, 10_000, length))
        codes = [schema.TRAIN] * (length - 2) + [schema.VALID, schema.TEST]
        actions = generator.choice(["like", "dislike"], length)
        users[f"u{number}"] = [
            (int(i), int(t), c, str(a)) for i, t, c, a in zip(items, times, codes, actions, strict=True)
        ]
    return make_batch(users)


@pytest.fixture
def make_recipe(tmp_path: Path) -> Callable[..., Recipe]:
    """A recipe over a generated CSV log of 40 users and 30 items; sections given as keywords replace the defaults."""
    generator = np.random.default_rng(3)
    lines = ["user_id,item_id,timestamp,rating"]
    for user in range(40):
        for step, item in enumerate(generator.permutation(30)[: generator.integers(6, 20)]):
            lines.append(f"user{user},i{item},{1000 * step + user},{generator.integers(1, 6)}")
    (tmp_path / "log.csv").write_text("\n".join(lines) + "\n")
    titles = [f"i{number},Title {number},{1970 + number}" for number in range(30)]
    (tmp_path / "items.csv").write_text("\n".join(["item_id,title,year", *titles]) + "\n")

    def make(**sections: object) -> Recipe:
        document: dict = {
            "name": "small",
            "data": {
                "interactions": {"path": str(tmp_path / "log.csv")},
                "items": {"path": str(tmp_path / "items.csv")},
            },
            "protocol": {
                "name": "small",
                "split": {"method": "leave_one_out", "targets": "last"},
                "candidates": {"count": 5},
            },
            "prompt": {"max_items": 3, "item": "{{ title }} ({{ year }})"},
            "tasks": [{"task": "next_item", "template": "next_item/films"}],
            "model": {"name_or_path": "none"},
        }
        return Recipe.model_validate({**document, **sections})

    return make


WORDS = {"view": "view", "cart": "add to cart", "buy": "buy", "leave": "leave"}


@pytest.fixture(scope="session")
def make_events() -> Callable[..., pa.RecordBatch]:
    """Users given as lists of events become a batch of schema.sequences_schema(attributes).

    An event is (action, item or None, timestamp, session, split code, *attributes).
    """

    def make(users: dict[str, list[tuple]], attributes: Sequence[str] = ()) -> pa.RecordBatch:
        rows = [
            {
                "user_index": number,
                "user_id": user,
                "user_key": int(text_keys([user])[0]),
                "items": [schema.NO_ITEM if item is None else item for _, item, *_ in events],
                "timestamps": [event[2] for event in events],
                "splits": [event[4] for event in events],
                "actions": [event[0] for event in events],
                "sessions": [event[3] for event in events],
                **{
                    f"{schema.ATTRIBUTE}{name}": [event[5 + place] for event in events]
                    for place, name in enumerate(attributes)
                },
            }
            for number, (user, events) in enumerate(users.items())
        ]
        return pa.RecordBatch.from_pylist(rows, schema=schema.sequences_schema(attributes))

    return make


@pytest.fixture(scope="session")
def make_event_converter(make_converter) -> Callable[..., Converter]:
    """A converter of events with WORDS over NUM_ITEMS items; keywords of a Task, of Events, and of a Converter."""
    of_task = {field.name for field in dataclasses.fields(Task)} - {"name", "task", "template"}
    of_events = {field.name for field in dataclasses.fields(Events)}

    def make(task: str, template: str, **changes: Any) -> Converter:
        shape = {name: changes.pop(name) for name in of_task & set(changes)}
        events = {name: changes.pop(name) for name in of_events & set(changes)}
        if task in ("next_action", "next_event", "outcome"):
            shape["within_session"] = True
        line = "{{ action }}{% if item %}: {{ item }}{% endif %}"
        converter = make_converter(task, template, **changes)
        return dataclasses.replace(
            converter,
            tasks=(dataclasses.replace(converter.tasks[0], **shape),),
            events=Events(**{"words": WORDS, "line": line, **events}),
        )

    return make
