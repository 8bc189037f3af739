"""The whole line on a bank's data with a tiny model: customers who are asked on dates, and answers that are judged."""

import csv
import json
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
import yaml
from scipy import stats

from recllm import stages
from recllm.cli import main
from recllm.convert.pipeline import convert
from recllm.data.dataset import Dataset
from recllm.data.far_trans import read_far_trans
from recllm.data.far_trans_synthetic import Bank, write_far_trans
from recllm.data.prices import DAY_S, day_of, price_features
from recllm.errors import UserError
from recllm.evaluate.asset_rankings import AssetRankings
from recllm.evaluate.recommendations import Recommendations
from recllm.recipe import load_recipe

SIZES = {"num_customers": 40, "num_assets": 12, "first": "2019-01-01", "last": "2020-12-31", "purchases": 15.0}
WINDOW = 60
TASK = {"task": "assets", "template": "assets/customers"}
RANK = {"task": "rank_assets", "template": "rank_assets/customers"}
RANKING = [f"tasks=[{json.dumps(RANK)}]", "graph=null", "finance.lookback_days=60", "finance.min_choices=15"]
DATE = re.compile(r"\b\d{4}-\d\d-\d\d\b")


@pytest.fixture
def bank_recipe(tiny_recipe: Path, long_model_folder: Path, monkeypatch) -> Path:
    folder = tiny_recipe.parent
    monkeypatch.setenv("RECLLM_CACHE", str(folder / "cache"))
    write_far_trans(folder / "bank", Bank(**SIZES))
    document = yaml.safe_load(tiny_recipe.read_text())
    del document["data"]
    document |= {
        "finance": {"folder": str(folder / "bank"), "every_days": 30, "window_days": WINDOW, "max_assets": 3},
        "graph": {"retrieval": {"method": "khop", "fan_out": 3}, "budget": 300, "dates": True},
        "tasks": [TASK],
    }
    document["protocol"] = {
        "name": "dates",
        "split": {"method": "dates", "valid_from": "2020-03-01", "test_from": "2020-07-01"},
        "candidates": {"count": 3},
        "ranking": {"k": [1, 3], "exclude_history": False},
        "decoding": {"max_new_tokens": 8},
        "bootstrap": {"samples": 200},
    }
    document["model"]["name_or_path"] = str(long_model_folder)
    tiny_recipe.write_text(yaml.safe_dump(document))
    return tiny_recipe


def converted(recipe: Path, output: Path, *overrides: str, workers: int = 1) -> tuple[dict, list[dict]]:
    """The manifest, and every example."""
    loaded = load_recipe(recipe, list(overrides))
    manifest = convert(loaded, output, workers, stages.graph_tokenizer(loaded))
    parts = sorted(output.glob("*/part-*.parquet"))
    return manifest, [row | {"split": part.parent.name} for part in parts for row in pq.read_table(part).to_pylist()]


def asked(row: dict) -> str:
    return "\n".join(message["content"] for message in row["prompt"])


def answer(row: dict) -> str:
    return row["completion"][-1]["content"]


def named(row: dict) -> tuple[str, str]:
    """Customer and date."""
    _, customer, date = row["example_id"].split("/")
    return customer, date


