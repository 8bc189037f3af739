"""Adapters: built for training, written to adapter/, loaded again. model/export.py folds them for single users.

A base model and the recipe's adapter section (or a folder) enter; a PEFT model leaves. The folder:

    adapter_model.safetensors   LoRA weights and
    adapter_config.json         their config as peft_type LORA: stock PEFT and vLLM load these two, gates uniform
    base_model.json             the base model that they fit
    gate.safetensors            the gate, its mean and deviation            } of an instance-wise
    ilora.json                  experts, scaling, gate shape, vocabulary    } adapter only
    soft_token.safetensors      the projection, its mean and deviation      } of a LoRA beside a soft token only: stock
    soft_token.json             its shape, vocabulary                       } PEFT loads the LoRA without the token
    sequence_encoder/           what the gate or the soft token reads
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
from recllm.model.base_model import keep_head_folded
from recllm.model.ilora import ILORA, ILoraConfig, ILoraModel
from recllm.model.sequence_encoder import SequenceEncoder, describe, load_encoder, read_tensors, write_encoder
from recllm.model.soft_token import SOFT_TOKEN, SoftTokenConfig, SoftTokenModel
from recllm.recipe import AdapterSection

FORMAT_VERSION = 1
LORA_WEIGHTS, LORA_CONFIG, BASE_MODEL = "adapter_model.safetensors", "adapter_config.json", "base_model.json"
GATE_WEIGHTS, ILORA_CONFIG, ENCODER = "gate.safetensors", "ilora.json", "sequence_encoder"
TOKEN_WEIGHTS, TOKEN_CONFIG = "soft_token.safetensors", "soft_token.json"
ITEMS, MANIFEST, CARD = "items.parquet", "manifest.json", "README.md"
WEIGHTS_SHA256, SAMPLED = "sampled_weights_sha256", 64
BASE_SIZES = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")
EXACT = (torch.float32, torch.bfloat16)  # float16 rounds small bf16 numbers: no fingerprint then
_GATE_PREFIX, _ENCODER_PREFIX = "base_model.gate.", "base_model.sequence_encoder."
_TOKEN_PREFIX = "base_model.soft_token."


# ---- built ----


def build_adapter(
    base_model: Any, section: AdapterSection, encoder: SequenceEncoder | None = None, adapter_name: str = "default"
) -> PeftModel:
    """A fresh, trainable adapter around the base model: plain LoRA, or one of the two that the encoder guides.

    Raises:
        UserError: method ilora or soft_token without an encoder, or modules that the base model does not have.
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
        raise UserError(
            f"adapter.method={section.method} needs a sequence encoder to read histories: fit one, or take method lora"
        )
    config: LoraConfig
    if section.method == "soft_token":
        config = SoftTokenConfig(**lora, representation_size=encoder.hidden_size)
    else:
        config = _ilora_config(section, lora, encoder)
    model = _wrap(base_model, config, adapter_name)
    _reader(model).set_encoder(encoder, adapter_name)
    return model


def _ilora_config(section: AdapterSection, lora: dict[str, Any], encoder: SequenceEncoder) -> ILoraConfig:
    return ILoraConfig(
        **lora,
        num_experts=section.num_experts,
        representation_size=encoder.hidden_size,
        gate_hidden_size=section.gate.hidden_size,
        gate_temperature=section.gate.temperature,
        gate_type=section.gate.type,
        gate_top_k=section.gate.top_k,
        gate_per_layer=section.gate.per_layer,
    )


def _wrap(base_model: Any, config: LoraConfig, adapter_name: str, low_cpu_mem_usage: bool = False) -> PeftModel:
    try:
        if not isinstance(base_model, PeftModel):
            keep_head_folded(base_model)
            return get_peft_model(base_model, config, adapter_name=adapter_name, low_cpu_mem_usage=low_cpu_mem_usage)
        base_model.add_adapter(adapter_name, config, low_cpu_mem_usage=low_cpu_mem_usage)
        return base_model
    except ValueError as error:  # PEFT's NoMatchingPeftModuleError among them
        raise UserError(f"adapter: {error}") from None


# ---- asked ----


def accepts_history(model: Any) -> bool:
    """Whether forward() and generate() take history_items: not those of a plain LoRA or a base model."""
    return isinstance(getattr(model, "base_model", None), (ILoraModel, SoftTokenModel))


