"""Does the gate help where the best possible score is known? Synthetic users of hidden clusters.

    python scripts/reproduce/synthetic.py                 all cells that are not there yet, then the report
    python scripts/reproduce/synthetic.py --seeds 0 --steps 20 --base-steps 20 --users 60      a quick look
    python scripts/reproduce/synthetic.py --report        eval/reference/synthetic.md from the cells that are there
    python scripts/reproduce/synthetic.py --split valid --rates lora=0.002,0.03 --arms lora --knobs 1 --seeds 0
                                                          other learning rates, asked of the validation users

The world (recllm/data/synthetic.py, `Clusters`): popularity says nothing once the last item is known, the user's hidden
cluster says much. The knob goes from one transition table for all users (0) to clusters that contradict each other (1).
The base model is a tiny Llama with a word-level tokenizer, trained in full on the training users' examples: a random
one could not be taught to write titles by an adapter. It is then frozen, and every arm fits an adapter to it on the
same examples in the same order. Arms train 16,384 numbers (soft_token has a smaller r for it), those with a gate its
132 more; in uniform and oracle these get no gradient, as the weights are given. Test users are in no training set.

Settings: what the prompt shows and what the gate (or the soft token) reads. `2:all` the gate remembers more than the
prompt shows; `2:2` both see the same two items; `8:8` (at the largest knob only, to save time) both see the same eight,
under a base model trained on such prompts. The encoder is a GRU4Rec: at this size SASRec does not learn which cluster a
history is of (a linear probe of its state finds 40 to 70% of the clusters, of GRU4Rec's 94%).
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
    score,
    seeds_said,
    settings_hash,
    this_machine,
    trained_parameters,
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
from recllm.data.dataset import Dataset, pad_left
from recllm.data.synthetic import Clusters, Score, bayes_scores, best_score, window_score, write_clusters
from recllm.errors import UserError
from recllm.model.adapter import accepts_history, fit_gate_statistics
from recllm.model.sequence_encoder import load_encoder
from recllm.recipe import Recipe
from recllm.train.collator import COLUMNS, Collator, TokenizedExamples, tokenize
from recllm.train.encoder import fit_encoder

ROOT = Path(__file__).resolve().parents[2]
REPORT = ROOT / "eval" / "reference" / "synthetic.md"
KEY = ("knob", "setting", "arm", "seed", "settings_id")
LENGTH = 40  # items of each user
SCORED_FROM = 16  # test targets have at least so many items before them
# Learning rates of the LoRA and of what reads the representation. They were chosen by validation users of knob 1, seed
# 0 (--split valid --rates …), among 0.002, 0.005, 0.01 (soft token: 0.02 too) and 0.01, 0.03, 0.1 (soft token: 0.3 too)
RATES = {"lora": (5e-3, 3e-2), "ilora": (5e-3, 3e-2), "soft_token": (1e-2, 1e-1)}
WORLD = Clusters(num_tiers=4, focus=0.8)
ENCODER = {
    "type": "gru4rec",
    "hidden_size": 32,
    "num_layers": 1,
    "dropout": 0.0,
    "max_epochs": 40,
    "patience": 6,
    "learning_rate": 5e-3,
}
BATCH_SIZE = 64
TEMPLATE = {
    "id": "synthetic@1",
    "task": "next_item",
    "phrasings": [{"user": "{{ history }}"}],
}


def main() -> None:
    """Run what is missing, then report."""
    arguments = _arguments()
    cells = Cells(arguments.work / "cells.jsonl", KEY)
    if not arguments.report:
        knobs = sorted(arguments.knobs, reverse=True)  # the longest first: workers end together
        groups = [(arguments, knob, seed) for knob in knobs for seed in arguments.seeds]
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
        files.write_text(arguments.output, text)


def _wanted(arguments: argparse.Namespace, cells: Cells) -> list[Cell]:
    """Cells of a report: all, or, after a run, those of its settings. Never those of an arm as it was earlier."""
    found = of_current_arms(cells.read().values(), ARM_VERSIONS)
    asked = {settings_hash(cell_settings(arguments, arm)) for arm in ARMS}
    return [cell for cell in found if arguments.report or cell["settings_id"] in asked]


# ---- settings ----


def world_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What decides log, data set, encoder and base model, beside knob, seed and prompt length."""
    world = {name: value for name, value in dataclasses.asdict(WORLD).items() if name not in ("conflict", "seed")}
    return {
        "version": __version__,
        "world": world,
        "users": arguments.users,
        "length": LENGTH,
        "scored_from": SCORED_FROM,
        "encoder": ENCODER,
        "width": WIDTH,
        "base_steps": arguments.base_steps,
        "dtype": "float32",
    }


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
    for shown in sorted({_prompt(setting) for setting in _settings(arguments, knob)}):
        run_prompt(arguments, knob, seed, shown)


