"""recllm's vLLM plugin: one instance-wise adapter, a gate for every request.

    extra_args={"gate_weights": [...]} in SamplingParams, vllm_xargs in an HTTP request; or a LoRARequest whose name
    holds the gate (`gated_lora_request`), which vLLM's beam search carries where it drops extra_args

vLLM loads `register` in each of its processes (entry point vllm.general_plugins). It hooks these places, each checked
before any is touched:

    front end   InputProcessor.process_inputs      a gate is checked and becomes factors; its hash is the cache_salt
                _maybe_get_adapters                a gated beam search over HTTP: the gate moves into the LoRA's name
    scheduler   _gen_lora_extra_hash_keys          the gate's hash is in the key of each block of keys and values
    worker      the platform's LoRA kernels        (punica.py)
                set_active_loras, both runners     the factors of a step's requests are written for its tokens

Without a gate in any request nothing changes: the front end finds nothing to check, keys are vLLM's own, factors ones.
A gated adapter whose request has no gate is served as stock vLLM serves it, as the plain LoRA with uniform gates.
"""

import os
from typing import TYPE_CHECKING, Any

from recllm.infer.vllm_plugin.gates import name_with_gate

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

SUPPORTED = ">=0.32,<0.33"  # as the extra in pyproject.toml
PER_LAYER = "RECLLM_GATE_LAYERS"  # decoder layers where adapters with a gate a layer are served; unset: shared gates
CPU_RUNS = "RECLLM_CPU_LORA_RUNS"  # 1: LoRA on a CPU by stretches of equal tokens from the start (punica.py)

_registered = False


def register() -> None:
    """Check and hook this process's vLLM; a second call does nothing.

    Raises:
        RuntimeError: an unsupported vLLM, or one whose hooked symbols differ: names both versions.
    """
    global _registered
    if _registered:
        return
    from recllm.infer.vllm_plugin import hooks

    hooks.check()
    hooks.install(gate_layers(), os.environ.get(CPU_RUNS) == "1")
    _registered = True


def is_registered() -> bool:
    """Whether this process's vLLM is hooked."""
    return _registered


def gate_layers() -> int:
    """Layers of factors that this process's workers keep.

    Raises:
        RuntimeError: the variable is no positive number.
    """
    text = os.environ.get(PER_LAYER, "1")
    if not text.isdecimal() or int(text) < 1:
        raise RuntimeError(f"{PER_LAYER}={text!r}: the number of decoder layers is expected, or leave it unset")
    return int(text)


def gated_lora_request(lora_request: "LoRARequest", gate_weights: Any) -> "LoRARequest":
    """The same adapter, with a user's gate in its name: for `LLM.beam_search`, which drops extra_args.

    The gate is taken out again before the engine sees the request: adapter, slot and metrics are the plain one's.

    Raises:
        GateError: a ValueError, of what can be no gate.
    """
    import msgspec

    return msgspec.structs.replace(lora_request, lora_name=name_with_gate(lora_request.lora_name, gate_weights))
