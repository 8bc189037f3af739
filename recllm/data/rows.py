"""From the files of a log to rows of numbers in a scratch file: the first half of `sequences.prepare`.

The data and filter sections of a recipe enter, and `actions` of an event log; a `Source` leaves, its rows on disk and
its texts, each once, in memory.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow.compute as pc
from tqdm import tqdm

from recllm.data import readers, tables
from recllm.data.randomness import text_keys
from recllm.data.readers import ORDER, ROW
from recllm.data.spool import Spool
from recllm.errors import UserError
from recllm.recipe import ActionsSection, DataSection, FilterSection, InteractionsSource
from recllm.schema import ACTION, ATTRIBUTE, ITEM_ID, NO_ITEM, RATING, SESSION_ID, TITLE, USER_ID

NO_TEXT = "\0"  # stands for a null action or session where texts are hashed
_BATCH = 1 << 17  # rows read at a time
_ITEM, _UNKNOWN = "__item", "__unknown"


@dataclass(frozen=True)
class Source:
    """The log as it was read: rows that pass every filter but the k-core, with numbers for texts."""

    # user, item (row of `items`, NO_ITEM without one), order, and where the source has them action (-1: null), session
    # (a hash) and, of events, row (place in the files) and the attributes
    rows: Spool
    items: pl.DataFrame  # item_id, title, attributes
    users: list[str]  # by number
    texts: dict[str, list[str]]  # "action" and "attribute:NAME" → texts by number
    counts: dict[str, int]
    skipped: dict[str, str]  # files that could not be read → why
    sha256: dict[str, str]  # of files that another process read


@dataclass
class Scan:
    """A log while it is read: batches of rows in any order, and what else comes to light on the way."""

    names: list[str]  # columns of the log
    batches: Iterator[pl.DataFrame]  # see `selected`
    paths: list[str]  # of the files that are read
    skipped: dict[str, str]  # path → why it could not be read; complete when the batches are through
    sha256: dict[str, str] = field(default_factory=dict)  # of files that this process does not read itself, likewise


class Scanner(Protocol):
    """Opens a log: here (`scan`), or on a cluster (convert/ray_reading.py)."""

    def __call__(
        self,
        data: DataSection,
        filters: FilterSection,
        actions: ActionsSection | None,
        items: pl.DataFrame | None,
    ) -> Scan:
        """The log of a recipe's sections; with `items` as the catalogue."""


def scan(
    data: DataSection,
    filters: FilterSection,
    actions: ActionsSection | None,
    items: pl.DataFrame | None,
    skip_unreadable: bool = False,
) -> Scan:
    """Read in this process, with the streaming engine and all cores.

    Args:
        data, filters, actions: of the recipe.
        items: the catalogue, if there is one.
        skip_unreadable: leave out files that cannot be read to their end, which takes one more pass to know.

    Raises:
        UserError: bad input (see readers), no file that can be read.
    """
    source, skipped = data.interactions, dict[str, str]()
    if skip_unreadable:
        source, skipped = _readable(data, filters, actions)
    scanned = readers.read_interactions(source, not_read(filters), actions)
    names, paths = scanned.collect_schema().names(), readers.paths_of(source)
    frame = selected(scanned, names, items)
    return Scan(names, tables.batches(frame, paths, _BATCH, readers.list_key(source)), paths, skipped)


def _readable(
    data: DataSection, filters: FilterSection, actions: ActionsSection | None
) -> tuple[InteractionsSource, dict[str, str]]:
    """The source without the files that cannot be read, and why not."""
    source, skipped = data.interactions, dict[str, str]()
    for path in readers.log_paths(source, actions):
        try:
            read_through(readers.read_file(path, source, not_read(filters), actions), source)
        except tables.Unreadable as error:
            skipped[path] = str(error)
    left = [path for path in readers.paths_of(source) if path not in skipped]
    refuse_nothing_left(left, skipped)
    return source.model_copy(update={"path": left}), skipped


def refuse_nothing_left(left: Collection[str], skipped: Mapping[str, str]) -> None:
    """An error where every file of a log was skipped."""
    if not left:
        first = next(iter(skipped.values()))
        raise UserError(f"none of the {len(skipped)} files of the log can be read, the first: {first}")


