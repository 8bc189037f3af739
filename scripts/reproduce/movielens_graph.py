"""Does the subgraph help? MovieLens with a knowledge graph: none, random, khop, two_stage, parallel, at one budget.

    python scripts/reproduce/movielens_graph.py                        ML-100K with Wikidata, plain LoRA, 3 seeds
    python scripts/reproduce/movielens_graph.py --data ml-1m=shared/data/ml-1m-dbpedia          ML-1M with DBpedia
    python scripts/reproduce/movielens_graph.py --retrieval            what retrieval finds: no model is trained
    python scripts/reproduce/movielens_graph.py --estimate             seconds a step here, minutes a cell
    python scripts/reproduce/movielens_graph.py --method ilora
    python scripts/reproduce/movielens_graph.py --device cuda --batch-size 64 --max-titles 6000 --jobs 5   on a GPU
    python scripts/reproduce/movielens_graph.py --report               eval/reference/graph.md

First, without a model: of all held-out titles, how often the subgraph in the prompt names the title, or something that
the graph ties to it, beside what chance and popularity would name. Then, cell by cell, adapters: a cell is one adapter
whose training prompts had subgraphs of one method. All arms share template, windows, batches, steps, and the lists of
titles in their prompts; `none` has no graph, the others one of at most `--budget` tokens.

Held out are single next titles after a list, as `recllm evaluate` asks: everything from a user's first test position
on (temporal_20), each with the ten titles before it in the prompt and a subgraph of what the user had until then.
Windows would be cheaper, but their first titles have no list, and a subgraph names the user's films: it would gain by
being a history, not by being knowledge. Training windows begin their loss at a random title (dense_start: random), so
lists and subgraphs stand together in training as they do when asked. Scored is a choice of `--max-titles`, the same for
all arms and seeds, and beside it all titles that no training user had (cold): too few for a choice to hold them.

A seed changes batches, initialisation and encoder; the data is that of DATA_SEED throughout.
"""

import argparse
import contextlib
import itertools
import json
import sys
import time
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from evidence import (
    PEOPLE_SAID,
    Against,
    Cell,
    Cells,
    Plan,
    Tables,
    against,
    at_once,
    common_settings,
    comparisons,
    first_rows,
    fit,
    fresh_adapter,
    holm,
    interval,
    machine_line,
    markdown,
    moved_paths,
    of_current_arms,
    per_title,
    say,
    score,
    seeds_said,
    settings_hash,
    states,
    this_machine,
    trained_parameters,
)

from recllm import __version__, files, schema
from recllm.convert.examples import GRAPH_SALT
from recllm.convert.knowledge import NO_LINK, Knowledge, Moments
from recllm.convert.pipeline import GRAPH, convert
from recllm.convert.targets import Sequences
from recllm.convert.titles import tokenizer_special_tokens
from recllm.data.dataset import Dataset
from recllm.data.randomness import mix
from recllm.errors import UserError
from recllm.evaluate.baselines import item_counts
from recllm.evaluate.figures import popularity_classes
from recllm.graph.budget import Fitted
from recllm.graph.segments import is_in, ranges
from recllm.graph.subgraphs import Subgraphs
from recllm.model.adapter import accepts_history, fit_gate_statistics
from recllm.model.base_model import load_base_model, tokenizer_json
from recllm.recipe import Recipe, load_recipe
from recllm.train.collator import COLUMNS, Collator, TokenizedExamples, tokenize
from recllm.train.encoder import fit_encoder

ROOT = Path(__file__).resolve().parents[2]
REPORT = ROOT / "eval" / "reference" / "graph.md"
RECIPES = {"ml-100k": "movielens/next_item_kg_ilora", "ml-1m": "movielens_1m/next_item_kg_ilora"}
KEY = ("data", "method", "arm", "seed", "settings_id")
RETRIEVAL_KEY = ("data", "arm", "settings_id")
DATA_SEED = 0
RATES = (1e-3, 3e-3)  # of the LoRA and of what reads the representation, in all arms; tuned for none of them
ARMS = ("none", "random", "khop", "two_stage", "parallel")  # that are trained where --arms names none
METHODS = (*ARMS[1:], "pagerank")  # whose retrieval is measured
ARM_VERSIONS: dict[str, int] = {}
PAIRS = [
    *((arm, "random") for arm in METHODS[1:]),
    ("two_stage", "khop"),
    ("two_stage", "parallel"),
]
CLASSES = ("head", "tail", "cold")
PARTS = (*CLASSES, "the subgraph names the title", "it does not")
TEMPLATE = "next_item/films_graph"
WINDOW = 10  # titles of a training window, and of the list before a held-out title
RARE = 20  # triples that a rare attribute has at most: people rather than genres
PIECE = 4096  # prompts whose subgraphs are in memory at once