def has_gate(model: Any) -> bool:
    """Whether the model holds an instance-wise adapter, so that gate_weights() has an answer."""
    return isinstance(getattr(model, "base_model", None), ILoraModel)


def gate_weights(model: PeftModel, history_items: torch.Tensor) -> torch.Tensor:
    """Weights of histories (B, L) by the active adapter's gate: (B, K), float32, or (B, layers, K) with one a layer."""
    return _tuner(model).gate_weights(history_items)


def fit_gate_statistics(model: PeftModel, representations: torch.Tensor, adapter_name: str = "default") -> None:
    """Mean and deviation of the gate, or of the soft token, from representations (N, D) of the training examples."""
    tuner = _reader(model)
    (tuner.gate if isinstance(tuner, ILoraModel) else tuner.soft_token)[adapter_name].fit_statistics(representations)


def _tuner(model: PeftModel) -> ILoraModel:
    if not has_gate(model):
        raise ValueError(f"{type(model).__name__} holds no instance-wise adapter: it has no gate")
    return model.base_model  # type: ignore[return-value]  # PEFT declares a plain module; checked just above


def _reader(model: PeftModel) -> ILoraModel | SoftTokenModel:
    """The tuner that reads histories."""
    if not accepts_history(model):
        raise ValueError(f"{type(model).__name__} holds no adapter that reads histories")
    return model.base_model  # type: ignore[return-value]  # as above


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
    lora, own, encoder = _split(
        get_peft_model_state_dict(model, state_dict, adapter_name=adapter_name, save_embedding_layers=False)
    )
    _check_tensors({**lora, **own, **encoder})
    write_lora(lora, model, folder, adapter_name)
    if not accepts_history(model):
        return
    tuner = _reader(model)
    if isinstance(tuner, ILoraModel):
        _save(own, folder / GATE_WEIGHTS)
        _write_ilora(tuner, adapter_name, folder)
    else:
        _save(own, folder / TOKEN_WEIGHTS)
        _write_soft_token(tuner, adapter_name, folder)
    if adapter_name in tuner.sequence_encoder:
        own_encoder = tuner.sequence_encoder[adapter_name]
        (folder / ENCODER).mkdir(exist_ok=True)
        write_encoder(encoder, describe(own_encoder, own_encoder.vocabulary_sha256), folder / ENCODER)


def lora_weights(model: PeftModel, adapter_name: str = "default") -> dict[str, torch.Tensor]:
    """The LoRA of an adapter, as it is named in adapter_model.safetensors; without gate, soft token and encoder."""
    return _split(get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False))[0]


def write_lora(weights: dict[str, torch.Tensor], model: PeftModel, folder: Path, adapter_name: str = "default") -> None:
    """`weights` as an ordinary PEFT LoRA, with the config of the model's adapter and the base model that it fits.

    Raises:
        UserError: a tensor is empty or not finite.
    """
    _check_tensors(weights)
    _save(weights, folder / LORA_WEIGHTS)
    _write_plain_config(model.peft_config[adapter_name], folder)
    write_json(folder / BASE_MODEL, _describe_base(model))


def _split(weights: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], ...]:
    """LoRA, gate or soft token, and encoder weights; the latter two without their prefix."""

    def below(prefix: str) -> dict[str, torch.Tensor]:
        return {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}

    prefixes = (_GATE_PREFIX, _TOKEN_PREFIX, _ENCODER_PREFIX)
    lora = {key: value for key, value in weights.items() if not key.startswith(prefixes)}
    return lora, below(_GATE_PREFIX) | below(_TOKEN_PREFIX), below(_ENCODER_PREFIX)


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
    described = {"name_or_path": base.name_or_path, WEIGHTS_SHA256: weights_sha256(base)}
    return described | {name: getattr(config, name, None) for name in BASE_SIZES}


