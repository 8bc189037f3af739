"""Does the gate help on real data? SmolLM2-135M on MovieLens, plain LoRA against instance-wise LoRA at equal steps.

    python scripts/reproduce/movielens.py                                      ML-100K, windows of 5 titles, 3 seeds
    python scripts/reproduce/movielens.py --windows 2 5 10 --arms lora ilora soft_token
    python scripts/reproduce/movielens.py --data ml-1m=shared/data/ml-1m-dbpedia         MovieLens-1M
    python scripts/reproduce/movielens.py --estimate                           seconds a step here, minutes a cell
    python scripts/reproduce/movielens.py --evaluate                           then 20 candidates, with the baselines
    python scripts/reproduce/movielens.py --evaluate --beam 400                then the whole catalogue, by beams
    python scripts/reproduce/movielens.py --device cuda --batch-size 64 --max-windows 4000 --jobs 6     on a GPU
    python scripts/reproduce/movielens.py --report                             eval/reference/movielens_gate.md

A cell is one adapter: r = 8 on all linear modules, bf16 base, dense windows of n titles, batch 8, 300 steps. A prompt
is one instruction, so within a window a title is predicted from at most n − 1 titles before it, while the gate reads up
to 200 items before the window. Measured is nats a held-out title: all held-out positions of a user, tiled into windows
as the training positions are. Held out is, with `--protocol temporal` (default), what is newer than the global cut-off
of temporal_20 and behind a user's first test position; with `--protocol last_20`, the last 20% of each user, for
comparison with the first run (it leaks across users: most targets are older than others' training interactions).

Arms: lora; ilora; soft_token (plain LoRA with the same representation in the input); sigmoid (a gate for each rank);
shuffled (trained and asked with the representation of another user, drawn anew for every window). ilora@uniform and
ilora@shuffled are the trained ilora adapter under control gates, the latter as in `recllm evaluate`: each user takes
one other user's. A gate trained uniform is the plain LoRA, to the last bit: it has no arm.

A seed changes batches, initialisation and encoder. Split, phrasings, candidates and the choice of held-out windows are
those of DATA_SEED throughout: all seeds are asked about the same titles of the same people.
"""

import argparse
import contextlib
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import torch
from evidence import (
    PEOPLE_SAID,
    Cell,
    Cells,
    Plan,
    Tables,
    at_once,
    common_settings,
    comparisons,
    first_rows,
    fit,
    fresh_adapter,
    machine_line,
    markdown,
    moved_paths,
    of_current_arms,
    per_title,
    rows_of_others,
    say,
    score,
    seeds_said,
    settings_hash,
    states,
    this_machine,
    trained_parameters,
)

from recllm import __version__, files, schema
from recllm.convert.pipeline import convert
from recllm.convert.targets import Sequences, find_targets
from recllm.convert.templates import load_template
from recllm.data.dataset import Dataset
from recllm.errors import UserError
from recllm.evaluate.evaluation import evaluate, table_text
from recllm.evaluate.language_model import swapped_rows
from recllm.model.adapter import accepts_history, fit_gate_statistics, save_adapter
from recllm.model.base_model import load_base_model
from recllm.recipe import Recipe, load_recipe
from recllm.train.collator import COLUMNS, Collator, TokenizedExamples, tokenize
from recllm.train.encoder import fit_encoder

ROOT = Path(__file__).resolve().parents[2]
REPORT = ROOT / "eval" / "reference" / "movielens_gate.md"
KEY = ("data", "protocol", "window", "arm", "seed", "settings_id")
ARM_VERSIONS = {"shuffled": 2}  # 1 gave each user one fixed partner, which a gate can learn by heart
DATA_SEED = 0
RATES = (1e-3, 3e-3)  # of the LoRA and of what reads the representation, in all arms; tuned for none of them
ARMS = ("lora", "ilora", "soft_token", "shuffled", "sigmoid")
TEMPLATE = "next_item/films"
MAX_ITEMS = 200
TAIL = 0.2  # of a user's interactions, held out by protocol last_20


