"""What the scripts of this folder share: finished cells on disk, one training loop for all arms, paired tables.

A cell is one trained arm under one seed and setting. Its key, its settings and what it measured on each held-out
example enter a JSONL file, a line a cell; a run that was stopped skips the lines that are there. The hash of the
settings is part of the key: cells of other settings are not taken for finished, and no table mixes them. The training
loop is light on purpose: every arm sees the same batches in the same order, and what the gate is given may be any table
by example (oracle, shuffled).
"""

import fcntl
import functools
import hashlib
import itertools
import json
import math
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import stats
from tqdm import tqdm

from recllm import files
from recllm.data.dataset import Dataset, pad_left
from recllm.errors import UserError
from recllm.evaluate.evaluation import machine
from recllm.evaluate.statistics import Difference, holm, paired_differences
from recllm.model.adapter import build_adapter
from recllm.model.base_model import load_base_model
from recllm.model.sequence_encoder import load_encoder
from recllm.recipe import AdapterSection, ModelSection, load_recipe
from recllm.train.collator import IGNORE, Collator, TokenizedExamples
from recllm.train.trainer import EpochSampler, completion_loss, computing_in, without_cudnn_attention

Tables = dict[str, torch.Tensor]  # "representation" (N, D) or "gate_weights" (N, K), a row an example; {} of plain LoRA
Cell = dict[str, Any]
OWN_SETTINGS = ("rates", "arm_version")  # of an arm: learning rates; counted up when what an arm is has changed
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


