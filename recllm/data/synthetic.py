"""Writes logs that look like logs: of any size for benchmarks, or of a known process for evidence.

Sizes and a seed enter; a folder with interactions.parquet and items.parquet leaves. `write_interactions` streams items
that have nothing to do with each other, `write_events` events of such sessions. `write_clusters` draws users from
hidden clusters whose transition tables are known, so that the best possible score is known too (`best_score`,
`window_score`, `bayes_scores`).
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from recllm import files
from recllm.errors import UserError

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_BATCH = 1 << 19
_START_S = 1_600_000_000
_SESSION_LENGTH = 8  # mean number of interactions
_ADJECTIVES = ("Quiet", "Red", "Last", "Golden", "Hidden", "Broken", "Distant", "Silver")
_NOUNS = ("River", "Garden", "Signal", "Winter", "Harbour", "Letter", "Mirror", "Road")


def write_interactions(path: Path, num_interactions: int, num_users: int, num_items: int, seed: int) -> Path:
    """Write a synthetic log; the folder is complete or absent.

    Users have about equal numbers of interactions, items are drawn by a Zipf law (exponent 1), a user's times run
    forward in sessions of about eight, each beginning at a random moment of a year. Rows are in time order within a
    user, users one after the other.

    Returns:
        The folder `path`, with interactions.parquet (user_id, item_id, timestamp, session_id, rating) and items.parquet
        (item_id, title, genre).
    """
    return _write(path, num_interactions, num_users, num_items, seed, lambda table, _: table)


def write_events(path: Path, num_events: int, num_users: int, num_items: int, seed: int) -> Path:
    """Write a synthetic log of events, as `write_interactions` does.

    Returns:
        The folder `path`, with interactions.parquet (user_id, item_id, timestamp, session_id, action, query) and
        items.parquet. Of ten events six are "view", one "cart", "buy" and "save", with an item, and one is "search",
        with a query of two words in place of it.
    """
    return _write(path, num_events, num_users, num_items, seed, _as_events)


def _as_events(table: pa.Table, generator: np.random.Generator) -> pa.Table:
    """Interactions with actions, and searches among them."""
    drawn = generator.integers(0, 10, table.num_rows)
    actions = pa.array(["view"] * 6 + ["cart", "buy", "save", "search"]).take(pa.array(drawn))
    searches = pa.array(drawn == 9)
    words = pa.array([f"{adjective} {noun}".lower() for adjective in _ADJECTIVES for noun in _NOUNS])
    query = words.take(pa.array(generator.integers(0, len(words), table.num_rows)))
    item = pc.if_else(searches, pa.scalar(None, pa.int64()), table["item_id"])
    table = table.drop_columns("rating").set_column(table.schema.get_field_index("item_id"), "item_id", item)
    return table.append_column("action", actions).append_column("query", pc.if_else(searches, query, ""))


def _write(
    path: Path,
    num_interactions: int,
    num_users: int,
    num_items: int,
    seed: int,
    finish: Callable[[pa.Table, np.random.Generator], pa.Table],
) -> Path:
    """Write the log in batches, each as `finish` makes it of interactions."""
    generator = np.random.default_rng(seed)
    with files.replacing_folder(Path(path)) as folder:
        _write_items(folder / "items.parquet", num_items)
        popularity = np.cumsum(1 / np.arange(1, num_items + 1))
        shuffled = generator.permutation(num_items)  # popular items stand anywhere in the catalogue
        writer = None
        for start in range(0, num_interactions, _BATCH):
            rows = np.arange(start, min(start + _BATCH, num_interactions))
            table = finish(_batch(generator, rows, num_interactions, num_users, popularity, shuffled), generator)
            writer = writer or pq.ParquetWriter(folder / "interactions.parquet", table.schema)
            writer.write_table(table)
        if writer:
            writer.close()
    return Path(path)


def _batch(
    generator: np.random.Generator,
    rows: npt.NDArray[np.int64],
    num_interactions: int,
    num_users: int,
    popularity: npt.NDArray[np.float64],
    shuffled: npt.NDArray[np.int64],
) -> pa.Table:
    users = rows * num_users // num_interactions
    begins = -(-users * num_interactions // num_users)  # first row of the user
    sessions = (rows - begins) // _SESSION_LENGTH
    places = (rows - begins) % _SESSION_LENGTH
    year_s = 365 * 86_400
    per_user = num_interactions // num_users // _SESSION_LENGTH + 1
    lot = (users * 2_654_435_761 % 1_000_003) / 1_000_003  # a user's own phase: a batch border does not matter
    session_start = ((sessions + lot) / per_user * year_s).astype(np.int64)
    items = shuffled[np.searchsorted(popularity, generator.random(len(rows)) * popularity[-1])]
    return pa.table(
        {
            "user_id": pa.array(users + 1),
            "item_id": pa.array(items + 1),
            "timestamp": pa.array(_START_S + session_start + places * 60 + generator.integers(0, 60, len(rows))),
            "session_id": pa.array(users * (per_user + 1) + sessions),
            "rating": pa.array(generator.integers(1, 6, len(rows)).astype(np.float32)),
        }
    )


def _write_items(path: Path, num_items: int) -> None:
    numbers = range(1, num_items + 1)
    titles = [f"The {_ADJECTIVES[n % 8]} {_NOUNS[n // 8 % 8]} {n}" for n in numbers]
    genres = [("drama", "comedy", "thriller")[n % 3] for n in numbers]
    pq.write_table(pa.table({"item_id": list(numbers), "title": titles, "genre": genres}), path)


# ---- hidden clusters ----

_DAY_S = 86_400
_EXACT_PATHS = 1 << 26  # numbers in the table of all windows: 512 MiB in float64


@dataclasses.dataclass(frozen=True)
class Clusters:
    """A log of hidden user clusters: which items follow which, and how often. N = num_tiers · tier_size items.

    Items stand in tiers of equal popularity; the popularity of tiers is Zipf's. From an item a user goes, with
    probability 1 − jump, to one of `num_clusters` successors in the same tier, and otherwise to any item by popularity.
    The user's own cluster names one successor, which has probability `focus`; the others share the rest. In a tier
    where the clusters agree, all of them name the same one. So

        P_c[i, j] = (1 − jump) · Σ_k w[(k − c · conflicts) mod C] · [j is successor k of i] + jump · popularity[j]

    Successor k is a permutation of the tier, and no two of them share an arrow. Hence the rows of all clusters are
    permutations of each other's, popularity is stationary for every cluster at every `conflict`, and the successors of
    an item are equally popular: after the last item is known, popularity says nothing, only the cluster does.
    """

    num_clusters: int = 4  # C
    num_tiers: int = 8
    tier_size: int = 8
    conflict: float = 1.0  # share of the interactions in tiers where clusters differ; 0: one table for all users
    focus: float = 0.7
    jump: float = 0.05
    zipf: float = 1.0  # exponent of the tiers' popularity
    seed: int = 0  # of the successors and the titles

    def __post_init__(self) -> None:
        if not 2 <= self.num_clusters < self.tier_size:
            raise UserError(
                f"num_clusters={self.num_clusters} with tier_size={self.tier_size}: at least 2 clusters and fewer than "
                "a tier has items are expected, or the successors of an item would not differ: raise tier_size"
            )
        for name in ("conflict", "focus", "jump"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name}={getattr(self, name)}: a share from 0 to 1 is expected")

    @property
    def num_items(self) -> int:
        """N."""
        return self.num_tiers * self.tier_size

    @property
    def tiers(self) -> Ints:
        """(N,) the tier of each item, 0 the most popular."""
        return np.arange(self.num_items) // self.tier_size

    @property
    def popularity(self) -> Floats:
        """(N,) share of each item in the interactions, equal within a tier."""
        shares = 1 / np.arange(1, self.num_tiers + 1) ** self.zipf
        return np.repeat(shares / shares.sum() / self.tier_size, self.tier_size)

    @property
    def conflicting(self) -> npt.NDArray[np.bool_]:
        """(tiers,) where the clusters differ: popular tiers first, as long as their share fits into `conflict`."""
        shares = self.popularity.reshape(self.num_tiers, -1).sum(1)
        chosen, left = np.zeros(self.num_tiers, bool), self.conflict + 1e-9
        for tier, share in enumerate(shares):
            if share <= left:
                chosen[tier], left = True, left - share
        return chosen

    @property
    def successors(self) -> Ints:
        """(C, N): successor k of each item. In a ring of the tier's items in random order, the k-th neighbour."""
        generator = np.random.default_rng([self.seed, 0])
        following = np.empty((self.num_clusters, self.num_items), dtype=np.int64)
        for begin in range(0, self.num_items, self.tier_size):
            ring = begin + generator.permutation(self.tier_size)
            for k in range(self.num_clusters):
                following[k, ring] = np.roll(ring, -(k + 1))
        return following

    @property
    def tables(self) -> Floats:
        """(C, N, N): P_c[i, j], the probability that j follows i for a user of cluster c; rows sum to 1."""
        others = (1 - self.focus) / (self.num_clusters - 1)
        weights = np.where(np.arange(self.num_clusters) == 0, self.focus, others)
        tables = np.tile(self.jump * self.popularity, (self.num_clusters, self.num_items, 1))
        items = np.arange(self.num_items)
        for k, following in enumerate(self.successors):
            for cluster in range(self.num_clusters):
                own = (k - cluster * self.conflicting[self.tiers]) % self.num_clusters  # (N,)
                tables[cluster, items, following] += (1 - self.jump) * weights[own]
        return tables