def test_run_goes_from_a_bank_to_the_report(bank_recipe, capsys):
    assert main(["run", str(bank_recipe)]) == 0
    run = load_recipe(bank_recipe).output
    metrics = json.loads((run / "report" / "metrics.json").read_text())
    systems = {system["name"]: system for system in metrics["systems"]}
    assert {"ilora", "ilora_uniform", "ilora_shuffled", "base_model"} <= set(systems)
    assert {"random", "popularity", "item_to_item", "sasrec", "chance"} <= set(systems)
    hits = {f"hits@{k}/{label}" for k in (1, 3) for label in ("both", "preference", "profit")}
    for name, system in systems.items():
        assert hits <= set(system["metrics"])
        for metric in hits:
            found = system["metrics"][metric]
            assert 0 <= found["low"] <= found["value"] <= found["high"] <= 1
        assert ("nats" in system["metrics"]) == (system["kind"] != "baseline")
        if system["kind"] == "baseline" and name != "chance":
            assert system["metrics"]["valid_ratio"]["value"] == 1
    ilora = systems["ilora"]["metrics"]  # eight bytes end no list: all are misses, and in the denominator
    assert ilora["valid_ratio"]["value"] == ilora["hits@3/profit"]["value"] == 0
    assert systems["popularity"]["metrics"]["hits@3/profit"]["value"] > 0
    compared = {test["metric"] for test in metrics["comparisons"]}
    assert compared == {"hits@3/both", "hits@3/preference", "hits@3/profit", "nats"}
    assert set(metrics["segments"]["assets"]) == {"history length", "user"}
    report = (run / "report" / "report.md").read_text()
    assert "Recommended assets" in report
    assert "chance" in report
    assert "None" not in report
    assert 'class="target"' not in (run / "report" / "report.html").read_text()

    predictions = pl.read_parquet(run / "report" / "predictions.parquet")
    for name, system in systems.items():
        rows = predictions.filter(pl.col("system") == name)
        assert rows.height == system["num_examples"]
        mean = np.mean([row["hits@3/both"] for row in rows["figures"].to_list()])
        assert mean == pytest.approx(system["metrics"]["hits@3/both"]["value"])
    capsys.readouterr()
    report = str(run / "report")
    assert main(["compare", report, report]) == 0
    assert "assets, hits@3/both" in capsys.readouterr().out

    assert main(["run", str(bank_recipe)]) == 0
    assert capsys.readouterr().out.count("up to date") == len(stages.STAGES)
    prices = bank_recipe.parent / "bank" / "close_prices.csv"
    prices.write_text(prices.read_text().rstrip("\n").rpartition("\n")[0] + "\n")
    assert main(["run", str(bank_recipe)]) == 0
    assert capsys.readouterr().out.count("up to date") == 0


def test_examples_ask_on_dates_and_answer_with_what_is_bought_and_rises(bank_recipe, tmp_path):
    manifest, rows = converted(bank_recipe, tmp_path / "dataset")
    data = read_far_trans(bank_recipe.parent / "bank")
    dataset = Dataset.open(tmp_path / "dataset")
    transactions = data.transactions.with_columns(pl.Series("title", data.titles)[data.transactions["asset"]])
    assert {row["split"] for row in rows} == {"train", "valid", "test"}
    ends = {"train": "2020-03-01", "valid": "2020-07-01", "test": "2021-01-01"}
    for row in rows:
        customer, date = named(row)
        day = day_of(date)
        assert row["timestamp"] == day * DAY_S
        assert day + WINDOW <= day_of(ends[row["split"]])
        assert row["target"] is row["candidates"] is row["choices"] is None
        own = transactions.filter(pl.col("customer_id") == customer)
        past = own.filter(pl.col("day") < day)
        assert row["history_end"] == row["gate_end"] == past.height >= 1
        user = dataset.sequences.user_ids.to_pylist().index(customer)
        items = dataset.history(user, row["history_end"], 1000)
        assert sorted(dataset.titles[item] for item in items) == sorted(past["title"])
        bought = own.filter((pl.col("day") >= day) & (pl.col("day") < day + WINDOW) & (pl.col("side") == "Buy"))
        before, last = data.prices.before(day), data.prices.last(day, day + WINDOW)
        good = {title for title, asset in zip(bought["title"], bought["asset"]) if last[asset] > before[asset]}
        listed = json.loads(answer(row))
        assert answer(row) == row["label"]
        assert len(listed) == len(set(listed)) == min(len(good), 3)
        assert set(listed) <= good
    counts = manifest["counts"]["examples"]
    assert {split: entry["examples"] for split, entry in manifest["finance"]["assets"]["splits"].items()} == {
        split: counts[f"{split}/assets"] for split in ("train", "valid", "test")
    }