class Run(NamedTuple):
    """Everything that the arms of one data set, window and seed share."""

    arguments: argparse.Namespace
    data: str
    window: int
    seed: int
    folder: Path
    encoder_folder: Path
    report_folder: Path
    recipe: Recipe
    dataset: Dataset
    tokenizer: Any
    collator: Collator
    train: TokenizedExamples
    held: TokenizedExamples
    titles: list[int]  # held-out titles of each window


def main() -> None:
    """Run what is missing, evaluate where asked, report."""
    arguments = _arguments()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    cells = Cells(arguments.work / "cells.jsonl", KEY)
    runs = [(window, seed) for seed in arguments.seeds for window in arguments.windows]  # a whole seed first
    if arguments.jobs > 1 and not arguments.report:
        run_at_once(arguments, runs)
    elif not arguments.report:
        for window, seed in runs:
            run_arms(arguments, cells, window, seed)
    text = report(_wanted(arguments, cells), cells.path.parent)
    print(text)
    if arguments.report:
        files.write_text(arguments.output, text)


def _wanted(arguments: argparse.Namespace, cells: Cells) -> list[Cell]:
    """Cells of a report: all, or, after a run, those of its settings. Never those of an arm as it was earlier."""
    found = of_current_arms(cells.read().values(), ARM_VERSIONS)
    asked = {settings_hash(cell_settings(arguments, arm)) for arm in ARMS}
    return [cell for cell in found if arguments.report or cell["settings_id"] in asked]


# ---- settings ----


def data_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What decides data set and encoder, beside data, protocol, window and seed."""
    return {
        "version": __version__,
        "model": arguments.model,
        "encoder_epochs": arguments.encoder_epochs,
        "max_items": MAX_ITEMS,
        "template": TEMPLATE,
        "data_seed": DATA_SEED,
        "set": sorted(arguments.set),
    }


def training_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What decides an adapter, beside its arm."""
    return data_settings(arguments) | {
        "dtype": arguments.dtype,
        "steps": arguments.steps,
        "batch_size": arguments.batch_size,
        "rates": list(RATES),
    }


def cell_settings(arguments: argparse.Namespace, arm: str) -> dict[str, Any]:
    """Everything that decides a cell, beside its key."""
    own = {"arm_version": ARM_VERSIONS.get(arm, 1), "max_windows": arguments.max_windows}
    return training_settings(arguments) | own


def training_part(settings: dict[str, Any]) -> dict[str, Any]:
    """`training_settings` of a cell's settings."""
    return {name: value for name, value in settings.items() if name not in ("arm_version", "max_windows")}


# ---- running ----


def run_at_once(arguments: argparse.Namespace, runs: list[tuple[int, int]]) -> None:
    """A process for each window and seed, `jobs` at a time.

    Data and encoders, which they share, are made first, one after the other.
    """
    for window, seed in runs:
        prepare(arguments, arguments.data.split("=")[0], window, seed)

    own = {f"window{window}-seed{seed}": ["--windows", str(window), "--seeds", str(seed)] for window, seed in runs}
    at_once(own, arguments.jobs, arguments.work / "logs")


def run_arms(arguments: argparse.Namespace, cells: Cells, window: int, seed: int) -> None:
    """The missing arms of a window and seed, then the evaluation of those that are there."""
    data = arguments.data.split("=")[0]
    done = cells.read()
    keys = {
        arm: (data, arguments.protocol, window, arm, seed, settings_hash(cell_settings(arguments, arm)))
        for arm in arguments.arms
    }
    missing = [arm for arm, key in keys.items() if key not in done]
    if not missing and not arguments.evaluate:
        return
    run = prepare(arguments, data, window, seed)
    if arguments.estimate:
        estimate(run)
        return
    for arm in missing:
        started = time.monotonic()
        for cell in reversed(fit_arm(run, arm)):  # the arm's own cell last: it marks all of them as done
            cells.add(cell | {"wall_s": round(time.monotonic() - started, 1)})
            say(f"window {window} seed {seed} {cell['arm']}: {per_title(cell):.4f} nats a title")
        say(f"  {time.monotonic() - started:.0f} s")
    if arguments.evaluate:
        evaluate_arms(run)


