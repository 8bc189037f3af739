"""One evaluation: `recllm evaluate`.

A recipe, dataset/, encoder/ and adapter/ enter; report/ leaves, in one step: metrics.json, predictions.parquet,
gates.parquet and what report.py makes of them. Everything that can be wrong is found before the first score.

metrics.json. An ESTIMATE is {"value", "low", "high"}: the figure and its percentile bootstrap interval over users at
protocol.bootstrap.confidence (of a rate of exactly 0 or 1 its Clopper–Pearson bound); null is "undefined". Lower is
better for nats, brier and calibration_error only.

    format          1
    name, description                of the recipe
    split, tasks                     "test", ["next_item"]: tasks by the names that begin their example ids
    main_system     {task: name}: the system that all others are compared with
    protocol        recipe.protocol
    candidates_label                 how the candidates were drawn, the heading of their table
    provenance      versions {recllm, python, torch, transformers, peft, numpy, …},
                    hashes {recipe, dataset_manifest, items, encoder, adapter, adapters {name}, inputs {path},
                    templates {task: id}},
                    seed, seeds, command, created, base_model {name_or_path, dtype, attn_implementation},
                    machine {cpu_count, processor, platform, torch_device}, seconds {system: scoring wall time}
    counts          the manifest's, and evaluated {task: {examples, users, of_examples, chosen_by_seed}}
    audit           the manifest's leakage audit
    systems         [{name, kind: adapter | control | base_model | baseline, method: null | ilora | soft_token | lora,
                      has_gate, task, description, num_examples, num_users,
                      metrics {"hit_rate@1": ESTIMATE, … "ndcg@k", "mrr@k", "mrr", "valid_ratio", "nats"},
                      full_catalogue: null | {the same without nats},
                      beam: null | {width, k, exact: share of examples whose best k are known to be right,
                      recall: null | share of the exhaustive best k that the beam found}
                      generation: null | {num_examples, max_new_tokens, note, valid_ratio, exact_hit},
                      verdicts: null | {verdict: number of explanations}}]
                    nats, of language models only: negative log-likelihood of the right answer, terminator included.
                    Closed tasks (like): accuracy, balanced_accuracy, "f1 LABEL", auc, brier, calibration_error, …
                    Explanations: supported, valid_ratio. Lists of assets: "hits@k/LABEL", "attainable/LABEL" (the
                    highest that it can be), valid_ratio, finished, unknown_share; LABEL: both, preference, profit
    comparisons     [{task, a, b, metric, difference: a − b, low, high, p_value, p_holm, method: mcnemar |
                      paired_bootstrap, num_examples, num_users}]; Holm within one task and metric
    against_plain   [as comparisons, of nats only]: a is each other adapter and control, b each plain LoRA adapter; Holm
                    within one task and plain LoRA
    segments        {task: {segment: {value: {system: {metric: ESTIMATE, …, num_examples, num_users}}}}}
    segment_notes   {segment: what its values mean}
    examples        [{task, example_id, user_id, history: [texts, oldest first], history_length, target, label,
                      systems {name: {rank, full_rank, top: [{text, score, target}], text, valid}}}]
    gate            null | {system, type: softmax | sigmoid, uniform (weight of each expert that makes the plain LoRA),
                      num_experts, mean_weights, deviation, strongest_counts, strongest_none (examples with the same
                      weight on every expert), mean_entropy, max_entropy, file,
                      collapse (model/gate.py: entropy, largest_mean, …, collapsed), num_layers: null | number,
                      layer_means: null | [[mean weight of each expert] of each layer]}
                    entropy is that of the experts' shares of a user's weight; with one gate a layer all but collapse
                    and layer_means are of the mean over layers
    experts         null | {system, num_users, item_groups: null | {column, separator, guessed}, notes [sentences],
                      parts [{name, what: items | users,
                              groups [{name, share, num_users, lifts [ESTIMATE by expert]}]}]}
                    whom each expert serves (experts.py); all its intervals hold at once
    notes           [sentences]: controls that were asked for and not run, and why
    training_log    [{step, loss, …}] as the trainer logged it; [] where the adapter folder has none

predictions.parquet: figures.PREDICTIONS. gates.parquet: example_id, user_index, weights, x, y, strongest.
"""