def test_prompts_show_the_newest_transactions_before_the_date(bank_recipe, tmp_path):
    _, rows = converted(bank_recipe, tmp_path / "dataset", "prompt.max_items=3")
    data = read_far_trans(bank_recipe.parent / "bank")
    longest = 0
    for row in rows:
        customer, date = named(row)
        own = data.transactions.filter((pl.col("customer_id") == customer) & (pl.col("day") < day_of(date)))
        lines = re.findall(r"^(\d{4}-\d\d-\d\d) (Buy|Sell) (.+): (\d+) units, ([\d,.]+) EUR$", asked(row), re.MULTILINE)
        newest = own.tail(3)
        assert [line[1] for line in lines] == newest["side"].to_list()
        assert [line[2] for line in lines] == [data.titles[asset] for asset in newest["asset"]]
        assert [float(line[4].replace(",", "")) for line in lines] == newest["value"].to_list()
        assert all(line[0] < date for line in lines)
        longest = max(longest, own.height)
    assert longest > 3


def test_no_prompt_shows_a_day_of_its_date_or_later(bank_recipe, tmp_path):
    manifest, rows = converted(bank_recipe, tmp_path / "dataset")
    for row in rows:
        date = named(row)[1]
        shown = DATE.findall(asked(row))
        assert shown.count(date) == asked(row).count(date) >= 1
        assert all(day <= date for day in shown)
    entries = manifest["graph"]["shown"].values()
    assert all(entry["not_older_than_cutoff"] == 0 for entry in entries)
    assert sum(entry["timed_triples"] for entry in entries) > 100


@pytest.mark.parametrize("method", ["khop", "two_stage", "parallel", "pagerank", "random"])
def test_what_happens_from_a_date_on_changes_no_prompt_of_it(bank_recipe, tmp_path, method):
    """The future of another bank behind the date: other prices, transactions and summaries, and of fewer assets."""
    date = "2020-08-15"
    other = write_far_trans(tmp_path / "other", Bank(**SIZES, seed=1))
    mixed = write_far_trans(tmp_path / "mixed", Bank(**SIZES))
    for name in ("transactions", "close_prices"):
        _replace_future(mixed / f"{name}.csv", other / f"{name}.csv", date)
    overrides = ["finance.keep=all", f"graph.retrieval.method={method}"]
    _, rows = converted(bank_recipe, tmp_path / "a", *overrides)
    _, changed = converted(bank_recipe, tmp_path / "b", *overrides, f"finance.folder={mixed}")
    seen = ("example_id", "history_end", "gate_end", "timestamp", "prompt", "split")
    before, after = (
        {row["example_id"]: {name: row[name] for name in seen} for row in found if named(row)[1] <= date}
        for found in (rows, changed)
    )
    held_out = {name for name, row in before.items() if row["split"] == "test"}
    assert len(held_out) > 20
    assert [before[name] for name in held_out] == [after.get(name) for name in held_out]
    assert before == after
    assert [row["label"] for row in rows] != [row["label"] for row in changed]


def _replace_future(path: Path, other: Path, date: str) -> None:
    rows = []
    for file, past in ((path, True), (other, False)):
        with file.open(newline="", encoding="utf-8") as handle:
            head, *body = csv.reader(handle)
        place = head.index("timestamp")
        ended = [] if past else sorted({row[head.index("ISIN")] for row in body})[::3]
        rows += [row for row in body if (row[place] < date) == past and row[head.index("ISIN")] not in ended]
    with path.open("w", newline="", encoding="utf-8") as handle:
        csv.writer(handle).writerows([head, *rows])


