"""Does the gate help to predict actions where users follow hidden policies and mostly leave? Synthetic sessions.

    python scripts/reproduce/action_policies.py                   all cells that are not there yet, then the report
    python scripts/reproduce/action_policies.py --seeds 0 --steps 20 --base-steps 20 --users 60      a quick look
    python scripts/reproduce/action_policies.py --estimate        seconds of a world and an arm here, the grid in hours
    python scripts/reproduce/action_policies.py --report          eval/reference/actions.md from the cells there are
    python scripts/reproduce/action_policies.py --split valid --rates lora=0.002,0.03 --arms lora --knobs 1 --seeds 0
                                                          other learning rates, asked of the validation users

The world (recllm/data/synthetic_sessions.py, `SessionClusters`): three of four steps of a session are "leave", whatever
the popularity of anything else says; in each context (last action, category of its item) a cluster of users has one
preferred action. The knob `conflict` goes from one policy for all users (0) to clusters of which each stays only where
all others leave (1). Sessions are short, so a prompt that shows the session says little about the cluster; the gate
reads all sessions of the user before it. The base model is a tiny Llama (tiny_llama.py), trained in full on the
training users' examples and then frozen; every arm fits an adapter to it on the same examples in the same order, and
arms train equally many numbers (a gate 1.6% more). Test users are in no training set.

Settings: what the prompt shows and what the gate (or the soft token) reads. `1:all` the last event, which is the
context, and the gate all events of all sessions; at the largest knob only, `1:prompt`, where the gate reads that event
alone, and `4:all`, where the prompt shows the last 4 events of the session. What a session says of the cluster this
base model hardly learns to read (conflict 1, seed 0: 1,200 steps leave it at 0.66 nats where Bayes has 0.55, 10,000
steps at 0.62). So it is `1:all` where plain LoRA comes near the best that its prompt allows; of a gap under `4:all` a
part may be the base model's.
Arms: lora; ilora (gate on the frozen state); uniform, trained with uniform gates; shuffled, trained and asked with the
state of another user, drawn anew for every example; oracle, trained with the true cluster as the gate; soft_token.
ilora@uniform and ilora@shuffled are the ilora adapter as trained, asked with uniform gates and, as `recllm evaluate`
does, with each user taking one other user's states.
"""

import argparse
import contextlib
import dataclasses
import multiprocessing
import os
import re
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
import yaml
from evidence import (
    WORLDS_SAID,
    Cell,
    Cells,
    Plan,
    Tables,
    common_settings,
    comparisons,
    fit,
    machine_line,
    markdown,
    of_current_arms,
    say,
    score,
    seeds_said,
    settings_hash,
    states,
    this_machine,
    trained_parameters,
    write_part,
)
from tiny_llama import (
    ARM_VERSIONS,
    ARMS,
    RANK,
    READS_HISTORY,
    WIDTH,
    fit_base,
    given_to,
    make_arm,
    method_of,
    word_tokenizer,
)

from recllm import __version__, files
from recllm.convert.pipeline import convert
from recllm.data.dataset import Dataset
from recllm.data.synthetic_sessions import (
    LEAVE,
    Answers,
    Log,
    Score,
    SessionClusters,
    bayes_answers,
    best_score,
    prompt_score,
    write_sessions,
)
from recllm.errors import UserError
from recllm.model.adapter import accepts_history, fit_gate_statistics
from recllm.recipe import Recipe
from recllm.train.collator import COLUMNS, Collator, TokenizedExamples, tokenize
from recllm.train.encoder import fit_encoder

