"""A recipe becomes dataset/, streamed over all cores of this machine, or of a cluster.

A `Recipe` enters; sequences.parquet, items.parquet, {train,valid,test}/part-*.parquet and manifest.json leave, in one
step: the folder appears complete or not at all. The bytes depend on the recipe and its inputs only, not on the engine
or the number of workers: shards are cut by user and each is written by one worker. `Local` is the engine of one
machine; that of a cluster is in ray_engine.py.
"""

import contextlib
import dataclasses
import functools
import itertools
import multiprocessing
import os
import threading
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm import tqdm

import recllm
from recllm import files, schema
from recllm.convert import classes
from recllm.convert.events import Events, check_events
from recllm.convert.examples import Converter, Task, draws_candidates, iterate_examples, targets_of
from recllm.convert.finance import ask_customers
from recllm.convert.knowledge import Knowledge
from recllm.convert.targets import WITHOUT_RATIONALE, Sequences
from recllm.convert.templates import ACTION_TASKS, BANK_TASKS, GRAPH_TASKS, GRAPH_VARIABLES, RANK_ASSETS, load_template
from recllm.convert.titles import item_texts, tokenizer_special_tokens, user_texts
from recllm.data import object_store
from recllm.data.candidates import CandidateSampler
from recllm.data.rows import Scan, Scanner, scan
from recllm.data.sequences import Prepared, prepare
from recllm.data.stored import SHARD_POSITIONS, USER, Shard, StoredSequences
from recllm.errors import UserError
from recllm.graph.build import build_graph, check_times
from recllm.recipe import (
    ActionsSection,
    DataSection,
    FilterSection,
    GraphSection,
    PromptSection,
    Recipe,
    TaskSection,
)

IN_FLIGHT = 2  # shards handed out for each worker: bounds what waits in memory
GRAPH = "graph"  # folder of a dataset
TOKENIZER = "tokenizer.json"
MOST_WORKERS = 8  # unless more are asked for: each takes some 200 MiB
READ: dict[str, Any] = {  # the part of the recipe that convert reads; beside it the tokenizer's special tokens
    **dict.fromkeys(("seed", "data", "graph", "finance", "actions", "filter", "history", "prompt", "tasks"), True),
    "protocol": {"name", "split", "candidates"},
}
DICTIONARY = ["task", "label", "prompt.list.element.role", "completion.list.element.role"]
DENSE_DICTIONARY = [*DICTIONARY, "prompt.list.element.content"]


class Further(NamedTuple):
    """What the manifest says of what a recipe need not have."""

    graph: dict[str, Any] | None = None
    finance: dict[str, Any] | None = None


class Written(NamedTuple):
    """What shards held."""

    examples: Counter[str]  # by "split/task name"
    graph: Counter[str]  # what they show of the graph, and why sessions have none, by "split/task name/what"
    labels: Counter[tuple[str, str]]  # of the tasks about actions, by "split/task name" and label
    sessions: Counter[str]  # of event datasets, by split

    @classmethod
    def nothing(cls) -> "Written":
        """No shard yet."""
        return cls(Counter(), Counter(), Counter(), Counter())

    def add(self, other: "Written") -> None:
        """One more shard."""
        self.examples.update(other.examples)
        self.graph.update(other.graph)
        self.labels.update(other.labels)
        self.sessions.update(other.sessions)

    def document(self) -> dict[str, Any]:
        """As JSON holds it."""
        labels = [[place, label, count] for (place, label), count in self.labels.items()]
        return {"examples": self.examples, "graph": self.graph, "labels": labels, "sessions": self.sessions}

    @classmethod
    def of_document(cls, found: dict[str, Any]) -> "Written":
        """What `document` gave."""
        labels = Counter({(place, label): count for place, label, count in found["labels"]})
        return cls(Counter(found["examples"]), Counter(found["graph"]), labels, Counter(found["sessions"]))


