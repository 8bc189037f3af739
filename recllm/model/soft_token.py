"""LoRA beside a soft token as a PEFT tuner: the fair competitor of instance-wise LoRA.

A base model and a `SoftTokenConfig` enter; a PEFT model leaves that reads what an instance-wise adapter reads, by the
same arguments of forward() and generate(),

    history_items    (B, L) item indices or event codes, oldest first, -1 to the left: the encoder runs inside
    representation   (B, D) what the sequence encoder says of each user

but puts it into the input, not into the weights. The LoRA is plain; each row's first real token x gets

    x + scale · P z / √D          z = (e − mean) / deviation, as the gate reads it; P (H, D) is trained

where `scale` is the root mean square of the base model's embeddings: with entries of P of size 1 the soft token is as
long as an embedding, whatever the model. The first token of a chat prompt is always the same one, so it is a place
that the model can learn to read. It is added and not put before the prompt, so no shape changes: caches, tries,
left padding and the number of positions stay as they are. (The idea of a recommender's state as a token of the prompt:
Zhang et al., "CoLLM: Integrating Collaborative Embeddings into Large Language Models for Recommendation", 2023.)

P starts at zero, which is the plain LoRA. A soft token of its own may not: at zero RMSNorm divides by nearly nothing,
and training ends in NaN within a few steps. Added to an embedding it never is alone. An empty history adds exactly
nothing.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from torch.nn import functional

from recllm.errors import UserError
from recllm.model.gate import Standardised
from recllm.model.guided import GuidedLoraModel
from recllm.model.ilora import copies_of_each_prompt

SOFT_TOKEN: Any = "SOFT_TOKEN"  # as ILORA: PEFT's mappings take any string
ARGUMENTS = ("history_items", "representation")
SAMPLED_ROWS = 1024  # of the embedding, for its scale


@dataclass
class SoftTokenConfig(LoraConfig):
    """LoraConfig and the width of what the soft token is made from."""

    representation_size: int = field(default=64, metadata={"help": "D: width of the sequence encoder's output"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = SOFT_TOKEN
        for name in ("modules_to_save", "trainable_token_indices", "alora_invocation_tokens"):
            if getattr(self, name):
                raise UserError(
                    f"{name}={getattr(self, name)!r} cannot be combined with a soft token: it would change what the "
                    "token is added to, and vLLM refuses it. Leave it out"
                )


class SoftToken(Standardised):
    """Representation → what is added to an embedding. D: representation_size, H: hidden_size of the base model."""

    scale: torch.Tensor  # ()

    def __init__(self, representation_size: int, hidden_size: int, scale: float = 1.0) -> None:
        super().__init__(representation_size)
        self.hidden_size = hidden_size
        self.projection = nn.Parameter(torch.zeros(hidden_size, representation_size))
        self.register_buffer("scale", torch.tensor(float(scale)))

    def forward(self, representation: torch.Tensor) -> torch.Tensor:
        """(B, D) → (B, H), float32; a row of zeros (an empty history) gives zeros."""
        with torch.autocast(representation.device.type, enabled=False):
            z = self.standardise(representation)
            token = functional.linear(z, self.projection.float()) * (self.scale * self.representation_size**-0.5)
        empty = (representation == 0).all(dim=-1, keepdim=True)  # (B, 1)
        return torch.where(empty, 0.0, token)


class TokenRows:
    """What the running forward adds, and where. Two hooks share it: one of the model, one of its embedding."""

    def __init__(self) -> None:
        self.enabled = True
        self.rows: torch.Tensor | None = None  # (B, H); None outside a forward
        self.place: torch.Tensor | None = None  # (B, T) bool; None but between the model's call and its embedding's

    def locate(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Hook before the base model: find the first real token of each row."""
        self.place = None
        if not self.enabled:
            return None
        if self.rows is None:
            raise RuntimeError(
                "the adapter with a soft token was called without one: pass history_items= or representation= to the "
                "PEFT model's forward() or generate(), not to the base model inside it"
            )
        ids = kwargs["input_ids"] if kwargs.get("input_ids") is not None else (args[0] if args else None)
        embeddings = kwargs.get("inputs_embeds") if ids is None else None
        inputs = ids if embeddings is None else embeddings
        if inputs is None or inputs.shape[0] != self.rows.shape[0]:
            found = None if inputs is None else tuple(inputs.shape)
            raise RuntimeError(f"inputs {found} do not have one row for each of {self.rows.shape[0]} soft tokens")
        self.place = first_tokens(inputs, kwargs)
        if embeddings is None:
            return None
        return args, kwargs | {"inputs_embeds": self.add(model, (), embeddings)}

    def add(self, _: nn.Module, __: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        """Hook behind the embedding: (B, T, H) with each row's token added in its place."""
        place, self.place = self.place, None  # once a forward, whatever else the model looks up
        if place is None or self.rows is None:
            return output
        token = self.rows.to(output)[:, None]  # (B, 1, H)
        return torch.where(place.to(output.device)[..., None], output + token, output)


class UsingToken:
    """Context of one forward or generate: the hooks see these rows."""

    def __init__(self, state: TokenRows, rows: torch.Tensor) -> None:
        self.state, self.rows = state, rows

    def __enter__(self) -> None:
        self.outer, self.state.rows = self.state.rows, self.rows

    def __exit__(self, *_: object) -> None:
        self.state.rows, self.state.place = self.outer, None


def first_tokens(inputs: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
    """(B, T) bool, True at the first real token of each row that stands in these `inputs` (B, T, …).

    A padding mask knows it; without one (a tree mask, none) the token of position 0 does; without positions it is the
    first column, unless keys and values of earlier tokens are there. Padding may be marked too where nothing sees it.

    >>> first_tokens(torch.zeros(2, 3), {"attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]])}).tolist()
    [[False, True, False], [True, False, False]]
    >>> first_tokens(torch.zeros(1, 2), {"attention_mask": torch.tensor([[0, 1, 1]])}).tolist()  # the last two of three
    [[True, False]]
    """
    batch, length = inputs.shape[:2]
    mask, positions, past = (kwargs.get(name) for name in ("attention_mask", "position_ids", "past_key_values"))
    if torch.is_tensor(mask) and mask.dim() == 2:
        real = mask.to(torch.bool)
        return (real & (real.cumsum(-1) == 1))[:, -length:]
    if torch.is_tensor(positions) and positions.dim() == 2:
        return (positions == 0).expand(batch, length)
    begin = torch.arange(length, device=inputs.device) == 0
    if past is not None:
        begin = begin & (past.get_seq_length() == 0)
    return begin.expand(batch, length)


class SoftTokenModel(GuidedLoraModel):
    """The tuner: plain LoRA layers, and a soft token and a sequence encoder for each adapter, as submodules.

    Of several active adapters the tokens add up, as their LoRA parts do. peft_config: adapter name → SoftTokenConfig.
    """

    reader_name, reader_said = "soft_token", "soft token"
    arguments = ARGUMENTS
    soft_token: Any  # nn.ModuleDict: adapter name → SoftToken
    token_rows: TokenRows
    hooks: list[Any]

    # ---- adapters come and go ----

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Insert the LoRA layers and the adapter's soft token."""
        self._make_state(model)
        embedding: Any = model.get_input_embeddings()  # type: ignore[operator]  # nn.Module to PEFT
        weight = embedding.weight
        config = self.peft_config[adapter_name]
        # One that is loaded brings its own scale, and one process alone may load it: a sharded weight needs all
        scale = 1.0 if config.inference_mode else embedding_scale(embedding)
        token = SoftToken(config.representation_size, embedding.embedding_dim, scale)
        trained = self._trained()
        on_meta = weight.is_meta or token.projection.is_meta  # the latter with low_cpu_mem_usage
        self.soft_token[adapter_name] = token if on_meta else token.to(weight.device)
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            if isinstance(model.get_input_embeddings(), LoraLayer):  # type: ignore[operator]  # as above
                raise UserError("target_modules includes the input embedding, to which the soft token is added")
        except BaseException:
            del self.soft_token[adapter_name]
            raise
        for name, requires_grad in trained.items():  # a further adapter changes nothing for those there, as in PEFT
            self._set_grad(name, requires_grad)

    def _make_state(self, model: Any) -> None:
        if not self._make_modules():
            return
        self.token_rows = TokenRows()
        self.hooks = [
            model.register_forward_pre_hook(self.token_rows.locate, with_kwargs=True),
            model.get_input_embeddings().register_forward_hook(self.token_rows.add),
        ]

    def disable_adapter_layers(self) -> None:
        """Off: LoRA and soft token."""
        super().disable_adapter_layers()
        self.token_rows.enabled = False

    def enable_adapter_layers(self) -> None:
        """On: LoRA and soft token."""
        super().enable_adapter_layers()
        self.token_rows.enabled = True

    def unload(self) -> nn.Module:
        """The base model without adapter and hooks."""
        for hook in self.hooks:
            hook.remove()
        return super().unload()

    def merge_and_unload(self, *_: Any, **__: Any) -> Any:
        """Refused: the soft token cannot be merged into weights."""
        raise UserError(
            "a soft token cannot be merged, it differs from user to user: load the folder with stock PEFT and merge "
            "that for the LoRA without its soft token"
        )

    # ---- running ----

    def tokens(self, representation: torch.Tensor | None = None, history_items: torch.Tensor | None = None) -> Any:
        """(B, H) float32: what is added to each row, of the active adapters, from one of the two arguments."""
        rows = []
        for name in self.active_adapters:
            token, state = self.soft_token[name], representation
            if state is None:
                if history_items is None:
                    raise ValueError(f"a soft token needs one of {', '.join(self.arguments)}")
                state = self.represent(history_items, name)
            if state.dim() != 2 or state.shape[1] != token.representation_size:
                expected = f"(B, {token.representation_size})"
                raise ValueError(f"representation has shape {tuple(state.shape)}, {expected} is expected")
            self._check_finite(state, "representation")
            rows.append(token(state.to(token.mean.device)))
        return sum(rows[1:], rows[0])

    def _take(self, kwargs: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        if kwargs.pop("gate_weights", None) is not None:
            raise ValueError(f"a soft token has no gate: pass one of {', '.join(self.arguments)}")
        return super()._take(kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's forward, with one of the two arguments. Without any it raises (unless disabled)."""
        given, kwargs = self._take(kwargs)
        if not given:
            return self.model(*args, **kwargs)
        with UsingToken(self.token_rows, self.tokens(**given)):
            return self.model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's generate, with one of the two arguments: one soft token a prompt, repeated for beams."""
        given, kwargs = self._take(kwargs)
        if not given:
            return self.model.generate(*args, **kwargs)
        rows = self.tokens(**given).repeat_interleave(copies_of_each_prompt(self.model, kwargs), dim=0)
        with UsingToken(self.token_rows, rows):
            return self.model.generate(*args, **kwargs)


@torch.no_grad()
def embedding_scale(embedding: Any) -> float:
    """Root mean square of what the embedding gives, over rows spread over the vocabulary; 1 for weights not here yet.

    Through its forward: some models multiply inside it. A sharded weight (ZeRO-3) is gathered first.
    """
    weight = embedding.weight
    if weight.is_meta:
        return 1.0  # the saved one is loaded over it
    with _gathered(weight):
        rows = torch.linspace(0, embedding.num_embeddings - 1, SAMPLED_ROWS, dtype=torch.float64).long()
        return float(embedding(rows.unique().to(weight.device)).float().square().mean().sqrt())


def _gathered(weight: torch.Tensor) -> Any:
    if not hasattr(weight, "ds_id"):
        return torch.no_grad()
    from deepspeed.runtime.zero import GatheredParameters  # only where deepspeed has sharded it

    return GatheredParameters([weight])


PEFT_TYPE_TO_CONFIG_MAPPING[SOFT_TOKEN] = SoftTokenConfig
PEFT_TYPE_TO_TUNER_MAPPING[SOFT_TOKEN] = SoftTokenModel
PEFT_TYPE_TO_PREFIX_MAPPING[SOFT_TOKEN] = "lora_"
