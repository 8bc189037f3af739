"""What the frozen sequence encoder says of every example, computed once before training.

An encoder, a dataset and tokenised examples enter; a table (N, D) float32 leaves: in memory while it is small, else
mapped from a file, so that memory stays bounded and the processes of one machine share it, and the work of filling it.
"""

import platform
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from accelerate import PartialState
from accelerate.utils import gather_object

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
    users, ends = examples.user_indices[chosen], examples.gate_ends[chosen]
    histories = [dataset.read(int(user), int(end), max_items) for user, end in zip(users, ends)]
    progress = "encode histories" if PartialState().is_local_main_process else None
    return encode_histories(encoder, histories, device=device, progress=progress)


def representation_table(
    encoder: SequenceEncoder,
    dataset: Dataset,
    examples: TokenizedExamples,
    max_items: int,
    folder: Path,
    device: torch.device,
) -> Array:
    """(N, D) float32, a row an example; all processes call it, those of a machine share the work.

    A file goes to `folder` and is unlinked as soon as it is mapped: nothing of it is left when training ends or dies.
    """
    state, shape = PartialState(), (len(examples), encoder.hidden_size)

    def fill(table: Array, first: int, last: int) -> None:
        for begin in range(first, last, AT_ONCE):
            chosen = np.arange(begin, min(begin + AT_ONCE, last))
            table[chosen] = encode_examples(encoder, dataset, examples, chosen, max_items, device).numpy()

    if state.num_processes == 1 and 4 * shape[0] * shape[1] <= IN_MEMORY:
        table = np.empty(shape, dtype=np.float32)
        fill(table, 0, len(table))
        return table
    main, processes = processes_here(state)
    path = folder / f".representations-{platform.node()}-{main}.npy"  # machines may share the folder
    if state.is_main_process:
        for left in folder.glob(".representations*.npy"):  # by a run that was killed
            left.unlink()
    state.wait_for_everyone()
    if state.is_local_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
    state.wait_for_everyone()
    mapped = np.load(path, mmap_mode="r+")
    own = state.process_index - main
    fill(mapped, len(mapped) * own // processes, len(mapped) * (own + 1) // processes)
    mapped.flush()
    state.wait_for_everyone()
    table = np.load(path, mmap_mode="r")
    state.wait_for_everyone()
    if state.is_local_main_process:
        path.unlink(missing_ok=True)
    return table


def processes_here(state: PartialState) -> tuple[int, int]:
    """The first process of this machine and how many there are; launchers number those of a machine in a row."""
    if state.num_processes == 1:
        return 0, 1
    indices = gather_object([state.local_process_index])
    main = state.process_index - state.local_process_index
    others = indices[main + 1 :]
    return main, 1 + (others.index(0) if 0 in others else len(others))


def statistics_examples(examples: TokenizedExamples, seed: int) -> Array:
    """The examples by whose representations the gate standardises: those with a history, or a seeded choice of them.

    An empty history has a uniform gate, whatever the statistics.
    """
    chosen = np.flatnonzero(examples.gate_ends)
    if len(chosen) > STATISTICS_HISTORIES:
        chosen = np.random.default_rng([seed, 0]).choice(chosen, STATISTICS_HISTORIES, replace=False)
    return np.sort(chosen)
