"""Action prediction on real logs: shipped recipes, plain LoRA against instance-wise LoRA at equal steps and seeds.

    python scripts/reproduce/action_logs.py --data ecommerce=FOLDER otto=FOLDER yoochoose=FOLDER      all runs, 3 seeds
    python scripts/reproduce/action_logs.py --runs movielens --seeds 0 --steps 2 --max-examples 20    how long it takes
    python scripts/reproduce/action_logs.py --runs movielens --set train.learning_rate=5e-4           other settings
    python scripts/reproduce/action_logs.py --report     its part of eval/reference/actions.md from finished reports

A run is a recipe: ecommerce (type of the next action), outcome (buy or leave), otto (click, cart or order of an item;
the public sample is 20 users: it shows the format, not a result), yoochoose (next item of a session in the whole
catalogue) and movielens (band of a rating). Each goes through convert → encoder → train → evaluate as in `recllm run`,
with two adapters: the recipe's ilora, and plain LoRA of the same rank, steps and learning rate. One report a seed holds
both, the gate's controls and all baselines; FOLDER has the files that the recipe names, as they are published.

A seed changes batches, initialisation and encoder. Split, phrasings, candidates and the choice of held-out examples are
those of DATA_SEED throughout: all seeds are asked the same questions.
"""

import argparse
import contextlib
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import torch
from evidence import Cell, comparisons, markdown, moved_paths, say, settings_hash, write_part

from recllm import __version__, files, schema
from recllm.convert.pipeline import convert
from recllm.data.dataset import Dataset
from recllm.errors import UserError
from recllm.evaluate.evaluation import METRICS, PREDICTIONS, evaluate
from recllm.evaluate.metrics import NO_RANK
from recllm.evaluate.reading import beam_note
from recllm.recipe import Recipe, load_recipe
from recllm.train.encoder import fit_encoder
from recllm.train.finetune import train

ROOT = Path(__file__).resolve().parents[2]
REPORT = ROOT / "eval" / "reference" / "actions.md"
HEADING = "# Real logs: plain LoRA and instance-wise LoRA on shipped recipes"
DATA_SEED = 0
PLAIN, GATED = "plain_lora", "ilora"  # as reports name the adapters
CUTOFF = 20  # of ranks in the whole catalogue
SAID = (
    "Exact match is averaged within a session, then over sessions, as are nats and hits; brackets are 95% intervals. "
    "Sessions are resampled with their examples. With three seeds or more seeds are resampled too (two-way bootstrap, "
    "Student's t as in movielens_gate.md); with fewer, figures are given these seeds and say nothing of others. "
    "Differences are to plain LoRA on the same examples, p is Holm's over a table or line. Macro F1, macro recall, "
    "label nats (−ln of the right label's probability among the labels) and the recall of all answers but the system's "
    "most frequent one are means over the seeds of the reports' figures, which have intervals of their own."
)


class Run(NamedTuple):
    """A shipped recipe, and the folder in its paths that --data replaces; None: it fetches its data."""

    recipe: str
    folder: str | None


RUNS = {
    "ecommerce": Run("ecommerce/action_ilora", "data/ecom-events"),
    "outcome": Run("ecommerce/outcome_ilora", "data/ecom-events"),
    "otto": Run("otto/action_on_item_ilora", "data/otto"),
    "yoochoose": Run("yoochoose/next_item_ilora", "data/yoochoose"),
    "movielens": Run("movielens/rating_bands_ilora", None),
}


def main() -> None:
    """Run what is missing, then report."""
    arguments = _arguments()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    for seed in () if arguments.report else arguments.seeds:  # a whole seed first
        for name in arguments.runs:
            run_seed(arguments, name, seed)
    text = report(arguments.work)
    print(text)
    if arguments.report:
        write_part(arguments.output, HEADING, text)


# ---- running ----


def settings_of(arguments: argparse.Namespace, name: str) -> dict[str, Any]:
    """Everything that decides a run, beside its seed and the data."""
    return {
        "version": __version__,
        "format": schema.DATASET_FORMAT,
        "recipe": RUNS[name].recipe,
        "steps": arguments.steps,
        "max_examples": arguments.max_examples,
        "data_seed": DATA_SEED,
        "set": sorted(arguments.set),
    }