import datetime
import hashlib
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm import tqdm

from recllm import __version__, files
from recllm.data.dataset import Dataset
from recllm.errors import UserError
from recllm.evaluate import baselines, experts, figures, language_model, reading
from recllm.evaluate.baselines import Scorer
from recllm.evaluate.language_model import BASE_MODEL, Adapter, Gates, LanguageModels, System
from recllm.evaluate.recommendations import hits_names
from recllm.evaluate.tasks import Prediction, Task, load_tasks
from recllm.recipe import Recipe

FORMAT = 1
METRICS, PREDICTIONS, GATES = "metrics.json", "predictions.parquet", "gates.parquet"
NUM_EXAMPLES_SHOWN = 10
BASELINES = {
    "random": "uniform numbers, seeded by example and item",
    "popularity": "the number of training interactions",
    "item_to_item": "item-to-item transitions of training from the last items of the history, with decay",
    "sequence_encoder": "the sequence encoder of this run",  # in the report under its type
}
ENCODERS = {"sasrec": "SASRec", "gru4rec": "GRU4Rec", "content": "the content encoder"}
CLOSED_BASELINES = {
    "constant": "the most frequent answer of training, for everybody",
    "user_most_frequent": "each user's most frequent answer of training",
}
CHANCE = "chance"
_ORDER = ("adapter", "control", "base_model", "baseline")


def evaluate(
    recipe: Recipe, dataset_folder: Path, encoder_folder: Path, adapter_folder: Path | None, output: Path
) -> dict[str, Any]:
    """Score the adapter of a run, its controls, the base model and the baselines on the same frozen examples.

    Args:
        recipe: what to score (`evaluate`) and how (`protocol`).
        dataset_folder: written by convert.
        encoder_folder: the fitted sequence encoder, a baseline under its own type.
        adapter_folder: written by train; None evaluates the baselines only.
        output: the report folder; an old one is replaced when the new one is complete.

    Returns:
        What metrics.json holds.

    Raises:
        UserError: adapter or encoder of another vocabulary or base model; broken candidates; an empty split;
            evaluate.item_groups that the items do not have.
    """
    from recllm.evaluate import report

    dataset = Dataset.open(Path(dataset_folder))
    adapters = list_adapters(recipe, None if adapter_folder is None else Path(adapter_folder))
    check_protocol(recipe, dataset)
    section = recipe.evaluate
    if (section.exhaustive or section.beam_width) and not recipe.protocol.ranking.full_catalogue:
        asked = "exhaustive=true" if section.exhaustive else f"beam_width={section.beam_width}"
        raise UserError(
            f"evaluate.{asked} ranks the whole catalogue, protocol.ranking.full_catalogue=false does not want that: "
            "set one of them the other way"
        )
    tasks = load_tasks(dataset, recipe.evaluate.split, recipe.evaluate.max_examples, recipe.seed)
    scorers = make_scorers(recipe, dataset, Path(encoder_folder), tasks)
    wants_model = adapters or BASE_MODEL in recipe.evaluate.baselines
    models = LanguageModels(recipe, dataset, adapters) if wants_model else None
    unscored = [task.name for task in tasks if not task.is_closed and (_asks_words(task) or not scorers)]
    if models is None and unscored:
        raise UserError(f"no system scores the task {unscored[0]}: name evaluate.baselines or give an adapter")
    main = next((adapter.folder for adapter in adapters if adapter.is_main), None)
    log = training_log(main)
    groups = experts.load_groups(recipe, dataset) if any(a.is_main and a.method == "ilora" for a in adapters) else None
    if models:
        models.check(tasks)

    systems = [run_baseline(name, score, recipe, dataset, tasks) for name, score in _bar(scorers)]
    systems += closed_baselines(dataset, tasks) + chance(tasks)
    systems += models.systems(tasks) if models else []
    systems.sort(key=lambda system: _ORDER.index(system.kind))  # within a kind as they were scored
    gates = models.gates if models else None

    document = summarise(recipe, dataset, tasks, systems, gates, groups)
    document["notes"] = notes(recipe, adapters) + (models.notes if models else [])
    if gates:
        document["notes"] += unread_notes(tasks)
    document["provenance"] |= provenance(recipe, dataset, Path(encoder_folder), adapters)
    document["training_log"] = log
    with files.replacing_folder(Path(output)) as folder:
        write_predictions(folder / PREDICTIONS, tasks, systems, recipe.protocol.ranking.k)
        if gates:
            pq.write_table(language_model.gates_table(gates, tasks), folder / GATES, compression="zstd")
        files.write_json(folder / METRICS, document)
        report.write(folder)
    print(table_text(document))
    print(f"report: {Path(output) / 'report.html'}")
    return document