class Engine(Protocol):
    """Where a log is read and examples are written."""

    def opened(self, folder: Path) -> contextlib.AbstractContextManager[None]:
        """All of the work on the dataset that becomes `folder` lies within."""

    def scan(
        self,
        data: DataSection,
        filters: FilterSection,
        actions: ActionsSection | None,
        items: pl.DataFrame | None,
        skip_unreadable: bool = False,
    ) -> Scan:
        """See rows.scan."""

    def prepared(self, folder: Path, make: Callable[[Path], Prepared]) -> Prepared:
        """What `make` gives of a folder, with sequences.parquet in `folder`; or what it gave a run that was killed."""

    def write(
        self, sequences: StoredSequences, cut: list[Shard], converter: Converter, folder: Path
    ) -> Iterator[tuple[int, Written]]:
        """Write each shard to folder/{train,valid,test}/part-NUMBER.parquet; its number and what it held, when done.

        Numbers are those in `cut`, from 0.
        """


@dataclasses.dataclass(frozen=True)
class Local:
    """The cores of this machine: a pool of processes, or this process alone with 1."""

    workers: int

    def opened(self, folder: Path) -> contextlib.AbstractContextManager[None]:  # noqa: ARG002  # of clusters
        """Nothing to open."""
        return contextlib.nullcontext()

    scan = staticmethod(scan)

    def prepared(self, folder: Path, make: Callable[[Path], Prepared]) -> Prepared:
        """Made."""
        return make(folder)

    def write(
        self, sequences: StoredSequences, cut: list[Shard], converter: Converter, folder: Path
    ) -> Iterator[tuple[int, Written]]:
        """See Engine."""
        jobs = ((number, batch, str(folder)) for number, batch in enumerate(sequences.read(cut)))
        return enumerate(_run(jobs, converter, min(self.workers, len(cut))))


def convert(
    recipe: Recipe,
    output: Path,
    workers: int | None = None,
    tokenizer: str | None = None,
    engine: Engine | None = None,
    skip_unreadable: bool = False,
) -> dict[str, Any]:
    """Write the dataset of `recipe` to the folder `output` and return its manifest.

    Args:
        recipe: the run; its templates are loaded and checked before any data is read.
        output: replaced when the new dataset is complete, untouched otherwise.
        workers: processes; None takes the cores that this process may use, at most MOST_WORKERS. 1 works in this
            process.
        tokenizer: the base model's tokenizer.json as text: counts the budget of a graph. None: that of its folder.
        engine: None is `Local(workers)`.
        skip_unreadable: leave out files of the log that cannot be read to their end, and name them in the manifest.

    Raises:
        UserError: anything wrong with recipe, templates or data; an empty split; a worker that was killed.
        OSError: the disk is full.
    """
    workers = min(available_cores(), MOST_WORKERS) if workers is None else workers
    if workers < 1:
        raise UserError(f"convert with {workers} workers: at least 1 is needed, leave --workers out for the default")
    engine = engine or Local(workers)
    with files.replacing_folder(output) as folder, engine.opened(folder), _copies():
        scanner = functools.partial(engine.scan, skip_unreadable=skip_unreadable)
        prepared, converter, further = set_up(recipe, folder, tokenizer, scanner, engine.prepared)
        written = _write_examples(prepared.sequences, converter, folder, engine)
        _check_nothing_is_empty(converter.tasks, written)
        items = prepared.items.with_columns(pl.Series("text", converter.texts.to_pylist(), pl.String))
        pq.write_table(_plain(items.rechunk().to_arrow()), folder / "items.parquet", compression="zstd")
        manifest = _manifest(recipe, prepared, converter, written)
        manifest |= {"graph": _graph_entry(further.graph, written), "finance": further.finance}
        manifest |= {"skipped": prepared.skipped} if skip_unreadable else {}
        files.write_json(folder / "manifest.json", manifest)
    print(summary(manifest, output))
    return manifest


