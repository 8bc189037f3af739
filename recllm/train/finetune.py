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
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import tqdm
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, TrainingArguments, set_seed
from transformers.integrations import TensorBoardCallback

from recllm import files
from recllm.convert.templates import load_template
from recllm.data.dataset import Dataset, pad_left
from recllm.errors import UserError
from recllm.model.adapter import build_adapter, fit_gate_statistics, load_adapter, save_adapter
from recllm.model.base_model import load_base_model
from recllm.model.sequence_encoder import SASRec, load_encoder
from recllm.recipe import Recipe
from recllm.train.card import model_card
from recllm.train.collator import COLUMNS, Collator, TokenizedExamples, tokenize
from recllm.train.trainer import AdapterTrainer, last_checkpoint

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
)
STATISTICS_HISTORIES = 50_000  # mean and deviation of so many are as good as those of all
PROBE_ROWS = 2
RELOADED = "reloaded"
TOLERANCE = 1e-5  # of the reloaded adapter's logits, relative to their largest: the same weights give the same numbers


def train(
    recipe: Recipe,
    dataset_folder: Path,
    encoder_folder: Path,
    output: Path,
    *,
    resume: bool = True,
    allow_template_mismatch: bool = False,
) -> Path:
    """Fine-tune the recipe's adapter and write it to `output`.

    Raises:
        UserError: anything of recipe, dataset and encoder that does not fit together, before any long work;
            a loss that is not finite; a saved adapter that does not give the logits of the trained one.
    """
    output = Path(output)
    dataset = Dataset.open(Path(dataset_folder))
    checkpoints = output.parent / "checkpoints"
    arguments = training_arguments(recipe, checkpoints)
    encoder = check_inputs(recipe, dataset, Path(encoder_folder), allow_template_mismatch)
    set_seed(recipe.seed)
    base_model, tokenizer = load_base_model(recipe.model)
    model = build_adapter(base_model, recipe.adapter, encoder)
    examples = tokenize_split(dataset, "train", tokenizer, model)
    evaluated = tokenize_split(dataset, "valid", tokenizer, model) if arguments.eval_strategy != "no" else None
    fingerprint = fingerprint_of(recipe, dataset, Path(encoder_folder))
    checkpoint = _resume_from(checkpoints, fingerprint, resume)
    if encoder is not None and checkpoint is None:  # a checkpoint brings its own
        max_items = recipe.history.max_items
        states = representations(encoder, dataset, examples, max_items, recipe.seed, arguments.device)
        fit_gate_statistics(model, states)
    trainer = make_trainer(
        recipe, model, tokenizer, dataset, examples, evaluated, arguments, fingerprint, output.parent / "logs"
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.is_world_process_zero():
        save_and_check(recipe, trainer, dataset, examples, output)
        if "save_total_limit" not in recipe.train:
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
    for key in recipe.train:
        if key in OURS:
            raise UserError(f"train.{key} may not be set: {OURS[key]}")
        if key not in fields:
            close = difflib.get_close_matches(key, fields, n=1)
            hint = f'did you mean "{close[0]}"?' if close else "see the documentation of transformers.TrainingArguments"
            raise UserError(f'train.{key}: transformers.TrainingArguments has no argument "{key}", {hint}')
    values = {**DEFAULTS, "dataloader_pin_memory": torch.cuda.is_available()}
    values |= {key: _number(value, fields[key].default) for key, value in recipe.train.items()}
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


def check_inputs(recipe: Recipe, dataset: Dataset, encoder_folder: Path, allow_mismatch: bool) -> SASRec | None:
    """Refuse a dataset or encoder that does not belong to this recipe; returns the encoder, None for plain LoRA."""
    _check_settings(recipe, dataset)
    _check_templates(recipe, dataset, allow_mismatch)
    if recipe.adapter.method == "lora":
        return None
    encoder, info = load_encoder(encoder_folder)
    if info["vocabulary_sha256"] != dataset.vocabulary_sha256:
        raise UserError(
            f"{encoder_folder} was fitted on the vocabulary {info['vocabulary_sha256'][:12]}…, {dataset.folder} has "
            f"{dataset.vocabulary_sha256[:12]}…: delete the folder and run `recllm train`"
        )
    return encoder


def _check_settings(recipe: Recipe, dataset: Dataset) -> None:
    wanted = {"history_max_items": recipe.history.max_items, "prompt_max_items": recipe.prompt.max_items}
    for key, value in wanted.items():
        found = dataset.manifest[key]
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
    dataset: Dataset, split: str, tokenizer: PreTrainedTokenizerBase, model: PeftModel
) -> TokenizedExamples:
    """All examples of a split; the errors of `tokenize`."""
    counts = dataset.manifest["counts"]["examples"]  # "split/task" → examples
    total = sum(count for name, count in counts.items() if name.startswith(f"{split}/"))
    batches = dataset.example_batches(split, COLUMNS)
    return tokenize(batches, tokenizer, context_tokens(model.config), split, total)