ROOT = Path(__file__).resolve().parents[2]
REPORT = ROOT / "eval" / "reference" / "actions.md"
HEADING = "# Synthetic sessions: when the gate helps to predict actions"
KEY = ("knob", "setting", "arm", "seed", "settings_id")
CONTROLS = {"ilora@uniform": "uniform", "ilora@shuffled": "ilora@shuffled"}  # arm → what the ilora adapter is given
SCORED_FROM = 30  # test targets have at least so many events before them
MAX_EVENTS = 256  # that the gate reads
# Learning rates of the LoRA and of what reads the representation: as they were chosen for synthetic.py
RATES = {"lora": (5e-3, 3e-2), "ilora": (5e-3, 3e-2), "soft_token": (1e-2, 1e-1)}
# Which item comes next is chance: the encoder has to say it nevertheless, and more items leave more noise in its loss
WORLD = SessionClusters(items_per_category=1)
# Patient: for dozens of epochs it learns nothing but what the context says, then what tells clusters apart
ENCODER = {
    "type": "gru4rec",
    "hidden_size": 64,
    "num_layers": 1,
    "dropout": 0.0,
    "batch_size": 32,
    "max_epochs": 150,
    "patience": 80,
    "learning_rate": 5e-3,
}
BATCH_SIZE = 64
TEMPLATE = {"id": "synthetic_sessions@1", "task": "next_action", "phrasings": [{"user": "{{ events }}"}]}


def main() -> None:
    """Run what is missing, then report."""
    arguments = _arguments()
    cells = Cells(arguments.work / "cells.jsonl", KEY)
    if arguments.estimate:
        estimate(arguments)
        return
    if not arguments.report:
        knobs = sorted(arguments.knobs, reverse=True)  # the longest first: workers end together
        groups = [(arguments, knob, seed) for seed in arguments.seeds for knob in knobs]  # a whole seed first
        if arguments.workers > 1:
            with multiprocessing.get_context("spawn").Pool(arguments.workers) as pool:
                for _ in pool.imap_unordered(run_group, groups, chunksize=1):
                    pass
        else:
            for group in groups:
                run_group(group)
    text = report(_wanted(arguments, cells))
    print(text)
    if arguments.report:
        write_part(arguments.output, HEADING, text)


def _wanted(arguments: argparse.Namespace, cells: Cells) -> list[Cell]:
    """Cells of a report: all, or, after a run, those of its settings. Never those of an arm as it was earlier."""
    found = of_current_arms(cells.read().values(), ARM_VERSIONS)
    asked = {settings_hash(cell_settings(arguments, arm)) for arm in ARMS}
    return [cell for cell in found if arguments.report or cell["settings_id"] in asked]


# ---- settings ----


def world_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What decides log, data set, encoder and base model, beside knob, seed and prompt length."""
    world = dataclasses.asdict(_world(arguments, 0.0, 0))
    return {
        "version": __version__,
        "world": {name: value for name, value in world.items() if name not in ("conflict", "seed")},
        "users": arguments.users,
        "sessions": arguments.sessions,
        "scored_from": SCORED_FROM,
        "max_events": MAX_EVENTS,
        "encoder": ENCODER,
        "width": WIDTH,
        "base_steps": arguments.base_steps,
        "dtype": "float32",
    }


def _world(arguments: argparse.Namespace, knob: float, seed: int) -> SessionClusters:
    return dataclasses.replace(WORLD, conflict=knob, seed=seed, noise=arguments.noise, exit_rate=arguments.exit_rate)


def cell_settings(arguments: argparse.Namespace, arm: str) -> dict[str, Any]:
    """Everything that decides a cell, beside its key."""
    return world_settings(arguments) | {
        "split": arguments.split,
        "rank": RANK,
        "batch_size": BATCH_SIZE,
        "steps": arguments.steps,
        "rates": list(_rates(arguments, arm)),
        "arm_version": ARM_VERSIONS.get(arm, 1),
    }


def _rates(arguments: argparse.Namespace, arm: str) -> tuple[float, float]:
    """Learning rates of an arm's LoRA and of what reads the representation."""
    method = method_of(arm)
    for text in arguments.rates:
        found = re.fullmatch(r"(lora|ilora|soft_token)=([0-9.e-]+),([0-9.e-]+)", text)
        if not found:
            raise UserError(f"--rates {text}: METHOD=LORA,GUIDE is expected, as in ilora=0.005,0.03")
        if found[1] == method:
            return float(found[2]), float(found[3])
    return RATES[method]


# ---- one world under one seed ----


