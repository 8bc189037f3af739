"""Features of items: what the base model makes of each item's text, for the content encoder.

Texts and a base model enter; (num_items, F) float32 leaves, F the base model's width: the mean over a text's tokens of
the base model's last hidden states. They are kept in a folder of the run and computed again only when the texts or the
base model's weights have changed.
"""

import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from recllm.errors import UserError
from recllm.files import read_json, replacing_folder, write_json
from recllm.model.adapter import weights_sha256
from recllm.model.base_model import load_base_model
from recllm.model.chat import line_ids
from recllm.recipe import ModelSection

MAX_TOKENS = 256  # of one text; what stands behind is cut off
FEATURES, KEY = "features.safetensors", "features.json"
METHOD = "mean of last hidden states after one begin token, 1"  # part of the key: another method, other features


def load_or_compute(section: ModelSection, texts: Sequence[str], folder: Path, batch_size: int = 64) -> torch.Tensor:
    """The features of a recipe's base model, from `folder` where they are there already, otherwise computed and kept.

    The folder's key hangs on the base model's weights, its dtype and the texts. A base model whose weights have no
    fingerprint (float16, quantised) has its features computed each time.
    """
    model, tokenizer = load_base_model(section)
    key = features_key(model, texts)
    found = _read(Path(folder), key) if key is not None else None
    if found is not None:
        return found
    on_gpu = torch.cuda.is_available() and not getattr(model, "is_quantized", False)  # a quantised one is there already
    features = item_features(model.to("cuda") if on_gpu else model, tokenizer, texts, batch_size)
    if key is not None:
        _write(Path(folder), key, features)
    return features


@torch.no_grad()
def item_features(
    model: Any, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], batch_size: int = 64
) -> torch.Tensor:
    """(N, F) float32 on the CPU: for each text the mean of the last hidden states of its tokens.

    A begin token stands before each text and does not count: language models park large values on the first token,
    which would drown a short title. Equal texts are computed once and have equal features. A text without tokens gets
    the mean of all others.

    Raises:
        UserError: a hidden state that is not finite.
    """
    unique = list(dict.fromkeys(texts))
    ids = [line_ids(tokenizer, text)[:MAX_TOKENS] for text in unique]
    order = sorted((row for row in range(len(ids)) if ids[row]), key=lambda row: len(ids[row]))
    features = torch.zeros(len(unique), model.config.get_text_config().hidden_size)
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    was_training = model.training
    model.eval()
    for start in tqdm(range(0, len(order), batch_size), desc="item features", unit="batch"):
        rows = order[start : start + batch_size]
        features[rows] = _means(model, [[begin, *ids[row]] for row in rows])
    model.train(was_training)
    if not torch.isfinite(features).all():
        bad = int((~torch.isfinite(features).all(dim=1)).nonzero()[0])
        raise UserError(
            f'the base model gives item text "{unique[bad]}" features that are not finite: try another dtype'
        )
    if empty := [row for row in range(len(ids)) if not ids[row]]:
        features[empty] = features[order].mean(dim=0) if order else 0.0
    place = {text: row for row, text in enumerate(unique)}
    return features[[place[text] for text in texts]]


def _means(model: Any, ids: list[list[int]]) -> torch.Tensor:
    """(B, F) of token ids whose first does not count. Padded on the right: no token looks there."""
    longest = max(map(len, ids))
    tokens = torch.tensor([[*row, *[0] * (longest - len(row))] for row in ids], device=model.device)
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids], device=model.device)
    decoder = getattr(model, model.base_model_prefix, model)  # without the head over the vocabulary
    states = decoder(input_ids=tokens, attention_mask=mask, use_cache=False).last_hidden_state.float()  # (B, T, F)
    counted = mask[:, 1:].unsqueeze(-1)
    return ((states[:, 1:] * counted).sum(dim=1) / counted.sum(dim=1)).cpu()


def features_key(model: Any, texts: Sequence[str]) -> str | None:
    """Hash of all that decides the features; None where the model's weights have no fingerprint."""
    weights = weights_sha256(model)
    if weights is None:
        return None
    digest = hashlib.sha256(f"{METHOD}\0{MAX_TOKENS}\0{weights}\0{model.dtype}".encode())
    for text in texts:
        digest.update(hashlib.sha256(text.encode()).digest())
    return digest.hexdigest()


def _read(folder: Path, key: str) -> torch.Tensor | None:
    """The features kept under this key; None where there are others, none, or a damaged file."""
    if not (folder / KEY).is_file():
        return None
    try:
        if read_json(folder / KEY, "the key of item features").get("key") != key:
            return None
        return load_file(folder / FEATURES)["features"]
    except (UserError, SafetensorError, OSError, KeyError) as error:
        print(f"recllm: {folder} cannot be read ({error}): computing the item features again", file=sys.stderr)
        return None


def _write(folder: Path, key: str, features: torch.Tensor) -> None:
    with replacing_folder(folder) as staging:
        # float32: before they are standardised, half precision would eat the difference between items
        save_file({"features": features.contiguous()}, staging / FEATURES)
        (staging / FEATURES).chmod(0o644)  # safetensors makes 0600
        write_json(staging / KEY, {"key": key, "num_items": len(features), "feature_size": features.shape[-1]})
