"""Whether vLLM will serve an adapter, said before it is trained.

The base model's config and the adapter's (resolved by PEFT, or not yet) enter; reasons against leave, none for "yes".

The rules are those of vLLM 0.32 (read in its source: vllm/lora/peft_helper.py `_validate_features`, `validate_legal`;
vllm/config/lora.py `MaxLoRARanks`; vllm/lora/utils.py `get_supported_lora_modules`; the models that derive from
`SupportsLoRA`). The gate is recllm's own vLLM plugin's part: it multiplies the activations of linear layers by a row of
max_lora_rank numbers, so every kind of gate goes, and what is no linear layer does not.
"""

from typing import Any

from peft import LoraConfig

from recllm.model.ilora import ILoraConfig
from recllm.model.soft_token import SoftTokenConfig

VLLM = "0.32"
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank may be
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
LLAMA = frozenset((*ATTENTION, "gate_proj", "up_proj", "down_proj"))
# Dense decoders and, for mixtures of experts, their attention: linear layers that transformers and vLLM name alike.
# Others may go too: these are the ones that were looked at.
MODULES: dict[str, frozenset[str]] = {
    **dict.fromkeys(
        ("LlamaForCausalLM", "MistralForCausalLM", "Ministral3ForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM",
         "GemmaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM", "GraniteForCausalLM", "Exaone4ForCausalLM",
         "CohereForCausalLM", "Cohere2ForCausalLM"), LLAMA,
    ),
    "Phi3ForCausalLM": frozenset(("qkv_proj", "o_proj", "gate_up_proj", "down_proj")),
    "Glm4ForCausalLM": frozenset((*ATTENTION, "gate_up_proj", "down_proj")),
    "NemotronForCausalLM": frozenset((*ATTENTION, "up_proj", "down_proj")),
    "OPTForCausalLM": frozenset(("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")),
    **dict.fromkeys(("MixtralForCausalLM", "Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM"), frozenset(ATTENTION)),
}  # fmt: skip
# "embedding_modules" of those models: an ordinary LoRA may have these two too
WITH_EMBEDDINGS = frozenset(("LlamaForCausalLM", "Qwen3ForCausalLM", "GraniteForCausalLM", "Exaone4ForCausalLM"))
EMBEDDINGS = ("embed_tokens", "lm_head")
HARMLESS_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")  # the others change the base model's weights
OPTIONS = {  # of LoraConfig: what vLLM says of them
    "use_dora": "it has no DoRA",
    "lora_bias": "it has no bias in a LoRA",
    "modules_to_save": "it takes no further trained modules",
    "alora_invocation_tokens": "it has no activated LoRA",
    "layer_replication": "it does not replicate layers",
    "use_bdlora": "it has no block-diagonal LoRA",
    "use_qalora": "it has no QALoRA",
    "trainable_token_indices": "it refuses tensors that are no LoRA",
    "target_parameters": "experts of a mixture are not checked here",
}


def servability(config: Any, lora_config: LoraConfig) -> list[str]:
    """Why vLLM would not serve an adapter of `lora_config` on a base model of `config`; an empty list if it would."""
    reasons = [
        f"{name}={getattr(lora_config, name)!r}: {why}" for name, why in OPTIONS.items() if _set(lora_config, name)
    ]
    if lora_config.bias != "none":
        reasons.append(f"bias={lora_config.bias!r}: it has no bias in an adapter")
    init = lora_config.init_lora_weights
    if isinstance(init, str) and init.lower() not in HARMLESS_INITS:
        reasons.append(f"init_lora_weights={init!r}: it changes the base model's weights")
    if max_lora_rank(lora_config) is None:
        reasons.append(f"r={_largest_rank(lora_config)}: its largest rank is {RANKS[-1]}, lower adapter.r")
    if isinstance(lora_config, SoftTokenConfig):
        reasons.append("a soft token is no part of a LoRA: it would serve the LoRA without the token")
    return reasons + _module_reasons(config, lora_config)


def max_lora_rank(lora_config: LoraConfig) -> int | None:
    """The --max-lora-rank that vLLM needs for this adapter, None where none is large enough.

    >>> max_lora_rank(LoraConfig(r=12))
    16
    """
    return next((rank for rank in RANKS if rank >= _largest_rank(lora_config)), None)


def servable_text(config: Any, lora_config: Any) -> str:
    """One line for the log of a training run; `lora_config` as of `servability`."""
    reasons = servability(config, lora_config)
    if reasons:
        return f"servable by vLLM {VLLM}: no, because {'; '.join(reasons)}"
    plugin = ", gates by recllm's plugin" if isinstance(lora_config, ILoraConfig) else ""
    return f"servable by vLLM {VLLM}: yes, with --max-lora-rank {max_lora_rank(lora_config)}{plugin}"


def _set(lora_config: LoraConfig, name: str) -> bool:
    return bool(getattr(lora_config, name, None))


def _largest_rank(lora_config: LoraConfig) -> int:
    return max([lora_config.r, *(lora_config.rank_pattern or {}).values()])


def _module_reasons(config: Any, lora_config: LoraConfig) -> list[str]:
    architecture = next(iter(getattr(config, "architectures", None) or []), None)
    if architecture not in MODULES:
        known = ", ".join(sorted(name.removesuffix("ForCausalLM") for name in MODULES))
        return [f"its LoRA for the architecture {architecture} has not been checked; checked: {known}"]
    targets = lora_config.target_modules
    if targets is None or isinstance(targets, str):  # "all-linear" or a pattern, not resolved yet
        return []
    names = {name.rpartition(".")[2] for name in targets} - MODULES[architecture]
    gated = isinstance(lora_config, ILoraConfig)
    reasons = []
    for name in sorted(names):
        if name not in EMBEDDINGS:
            reasons.append(f"target_modules has {name}, no linear layer that it has for {architecture}")
        elif gated:
            reasons.append(f"target_modules has {name}: the gate reaches linear layers of the decoder only")
        elif architecture not in WITH_EMBEDDINGS:
            reasons.append(f"target_modules has {name}: it has no LoRA for the embeddings of {architecture}")
    return reasons