def run_group(group: tuple[argparse.Namespace, float, int]) -> None:
    """All missing cells of one world and seed: they share log and encoder, and by prompt length the base model."""
    arguments, knob, seed = group
    torch.set_num_threads(arguments.threads)
    done, ids = _cells(arguments).read(), {arm: settings_hash(cell_settings(arguments, arm)) for arm in ARMS}
    for shown in sorted({_shown(setting) for setting in arguments.settings}):
        settings = [setting for setting in _settings(arguments, knob) if _shown(setting) == shown]
        wanted = [(setting, arm) for setting in settings for arm in _arms(setting, settings) if arm in arguments.arms]
        missing = [(setting, arm) for setting, arm in wanted if (knob, setting, arm, seed, ids[arm]) not in done]
        if missing:
            run_cells(arguments, knob, seed, shown, missing)


def run_cells(
    arguments: argparse.Namespace, knob: float, seed: int, shown: int, missing: list[tuple[str, str]]
) -> None:
    """Cells (setting, arm) of one prompt length; a line on stderr for each."""
    cells, started = _cells(arguments), time.monotonic()
    world = World(arguments, knob, seed, shown)
    say(f"conflict {knob} seed {seed} prompt {shown}: data, encoder, base model in {time.monotonic() - started:.0f} s")
    for number, (setting, arm) in enumerate(missing, 1):
        started = time.monotonic()
        for cell in reversed(world.cells(setting, arm)):  # the arm's own cell last: it marks all of them as done
            cells.add(cell | {"wall_s": round(time.monotonic() - started, 1)})
            say(f"conflict {knob} seed {seed} {setting} {cell['arm']}: {np.mean(cell['nats']):.4f} nats")
        say(f"  {number} of {len(missing)} in {time.monotonic() - started:.1f} s")


def _cells(arguments: argparse.Namespace) -> Cells:
    return Cells(arguments.work / "cells.jsonl", KEY)


def _settings(arguments: argparse.Namespace, knob: float) -> list[str]:
    """The settings of a knob: those behind the first only at the largest knob."""
    return arguments.settings if knob == max(arguments.knobs) else arguments.settings[:1]


def _shown(setting: str) -> int:
    return int(setting.split(":")[0])


def _arms(setting: str, settings: list[str]) -> tuple[str, ...]:
    """Arms that read no history are the same whatever the gate reads: fitted once, under the first setting."""
    return ARMS if setting == settings[0] else READS_HISTORY


