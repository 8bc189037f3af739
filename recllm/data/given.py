"""The split of a published protocol: explicit rows, each a user, a history and a target, found again in a log.

JSONL files enter; for each part of a log the rows of its users leave, each with the position of its target.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from recllm.data import offline
from recllm.data.log import Log
from recllm.errors import UserError
from recllm.recipe import GivenRows, SplitSection

Rows = dict[str, list[tuple[int, dict[str, Any]]]]  # "valid" and "test" → (line, row)


@dataclass(frozen=True)
class GivenRow:
    """A row found in a log."""

    position: int  # of the target, in the flat log
    target: int  # item_index
    history: list[int]  # item_index, oldest first
    history_equal: bool  # the history stands directly before the target


def read_given(section: SplitSection) -> Rows:
    """Read the rows of split.given.

    Raises:
        UserError: no split.given, a missing file, a line that is no JSON object or lacks a key.
    """
    if section.given is None:
        raise UserError("split.method given needs split.given with valid and test: paths of JSONL rows")
    return {name: _read(getattr(section.given, name), section.given) for name in ("valid", "test")}


def _read(path: str, given: GivenRows) -> list[tuple[int, dict[str, Any]]]:
    file = Path(offline.resolve(path))
    if not file.is_file():
        raise UserError(f"{path} does not exist: split.given names JSONL files of rows with a user, history and target")
    rows = []
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError:
            raise UserError(f"{where}: is not UTF-8 text: save the file as UTF-8") from None
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: not valid JSON ({error.msg}): mend or drop the line") from None
        if not isinstance(row, dict):
            raise UserError(f"{where}: holds {str(row)[:60]!r}, one JSON object a line is expected")
        for key in (given.user, given.history, given.target):
            if key not in row:
                raise UserError(f'{where}: no key "{key}", keys there: {", ".join(row)}; set split.given')
        if not isinstance(row[given.history], list):
            raise UserError(f"{where}: {given.history} is {row[given.history]!r}, a list of item ids is expected")
        rows.append((number, row))
    return rows


class Given:
    """Finds the rows of split.given in the parts of a log. `item_ids` stand in item_index order."""

    def __init__(self, names: GivenRows, rows: Rows, item_ids: list[str]) -> None:
        self.names, self.rows, self.item_ids = names, rows, item_ids
        self.item_of = {item_id: number for number, item_id in enumerate(item_ids)}

    def check_users(self, user_ids: pl.Series) -> None:
        """Refuse rows of users who are not there, (U,) texts.

        Raises:
            UserError: names file, line and user.
        """
        known = set(user_ids.filter(user_ids.is_in(self._users())).to_list())
        for split, rows in self.rows.items():
            for number, row in rows:
                if str(row[self.names.user]) not in known:
                    raise UserError(
                        f"{self._where(split, number)}: user {row[self.names.user]} is not in the interactions (after "
                        "filtering): check the filter section and split.given.user"
                    )

    def _users(self) -> list[str]:
        return sorted({str(row[self.names.user]) for rows in self.rows.values() for _, row in rows})

    def _where(self, split: str, number: int) -> str:
        return f"{getattr(self.names, split)}, line {number}"

    def find(self, log: Log) -> dict[str, list[GivenRow]]:
        """The rows of the users of `log`, by split.

        Raises:
            UserError: an item that is not there, a target that its user never had or that two splits want.
        """
        user_of = {user_id: number for number, user_id in enumerate(log.user_ids)}
        found: dict[str, list[GivenRow]] = {}
        taken: dict[int, str] = {}  # position → split
        for split, rows in self.rows.items():
            found[split] = []
            for number, row in rows:
                user = user_of.get(str(row[self.names.user]))
                if user is None:  # of another part
                    continue
                place = self._place(log, user, row, self._where(split, number))
                if taken.setdefault(place.position, split) != split:
                    raise UserError(
                        f"{getattr(self.names, split)}: item {self.item_ids[place.target]} of user "
                        f"{log.user_ids[user]} is a target in {getattr(self.names, taken[place.position])}, too: "
                        "a position cannot be valid and test"
                    )
                found[split].append(place)
        return found

    def _place(self, log: Log, user: int, row: dict[str, Any], where: str) -> GivenRow:
        """Of several interactions with the target the one that the history precedes, otherwise the last."""
        start, end = (int(edge) for edge in log.offsets[user : user + 2])
        sequence = log.items[start:end]
        target = self._item(row[self.names.target], where)
        places = np.flatnonzero(sequence == target)
        if not len(places):
            raise UserError(
                f"{where}: user {row[self.names.user]} has no interaction with target {row[self.names.target]} (after "
                "filtering): check the filter section and split.given.item_id_offset"
            )
        history = [self._item(item, where) for item in row[self.names.history]]
        equal = [place for place in places if _ends_with(sequence[:place], history)]
        return GivenRow(start + int(equal[-1] if equal else places[-1]), target, history, bool(equal))

    def _item(self, given_id: Any, where: str) -> int:
        offset = self.names.item_id_offset
        try:
            name = str(int(str(given_id)) + offset) if offset else str(given_id)
        except ValueError:
            raise UserError(
                f"{where}: item id {given_id!r} is no whole number, split.given.item_id_offset can only be added to one"
            ) from None
        if name not in self.item_of:
            raise UserError(f'{where}: item "{name}" is not in the items: check split.given.item_id_offset')
        return self.item_of[name]

    def settle_ties(self, log: Log) -> npt.NDArray[np.int64]:
        """Order of positions, (P,), in which ties stand as the given rows have them; only moves within one time.

        Published rows often come from a log whose ties were ordered by something that was not published. Where the
        rows say which of two simultaneous interactions came first, they are followed: items of a row's history keep
        its order and its target comes last; everything else at the time of the oldest goes before, at the time of the
        target after.
        """
        order = np.arange(len(log.items))
        users = log.users
        found = [row for rows in self.find(log).values() for row in rows]
        for row in sorted(found, key=lambda row: int(log.order_us[row.position])):
            start, end = log.offsets[users[row.position]], log.offsets[users[row.position] + 1]
            part = order[start:end]
            order[start:end] = part[np.lexsort((_ranks(log, part, row), log.order_us[part]))]
        return order


def _ranks(log: Log, part: npt.NDArray[np.int64], row: GivenRow) -> npt.NDArray[np.int64]:
    items, times = log.items[part], log.order_us[part]
    places = {int(item): place for place, item in enumerate([*row.history, row.target], 1)}
    known = times[np.isin(items, row.history)]
    oldest = known.min() if len(known) else log.order_us[row.position]
    others = np.where(times <= oldest, 0, len(places) + 1)
    return np.array([places.get(int(item), other) for item, other in zip(items, others)], dtype=np.int64)


def _ends_with(sequence: npt.NDArray[np.int32], history: list[int]) -> bool:
    if not history:  # stands before a first interaction only
        return not len(sequence)
    return sequence[-len(history) :].tolist() == history
