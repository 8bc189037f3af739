"""Fits the sequence encoder: what guides the gate, and a baseline of every report.

A dataset and the encoder section enter, and item features for a content encoder; a folder with the fitted encoder
(safetensors, its vocabulary's hash, the metrics of its best epoch) leaves. Targets are the TRAIN positions only; the
VALID positions stop the training. Of an event dataset the encoder reads (item, action) and learns to say both of the
next event; otherwise it reads and says items. Memory is bounded however long histories are: batches are cut by the
items in them, and the loss over the catalogue runs piece by piece.
"""

import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from recllm.data.dataset import Dataset, pad_left
from recllm.errors import UserError
from recllm.model.histories import batches, encode_histories
from recllm.model.sequence_encoder import SequenceEncoder, make_encoder, save_encoder
from recllm.recipe import EncoderSection
from recllm.schema import TRAIN, VALID, event_codes

FULL_SOFTMAX_ITEMS = 50_000  # up to here the loss runs over the whole catalogue, above over a sample of it
SAMPLED_NEGATIVES = 8_192  # shared by a batch
CUTOFF = 10  # of the metrics, as their names say
VALIDATION_TARGETS = 10_000  # so many, by seeded choice, decide when to stop
SCORES_AT_ONCE = 1 << 26  # numbers in one block of scores: 256 MiB in float32
LONG_WINDOW = 512  # a batch holds at most batch_size windows of this length: fewer of longer ones
LONG_QUADRATIC = 2_000  # items: beyond, attention over a whole history is worth a word


class Window(NamedTuple):
    """A stretch of one user's sequence: what is read, and what is to be predicted at each position."""

    items: np.ndarray  # (L,) item indices or event codes, oldest first
    targets: np.ndarray  # (L,) the item after each; NO_ITEM where that event has none
    actions: np.ndarray | None = None  # (L,) of events: the action after each


class Held(NamedTuple):
    """Validation targets and what came before each."""

    histories: list[np.ndarray]  # N, what the encoder reads: item indices or event codes, oldest first
    targets: np.ndarray  # (N,) NO_ITEM of events without one
    # N, all items before each target, NO_ITEM of events without one, views of the dataset's: they are not ranked. None
    # where everything is
    had: list[np.ndarray] | None
    actions: np.ndarray | None = None  # (N,) of events


class Batch(NamedTuple):
    """Windows, padded on the left with -1: (B, L) each."""

    items: torch.Tensor
    targets: torch.Tensor
    actions: torch.Tensor | None = None  # of events