# ---- data ----


def prepare(arguments: argparse.Namespace, data: str, window: int, seed: int) -> Run:
    """Convert and fit the encoder where that is not done, and tokenise."""
    shared = Path(arguments.work) / f"{data}-{arguments.protocol}-{settings_hash(data_settings(arguments))}"
    dataset_folder = shared / f"window{window}" / f"dataset-{schema.DATASET_FORMAT}"  # of all seeds
    folder = shared / f"window{window}" / f"seed{seed}-{settings_hash(training_settings(arguments))}"
    kind = f"{arguments.max_examples}-users{'-exhaustive' * arguments.exhaustive}"
    kind += "" if arguments.beam is None else f"-beam{arguments.beam}"
    report_folder = folder / f"report{schema.DATASET_FORMAT}-{kind}"
    recipe = make_recipe(arguments, data, window, folder, shared)
    if not dataset_folder.is_dir():
        with contextlib.redirect_stdout(sys.stderr):
            convert(recipe, dataset_folder, workers=None)
    dataset = Dataset.open(dataset_folder)
    encoder_folder = shared / f"encoder-seed{seed}"  # the windows share split and vocabulary
    if not encoder_folder.is_dir():
        fit_encoder(dataset, recipe.encoder, MAX_ITEMS, seed, encoder_folder)
    _, tokenizer = load_base_model(recipe.model)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    train = tokenize(dataset.example_batches("train", COLUMNS), tokenizer, 2048, "train")
    held, titles = held_out(dataset, tokenizer, window, arguments.max_windows)
    shared_parts = (recipe, dataset, tokenizer, Collator(int(pad)), train, held, titles)
    return Run(arguments, data, window, seed, folder, encoder_folder, report_folder, *shared_parts)


def make_recipe(arguments: argparse.Namespace, data: str, window: int, folder: Path, shared: Path) -> Recipe:
    """The shipped recipe of the data set with this window and protocol; its seed is that of the data."""
    name = "movielens_1m/next_item_ilora" if data == "ml-1m" else "movielens/next_item_ilora"
    places = moved_paths(name, "data/ml-1m-dbpedia", arguments.data.split("=")[1]) if "=" in arguments.data else []
    overrides = [
        f"seed={DATA_SEED}",
        f"output_dir={folder}",
        f"prompt.max_items={window}",
        f"tasks.0.dense_window={window}",
        f"history.max_items={MAX_ITEMS}",
        f"model.name_or_path={arguments.model}",
        f"model.dtype={arguments.dtype}",
        f"encoder.max_epochs={arguments.encoder_epochs}",
        *arguments.set,
    ]
    recipe = load_recipe(name, [*places, *overrides])
    if arguments.protocol == "temporal":
        return recipe
    rows = write_tail_rows(recipe, shared)
    split = {"method": "given", "min_history": 1, "given": {name: str(path) for name, path in rows.items()}}
    protocol = recipe.protocol.model_dump() | {"name": "last_20", "split": split}
    return Recipe.model_validate(recipe.model_dump() | {"protocol": protocol})


