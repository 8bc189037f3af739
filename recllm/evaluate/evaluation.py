"""One evaluation: `recllm evaluate`.

A recipe, dataset/, encoder/ and adapter/ enter; report/ leaves, in one step: metrics.json, predictions.parquet,
gates.parquet and what report.py makes of them. Everything that can be wrong is found before the first score.

metrics.json. An ESTIMATE is {"value", "low", "high"}: the figure and its percentile bootstrap interval over users at
protocol.bootstrap.confidence (of a mean over examples or sessions that is exactly 0 or 1 its Clopper–Pearson bound;
what is no such mean, as figures of classes and means over them, has no interval where all resamples are alike); null is
"undefined". Lower is better for what ends in nats, brier or calibration_error only. Of the tasks about actions
(next_action, next_event, outcome, action_on_item) intervals and tests are over sessions, and num_sessions stands beside
or in place of num_users. There the figures of one class have no interval where fewer than 5 sessions hold it
(statistics.FEW_USERS), and in a mean over classes a class that a resample did not draw keeps its value of all examples.

    format          1
    name, description                of the recipe
    split, tasks                     "test", ["next_item"]: tasks by the names that begin their example ids
    main_system     {task: name}: the system that all others are compared with
    protocol        recipe.protocol
    candidates_label                 how the candidates were drawn, the heading of their table
    provenance      versions {recllm, python, torch, transformers, peft, numpy, …},
                    hashes {recipe, dataset_manifest, items, encoder, adapter, adapters {name}, inputs {path},
                    templates {task: id}},
                    seed, seeds, command, created, engine (who ran the language models),
                    base_model {name_or_path, dtype, attn_implementation},
                    machine {cpu_count, processor, platform, torch_device}, seconds {system: scoring wall time}
    counts          the manifest's, and evaluated {task: {examples, users, of_examples, chosen_by_seed}}, of tasks about
                    actions sessions too
    audit           the manifest's leakage audit
    systems         [{name, kind: adapter | control | base_model | baseline, method: null | ilora | soft_token | lora,
                      has_gate, task, description, num_examples, num_users,
                      metrics {"hit_rate@1": ESTIMATE, … "ndcg@k", "mrr@k", "mrr", "valid_ratio", "nats"},
                      full_catalogue: null | {the same without nats},
                      beam: null | {width, k, exact: share of examples whose best k are known to be right,
                      recall: null | share of the exhaustive best k that the beam found}
                      generation: null | {num_examples, max_new_tokens, note, valid_ratio, exact_hit}: of next_event
                      the answers that were held to no schema, null where none was (the held ones are in metrics)
                      verdicts: null | {verdict: number of explanations; of next_event why answers cannot be read},
                      of the tasks about actions also classes, calibration and reliability, of next_item otto}]
                    nats, of language models only: negative log-likelihood of the right answer, terminator included; of
                    a task with a rationale behind the one that the system wrote itself.
                    Closed tasks: accuracy (of next_action that of the action's type), valid_ratio. Like:
                    balanced_accuracy, "f1 LABEL", auc, brier, calibration_error
                    Explanations: supported, valid_ratio. Lists of assets: "hits@k/LABEL", "attainable/LABEL" (the
                    highest that it can be), valid_ratio, finished, unknown_share; LABEL: both, preference, profit.
                    Orders of assets: undcg/rank, undcg/utility, mrr, "hit_rate@k" of the choice, tau/utility,
                    tau/momentum, tau/safety, json_valid, permutation_valid, finished.
                    Tasks about actions (formulas in action_metrics.py): exact_match (averaged within a session, then
                    over sessions), macro_f1, weighted_f1, macro_recall, weighted_recall, and both recalls with /head
                    and /tail (head: the most frequent classes that together hold half of training). With
                    probabilities auc, grouped_auc and brier of two labels, macro_auc, macro_grouped_auc (one against
                    the rest) and multiclass_brier of more; top_label_calibration_error and label_nats (−log p of the
                    right label among the labels). next_event: type_accuracy, rouge_l/FIELD, valid_ratio.
                    rationale_finished: share of rationales that ended by themselves. And
                      classes {per_class [{label, words, head, support, predicted, precision, recall, f1: ESTIMATE}],
                        confusion [[right label × answered label, the last column: cannot be read]],
                        most_frequent null | {label, share, rest_recall: ESTIMATE}}: the answer that is given most
                        often, how often, and the mean recall of all other labels; null: no answer can be read
                      calibration null | {temperature, num_examples (of valid), before {metric: ESTIMATE}, after {…}};
                        null too of controls, and where none fits, which `notes` says; all of `metrics` are uncalibrated
                      reliability null | {before [{low, high, num_examples, confidence, accuracy}], after: where
                        calibrated}
                      otto null | {k, recall {label: ESTIMATE}, possible {label: items to be found}, score: null |
                        ESTIMATE}: of next_item within sessions, the first k items of the whole catalogue against what
                        follows in the session (Σ hits / Σ min(k, items to come)); null without such a ranking.
                        Its intervals resample users, as all of next_item's do
    below_constant  [{task, system, metric, value, constant, answer, answer_share, rest_recall}]: adapters and base
                    models below the constant answer, whether or not that is among the systems, in exact match, else in
                    accuracy or type_accuracy; main systems first; reports open with it
    comparisons     [{task, a, b, metric, difference: a − b, low, high, p_value, p_holm, method: mcnemar |
                      mcnemar_clustered | paired_bootstrap, num_examples, num_users}]; Holm within one task and metric
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
from recllm.evaluate import (
    action_figures,
    action_systems,
    baselines,
    experts,
    figures,
    graph_systems,
    language_model,
    reading,
)
from recllm.evaluate.action_systems import ActionSystems, held_out
from recllm.evaluate.asset_rankings import ADVISERS
from recllm.evaluate.baselines import Scorer
from recllm.evaluate.explanations import Explanations
from recllm.evaluate.language_model import BASE_MODEL, Adapter, Gates, LanguageModels, System
from recllm.evaluate.recommendations import hits_names
from recllm.evaluate.tasks import LIKE, Prediction, Task, load_tasks
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
            evaluate.item_groups that the items do not have; a package that is not installed.
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
    wants_model = bool(adapters) or BASE_MODEL in recipe.evaluate.baselines
    action_systems.check_packages(recipe, [task.kind for task in tasks], writes=wants_model)
    check_beams(recipe, dataset, tasks)
    scorers = make_scorers(recipe, dataset, Path(encoder_folder), tasks)
    actions = ActionSystems(recipe, dataset, Path(encoder_folder), tasks)
    held, uncalibrated = calibration_tasks(recipe, dataset, tasks)
    explanations = Explanations.of(recipe, dataset) if any(task.is_explained for task in tasks) else None
    of_graph, unexplained = graph_systems.systems(recipe, dataset, tasks, explanations)
    models = LanguageModels(recipe, dataset, adapters, held, explanations) if wants_model else None
    if models is None:
        check_scored(recipe, tasks, scorers, of_graph)
    main = next((adapter.folder for adapter in adapters if adapter.is_main), None)
    log = training_log(main)
    groups = experts.load_groups(recipe, dataset) if any(a.is_main and a.method == "ilora" for a in adapters) else None
    if models:
        models.check(tasks)

    systems = [run_baseline(name, score, recipe, dataset, tasks) for name, score in _bar(scorers)]
    systems += closed_baselines(dataset, tasks) + advisers(tasks) + chance(tasks) + of_graph + actions.systems(held)
    systems += models.systems(tasks) if models else []
    systems = merged(systems)
    systems.sort(key=lambda system: _ORDER.index(system.kind))  # within a kind as they were scored
    gates = models.gates if models else None

    document = summarise(recipe, dataset, tasks, systems, gates, groups, actions)
    document["notes"] += notes(recipe, adapters) + (models.notes if models else []) + uncalibrated + unexplained
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
    taken = {*BASELINES, *ENCODERS, *CLOSED_BASELINES, *action_systems.DESCRIPTIONS, *graph_systems.DESCRIPTIONS}
    taken |= {*ADVISERS, CHANCE, BASE_MODEL}
    taken |= {adapter.name for adapter in adapters}
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
        UserError: names the first section that differs; an action of protocol.actions that the dataset does not have.
    """
    asked = recipe.protocol.actions
    named = [*asked.otto_weights, *asked.otto_next] if dataset.is_events else []
    if unknown := [label for label in named if label not in dataset.actions]:
        raise UserError(
            f'protocol.actions names the action "{unknown[0]}", {dataset.folder} has {", ".join(dataset.actions)}: '
            "take labels of the log"
        )
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