@contextlib.contextmanager
def _copies() -> Iterator[None]:
    """Copies of objects in stores go with the conversion: the next one in this process reads what is there then."""
    try:
        yield
    finally:
        object_store.forget_all()


def set_up(
    recipe: Recipe,
    folder: Path,
    tokenizer: str | None = None,
    scanner: Scanner = scan,
    preparing: Callable[[Path, Callable[[Path], Prepared]], Prepared] | None = None,
) -> tuple[Prepared, Converter, Further]:
    """All that comes before the first example: templates, data, texts, and every check that needs no example.

    sequences.parquet is written to `folder`, by `preparing` (see Engine.prepared) if that is given, and graph/ and
    finance/ where the recipe has one. With prompt.user the batches of sequences have a further column `user`, for a
    bank's tasks the columns of convert/finance.py.

    Raises:
        UserError: anything wrong with recipe, templates or data; an empty split.
    """
    tasks = load_tasks(recipe)
    _check_prompt(recipe)
    special_tokens = tokenizer_special_tokens(recipe.model.name_or_path)
    events = Events.of(recipe, special_tokens) if recipe.actions else None
    if recipe.prompt.user and recipe.data.users is None:
        raise UserError(
            f'prompt.user is "{recipe.prompt.user}", but data.users is not set: name the file with the attributes of '
            "the users there, or leave prompt.user out"
        )
    if recipe.graph is not None:
        tokenizer = tokenizer or _tokenizer(recipe.model.name_or_path)
    read = (recipe.data, recipe.filter, recipe.protocol.split, recipe.seed)
    make = functools.partial(prepare, *read, events=recipe.actions, scanner=scanner)
    prepared = make(folder) if preparing is None else preparing(folder, make)
    check_labels(prepared.actions, tasks)
    check_sessions(prepared, tasks)
    converter, graph, finance = make_converter(recipe, prepared, tasks, events), None, None
    further: dict[str, pa.Array] = {}
    if recipe.prompt.user and prepared.users is not None:
        texts = user_texts(prepared.users, recipe.prompt.user, special_tokens)
        further[USER] = pa.array(texts, pa.string())
    if bank_tasks := {task.task for task in tasks} & set(BANK_TASKS):
        columns, finance = ask_customers(recipe, prepared, converter.texts.to_pylist(), folder, bank_tasks)
        further |= columns
    prepared = dataclasses.replace(prepared, sequences=dataclasses.replace(prepared.sequences, further=further))
    check_not_empty(prepared.sequences, converter)
    check_candidates(prepared.sequences, converter)
    if recipe.graph is not None and tokenizer is not None:
        graph = build_graph(recipe.graph, prepared.items.get_column(schema.ITEM_ID).to_list(), folder / GRAPH)
        graph["warning"] = check_times(graph["time_range"], *_span(prepared.sequences))
        knowledge = Knowledge(folder / GRAPH, recipe.graph, converter.texts, special_tokens, tokenizer)
        for task in tasks:
            knowledge.check(task.relations)
        converter = dataclasses.replace(converter, knowledge=knowledge)
    return prepared, converter, Further(graph, finance)


def _span(sequences: StoredSequences) -> tuple[int, int]:
    """First and last time of the interactions, seconds since the epoch."""
    ends = [pc.min_max(pc.list_flatten(batch.column("timestamps"))) for batch in sequences.batches(SHARD_POSITIONS)]
    return min(end["min"].as_py() for end in ends), max(end["max"].as_py() for end in ends)


def _tokenizer(name_or_path: str) -> str:
    """The tokenizer of a local folder.

    Raises:
        UserError: there is none.
    """
    path = Path(name_or_path) / TOKENIZER
    if not path.is_file():
        raise UserError(
            f"{path} does not exist: the budget of a graph is counted by the base model's tokenizer, save it there, or "
            "give convert its text"
        )
    return path.read_text(encoding="utf-8")