def run_prompt(arguments: argparse.Namespace, knob: float, seed: int, shown: int) -> None:
    """All missing cells of one prompt length; a line on stderr for each."""
    cells = Cells(arguments.work / "cells.jsonl", KEY)
    settings = [setting for setting in _settings(arguments, knob) if _prompt(setting) == shown]
    wanted = [(setting, arm) for setting in settings for arm in _arms(setting, settings) if arm in arguments.arms]
    done, ids = cells.read(), {arm: settings_hash(cell_settings(arguments, arm)) for arm in ARMS}
    missing = [(setting, arm) for setting, arm in wanted if (knob, setting, arm, seed, ids[arm]) not in done]
    if not missing:
        return
    started = time.monotonic()
    world = World(arguments, knob, seed, shown)
    _say(f"knob {knob} seed {seed} prompt {shown}: data, encoder and base model in {time.monotonic() - started:.0f} s")
    for number, (setting, arm) in enumerate(missing, 1):
        started = time.monotonic()
        for cell in reversed(world.cells(setting, arm)):  # the arm's own cell last: it marks all of them as done
            cells.add(cell | {"wall_s": round(time.monotonic() - started, 1)})
            _say(f"knob {knob} seed {seed} {setting} {cell['arm']}: {np.mean(cell['nats']):.4f} nats")
        _say(f"  {number} of {len(missing)} in {time.monotonic() - started:.1f} s")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _settings(arguments: argparse.Namespace, knob: float) -> list[str]:
    """The settings of a knob: prompts longer than the shortest only at the largest knob."""
    shortest = min(map(_prompt, arguments.settings))
    return [s for s in arguments.settings if _prompt(s) == shortest or knob == max(arguments.knobs)]


def _prompt(setting: str) -> int:
    return int(setting.split(":")[0])


def _arms(setting: str, settings: list[str]) -> tuple[str, ...]:
    """Arms that read no history are the same under every gate memory: fitted once, under the first setting."""
    return ARMS if setting == settings[0] else READS_HISTORY


