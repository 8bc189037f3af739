"""Fits the sequence encoder: what guides the gate, and a baseline of every report.

A dataset and the encoder section enter; a folder with the fitted SASRec (safetensors, its vocabulary's hash, the
metrics of its best epoch) leaves. Targets are the TRAIN positions only; the VALID positions stop the training.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional
from tqdm import tqdm

from recllm.data.dataset import Dataset
from recllm.errors import UserError
from recllm.model.sequence_encoder import SASRec, save_encoder
from recllm.recipe import EncoderSection
from recllm.schema import TRAIN, VALID
from recllm.train.collator import pad_left

FULL_SOFTMAX_ITEMS = 50_000  # up to here the loss runs over the whole catalogue, above over a sample of it
SAMPLED_NEGATIVES = 8_192  # shared by a batch
K = 10


class Window(NamedTuple):
    """A stretch of one user's sequence: what is read, and what is to be predicted at each position."""

    items: np.ndarray  # (L,) item indices, oldest first
    targets: np.ndarray  # (L,) the item after each


class Held(NamedTuple):
    """The validation targets and all that came before each."""

    histories: list[np.ndarray]
    targets: np.ndarray  # (N,)
    exclude_history: bool


def fit_encoder(dataset: Dataset, section: EncoderSection, max_items: int, seed: int, output: Path) -> dict[str, Any]:
    """Train SASRec on the training positions and save the epoch with the best validation ndcg@10.

    SASRec (Kang & McAuley 2018) with the full softmax cross-entropy in place of one sampled negative, which is what
    makes it a strong baseline (Klenitskiy & Vasilev 2023, arXiv:2309.07602).

    Returns:
        The metrics of the saved epoch: ndcg@10, hit_rate@10 and, for comparison, the most popular items' ndcg@10.

    Raises:
        UserError: no training or no validation target, or a loss that is not finite.
    """
    windows, held = training_windows(dataset, max_items), validation(dataset, max_items)
    _check(dataset, windows, held)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        encoder = SASRec(
            num_items=dataset.num_items,
            hidden_size=section.hidden_size,
            num_layers=section.num_layers,
            num_heads=section.num_heads,
            max_items=max_items,
            dropout=section.dropout,
        ).to(device)
        metrics = _fit(encoder, section, windows, held, seed)
    metrics["popularity_ndcg@10"] = _metrics(_popularity(dataset), held)["ndcg@10"]
    save_encoder(encoder.cpu().eval(), Path(output), dataset.vocabulary_sha256, {"metrics": metrics, "seed": seed})
    return metrics


def training_windows(dataset: Dataset, max_items: int) -> list[Window]:
    """Every training target once, each with the training positions before it; long histories are cut to `max_items`.

    Positions of other roles are never read: neither as targets nor as history.
    """
    sequences, windows = dataset.sequences, []
    for begin, end in zip(sequences.offsets[:-1], sequences.offsets[1:]):
        items = sequences.items[begin:end][sequences.splits[begin:end] == TRAIN].astype(np.int64)
        for stop in range(len(items) - 1, 0, -max_items):
            start = max(0, stop - max_items)
            windows.append(Window(items[start:stop], items[start + 1 : stop + 1]))
    return windows


def validation(dataset: Dataset, max_items: int) -> Held:
    """The validation targets with the last `max_items` items before each."""
    sequences = dataset.sequences
    positions = np.flatnonzero(sequences.splits == VALID)
    users = np.searchsorted(sequences.offsets, positions, side="right") - 1
    inside = positions - sequences.offsets[users]
    histories = [dataset.history(int(user), int(end), max_items) for user, end in zip(users, inside)]
    ranking = dataset.manifest.get("recipe", {}).get("protocol", {}).get("ranking", {})
    return Held(histories, sequences.items[positions].astype(np.int64), bool(ranking.get("exclude_history", True)))


def _check(dataset: Dataset, windows: list[Window], held: Held) -> None:
    for what, count in (("training", len(windows)), ("validation", len(held.targets))):
        if not count:
            raise UserError(
                f"{dataset.folder}: 0 {what} targets with an earlier interaction, the encoder needs at least 1: "
                f"lower protocol.split.min_history or the filters, or give {what} a larger share"
            )


def _fit(encoder: SASRec, section: EncoderSection, windows: list[Window], held: Held, seed: int) -> dict[str, Any]:
    generator = np.random.default_rng([seed, 0])
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=section.learning_rate, weight_decay=0.0)
    best: dict[str, Any] = {"ndcg@10": -1.0}
    state: dict[str, torch.Tensor] = {}
    with tqdm(range(1, section.max_epochs + 1), desc="fit encoder", unit="epoch") as epochs:
        for epoch in epochs:
            loss = _epoch(encoder, optimizer, windows, section.batch_size, generator)
            metrics = evaluate_encoder(encoder, held)
            if metrics["ndcg@10"] > best["ndcg@10"]:
                best = {**metrics, "epoch": epoch, "loss": loss}
                state = {name: value.detach().clone() for name, value in encoder.state_dict().items()}
            epochs.set_postfix(loss=f"{loss:.3f}", ndcg=f"{metrics['ndcg@10']:.4f}", best=f"{best['ndcg@10']:.4f}")
            if epoch - best["epoch"] >= section.patience:
                break
    encoder.load_state_dict(state)
    return best