def check_beams(recipe: Recipe, dataset: Dataset, tasks: list[Task]) -> None:
    """Refuse beams that find fewer items than recall@k by action looks at.

    Raises:
        UserError: a task whose items are held against what follows in the session, and a beam narrower than otto_k.
    """
    width, k = recipe.evaluate.beam_width, recipe.protocol.actions.otto_k
    held = [task.name for task in tasks if action_figures.wants_otto(task, dataset)]
    if held and width is not None and width < k and not recipe.evaluate.exhaustive:
        raise UserError(
            f"evaluate.beam_width={width} finds {width} items at most, recall@{k} by action of {held[0]} looks at the "
            f"first {k}: set evaluate.beam_width to {k} or more, evaluate.exhaustive, or a smaller "
            "protocol.actions.otto_k"
        )


def check_scored(recipe: Recipe, tasks: list[Task], scorers: dict[str, Scorer], of_graph: list[System]) -> None:
    """Refuse a task that no baseline scores, where there is no language model.

    Raises:
        UserError: names the task.
    """
    for task in tasks:
        if task.kind == LIKE or action_systems.answers_any(recipe.evaluate.action_baselines, task.kind):
            continue
        if (scorers and _is_scored_by_items(task)) or any(task.name in system.predictions for system in of_graph):
            continue
        option = "evaluate.action_baselines" if task.is_action else "evaluate.baselines"
        raise UserError(f"no system scores the task {task.name}: name {option} or give an adapter")