def available_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def load_tasks(recipe: Recipe) -> tuple[Task, ...]:
    """The recipe's tasks with their templates. A task that occurs again is called next_item.2 in example ids."""
    seen: Counter[str] = Counter()
    tasks = []
    for entry in recipe.tasks:
        if entry.dense_window == 1 or (entry.dense_window and entry.task != "next_item"):
            raise UserError(
                f"task {entry.task} has dense_window={entry.dense_window}: windows of 2 and more titles are for "
                "next_item, other tasks need 0"
            )
        if entry.dense_start == "random" and not entry.dense_window:
            raise UserError(
                f"task {entry.task} has dense_start=random without dense_window: set dense_window to the titles of a "
                "window, or leave dense_start out"
            )
        _check_sections(entry, recipe)
        seen[entry.task] += 1
        name = entry.task if seen[entry.task] == 1 else f"{entry.task}.{seen[entry.task]}"
        template = load_template(entry.template, entry.task, dense=entry.dense_window > 0)
        tasks.append(
            Task(
                name,
                entry.task,
                template,
                entry.dense_window,
                entry.max_train_targets,
                entry.dense_start,
                tuple(entry.relations),
                entry.within_session or entry.task in ("next_action", "next_event", "outcome"),
                tuple(entry.positive),
                entry.after,
                tuple(entry.fields.items()),
                entry.rationale,
            )
        )
    _check_graph_is_shown(tasks, recipe.graph)
    return tuple(tasks)


def _check_sections(entry: TaskSection, recipe: Recipe) -> None:
    """Refuse a task that reads a section which the recipe does not have, or that has settings of another one."""
    check_events(entry, recipe)
    if entry.task in BANK_TASKS and recipe.finance is None:
        raise UserError(f"the task {entry.task} asks a bank's customers, and the recipe has none: add `finance`")
    if entry.task in BANK_TASKS and recipe.protocol.split.method != "dates":
        raise UserError(
            f"the task {entry.task} asks on dates, protocol.split.method is {recipe.protocol.split.method}: set it to "
            "dates, with valid_from and test_from"
        )
    if entry.task == RANK_ASSETS and recipe.protocol.candidates.method != "uniform":
        raise UserError(
            f"the task rank_assets draws its candidates uniformly, protocol.candidates.method is "
            f"{recipe.protocol.candidates.method}: set it to uniform"
        )
    if entry.task in GRAPH_TASKS and recipe.graph is None:
        raise UserError(f"the task {entry.task} asks what a knowledge graph says, and the recipe has none: add `graph`")
    if entry.relations and entry.task not in ("item_to_attribute", "attribute_to_item"):
        raise UserError(
            f"task {entry.task} has relations={entry.relations}, which item_to_attribute and attribute_to_item read: "
            "set graph.retrieval.allow, or leave it out"
        )


def _check_prompt(recipe: Recipe) -> None:
    """Refuse a text about events that there are not."""
    if recipe.actions is None and recipe.prompt.event != PromptSection.model_fields["event"].default:
        raise UserError(
            f'prompt.event is "{recipe.prompt.event}", but the recipe has no events: add `actions`, or leave it out'
        )


def _check_graph_is_shown(tasks: Sequence[Task], graph: GraphSection | None) -> None:
    """A graph that no prompt shows, and no task asks, would be built for nothing."""
    shown = any(task.task in GRAPH_TASKS or task.uses & set(GRAPH_VARIABLES) for task in tasks)
    if graph is not None and not shown:
        raise UserError(
            f"the recipe has a graph, and no template of its tasks uses {' or '.join(GRAPH_VARIABLES)}: take templates "
            "that do, such as next_item/films_graph, or leave `graph` out"
        )


def _check_nothing_is_empty(tasks: Sequence[Task], written: Written) -> None:
    """A task that the graph has nothing to ask of leaves no examples, and no file that later stages could read."""
    for split, task in itertools.product(schema.SPLITS, tasks):
        if not written.examples[f"{split}/{task.name}"]:
            left_out = written.graph[f"{split}/{task.name}/left_out"]
            raise UserError(
                f"the split {split} has no example of the task {task.name}: of {left_out} items that users had, the "
                "graph says nothing that could be asked. Give it more links or relations, or allow more"
            )


