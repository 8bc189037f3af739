"""Instance-wise adapters as ordinary LoRAs, for whatever serves or merges LoRAs: one user's, or a few for all users.

A model with an instance-wise adapter and gate weights enter; folders leave that stock PEFT and vLLM load:

    FOLDER/                    of one user: adapter_model.safetensors, adapter_config.json, base_model.json

    FOLDER/prototype-00/ …     of m prototypes, each such a folder
           assignment.parquet  row, user_id (where known), prototype, distance of the user's gate from the prototype's
           prototypes.json     the prototypes' weights and sizes, and what the clustering costs

One user's gate g is folded into B, because B (f ⊙ A x) = (B diag f) A x with f = K · repeat(g, R/K), or 2 g of a
sigmoid. The prototypes are the means of a k-means clustering of the users' gates (Lloyd 1982, from k-means++ starts,
Arthur & Vassilvitskii 2007): a mean of gates is a gate.
"""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from peft import PeftModel
from scipy.cluster.vq import kmeans2

from recllm.data.dataset import Dataset
from recllm.errors import UserError
from recllm.files import replacing_folder, write_json
from recllm.model.adapter import LORA_CONFIG, has_gate, lora_weights, write_lora
from recllm.model.histories import History, encode_histories
from recllm.model.ilora import DECODER_LAYER
from recllm.schema import ITEM_ID

PROTOTYPES, ASSIGNMENT = "prototypes.json", "assignment.parquet"
STARTS = 4  # of k-means: the best of so many
ROUNDS = 100

Points = npt.NDArray[np.float64]  # (N, P): one gate a row, the layers of a gate a layer one after the other
Nats = Callable[[torch.Tensor], npt.ArrayLike]  # gate weights (N, …) → nats of each held-out answer under them, (N,)


# ---- one user ----


@torch.no_grad()
def export_user_adapter(
    model: PeftModel,
    user: torch.Tensor | Sequence[str],
    folder: Path,
    adapter_name: str = "default",
    *,
    items: Path | None = None,
) -> list[str]:
    """One user as an ordinary LoRA: their gate folded into B.

    Args:
        model: with an instance-wise adapter.
        user: gate weights, (K,) or (layers, K); or a history that the gate reads, item ids, oldest first, of anybody.
            An empty one has the uniform gate. Unknown ids are left out, as `recllm serve` leaves them out.
        folder: where the LoRA goes; an earlier export is replaced.
        adapter_name: which adapter of the model.
        items: of a history: the folder with the adapter's items.parquet and manifest.json, adapter/ or dataset/.

    Returns:
        The ids of the history that are unknown.

    Raises:
        UserError: weights that are not one user's, or not finite; a history without `items`, with those of another
            vocabulary, of an adapter that reads events, or of something else than ids; the folder holds something else
            than an export.
    """
    check_output(Path(folder))
    unknown: list[str] = []
    if not isinstance(user, torch.Tensor):
        tuner = _gated(model)
        dataset = _items_of(tuner, items, adapter_name)
        read, unknown = find_items(dataset, user)
        user = gate_of_items(model, read, int(dataset.manifest["history_max_items"]), adapter_name)
    folded = folded_lora(model, user, adapter_name)
    with replacing_folder(Path(folder)) as staging:
        write_lora(folded, model, staging, adapter_name)
    return unknown


@torch.no_grad()
def folded_lora(model: PeftModel, weights: torch.Tensor, adapter_name: str = "default") -> dict[str, torch.Tensor]:
    """The tensors of `export_user_adapter`; errors as there."""
    tuner: Any = _gated(model)
    shape = tuner.gate[adapter_name].shape
    if tuple(weights.shape) != shape:
        wanted = f"({', '.join(map(str, shape))}{',' if len(shape) == 1 else ''})"
        raise UserError(f"gate weights have shape {tuple(weights.shape)}, one user's are {wanted}: pass one row")
    factor = tuner.factor(weights.detach()[None], adapter_name)[0]  # (R,) or (layers, R)
    return {name: _folded(name, value, factor) for name, value in lora_weights(model, adapter_name).items()}


