"""A gate without its base model gives the numbers of the whole adapter."""

import numpy as np
import pytest
import torch

from recllm.errors import UserError
from recllm.model.adapter import load_adapter, save_adapter
from recllm.model.histories import RepresentationCache
from recllm.model.user_gate import UserGate

HISTORIES = [np.array([1, 2, 3, 4, 5]), np.array([9, 17]), np.array([], dtype=np.int64)]


@pytest.mark.parametrize(
    "section",
    [
        {},
        {"gate": {"type": "sigmoid"}},
        {"gate": {"per_layer": True, "hidden_size": 8}},
        {"gate": {"top_k": 2, "temperature": 0.5}},
    ],
    ids=["softmax", "sigmoid", "per layer, MLP", "top-k"],
)
def test_the_weights_are_those_of_the_whole_adapter(section, adapter, tiny_llama, tmp_path, histories):
    save_adapter(adapter(**section), tmp_path / "adapter")
    whole = load_adapter(tiny_llama(), tmp_path / "adapter")
    wanted = whole.base_model.gate_weights(histories)

    found = UserGate.load(tmp_path / "adapter").weights(HISTORIES)

    assert found.shape == tuple(wanted.shape)
    np.testing.assert_allclose(found, wanted.detach().numpy(), atol=1e-6)
    assert np.ptp(found[0]) > 1e-3  # the adapter's gate is not uniform: equal numbers mean something


def test_an_empty_history_has_the_uniform_gate(adapter, tmp_path):
    save_adapter(adapter(num_experts=4), tmp_path / "adapter")
    np.testing.assert_array_equal(UserGate.load(tmp_path / "adapter").weights(HISTORIES[2:]), [[1 / 4] * 4])


def test_a_cache_remembers_from_call_to_call(adapter, tmp_path):
    save_adapter(adapter(), tmp_path / "adapter")
    gate = UserGate.load(tmp_path / "adapter", RepresentationCache())
    first = gate.weights(HISTORIES)
    assert gate.cache.hits == 0
    np.testing.assert_array_equal(gate.weights(HISTORIES), first)
    assert gate.cache.hits == len(HISTORIES)


def test_a_plain_lora_and_a_foreign_gate_are_refused(adapter, tmp_path):
    save_adapter(adapter(method="lora"), tmp_path / "plain")
    with pytest.raises(UserError, match=r"plain has no ilora\.json"):
        UserGate.load(tmp_path / "plain")

    save_adapter(adapter(), tmp_path / "four")
    save_adapter(adapter(num_experts=2), tmp_path / "two")
    (tmp_path / "four" / "gate.safetensors").write_bytes((tmp_path / "two" / "gate.safetensors").read_bytes())
    with pytest.raises(UserError, match=r"does not fit ilora\.json"):
        UserGate.load(tmp_path / "four")


def test_no_histories_give_no_weights(adapter, tmp_path):
    save_adapter(adapter(), tmp_path / "adapter")
    assert UserGate.load(tmp_path / "adapter").weights([]).shape == (0, 4)
    assert torch.is_inference_mode_enabled() is False