@torch.no_grad()
def weights_sha256(base_model: Any) -> str | None:
    """Fingerprint of a base model: SAMPLED numbers of each of its parameters, spread evenly, as bf16.

    The same whether the weights were loaded in float32 or bfloat16. None where it would not be: other types, quantised
    weights, and weights that are not here (meta device, sharded).
    """
    if getattr(base_model, "is_quantized", False) or getattr(base_model, "hf_quantizer", None) is not None:
        return None
    parts = []
    for name, tensor in base_model.named_parameters():
        if "lora_" in name:  # the LoRA layers of an adapter lie between those of the base model
            continue
        if tensor.is_meta or hasattr(tensor, "device_mesh") or not tensor.numel() or tensor.dtype not in EXACT:
            return None
        places = torch.linspace(0, tensor.numel() - 1, SAMPLED, dtype=torch.float64).long().to(tensor.device)
        parts.append(tensor.flatten()[places].to(torch.bfloat16))
    return hashlib.sha256(torch.cat(parts).cpu().view(torch.int16).numpy().tobytes()).hexdigest() if parts else None


def _write_ilora(tuner: ILoraModel, name: str, folder: Path) -> None:
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
        "gate_type": config.gate_type,
        "gate_top_k": config.gate_top_k,
        "gate_per_layer": config.gate_per_layer,
        "vocabulary_sha256": encoder.vocabulary_sha256 if encoder is not None else None,
        "history_max_items": encoder.max_items if encoder is not None else None,
    }
    write_json(folder / ILORA_CONFIG, document)


def _write_soft_token(tuner: SoftTokenModel, name: str, folder: Path) -> None:
    encoder, token = dict(tuner.sequence_encoder.items()).get(name), tuner.soft_token[name]
    document = {
        "format_version": FORMAT_VERSION,
        "representation_size": token.representation_size,
        "hidden_size": token.hidden_size,
        "vocabulary_sha256": encoder.vocabulary_sha256 if encoder is not None else None,
        "history_max_items": encoder.max_items if encoder is not None else None,
    }
    write_json(folder / TOKEN_CONFIG, document)


# ---- loaded ----


