"""What the scripts of this folder share: finished cells on disk, one training loop for all arms, paired tables.

A cell is one trained arm under one seed and setting. Its key and what it measured on each held-out example enter a
JSONL file, a line a cell; a run that was stopped skips the lines that are there. The training loop is light on purpose:
every arm sees the same batches in the same order, and what the gate is given may be any table by example (oracle,
shuffled).
"""

import fcntl
import functools
import itertools
import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from recllm import __version__
from recllm.evaluate.evaluation import machine
from recllm.evaluate.statistics import bootstrap_means, holm, paired_differences
from recllm.train.collator import IGNORE, Collator, TokenizedExamples
from recllm.train.trainer import EpochSampler, completion_loss

Tables = dict[str, torch.Tensor]  # "representation" (N, D) or "gate_weights" (N, K), a row an example; {} of plain LoRA
Cell = dict[str, Any]
GUIDES = ("base_model.gate.", "base_model.soft_token.")  # beginnings of the names of what reads a representation


class Cells:
    """Finished cells in a JSONL file. Several processes may add; a line that was cut off is passed over."""

    def __init__(self, path: Path, names: Sequence[str]) -> None:
        """`names` are the fields that identify a cell."""
        self.path, self.names = Path(path), tuple(names)

    def read(self) -> dict[tuple[Any, ...], Cell]:
        """Key → cell; the newest of a key counts."""
        found = {}
        for line in self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else ():
            try:
                cell = json.loads(line)
                found[tuple(cell[name] for name in self.names)] = cell
            except (json.JSONDecodeError, KeyError, TypeError):
                continue  # the last line of a killed run
        return found

    def add(self, cell: Cell) -> None:
        """Append one cell in one write, behind a newline where a killed run left half a line."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            end = file.seek(0, os.SEEK_END)
            broken = bool(end) and (file.seek(end - 1) >= 0 and file.read(1) != b"\n")
            file.write(b"\n" * broken + json.dumps(cell, separators=(",", ":")).encode() + b"\n")


# ---- training and scoring ----


class Plan(NamedTuple):
    """How an adapter is fitted; the same for all arms."""

    steps: int
    batch_size: int
    learning_rate: float
    gate_learning_rate: float
    seed: int
    warmup: int = 10


def fit(
    model: Any, examples: TokenizedExamples, collator: Collator, tables: Tables, plan: Plan, label: str = ""
) -> dict[str, float]:
    """Train whatever requires a gradient, in place: AdamW, cosine to zero after a linear warm-up, clipped at norm 1.

    The order of batches hangs on the plan's seed alone. Returns the loss a token over the last tenth of the steps, and
    the seconds of a step.
    """
    device = next(model.parameters()).device
    model.train()
    optimizer = torch.optim.AdamW(_groups(model, plan), weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, [lambda step: _rate(step, plan)] * len(optimizer.param_groups)
    )
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    losses, seconds = [], []
    batches = itertools.islice(_training_batches(examples, plan), plan.steps)
    for rows in tqdm(batches, total=plan.steps, desc=label, unit="step", disable=not label, mininterval=5):
        started = time.perf_counter()
        batch = _batch(examples, collator, tables, rows, device)
        labels = batch.pop("labels")
        total, count = completion_loss(model(**batch, use_cache=False).logits, labels)
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(float(total.detach()) / count)
        seconds.append(time.perf_counter() - started)
    if not math.isfinite(losses[-1]):
        raise RuntimeError(f"{label}: the loss is {losses[-1]} after {plan.steps} steps: lower the learning rate")
    return {"loss": float(np.mean(losses[-max(1, plan.steps // 10) :])), "step_s": float(np.median(seconds))}


@torch.no_grad()
def same_start(model: Any, seed: int) -> None:
    """Draw every LoRA A anew from the seed and its place alone: arms of one rank then start from the same weights.

    Built one after the other they would not, as a gate draws random numbers before them. An interval over users does
    not hold that chance.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        if ".lora_A." in name:
            bound = 1 / math.sqrt(parameter.shape[1])  # PEFT's: kaiming_uniform_ with a = √5
            parameter.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))


def _groups(model: Any, plan: Plan) -> list[dict[str, Any]]:
    """Parameters with the plan's rate, and those of a gate or a soft token's projection with the gate's."""
    guided: list[Any] = []
    plain: list[Any] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (guided if name.startswith(GUIDES) else plain).append(parameter)
    groups = [{"params": plain, "lr": plan.learning_rate}, {"params": guided, "lr": plan.gate_learning_rate}]
    return [group for group in groups if group["params"]]


def _rate(step: int, plan: Plan) -> float:
    if step < plan.warmup:
        return (step + 1) / plan.warmup
    return 0.5 * (1 + math.cos(math.pi * (step - plan.warmup) / max(1, plan.steps - plan.warmup)))


def _training_batches(examples: TokenizedExamples, plan: Plan) -> Iterator[list[int]]:
    """Whole batches of examples of like length, epoch after epoch."""
    for epoch in itertools.count():
        order = list(EpochSampler(examples.lengths, plan.batch_size, plan.seed, functools.partial(int, epoch)))
        for start in range(0, max(1, len(order) - plan.batch_size + 1), plan.batch_size):
            yield order[start : start + plan.batch_size]


