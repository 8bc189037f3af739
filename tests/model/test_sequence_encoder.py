import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recllm.errors import UserError
from recllm.model.sequence_encoder import SASRec, attention_mask, load_encoder, save_encoder


def _sasrec(max_items: int = 8, **sizes: Any) -> SASRec:
    torch.manual_seed(0)
    return SASRec(20, 16, max_items=max_items, **sizes).eval()


def test_shapes() -> None:
    encoder, items = _sasrec(), torch.tensor([[1, 2, 3], [-1, 4, 5]])
    assert encoder.states(items).shape == (2, 3, 16)
    assert encoder(items).shape == (2, 16)
    assert torch.equal(encoder(items), encoder.states(items)[:, -1])
    assert encoder.scores(encoder(items)).shape == (2, 20)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 19), min_size=1, max_size=8), st.integers(0, 8))
def test_left_padding_changes_nothing(history: list[int], padding: int) -> None:
    encoder = _sasrec(max_items=16)
    plain = encoder(torch.tensor([history]))
    padded = encoder(torch.tensor([[-1] * padding + history]))
    torch.testing.assert_close(padded, plain)


def test_a_long_history_is_cut_to_its_newest_items() -> None:
    encoder, items = _sasrec(max_items=4), torch.arange(10)[None]
    assert torch.equal(encoder(items), encoder(items[:, -4:]))


def test_states_look_back_only() -> None:
    encoder, items = _sasrec(), torch.tensor([[1, 2, 3, 4, 5]])
    changed = items.clone()
    changed[0, 3] = 9
    before, after = encoder.states(items), encoder.states(changed)
    assert torch.equal(before[:, :3], after[:, :3])
    assert not torch.allclose(before[:, 3:], after[:, 3:])


def test_order_matters() -> None:
    encoder = _sasrec()
    assert not torch.allclose(encoder(torch.tensor([[1, 2, 3]])), encoder(torch.tensor([[2, 1, 3]])))


def test_batch_equals_single_rows() -> None:
    encoder = _sasrec()
    rows = torch.tensor([[1, 2, 3], [-1, -1, 7], [-1, 4, 5]])
    torch.testing.assert_close(encoder(rows), torch.cat([encoder(row[None]) for row in rows]))


@pytest.mark.parametrize("length", [0, 1, 5])
def test_an_empty_history_gives_zeros_and_no_nan(length: int) -> None:
    encoder = _sasrec().train()
    items = torch.full((2, length), -1)
    assert torch.equal(encoder(items), torch.zeros(2, 16))


def test_every_position_may_look_at_something() -> None:
    mask = attention_mask(torch.tensor([[False, True, True], [False, False, False]]))
    assert mask[0, 0].tolist() == [[True, False, False], [False, True, False], [False, True, True]]
    assert mask.any(-1).all()  # a softmax over nothing is NaN in older torch


def test_padding_gives_finite_gradients() -> None:
    encoder = _sasrec().train()
    encoder(torch.tensor([[-1, -1, -1], [-1, 1, 2]])).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in encoder.parameters() if p.grad is not None)


def test_it_learns_the_next_item() -> None:
    # item i is followed by i + 1: after a few steps the successor ranks first
    encoder = _sasrec().train()
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


def test_items_outside_the_vocabulary() -> None:
    with pytest.raises(UserError, match="20 items"):
        _sasrec()(torch.tensor([[1, 20]]))
    with pytest.raises(UserError, match="-2"):
        _sasrec()(torch.tensor([[-2, 1]]))


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(UserError, match="multiple of 3"):
        SASRec(20, 16, num_heads=3)


def test_save_and_load(tmp_path: Path) -> None:
    encoder, items = _sasrec(), torch.tensor([[1, 2, 3]])
    save_encoder(encoder, tmp_path / "encoder", "abc", {"metrics": {"ndcg@10": 0.5}, "seed": 3})
    loaded, info = load_encoder(tmp_path / "encoder")
    assert torch.equal(loaded(items), encoder(items))
    assert not loaded.training
    assert loaded.vocabulary_sha256 == info["vocabulary_sha256"] == "abc"
    assert info["metrics"] == {"ndcg@10": 0.5}
    assert (info["type"], info["num_items"], info["hidden_size"], info["max_items"]) == ("sasrec", 20, 16, 8)


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
