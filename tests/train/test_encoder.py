import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from recllm import stages
from recllm.convert.pipeline import convert
from recllm.data.dataset import Dataset
from recllm.errors import UserError
from recllm.model.adapter import build_adapter, fit_gate_statistics
from recllm.model.sequence_encoder import ContentEncoder, SASRec, encode_histories, load_encoder, make_encoder
from recllm.recipe import AdapterSection, EncoderSection
from recllm.schema import TEST, TRAIN, UNUSED, VALID
from recllm.train import encoder as module
from recllm.train.encoder import (
    Held,
    evaluate_encoder,
    fit_encoder,
    sampled_cross_entropy,
    training_windows,
    validation,
)

from .conftest import NUM_ITEMS, event_dataset, recipe_of

KINDS = {"sasrec": {}, "windowed": {"window": 3}, "gru4rec": {"type": "gru4rec"}, "content": {"type": "content"}}
SECTION = EncoderSection(hidden_size=16, num_layers=1, batch_size=16, max_epochs=25, dropout=0.1, learning_rate=5e-3)


def with_splits(dataset: Dataset, splits: np.ndarray) -> Dataset:
    copy = Dataset(dataset.folder, dataset.manifest, dataset.items)
    copy.__dict__["sequences"] = replace(dataset.sequences, splits=splits.astype(np.int8))
    return copy


def test_windows_hold_every_training_target_once_with_what_came_before(dataset: Dataset):
    sequences = dataset.sequences
    pairs = [(int(i), int(t)) for w in training_windows(dataset, 5) for i, t in zip(w.items, w.targets)]
    wanted = []
    for begin, end in zip(sequences.offsets[:-1], sequences.offsets[1:]):
        train = sequences.items[begin:end][sequences.splits[begin:end] == TRAIN].tolist()
        wanted += list(itertools.pairwise(train))
    assert sorted(pairs) == sorted(wanted)
    assert max(len(w.items) for w in training_windows(dataset, 5)) == 5


@pytest.mark.parametrize("code", [VALID, TEST, UNUSED])
def test_other_positions_are_never_read(dataset: Dataset, code: int):
    splits = np.full(len(dataset.sequences.splits), TRAIN)
    hidden = dataset.sequences.items == 7
    splits[hidden] = code
    for window in training_windows(with_splits(dataset, splits), 12):
        assert 7 not in window.items
        assert 7 not in window.targets


def test_validation_reads_all_positions_before_the_target(dataset: Dataset):
    held = validation(dataset, 100, exclude_history=True)
    sequences = dataset.sequences
    assert len(held.targets) == sequences.num_users
    end = sequences.offsets[1]  # leave-one-out: valid is the last but one
    assert held.targets[0] == sequences.items[end - 2]
    assert held.histories[0].tolist() == held.had[0].tolist() == sequences.items[: end - 2].tolist()
    short = validation(dataset, 2, exclude_history=True)
    assert short.histories[0].tolist() == sequences.items[end - 4 : end - 2].tolist()
    assert short.had[0].tolist() == held.had[0].tolist()  # the ranking leaves all of them out
    assert np.shares_memory(short.had[0], sequences.items)
    assert validation(dataset, 2, exclude_history=False).had is None


def test_a_large_validation_split_is_sampled_by_seed(dataset: Dataset, monkeypatch):
    whole = validation(dataset, 12, False)
    monkeypatch.setattr(module, "VALIDATION_TARGETS", 20)
    held, other = validation(dataset, 12, True, seed=1), validation(dataset, 12, True, seed=2)
    assert len(held.targets) == len(held.histories) == 20
    assert len(held.had) == 20
    assert np.array_equal(held.targets, validation(dataset, 12, True, seed=1).targets)
    pairs = [{(*history.tolist(), int(t)) for history, t in zip(h.histories, h.targets)} for h in (whole, held, other)]
    assert pairs[1] <= pairs[0]
    assert pairs[1] != pairs[2]


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_the_ring_and_beats_popularity(dataset: Dataset, tmp_path, kind: str):
    section = EncoderSection(**SECTION.model_dump() | KINDS[kind])
    features = torch.randn(NUM_ITEMS, 40, generator=torch.Generator().manual_seed(0)) if kind == "content" else None
    output = tmp_path / "encoder"
    metrics = fit_encoder(dataset, section, 12, 0, output, exclude_history=False, item_features=features)
    assert metrics["ndcg@10"] > 0.8
    assert metrics["ndcg@10"] > 2 * metrics["popularity_ndcg@10"]
    encoder, info = load_encoder(tmp_path / "encoder")
    assert info["vocabulary_sha256"] == dataset.vocabulary_sha256
    assert info["type"] == section.type
    saved = evaluate_encoder(encoder, validation(dataset, 12, exclude_history=False))
    assert saved["ndcg@10"] == pytest.approx(metrics["ndcg@10"])  # the best epoch was kept, not the last