# ---- before any long work ----


def list_adapters(recipe: Recipe, main: Path | None) -> list[Adapter]:
    """The run's adapter, named by its method, and those that the recipe names.

    Raises:
        UserError: a folder without an adapter, or a name that another system has.
    """
    adapters = []
    if main is not None:
        language_model.check_adapter_folder(main)
        method = language_model.method_of(main)
        adapters.append(Adapter(method, main, True, method))
    taken = {*BASELINES, *ENCODERS, *CLOSED_BASELINES, CHANCE, BASE_MODEL, *(adapter.name for adapter in adapters)}
    taken |= {f"{adapter.name}_{name}" for adapter in adapters for name in language_model.CONTROLS[adapter.method]}
    for name, folder in recipe.evaluate.adapters.items():
        if name in taken:
            raise UserError(f'evaluate.adapters: "{name}" is the name of another system of the report: choose another')
        language_model.check_adapter_folder(Path(folder))
        adapters.append(Adapter(name, Path(folder), False, language_model.method_of(Path(folder))))
    return adapters


def notes(recipe: Recipe, adapters: list[Adapter]) -> list[str]:
    """What was asked for and does not go with the run's adapter."""
    return [note for a in adapters for note in language_model.control_notes(recipe.evaluate.controls, a)]


def unread_notes(tasks: list[Task]) -> list[str]:
    """A sentence for each task with examples whose gate has nothing to read."""
    counts = {task.name: (int((task.examples.gate_end == 0).sum()), len(task.target)) for task in tasks}
    return [
        f"{name}: of {unread} of {total} examples the gate has nothing to read, because their users did nothing before "
        "what the prompt shows: they get the plain LoRA, under every control too that does not swap gates."
        for name, (unread, total) in counts.items()
        if unread
    ]


def check_protocol(recipe: Recipe, dataset: Dataset) -> None:
    """Refuse a protocol whose split or candidates, or a history.gate, that the dataset was not converted with.

    Raises:
        UserError: names the first section that differs.
    """
    if (gate := dataset.manifest.get("history_gate")) != recipe.history.gate:
        raise UserError(
            f"{dataset.folder} was converted with history.gate={gate}, the recipe has {recipe.history.gate}: run "
            "`recllm convert` with this recipe"
        )
    converted = dataset.manifest.get("recipe", {}).get("protocol", {})
    for section in ("split", "candidates"):
        wanted = recipe.protocol.model_dump(mode="json")[section]
        found = converted.get(section, wanted)
        differing = [key for key in wanted if found.get(key) != wanted[key]]
        if differing:
            key = differing[0]
            raise UserError(
                f"{dataset.folder} was converted with protocol.{section}.{key}={found.get(key)!r}, the recipe has "
                f"{wanted[key]!r}: run `recllm convert` with this recipe, or score with the dataset's protocol"
            )


def make_scorers(recipe: Recipe, dataset: Dataset, encoder_folder: Path, tasks: list[Task]) -> dict[str, Scorer]:
    """The baselines that the recipe names, ready to score; none where every task is closed."""
    makers = {
        "random": lambda: baselines.random(dataset, recipe.seed),
        "popularity": lambda: baselines.popularity(dataset),
        "item_to_item": lambda: baselines.item_to_item(dataset),
    }
    if all(task.is_closed for task in tasks):
        return {}
    wanted = [name for name in reversed(BASELINES) if name in recipe.evaluate.baselines]
    named = (
        baselines.sequence_encoder(dataset, encoder_folder) if name == "sequence_encoder" else (name, makers[name]())
        for name in wanted
    )
    return dict(named)


