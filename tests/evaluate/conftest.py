"""A small run up to evaluation: a converted log, an encoder, two adapters with random weights; nothing is trained."""

from pathlib import Path
from typing import NamedTuple

import pytest

from recllm.recipe import Recipe

NUM_ITEMS, NUM_USERS = 40, 60
GENRES = ("Action", "Action|Comedy", "Comedy", "Drama")  # of a quarter of the ring each


class Made(NamedTuple):
    recipe: Recipe
    dataset: Path
    encoder: Path
    adapter: Path  # instance-wise, random weights
    plain: Path  # plain LoRA
    kinds: dict[str, Path]  # other kinds: soft_token, sigmoid, per_layer


def write_log(folder: Path) -> None:
    """Users walk a ring of items; every second item is rated 5, the others 1."""
    lines = ["user_id,item_id,timestamp,rating"]
    for user in range(NUM_USERS):
        start, length = user * 7 % NUM_ITEMS, 8 + user % 5
        for step in range(length):
            item = (start + step) % NUM_ITEMS
            lines.append(f"u{user},i{item},{1000 + 10 * step + user},{5 if item % 2 else 1}")
    (folder / "log.csv").write_text("\n".join(lines) + "\n")
    items = [f"i{item},Film {item},{GENRES[item * len(GENRES) // NUM_ITEMS]}" for item in range(NUM_ITEMS)]
    (folder / "items.csv").write_text("\n".join(["item_id,title,genres", *items]) + "\n")
    users = [f"u{user},{'MF'[user % 2]}" for user in range(NUM_USERS)]
    (folder / "users.csv").write_text("\n".join(["user_id,gender", *users]) + "\n")


def make_recipe(folder: Path, model: Path, **changes) -> Recipe:
    document = {
        "name": "tiny",
        "output_dir": str(folder / "run"),
        "data": {
            "interactions": {"path": str(folder / "log.csv")},
            "items": {"path": str(folder / "items.csv")},
            "users": {"path": str(folder / "users.csv")},
        },
        "filter": {"like_at": 3},
        "protocol": {
            "name": "loo",
            "split": {"method": "leave_one_out", "min_history": 1},
            "candidates": {"count": 6},
            "ranking": {"k": [1, 3], "exclude_history": True},
            "decoding": {"max_new_tokens": 6},
            "bootstrap": {"samples": 200},
        },
        "prompt": {"max_items": 3},
        "tasks": [
            {"task": "next_item", "template": "next_item/films", "dense_window": 4},
            {"task": "like", "template": "like/items"},
        ],
        "model": {"name_or_path": str(model), "dtype": "float32"},
        "adapter": {"r": 4, "num_experts": 2},
        "evaluate": {"max_examples": 10, "batch_size": 4},
    }
    return Recipe.model_validate(document | changes)


@pytest.fixture(scope="session")
def made(tmp_path_factory, tiny_model_folder) -> Made:
    import torch

    from recllm.convert.pipeline import convert
    from recllm.data.dataset import Dataset
    from recllm.model.adapter import build_adapter, save_adapter
    from recllm.model.base_model import load_base_model
    from recllm.model.sequence_encoder import SASRec, load_encoder, save_encoder
    from recllm.recipe import AdapterSection, GateSection

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("evaluate")
    write_log(folder)
    recipe = make_recipe(folder, tiny_model_folder)
    convert(recipe, folder / "dataset", workers=1)
    dataset = Dataset.open(folder / "dataset")
    torch.manual_seed(0)
    encoder = SASRec(dataset.num_items, 8, num_layers=1, num_heads=1, max_items=20)
    save_encoder(encoder, folder / "encoder", dataset.vocabulary_sha256, {})
    kinds = {
        "soft_token": AdapterSection(method="soft_token", r=4),
        "sigmoid": AdapterSection(r=4, gate=GateSection(type="sigmoid")),
        "per_layer": AdapterSection(r=4, num_experts=2, gate=GateSection(per_layer=True)),
    }
    for name, section in {"adapter": recipe.adapter, "plain": AdapterSection(method="lora", r=4), **kinds}.items():
        base, _ = load_base_model(recipe.model)
        model = build_adapter(base, section, load_encoder(folder / "encoder")[0])
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_" in key or "gate." in key or "soft_token." in key:
                    parameter.normal_(std=0.3)
        save_adapter(model, folder / name, items=folder / "dataset/items.parquet", manifest=dataset.manifest)
    (folder / "adapter/training_log.json").write_text('[{"step": 1, "loss": 2.5}]')
    return Made(
        recipe,
        folder / "dataset",
        folder / "encoder",
        folder / "adapter",
        folder / "plain",
        {name: folder / name for name in kinds},
    )