Ints = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]


class Held(NamedTuple):
    """N held-out titles."""

    users: Ints  # (N,)
    positions: Ints  # (N,) in the user's sequence
    targets: Ints  # (N,) item_index
    classes: npt.NDArray[np.str_]  # (N,) popularity of the target in training

    def take(self, rows: Ints | Flags) -> "Held":
        """Some of them."""
        return Held(self.users[rows], self.positions[rows], self.targets[rows], self.classes[rows])


class Run(NamedTuple):
    """What an arm is trained and asked on."""

    arguments: argparse.Namespace
    data: str
    arm: str
    seed: int
    encoder_folder: Path | None
    recipe: Recipe
    dataset: Dataset
    collator: Collator
    train: TokenizedExamples
    asked: TokenizedExamples
    held: Held  # of the examples asked
    drawn: Flags  # (N,) those of the choice, and not only among all cold ones


def main() -> None:
    """Run what is missing, report."""
    arguments = _arguments()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    retrieved = Cells(arguments.work / "retrieval.jsonl", RETRIEVAL_KEY)
    cells = Cells(arguments.work / "cells.jsonl", KEY)
    if not arguments.report:
        run_retrieval(arguments, retrieved)
        if not arguments.retrieval:
            run_arms(arguments, cells)
    text = report(*_wanted(arguments, retrieved, cells))
    print(text)
    if arguments.report:
        files.write_text(arguments.output, text)


def _wanted(arguments: argparse.Namespace, retrieved: Cells, cells: Cells) -> tuple[list[Cell], list[Cell]]:
    """Cells of a report: all, or, after a run, those of its settings."""

    def kept(found: Cells, own: str) -> list[Cell]:
        return [cell for cell in found.read().values() if arguments.report or cell["settings_id"] == own]

    return (
        kept(retrieved, settings_hash(data_settings(arguments))),
        kept(cells, settings_hash(cell_settings(arguments))),
    )


# ---- settings ----


def data_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What decides prompts, beside data set and arm."""
    return {
        "version": __version__,
        "model": arguments.model,
        "budget": arguments.budget,
        "window": WINDOW,
        "template": TEMPLATE,
        "data_seed": DATA_SEED,
        "set": sorted(arguments.set),
    }


def cell_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything that decides a cell, beside its key."""
    own = {
        "dtype": arguments.dtype,
        "steps": arguments.steps,
        "batch_size": arguments.batch_size,
        "rates": list(RATES),
        "arm_version": 1,
        "max_titles": arguments.max_titles,
    }
    own |= {"encoder_epochs": arguments.encoder_epochs} if arguments.method != "lora" else {}
    return data_settings(arguments) | own


# ---- data ----


def make_recipe(arguments: argparse.Namespace, arm: str) -> Recipe:
    """The shipped recipe with a graph, the one task, this arm's retrieval; its seed is that of the data."""
    name, _, folder = arguments.data.partition("=")
    task = load_recipe(RECIPES[name]).tasks[0].model_dump(mode="json")
    task |= {"template": TEMPLATE, "dense_window": WINDOW, "dense_start": "random"}
    overrides = [
        f"seed={DATA_SEED}",
        f"prompt.max_items={WINDOW}",
        f"tasks={json.dumps([task])}",
        "protocol.split.targets=all",
        f"model.name_or_path={arguments.model}",
        f"model.dtype={arguments.dtype}",
        f"encoder.max_epochs={arguments.encoder_epochs}",
        *([f"graph.budget={arguments.budget}", f"graph.retrieval.method={arm}"] if arm != "none" else []),
        *arguments.set,
        *(["graph=null"] if arm == "none" else []),
    ]
    moved = moved_paths(RECIPES[name], "data/ml-1m-dbpedia", folder) if folder else []
    return load_recipe(RECIPES[name], [*moved, *overrides])


def shared_folder(arguments: argparse.Namespace) -> Path:
    """What all cells of a data set and its settings share."""
    return Path(arguments.work) / f"{_data(arguments)}-{settings_hash(data_settings(arguments))}"