def check_labels(actions: Collection[str], tasks: Iterable[Task]) -> None:
    """Refuse the task like for a log without actions, or with actions that the template has no words for."""
    like = [task for task in tasks if task.task == "like"]
    if not like:
        return
    if not actions:
        raise UserError(
            "the task like needs actions and the interactions have none: set filter.like_at to the rating from "
            "which an interaction counts as like, or map a column to `action`"
        )
    for task in like:
        unknown = sorted(set(actions) - set(task.template.answers))
        if unknown:
            raise UserError(
                f'the interactions hold the action "{unknown[0]}", the template "{task.template.name}" answers '
                f"{', '.join(task.template.answers)}: filter it out or add it to the template's answers"
            )


def check_sessions(prepared: Prepared, tasks: Iterable[Task]) -> None:
    """Refuse what asks within sessions of a log without them, and about items of a log without any."""
    first = next(prepared.sequences.batches(SHARD_POSITIONS))
    for task in tasks:
        if task.within_session and first.column("sessions").null_count:
            raise UserError(
                f"the task {task.name} asks within sessions and the interactions have none: map a column with "
                "data.interactions.columns.session_id"
            )
        if not prepared.items.height and task.task not in ("next_action", "next_event", "outcome"):
            raise UserError(
                f"the task {task.name} asks about items and no event has one: map a column with "
                "data.interactions.columns.item_id"
            )


def check_candidates(sequences: StoredSequences, converter: Converter) -> None:
    """Refuse more candidates than a user's own items leave over; of users whose examples have candidates."""
    if converter.sampler is None:
        return
    num_items, others = converter.sampler.num_items, converter.sampler.section.count - 1
    drawn = [
        schema.SPLIT_CODES[split]
        for split in schema.SPLITS
        if any(draws_candidates(task, split) for task in converter.tasks)
    ]
    if sequences.lengths.max() + others <= num_items:
        return
    full = pl.concat(_without_enough(batch, num_items - others, drawn) for batch in sequences.batches(SHARD_POSITIONS))
    if full.is_empty():
        return
    worst = full.sort("had", descending=True, maintain_order=True).row(0, named=True)
    left = num_items - worst["had"]
    step = f"set protocol.candidates.count to {left + 1} or less" if left else "give more items or filter the user out"
    raise UserError(
        f'user "{worst["user_id"]}" had {worst["had"]} of the {num_items} items, which leaves {left} for the {others} '
        f"other candidates of an example (so of {full.height} users): {step}"
    )


def _without_enough(batch: pa.RecordBatch, most: int, drawn: list[int]) -> pl.DataFrame:
    """user_id and `had` of users with examples of the splits `drawn` who had more than `most` different items."""
    frame = pl.DataFrame(pl.from_arrow(batch.select([schema.USER_ID, "items", "splits"])))
    frame = frame.filter(pl.col("items").list.len() > most)  # only these can have had too many
    frame = frame.with_columns(pl.col("items").list.set_difference([schema.NO_ITEM]))
    frame = frame.filter(pl.col("splits").list.eval(pl.element().is_in(drawn)).list.any())
    return frame.select(schema.USER_ID, pl.col("items").list.n_unique().alias("had")).filter(pl.col("had") > most)