def _batch(
    examples: TokenizedExamples, collator: Collator, tables: Tables, rows: Sequence[int], device: torch.device
) -> dict[str, Any]:
    batch = collator([examples[row] for row in rows])
    batch |= {name: table[list(rows)] for name, table in tables.items()}
    return {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}


@torch.inference_mode()
def score(
    model: Any, examples: TokenizedExamples, collator: Collator, tables: Tables, batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Nats (N,) of each example's completion, terminator included, and whether greedy decoding gives it (N,)."""
    device = next(model.parameters()).device
    model.eval()
    nats, hits = np.empty(len(examples)), np.empty(len(examples), dtype=bool)
    order = np.argsort(examples.lengths, kind="stable")
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size].tolist()
        batch = _batch(examples, collator, tables, rows, device)
        wanted = batch.pop("labels")[:, -(batch["logits_to_keep"] - 1) :]  # (B, n)
        logits = model(**batch, use_cache=False).logits[:, :-1].float()  # (B, n, V)
        costs = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), wanted.flatten(), reduction="none", ignore_index=IGNORE
        )
        nats[rows] = costs.view(wanted.shape).double().sum(1).cpu().numpy()
        hits[rows] = ((logits.argmax(-1) == wanted) | (wanted == IGNORE)).all(1).cpu().numpy()
    return nats, hits


def trained_parameters(model: Any) -> int:
    """How many numbers of a model are trained."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


# ---- tables ----


def interval(cells: Sequence[Cell], name: str = "nats") -> str:
    """Mean over all examples of some cells with its 95% interval over users."""
    values, users = _pooled(cells, name)
    found = bootstrap_means(values[:, None], users, np.random.default_rng(0))[0]
    return f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}]"


class Against(NamedTuple):
    """An arm against another on the same examples, pooled over seeds."""

    difference: float
    low: float
    high: float
    p_value: float
    by_seed: list[float]

    def text(self, p_holm: float | None = None) -> str:
        """For a table: difference, interval, p, and each seed's own difference."""
        p_value = "" if p_holm is None else f", p {p_holm:.4f}"
        seeds = " ".join(f"{value:+.3f}" for value in self.by_seed)
        return f"{self.difference:+.3f} [{self.low:+.3f}, {self.high:+.3f}]{p_value} | {seeds}"


def against(arm: Sequence[Cell], other: Sequence[Cell], name: str = "nats") -> Against | None:
    """Paired difference arm − other over the seeds that both have; None where there is none."""
    others = {cell["seed"]: cell for cell in other}
    pairs = [(cell, others[cell["seed"]]) for cell in arm if cell["seed"] in others]
    if not pairs:
        return None
    for a, b in pairs:
        if a["users"] != b["users"]:
            raise RuntimeError(
                f"cells {a['arm']} and {b['arm']} of seed {a['seed']} have other examples: run one again"
            )
    values, users = _pooled([a for a, _ in pairs], name)
    gaps = values - _pooled([b for _, b in pairs], name)[0]
    found = paired_differences(gaps[:, None], users, np.random.default_rng(0))[0]
    seeds = [float(np.average(np.subtract(a[name], b[name]), weights=_titles(a))) for a, b in pairs]
    return Against(*found, seeds)


def _pooled(cells: Sequence[Cell], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Values a title and users of cells; an example of n titles counts n times.

    A user of another seed is another one, unless the cells say that all seeds have the same people.
    """
    values = np.concatenate([np.repeat(np.array(cell[name], float), _titles(cell)) for cell in cells])
    other = [0 if cell.get("same_people") else 10_000_000 * n for n, cell in enumerate(cells)]
    users = [np.repeat(np.array(cell["users"]), _titles(cell)) + first for cell, first in zip(cells, other)]
    return values, np.concatenate(users)


def _titles(cell: Cell) -> list[int]:
    return list(cell.get("titles", [1] * len(cell["users"])))


def comparison_rows(arms: dict[str, list[Cell]], reference: str, extra: Sequence[str] = ()) -> list[list[str]]:
    """Rows of a table: arm, figures, difference to `reference` with Holm's p over the arms, difference by seed."""
    found = {arm: against(cells, arms[reference]) for arm, cells in arms.items() if arm != reference and cells}
    adjusted = dict(zip(found, holm([gap.p_value if gap else math.nan for gap in found.values()])))
    rows = []
    for arm, cells in arms.items():
        if not cells:
            continue
        gap = found.get(arm)
        difference, seeds = gap.text(adjusted[arm]).split(" | ") if gap else ("", "")
        figures = [interval(cells), *(f"{np.mean(_pooled(cells, name)[0]):.3f}" for name in extra)]
        parameters = cells[0].get("parameters")
        rows.append([arm, *figures, difference, seeds, "" if parameters is None else str(parameters)])
    return rows


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def machine_line(cells: Iterable[Cell]) -> str:
    """What kind of machines made the cells, and with which version: no names, no paths."""
    kinds = sorted({cell["machine"] for cell in cells})
    return f"Machine: {'; '.join(kinds)}. recllm {__version__}."


def this_machine(device: str) -> str:
    """The kind of this machine for a cell."""
    found = machine()
    name = found["torch_device"] if device.startswith("cuda") else found["processor"]
    return f"{found['cpu_count']} CPU cores, {name}, torch {torch.__version__}"