# ---- scoring ----


def run_baseline(name: str, score: Scorer, recipe: Recipe, dataset: Dataset, tasks: list[Task]) -> System:
    """A baseline's scores of the candidates and, where the protocol wants it, ranks in the whole catalogue.

    Where lists of assets are asked for, it answers with its best ones of those on offer.
    """
    started, ranking, predictions = time.monotonic(), recipe.protocol.ranking, {}
    for task in tasks:
        if task.judge is not None:
            best = baselines.best_items(score, dataset, task.examples, task.judge.offered, max(ranking.k))
            predictions[task.name] = Prediction(_no_scores(task), generations=task.judge.write(best))
        if task.candidates is None:
            continue
        given = (task.examples, task.candidates, task.target, ranking.full_catalogue, ranking.exclude_history)
        scores, full = baselines.score_examples(score, dataset, *given)
        predictions[task.name] = Prediction(scores, full_rank=full)
    described = BASELINES.get(name) or f"{ENCODERS.get(name, name)}, {BASELINES['sequence_encoder']}"
    return System(name, "baseline", described, predictions, time.monotonic() - started)


def _no_scores(task: Task) -> npt.NDArray[np.float64]:
    return np.zeros((len(task.target), 0))


def chance(tasks: list[Task]) -> list[System]:
    """What lists drawn by lot are expected to hit, where lists are asked for."""
    found = {task.name: Prediction(_no_scores(task)) for task in tasks if task.judge is not None}
    text = "expected of assets drawn uniformly from those with a price before the date"
    return [System(CHANCE, "baseline", text, found, 0.0)] if found else []


def _asks_words(task: Task) -> bool:
    """Whether its answers are texts that only a language model has."""
    return task.choices is not None and task.judge is None


def closed_baselines(dataset: Dataset, tasks: list[Task]) -> list[System]:
    """The constant answer and each user's most frequent one, for closed tasks."""
    closed = [task for task in tasks if task.is_closed]
    if not closed:
        return []
    made: dict[str, dict[str, Prediction]] = {name: {} for name in CLOSED_BASELINES}
    train = dataset.examples("train", ["task", "user_index", "label"])
    for task in closed:
        rows = train.filter(pc.equal(train["task"], task.kind))
        labels, users = rows["label"].to_pylist(), rows["user_index"].to_pylist()
        constant = baselines.most_frequent_label(labels, task.labels)
        answers = {
            "constant": [constant] * len(task.target),
            "user_most_frequent": baselines.user_labels(labels, users, task.users.tolist(), task.labels),
        }
        for name, chosen in answers.items():
            scores = np.array([[float(answer == label) for label in task.labels] for answer in chosen])
            made[name][task.name] = Prediction(scores, has_probabilities=False)
    return [System(name, "baseline", CLOSED_BASELINES[name], found, 0.0) for name, found in made.items()]


# ---- metrics.json ----


