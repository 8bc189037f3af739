"""The stages of a run: convert → encoder → train → evaluate, each skipped when its inputs have not changed.

A recipe enters; dataset/, encoder/, adapter/ and report/ under `recipe.output` leave. Whether a stage is up to date is
decided by a fingerprint of all that it reads (recipe sections, input files, the outputs of earlier stages), kept in
stages/NAME.json beside the outputs and written only after the stage has ended well.
"""

import datetime
import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from recllm import __version__, assets, files, schema
from recllm.data import object_store, offline
from recllm.errors import UserError
from recllm.recipe import Recipe

FIT_S = 24 * 3600.0  # how long ranks wait for the first one to fit the encoder, at least
OUTPUTS = {"convert": "dataset", "encoder": "encoder", "train": "adapter", "evaluate": "report"}


def output_of(recipe: Recipe, stage: str) -> Path:
    """Folder that a stage of this run writes."""
    return recipe.output / OUTPUTS[stage]


def require(recipe: Recipe, stage: str) -> Path:
    """Output folder of an earlier stage, or an error that says which command makes it."""
    folder = output_of(recipe, stage)
    files.recover(folder)
    if not folder.is_dir():
        verb = "train" if stage == "encoder" else stage
        raise UserError(f"{folder} does not exist: run `recllm {verb}` with this recipe first, or `recllm run`")
    return folder


def convert(
    recipe: Recipe,
    workers: int | None = None,
    engine: str = "local",
    partitions: int | None = None,
    skip_unreadable: bool = False,
) -> None:
    """Interactions → dataset/, with the cores of this machine or on a Ray cluster: the same files.

    Args:
        recipe: the run.
        workers: processes of the local engine.
        engine: local or ray.
        partitions: tasks of Ray that examples are dealt to.
        skip_unreadable: leave out files of the log that cannot be read.

    Raises:
        UserError: options of the other engine.
    """
    from recllm.convert.pipeline import Engine
    from recllm.convert.pipeline import convert as convert_dataset

    output = output_of(recipe, "convert")
    chosen: Engine | None = None
    if engine == "ray":
        from recllm.convert.ray_engine import RayEngine

        if workers is not None:
            raise UserError(f"--workers {workers} is of the local engine: leave it out, Ray takes the cluster's cores")
        chosen = RayEngine(output, fingerprint(recipe, "convert", skip_unreadable), partitions)
    elif partitions is not None:
        raise UserError(f"--partitions {partitions} is of --engine ray: add that, or give --workers")
    convert_dataset(recipe, output, workers, graph_tokenizer(recipe), chosen, skip_unreadable)


def graph_tokenizer(recipe: Recipe) -> str | None:
    """The tokenizer that counts the budget of the recipe's graph; None without a graph: nothing heavy is loaded."""
    if recipe.graph is None:
        return None
    from recllm.model.base_model import tokenizer_json

    return tokenizer_json(recipe.model.name_or_path)


def encoder(recipe: Recipe) -> None:
    """dataset/ → encoder/: the sequence encoder that guides the gate, and a baseline.

    A content encoder first has the base model read the items' texts → item_features/, kept for the next time.
    """
    from recllm.data.dataset import Dataset
    from recllm.train.encoder import fit_encoder

    dataset, features = Dataset.open(require(recipe, "convert")), None
    if recipe.encoder.type == "content":
        from recllm.model.item_features import load_or_compute

        features = load_or_compute(recipe.model, dataset.titles, recipe.output / "item_features")
    fit_encoder(
        dataset,
        recipe.encoder,
        recipe.history.max_items,
        recipe.seed,
        output_of(recipe, "encoder"),
        exclude_history=recipe.protocol.ranking.exclude_history,
        item_features=features,
    )


def train(recipe: Recipe, allow_template_mismatch: bool = False) -> None:
    """dataset/ and encoder/ → adapter/."""
    from recllm.train.finetune import train as finetune

    finetune(
        recipe,
        require(recipe, "convert"),
        require(recipe, "encoder"),
        output_of(recipe, "train"),
        allow_template_mismatch=allow_template_mismatch,
    )


