"""Instance-wise LoRA as a PEFT tuner: every row of a batch has its own mixture of experts.

A base model and an `ILoraConfig` enter; a PEFT model leaves whose forward() and generate() take one of

    history_items    (B, L) item indices or event codes, oldest first, -1 to the left: encoder and gate run inside
    representation   (B, D) what the sequence encoder says of each user: the gate runs inside
    gate_weights     (B, K) used as they are (controls: uniform, shuffled, oracle); (B, layers, K) with a gate a layer

The method (Kong et al., "Customizing Language Models with Instance-wise LoRA for Sequential Recommendation", NeurIPS
2024): a LoRA of rank R is cut into K experts of rank R/K and each user weighs them by a gate g,

    y = W x + (alpha / R) · B (K · repeat(g, R/K) ⊙ (A x))

which is one product with the (B, T, R) activations and no loop over experts: expert k is rows (k-1)·R/K … k·R/K of A
and the same columns of B. Uniform g gives K · 1/K = 1: the plain LoRA with the same weights. A sigmoid gate has a
weight for each rank in place of K · repeat(g, R/K): 2 · sigmoid(z), which is 1 at z = 0. With gate_per_layer each
decoder layer has its own g, and each LoRA layer takes that of the decoder layer it lies in.

Importing this module makes "ILORA" known to PEFT. Gates travel in an object that belongs to the tuner and holds them
for the length of one forward, never in a global; a layer that finds none there raises.
"""

import functools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from types import TracebackType
from typing import Any, NamedTuple

import torch
from peft import LoraConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from torch import nn

from recllm.errors import UserError
from recllm.model.gate import Gate, rank_factor
from recllm.model.guided import GuidedLoraModel

ILORA: Any = "ILORA"  # PeftType is a closed enum, but PEFT's mappings are keyed by anything that hashes like a str
GATE_TYPES = ("softmax", "sigmoid")
GATE_ARGUMENTS = ("history_items", "representation", "gate_weights")
DECODER_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|block)\.(\d+)\.")  # in a module's name


class Rows(NamedTuple):
    """What the layers of an adapter multiply A x by in one forward.

    factors: (B, 1, R) of each LoRA layer, `scaling` within; views of one tensor, which in an autocast has been cast to
        its dtype once. Their gradients then meet in one sum, in float32.
    """

    factors: tuple[torch.Tensor, ...]
    scaling: float