def check_not_empty(sequences: StoredSequences, converter: Converter) -> None:
    """Refuse a split without any example of a task. Looks at shards until every one has been seen."""
    missing = {(split, task.name): task for split in schema.SPLITS for task in converter.tasks}
    unexplained: Counter[tuple[str, str]] = Counter()
    for shard in sequences.batches(SHARD_POSITIONS):
        batch, found = Sequences.of(shard), {}
        for (split, name), task in missing.items():
            targets = targets_of(batch, task, split, converter)
            unexplained[split, name] += targets.left_out.get(WITHOUT_RATIONALE, 0)
            if not len(targets):
                found[split, name] = task
        if not (missing := found):
            return
    (split, name), task = next(iter(missing.items()))
    why, step = "", "Change protocol.split (fractions, targets, min_history) or filter less"
    if count := unexplained[split, name]:
        why = f', and {count} were left out because the log has no "{task.rationale}" of them, their rationale'
        step = f"{step}, or leave the task's rationale out"
    raise UserError(f"the split {split} has no example of the task {name}: at least one is needed{why}. {step}")


def make_converter(
    recipe: Recipe, prepared: Prepared, tasks: tuple[Task, ...], events: Events | None = None
) -> Converter:
    """Render the items and set up the candidates, which not all event logs have items for."""
    special_tokens, sampler = tokenizer_special_tokens(recipe.model.name_or_path), None
    if not all(task.task in ACTION_TASKS for task in tasks):
        sampler = CandidateSampler(prepared.items.height, prepared.train_counts, recipe.protocol.candidates)
    return Converter(
        tasks=tasks,
        texts=pa.array(item_texts(prepared.items, recipe.prompt.item, special_tokens), pa.string()),
        sampler=sampler,
        prompt_max_items=recipe.prompt.max_items,
        before_list=recipe.history.gate == "before_list",
        seed=recipe.seed,
        lookback_days=recipe.finance.lookback_days if recipe.finance else 0,
        events=events,
    )


def _write_examples(sequences: StoredSequences, converter: Converter, folder: Path, engine: Engine) -> Written:
    """Write every shard."""
    for split in schema.SPLITS:
        (folder / split).mkdir()
    cut, counts = sequences.cut(SHARD_POSITIONS), dict[int, Written]()
    with tqdm(total=sequences.num_users, unit="user", desc="convert", leave=False) as progress:
        for number, held in engine.write(sequences, cut, converter, folder):
            counts[number] = held
            progress.update(cut[number].users)
    if len(counts) != len(cut):
        raise RuntimeError(f"{len(counts)} of {len(cut)} shards were written: a defect")
    written = Written.nothing()
    for number in range(len(cut)):  # whatever was done first
        written.add(counts[number])
    for split in schema.SPLITS:  # a shard without examples of a split leaves no file: close the gaps
        for number, path in enumerate(sorted((folder / split).iterdir())):
            path.rename(path.with_name(f"part-{number:05d}.parquet"))
    return written


