"""What the frozen sequence encoder says of every example, computed once before training.

An encoder, a dataset and tokenised examples enter; a table (N, D) float32 leaves: in memory while it is small, else
mapped from a file, so that memory stays bounded and the processes of one machine share it.
"""

import os
import platform
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from accelerate import PartialState

from recllm.data.dataset import Dataset
from recllm.model.histories import encode_histories
from recllm.model.sequence_encoder import SequenceEncoder
from recllm.train.collator import TokenizedExamples

IN_MEMORY = 1 << 30  # bytes; a larger table is a file
AT_ONCE = 1 << 17  # examples whose representations are computed together; equal histories stand together in a dataset
STATISTICS_HISTORIES = 50_000  # mean and deviation of so many are as good as those of all
Array = npt.NDArray[Any]


def encode_examples(
    encoder: SequenceEncoder,
    dataset: Dataset,
    examples: TokenizedExamples,
    chosen: Array,
    max_items: int,
    device: torch.device,
) -> torch.Tensor:
    """(len(chosen), D) float32: what the encoder says of the histories of the chosen examples."""
    users, ends = examples.user_indices[chosen], examples.history_ends[chosen]
    histories = [dataset.history(int(user), int(end), max_items) for user, end in zip(users, ends)]
    return encode_histories(encoder, histories, device=device, progress="encode histories")


def representation_table(
    encoder: SequenceEncoder,
    dataset: Dataset,
    examples: TokenizedExamples,
    max_items: int,
    folder: Path,
    device: torch.device,
) -> Array:
    """(N, D) float32, a row an example; all processes call it, one on each machine computes.

    A file goes to `folder` and is unlinked as soon as it is mapped: nothing of it is left when training ends or dies.
    """
    state, shape = PartialState(), (len(examples), encoder.hidden_size)

    def fill(table: Array) -> None:
        for begin in range(0, len(table), AT_ONCE):
            chosen = np.arange(begin, min(begin + AT_ONCE, len(table)))
            table[chosen] = encode_examples(encoder, dataset, examples, chosen, max_items, device).numpy()

    if state.num_processes == 1 and 4 * shape[0] * shape[1] <= IN_MEMORY:
        table = np.empty(shape, dtype=np.float32)
        fill(table)
        return table
    path = folder / ".representations.npy"
    if state.is_local_main_process:  # of each machine, which may share the folder: the same bytes under one name
        folder.mkdir(parents=True, exist_ok=True)
        mine = f".representations-{platform.node()}-"
        for left in folder.glob(f"{mine}*.npy"):  # by a run that was killed while it wrote
            left.unlink()
        own = folder / f"{mine}{os.getpid()}.npy"
        mapped = np.lib.format.open_memmap(own, mode="w+", dtype=np.float32, shape=shape)
        fill(mapped)
        mapped.flush()
        os.replace(own, path)
    state.wait_for_everyone()
    table = np.load(path, mmap_mode="r")
    state.wait_for_everyone()
    if state.is_local_main_process:
        path.unlink(missing_ok=True)
    return table


def statistics_examples(examples: TokenizedExamples, seed: int) -> Array:
    """The examples by whose representations the gate standardises: those with a history, or a seeded choice of them.

    An empty history has a uniform gate, whatever the statistics.
    """
    chosen = np.flatnonzero(examples.history_ends)
    if len(chosen) > STATISTICS_HISTORIES:
        chosen = np.random.default_rng([seed, 0]).choice(chosen, STATISTICS_HISTORIES, replace=False)
    return np.sort(chosen)
