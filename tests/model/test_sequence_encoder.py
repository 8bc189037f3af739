import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from recllm.errors import UserError
from recllm.model import histories as histories_module
from recllm.model.adapter import build_adapter, load_adapter, save_adapter
from recllm.model.encoders import sasrec as sasrec_module
from recllm.model.histories import ENTRY_BYTES, batches
from recllm.model.sequence_encoder import (
    ContentEncoder,
    Gru4Rec,
    RepresentationCache,
    SASRec,
    SequenceEncoder,
    attention_mask,
    encode_histories,
    load_encoder,
    make_encoder,
    save_encoder,
)
from recllm.recipe import AdapterSection, EncoderSection

KINDS = ("sasrec", "windowed", "gru4rec", "content")


def _sasrec(max_items: int = 8, **sizes: Any) -> SASRec:
    torch.manual_seed(0)
    return SASRec(20, 16, max_items=max_items, **sizes).eval()


def _encoder(kind: str, max_items: int = 8, **section: Any) -> SequenceEncoder:
    torch.manual_seed(0)
    features = torch.randn(20, 24) if kind == "content" else None
    if kind == "windowed":
        kind, section = "sasrec", {"window": 3} | section
    sizes = EncoderSection(**{"type": kind, "hidden_size": 16, "dropout": 0.2} | section)
    return make_encoder(sizes, 20, max_items, features).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_shapes(kind: str) -> None:
    encoder, items = _encoder(kind), torch.tensor([[1, 2, 3], [-1, 4, 5]])
    assert encoder.states(items).shape == (2, 3, 16)
    assert encoder(items).shape == (2, 16)
    assert torch.equal(encoder(items), encoder.states(items)[:, -1])
    assert encoder.scores(encoder(items)).shape == (2, 20)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(KINDS), st.lists(st.integers(0, 19), min_size=1, max_size=8), st.integers(0, 8))
def test_left_padding_changes_nothing(kind: str, history: list[int], padding: int) -> None:
    encoder = _encoder(kind, max_items=16)
    plain = encoder(torch.tensor([history]))
    padded = encoder(torch.tensor([[-1] * padding + history]))
    torch.testing.assert_close(padded, plain)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_gives_zero_states_and_leaves_those_of_the_items(kind: str) -> None:
    encoder = _encoder(kind)
    padded = encoder.states(torch.tensor([[-1, -1, 4, 5]]))
    assert torch.equal(padded[:, :2], torch.zeros(1, 2, 16))
    torch.testing.assert_close(padded[:, 2:], encoder.states(torch.tensor([[4, 5]])))


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_history_is_cut_to_its_newest_items(kind: str) -> None:
    encoder, items = _encoder(kind, max_items=4), torch.arange(10)[None]
    assert torch.equal(encoder(items), encoder(items[:, -4:]))


@pytest.mark.parametrize("kind", KINDS)
def test_states_look_back_only(kind: str) -> None:
    encoder, items = _encoder(kind), torch.tensor([[1, 2, 3, 4, 5]])
    changed = items.clone()
    changed[0, 3] = 9
    before, after = encoder.states(items), encoder.states(changed)
    assert torch.equal(before[:, :3], after[:, :3])
    assert not torch.allclose(before[:, 3:], after[:, 3:])


@pytest.mark.parametrize("kind", KINDS)
def test_order_matters(kind: str) -> None:
    encoder = _encoder(kind)
    assert not torch.allclose(encoder(torch.tensor([[1, 2, 3]])), encoder(torch.tensor([[2, 1, 3]])))