def make_recipe(arguments: argparse.Namespace, name: str) -> Recipe:
    """The shipped recipe with this run's data, steps and overrides; its seed is that of the data.

    Raises:
        UserError: --data that is no NAME=FOLDER of a run that needs one.
    """
    run, overrides = RUNS[name], [f"seed={DATA_SEED}"]
    places = dict(text.split("=", 1) for text in arguments.data if "=" in text)
    if run.folder is not None and (place := places.get(name) or places.get(run.recipe.split("/")[0])):
        overrides += moved_paths(run.recipe, run.folder, place)
    if arguments.steps is not None:
        overrides.append(f"train.max_steps={arguments.steps}")
    if arguments.max_examples is not None:
        overrides.append(f"evaluate.max_examples={arguments.max_examples}")
    return load_recipe(run.recipe, [*overrides, *arguments.set])


def run_seed(arguments: argparse.Namespace, name: str, seed: int) -> None:
    """Data set, encoder, both adapters and the report of a seed, each unless it is there."""
    settings = settings_of(arguments, name)
    folder = Path(arguments.work) / f"{name}-{settings_hash(settings)}"
    own = folder / f"seed{seed}"
    if (own / "report" / METRICS).is_file():
        return
    recipe = make_recipe(arguments, name)
    seeded = recipe.model_copy(update={"seed": seed})
    files.write_json(folder / "settings.json", settings | {"name": name})
    took: dict[str, float] = {}

    def stage(output: Path, make: Callable[..., Any], *given: Any) -> None:
        if output.is_dir():
            return
        started = time.monotonic()
        with contextlib.redirect_stdout(sys.stderr):
            make(*given, output)
        took[output.parent.name if output.name == "adapter" else output.name] = round(time.monotonic() - started, 1)
        say(f"{name} seed {seed}: {output.relative_to(folder)} in {time.monotonic() - started:.0f} s")

    dataset, encoder = folder / "dataset", own / "encoder"
    stage(dataset, convert, recipe)
    stage(encoder, _fit_encoder, seeded, dataset)
    for arm, method in ((PLAIN, "lora"), (GATED, "ilora")):
        adapted = seeded.model_copy(update={"adapter": seeded.adapter.model_copy(update={"method": method})})
        stage(own / arm / "adapter", train, adapted, dataset, encoder)
    asked = recipe.evaluate.model_copy(update={"adapters": {PLAIN: str(own / PLAIN / "adapter")}})
    scored = recipe.model_copy(update={"evaluate": asked})
    stage(own / "report", evaluate, scored, dataset, encoder, own / GATED / "adapter")
    files.write_json(own / "seconds.json", took)
    if not arguments.keep:
        for arm in (PLAIN, GATED):
            shutil.rmtree(own / arm)


def _fit_encoder(recipe: Recipe, dataset: Path, output: Path) -> None:
    exclude = recipe.protocol.ranking.exclude_history
    fit_encoder(Dataset.open(dataset), recipe.encoder, recipe.history.max_items, recipe.seed, output, exclude)


# ---- the report ----


def report(work: Path) -> str:
    """The tables of all finished reports under `work`, as Markdown."""
    found = [(path.parent, files.read_json(path, "settings")) for path in sorted(Path(work).glob("*/settings.json"))]
    order = list(RUNS)
    runs = [(order.index(settings["name"]), folder, settings) for folder, settings in found if _seeds(folder)]
    if not runs:
        return f"no finished report under {work}: run without --report first"
    lines = [HEADING, "", _intro([folder for _, folder, _ in runs]), ""]
    for _, folder, settings in sorted(runs, key=lambda run: run[:1] + run[1:2]):
        lines += _run_part(folder, settings)
    return "\n".join(lines).rstrip() + "\n"


def _seeds(folder: Path) -> dict[int, Path]:
    """Seed → report folder, of finished ones."""
    paths = folder.glob(f"seed*/report/{METRICS}")
    return dict(sorted((int(path.parents[1].name.removeprefix("seed")), path.parent) for path in paths))


def _intro(folders: list[Path]) -> str:
    documents = [_document(path) for folder in folders for path in _seeds(folder).values()]
    machines = sorted({_machine(document["provenance"]) for document in documents})
    versions = sorted({str(document["provenance"]["versions"]["recllm"]) for document in documents})
    return (
        "Command: `python scripts/reproduce/action_logs.py --data ecommerce=FOLDER otto=FOLDER yoochoose=FOLDER`, and "
        f"what each part names. Machine: {'; '.join(machines)}. Reports made by recllm {', '.join(versions)}. Both "
        "adapters have the recipe's rank, steps, batches and learning rate; the gate "
        f"trains a few numbers more. {SAID}"
    )


