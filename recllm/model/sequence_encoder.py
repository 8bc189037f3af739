"""Sequence encoders: what a user did → one vector, and a score for every item. The front door of model/encoders/.

Item indices or event codes (B, L) enter: oldest first, padded on the LEFT with -1. A representation (B, D) of each
history leaves: it guides the gate, and its scores are a baseline of every report. Encoders are made from a recipe's
section, written as a folder (encoder.safetensors and encoder.json) and loaded from one.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from recllm.errors import UserError
from recllm.files import read_json, replacing_folder, write_json
from recllm.model.encoders.content import ContentEncoder
from recllm.model.encoders.gru4rec import Gru4Rec
from recllm.model.encoders.interface import PADDING, SequenceEncoder
from recllm.model.encoders.sasrec import SASRec, attention_mask
from recllm.model.histories import RepresentationCache, encode_histories
from recllm.recipe import EncoderSection

__all__ = [
    "PADDING",
    "ContentEncoder",
    "Gru4Rec",
    "RepresentationCache",
    "SASRec",
    "SequenceEncoder",
    "attention_mask",
    "describe",
    "encode_histories",
    "load_encoder",
    "make_encoder",
    "read_tensors",
    "save_encoder",
    "write_encoder",
]

WEIGHTS, SIZES = "encoder.safetensors", "encoder.json"
ENCODERS: dict[str, type[SequenceEncoder]] = {"sasrec": SASRec, "gru4rec": Gru4Rec, "content": ContentEncoder}


def make_encoder(
    section: EncoderSection,
    num_items: int,
    max_items: int,
    item_features: torch.Tensor | None = None,
    num_actions: int = 0,
) -> SequenceEncoder:
    """A fresh encoder of the section's type; `item_features` (num_items, F) are for the content encoder alone.

    With `num_actions` > 0 it reads event codes, otherwise item indices.

    Raises:
        UserError: a content encoder without features or with others; a window for a type that has none.
    """
    sizes: dict[str, Any] = {"num_items": num_items, "max_items": max_items, "num_actions": num_actions}
    sizes |= {name: getattr(section, name) for name in ("hidden_size", "num_layers", "dropout")}
    if section.type == "gru4rec":
        if section.window:
            raise UserError(f"encoder.window={section.window}: a gru4rec has none, it is linear already: set it to 0")
        return Gru4Rec(**sizes)
    sizes |= {"num_heads": section.num_heads, "window": section.window}
    if section.type == "sasrec":
        return SASRec(**sizes)
    if item_features is None:
        raise UserError("encoder.type=content needs features of the items' texts: compute them with item_features()")
    encoder = ContentEncoder(feature_size=item_features.shape[-1], **sizes)
    if num_items:
        encoder.item_embedding.set_features(item_features)
    return encoder


def save_encoder(encoder: SequenceEncoder, folder: Path, vocabulary_sha256: str, extra: dict[str, Any]) -> None:
    """Write the encoder as a folder: encoder.safetensors, and encoder.json with its sizes, vocabulary and `extra`."""
    with replacing_folder(Path(folder)) as staging:
        write_encoder(encoder.state_dict(), describe(encoder, vocabulary_sha256) | extra, staging)


def write_encoder(weights: dict[str, torch.Tensor], info: dict[str, Any], folder: Path) -> None:
    """The two files of an encoder, into an existing folder that the caller moves into place."""
    # clone: safetensors refuses tensors that share memory
    save_file({name: value.detach().cpu().clone() for name, value in weights.items()}, folder / WEIGHTS)
    (folder / WEIGHTS).chmod(0o644)  # safetensors makes 0600
    write_json(folder / SIZES, info)


def describe(encoder: SequenceEncoder, vocabulary_sha256: str | None) -> dict[str, Any]:
    """What encoder.json says of an encoder: enough to build it again."""
    return {"type": encoder.type, "vocabulary_sha256": vocabulary_sha256} | encoder.sizes()


def load_encoder(folder: Path) -> tuple[SequenceEncoder, dict[str, Any]]:
    """The encoder of a folder, in eval mode on the CPU, and what its encoder.json says (sizes, metrics, …).

    Raises:
        UserError: a file is missing, truncated or does not fit the other; weights that are not finite.
    """
    folder = Path(folder)
    info = read_json(folder / SIZES, "the sizes of a sequence encoder")
    encoder = _build(info, folder / SIZES)
    encoder.vocabulary_sha256 = info.get("vocabulary_sha256")
    weights = read_tensors(folder / WEIGHTS, "the weights of a sequence encoder")
    if broken := [name for name, value in weights.items() if not torch.isfinite(value).all()]:
        raise UserError(f"{folder / WEIGHTS}: {broken[0]} holds numbers that are not finite: fit the encoder again")
    try:
        encoder.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"{folder / WEIGHTS} does not fit {SIZES} beside it ({error}): fit the encoder again") from None
    return encoder.eval(), info


def _build(info: dict[str, Any], place: Path) -> SequenceEncoder:
    """An encoder of the sizes that encoder.json names."""
    kind = info.get("type")
    if kind not in ENCODERS:
        raise UserError(
            f'{place}: type is "{kind}", this recllm has {", ".join(ENCODERS)}: use the version of recllm that wrote it'
        )
    info = {"window": 0, "num_actions": 0} | info  # encoders of earlier formats have none
    try:
        return ENCODERS[kind](**{name: info[name] for name in ENCODERS[kind].SIZES})
    except KeyError as missing:
        raise UserError(f"{place}: no {missing}, a sequence encoder needs it: fit the encoder again") from None


def read_tensors(path: Path, what: str) -> dict[str, torch.Tensor]:
    """Tensors of a safetensors file, on the CPU.

    Raises:
        UserError: the file is missing or truncated.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist: it should hold {what}. Run the stage that writes it again")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{path} is damaged ({error}); it should hold {what}. Run the stage that writes it again"
        ) from None
