"""The ways of asking language models, behind one small interface: Transformers in this process, vLLM, vLLMs under Ray.

A recipe and its adapters enter; engines leave, one for each adapter or for the base model alone. Both have `score`,
`rank_titles`, `generate` and `num_tokens`, and give the same numbers.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from recllm.recipe import Recipe


class Engines(Protocol):
    """What the evaluation needs of each."""

    tokenizer: Any
    tokens: Any  # infer.tokens.Tokens: prompts and answers as token ids, within the model's context

    def check(self, folders: list[Path]) -> None:
        """Find now what would stop `engine` later.

        Raises:
            UserError: a damaged adapter.
        """

    def start(self, longest: int) -> None:
        """Before the first engine: prompts with their answers have `longest` tokens at most."""

    def engine(self, folder: Path | None) -> contextlib.AbstractContextManager[Any]:
        """An engine for an adapter, or for the base model alone; one at a time."""

    def close(self) -> None:
        """After the last engine."""


def make_engines(recipe: Recipe, folders: list[Path]) -> Engines:
    """As evaluate.engine says, with every adapter checked against the base model.

    Raises:
        UserError: an adapter of another base model; what the engine cannot do.
    """
    ways: dict[str, type[TransformersEngines] | type[VllmEngines]]
    ways = {"transformers": TransformersEngines, "vllm": VllmEngines, "ray-vllm": RayVllmEngines}
    return ways[recipe.evaluate.engine](recipe, folders)


class TransformersEngines:
    """The base model is loaded once; an adapter is put on it and taken off again."""

    def __init__(self, recipe: Recipe, folders: list[Path]) -> None:
        import torch

        from recllm.infer.tokens import Tokens
        from recllm.model.adapter import check_base_model
        from recllm.model.base_model import load_base_model

        base, self.tokenizer = load_base_model(recipe.model)
        for folder in folders:
            check_base_model(base, folder)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.base, self.batch_size = base.to(self.device), recipe.evaluate.batch_size
        self.tokens = Tokens.of(self.tokenizer, base.config.get_text_config())

    def check(self, folders: list[Path]) -> None:
        """Adapters with damaged weights are found by loading them."""
        from recllm.model.adapter import load_adapter

        for folder in folders:
            self.base = load_adapter(self.base, folder).unload()

    def start(self, longest: int) -> None:
        """Nothing to start."""

    @contextlib.contextmanager
    def engine(self, folder: Path | None) -> Iterator[Any]:
        """An engine for an adapter, or for the base model alone."""
        from recllm.infer.transformers_engine import TransformersEngine
        from recllm.model.adapter import load_adapter

        if folder is None:
            yield TransformersEngine(self.base, self.tokenizer, self.batch_size)
            return
        model = load_adapter(self.base, folder).to(self.device)
        try:
            yield TransformersEngine(model, self.tokenizer, self.batch_size)
        finally:
            self.base = model.unload()

    def close(self) -> None:
        """Nothing to stop."""


class VllmEngines:
    """vLLM is started once, with room for every adapter; the base model is in its processes alone."""

    def __init__(self, recipe: Recipe, folders: list[Path]) -> None:
        from recllm.infer.tokens import Tokens
        from recllm.infer.vllm_engine import check_precision, gate_layers, lora_settings
        from recllm.model.adapter import check_base_config
        from recllm.model.base_model import load_base_config, load_tokenizer

        check_precision(recipe.model)
        config = load_base_config(recipe.model.name_or_path)
        for folder in folders:
            check_base_config(config, folder)
        lora_settings(folders)
        gate_layers(folders)
        self.recipe, self.folders = recipe, folders
        self.tokenizer = load_tokenizer(recipe.model.name_or_path)
        self.tokens = Tokens.of(self.tokenizer, config)
        self._model: Any = None

    def check(self, folders: list[Path]) -> None:
        """Adapters with damaged weights are found by reading them."""
        from recllm.model.adapter import LORA_WEIGHTS
        from recllm.model.sequence_encoder import read_tensors

        for folder in folders:
            read_tensors(folder / LORA_WEIGHTS, "LoRA weights")

    def start(self, longest: int) -> None:
        """Start vLLM."""
        from recllm.infer.vllm_engine import VllmModel

        if self._model is None:
            self._model = VllmModel(self.recipe.model, self.folders, longest)

    @contextlib.contextmanager
    def engine(self, folder: Path | None) -> Iterator[Any]:
        """An engine for an adapter, or for the base model alone."""
        from recllm.infer.vllm_engine import VllmEngine

        yield VllmEngine(self._model, folder)

    def close(self) -> None:
        """Stop vLLM."""
        if self._model is not None:
            self._model.close()


class RayVllmEngines(VllmEngines):
    """`evaluate.replicas` of them, each with room for every adapter, are started under Ray and asked together."""

    def check(self, folders: list[Path]) -> None:
        """Damaged adapters, and a Ray that is not there or has no room."""
        from recllm.cluster import connected
        from recllm.infer.replicas import ASKED, room

        super().check(folders)
        with connected(ASKED):  # not kept: what comes next may stop, and needs no Ray
            room(self.recipe.evaluate.replicas)

    def start(self, longest: int) -> None:
        """Start the replicas."""
        from recllm.infer.ray_vllm_engine import RayVllmModel

        if self._model is None:
            section = self.recipe.evaluate
            self._model = RayVllmModel(
                self.recipe.model, self.folders, longest, section.replicas, silence_s=section.replica_timeout_s
            )

    @contextlib.contextmanager
    def engine(self, folder: Path | None) -> Iterator[Any]:
        """An engine for an adapter, or for the base model alone."""
        from recllm.infer.ray_vllm_engine import RayVllmEngine

        yield RayVllmEngine(self._model.replicas, self._model.tokens, folder)