def _document(folder: Path) -> dict[str, Any]:
    return files.read_json(folder / METRICS, "metrics")


def _machine(provenance: dict[str, Any]) -> str:
    found = provenance["machine"]
    device = found["processor"] if found["torch_device"] == "cpu" else found["torch_device"]
    return f"{found['cpu_count']} CPU cores, {device}, torch {provenance['versions']['torch']}"


def _run_part(folder: Path, settings: dict[str, Any]) -> list[str]:
    seeds = _seeds(folder)
    documents = {seed: _document(path) for seed, path in seeds.items()}
    first = next(iter(documents.values()))
    told = [f"{key} {settings[key]}" for key in ("steps", "max_examples") if settings[key] is not None]
    told += [f"set {' '.join(settings['set'])}"] * bool(settings["set"])
    base = first["provenance"]["base_model"]
    lines = [
        f"## {settings['name']}: `{settings['recipe']}`",
        "",
        f"{first['description']}. Seeds {', '.join(map(str, seeds))}; base model {base['name_or_path']}, "
        f"{base['dtype']}; {'; '.join(told) or 'the recipe as it is shipped'}.",
        "",
    ]
    cells = [cell for seed, path in seeds.items() for cell in cells_of(path, folder / "dataset", seed)]
    for task in first["tasks"]:
        lines += [*_task_part(task, [cell for cell in cells if cell["task"] == task], documents), ""]
    return lines


def cells_of(report_folder: Path, dataset_folder: Path, seed: int) -> list[Cell]:
    """A cell for each task and system of a report: session by session the mean over its examples.

    `exact` of closed tasks, `hits` (rank in the whole catalogue up to CUTOFF) of items, `nats` of language models:
    those that a system has. "users" are the sessions, which is what intervals resample.
    """
    columns = ["system", "task", "example_id", "nats", "label", "predicted", "full_rank"]
    table, document = pq.read_table(report_folder / PREDICTIONS, columns=columns), _document(report_folder)
    sessions = _sessions(Dataset.open(dataset_folder), document["split"])
    rows = table.to_pylist()
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["task"], row["system"]), []).append(row)
    return [
        {"task": task, "arm": system, "seed": seed, "same_people": True, **_by_session(own, sessions)}
        for (task, system), own in groups.items()
    ]


def _sessions(dataset: Dataset, split: str) -> dict[str, int]:
    """Example id → a number for each session of each user; of a log without sessions for each user."""
    table = dataset.examples(split, ["example_id", "user_index", "session"])
    number = table["session"].fill_null(0).to_numpy().astype(np.int64)
    users = table["user_index"].to_numpy().astype(np.int64)
    return dict(zip(table["example_id"].to_pylist(), (users * (number.max(initial=0) + 1) + number).tolist()))


def _by_session(rows: list[dict[str, Any]], sessions: dict[str, int]) -> dict[str, Any]:
    """users, titles and the means of each metric that all rows have."""
    values = {
        "exact": [None if row["label"] is None else float(row["label"] == row["predicted"]) for row in rows],
        "hits": [None if row["full_rank"] is None else float(NO_RANK < row["full_rank"] <= CUTOFF) for row in rows],
        "nats": [row["nats"] for row in rows],
    }
    own, member = np.unique([sessions[row["example_id"]] for row in rows], return_inverse=True)
    counts = np.bincount(member)
    found = {name: column for name, column in values.items() if None not in column}
    means = {name: (np.bincount(member, weights=column) / counts).tolist() for name, column in found.items()}
    return {"users": own.tolist(), "titles": [1] * len(own), **means}