def load_adapter(
    base_model: Any,
    folder: Path,
    adapter_name: str = "default",
    is_trainable: bool = False,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """The adapter of a folder on its base model; a PeftModel as `base_model` gets it as a further adapter.

    A folder without ilora.json and soft_token.json is a plain LoRA (also one that stock PEFT has written). With
    `low_cpu_mem_usage` the layers are not drawn first, as in PEFT: the file's tensors take their place.

    Raises:
        UserError: a file is missing or damaged, or the adapter belongs to another base model.
    """
    folder = Path(folder)
    config = _read_config(folder)
    config.inference_mode = not is_trainable
    check_base_model(base_model, folder)
    encoder = load_encoder(folder / ENCODER)[0] if (folder / ENCODER).is_dir() else None
    model = _wrap(base_model, config, adapter_name, low_cpu_mem_usage)
    if encoder is not None:
        _reader(model).set_encoder(encoder, adapter_name)
    load_weights(model, folder, adapter_name, low_cpu_mem_usage)
    return model if isinstance(base_model, PeftModel) else model.train(is_trainable)


def load_weights(
    model: PeftModel, folder: Path, adapter_name: str = "default", low_cpu_mem_usage: bool = False
) -> None:
    """Copy the weights of a saved adapter into an adapter of the same shape, in place.

    With `low_cpu_mem_usage` they take the place of its tensors, which may be on the meta device.

    Raises:
        UserError: a file is missing or damaged, or has other tensors or shapes than the model's adapter.
    """
    folder = Path(folder)
    found = read_tensors(folder / LORA_WEIGHTS, "LoRA weights")
    if accepts_history(model):
        if has_gate(model):
            prefix, own = _GATE_PREFIX, read_tensors(folder / GATE_WEIGHTS, "the weights of the gate")
        else:
            prefix, own = _TOKEN_PREFIX, read_tensors(folder / TOKEN_WEIGHTS, "the weights of the soft token")
        found |= {prefix + name: value for name, value in own.items()}
        if adapter_name in _reader(model).sequence_encoder:
            weights = load_encoder(folder / ENCODER)[0].state_dict()
            found |= {_ENCODER_PREFIX + name: value for name, value in weights.items()}
    wanted = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    _check_fit(found, wanted, folder)
    set_peft_model_state_dict(model, found, adapter_name=adapter_name, low_cpu_mem_usage=low_cpu_mem_usage)
    if low_cpu_mem_usage and accepts_history(model):
        _to_base_model(_reader(model), adapter_name)


def _to_base_model(tuner: ILoraModel | SoftTokenModel, name: str) -> None:
    """What the file's tensors took the place of lay beside the base model; PEFT moves back its layers only."""
    device = tuner.model.get_input_embeddings().weight.device
    own = tuner.gate if isinstance(tuner, ILoraModel) else tuner.soft_token
    for modules in (own, tuner.sequence_encoder):
        if name in modules and device.type != "meta":
            modules[name].to(device)


def check_vocabulary(folder: Path, vocabulary_sha256: str) -> None:
    """Refuse an adapter that reads histories whose numbers mean other items or actions; a plain LoRA fits any.

    Raises:
        UserError: the adapter's sequence encoder was fitted on another vocabulary (Dataset.vocabulary_sha256).
    """
    shapes = [Path(folder) / name for name in (ILORA_CONFIG, TOKEN_CONFIG) if (Path(folder) / name).is_file()]
    if not shapes:
        return
    own = read_json(shapes[0], "the shape of an adapter that reads histories").get("vocabulary_sha256")
    if own != vocabulary_sha256:
        raise UserError(
            f"{folder} was trained on the vocabulary {str(own)[:12]}…, this dataset has {vocabulary_sha256[:12]}…: "
            "take the dataset that it was trained on, or train on this one"
        )


def _read_config(folder: Path) -> LoraConfig:
    """The config of the kind of adapter whose files the folder has: ILoraConfig, SoftTokenConfig or LoraConfig."""
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist: a folder written by `recllm train` is expected")
    document = read_json(folder / LORA_CONFIG, "the config of a LoRA adapter")
    if document.get("peft_type") != "LORA":
        raise _no_lora(folder / LORA_CONFIG, document.get("peft_type"))
    skipped = ("peft_type", "auto_mapping")
    known = {k: v for k, v in document.items() if k in LoraConfig.__dataclass_fields__ and k not in skipped}
    # A folder that has lost one of its files must not pass for a plain LoRA
    if any((folder / name).exists() for name in (TOKEN_CONFIG, TOKEN_WEIGHTS)):
        return SoftTokenConfig(**known, representation_size=_representation_size(folder))
    if not any((folder / name).exists() for name in (ILORA_CONFIG, GATE_WEIGHTS, ENCODER)):
        return LoraConfig(**known)
    ilora = _read_ilora(folder, known)
    return ILoraConfig(**known, **{name: ilora[name] for name in _GATE_SHAPE | _GATE_KIND if name in ilora})


def _no_lora(place: Path, peft_type: Any) -> UserError:
    if peft_type not in (ILORA, SOFT_TOKEN):
        return UserError(
            f'{place}: peft_type is "{peft_type}", an adapter of another kind than LORA: load this one with PEFT'
        )
    return UserError(
        f'{place}: peft_type is "{peft_type}", so save_pretrained wrote this folder, which leaves out the kind, '
        "the sizes and the vocabulary of the sequence encoder, without which no history can be read. Write it with "
        "recllm.model.adapter.save_adapter(model, folder) where the model still is; else import recllm.model.adapter, "
        "load the folder with PeftModel.from_pretrained, hand the model the sequence encoder that it was trained on, "
        "model.base_model.set_encoder(encoder, adapter_name), and write it with save_adapter"
    )


def read_ilora(folder: Path) -> dict[str, Any]:
    """ilora.json of an instance-wise adapter's folder: experts, scaling, gate shape, vocabulary.

    Raises:
        UserError: a file is missing or damaged, or it and the LoRA's config disagree.
    """
    return _read_ilora(Path(folder), read_json(Path(folder) / LORA_CONFIG, "the config of a LoRA adapter"))


def _read_ilora(folder: Path, lora: dict[str, Any]) -> dict[str, Any]:
    ilora = read_json(folder / ILORA_CONFIG, "the shape of an instance-wise adapter")
    _check_ilora(ilora, lora, folder)
    return ilora


def _representation_size(folder: Path) -> int:
    """Of a soft token, from its checked soft_token.json."""
    place = folder / TOKEN_CONFIG
    document = read_json(place, "the shape of a soft token")
    _check_format(place, document)
    if not isinstance(document.get("representation_size"), int):
        raise UserError(
            f"{place}: representation_size is {document.get('representation_size')!r}, a number is expected"
        )
    _check_encoder_is_there(document, folder)
    return int(document["representation_size"])


def _check_format(place: Path, document: dict[str, Any]) -> None:
    if document.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{place}: format_version is {document.get('format_version')}, this recllm reads {FORMAT_VERSION}: "
            "use the version of recllm that wrote it"
        )


