"""One fine-tuning run: `recllm train`.

A recipe, dataset/ and encoder/ enter; adapter/ leaves, reloaded and checked before it takes its place.
"""

import dataclasses
import difflib
import hashlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from accelerate import PartialState
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, TrainingArguments, set_seed
from transformers.integrations import TensorBoardCallback

from recllm import files
from recllm.convert.templates import load_template
from recllm.data.dataset import Dataset
from recllm.errors import UserError
from recllm.model.adapter import (
    accepts_history,
    build_adapter,
    check_base_model,
    fit_gate_statistics,
    load_adapter,
    save_adapter,
)
from recllm.model.base_model import load_base_model, prepare_for_training
from recllm.model.histories import encode_histories
from recllm.model.sequence_encoder import SequenceEncoder, load_encoder
from recllm.model.servable import servable_text
from recllm.recipe import LossSection, Recipe
from recllm.train import engines, streaming
from recllm.train.card import model_card
from recllm.train.collator import COLUMNS, WEIGHED, Collator, TokenizedExamples, tokenize
from recllm.train.dro import DRO, GroupDro
from recllm.train.representations import encode_examples, representation_table, statistics_examples
from recllm.train.streaming import Share, StoredHistories, StreamedExamples, is_streaming
from recllm.train.trainer import ENCODER, GATE, SOFT_TOKEN, AdapterTrainer, check_balance, last_checkpoint
from recllm.train.weights import TokenWeights, action_groups, check_tasks, token_weights, user_groups, weighs

OURS = {  # keys of TrainingArguments that a recipe may not set, and why
    "output_dir": "checkpoints go beside the adapter: set output_dir at the top of the recipe",
    "seed": "the recipe has one seed for all stages: set it at the top",
    "remove_unused_columns": "the collator makes the batches, no column is left over",
    "label_names": "the loss is on the completion",
    "prediction_loss_only": "evaluation during training gives the loss only",
    "length_column_name": "lengths are known from tokenising",
    "resume_from_checkpoint": "a run resumes from its own last checkpoint by itself",
    "save_only_model": "a run that was killed could not be resumed",
    "ignore_data_skip": "a resumed run must go on with the examples that the killed one had not reached",
    "push_to_hub": "the adapter folder can be uploaded after training",
}
DEFAULTS: dict[str, Any] = {  # where they differ from transformers'
    "report_to": "tensorboard",
    "train_sampling_strategy": "group_by_length",
    "save_total_limit": 2,  # the one before the last survives a kill while the last is written
    "logging_steps": 10,
    "logging_nan_inf_filter": False,  # it hides a diverged run: ours stops
}
NO_WEIGHT = (  # beginnings of keys of `train:` that do not touch the weights: they may change before a run is resumed
    "logging_",
    "log_",
    "report_to",
    "run_name",
    "save_",
    "disable_tqdm",
    "dataloader_num_workers",
    "dataloader_pin_memory",
    "dataloader_persistent_workers",
    "dataloader_prefetch_factor",
    "ddp_timeout",
)
PROBE_ROWS = 2
Array = npt.NDArray[Any]
RELOADED = "reloaded"
TOLERANCE = 1e-5  # of the reloaded adapter's logits, relative to their largest: the same weights give the same numbers


