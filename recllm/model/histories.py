"""Representations of many histories: each different one is encoded once, in batches of like length.

An encoder and histories (item indices or event codes, oldest first, not padded) enter; (N, D) float32 on the CPU
leaves. A `RepresentationCache` remembers representations from call to call by a hash of what was read.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from recllm.data.dataset import pad_left
from recllm.errors import UserError
from recllm.model.encoders.interface import SequenceEncoder, out_of_vocabulary

NUMBERS_AT_ONCE = 1 << 27  # of a batch's working memory: 512 MiB in float32
ENTRY_BYTES = 300  # of Python around one remembered representation, measured
SAMPLED = 64  # numbers of each tensor in an encoder's fingerprint

History = npt.NDArray[np.integer]


class RepresentationCache:
    """Remembers representations of one encoder by history, the least recently used forgotten first.

    It notices another encoder, or new weights, by a fingerprint of a sample of the weights, and then begins anew.
    """

    def __init__(self, max_bytes: int = 256 << 20) -> None:
        self.max_bytes = max_bytes
        self.hits = self.misses = 0
        self._known: OrderedDict[bytes, torch.Tensor] = OrderedDict()  # hash of the items → (D,)
        self._fingerprint = b""

    def __len__(self) -> int:
        return len(self._known)

    @property
    def num_bytes(self) -> int:
        """Memory of what is remembered, about."""
        width = len(next(iter(self._known.values()))) if self._known else 0
        return len(self._known) * (4 * width + ENTRY_BYTES)

    def clear(self) -> None:
        """Forget everything."""
        self._known.clear()

    def use_for(self, encoder: SequenceEncoder) -> None:
        """Forget what another encoder said, or this one before it was trained on."""
        if (fingerprint := _fingerprint(encoder)) != self._fingerprint:
            self.clear()
            self._fingerprint = fingerprint

    def get(self, key: bytes) -> torch.Tensor | None:
        """(D,) of a history, None where it is not remembered."""
        found = self._known.get(key)
        if found is None:
            self.misses += 1
            return None
        self.hits += 1
        self._known.move_to_end(key)
        return found

    def put(self, key: bytes, representation: torch.Tensor) -> None:
        """Remember (D,), forgetting the least recently used where the limit is passed."""
        self._known[key] = representation.clone()  # not a view, which would keep its whole batch
        self._known.move_to_end(key)
        room = self.max_bytes // (4 * len(representation) + ENTRY_BYTES)
        while len(self._known) > room:
            self._known.popitem(last=False)


def encode_histories(
    encoder: SequenceEncoder,
    histories: Sequence[History],
    batch_size: int = 256,
    device: torch.device | str | None = None,
    cache: RepresentationCache | None = None,
    progress: str | None = None,
) -> torch.Tensor:
    """What the encoder says of each history: (N, D), float32, on the CPU; zeros for an empty one.

    Args:
        encoder: used in eval mode, without gradients; left in the mode and on the device that it was in.
        histories: (L,) item indices or event codes each, oldest first, without padding; of any length.
        batch_size: rows at once, at most; fewer where histories are long.
        device: where to encode; None is where the encoder is.
        cache: remembers representations across calls.
        progress: label of a progress bar; None shows none.

    Raises:
        UserError: an item or event outside the vocabulary, or a representation that is not finite.
    """
    read = [np.asarray(history)[-encoder.reach :] for history in histories]
    _check(read, encoder)
    keys = [_key(history) for history in read]
    if cache is not None:
        cache.use_for(encoder)
    known: dict[bytes, torch.Tensor] = {}
    missing: dict[bytes, History] = {}
    for key, history in zip(keys, read):
        if key in known or key in missing:
            continue
        found = cache.get(key) if cache is not None else None
        if found is not None:
            known[key] = found
        else:
            missing[key] = history
    for key, row in _encode_all(encoder, missing, batch_size, device, progress):
        known[key] = row
        if cache is not None:
            cache.put(key, row)
    return torch.stack([known[key] for key in keys]) if keys else torch.empty(0, encoder.hidden_size)


def _check(histories: Sequence[History], encoder: SequenceEncoder) -> None:
    full = [history for history in histories if len(history)]
    lowest = min((int(history.min()) for history in full), default=0)
    highest = max((int(history.max()) for history in full), default=0)
    if full and (lowest < 0 or highest >= encoder.vocabulary_size):
        raise out_of_vocabulary(lowest, highest, encoder)


def _key(history: History) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(history, dtype=np.int64).tobytes(), digest_size=16).digest()


def _encode_all(
    encoder: SequenceEncoder,
    missing: dict[bytes, History],
    batch_size: int,
    device: torch.device | str | None,
    progress: str | None,
) -> Iterator[tuple[bytes, torch.Tensor]]:
    """Each key with its (D,)."""
    order = sorted(missing, key=lambda key: len(missing[key]))  # like lengths together: less padding
    was_training, at_home = encoder.training, encoder.device
    encoder.eval().to(at_home if device is None else device)
    try:
        with tqdm(total=len(order), desc=progress, unit="history", disable=progress is None) as bar:
            for keys in batches([len(missing[key]) for key in order], encoder, batch_size):
                chosen = order[keys]
                yield from zip(chosen, _encode(encoder, [missing[key] for key in chosen]))
                bar.update(len(chosen))
    finally:
        encoder.to(at_home).train(was_training)


def batches(lengths: Sequence[int], encoder: SequenceEncoder, batch_size: int, longest: int = 0) -> Iterator[slice]:
    """Stretches of ascending lengths: at most `batch_size` rows, fewer where the working memory would be too large.

    A batch may further be limited to `longest` items in all, padding included (0: not limited). One row always fits.
    """
    start = 0
    for stop in range(1, len(lengths) + 1):
        rows, length = stop + 1 - start, lengths[min(stop, len(lengths) - 1)]  # if the next row came along
        if (
            stop == len(lengths)
            or rows > batch_size
            or rows * encoder.numbers_a_row(length) > NUMBERS_AT_ONCE
            or (longest and rows * length > longest)
        ):
            yield slice(start, stop)
            start = stop


@torch.no_grad()
def _encode(encoder: SequenceEncoder, histories: list[History]) -> torch.Tensor:
    items = torch.from_numpy(pad_left(histories)).to(encoder.device)
    with torch.autocast(encoder.device.type, enabled=False):
        rows = encoder(items).float().cpu()
    if not torch.isfinite(rows).all():
        bad = (~torch.isfinite(rows).all(dim=1)).nonzero().flatten()
        raise UserError(
            f"the sequence encoder gives {len(bad)} of {len(rows)} histories a representation that is not finite "
            f"(first: {histories[int(bad[0])][-5:].tolist()} at its end): its weights are damaged or diverged, fit it "
            "again, with a lower encoder.learning_rate"
        )
    return rows


@torch.no_grad()
def _fingerprint(encoder: SequenceEncoder) -> bytes:
    """Hash of SAMPLED numbers of each tensor: training moves them all, and reading all would cost more than a hit."""
    digest = hashlib.blake2b(f"{encoder.type} {sorted(encoder.sizes().items())}".encode(), digest_size=16)
    parts = []
    for tensor in (*encoder.parameters(), *encoder.buffers()):
        flat = tensor.detach().reshape(-1)
        parts.append(flat[:: max(1, len(flat) // SAMPLED)][:SAMPLED].float())
    digest.update(torch.cat(parts).cpu().numpy().tobytes())
    return digest.digest()