def read_through(file: readers.LogFile, source: InteractionsSource) -> None:
    """Decode every value once: what is broken behind the checked columns shows now.

    Raises:
        Unreadable: it is.
    """
    for _ in tables.batches(file.frame, [file.about.path], _BATCH, readers.list_key(source)):
        pass


def batch_rows() -> int:
    """Rows that are read at a time."""
    return _BATCH


def in_order(
    file: readers.LogFile, source: InteractionsSource, items: pl.DataFrame | None, size: int
) -> Iterator[pl.DataFrame]:
    """The batches of one file as `selected` says, of `size` rows but for the last, however often it is read.

    A task that is lost and run again therefore gives the same batches under the same numbers.
    """
    frame, waiting = selected(file.frame, file.about.names, items, ordered=True), pl.DataFrame()
    paths, key = [file.about.path], readers.list_key(source)
    for batch in tables.batches(frame, paths, size, key, ordered=True):
        waiting = pl.concat([waiting, batch]) if waiting.width else batch
        while waiting.height >= size:
            yield waiting.head(size)
            waiting = waiting.slice(size)
    if waiting.height:
        yield waiting


def selected(
    scanned: pl.LazyFrame, names: Collection[str], items: pl.DataFrame | None, ordered: bool = False
) -> pl.LazyFrame:
    """The columns that are written down: with a catalogue the row of each item in it, otherwise its id.

    Rows come in any order, unless they are `ordered` as in the file.
    """
    wanted = [name for name in (USER_ID, ORDER, RATING, ACTION, SESSION_ID, ROW) if name in names]
    attributes = [name for name in names if name.startswith(ATTRIBUTE)]
    if items is None:
        return scanned.select(*wanted, ITEM_ID, *attributes)
    catalogue = items.lazy().select(ITEM_ID, pl.int_range(pl.len(), dtype=pl.Int32).alias(_ITEM))
    # Build side: by default the engine may hold the log and stream the catalogue.
    order: Any = "left" if ordered else None
    joined = scanned.join(catalogue, on=ITEM_ID, how="left", build_side="force_right", maintain_order=order)
    unknown = (pl.col(_ITEM).is_null() & pl.col(ITEM_ID).is_not_null()).alias(_UNKNOWN)
    return joined.select(*wanted, pl.col(_ITEM).fill_null(NO_ITEM), unknown, *attributes)


def read_rows(
    data: DataSection,
    filters: FilterSection,
    actions: ActionsSection | None,
    folder: Path,
    scanner: Scanner = scan,
) -> Source:
    """Ids become integers early: a row is 16 to 36 bytes, and 4 for each attribute.

    Texts are numbered as they come: memory holds the different ids and attributes, each once, and a batch of rows.
    Attributes that differ in every event (pages, typed text) are therefore all in memory.

    Raises:
        UserError: bad input (see readers), unknown items or actions; session ids where pauses should make sessions.
    """
    items = None if data.items is None else readers.read_items(data.items)
    log = scanner(data, filters, actions, items)
    _check_columns(log.names, data, filters, actions)
    reading = _Reading(log.names, filters, actions, items, folder)
    with tqdm(unit="interaction", desc="read", unit_scale=True, leave=False) as progress:
        for batch in log.batches:
            progress.update(batch.height)
            reading.add(batch)
    if reading.vocabulary and reading.vocabulary.unknown and not reading.vocabulary.drop:
        raise UserError(f"{', '.join(log.paths)}: {reading.vocabulary.complaint()}")
    if reading.unknown and not filters.drop_unknown_items and items is not None:
        left = [path for path in log.paths if path not in log.skipped]
        data = data.model_copy(update={"interactions": data.interactions.model_copy(update={"path": left})})
        raise UserError(_unknown_items(data, filters, actions, items, reading))
    return reading.source(items, log)