def _check_encoder_is_there(document: dict[str, Any], folder: Path) -> None:
    if document.get("history_max_items") is not None and not (folder / ENCODER).is_dir():
        raise UserError(
            f"{folder / ENCODER} does not exist: the adapter was trained on its sequence encoder, copy it back"
        )


_GATE_SHAPE: dict[str, type | tuple[type, ...]] = {
    "num_experts": int,
    "representation_size": int,
    "gate_hidden_size": int,
    "gate_temperature": (int, float),
}
# Absent in folders that were written before there were others than a shared softmax over all experts
_GATE_KIND: dict[str, type | tuple[type, ...]] = {
    "gate_type": str,
    "gate_top_k": (int, type(None)),
    "gate_per_layer": bool,
}


def _check_ilora(ilora: dict[str, Any], lora: dict[str, Any], folder: Path) -> None:
    place = folder / ILORA_CONFIG
    _check_format(place, ilora)
    for name, kind in _GATE_SHAPE.items():
        if not isinstance(ilora.get(name), kind):
            raise UserError(f"{place}: {name} is {ilora.get(name)!r}, a number is expected: train the adapter again")
    for name, kind in _GATE_KIND.items():
        if name in ilora and not isinstance(ilora[name], kind):
            raise UserError(f"{place}: {name} is {ilora[name]!r}: copy the file as it was written, or train again")
    if ilora.get("gate_type") == "sigmoid" and ilora["num_experts"] != ilora.get("r"):
        raise UserError(
            f"{place}: num_experts is {ilora['num_experts']}, a sigmoid gate has one for each rank, {ilora.get('r')}: "
            "train again"
        )
    for name in ("r", "lora_alpha"):
        if ilora.get(name) != lora.get(name):
            raise UserError(f"{place}: {name} is {ilora.get(name)}, but {lora.get(name)} in {LORA_CONFIG}: train again")
    scaling = lora["lora_alpha"] / (lora["r"] ** 0.5 if lora.get("use_rslora") else lora["r"])
    if ilora.get("scaling") != scaling:
        raise UserError(f"{place}: scaling is {ilora.get('scaling')}, r and lora_alpha give {scaling}: train again")
    _check_encoder_is_there(ilora, folder)


def check_base_model(base_model: Any, folder: Path) -> None:
    """Sizes and a sample of the weights decide, not the name: a folder may have been moved.

    Raises:
        UserError: the adapter in `folder` was trained on another base model.
    """
    if not (folder / BASE_MODEL).is_file():
        return  # written by stock PEFT: the shapes of its tensors are checked on loading
    base: Any = base_model.get_base_model() if isinstance(base_model, PeftModel) else base_model
    wanted = check_base_config(base.config.get_text_config(), folder)
    own, given = wanted.get(WEIGHTS_SHA256), weights_sha256(base)
    if own and given and own != given:
        raise UserError(
            f"{folder} is an adapter for {wanted.get('name_or_path')} (weights {own[:12]}…), the base model given is "
            f"{base.name_or_path} (weights {given[:12]}…): of the same sizes, but with other weights. Load the base "
            "model that it was trained on (model.name_or_path)"
        )


def check_base_config(config: Any, folder: Path) -> dict[str, Any]:
    """The sizes alone, by a text config, where the weights are another process's; returns base_model.json.

    Raises:
        UserError: the adapter in `folder` was trained on a base model of other sizes.
    """
    if not (folder / BASE_MODEL).is_file():
        return {}
    wanted: dict[str, Any] = read_json(folder / BASE_MODEL, "the base model of an adapter")
    differing = {
        name: (value, getattr(config, name, None))
        for name, value in wanted.items()
        if name in BASE_SIZES and value != getattr(config, name, None)
    }
    if differing:
        text = ", ".join(f"{name} {own} (given: {given})" for name, (own, given) in differing.items())
        raise UserError(
            f"{folder} is an adapter for {wanted.get('name_or_path')} with {text}: load that base model "
            "(model.name_or_path)"
        )
    return wanted


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
                "the adapter is for another base model, or has another r or gate"
            )