def calibration_tasks(recipe: Recipe, dataset: Dataset, tasks: list[Task]) -> tuple[dict[str, Task], list[str]]:
    """Validation examples that fit temperatures, by the name of their task, and sentences where there are none.

    Never of what is reported: a report on valid has no temperatures.
    """
    wanted, count = [t for t in tasks if t.is_action and t.is_closed], recipe.protocol.actions.calibration_examples
    if not wanted or not count:
        return {}, []
    if recipe.evaluate.split == "valid":
        return {}, ["No calibration: temperatures are fitted on valid, which is what this report is about."]
    if not dataset.examples("valid", ["example_id"]).num_rows:
        return {}, ["No calibration: the split valid has no examples to fit temperatures on."]
    held = held_out(wanted, load_tasks(dataset, "valid", count, recipe.seed))
    missing = [task.name for task in wanted if task.name not in held]
    return held, [f"{name}: no calibration, the split valid has no example of it." for name in missing]


def make_scorers(recipe: Recipe, dataset: Dataset, encoder_folder: Path, tasks: list[Task]) -> dict[str, Scorer]:
    """The baselines that the recipe names, ready to score items; none where no task asks for items."""
    makers = {
        "random": lambda: baselines.random(dataset, recipe.seed),
        "popularity": lambda: baselines.popularity(dataset),
        "item_to_item": lambda: baselines.item_to_item(dataset),
    }
    if not any(_is_scored_by_items(task) for task in tasks):
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

    Where lists of assets are asked for, it answers with its best ones of those on offer, or with all candidates.
    """
    started, ranking, predictions = time.monotonic(), recipe.protocol.ranking, {}
    for task in tasks:
        if task.judge is not None:
            count = task.judge.listed(ranking.k)
            best = baselines.best_items(score, dataset, task.examples, task.judge.offered, count)
            predictions[task.name] = Prediction(_no_scores(task), generations=task.judge.write(best))
        if task.candidates is None:
            continue
        given = (task.examples, task.candidates, task.target, ranking.full_catalogue, ranking.exclude_history)
        k = recipe.protocol.actions.otto_k if action_figures.wants_otto(task, dataset) else 0
        scores, full, top = baselines.score_examples(score, dataset, *given, k)
        predictions[task.name] = Prediction(scores, full_rank=full, top=top)
    described = BASELINES.get(name) or f"{ENCODERS.get(name, name)}, {BASELINES['sequence_encoder']}"
    return System(name, "baseline", described, predictions, time.monotonic() - started)


def _no_scores(task: Task) -> npt.NDArray[np.float64]:
    return np.zeros((len(task.target), 0))


def advisers(tasks: list[Task]) -> list[System]:
    """Momentum, safety and the fitted utility, where assets are to be ranked by a utility."""
    made: dict[str, dict[str, Prediction]] = {}
    for task in tasks:
        for name, written in (task.judge.advisers() if task.judge else {}).items():
            made.setdefault(name, {})[task.name] = Prediction(_no_scores(task), generations=written)
    return [System(name, "baseline", ADVISERS[name], found, 0.0) for name, found in made.items()]


def chance(tasks: list[Task]) -> list[System]:
    """What is expected of lists drawn by lot, where lists are asked for."""
    found = {task.name: Prediction(_no_scores(task)) for task in tasks if task.judge is not None}
    text = "expected of lists drawn uniformly: of assets with a price before the date, or orders of the candidates"
    return [System(CHANCE, "baseline", text, found, 0.0)] if found else []


def _is_scored_by_items(task: Task) -> bool:
    """Whether scores of items answer it."""
    return task.candidates is not None or task.judge is not None


def merged(systems: list[System]) -> list[System]:
    """Systems of one name as one: a baseline may answer tasks about items and tasks about actions in two ways."""
    found: dict[str, System] = {}
    for system in systems:
        known = found.get(system.name)
        if known is None:
            found[system.name] = system
            continue
        both, took = known.predictions | system.predictions, known.seconds + system.seconds
        found[system.name] = known._replace(predictions=both, seconds=took)
    return list(found.values())


def closed_baselines(dataset: Dataset, tasks: list[Task]) -> list[System]:
    """The constant answer and each user's most frequent one, for the task like."""
    closed = [task for task in tasks if task.kind == LIKE]
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
    actions: ActionSystems,
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
        "below_constant": [],
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
        training = actions.label_counts(task) if task.is_action else None
        document["systems"] += figures.system_entries(task, present, titles, protocol, training)
        if task.is_action:
            constant = actions.constant(task)
            document["below_constant"] += action_figures.below_constant(task, document["systems"], main, constant)
            document["notes"] += action_figures.warnings(task)
            answers = {system.name: system.predictions[task.name] for system in present}
            document["notes"] += action_figures.uncalibrated(task, answers)
        if action_figures.wants_otto(task, dataset):
            document["notes"] += add_otto(document["systems"], task, present, dataset, recipe)
        document["comparisons"] += figures.comparisons(task, present, main, protocol)
        document["against_plain"] += figures.against_plain(task, present, protocol)
        document["segments"][task.name] = figures.segments(task, present, dataset, protocol)
        count = max(1, NUM_EXAMPLES_SHOWN // len(tasks))
        document["examples"] += figures.example_entries(task, present, dataset, count)
    # the report opens with main systems, of whichever task
    document["below_constant"].sort(key=lambda one: one["system"] != document["main_system"][one["task"]])
    return document


def add_otto(
    entries: list[dict[str, Any]], task: Task, systems: list[System], dataset: Dataset, recipe: Recipe
) -> list[str]:
    """recall@k by action into the entries of a task's systems; a sentence on those that have no ranking."""
    protocol, labels = recipe.protocol, dataset.actions
    to_come = action_figures.items_to_come(task, dataset, recipe.evaluate.split, protocol.actions.otto_next)
    predictions = [system.predictions[task.name] for system in systems]
    found = action_figures.otto(task, predictions, to_come, labels, protocol)
    by_name = dict(zip((system.name for system in systems), found, strict=True))
    for entry in entries:
        if entry["task"] == task.name:
            entry["otto"] = by_name[entry["name"]]
    without = ", ".join(name for name, one in by_name.items() if one is None)
    text = (
        f"{task.name}: no recall@{protocol.actions.otto_k} by action of {without}, which were not asked to rank the "
        "whole catalogue (evaluate.beam_width, evaluate.exhaustive)."
    )
    return [text] if without else []


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
        "engine": _engine(recipe),
        "base_model": recipe.model.model_dump(mode="json"),
        "machine": machine(),
    }