class Score(NamedTuple):
    """How well the next item is predicted, on average."""

    nats: float  # −ln of the probability given to it
    hit_rate: float  # @1: the most probable item is it; of several equally probable ones any is as good


def best_score(world: Clusters) -> Score:
    """Of a predictor that knows the user's cluster and the last item: nobody does better. Exact."""
    weights = np.repeat(world.popularity[None] / world.num_clusters, world.num_clusters, 0)  # (C, N)
    return _expected(world.tables.reshape(-1, world.num_items), weights.ravel())


def window_score(world: Clusters, window: int) -> Score:
    """Of Bayes' predictor that sees the last `window` items and nothing else of the user. Exact, over all windows.

    The first item of a window is drawn by popularity, which is stationary; the posterior of the clusters weighs their
    tables. By the rings' symmetry one first item a tier stands for all.

    Raises:
        UserError: no window, or one with too many possible contents: `bayes_scores` estimates those from a sample.
    """
    tables, size = world.tables, world.num_items
    if window < 1 or world.num_tiers * world.num_clusters * size**window > _EXACT_PATHS:
        raise UserError(
            f"a window of {window} of {size} items is not enumerated: at least 1 is expected, and few enough items; "
            "estimate it with bayes_scores"
        )
    first = np.arange(0, size, world.tier_size)
    paths = np.repeat(world.popularity[None, first] * world.tier_size / world.num_clusters, world.num_clusters, 0)
    last = first
    for _ in range(window - 1):  # paths (C, P): probability of cluster and path; last (P,): where it stands
        paths = (paths[:, :, None] * tables[:, last]).reshape(world.num_clusters, -1)
        last = np.tile(np.arange(size), len(last))
    mass = paths.sum(0)
    reached = mass > 0
    mixed = np.einsum("cp,cpn->pn", paths[:, reached] / mass[reached], tables[:, last[reached]])
    return _expected(mixed, mass[reached])


