from typing import Any

import pytest
from peft import LoraConfig
from transformers import LlamaConfig, MixtralConfig, Qwen2Config

from recllm.model.ilora import ILoraConfig
from recllm.model.servable import max_lora_rank, servability, servable_text
from recllm.model.soft_token import SoftTokenConfig

LLAMA = LlamaConfig(architectures=["LlamaForCausalLM"])
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize("kind", [LoraConfig, ILoraConfig])
@pytest.mark.parametrize("targets", ["all-linear", ALL_LINEAR, ["model.layers.0.self_attn.q_proj"]])
def test_the_usual_adapter_is_servable(kind: Any, targets: Any) -> None:
    assert servability(LLAMA, kind(r=8, target_modules=targets)) == []


def test_every_kind_of_gate_is_servable() -> None:
    for gate in ({"gate_per_layer": True}, {"gate_type": "sigmoid"}, {"gate_top_k": 2}):
        assert servability(LLAMA, ILoraConfig(r=8, target_modules="all-linear", **gate)) == []


@pytest.mark.parametrize(("r", "rank"), [(1, 1), (2, 8), (8, 8), (12, 16), (300, 320), (512, 512), (513, None)])
def test_the_rank_to_serve_with(r: int, rank: int | None) -> None:
    config = LoraConfig(r=r, target_modules=["q_proj"])
    assert max_lora_rank(config) == rank
    assert bool(servability(LLAMA, config)) == (rank is None)


def test_the_largest_rank_of_a_pattern_counts() -> None:
    assert max_lora_rank(LoraConfig(r=8, rank_pattern={"q_proj": 40})) == 64


@pytest.mark.parametrize(
    ("options", "words"),
    [({"use_dora": True}, "DoRA"), ({"lora_bias": True}, "bias"), ({"bias": "all"}, "bias"),
     ({"modules_to_save": ["lm_head"]}, "further trained modules"), ({"init_lora_weights": "pissa"}, "pissa"),
     ({"r": 1024}, "largest rank is 512")],
)  # fmt: skip
def test_what_vllm_refuses(options: dict[str, Any], words: str) -> None:
    (reason,) = servability(LLAMA, LoraConfig(**{"target_modules": ["q_proj"]} | options))
    assert words in reason


def test_modules_that_vllm_does_not_have() -> None:
    (reason,) = servability(LLAMA, LoraConfig(target_modules=["q_proj", "router"]))
    assert "router" in reason
    moe = MixtralConfig(architectures=["MixtralForCausalLM"])
    assert servability(moe, LoraConfig(target_modules=["q_proj", "o_proj"])) == []
    assert "gate" in servability(moe, LoraConfig(target_modules=["gate"]))[0]


def test_embeddings_are_for_plain_loras_of_some_models() -> None:
    targets = ["q_proj", "lm_head"]
    assert servability(LLAMA, LoraConfig(target_modules=targets)) == []
    assert "the gate reaches" in servability(LLAMA, ILoraConfig(target_modules=targets))[0]
    qwen = Qwen2Config(architectures=["Qwen2ForCausalLM"])
    assert "embeddings of Qwen2" in servability(qwen, LoraConfig(target_modules=targets))[0]


def test_an_architecture_that_was_not_checked() -> None:
    for config in (LlamaConfig(architectures=["BloomForCausalLM"]), LlamaConfig()):
        (reason,) = servability(config, LoraConfig(target_modules="all-linear"))
        assert "has not been checked" in reason


def test_the_line_of_the_log() -> None:
    ilora = ILoraConfig(r=12, num_experts=4, target_modules="all-linear")
    assert (
        servable_text(LLAMA, ilora) == "servable by vLLM 0.32: yes, with --max-lora-rank 16, gates by recllm's plugin"
    )
    soft = SoftTokenConfig(r=8, target_modules="all-linear")
    assert servable_text(LLAMA, soft).startswith("servable by vLLM 0.32: no, because a soft token is no part of a LoRA")


def test_a_built_adapter_is_servable(adapter: Any) -> None:
    model = adapter()
    assert model.config.architectures is None or servability(model.config, model.peft_config["default"]) == []
    model.config.architectures = [type(model.get_base_model()).__name__]
    assert servability(model.config, model.peft_config["default"]) == []