def test_answers_are_judged_by_what_happened(bank_recipe, tmp_path):
    _, rows = converted(bank_recipe, tmp_path / "dataset")
    dataset = Dataset.open(tmp_path / "dataset")
    held_out = [row for row in rows if row["split"] == "test"]
    judge = Recommendations(dataset, "test", [row["example_id"] for row in held_out])
    right = judge.figures([(answer(row), True) for row in held_out], [1, 3])
    for metric in ("hits@1/both", "hits@1/preference", "hits@1/profit", "valid_ratio", "finished"):
        assert right[metric].mean() == 1
    unfinished = judge.figures([(answer(row), False) for row in held_out], [1])
    wrong = judge.figures([("I would buy " + answer(row), True) for row in held_out], [1])
    for figures in (unfinished, wrong):
        assert sum(values.sum() for name, values in figures.items() if name.startswith("hits")) == 0
        assert figures["valid_ratio"].sum() == 0
    assert unfinished["finished"].mean() == 0
    assert wrong["finished"].mean() == 1
    lots = np.random.default_rng(0)
    drawn = [lots.permutation(np.flatnonzero(row))[:3] for row in np.repeat(judge.offered, 200, axis=0)]
    many = Recommendations(dataset, "test", [row["example_id"] for row in held_out for _ in range(200)])
    found = many.figures(many.write(np.array(drawn)), [3])
    for name, expected in judge.chance([3]).items():
        assert found[name].mean() == pytest.approx(expected.mean(), abs=0.03)


def test_completions_for_preferences_stand_beside_the_examples(bank_recipe, tmp_path):
    _, rows = converted(bank_recipe, tmp_path / "dataset")
    titles = set(Dataset.open(tmp_path / "dataset").titles)
    for split in ("train", "valid", "test"):
        table = pl.read_parquet(tmp_path / "dataset" / "finance" / f"{split}_completions.parquet")
        good = dict(table.filter("label").select("example_id", "completion").iter_rows())
        mine = {row["example_id"].removeprefix("assets/"): answer(row) for row in rows if row["split"] == split}
        assert good == mine
        bad = dict(table.filter(~pl.col("label")).select("example_id", "completion").iter_rows())
        assert set(bad) == set(good)
        for name, completion in bad.items():
            assert set(json.loads(completion)) <= titles - set(json.loads(good[name]))


def test_who_is_asked(bank_recipe, tmp_path):
    manifests = {keep: converted(bank_recipe, tmp_path / keep, f"finance.keep={keep}") for keep in ("both", "all")}
    both, everybody = (
        {name: json.loads(answer(row)) for row in rows if (name := row["example_id"])} for _, rows in manifests.values()
    )
    assert all(both.values())
    assert both == {name: listed for name, listed in everybody.items() if listed}
    empty = [row["split"] for row in manifests["all"][1] if not json.loads(answer(row))]
    assert set(empty) == {"valid", "test"}  # an empty list is nothing to learn
    _, few = converted(bank_recipe, tmp_path / "few", "tasks.0.max_train_targets=1", "finance.min_history=4")
    train = [named(row)[0] for row in few if row["split"] == "train"]
    assert len(train) == len(set(train)) > 10
    assert min(row["history_end"] for row in few) >= 4


def test_the_dataset_is_the_same_from_any_number_of_workers(bank_recipe, tmp_path, monkeypatch):
    from recllm.convert import pipeline

    monkeypatch.setattr(pipeline, "SHARD_POSITIONS", 100)
    one = converted(bank_recipe, tmp_path / "one")
    two = converted(bank_recipe, tmp_path / "two", workers=2)
    assert one == two
    assert len(list((tmp_path / "one" / "train").iterdir())) > 3


def test_other_tasks_run_on_the_same_bank(bank_recipe, tmp_path):
    tasks = [TASK, {"task": "next_item", "template": "next_item/items"}]
    overrides = f"tasks={json.dumps(tasks)}", "protocol.candidates.count=2"
    _, rows = converted(bank_recipe, tmp_path / "dataset", *overrides)
    dataset = Dataset.open(tmp_path / "dataset")
    cutoffs = {"train": -1, "valid": day_of("2020-03-01") * DAY_S, "test": day_of("2020-07-01") * DAY_S}
    newest = {split: max(r["timestamp"] for r in rows if r["split"] == split) for split in cutoffs}
    assert newest["train"] < cutoffs["valid"] <= newest["valid"] < cutoffs["test"] <= newest["test"]
    for row in rows:
        assert row["timestamp"] >= cutoffs[row["split"]]
        if row["task"] == "next_item":
            assert answer(row) == dataset.titles[row["target"]]


