"""What the scripts on synthetic worlds share: a tiny base model that is trained in full, and arms of equal size on it.

Words and examples enter; a tokenizer, a folder with a base model and the tables that guide an arm's adapter leave.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from evidence import Plan, Tables, fit, rows_of_others, same_start
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from recllm import files
from recllm.evaluate.language_model import swapped_rows
from recllm.model.adapter import build_adapter
from recllm.model.base_model import load_base_model
from recllm.model.sequence_encoder import load_encoder
from recllm.recipe import AdapterSection, ModelSection
from recllm.train.collator import Collator, TokenizedExamples

WIDTH = 64
RANK = 8
ARMS = ("lora", "ilora", "uniform", "shuffled", "oracle", "soft_token")
ARM_VERSIONS = {"shuffled": 2}  # 1 gave each user one fixed partner, which a gate can learn by heart
READS_HISTORY = ("ilora", "shuffled", "soft_token")  # the arms for which it matters what the gate reads


def word_tokenizer(words: Iterable[str]) -> PreTrainedTokenizerFast:
    """A word is a token, and so is a newline; ChatML without anything else."""
    special = ["<pad>", "<|user|>", "<|end|>", "<unk>"]
    vocabulary = {token: number for number, token in enumerate([*special, "\n", *sorted(set(words))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex("\n"), "isolated"), pre_tokenizers.Split(Regex(" +"), "removed")]
    )
    tokenizer.add_special_tokens(special)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<|end|>",
        bos_token="<|user|>",
        unk_token="<unk>",
        padding_side="left",
    )
    wrapped.chat_template = "{% for message in messages %}<|user|>{{ message.content }}<|end|>{% endfor %}"
    return wrapped


def fit_base(
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    examples: TokenizedExamples,
    collator: Collator,
    steps: int,
    seed: int,
    device: str,
) -> None:
    """Write a tiny Llama, all of whose weights are trained on the examples: adapters can teach a random one nothing."""
    torch.manual_seed(seed)
    model: Any = LlamaForCausalLM(_config(tokenizer))
    log = fit(model.to(device), examples, collator, {}, Plan(steps, 128, 3e-3, 3e-3, seed, warmup=30))
    with files.replacing_folder(folder) as staging:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        files.write_json(staging / "base_log.json", log)


def _config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """Two layers of width 64: learns the whole world within a minute of one core."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
        initializer_range=0.05,
    )


# ---- arms ----


def method_of(arm: str) -> Any:
    """The method of an arm's adapter, as adapter.method of a recipe."""
    return arm if arm in ("lora", "soft_token") else "ilora"


def make_arm(arm: str, base: Path, encoder: Path, num_experts: int, seed: int, device: str) -> Any:
    """An arm's adapter before its first step; arms of a seed start from the same LoRA weights where ranks are equal."""
    torch.manual_seed(seed)
    model, _ = load_base_model(ModelSection(name_or_path=str(base), dtype="float32"))
    loaded, _ = load_encoder(encoder)
    method = method_of(arm)
    rank = equal_rank(model, loaded.hidden_size, method)
    experts = num_experts if method == "ilora" else 1
    section = AdapterSection(method=method, r=rank, lora_alpha=2 * rank, num_experts=experts)
    model = build_adapter(model, section, loaded).to(device)
    same_start(model, seed)
    return model


def equal_rank(base: Any, width: int, method: str) -> int:
    """The rank whose number of trained parameters is nearest to that of an instance-wise adapter of rank RANK."""
    modules = [m for name, m in base.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"]
    a_rank = sum(m.in_features + m.out_features for m in modules)
    beside = {"lora": 0, "ilora": 0, "soft_token": width * base.config.hidden_size}[method]
    return RANK - round(beside / a_rank)


def given_to(
    arm: str,
    users: np.ndarray,
    states: Callable[[], torch.Tensor],
    clusters: np.ndarray,
    num_experts: int,
    seed: int,
) -> Tables:
    """What the gate or the soft token is given for each example, of users (N,) with the true clusters (N,).

    `states` makes the representations (N, D) of what the gate may read. ilora@shuffled is the control of `recllm
    evaluate`: each user takes one other user's; the arm shuffled draws another user's anew for every example.
    """
    if arm == "lora":
        return {}
    if arm.endswith("uniform"):
        return {"gate_weights": torch.full((len(users), num_experts), 1 / num_experts)}
    if arm == "oracle":
        return {"gate_weights": torch.nn.functional.one_hot(torch.from_numpy(clusters), num_experts).float()}
    generator = np.random.default_rng([seed, 1])
    found = states()
    if arm == "shuffled":
        found = found[torch.from_numpy(rows_of_others(users, generator))]
    if arm == "ilora@shuffled":
        rows = swapped_rows(users, generator)
        assert rows is not None  # there is more than one user
        found = found[torch.from_numpy(rows)]
    return {"representation": found}