def settings_hash(settings: dict[str, Any]) -> str:
    """Ten hex digits that any other settings would change: for keys of cells and names of folders."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:10]


def of_current_arms(cells: Iterable[Cell], versions: dict[str, int]) -> list[Cell]:
    """Cells but for those of an arm as it was defined earlier; an arm that `versions` does not name has version 1."""
    return [c for c in cells if c["settings"]["arm_version"] == versions.get(c["arm"].split("@")[0], 1)]


def common_settings(cells: Iterable[Cell]) -> dict[str, Any]:
    """The settings of cells that enter one table; those of an arm alone (OWN_SETTINGS) may differ between arms.

    Raises:
        UserError: cells with different settings.
    """
    found: dict[str, Any] = {}
    for cell in cells:
        for name, value in cell["settings"].items():
            place = f"{name} of {cell['arm'].split('@')[0]}" if name in OWN_SETTINGS else name
            if found.setdefault(place, value) != value:
                raise UserError(
                    f"cells with {place} = {found[place]} and {value} are in one file: a table takes one of them. Give "
                    "each its own --work folder, or remove the lines of the other"
                )
    return {name: value for name, value in found.items() if " of " not in name}


# ---- running ----


def say(text: str) -> None:
    """To the standard error, at once."""
    print(text, file=sys.stderr, flush=True)


def per_title(cell: Cell) -> float:
    """Mean nats a title of one cell."""
    return float(np.average(cell["nats"], weights=cell["titles"]))


def moved_paths(recipe: str, old: str, new: str | Path) -> list[str]:
    """Overrides of a shipped recipe that find its files of the folder `old` in the folder `new`."""

    def moved(value: Any) -> Any:
        if isinstance(value, list) and value and all(isinstance(part, str) for part in value):
            parts = [moved(part) for part in value]
            return None if None in parts else parts
        is_there = isinstance(value, str) and value.startswith(f"{old}/")
        return str(Path(new) / value.removeprefix(f"{old}/")) if is_there else None

    def walk(section: dict[str, Any], place: str) -> Iterator[str]:
        for name, value in section.items():
            if isinstance(value, dict):
                yield from walk(value, f"{place}{name}.")
            elif (path := moved(value)) is not None:
                yield f"{place}{name}={json.dumps(path)}"

    return list(walk(load_recipe(recipe).model_dump(mode="json"), ""))


def at_once(runs: dict[str, list[str]], jobs: int, logs: Path) -> None:
    """This script again for each of some named runs with its own options, `jobs` at a time.

    A small model's steps leave most of a GPU idle.

    Raises:
        UserError: some failed; the others have gone on to their end.
    """
    logs.mkdir(parents=True, exist_ok=True)

    def start(name: str) -> int:
        log = logs / f"{name}.log"
        command = [sys.executable, *sys.argv, "--jobs", "1", *runs[name]]  # the last of an option counts
        with log.open("ab") as file:
            code = subprocess.run(command, stdout=file, stderr=file).returncode
        if code:
            say(f"exit code {code}, the others go on; {log}: …{log.read_text(errors='replace')[-400:]}")
        return code

    with ThreadPoolExecutor(jobs) as pool:
        codes = list(tqdm(pool.map(start, runs), total=len(runs), unit="run"))
    if any(codes):
        raise UserError(f"{sum(map(bool, codes))} of {len(runs)} runs failed: start again for the rest")


# ---- training and scoring ----


class Plan(NamedTuple):
    """How an adapter is fitted; the same for all arms."""

    steps: int
    batch_size: int
    learning_rate: float
    gate_learning_rate: float
    seed: int
    warmup: int = 10


@without_cudnn_attention()
def fit(
    model: Any, examples: TokenizedExamples, collator: Collator, tables: Tables, plan: Plan, label: str = ""
) -> dict[str, float]:
    """Train whatever requires a gradient, in place: AdamW, cosine to zero after a linear warm-up, clipped at norm 1.

    On a bf16 model the arithmetic is bf16 (autocast) over fp32 adapter weights, as in `recllm train`.

    The order of batches hangs on the plan's seed alone. Returns the loss a token over the last tenth of the steps, and
    the seconds of a step.
    """
    device = next(model.parameters()).device
    compute_dtype = torch.bfloat16 if model.dtype == torch.bfloat16 else None
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
        with computing_in(compute_dtype, device.type):
            logits = model(**batch, use_cache=False).logits
        total, count = completion_loss(logits, labels)
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(float(total.detach()) / count)
        seconds.append(time.perf_counter() - started)
        if not math.isfinite(losses[-1]):
            raise RuntimeError(f"{label}: the loss is {losses[-1]} at step {len(losses)}: lower the learning rate")
    return {"loss": float(np.mean(losses[-max(1, plan.steps // 10) :])), "step_s": float(np.median(seconds))}


def fresh_adapter(
    base: ModelSection, section: AdapterSection, encoder: Path | None, seed: int, device: str, checkpointing: bool
) -> Any:
    """An adapter before its first step, on the device; every arm of a seed starts from the same LoRA weights."""
    torch.manual_seed(seed)
    model, _ = load_base_model(base)
    model = build_adapter(model, section, None if encoder is None else load_encoder(encoder)[0]).to(device)
    same_start(model, seed)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


@torch.no_grad()
def states(
    encoder_folder: Path, dataset: Dataset, examples: TokenizedExamples, max_items: int | np.ndarray, device: str
) -> torch.Tensor:
    """(N, D): what the encoder says of all that the gate may read: the newest `max_items`, of all examples or (N,)."""
    encoder, _ = load_encoder(encoder_folder)
    encoder.to(device)
    found = torch.empty(len(examples), encoder.hidden_size)
    limits = np.broadcast_to(max_items, len(examples))
    order = np.argsort(np.minimum(examples.gate_ends, limits), kind="stable")
    for start in range(0, len(order), 256):
        rows = order[start : start + 256]
        asked = zip(examples.user_indices[rows].tolist(), examples.gate_ends[rows].tolist(), limits[rows].tolist())
        histories = [dataset.read(*one) for one in asked]
        items = torch.from_numpy(pad_left(histories)).to(device)
        found[torch.from_numpy(rows)] = encoder(items).float().cpu()
    return found


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


def first_rows(examples: TokenizedExamples, count: int) -> TokenizedExamples:
    """The first examples, for estimates."""
    rows = [examples[row] for row in range(count)]
    tokens = np.concatenate([row.input_ids for row in rows])
    columns = [np.array([len(row.input_ids) for row in rows])]
    columns += [
        np.array(part)[:count] for part in (examples.completion_tokens, examples.user_indices, examples.gate_ends)
    ]
    return TokenizedExamples(tokens, *columns)


def rows_of_others(users: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """For each example (N,) the row of an example of another user, drawn anew for every example.

    A user has no fixed partner: what a table says in these rows tells nothing of who is asking.
    """
    if len(np.unique(users)) < 2:
        raise RuntimeError("all examples are of one user: nobody to take a row from")
    rows = rng.integers(len(users), size=len(users))
    while len(own := np.flatnonzero(users[rows] == users)):
        rows[own] = rng.integers(len(users), size=len(own))
    return rows


def trained_parameters(model: Any) -> int:
    """How many numbers of a model are trained."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


# ---- tables ----

FEW_SEEDS = 3  # with fewer seeds nothing is said beyond these seeds
SAMPLES = 10_000
WORLDS_SAID = (
    "A seed is another world with other users, so seeds are the independent observations: intervals and p-values are "
    "Student's t over the seeds' own means (of paired differences), whatever the number of users."
)
PEOPLE_SAID = (
    "Seeds and users are both resampled (two-way bootstrap): each of 10,000 resamples draws seeds with replacement "
    "and, independently, users with replacement, a drawn user with all titles under every drawn seed; weights of seeds "
    "are rescaled as by Rao and Wu (1988), as so few seeds understate their variance otherwise. Interval and p-value "
    "are Student's t with the resamples' deviation and Satterthwaite's degrees of freedom: few where seeds differ more "
    "than users do."
)
FEW_SAID = (
    'With fewer than three seeds (marked "given seed …") intervals and p-values are a bootstrap over users and say '
    "nothing about another seed."
)


