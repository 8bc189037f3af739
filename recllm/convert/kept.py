"""A prepared log on disk, so that a run which was killed does not read, group and split it again.

A `Prepared` and the folder with its sequences.parquet enter, the files of FILES leave there; and back. The folder takes
its name when all of them are written (ray_engine.Done), and its note names their sizes.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from recllm import files
from recllm.data.sequences import Prepared
from recllm.data.stored import StoredSequences

SEQUENCES = "sequences.parquet"
FILES = (SEQUENCES, "lengths.npy", "train_counts.npy", "items.arrow", "users.arrow")  # users where data has any
_NOTE = "prepared.json"
_PLAIN = ("actions", "split", "audit", "inputs", "skipped", "counts")  # fields of Prepared that JSON holds


def write(prepared: Prepared, folder: Path) -> None:
    """Write all but the sequences, which lie in `folder` already; the further columns are not kept.

    Raises:
        OSError: the disk is full.
    """
    np.save(folder / "lengths.npy", prepared.sequences.lengths, allow_pickle=False)
    np.save(folder / "train_counts.npy", prepared.train_counts, allow_pickle=False)
    prepared.items.write_ipc(folder / "items.arrow")
    if prepared.users is not None:
        prepared.users.write_ipc(folder / "users.arrow")
    sizes = {name: (folder / name).stat().st_size for name in FILES if (folder / name).exists()}
    # not sorted, as files.write_json would have it: a summary lists the audit in its own order
    text = json.dumps({"sizes": sizes, **{name: getattr(prepared, name) for name in _PLAIN}})
    files.write_text(folder / _NOTE, text)


def read(folder: Path) -> Prepared | None:
    """What `write` was given; None where the folder is not there, or a file has not the size that the note names."""
    try:
        note: dict[str, Any] = json.loads((folder / _NOTE).read_text(encoding="utf-8"))
        noted = note.pop("sizes")
        sizes = {name: (folder / name).stat().st_size for name in noted}
    except FileNotFoundError:
        return None
    if sizes != noted:
        return None
    users = folder / "users.arrow"
    return Prepared(
        sequences=StoredSequences(folder / SEQUENCES, np.load(folder / "lengths.npy", allow_pickle=False)),
        items=pl.read_ipc(folder / "items.arrow"),
        users=pl.read_ipc(users) if users.name in sizes else None,
        train_counts=np.load(folder / "train_counts.npy", allow_pickle=False),
        **note,
    )
