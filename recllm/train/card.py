"""The model card: what an adapter is, from what it was made and how. It states facts of the run and claims nothing.

A recipe, the dataset's manifest and the training log enter; the text of README.md leaves.
"""

import json
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from recllm import __version__
from recllm.recipe import LossSection, Recipe

METHODS = {
    "lora": "an ordinary LoRA: the same weights for every user",
    "ilora": (
        "an instance-wise LoRA (Kong et al., NeurIPS 2024): {gate} reads a "
        "user's history through the sequence encoder. Stock PEFT and stock vLLM load it as an ordinary LoRA with "
        "uniform gates; recllm.load_adapter loads it whole"
    ),
    "soft_token": (
        "a LoRA beside a soft token: what the sequence encoder says of a user's history is projected and added to the "
        "prompt's first token. Stock PEFT and stock vLLM load the LoRA without it; recllm.load_adapter loads it whole"
    ),
}


def model_card(recipe: Recipe, manifest: dict[str, Any], log_history: list[dict[str, Any]]) -> str:
    """README.md of an adapter folder, with the metadata block that hubs read."""
    adapter = recipe.adapter
    method = METHODS[adapter.method].format(gate=_gate(recipe))
    return "\n".join(
        [
            "---",
            f"base_model: {json.dumps(recipe.model.name_or_path)}",
            "library_name: peft",
            "tags: [recllm, recommendation, lora]",
            "---",
            "",
            f"# {recipe.name}",
            "",
            *([recipe.description, ""] if recipe.description else []),
            f"Adapter for `{recipe.model.name_or_path}`: {method}.",
            "",
            *_table("Training", _training(recipe, log_history)),
            *_table("Data", _data(manifest)),
            *_table("Made with", _versions()),
            "It answers with items of `items.parquet` only as far as it was taught to; how well it ranks is in the "
            "report of `recllm evaluate`, beside its baselines.",
            "",
        ]
    )


def _gate(recipe: Recipe) -> str:
    adapter = recipe.adapter
    if adapter.gate.type == "sigmoid":
        text = f"a sigmoid gate on each of {adapter.r} ranks"
    else:
        text = f"a gate over {adapter.num_experts} experts of rank {adapter.r // adapter.num_experts}"
    return f"{text}, one for each layer," if adapter.gate.per_layer else text


def _table(title: str, rows: dict[str, Any]) -> list[str]:
    lines = [f"| {key} | {str(value).replace('|', chr(92) + '|')} |" for key, value in rows.items()]
    return [f"## {title}", "", "| | |", "|---|---|", *lines, ""]


def _training(recipe: Recipe, log_history: list[dict[str, Any]]) -> dict[str, Any]:
    losses = [entry["loss"] for entry in log_history if "loss" in entry]
    final: dict[str, Any] = next((entry for entry in reversed(log_history) if "train_loss" in entry), {})
    rows: dict[str, Any] = {
        "rank, alpha, dropout": f"{recipe.adapter.r}, {recipe.adapter.lora_alpha}, {recipe.adapter.lora_dropout}",
        "seed": recipe.seed,
        "optimizer steps": final.get("step", "unknown"),
        **({} if recipe.loss == LossSection() else {"loss": _loss(recipe.loss)}),
        "arguments": ", ".join(f"{key}={value}" for key, value in recipe.train.items()) or "defaults",
    }
    if losses:
        rows["loss in nats a token, first and last logged"] = f"{losses[0]:.4f}, {losses[-1]:.4f}"
    return rows


def _loss(loss: LossSection) -> str:
    changed = loss.model_dump(exclude_defaults=True)
    return ", ".join(f"{key}={json.dumps(value)}" for key, value in changed.items())


def _data(manifest: dict[str, Any]) -> dict[str, Any]:
    templates = [f"{entry['id']} (sha256 {entry['sha256']})" for entry in manifest["templates"]]
    inputs = {f"`{path}`": f"sha256 {digest}" for path, digest in manifest["inputs"].items()}
    return {
        **inputs,
        "templates": ", ".join(templates),
        "item vocabulary": f"sha256 {manifest['items_sha256']}",
        "split": manifest["split"].get("method", manifest["split"]),
    }


def _versions() -> dict[str, str]:
    return {
        "command": f"`{shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])}`",
        "recllm": __version__,
        "torch, transformers, peft": f"{torch.__version__}, {transformers.__version__}, {peft.__version__}",
        "python": platform.python_version(),
    }
