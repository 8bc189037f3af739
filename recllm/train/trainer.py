"""The trainer: transformers.Trainer with our loss, learning rates, logging, data order and checkpoints.

An adapter model, training arguments and tokenised examples enter; a trained adapter (in place) and checkpoints leave.
A checkpoint is a usable adapter folder with optimizer, scheduler, random and trainer state beside the weights.
"""

import math
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from peft.helpers import disable_input_dtype_casting
from torch.distributed.tensor.experimental import implicit_replication
from torch.nn import functional
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import EvalLoopOutput

from recllm import files
from recllm.errors import UserError
from recllm.model.adapter import has_gate, load_weights, write_adapter
from recllm.model.gate import collapse, load_balancing_loss
from recllm.model.ilora import GateRows
from recllm.train import engines
from recllm.train.collator import IGNORE, TokenizedExamples, without_loss
from recllm.train.dro import DRO, GroupDro
from recllm.train.order import order_of
from recllm.train.streaming import StreamedExamples
from recllm.train.weights import TokenWeights

MARKER = "checkpoint.json"  # written last: a checkpoint without it was cut off while being written
OPTIMIZERS = ("optimizer.pt", "optimizer.bin", "optimizer_*", "global_step*")  # alone and DDP; FSDP; FSDP; DeepSpeed
# In the names of the parameters of each and of no others (a router of the base model is base_model.model…gate)
GATE, SOFT_TOKEN, ENCODER = "base_model.gate.", "base_model.soft_token.", "base_model.sequence_encoder."
STATE = "trainer_state.json"
GATE_ROWS = 16_384  # of each process; the statistics of a log are over the last so many users
COLLAPSE_ROWS = 16  # of fewer users a gate's collapse is not told: they may well be alike