def summarise(
    recipe: Recipe,
    dataset: Dataset,
    tasks: list[Task],
    systems: list[System],
    gates: Gates | None,
    groups: experts.Groups | None,
) -> dict[str, Any]:
    """metrics.json but for provenance beyond timings, and the training log."""
    protocol, titles = recipe.protocol, dataset.titles
    document: dict[str, Any] = {
        "format": FORMAT,
        "name": recipe.name,
        "description": recipe.description,
        "split": recipe.evaluate.split,
        "tasks": [task.name for task in tasks],
        "main_system": {},
        "protocol": protocol.model_dump(mode="json"),
        "candidates_label": candidates_label(recipe),
        "provenance": {"seconds": {system.name: round(system.seconds, 2) for system in systems}},
        "counts": dataset.manifest["counts"] | {"evaluated": {task.name: _evaluated(task, recipe) for task in tasks}},
        "audit": dataset.manifest["audit"],
        "systems": [],
        "comparisons": [],
        "against_plain": [],
        "segments": {},
        "segment_notes": figures.SEGMENT_NOTES,
        "examples": [],
        "gate": gate_figures(gates, tasks) if gates else None,
        "experts": expert_figures(gates, groups, tasks, dataset, recipe) if gates and groups else None,
        "notes": [],
    }
    for task in tqdm(tasks, desc="metrics and intervals", unit="task"):
        present = [system for system in systems if task.name in system.predictions]
        main = present[0].name
        document["main_system"][task.name] = main
        document["systems"] += figures.system_entries(task, present, titles, protocol)
        document["comparisons"] += figures.comparisons(task, present, main, protocol)
        document["against_plain"] += figures.against_plain(task, present, protocol)
        document["segments"][task.name] = figures.segments(task, present, dataset, protocol)
        count = max(1, NUM_EXAMPLES_SHOWN // len(tasks))
        document["examples"] += figures.example_entries(task, present, dataset, count)
    return document


def candidates_label(recipe: Recipe) -> str:
    """How the candidates came about, so that nobody takes sampled figures for full-catalogue ones."""
    section = recipe.protocol.candidates
    how = "uniform" if section.method == "uniform" else "popularity-weighted"
    return f"sampled: 1 target + {section.count - 1} {how} items"


def gate_figures(gates: Gates, tasks: list[Task]) -> dict[str, Any]:
    """Mean, spread, entropy (nats) and collapse of the gate weights over all evaluated examples."""
    import torch

    from recllm.model.gate import collapse

    rows = gates.all_weights(tasks)
    weights = language_model.by_expert(rows)
    shares = weights / weights.sum(axis=1, keepdims=True)  # of a softmax the weights themselves
    entropy = -(shares * np.log(np.maximum(shares, 1e-12))).sum(axis=1)
    strongest = language_model.strongest_experts(weights)
    return {
        "system": gates.system,
        "type": gates.type,
        "uniform": gates.uniform,
        "num_experts": weights.shape[1],
        "mean_weights": weights.mean(axis=0).tolist(),
        "deviation": weights.std(axis=0).tolist(),
        "strongest_counts": np.bincount(strongest[strongest >= 0], minlength=weights.shape[1]).tolist(),
        "strongest_none": int((strongest < 0).sum()),
        "mean_entropy": float(entropy.mean()),
        "max_entropy": float(np.log(weights.shape[1])),
        "file": GATES,
        "collapse": collapse(torch.from_numpy(rows)),
        "num_layers": rows.shape[1] if rows.ndim == 3 else None,
        "layer_means": rows.mean(axis=0).tolist() if rows.ndim == 3 else None,
    }


def expert_figures(
    gates: Gates, groups: experts.Groups, tasks: list[Task], dataset: Dataset, recipe: Recipe
) -> dict[str, Any] | None:
    """Whom each expert serves, by the evaluated users of all tasks."""
    weights = language_model.by_expert(gates.all_weights(tasks))
    users = np.concatenate([task.users for task in tasks])
    ends = np.concatenate([task.examples.history_end for task in tasks])
    gate_ends = np.concatenate([task.examples.gate_end for task in tasks])
    return experts.summarise(gates.system, weights, users, ends, gate_ends, dataset, groups, recipe)


def provenance(recipe: Recipe, dataset: Dataset, encoder_folder: Path, adapters: list[Adapter]) -> dict[str, Any]:
    """Everything that a reader needs to make the report again: versions, hashes, seeds, command, machine."""
    manifest = dataset.manifest
    main = next((adapter.folder for adapter in adapters if adapter.is_main), None)
    return {
        "versions": versions(),
        "hashes": {
            "recipe": _json_sha256(recipe.model_dump(mode="json")),
            "dataset_manifest": files.sha256_of(dataset.folder / "manifest.json"),
            "items": manifest["items_sha256"],
            "encoder": files.sha256_of(encoder_folder) if encoder_folder.is_dir() else None,
            "adapter": None if main is None else files.sha256_of(main),
            "adapters": {adapter.name: files.sha256_of(adapter.folder) for adapter in adapters if not adapter.is_main},
            "inputs": manifest["inputs"],
            "templates": {f"{entry['task']}: {entry['id']}": entry["sha256"] for entry in manifest["templates"]},
        },
        "seed": recipe.seed,
        "seeds": manifest["seeds"],
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "base_model": recipe.model.model_dump(mode="json"),
        "machine": machine(),
    }


def versions() -> dict[str, str]:
    """Versions of this package and of what computes its figures."""
    found = {"recllm": __version__, "python": platform.python_version()}
    for name in ("torch", "transformers", "peft", "numpy", "scipy", "polars", "pyarrow"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """What kind of machine this is; no names, no paths."""
    import torch

    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu"
    return {
        "cpu_count": os.cpu_count(),
        "processor": _processor(),
        "platform": platform.platform(),
        "torch_device": device,
        "torch_threads": torch.get_num_threads(),
    }


def training_log(adapter_folder: Path | None) -> list[dict[str, Any]]:
    """What the trainer logged, from the adapter's training_log.json; [] where there is none."""
    if adapter_folder is None or not (adapter_folder / "training_log.json").is_file():
        return []
    return list(files.read_json(adapter_folder / "training_log.json", "the log of a training run"))


def write_predictions(path: Path, tasks: list[Task], systems: list[System], cutoffs: Sequence[int]) -> None:
    """predictions.parquet, a row group a system and task."""
    with pq.ParquetWriter(path, figures.PREDICTIONS, compression="zstd") as writer:
        for task in tasks:
            for system in systems:
                if task.name in system.predictions:
                    writer.write_table(figures.predictions_table(task, system, cutoffs))


# ---- for the terminal ----


def table_text(document: dict[str, Any]) -> str:
    """The systems with their main figures and intervals as plain text, one table a task."""
    lines = []
    for task in document["tasks"]:
        systems = [system for system in document["systems"] if system["task"] == task]
        names = _shown_metrics(document, systems)
        title = f"{task}, split {document['split']}, {systems[0]['num_examples']} examples of "
        confidence = document["protocol"]["bootstrap"]["confidence"]
        lines += ["", f"{title}{systems[0]['num_users']} users, {confidence:.0%} intervals over users"]
        if "hit_rate@1" in systems[0]["metrics"]:
            lines.append(f"candidates {document['candidates_label']}; full: rank in the whole catalogue")
            lines += [note] if (note := reading.beam_note(systems)) else []
        rows = [["system", *names]] + [[system["name"], *(_cell(system, name) for name in names)] for system in systems]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines += ["  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip() for row in rows]
    return "\n".join(lines)


def _shown_metrics(document: dict[str, Any], systems: list[dict[str, Any]]) -> list[str]:
    if "supported" in systems[0]["metrics"]:
        return ["supported", "valid_ratio", "nats"]
    if (hits := hits_names(max(document["protocol"]["ranking"]["k"])))[0] in systems[0]["metrics"]:
        return [*hits, "valid_ratio", "nats"]
    if "accuracy" in systems[0]["metrics"]:
        return ["accuracy", "balanced_accuracy", "auc", "nats"]
    cutoffs = document["protocol"]["ranking"]["k"]
    names = [f"hit_rate@{k}" for k in sorted({min(cutoffs), max(cutoffs)})] + [f"ndcg@{max(cutoffs)}"]
    if any(system["full_catalogue"] for system in systems):
        names.append(f"full ndcg@{max(cutoffs)}")
    return [*names, "nats"]


def _cell(system: dict[str, Any], name: str) -> str:
    place = (system["full_catalogue"] or {}) if name.startswith("full ") else system["metrics"]
    found = place.get(name.removeprefix("full "))
    if not found or found["value"] is None:
        return "-"
    if found["low"] is None:
        return f"{found['value']:.3f}"
    return f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"


def _evaluated(task: Task, recipe: Recipe) -> dict[str, int]:
    return {
        "examples": len(task.target),
        "users": len(np.unique(task.users)),
        "of_examples": task.available,
        "chosen_by_seed": recipe.seed,
    }


def _bar(scorers: dict[str, Scorer]) -> Iterator[tuple[str, Scorer]]:
    with tqdm(scorers.items(), desc="baselines", unit="system") as bar:
        for name, score in bar:
            bar.set_postfix_str(name)
            yield name, score


def _json_sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _processor() -> str:
    """The processor's name; Linux tells it in /proc only."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
