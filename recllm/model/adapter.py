"""Adapters: built for training, written to adapter/, loaded again, folded for one user.

A base model and the recipe's adapter section (or a folder) enter; a PEFT model leaves. The folder:

    adapter_model.safetensors   LoRA weights and
    adapter_config.json         their config as peft_type LORA: stock PEFT and vLLM load these two, gates uniform
    base_model.json             the base model that they fit
    gate.safetensors            the gate, its mean and deviation            } of an instance-wise
    ilora.json                  experts, scaling, gate shape, vocabulary    } adapter only
    sequence_encoder/           what the gate reads                         }
    items.parquet, manifest.json, README.md    as the caller gives them
"""

import hashlib
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from peft.utils.save_and_load import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import save_file

from recllm.errors import UserError
from recllm.files import read_json, replacing_folder, write_json, write_text
from recllm.model.ilora import ILoraConfig, ILoraModel
from recllm.model.sequence_encoder import SASRec, describe, load_encoder, read_tensors, write_encoder
from recllm.recipe import AdapterSection

FORMAT_VERSION = 1
LORA_WEIGHTS, LORA_CONFIG, BASE_MODEL = "adapter_model.safetensors", "adapter_config.json", "base_model.json"
GATE_WEIGHTS, ILORA_CONFIG, ENCODER = "gate.safetensors", "ilora.json", "sequence_encoder"
ITEMS, MANIFEST, CARD = "items.parquet", "manifest.json", "README.md"
WEIGHTS_SHA256, FINGERPRINT_ROWS = "weights_sha256", 64
EXACT = (torch.float32, torch.bfloat16)  # float16 rounds small bf16 numbers: no fingerprint then
_GATE_PREFIX, _ENCODER_PREFIX = "base_model.gate.", "base_model.sequence_encoder."


# ---- built ----


def build_adapter(
    base_model: Any, section: AdapterSection, encoder: SASRec | None = None, adapter_name: str = "default"
) -> PeftModel:
    """A fresh, trainable adapter around the base model: plain LoRA, or instance-wise LoRA guided by the encoder.

    Raises:
        UserError: method ilora without an encoder, or modules that the base model does not have.
    """
    lora: dict[str, Any] = {
        "r": section.r,
        "lora_alpha": section.lora_alpha,
        "lora_dropout": section.lora_dropout,
        "target_modules": section.target_modules,
        "task_type": "CAUSAL_LM",
    }
    if section.method == "lora":
        return _wrap(base_model, LoraConfig(**lora), adapter_name)
    if encoder is None:
        raise UserError("adapter.method=ilora needs a sequence encoder to guide its gate: fit one, or take method lora")
    config = ILoraConfig(
        **lora,
        num_experts=section.num_experts,
        representation_size=encoder.hidden_size,
        gate_hidden_size=section.gate.hidden_size,
        gate_temperature=section.gate.temperature,
    )
    model = _wrap(base_model, config, adapter_name)
    _tuner(model).set_encoder(encoder, adapter_name)
    return model


def _wrap(base_model: Any, config: LoraConfig, adapter_name: str) -> PeftModel:
    try:
        if not isinstance(base_model, PeftModel):
            return get_peft_model(base_model, config, adapter_name=adapter_name)
        base_model.add_adapter(adapter_name, config)
        return base_model
    except ValueError as error:  # PEFT's NoMatchingPeftModuleError among them
        raise UserError(f"adapter: {error}") from None


# ---- asked ----


def accepts_history(model: Any) -> bool:
    """Whether forward() and generate() take history_items: an instance-wise adapter, not a plain LoRA or base model."""
    return isinstance(getattr(model, "base_model", None), ILoraModel)


def gate_weights(model: PeftModel, history_items: torch.Tensor) -> torch.Tensor:
    """Expert weights (B, K), float32, rows sum to 1, of histories (B, L), by the active adapter."""
    return _tuner(model).gate_weights(history_items)


def fit_gate_statistics(model: PeftModel, representations: torch.Tensor, adapter_name: str = "default") -> None:
    """Set the gate's mean and deviation from representations (N, D) of the training examples."""
    _tuner(model).gate[adapter_name].fit_statistics(representations)


def _tuner(model: PeftModel) -> ILoraModel:
    if not accepts_history(model):
        raise ValueError(f"{type(model).__name__} holds no instance-wise adapter: it has no gate")
    return model.base_model  # type: ignore[return-value]  # PEFT declares a plain module; checked just above


# ---- written ----