def test_answers_may_be_ids(bank_recipe, tmp_path):
    _, rows = converted(bank_recipe, tmp_path / "dataset", 'prompt.item="{{ item_id }}"')
    isins = set(read_far_trans(bank_recipe.parent / "bank").isins)
    assert all(set(json.loads(answer(row))) <= isins for row in rows)
    assert all(re.search(r"(Buy|Sell) ZZ\d{10}: ", asked(row)) for row in rows)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["finance=null", "graph=null", "data={interactions: {path: a}, items: {path: b}}"], "add `finance`"),
        (["protocol.split={method: temporal}"], "asks on dates, protocol.split.method is temporal"),
        (["protocol.split.valid_from=2020-09-01"], "valid_from before test_from, not 2020-09-01 and 2020-07-01"),
        (["protocol.split.valid_from=soon"], r"split\.valid_from"),
        (["protocol.split={method: temporal, test_from: 2020-07-01}"], "belong to the method dates"),
        (["protocol.split.test_from=2020-12-01"], "test: no window of 60 days fits between 2020-12-01 and 2021-01-01"),
        (["protocol.split.test_from=2020-04-01"], "valid: no window of 60 days fits"),
        (["finance.train_from=2020-02-01"], "train: no window of 60 days fits"),
        (["finance.folder={folder}/nowhere"], "nowhere"),
        (["finance.keep=some"], r"finance\.keep"),
        (["finance.min_history=100000"], "give no example"),
        (["filter.item_core=60"], "the task assets needs them all"),
        (["tasks.0.dense_window=4"], "dense_window"),
        (["tasks.0.template=next_item/items"], 'is for the task "next_item"'),
    ],
)
def test_bad_input_is_an_error_that_names_it(bank_recipe, tmp_path, overrides, message):
    named = [override.replace("{folder}", str(tmp_path)) for override in overrides]
    with pytest.raises(UserError, match=message):
        converted(bank_recipe, tmp_path / "dataset", *named)
    assert not (tmp_path / "dataset").exists()


def test_a_report_needs_what_happened(bank_recipe, tmp_path):
    _, rows = converted(bank_recipe, tmp_path / "dataset")
    names = [row["example_id"] for row in rows if row["split"] == "test"]
    dataset = Dataset.open(tmp_path / "dataset")
    with pytest.raises(UserError, match=r"holds \d+ of the \d+ evaluated examples of valid: convert again"):
        Recommendations(dataset, "valid", names)
    (tmp_path / "dataset" / "finance" / "test_windows.parquet").unlink()
    with pytest.raises(UserError, match=r"finance cannot be read .*convert again"):
        Recommendations(dataset, "test", names)


# ---- rank_assets ----