def _task_part(task: str, cells: list[Cell], documents: dict[int, dict[str, Any]]) -> list[str]:
    closed = any("exact" in cell for cell in cells)
    name = "exact" if closed else "hits"
    arms = {arm: [c for c in cells if c["arm"] == arm and name in c] for arm in dict.fromkeys(c["arm"] for c in cells)}
    systems = {arm: _figures(task, arm, documents) for arm in arms}
    shown = ["macro_f1", "macro_recall", "rest_recall", "label_nats"] if closed else [f"ndcg@{CUTOFF}", "nats"]
    header = ["system", "exact match" if closed else f"hit_rate@{CUTOFF}, whole catalogue", *map(_spoken, shown)]
    header += ["against plain LoRA", "by seed"]
    if not arms.get(PLAIN):
        return [f"**{task}**: plain LoRA has no such figures."]
    rows, _ = comparisons(arms, PLAIN, [], name=name)
    table = [[arm, value, *(_number(systems[arm].get(one)) for one in shown), *rest[:2]] for arm, value, *rest in rows]
    size = next(iter(documents.values()))["counts"]["evaluated"][task]
    sessions = len(next(cell for cell in cells if cell["arm"] == PLAIN)["users"])
    lines = [f"**{task}**: {size['examples']} of {size['of_examples']} examples in {sessions} sessions.", ""]
    for seed, document in documents.items() if not closed else ():
        lines += [f"Seed {seed}: {note}.", ""] if (note := beam_note(_of_task(task, document))) else []
    if below := [
        one for document in documents.values() for one in document.get("below_constant", []) if one["task"] == task
    ]:
        lines = [f"**{task}: {_below(below)}**", "", *lines]
    return [*lines, markdown(header, table), "", *_nats_lines(cells), *_mcnemar_lines(task, documents)]


def _below(found: list[dict[str, Any]]) -> str:
    """The systems below the constant answer, so that nobody misses it."""
    said = [f"{one['system']} {one['metric']} {one['value']:.3f} against {one['constant']:.3f}" for one in found]
    return f"below the constant answer: {'; '.join(said)}"


def _of_task(task: str, document: dict[str, Any]) -> list[dict[str, Any]]:
    """The systems that a report has of a task."""
    return [entry for entry in document["systems"] if entry["task"] == task]


def _figures(task: str, system: str, documents: dict[int, dict[str, Any]]) -> dict[str, float]:
    """Means over the seeds of what the reports say of a system; of ranked tasks those of the whole catalogue."""
    found: dict[str, list[float]] = {}
    for document in documents.values():
        for entry in document["systems"]:
            if (entry["task"], entry["name"]) != (task, system):
                continue
            figures = entry["metrics"] | (entry["full_catalogue"] or {})
            if classes := entry.get("classes"):
                figures = figures | {"rest_recall": classes["most_frequent"]["rest_recall"]}
            for name, estimate in figures.items():
                if estimate["value"] is not None:
                    found.setdefault(name, []).append(estimate["value"])
    return {name: float(np.mean(values)) for name, values in found.items()}


def _spoken(name: str) -> str:
    return {"rest_recall": "recall of all but its most frequent answer"}.get(name, name.replace("_", " "))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _nats_lines(cells: list[Cell]) -> list[str]:
    """Differences in nats of what is a language model to plain LoRA."""
    models = [cell for cell in cells if "nats" in cell]
    arms = {arm: [c for c in models if c["arm"] == arm] for arm in dict.fromkeys(c["arm"] for c in models)}
    if PLAIN not in arms:
        return []
    rows, _ = comparisons(arms, PLAIN, [])
    plain = next(row[1] for row in rows if row[0] == PLAIN)
    others = [f"{row[0]} {row[2]} (by seed {row[3]})" for row in rows if row[2]]
    return [f"- nats of the answer, plain LoRA {plain}; against it {'; '.join(others)}"]


def _mcnemar_lines(task: str, documents: dict[int, dict[str, Any]]) -> list[str]:
    """Each seed's own test of the reports, of the two adapters."""
    said = [
        f"seed {seed} {one['metric']} {one['difference']:+.3f}, p {one['p_value']:.4f} ({one['method']})"
        for seed, document in documents.items()
        for one in document["comparisons"]
        if one["task"] == task and {one["a"], one["b"]} == {PLAIN, GATED} and one["method"].startswith("mcnemar")
    ]
    return [f"- McNemar of {GATED} against {PLAIN}: {'; '.join(said)}"] if said else []


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("--work", type=Path, default=Path("runs/evidence/action_logs"))
    parser.add_argument("--output", type=Path, default=REPORT)
    parser.add_argument("--runs", nargs="+", default=list(RUNS), choices=RUNS)
    parser.add_argument("--data", nargs="+", default=[], metavar="RUN=FOLDER", help="where a run's files are")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="training steps of both adapters; default: the recipe's")
    parser.add_argument("--max-examples", type=int, help="held-out examples that are scored; default: the recipe's")
    parser.add_argument("--threads", type=int, default=0, help="0: torch's default")
    parser.add_argument("--keep", action="store_true", help="keep the adapters after the report")
    parser.add_argument("--report", action="store_true", help="write the report from the finished ones that are there")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="further overrides of the recipes")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