def _check_columns(names: list[str], data: DataSection, filters: FilterSection, actions: ActionsSection | None) -> None:
    if RATING not in not_read(filters) and RATING not in names:
        raise UserError(
            "filter.min_rating, like_at and rating_bands need ratings, the source has no rating column: "
            "map one with data.interactions.columns.rating or drop the filter"
        )
    if actions and actions.session_gap_s and SESSION_ID in names:
        column = data.interactions.columns.get(SESSION_ID, SESSION_ID)
        raise UserError(
            f"actions.session_gap_s={actions.session_gap_s} makes sessions from pauses, and the log has session ids in "
            f'column "{column}": leave session_gap_s out, or set data.interactions.columns.session_id=null'
        )


def not_read(filters: FilterSection) -> set[str]:
    """Optional columns that nothing looks at, whatever they hold."""
    rated = filters.min_rating is not None or filters.makes_actions
    return (set() if rated else {RATING}) | ({ACTION} if filters.makes_actions else set())


class _Reading:
    """Takes in a log, batch by batch."""

    def __init__(
        self,
        names: list[str],
        filters: FilterSection,
        actions: ActionsSection | None,
        items: pl.DataFrame | None,
        folder: Path,
    ) -> None:
        self.names, self.filters = names, filters
        self.vocabulary = None if actions is None else _Vocabulary(actions)
        self.users, self.found = _Numbers(), _Numbers()
        self.ids = _Numbers() if items is None else None  # of a log without a catalogue
        self.attributes = {name: _Numbers() for name in names if name.startswith(ATTRIBUTE)}
        self.acts = ACTION in names or filters.makes_actions
        self.rows = Spool(folder, self._row_type())
        self.read = self.rated = self.unknown = 0

    def _row_type(self) -> np.dtype[Any]:
        fields = [("user", np.uint32), ("item", np.int32), ("order", np.int64)]
        fields += [("action", np.int32)] * self.acts + [("session", np.uint64)] * (SESSION_ID in self.names)
        fields += [(ROW, np.int64)] * (ROW in self.names)
        return np.dtype([*fields, *((name, np.uint32) for name in self.attributes)])

    def add(self, batch: pl.DataFrame) -> None:
        """Filter and number the rows of a batch, and write them down."""
        self.read += batch.height
        batch = _by_rating(batch, self.filters)
        self.rated += batch.height
        if self.vocabulary:
            batch = batch.filter(self.vocabulary.known(batch[ACTION]))
        if self.ids is None:
            self.unknown += int(batch[_UNKNOWN].sum())
            batch = batch.filter(~pl.col(_UNKNOWN))
        rows = np.empty(batch.height, self.rows.dtype)
        rows["user"], rows["order"] = self.users.of(batch[USER_ID]), batch[ORDER].to_numpy()
        rows["item"] = batch[_ITEM].to_numpy() if self.ids is None else self.ids.of(batch[ITEM_ID])
        if self.acts:
            rows["action"] = (self.vocabulary or self.found).of(batch[ACTION])
        if SESSION_ID in self.names:
            rows["session"] = _keys(batch[SESSION_ID])
        if ROW in self.names:
            rows[ROW] = batch[ROW].to_numpy()
        for name, numbers in self.attributes.items():
            rows[name] = numbers.of(batch[name])
        self.rows.append(rows)

    def source(self, items: pl.DataFrame | None, log: Scan) -> Source:
        """All that was taken in."""
        counts = {"interactions_read": self.read}
        if self.filters.min_rating is not None:
            counts["after_min_rating"] = self.rated
        known = self.rated
        if self.vocabulary:
            known -= self.vocabulary.unknown.total()
            counts["after_unknown_actions"] = known
        if items is not None:
            counts["after_unknown_items"] = known - self.unknown
        texts = {name: numbers.texts for name, numbers in self.attributes.items()}
        if self.acts:
            texts[ACTION] = (self.vocabulary or self.found).texts
        if self.ids is not None:
            items = _of_ids(self.ids.texts)
        assert items is not None  # one of both there is
        return Source(self.rows, items, self.users.texts, texts, counts, log.skipped, log.sha256)


def _of_ids(item_ids: list[str]) -> pl.DataFrame:
    """A catalogue of the ids in a log: each is its own title."""
    ids = pl.Series(ITEM_ID, item_ids, dtype=pl.String)
    return pl.DataFrame([ids, ids.str.replace_all(tables.CONTROL, " ").alias(TITLE)])