def write_tail_rows(recipe: Recipe, folder: Path) -> dict[str, Path]:
    """Rows of split.given that make the last TAIL of each user test and the position before it valid.

    A user's interactions behind a given target are not trained on, so one target, the first of the tail, is enough.
    """
    temporal = folder / "order"  # the project's own reading, filtering and order
    if not temporal.is_dir():
        with contextlib.redirect_stdout(sys.stderr):
            convert(recipe, temporal, workers=None)
    dataset = Dataset.open(temporal)
    sequences, item_ids = dataset.sequences, dataset.items["item_id"].to_pylist()
    rows: dict[str, list[dict[str, Any]]] = {"valid": [], "test": []}
    for user, user_id in enumerate(sequences.user_ids.to_pylist()):
        items = sequences.items[sequences.offsets[user] : sequences.offsets[user + 1]]
        first = len(items) - round(TAIL * len(items))
        if first < 3 or first >= len(items):
            continue
        for split, place in (("valid", first - 1), ("test", first)):
            history = [item_ids[item] for item in items[:place]]
            rows[split].append({"user": user_id, "history": history, "target": item_ids[items[place]]})
    paths = {split: folder / f"{split}.jsonl" for split in rows}
    for split, path in paths.items():
        files.write_text(path, "".join(json.dumps(row) + "\n" for row in rows[split]))
    return paths


def held_out(dataset: Dataset, tokenizer: Any, window: int, max_windows: int) -> tuple[TokenizedExamples, list[int]]:
    """Windows over everything from each user's first test position on, written as training windows are.

    Also how many titles each has. Of more than `max_windows` a choice is taken, the same for every seed.
    """
    sequences = dataset.sequences
    users = np.repeat(np.arange(sequences.num_users), np.diff(sequences.offsets))
    tested = np.flatnonzero(sequences.splits == schema.TEST)
    first = np.full(sequences.num_users, np.iinfo(np.int64).max)
    np.minimum.at(first, users[tested], tested)
    roles = np.where(np.arange(len(users)) >= first[users], schema.TRAIN, schema.UNUSED).astype(np.int8)
    number = np.arange(sequences.num_users)
    flat = Sequences(
        sequences.offsets,
        sequences.items,
        sequences.timestamps,
        roles,
        None,
        number.astype(np.int32),
        sequences.user_keys,
        sequences.user_ids,  # type: ignore[arg-type]  # a chunked column; find_targets reads no ids
    )
    found = find_targets(flat, schema.TRAIN, dense_window=window)
    if len(found) > max_windows:  # the same for all seeds and arms
        found = found.take(np.sort(np.random.default_rng(0).choice(len(found), max_windows, replace=False)))
    text = str(load_template(TEMPLATE, "next_item", dense=True).phrasings[0].window).split("%}")[-1].strip()
    rows = []
    for user, start, stop in zip(found.row.tolist(), found.start.tolist(), found.stop.tolist()):
        items = sequences.items[sequences.offsets[user] + start : sequences.offsets[user] + stop]
        lines = "".join(f"{dataset.titles[item]}\n" for item in items)
        messages = [{"role": "user", "content": text}], [{"role": "assistant", "content": lines}]
        rows.append((f"held/{user}/{start}", user, start, *messages))
    columns = [pl.Series(name, values) for name, values in zip(COLUMNS, zip(*rows))]
    table = pl.DataFrame(columns).to_arrow().cast(_example_types())
    return tokenize(table.to_batches(), tokenizer, 2048, "test"), (found.stop - found.start).tolist()


def _example_types() -> Any:
    import pyarrow as pa

    return pa.schema([schema.EXAMPLES.field(name) for name in COLUMNS])


# ---- cells ----


def fit_arm(run: Run, arm: str) -> list[Cell]:
    """Train one arm, keep its adapter, and score the held-out windows; of ilora also under control gates."""
    model, trained, held = set_up(run, arm)
    plan = Plan(run.arguments.steps, run.arguments.batch_size, *RATES, run.seed)
    log = fit(model, run.train, run.collator, trained, plan, f"window {run.window} seed {run.seed} {arm}")
    if arm != "shuffled":
        save_adapter(model, run.folder / arm, items=run.dataset.folder / "items.parquet", manifest=run.dataset.manifest)
    found = [_cell(run, arm, model, held, log)]
    if arm == "ilora":
        uniform = {"gate_weights": torch.full((len(run.held), model.peft_config["default"].num_experts), 0.0)}
        uniform["gate_weights"] += 1 / uniform["gate_weights"].shape[1]
        found.append(_cell(run, "ilora@uniform", model, uniform, log))
        swapped = swapped_rows(run.held.user_indices, np.random.default_rng([run.seed, 1]))
        if swapped is not None:
            found.append(_cell(run, "ilora@shuffled", model, _rows(held, swapped), log))
    return found