class World:
    """Data, base model, encoder and examples of one group."""

    def __init__(self, arguments: argparse.Namespace, knob: float, seed: int, shown: int) -> None:
        """Folders that are there are taken as they are: a stopped run goes on."""
        self.arguments, self.knob, self.seed = arguments, knob, seed
        self.truth = dataclasses.replace(WORLD, conflict=knob, seed=seed)
        self.log = Path(arguments.work) / f"knob{knob}-seed{seed}-{settings_hash(world_settings(arguments))}"
        self.folder = self.log / f"prompt{shown}"
        if not (self.log / "log").is_dir():
            write_clusters(self.log / "log", self.truth, arguments.users, LENGTH, seed)
        files.write_text(self.log / "template.yaml", yaml.safe_dump(TEMPLATE))
        titles = pq.read_table(self.log / "log" / "items.parquet")["title"].to_pylist()
        self.tokenizer = word_tokenizer(word for title in titles for word in title.split())
        self.tokenizer.save_pretrained(self.log / "tokenizer")
        recipe = make_recipe(self.log, seed, shown)
        if not (self.folder / "dataset").is_dir():
            with contextlib.redirect_stdout(sys.stderr):
                convert(recipe, self.folder / "dataset", workers=1)
        self.dataset = Dataset.open(self.folder / "dataset")
        self.collator = Collator(int(self.tokenizer.pad_token_id or 0))
        self.train, self.asked = self._tokenized("train"), self._tokenized(arguments.split)
        self.encoder_folder = self.log / "encoder"
        if not self.encoder_folder.is_dir():
            fit_encoder(self.dataset, recipe.encoder, LENGTH, seed, self.encoder_folder, exclude_history=False)
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
        memory = setting.split(":")[1]
        trained, tested = self._tables(self.train, arm, memory), self._tables(self.asked, arm, memory)
        if accepts_history(model) and "representation" in trained:
            fit_gate_statistics(model, trained["representation"].cpu())
        plan = Plan(self.arguments.steps, BATCH_SIZE, *_rates(self.arguments, arm), self.seed)
        log = fit(model, self.train, self.collator, trained, plan)
        found = [self._cell(setting, arm, model, tested, log)]
        if arm == "ilora":
            for control, given in (("ilora@uniform", "uniform"), ("ilora@shuffled", "ilora@shuffled")):
                found.append(self._cell(setting, control, model, self._tables(self.asked, given, memory), log))
        return found

    def _tables(self, examples: TokenizedExamples, arm: str, memory: str) -> Tables:
        """What the gate or the soft token is given for each example."""
        users = examples.user_indices
        max_items = LENGTH if memory == "all" else int(memory)
        return given_to(
            arm,
            users,
            lambda: self._states(examples, max_items),
            self._clusters()[users],
            self.truth.num_clusters,
            self.seed,
        )

    @torch.no_grad()
    def _states(self, examples: TokenizedExamples, max_items: int) -> torch.Tensor:
        """(N, D): what the encoder says of the last `max_items` items before each example."""
        encoder, _ = load_encoder(self.encoder_folder)
        found = torch.empty(len(examples), encoder.hidden_size)
        order = np.argsort(np.minimum(examples.gate_ends, max_items), kind="stable")
        for start in range(0, len(order), 512):
            rows = order[start : start + 512]
            histories = [
                self.dataset.history(int(examples.user_indices[row]), int(examples.gate_ends[row]), max_items)
                for row in rows
            ]
            found[torch.from_numpy(rows)] = encoder(torch.from_numpy(pad_left(histories)))
        return found

    def _clusters(self) -> np.ndarray:
        """(U,) the true cluster of each user of the dataset."""
        table = pq.read_table(self.log / "log" / "clusters.parquet")
        own = dict(zip(table["user_id"].to_pylist(), table["cluster"].to_pylist()))
        return np.array([own[int(user)] for user in self.dataset.sequences.user_ids.to_pylist()])

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
            "users": self.asked.user_indices.tolist(),
            "bayes": self._bayes(setting),
            "machine": this_machine(self.arguments.device),
            **log,
        }

    def _bayes(self, setting: str) -> dict[str, float]:
        """Nats of the best possible predictors on these very targets."""
        sequences, items = self.dataset.sequences, self.dataset.items["item_id"].to_pylist()
        world_items = np.array([int(item) for item in items])[sequences.items].reshape(-1, LENGTH)
        rows, columns = self.asked.user_indices, self.asked.gate_ends - 1
        seen = {
            "cluster": bayes_scores(self.truth, world_items, clusters=self._clusters())[0],
            "all": bayes_scores(self.truth, world_items)[0],
            "prompt": bayes_scores(self.truth, world_items, int(setting.split(":")[0]))[0],
        }
        return {name: round(float(values[rows, columns].mean()), 4) for name, values in seen.items()}


# ---- data ----


def make_recipe(folder: Path, seed: int, shown: int) -> Recipe:
    """Whole users are held out; every position of a test user from SCORED_FROM on is a target."""
    return Recipe.model_validate(
        {
            "name": "synthetic",
            "seed": seed,
            "output_dir": str(folder),
            "data": {
                "interactions": {"path": str(folder / "log" / "interactions.parquet")},
                "items": {"path": str(folder / "log" / "items.parquet")},
            },
            "protocol": {
                "name": "user_holdout",
                "split": {
                    "method": "user_holdout",
                    "valid_fraction": 0.1,
                    "test_fraction": 0.2,
                    "targets": "all",
                    "min_history": SCORED_FROM,
                },
                "candidates": {"count": 2},
            },
            "history": {"max_items": LENGTH},
            "prompt": {"max_items": shown},
            "tasks": [{"task": "next_item", "template": str(folder / "template.yaml")}],
            "encoder": ENCODER,
            "model": {"name_or_path": str(folder / "tokenizer"), "dtype": "float32"},
        }
    )


# ---- the report ----


def report(found: list[Cell]) -> str:
    """The tables of finished cells of the same settings, as Markdown.

    Raises:
        UserError: cells of different settings.
    """
    if not found:
        return "no finished cell with settings: run without --report first"
    lines = ["# Synthetic clusters: when the gate helps", "", _intro(found), ""]
    for knob in sorted({cell["knob"] for cell in found}):
        lines += [f"## Knob {knob}", "", _analytic(dataclasses.replace(WORLD, conflict=knob)), ""]
        for setting in dict.fromkeys(cell["setting"] for cell in found if cell["knob"] == knob):
            lines += [*_table(found, knob, setting), ""]
    return "\n".join(lines).rstrip() + "\n"