def test_a_run_ranks_assets_by_utility_and_reports_it(bank_recipe, capsys):
    assert main(["run", str(bank_recipe), *RANKING]) == 0
    assert "undcg/rank" in capsys.readouterr().out
    run = load_recipe(bank_recipe, RANKING).output
    metrics = json.loads((run / "report" / "metrics.json").read_text())
    systems = {system["name"]: system for system in metrics["systems"]}
    assert {"ilora", "ilora_uniform", "ilora_shuffled", "base_model"} <= set(systems)
    assert {"random", "popularity", "item_to_item", "sasrec"} <= set(systems)
    assert {"momentum", "safety", "fitted_utility", "chance"} <= set(systems)
    rates = {"undcg/rank", "undcg/utility", "mrr", "hit_rate@1", "hit_rate@3"}
    taus = {"tau/utility", "tau/momentum", "tau/safety"}
    for name, system in systems.items():
        found = system["metrics"]
        assert rates | taus <= set(found)
        for metric in rates | taus:
            low, value, high = (found[metric][name] for name in ("low", "value", "high"))
            assert -1 <= low <= value + 1e-9 <= high + 2e-9 <= 1 + 3e-9
            assert metric in taus or low >= 0
        assert ("nats" in found) == (system["kind"] != "baseline")
        if system["kind"] == "baseline" and name != "chance":
            assert found["permutation_valid"]["value"] == found["json_valid"]["value"] == 1
            assert found["hit_rate@3"]["value"] == 1  # of three candidates
    utility = systems["fitted_utility"]["metrics"]
    assert utility["undcg/rank"]["value"] == utility["undcg/utility"]["value"] == 1
    assert utility["tau/utility"]["value"] > 0.99  # candidates of equal utility are no pair
    assert systems["momentum"]["metrics"]["tau/momentum"]["value"] > 0.99
    assert systems["chance"]["metrics"]["tau/utility"] == {"value": 0, "low": 0, "high": 0}
    assert systems["chance"]["metrics"]["mrr"]["value"] == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)
    ilora = systems["ilora"]["metrics"]  # eight bytes end no list
    assert all(ilora[metric]["value"] == 0 for metric in rates | taus | {"permutation_valid", "finished"})
    assert ilora["tau/utility"]["low"] == -ilora["permutation_valid"]["high"] < 0
    compared = {test["metric"] for test in metrics["comparisons"]}
    assert compared == {"undcg/rank", "mrr", "tau/utility", "nats"}
    segments = metrics["segments"]["rank_assets"]
    assert set(segments) == {"history length", "user", "taste", "target popularity"}
    assert set(segments["taste"]) == {"of their own", "of all customers"}
    report = (run / "report" / "report.md").read_text()
    for text in ("Ranked assets", "3 candidates", "ceiling", "held every candidate once"):
        assert text in report
    assert "None" not in report

    predictions = pl.read_parquet(run / "report" / "predictions.parquet")
    dataset = Dataset.open(run / "dataset")
    for name, system in systems.items():
        rows = predictions.filter(pl.col("system") == name)
        assert rows.height == system["num_examples"]
        mean = np.mean([row["undcg/rank"] for row in rows["figures"].to_list()])
        assert mean == pytest.approx(system["metrics"]["undcg/rank"]["value"])
        assert all(dataset.titles[row["target"]] in json.loads(row["label"]) for row in rows.to_dicts())
    taught = predictions.filter(pl.col("system") == "fitted_utility")
    assert taught["text"].to_list() == taught["label"].to_list()
    report = str(run / "report")
    assert main(["compare", report, report]) == 0
    assert "rank_assets, tau/utility" in capsys.readouterr().out


def test_candidates_are_shown_with_what_their_prices_did_and_ranked_by_utility(bank_recipe, tmp_path):
    manifest, rows = converted(bank_recipe, tmp_path / "dataset", *RANKING)
    data = read_far_trans(bank_recipe.parent / "bank")
    dataset = Dataset.open(tmp_path / "dataset")
    line = re.compile(r"^(.+): mean ([+-][\d.]+)%, variance ([\d.]+), drawdown ([\d.]+)%$", re.MULTILINE)
    judged = {row["example_id"]: row for split in ("train", "valid", "test") for row in stored(tmp_path, split)}
    for row in rows:
        customer, date = named(row)
        known = price_features(data.prices, day_of(date) - 60, day_of(date))
        shown = line.findall(asked(row))
        assert [title for title, *_ in shown] == [dataset.titles[item] for item in row["candidates"]]
        for title, *figures in shown:
            asset = dataset.titles.index(title)
            expected = (known.mean[asset] * 100, known.variance[asset] * 1e4, known.drawdown[asset] * 100)
            assert [float(figure) for figure in figures] == pytest.approx(expected, abs=0.06)
        own = judged[f"{customer}/{date}"]
        parts = (np.array(own[name]) for name in ("mean", "variance", "drawdown"))
        mean, variance, drawdown = ((part - part.mean()) / (part.std() or 1) for part in parts)
        utility = mean - own["taste_variance"] * variance - own["taste_drawdown"] * drawdown
        order = [dataset.titles.index(title) for title in json.loads(answer(row))]
        places = [row["candidates"].index(asset) for asset in order]
        assert sorted(order) == sorted(row["candidates"])
        assert np.diff(utility[places]).max() <= 1e-9
        bought = data.transactions.filter(
            (pl.col("customer_id") == customer) & (pl.col("day") >= day_of(date)) & (pl.col("side") == "Buy")
        )
        assert row["target"] == next(asset for asset in bought["asset"] if not np.isnan(known.mean[asset]))
        assert answer(row) == row["label"]
        assert row["gate_end"] == row["history_end"] > 0
    counts, entry = manifest["counts"]["examples"], manifest["finance"]["rank_assets"]
    assert {split: part["examples"] for split, part in entry["splits"].items()} == {
        split: counts[f"{split}/rank_assets"] for split in ("train", "valid", "test")
    }
    assert all(0 < part["own_taste"] < part["examples"] for part in entry["splits"].values())
    assert entry["splits"]["train"]["first"] >= "2019-03-02"  # the first price and 60 days