def test_same_seed_same_weights_and_the_callers_generator_is_untouched(dataset: Dataset, tmp_path):
    section = SECTION.model_copy(update={"max_epochs": 2})
    torch.manual_seed(5)
    expected = torch.rand(1)
    weights = []
    for number, seed in enumerate((3, 3, 4)):
        torch.manual_seed(5)
        fit_encoder(dataset, section, 12, seed, tmp_path / str(number))
        assert torch.equal(torch.rand(1), expected)
        weights.append(load_encoder(tmp_path / str(number))[0].state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not torch.equal(weights[0]["item_embedding.weight"], weights[2]["item_embedding.weight"])


def test_it_stops_after_patience_epochs_without_a_better_one(dataset: Dataset, tmp_path, monkeypatch):
    scores = iter([0.1, 0.3, 0.2, 0.3, 0.25, 0.9])
    monkeypatch.setattr(module, "evaluate_encoder", lambda *_: {"ndcg@10": next(scores), "hit_rate@10": 0.0})
    metrics = fit_encoder(dataset, SECTION.model_copy(update={"patience": 3}), 12, 0, tmp_path / "encoder")
    assert (metrics["ndcg@10"], metrics["epoch"]) == (0.3, 2)


class FixedScores(SASRec):
    """Scores every history alike."""

    def __init__(self, scores: list[float]) -> None:
        super().__init__(num_items=len(scores), hidden_size=2, num_layers=1, num_heads=1, max_items=4)
        self.fixed = torch.tensor(scores)

    def scores(self, representation: torch.Tensor) -> torch.Tensor:
        return self.fixed.expand(len(representation), -1)


@pytest.mark.parametrize(
    ("exclude", "target", "rank"),
    [(False, 0, 1), (False, 2, 3), (False, 3, 5), (False, 4, 5), (True, 2, 2), (True, 0, 1)],
)
def test_ranks_are_pessimistic_and_the_target_is_always_ranked(exclude: bool, target: int, rank: int):
    histories = [np.array([0], dtype=np.int32)]
    held = Held(histories, np.array([target]), histories if exclude else None)
    metrics = evaluate_encoder(FixedScores([5.0, 4.0, 3.0, 1.0, 1.0]), held)
    assert metrics == {"ndcg@10": pytest.approx(1 / math.log2(1 + rank)), "hit_rate@10": 1.0}


def test_scores_come_in_blocks_of_bounded_size(monkeypatch):
    sizes = []

    class Watched(FixedScores):
        def scores(self, representation: torch.Tensor) -> torch.Tensor:
            sizes.append(len(representation))
            return super().scores(representation)

    histories = [np.array([1], dtype=np.int32)] * 7
    held = Held(histories, np.array([0, 2, 4, 4, 0, 3, 2]), histories)
    whole = evaluate_encoder(FixedScores([5.0, 4.0, 3.0, 1.0, 1.0]), held)
    monkeypatch.setattr(module, "SCORES_AT_ONCE", 12)
    assert evaluate_encoder(Watched([5.0, 4.0, 3.0, 1.0, 1.0]), held) == whole
    assert max(sizes) == 12 // 5


def test_a_score_that_is_no_number_stands_before_the_target():
    held = Held([np.array([], dtype=np.int32)], np.array([0]), None)
    metrics = evaluate_encoder(FixedScores([5.0, math.nan, math.nan, 1.0]), held)
    assert metrics["ndcg@10"] == pytest.approx(1 / math.log2(1 + 3))


def test_popularity_counts_training_positions_and_leaves_out_what_the_user_had(dataset: Dataset, tmp_path):
    sequences = dataset.sequences
    counts = np.bincount(sequences.items[sequences.splits == TRAIN], minlength=dataset.num_items)
    section = SECTION.model_copy(update={"max_epochs": 1})
    for exclude in (False, True):
        held, gains = validation(dataset, 100, exclude), []
        for history, target in zip(held.histories, held.targets):
            others = [i for i in range(dataset.num_items) if i != target and not (exclude and i in history)]
            rank = 1 + sum(counts[i] >= counts[target] for i in others)
            gains.append(1 / math.log2(1 + rank) if rank <= 10 else 0.0)
        metrics = fit_encoder(dataset, section, 12, 0, tmp_path / "encoder", exclude_history=exclude)
        assert metrics["popularity_ndcg@10"] == pytest.approx(np.mean(gains))


def test_sampled_softmax_over_all_items_is_the_full_softmax():
    generator = torch.Generator().manual_seed(0)
    states, table = torch.randn(6, 4, generator=generator), torch.randn(9, 4, generator=generator)
    targets = torch.tensor([0, 3, 8, 3, 1, 2])
    sampled = sampled_cross_entropy(states, targets, torch.arange(9), table)
    torch.testing.assert_close(sampled, functional.cross_entropy(states @ table.T, targets))


def test_large_catalogues_train_on_a_sample(dataset: Dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "FULL_SOFTMAX_ITEMS", 10)
    monkeypatch.setattr(module, "SAMPLED_NEGATIVES", 12)
    assert fit_encoder(dataset, SECTION, 12, 0, tmp_path / "encoder", exclude_history=False)["ndcg@10"] > 0.8


def test_no_validation_target_is_an_error(dataset: Dataset, tmp_path):
    everything = with_splits(dataset, np.full(len(dataset.sequences.splits), TRAIN))
    with pytest.raises(UserError, match="0 validation targets"):
        fit_encoder(everything, SECTION, 12, 0, tmp_path / "encoder")
    assert not (tmp_path / "encoder").exists()


def test_a_diverging_learning_rate_is_an_error(dataset: Dataset, tmp_path):
    with pytest.raises(UserError, match=r"lower encoder\.learning_rate"):
        fit_encoder(dataset, SECTION.model_copy(update={"learning_rate": 1e30}), 12, 0, tmp_path / "encoder")


# ---- events ----

ACTIONS = ["view", "buy", "leave"]


def walks(num_users: int = 120, num_items: int = 6) -> Dataset:
    """Everybody views an item, buys it, leaves, and goes on with the next item of a ring; all but the last are TRAIN.

    What follows a view of the item that was just viewed is a purchase: (item, action) says the whole of the next event.
    """
    generator = np.random.default_rng(0)
    rows = []
    for _ in range(num_users):
        at, row = int(generator.integers(num_items)), []
        for _ in range(4):
            row += [(at, 0), (at, 1), (-1, 2)]
            at = (at + 1) % num_items
        rows.append(row[: int(generator.integers(8, 12))])
    return event_dataset(rows, ACTIONS, num_items)


def test_windows_of_events_read_codes_and_say_what_comes_next():
    dataset = event_dataset([[(1, 0), (-1, 2), (0, 1), (1, 0), (1, 1)]], ACTIONS, 2, valid=1)
    (window,) = training_windows(dataset, 10)
    codes = [2 + 3 * 0, 0 + 3 * 2, 1 + 3 * 1]  # (item + 1) + (2 items + 1) · action
    assert window.items.tolist() == codes
    assert window.targets.tolist() == [-1, 0, 1]
    assert window.actions is not None
    assert window.actions.tolist() == [2, 1, 0]
    held = validation(dataset, 12, exclude_history=True)
    assert held.actions is not None
    assert (held.targets.tolist(), held.actions.tolist()) == ([1], [1])
    assert held.histories[0].tolist() == [*codes, 2 + 3 * 0]
    assert held.had[0].tolist() == [1, -1, 0, 1]
    short = validation(dataset, 2, exclude_history=True)
    assert short.histories[0].tolist() == [codes[2], 2 + 3 * 0]
    assert short.histories[0].nbytes == 2 * 8  # no whole history is copied
    assert np.shares_memory(short.had[0], dataset.sequences.items)
    assert [window.items.tolist() for window in training_windows(dataset, 2)] == [codes[1:], codes[:1]]


def test_every_training_event_but_a_users_first_is_a_target():
    dataset = walks()
    sequences = dataset.sequences
    pairs = [pair for w in training_windows(dataset, 5) for pair in zip(w.targets.tolist(), w.actions.tolist())]
    wanted = []
    for begin, end in zip(sequences.offsets[:-1], sequences.offsets[1:]):
        train = np.flatnonzero(sequences.splits[begin:end] == TRAIN)[1:] + begin
        wanted += list(zip(sequences.items[train].tolist(), sequences.actions[train].tolist()))
    assert sorted(pairs) == sorted(wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_the_next_action_and_the_next_item(tmp_path, kind: str):
    dataset = walks()
    section = EncoderSection(**SECTION.model_dump() | KINDS[kind])
    features = torch.randn(6, 40, generator=torch.Generator().manual_seed(0)) if kind == "content" else None
    metrics = fit_encoder(dataset, section, 12, 0, tmp_path / "encoder", exclude_history=False, item_features=features)
    assert metrics["action_accuracy"] > 0.95
    assert metrics["macro_recall"] > 0.95
    assert metrics["ndcg@10"] > 0.9
    assert metrics["nats"] < 0.5 * metrics["popularity_action_nats"]
    encoder, info = load_encoder(tmp_path / "encoder")
    assert (info["num_actions"], info["vocabulary_sha256"]) == (3, dataset.vocabulary_sha256)
    saved = evaluate_encoder(encoder, validation(dataset, 12, exclude_history=False))
    assert saved["nats"] == pytest.approx(metrics["nats"])  # the best epoch was kept


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_actions_of_a_log_without_items(tmp_path, kind: str):
    dataset = event_dataset([[(-1, (user + step) % 3) for step in range(8)] for user in range(30)], ACTIONS, 0)
    section = EncoderSection(**SECTION.model_dump() | KINDS[kind])
    features = torch.zeros(0, 40) if kind == "content" else None
    metrics = fit_encoder(dataset, section, 12, 0, tmp_path / "encoder", item_features=features)
    assert metrics["action_accuracy"] == 1.0
    assert metrics["nats"] == metrics["action_nats"]
    assert not {"ndcg@10", "item_nats", "popularity_ndcg@10"} & metrics.keys()
    assert load_encoder(tmp_path / "encoder")[0].scores(torch.zeros(2, 16)).shape == (2, 0)


def test_the_loss_of_events_is_that_of_the_action_and_of_the_item_where_there_is_one():
    encoder = make_encoder(SECTION, 4, 12, num_actions=3).eval()
    with torch.no_grad():
        encoder.item_embedding.weight.zero_()
        encoder.action_embedding.weight.zero_()
        encoder.action_bias.copy_(torch.tensor([0.5, 0.25, 0.25]).log())
    states, items, actions = torch.ones(4, 16), torch.tensor([3, -1, -1, 0]), torch.tensor([0, 1, 2, 0])
    loss = module._event_loss(encoder, states, items, actions, np.random.default_rng(0))
    expected = (2 * math.log(2) + 2 * math.log(4) + 2 * math.log(4)) / 4  # two items among four, equally likely
    assert loss.item() == pytest.approx(expected)
    none = module._event_loss(encoder, states, torch.full((4,), -1), actions, np.random.default_rng(0))
    assert none.item() == pytest.approx((2 * math.log(2) + 2 * math.log(4)) / 4)


class FixedEvents(FixedScores):
    """Scores every history alike: items, and actions by their logarithmic probabilities."""

    def __init__(self, scores: list[float], actions: list[float]) -> None:
        super().__init__(scores)
        self.num_actions, self.fixed_actions = len(actions), torch.tensor(actions).log()
        self.action_embedding = torch.nn.Embedding(len(actions), 2)

    def action_scores(self, representation: torch.Tensor) -> torch.Tensor:
        return self.fixed_actions.expand(len(representation), -1)


@pytest.mark.parametrize(("exclude", "rank"), [(False, 2), (True, 1)])
def test_metrics_of_events(exclude: bool, rank: int):
    """Items score 2, 1, 0; actions have 0.5, 0.3, 0.2; one target of four has an item: 1, of which 0 was had before."""
    histories = [np.array([1, 4], dtype=np.int64)] * 4  # action 0 on item 0; action 1 without item
    had = [np.array([0, -1])] * 4 if exclude else None
    held = Held(histories, np.array([-1, 1, -1, -1]), had, np.array([0, 1, 2, 0]))
    metrics = evaluate_encoder(FixedEvents([2.0, 1.0, 0.0], [0.5, 0.3, 0.2]), held)
    action_nats = -math.log(0.5 * 0.3 * 0.2 * 0.5)
    item_nats = math.log(math.exp(2) + math.exp(1) + math.exp(0)) - 1
    assert metrics == {
        "nats": pytest.approx((action_nats + item_nats) / 4),
        "action_nats": pytest.approx(action_nats / 4),
        "item_nats": pytest.approx(item_nats),
        "action_accuracy": 2 / 4,  # action 0 is said of all
        "macro_recall": pytest.approx(1 / 3),
        "ndcg@10": pytest.approx(1 / math.log2(1 + rank)),
        "hit_rate@10": 1.0,
    }


def test_the_constant_action_is_the_most_frequent_of_training():
    rows = [[(-1, 0), (-1, 0), (-1, 0), (-1, 1), (-1, 0)], [(-1, 0), (-1, 1), (-1, 2)]]
    dataset = event_dataset(rows, ACTIONS, 0)  # trained: 0 0 0 1, 0 1; held: 0, 2
    figures = module._constant_action(dataset, np.array([0, 2]))
    assert figures == {
        "popularity_action_nats": pytest.approx(-(math.log(5 / 9) + math.log(1 / 9)) / 2),  # (4, 2, 0) + 1
        "popularity_action_accuracy": 0.5,
        "popularity_macro_recall": 0.5,
    }


def test_the_epoch_with_the_fewest_nats_is_kept(tmp_path, monkeypatch):
    scores = iter([2.0, 1.5, 1.7, 1.6, 1.9, 0.1])
    monkeypatch.setattr(module, "evaluate_encoder", lambda *_: {"nats": next(scores), "ndcg@10": 0.0})
    metrics = fit_encoder(walks(), SECTION.model_copy(update={"patience": 3}), 12, 0, tmp_path / "encoder")
    assert (metrics["nats"], metrics["epoch"]) == (1.5, 2)


def test_large_catalogues_of_events_train_on_a_sample(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "FULL_SOFTMAX_ITEMS", 3)
    monkeypatch.setattr(module, "SAMPLED_NEGATIVES", 5)
    metrics = fit_encoder(walks(), SECTION, 12, 0, tmp_path / "encoder", exclude_history=False)
    assert metrics["ndcg@10"] > 0.9
    assert metrics["action_accuracy"] > 0.95


# ---- items by their text ----


def test_a_recipe_with_a_content_encoder_has_its_base_model_read_the_titles(
    log_folder, tiny_model_folder, tmp_path, capsys
):
    changes = {"encoder": {"type": "content", "hidden_size": 16, "num_layers": 1, "max_epochs": 1}}
    model = {"name_or_path": str(tiny_model_folder), "dtype": "float32"}
    recipe = recipe_of(log_folder, **changes, model=model, output_dir=str(tmp_path / "run"))
    stages.run_stage(recipe, "convert")
    assert stages.run_stage(recipe, "encoder")
    assert (recipe.output / "item_features" / "features.safetensors").is_file()
    encoder, _ = load_encoder(recipe.output / "encoder")
    assert isinstance(encoder, ContentEncoder)
    assert encoder.item_embedding.features.float().std() > 0.9
    assert not stages.run_stage(recipe, "encoder")
    other = recipe.model_copy(update={"model": recipe.model.model_copy(update={"dtype": "bfloat16"})})
    assert stages.fingerprint(other, "encoder") != stages.fingerprint(recipe, "encoder")
    features = recipe.output / "item_features" / "features.json"
    before = features.stat().st_mtime_ns
    deeper = recipe.model_copy(update={"encoder": recipe.encoder.model_copy(update={"hidden_size": 8})})
    assert stages.run_stage(deeper, "encoder")
    assert features.stat().st_mtime_ns == before  # the titles were not read again


# ---- long histories ----


def test_long_windows_come_in_fewer_rows(dataset: Dataset, monkeypatch):
    monkeypatch.setattr(module, "LONG_WINDOW", 4)
    encoder = make_encoder(SECTION, dataset.num_items, 12)
    windows = training_windows(dataset, 12)
    rows = [items.shape for items, *_ in module._batches(windows, 8, np.random.default_rng(0), encoder)]
    assert sum(count for count, _ in rows) == len(windows)
    assert all(count <= 8 and count * length <= 8 * 4 for count, length in rows)
    assert max(length for _, length in rows) == 12


def test_a_loss_in_pieces_is_the_loss_and_has_its_gradients(monkeypatch):
    encoder = make_encoder(SECTION, 30, 12)
    generator = torch.Generator().manual_seed(0)
    states, targets = torch.randn(50, 16, generator=generator), torch.randint(0, 30, (50,), generator=generator)

    def run() -> list[torch.Tensor]:
        encoder.zero_grad()
        leaf = states.clone().requires_grad_()
        loss = module._cross_entropy(encoder, leaf, targets, np.random.default_rng(0))
        loss.backward()
        return [loss.detach(), leaf.grad, encoder.item_embedding.weight.grad.clone()]

    for full_softmax in (50_000, 10):
        monkeypatch.setattr(module, "FULL_SOFTMAX_ITEMS", full_softmax)
        monkeypatch.setattr(module, "SCORES_AT_ONCE", 1 << 26)
        whole = run()
        monkeypatch.setattr(module, "SCORES_AT_ONCE", 30 * 7)
        torch.testing.assert_close(run(), whole, rtol=1e-5, atol=1e-7)


def test_windows_of_a_windowed_encoder_are_as_long_as_it_reaches(dataset: Dataset, tmp_path, monkeypatch, capsys):
    lengths = []
    real = module.training_windows
    monkeypatch.setattr(module, "training_windows", lambda *given: lengths.append(given[1]) or real(*given))
    section = EncoderSection(**SECTION.model_dump() | {"window": 3, "max_epochs": 1})
    fit_encoder(dataset, section, 1000, 0, tmp_path / "encoder")
    assert lengths == [4]  # one layer: the item itself and three before it
    longest = int(np.diff(dataset.sequences.offsets).max())
    assert f"up to {longest} items, of which this encoder reads the newest 4 " in capsys.readouterr().err
    module._say_reach(make_encoder(section, 24, 4), dataset, 4)  # as many as history.max_items asks for
    module._say_reach(make_encoder(SECTION, 24, 1000), dataset, 1000)
    assert capsys.readouterr().err == ""


def test_attention_over_very_long_histories_is_pointed_out(dataset: Dataset, monkeypatch, capsys):
    monkeypatch.setattr(module, "LONG_QUADRATIC", 10)
    windows = training_windows(dataset, 1000)
    monkeypatch.setattr(SASRec, "numbers_a_row", lambda _, length: length**2)
    module._warn_of_cost(make_encoder(SECTION, 24, 1000), windows)
    assert "gru4rec" in capsys.readouterr().err
    module._warn_of_cost(make_encoder(EncoderSection(type="gru4rec"), 24, 1000), windows)
    assert capsys.readouterr().err == ""


@pytest.fixture(scope="module")
def long_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two users with 10,003 interactions each, with 30 of 40 items."""
    folder = tmp_path_factory.mktemp("long")
    generator = np.random.default_rng(0)
    (folder / "items.csv").write_text("item_id,title\n" + "".join(f"i{n:02d},Film number {n:02d}\n" for n in range(40)))
    rows = [
        f"u{user},i{item:02d},{step}"
        for user in range(2)
        for step, item in enumerate(generator.integers(30, size=10_003))
    ]
    (folder / "log.csv").write_text("user_id,item_id,timestamp\n" + "\n".join(rows) + "\n")
    return folder


def test_ten_thousand_events_reach_the_gate_while_the_prompt_shows_ten(long_log: Path, tiny_llama):
    task = {"task": "next_item", "template": "next_item/films", "max_train_targets": 1}
    recipe = recipe_of(long_log, history={"max_items": 10_000}, prompt={"max_items": 10}, tasks=[task])
    convert(recipe, recipe.output / "dataset", workers=1)
    dataset = Dataset.open(recipe.output / "dataset")
    section = EncoderSection(type="gru4rec", hidden_size=16, num_layers=1, max_epochs=1)
    fit_encoder(dataset, section, 10_000, 0, recipe.output / "encoder")
    encoder, _ = load_encoder(recipe.output / "encoder")

    (example, *_) = dataset.examples("test").to_pylist()
    assert json.dumps(example["prompt"]).count("Film number") == 10
    history = dataset.history(example["user_index"], example["history_end"], 10_000)
    assert len(history) == 10_000

    early = history.copy()
    early[100:110] = (early[100:110] + 1) % 30
    states = encode_histories(encoder, [history, early, history[-10:], history[:5000]])
    again = encode_histories(encoder, [history, history[-7:]], batch_size=1)[0]
    moved = (states[0] - states[1]).abs().max()  # 9,900 steps later there is little left of it, but no rounding
    assert moved > 1e-5
    assert (states[0] - again).abs().max() < moved / 10
    model = build_adapter(tiny_llama(), AdapterSection(r=4, num_experts=2), encoder)
    fit_gate_statistics(model, states)
    torch.nn.init.normal_(model.base_model.gate["default"].output.weight)
    items = torch.from_numpy(np.stack([history, early])).long()
    gates = model.base_model.gate_weights(items)
    assert not torch.equal(gates[0], gates[1])
    given = model.base_model.gate_weights(representation=states[:2])
    torch.testing.assert_close(gates, given, rtol=0, atol=1e-3)