def _engine(recipe: Recipe) -> str:
    section = recipe.evaluate
    return f"{section.engine}, {section.replicas} replicas" if section.engine == "ray-vllm" else section.engine


def versions() -> dict[str, str]:
    """Versions of this package and of what computes its figures."""
    found = {"recllm": __version__, "python": platform.python_version()}
    for name in ("torch", "transformers", "peft", "numpy", "scipy", "polars", "pyarrow", "scikit-learn", "xgrammar"):
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
    """The systems with their main figures and intervals as plain text, one table a task.

    The first line says which model is below the constant answer, where one is.
    """
    lines = reading.below_constant(document)
    for task in document["tasks"]:
        systems = [system for system in document["systems"] if system["task"] == task]
        names = _shown_metrics(document, systems)
        title = f"{task}, split {document['split']}, {systems[0]['num_examples']} examples of "
        confidence = document["protocol"]["bootstrap"]["confidence"]
        lines += ["", f"{title}{reading.clusters(systems[0])}, {confidence:.0%} intervals over {reading.unit(task)}"]
        if "hit_rate@1" in systems[0]["metrics"] and not reading.is_ordered(task):
            ranked = any(system["full_catalogue"] for system in systems)
            full = "; full: rank in the whole catalogue" if ranked else ""
            lines.append(f"candidates {reading.candidates_note(document, task)}{full}")
            lines += [note] if (note := reading.beam_note(systems)) else []
        rows = [["system", *names]] + [[system["name"], *(_cell(system, name) for name in names)] for system in systems]
        lines += _columns(rows) + _otto_lines(systems)
        if reading.is_action(task):
            lines += [f"note: {note}" for note in document["notes"] if note.startswith(f"{task}:")]
    return "\n".join(lines)