class World:
    """Data, base model, encoder and examples of one world, seed and prompt length."""

    def __init__(self, arguments: argparse.Namespace, knob: float, seed: int, shown: int) -> None:
        """Folders that are there are taken as they are: a stopped run goes on."""
        self.arguments, self.knob, self.seed, self.shown = arguments, knob, seed, shown
        self.truth = _world(arguments, knob, seed)
        self.log = Path(arguments.work) / f"conflict{knob}-seed{seed}-{settings_hash(world_settings(arguments))}"
        self.folder, self.encoder_folder = self.log / f"prompt{shown}", self.log / "encoder"
        if not (self.log / "log").is_dir():
            write_sessions(self.log / "log", self.truth, arguments.users, arguments.sessions, seed)
        files.write_text(self.log / "template.yaml", yaml.safe_dump(TEMPLATE))
        self.tokenizer = make_tokenizer(self.truth, self.log / "log" / "items.parquet")
        self.tokenizer.save_pretrained(self.log / "tokenizer")
        recipe = make_recipe(self.log, self.truth, seed, shown)
        if not (self.folder / "dataset").is_dir():
            with contextlib.redirect_stdout(sys.stderr):
                convert(recipe, self.folder / "dataset", workers=1)
        self.dataset = Dataset.open(self.folder / "dataset")
        self.events = read_events(self.dataset, self.log / "log" / "clusters.parquet")
        self.collator = Collator(int(self.tokenizer.pad_token_id or 0))
        self.train, self.asked = self._tokenized("train"), self._tokenized(arguments.split)
        if not self.encoder_folder.is_dir():
            fit_encoder(self.dataset, recipe.encoder, MAX_EVENTS, seed, self.encoder_folder, exclude_history=False)
        if not (self.folder / "base").is_dir():
            steps, device = arguments.base_steps, arguments.device
            fit_base(self.folder / "base", self.tokenizer, self.train, self.collator, steps, seed, device)

    def _tokenized(self, split: str) -> TokenizedExamples:
        return tokenize(self.dataset.example_batches(split, COLUMNS), self.tokenizer, 512, split)

    # ---- cells ----

    def cells(self, setting: str, arm: str) -> list[Cell]:
        """Fit one arm and score it; of ilora also under the gates of the controls."""
        base, device = self.folder / "base", self.arguments.device
        model = make_arm(arm, base, self.encoder_folder, self.truth.num_clusters, self.seed, device)
        trained, tested = self._tables(self.train, arm, setting), self._tables(self.asked, arm, setting)
        if accepts_history(model) and "representation" in trained:
            fit_gate_statistics(model, trained["representation"].cpu())
        plan = Plan(self.arguments.steps, BATCH_SIZE, *_rates(self.arguments, arm), self.seed)
        log = fit(model, self.train, self.collator, trained, plan)
        found = [self._cell(setting, arm, model, tested, log)]
        for control, given in CONTROLS.items() if arm == "ilora" else ():
            found.append(self._cell(setting, control, model, self._tables(self.asked, given, setting), log))
        return found

    def _tables(self, examples: TokenizedExamples, arm: str, setting: str) -> Tables:
        """What the gate or the soft token is given for each example."""
        own = self.events.clusters[examples.user_indices]
        count, users = self.truth.num_clusters, examples.user_indices
        return given_to(arm, users, lambda: self._states(examples, setting), own, count, self.seed)

    def _states(self, examples: TokenizedExamples, setting: str) -> torch.Tensor:
        """(N, D): what the encoder says of the events before each example that the gate reads."""
        read = np.full(len(examples), MAX_EVENTS)
        if setting.endswith(":prompt"):
            read = np.minimum(self._targets(examples) - self._session_begins(examples), self.shown)
        return states(self.encoder_folder, self.dataset, examples, read, self.arguments.device)

    def _targets(self, examples: TokenizedExamples) -> np.ndarray:
        """(N,) where each example's target stands among all events."""
        return self.dataset.sequences.offsets[examples.user_indices] + examples.gate_ends

    def _session_begins(self, examples: TokenizedExamples) -> np.ndarray:
        """(N,) and where its session begins."""
        sessions = self.events.sessions
        return np.searchsorted(sessions, sessions[self._targets(examples)])

    def _cell(self, setting: str, arm: str, model: Any, tables: Tables, log: dict[str, float]) -> Cell:
        nats, hits = score(model, self.asked, self.collator, tables, 256)
        settings = cell_settings(self.arguments, arm.split("@")[0])
        return {
            "knob": self.knob,
            "setting": setting,
            "arm": arm,
            "seed": self.seed,
            "settings_id": settings_hash(settings),
            "settings": settings,
            "parameters": trained_parameters(model),
            "nats": [round(value, 4) for value in nats.tolist()],
            "hits": hits.astype(int).tolist(),
            "labels": self.events.actions[self._targets(self.asked)].tolist(),
            "users": self.asked.user_indices.tolist(),
            "bayes": self._bayes(),
            "machine": this_machine(self.arguments.device),
            "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
            **log,
        }

    def _bayes(self) -> dict[str, dict[str, float]]:
        """Scores of the best possible predictors on these very targets."""
        place = np.searchsorted(self.events.targets, self._targets(self.asked))
        seen = {
            "prompt": bayes_answers(self.truth, self.events, shown=self.shown),
            "all": bayes_answers(self.truth, self.events),
            "cluster": bayes_answers(self.truth, self.events, clusters=self.events.clusters),
        }
        return {
            name: {metric: round(value, 4) for metric, value in _taken(answers, place)._asdict().items()}
            for name, answers in seen.items()
        }


def _taken(answers: Answers, place: np.ndarray) -> Score:
    return Answers(*(column[place] for column in answers)).score()


# ---- data ----


def make_tokenizer(world: SessionClusters, items: Path) -> Any:
    """A token for each word of a title and for each action."""
    titles = pq.read_table(items)["title"].to_pylist()
    return word_tokenizer([*world.labels, *(word for title in titles for word in title.split())])