class _Numbers:
    """Numbers texts in the order in which they come; null is -1."""

    def __init__(self) -> None:
        self._number: dict[str, int] = {}

    @property
    def texts(self) -> list[str]:
        return list(self._number)

    def of(self, column: pl.Series) -> npt.NDArray[np.int64]:
        different, places = _different(column)
        numbers = [-1 if text is None else self._number.setdefault(text, len(self._number)) for text in different]
        return np.array(numbers, dtype=np.int64)[places]


class _Vocabulary:
    """Numbers the actions of an event log by their place among the words, and counts those that are not there."""

    def __init__(self, actions: ActionsSection) -> None:
        self.texts, self.drop = list(actions.words), actions.drop_unknown
        self.unknown: Counter[str | None] = Counter()

    def known(self, column: pl.Series) -> pl.Series:
        """Which of a batch's rows have one of the actions."""
        known = column.is_in(self.texts).fill_null(False)
        for label, count in column.filter(~known).value_counts().iter_rows():
            self.unknown[label] += count
        return known

    def of(self, column: pl.Series) -> npt.NDArray[np.int64]:
        different, places = _different(column)
        return np.array([self.texts.index(str(text)) for text in different], dtype=np.int64)[places]

    def complaint(self) -> str:
        """What is wrong with the most frequent of the unknown ones, and the next step."""
        label, count = min(self.unknown.items(), key=lambda one: (-one[1], one[0] or ""))
        others = len(self.unknown) - 1
        return (
            (
                f'{count} events have the action "{label}"'
                if label
                else f"{count} events have no rating in any band, hence no action"
            )
            + (f" and {self.unknown.total() - count} others one of {others} further ones" if others else "")
            + f", which actions.words does not hold, {tables.nearest(label or '', self.texts)}: add it there, drop the "
            "events, or set actions.drop_unknown to true"
        )


def _keys(column: pl.Series) -> npt.NDArray[np.uint64]:
    """Hash of each row's text; null has its own value."""
    different, places = _different(column)
    return text_keys(NO_TEXT if text is None else text for text in different)[places]


def _different(column: pl.Series) -> tuple[list[str | None], npt.NDArray[np.int64]]:
    """Each text once, in any order, and each row's place among them."""
    encoded = pc.dictionary_encode(column.to_arrow(), null_encoding="encode")
    return encoded.dictionary.to_pylist(), encoded.indices.to_numpy()


def _by_rating(batch: pl.DataFrame, filters: FilterSection) -> pl.DataFrame:
    if filters.min_rating is not None:
        batch = batch.filter(pl.col(RATING) >= filters.min_rating)  # blank ratings go, too
    if filters.like_at is not None:
        liked = pl.when(pl.col(RATING) >= filters.like_at).then(pl.lit("like"))
        disliked = pl.when(pl.col(RATING).is_not_null()).then(pl.lit("dislike"))
        batch = batch.with_columns(pl.coalesce(liked, disliked).alias(ACTION))
    elif filters.rating_bands:
        best_first = reversed(filters.rating_bands.items())
        bands = [pl.when(pl.col(RATING) >= lowest).then(pl.lit(label)) for label, lowest in best_first]
        batch = batch.with_columns(pl.coalesce(bands).alias(ACTION))
    return batch


def _unknown_items(
    data: DataSection, filters: FilterSection, actions: ActionsSection | None, items: pl.DataFrame, log: _Reading
) -> str:
    scanned = readers.read_interactions(data.interactions, not_read(filters), actions)
    if filters.min_rating is not None:
        scanned = scanned.filter(pl.col(RATING) >= filters.min_rating)
    missing = scanned.filter(pl.col(ITEM_ID).is_not_null()).join(items.lazy().select(ITEM_ID), on=ITEM_ID, how="anti")
    ids = missing.select(ITEM_ID).unique().sort(ITEM_ID).head(5).collect(engine="streaming")[ITEM_ID].to_list()
    return (
        f"{log.unknown} of {log.rated} interactions have items that {data.items.path if data.items else ''} does not "
        f"hold (item ids {', '.join(ids)}…): add them, check data.items.columns.item_id, or set "
        "filter.drop_unknown_items to true"
    )