def seeds_said(cells: Iterable[Cell], said: str, names: Sequence[str]) -> str:
    """How intervals come about: `said` of arms with enough seeds, FEW_SAID of others; `names` tell arms apart."""
    counts = Counter(tuple(cell[name] for name in names) for cell in cells)
    parts = [said] * (max(counts.values()) >= FEW_SEEDS) + [FEW_SAID] * (min(counts.values()) < FEW_SEEDS)
    return " ".join(parts)


class Against(NamedTuple):
    """An arm against another on the same examples."""

    difference: float
    low: float
    high: float
    p_value: float
    by_seed: list[float]
    given: str  # "given seed 0" where too few seeds say anything about others

    def text(self, p_holm: float) -> str:
        """For a table: difference, interval, p, and on what it is conditional."""
        given = f" ({self.given})" * bool(self.given)
        p_value = "p < 0.0001" if p_holm < 1e-4 else "no p" if math.isnan(p_holm) else f"p {p_holm:.4f}"
        return f"{self.difference:+.3f} {_range(self.low, self.high, '+.3f')}, {p_value}{given}"

    def seeds(self) -> str:
        """Each seed's own difference."""
        return " ".join(f"{value:+.3f}" for value in self.by_seed)


def _range(low: float, high: float, form: str) -> str:
    return "[no interval]" if math.isnan(low) else f"[{low:{form}}, {high:{form}}]"


def interval(cells: Sequence[Cell], name: str = "nats") -> str:
    """Mean over the seeds of some cells with its 95% interval."""
    found = _over_seeds([_by_title(cell, cell[name]) for cell in cells], _same_people(cells))
    return f"{found.difference:.3f} {_range(found.low, found.high, '.3f')}"


def against(arm: Sequence[Cell], other: Sequence[Cell], name: str = "nats") -> Against | None:
    """Paired difference arm − other over the seeds that both have, in their order; None where there is none."""
    others = {cell["seed"]: cell for cell in other}
    in_order = sorted(arm, key=lambda cell: int(cell["seed"]))  # cells come in the order in which they were finished
    pairs = [(cell, others[cell["seed"]]) for cell in in_order if cell["seed"] in others]
    if not pairs:
        return None
    for a, b in pairs:
        if a["users"] != b["users"]:
            raise RuntimeError(
                f"cells {a['arm']} and {b['arm']} of seed {a['seed']} have other examples: run one again"
            )
    gaps = [_by_title(a, np.subtract(a[name], b[name])) for a, b in pairs]
    found = _over_seeds(gaps, _same_people([a for a, _ in pairs]))
    few = len(pairs) < FEW_SEEDS
    given = f"given seed{'s' * (len(pairs) > 1)} {', '.join(str(a['seed']) for a, _ in pairs)}" if few else ""
    return Against(*found, [float(values.mean()) for values, _ in gaps], given)


Values = tuple[np.ndarray, np.ndarray]  # a value a title of one seed, and its user


def _by_title(cell: Cell, values: Any) -> Values:
    """An example of n titles counts n times."""
    titles = cell.get("titles", [1] * len(cell["users"]))
    return np.repeat(np.array(values, float), titles), np.repeat(np.array(cell["users"]), titles)


def _same_people(cells: Sequence[Cell]) -> bool:
    """Whether all seeds were asked about the same examples of the same people."""
    if not all(cell.get("same_people") for cell in cells):
        return False
    if any(cell["users"] != cells[0]["users"] or cell["titles"] != cells[0]["titles"] for cell in cells):
        raise RuntimeError("cells of several seeds say that they have the same examples, and have not: run them again")
    return True


def _over_seeds(seeds: list[Values], same_people: bool) -> Difference:
    """Mean over seeds of each seed's mean, its 95% interval and p of "it is zero": see WORLDS_SAID and PEOPLE_SAID."""
    if len(seeds) < FEW_SEEDS:  # given these seeds
        values = np.concatenate([values for values, _ in seeds])
        users = [own + (0 if same_people else 10_000_000 * n) for n, (_, own) in enumerate(seeds)]
        return paired_differences(values[:, None], np.concatenate(users), np.random.default_rng(0))[0]
    if same_people:
        return _two_way(seeds)
    means = np.array([values.mean() for values, _ in seeds])
    return _student(float(means.mean()), float(stats.sem(means)), len(means) - 1)


