"""Written orders of candidate assets against a customer's utility and choice: the task rank_assets.

What a system wrote enters, its figures leave. An answer is a JSON list of assets, read strictly (finance.py): all
candidates, each once, or it is no ranking. Utility, momentum and safety of the candidates, and which one the customer
then bought first, are those that convert kept in the dataset.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import polars as pl

from recllm.convert.finance import FOLDER
from recllm.data.dataset import Dataset
from recllm.data.finance_choices import Rankings
from recllm.errors import UserError
from recllm.evaluate import finance
from recllm.evaluate.recommendations import Written, written_lists

LEADING = ("undcg/rank", "mrr", "tau/utility")  # the metrics that lead the task
SIGNED = tuple(f"tau/{name}" for name in finance.Views._fields)  # within −1 and 1, the others within 0 and 1
ADVISERS = {  # scorers beside the baselines; of the utility what completions teach
    "momentum": "the candidates by falling mean return",
    "safety": "the candidates by rising risk, λ z(σ²) + γ z(drawdown), of each customer's fitted λ and γ",
    "fitted_utility": "the candidates by each customer's fitted utility: the order that completions teach, and so the "
    "ceiling of undcg and tau/utility",
}


class AssetRankings:
    """Judges answers to N examples of the task rank_assets with C candidates among A assets.

    Args:
        example_ids: (N,) "rank_assets/CUSTOMER/DATE".

    Raises:
        UserError: the dataset does not hold an example's candidates.
    """

    def __init__(self, dataset: Dataset, split: str, example_ids: Sequence[str]) -> None:
        rankings = _rankings(dataset, split, [name.partition("/")[2] for name in example_ids])
        self.candidates = rankings.matrix("candidates")  # (N, C) item_index
        self.chosen, self.seen = rankings.chosen, rankings.views()
        self.offered = np.zeros((len(self.candidates), dataset.num_items), dtype=bool)  # (N, A) is a candidate
        np.put_along_axis(self.offered, self.candidates, True, axis=1)
        own = rankings.table["own_taste"].to_numpy()
        self.groups = {"taste": np.where(own, "of their own", "of all customers")}  # segments, (N,) each
        self._titles = dataset.titles
        self._assets = finance.vocabulary(dataset.items["item_id"].to_pylist(), dataset.titles)

    def leading(self, _: Sequence[int]) -> list[str]:
        """The metrics that are compared."""
        return list(LEADING)

    def listed(self, _: Sequence[int]) -> int:
        """How many assets a baseline lists: all candidates."""
        return self.candidates.shape[1]

    def figures(self, written: Written, cutoffs: Sequence[int]) -> dict[str, npt.NDArray[np.float64]]:
        """All figures of Conv-FinRe, each (N,)."""
        answers = finance.read_answers([text for text, _ in written], [end for _, end in written], self._assets)
        return finance.ranking(answers, self.candidates, self.chosen, self.seen, cutoffs)

    def chance(self, cutoffs: Sequence[int]) -> dict[str, npt.NDArray[np.float64]]:
        """What is expected of an order drawn uniformly."""
        return finance.expected_ranking(self.seen, cutoffs)

    def write(self, assets: npt.NDArray[np.int64]) -> list[tuple[str, bool]]:
        """Lists of asset numbers (N, C), best first, as the answers that a model would write."""
        return written_lists(assets, self._titles)

    def advisers(self) -> dict[str, list[tuple[str, bool]]]:
        """What momentum, safety and utility themselves answer; equal scores stand as in the prompt."""
        found = zip(ADVISERS, (self.seen.momentum, self.seen.safety, self.seen.utility))
        order = {name: np.argsort(-scores, axis=1, kind="stable") for name, scores in found}
        return {name: self.write(np.take_along_axis(self.candidates, rows, axis=1)) for name, rows in order.items()}


def _rankings(dataset: Dataset, split: str, names: Sequence[str]) -> Rankings:
    """The examples of these names, in this order."""
    path = dataset.folder / FOLDER / f"{split}_rankings.parquet"
    try:
        known = pl.read_parquet(path)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise UserError(
            f"{path} cannot be read ({str(error).splitlines()[0]}): it holds the candidates and tastes of the task "
            "rank_assets, convert again"
        ) from None
    found = pl.DataFrame({"example_id": names}).join(known, on="example_id", how="inner", maintain_order="left")
    if found.height != len(names):
        raise UserError(f"{path} holds {found.height} of the {len(names)} evaluated examples: convert again")
    return Rankings(found)
