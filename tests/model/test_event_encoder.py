"""Encoders that read events: an action, with an item or without."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recllm.errors import UserError
from recllm.model.adapter import build_adapter, load_adapter, save_adapter
from recllm.model.sequence_encoder import (
    RepresentationCache,
    SASRec,
    SequenceEncoder,
    encode_histories,
    load_encoder,
    make_encoder,
    save_encoder,
)
from recllm.model.user_gate import UserGate
from recllm.recipe import AdapterSection, EncoderSection
from recllm.schema import event_codes

KINDS = ("sasrec", "windowed", "gru4rec", "content")
NUM_ITEMS, NUM_ACTIONS = 20, 3


def _encoder(kind: str, num_items: int = NUM_ITEMS, num_actions: int = NUM_ACTIONS) -> SequenceEncoder:
    torch.manual_seed(0)
    features = torch.randn(num_items, 24) if kind == "content" else None
    section = EncoderSection(type="sasrec" if kind == "windowed" else kind, hidden_size=16, dropout=0.2)
    section = section.model_copy(update={"window": 3 if kind == "windowed" else 0})
    return make_encoder(section, num_items, 8, features, num_actions).eval()


def _codes(items: list[int], actions: list[int], num_items: int = NUM_ITEMS) -> torch.Tensor:
    return torch.from_numpy(event_codes(np.array(items), np.array(actions), num_items))


@pytest.mark.parametrize("kind", KINDS)
def test_an_events_vector_is_the_sum_of_its_action_and_its_item(kind: str) -> None:
    encoder = _encoder(kind)
    items, actions = encoder.item_embedding.weight, encoder.action_embedding.weight
    found = encoder.embed(_codes([-1, 0, 19], [0, 2, 1]))
    torch.testing.assert_close(found, torch.stack([actions[0], actions[2] + items[0], actions[1] + items[19]]))


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_and_scores(kind: str) -> None:
    encoder = _encoder(kind)
    states = encoder(torch.stack([_codes([1, -1, 3], [0, 1, 2]), torch.tensor([-1, -1, 5])]))
    assert states.shape == (2, 16)
    assert encoder.scores(states).shape == (2, NUM_ITEMS)
    with torch.no_grad():
        encoder.action_bias.copy_(torch.tensor([0.5, 0.0, -0.5]))
    products = states.unsqueeze(1) * encoder.action_embedding.weight  # (2, 3, 16): tied to what is read
    expected = products.sum(dim=-1) + torch.tensor([0.5, 0.0, -0.5])
    torch.testing.assert_close(encoder.action_scores(states), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_without_actions_everything_is_as_it_was(kind: str) -> None:
    """Actions are drawn last, so the others are those of the same seed; of no weight, they change no bit."""
    plain, events = _encoder(kind, num_actions=0), _encoder(kind)
    weights = events.state_dict()
    assert weights.keys() - plain.state_dict().keys() == {"action_embedding.weight", "action_bias"}
    assert all(torch.equal(value, weights[name]) for name, value in plain.state_dict().items())
    torch.nn.init.zeros_(events.action_embedding.weight)
    items = torch.tensor([[4, 0, 19], [-1, 7, 7]])
    codes = torch.where(items < 0, -1, items + 1 + (NUM_ITEMS + 1) * 2)  # action 2 throughout
    assert torch.equal(events.states(codes), plain.states(items))
    with pytest.raises(ValueError, match="has no actions"):
        plain.action_scores(plain(items))


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_done_and_what_it_was_done_to_both_matter(kind: str) -> None:
    encoder, history = _encoder(kind), [1, 2, 3]
    rows = [_codes(history, [0, 0, 0]), _codes(history, [0, 1, 0]), _codes([1, -1, 3], [0, 0, 0])]
    states = encoder(torch.stack(rows))
    assert all(not torch.allclose(states[a], states[b]) for a, b in ((0, 1), (0, 2), (1, 2)))


@pytest.mark.parametrize("kind", KINDS)
def test_padding_is_no_event(kind: str) -> None:
    encoder, codes = _encoder(kind), _codes([-1, 5], [0, 2])
    assert codes[0] == 0  # the first action without an item: next to padding
    padded = encoder.states(torch.cat([torch.tensor([-1, -1]), codes])[None])
    torch.testing.assert_close(padded[:, 2:], encoder.states(codes[None]))
    assert torch.equal(padded[:, :2], torch.zeros(1, 2, 16))
    assert torch.equal(encoder(torch.full((2, 3), -1)), torch.zeros(2, 16))


@pytest.mark.parametrize("kind", KINDS)
def test_codes_outside_the_vocabulary(kind: str) -> None:
    encoder = _encoder(kind)
    assert encoder.vocabulary_size == (20 + 1) * 3
    encoder(torch.tensor([[62]]))
    message = r"event codes from 1 to 63 are outside .* of 20 items and 3 actions, which is 0 to 62"
    for read in (encoder, encoder.states):
        with pytest.raises(UserError, match=message):
            read(torch.tensor([[1, 63]]))
    with pytest.raises(UserError, match=message):
        encode_histories(encoder, [np.array([1]), np.array([63])])
    with pytest.raises(UserError, match="from -2 to 1"):
        encoder(torch.tensor([[-2, 1]]))


def test_codes_that_32_bits_cannot_tell_apart_are_other_histories() -> None:
    encoder = SASRec(num_items=70_000, hidden_size=2, num_layers=1, num_heads=1, max_items=4, num_actions=70_000).eval()
    low = 5
    assert encoder.vocabulary_size > low + 2**32
    histories, cache = [np.array([low]), np.array([low + 2**32])], RepresentationCache()
    rows = encode_histories(encoder, histories, cache=cache)
    assert torch.equal(rows[1], encoder(torch.tensor([[low + 2**32]]))[0])
    assert len(cache) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_log_without_items(kind: str, tmp_path: Path, tiny_llama: Any) -> None:
    encoder = _encoder(kind, num_items=0)
    encoder.vocabulary_sha256 = "v" * 64
    codes = _codes([-1, -1, -1], [0, 2, 1], num_items=0)
    assert codes.tolist() == [0, 2, 1]
    states = encoder(torch.stack([codes, torch.tensor([-1, -1, 1])]))
    assert encoder.scores(states).shape == (2, 0)
    assert encoder.action_scores(states).shape == (2, 3)
    assert min(value.numel() for value in encoder.state_dict().values()) > 0  # empty ones read as shards not gathered
    save_encoder(encoder, tmp_path / "encoder", "v" * 64, {})
    torch.testing.assert_close(load_encoder(tmp_path / "encoder")[0](codes[None]), states[:1])
    with pytest.raises(UserError, match="of 0 items and 3 actions, which is 0 to 2"):
        encoder(torch.tensor([[3]]))

    model = build_adapter(tiny_llama(), AdapterSection(r=4, num_experts=2), encoder).eval()
    torch.nn.init.normal_(model.base_model.gate["default"].output.weight)
    save_adapter(model, tmp_path / "adapter")
    with torch.no_grad():
        wanted = model.base_model.gate_weights(codes[None])
        loaded = load_adapter(tiny_llama(), tmp_path / "adapter", low_cpu_mem_usage=True)
        assert torch.equal(loaded.base_model.gate_weights(codes[None]), wanted)
    found = UserGate.load(tmp_path / "adapter").weights([codes.numpy()])
    np.testing.assert_allclose(found, wanted.numpy(), atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_an_action_that_hangs_on_action_and_item(kind: str) -> None:
    """After a view of an even item, or a purchase of an odd one, action 2 follows, otherwise action 0."""
    encoder = _encoder(kind).train()
    items = torch.arange(20).repeat(2)
    actions = torch.arange(2).repeat_interleave(20)
    codes = (items + 1 + (NUM_ITEMS + 1) * actions)[:, None]
    follows = torch.where((items + actions) % 2 == 0, 2, 0)
    optimizer = torch.optim.Adam(encoder.parameters(), lr=1e-2)
    for _ in range(120):
        loss = torch.nn.functional.cross_entropy(encoder.action_scores(encoder(codes)), follows)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    encoder.eval()
    assert (encoder.action_scores(encoder(codes)).argmax(-1) == follows).float().mean() > 0.9  # either part alone: 0.5
