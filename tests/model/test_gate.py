import math

import pytest
import torch

from recllm.errors import UserError
from recllm.model.gate import Gate


def _random_gate(**sizes: object) -> Gate:
    torch.manual_seed(0)
    gate = Gate(6, 4, **sizes)
    for parameter in gate.parameters():
        torch.nn.init.normal_(parameter)
    return gate


@pytest.mark.parametrize("hidden_size", [0, 5])
def test_rows_sum_to_one_in_float32(hidden_size: int) -> None:
    weights = _random_gate(hidden_size=hidden_size)(torch.randn(7, 6, dtype=torch.bfloat16))
    assert weights.shape == (7, 4)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.sum(-1), torch.ones(7))


def test_formula() -> None:
    gate = Gate(2, 2, temperature=0.5)
    with torch.no_grad():
        gate.output.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    gate.mean.copy_(torch.tensor([1.0, 2.0]))
    gate.deviation.copy_(torch.tensor([2.0, 4.0]))
    # z = ((3 - 1) / 2, (2 - 2) / 4) = (1, 0); logits divided by 0.5
    first = math.exp(1 / 0.5) / (math.exp(1 / 0.5) + math.exp(0))
    torch.testing.assert_close(gate(torch.tensor([[3.0, 2.0]])), torch.tensor([[first, 1 - first]]))


@pytest.mark.parametrize("num_experts", [1, 2, 3, 4, 6, 8])
def test_empty_history_is_exactly_uniform(num_experts: int) -> None:
    torch.manual_seed(0)
    gate = Gate(6, num_experts)
    torch.nn.init.normal_(gate.output.weight)
    gate.mean.fill_(3.0)
    weights = gate(torch.zeros(2, 6))
    assert torch.equal(weights, torch.full((2, num_experts), 1 / num_experts))
    assert torch.equal(weights * num_experts, torch.ones(2, num_experts))  # so that the factor of A x is exactly 1


def test_starts_uniform_for_everybody() -> None:
    torch.testing.assert_close(Gate(6, 4)(torch.randn(3, 6)), torch.full((3, 4), 1 / 4))


def test_a_row_does_not_hang_on_the_others() -> None:
    # the released code has batch normalisation here
    gate, rows = _random_gate().train(), torch.randn(5, 6)
    torch.testing.assert_close(gate(rows)[2:3], gate(rows[2:3]))


def test_statistics_are_those_of_the_given_rows_without_empty_histories() -> None:
    gate = Gate(2, 4)
    gate.fit_statistics(torch.tensor([[1.0, 5.0], [3.0, 5.0], [0.0, 0.0]]))
    assert gate.mean.tolist() == [(1 + 3) / 2, 5.0]
    assert gate.deviation.tolist() == [1.0, 1.0]  # a constant dimension is centred, not divided by zero
    assert {"mean", "deviation"} <= gate.state_dict().keys()


def test_a_shared_component_does_not_saturate_the_gate() -> None:
    # SASRec states share a large common component: on raw states the softmax collapses onto one expert
    torch.manual_seed(0)
    states = torch.full((200, 6), 50.0) + 0.1 * torch.randn(200, 6)
    gate = _random_gate()
    collapsed = gate(states).max(-1).values.mean()
    gate.fit_statistics(states)
    assert collapsed > 0.99
    assert gate(states).max(-1).values.mean() < 0.9


@pytest.mark.parametrize(
    ("rows", "words"),
    [(torch.zeros(3, 2), "0 non-empty"), (torch.tensor([[1.0, 2.0], [math.nan, 1.0]]), "finite: False")],
)
def test_statistics_refuse_what_they_cannot_use(rows: torch.Tensor, words: str) -> None:
    with pytest.raises(UserError, match=words):
        Gate(2, 4).fit_statistics(rows)


def test_casting_keeps_statistics_and_computes_in_float32() -> None:
    gate = _random_gate()
    gate.fit_statistics(torch.randn(50, 6) + 100)
    mean = gate.mean.clone()
    gate.to(torch.bfloat16)
    assert gate.output.weight.dtype == torch.bfloat16
    assert torch.equal(gate.mean, mean)
    assert gate(torch.randn(2, 6)).dtype == torch.float32


def test_autocast_does_not_reach_the_gate() -> None:
    gate, rows = _random_gate(), torch.randn(4, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = gate(rows)
    assert torch.equal(inside, gate(rows))