def _intro(cells: list[Cell]) -> str:
    settings = common_settings(cells)
    seeds = sorted({cell["seed"] for cell in cells})
    return (
        f"Command: `python scripts/reproduce/synthetic.py`, seeds {', '.join(map(str, seeds))}. {machine_line(cells)}\n"
        f"{settings['users']} users of {settings['length']} items (a fifth of them held out for the test, a tenth for "
        f"validation; scored here: {settings['split']}), {settings['base_steps']} steps of the base model, "
        f"{settings['steps']} of each adapter. The base model is a tiny Llama trained in full on the training users, "
        "then frozen; what the settings and arms mean stands at the top of the script.\n\n"
        f"{_parameters_said(cells)} {_rates_said(cells)}\n\n"
        "Figures are nats a held-out title, lower is better, with 95% intervals. Differences are to plain LoRA on the "
        "same targets. A seed is also another split and another initialisation. "
        + seeds_said(cells, WORLDS_SAID, ("knob", "setting", "arm"))
        + " p is Holm's over all comparisons of a table and of the lines under it."
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
        f"Learning rates of the LoRA and of what reads the representation: {said}; chosen for each method on the "
        "validation users of one world (knob 1, seed 0), soft_token's in a search that was not repeated; controls take "
        "ilora's."
    )


def _analytic(world: Clusters) -> str:
    def text(found: Score) -> str:
        return f"{found.nats:.3f} nats, hit_rate@1 {found.hit_rate:.3f}"

    known = [f"knowing the cluster {text(best_score(world))}"]
    known += [f"seeing the last {w} item{'s' * (w > 1)} {text(window_score(world, w))}" for w in (1, 2)]
    return f"Best possible, exact: {'; '.join(known)}."


def _table(cells: list[Cell], knob: float, setting: str) -> list[str]:
    here = [cell for cell in cells if cell["knob"] == knob and cell["setting"] == setting]
    shown = setting.split(":")[0]
    common = [
        c
        for c in cells
        if c["knob"] == knob
        and c["setting"].split(":")[0] == shown
        and c["arm"] not in READS_HISTORY
        and "@" not in c["arm"]
    ]
    arms = {
        arm: [c for c in here if c["arm"] == arm] or [c for c in common if c["arm"] == arm]
        for arm in (*ARMS, "ilora@uniform", "ilora@shuffled")
    }
    if not arms["lora"]:
        return [f"Setting {setting}: plain LoRA is not finished."]
    bayes = [cell["bayes"] for cell in arms["lora"]]
    limits = {name: np.mean([values[name] for values in bayes]) for name in ("prompt", "all", "cluster")}
    seen = "all items" if setting.endswith("all") else f"the last {setting.split(':')[1]} items"
    title = (
        f"**Prompt shows the last {shown} items, the gate reads {seen}.** Bayes on the same targets: from the prompt's "
    )
    title += f"items {limits['prompt']:.3f}, from all items {limits['all']:.3f}, "
    title += f"knowing the cluster {limits['cluster']:.3f}."
    header = ["arm", "nats a title", "hit_rate@1 (greedy)", "against plain LoRA", "by seed", "trained parameters"]
    further = [("ilora", other) for other in ("soft_token", "shuffled", "ilora@shuffled")]
    rows, lines = comparisons(arms, "lora", further, extra=("hits",))
    return [title, "", markdown(header, rows), "", *lines]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("--work", type=Path, default=Path("runs/evidence/synthetic"))
    parser.add_argument("--output", type=Path, default=REPORT)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--knobs", type=float, nargs="+", default=[0.0, 0.5, 1.0])
    parser.add_argument("--settings", nargs="+", default=["2:all", "2:2", "8:8"])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--split", default="test", choices=["test", "valid"], help="the held-out users that are asked")
    parser.add_argument(
        "--rates", nargs="+", default=[], metavar="METHOD=LORA,GUIDE", help="other learning rates, of lora, ilora, …"
    )
    parser.add_argument("--users", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--base-steps", type=int, default=1200)
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="processes, each with --threads threads"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--report", action="store_true", help="write the report from the cells that are there")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