def _folded(name: str, value: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    if ".lora_B." not in name:
        return value
    if factor.dim() == 2:
        found = DECODER_LAYER.search(name)
        assert found is not None  # a gate a layer refuses modules outside of the layers
        factor = factor[int(found[1])]
    return value * factor.to(value)


def _gated(model: PeftModel) -> Any:
    if not has_gate(model):
        raise UserError("the adapter is no instance-wise one: it has no gate to fold, it is an ordinary LoRA already")
    return model.base_model


def check_output(folder: Path) -> None:
    """Refuse a folder that an export may not take the place of.

    Raises:
        UserError: it is a file, or holds something else than an earlier export.
    """
    if not folder.exists():
        return
    if folder.is_dir() and (not any(folder.iterdir()) or (folder / PROTOTYPES).is_file()):
        return
    allowed = {LORA_CONFIG, "adapter_model.safetensors", "base_model.json"}
    if folder.is_dir() and (folder / LORA_CONFIG).is_file() and {path.name for path in folder.iterdir()} <= allowed:
        return
    raise UserError(f"{folder} exists and is no earlier export: name a new folder, it would be replaced")


# ---- a few for all ----


@torch.no_grad()
def export_prototypes(
    model: PeftModel,
    weights: torch.Tensor,
    m: int,
    folder: Path,
    seed: int = 0,
    *,
    user_ids: Sequence[str] | None = None,
    cost: Callable[[Points], dict[str, Any]] | None = None,
    adapter_name: str = "default",
) -> dict[str, Any]:
    """Cluster users' gates into m prototypes and write each as an ordinary LoRA; returns prototypes.json.

    Users of fewer than m different gates get one prototype for each different one, and none is empty.

    Args:
        model: with an instance-wise adapter.
        weights: the users' gates, (N, K) or (N, layers, K).
        m: how many prototypes, 1 … N.
        folder: where they go; an earlier export is replaced.
        seed: of the starts of k-means.
        user_ids: N names for assignment.parquet.
        cost: further lines of prototypes.json, from the prototypes' gates as rows (`clustering_cost` with scores).
        adapter_name: which adapter of the model.

    Raises:
        UserError: m is not in 1 … N; weights that are not gates of this adapter; a folder that is no earlier export.
    """
    check_output(Path(folder))
    shape = _gated(model).gate[adapter_name].shape
    if tuple(weights.shape[1:]) != shape or not 1 <= m <= len(weights):
        raise UserError(
            f"{m} prototypes of gate weights {tuple(weights.shape)}: 1 to {len(weights)} prototypes of weights "
            f"(users, {', '.join(map(str, shape))}) are expected"
        )
    points = weights.detach().flatten(1).double().cpu().numpy()
    centres, labels = cluster(points, m, seed)
    document = _describe(points, centres, labels, shape) | {"asked_for": m, "seed": seed}
    if cost is not None:
        document["cost"] = cost(centres)
    with replacing_folder(Path(folder)) as staging:
        for number, centre in enumerate(centres):
            gate = torch.from_numpy(centre).float().reshape(shape)
            (place := staging / prototype_name(number)).mkdir()
            write_lora(folded_lora(model, gate, adapter_name), model, place, adapter_name)
        _write_assignment(points, centres, labels, user_ids, staging / ASSIGNMENT)
        write_json(staging / PROTOTYPES, document)
    return document


def prototype_name(number: int) -> str:
    """Folder of a prototype.

    >>> prototype_name(3)
    'prototype-03'
    """
    return f"prototype-{number:02d}"


def cluster(points: Points, m: int, seed: int = 0) -> tuple[Points, npt.NDArray[np.int64]]:
    """k-means: centres (m, P), the largest cluster first, and the centre of each point, (N,); no cluster is empty.

    With fewer than m different points each of them is a centre.
    """
    distinct, inverse = np.unique(points, axis=0, return_inverse=True)
    if len(distinct) <= m:
        return _largest_first(distinct, inverse.reshape(-1))
    generator = np.random.default_rng(seed)
    found = [_lloyd(points, _starts(points, m, generator)) for _ in range(STARTS)]
    return _largest_first(*min(found, key=lambda result: float(np.square(points - result[0][result[1]]).sum())))


def _starts(points: Points, m: int, generator: np.random.Generator) -> Points:
    """k-means++: each next centre is a point drawn by its squared distance from those there."""
    centres = [points[generator.integers(len(points))]]
    squares = np.square(points - centres[0]).sum(axis=1)
    while len(centres) < m:
        centres.append(points[generator.choice(len(points), p=squares / squares.sum())])
        squares = np.minimum(squares, np.square(points - centres[-1]).sum(axis=1))
    return np.array(centres)


def _lloyd(points: Points, centres: Points) -> tuple[Points, npt.NDArray[np.int64]]:
    """Lloyd's rounds from these centres; one that loses all its points begins anew at the point that is worst off."""
    for _ in range(len(centres) + 1):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of empty clusters: dealt with below
            centres, labels = kmeans2(points, centres, iter=ROUNDS, minit="matrix")
        labels = labels.astype(np.int64)
        empty = np.setdiff1d(np.arange(len(centres)), labels)
        if not len(empty):
            break
        centres[empty[0]] = points[np.square(points - centres[labels]).sum(axis=1).argmax()]
    means = np.array([points[labels == number].mean(axis=0) for number in np.unique(labels)])
    return means, np.unique(labels, return_inverse=True)[1].reshape(-1)


def _largest_first(centres: Points, labels: npt.NDArray[np.int64]) -> tuple[Points, npt.NDArray[np.int64]]:
    order = np.argsort(-np.bincount(labels, minlength=len(centres)), kind="stable")
    return centres[order], np.argsort(order)[labels]


def assign(points: Points, centres: Points) -> npt.NDArray[np.int64]:
    """(N,): the centre nearest to each point."""
    nearest = np.zeros(len(points), dtype=np.int64)
    best = np.full(len(points), np.inf)
    for number, centre in enumerate(centres):  # one after the other: (N, m, P) need not fit the memory
        squares = np.square(points - centre).sum(axis=1)
        nearest[squares < best] = number
        best = np.minimum(best, squares)
    return nearest


# ---- what it costs ----


def _describe(points: Points, centres: Points, labels: npt.NDArray[np.int64], shape: tuple[int, ...]) -> dict[str, Any]:
    sizes = np.bincount(labels, minlength=len(centres)).tolist()
    return {
        "format_version": 1,
        "users": len(points),
        "gate_shape": list(shape),
        "prototypes": [
            {"folder": prototype_name(number), "users": size, "gate_weights": centre.reshape(shape).tolist()}
            for number, (size, centre) in enumerate(zip(sizes, centres))
        ],
        **distortion(points, centres[labels]),
    }


def distortion(points: Points, centres: Points) -> dict[str, float]:
    """How far users' gates are from their prototypes': both (N, P).

    mean_distance, max_distance: Euclidean. variance_kept: 1 − Σ |g − p|² / Σ |g − mean g|², 1 where all are equal.

    >>> distortion(np.array([[0.0], [2.0], [4.0], [6.0]]), np.array([[1.0], [1.0], [5.0], [5.0]]))
    {'mean_distance': 1.0, 'max_distance': 1.0, 'variance_kept': 0.8}
    """
    distances = np.linalg.norm(points - centres, axis=1)
    spread = float(np.square(points - points.mean(axis=0)).sum())
    kept = 1 - float(np.square(distances).sum()) / spread if spread > 0 else 1.0
    return {"mean_distance": float(distances.mean()), "max_distance": float(distances.max()), "variance_kept": kept}


def clustering_cost(nats: Nats, weights: torch.Tensor, centres: Points) -> dict[str, float]:
    """What held-out answers lose when each is scored under the prototype nearest to its own gate.

    Args:
        nats: negative log-likelihood of each held-out answer under the gates that it is handed, as `weights`.
        weights: the answers' own gates, (N, K) or (N, layers, K).
        centres: the prototypes' gates as rows, (m, P).

    Returns:
        examples, nats_own and nats_prototype (means), nats_lost (their difference, a title) and max_nats_lost.
    """
    points = weights.detach().flatten(1).double().cpu().numpy()
    nearest = torch.from_numpy(centres[assign(points, centres)]).float().reshape(weights.shape)
    own, under = np.asarray(nats(weights), dtype=np.float64), np.asarray(nats(nearest), dtype=np.float64)
    lost = under - own
    return {
        "examples": len(own),
        "nats_own": float(own.mean()),
        "nats_prototype": float(under.mean()),
        "nats_lost": float(lost.mean()),
        "max_nats_lost": float(lost.max()),
    }


def _write_assignment(
    points: Points, centres: Points, labels: npt.NDArray[np.int64], user_ids: Sequence[str] | None, path: Path
) -> None:
    columns: dict[str, Any] = {"row": pa.array(np.arange(len(points)))}
    if user_ids is not None:
        columns["user_id"] = pa.array(user_ids, pa.string())
    columns["prototype"] = pa.array(labels.astype(np.int32))
    columns["distance"] = pa.array(np.linalg.norm(points - centres[labels], axis=1))
    pq.write_table(pa.table(columns), path)


# ---- gates of a history ----


def find_items(dataset: Dataset, history: Sequence[str]) -> tuple[list[int], list[str]]:
    """Item indices of the ids of a history, without those that the vocabulary does not know, and these ids.

    Raises:
        UserError: something else than a list of ids; a dataset of events.
    """
    if dataset.is_events:
        raise UserError(
            f"{dataset.folder} is of events, whose histories are no lists of item ids: export a user of the dataset "
            "(recllm export --user), or pass gate weights"
        )
    if isinstance(history, str):
        raise UserError(f'the history is the text "{history[:60]}", a list of item ids is expected')
    for place, item in enumerate(history):
        if not isinstance(item, str):
            raise UserError(f"history[{place}] is {item!r}, an item id of {dataset.folder} is expected, as text")
    known = {item: index for index, item in enumerate(dataset.items[ITEM_ID].to_pylist())}
    return [known[item] for item in history if item in known], [item for item in history if item not in known]


@torch.no_grad()
def gate_of_items(
    model: PeftModel, read: Sequence[int], max_items: int, adapter_name: str | None = None
) -> torch.Tensor:
    """Gate weights (K,) or (layers, K) of a history of item indices, of which the newest `max_items` are read.

    Raises:
        UserError: the adapter is no instance-wise one, or has no sequence encoder.
    """
    newest = np.array(read[max(len(read) - max_items, 0) :], dtype=np.int64)
    return _weights_of(_gated(model), [newest], adapter_name)[0]


def _items_of(tuner: Any, items: Path | None, adapter_name: str) -> Dataset:
    """The vocabulary that the adapter's encoder was fitted on."""
    if items is None:
        raise UserError("a history of item ids needs items=, the adapter's folder, which says what items they are")
    dataset, own = Dataset.open(Path(items)), _encoder_of(tuner, adapter_name).vocabulary_sha256
    if own != dataset.vocabulary_sha256:
        raise UserError(
            f"the adapter was trained on the vocabulary {str(own)[:12]}…, {items} has "
            f"{dataset.vocabulary_sha256[:12]}…: pass the adapter's own folder, or the dataset that it was trained on"
        )
    return dataset


def _encoder_of(tuner: Any, adapter_name: str) -> Any:
    if adapter_name not in tuner.sequence_encoder:
        raise UserError("the adapter has no sequence encoder, so its gates of histories are not known: train it again")
    return tuner.sequence_encoder[adapter_name]


def _weights_of(tuner: Any, histories: Sequence[History], adapter_name: str | None, **options: Any) -> torch.Tensor:
    """Gate weights (N, …) of histories as an encoder reads them, on the CPU, by the active adapter or by another."""
    name = tuner.active_adapters[0] if adapter_name is None else adapter_name
    states = encode_histories(_encoder_of(tuner, name), histories, **options)
    parts = [tuner.gate_weights(representation=part, adapter_name=name).float().cpu() for part in states.split(4096)]
    return torch.cat(parts)


# ---- gates of a dataset ----


def find_user(dataset: Dataset, user_id: str) -> int:
    """user_index of a user.

    Raises:
        UserError: the dataset has no such user.
    """
    ids = dataset.sequences.user_ids
    index = pc.index(ids, pa.scalar(user_id, ids.type)).as_py()
    if index < 0:
        some = ", ".join(ids[:3].to_pylist())
        raise UserError(
            f'{dataset.folder} has no user "{user_id}" among its {len(ids)}: pass a user_id of the log, e.g. {some}'
        )
    return int(index)


@torch.no_grad()
def gates_of(
    model: PeftModel, dataset: Dataset, users: Sequence[int], ends: Sequence[int] | None, max_items: int
) -> torch.Tensor:
    """Gate weights (N, …) of users by the active adapter, from all of their history, or from what is before `ends`.

    Raises:
        UserError: the adapter is no instance-wise one, or has no sequence encoder.
    """
    tuner = _gated(model)
    offsets = dataset.sequences.offsets
    stops = [int(offsets[user + 1] - offsets[user]) for user in users] if ends is None else list(ends)
    histories = [dataset.read(int(user), int(end), max_items) for user, end in zip(users, stops)]
    return _weights_of(tuner, histories, None, progress="encode histories")