def _data(arguments: argparse.Namespace) -> str:
    return str(arguments.data.split("=")[0])


def converted(arguments: argparse.Namespace, arm: str) -> tuple[Recipe, Dataset]:
    """The dataset of an arm, made where it is not there."""
    recipe = make_recipe(arguments, arm)
    folder = shared_folder(arguments) / arm / f"dataset-{schema.DATASET_FORMAT}"
    if not folder.is_dir():
        with contextlib.redirect_stdout(sys.stderr):
            convert(recipe, folder, arguments.workers, tokenizer_json(recipe.model.name_or_path))
    return recipe, Dataset.open(folder)


def held_out(dataset: Dataset) -> Held:
    """All test positions, in the order of the examples."""
    table = dataset.examples("test", ["user_index", "history_end", "target"])
    users, positions, targets = (table[name].to_numpy().astype(np.int64) for name in table.column_names)
    return Held(users, positions, targets, popularity_classes(item_counts(dataset))[targets])


def chosen(held: Held, most: int) -> tuple[Ints, Flags]:
    """Rows of a uniform choice of `most` titles and of all cold ones; which of these the choice drew."""
    rows = np.random.default_rng(0).permutation(len(held.users))[:most]
    asked = np.union1d(rows, np.flatnonzero(held.classes == "cold"))
    return asked, np.isin(asked, rows)


# ---- what retrieval finds ----


def run_retrieval(arguments: argparse.Namespace, cells: Cells) -> None:
    """The figures of each method for all held-out titles."""
    data, done, own = _data(arguments), cells.read(), settings_hash(data_settings(arguments))
    missing = [arm for arm in arguments.arms or METHODS if arm != "none" and (data, arm, own) not in done]
    for arm in missing:
        _, dataset = converted(arguments, missing[0])  # sequences and graph are those of all methods
        found = retrieval_figures(make_recipe(arguments, arm), dataset)
        told = {"data": data, "arm": arm, "settings_id": own, "settings": data_settings(arguments)}
        cells.add(told | {"machine": this_machine("cpu")} | found)
        say(f"{data} {arm}: retrieval of {found['prompts']} prompts took {found['cpu_s']} CPU-s")


def retrieval_figures(recipe: Recipe, dataset: Dataset) -> dict[str, Any]:
    """Sums of what the subgraphs of all held-out titles show, by user and class of the target."""
    knowledge, held, past = open_knowledge(recipe, dataset), held_out(dataset), Past.of(dataset)
    parts, cpu_s = [], 0.0
    for begin in range(0, len(held.users), PIECE):
        here = held.take(np.arange(begin, min(begin + PIECE, len(held.users))))
        moments = moments_of(recipe, dataset, here)
        began = time.process_time()
        found, fitted = knowledge.fitted(moments)
        cpu_s += time.process_time() - began
        figures = Entities.of(knowledge, found, fitted).figures(here, past)
        parts.append(figures | {"triples": fitted.kept, "tokens": fitted.tokens})
    figures = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return _by_user(held, figures) | {"cpu_s": round(cpu_s, 2), "prompts": len(held.users)}


def open_knowledge(recipe: Recipe, dataset: Dataset) -> Knowledge:
    """The graph of a dataset, asked as convert asks it."""
    assert recipe.graph is not None
    special = tokenizer_special_tokens(recipe.model.name_or_path)
    texts = pa.array(dataset.titles, pa.string())
    tokenizer = tokenizer_json(recipe.model.name_or_path)
    return Knowledge(dataset.folder / GRAPH, recipe.graph, texts, special, tokenizer)


def moments_of(recipe: Recipe, dataset: Dataset, held: Held) -> Moments:
    """What the graph may know of, as in the examples that convert wrote: the newest items of earlier seconds."""
    assert recipe.graph is not None
    begins = dataset.sequences.offsets[held.users]
    places = begins + held.positions
    ends = np.maximum(_flat(dataset.folder).first_of_second[places], begins)
    counts = np.minimum(ends - begins, recipe.graph.retrieval.max_items)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    keys = mix(recipe.seed, GRAPH_SALT, dataset.sequences.user_keys[held.users], held.positions)
    items = dataset.sequences.items[ranges(ends - counts, counts)]
    return Moments(offsets, items, dataset.sequences.timestamps[places], keys)