def fingerprint_of(recipe: Recipe, dataset: Dataset, encoder_folder: Path) -> str:
    """sha256 over all that decides the weights of a run: only its own checkpoints may be resumed."""
    document = recipe.model_dump(mode="json")
    if not recipe.train.get("load_best_model_at_end"):  # with it, when is saved decides what is loaded
        document["train"] = {k: v for k, v in document["train"].items() if not k.startswith(NO_WEIGHT)}
    read: dict[str, Any] = {key: document[key] for key in ("seed", "model", "adapter", "train", "history", "prompt")}
    read["num_processes"] = PartialState().num_processes
    read["dataset"] = files.sha256_of(dataset.folder / "manifest.json")
    if recipe.adapter.method != "lora":
        read["encoder"] = files.sha256_of(encoder_folder)
    return hashlib.sha256(json.dumps(read, sort_keys=True).encode()).hexdigest()


# ---- the run ----


@torch.no_grad()
def representations(
    encoder: SASRec,
    dataset: Dataset,
    examples: TokenizedExamples,
    max_items: int,
    seed: int,
    device: torch.device,
    rows: int = 256,
) -> torch.Tensor:
    """(N, D): what the encoder says of the histories of training examples; the gate standardises by these.

    On raw SASRec states, which share a large common component, a softmax gate collapses onto one expert. Of more than
    STATISTICS_HISTORIES histories that are not empty a seeded choice is taken.
    """
    chosen = np.flatnonzero(examples.history_ends)  # an empty history has a uniform gate, whatever the statistics
    if len(chosen) > STATISTICS_HISTORIES:
        chosen = np.random.default_rng([seed, 0]).choice(chosen, STATISTICS_HISTORIES, replace=False)
    chosen = chosen[np.argsort(examples.history_ends[chosen], kind="stable")]  # like lengths together: less padding
    at_home = encoder.item_embedding.weight.device
    encoder.to(device)
    states = [torch.empty(0, encoder.hidden_size)]
    for begin in tqdm(range(0, len(chosen), rows), desc="gate statistics", unit="batch"):
        part = chosen[begin : begin + rows]
        ends, users = examples.history_ends[part], examples.user_indices[part]
        histories = [dataset.history(int(user), int(end), max_items) for user, end in zip(users, ends)]
        states.append(encoder(torch.from_numpy(pad_left(histories)).to(device)).cpu())
    encoder.to(at_home)
    return torch.cat(states)


def make_trainer(
    recipe: Recipe,
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    examples: TokenizedExamples,
    evaluated: TokenizedExamples | None,
    arguments: TrainingArguments,
    fingerprint: str,
    logs: Path,
) -> AdapterTrainer:
    """The trainer of this run; `evaluated` only where the recipe asks for evaluation during training."""
    histories = dataset if recipe.adapter.method == "ilora" else None
    pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    trainer = AdapterTrainer(
        model=model,
        args=arguments,
        data_collator=Collator(pad_token_id, histories, recipe.history.max_items),
        train_dataset=examples,
        eval_dataset=evaluated,
        gate_learning_rate=recipe.adapter.gate.learning_rate if histories is not None else None,
        fingerprint=fingerprint,
    )
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and "TENSORBOARD_LOGGING_DIR" not in os.environ:
            callback.logging_dir = str(logs)
    return trainer


def _resume_from(folder: Path, fingerprint: str, resume: bool) -> str | None:
    """The checkpoint to go on from; None begins afresh: the checkpoints of other runs are moved out of the way."""
    state = PartialState()
    found = last_checkpoint(folder, fingerprint, state.num_processes) if resume else None
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


def save_and_check(
    recipe: Recipe, trainer: AdapterTrainer, dataset: Dataset, examples: TokenizedExamples, output: Path
) -> None:
    """Write the adapter to a folder beside `output`, reload and check it there, then move it into place.

    Raises:
        UserError: what was saved is not what was trained; `output` stays as it was.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    history = trainer.state.log_history
    # those whose gate has most to say: an empty history has a uniform one, whatever was saved
    longest = np.argsort(-examples.history_ends, kind="stable")[:PROBE_ROWS]
    rows: list[Any] = [examples[int(i)] for i in longest]
    with files.replacing_folder(output) as staging:
        card = model_card(recipe, dataset.manifest, history)
        save_adapter(model, staging, items=dataset.folder / "items.parquet", manifest=dataset.manifest, card=card)
        files.write_json(staging / "training_log.json", history)
        check_saved(model, staging, trainer.data_collator(rows))


@torch.no_grad()
def check_saved(model: PeftModel, folder: Path, probe: dict[str, Any]) -> None:
    """Load a saved adapter a second time, beside the trained one: it must give the same logits.

    Raises:
        UserError: a file that cannot be read back (save_adapter has refused empty and non-finite tensors before), or
            logits that differ by more than TOLERANCE of the largest.
    """
    model.eval()
    trained = model.active_adapters[0]
    inputs = {k: v.to(model.device) if torch.is_tensor(v) else v for k, v in probe.items() if k != "labels"}
    wanted = model(**inputs, use_cache=False).logits.float()
    try:
        load_adapter(model, folder, RELOADED)
        model.set_adapter(RELOADED)
        found = model(**inputs, use_cache=False).logits.float()
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
