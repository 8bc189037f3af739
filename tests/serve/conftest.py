"""What the server's tests share: a converted dataset, random adapters for it, and a stand-in for vLLM's server."""

import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from recllm.convert.pipeline import convert
from recllm.data.dataset import Dataset
from recllm.model.adapter import build_adapter, fit_gate_statistics, save_adapter
from recllm.model.sequence_encoder import SASRec
from recllm.recipe import AdapterSection, load_recipe
from recllm.serve.adapter import ServedAdapter, open_adapter

collect_ignore = ["stand_in.py"]  # no tests in it, and it needs the extra `serve`
NUM_ITEMS = 40
sys.path.append(str(Path(__file__).parent))  # stand_in.py, which a process of its own runs too


class World(NamedTuple):
    """A recipe's dataset and adapters for it."""

    recipe: Path
    model: Path  # folder of the base model
    dataset: Path
    ilora: Path
    lora: Path

    def converted(self, folder: Path, *overrides: str) -> Dataset:
        """Another dataset of the same log."""
        convert(load_recipe(self.recipe, overrides), folder, workers=1)
        return Dataset.open(folder)


@pytest.fixture(scope="session")
def world(tmp_path_factory, tiny_llama, tiny_tokenizer) -> World:
    """60 users, 40 items of which two share a title, and a Llama with heads of 32, as vLLM's CPU attention needs."""
    folder = tmp_path_factory.mktemp("served")

    def llama() -> Any:
        return tiny_llama(hidden_size=128, intermediate_size=128, max_position_embeddings=512, initializer_range=0.1)

    llama().save_pretrained(folder / "model")
    tiny_tokenizer.save_pretrained(folder / "model")
    rows = ["user_id,item_id,timestamp"]
    for user in range(60):
        start, length = user * 7 % NUM_ITEMS, 8 + user % 5
        rows += [f"u{user},i{(start + step) % NUM_ITEMS},{1000 + 10 * step + user}" for step in range(length)]
    (folder / "interactions.csv").write_text("\n".join(rows) + "\n")
    titles = [f"Film {item}" for item in range(NUM_ITEMS - 2)] + ["Twice", "Twice"]
    titles[5] = "Odd <|im_end|> one"  # written otherwise in prompts
    items = [f"i{item},{title},{'comedy' if item % 2 else 'drama'}" for item, title in enumerate(titles)]
    (folder / "items.csv").write_text("\n".join(["item_id,title,genre", *items]) + "\n")
    users = [f"u{user},{'old' if user % 2 else 'young'} [INST]" for user in range(60)]
    (folder / "users.csv").write_text("\n".join(["user_id,age", *users]) + "\n")
    recipe = folder / "recipe.yaml"
    recipe.write_text(f"""
name: served
output_dir: {folder}/run
data:
  interactions: {{path: {folder}/interactions.csv}}
  items: {{path: {folder}/items.csv}}
  users: {{path: {folder}/users.csv}}
protocol: temporal_20
history: {{max_items: 6}}
prompt: {{max_items: 3}}
tasks: [{{task: next_item, template: next_item/films, dense_window: 4}}]
model: {{name_or_path: {folder}/model, dtype: float32}}
""")
    convert(load_recipe(recipe), folder / "dataset", workers=1)
    dataset = Dataset.open(folder / "dataset")
    for number, method in enumerate(("ilora", "lora")):
        _save_adapter(llama(), str(folder / "model"), dataset, folder / method, method, number)
    return World(recipe, folder / "model", folder / "dataset", folder / "ilora", folder / "lora")


@pytest.fixture(scope="session")
def events_folder(world: World, tmp_path_factory: pytest.TempPathFactory, tiny_llama: Any) -> Path:
    """An instance-wise adapter that reads events of the same items: its dataset is no more than items and manifest."""
    folder = tmp_path_factory.mktemp("events")
    dataset = Dataset.open(world.dataset)
    actions = {"labels": ["view", "buy"], "words": {"view": "view", "buy": "buy"}}
    events = Dataset(dataset.folder, dataset.manifest | {"events": True, "actions": actions}, dataset.items)
    base = tiny_llama(hidden_size=128, intermediate_size=128, max_position_embeddings=512, initializer_range=0.1)
    _save_adapter(base, str(world.model), events, folder / "adapter", "ilora", 3)
    return folder / "adapter"


def _save_adapter(base: Any, model: str, dataset: Dataset, folder: Path, method: str, seed: int) -> None:
    """A random adapter: nothing in it is zero, so that users differ."""
    base.name_or_path = model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = None
        if method == "ilora":
            encoder = SASRec(NUM_ITEMS, 16, max_items=6, num_actions=len(dataset.actions)).eval()
            encoder.vocabulary_sha256 = dataset.vocabulary_sha256
        section = AdapterSection(method=method, r=8, lora_alpha=16, num_experts=4)  # type: ignore[arg-type]
        built = build_adapter(base, section, encoder).eval()
        if encoder is not None:
            fit_gate_statistics(built, encoder(torch.arange(NUM_ITEMS)[:, None]))
        with torch.no_grad():
            for name, weights in built.named_parameters():
                if ".default." in name and "sequence_encoder" not in name:
                    weights.copy_(torch.randn(weights.shape) * (1.0 if name.startswith("base_model.gate.") else 0.15))
        items = dataset.folder / "items.parquet"
        save_adapter(built, folder, items=items, manifest=dataset.manifest)


@pytest.fixture
def adapter(world: World) -> ServedAdapter:
    """The instance-wise one, opened."""
    return open_adapter(world.ilora)


@pytest.fixture
def stub() -> Any:
    """A stand-in for vLLM, not yet running."""
    from stand_in import Stub  # needs the extra `serve`

    return Stub()