def evaluate(recipe: Recipe) -> None:
    """dataset/, encoder/ and adapter/ → report/."""
    from recllm.evaluate.evaluation import evaluate as score

    score(
        recipe,
        require(recipe, "convert"),
        require(recipe, "encoder"),
        require(recipe, "train"),
        output_of(recipe, "evaluate"),
    )


def export(
    recipe: Recipe,
    output: Path,
    user_id: str | None = None,
    prototypes: int | None = None,
    max_examples: int = 100,
    history: Sequence[str] | None = None,
) -> None:
    """adapter/ → an ordinary LoRA of one user, or `prototypes` of them that stand for all users of dataset/.

    A user's gate reads all of their history in dataset/, or `history`, item ids of anybody, without those that are
    unknown; with history.gate=before_list and a dense task without its last `prompt.max_items` items, which stand in
    the list that the next prompt begins. What prototypes cost is measured on up to `max_examples` held-out examples of
    each task (0: not at all).
    """
    import numpy as np

    from recllm.data.dataset import Dataset
    from recllm.model import export as folding
    from recllm.model.adapter import check_vocabulary, load_adapter
    from recllm.model.base_model import load_base_model

    dataset, adapter = Dataset.open(require(recipe, "convert")), require(recipe, "train")
    folding.check_output(output)
    users = range(dataset.sequences.num_users) if user_id is None else [folding.find_user(dataset, user_id)]
    items, unknown = folding.find_items(dataset, history) if history is not None else ([], [])
    check_vocabulary(adapter, dataset.vocabulary_sha256)
    base_model, tokenizer = load_base_model(recipe.model)
    model = load_adapter(base_model, adapter)
    before_list = recipe.history.gate == "before_list" and any(task.dense_window for task in recipe.tasks)
    listed = recipe.prompt.max_items if before_list else 0
    if history is not None:
        read = items[: max(len(items) - listed, 0)]
        gate = folding.gate_of_items(model, read, recipe.history.max_items)
        folding.export_user_adapter(model, gate, output)
        left_out = f"; left out as unknown: {', '.join(unknown)}" if unknown else ""
        print(f"{output}: the LoRA of a history of {len(items)} items, gate weights {_rounded(gate)}{left_out}")
        return
    lengths = np.diff(dataset.sequences.offsets)[list(users)]
    weights = folding.gates_of(model, dataset, users, np.maximum(lengths - listed, 0), recipe.history.max_items)
    if user_id is not None:
        folding.export_user_adapter(model, weights[0], output)
        print(f"{output}: the LoRA of user {user_id}, gate weights {_rounded(weights[0])}")
        return
    cost = _prototype_cost(recipe, dataset, model, tokenizer, max_examples) if max_examples else None
    names = dataset.sequences.user_ids.to_pylist()
    document = folding.export_prototypes(
        model, weights, prototypes or 0, output, recipe.seed, user_ids=names, cost=cost
    )
    print(_prototype_text(document, output))


def _prototype_cost(
    recipe: Recipe, dataset: Any, model: Any, tokenizer: Any, max_examples: int
) -> Callable[[Any], dict[str, Any]]:
    """Prototypes' gates → nats that held-out answers lose under them."""
    from recllm.evaluate.tasks import load_tasks
    from recllm.infer.transformers_engine import TransformersEngine
    from recllm.model import export as folding

    tasks = load_tasks(dataset, recipe.evaluate.split, max_examples, recipe.seed)
    prompts = [prompt for task in tasks for prompt in task.prompts]
    texts = [(task.answer_texts(dataset.titles), task.right_column) for task in tasks]
    answers = [[row[right]] for rows, rights in texts for row, right in zip(rows, rights)]
    users = [user for task in tasks for user in task.examples.user_index]
    ends = [end for task in tasks for end in task.examples.gate_end]
    own = folding.gates_of(model, dataset, users, ends, recipe.history.max_items)
    engine = TransformersEngine(model, tokenizer, recipe.evaluate.batch_size)

    def nats(weights: Any) -> Any:
        return -engine.score(prompts, answers, gate_weights=weights.numpy(), progress="score held-out answers")[:, 0]

    return lambda centres: folding.clustering_cost(nats, own, centres)


