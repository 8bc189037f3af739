"""A user's gate without the base model: for engines and servers that hold the base model themselves.

The folder of an instance-wise adapter and histories (item indices or event codes) enter; gate weights leave. Only the
encoder and the gate are loaded, some hundred kilobytes; the numbers are those of the whole model (`gate_weights` of the
tuner).
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from recllm.errors import UserError
from recllm.files import read_json
from recllm.model.adapter import BASE_MODEL, ENCODER, GATE_WEIGHTS, ILORA_CONFIG, read_ilora
from recllm.model.encoders.interface import SequenceEncoder
from recllm.model.gate import Gate
from recllm.model.histories import History, RepresentationCache, encode_histories
from recllm.model.sequence_encoder import load_encoder, read_tensors

Weights = npt.NDArray[np.float32]  # (N, K), or (N, layers, K) with one gate a layer


class UserGate:
    """Sequence encoder and gate of one adapter.

    Args:
        encoder: in eval mode.
        gate: in eval mode.
        cache: remembers representations from call to call; None: nothing is remembered.
    """

    def __init__(self, encoder: SequenceEncoder, gate: Gate, cache: RepresentationCache | None = None) -> None:
        self.encoder, self.gate, self.cache = encoder.eval(), gate.eval(), cache

    @classmethod
    def load(cls, folder: Path, cache: RepresentationCache | None = None) -> "UserGate":
        """Of an adapter's folder.

        Raises:
            UserError: no instance-wise adapter, or a file of it is missing or damaged.
        """
        folder = Path(folder)
        if not (folder / ILORA_CONFIG).is_file():
            raise UserError(
                f"{folder} has no {ILORA_CONFIG}: an instance-wise adapter (adapter.method=ilora) is expected"
            )
        shape = read_ilora(folder)
        layers = None
        if shape.get("gate_per_layer"):
            layers = int(read_json(folder / BASE_MODEL, "the base model of an adapter")["num_hidden_layers"])
        gate = Gate(
            shape["representation_size"],
            shape["num_experts"],
            shape["gate_hidden_size"],
            shape["gate_temperature"],
            shape.get("gate_type", "softmax"),
            shape.get("gate_top_k"),
            layers,
        )
        try:
            gate.load_state_dict(read_tensors(folder / GATE_WEIGHTS, "the weights of the gate"))
        except RuntimeError as error:
            raise UserError(
                f"{folder / GATE_WEIGHTS} does not fit {ILORA_CONFIG} ({error}): copy the folder again"
            ) from None
        return cls(load_encoder(folder / ENCODER)[0], gate, cache)

    def representations(self, histories: Sequence[History]) -> npt.NDArray[np.float32]:
        """(N, D) of histories of item indices or event codes, oldest first; zeros for an empty one."""
        states: npt.NDArray[np.float32] = encode_histories(self.encoder, histories, cache=self.cache).numpy()
        return states

    @torch.inference_mode()
    def weigh(self, representations: npt.NDArray[np.float32]) -> Weights:
        """Gate weights of representations (N, D)."""
        parts = [self.gate(part).cpu() for part in torch.from_numpy(representations).split(4096)]
        weights: Weights = torch.cat(parts).float().numpy() if parts else np.empty((0, *self.gate.shape), np.float32)
        return weights

    def weights(self, histories: Sequence[History]) -> Weights:
        """Gate weights of histories; an empty one has the uniform gate."""
        return self.weigh(self.representations(histories))