def fit_encoder(
    dataset: Dataset,
    section: EncoderSection,
    max_items: int,
    seed: int,
    output: Path,
    exclude_history: bool = True,
    item_features: torch.Tensor | None = None,
) -> dict[str, Any]:
    """Train the section's encoder on the training positions and save the epoch with the best validation ndcg@10.

    Every type is trained with the full softmax cross-entropy in place of one sampled negative, which is what makes
    SASRec a strong baseline (Klenitskiy & Vasilev 2023, arXiv:2309.07602). On an event dataset the loss is that of the
    next action and, where the next event has an item, of the next item: - log p(action) - log p(item), a mean over the
    events; the epoch with the lowest such nats in validation is saved.

    Args:
        dataset: what convert wrote.
        section: the encoder's type, sizes and training.
        max_items: of the history; what is older is not read.
        seed: of weights, batches and the choice of validation targets.
        output: the folder to write.
        exclude_history: leave out what the user already had when validating, as the protocol's ranking does.
        item_features: (num_items, F), for type content.

    Returns:
        The metrics of the saved epoch on at most VALIDATION_TARGETS targets: ndcg@10, hit_rate@10 and, for comparison,
        the most popular items' ndcg@10. On an event dataset as `evaluate_encoder` says, ranks of items only where
        there are some, and for comparison what the shares of the actions in training alone give.

    Raises:
        UserError: no training or no validation target, a loss that is not finite, or as `make_encoder`.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        num_actions = len(dataset.actions) if dataset.is_events else 0
        encoder = make_encoder(section, dataset.num_items, max_items, item_features, num_actions).to(device)
        windows = training_windows(dataset, encoder.reach)  # nothing older touches a state at a window's end
        held = validation(dataset, encoder.reach, exclude_history, seed)
        _check(dataset, windows, held)
        _warn_of_cost(encoder, windows)
        _say_reach(encoder, dataset, max_items)
        metrics = _fit(encoder, section, windows, held, seed)
    if (ranked := _with_items(held)) is not None:
        popularity = _popularity(dataset).to(device)
        popular = _metrics(lambda rows: popularity.expand(len(ranked.targets[rows]), -1), ranked, device)
        metrics["popularity_ndcg@10"] = popular["ndcg@10"]
    if held.actions is not None:
        metrics |= _constant_action(dataset, held.actions)
    save_encoder(encoder.cpu().eval(), Path(output), dataset.vocabulary_sha256, {"metrics": metrics, "seed": seed})
    return metrics


def training_windows(dataset: Dataset, max_items: int) -> list[Window]:
    """Every training target once, each with the training positions before it; long histories are cut to `max_items`.

    Positions of other roles are never read: neither as targets nor as history.
    """
    sequences, windows = dataset.sequences, []
    positions = np.flatnonzero(sequences.splits == TRAIN)
    trained = sequences.items[positions].astype(np.int64)  # all users', in their order
    actions = _actions(dataset, positions)
    read = trained if actions is None else event_codes(trained, actions, dataset.num_items)
    bounds = np.searchsorted(positions, sequences.offsets)
    for begin, end in itertools.pairwise(bounds):
        for stop in range(end - 1, begin, -max_items):
            start = max(begin, stop - max_items)
            following = slice(start + 1, stop + 1)
            done = None if actions is None else actions[following]
            windows.append(Window(read[start:stop], trained[following], done))
    return windows


def validation(dataset: Dataset, reach: int, exclude_history: bool, seed: int = 0) -> Held:
    """Validation targets, at most VALIDATION_TARGETS by seeded choice, with the newest `reach` positions before each.

    No more is copied: what the ranking leaves out are views, however long users' histories are.
    """
    sequences = dataset.sequences
    positions = np.flatnonzero(sequences.splits == VALID)
    if len(positions) > VALIDATION_TARGETS:
        generator = np.random.default_rng([seed, VALID])
        positions = np.sort(generator.choice(positions, VALIDATION_TARGETS, replace=False))
    users = np.searchsorted(sequences.offsets, positions, side="right") - 1
    inside = positions - sequences.offsets[users]
    histories = [dataset.read(int(user), int(end), reach) for user, end in zip(users, inside)]
    had = [sequences.items[end - before : end] for end, before in zip(positions, inside)] if exclude_history else None
    return Held(histories, sequences.items[positions].astype(np.int64), had, _actions(dataset, positions))


def _actions(dataset: Dataset, positions: np.ndarray) -> np.ndarray | None:
    """Numbers of the actions at flat positions; None unless it is an event dataset."""
    actions = dataset.sequences.actions
    return None if actions is None else actions[positions].astype(np.int64)


def _check(dataset: Dataset, windows: list[Window], held: Held) -> None:
    for what, count in (("training", len(windows)), ("validation", len(held.targets))):
        if not count:
            raise UserError(
                f"{dataset.folder}: 0 {what} targets with an earlier interaction, the encoder needs at least 1: "
                f"lower protocol.split.min_history or the filters, or give {what} a larger share"
            )


def _warn_of_cost(encoder: SequenceEncoder, windows: list[Window]) -> None:
    longest = max(len(window.items) for window in windows)
    quadratic = encoder.numbers_a_row(2 * longest) > 3 * encoder.numbers_a_row(longest)
    if longest > LONG_QUADRATIC and quadratic:
        print(
            f"recllm: histories of {longest} items, and an encoder whose cost grows with the square of the length: "
            "set encoder.window, or encoder.type=gru4rec",
            file=sys.stderr,
        )


def _say_reach(encoder: SequenceEncoder, dataset: Dataset, max_items: int) -> None:
    """Say so where a window keeps from the gate what history.max_items promises."""
    longest = min(max_items, int(np.diff(dataset.sequences.offsets).max()))
    if encoder.reach < longest:
        print(
            f"recllm: histories have up to {longest} items, of which this encoder reads the newest {encoder.reach} "
            "(encoder.window · encoder.num_layers + 1): for the gate to know more raise them, or take a gru4rec",
            file=sys.stderr,
        )


def _fit(
    encoder: SequenceEncoder, section: EncoderSection, windows: list[Window], held: Held, seed: int
) -> dict[str, Any]:
    generator = np.random.default_rng([seed, 0])
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=section.learning_rate, weight_decay=0.0)
    best: dict[str, Any] = {}
    state: dict[str, torch.Tensor] = {}
    name, sign = ("ndcg@10", 1) if held.actions is None else ("nats", -1)  # the larger, or the smaller, the better
    with tqdm(range(1, section.max_epochs + 1), desc="fit encoder", unit="epoch") as epochs:
        for epoch in epochs:
            loss = _epoch(encoder, optimizer, windows, section.batch_size, generator)
            metrics = evaluate_encoder(encoder, held)
            if not best or sign * metrics[name] > sign * best[name]:
                best = {**metrics, "epoch": epoch, "loss": loss}
                state = {key: value.detach().clone() for key, value in encoder.state_dict().items()}
            now = {name.partition("@")[0]: f"{metrics[name]:.4f}", "best": f"{best[name]:.4f}"}
            epochs.set_postfix({"loss": f"{loss:.3f}", **now})
            if epoch - best["epoch"] >= section.patience:
                break
    encoder.load_state_dict(state)
    return best


def _epoch(
    encoder: SequenceEncoder,
    optimizer: torch.optim.Optimizer,
    windows: list[Window],
    batch_size: int,
    generator: np.random.Generator,
) -> float:
    """One pass; returns the mean cross-entropy a target in nats."""
    encoder.train()
    total, count = 0.0, 0
    for items, targets, actions in _batches(windows, batch_size, generator, encoder):
        wanted = (targets if actions is None else actions) >= 0  # not padding
        states = encoder.states(items)[wanted]
        if actions is None:
            loss = _cross_entropy(encoder, states, targets[wanted], generator)
        else:
            loss = _event_loss(encoder, states, targets[wanted], actions[wanted], generator)
        if not torch.isfinite(loss):
            raise UserError(f"the encoder's loss is {loss.item()} (not finite): lower encoder.learning_rate")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total, count = total + loss.item() * int(wanted.sum()), count + int(wanted.sum())
    return total / count


def _batches(
    windows: list[Window], batch_size: int, generator: np.random.Generator, encoder: SequenceEncoder
) -> Iterator[Batch]:
    """Batches of windows of like length, in random order.

    At most `batch_size` windows; of long ones fewer, so that a batch's memory is bounded.
    """
    shuffled = generator.permutation(len(windows))
    lengths = np.array([len(windows[i].items) for i in shuffled])
    order = shuffled[np.argsort(lengths, kind="stable")]
    parts = list(batches(np.sort(lengths).tolist(), encoder, batch_size, longest=batch_size * LONG_WINDOW))
    for number in generator.permutation(np.arange(len(parts))):
        rows = [windows[i] for i in order[parts[number]]]
        columns = [column for column in zip(*rows) if column[0] is not None]
        yield Batch(*(torch.from_numpy(pad_left(column)).to(encoder.device) for column in columns))


def _event_loss(
    encoder: SequenceEncoder,
    states: torch.Tensor,
    items: torch.Tensor,
    actions: torch.Tensor,
    generator: np.random.Generator,
) -> torch.Tensor:
    """Mean over N events of - log p(action) - log p(item), the latter where there is one: (N, D), (N,), (N,)."""
    loss = functional.cross_entropy(encoder.action_scores(states).float(), actions)
    having = items >= 0
    if count := int(having.sum()):
        loss = loss + _cross_entropy(encoder, states[having], items[having], generator) * (count / len(actions))
    return loss


def _cross_entropy(
    encoder: SequenceEncoder, states: torch.Tensor, targets: torch.Tensor, generator: np.random.Generator
) -> torch.Tensor:
    """Mean cross-entropy of (N, D) states against (N,) targets: over all items, or over the target and a sample."""
    table = encoder.item_embedding.weight
    if encoder.num_items <= FULL_SOFTMAX_ITEMS:
        return _in_pieces(_full_cross_entropy, states, targets, table, width=encoder.num_items)
    drawn = torch.from_numpy(generator.integers(encoder.num_items, size=SAMPLED_NEGATIVES)).to(targets.device)

    def sampled(states: torch.Tensor, targets: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        return sampled_cross_entropy(states, targets, drawn, table)

    return _in_pieces(sampled, states, targets, table, width=SAMPLED_NEGATIVES)


def _full_cross_entropy(states: torch.Tensor, targets: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy((states @ table.T).float(), targets)


def _in_pieces(
    loss: Callable[..., torch.Tensor], states: torch.Tensor, targets: torch.Tensor, table: torch.Tensor, width: int
) -> torch.Tensor:
    """A mean loss over (N, D) states whose scores (N, width) are made, and in backward made again, block by block."""
    rows = max(1, SCORES_AT_ONCE // width)
    if len(states) <= rows:
        return loss(states, targets, table)
    total = states.new_zeros((), dtype=torch.float32)
    for some, wanted in zip(states.split(rows), targets.split(rows)):
        total = total + checkpoint(loss, some, wanted, table, use_reentrant=False) * len(wanted)
    return total / len(targets)


def sampled_cross_entropy(
    states: torch.Tensor, targets: torch.Tensor, negatives: torch.Tensor, table: torch.Tensor
) -> torch.Tensor:
    """Cross-entropy of the target among uniformly drawn negatives; a negative that is the target does not count.

    states (N, D), targets (N,), negatives (M,), table (num_items, D).
    """
    positive = (states * table[targets]).sum(-1, keepdim=True)  # (N, 1)
    others = (states @ table[negatives].T).masked_fill(negatives[None] == targets[:, None], float("-inf"))  # (N, M)
    logits = torch.cat([positive, others], dim=-1).float()
    return functional.cross_entropy(logits, torch.zeros_like(targets))


@torch.no_grad()
def evaluate_encoder(encoder: SequenceEncoder, held: Held) -> dict[str, float]:
    """ndcg@10 and hit_rate@10 of the held targets over the whole catalogue; ties rank the target last.

    Of events these are over the targets with an item, and absent where none has one. nats is the mean over all targets
    of - log p(action) - log p(item), the latter where there is an item; action_nats and item_nats are its parts, each
    a mean over its own targets. action_accuracy, and macro_recall: the mean recall of the actions that occur; of
    actions that score alike the first is taken.
    """
    encoder.eval()
    read = encode_histories(encoder, held.histories)  # (N, D)
    if held.actions is not None:
        return _event_metrics(encoder, held, held.actions, read)
    return _metrics(lambda rows: encoder.scores(read[rows].to(encoder.device)), held, encoder.device)


def _event_metrics(encoder: SequenceEncoder, held: Held, actions: np.ndarray, read: torch.Tensor) -> dict[str, float]:
    log_p = encoder.action_scores(read.to(encoder.device)).float().log_softmax(dim=-1).cpu().numpy()  # (N, actions)
    nats = -log_p[np.arange(len(actions)), actions].astype(np.float64)
    metrics = {"nats": float(nats.mean()), "action_nats": float(nats.mean())}
    metrics |= _action_figures(log_p.argmax(axis=1), actions)
    if (ranked := _with_items(held)) is not None:
        states, item_nats = read[torch.from_numpy(held.targets >= 0)], list[torch.Tensor]()

        def score(rows: slice) -> torch.Tensor:
            scores = encoder.scores(states[rows].to(encoder.device))
            targets = torch.from_numpy(ranked.targets[rows]).to(encoder.device)
            item_nats.append(functional.cross_entropy(scores.float(), targets, reduction="none").double().cpu())
            return scores

        metrics |= _metrics(score, ranked, encoder.device)
        of_items = torch.cat(item_nats)
        metrics["item_nats"] = float(of_items.mean())
        metrics["nats"] = (float(nats.sum()) + float(of_items.sum())) / len(actions)
    return metrics


def _with_items(held: Held) -> Held | None:
    """The targets that have an item, with what is not ranked for them; None without any."""
    if held.actions is None:
        return held
    having = np.flatnonzero(held.targets >= 0)
    if not len(having):
        return None
    had = None if held.had is None else [held.had[row] for row in having]
    return Held([held.histories[row] for row in having], held.targets[having], had)


def _action_figures(predicted: np.ndarray, actions: np.ndarray) -> dict[str, float]:
    """Of predicted actions (N,) and those that were taken (N,).

    >>> _action_figures(np.array([0, 0, 0, 0]), np.array([0, 0, 0, 1]))
    {'action_accuracy': 0.75, 'macro_recall': 0.5}
    """
    right = predicted == actions
    recalls = [right[actions == action].mean() for action in np.unique(actions)]
    return {"action_accuracy": float(right.mean()), "macro_recall": float(np.mean(recalls))}


def _constant_action(dataset: Dataset, actions: np.ndarray) -> dict[str, float]:
    """What the shares of the actions in training alone give, each counted once more than it occurs."""
    trained = _actions(dataset, np.flatnonzero(dataset.sequences.splits == TRAIN))
    assert trained is not None  # of an event dataset
    counts = np.bincount(trained, minlength=len(dataset.actions)) + 1
    figures = {"action_nats": float(-np.log(counts / counts.sum())[actions].mean())}
    figures |= _action_figures(np.full(len(actions), counts.argmax()), actions)
    return {f"popularity_{name}": value for name, value in figures.items()}


def _metrics(
    score: Callable[[slice], torch.Tensor], held: Held, device: torch.device, batch_size: int = 256
) -> dict[str, float]:
    """Metrics of a scorer: which of the held targets (B of them) → (B, num_items)."""
    ranks: list[torch.Tensor] = []
    start, count = 0, 1  # the first block tells how many items there are
    while start < len(held.targets):
        rows = slice(start, start + count)
        excluded = None if held.had is None else torch.from_numpy(pad_left(held.had[rows])).to(device)
        targets = torch.from_numpy(held.targets[rows]).to(device)
        scores = score(rows).to(torch.float32, copy=True)
        ranks.append(_ranks(scores, excluded, targets).cpu())
        start, count = start + count, max(1, min(batch_size, SCORES_AT_ONCE // scores.shape[1]))
    return _summary(torch.cat(ranks).numpy())


def _ranks(scores: torch.Tensor, excluded: torch.Tensor | None, targets: torch.Tensor) -> torch.Tensor:
    """1-based ranks (B,) of the targets (B,) in (B, num_items) scores, which are overwritten.

    Every equal score stands before the target, and so does one that is not a number. `excluded` (B, L), padded with
    -1, are not ranked, but the target always is.
    """
    wanted = scores.gather(1, targets[:, None])  # (B, 1), a copy
    if excluded is not None:
        rows, columns = (excluded >= 0).nonzero(as_tuple=True)
        scores[rows, excluded[rows, columns]] = float("-inf")
    scores.scatter_(1, targets[:, None], float("-inf"))
    return 1 + (~(scores < wanted)).sum(dim=1)


def _summary(ranks: np.ndarray) -> dict[str, float]:
    # one relevant item: ndcg@k = 1 / log2(1 + rank) up to k, otherwise 0 (Järvelin & Kekäläinen 2002)
    gains = np.where(ranks <= CUTOFF, 1 / np.log2(1 + ranks), 0.0)
    return {"ndcg@10": float(gains.mean()), "hit_rate@10": float((ranks <= CUTOFF).mean())}


def _popularity(dataset: Dataset) -> torch.Tensor:
    trained = dataset.sequences.items[dataset.sequences.splits == TRAIN]
    return torch.from_numpy(np.bincount(trained[trained >= 0], minlength=dataset.num_items).astype(np.float32))
