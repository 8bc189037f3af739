"""Written lists of assets against what then happened: what a system wrote enters, its figures leave.

An answer is a JSON list of assets, read strictly (finance.py). It hits where one of its first k entries was bought in
the window (preference), rose in it (profit), or both, by the examples and windows that convert kept in the dataset.
"""

import json
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import polars as pl

from recllm.convert.finance import FOLDER
from recllm.data import finance as examples
from recllm.data.dataset import Dataset
from recllm.errors import UserError
from recllm.evaluate import finance
from recllm.evaluate.baselines import NO_ITEM

LABELS = ("both", "preference", "profit")

Written = Sequence[tuple[str, bool]]  # texts, and whether each ended by itself


def hits_names(k: int) -> list[str]:
    """The metrics that lead the task assets.

    >>> hits_names(3)
    ['hits@3/both', 'hits@3/preference', 'hits@3/profit']
    """
    return [f"hits@{k}/{label}" for label in LABELS]


class Recommendations:
    """Judges answers to N examples of the task assets.

    Args:
        example_ids: (N,) "assets/CUSTOMER/DATE".

    Raises:
        UserError: the dataset does not hold what happened after an example's date.
    """

    def __init__(self, dataset: Dataset, split: str, example_ids: Sequence[str]) -> None:
        labels = _task(dataset, split, [name.partition("/")[2] for name in example_ids]).labels()
        self.groups: dict[str, npt.NDArray] = {}  # segments of its own
        self.offered = labels.pop("offered")  # (N, A) had a price before the date
        self.labels = {name: labels[name] for name in LABELS}  # (N, A) each
        self._titles = dataset.titles
        self._assets = finance.vocabulary(dataset.items["item_id"].to_pylist(), dataset.titles)

    def leading(self, cutoffs: Sequence[int]) -> list[str]:
        """The metrics that are compared."""
        return hits_names(max(cutoffs))

    def listed(self, cutoffs: Sequence[int]) -> int:
        """How many assets a baseline lists."""
        return max(cutoffs)

    def figures(self, written: Written, cutoffs: Sequence[int]) -> dict[str, npt.NDArray[np.float64]]:
        """hits@k/LABEL, and what became of the answers as text; each (N,)."""
        answers = finance.read_answers([text for text, _ in written], [end for _, end in written], self._assets)
        return finance.recommendation(answers, self.labels, cutoffs)

    def chance(self, cutoffs: Sequence[int]) -> dict[str, npt.NDArray[np.float64]]:
        """hits@k/LABEL that is expected of assets drawn uniformly from those on offer."""
        return {
            f"hits@{k}/{name}": finance.chance(relevant, k, self.offered)
            for name, relevant in self.labels.items()
            for k in cutoffs
        }

    def write(self, assets: npt.NDArray[np.int64]) -> list[tuple[str, bool]]:
        """Lists of asset numbers (N, C), best first, NO_ITEM for none, as the answers that a model would write."""
        return written_lists(assets, self._titles)

    def advisers(self) -> dict[str, list[tuple[str, bool]]]:
        """What answers beside the baselines: nobody."""
        return {}


def written_lists(assets: npt.NDArray[np.int64], titles: Sequence[str]) -> list[tuple[str, bool]]:
    """Lists of asset numbers (N, C), best first, NO_ITEM for none, as the answers that a model would write.

    >>> written_lists(np.array([[1, 0], [0, NO_ITEM]]), ["A", "B"])
    [('["B", "A"]', True), ('["A"]', True)]
    """
    lists = ([titles[asset] for asset in row if asset != NO_ITEM] for row in assets.tolist())
    return [(json.dumps(names, ensure_ascii=False), True) for names in lists]


def _task(dataset: Dataset, split: str, names: Sequence[str]) -> examples.Task:
    """The examples of these names, in this order, with their windows."""
    folder = dataset.folder / FOLDER
    try:
        known, windows = (pl.read_parquet(folder / f"{split}_{what}.parquet") for what in ("examples", "windows"))
    except (OSError, pl.exceptions.PolarsError) as error:
        raise UserError(
            f"{folder} cannot be read ({str(error).splitlines()[0]}): it says what happened after the "
            "dates of the task assets, convert again"
        ) from None
    found = pl.DataFrame({"example_id": names}).join(known, on="example_id", how="inner", maintain_order="left")
    if found.height != len(names):
        raise UserError(
            f"{folder} holds {found.height} of the {len(names)} evaluated examples of {split}: convert again"
        )
    return examples.Task(found, windows, dataset.num_items)
