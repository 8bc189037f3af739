"""Streamed training examples against those that are tokenised beforehand: the same rows, each once, and memory bounds.

The converted log enters, its training examples written anew as several files with small row groups of different sizes.
"""

import contextlib
import copy
import dataclasses
import re
import shutil
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from recllm.data.dataset import Dataset
from recllm.errors import UserError
from recllm.model.chat import encode, framing_bytes
from recllm.recipe import EncoderSection
from recllm.train import finetune, streaming
from recllm.train.collator import COLUMNS, Collator, Row, TokenizedExamples, tokenize
from recllm.train.encoder import fit_encoder
from recllm.train.streaming import Piece, Share, StoredHistories, StreamedExamples, cut

from .conftest import event_dataset, recipe_of
from .on_cpu import Worlds
from .test_distributed import Runs, assert_same_weights, flat, logged

EXAMPLES = 148
FILES = [[20, 7, 33], [1], [40, 47]]  # rows of each row group of each file
BATCH, STEP = 4, 8


@pytest.fixture(scope="module")
def small(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """The same examples in small row groups; and the sequences, too."""
    folder = tmp_path_factory.mktemp("small") / "dataset"
    shutil.copytree(dataset.folder, folder)
    table = dataset.examples("train")
    assert table.num_rows == sum(map(sum, FILES)) == EXAMPLES
    shutil.rmtree(folder / "train")
    (folder / "train").mkdir()
    begin = 0
    for number, groups in enumerate(FILES):
        with pq.ParquetWriter(folder / "train" / f"part-{number:05d}.parquet", table.schema) as writer:
            for rows in groups:
                writer.write_table(table.slice(begin, rows))
                begin += rows
    pq.write_table(pq.read_table(folder / "sequences.parquet"), folder / "sequences.parquet", row_group_size=5)
    return Dataset.open(folder)


@pytest.fixture(scope="module")
def tokenized(dataset: Dataset, tiny_tokenizer) -> TokenizedExamples:
    return tokenize(dataset.examples("train", COLUMNS).to_batches(), tiny_tokenizer, 512)


def streamed(dataset: Dataset, tokenizer: Any, rank: int = 0, processes: int = 1, **options: Any) -> StreamedExamples:
    share = Share(rank, processes, BATCH, STEP // BATCH)
    values = {"seed": 0, "buffer_size": 32, "histories": StoredHistories(dataset, 12), **options}
    return StreamedExamples(dataset, tokenizer, 512, share, **values)


def key(row: Row) -> tuple[int, int, bytes, int]:
    return row.user_index, row.gate_end, row.input_ids.tobytes(), row.completion_tokens


def keys(rows: Any) -> list[tuple[int, int, bytes, int]]:
    return [key(row) for row in rows]


# ---- which rows ----


def test_pieces_are_cut_anywhere():
    pieces = [Piece("a", 0, 0, 5), Piece("a", 1, 0, 1), Piece("b", 0, 0, 4)]
    rows = [(p.path, p.group, p.first + n) for p in pieces for n in range(p.rows)]
    for begin in range(11):
        for end in range(begin, 11):
            found = cut(pieces, begin, end)
            assert [(p.path, p.group, p.first + n) for p in found for n in range(p.rows)] == rows[begin:end]
            assert all(piece.rows for piece in found)


@pytest.mark.parametrize("stretch", [1024, 6])
@pytest.mark.parametrize("processes", [1, 2, 3, 5])
def test_each_example_is_once_in_the_loss_of_an_epoch_and_all_processes_have_equally_many_rows(
    small: Dataset, tokenized: TokenizedExamples, tiny_tokenizer, processes: int, stretch: int, monkeypatch
):
    monkeypatch.setattr(streaming, "STRETCH", stretch)
    shares = [list(streamed(small, tiny_tokenizer, rank, processes)) for rank in range(processes)]
    examples = [streamed(small, tiny_tokenizer, rank, processes) for rank in range(processes)]
    assert {len(rows) for rows in shares} == {len(examples[0])}
    assert len(examples[0]) == (EXAMPLES if processes == 1 else -(-EXAMPLES // (processes * BATCH)) * BATCH)
    counted = [row for rows in shares for row in rows if row.completion_tokens]
    assert sorted(keys(counted)) == sorted(keys(tokenized[n] for n in range(EXAMPLES)))
    with_loss = [sum(row.completion_tokens > 0 for row in rows) for rows in shares]
    assert max(with_loss) - min(with_loss) <= 1


def test_a_process_without_any_example_has_rows_without_loss(small: Dataset, tiny_tokenizer, tmp_path: Path):
    few = dataclasses.replace(small, folder=tmp_path)
    (tmp_path / "train").mkdir()
    pq.write_table(small.examples("train").slice(0, 2), tmp_path / "train" / "part-00000.parquet")
    shutil.copy(small.folder / "sequences.parquet", tmp_path)
    shares = [list(streamed(few, tiny_tokenizer, rank, 3)) for rank in range(3)]
    assert [len(rows) for rows in shares] == [BATCH] * 3
    assert [sum(row.completion_tokens > 0 for row in rows) for rows in shares] == [0, 1, 1]
    batch = Collator(0)(shares[0])
    assert (batch["labels"] == -100).all()
    assert batch["history_items"].shape[0] == BATCH


def test_histories_are_those_of_the_dataset(small: Dataset, tiny_tokenizer):
    for row in streamed(small, tiny_tokenizer, histories=StoredHistories(small, 7)):
        np.testing.assert_array_equal(row.history, small.read(row.user_index, row.gate_end, 7))
    assert all(row.history is None for row in streamed(small, tiny_tokenizer, histories=None))


def test_histories_of_events_are_those_of_the_dataset(tmp_path: Path):
    rows = [[(0, 1), (2, 0), (-1, 2)], [], [(1, 2), (1, 1)]]
    dataset = event_dataset(rows, ["see", "buy", "leave"], num_items=3, folder=tmp_path)
    columns = {
        "user_index": pa.array(range(3), pa.int32()),
        "items": pa.array([[item for item, _ in row] for row in rows], pa.list_(pa.int32())),
        "actions": pa.array([[["see", "buy", "leave"][action] for _, action in row] for row in rows]),
    }
    pq.write_table(pa.table(columns), tmp_path / "sequences.parquet", row_group_size=2)
    users, ends = [0, 2, 0, 1, 0], [3, 2, 1, 0, 0]
    for found, user, end in zip(StoredHistories(dataset, 2).read(users, ends), users, ends, strict=True):
        np.testing.assert_array_equal(found, dataset.read(user, end, 2))


def test_nothing_of_the_dataset_is_held_but_a_buffer(small: Dataset, tiny_tokenizer, monkeypatch):
    """Row groups are read as they are needed: before the first row only those of the first buffer."""
    read: list[int] = []
    group_of = streaming._group
    monkeypatch.setattr(streaming, "_group", lambda *a: read.append(1) or group_of(*a))
    examples = streamed(small, tiny_tokenizer, histories=None, buffer_size=8)
    assert not read
    rows = iter(examples)
    next(rows)
    assert len(read) <= 3  # of the six: two may be of one row and of seven
    assert len(list(rows)) == EXAMPLES - 1
    assert len(read) == 6


# ---- in what order ----


def test_the_order_hangs_on_seed_epoch_and_share_alone(small: Dataset, tiny_tokenizer):
    def order(rank: int = 0, processes: int = 1, seed: int = 0, epoch: int = 0, size: int = 32) -> list[Any]:
        examples = streamed(small, tiny_tokenizer, rank, processes, seed=seed, buffer_size=size)
        examples.epoch = lambda: epoch
        return keys(examples)

    first = order()
    assert order() == first
    for other in (order(seed=1), order(epoch=1), order(size=64)):
        assert other != first
        assert sorted(other) == sorted(first)
    assert order(1, 2)[:8] != order(0, 2)[:8]


def test_rows_are_shuffled_within_a_buffer(small: Dataset, tokenized: TokenizedExamples, tiny_tokenizer):
    """The order of the files is in no buffer, and no row leaves its buffer."""
    places = {key(tokenized[n]): n for n in range(EXAMPLES)}
    examples = streamed(small, tiny_tokenizer, by_length=False)
    found = [places[key(row)] for row in examples]
    pieces = cut([examples.groups[n] for n in np.random.default_rng([0, 0]).permutation(6)], 0, EXAMPLES)
    unshuffled = [places[tuple(key(examples._row(**row)))] for row in streaming.read_pieces(pieces)]
    for begin in range(0, EXAMPLES, 32):
        buffer = found[begin : begin + 32]
        assert sorted(buffer) == sorted(unshuffled[begin : begin + 32])
        assert buffer != unshuffled[begin : begin + 32]


def test_a_buffer_mixes_stretches_of_many_row_groups(small: Dataset, tokenized, tiny_tokenizer, monkeypatch):
    """Of 148 rows in 6 row groups a buffer of 32 has 8 stretches of 4 rows, wherever they lie."""
    places = {key(tokenized[n]): n for n in range(EXAMPLES)}
    ends = np.cumsum([rows for groups in FILES for rows in groups])

    def groups_met(stretch: int) -> int:
        monkeypatch.setattr(streaming, "STRETCH", stretch)
        found = [places[key(row)] for row in streamed(small, tiny_tokenizer)]
        assert sorted(found) == list(range(EXAMPLES))
        buffers = [found[begin : begin + 32] for begin in range(0, EXAMPLES, 32)]
        return sum(len(set(np.searchsorted(ends, buffer, side="right"))) for buffer in buffers)

    assert groups_met(4) > groups_met(1024) + 4  # of five buffers


def test_rows_of_like_length_stand_together_the_longest_first(small: Dataset, tiny_tokenizer):
    def padding(by_length: bool) -> int:
        rows = [len(row.input_ids) for row in streamed(small, tiny_tokenizer, buffer_size=148, by_length=by_length)]
        steps = [rows[begin : begin + STEP] for begin in range(0, EXAMPLES // STEP * STEP, STEP)]
        return sum(max(step) * len(step) - sum(step) for step in steps)

    assert padding(by_length=True) < 0.5 * padding(by_length=False)
    lengths = [len(row.input_ids) for row in streamed(small, tiny_tokenizer, buffer_size=148)]
    assert max(lengths) == max(lengths[:STEP])


@pytest.mark.parametrize("epoch", [0, 1, 2])
@pytest.mark.parametrize("rows", [2048, 2047])
def test_batches_of_like_length_meet_so_that_no_process_waits_long(small, tiny_tokenizer, rows: int, epoch: int):
    """Of 8 ranks the longest batch of each step against their mean; every second rank has a row more.

    With 2047 rows that makes a group more.
    """
    ranks, draw = 8, np.random.default_rng(7)
    lengths = [draw.integers(20, 2000, rows + (rank % 2)) for rank in range(ranks)]

    def longest(rank: int) -> np.ndarray:
        examples = streamed(small, tiny_tokenizer, rank, ranks, buffer_size=4096)
        examples.num_examples = ranks * rows + ranks // 2
        made = [Row(np.zeros(length, np.int32), 1, 0, 0) for length in lengths[rank]]
        order = examples._order(made, epoch, 0)
        assert sorted(order) == list(range(len(made)))
        whole = lengths[rank][order][: rows // STEP * STEP]
        return whole.reshape(-1, STEP).max(axis=1)

    steps = np.stack([longest(rank) for rank in range(ranks)])
    assert steps.max(axis=0).sum() < 1.1 * steps.mean(axis=0).sum()
    unaligned = np.stack([np.random.default_rng(rank).permutation(own) for rank, own in enumerate(steps)])
    assert unaligned.max(axis=0).sum() > 1.6 * unaligned.mean(axis=0).sum()


@pytest.mark.parametrize("stretch", [1024, 6])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("batches", [0, 1, 8, 11, 18, 19])
def test_a_resumed_epoch_goes_on_at_the_same_place(
    small: Dataset, tiny_tokenizer, rank: int, batches: int, stretch: int, monkeypatch
):
    monkeypatch.setattr(streaming, "STRETCH", stretch)
    examples = streamed(small, tiny_tokenizer, rank, 2)
    whole = keys(examples)
    examples.skip = batches * BATCH
    assert len(whole) == 19 * BATCH == len(examples)
    resumed = list(examples)
    assert all(row is streaming.SKIPPED for row in resumed[: batches * BATCH])
    assert keys(resumed[batches * BATCH :]) == whole[batches * BATCH :]


def test_a_resumed_epoch_reads_nothing_of_what_was_done(small: Dataset, tiny_tokenizer, monkeypatch):
    encoded: list[int] = []
    examples = streamed(small, tiny_tokenizer)
    encode = examples.encode
    monkeypatch.setattr(examples, "encode", lambda *a: encoded.append(1) or encode(*a))
    examples.skip = 30 * BATCH  # of 148 rows 120: the buffers before row 96 are passed over
    assert len(list(examples)) == EXAMPLES
    assert len(encoded) == EXAMPLES - 96


def test_a_worker_reads_ahead_in_the_same_order(small: Dataset, tiny_tokenizer):
    def batches(workers: int) -> list[torch.Tensor]:
        examples = streamed(small, tiny_tokenizer, 1, 2)
        loader = torch.utils.data.DataLoader(examples, BATCH, collate_fn=Collator(0), num_workers=workers)
        return [batch["input_ids"] for batch in loader]

    alone, ahead = batches(0), batches(1)
    assert len(alone) == 19
    assert all(torch.equal(one, two) for one, two in zip(alone, ahead, strict=True))


def test_the_gate_standardises_by_all_histories_of_a_small_dataset(small: Dataset, tokenized, tiny_tokenizer):
    found = streamed(small, tiny_tokenizer).statistics_histories()
    wanted = [small.read(int(u), int(e), 12) for u, e in zip(tokenized.user_indices, tokenized.gate_ends) if e]
    assert sorted(map(list, found)) == sorted(map(list, wanted))


def test_of_many_histories_a_share_of_each_row_group_is_chosen(small: Dataset, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(streaming, "STATISTICS_HISTORIES", 12)
    monkeypatch.setattr(streaming, "STATISTICS_SHARE", 4)
    examples = streamed(small, tiny_tokenizer)
    read, of_a_group = examples.histories.read, []
    monkeypatch.setattr(examples.histories, "read", lambda *rows: of_a_group.append(len(rows[0])) or read(*rows))
    found = examples.statistics_histories()
    assert 3 <= len(of_a_group) <= len(examples.groups)
    assert max(of_a_group) == 4  # though the largest group has 47
    assert len(found) == 12
    assert all(len(history) for history in found)
    assert list(map(list, found)) == list(map(list, examples.statistics_histories()))


# ---- what is refused ----


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"streaming": "yes"}, "train.streaming='yes': true or false is expected"),
        ({"streaming": True, "buffer_size": 0}, "train.buffer_size=0: a number of rows, 1 or more"),
        ({"streaming": True, "buffer_size": True}, "train.buffer_size=True"),
        ({"buffer_size": 100}, "train.buffer_size=100 belongs to train.streaming=true"),
        ({"streaming": True, "eval_strategy": "epoch"}, "train.eval_strategy=epoch holds all of the valid split"),
        ({"streaming": True, "dataloader_num_workers": 2}, "dataloader_num_workers=2, and only 0 or 1 keep the order"),
        ({"streaming": True, "dataloader_num_workers": 1, "dataloader_persistent_workers": True}, "repeat the first"),
        ({"streaming": True, "auto_find_batch_size": True}, "would cut it otherwise"),
        ({"streaming": True, "dataloader_drop_last": True}, "would leave examples out"),
        (
            {"streaming": True, "train_sampling_strategy": "sequential"},
            "=sequential is none of group_by_length, random",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_any_work(small, log_folder, tmp_path, train, message):
    recipe = recipe_of(log_folder, train={"use_cpu": True, "report_to": "none", "max_steps": 1, **train})
    with pytest.raises(UserError, match=message):
        finetune.train(recipe, small.folder, tmp_path / "no-encoder", tmp_path / "adapter")


def test_losses_that_need_all_examples_and_tables_are_refused(small: Dataset, log_folder: Path, tmp_path: Path):
    train = {"use_cpu": True, "report_to": "none", "max_steps": 1, "streaming": True}
    weighted = recipe_of(log_folder, train=train, loss={"dro": {"groups": "user_cluster"}})
    with pytest.raises(UserError, match="loss section weighs tokens by counts over all examples"):
        finetune.train(weighted, small.folder, tmp_path / "no-encoder", tmp_path / "adapter")
    table = {"representation": np.zeros((EXAMPLES, 16), np.float32)}
    with pytest.raises(UserError, match="gate_inputs has a row for every example"):
        finetune.train(
            recipe_of(log_folder, train=train), small.folder, tmp_path / "no", tmp_path / "adapter", gate_inputs=table
        )


def broken(small: Dataset, folder: Path) -> Dataset:
    shutil.copytree(small.folder, folder / "dataset")
    return dataclasses.replace(small, folder=folder / "dataset")


def test_files_that_cannot_be_read_are_named(small: Dataset, tiny_tokenizer, tmp_path: Path):
    dataset = broken(small, tmp_path)
    part = dataset.folder / "train" / "part-00002.parquet"
    content = part.read_bytes()
    part.write_bytes(content[:-8])
    with pytest.raises(UserError, match=r"part-00002\.parquet: is no readable parquet file"):
        streamed(dataset, tiny_tokenizer)
    part.write_bytes(content)
    examples = streamed(dataset, tiny_tokenizer)
    part.unlink()
    with pytest.raises(UserError, match=r"part-00002\.parquet does not exist"):
        list(examples)
    shutil.rmtree(dataset.folder / "train")
    with pytest.raises(UserError, match='0 "train" examples'):
        streamed(dataset, tiny_tokenizer)


def test_examples_that_do_not_fit_are_named(small: Dataset, tiny_tokenizer, tmp_path: Path):
    share = Share(0, 1, BATCH, 2)
    with pytest.raises(UserError, match=r'the "train" example \S+ has \d+ tokens, the base model\'s context is 8'):
        list(StreamedExamples(small, tiny_tokenizer, 8, share, seed=0))
    histories = StoredHistories(small, 12)
    with pytest.raises(UserError, match="user_index 48 is outside the 48 users"):
        histories.read([48], [0])
    with pytest.raises(UserError, match=r"gate_end 999 is outside the \d+ interactions of user 7"):
        histories.read([7], [999])


@pytest.mark.parametrize("processes", [1, 3])
def test_examples_that_are_too_long_are_found_before_the_first_is_trained_on(
    small: Dataset, tokenized: TokenizedExamples, tiny_tokenizer, processes: int, monkeypatch
):
    longest = int(tokenized.lengths.max())
    many = int(np.sort(tokenized.lengths)[-10])
    limits = {longest: 0, longest - 1: int((tokenized.lengths == longest).sum()), many: 0}
    limits[many] = int((tokenized.lengths > many).sum())
    for limit, wrong in limits.items():
        seen: list[Any] = []
        for round_of in ("look", "tell"):  # what each process hands in, then what each says of all of that
            for rank in range(processes):
                gather = seen.__iadd__ if round_of == "look" else lambda _, of_all=seen: of_all
                monkeypatch.setattr(streaming, "gather_object", gather)
                share = Share(rank, processes, BATCH, 1)
                examples = StreamedExamples(small, tiny_tokenizer, limit, share, seed=0)
                found = rf"^{wrong} of {len(tokenized)} \"train\" examples are longer .* has {longest}\)"
                with contextlib.suppress(UserError) if round_of == "look" else said(found if wrong else None):
                    examples.check_lengths()
        assert len(seen) == processes


def said(error: str | None) -> Any:
    """A UserError is expected, or nothing."""
    return contextlib.nullcontext() if error is None else pytest.raises(UserError, match=error)


def test_only_texts_with_more_bytes_than_the_context_has_tokens_are_tokenised(small, tokenized, tiny_tokenizer):
    encoded: list[int] = []

    def check(limit: int) -> int:
        examples, before = streamed(small, tiny_tokenizer), len(encoded)
        examples.max_tokens = limit
        encode = examples.encode

        class Counting:
            tokenizer = tiny_tokenizer

            def __call__(self, *texts: Any) -> Any:
                encoded.append(1)
                return encode(*texts)

        examples.encode = Counting()
        examples.check_lengths()
        return len(encoded) - before

    bound = bounds(small, tiny_tokenizer)
    assert check(sys.maxsize) == check(int(bound.max())) == 0
    limit = int(np.sort(bound)[-4])
    assert check(limit) == int((bound > limit).sum())


def bounds(dataset: Dataset, tokenizer: Any) -> np.ndarray:
    return streaming.most_tokens(dataset.examples("train", COLUMNS), partial(framing_bytes, tokenizer))


@pytest.mark.parametrize("template", [True, False])
def test_the_bound_is_one_for_prompts_of_any_roles(tiny_tokenizer, template: bool):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = tokenizer.chat_template if template else None
    assert bool(tokenizer.chat_template) == template
    user, begun = {"role": "user", "content": "Für Elise?\n\n"}, {"role": "assistant", "content": "A\nB 🎬\n"}
    system = {"role": "system", "content": ""}
    prompts = [[user], [system, user], [user, begun], [system, user, begun, user]]
    answer = [{"role": "assistant", "content": "Nine ½ Weeks\n"}]
    table = pa.table({"prompt": prompts, "completion": [answer] * len(prompts)})
    most = streaming.most_tokens(table.slice(1), partial(framing_bytes, tokenizer))
    for bound, prompt in zip(most, prompts[1:], strict=True):
        assert 0 <= bound - sum(map(len, encode(tokenizer, prompt, answer))) <= 400


def test_the_bound_holds_for_the_dataset(small: Dataset, tokenized: TokenizedExamples, tiny_tokenizer):
    assert (bounds(small, tiny_tokenizer) >= tokenized.lengths).all()


# ---- training ----


@pytest.fixture(scope="module")
def worlds() -> Iterator[Worlds]:
    pytest.importorskip("deepspeed", reason="needs the extra deepspeed, which `make test` installs")
    with Worlds() as worlds:
        yield worlds


@pytest.fixture(scope="module")
def runs(worlds: Worlds, small: Dataset, log_folder: Path, tiny_model_folder: Path, tmp_path_factory) -> Runs:
    folder = tmp_path_factory.mktemp("streams")
    encoder = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "batch_size": 16, "max_epochs": 3, "dropout": 0.0}
    train = {"max_steps": 3, "learning_rate": 0.01, "logging_steps": 1, "save_steps": 4, "report_to": "none"}
    train |= {"gradient_accumulation_steps": 2, "streaming": True, "buffer_size": 16}
    model = {"name_or_path": str(tiny_model_folder), "dtype": "float32"}
    recipe = recipe_of(log_folder, train=train, model=model, encoder=encoder)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    fit_encoder(small, EncoderSection(**encoder), 12, 0, folder / "encoder")
    return Runs(
        worlds, folder, {"recipe": folder / "recipe.yaml", "dataset": small.folder, "encoder": folder / "encoder"}
    )


WHOLE = 168  # rows of a step, which so holds an epoch: two batches of each process, the second one smaller


@pytest.mark.parametrize(
    ("config", "processes"), [("single", 1), ("ddp", 2), ("ddp", 3), ("zero2", 2)], ids=lambda value: str(value)
)
def test_an_epoch_has_the_loss_of_all_examples_for_any_number_of_processes(runs: Runs, config: str, processes: int):
    """One optimizer step an epoch: order and cut cannot matter, an example twice or never would."""
    beforehand = ["train.streaming=false", "train.buffer_size=null"]
    _, expected = runs("beforehand", "single", *beforehand, rows=WHOLE)
    result, adapter = runs(f"{config}-{processes}", config, rows=WHOLE, processes=processes)
    assert result["codes"] == [0] * processes, result["log"]
    engine = {"single": "PeftModelForCausalLM", "ddp": "DistributedDataParallel", "zero2": "DeepSpeedEngine"}[config]
    assert [rank["engine"] for rank in result["ranks"]] == [engine] * processes
    losses = [entry["loss"] for entry in logged(adapter)]
    assert losses == pytest.approx([entry["loss"] for entry in logged(expected)], rel=1e-5)
    assert losses[-1] < losses[0] - 0.5
    assert_same_weights(adapter, expected, atol=2e-4)
    for epoch in range(3):
        batches = [rank["rows"][2 * epoch : 2 * epoch + 2] for rank in result["ranks"]]
        seen = [row for own in batches for row in flat(own)]
        assert len(seen) == len(set(seen)) == EXAMPLES


def test_a_run_that_was_killed_within_an_epoch_goes_on_with_the_examples_it_had_not_reached(runs: Runs):
    """19 batches an epoch, so 10 steps; two steps into the second epoch is the last checkpoint."""
    steps = ["train.max_steps=14"]
    result, whole = runs("ddp-steps", "ddp", *steps, rows=16)
    assert result["codes"] == [0, 0], result["log"]
    output = runs.folder / "ddp-steps-killed" / "adapter"
    killed = runs.start(output, "ddp", *steps, rows=16, kill_at=13)
    assert killed["codes"][0] == -9
    resumed = runs.start(output, "ddp", *steps, rows=16)
    assert resumed["codes"] == [0, 0], resumed["log"]
    assert re.search(r"going on from \S+checkpoint-12", resumed["log"])
    for one, other in zip(resumed["ranks"], result["ranks"], strict=True):
        assert not flat(one["rows"][:4])  # thrown away unread
        assert one["rows"][4:] == other["rows"][19 + 4 :]
        assert len(flat(one["rows"])) >= 2 * 2 * BATCH
    losses = [entry["loss"] for entry in logged(output)]
    assert losses == pytest.approx([entry["loss"] for entry in logged(whole)], rel=1e-5)
    assert_same_weights(output, whole, atol=1e-5)


@pytest.mark.parametrize("override", ["adapter.method=lora", "encoder.joint_learning_rate=0.02"])
def test_adapters_that_read_otherwise(runs: Runs, override: str):
    beforehand = ["train.streaming=false", "train.buffer_size=null", override]
    _, expected = runs(f"beforehand-{override}", "single", *beforehand, rows=WHOLE)
    result, adapter = runs(f"single-{override}", "single", override, rows=WHOLE)
    assert result["codes"] == [0], result["log"]
    assert [e["loss"] for e in logged(adapter)] == pytest.approx([e["loss"] for e in logged(expected)], rel=1e-5)
    assert_same_weights(adapter, expected, atol=5e-4)
