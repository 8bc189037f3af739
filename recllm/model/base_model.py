"""The base model and its tokenizer, by name.

A `ModelSection` enters: a local folder, a hub name or offline://smollm2-135m-instruct. A model in eval mode and a
tokenizer that pads on the left leave.

Padding: where a tokenizer has no pad token, eos stands in for it, and SmolLM2's own pad IS its eos. So a mask must
come from lengths, never from comparing ids with pad_token_id: a real eos would be masked.
"""

import contextlib
import fcntl
import importlib.util
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import prepare_model_for_kbit_training
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedTokenizerBase

from recllm.data import offline
from recllm.errors import UserError
from recllm.files import replacing_folder
from recllm.recipe import ModelSection

CPU_KERNEL = "support_avx512bf16_for_cpu"  # attribute of bitsandbytes' 4-bit layers: use it for inference


def load_base_model(section: ModelSection) -> tuple[Any, PreTrainedTokenizerBase]:
    """The model (eval mode, in the section's dtype and attention, quantised as it says) and its tokenizer.

    Raises:
        UserError: no such folder or hub name, a damaged folder, code that would have to be trusted, a wrong dtype;
            quantisation without bitsandbytes.
    """
    place, options = model_folder(section.name_or_path), _quantization(section)
    with _explaining(section.name_or_path):
        model = AutoModelForCausalLM.from_pretrained(
            place,
            dtype=getattr(torch, section.dtype),
            attn_implementation=section.attn_implementation,
            local_files_only=Path(place).is_dir(),
            trust_remote_code=False,
            **options,
        )
    _only_kernels_that_fit(model)
    model.config.name_or_path = model.name_or_path = section.name_or_path  # what an adapter's config will name
    return model.eval(), load_tokenizer(section.name_or_path)


def _quantization(section: ModelSection) -> dict[str, Any]:
    """Options of from_pretrained. Linear layers are quantised while they are read; the head and embeddings are not.

    4bit: NF4 with double quantisation (QLoRA: Dettmers et al., NeurIPS 2023). 8bit: LLM.int8 (Dettmers et al., NeurIPS
    2022), which keeps columns with outliers in 16 bits; it looks for them in the whole batch, so that a row's last
    digits may hang on its neighbours.
    """
    if section.quantization is None:
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            f"model.quantization={section.quantization} needs bitsandbytes, which is not installed: run `pip install "
            '"recllm[quant]"`, or leave model.quantization out'
        )
    if section.quantization == "8bit":
        # it says at every layer of every forward that it computes in float16
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, section.dtype),
    )
    return {"quantization_config": config}


def _only_kernels_that_fit(model: Any) -> None:
    """Keep the CPU's 4-bit kernel away from layers that it cannot read, where bitsandbytes does not ask.

    It wants rows of whole blocks, of 64 weights, and a multiple of 32 of them.
    """
    for module in model.modules():
        if hasattr(module, CPU_KERNEL) and (module.in_features % 64 or module.out_features % 32):
            setattr(module, CPU_KERNEL, False)


def prepare_for_training(model: Any) -> Any:
    """A quantised model with all that is not quantised (norms, embeddings, head) in float32; others are left alone.

    As QLoRA trains: PEFT's prepare_model_for_kbit_training. Call it before the adapter is built.
    """
    if not getattr(model, "is_quantized", False):
        return model
    for module in model.modules():
        if hasattr(module, CPU_KERNEL):
            # bitsandbytes repacks a 4-bit weight in the first evaluation on a CPU, for a kernel without a gradient:
            # from then on training would silently learn nothing below it
            setattr(module, CPU_KERNEL, False)
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)  # the trainer switches it on


def keep_head_folded(model: Any) -> None:
    """Have the language-model head read contiguous hidden states; call it before the adapter is built.

    With logits_to_keep it is given a slice, (B, n, D) of (B, T, D). In training torch does not fold that into a product
    with (B · n, D) but copies the head's weights once for each row of the batch, which took a third of a CPU step.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is not None and _contiguous not in head._forward_pre_hooks.values():
        head.register_forward_pre_hook(_contiguous)


def _contiguous(_: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(value.contiguous() if torch.is_tensor(value) else value for value in inputs)


def load_base_config(name_or_path: str) -> Any:
    """The text config of a base model, without its weights.

    Raises:
        UserError: as `load_base_model`.
    """
    place = model_folder(name_or_path)
    with _explaining(name_or_path):
        config = AutoConfig.from_pretrained(place, local_files_only=Path(place).is_dir(), trust_remote_code=False)
    return config.get_text_config()


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


def tokenizer_json(name_or_path: str) -> str:
    """The tokenizer as the text of a tokenizer.json, which the `tokenizers` library reads without transformers.

    Raises:
        UserError: as `load_tokenizer`; or a tokenizer that is not written in Rust.
    """
    tokenizer = load_tokenizer(name_or_path)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(
            f"the tokenizer of {name_or_path} is a {type(tokenizer).__name__} without a tokenizer.json, which counts "
            "the budget of a graph: save the model with a fast tokenizer"
        )
    return str(backend.to_str())


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