@cache
def _flat(folder: Path) -> Sequences:
    """The sequences of a dataset as convert has them."""
    table = pq.read_table(folder / "sequences.parquet").combine_chunks()
    return Sequences.of(table.to_batches()[0])


class Past(NamedTuple):
    """When each user first had each item, and how popular items are."""

    keys: Ints  # sorted, user · num_items + item
    positions: Ints  # of each key, in the user's sequence
    popularity: Ints  # (num_items,) place of each item, 0 the most frequent in training

    @classmethod
    def of(cls, dataset: Dataset) -> "Past":
        """Of all sequences."""
        sequences = dataset.sequences
        counts = np.diff(sequences.offsets)
        users = np.repeat(np.arange(sequences.num_users), counts)
        keys, first = np.unique(users * dataset.num_items + sequences.items.astype(np.int64), return_index=True)
        popularity = np.empty(dataset.num_items, dtype=np.int64)
        popularity[np.argsort(-item_counts(dataset), kind="stable")] = np.arange(dataset.num_items)
        return cls(keys, first - sequences.offsets[users[first]], popularity)

    def unseen(self, users: Ints, positions: Ints, items: Ints) -> Flags:
        """Whether a user had not had an item before a position."""
        keys = users * len(self.popularity) + items
        places = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        found: Flags = (self.keys[places] != keys) | (self.positions[places] >= positions)
        return found

    def before(self, user: int, position: int) -> Ints:
        """Popularity places of the items that a user had before a position, sorted."""
        begin, end = np.searchsorted(self.keys, [user * len(self.popularity), (user + 1) * len(self.popularity)])
        had = self.keys[begin:end][self.positions[begin:end] < position] - user * len(self.popularity)
        return np.sort(self.popularity[had])


