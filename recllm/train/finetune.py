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

import torch
from accelerate import PartialState
from accelerate.utils import tqdm
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, TrainingArguments, set_seed
from transformers.integrations import TensorBoardCallback

from recllm import files
from recllm.convert.templates import load_template
from recllm.data.dataset import Dataset
from recllm.errors import UserError
from recllm.model.adapter import build_adapter, fit_gate_statistics, load_adapter, save_adapter
from recllm.model.base_model import load_base_model
from recllm.model.sequence_encoder import SASRec, load_encoder
from recllm.recipe import Recipe
from recllm.train.card import model_card
from recllm.train.collator import COLUMNS, Collator, TokenizedExamples, pad_left, tokenize
from recllm.train.trainer import AdapterTrainer, last_checkpoint

OURS = {  # keys of TrainingArguments that a recipe may not set, and why
    "output_dir": "checkpoints go beside the adapter: set output_dir at the top of the recipe",
    "seed": "the recipe has one seed for all stages: set it at the top",
    "remove_unused_columns": "the collator makes the batches, no column is left over",
    "label_names": "the loss is on the completion",
    "prediction_loss_only": "evaluation during training gives the loss only",
    "length_column_name": "lengths are known from tokenising",
    "resume_from_checkpoint": "a run resumes from its own last checkpoint by itself",
    "push_to_hub": "the adapter folder can be uploaded after training",
}
DEFAULTS: dict[str, Any] = {  # where they differ from transformers'
    "report_to": "tensorboard",
    "train_sampling_strategy": "group_by_length",
    "save_total_limit": 2,  # the one before the last survives a kill while the last is written
    "logging_steps": 10,
    "logging_nan_inf_filter": False,  # it hides a diverged run: ours stops
}
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
    examples = tokenize(dataset.examples("train", COLUMNS), tokenizer, context_tokens(base_model.config))
    model = build_adapter(base_model, recipe.adapter, encoder)
    if encoder is not None:
        fit_gate_statistics(model, representations(encoder, dataset, examples, recipe.history.max_items))
    fingerprint = fingerprint_of(recipe, dataset, Path(encoder_folder))
    trainer = make_trainer(recipe, model, tokenizer, dataset, examples, arguments, fingerprint, output.parent / "logs")
    trainer.train(resume_from_checkpoint=_resume_from(checkpoints, fingerprint, resume))
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


def fingerprint_of(recipe: Recipe, dataset: Dataset, encoder_folder: Path) -> str:
    """sha256 over all that decides the weights of a run: only its own checkpoints may be resumed."""
    document = recipe.model_dump(mode="json")
    read: dict[str, Any] = {key: document[key] for key in ("seed", "model", "adapter", "train", "history", "prompt")}
    read["dataset"] = files.sha256_of(dataset.folder / "manifest.json")
    if recipe.adapter.method != "lora":
        read["encoder"] = files.sha256_of(encoder_folder)
    return hashlib.sha256(json.dumps(read, sort_keys=True).encode()).hexdigest()


# ---- the run ----


@torch.no_grad()
def representations(
    encoder: SASRec, dataset: Dataset, examples: TokenizedExamples, max_items: int, rows: int = 256
) -> torch.Tensor:
    """(N, D): what the encoder says of the history of every training example; the gate standardises by these.

    On raw SASRec states, which share a large common component, a softmax gate collapses onto one expert.
    """
    states = []
    for begin in tqdm(range(0, len(examples), rows), desc="gate statistics", unit="batch"):
        ends = examples.history_ends[begin : begin + rows]
        users = examples.user_indices[begin : begin + rows]
        histories = [dataset.history(int(user), int(end), max_items) for user, end in zip(users, ends)]
        states.append(encoder(pad_left(histories).to(encoder.item_embedding.weight.device)).cpu())
    return torch.cat(states)


def make_trainer(
    recipe: Recipe,
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    examples: TokenizedExamples,
    arguments: TrainingArguments,
    fingerprint: str,
    logs: Path,
) -> AdapterTrainer:
    """The trainer of this run; valid examples are read only where the recipe asks for evaluation during training."""
    histories = dataset if recipe.adapter.method == "ilora" else None
    pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    evaluated = None
    if arguments.eval_strategy != "no":
        evaluated = tokenize(dataset.examples("valid", COLUMNS), tokenizer, context_tokens(model.config))
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
    """The checkpoint to go on from; None begins afresh, without what other runs have left there."""
    found = last_checkpoint(folder, fingerprint) if resume else None
    state = PartialState()
    state.wait_for_everyone()  # all ranks have looked before the first one tidies up
    if state.is_main_process:
        if found is None:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            print(f"recllm: going on from {found}", file=sys.stderr)
    state.wait_for_everyone()
    return str(found) if found else None


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
    rows: list[Any] = [examples[i] for i in range(min(PROBE_ROWS, len(examples)))]
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