class EpochSampler(torch.utils.data.Sampler[int]):
    """Order of an epoch from (seed, epoch) alone, so that a resumed run sees the order of an uninterrupted one.

    transformers' own length-grouped sampler draws from the global generator, whose state a resumed run no longer has
    at the beginning of the epoch. It also leaves the batches sorted by length, so that every 50th step would see the
    shortest examples only, which in dense data are those with an empty history.
    """

    def __init__(
        self, lengths: np.ndarray, group_size: int, seed: int, epoch: Callable[[], int], whole: int = 1
    ) -> None:
        """`group_size` > 0: examples of like length stand together in groups of that size; 0: plainly shuffled.

        The order is filled up to a multiple of `whole` with examples without loss, so that several processes get
        equally many batches and yet every example counts once an epoch.
        """
        self.lengths, self.group_size, self.seed, self.epoch, self.whole = lengths, group_size, seed, epoch, whole

    def __len__(self) -> int:
        """Number of examples, those without loss among them."""
        return -(-len(self.lengths) // self.whole) * self.whole

    def __iter__(self) -> Iterator[int]:
        return iter(filled_up(self._order(), self.whole))

    def _order(self) -> list[int]:
        epoch = self.epoch()
        generator = np.random.default_rng([self.seed, epoch])
        return order_of(self.lengths, self.group_size, generator, longest_first=epoch == 0)


def filled_up(order: list[int], whole: int) -> list[int]:
    """The order with examples without loss at its end, up to a multiple of `whole`.

    >>> filled_up([4, 7, 5], 2)
    [4, 7, 5, -6]
    """
    return order + [without_loss(order[-1])] * (-len(order) % whole) if order else order


class AdapterTrainer(Trainer):
    """transformers.Trainer for plain LoRA, instance-wise LoRA, and LoRA beside a soft token."""

    def __init__(
        self,
        *args: Any,
        learning_rates: dict[str, float] | None = None,
        balance: float = 0.0,
        fingerprint: str = "",
        compute_dtype: torch.dtype | None = None,
        weights: TokenWeights | None = None,
        dro: GroupDro | None = None,
        first_log: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """See transformers.Trainer, and:

        Args:
            args: as transformers.Trainer.
            learning_rates: own rates of the parameters that have GATE, SOFT_TOKEN or ENCODER in their names.
            balance: weight of the gate's load-balancing loss over the whole batch of an optimizer step, whatever its
                number of processes. Its value does not depend on gradient accumulation either, but its gradient does:
                a micro-batch is pulled towards balance of what the step has seen so far, not of what is to come.
            fingerprint: written into checkpoints; a run resumes from those with its own only.
            compute_dtype: matrix products run in it by torch.autocast, the adapter's too, whose weights stay in fp32;
                None leaves that to train.bf16 and train.fp16.
            weights: what the tokens of the training examples count, which must be numbered; None: all the same.
            dro: weighs the groups that `weights` has.
            first_log: of a run that begins, an entry of the log at step 0.
            kwargs: as transformers.Trainer.

        Raises:
            UserError: balance over micro-batches of one row: see check_balance.
        """
        super().__init__(*args, **kwargs)
        if self.is_deepspeed_enabled:
            engines.keep_adapter_fp32(self.accelerator.state.deepspeed_plugin.deepspeed_config, compute_dtype)
        self.autocasts = compute_dtype is not None or self.args.bf16
        self.compute_dtype = None if self.is_deepspeed_enabled else compute_dtype
        self.learning_rates, self.balance, self.fingerprint = learning_rates or {}, balance, fingerprint
        self.engine = engines.asked_engine(self.args)
        self.model_accepts_loss_kwargs = True  # compute_loss divides by num_items_in_batch: it must be counted
        # the same object whatever wraps the model later
        tuner: Any = getattr(self.model, "base_model", None)
        self._gate_rows: GateRows | None = tuner.gate_rows if has_gate(self.model) else None
        self._seen, self._told_of_collapse = Seen(), False
        check_balance(self.balance, self.args)
        self._step_rows: torch.Tensor | None = None  # rows with loss in the current optimizer step, all processes
        self._before: tuple[torch.Tensor, torch.Tensor] | None = None  # summed gates and rows of its micro-batches
        self._evaluated: list[tuple[float, int]] = []  # summed loss and tokens of each batch of an evaluation
        self.weights = None if weights is None else weights.to(self.args.device)
        self.dro, self.first_log = dro, first_log or {}
        self._step_weight: torch.Tensor | None = None  # of all tokens in the current optimizer step, all processes
        self._step_groups: torch.Tensor | None = None  # (2, G): weighted nats and weight of each group in it, so far
        self._batches_left = 0  # in the current optimizer step
        if isinstance(self.train_dataset, StreamedExamples):
            self.train_dataset.epoch = self._epoch

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """transformers'. PEFT would cast what enters the adapter to fp32, only for autocast to cast it back."""
        casting = disable_input_dtype_casting(cast(torch.nn.Module, self.model), self.autocasts)
        with casting, without_cudnn_attention():
            return super().train(*args, **kwargs)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Cross-entropy in fp32 over completion tokens, a mean over all of them in one optimizer step.

        The sum over this micro-batch is divided by `num_items_in_batch`, the count over all accumulated micro-batches
        and processes (in an evaluation, that of the batch); without it by its own count. With weights it is the
        weighted mean, in training only: an evaluation tells the plain one.
        """
        inputs = dict(inputs)
        labels, examples = inputs.pop("labels"), inputs.pop("examples", None)
        with computing_in(self.compute_dtype, self.accelerator.device.type):
            outputs = model(**inputs, use_cache=False)
        smoothing = self.args.label_smoothing_factor if model.training else 0.0
        if model.training and self.weights is not None:
            loss = self._weighted_loss(outputs.logits, labels, examples, smoothing, num_items_in_batch is not None)
        else:
            loss = self._mean_loss(outputs.logits, labels, smoothing, num_items_in_batch, model.training)
        if model.training:
            gates = self._gates(labels)
            self._seen.add(inputs["attention_mask"], gates)
            if self.balance and gates is not None:
                loss = loss + self.balance * self._balance_loss(gates)
        return (loss, outputs) if return_outputs else loss

    def _mean_loss(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        smoothing: float,
        num_items_in_batch: torch.Tensor | int | None,
        training: bool,
    ) -> torch.Tensor:
        total, count = completion_loss(logits, labels, smoothing)
        if not training:
            self._evaluated.append((float(total.detach()), count))
        if num_items_in_batch is None:
            return total / max(count, 1)
        processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return total / num_items_in_batch * processes  # gradients are averaged over processes: undone here

    def _weighted_loss(
        self, logits: torch.Tensor, labels: torch.Tensor, examples: torch.Tensor, smoothing: float, in_step: bool
    ) -> torch.Tensor:
        """Σ w · nats over this micro-batch, by Σ w of the whole step (of this micro-batch unless `in_step`).

        Of group distributionally robust optimisation each token counts by its group too, and the step's last
        micro-batch brings the groups' weights up to date: all processes then come together.
        """
        weights = cast(TokenWeights, self.weights)
        nats, rows, places = token_losses(logits, labels, smoothing)
        rows = examples.to(rows.device)[rows]  # (M,): the example of each token
        token_weights = weights.of(rows, places)
        counted = token_weights
        if self.dro is not None and weights.groups is not None:
            of_group = weights.groups[rows]
            self._add_to_groups(of_group, nats.detach(), token_weights)
            factors = torch.from_numpy(self.dro.factors).to(token_weights)
            counted = token_weights * factors[of_group]
        whole = self._step_weight if in_step and self._step_weight is not None else token_weights.double().sum()
        processes = self.accelerator.num_processes if in_step else 1  # gradients are averaged over processes
        loss = (counted * nats).sum() / whole.clamp(min=torch.finfo(torch.float32).tiny).float() * processes
        self._batches_left -= 1
        if self._batches_left == 0 and self.dro is not None and self._step_groups is not None:
            groups = cast(torch.Tensor, self.accelerator.reduce(self._step_groups, reduction="sum"))
            self.dro.update(*groups.cpu().numpy())
        return loss

    def _add_to_groups(self, groups: torch.Tensor, nats: torch.Tensor, weights: torch.Tensor) -> None:
        parts = torch.stack([nats.double() * weights, weights.double()])  # (2, M)
        before = self._step_groups
        if before is None:
            before = parts.new_zeros(2, len(cast(GroupDro, self.dro).groups.names))
        self._step_groups = before.index_add(1, groups, parts)

    def _gates(self, labels: torch.Tensor) -> torch.Tensor | None:
        """The gate weights of the forward that has just run, with gradient, of the rows that carry loss."""
        if self._gate_rows is None or not self._gate_rows.weights:
            return None
        (weights,) = self._gate_rows.weights.values()
        return weights[(labels != IGNORE).any(dim=1).to(weights.device)]

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """transformers', which reads all micro-batches of an optimizer step: their rows, or weights, are counted."""
        batches, count = super().get_batch_samples(*args, **kwargs)
        if self.weights is not None:
            own = [self._weight_of(self.weights, batch) for batch in batches]
            self._step_weight, self._step_groups, self._batches_left = self._sum(sum(own))[0], None, len(batches)
        if self.balance and self._gate_rows is not None:
            rows = sum(int((batch["labels"] != IGNORE).any(dim=1).sum()) for batch in batches)
            self._step_rows, self._before = self._sum(rows)[0].float(), None
            self._seen.balance_steps += 1
        return batches, count

    def _weight_of(self, weights: TokenWeights, batch: dict[str, Any]) -> torch.Tensor:
        """The summed weight of a micro-batch's tokens; examples without loss have none."""
        device = weights.answer.device
        tokens = (batch["labels"] != IGNORE).sum(dim=1).to(device)
        return weights.sums(batch["examples"].to(device), tokens).sum()

    def _balance_loss(self, gates: torch.Tensor) -> torch.Tensor:
        """This micro-batch's share of the load-balancing loss of the whole step; all processes call it.

        With L(m) the loss of a mean gate m, and m_j the mean over the n_j rows that all processes have seen up to the
        step's micro-batch j, the share is (n_j L(m_j) − n_i L(m_i)) / N, i = j − 1, N the rows of the step: the shares
        add up to the loss of the step, whatever the cut. Other processes and micro-batches have no gradient here.
        """
        own = gates.float().sum(dim=0)  # (K,) or (layers, K)
        mine = torch.cat([own.detach().flatten(), own.new_tensor([len(gates)])])
        total = cast(torch.Tensor, self.accelerator.reduce(mine, reduction="sum"))
        before, rows = self._before or (torch.zeros_like(own), own.new_zeros(()))
        gate_sum, row_sum = before + total[:-1].view_as(own), rows + total[-1]
        self._before = gate_sum.detach(), row_sum
        # gradients are averaged over processes: undone by the factor, which the value does not have
        differentiable = gate_sum + (own - own.detach()) * self.accelerator.num_processes
        share = _balance(differentiable, row_sum) - _balance(before, rows)
        share = share / (row_sum if self._step_rows is None else self._step_rows.to(share.device)).clamp(min=1)
        self._seen.balance = self._seen.balance + share.detach()
        return share

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
        """The recipe's optimizer, with groups of their own for parameters that have their own learning rate."""
        fresh, target = self.optimizer is None, cast(torch.nn.Module, self.model if model is None else model)
        optimizer = super().create_optimizer(model)
        if fresh:
            for part, learning_rate in self.learning_rates.items():
                split_group(optimizer, target, part, learning_rate)
        return optimizer

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_for_training(*args, **kwargs)
        engines.check_engine(self.engine, self.model_wrapped)
        engines.limit_waiting(self.args.ddp_timeout_delta)  # of the engine's own groups too
        return prepared

    def _epoch(self) -> int:
        return int(self.state.epoch or 0)  # exact at the beginning of every epoch, resumed or not

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        """transformers'; of streamed examples one that accelerate does not split: each process has its own rows."""
        if not isinstance(self.train_dataset, StreamedExamples):
            return super().get_train_dataloader()
        return torch.utils.data.DataLoader(
            self.train_dataset,
            batch_size=self.args.train_batch_size,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            prefetch_factor=self.args.dataloader_prefetch_factor,
        )

    def num_examples(self, dataloader: torch.utils.data.DataLoader) -> int:
        """transformers', which logs it: of all processes."""
        dataset = dataloader.dataset
        return dataset.num_examples if isinstance(dataset, StreamedExamples) else super().num_examples(dataloader)

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        strategy = self.args.train_sampling_strategy
        if strategy not in ("random", "group_by_length") or not isinstance(dataset, TokenizedExamples):
            return super()._get_train_sampler(train_dataset)
        seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
        # one optimizer step: batches go round the processes
        group = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return EpochSampler(
            dataset.lengths,
            group if strategy == "group_by_length" else 0,
            seed,
            self._epoch,
            self._at_once(self.args.train_batch_size),
        )

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        return filled_up(list(range(len(eval_dataset))), self._at_once(self.args.eval_batch_size))

    def _at_once(self, batch_size: int) -> int:
        """Rows that all processes read together; alone, a last batch may be smaller."""
        return batch_size * self.args.world_size if self.args.world_size > 1 else 1

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the padding share, what an instance-wise adapter's gate does, and groups; over all processes."""
        if "loss" in logs:
            self._check_finite(logs["loss"])
            logs |= self._over_all_processes(self._seen)
            logs |= {} if self.dro is None else self.dro.logged()
            self._seen = Seen()
        super().log(logs, start_time)

    @torch.no_grad()
    def _over_all_processes(self, seen: "Seen") -> dict[str, float]:
        if not seen.places:
            return {}
        real, places, balance, steps = self._sum(seen.real, seen.places, seen.balance, seen.balance_steps).tolist()
        found = {"padding_share": 1 - real / places}
        if not seen.gates:
            return found
        weights = self._gather(torch.cat(seen.gates))
        if steps:
            found["gate_balance_loss"] = balance / steps
        if len(weights):
            state = collapse(weights)
            found |= gate_statistics(weights) | collapse_statistics(state)
            self._tell_of_collapse(state)
        return found

    def _sum(self, *numbers: Any) -> torch.Tensor:
        mine = torch.stack([torch.as_tensor(n, device=self.accelerator.device, dtype=torch.float64) for n in numbers])
        return cast(torch.Tensor, self.accelerator.reduce(mine, reduction="sum"))

    def _gather(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows of all processes, which may differ in number; weights are never negative."""
        rows = rows.detach().float().to(self.accelerator.device)
        padded = cast(torch.Tensor, self.accelerator.pad_across_processes(rows, dim=0, pad_index=-1))
        gathered = cast(torch.Tensor, self.accelerator.gather(padded)).cpu()
        return gathered[(gathered >= 0).flatten(1).all(dim=1)]

    def _tell_of_collapse(self, state: dict[str, Any]) -> None:
        if not state["collapsed"] or state["num_users"] < COLLAPSE_ROWS or self._told_of_collapse:
            return
        self._told_of_collapse = True
        if self.is_world_process_zero():
            print(
                f"recllm: the gate has collapsed at step {self.state.global_step}: the strongest expert has "
                f"{state['largest_mean']:.2f} of the weight, and {state['stuck_experts']:.0%} of the experts are the "
                "same for nearly every user. Lower adapter.gate.learning_rate, raise adapter.gate.temperature, or set "
                "adapter.gate.balance (try 0.01)",
                file=sys.stderr,
            )

    def _check_finite(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise UserError(
                f"the loss is {loss} at step {self.state.global_step}: lower train.learning_rate "
                f"(now {self.args.learning_rate:g}) or adapter.gate.learning_rate, or raise train.warmup_steps"
            )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The adapter as a folder; all processes call it, the first one writes."""
        weights = engines.whole_weights(self.accelerator.unwrap_model(self.model))
        if self.args.should_save:
            self._save(output_dir, weights)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        # In place: other processes already write their random states there, and a swap of folders would lose them
        folder = Path(str(output_dir or self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MARKER).unlink(missing_ok=True)
        write_adapter(self.accelerator.unwrap_model(self.model), folder, state_dict=state_dict)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:  # transformers would delete older checkpoints before this one is complete
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()  # every rank has written its random state
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
            launch = {"processes": self.args.world_size, "engine": self.engine, "precision": self.args.mixed_precision}
            if self.dro is not None:
                files.write_json(folder / DRO, self.dro.document())
            files.write_json(folder / MARKER, {"fingerprint": self.fingerprint, **launch, "files": _sizes(folder)})
            best = self.state.best_model_checkpoint
            rotate(folder, limit, folder.parent / Path(best).name if best else None)

    def _init_training_state(self, max_steps: int, *args: Any) -> tuple[int, int]:
        """transformers', but the run's own logging_steps and save_steps, and a best checkpoint that is there.

        A run that begins has its first entry in the log, one that goes on the groups' weights of its checkpoint.
        """
        found = super()._init_training_state(max_steps, *args)
        self.state.compute_steps(self.args, max_steps)
        checkpoint = args[2]
        if checkpoint is not None:
            self.state.best_model_checkpoint = self._best_checkpoint(Path(checkpoint))
            if self.dro is not None:
                place = Path(checkpoint) / DRO
                self.dro.restore(files.read_json(place, "the groups' weights of a checkpoint"), str(place))
        elif self.first_log:
            self.state.log_history.append({**self.first_log, "epoch": 0.0, "step": 0})
        return found

    def _best_checkpoint(self, checkpoint: Path) -> str | None:
        """The best checkpoint of a resumed run: beside the one it goes on from, wherever the run was moved to."""
        stored = TrainerState.load_from_json(str(checkpoint / STATE)).best_model_checkpoint
        if stored is None:
            return None
        folder = checkpoint.parent / Path(stored).name
        fault = _fault(folder, self.fingerprint) if folder.is_dir() else "it is missing"
        if fault is None:
            return str(folder)
        if not self.args.load_best_model_at_end:
            return None
        raise UserError(
            f"{folder} is the best checkpoint so far, which train.load_best_model_at_end needs, but {fault}: put it "
            f"back, or move {checkpoint.parent} away to begin afresh"
        )

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """transformers', which asks whether the run has ended only after a step, and so goes beyond a finished run."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        if isinstance(self.train_dataset, StreamedExamples):  # transformers throws these batches away, unread
            goes_on = kwargs["resume_from_checkpoint"] is not None and kwargs["epoch"] == kwargs["epochs_trained"]
            batches = kwargs["steps_trained_in_current_epoch"] if goes_on else 0
            self.train_dataset.skip = batches * self.args.train_batch_size
        super()._run_epoch(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        with implicit_replication():  # FSDP2 has split the tensors that these whole ones are copied into
            load_weights(self.accelerator.unwrap_model(model or self.model), Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        if self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            self._load_from_checkpoint(str(self.state.best_model_checkpoint))


def check_balance(balance: float, arguments: TrainingArguments) -> None:
    """Refuse a load-balancing loss over micro-batches of one row.

    Raises:
        UserError: it would pull every single user's gate to be uniform.
    """
    if balance and arguments.train_batch_size * arguments.world_size < 2:
        raise UserError(
            f"adapter.gate.balance={balance:g} with one row a micro-batch would pull every user's gate to be uniform: "
            "set train.per_device_train_batch_size to 2 or more"
        )


def computing_in(dtype: torch.dtype | None, device_type: str) -> AbstractContextManager[Any]:
    """torch.autocast to `dtype`; of None a context that changes nothing, whatever autocast it stands in."""
    return nullcontext() if dtype is None else torch.autocast(device_type, dtype)


@contextmanager
def without_cudnn_attention() -> Iterator[None]:
    """Training within has gradients that are finite: cuDNN's attention is left out, PyTorch's other kernels do it.

    Its backward pass gives NaN on Hopper GPUs where a batch with a mask is 64, 192, 320, … tokens long (PyTorch 2.11 to
    2.13 at least, pytorch/pytorch issue 196678): nothing is wrong with the data or the learning rate then.
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


class Seen:
    """What went through the model of this process since the last log; sums stay on their device, unread."""

    def __init__(self) -> None:
        self.places = 0  # in batches, padding among them
        self.real: torch.Tensor | float = 0.0  # tokens that are no padding
        self.gates: list[torch.Tensor] = []  # (B, K) or (B, layers, K) each, GATE_ROWS and less than a batch more
        self.gate_rows = 0
        self.balance: torch.Tensor | float = 0.0  # load-balancing loss, summed over optimizer steps
        self.balance_steps = 0

    def add(self, mask: torch.Tensor, gates: torch.Tensor | None) -> None:
        """Count one micro-batch."""
        self.places += mask.numel()
        self.real = self.real + mask.sum()
        if gates is not None:
            self.gates.append(gates.detach())
            self.gate_rows += len(gates)
            while self.gate_rows - len(self.gates[0]) >= GATE_ROWS:
                self.gate_rows -= len(self.gates.pop(0))


def _balance(gate_sum: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Rows times the load-balancing loss of their mean gate; 0 without rows."""
    if not rows:
        return gate_sum.sum() * 0
    return rows * load_balancing_loss((gate_sum / rows)[None])


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


def token_losses(
    logits: torch.Tensor, labels: torch.Tensor, smoothing: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cross-entropy in nats (fp32), row and place within its completion of each of M tokens that carry loss: (M,).

    logits and labels as of `completion_loss`.
    """
    wanted = labels[:, -(logits.shape[1] - 1) :]  # (B, n - 1)
    carries = wanted != IGNORE
    nats = functional.cross_entropy(
        logits[:, :-1][carries].float(), wanted[carries], reduction="none", label_smoothing=smoothing
    )
    return nats, carries.nonzero()[:, 0], (carries.cumsum(dim=1) - 1)[carries]


def split_group(optimizer: torch.optim.Optimizer, model: torch.nn.Module, part: str, learning_rate: float) -> None:
    """Move the parameters with `part` in their names into groups of their own with their own learning rate."""
    own = {id(p) for name, p in model.named_parameters() if part in name and p.requires_grad}
    if not own:
        raise RuntimeError(f'no trainable parameter has "{part}" in its name, but the recipe sets its learning rate')
    for group in list(optimizer.param_groups):
        moved = [p for p in group["params"] if id(p) in own]
        if moved:
            group["params"] = [p for p in group["params"] if id(p) not in own]
            options = {name: value for name, value in group.items() if name != "params"}
            optimizer.add_param_group({**options, "params": moved, "lr": learning_rate})


def gate_statistics(weights: torch.Tensor) -> dict[str, float]:
    """Mean entropy a row in nats, and the mean weight of each expert, of (N, K) or (N, layers, K) gate weights.

    The entropy is that of a row's weights as shares of their sum, which for a softmax gate is 1.

    >>> gate_statistics(torch.tensor([[1.0, 0.0]]))
    {'gate_entropy': 0.0, 'expert_0': 1.0, 'expert_1': 0.0}
    """
    rows = weights.double().flatten(0, -2)  # (N · layers, K)
    shares = rows / rows.sum(-1, keepdim=True)
    means = {f"expert_{k}": float(mean) for k, mean in enumerate(rows.mean(0))}
    return {"gate_entropy": float(torch.special.entr(shares).sum(-1).mean()), **means}


def collapse_statistics(state: dict[str, Any]) -> dict[str, float]:
    """The document of gate.collapse as numbers for a log: its keys behind "gate_use_"."""
    return {f"gate_use_{key}": float(value) for key, value in state.items() if key != "num_users"}


def numbered(folder: Path) -> dict[Path, int]:
    """The folders checkpoint-N of a run with their steps; others beside them are somebody's own."""
    found = {path: re.fullmatch(r"checkpoint-(\d+)", path.name) for path in folder.glob("checkpoint-*")}
    return {path: int(match[1]) for path, match in found.items() if match and path.is_dir()}


def rotate(newest: Path, limit: int | None, best: Path | None) -> None:
    """Delete the oldest checkpoints beside the one just completed, incomplete ones first, so that `limit` are left.

    The newest and the best one stay. No limit, or one below 1: all stay.
    """
    if limit is None or limit < 1:
        return
    found, protected = numbered(newest.parent), {newest, best} - {None}
    rest = sorted(found.keys() - protected, key=lambda path: ((path / MARKER).is_file(), found[path]))
    for old in rest[: max(0, len(found) - max(limit, len(protected)))]:
        (old / MARKER).unlink(missing_ok=True)  # first: cut off here, it must not count as complete
        shutil.rmtree(old, ignore_errors=True)


def last_checkpoint(
    folder: Path,
    fingerprint: str,
    processes: int = 1,
    engine: str = engines.ALONE,
    precision: str = "no",
) -> Path | None:
    """The newest complete checkpoint of this very run, or None; what is passed over is said in a warning.

    Raises:
        UserError: it is this run's, but was written by another number of processes another engine, or in
            another mixed precision.
    """
    steps = numbered(folder)
    for checkpoint in sorted(steps, key=steps.__getitem__, reverse=True):
        fault = _fault(checkpoint, fingerprint)
        if fault is None:
            _check_launched_alike(checkpoint, processes, engine, precision)
            fault = _missing(checkpoint, processes)
        if fault is None:
            return checkpoint
        warnings.warn(f"{checkpoint} is passed over: {fault}", stacklevel=2)
    return None


def _fault(checkpoint: Path, fingerprint: str) -> str | None:
    if not (checkpoint / MARKER).is_file():
        return "it was cut off while being written"
    marker = files.read_json(checkpoint / MARKER, "the marker of a complete checkpoint")
    if marker["fingerprint"] != fingerprint:
        return "it belongs to another recipe, dataset or encoder"
    if marker["files"] != _sizes(checkpoint):
        return "its files have other sizes than when it was written"
    return None


def _missing(checkpoint: Path, processes: int) -> str | None:
    for patterns in _needed(checkpoint, processes):
        if not any(any(checkpoint.glob(pattern)) for pattern in patterns):
            return f"it has no {patterns[0]}, without which the run would go on differently"
    return None


def _check_launched_alike(checkpoint: Path, processes: int, engine: str, precision: str) -> None:
    """Optimizer and random states are split by process and engine: others would begin them anew, silently."""
    marker = files.read_json(checkpoint / MARKER, "the marker of a complete checkpoint")
    written = (marker["processes"], marker["engine"])
    if written != (processes, engine):
        raise UserError(
            f"{checkpoint} was written by {written[0]} processes under {written[1]}, this run has {processes} under "
            f"{engine}: launch as then (--num_processes, --config_file) to go on from it, or move {checkpoint.parent} "
            "away to begin afresh"
        )
    before = marker.get("precision", precision)  # absent from checkpoints of earlier versions
    if before != precision:
        raise UserError(
            f"{checkpoint} was written with mixed precision {before}, this run has {precision}: launch as then "
            f"(--mixed_precision, ACCELERATE_MIXED_PRECISION), or move {checkpoint.parent} away to begin afresh"
        )


def _needed(checkpoint: Path, processes: int) -> list[tuple[str, ...]]:
    """What an exact resume reads; of each entry one file or folder."""
    states = ["rng_state.pth"] if processes == 1 else [f"rng_state_{rank}.pth" for rank in range(processes)]
    own_scheduler = any(checkpoint.glob("global_step*"))  # DeepSpeed may keep it with its optimizer
    schedulers = [] if own_scheduler else [("scheduler.pt",)]
    return [OPTIMIZERS, *schedulers, (STATE,), *((name,) for name in states)]


def _sizes(folder: Path) -> dict[str, int]:
    return {
        str(path.relative_to(folder)): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MARKER
    }
