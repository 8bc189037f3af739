"""The trainer: transformers.Trainer with our loss, learning rates, logging, data order and checkpoints.

An adapter model, training arguments and tokenised examples enter; a trained adapter (in place) and checkpoints leave.
A checkpoint is a usable adapter folder with optimizer, scheduler, random and trainer state beside the weights.
"""

import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch.nn import functional
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from recllm import files
from recllm.errors import UserError
from recllm.model.adapter import accepts_history, gate_weights, load_weights, write_adapter
from recllm.train.collator import IGNORE, TokenizedExamples

MARKER = "checkpoint.json"  # written last: a checkpoint without it was cut off while being written
OPTIMIZERS = ("optimizer.pt", "optimizer.bin", "optimizer_*", "global_step*")  # alone and DDP; FSDP; FSDP; DeepSpeed
GATE = "base_model.gate."  # in the name of every gate parameter and of no other (a router is base_model.model…gate)


class EpochSampler(torch.utils.data.Sampler[int]):
    """Order of an epoch from (seed, epoch) alone, so that a resumed run sees the order of an uninterrupted one.

    transformers' own length-grouped sampler draws from the global generator, whose state a resumed run no longer has
    at the beginning of the epoch. It also leaves the batches sorted by length, so that every 50th step would see the
    shortest examples only, which in dense data are those with an empty history.
    """

    def __init__(self, lengths: np.ndarray, group_size: int, seed: int, epoch: Callable[[], int]) -> None:
        """`group_size` > 0: examples of like length stand together in groups of that size; 0: plainly shuffled."""
        self.lengths, self.group_size, self.seed, self.epoch = lengths, group_size, seed, epoch

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        epoch = self.epoch()
        generator = np.random.default_rng([self.seed, epoch])
        order = generator.permutation(len(self.lengths))
        if not self.group_size:
            return iter(order.tolist())
        whole = len(order) - len(order) % self.group_size  # the remainder is a random choice, not the shortest
        groups = generator.permutation(self._groups(order[:whole]))
        if epoch == 0 and len(groups):  # the longest first, once: a run that lacks memory stops at once
            longest = self.lengths[groups].max(axis=1).argmax()
            groups[[0, longest]] = groups[[longest, 0]]
        return iter(groups.ravel().tolist() + order[whole:].tolist())

    def _groups(self, order: np.ndarray) -> np.ndarray:
        """(N / group_size, group_size): sorted by length within stretches of 50 groups, fewer where data are few."""
        stretch = self.group_size * max(1, min(len(self.lengths) // (self.group_size * 4), 50))
        parts = [order[start : start + stretch] for start in range(0, len(order), stretch)]
        arranged = [part[np.argsort(-self.lengths[part], kind="stable")] for part in parts]
        return np.concatenate([np.empty(0, np.int64), *arranged]).reshape(-1, self.group_size)


class AdapterTrainer(Trainer):
    """transformers.Trainer for LoRA and instance-wise LoRA."""

    def __init__(
        self, *args: Any, gate_learning_rate: float | None = None, fingerprint: str = "", **kwargs: Any
    ) -> None:
        """`fingerprint` is written into checkpoints; a run resumes from those with its own only."""
        super().__init__(*args, **kwargs)
        self.gate_learning_rate = gate_learning_rate
        self.fingerprint = fingerprint
        self.model_accepts_loss_kwargs = True  # compute_loss divides by num_items_in_batch: it must be counted
        self._reads_history = accepts_history(self.model)
        self._seen = Seen()
        self._evaluated: list[tuple[float, int]] = []  # summed loss and tokens of each batch of an evaluation

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Cross-entropy in fp32 over completion tokens, a mean over all of them in one optimizer step.

        The sum over this micro-batch is divided by `num_items_in_batch`, the count over all accumulated micro-batches
        and processes (in an evaluation, that of the batch); without it by its own count.
        """
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        if model.training:
            self._seen.add(inputs)
        outputs = model(**inputs, use_cache=False)
        smoothing = self.args.label_smoothing_factor if model.training else 0.0
        total, count = completion_loss(outputs.logits, labels, smoothing)
        if not model.training:
            self._evaluated.append((float(total.detach()), count))
        if num_items_in_batch is None:
            loss = total / count
        else:
            processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
            loss = total / num_items_in_batch * processes  # gradients are averaged over processes: undone here
        return (loss, outputs) if return_outputs else loss

    def evaluation_loop(
        self,
        dataloader: torch.utils.data.DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """transformers', with the loss as a mean over all completion tokens instead of over the batches' means."""
        self._evaluated = []
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        sums = torch.tensor(self._evaluated, dtype=torch.float32, device=self.accelerator.device).sum(0)
        total, count = cast(torch.Tensor, self.accelerator.reduce(sums, reduction="sum")).tolist()
        cast(dict[str, float], output.metrics)[f"{metric_key_prefix}_loss"] = total / count
        return output

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """The recipe's optimizer, with a group of its own for the gate where it has its own learning rate."""
        fresh, target = self.optimizer is None, cast(torch.nn.Module, self.model if model is None else model)
        optimizer = super().create_optimizer(model)
        if fresh and self.gate_learning_rate is not None:
            split_gate_group(optimizer, target, self.gate_learning_rate)
        return optimizer

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        strategy = self.args.train_sampling_strategy
        if strategy not in ("random", "group_by_length") or not isinstance(dataset, TokenizedExamples):
            return super()._get_train_sampler(train_dataset)
        seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
        # one optimizer step: batches go round the processes
        group = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        # state.epoch is exact at the beginning of every epoch, resumed or not
        return EpochSampler(
            dataset.lengths, group if strategy == "group_by_length" else 0, seed, lambda: int(self.state.epoch or 0)
        )

    def _get_eval_sampler(self, eval_dataset: Any) -> torch.utils.data.Sampler | None:
        return torch.utils.data.SequentialSampler(eval_dataset)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the padding share and, for an instance-wise adapter, the gate's entropy and mean expert weights."""
        if "loss" in logs:
            self._check_finite(logs["loss"])
            logs |= self._seen.padding()
            if self._reads_history and self._seen.histories:
                logs |= gate_statistics(self._gate_weights(self._seen.histories))
            self._seen = Seen()
        super().log(logs, start_time)

    def _check_finite(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise UserError(
                f"the loss is {loss} at step {self.state.global_step}: lower train.learning_rate "
                f"(now {self.args.learning_rate:g}) or adapter.gate.learning_rate, or raise train.warmup_steps"
            )

    @torch.no_grad()
    def _gate_weights(self, histories: list[torch.Tensor]) -> torch.Tensor:
        """(N, K) weights, by the gate as it is now, of the rows seen since the last log (of this process)."""
        model = self.accelerator.unwrap_model(self.model)
        return torch.cat([gate_weights(model, history).cpu() for history in histories])

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        # In place: other processes already write their random states there, and a swap of folders would lose them
        folder = Path(str(output_dir or self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MARKER).unlink(missing_ok=True)
        write_adapter(self.accelerator.unwrap_model(self.model), folder, state_dict=state_dict)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()  # every rank has written its random state
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
            files.write_json(folder / MARKER, {"fingerprint": self.fingerprint, "files": _sizes(folder)})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        load_weights(self.accelerator.unwrap_model(model or self.model), Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        load_weights(self.accelerator.unwrap_model(self.model), Path(str(self.state.best_model_checkpoint)))


class Seen:
    """What went through the model since the last log."""

    def __init__(self) -> None:
        self.tokens, self.padding_tokens = 0, 0
        self.histories: list[torch.Tensor] = []

    def add(self, inputs: dict[str, Any]) -> None:
        """Count one micro-batch."""
        mask = inputs["attention_mask"]
        self.tokens += mask.numel()
        self.padding_tokens += mask.numel() - int(mask.sum())
        if "history_items" in inputs:
            self.histories.append(inputs["history_items"])

    def padding(self) -> dict[str, float]:
        """Share of positions that were padding."""
        return {"padding_share": self.padding_tokens / self.tokens} if self.tokens else {}


def completion_loss(logits: torch.Tensor, labels: torch.Tensor, smoothing: float = 0.0) -> tuple[torch.Tensor, int]:
    """Summed cross-entropy in nats (fp32) and the number of tokens that it runs over.

    logits (B, n, V) of the last n positions; labels (B, T), -100 without loss. Position t predicts label t + 1.
    """
    wanted = labels[:, -(logits.shape[1] - 1) :]  # (B, n - 1)
    carries = wanted != IGNORE
    total = functional.cross_entropy(
        logits[:, :-1][carries].float(), wanted[carries], reduction="sum", label_smoothing=smoothing
    )
    return total, int(carries.sum())


def split_gate_group(optimizer: torch.optim.Optimizer, model: torch.nn.Module, learning_rate: float) -> None:
    """Move the gate's parameters into groups of their own with their own learning rate."""
    gate = {id(p) for name, p in model.named_parameters() if GATE in name and p.requires_grad}
    if not gate:
        raise RuntimeError(f'no trainable parameter has "{GATE}" in its name, but the recipe sets gate.learning_rate')
    for group in list(optimizer.param_groups):
        moved = [p for p in group["params"] if id(p) in gate]
        if moved:
            group["params"] = [p for p in group["params"] if id(p) not in gate]
            options = {name: value for name, value in group.items() if name != "params"}
            optimizer.add_param_group({**options, "params": moved, "lr": learning_rate})


def gate_statistics(weights: torch.Tensor) -> dict[str, float]:
    """Mean entropy a row in nats, and the mean weight of each expert, of (N, K) gate weights.

    >>> gate_statistics(torch.tensor([[1.0, 0.0]]))
    {'gate_entropy': 0.0, 'expert_0': 1.0, 'expert_1': 0.0}
    """
    entropy = torch.special.entr(weights.double()).sum(-1).mean()
    means = {f"expert_{k}": float(mean) for k, mean in enumerate(weights.mean(0))}
    return {"gate_entropy": float(entropy), **means}


def last_checkpoint(folder: Path, fingerprint: str, processes: int = 1) -> Path | None:
    """The newest complete checkpoint of this very run, or None; what is passed over is said in a warning."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    for checkpoint in found:
        fault = _fault(checkpoint, fingerprint, processes)
        if fault is None:
            return checkpoint
        warnings.warn(f"{checkpoint} is passed over: {fault}", stacklevel=2)
    return None


def _fault(checkpoint: Path, fingerprint: str, processes: int) -> str | None:
    if not (checkpoint / MARKER).is_file():
        return "it was cut off while being written"
    marker = files.read_json(checkpoint / MARKER, "the marker of a complete checkpoint")
    if marker["fingerprint"] != fingerprint:
        return "it belongs to another recipe, dataset, encoder or number of processes"
    if marker["files"] != _sizes(checkpoint):
        return "its files have other sizes than when it was written"
    for patterns in _needed(checkpoint, processes):
        if not any(any(checkpoint.glob(pattern)) for pattern in patterns):
            return f"it has no {patterns[0]}, without which the run would go on differently"
    return None


def _needed(checkpoint: Path, processes: int) -> list[tuple[str, ...]]:
    """What an exact resume reads; of each entry one file or folder."""
    states = ["rng_state.pth"] if processes == 1 else [f"rng_state_{rank}.pth" for rank in range(processes)]
    own_scheduler = any(checkpoint.glob("global_step*"))  # DeepSpeed may keep it with its optimizer
    schedulers = [] if own_scheduler else [("scheduler.pt",)]
    return [OPTIMIZERS, *schedulers, ("trainer_state.json",), *((name,) for name in states)]


def _sizes(folder: Path) -> dict[str, int]:
    return {
        str(path.relative_to(folder)): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MARKER
    }