def _columns(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip() for row in rows]


def _otto_lines(systems: list[dict[str, Any]]) -> list[str]:
    """recall@k of each action, where items are held against what follows in the session."""
    found = {system["name"]: system["otto"] for system in systems if system.get("otto")}
    if not found:
        return []
    first = next(iter(found.values()))
    heads = ["system", *(f"recall@{first['k']} {label}" for label in first["recall"]), "score"]
    rows = [[name, *map(_estimate, one["recall"].values()), _estimate(one["score"])] for name, one in found.items()]
    return ["", *_columns([heads, *rows])]


def _shown_metrics(document: dict[str, Any], systems: list[dict[str, Any]]) -> list[str]:
    known = systems[0]["metrics"]
    if reading.is_ordered(systems[0]["task"]):
        return [*reading.leading_metrics(document, systems[0]["task"]), "permutation_valid", "nats"]
    if reading.is_action(systems[0]["task"]):
        fields = [name for name in known if name.startswith("rouge_l/")]
        own = ["accuracy"] if "accuracy" in known else ["type_accuracy", *fields, "valid_ratio"]
        return ["exact_match", *own, "macro_f1", "weighted_f1", "label_nats", "nats"]
    if "supported" in known:
        return ["supported", "valid_ratio", "nats"]
    if (hits := hits_names(max(document["protocol"]["ranking"]["k"])))[0] in known:
        return [*hits, "valid_ratio", "nats"]
    if "accuracy" in known:
        return ["accuracy", "balanced_accuracy", "auc", "nats"]
    cutoffs = document["protocol"]["ranking"]["k"]
    names = [f"hit_rate@{k}" for k in sorted({min(cutoffs), max(cutoffs)})] + [f"ndcg@{max(cutoffs)}"]
    if any(system["full_catalogue"] for system in systems):
        names.append(f"full ndcg@{max(cutoffs)}")
    return [*names, "nats"]


def _cell(system: dict[str, Any], name: str) -> str:
    place = (system["full_catalogue"] or {}) if name.startswith("full ") else system["metrics"]
    return _estimate(place.get(name.removeprefix("full ")))


def _estimate(found: dict[str, Any] | None) -> str:
    if not found or found["value"] is None:
        return "-"
    if found["low"] is None:
        return f"{found['value']:.3f}"
    return f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"


def _evaluated(task: Task, recipe: Recipe) -> dict[str, int]:
    sessions = {"sessions": len(np.unique(task.clusters))} if task.is_action else {}
    return {
        "examples": len(task.target),
        "users": len(np.unique(task.users)),
        **sessions,
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