def set_up(run: Run, arm: str) -> tuple[Any, Tables, Tables]:
    """A fresh adapter, and what it is given for the training and the held-out windows."""
    method = arm if arm in ("lora", "soft_token") else "ilora"
    section = run.recipe.adapter.model_copy(update={"method": method})
    if arm == "sigmoid":
        section = section.model_copy(update={"gate": section.gate.model_copy(update={"type": "sigmoid"})})
    device = run.arguments.device
    model = fresh_adapter(run.recipe.model, section, run.encoder_folder, run.seed, device, run.arguments.checkpointing)
    if not accepts_history(model):
        return model, {}, {}
    trained, held = (
        {"representation": states(run.encoder_folder, run.dataset, examples, MAX_ITEMS, device)}
        for examples in (run.train, run.held)
    )
    if arm == "shuffled":
        trained, held = _shuffled(run, run.train, trained), _shuffled(run, run.held, held)
    fit_gate_statistics(model, trained["representation"].cpu())
    return model, trained, held


def _shuffled(run: Run, examples: TokenizedExamples, tables: Tables) -> Tables:
    """Each example with the row of another user, drawn anew for every example."""
    return _rows(tables, rows_of_others(examples.user_indices, np.random.default_rng([run.seed, 1])))


def _rows(tables: Tables, rows: np.ndarray) -> Tables:
    return {name: table[torch.from_numpy(rows)] for name, table in tables.items()}


def _cell(run: Run, arm: str, model: Any, tables: Tables, log: dict[str, float]) -> Cell:
    nats, _ = score(model, run.held, run.collator, tables, 2 * run.arguments.batch_size)
    titles, settings = np.array(run.titles), cell_settings(run.arguments, arm.split("@")[0])
    return {
        "data": run.data,
        "protocol": run.arguments.protocol,
        "window": run.window,
        "arm": arm,
        "seed": run.seed,
        "settings_id": settings_hash(settings),
        "settings": settings,
        "parameters": trained_parameters(model),
        "nats": [round(value, 4) for value in (nats / titles).tolist()],
        "titles": run.titles,
        "same_people": True,
        "users": run.held.user_indices.tolist(),
        "history": run.held.gate_ends.tolist(),
        "machine": this_machine(run.arguments.device),
        **log,
    }


def evaluate_arms(run: Run) -> None:
    """The report's metrics over 20 candidates with the baselines, all adapters of a window and seed in one report.

    A report that lacks an asked arm is made again. Adapters are removed once all are in it.

    Raises:
        UserError: the new report needs an adapter that was removed after an earlier one.
    """
    done = evaluated(run.report_folder)
    wanted = {arm for arm in run.arguments.arms if arm != "shuffled"}  # asked with others' tables: no report asks so
    if "ilora" not in wanted or {_adapter_name(arm) for arm in wanted} <= done:
        return
    there = {arm for arm in ARMS if (run.folder / arm).is_dir()}
    arms = [arm for arm in ARMS if arm in wanted | there or _adapter_name(arm) in done]
    if gone := [arm for arm in arms if arm not in there]:
        raise UserError(
            f"{run.report_folder} has to be made again with {', '.join(arms)}, and the adapters of {', '.join(gone)} "
            "are gone: remove the lines of these arms from cells.jsonl to train them again"
        )
    others = {_adapter_name(arm): str(run.folder / arm) for arm in arms if arm != "ilora"}
    asked = {
        "adapters": others,
        "max_examples": run.arguments.max_examples,
        "exhaustive": run.arguments.exhaustive,
        "batch_size": run.arguments.batch_size,
    }
    if run.arguments.beam is not None:  # dear, so for the arms alone; controls and base model are in the other report
        baselines = [name for name in run.recipe.evaluate.baselines if name != "base_model"]
        asked |= {"beam_width": run.arguments.beam, "controls": [], "baselines": baselines}
    section = run.recipe.evaluate.model_copy(update=asked)
    recipe = run.recipe.model_copy(update={"evaluate": section})
    with contextlib.redirect_stdout(sys.stderr):
        evaluate(recipe, run.dataset.folder, run.encoder_folder, run.folder / "ilora", run.report_folder)
    if not run.arguments.keep and {_adapter_name(arm) for arm in arms} <= evaluated(run.report_folder):
        for arm in arms:  # half a gigabyte a seed otherwise; the report stays
            shutil.rmtree(run.folder / arm)


