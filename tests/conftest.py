"""Fixtures that several rooms share: the folder of shared data, the offline default, a tiny Llama."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for a hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """../shared/data beside the checkout: real logs that may not be committed."""
    folder = Path(os.environ.get("RECLLM_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent: set RECLLM_SHARED_DATA to the folder with ml-100k and the other logs")
    return folder


@pytest.fixture(scope="session")
def movielens() -> Path:
    """MovieLens-100K as RecBole atomic files, fetched once into the cache."""
    from recllm.data import offline

    return offline.resolve("offline://movielens-100k")


@pytest.fixture(scope="session")
def smollm2() -> str:
    """Name of the real small model; fetched and converted once into the cache."""
    from recllm.data import offline

    offline.resolve("offline://smollm2-135m-instruct")
    return "offline://smollm2-135m-instruct"


CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> "PreTrainedTokenizerFast":
    """A byte-level BPE without merges (one token a byte, so anything can be said) with a ChatML template.

    Special tokens: <|im_start|> (bos), <|im_end|> (eos AND pad, as in SmolLM2) and <|endoftext|>; 259 ids in all.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {token: index for index, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    wrapped.chat_template = CHATML
    return wrapped


@pytest.fixture(scope="session")
def tiny_llama() -> "Callable[..., LlamaForCausalLM]":
    """tiny_llama(seed=0, **config) builds a random LlamaForCausalLM: 2 layers, hidden 32, 259 tokens, fp32, eval."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    def build(seed: int = 0, **overrides: object) -> "LlamaForCausalLM":
        sizes: dict[str, object] = {
            "vocab_size": 259,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 2,
            "tie_word_embeddings": True,
            "initializer_range": 0.2,  # wide, so that logits differ visibly from token to token
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            config = LlamaConfig(**(sizes | overrides))
            return LlamaForCausalLM(config).to(torch.float32).eval()

    return build


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory, tiny_llama, tiny_tokenizer) -> Path:
    """The tiny Llama and its tokenizer as a local model folder."""
    folder = tmp_path_factory.mktemp("tiny-model")
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def long_model_folder(tmp_path_factory, tiny_llama, tiny_tokenizer) -> Path:
    """The same for prompts of up to 4096 tokens: one with a subgraph has a token for each of its bytes."""
    folder = tmp_path_factory.mktemp("long-model")
    tiny_llama(max_position_embeddings=4096).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_recipe(tmp_path, tiny_model_folder) -> Path:
    """A whole run in seconds: 60 users who walk a ring of 40 items, a tiny random Llama, four training steps."""
    rows = ["user_id,item_id,timestamp"]
    for user in range(60):
        start, length = user * 7 % 40, 8 + user % 5
        rows += [f"u{user},i{(start + step) % 40},{1000 + 10 * step + user}" for step in range(length)]
    (tmp_path / "interactions.csv").write_text("\n".join(rows) + "\n")
    items = ["item_id,title,genre"] + [f"i{item},Film {item},{'comedy' if item % 2 else 'drama'}" for item in range(40)]
    (tmp_path / "items.csv").write_text("\n".join(items) + "\n")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"""
name: tiny
output_dir: {tmp_path}/run
data:
  interactions: {{path: {tmp_path}/interactions.csv}}
  items: {{path: {tmp_path}/items.csv}}
protocol: temporal_20
prompt: {{max_items: 4}}
tasks: [{{task: next_item, template: next_item/films, dense_window: 4}}]
encoder: {{hidden_size: 8, num_layers: 1, num_heads: 1, max_epochs: 3}}
model: {{name_or_path: {tiny_model_folder}, dtype: float32}}
adapter: {{r: 4, num_experts: 2}}
train: {{max_steps: 4, per_device_train_batch_size: 4, logging_steps: 2, save_steps: 2, report_to: none}}
evaluate: {{max_examples: 12, batch_size: 4}}
""")
    return recipe