def _expected(rows: Floats, weights: Floats) -> Score:
    """Rows (P, N) of true next-item probabilities, each met with a weight (P,)."""
    logs = np.log(rows, out=np.zeros_like(rows), where=rows > 0)
    return Score(float(-(rows * logs).sum(1) @ weights), float(rows.max(1) @ weights))


def bayes_scores(
    world: Clusters, sequences: Ints, window: int | None = None, clusters: Ints | None = None
) -> tuple[Floats, Floats]:
    """Nats and hits of Bayes' predictor at every position but the first of sequences (U, L): two arrays (U, L − 1).

    It sees the last `window` items before the position (None: all), or with `clusters` (U,) the user's cluster. A hit
    counts 1/n where n items are equally probable.
    """
    tables = world.tables
    steps = np.log(np.maximum(tables[:, sequences[:, :-1], sequences[:, 1:]], 1e-300))  # (C, U, L - 1)
    evidence = np.concatenate([np.zeros((*steps.shape[:2], 1)), np.cumsum(steps, axis=2)], axis=2)  # (C, U, L)
    nats, hits = np.empty(steps.shape[1:]), np.empty(steps.shape[1:])
    for position in range(1, sequences.shape[1]):
        begin = 0 if window is None else max(0, position - window)
        known = evidence[:, :, position - 1] - evidence[:, :, begin]  # (C, U)
        posterior = np.exp(known - known.max(0))
        if clusters is not None:
            posterior = np.equal.outer(np.arange(world.num_clusters), clusters).astype(np.float64)
        rows = np.einsum("cu,cun->un", posterior / posterior.sum(0), tables[:, sequences[:, position - 1]])
        own = rows[np.arange(len(rows)), sequences[:, position]]
        best = rows.max(1, keepdims=True)
        ties = rows >= best * (1 - 1e-9)
        nats[:, position - 1] = -np.log(own)
        hits[:, position - 1] = (own >= best[:, 0] * (1 - 1e-9)) / ties.sum(1)
    return nats, hits


