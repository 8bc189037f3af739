"""The base model and its tokenizer, by name.

A `ModelSection` enters: a local folder, a hub name or offline://smollm2-135m-instruct. A model in eval mode and a
tokenizer that pads on the left leave.

Padding: where a tokenizer has no pad token, eos stands in for it, and SmolLM2's own pad IS its eos. So a mask must
come from lengths, never from comparing ids with pad_token_id: a real eos would be masked.
"""

import contextlib
import fcntl
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from recllm.data import offline
from recllm.errors import UserError
from recllm.files import replacing_folder
from recllm.recipe import ModelSection


def load_base_model(section: ModelSection) -> tuple[Any, PreTrainedTokenizerBase]:
    """The model (eval mode, in the section's dtype and attention) and its tokenizer.

    Raises:
        UserError: no such folder or hub name, a damaged folder, code that would have to be trusted, a wrong dtype.
    """
    place = model_folder(section.name_or_path)
    with _explaining(section.name_or_path):
        model = AutoModelForCausalLM.from_pretrained(
            place,
            dtype=getattr(torch, section.dtype),
            attn_implementation=section.attn_implementation,
            local_files_only=Path(place).is_dir(),
            trust_remote_code=False,
        )
    model.config.name_or_path = model.name_or_path = section.name_or_path  # what an adapter's config will name
    return model.eval(), load_tokenizer(section.name_or_path)


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """The tokenizer: left padding (generation continues a row's last token), a pad token in any case.

    Raises:
        UserError: as `load_base_model`; or neither a pad nor an eos token.
    """
    place = model_folder(name_or_path)
    with _explaining(name_or_path):
        tokenizer = AutoTokenizer.from_pretrained(
            place, local_files_only=Path(place).is_dir(), trust_remote_code=False, padding_side="left"
        )
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"the tokenizer of {name_or_path} has neither a pad nor an eos token: set one in its folder"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def model_folder(name_or_path: str) -> str:
    """What transformers can load: a folder in its own format, or the hub name as it was given.

    Raises:
        UserError: a path that does not exist, or a folder without config.json.
    """
    if name_or_path.startswith(offline.PREFIX):
        return str(_converted(offline.resolve(name_or_path)))
    folder = Path(name_or_path)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder} has no config.json: a folder written by save_pretrained() is expected")
    elif name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1:
        raise UserError(f'model.name_or_path: there is no folder "{name_or_path}": check the path')
    return name_or_path


def _converted(source: Path) -> Path:
    """The fetched GGUF file as a bf16 folder of transformers, made once and kept beside it in the cache."""
    (gguf,) = source.glob("*.gguf")
    folder = source.with_name(f"{source.name}-bf16")
    with _only_one_process(folder.with_name(f"{folder.name}.lock")):
        if not folder.is_dir():
            print(f"converting {gguf.name} to bf16 safetensors, once: 269 MB → {folder}", file=sys.stderr, flush=True)
            with replacing_folder(folder) as staging:
                _convert(gguf, staging)
    return folder


def _convert(gguf: Path, target: Path) -> None:
    # since 5.18 a GGUF model stays quantised unless it is told otherwise; before, it never did
    config_class = getattr(transformers, "GgufConfig", None)
    options = {"quantization_config": config_class(dequantize=True)} if config_class else {}
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, **options)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = AutoModelForCausalLM.from_config(
        config, dtype=torch.bfloat16
    )  # save_pretrained refuses what came from GGUF
    plain.load_state_dict(loaded.state_dict())
    plain.save_pretrained(target)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(target)


@contextlib.contextmanager
def _only_one_process(lock: Path) -> Iterator[None]:
    """Several ranks start at once: one converts, the others wait and find the result."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _explaining(name_or_path: str) -> Iterator[None]:
    """transformers' errors as the user's to mend."""
    try:
        yield
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise UserError(
            f"model.name_or_path: {name_or_path} could not be loaded ({error}). A folder written by save_pretrained(), "
            "a hub name or offline://smollm2-135m-instruct is expected; code from a hub is never run"
        ) from error
