"""Writes logs of any size that look like logs: Zipf popularity, sessions, times. For benchmarks and tests.

Sizes and a seed enter; a folder with interactions.parquet and items.parquet leaves, streamed in batches.
"""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from recllm import files

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
    generator = np.random.default_rng(seed)
    with files.replacing_folder(Path(path)) as folder:
        _write_items(folder / "items.parquet", num_items)
        popularity = np.cumsum(1 / np.arange(1, num_items + 1))
        shuffled = generator.permutation(num_items)  # popular items stand anywhere in the catalogue
        writer = None
        for start in range(0, num_interactions, _BATCH):
            rows = np.arange(start, min(start + _BATCH, num_interactions))
            table = _batch(generator, rows, num_interactions, num_users, popularity, shuffled)
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