@pytest.mark.parametrize("kind", KINDS)
def test_batch_equals_single_rows(kind: str) -> None:
    encoder = _encoder(kind)
    rows = torch.tensor([[1, 2, 3], [-1, -1, 7], [-1, 4, 5]])
    torch.testing.assert_close(encoder(rows), torch.cat([encoder(row[None]) for row in rows]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [0, 1, 5, 8])
def test_an_empty_history_gives_zeros_and_no_nan(kind: str, length: int) -> None:
    encoder = _encoder(kind).train()
    items = torch.full((2, length), -1)
    assert torch.equal(encoder(items), torch.zeros(2, 16))


def test_every_position_may_look_at_something() -> None:
    mask = attention_mask(torch.tensor([[False, True, True], [False, False, False]]))
    assert mask[0, 0].tolist() == [[True, False, False], [False, True, False], [False, True, True]]
    assert mask.any(-1).all()  # a softmax over nothing is NaN in older torch


@pytest.mark.parametrize("kind", KINDS)
def test_padding_gives_finite_gradients(kind: str) -> None:
    encoder = _encoder(kind).train()
    encoder.states(torch.tensor([[-1] * 6, [-1, 1, 2, 3, 4, 5]])).square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in encoder.parameters() if p.grad is not None)


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_the_next_item(kind: str) -> None:
    # item i is followed by i + 1: after a few steps the successor ranks first
    encoder = _encoder(kind).train()
    optimizer = torch.optim.Adam(encoder.parameters(), lr=1e-2)
    starts = torch.arange(12)[:, None]
    items = starts + torch.arange(8)  # (12, 8)
    for _ in range(60):
        loss = torch.nn.functional.cross_entropy(
            encoder.scores(encoder.states(items[:, :-1])).flatten(0, 1), items[:, 1:].flatten()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    encoder.eval()
    assert encoder.scores(encoder(items[:, :4])).argmax(-1).tolist() == items[:, 4].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_items_outside_the_vocabulary(kind: str) -> None:
    encoder = _encoder(kind)
    for items in ([[1, 20]], [[20, *[1] * 30]]):  # beyond the history's cut too
        with pytest.raises(UserError, match="20 items"):
            encoder(torch.tensor(items))
        with pytest.raises(UserError, match="20 items"):
            encoder.states(torch.tensor(items))
    with pytest.raises(UserError, match="-2"):
        encoder(torch.tensor([[-2, 1]]))
    with pytest.raises(UserError, match="20 items"):
        encode_histories(encoder, [np.array([1, 2]), np.array([20])])
    with pytest.raises(UserError, match="-1"):
        encode_histories(encoder, [np.array([-1, 2])])  # histories are not padded


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(UserError, match="multiple of 3"):
        SASRec(20, 16, num_heads=3)


@pytest.mark.parametrize("kind", KINDS)
def test_save_and_load(tmp_path: Path, kind: str) -> None:
    encoder, items = _encoder(kind), torch.tensor([[1, 2, 3]])
    save_encoder(encoder, tmp_path / "encoder", "abc", {"metrics": {"ndcg@10": 0.5}, "seed": 3})
    loaded, info = load_encoder(tmp_path / "encoder")
    assert torch.equal(loaded(items), encoder(items))
    assert not loaded.training
    assert loaded.vocabulary_sha256 == info["vocabulary_sha256"] == "abc"
    assert info["metrics"] == {"ndcg@10": 0.5}
    assert (info["num_items"], info["hidden_size"], info["max_items"]) == (20, 16, 8)
    assert (type(loaded), info["type"]) == (type(encoder), "sasrec" if kind == "windowed" else kind)
    assert loaded.sizes() == encoder.sizes()
    assert torch.equal(loaded.scores(loaded(items)), encoder.scores(encoder(items)))


@pytest.mark.parametrize("absent", [{"num_actions"}, {"num_actions", "window"}])
def test_an_encoder_of_an_earlier_format_still_loads(tmp_path: Path, absent: set[str]) -> None:
    encoder = _sasrec()
    save_encoder(encoder, tmp_path / "encoder", "abc", {})
    sizes = tmp_path / "encoder" / "encoder.json"
    old = {name: value for name, value in json.loads(sizes.read_text()).items() if name not in absent}
    assert set(old) == {"type", "vocabulary_sha256", *SASRec.SIZES} - absent
    sizes.write_text(json.dumps(old))
    items = torch.tensor([[1, 2, 3]])
    assert torch.equal(load_encoder(tmp_path / "encoder")[0](items), encoder(items))


def test_bad_folders(tmp_path: Path) -> None:
    folder = tmp_path / "encoder"
    with pytest.raises(UserError, match="does not exist"):
        load_encoder(folder)
    save_encoder(_sasrec(), folder, "abc", {})
    weights = (folder / "encoder.safetensors").read_bytes()
    (folder / "encoder.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(UserError, match="damaged"):
        load_encoder(folder)
    (folder / "encoder.safetensors").unlink()
    with pytest.raises(UserError, match="does not exist"):
        load_encoder(folder)
    (folder / "encoder.safetensors").write_bytes(weights)
    sizes = json.loads((folder / "encoder.json").read_text())
    (folder / "encoder.json").write_text(json.dumps(sizes | {"num_items": 21}))
    with pytest.raises(UserError, match="does not fit"):
        load_encoder(folder)
    (folder / "encoder.json").write_text(json.dumps({k: v for k, v in sizes.items() if k != "num_items"}))
    with pytest.raises(UserError, match="num_items"):
        load_encoder(folder)
    (folder / "encoder.json").write_text(json.dumps(sizes | {"type": "mamba"}))
    with pytest.raises(UserError, match=r'"mamba".*gru4rec'):
        load_encoder(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, kind: str) -> None:
    encoder = _encoder(kind)
    with torch.no_grad():
        encoder.norm.bias[3] = float("nan")
    with pytest.raises(UserError, match=r"not finite .*\[5, 6\].*fit it again"):
        encode_histories(encoder, [np.array([5, 6])])
    save_encoder(encoder, tmp_path / "encoder", "abc", {})
    with pytest.raises(UserError, match=r"norm\.bias.*not finite"):
        load_encoder(tmp_path / "encoder")


def test_sections_that_do_not_fit_their_type() -> None:
    with pytest.raises(UserError, match=r"encoder\.window=4"):
        make_encoder(EncoderSection(type="gru4rec", window=4), 20, 8)
    with pytest.raises(UserError, match="item_features"):
        make_encoder(EncoderSection(type="content"), 20, 8)
    with pytest.raises(UserError, match=r"\(19, 24\).*\(20, 24\)"):
        make_encoder(EncoderSection(type="content"), 20, 8, torch.randn(19, 24))
    with pytest.raises(UserError, match="finite: False"):
        make_encoder(EncoderSection(type="content"), 20, 8, torch.full((20, 24), float("nan")))


# ---- a window ----


@pytest.mark.parametrize("length", [1, 4, 5, 31, 33, 64, 97])
@pytest.mark.parametrize("window", [1, 3, 40])
def test_windowed_attention_is_masked_full_attention(length: int, window: int, monkeypatch) -> None:
    encoder = _sasrec(max_items=100, window=window, dropout=0.0).double().train()
    items = torch.randint(0, 20, (3, length), generator=torch.Generator().manual_seed(1))
    items[1, : length // 2] = -1
    items[2, :-1] = -1

    def run() -> list[torch.Tensor]:
        encoder.zero_grad()
        states = encoder.states(items)
        (states * torch.linspace(-1, 1, 16)).sum().backward()
        return [states.detach(), *(p.grad.clone() for p in encoder.parameters())]

    def full(real: torch.Tensor, window: int) -> Any:
        return functools.partial(functional.scaled_dot_product_attention, attn_mask=attention_mask(real, window))

    windowed = run()
    monkeypatch.setattr(sasrec_module, "attention_over", full)
    torch.testing.assert_close(windowed, run(), rtol=1e-9, atol=1e-12)


def test_a_state_sees_as_far_as_its_layers_hand_on() -> None:
    encoder = _sasrec(max_items=100, window=4)  # 2 layers: 8 items back
    assert encoder.reach == 9
    items = torch.randint(0, 19, (1, 60), generator=torch.Generator().manual_seed(0))
    changes = []
    for back in (8, 9):
        changed = items.clone()
        changed[0, -1 - back] = 19
        changes.append(not torch.allclose(encoder(items), encoder(changed)))
    assert changes == [True, False]
    torch.testing.assert_close(encoder(items), encoder.states(items)[:, -1])


class Work(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts what is computed under it: numbers that operations give, and products of queries and keys."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        self.sizes.extend(t.numel() for t in (result if isinstance(result, tuple) else (result,)) if torch.is_tensor(t))
        if "scaled_dot_product" in str(func):  # one operation: what it computes inside is seen by nobody
            query, key = args[:2]
            self.sizes.append(query.numel() * key.shape[-2])
        return result


def _work(kind: str, length: int, run: str = "states", **section: Any) -> Work:
    encoder = _encoder(kind, max_items=length, **section)
    with Work() as work, torch.no_grad():
        getattr(encoder, run)(torch.zeros(1, length, dtype=torch.long))
    return work


def test_windowed_states_take_memory_linear_in_the_length() -> None:
    def largest(length: int, window: int) -> int:
        return max(_work("windowed", length, window=window).sizes)

    assert largest(2048, 32) <= 2.1 * largest(1024, 32)
    assert largest(2048, 0) >= 4 * largest(1024, 0)


@pytest.mark.parametrize(
    ("kind", "length", "growth"),
    [("windowed", 10_000, (9.5, 10.5)), ("gru4rec", 600, (9.5, 10.5)), ("sasrec", 2_000, (50, 100))],
)
def test_ten_times_the_length_is_ten_times_the_work(kind: str, length: int, growth: tuple[float, float]) -> None:
    """Of all states, as training computes them; SASRec without a window pays a hundredfold. Seconds: the benchmark."""
    ratio = sum(_work(kind, length).sizes) / sum(_work(kind, length // 10).sizes)
    assert growth[0] < ratio < growth[1]


def test_a_windows_representation_costs_no_more_for_a_longer_history() -> None:
    short, long = (sum(_work("windowed", length, "forward").sizes) for length in (1_000, 10_000))
    assert long - short < 2 * 9_000  # the look at the vocabulary


# ---- histories of ten thousand ----


def _gates_after_one_change(encoder: SequenceEncoder, llama: Any, *back: int | None) -> list[torch.Tensor]:
    """Gate weights of a history of 10,000, and after that with one other event so many places before the newest."""
    model = build_adapter(llama, AdapterSection(), encoder)
    torch.manual_seed(0)
    torch.nn.init.normal_(model.base_model.gate["default"].output.weight, std=0.2)  # far from 0 and 1
    items = torch.randint(0, 19, (1, 10_000), generator=torch.Generator().manual_seed(0))
    gates = []
    for place in (None, *back):
        changed = items.clone()
        if place is not None:
            changed[0, -1 - place] = 19
        with torch.no_grad():
            gates.append(model.base_model.gate_weights(changed))
    return gates


@pytest.mark.parametrize(
    ("kind", "section"),
    [
        ("gru4rec", {}),
        pytest.param("windowed", {"window": 5_000, "num_heads": 1, "hidden_size": 8}, marks=pytest.mark.slow),
    ],
)
def test_an_event_9_000_back_changes_the_gate_of_an_encoder_that_reads_so_far(
    tiny_llama: Any, kind: str, section: dict[str, Any]
) -> None:
    encoder = _encoder(kind, max_items=10_000, **section)
    assert encoder.reach == 10_000
    gates, changed, again = _gates_after_one_change(encoder, tiny_llama(), 9_000, None)
    assert torch.equal(gates, again)  # so what follows is no rounding
    assert (gates - changed).abs().max() > 1e-6


@pytest.mark.parametrize(
    ("kind", "max_items", "section", "reach"),
    [
        ("sasrec", 200, {}, 200),
        ("windowed", 10_000, {"window": 64, "num_layers": 2}, 2 * 64 + 1),
        ("windowed", 100, {"window": 64, "num_layers": 2}, 100),
        ("gru4rec", 8_000, {}, 8_000),
    ],
)
def test_a_gate_hangs_on_as_many_events_as_its_encoder_says_it_reads(
    tiny_llama: Any, kind: str, max_items: int, section: dict[str, Any], reach: int
) -> None:
    encoder = _encoder(kind, max_items=max_items, **section)
    assert encoder.reach == reach
    gates, last, before, far = _gates_after_one_change(encoder, tiny_llama(), reach - 1, reach, 9_000)
    assert not torch.equal(gates, last)
    assert torch.equal(gates, before)
    assert torch.equal(gates, far)


# ---- a recurrent state ----


def test_a_gru4rec_is_torchs_gru_over_the_items() -> None:
    encoder = _encoder("gru4rec")
    assert isinstance(encoder, Gru4Rec)
    items = torch.tensor([[-1, -1, 3, 4, 5]])
    states, _ = encoder.gru(encoder.item_embedding(items[:, 2:]) * 4.0)  # √D
    torch.testing.assert_close(encoder.states(items)[:, 2:], encoder.norm(states))


# ---- items by their text ----


def test_items_of_equal_text_are_one_to_a_content_encoder() -> None:
    torch.manual_seed(0)
    features = torch.randn(20, 24)
    features[7] = features[3]
    encoder = make_encoder(EncoderSection(type="content", hidden_size=16), 20, 8, features).eval()
    assert isinstance(encoder, ContentEncoder)
    table = encoder.item_embedding.weight
    assert torch.equal(table[7], table[3])
    assert not torch.allclose(table[7], table[4])
    assert torch.equal(encoder(torch.tensor([[1, 7]])), encoder(torch.tensor([[1, 3]])))
    scores = encoder.scores(encoder(torch.tensor([[1, 2]])))
    torch.testing.assert_close(scores[:, 7], scores[:, 3])


def test_a_new_item_is_scored_by_its_text() -> None:
    # even items are followed by items of group 1, odd ones by group 0; item 19 (group 1) is never seen in training
    torch.manual_seed(0)
    features = 0.3 * torch.randn(20, 24)
    features[::2, :4] += 2
    features[1::2, 4:8] += 2
    encoder = make_encoder(EncoderSection(type="content", hidden_size=16, dropout=0.0), 20, 8, features).train()
    optimizer = torch.optim.Adam(encoder.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        items = torch.randint(0, 9, (16, 6), generator=generator) * 2 + torch.arange(6) % 2  # even, odd, even, …
        loss = functional.cross_entropy(
            encoder.scores(encoder.states(items[:, :-1])).flatten(0, 1), items[:, 1:].flatten()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    encoder.eval()
    with torch.no_grad():
        after_even, after_odd = encoder.scores(encoder(torch.tensor([[1, 4], [4, 1]])))
        assert after_even[19] > after_even[0:18:2].max()  # before every item of the other group
        assert after_odd[19] < after_odd[0:18:2].min()
        assert not torch.allclose(encoder(torch.tensor([[4, 19]])), encoder(torch.tensor([[4, 18]])), atol=1e-2)


def test_features_are_standardised_and_kept_in_half_precision(tmp_path: Path) -> None:
    torch.manual_seed(0)
    features = torch.randn(20, 24, dtype=torch.float32) + 1000.0  # in half precision this would be mostly rounding
    features[:, 5] = 3.0
    encoder = make_encoder(EncoderSection(type="content", hidden_size=16), 20, 8, features)
    kept = encoder.item_embedding.features
    assert kept.dtype == torch.float16
    assert torch.equal(kept[:, 5], torch.zeros(20, dtype=torch.float16))
    wanted = (features - features.mean(0)) / features.std(0, correction=0)
    torch.testing.assert_close(kept[:, :5].float(), wanted[:, :5], rtol=1e-3, atol=1e-3)
    save_encoder(encoder, tmp_path / "encoder", "abc", {})
    assert load_encoder(tmp_path / "encoder")[0].item_embedding.features.dtype == torch.float16


# ---- many histories ----


class Counting(Gru4Rec):
    """Counts the rows that it encodes."""

    rows: list[tuple[int, ...]]

    def forward(self, items: torch.Tensor) -> torch.Tensor:
        self.rows = [*getattr(self, "rows", []), tuple(items.shape)]
        return super().forward(items)

    @property
    def encoded(self) -> int:
        return sum(rows for rows, _ in self.rows)


def _counting(max_items: int = 50) -> Counting:
    torch.manual_seed(0)
    return Counting(20, 16, max_items=max_items, dropout=0.5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_many_histories_are_those_one_by_one(kind: str, batch_size: int) -> None:
    encoder = _encoder(kind, max_items=30).train()  # in training, dropout must not touch them
    generator = np.random.default_rng(0)
    many = [generator.integers(0, 20, size).astype(np.int32) for size in (5, 0, 40, 1, 30, 5, 12, 7)]
    many.append(many[0].copy())
    found = encode_histories(encoder, many, batch_size)
    assert (found.dtype, found.shape, found.requires_grad, encoder.training) == (torch.float32, (9, 16), False, True)
    encoder.eval()
    for history, row in zip(many, found):
        torch.testing.assert_close(row, encoder(torch.from_numpy(history).long()[None])[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(found[1], torch.zeros(16))


def test_no_history_gives_no_row() -> None:
    assert encode_histories(_counting(), []).shape == (0, 16)


def test_equal_histories_are_encoded_once() -> None:
    encoder = _counting(max_items=3)
    many = [np.array([1, 2, 3]), np.array([9, 1, 2, 3], dtype=np.int32), np.array([3, 2, 1]), np.array([1, 2, 3])]
    found = encode_histories(encoder, many)
    assert encoder.encoded == 2  # the older items are not read: the first two are the same history
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[3])
    assert not torch.allclose(found[0], found[2])


def test_the_cache_answers_across_calls_until_the_encoder_changes() -> None:
    encoder, cache = _counting(), RepresentationCache()
    many = [np.array([1, 2, 3]), np.array([4, 5])]
    first = encode_histories(encoder, many, cache=cache)
    assert torch.equal(encode_histories(encoder, many[::-1], cache=cache), first.flip(0))
    assert (encoder.encoded, cache.hits, cache.misses) == (2, 2, 2)
    encode_histories(encoder, [np.array([4, 6]), many[0]], cache=cache)
    assert encoder.encoded == 3
    with torch.no_grad():
        encoder.gru.weight_hh_l0.mul_(2)
    changed = encode_histories(encoder, many, cache=cache)
    assert encoder.encoded == 5
    assert not torch.allclose(changed, first)
    other = Gru4Rec(20, 16, max_items=50).eval()
    assert torch.equal(encode_histories(other, many, cache=cache), encode_histories(other, many))


def test_the_cache_forgets_the_least_recently_used() -> None:
    encoder, cache = _counting(), RepresentationCache(max_bytes=2 * (4 * 16 + ENTRY_BYTES))
    one, two, three = (np.array([n]) for n in (1, 2, 3))
    for history in (one, two, one, three):  # three pushes out two: one was asked for again
        encode_histories(encoder, [history], cache=cache)
    assert (len(cache), encoder.encoded) == (2, 3)
    assert cache.num_bytes <= cache.max_bytes
    encode_histories(encoder, [one, three], cache=cache)
    assert encoder.encoded == 3
    encode_histories(encoder, [two], cache=cache)
    assert encoder.encoded == 4


def test_a_remembered_row_does_not_keep_its_batch() -> None:
    cache = RepresentationCache()
    encode_histories(_counting(), [np.array([n]) for n in range(20)], cache=cache)
    row = cache.get(next(iter(cache._known)))
    assert row is not None
    assert row.untyped_storage().nbytes() == 4 * 16


def test_long_histories_come_in_fewer_rows(monkeypatch) -> None:
    encoder = _counting(max_items=1000)
    monkeypatch.setattr(histories_module, "NUMBERS_AT_ONCE", 2 * encoder.numbers_a_row(100))
    generator = np.random.default_rng(0)
    encode_histories(
        encoder, [generator.integers(0, 20, size) for size in [100] * 5 + [10] * 40 + [900]], batch_size=16
    )
    assert sorted(encoder.rows) == [(1, 100), (1, 900), (2, 100), (2, 100), (8, 10), (16, 10), (16, 10)]


def test_batches_hold_every_row_once_in_order() -> None:
    lengths = sorted(np.random.default_rng(0).integers(0, 60, 100).tolist())
    parts = list(batches(lengths, _counting(), 7, longest=100))
    assert [row for part in parts for row in range(part.start, part.stop)] == list(range(100))
    for part in parts:
        rows = part.stop - part.start
        assert rows <= 7
        assert rows == 1 or rows * lengths[part.stop - 1] <= 100
    assert list(batches([], _counting(), 7)) == []


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_saved_with_every_kind_and_loaded_again(tmp_path: Path, tiny_llama: Any, kind: str) -> None:
    encoder, items = _encoder(kind), torch.tensor([[-1, 2, 3], [4, 5, 6], [-1, -1, -1]])
    encoder.vocabulary_sha256 = "v" * 64
    model = build_adapter(tiny_llama(), AdapterSection(r=4, num_experts=2), encoder).eval()
    torch.nn.init.normal_(model.base_model.gate["default"].output.weight)
    save_adapter(model, tmp_path / "adapter")
    loaded = load_adapter(tiny_llama(), tmp_path / "adapter")
    assert type(loaded.base_model.sequence_encoder["default"]) is type(encoder)
    with torch.no_grad():
        gates = loaded.base_model.gate_weights(items)
        assert torch.equal(gates, model.base_model.gate_weights(items))
    assert not torch.allclose(gates[0], gates[1])
    assert torch.equal(gates[2], torch.full((2,), 0.5))