class Entities(NamedTuple):
    """The different entities that subgraphs show: E pairs, by prompt."""

    knowledge: Knowledge
    prompts: Ints  # (E,)
    entities: Ints  # (E,)

    @classmethod
    def of(cls, knowledge: Knowledge, found: Subgraphs, fitted: Fitted) -> "Entities":
        """From the triples in the texts."""
        size, prompts = knowledge.graph.num_entities, found.prompts[fitted.is_kept] * knowledge.graph.num_entities
        keys = np.unique(np.concatenate([prompts + found.heads[fitted.is_kept], prompts + found.tails[fitted.is_kept]]))
        return cls(knowledge, keys // size, keys % size)

    def figures(self, held: Held, past: Past) -> dict[str, npt.NDArray[Any]]:
        """What is named, of each prompt (N,)."""
        count, items = len(held.users), self._items()
        is_item = items != NO_LINK
        prompts, items = self.prompts[is_item], items[is_item]
        is_new = past.unseen(held.users[prompts], held.positions[prompts], items)
        unseen = np.bincount(prompts[is_new], minlength=count)
        before = [past.before(*place) for place in zip(held.users.tolist(), held.positions.tolist())]
        left = len(past.popularity) - np.array([len(had) for had in before])
        places = past.popularity[held.targets]
        ahead = places - np.array([np.searchsorted(had, place) for had, place in zip(before, places.tolist())])
        prompts_of, named, rare = self._attributes(held.targets)
        attributes = np.bincount(prompts_of[named], minlength=count)
        return {
            "with_graph": np.bincount(self.prompts, minlength=count) > 0,
            "target_named": self.show_items(held.targets),
            "unseen_named": unseen,
            "by_chance": unseen / left,
            "most_popular": ahead < unseen,
            "attribute_named": attributes > 0,
            "rare_attribute_named": np.bincount(prompts_of[named & rare], minlength=count) > 0,
            "attributes_named": attributes,
        }

    def _items(self) -> Ints:
        """(E,) the first item of each entity; NO_LINK of what is none."""
        linked = np.asarray(self.knowledge.linked)
        item_of = np.full(self.knowledge.graph.num_entities, NO_LINK, dtype=np.int64)
        linked_items = np.flatnonzero(linked != NO_LINK)[::-1]
        item_of[linked[linked_items]] = linked_items
        found: Ints = item_of[self.entities]
        return found

    def show_items(self, items: Ints) -> Flags:
        """(N,) whether each prompt shows its item."""
        return self.show(np.arange(len(items)), np.asarray(self.knowledge.linked)[items].astype(np.int64))

    def show(self, prompts: Ints, entities: Ints) -> Flags:
        """Whether a prompt shows an entity."""
        size = self.knowledge.graph.num_entities
        keys = self.prompts * size + self.entities  # sorted
        return is_in(prompts * size + entities, keys) & (entities != NO_LINK)

    def _attributes(self, targets: Ints) -> tuple[Ints, Flags, Flags]:
        """Neighbours of the prompts' targets that are no items: the prompt, is it shown there, is it rare?"""
        graph, linked = self.knowledge.graph, np.asarray(self.knowledge.linked)
        is_item = np.zeros(graph.num_entities, dtype=bool)
        is_item[linked[linked != NO_LINK]] = True
        entities = linked[targets].astype(np.int64)
        prompts = np.flatnonzero(entities != NO_LINK)
        begins = graph.run_begins[graph.run_offsets[entities[prompts]]]
        counts = graph.degrees(entities[prompts])
        near = graph.targets[ranges(begins, counts)].astype(np.int64)
        keys = np.unique(np.repeat(prompts, counts) * graph.num_entities + near)
        prompts, near = keys // graph.num_entities, keys % graph.num_entities
        prompts, near = prompts[~is_item[near]], near[~is_item[near]]
        return prompts, self.show(prompts, near), graph.degrees(near) <= RARE


def _by_user(held: Held, figures: dict[str, npt.NDArray[Any]]) -> dict[str, Any]:
    """Means by user and class: for intervals over users as good as every prompt, and far shorter."""
    groups = held.users * len(CLASSES) + np.array([CLASSES.index(name) for name in held.classes.tolist()], np.int64)
    unique, members = np.unique(groups, return_inverse=True)
    counts = np.bincount(members)
    means = {name: np.bincount(members, values) / counts for name, values in figures.items()}
    return {
        "users": (unique // len(CLASSES)).tolist(),
        "classes": [CLASSES[number] for number in (unique % len(CLASSES)).tolist()],
        "titles": counts.tolist(),
        "seed": DATA_SEED,
        **{name: np.round(values, 5).tolist() for name, values in means.items()},
    }


# ---- cells ----


def run_arms(arguments: argparse.Namespace, cells: Cells) -> None:
    """The missing cells, a whole seed first."""
    own, done = settings_hash(cell_settings(arguments)), cells.read()
    runs = [
        (arm, seed)
        for seed in arguments.seeds
        for arm in arguments.arms or ARMS
        if (_data(arguments), arguments.method, arm, seed, own) not in done
    ]
    if arguments.estimate:
        for arm in (arguments.arms or ARMS)[:2]:
            estimate(prepare(arguments, arm, arguments.seeds[0]))
    elif arguments.jobs > 1:
        for arm, seed in runs:  # what they share
            converted(arguments, arm)
            encoder(arguments, seed)
        options = {f"{arm}-seed{seed}": ["--arms", arm, "--seeds", str(seed)] for arm, seed in runs}
        at_once(options, arguments.jobs, arguments.work / "logs")
    else:
        for arm, seed in runs:
            started = time.monotonic()
            cell = fit_arm(prepare(arguments, arm, seed))
            cells.add(cell | {"wall_s": round(time.monotonic() - started, 1)})
            say(f"{arm} seed {seed}: {per_title(_drawn(cell)):.4f} nats a title, {time.monotonic() - started:.0f} s")


def prepare(arguments: argparse.Namespace, arm: str, seed: int) -> Run:
    """Convert, fit the encoder where the method reads one, tokenise."""
    recipe, dataset = converted(arguments, arm)
    _, tokenizer = load_base_model(recipe.model)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    train = tokenize(dataset.example_batches("train", COLUMNS), tokenizer, arguments.max_tokens, "train")
    held = held_out(dataset)
    rows, drawn = chosen(held, arguments.max_titles)
    table = dataset.examples("test", COLUMNS).take(pa.array(rows)).combine_chunks()
    asked = tokenize(table.to_batches(), tokenizer, arguments.max_tokens, "test")
    parts = (recipe, dataset, Collator(int(pad)), train, asked, held.take(rows), drawn)
    return Run(arguments, _data(arguments), arm, seed, encoder(arguments, seed), *parts)


def encoder(arguments: argparse.Namespace, seed: int) -> Path | None:
    """The encoder of a seed, which all arms share; None for plain LoRA."""
    if arguments.method == "lora":
        return None
    folder = shared_folder(arguments) / f"encoder-seed{seed}-{arguments.encoder_epochs}"
    if not folder.is_dir():
        recipe, dataset = converted(arguments, "none")
        fit_encoder(dataset, recipe.encoder, recipe.history.max_items, seed, folder)
    return folder


def set_up(run: Run) -> tuple[Any, Tables, Tables]:
    """A fresh adapter, and what it is given for the training and the held-out examples."""
    section = run.recipe.adapter.model_copy(update={"method": run.arguments.method})
    device = run.arguments.device
    model = fresh_adapter(run.recipe.model, section, run.encoder_folder, run.seed, device, run.arguments.checkpointing)
    if run.encoder_folder is None or not accepts_history(model):
        return model, {}, {}
    read = partial(states, run.encoder_folder, run.dataset, max_items=run.recipe.history.max_items, device=device)
    trained, held = ({"representation": read(examples)} for examples in (run.train, run.asked))
    fit_gate_statistics(model, trained["representation"].cpu())
    return model, trained, held


def fit_arm(run: Run) -> Cell:
    """Train one arm and score the held-out titles."""
    model, trained, held = set_up(run)
    plan = Plan(run.arguments.steps, run.arguments.batch_size, *RATES, run.seed)
    log = fit(model, run.train, run.collator, trained, plan, f"{run.arm} seed {run.seed}")
    nats, hits = score(model, run.asked, run.collator, held, 2 * run.arguments.batch_size)
    settings = cell_settings(run.arguments)
    return {
        "data": run.data,
        "method": run.arguments.method,
        "arm": run.arm,
        "seed": run.seed,
        "settings_id": settings_hash(settings),
        "settings": settings,
        "parameters": trained_parameters(model),
        "nats": np.round(nats, 4).tolist(),
        "hits": hits.astype(int).tolist(),
        "titles": [1] * len(nats),
        "same_people": True,
        "users": run.held.users.tolist(),
        "positions": run.held.positions.tolist(),
        "classes": run.held.classes.tolist(),
        "drawn": run.drawn.astype(int).tolist(),
        "named": _target_is_named(run).astype(int).tolist(),
        "prompt_tokens": float(np.mean(run.asked.lengths - run.asked.completion_tokens)),
        "machine": this_machine(run.arguments.device),
        **log,
    }


def _target_is_named(run: Run) -> Flags:
    """(N,) whether the subgraph names the title that is asked for."""
    if run.recipe.graph is None:
        return np.zeros(len(run.asked), dtype=bool)
    knowledge = open_knowledge(run.recipe, run.dataset)
    shown = Entities.of(knowledge, *knowledge.fitted(moments_of(run.recipe, run.dataset, run.held)))
    return shown.show_items(run.held.targets)


def estimate(run: Run) -> None:
    """Minutes a cell on this machine, from a few steps and a few held-out titles."""
    model, trained, held = set_up(run)
    began = time.process_time()
    log = fit(model, run.train, run.collator, trained, Plan(4, run.arguments.batch_size, *RATES, run.seed))
    cpu_s = (time.process_time() - began) / 4
    count = min(32, len(run.asked))
    started = time.perf_counter()
    few = {name: table[:count] for name, table in held.items()}
    score(model, first_rows(run.asked, count), run.collator, few, 2 * run.arguments.batch_size)
    scoring = (time.perf_counter() - started) / count * len(run.asked)
    print(
        f"{run.data} {run.arm}: {len(run.train)} training windows of {np.mean(run.train.lengths):.0f} tokens, "
        f"{len(run.asked)} held-out titles of {np.mean(run.asked.lengths):.0f} ({len(np.unique(run.held.users))} "
        f"users); {log['step_s']:.2f} s a step ({cpu_s:.2f} CPU-s), {scoring:.0f} s a scoring: "
        f"{(run.arguments.steps * log['step_s'] + scoring) / 60:.1f} minutes a cell"
    )


# ---- the report ----


def report(retrieved: list[Cell], cells: list[Cell]) -> str:
    """The tables of what is there, as Markdown.

    Raises:
        UserError: cells of different settings in one table.
    """
    if not retrieved and not cells:
        return "nothing is measured yet: run without --report first"
    lines = ["# MovieLens with a knowledge graph: does the subgraph help?", ""]
    lines += _retrieval_part(retrieved) if retrieved else []
    lines += _trained_part(of_current_arms(cells, ARM_VERSIONS)) if cells else []
    return "\n".join(lines).rstrip() + "\n"


def _retrieval_part(cells: list[Cell]) -> list[str]:
    lines = [
        "## What retrieval finds, without a model",
        "",
        "Commands: `python scripts/reproduce/movielens_graph.py --retrieval`, the same with `--data ml-1m=FOLDER`, "
        f"then `--report`. {machine_line(cells)}",
        "",
        "Of all held-out titles (protocol temporal_20, everything from a user's first test position on): of how many "
        "of a thousand the subgraph that stands in the prompt names the title, with 95% intervals (bootstrap over "
        "users), and of those that are head, tail and cold in training. Beside it, of how many as many other titles "
        "would: drawn from what the user had not had (by chance), or the most popular in "
        "training of these. Attribute: something that is no title and that the graph ties to the title (of it, rare: "
        f"tied to at most {RARE} things). A prompt names what a user had, too; unseen are the titles that are new to "
        "the user. CPU-second: retrieval and fitting into the budget, one process, on a machine that others used.",
        "",
    ]
    header = ["method", "with a subgraph", "triples", "tokens", "unseen titles named", "names the title, of 1000"]
    header += ["by chance", "most popular", "head", "tail", "cold", "an attribute", "a rare one", "prompts a CPU-s"]
    for data in dict.fromkeys(cell["data"] for cell in cells):
        here = sorted((cell for cell in cells if cell["data"] == data), key=lambda cell: METHODS.index(cell["arm"]))
        settings = common_settings(here)
        counts = {name: sum(n for n, c in zip(here[0]["titles"], here[0]["classes"]) if c == name) for name in CLASSES}
        said = ", ".join(f"{count} {name}" for name, count in counts.items())
        lines += [f"### {data}, {settings['budget']} tokens", ""]
        lines += [f"{here[0]['prompts']} titles of {len(set(here[0]['users']))} users ({said}).", ""]
        lines += [markdown(header, map(_retrieval_row, here)), ""]
    return lines


def _retrieval_row(cell: Cell) -> list[str]:
    def mean(name: str, own: str | None = None) -> float:
        rows = [n for n, group in enumerate(cell["classes"]) if own in (None, group)]
        weights = [cell["titles"][n] for n in rows]
        return float(np.average([cell[name][n] for n in rows], weights=weights)) if rows else float("nan")

    return [
        cell["arm"],
        f"{mean('with_graph'):.1%}",
        f"{mean('triples'):.1f}",
        f"{mean('tokens'):.0f}",
        f"{mean('unseen_named'):.2f}",
        interval([cell | {"of_1000": [1000 * value for value in cell["target_named"]]}], "of_1000"),
        f"{1000 * mean('by_chance'):.2f}",
        f"{1000 * mean('most_popular'):.2f}",
        *(f"{1000 * mean('target_named', name):.2f}" for name in CLASSES),
        f"{mean('attribute_named'):.3f}",
        f"{mean('rare_attribute_named'):.3f}",
        f"{cell['prompts'] / max(cell['cpu_s'], 0.01):,.0f}",
    ]


def _trained_part(cells: list[Cell]) -> list[str]:
    seeds = ", ".join(map(str, sorted({cell["seed"] for cell in cells})))
    lines = [
        "## What adapters gain",
        "",
        f"Commands: `python scripts/reproduce/movielens_graph.py`, then `--report`; seeds {seeds}. "
        f"{machine_line(cells)}",
        "",
        "Nats a held-out title, lower is better, with 95% intervals; a title stands behind a list of "
        f"{WINDOW} and, but for `none`, a subgraph of what the user had until then; differences are to `none` on the "
        "same titles. All arms have the same windows, batches and steps, and no learning rate is tuned; `none` reads "
        "fewer tokens. "
        + seeds_said(cells, PEOPLE_SAID, ("data", "method", "arm"))
        + " p is Holm's over all comparisons of a table and of the lines under it.",
        "",
    ]
    for group in dict.fromkeys((cell["data"], cell["method"]) for cell in cells):
        lines += _group(group, [cell for cell in cells if (cell["data"], cell["method"]) == group])
    return lines


def _group(group: tuple[str, str], cells: list[Cell]) -> list[str]:
    arms = {arm: [cell for cell in cells if cell["arm"] == arm] for arm in ("none", *METHODS)}
    title = f"### {group[0]}, {group[1]}"
    if not arms["none"]:
        return [title, "", "The arm without a graph is not finished.", ""]
    settings = common_settings(cells)
    names = ("model", "dtype", "steps", "batch_size", "budget", "window")
    told = ", ".join(f"{name} {settings[name]}" for name in names)
    told += f"; set {' '.join(settings['set'])}" * bool(settings["set"])
    drawn = {arm: [_drawn(cell) for cell in own] for arm, own in arms.items()}
    first = drawn["none"][0]
    size = f"{len(first['users'])} titles of {len(set(first['users']))} users"
    tokens = ", ".join(f"{arm} {own[0]['prompt_tokens']:.0f}" for arm, own in arms.items() if own)
    header = ["arm", "nats a title", "greedy hits", "against none", "by seed", "trained parameters"]
    rows, lines = comparisons(drawn, "none", PAIRS, ["hits"])
    return [
        *(title, "", f"{size}. Settings: {told}. Tokens of a prompt: {tokens}.", "", markdown(header, rows), ""),
        *(*lines, "") * bool(lines),
        *_parts(arms, drawn),
    ]


def _parts(arms: dict[str, list[Cell]], drawn: dict[str, list[Cell]]) -> list[str]:
    """Differences to `none` by the target's popularity, and by whether the subgraph names it."""
    found: dict[tuple[str, str], tuple[int, Against]] = {}
    for arm, part in itertools.product([arm for arm in METHODS if arms[arm]], PARTS):
        source = arms if part == "cold" else drawn
        rows = _is_of(source[arm][0], part)
        own, none = ([_rows(cell, rows) for cell in source[which]] for which in (arm, "none"))
        if rows.any() and (gap := against(own, none)) is not None:
            found[arm, part] = int(rows.sum()), gap
    adjusted = dict(zip(found, holm([gap.p_value for _, gap in found.values()])))
    texts = {key: f"{gap.text(adjusted[key])}; {count} titles" for key, (count, gap) in found.items()}
    table = [[arm, *(texts.get((arm, part), "") for part in PARTS)] for arm in dict.fromkeys(arm for arm, _ in found)]
    said = "The same differences by the title's popularity in training (cold: all that there are), and by the subgraph:"
    return [said, "", markdown(["arm", *PARTS], table), ""] if table else []


def _is_of(cell: Cell, part: str) -> Flags:
    """Which titles of a cell are of a part."""
    if part in CLASSES:
        return np.array(cell["classes"]) == part
    return np.array(cell["named"]) == (part == PARTS[-2])


def _drawn(cell: Cell) -> Cell:
    return _rows(cell, np.array(cell["drawn"]) == 1)


def _rows(cell: Cell, rows: Flags) -> Cell:
    """A cell of some of its titles."""
    columns = ("nats", "hits", "titles", "users", "positions", "classes", "drawn", "named")
    return cell | {name: [value for value, kept in zip(cell[name], rows.tolist()) if kept] for name in columns}


def _arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("--work", type=Path, default=Path("runs/evidence/graph"))
    parser.add_argument("--output", type=Path, default=REPORT)
    parser.add_argument("--data", default="ml-100k", help="ml-100k, or ml-1m=FOLDER with its files")
    parser.add_argument("--method", default="lora", choices=["lora", "ilora"])
    parser.add_argument("--arms", nargs="+", choices=("none", *METHODS), help="default: all, but for training pagerank")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--budget", type=int, default=200, help="tokens of a subgraph")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-titles", type=int, default=400, help="held-out titles, all cold ones beside")
    parser.add_argument("--max-tokens", type=int, default=2048, help="of an example")
    parser.add_argument("--encoder-epochs", type=int, default=200)
    parser.add_argument("--model", default="offline://smollm2-135m-instruct")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="0: torch's default")
    parser.add_argument("--workers", type=int, default=1, help="processes that convert")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing, where memory is short")
    parser.add_argument("--jobs", type=int, default=1, help="cells at once, a process each (15 GB each)")
    parser.add_argument("--retrieval", action="store_true", help="only what retrieval finds: nothing is trained")
    parser.add_argument("--estimate", action="store_true", help="time a few steps of two arms and stop")
    parser.add_argument("--report", action="store_true", help="write the report from what is there")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further overrides of the recipe")
    arguments = parser.parse_args(given)
    name, _, folder = arguments.data.partition("=")
    if name not in RECIPES or bool(folder) != (name == "ml-1m"):
        parser.error(f"--data {arguments.data}: ml-100k or ml-1m=FOLDER is expected")
    return arguments


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