def stored(folder: Path, split: str) -> list[dict]:
    return pl.read_parquet(folder / "dataset" / "finance" / f"{split}_rankings.parquet").to_dicts()


def test_prices_from_a_date_on_change_no_ranking_of_it(bank_recipe, tmp_path):
    date = "2020-08-15"
    other = write_far_trans(tmp_path / "other", Bank(**SIZES, seed=1))
    mixed = write_far_trans(tmp_path / "mixed", Bank(**SIZES))
    _replace_future(mixed / "close_prices.csv", other / "close_prices.csv", date)
    _, rows = converted(bank_recipe, tmp_path / "a", *RANKING)
    _, changed = converted(bank_recipe, tmp_path / "b", *RANKING, f"finance.folder={mixed}")
    before, after = ({row["example_id"]: row for row in found if named(row)[1] <= date} for found in (rows, changed))
    assert len({name for name, row in before.items() if row["split"] == "test"}) > 10
    assert before == after
    assert rows != changed
    for row in rows:
        shown = DATE.findall(asked(row))
        assert shown.count(named(row)[1]) == asked(row).count(named(row)[1]) >= 1
        assert all(day <= named(row)[1] for day in shown)


def test_orders_are_judged_strictly(bank_recipe, tmp_path):
    _, rows = converted(bank_recipe, tmp_path / "dataset", *RANKING)
    dataset = Dataset.open(tmp_path / "dataset")
    held_out = [row for row in rows if row["split"] == "test"]
    judge = AssetRankings(dataset, "test", [row["example_id"] for row in held_out])
    assert judge.candidates.tolist() == [row["candidates"] for row in held_out]
    assert np.take_along_axis(judge.candidates, judge.chosen[:, None], 1)[:, 0].tolist() == [
        row["target"] for row in held_out
    ]
    right = judge.figures([(answer(row), True) for row in held_out], [1, 3])
    assert right["undcg/rank"].min() == right["hit_rate@3"].min() == right["permutation_valid"].min() == 1
    for wrong in (
        [(answer(row), False) for row in held_out],
        [("Here: " + answer(row), True) for row in held_out],
        [(json.dumps(json.loads(answer(row))[:2]), True) for row in held_out],
        [(json.dumps([*json.loads(answer(row)), "x"]), True) for row in held_out],
    ):
        assert not any(
            values.any()
            for name, values in judge.figures(wrong, [1, 3]).items()
            if name not in ("json_valid", "finished")
        )
    lots = np.random.default_rng(0)
    many = AssetRankings(dataset, "test", [row["example_id"] for row in held_out for _ in range(200)])
    found = many.figures(many.write(lots.permuted(many.candidates, axis=1)), [1, 3])
    for name, expected in judge.chance([1, 3]).items():
        assert found[name].mean() == pytest.approx(expected.mean(), abs=0.03)
    (tmp_path / "dataset" / "finance" / "test_rankings.parquet").unlink()
    with pytest.raises(UserError, match=r"rankings.parquet cannot be read .*convert again"):
        AssetRankings(dataset, "test", [])
    with pytest.raises(UserError, match=r"holds \d+ of the \d+ evaluated examples: convert again"):
        AssetRankings(dataset, "valid", [row["example_id"] for row in held_out])