def _prototype_text(document: dict[str, Any], output: Path) -> str:
    lines = [f"{output}: {len(document['prototypes'])} prototypes of {document['users']} users"]
    lines.append(
        "distance of a user's gate from the prototype's: mean {mean_distance:.4f}, largest {max_distance:.4f}; "
        "share of the gates' variance kept: {variance_kept:.3f}".format(**document)
    )
    if "cost" in document:
        lines.append(
            "a held-out answer loses {nats_lost:.4f} nats on average over {examples} ({nats_own:.4f} under its own "
            "gate, {nats_prototype:.4f} under the nearest prototype's)".format(**document["cost"])
        )
    return "\n".join(lines)


def _rounded(weights: Any) -> list[Any]:
    return [_rounded(row) if row.dim() else round(float(row), 4) for row in weights]


STAGES: dict[str, Callable[..., None]] = {
    "convert": convert,
    "encoder": encoder,
    "train": train,
    "evaluate": evaluate,
}


def run(recipe: Recipe, force: bool = False, convert_options: Mapping[str, Any] | None = None) -> None:
    """All stages in order; one whose inputs have not changed is skipped. `convert_options` go to `convert`.

    Raises:
        UserError: before the first stage, where the last one needs a package that is not installed.
    """
    if recipe.actions is not None:
        from recllm.evaluate.action_systems import check_packages

        check_packages(recipe, [task.task for task in recipe.tasks], writes=True)
    for name in STAGES:
        run_stage(recipe, name, force, **((convert_options or {}) if name == "convert" else {}))


def fine_tune(recipe: Recipe, allow_template_mismatch: bool = False) -> None:
    """The encoder where it is stale, then training, resumed from its last checkpoint: what `recllm train` does.

    Under `accelerate launch` every rank comes here; the first alone decides whether the encoder is stale and fits it,
    while the others wait: on another machine the base model's files have other times.
    """
    from accelerate import PartialState

    from recllm.train import engines

    # The other ranks wait for the fit, which may be long: train.ddp_timeout is set, by engines.limit_waiting, for the
    # training that follows, and does not shorten this
    patience = datetime.timedelta(seconds=max(FIT_S, float(recipe.train.get("ddp_timeout", 0))))
    with engines.telling_of_lost_processes():
        state = PartialState(cpu=bool(recipe.train.get("use_cpu")), timeout=patience)
        if state.is_main_process:
            run_stage(recipe, "encoder")
        state.wait_for_everyone()
    run_stage(recipe, "train", force=True, allow_template_mismatch=allow_template_mismatch)


def run_stage(recipe: Recipe, name: str, force: bool = False, **options: Any) -> bool:
    """Run one stage unless it is up to date; returns whether it ran. `options` go to the stage's function."""
    record_path = recipe.output / "stages" / f"{name}.json"
    key = fingerprint(recipe, name, bool(options.get("skip_unreadable")))
    output = output_of(recipe, name)
    if not force and _up_to_date(record_path, key, output):
        print(f"== {name}: up to date ({output})", flush=True)
        return False
    print(f"== {name} → {output}", flush=True)
    is_main = os.environ.get("RANK", "0") == "0"  # set by accelerate launch
    if is_main:
        record_path.unlink(missing_ok=True)
    started = time.monotonic()
    STAGES[name](recipe, **options)
    wall_s = round(time.monotonic() - started, 1)
    if is_main:
        files.write_json(record_path, {"inputs": key, "output": _listing(output), "wall_s": wall_s})
    print(f"== {name}: done in {wall_s:.0f} s", flush=True)
    return True