def _student(value: float, error: float, freedom: float) -> Difference:
    if error == 0:
        return Difference(value, value, value, float(value == 0))
    half = float(stats.t.ppf(0.975, freedom)) * error
    return Difference(value, value - half, value + half, float(2 * stats.t.sf(abs(value) / error, freedom)))


def _two_way(seeds: list[Values]) -> Difference:
    """Seeds and users resampled independently of each other, as every user is there under every seed."""
    rng, number = np.random.default_rng(0), len(seeds)
    _, members = np.unique(seeds[0][1], return_inverse=True)
    sums = np.stack([np.bincount(members, weights=values) for values, _ in seeds])  # (S, U)
    titles = np.bincount(members)  # (U,)
    people = rng.multinomial(len(titles), np.full(len(titles), 1 / len(titles)), SAMPLES)  # (n, U) times drawn
    means = (people @ sums.T) / (people @ titles)[:, None]  # (n, S)
    drawn = rng.multinomial(number, np.full(number, 1 / number), SAMPLES)  # (n, S)
    weights = 1 + (drawn - 1) * math.sqrt(number / (number - 1))  # Rao and Wu: variance of a mean is s² / S, unbiased
    whole, users = float((weights * means).mean(axis=1).var()), float(means.mean(axis=1).var())
    between = max(0.0, whole - users)  # the variance that seeds add
    parts = between**2 / (number - 1) + users**2 / max(1, len(titles) - 1)
    freedom = whole**2 / parts if parts else float("inf")
    return _student(float(sums.sum() / titles.sum() / number), math.sqrt(whole), freedom)


def comparisons(
    arms: dict[str, list[Cell]],
    reference: str,
    further: Sequence[tuple[str, str]],
    extra: Sequence[str] = (),
    name: str = "nats",
) -> tuple[list[list[str]], list[str]]:
    """Rows of a table and the lines under it; p is Holm's over all comparisons of both.

    A row: arm, figures, difference to `reference`, difference by seed, trained parameters. `further` are pairs of arms.
    Compared is what cells hold of each example under `name`.
    """
    pairs = [(arm, reference) for arm in arms if arm != reference] + list(further)
    found = {pair: gap for pair in pairs if (gap := against(arms[pair[0]], arms[pair[1]], name)) is not None}
    adjusted = dict(zip(found, holm([gap.p_value for gap in found.values()])))
    rows = []
    for arm, cells in arms.items():
        if not cells:
            continue
        gap = found.get((arm, reference))
        shown = (gap.text(adjusted[arm, reference]), gap.seeds()) if gap else ("", "")
        figures = [interval(cells, name), *(f"{_mean(cells, other):.3f}" for other in extra)]
        parameters = cells[0].get("parameters")
        rows.append([arm, *figures, *shown, "" if parameters is None else str(parameters)])
    lines = [
        f"- {arm} against {other}: {found[arm, other].text(adjusted[arm, other])}; by seed {found[arm, other].seeds()}"
        for arm, other in further
        if (arm, other) in found
    ]
    return rows, lines


def _mean(cells: Sequence[Cell], name: str) -> float:
    return float(np.mean([_by_title(cell, cell[name])[0].mean() for cell in cells]))


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_part(path: Path, heading: str, text: str) -> None:
    """Write a part of a Markdown file that begins with the line `heading` and ends before the next "# " line.

    A part that is there is replaced; a new one stands behind the others.
    """
    old = path.read_text(encoding="utf-8") if path.is_file() else ""
    parts = re.split(r"^(?=# )", old, flags=re.MULTILINE)
    places = [number for number, part in enumerate(parts) if part.splitlines()[:1] == [heading]]
    new = text.rstrip() + "\n"
    parts = [new if number in places else part for number, part in enumerate(parts)] + ([] if places else [new])
    files.write_text(path, "\n\n".join(part.strip() for part in parts if part.strip()) + "\n")


def machine_line(cells: Iterable[Cell]) -> str:
    """What kind of machines made the cells, and with which version: no names, no paths."""
    cells = list(cells)
    kinds = sorted({cell["machine"] for cell in cells})
    versions = sorted({str(cell["settings"]["version"]) for cell in cells})
    return f"Machine: {'; '.join(kinds)}. Cells made by recllm {', '.join(versions)}."


def this_machine(device: str) -> str:
    """The kind of this machine for a cell."""
    found = machine()
    name = found["torch_device"] if device.startswith("cuda") else found["processor"]
    return f"{found['cpu_count']} CPU cores, {name}, torch {torch.__version__}"
