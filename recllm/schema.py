"""Column names and Arrow schemas of every file that passes between stages (ARCHITECTURE.md, "The files").

Nothing enters and nothing leaves: this module only names things, and imports nothing heavier than NumPy and pyarrow.
"""

import hashlib
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import pyarrow as pa

USER_ID, ITEM_ID, TIMESTAMP = "user_id", "item_id", "timestamp"
ACTION, RATING, SESSION_ID = "action", "rating", "session_id"
TITLE = "title"

# What a reader yields. Optional columns are absent, never filled with nulls.
INTERACTIONS = pa.schema(
    [
        pa.field(USER_ID, pa.string(), nullable=False),
        pa.field(ITEM_ID, pa.string(), nullable=False),
        pa.field(TIMESTAMP, pa.int64(), nullable=False),  # seconds since the epoch
        pa.field(ACTION, pa.string()),
        pa.field(RATING, pa.float32()),
        pa.field(SESSION_ID, pa.string()),
    ]
)
REQUIRED_INTERACTION_COLUMNS = (USER_ID, ITEM_ID, TIMESTAMP)

# item_index runs 0..n-1 in row order; every further column is an attribute a template may use.
ITEMS = pa.schema(
    [
        pa.field("item_index", pa.int32(), nullable=False),
        pa.field(ITEM_ID, pa.string(), nullable=False),
        pa.field(TITLE, pa.string(), nullable=False),
    ]
)

NO_ITEM = -1  # in `items` of an event that has none
ATTRIBUTE = "attribute:"  # and its name: columns of sequences.parquet with what the log says of each event

# The role of one position of a user's sequence, as the target of an example.
UNUSED, TRAIN, VALID, TEST = 0, 1, 2, 3
SPLIT_CODES = {"train": TRAIN, "valid": VALID, "test": TEST}

# One row a user, the whole history once, oldest first. The lists of a row have equal length.
SEQUENCES = pa.schema(
    [
        pa.field("user_index", pa.int32(), nullable=False),
        pa.field(USER_ID, pa.string(), nullable=False),
        pa.field("user_key", pa.uint64(), nullable=False),  # hash of user_id: every random choice hangs on (seed, key)
        pa.field("items", pa.list_(pa.int32()), nullable=False),  # item_index; NO_ITEM of events without one
        pa.field("timestamps", pa.list_(pa.int64()), nullable=False),
        pa.field("splits", pa.list_(pa.int8()), nullable=False),  # UNUSED, TRAIN, VALID or TEST
        pa.field("actions", pa.list_(pa.string())),  # null where the source has no actions
        pa.field("sessions", pa.list_(pa.int32())),  # number of the session within the user; null without sessions
    ]
)

MESSAGES = pa.list_(pa.struct([pa.field("role", pa.string()), pa.field("content", pa.string())]))

DATASET_FORMAT = 4  # counted up when the columns below change: what was converted before is converted again

# One row an example. `prompt` may end in an assistant message: the completion then continues it.
EXAMPLES = pa.schema(
    [
        # "<task>/<user_id>/<position>", position = history_end; of a bank's tasks "<task>/<user_id>/<date>"
        pa.field("example_id", pa.string(), nullable=False),
        pa.field("task", pa.string(), nullable=False),
        pa.field("user_index", pa.int32(), nullable=False),
        pa.field("history_end", pa.int32(), nullable=False),  # position of the target, of a window its first item
        pa.field("gate_end", pa.int32(), nullable=False),  # the gate reads positions [0, gate_end)
        # of position history_end: nothing seen is newer; of a bank's tasks the date's midnight: all seen is older
        pa.field("timestamp", pa.int64(), nullable=False),
        pa.field("prompt", MESSAGES, nullable=False),
        pa.field("completion", MESSAGES, nullable=False),
        pa.field("target", pa.int32()),  # item_index; of a dense window its last item; null where a list is asked for
        pa.field("candidates", pa.list_(pa.int32())),  # item_index, target included, seeded order; null in training
        pa.field("label", pa.string()),  # right answer of a closed task, question, explanation or list, else null
        pa.field("choices", pa.list_(pa.string())),  # of a question about an item: the label and wrong answers
        pa.field("relation", pa.string()),  # of a question about an item: what is asked of it; else null
        pa.field("session", pa.int32()),  # of event datasets: the target's, by number within the user
        pa.field("rationale", pa.string()),  # what the completion writes before its answer, on one line; else null
    ]
)

SPLITS = ("train", "valid", "test")


def sequences_schema(attributes: Iterable[str] = ()) -> pa.Schema:
    """SEQUENCES with a column for each attribute of an event log.

    >>> sequences_schema(["text"]).names[-1]
    'attribute:text'
    """
    return pa.schema([*SEQUENCES, *(pa.field(f"{ATTRIBUTE}{name}", pa.list_(pa.string())) for name in attributes)])


def event_codes(
    items: npt.NDArray[np.integer], actions: npt.NDArray[np.integer], num_items: int
) -> npt.NDArray[np.int64]:
    """(item, action) of each event as one integer ≥ 0, which is what an encoder of events reads. Shapes are alike.

    code = (item + 1) + (num_items + 1) · action, with item = NO_ITEM where there is none.

    >>> event_codes(np.array([NO_ITEM, 1]), np.array([0, 2]), num_items=2).tolist()
    [0, 8]
    """
    return np.asarray(items, np.int64) + 1 + (num_items + 1) * np.asarray(actions, np.int64)


def items_of(codes: npt.NDArray[np.int64], num_items: int) -> npt.NDArray[np.int64]:
    """The items of event codes; NO_ITEM where there is none.

    >>> items_of(np.array([0, 8]), 2).tolist()
    [-1, 1]
    """
    return codes % (num_items + 1) - 1


def actions_of(codes: npt.NDArray[np.int64], num_items: int) -> npt.NDArray[np.int64]:
    """The numbers of the actions of event codes.

    >>> actions_of(np.array([0, 8]), 2).tolist()
    [0, 2]
    """
    return codes // (num_items + 1)


def vocabulary_sha256(item_ids: Iterable[str]) -> str:
    """Fingerprint of an item vocabulary: item ids in item_index order.

    An encoder or adapter is bound to the vocabulary that it was trained on by this value.

    >>> vocabulary_sha256(["a", "b"]) == vocabulary_sha256(["b", "a"])
    False
    """
    digest = hashlib.sha256()
    for item_id in item_ids:
        digest.update(item_id.encode() + b"\n")
    return digest.hexdigest()


def event_vocabulary_sha256(item_ids: Iterable[str], actions: Iterable[str]) -> str:
    """The same of an event dataset: item ids in item_index order, and action labels in the order of their numbers."""
    digest = hashlib.sha256(vocabulary_sha256(item_ids).encode())
    for label in actions:
        digest.update(b"\0" + label.encode() + b"\n")
    return digest.hexdigest()