def test_a_script_says_how_much_of_the_utilities_is_momentum(bank_recipe, tmp_path, monkeypatch, capsys):
    script = Path(__file__).resolve().parents[1] / "scripts" / "reproduce" / "far_trans_rankings.py"
    monkeypatch.setattr(sys, "argv", [str(script), "--recipe", str(bank_recipe), *RANKING])
    runpy.run_path(str(script), run_name="__main__")
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    converted(bank_recipe, tmp_path / "dataset", *RANKING)
    rows = pq.read_table(tmp_path / "dataset" / "finance" / "test_rankings.parquet").to_pylist()
    taus, fearless = [], 0
    for row in rows:
        mean, variance, drawdown = (stats.zscore(row[name]) for name in ("mean", "variance", "drawdown"))
        utility = mean - row["taste_variance"] * variance - row["taste_drawdown"] * drawdown
        taus.append(stats.kendalltau(row["mean"], utility).statistic)
        fearless += row["taste_variance"] == row["taste_drawdown"] == 0
    assert line["examples"] == len(rows)
    assert line["without_fear"] == pytest.approx(fearless / len(rows), abs=1e-4)
    assert line["advisers"]["momentum"]["tau/utility"]["value"] == pytest.approx(np.mean(taus))
    assert min(taus) < 1
    assert line["advisers"]["fitted_utility"]["tau/utility"]["value"] == 1


def test_both_tasks_of_a_bank_ask_in_one_recipe(bank_recipe, tmp_path, monkeypatch):
    from recllm.convert import pipeline

    monkeypatch.setattr(pipeline, "SHARD_POSITIONS", 100)
    overrides = [f"tasks={json.dumps([TASK, RANK])}"]
    one = converted(bank_recipe, tmp_path / "one", *overrides)
    assert one == converted(bank_recipe, tmp_path / "two", *overrides, workers=2)
    alone = [converted(bank_recipe, tmp_path / name, f"tasks=[{json.dumps(task)}]")[1] for name, task in
             (("assets", TASK), ("rank_assets", RANK))]  # fmt: skip
    by_id = {row["example_id"]: row for row in one[1]}
    assert by_id == {row["example_id"]: row for rows in alone for row in rows}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["finance=null", "data={interactions: {path: a}, items: {path: b}}"], "rank_assets asks a bank's customers"),
        (["protocol.split={method: temporal}"], "rank_assets asks on dates, protocol.split.method is temporal"),
        (["protocol.candidates.method=popularity"], "rank_assets draws its candidates uniformly"),
        (["protocol.candidates.count=12"], r"assets have three prices|buys \d+ of the \d+ assets on offer"),
        (["protocol.candidates.count=13"], "candidates.count is 13, the catalogue has 12 items"),
        (
            ["finance.lookback_days=3"],
            r"on \d{4}-\d\d-\d\d 0 assets have three prices in the 3 days .* finance.train_from",
        ),
        (["finance.lookback_days=2"], r"finance\.lookback_days"),
        (["finance.min_history=100000"], "give no example"),
        (["filter.item_core=60"], "the task rank_assets needs them all"),
        (["tasks.0.template=assets/customers"], 'is for the task "assets"'),
    ],
)
def test_bad_input_of_a_ranking_is_an_error_that_names_it(bank_recipe, tmp_path, overrides, message):
    with pytest.raises(UserError, match=message):
        converted(bank_recipe, tmp_path / "dataset", *RANKING, *overrides)
    assert not (tmp_path / "dataset").exists()
