"""LoRA tuners that read something of each user: what an instance-wise LoRA and a soft token have in common.

A base model enters; a tuner leaves that owns, for each adapter, a reader of representations (a gate, a soft token) and,
where set, the sequence encoder that makes them from histories.
"""

from typing import Any

import torch
from peft.tuners.lora.model import LoraModel
from torch import nn

from recllm.errors import UserError
from recllm.model.gate import check_finite
from recllm.model.sequence_encoder import SequenceEncoder

FLATTENED = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")  # a forward with one of these has many users in one row


def begin_anew(positions: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """(B,) bool: whether a token of the row stands at a lower position than one before it, padding left out.

    positions: (B, T). mask: (B, at least T), 0 where there is padding; None: nowhere.

    >>> begin_anew(torch.tensor([[0, 1, 2, 0, 1], [1, 1, 0, 1, 2]]), torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]))
    tensor([ True, False])
    """
    real = torch.ones_like(positions) if mask is None else mask[:, -positions.shape[1] :].to(positions)
    highest = torch.where(real.bool(), positions, -1).cummax(dim=-1).values  # so far
    return (real.bool() & (positions < highest)).any(dim=-1)


class GuidedLoraModel(LoraModel):
    """Readers and encoders as submodules, so that DDP, ZeRO and FSDP see their parameters.

    A subclass names its readers' module (`reader_name`) and the forward arguments that it takes (`arguments`). An
    encoder is frozen and in eval mode unless set as trainable.
    """

    reader_name: str  # of the nn.ModuleDict: adapter name → Standardised
    reader_said: str  # in errors
    arguments: tuple[str, ...]  # of forward() and generate(), one at a time
    model: Any  # PreTrainedModel
    peft_config: dict[str, Any]
    sequence_encoder: Any  # nn.ModuleDict: adapter name → SequenceEncoder
    trainable_encoders: set[str]

    uses_shared_state = True  # layers and hooks need the tuner around them: PEFT then refuses inject_adapter_in_model

    @property
    def readers(self) -> Any:
        """nn.ModuleDict: adapter name → what reads its representations."""
        return self._modules[self.reader_name]

    # ---- adapters come and go ----

    def _make_modules(self) -> bool:
        """False if they are there."""
        if self.reader_name in self._modules:
            return False
        setattr(self, self.reader_name, nn.ModuleDict())
        self.sequence_encoder = nn.ModuleDict()
        self.trainable_encoders = set()
        return True

    def _trained(self) -> dict[str, bool]:
        """Adapter name → whether its reader has gradients."""
        return {name: next(reader.parameters()).requires_grad for name, reader in self.readers.items()}

    def set_encoder(self, encoder: SequenceEncoder, adapter_name: str, trainable: bool = False) -> None:
        """Give an adapter its sequence encoder; `history_items` needs one. Frozen unless `trainable`.

        Raises:
            UserError: the encoder's width is not what the reader reads.
        """
        reader = self.readers[adapter_name]
        if encoder.hidden_size != reader.representation_size:
            raise UserError(
                f"the encoder gives {encoder.hidden_size} numbers a user, the {self.reader_said} reads "
                f"{reader.representation_size}: fit it again"
            )
        self.sequence_encoder[adapter_name] = encoder.to(reader.mean.device)
        (self.trainable_encoders.add if trainable else self.trainable_encoders.discard)(adapter_name)
        self._set_grad(adapter_name, self._trained()[adapter_name])
        self.train(self.training)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Activate adapters; gradients of readers and encoders follow, which PEFT does for layers only."""
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        self._sync_requires_grad(inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter with its reader and encoder."""
        super().delete_adapter(adapter_name)
        for modules in (self.readers, self.sequence_encoder):
            if adapter_name in modules:
                del modules[adapter_name]
        self.trainable_encoders.discard(adapter_name)
        self._sync_requires_grad()

    def set_requires_grad(self, adapter_names: Any, requires_grad: bool = True) -> None:
        """Switch gradients of adapters' layers and readers."""
        super().set_requires_grad(adapter_names, requires_grad)
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            self._set_grad(name, requires_grad)

    def _sync_requires_grad(self, inference_mode: bool = False) -> None:
        for name in self.readers:
            self._set_grad(name, name in self.active_adapters and not inference_mode)

    def _set_grad(self, name: str, requires_grad: bool) -> None:
        self.readers[name].requires_grad_(requires_grad)
        if name in self.sequence_encoder:
            encoder = self.sequence_encoder[name].requires_grad_(requires_grad and name in self.trainable_encoders)
            if encoder.num_actions:  # in no representation: engines of several processes wait for all gradients
                encoder.action_bias.requires_grad_(False)

    def train(self, mode: bool = True) -> "GuidedLoraModel":
        """Training mode for all but frozen encoders: their dropout would make what is read of a user random."""
        super().train(mode)
        for name, encoder in self.sequence_encoder.items():
            encoder.train(mode and name in self.trainable_encoders)
        return self

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # PEFT strips the name only where it is the last or last but one part of a key. A reader's lies deeper, and
        # would silently not be loaded under another adapter name.
        for owner in (cls.reader_name, "sequence_encoder"):
            prefix = f"base_model.{owner}.{adapter_name}."
            if key.startswith(prefix):
                return f"base_model.{owner}." + key.removeprefix(prefix)
        return super()._remove_adapter_name_from_key(key, adapter_name)

    # ---- running ----

    def represent(self, history_items: torch.Tensor, adapter_name: str | None = None) -> torch.Tensor:
        """What the sequence encoder says of histories: (B, L) → (B, D), float32; zeros for an empty history."""
        name = self.active_adapters[0] if adapter_name is None else adapter_name
        if name not in self.sequence_encoder:
            raise ValueError(f'adapter "{name}" has no sequence encoder: call set_encoder, or pass representation=')
        encoder = self.sequence_encoder[name]
        with torch.autocast(encoder.device.type, enabled=False):
            return encoder(history_items.to(encoder.device)).float()

    def _may_look(self, tensor: torch.Tensor) -> bool:
        # Looking makes a GPU wait, and a graph break when compiled
        return not torch.compiler.is_compiling() and (tensor.is_cpu or not self.training)

    def _check_finite(self, rows: torch.Tensor, what: str) -> None:
        if self._may_look(rows):  # NaN otherwise stays in its own row, and in the loss
            check_finite(rows, what)

    def _check_unpacked(self, positions: Any, mask: Any) -> None:
        """Refuse rows whose `positions` (B, T) begin anew: transformers reads a further sequence there.

        A mask of four dimensions is no padding and says itself what a token sees: a trie's answers share positions.
        """
        if not torch.is_tensor(positions) or positions.dim() != 2 or not self._may_look(positions):
            return
        if positions.shape[1] == 1:  # a step of a generation: nothing to look at
            return
        if mask is not None and not (torch.is_tensor(mask) and mask.dim() == 2):
            return
        packed = begin_anew(positions, mask)
        if packed.any():
            row = int(packed.nonzero()[0])
            raise RuntimeError(
                f"position_ids of row {row} of {len(packed)} begin anew within the row, which says that it is packed "
                "with several users: pass one user a row, padded"
            )

    def _take(self, kwargs: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """The one of `arguments` that was given, and what is for the base model."""
        given = {name: kwargs[name] for name in self.arguments if kwargs.get(name) is not None}
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} were given: pass one of {', '.join(self.arguments)}")
        if given and (flattened := [name for name in FLATTENED if kwargs.get(name) is not None]):
            raise RuntimeError(
                f"{flattened[0]} says that rows are packed with several users: pass one user a row, padded"
            )
        if given:
            self._check_unpacked(kwargs.get("position_ids"), kwargs.get("attention_mask"))
        return given, {name: value for name, value in kwargs.items() if name not in self.arguments}

    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("adapter_names") is not None:
            raise UserError(f"adapter_names (several adapters in one batch) does not go with a {self.reader_said}")
        return super()._enable_peft_forward_hooks(*args, **kwargs)