@dataclass
class ILoraConfig(LoraConfig):
    """LoraConfig and the shape of the gate. What would change the formula above is refused."""

    num_experts: int = field(default=4, metadata={"help": "K: experts that the rank is cut into"})
    representation_size: int = field(default=64, metadata={"help": "D: width of the sequence encoder's output"})
    gate_hidden_size: int = field(default=0, metadata={"help": "width of the gate's hidden layer; 0: one linear layer"})
    gate_temperature: float = field(default=1.0, metadata={"help": "divides the gate's logits"})
    gate_type: str = field(default="softmax", metadata={"help": "softmax over K experts, or sigmoid a rank (K = r)"})
    gate_top_k: int | None = field(default=None, metadata={"help": "softmax: the k largest experts, renormalised"})
    gate_per_layer: bool = field(default=False, metadata={"help": "a gate for each decoder layer, not one for all"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = ILORA
        if self.gate_type == "sigmoid":
            self.num_experts = self.r
        if self.num_experts < 1 or self.r % self.num_experts:
            raise UserError(
                f"r={self.r} does not split into num_experts={self.num_experts} equal experts: "
                f"take an r that is a multiple of num_experts"
            )
        self._check_gate()
        refused = {name: reason for name, reason in _refusals().items() if getattr(self, name)}
        if self.bias != "none":
            refused["bias"] = "a trained bias is the same for every user"
        for name, reason in refused.items():
            raise UserError(f"{name}={getattr(self, name)!r} cannot be combined with an instance-wise LoRA: {reason}")

    def _check_gate(self) -> None:
        if self.gate_type not in GATE_TYPES:
            raise UserError(f"gate_type={self.gate_type!r} is unknown: take one of {', '.join(GATE_TYPES)}")
        if self.gate_temperature <= 0:
            raise UserError(f"gate_temperature={self.gate_temperature} divides the logits: take a number above 0")
        k, num_experts = self.gate_top_k, self.num_experts
        if k is None:
            return
        if self.gate_type != "softmax" or not 1 <= k <= num_experts:
            raise UserError(
                f"gate_top_k={k} with gate_type={self.gate_type} and num_experts={num_experts}: it is for the softmax "
                "gate, from 2 to num_experts"
            )
        if k == 1 < num_experts:
            raise UserError(
                "gate_top_k=1: the one expert's renormalised weight is always 1, so no gradient reaches the gate. Take "
                "2 or more, or all experts with a low temperature"
            )


def _refusals() -> dict[str, str]:
    """Options of LoraConfig that an instance-wise adapter refuses, with the reason."""
    reasons = {
        "rank_pattern": "all layers share one gate, so all need the same r",
        "lora_bias": "the bias of B is not weighed by the gate, and vLLM refuses it",
        "target_parameters": "experts of a mixture-of-experts layer see tokens without their row",
        "modules_to_save": "vLLM refuses further trained modules; the gate has its own file",
        "trainable_token_indices": "vLLM refuses further trained tensors",
        "use_qalora": "it pools the input of A",
    }
    # DoRA, aLoRA and the like replace the layer's forward: PEFT marks each as a variant, and so do we
    variants = [f.name for f in fields(LoraConfig) if f.metadata.get("is_lora_variant")]
    return reasons | dict.fromkeys(variants, "it replaces the LoRA layer's formula by its own")


class GateRows:
    """The gates of the forward that is running.

    by_adapter: adapter name → factors of A x. Empty outside a forward.
    weights: adapter name → the weights that they were made of, (B, K) or (B, layers, K), with their gradient. They stay
        until the next forward, for losses on the gate.
    """

    def __init__(self) -> None:
        self.by_adapter: dict[str, Rows] = {}
        self.weights: dict[str, torch.Tensor] = {}

    def __reduce__(self) -> tuple[type["GateRows"], tuple[()]]:
        return GateRows, ()  # copied and pickled empty: a tensor inside a graph can be neither


class UsingRows:
    """Context in which the layers see these rows. It can be entered again: a graph may be walked back twice."""

    def __init__(self, state: GateRows, rows: "dict[str, Rows]") -> None:
        self.state, self.rows = state, rows
        self.outer: list[dict[str, Rows]] = []

    def __enter__(self) -> None:
        self.outer.append(self.state.by_adapter)
        self.state.by_adapter = self.rows

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.state.by_adapter = self.outer.pop()


class ILoraVariant(LoraVariant):
    """The formula of one layer. PEFT calls it in place of its own from every kind of linear layer, quantised or not.

    `place`: which of the adapter's factors is this layer's.
    """

    def __init__(self, state: GateRows, place: int = 0) -> None:
        self.state, self.place = state, place

    def supports_lora_conversion(self) -> bool:
        """No: one user's gate can be folded (export.export_user_adapter), all users' cannot."""
        return False

    def forward(  # type: ignore[override]  # PEFT's is a static method; ours needs the tuner's state
        self, module: LoraLayer, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **_: Any
    ) -> torch.Tensor:
        """`result` (the base layer's output, (B, T, out)) plus the adapter's share for each row's gate."""
        given = self.state.by_adapter.get(active_adapter)
        if given is None:
            raise RuntimeError(_NO_GATE.format(adapter=active_adapter))
        factor, scaling = given.factors[self.place], module.scaling[active_adapter]  # (B, 1, R)
        activations = module.lora_A[active_adapter](module.lora_dropout[active_adapter](x))  # (B, T, R)
        if activations.dim() != 3 or activations.shape[0] != factor.shape[0]:
            raise RuntimeError(_NO_ROWS.format(activations=tuple(activations.shape), rows=factor.shape[0]))
        if scaling != given.scaling:  # alpha_pattern, or PEFT's set_scale
            factor = factor * (scaling / given.scaling)
        return result + module.lora_B[active_adapter](activations * factor.to(activations))

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise UserError(
            "an instance-wise adapter cannot be merged: its weights differ from user to user. Fold one user's gate "
            "with recllm.model.export.export_user_adapter and merge that"
        )

    merge_safe = merge_unsafe = unmerge = _refuse  # type: ignore[assignment]  # PEFT's are static methods


_NO_GATE = (
    'the instance-wise adapter "{adapter}" was called without gates: pass history_items=, representation= or '
    "gate_weights= to the PEFT model's forward() or generate(), not to the base model inside it (gradient "
    "checkpointing too must be switched on through the PEFT model)"
)
_NO_ROWS = (
    "activations {activations} do not have one row for each of {rows} gates. Packed and padding-free batches mix users "
    "within a row and are not supported: pass one user a row, padded"
)


class ILoraModel(GuidedLoraModel):
    """The tuner. Owns a gate and, where set, a sequence encoder for each adapter, as submodules.

    peft_config: adapter name → ILoraConfig.
    """

    reader_name = reader_said = "gate"
    arguments = GATE_ARGUMENTS
    gate: Any  # nn.ModuleDict: adapter name → Gate
    gate_rows: GateRows
    decoder_layers: dict[str, torch.Tensor]  # adapter name → (M,) which of the gate's rows each LoRA layer takes

    # ---- adapters come and go ----

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Insert the LoRA layers, the adapter's gate, and our formula into each layer."""
        if self._make_modules():
            self.gate_rows, self.decoder_layers = GateRows(), {}
        config = self.peft_config[adapter_name]
        gate = _make_gate(config, model)
        parameter = next(model.parameters())
        trained = self._trained()
        on_meta = parameter.is_meta or gate.output.weight.is_meta  # the latter with low_cpu_mem_usage
        self.gate[adapter_name] = gate if on_meta else gate.to(parameter.device)
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            self._set_variants(model, adapter_name)
        except BaseException:
            del self.gate[adapter_name]
            raise
        for name, requires_grad in trained.items():  # a further adapter changes nothing for those there, as in PEFT
            self._set_grad(name, requires_grad)
        if getattr(model, "is_gradient_checkpointing", False):
            self.gradient_checkpointing_enable()  # it was switched on before our layers were there

    def _set_variants(self, model: nn.Module, adapter_name: str) -> None:
        rows: list[int] = []
        for name, module in model.named_modules():
            if not isinstance(module, LoraLayer):
                continue
            if adapter_name in module.lora_embedding_A:
                raise UserError(f"target_modules includes {name}, an embedding: instance-wise LoRA needs linear layers")
            if adapter_name in module.lora_A:
                if not isinstance(module.lora_A[adapter_name], nn.Linear):
                    raise UserError(f"target_modules includes {name}, which is not linear: leave it out")
                module.lora_variant[adapter_name] = ILoraVariant(self.gate_rows, len(rows))
                rows.append(_decoder_layer(name, self.gate[adapter_name]))
        self.decoder_layers[adapter_name] = torch.tensor(rows, device="cpu")  # on meta with low_cpu_mem_usage otherwise

    def add_weighted_adapter(self, *_: Any, **__: Any) -> None:
        """Refused: gates of several adapters have no mean."""
        raise UserError(
            "instance-wise adapters cannot be combined by weights: export_user_adapter one user of each first"
        )

    # ---- gates ----

    def gate_weights(
        self,
        history_items: torch.Tensor | None = None,
        *,
        representation: torch.Tensor | None = None,
        adapter_name: str | None = None,
    ) -> torch.Tensor:
        """Weights of histories (B, L) or of representations (B, D), by the active adapter's gate or by another's.

        (B, K), float32, or (B, layers, K) with a gate a layer.

        Raises:
            ValueError: neither given, a wrong shape, or no sequence encoder for history_items.
            UserError: a representation that is not finite (not looked for in training on a GPU, nor when compiled).
        """
        name = self.active_adapters[0] if adapter_name is None else adapter_name
        gate = self.gate[name]
        if representation is None:
            if history_items is None:
                raise ValueError("gate_weights() needs history_items or representation")
            representation = self.represent(history_items, name)
        if representation.dim() != 2 or representation.shape[1] != gate.representation_size:
            expected = f"(B, {gate.representation_size})"
            raise ValueError(f"representation has shape {tuple(representation.shape)}, {expected} is expected")
        self._check_finite(representation, "representation")
        return gate(representation.to(gate.mean.device))

    def _rows(self, given: dict[str, torch.Tensor]) -> dict[str, Rows]:
        """Adapter name → factors of A x of one forward."""
        ((argument, value),) = given.items()
        weights, rows = {}, {}
        for name in self.active_adapters:
            weights[name] = (
                value if argument == "gate_weights" else self.gate_weights(**{argument: value}, adapter_name=name)
            )
            config = self.peft_config[name]
            scaling = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
            factor = self.factor(weights[name], name) * scaling  # (B, R) or (B, layers, R)
            own = self.decoder_layers[name]
            if factor.dim() == 3:
                each = factor[:, own.to(factor.device)].transpose(0, 1)
            else:
                each = factor.expand(len(own), *factor.shape)
            if torch.is_autocast_enabled(factor.device.type):
                each = each.to(torch.get_autocast_dtype(factor.device.type))
            rows[name] = Rows(each.unsqueeze(2).unbind(0), scaling)  # (M, B, 1, R)
        self.gate_rows.weights = weights
        return rows

    def factor(self, weights: torch.Tensor, adapter_name: str) -> torch.Tensor:
        """What gate weights multiply A x by, float32: (B, K) → (B, R), or (B, layers, K) → (B, layers, R).

        Raises:
            ValueError: the weights do not have the shape of the adapter's gate.
            UserError: they are not finite (not looked for in training on a GPU, nor when compiled).
        """
        config, gate = self.peft_config[adapter_name], self.gate[adapter_name]
        if tuple(weights.shape[1:]) != gate.shape or weights.dim() < 2:
            shape, wanted = tuple(weights.shape), ", ".join(map(str, gate.shape))
            raise ValueError(f'gate_weights has shape {shape}, adapter "{adapter_name}" needs (B, {wanted})')
        self._check_finite(weights, "gate_weights")
        return rank_factor(weights, config.r, config.gate_type)

    # ---- running ----

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's forward, with one of the gate arguments. Without any, layers raise (unless disabled).

        Raises:
            UserError: a replica of nn.DataParallel: its threads would overwrite each other's gates.
        """
        if getattr(self, "_is_replica", False):
            raise UserError("nn.DataParallel runs threads on one tuner: start one process a GPU with accelerate launch")
        given, kwargs = self._take(kwargs)
        if not given:
            self.gate_rows.weights = {}
            return self.model(*args, **kwargs)
        with UsingRows(self.gate_rows, self._rows(given)):
            return self.model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's generate, with one of the gate arguments: one gate a prompt, repeated for its beams."""
        given, kwargs = self._take(kwargs)
        if not given:
            return self.model.generate(*args, **kwargs)
        copies = copies_of_each_prompt(self.model, kwargs)
        rows = {
            name: own._replace(factors=tuple(row.repeat_interleave(copies, dim=0) for row in own.factors))
            for name, own in self._rows(given).items()
        }
        with UsingRows(self.gate_rows, rows):
            return self.model.generate(*args, **kwargs)

    # ---- gradient checkpointing ----

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """The base model's, such that each layer is recomputed with the gates of its own forward.

        Backward runs after forward has ended, and possibly after another forward: the context keeps its rows.
        transformers makes the embeddings need a gradient, which reentrant checkpoints alone need and which would break
        a compiled graph: that is undone. PEFT does the same where checkpointing was on before there was an adapter,
        and there the break stays.

        Raises:
            UserError: use_reentrant=True, which cuts the gate off from its gradient.
        """
        options = dict(gradient_checkpointing_kwargs or {})
        if options.get("use_reentrant"):
            raise UserError("gradient checkpointing with use_reentrant=True loses the gate's gradient: set it to False")
        options |= {"use_reentrant": False, "context_fn": functools.partial(_checkpoint_contexts, self.gate_rows)}
        self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options, **kwargs)
        self.model.disable_input_require_grads()
        for module in self.model.modules():
            function = getattr(module, "_gradient_checkpointing_func", None)
            if isinstance(function, functools.partial) and "context_fn" in function.keywords:
                module._gradient_checkpointing_func = functools.partial(
                    _checkpoint, function
                )  # copies, as no closure does


def _make_gate(config: ILoraConfig, model: Any) -> Gate:
    num_layers = None
    if config.gate_per_layer:
        if not hasattr(model, "config"):
            raise UserError("gate_per_layer needs a transformers model: its config says how many layers it has")
        num_layers = model.config.get_text_config().num_hidden_layers
    return Gate(
        config.representation_size,
        config.num_experts,
        config.gate_hidden_size,
        config.gate_temperature,
        config.gate_type,
        config.gate_top_k,
        num_layers,
    )


def _decoder_layer(name: str, gate: Gate) -> int:
    """Which of the gate's rows a module takes: the number of the decoder layer in its name; 0 of a shared gate."""
    if gate.num_layers is None:
        return 0
    found = DECODER_LAYER.search(name)
    if found is None or int(found[1]) >= gate.num_layers:
        raise UserError(
            f"target_modules includes {name}, which lies in none of the {gate.num_layers} decoder layers: leave it "
            "out, or share one gate (adapter.gate.per_layer=false)"
        )
    return int(found[1])


def _checkpoint(eager: functools.partial[Any], function: Callable[..., Any], *args: Any) -> Any:
    """torch.compile refuses contexts of checkpoints and needs none: the rows are inputs of the compiled stretch."""
    if not torch.compiler.is_compiling():
        return eager(function, *args)
    options = {name: value for name, value in eager.keywords.items() if name != "context_fn"}
    return eager.func(function, *args, **options)


def _checkpoint_contexts(state: GateRows) -> tuple[UsingRows, UsingRows]:
    """Contexts of a checkpointed stretch: of its forward, and of its recomputation, both with the rows of now."""
    return UsingRows(state, state.by_adapter), UsingRows(state, state.by_adapter)


def copies_of_each_prompt(model: Any, kwargs: dict[str, Any]) -> int:
    """How often generate() repeats each prompt: transformers expands to max(num_beams, num_return_sequences).

    An argument counts first, then the config that was passed, and what that leaves open the model's own config fills.
    """
    configs = [config for config in (kwargs.get("generation_config"), model.generation_config) if config is not None]

    def asked(name: str) -> int:
        found = (kwargs.get(name), *(getattr(config, name, None) for config in configs))
        return next((value for value in found if value is not None), 1)

    return max(asked("num_beams"), asked("num_return_sequences"))


PEFT_TYPE_TO_CONFIG_MAPPING[ILORA] = ILoraConfig
PEFT_TYPE_TO_TUNER_MAPPING[ILORA] = ILoraModel
PEFT_TYPE_TO_PREFIX_MAPPING[ILORA] = "lora_"