def _epoch(
    encoder: SASRec,
    optimizer: torch.optim.Optimizer,
    windows: list[Window],
    batch_size: int,
    generator: np.random.Generator,
) -> float:
    """One pass; returns the mean cross-entropy a target in nats."""
    encoder.train()
    total, count = 0.0, 0
    for items, targets in _batches(windows, batch_size, generator, next(encoder.parameters()).device):
        wanted = targets >= 0  # not padding
        loss = _cross_entropy(encoder, encoder.states(items)[wanted], targets[wanted], generator)
        if not torch.isfinite(loss):
            raise UserError(f"the encoder's loss is {loss.item()} (not finite): lower encoder.learning_rate")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total, count = total + loss.item() * int(wanted.sum()), count + int(wanted.sum())
    return total / count


def _batches(
    windows: list[Window], batch_size: int, generator: np.random.Generator, device: torch.device
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of windows of like length, in random order, left-padded with -1: (B, L) items and (B, L) targets."""
    shuffled = generator.permutation(len(windows))
    lengths = np.array([len(windows[i].items) for i in shuffled])
    order = shuffled[np.argsort(lengths, kind="stable")]
    starts = np.arange(0, len(order), batch_size)
    for start in generator.permutation(starts):
        rows = [windows[i] for i in order[start : start + batch_size]]
        items, targets = pad_left([row.items for row in rows]), pad_left([row.targets for row in rows])
        yield items.to(device), targets.to(device)


def _cross_entropy(
    encoder: SASRec, states: torch.Tensor, targets: torch.Tensor, generator: np.random.Generator
) -> torch.Tensor:
    """Mean cross-entropy of (N, D) states against (N,) targets: over all items, or over the target and a sample."""
    if encoder.num_items <= FULL_SOFTMAX_ITEMS:
        return functional.cross_entropy(encoder.scores(states).float(), targets)
    drawn = torch.from_numpy(generator.integers(encoder.num_items, size=SAMPLED_NEGATIVES)).to(targets.device)
    return sampled_cross_entropy(states, targets, drawn, encoder.item_embedding.weight)


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
def evaluate_encoder(encoder: SASRec, held: Held, batch_size: int = 256) -> dict[str, float]:
    """ndcg@10 and hit_rate@10 of the held targets over the whole catalogue; ties rank the target last."""
    encoder.eval()
    device = next(encoder.parameters()).device
    ranks = []
    for start in range(0, len(held.targets), batch_size):
        histories = held.histories[start : start + batch_size]
        scores = encoder.scores(encoder(pad_left(histories).to(device))).float().cpu().numpy()
        ranks.append(_ranks(scores, histories, held.targets[start : start + batch_size], held.exclude_history))
    return _summary(np.concatenate(ranks))


def _ranks(scores: np.ndarray, histories: list[np.ndarray], targets: np.ndarray, exclude: bool) -> np.ndarray:
    """1-based ranks of the targets in (B, num_items) scores: every equal score stands before the target."""
    rows = np.arange(len(targets))
    target_scores = scores[rows, targets].copy()
    if exclude:
        for row, history in zip(scores, histories):
            row[history] = -np.inf
    scores[rows, targets] = -np.inf
    return 1 + (scores >= target_scores[:, None]).sum(axis=1)


def _summary(ranks: np.ndarray) -> dict[str, float]:
    # one relevant item: ndcg@k = 1 / log2(1 + rank) up to k, otherwise 0 (Järvelin & Kekäläinen 2002)
    gains = np.where(ranks <= K, 1 / np.log2(1 + ranks), 0.0)
    return {"ndcg@10": float(gains.mean()), "hit_rate@10": float((ranks <= K).mean())}


def _popularity(dataset: Dataset) -> np.ndarray:
    trained = dataset.sequences.items[dataset.sequences.splits == TRAIN]
    return np.bincount(trained, minlength=dataset.num_items).astype(np.float32)


def _metrics(scores: np.ndarray, held: Held) -> dict[str, float]:
    """The same metrics for one score an item, equal for all users."""
    ranks = [
        _ranks(scores[None].copy(), [history], held.targets[i : i + 1], held.exclude_history)
        for i, history in enumerate(held.histories)
    ]
    return _summary(np.concatenate(ranks))