@engines.telling_of_lost_processes()
def train(
    recipe: Recipe,
    dataset_folder: Path,
    encoder_folder: Path,
    output: Path,
    *,
    resume: bool = True,
    allow_template_mismatch: bool = False,
    gate_inputs: dict[str, Array] | None = None,
) -> Path:
    """Fine-tune the recipe's adapter and write it to `output`; all processes of a launch call it.

    Args:
        recipe: the run.
        dataset_folder: what `recllm convert` wrote.
        encoder_folder: the fitted sequence encoder; not read for a plain LoRA, but for groups of users.
        output: the adapter folder; checkpoints and logs go beside it.
        resume: go on from the last checkpoint of this very run, if there is one.
        allow_template_mismatch: train on a dataset of other templates than the recipe's.
        gate_inputs: for controls: "representation" (N, D) or "gate_weights" (N, K), a row a training example, in place
            of what the encoder says.

    Raises:
        UserError: anything of recipe, dataset, encoder and launch that does not fit together, before any long work;
            a loss that is not finite; a saved adapter that does not give the logits of the trained one; another process
            of the launch that died or no longer answers.
    """
    output = Path(output)
    dataset = Dataset.open(Path(dataset_folder))
    checkpoints = output.parent / "checkpoints"
    arguments = training_arguments(recipe, checkpoints)
    engines.check_launch()
    launch = engines.asked_engine(arguments), arguments.mixed_precision
    if is_streaming(recipe):
        streaming.check_streaming(recipe, arguments, gate_inputs)
    if recipe.adapter.method == "ilora":
        check_balance(recipe.adapter.gate.balance, arguments)
    encoder = check_inputs(recipe, dataset, Path(encoder_folder), allow_template_mismatch)
    set_seed(recipe.seed)
    base_model, tokenizer = load_base_model(recipe.model)
    model = build_adapter(prepare_for_training(base_model), recipe.adapter, encoder)
    if PartialState().is_main_process:
        print(f"recllm: {servable_text(base_model.config, model.peft_config['default'])}", file=sys.stderr)
    examples: TokenizedExamples | StreamedExamples
    if is_streaming(recipe):
        examples = stream(recipe, dataset, tokenizer, model, arguments)
        examples.check_lengths()
    else:
        examples = tokenize_split(dataset, "train", tokenizer, model, WEIGHED if weighs(recipe.loss) else COLUMNS)
    evaluated = tokenize_split(dataset, "valid", tokenizer, model) if arguments.eval_strategy != "no" else None
    fingerprint = fingerprint_of(recipe, dataset, Path(encoder_folder), gate_inputs)
    checkpoint = _resume_from(checkpoints, fingerprint, resume, *launch)
    if checkpoint is not None:  # the recipe names the base model: other weights may lie under that name by now
        check_base_model(model, Path(checkpoint))
    if encoder is not None:
        give_gate_inputs(recipe, model, encoder, dataset, examples, evaluated, arguments.device, output, gate_inputs)
        if checkpoint is None:  # a checkpoint brings its own
            _fit_statistics(recipe, model, encoder, dataset, examples, arguments.device)
    weighed = Weighed()
    if isinstance(examples, TokenizedExamples):
        weighed = weigh(recipe, dataset, examples, encoder, Path(encoder_folder), output, checkpoint)
    trainer = make_trainer(
        recipe, model, tokenizer, dataset, examples, evaluated, arguments, fingerprint, output.parent / "logs", weighed
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    save_and_check(recipe, trainer, dataset, examples, output)
    if trainer.is_world_process_zero() and "save_total_limit" not in recipe.train:
        shutil.rmtree(checkpoints, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    return output


# ---- before any long work ----


def training_arguments(recipe: Recipe, checkpoints: Path) -> TrainingArguments:
    """The recipe's `train:` section as TrainingArguments.

    Raises:
        UserError: an unknown key, with the nearest known one; a key that is ours to set; a value that does not fit.
    """
    fields = {field.name: field for field in dataclasses.fields(TrainingArguments) if field.init}
    is_streaming(recipe)  # its keys are none of transformers'
    given = {key: value for key, value in recipe.train.items() if key not in streaming.KEYS}
    for key in given:
        if key in OURS:
            raise UserError(f"train.{key} may not be set: {OURS[key]}")
        if key not in fields:
            close = difflib.get_close_matches(key, fields, n=1)
            hint = f'did you mean "{close[0]}"?' if close else "see the documentation of transformers.TrainingArguments"
            raise UserError(f'train.{key}: transformers.TrainingArguments has no argument "{key}", {hint}')
    values = {**DEFAULTS, "dataloader_pin_memory": torch.cuda.is_available()}
    values |= {key: _number(value, fields[key].default) for key, value in given.items()}
    if values.get("gradient_checkpointing"):
        values["gradient_checkpointing_kwargs"] = {"use_reentrant": False} | dict(
            values.get("gradient_checkpointing_kwargs") or {}
        )
    values |= {"output_dir": str(checkpoints), "seed": recipe.seed, "remove_unused_columns": False}
    values |= {"label_names": ["labels"], "prediction_loss_only": True}
    try:
        arguments = TrainingArguments(**values)
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"train: {error}") from None
    if arguments.n_gpu > 1:  # torch.nn.DataParallel would hand one user's gate to another's rows
        print("recllm: one process uses one GPU; for all of them start with `accelerate launch`", file=sys.stderr)
        arguments._n_gpu = 1
    return arguments


def _number(value: Any, default: Any) -> Any:
    """YAML reads 1e-4 (without a point) as text: turn it into the number that the argument wants."""
    if isinstance(value, str) and isinstance(default, (int, float)) and not isinstance(default, bool):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def check_inputs(
    recipe: Recipe, dataset: Dataset, encoder_folder: Path, allow_mismatch: bool
) -> SequenceEncoder | None:
    """Refuse a dataset or encoder that does not belong to this recipe; returns the encoder, None for plain LoRA."""
    check_tasks(recipe)
    _check_settings(recipe, dataset)
    _check_templates(recipe, dataset, allow_mismatch)
    encoder = _open_encoder(encoder_folder, dataset) if recipe.adapter.method != "lora" or _by_user(recipe) else None
    return encoder if recipe.adapter.method != "lora" else None


def _open_encoder(encoder_folder: Path, dataset: Dataset) -> SequenceEncoder:
    encoder, info = load_encoder(encoder_folder)
    if info["vocabulary_sha256"] != dataset.vocabulary_sha256:
        raise UserError(
            f"{encoder_folder} was fitted on the vocabulary {info['vocabulary_sha256'][:12]}…, {dataset.folder} has "
            f"{dataset.vocabulary_sha256[:12]}…: delete the folder and run `recllm train`"
        )
    return encoder


def _check_settings(recipe: Recipe, dataset: Dataset) -> None:
    wanted = {
        "history_max_items": recipe.history.max_items,
        "history_gate": recipe.history.gate,
        "prompt_max_items": recipe.prompt.max_items,
    }
    for key, value in wanted.items():
        found = dataset.manifest.get(key)
        if found != value:
            name = key.replace("_", ".", 1)
            raise UserError(
                f"{dataset.folder} was converted with {name}={found}, the recipe has {value}: "
                f"run `recllm convert` with this recipe, or set {name}={found}"
            )


def _check_templates(recipe: Recipe, dataset: Dataset, allow_mismatch: bool) -> None:
    converted = {(entry["task"], entry["sha256"]) for entry in dataset.manifest["templates"]}
    current = {}
    for task in recipe.tasks:
        template = load_template(task.template, task.task, dense=task.dense_window > 0)
        current[task.task, template.sha256] = template.id
    if converted == set(current):
        return
    text = (
        f"{dataset.folder} was converted with the templates {_templates_text(dataset)}, the recipe's are now "
        f"{', '.join(f'{current[key]} ({key[1][:12]})' for key in sorted(current))}"
    )
    if not allow_mismatch:
        raise UserError(f"{text}: run `recllm convert` again, or train with --allow-template-mismatch")
    print(f"recllm: {text}; going on because of --allow-template-mismatch", file=sys.stderr)


def _templates_text(dataset: Dataset) -> str:
    return ", ".join(f"{entry['id']} ({entry['sha256'][:12]})" for entry in dataset.manifest["templates"])


def context_tokens(config: Any) -> int:
    """The longest input of the base model; unlimited where its config names none."""
    return int(getattr(config, "max_position_embeddings", None) or sys.maxsize)


def tokenize_split(
    dataset: Dataset, split: str, tokenizer: PreTrainedTokenizerBase, model: PeftModel, columns: list[str] = COLUMNS
) -> TokenizedExamples:
    """All examples of a split, COLUMNS or WEIGHED of them; the errors of `tokenize`."""
    counts = dataset.manifest["counts"]["examples"]  # "split/task" → examples
    total = sum(count for name, count in counts.items() if name.startswith(f"{split}/"))
    batches = dataset.example_batches(split, columns)
    return tokenize(batches, tokenizer, context_tokens(model.config), split, total)


def stream(
    recipe: Recipe,
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    model: PeftModel,
    arguments: TrainingArguments,
) -> StreamedExamples:
    """The training examples of this process, none of which is read yet; the errors of StreamedExamples."""
    batch, state = arguments.train_batch_size, PartialState()
    return StreamedExamples(
        dataset,
        tokenizer,
        context_tokens(model.config),
        Share(state.process_index, state.num_processes, batch, arguments.gradient_accumulation_steps),
        seed=arguments.data_seed if arguments.data_seed is not None else recipe.seed,
        buffer_size=streaming.buffer_size_of(recipe),
        by_length=arguments.train_sampling_strategy == "group_by_length",
        histories=StoredHistories(dataset, recipe.history.max_items) if accepts_history(model) else None,
    )


def fingerprint_of(
    recipe: Recipe, dataset: Dataset, encoder_folder: Path, gate_inputs: dict[str, Array] | None = None
) -> str:
    """sha256 over all that decides the weights of a run: only its own checkpoints may be resumed."""
    document = recipe.model_dump(mode="json")
    if not recipe.train.get("load_best_model_at_end"):  # with it, when is saved decides what is loaded
        document["train"] = {k: v for k, v in document["train"].items() if not k.startswith(NO_WEIGHT)}
    if is_streaming(recipe):  # a resumed run passes over rows by their buffers: another default would be another order
        order = {"buffer_size": streaming.buffer_size_of(recipe), "streaming_order": streaming.ORDER}
        document["train"] = document["train"] | order
    read: dict[str, Any] = {key: document[key] for key in ("seed", "model", "adapter", "train", "history", "prompt")}
    read["dataset"] = files.sha256_of(dataset.folder / "manifest.json")
    read["compute_dtype"] = str(compute_dtype(recipe))
    if recipe.loss != LossSection():
        read["loss"] = document["loss"]
    if recipe.adapter.method != "lora" or _by_user(recipe):
        read["encoder"] = [document["encoder"], files.sha256_of(encoder_folder)]
    for name, table in (gate_inputs or {}).items():
        read[name] = hashlib.sha256(np.ascontiguousarray(table).tobytes()).hexdigest()
    return hashlib.sha256(json.dumps(read, sort_keys=True).encode()).hexdigest()


# ---- what the gate reads ----


def give_gate_inputs(
    recipe: Recipe,
    model: PeftModel,
    encoder: SequenceEncoder,
    dataset: Dataset,
    examples: TokenizedExamples | StreamedExamples,
    evaluated: TokenizedExamples | None,
    device: torch.device,
    output: Path,
    gate_inputs: dict[str, Array] | None,
) -> None:
    """Have each example carry what the adapter reads: a given table's row, or what the frozen encoder says of it.

    With encoder.joint_learning_rate nothing is carried and the encoder is set to be trained: the batches then hold the
    histories themselves. So they do of streamed examples, and the encoder runs in every step.

    Raises:
        UserError: tables that do not fit the examples, or together with evaluation during training or a joint encoder.
    """
    joint = recipe.encoder.joint_learning_rate is not None
    if gate_inputs and isinstance(examples, TokenizedExamples):
        if len(gate_inputs) != 1 or evaluated is not None or joint:
            raise UserError(
                f"gate_inputs has {', '.join(gate_inputs)}: one table is expected, of the training examples; without "
                "train.eval_strategy (its examples have none) and without encoder.joint_learning_rate"
            )
        ((argument, table),) = gate_inputs.items()
        examples.give(argument, table)
    elif joint:
        model.base_model.set_encoder(encoder, "default", trainable=True)  # type: ignore[operator]  # nn.Module to PEFT
    elif not isinstance(examples, StreamedExamples):
        for part in (examples, evaluated):
            if part is not None:
                folder = output.parent
                table = representation_table(encoder, dataset, part, recipe.history.max_items, folder, device)
                part.give("representation", table)


def _fit_statistics(
    recipe: Recipe,
    model: PeftModel,
    encoder: SequenceEncoder,
    dataset: Dataset,
    examples: TokenizedExamples | StreamedExamples,
    device: torch.device,
) -> None:
    """On raw SASRec states, which share a large common component, a softmax gate collapses onto one expert."""
    if isinstance(examples, StreamedExamples):
        progress = "encode histories" if PartialState().is_local_main_process else None
        histories = examples.statistics_histories()
        fit_gate_statistics(model, encode_histories(encoder, histories, device=device, progress=progress))
        return
    chosen = statistics_examples(examples, recipe.seed)
    if examples.argument == "representation":
        states = torch.from_numpy(np.asarray(examples.table[chosen], dtype=np.float32))
    else:
        states = encode_examples(encoder, dataset, examples, chosen, recipe.history.max_items, device)
    fit_gate_statistics(model, states)


# ---- what tokens count ----


class Weighed(NamedTuple):
    """What the trainer needs where not every token counts the same."""

    weights: TokenWeights | None = None
    dro: GroupDro | None = None
    first_log: dict[str, float] | None = None


def weigh(
    recipe: Recipe,
    dataset: Dataset,
    examples: TokenizedExamples,
    encoder: SequenceEncoder | None,
    encoder_folder: Path,
    output: Path,
    checkpoint: str | None,
) -> Weighed:
    """By the recipe's loss section; all processes call it. Clusters of users are those of the checkpoint, if any.

    Raises:
        UserError: classes, rationales or groups that the examples do not have.
    """
    section = recipe.loss
    if not weighs(section):
        return Weighed()
    weights, classes = token_weights(section, examples)
    examples.numbered = True
    first_log = {f"class_weight/{name}": weight for name, weight in classes.items()}
    if section.dro is None:
        return Weighed(weights, None, first_log)
    if section.dro.groups == "action":
        numbers, groups = action_groups(section, weights, examples)
    else:
        own = encoder if encoder is not None else _open_encoder(encoder_folder, dataset)
        table = _representations(recipe, dataset, examples, own, output)
        saved = None if checkpoint is None else files.read_json(Path(checkpoint) / DRO, "groups of a checkpoint")
        centres = None if saved is None else np.array(saved["centres"])
        numbers, groups = user_groups(section, weights, examples, table, recipe.seed, centres)
    dro = GroupDro(groups, section.dro.step_size)
    return Weighed(weights._replace(groups=torch.from_numpy(numbers)), dro, first_log)


def _by_user(recipe: Recipe) -> bool:
    return recipe.loss.dro is not None and recipe.loss.dro.groups == "user_cluster"


def _representations(
    recipe: Recipe, dataset: Dataset, examples: TokenizedExamples, encoder: SequenceEncoder, output: Path
) -> Array:
    """(N, D): what the encoder says of the examples' histories before training; of a control its own rows."""
    if examples.argument == "representation":
        return examples.table
    device = PartialState().device
    return representation_table(encoder, dataset, examples, recipe.history.max_items, output.parent, device)


# ---- the run ----


def own_learning_rates(recipe: Recipe) -> dict[str, float]:
    """Part of a parameter's name → its learning rate, where it is not train.learning_rate."""
    part = {"ilora": GATE, "soft_token": SOFT_TOKEN}.get(recipe.adapter.method)
    rates = {part: recipe.adapter.gate.learning_rate, ENCODER: recipe.encoder.joint_learning_rate} if part else {}
    return {name: rate for name, rate in rates.items() if name is not None and rate is not None}


def compute_dtype(recipe: Recipe) -> torch.dtype | None:
    """bf16 on a bf16 base model, unless the recipe decides by train.bf16 or train.fp16."""
    decided = recipe.model.dtype != "bfloat16" or {"bf16", "fp16"} & recipe.train.keys()
    return None if decided else torch.bfloat16


def make_trainer(
    recipe: Recipe,
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    examples: TokenizedExamples | StreamedExamples,
    evaluated: TokenizedExamples | None,
    arguments: TrainingArguments,
    fingerprint: str,
    logs: Path,
    weighed: Weighed,
) -> AdapterTrainer:
    """The trainer of this run; `evaluated` only where the recipe asks for evaluation during training."""
    histories = dataset if accepts_history(model) else None  # read where the examples carry nothing
    pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    trainer = AdapterTrainer(
        model=model,
        args=arguments,
        data_collator=Collator(pad_token_id, histories, recipe.history.max_items),
        train_dataset=examples,
        eval_dataset=evaluated,
        learning_rates=own_learning_rates(recipe),
        balance=recipe.adapter.gate.balance,
        fingerprint=fingerprint,
        compute_dtype=compute_dtype(recipe),
        **weighed._asdict(),
    )
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and "TENSORBOARD_LOGGING_DIR" not in os.environ:
            callback.logging_dir = str(logs)
    return trainer


def _resume_from(
    folder: Path, fingerprint: str, resume: bool, engine: str = engines.ALONE, precision: str = "no"
) -> str | None:
    """The checkpoint to go on from; None begins afresh: the checkpoints of other runs are moved out of the way."""
    state = PartialState()
    found = last_checkpoint(folder, fingerprint, state.num_processes, engine, precision) if resume else None
    state.wait_for_everyone()  # all ranks have looked before the first one tidies up
    if state.is_main_process:
        if found is not None:
            print(f"recllm: going on from {found}", file=sys.stderr)
        elif folder.exists():
            _set_aside(folder)
    state.wait_for_everyone()
    return str(found) if found else None


def _set_aside(folder: Path) -> None:
    """In place they would count as ours, and save_total_limit would delete ours before them. One set is kept."""
    old = folder.with_name(f"{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    folder.rename(old)
    print(f"recllm: beginning afresh; what was in {folder} is kept in {old} until the next time", file=sys.stderr)


# ---- after training ----


@torch.no_grad()
def save_and_check(
    recipe: Recipe,
    trainer: AdapterTrainer,
    dataset: Dataset,
    examples: TokenizedExamples | StreamedExamples,
    output: Path,
) -> None:
    """Write the adapter to a folder beside `output`, reload and check it there, then move it into place.

    All processes call it: a split model runs only where all of them run. The first one writes and compares.

    Raises:
        UserError: what was saved is not what was trained; `output` stays as it was.
    """
    model = trainer.accelerator.unwrap_model(trainer.model).eval()
    weights = engines.whole_weights(model)
    probe = _probe(trainer, examples)
    wanted = _logits(model, probe)
    engines.split_again(model)  # reading the state does so too, on the first process only
    if not trainer.is_world_process_zero():
        with model.disable_adapter():  # its part of the base model, while the first process runs the saved adapter
            _logits(model, {name: value for name, value in probe.items() if name != "history_items"})
        return
    history = trainer.state.log_history
    with files.replacing_folder(output) as staging:
        card = model_card(recipe, dataset.manifest, history)
        items, manifest = dataset.folder / "items.parquet", dataset.manifest
        save_adapter(model, staging, items=items, manifest=manifest, card=card, state_dict=weights)
        files.write_json(staging / "training_log.json", history)
        if trainer.dro is not None:
            files.write_json(staging / DRO, trainer.dro.document())
        check_saved(model, staging, probe, wanted)


def _probe(trainer: AdapterTrainer, examples: TokenizedExamples | StreamedExamples) -> dict[str, Any]:
    """A batch without labels of the examples whose gate has most to say: an empty history has a uniform one."""
    if isinstance(examples, StreamedExamples):
        rows: list[Any] = examples.probe(PROBE_ROWS)
    else:
        longest = np.argsort(-examples.gate_ends, kind="stable")[:PROBE_ROWS]
        # through the encoder, which is saved as well
        rows = [examples[int(i)]._replace(given=None, example=None) for i in longest]
    device = trainer.accelerator.device
    batch = trainer.data_collator(rows)
    return {k: v.to(device) if torch.is_tensor(v) else v for k, v in batch.items() if k != "labels"}


def _logits(model: PeftModel, probe: dict[str, Any]) -> torch.Tensor:
    return model(**probe, use_cache=False).logits.float()


@torch.no_grad()
def check_saved(model: PeftModel, folder: Path, probe: dict[str, Any], wanted: torch.Tensor) -> None:
    """Load a saved adapter a second time, beside the trained one: it must give the logits that were `wanted`.

    Raises:
        UserError: a file that cannot be read back (save_adapter has refused empty and non-finite tensors before), or
            logits that differ by more than TOLERANCE of the largest.
    """
    trained = model.active_adapters[0]
    try:
        load_adapter(model, folder, RELOADED)
        model.set_adapter(RELOADED)
        found = _logits(model.eval(), probe)
    finally:
        model.set_adapter(trained)
        if RELOADED in model.peft_config:
            model.delete_adapter(RELOADED)
    difference = float((found - wanted).abs().max() / wanted.abs().max())
    if not difference <= TOLERANCE:
        raise UserError(
            f"the saved adapter gives other logits than the trained one: largest difference {difference:.2e} of the "
            f"largest logit, {TOLERANCE:.0e} is allowed. It is not moved into place; the checkpoints are kept"
        )