def save_adapter(
    model: PeftModel,
    folder: Path,
    *,
    items: Path | None = None,
    manifest: dict[str, Any] | None = None,
    card: str | None = None,
    adapter_name: str = "default",
    state_dict: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write one adapter as a folder that takes the old one's place when it is complete.

    Args:
        model: the unwrapped PEFT model.
        folder: where adapter/ goes; an old one is replaced.
        items: items.parquet of the dataset, copied.
        manifest: the dataset's manifest.
        card: text of README.md.
        adapter_name: which adapter of the model.
        state_dict: gathered weights of the whole model, where a sharding engine holds only parts of each.

    Raises:
        UserError: a tensor is empty (sharded and not gathered) or not finite; nothing is written then.
    """
    with replacing_folder(Path(folder)) as staging:
        write_adapter(model, staging, adapter_name=adapter_name, state_dict=state_dict)
        if items is not None:
            shutil.copyfile(items, staging / ITEMS)
        if manifest is not None:
            write_json(staging / MANIFEST, manifest)
        if card is not None:
            write_text(staging / CARD, card)


def write_adapter(
    model: PeftModel,
    folder: Path,
    *,
    adapter_name: str = "default",
    state_dict: dict[str, torch.Tensor] | None = None,
) -> None:
    """The files of one adapter, into an existing folder; arguments and errors as `save_adapter`."""
    lora, gate, encoder = _split(
        get_peft_model_state_dict(model, state_dict, adapter_name=adapter_name, save_embedding_layers=False)
    )
    _check_tensors({**lora, **gate, **encoder})
    _save(lora, folder / LORA_WEIGHTS)
    _write_plain_config(model.peft_config[adapter_name], folder)
    write_json(folder / BASE_MODEL, _describe_base(model))
    if accepts_history(model):
        _save(gate, folder / GATE_WEIGHTS)
        _write_ilora(_tuner(model), adapter_name, encoder, folder)


def _split(weights: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], ...]:
    """LoRA, gate and encoder weights; the latter two without their prefix."""

    def below(prefix: str) -> dict[str, torch.Tensor]:
        return {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}

    lora = {key: value for key, value in weights.items() if not key.startswith((_GATE_PREFIX, _ENCODER_PREFIX))}
    return lora, below(_GATE_PREFIX), below(_ENCODER_PREFIX)


def _check_tensors(weights: dict[str, torch.Tensor]) -> None:
    empty = [name for name, value in weights.items() if value.numel() == 0]
    if empty or not weights:
        raise UserError(
            f"{len(empty)} of {len(weights)} adapter tensors are empty (first: {empty[0] if empty else 'none'}): "
            "a sharded model (ZeRO-3, FSDP) must be gathered first and handed over as state_dict"
        )
    broken = [name for name, value in weights.items() if not torch.isfinite(value).all()]
    if broken:
        raise UserError(f"{len(broken)} adapter tensors are not finite (first: {broken[0]}): lower train.learning_rate")


def _save(weights: dict[str, torch.Tensor], path: Path) -> None:
    save_file(
        {name: value.detach().cpu().contiguous().clone() for name, value in weights.items()}, path, {"format": "pt"}
    )
    path.chmod(0o644)  # safetensors makes 0600


def _write_plain_config(config: Any, folder: Path) -> None:
    """The config of the plain LoRA that the weights are under uniform gates, as PEFT writes it but in fixed order."""
    document = {k: v for k, v in config.to_dict().items() if k in LoraConfig.__dataclass_fields__}
    document |= {"peft_type": "LORA", "inference_mode": True}
    write_json(folder / LORA_CONFIG, {k: sorted(v) if isinstance(v, set) else v for k, v in document.items()})


def _describe_base(model: PeftModel) -> dict[str, Any]:
    base: Any = model.get_base_model()
    config = base.config.get_text_config()
    sizes = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")
    described = {"name_or_path": base.name_or_path, WEIGHTS_SHA256: weights_sha256(base)}
    return described | {name: getattr(config, name, None) for name in sizes}


@torch.no_grad()
def weights_sha256(base_model: Any) -> str | None:
    """Fingerprint of a base model: rows of its input embedding spread over the vocabulary, and its last norm, as bf16.

    The same whether the weights were loaded in float32 or bfloat16. None where it would not be: other types, quantised
    weights, and weights that are not here (meta device, sharded).
    """
    if getattr(base_model, "is_quantized", False) or getattr(base_model, "hf_quantizer", None) is not None:
        return None
    embedding = base_model.get_input_embeddings().weight
    # by name: the LoRA layers of an adapter lie between those of the base model
    vectors = [p for name, p in base_model.named_parameters() if p.dim() == 1 and "lora_" not in name]
    digest = hashlib.sha256()
    for tensor in (embedding, *vectors[-1:]):
        if tensor.is_meta or hasattr(tensor, "device_mesh") or not tensor.numel() or tensor.dtype not in EXACT:
            return None
        rows = torch.linspace(0, len(tensor) - 1, FINGERPRINT_ROWS, dtype=torch.float64).long().to(tensor.device)
        part = tensor[rows] if tensor.dim() == 2 else tensor
        digest.update(part.to(torch.bfloat16).cpu().contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def _write_ilora(tuner: ILoraModel, name: str, encoder_weights: dict[str, torch.Tensor], folder: Path) -> None:
    config = tuner.peft_config[name]
    encoder = dict(tuner.sequence_encoder.items()).get(name)
    scaling = next(m.scaling[name] for m in tuner.model.modules() if isinstance(m, LoraLayer) and name in m.scaling)
    document = {
        "format_version": FORMAT_VERSION,
        "num_experts": config.num_experts,
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "scaling": scaling,
        "representation_size": config.representation_size,
        "gate_hidden_size": config.gate_hidden_size,
        "gate_temperature": config.gate_temperature,
        "vocabulary_sha256": encoder.vocabulary_sha256 if encoder is not None else None,
        "history_max_items": encoder.max_items if encoder is not None else None,
    }
    write_json(folder / ILORA_CONFIG, document)
    if encoder is not None:
        (folder / ENCODER).mkdir(exist_ok=True)
        write_encoder(encoder_weights, describe(encoder, encoder.vocabulary_sha256), folder / ENCODER)


# ---- loaded ----


def load_adapter(base_model: Any, folder: Path, adapter_name: str = "default", is_trainable: bool = False) -> PeftModel:
    """The adapter of a folder on its base model; a PeftModel as `base_model` gets it as a further adapter.

    A folder without ilora.json is a plain LoRA (also one that stock PEFT has written).

    Raises:
        UserError: a file is missing or damaged, or the adapter belongs to another base model.
    """
    folder = Path(folder)
    config = _read_config(folder)
    config.inference_mode = not is_trainable
    check_base_model(base_model, folder)
    encoder = load_encoder(folder / ENCODER)[0] if (folder / ENCODER).is_dir() else None
    model = _wrap(base_model, config, adapter_name)
    if encoder is not None:
        _tuner(model).set_encoder(encoder, adapter_name)
    load_weights(model, folder, adapter_name)
    return model if isinstance(base_model, PeftModel) else model.train(is_trainable)


def load_weights(model: PeftModel, folder: Path, adapter_name: str = "default") -> None:
    """Copy the weights of a saved adapter into an adapter of the same shape, in place.

    Raises:
        UserError: a file is missing or damaged, or has other tensors or shapes than the model's adapter.
    """
    folder = Path(folder)
    found = read_tensors(folder / LORA_WEIGHTS, "LoRA weights")
    if accepts_history(model):
        gate = read_tensors(folder / GATE_WEIGHTS, "the weights of the gate")
        found |= {_GATE_PREFIX + name: value for name, value in gate.items()}
        if adapter_name in _tuner(model).sequence_encoder:
            weights = load_encoder(folder / ENCODER)[0].state_dict()
            found |= {_ENCODER_PREFIX + name: value for name, value in weights.items()}
    wanted = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    _check_fit(found, wanted, folder)
    set_peft_model_state_dict(model, found, adapter_name=adapter_name)


def check_vocabulary(folder: Path, vocabulary_sha256: str) -> None:
    """Refuse an instance-wise adapter whose item indices mean other items; a plain LoRA has none and fits any.

    Raises:
        UserError: the adapter's sequence encoder was fitted on another vocabulary.
    """
    if not (Path(folder) / ILORA_CONFIG).is_file():
        return
    own = read_json(Path(folder) / ILORA_CONFIG, "the shape of an instance-wise adapter").get("vocabulary_sha256")
    if own != vocabulary_sha256:
        raise UserError(
            f"{folder} was trained on item vocabulary {str(own)[:12]}…, this dataset has {vocabulary_sha256[:12]}…: "
            "take the dataset that it was trained on, or train on this one"
        )


def _read_config(folder: Path) -> LoraConfig:
    """ILoraConfig where the folder has the files of an instance-wise adapter, otherwise LoraConfig."""
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist: a folder written by `recllm train` is expected")
    document = read_json(folder / LORA_CONFIG, "the config of a LoRA adapter")
    if document.get("peft_type") != "LORA":
        raise UserError(f'{folder / LORA_CONFIG}: peft_type is "{document.get("peft_type")}", LORA is expected')
    skipped = ("peft_type", "auto_mapping")
    known = {k: v for k, v in document.items() if k in LoraConfig.__dataclass_fields__ and k not in skipped}
    # A folder that has lost one of its files must not pass for a plain LoRA
    if not any((folder / name).exists() for name in (ILORA_CONFIG, GATE_WEIGHTS, ENCODER)):
        return LoraConfig(**known)
    ilora = read_json(folder / ILORA_CONFIG, "the shape of an instance-wise adapter")
    _check_ilora(ilora, known, folder)
    return ILoraConfig(**known, **{name: ilora[name] for name in _GATE_SHAPE})


_GATE_SHAPE: dict[str, type | tuple[type, ...]] = {
    "num_experts": int,
    "representation_size": int,
    "gate_hidden_size": int,
    "gate_temperature": (int, float),
}


def _check_ilora(ilora: dict[str, Any], lora: dict[str, Any], folder: Path) -> None:
    place = folder / ILORA_CONFIG
    if ilora.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{place}: format_version is {ilora.get('format_version')}, this recllm reads {FORMAT_VERSION}: "
            "use the version of recllm that wrote it"
        )
    for name, kind in _GATE_SHAPE.items():
        if not isinstance(ilora.get(name), kind):
            raise UserError(f"{place}: {name} is {ilora.get(name)!r}, a number is expected: train the adapter again")
    for name in ("r", "lora_alpha"):
        if ilora.get(name) != lora.get(name):
            raise UserError(f"{place}: {name} is {ilora.get(name)}, but {lora.get(name)} in {LORA_CONFIG}: train again")
    scaling = lora["lora_alpha"] / (lora["r"] ** 0.5 if lora.get("use_rslora") else lora["r"])
    if ilora.get("scaling") != scaling:
        raise UserError(f"{place}: scaling is {ilora.get('scaling')}, r and lora_alpha give {scaling}: train again")
    if ilora.get("history_max_items") is not None and not (folder / ENCODER).is_dir():
        raise UserError(
            f"{folder / ENCODER} does not exist: the gate was trained on its sequence encoder, copy it back"
        )


def check_base_model(base_model: Any, folder: Path) -> None:
    """Sizes and a sample of the weights decide, not the name: a folder may have been moved.

    Raises:
        UserError: the adapter in `folder` was trained on another base model.
    """
    if not (folder / BASE_MODEL).is_file():
        return  # written by stock PEFT: the shapes of its tensors are checked on loading
    wanted = read_json(folder / BASE_MODEL, "the base model of an adapter")
    base: Any = base_model.get_base_model() if isinstance(base_model, PeftModel) else base_model
    config = base.config.get_text_config()
    differing = {
        name: (value, getattr(config, name, None))
        for name, value in wanted.items()
        if name not in ("name_or_path", WEIGHTS_SHA256) and value != getattr(config, name, None)
    }
    if differing:
        text = ", ".join(f"{name} {own} (given: {given})" for name, (own, given) in differing.items())
        raise UserError(
            f"{folder} is an adapter for {wanted.get('name_or_path')} with {text}: load that base model "
            "(model.name_or_path)"
        )
    own, given = wanted.get(WEIGHTS_SHA256), weights_sha256(base)
    if own and given and own != given:
        raise UserError(
            f"{folder} is an adapter for {wanted.get('name_or_path')} (weights {own[:12]}…), the base model given is "
            f"{base.name_or_path} (weights {given[:12]}…): of the same sizes, but with other weights. Load the base "
            "model that it was trained on (model.name_or_path)"
        )


def _check_fit(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], folder: Path) -> None:
    missing, unknown = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    if missing or unknown:
        first = (missing or unknown)[0]
        raise UserError(
            f"{folder}: {len(missing)} tensors of the model's adapter are missing and {len(unknown)} are not its own "
            f"(first: {first}): the adapter is for another base model or has other target_modules"
        )
    for name, value in found.items():
        if value.shape != wanted[name].shape:
            raise UserError(
                f"{folder}: {name} has shape {tuple(value.shape)}, the model needs {tuple(wanted[name].shape)}: "
                "the adapter is for another base model or has another r"
            )


# ---- folded ----


@torch.no_grad()
def export_user_adapter(model: PeftModel, weights: torch.Tensor, folder: Path, adapter_name: str = "default") -> None:
    """One user as an ordinary LoRA: their gate weights (K,) folded into B. Stock PEFT and vLLM load and merge it.

    B · (K · repeat(g) ⊙ A x) = (B · diag(K · repeat(g))) · A x

    Raises:
        UserError: `weights` is not one row of K numbers.
    """
    config = _tuner(model).peft_config[adapter_name]
    if tuple(weights.shape) != (config.num_experts,):
        raise UserError(f"gate weights have shape {tuple(weights.shape)}, one user's are ({config.num_experts},)")
    factor = (weights.float() * config.num_experts).repeat_interleave(config.r // config.num_experts)  # (R,)
    lora, _, _ = _split(get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False))
    _check_tensors(lora)
    folded = {name: value * factor.to(value) if ".lora_B." in name else value for name, value in lora.items()}
    with replacing_folder(Path(folder)) as staging:
        _save(folded, staging / LORA_WEIGHTS)
        _write_plain_config(config, staging)
        write_json(staging / BASE_MODEL, _describe_base(model))