def _adapter_name(arm: str) -> str:
    """What the report calls an arm's adapter."""
    return "ilora" if arm == "ilora" else f"{arm}_arm"


def evaluated(report_folder: Path) -> set[str]:
    """Names of the systems in a finished report; none without one."""
    path = report_folder / "metrics.json"
    if not path.is_file():
        return set()
    return {system["name"] for system in files.read_json(path, "metrics")["systems"]}


def estimate(run: Run) -> None:
    """Minutes a cell on this machine, from a few steps and a few held-out windows."""
    model, trained, held = set_up(run, "ilora")
    began = time.process_time()
    log = fit(model, run.train, run.collator, trained, Plan(4, run.arguments.batch_size, *RATES, run.seed))
    cpu_s = (time.process_time() - began) / 4
    count = min(32, len(run.held))
    few = first_rows(run.held, count)
    started = time.perf_counter()
    score(model, few, run.collator, {name: table[:count] for name, table in held.items()}, 2 * run.arguments.batch_size)
    scoring = (time.perf_counter() - started) / count * len(run.held)
    minutes = (run.arguments.steps * log["step_s"] + scoring) / 60
    print(
        f"window {run.window}: {len(run.train)} training and {len(run.held)} held-out windows ("
        f"{sum(run.titles)} titles, "
        f"{len(np.unique(run.held.user_indices))} users); {log['step_s']:.2f} s a step "
        f"({cpu_s:.2f} CPU-s), {scoring:.0f} s a scoring: "
        f"{minutes:.1f} minutes a cell (ilora {minutes + 2 * scoring / 60:.1f} with its two controls)"
    )


# ---- the report ----


def report(found: list[Cell], work: Path) -> str:
    """The tables of finished cells, one for each of their settings, and the metrics under `work`, as Markdown."""
    if not found:
        return "no finished cell with settings: run without --report first"
    lines = ["# MovieLens: does the gate help?", "", _intro(found), ""]
    groups: dict[tuple[str, str, int, str], list[Cell]] = {}
    for cell in found:
        own = settings_hash({name: value for name, value in cell["settings"].items() if name != "arm_version"})
        groups.setdefault((cell["data"], cell["protocol"], cell["window"], own), []).append(cell)
    for (data, protocol, window, _), here in sorted(groups.items()):
        lines += [*_group(data, protocol, window, here), ""]
    ids = {settings_hash(training_part(cell["settings"])) for cell in found}
    for path in sorted(work.glob(f"*/window*/seed*/report{schema.DATASET_FORMAT}-*/metrics.json")):
        if path.parents[1].name.split("-")[-1] not in ids:
            continue  # of other settings
        document = json.loads(path.read_text(encoding="utf-8"))
        names = [path.parents[number].name for number in (3, 2, 1, 0)]
        lines += [f"## {', '.join(names)}: 20 candidates", "", "```", table_text(document).strip(), "```", ""]
    return "\n".join(lines).rstrip() + "\n"