def read_events(dataset: Dataset, clusters: Path) -> Log:
    """The log as the dataset has it: its users, its order, its numbers of actions; items by their ids."""
    table = pq.read_table(clusters)
    own = dict(zip(table["user_id"].to_pylist(), table["cluster"].to_pylist()))
    sequences = dataset.sequences
    assert sequences.sessions is not None  # of an event dataset, as the actions
    assert sequences.actions is not None
    users = np.repeat(np.arange(sequences.num_users), np.diff(sequences.offsets))
    sessions = users * (int(sequences.sessions.max()) + 1) + sequences.sessions.astype(np.int64)
    if (np.diff(sessions) < 0).any():
        raise RuntimeError(f"{dataset.folder}: sessions of a user are not in the order of time: convert again")
    ids = np.array([*map(int, dataset.items["item_id"].to_pylist()), -1])  # the last is that of events without an item
    return Log(
        clusters=np.array([own[int(user)] for user in sequences.user_ids.to_pylist()]),
        users=users,
        sessions=sessions,
        actions=sequences.actions.astype(np.int64),
        items=ids[sequences.items],
    )


def make_recipe(folder: Path, world: SessionClusters, seed: int, shown: int) -> Recipe:
    """Whole users are held out; every action of a test user that has SCORED_FROM events before it is a target."""
    return Recipe.model_validate(
        {
            "name": "synthetic_sessions",
            "seed": seed,
            "output_dir": str(folder),
            "data": {
                "interactions": {"path": str(folder / "log" / "interactions.parquet")},
                "items": {"path": str(folder / "log" / "items.parquet")},
            },
            "actions": {"words": {label: label for label in world.labels}, "without_item": [LEAVE]},
            "protocol": {
                "name": "user_holdout",
                "split": {
                    "method": "user_holdout",
                    "valid_fraction": 0.1,
                    "test_fraction": 0.2,
                    "targets": "all",
                    "min_history": SCORED_FROM,
                },
            },
            "history": {"max_items": MAX_EVENTS},
            "prompt": {"max_items": shown, "event": "{{ action }} {{ item }}"},
            "tasks": [{"task": "next_action", "template": str(folder / "template.yaml")}],
            "encoder": ENCODER,
            "model": {"name_or_path": str(folder / "tokenizer"), "dtype": "float32"},
        }
    )


# ---- how long ----


def estimate(arguments: argparse.Namespace) -> None:
    """Seconds of the first world and seed and of one arm in it, and the hours of the whole grid on `workers` cores."""
    knob, seed, setting = max(arguments.knobs), arguments.seeds[0], arguments.settings[0]
    torch.set_num_threads(arguments.threads)
    started, cpu = time.monotonic(), time.process_time()
    world = World(arguments, knob, seed, _shown(setting))
    prepared, prepared_cpu = time.monotonic() - started, time.process_time() - cpu
    started, cpu = time.monotonic(), time.process_time()
    found = world.cells(setting, "ilora")
    arm, arm_cpu = time.monotonic() - started, time.process_time() - cpu
    arms = {k: sum(len(_arms(s, arguments.settings)) for s in _settings(arguments, k)) for k in arguments.knobs}
    total = len(arguments.seeds) * sum(prepared + count * arm for count in arms.values())
    print(
        f"{len(world.train)} training and {len(world.asked)} asked targets; data, encoder and base model "
        f"{prepared:.0f} s ({prepared_cpu:.0f} CPU-s), one arm (ilora and its two controls) {arm:.0f} s "
        f"({arm_cpu:.0f} CPU-s), peak {found[0]['peak_mib']} MiB; {len(arguments.seeds)} seeds of {len(arms)} worlds "
        f"with {sum(arms.values())} arms: {total / 3600:.1f} h of one core"
    )


# ---- the report ----


def report(found: list[Cell]) -> str:
    """The tables of finished cells of the same settings, as Markdown.

    Raises:
        UserError: cells of different settings.
    """
    if not found:
        return "no finished cell with settings: run without --report first"
    found = [with_recalls(cell) for cell in found]
    lines = [HEADING, "", _intro(found), ""]
    for knob in sorted({cell["knob"] for cell in found}):
        lines += [f"## Conflict {knob}", ""]
        for setting in dict.fromkeys(cell["setting"] for cell in found if cell["knob"] == knob):
            lines += [*_table(found, knob, setting), ""]
    return "\n".join(lines).rstrip() + "\n"


