"""A tiny Llama with a trained-looking instance-wise adapter: random B and gate, so that users differ."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from recllm.model.adapter import build_adapter, fit_gate_statistics
from recllm.model.sequence_encoder import SASRec
from recllm.recipe import AdapterSection

NUM_ITEMS = 20


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def encoder() -> Callable[..., SASRec]:
    """encoder(seed=0, hidden_size=16) builds an untrained SASRec over 20 items."""

    def build(seed: int = 0, hidden_size: int = 16, **sizes: Any) -> SASRec:
        torch.manual_seed(seed)
        return SASRec(NUM_ITEMS, hidden_size, **{"max_items": 8, "dropout": 0.2} | sizes).eval()

    return build


@pytest.fixture
def adapter(tiny_llama: Any, encoder: Any) -> Callable[..., Any]:
    """adapter(seed=0, trained=True, method="ilora", …) wraps a fresh tiny Llama; trained: random A, B and gate."""

    def build(
        seed: int = 0, trained: bool = True, base_model: Any = None, name: str = "default", **section: Any
    ) -> Any:
        section = {"method": "ilora", "r": 8, "lora_alpha": 16, "num_experts": 4} | section
        own_encoder = encoder(seed) if section["method"] != "lora" else None
        base_model = tiny_llama() if base_model is None else base_model
        model = build_adapter(base_model, AdapterSection(**section), own_encoder, name).eval()
        if own_encoder is not None:
            fit_gate_statistics(model, own_encoder(torch.arange(NUM_ITEMS)[:, None]), name)
        if trained:
            _randomise(model, seed, name)
        return model

    return build


@torch.no_grad()
def _randomise(model: Any, seed: int, name: str = "default") -> None:
    generator = torch.Generator().manual_seed(seed + 1)
    for key, parameter in model.named_parameters():
        if f".{name}." not in key or "sequence_encoder" in key:
            continue
        scale = 1.0 if key.startswith(("base_model.gate.", "base_model.soft_token.")) else 0.2
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


@pytest.fixture
def randomise() -> Callable[..., None]:
    """randomise(model, seed, name="default") fills A, B and the gate with noise."""
    return _randomise


@pytest.fixture
def tokens() -> torch.Tensor:
    """(3, 7) token ids."""
    return torch.randint(3, 259, (3, 7), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def histories() -> torch.Tensor:
    """(3, 5) item indices: a full history, a short one, an empty one."""
    return torch.tensor([[1, 2, 3, 4, 5], [-1, -1, -1, 9, 17], [-1, -1, -1, -1, -1]])