def _intro(cells: list[Cell]) -> str:
    seeds = sorted({cell["seed"] for cell in cells})
    counts = {cell["arm"]: cell["parameters"] for cell in cells if "@" not in cell["arm"]}
    said = "; ".join(f"{arm} {count:,}" for arm, count in counts.items())
    return (
        f"Command: `python scripts/reproduce/movielens.py`, seeds {', '.join(map(str, seeds))}. "
        f"{machine_line(cells)}\n\n"
        "Nats a held-out title, lower is better, with 95% intervals; differences are to plain LoRA on the same titles. "
        "A seed changes batches, initialisation and encoder; split, phrasings and held-out titles are those of data "
        f"seed {DATA_SEED} throughout. "
        + seeds_said(cells, PEOPLE_SAID, ("data", "protocol", "window", "arm"))
        + " p is Holm's over all comparisons of a table and of the lines under it.\n\n"
        f"What the comparison leaves open: the learning rates, {RATES[0]:g} of the LoRA and {RATES[1]:g} of what reads "
        "the representation, are the same in all arms and tuned for none, soft_token included. All arms have the same "
        "rank, so those that read a representation train more numbers than lora, the most of them soft_token "
        f"(trained numbers: {said})."
    )


def _group(data: str, protocol: str, window: int, cells: list[Cell]) -> list[str]:
    arms = {arm: [c for c in cells if c["arm"] == arm] for arm in (*ARMS, "ilora@uniform", "ilora@shuffled")}
    title = f"## {data}, protocol {protocol}, windows of {window} titles, the gate reads up to {MAX_ITEMS} items"
    if not arms["lora"]:
        return [title, "", "Plain LoRA is not finished."]
    settings = common_settings(cells)
    told = ", ".join(f"{name} {settings[name]}" for name in ("model", "dtype", "steps", "batch_size", "encoder_epochs"))
    told += f"; set {' '.join(settings['set'])}" * bool(settings["set"])
    first = arms["lora"][0]
    size = f"{sum(first['titles'])} titles in {len(first['users'])} windows of {len(set(first['users']))} users"
    header = ["arm", "nats a title", "against plain LoRA", "by seed", "trained parameters"]
    further = [("ilora", other) for other in ("soft_token", "shuffled", "ilora@shuffled", "ilora@uniform")]
    rows, lines = comparisons(arms, "lora", further)
    return [title, "", f"{size}. Settings: {told}.", "", markdown(header, rows), "", *lines]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("--work", type=Path, default=Path("runs/evidence/movielens"))
    parser.add_argument("--output", type=Path, default=REPORT)
    parser.add_argument("--data", default="ml-100k", help="ml-100k, or ml-1m=FOLDER with its files")
    parser.add_argument("--protocol", default="temporal", choices=["temporal", "last_20"])
    parser.add_argument("--windows", type=int, nargs="+", default=[5])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=["lora", "ilora", "soft_token", "shuffled"], choices=ARMS)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-windows", type=int, default=800, help="held-out windows at most")
    parser.add_argument("--encoder-epochs", type=int, default=200)
    parser.add_argument("--model", default="offline://smollm2-135m-instruct")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="0: torch's default")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing, where memory is short")
    parser.add_argument("--evaluate", action="store_true", help="20 candidates and the baselines, by recllm evaluate")
    parser.add_argument("--max-examples", type=int, default=200, help="users that --evaluate scores")
    parser.add_argument("--exhaustive", action="store_true", help="--evaluate ranks the whole catalogue by every title")
    parser.add_argument(
        "--beam", type=int, help="--evaluate ranks the whole catalogue by beams of this width, the arms alone"
    )
    parser.add_argument("--jobs", type=int, default=1, help="windows and seeds at once, a process each (15 GB each)")
    parser.add_argument("--keep", action="store_true", help="keep the adapters after --evaluate")
    parser.add_argument("--estimate", action="store_true", help="time a few steps and stop")
    parser.add_argument("--report", action="store_true", help="write the report from the cells that are there")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further overrides of the recipe")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