def with_recalls(cell: Cell) -> Cell:
    """The cell with two values an example whose means are macro recall and the recall of "leave".

    `macro` is hit · N / (L · n) for an example of an action with n of the N examples, of L actions that occur; `left`
    is hit · N / n of "leave" and 0 of others.
    """
    hits, labels = np.array(cell["hits"]), np.array(cell["labels"])
    counts = np.bincount(labels)
    shares = hits * len(labels) / counts[labels]
    left = labels == cell["settings"]["world"]["num_actions"]  # the number of "leave"
    return cell | {"macro": (shares / (counts > 0).sum()).tolist(), "left": np.where(left, shares, 0.0).tolist()}


def _intro(cells: list[Cell]) -> str:
    settings = common_settings(cells)
    seeds, world = sorted({cell["seed"] for cell in cells}), settings["world"]
    targets = [len(cell["labels"]) for cell in cells if cell["arm"] == "lora"]
    return (
        f"Command: `python scripts/reproduce/action_policies.py`, seeds {', '.join(map(str, seeds))}. "
        f"{machine_line(cells)}\n"
        f"{settings['users']} users of {settings['sessions']} sessions (a fifth of them held out for the test, a tenth "
        f"for validation; scored here: {settings['split']}, {min(targets)} to {max(targets)} actions a seed), "
        f'{world["num_clusters"]} clusters, {world["num_actions"]} actions and "leave", {world["num_categories"]} '
        f"categories of {world['items_per_category']} items, exit rate {world['exit_rate']:g}, noise "
        f"{world['noise']:g}; {settings['base_steps']} steps of the base model, {settings['steps']} of each adapter. "
        "What world, settings and arms are stands at the top of the script and of "
        "recllm/data/synthetic_sessions.py.\n\n"
        f"{_parameters_said(cells)} {_rates_said(cells)}\n\n"
        "Nats of the next action, lower is better, with 95% intervals; accuracy and macro recall are those of greedy "
        "decoding (a text that is no action is wrong). Differences are to plain LoRA on the same targets. A seed is "
        "also another split and another initialisation. "
        + seeds_said(cells, WORLDS_SAID, ("knob", "setting", "arm"))
        + " p is Holm's over all comparisons of a table (nats) or line (accuracy, macro recall). Rows in italics are "
        "computed, on the same targets: the constant answer, and Bayes' rule, which no system can beat but by chance."
    )


def _parameters_said(cells: list[Cell]) -> str:
    counts: dict[int, list[str]] = {}
    for cell in cells:
        names = counts.setdefault(cell["parameters"], [])
        if "@" not in cell["arm"] and cell["arm"] not in names:
            names.append(cell["arm"])
    said = "; ".join(f"{count:,} of {', '.join(sorted(names))}" for count, names in sorted(counts.items()) if names)
    return (
        f"Trained numbers: {said}. What a gate adds gets no gradient in uniform and oracle, where its weights are "
        "given: they train as many as lora."
    )


def _rates_said(cells: list[Cell]) -> str:
    rates = {method_of(cell["arm"].split("@")[0]): cell["settings"]["rates"] for cell in cells}
    said = ", ".join(f"{method} {lora:g} and {guide:g}" for method, (lora, guide) in sorted(rates.items()))
    return (
        f"Learning rates of the LoRA and of what reads the representation: {said}: as they were chosen for "
        "synthetic.py, not for this world; controls take ilora's."
    )


def _table(cells: list[Cell], knob: float, setting: str) -> list[str]:
    arms = _arms_of(cells, knob, setting)
    if not arms["lora"]:
        return [f"Setting {setting}: plain LoRA is not finished."]
    read = "all events of all sessions before" if setting.endswith(":all") else "the same"
    shown = "event" if _shown(setting) == 1 else f"{_shown(setting)} events"
    title = f"**The prompt shows the last {shown} of the session, the gate reads {read}.**"
    header = [
        "arm",
        "nats",
        "accuracy",
        "macro recall",
        'recall of "leave"',
        "against plain LoRA",
        "by seed",
        "trained",
    ]
    further = [("ilora", other) for other in ("soft_token", "shuffled", "ilora@shuffled")]
    rows, lines = comparisons(arms, "lora", further, extra=("hits", "macro", "left"))
    computed = [*_computed(arms["lora"]), *_exact(arms["lora"][0], knob, setting)]
    for name, said in (("hits", "accuracy"), ("macro", "macro recall")):
        lines += _line(arms, name, said)
    return [title, "", markdown(header, [*computed, *rows]), "", *lines]


