"""What a vLLM worker says of its gates: an extension of its class, asked by `collective_rpc("recllm_gates")`.

A gate that is sent and not applied would give the plain LoRA's answers without a word. So whoever starts vLLM with this
extension can ask whether the workers have the gated kernels, and in how many steps they wrote gates.
"""

from typing import Any

from recllm.infer.vllm_plugin.hooks import language_kernels


class GateReport:
    """Mixed into vLLM's worker."""

    model_runner: Any

    def recllm_gates(self) -> dict[str, Any]:
        """Class of the LoRA kernels, and the steps in which they were given gates."""
        kernels = language_kernels(self.model_runner.lora_manager._adapter_manager)
        gates = getattr(kernels, "gates", None)
        return {"kernels": type(kernels).__name__, "gated_steps": 0 if gates is None else gates.gated_steps}