def _run(jobs: Iterable[tuple[int, pa.RecordBatch, str]], converter: Converter, workers: int) -> Iterator[Written]:
    """Results in the order of the jobs, at most IN_FLIGHT shards a worker under way."""
    if workers <= 1:
        for number, batch, folder in jobs:
            yield write_shard(number, batch, folder, converter)
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy the locks of Polars' threads
    waiting: deque[Future[Written]] = deque()
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(converter,))
    try:
        for number, batch, folder in jobs:
            waiting.append(pool.submit(_write_shard_in_worker, number, batch, folder))
            if len(waiting) >= IN_FLIGHT * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise UserError(
            f"one of {workers} converting processes was killed, most likely for want of memory: the old dataset is "
            f"untouched. Take fewer with `recllm convert RECIPE --workers {max(1, workers // 2)}`"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_worker_converter: Converter | None = None  # set once in each worker process, so that it is not sent with every shard


def _start_worker(converter: Converter) -> None:
    global _worker_converter
    _worker_converter = converter
    pa.set_cpu_count(1)  # one process a core: no threads on top
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed run leaves no orphans: the pool itself would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _write_shard_in_worker(number: int, batch: pa.RecordBatch, folder: str) -> Written:
    assert _worker_converter is not None
    return write_shard(number, batch, folder, _worker_converter)


def write_shard(number: int, batch: pa.RecordBatch, folder: str, converter: Converter) -> Written:
    """Convert one shard into folder/{train,valid,test}/part-NUMBER.parquet, a row group a piece; count examples."""
    written = Written.nothing()
    if converter.events is not None:
        written.sessions.update(_sessions(Sequences.of(batch)))
    dense = any(task.dense_window for task in converter.tasks)
    with contextlib.ExitStack() as stack:
        writers: dict[str, pq.ParquetWriter] = {}
        for split, task, examples in iterate_examples(batch, converter, written.graph):
            if split not in writers:
                writers[split] = stack.enter_context(
                    pq.ParquetWriter(
                        Path(folder) / split / f"part-{number:05d}.parquet",
                        schema.EXAMPLES,
                        compression="zstd",
                        compression_level=1,
                        use_dictionary=DENSE_DICTIONARY if dense else DICTIONARY,
                        write_statistics=["user_index", "timestamp"],
                    )
                )
            writers[split].write_batch(examples.select(schema.EXAMPLES.names))
            written.examples[f"{split}/{task}"] += examples.num_rows
            if examples.column("task")[0].as_py() in ACTION_TASKS:
                for count in pc.value_counts(examples.column("label")).to_pylist():
                    written.labels[f"{split}/{task}", count["values"]] += count["counts"]
    return written


def _sessions(sequences: Sequences) -> dict[str, int]:
    """In how many sessions a batch has positions of each split."""
    begins = sequences.by_session.begin
    return {split: len(np.unique(begins[sequences.splits == code])) for split, code in schema.SPLIT_CODES.items()}


def _plain(table: pa.Table) -> pa.Table:
    """Polars' large strings as ordinary ones, and the promised columns as schema.ITEMS has them."""
    fields = []
    for field in table.schema:
        plain = pa.string() if pa.types.is_large_string(field.type) or field.type == pa.string_view() else field.type
        fields.append(schema.ITEMS.field(field.name) if field.name in schema.ITEMS.names else field.with_type(plain))
    return table.cast(pa.schema(fields))


def _manifest(recipe: Recipe, prepared: Prepared, converter: Converter, written: Written) -> dict[str, Any]:
    colliding = _colliding(converter.texts)
    return {
        "recllm_version": recllm.__version__,
        "format": schema.DATASET_FORMAT,
        "recipe": recipe.model_dump(mode="json", include=READ),
        "templates": [_provenance(task) for task in converter.tasks],
        "inputs": prepared.inputs,
        "items_sha256": schema.vocabulary_sha256(prepared.items.get_column(schema.ITEM_ID)),
        "counts": {**prepared.counts, "colliding_texts": colliding, "examples": dict(sorted(written.examples.items()))},
        "split": prepared.split,
        "audit": prepared.audit,
        "seeds": {"recipe": recipe.seed, "candidates": recipe.protocol.candidates.seed},
        "history_max_items": recipe.history.max_items,
        "history_gate": recipe.history.gate,
        "prompt_max_items": recipe.prompt.max_items,
        "events": recipe.actions is not None,
        "actions": recipe.actions
        and classes.entry(
            recipe.actions, converter.tasks, written.labels, written.graph, written.sessions, prepared.counts
        ),
    }


def _graph_entry(graph: dict[str, Any] | None, written: Written) -> dict[str, Any] | None:
    """What was read of a graph, and what examples show of it, by "split/task name"."""
    if graph is None:
        return None
    shown: dict[str, dict[str, int]] = {}
    for name, count in sorted(written.graph.items()):
        place, _, what = name.rpartition("/")
        if what in classes.TOLD:
            continue
        shown.setdefault(place, {})[what] = count
        if what == "not_older_than_cutoff" and count:
            raise RuntimeError(
                f"{place}: {count} triples that examples show are not older than their cut-off: a defect"
            )
    return graph | {"shown": shown}


def _provenance(task: Task) -> dict[str, Any]:
    template = task.template
    entry = {"task": task.task, "template": template.name, "id": template.id, "sha256": template.sha256}
    return entry | ({"answers": template.answers} if template.answers else {})


def _colliding(texts: pa.StringArray) -> int:
    """Items whose text another item has too."""
    counts = pc.value_counts(texts).field("counts")
    return int(pc.sum(pc.if_else(pc.greater(counts, 1), counts, 0)).as_py() or 0)


def summary(manifest: dict[str, Any], output: Path) -> str:
    """A few plain lines: what was written, the leakage audit, and what to be wary of."""
    counts, audit = manifest["counts"], dict(manifest["audit"])
    warnings = list(audit.pop("warnings", []))
    if counts["colliding_texts"]:
        warnings.append(
            f"{counts['colliding_texts']} items share their text with another item, so the model cannot tell them "
            "apart: write more into prompt.item"
        )
    lines = [f"{output}: {counts['interactions']} interactions, {counts['users']} users, {counts['items']} items"]
    lines += [f"  {name}: {number} examples" for name, number in counts["examples"].items()]
    lines += _graph_lines(manifest.get("graph"))
    warnings += _graph_warnings(manifest)
    lines += _finance_lines(manifest.get("finance"))
    lines += classes.lines(manifest.get("actions"))
    warnings += classes.warnings(manifest.get("actions"))
    lines += [f"  audit: {name} {_short(value)}" for name, value in audit.items() if value is not None]
    if skipped := manifest.get("skipped"):
        warnings.append(f"{len(skipped)} files of the log could not be read and were skipped, as asked")
        warnings += [f"skipped: {why}" for why in skipped.values()]
    return "\n".join([*lines, *(f"  warning: {text}" for text in warnings)])


def _graph_lines(graph: dict[str, Any] | None) -> list[str]:
    if graph is None:
        return []
    counts = graph["counts"]
    lines = [
        f"  graph: {counts['triples']} triples, {counts['entities']} entities, {counts['relations']} relations; "
        f"{counts['linked_items']} items linked, {counts['items_without_link']} not"
    ]
    for place, shown in graph["shown"].items():
        parts = []
        if asked := shown.get("with_graph", 0) + shown.get("without_graph", 0):
            mean = shown["tokens"] / max(shown["with_graph"], 1)
            parts.append(f"{shown['with_graph']} of {asked} with a subgraph, {mean:.0f} tokens each")
        if shown.get("left_out"):
            parts.append(f"{shown['left_out']} left out: the graph has nothing to ask of their items")
        lines += [f"  graph, {place}: {'; '.join(parts)}"] if parts else []
    return lines


def _graph_warnings(manifest: dict[str, Any]) -> list[str]:
    """Times that look wrong, and subgraphs that the budget leaves nothing of."""
    graph = manifest.get("graph") or {}
    warnings = [graph["warning"]] if graph.get("warning") else []
    small = {place: shown.get("budget_too_small", 0) for place, shown in graph.get("shown", {}).items()}
    if small := {place: count for place, count in small.items() if count}:
        warnings.append(
            f"{sum(small.values())} examples go without a subgraph, because graph.budget, "
            f"{manifest['recipe']['graph']['budget']} tokens, holds not one of the triples that were found for them "
            f"({', '.join(f'{place} {count}' for place, count in small.items())}): raise graph.budget"
        )
    return warnings


def _finance_lines(finance: dict[str, Any] | None) -> list[str]:
    if finance is None:
        return []
    said = {
        "assets": "of which {preference} buy something, {both} something that rises",
        "rank_assets": "of which {own_taste} by customers with a taste of their own",
    }
    return [
        f"  {task}, {split}: {{dates}} dates from {{first}} to {{last}}, {{examples}} examples, {text}".format(**entry)
        for task, text in said.items()
        for split, entry in finance.get(task, {}).get("splits", {}).items()
    ]


def _short(value: Any) -> str:
    return f"{value:.1%}" if isinstance(value, float) else str(value)