def draw_sequences(world: Clusters, num_users: int, length: int, seed: int) -> tuple[Ints, Ints]:
    """Clusters (U,), in equal shares, and sequences (U, L) of items; the first item is drawn by popularity."""
    generator = np.random.default_rng([seed, 1])
    clusters = generator.permutation(np.arange(num_users) % world.num_clusters)
    cumulated = np.cumsum(world.tables, axis=2)
    sequences = np.empty((num_users, length), dtype=np.int64)
    sequences[:, 0] = _drawn(np.cumsum(world.popularity)[None], generator.random(num_users))
    for position in range(1, length):
        rows = cumulated[clusters, sequences[:, position - 1]]  # (U, N)
        sequences[:, position] = _drawn(rows, generator.random(num_users))
    return clusters, sequences


def _drawn(cumulated: Floats, lots: Floats) -> Ints:
    """First place where the cumulated probability (U, N) or (1, N) exceeds each lot (U,)."""
    return np.minimum((cumulated <= lots[:, None]).sum(1), cumulated.shape[1] - 1)


def write_clusters(path: Path, world: Clusters, num_users: int, length: int, seed: int) -> Path:
    """Write a log of users of hidden clusters; the folder is complete or absent.

    Returns:
        The folder `path`, with interactions.parquet (user_id, item_id, timestamp), items.parquet (item_id, title,
        colour, thing: a title is a colour and a thing, the thing is the item's tier), clusters.parquet (user_id,
        cluster) and world.json, the arguments of `Clusters`. Item n has item_id n, user u has user_id u.

    Raises:
        UserError: sequences of fewer than two items.
    """
    if length < 2 or num_users < 1:
        raise UserError(f"{num_users} users with {length} items each: at least 1 user with 2 items is expected")
    clusters, sequences = draw_sequences(world, num_users, length, seed)
    generator = np.random.default_rng([seed, 2])
    start = generator.integers(0, 365 * _DAY_S, num_users)
    times = _START_S + start[:, None] + np.cumsum(generator.integers(600, 2 * _DAY_S, sequences.shape), axis=1)
    users = np.arange(num_users)
    log = {"user_id": np.repeat(users, length), "item_id": sequences.ravel(), "timestamp": times.ravel()}
    with files.replacing_folder(Path(path)) as folder:
        pq.write_table(pa.table(log), folder / "interactions.parquet")
        pq.write_table(pa.table(_titled(world)), folder / "items.parquet")
        pq.write_table(pa.table({"user_id": users, "cluster": clusters}), folder / "clusters.parquet")
        files.write_json(folder / "world.json", dataclasses.asdict(world))
    return Path(path)


def _titled(world: Clusters) -> dict[str, list[int] | list[str]]:
    """Titles of attribute words; which colour an item has says nothing of its place in the ring."""
    generator = np.random.default_rng([world.seed, 3])
    colours = [_word(_ADJECTIVES, place) for place in range(world.tier_size)]
    things = [_word(_NOUNS, tier) for tier in world.tiers]
    own = [colours[place] for _ in range(world.num_tiers) for place in generator.permutation(world.tier_size)]
    titles = [f"{colour} {thing}" for colour, thing in zip(own, things)]
    return {"item_id": list(range(world.num_items)), "title": titles, "colour": own, "thing": things}


def _word(words: tuple[str, ...], number: int) -> str:
    """A word for each number; beyond the list with a letter behind it."""
    turn, place = divmod(number, len(words))
    return words[place] + (chr(ord("a") + turn - 1) if turn else "")