def _arms_of(cells: list[Cell], knob: float, setting: str) -> dict[str, list[Cell]]:
    """Cells of a table by arm; those that read no history may stand under another setting of the same prompt."""
    here = [cell for cell in cells if cell["knob"] == knob and _shown(cell["setting"]) == _shown(setting)]
    arms: dict[str, list[Cell]] = {}
    for arm in (*ARMS, *CONTROLS):
        of_arm = [cell for cell in here if cell["arm"] == arm]
        own = [cell for cell in of_arm if cell["setting"] == setting]
        arms[arm] = own or ([] if arm.split("@")[0] in READS_HISTORY else of_arm)
    return arms


def _computed(cells: list[Cell]) -> list[list[str]]:
    """Rows of predictors whose answers are computed: means over the seeds of plain LoRA's cells."""
    shares = [np.bincount(cell["labels"]) / len(cell["labels"]) for cell in cells]
    constant = [float(np.mean([share[-1] for share in shares])), float(np.mean([1 / len(share) for share in shares]))]
    rows = [[f"*always {LEAVE}*", "", f"{constant[0]:.3f}", f"{constant[1]:.3f}", "1.000", "", "", ""]]
    names = {"prompt": "Bayes, the prompt", "all": "Bayes, the whole history", "cluster": "Bayes, the cluster too"}
    for key, name in names.items():
        means = [float(np.mean([cell["bayes"][key][metric] for cell in cells])) for metric in Score._fields]
        rows.append([f"*{name}*", *(f"{value:.3f}" for value in means), "", "", "", ""])
    return rows


def _exact(cell: Cell, knob: float, setting: str) -> list[list[str]]:
    """The same in expectation, where it can be enumerated."""
    world = SessionClusters(**cell["settings"]["world"], conflict=knob)
    scores = {"the prompt": prompt_score(world, _shown(setting)), "the cluster too": best_score(world)}
    return [
        [f"*Bayes, {name}, exact*", *(f"{value:.3f}" for value in found), "", "", "", ""]
        for name, found in scores.items()
    ]


def _line(arms: dict[str, list[Cell]], name: str, said: str) -> list[str]:
    """A line each: differences of a further metric to plain LoRA, and of ilora to its rivals."""
    rows, lines = comparisons(arms, "lora", [("ilora", "soft_token")], name=name)
    differences = [f"{row[0]} {row[2]}" for row in rows if row[2]]
    return [f"- {said} against plain LoRA: {'; '.join(differences)}", *(f"- {said}, {line[2:]}" for line in lines)]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("--work", type=Path, default=Path("runs/evidence/actions"))
    parser.add_argument("--output", type=Path, default=REPORT)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--knobs", type=float, nargs="+", default=[0.0, 0.5, 1.0], metavar="CONFLICT")
    parser.add_argument("--settings", nargs="+", default=["1:all", "1:prompt", "4:all"], metavar="SHOWN:all|prompt")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--split", default="test", choices=["test", "valid"], help="the held-out users that are asked")
    parser.add_argument(
        "--rates", nargs="+", default=[], metavar="METHOD=LORA,GUIDE", help="other learning rates, of lora, ilora, …"
    )
    parser.add_argument("--exit-rate", type=float, default=WORLD.exit_rate, help="share of steps that leave")
    parser.add_argument("--noise", type=float, default=WORLD.noise, help="share of actions drawn by popularity")
    parser.add_argument("--users", type=int, default=1000)
    parser.add_argument("--sessions", type=int, default=30, help="sessions of each user")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--base-steps", type=int, default=1200)
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="processes, each with --threads threads"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--estimate", action="store_true", help="time one world and one arm and stop")
    parser.add_argument("--report", action="store_true", help="write the report from the cells that are there")
    arguments = parser.parse_args()
    if wrong := [one for one in arguments.settings if not re.fullmatch(r"[1-9]\d*:(all|prompt)", one)]:
        raise UserError(f"--settings {wrong[0]}: SHOWN:all or SHOWN:prompt is expected, as in 4:all")
    return arguments


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