def fingerprint(recipe: Recipe, name: str, skip_unreadable: bool = False) -> str:
    """sha256 over everything that the stage reads; where convert may leave out files, over that too."""
    document = recipe.model_dump(mode="json")
    joint = document["encoder"].pop("joint_learning_rate")  # of the adapter's training, not of this fit
    for setting in ("replicas", "replica_timeout_s"):  # how many share the work: the numbers are the same
        document["evaluate"].pop(setting)
    from recllm.convert.pipeline import tokenizer_special_tokens
    from recllm.data.sequences import source_paths

    read: dict[str, Any] = {"recllm": __version__, "stage": name, "seed": recipe.seed}
    sections: tuple[str, ...]
    if name == "convert":
        sections = ("data", "graph", "finance", "actions", "filter", "history", "prompt", "tasks")
        read["format"] = schema.DATASET_FORMAT
        read |= {"split": document["protocol"]["split"], "candidates": document["protocol"]["candidates"]}
        paths = source_paths(recipe.data, recipe.protocol.split)
        if recipe.graph is not None:
            from recllm.graph.build import source_paths as graph_paths

            paths = [*paths, *graph_paths(recipe.graph)]
            read["tokenizer"] = _model_files(recipe.model.name_or_path) or recipe.model.name_or_path
        if recipe.finance is not None:
            paths = [*paths, recipe.finance.folder]
        read["files"] = {path: _content(path) for path in paths}
        read |= {"skip_unreadable": True} if skip_unreadable else {}
        read["special_tokens"] = tokenizer_special_tokens(recipe.model.name_or_path)  # neutralised in titles
        read["templates"] = [files.sha256_of(assets.find("prompts", task.template)) for task in recipe.tasks]
    elif name == "encoder":
        sections = ("encoder", "history")
        read["exclude_history"] = recipe.protocol.ranking.exclude_history
        read["dataset"] = files.sha256_of(require(recipe, "convert") / "manifest.json")
        if recipe.encoder.type == "content":  # its features are the base model's
            sections = (*sections, "model")
            read["model_files"] = _model_files(recipe.model.name_or_path)
    elif name == "train":
        sections = ("model", "adapter", "loss", "train", "tasks", "history", "prompt")
        read["dataset"] = files.sha256_of(require(recipe, "convert") / "manifest.json")
        read["encoder"] = files.sha256_of(require(recipe, "encoder"))
        read["joint_learning_rate"] = joint
        read["model_files"] = _model_files(recipe.model.name_or_path)
    else:
        sections = ("model", "evaluate", "protocol", "history", "tasks")
        read["dataset"] = files.sha256_of(require(recipe, "convert") / "manifest.json")
        read["encoder"] = files.sha256_of(require(recipe, "encoder"))
        read["model_files"] = _model_files(recipe.model.name_or_path)
        read["adapters"] = [files.sha256_of(folder) for folder in _adapters(recipe)]
    read |= {section: document[section] for section in sections}
    return hashlib.sha256(json.dumps(read, sort_keys=True).encode()).hexdigest()


def _content(path: str) -> Any:
    """What changes with a file's content; objects in stores are not sent for it."""
    return object_store.version(path) if object_store.is_url(path) else files.sha256_of(offline.resolve(path))


def _model_files(name_or_path: str) -> dict[str, tuple[int, int]]:
    """Names, sizes and times of a local base model's files; its gigabytes are not read for every run."""
    folder = Path(name_or_path)
    if not folder.is_dir():
        return {}
    stats = {str(path.relative_to(folder)): path.stat() for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}


def _adapters(recipe: Recipe) -> list[Path]:
    folders = [require(recipe, "train"), *(Path(path) for path in recipe.evaluate.adapters.values())]
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"evaluate.adapters names {folder}, which is no folder: train it first or remove it")
    return folders


def _up_to_date(record_path: Path, key: str, output: Path) -> bool:
    if not record_path.is_file() or not output.is_dir():
        return False
    record = files.read_json(record_path, "the record of a finished stage")
    if not isinstance(record, dict) or record.get("inputs") != key:
        return False
    # a file that somebody added is no reason to run again, and would be lost
    return record.get("output", {}).items() <= _listing(output).items()


def _listing(output: Path) -> dict[str, int]:
    """Names and sizes of an output's files: an output that somebody emptied or cut short is made again."""
    return {str(p.relative_to(output)): p.stat().st_size for p in sorted(output.rglob("*")) if p.is_file()}
