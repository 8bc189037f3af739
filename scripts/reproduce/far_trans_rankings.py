"""How much is personal in the orders that `rank_assets` teaches? No model is trained: convert, and what its files hold.

    python scripts/reproduce/far_trans_rankings.py                        the drawn bank of far_trans/rank_assets_ilora
    python scripts/reproduce/far_trans_rankings.py finance.folder=FOLDER  a bank of your own; any override of the recipe

Of the test examples: the share whose customer's fitted λ and γ are both 0 (`without_fear`), so that utility is
momentum; the share with a taste of their own; and of momentum (the same order for everybody), safety and the fitted
utility itself: the utility NDCG, the MRR of what was bought, and Kendall's τ with the utility, means with 95% intervals
(bootstrap over customers). The last line is one JSON object.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from recllm.convert.finance import FOLDER
from recllm.convert.pipeline import convert
from recllm.convert.templates import RANK_ASSETS
from recllm.data.dataset import Dataset
from recllm.evaluate.asset_rankings import LEADING, AssetRankings
from recllm.evaluate.statistics import as_json, bootstrap_means
from recllm.recipe import load_recipe

RECIPE = "far_trans/rank_assets_ilora"


def main() -> None:
    """Convert into a folder of its own and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of the recipe")
    parser.add_argument("--recipe", default=RECIPE)
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    with tempfile.TemporaryDirectory() as folder:
        convert(recipe, Path(folder) / "dataset", workers=1)
        line = measure(Dataset.open(Path(folder) / "dataset"), recipe.protocol.ranking.k)
    for name, figures in line["advisers"].items():
        said = (f"{metric} {e['value']:.3f} [{e['low']:.3f}, {e['high']:.3f}]" for metric, e in figures.items())
        print(f"{name}: {', '.join(said)}")
    print(json.dumps({"bench": "far_trans_rankings", "recipe": arguments.recipe, **line}))


def measure(dataset: Dataset, cutoffs: list[int]) -> dict[str, Any]:
    """Of all test examples."""
    table = pl.read_parquet(dataset.folder / FOLDER / "test_rankings.parquet")
    rankings = AssetRankings(dataset, "test", [f"{RANK_ASSETS}/{name}" for name in table["example_id"]])
    customers = np.unique(table["customer_id"].to_numpy(), return_inverse=True)[1]
    advisers = {}
    for name, written in rankings.advisers().items():
        figures = rankings.figures(written, cutoffs)
        columns = np.stack([figures[metric] for metric in LEADING], axis=1)  # (N, M)
        found = bootstrap_means(columns, customers, np.random.default_rng(0))
        advisers[name] = {metric: as_json(estimate) for metric, estimate in zip(LEADING, found, strict=True)}
    fearless = (table["taste_variance"].to_numpy() == 0) & (table["taste_drawdown"].to_numpy() == 0)
    return {
        "examples": table.height,
        "customers": int(customers.max()) + 1,
        "without_fear": round(float(fearless.mean()), 4),
        "own_taste": round(float(table["own_taste"].to_numpy().mean()), 4),
        "advisers": advisers,
    }


if __name__ == "__main__":
    main()
