from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from recllm.errors import UserError
from recllm.model.base_model import load_base_model, load_tokenizer
from recllm.model.chat import answer_ids, prompt_ids, token_counter
from recllm.recipe import ModelSection


@pytest.fixture
def folder(tiny_llama: Any, tiny_tokenizer: Any, tmp_path: Path) -> Path:
    tiny_llama().save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_local_folder(folder: Path, tiny_llama: Any, dtype: Any) -> None:
    section = ModelSection(name_or_path=str(folder), dtype=dtype, attn_implementation="eager")
    model, tokenizer = load_base_model(section)
    assert model.dtype == getattr(torch, dtype)
    assert not model.training
    assert model.config._attn_implementation == "eager"
    assert model.name_or_path == str(folder)
    assert (tokenizer.padding_side, tokenizer.pad_token) == ("left", "<|im_end|>")
    if dtype == "float32":
        assert torch.equal(model.lm_head.weight, tiny_llama().lm_head.weight)


def test_a_tokenizer_without_pad_takes_eos(tiny_tokenizer: Any, folder: Path) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer._tokenizer, eos_token="<|endoftext|>")
    bare.save_pretrained(folder)
    assert load_tokenizer(str(folder)).pad_token == "<|endoftext|>"
    PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer._tokenizer).save_pretrained(folder)
    with pytest.raises(UserError, match="neither a pad nor an eos"):
        load_tokenizer(str(folder))


def test_padding_does_not_mask_a_real_eos(folder: Path) -> None:
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id  # as in SmolLM2
    batch = tokenizer.pad({"input_ids": [answer_ids(tokenizer, "Alien"), answer_ids(tokenizer, "Se")]})
    assert batch["attention_mask"] == [[1] * 6, [0] * 3 + [1] * 3]


def test_token_counter(folder: Path) -> None:
    prompt = [{"role": "user", "content": "hi"}]
    tokenizer = load_tokenizer(str(folder))
    counted = token_counter(str(folder))(prompt, [{"role": "assistant", "content": "Alien\n"}])
    assert counted == (len(prompt_ids(tokenizer, prompt)), len("Alien\n"))


def test_bad_names(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no folder"):
        load_tokenizer(str(tmp_path / "absent"))
    with pytest.raises(UserError, match="could not be loaded"):
        load_tokenizer("nobody/no-such-model")
    with pytest.raises(UserError, match="known: offline://"):
        load_tokenizer("offline://no-such-model")
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"no config\.json"):
        load_base_model(ModelSection(name_or_path=str(folder)))


def test_damaged_weights(folder: Path) -> None:
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(UserError, match="could not be loaded"):
        load_base_model(ModelSection(name_or_path=str(folder)))


@pytest.mark.slow
def test_smollm2(smollm2: str) -> None:
    model, tokenizer = load_base_model(ModelSection(name_or_path=smollm2))
    assert model.dtype == torch.bfloat16
    assert model.config.get_text_config().vocab_size == len(tokenizer) == 49152
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    ids = prompt_ids(tokenizer, [{"role": "user", "content": "What is the capital of France?"}])
    answer = model.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=12, do_sample=False
    )
    assert "Paris" in tokenizer.decode(answer[0, len(ids) :])
