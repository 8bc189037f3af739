"""Scoring, ranking and generating with several vLLMs under Ray: the methods and the numbers of one of them.

`RayVllmModel` starts the replicas (replicas.py), each with the base model and room for the adapters that will be asked;
`RayVllmEngine` asks them with one adapter, or with none. Each replica is a `VllmModel`, which has asked its own worker
whether it gates, and loads base model and adapters from the driver's paths, where it must find the same.
"""

import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from recllm import files
from recllm.errors import UserError
from recllm.infer.beams import Ranking
from recllm.infer.item_trie import ItemTrie
from recllm.infer.replicas import Engine, Replicas
from recllm.infer.tokens import Generation, Prompt, Tokens
from recllm.infer.vllm_engine import PART_ANSWERS, VllmEngine, VllmModel
from recllm.model.base_model import load_base_config, load_tokenizer, model_folder
from recllm.recipe import ModelSection


class RayVllmModel:
    """Running replicas of vLLM: the base model, its tokenizer, and adapters that are loaded when they are first asked.

    Args:
        section: the base model; a folder has to be at the same path on every node.
        adapters: folders that may be asked, at the same paths on every node.
        longest: tokens of the longest prompt with its answer.
        replicas: vLLM engines.
        chunk: prompts of a chunk; None: by the number of prompts.
        silence_s: seconds without an answer after which a replica is killed and replaced; None: never.

    Raises:
        UserError: as `Replicas`, and as `VllmModel` on a node; another base model or adapter at a node's path.
    """

    def __init__(
        self,
        section: ModelSection,
        adapters: Sequence[Path],
        longest: int,
        replicas: int,
        chunk: int | None = None,
        silence_s: float | None = None,
    ) -> None:
        name = section.name_or_path
        if Path(name).is_dir():  # replicas work in other folders
            section = section.model_copy(update={"name_or_path": str(Path(name).resolve())})
        folders = [Path(folder).resolve() for folder in adapters]
        expected = {str(folder): files.sha256_of(folder) for folder in folders}
        start = partial(start_vllm, section, folders, longest, _base_model_hash(section), expected)
        config = load_base_config(section.name_or_path)
        self.tokens = Tokens(load_tokenizer(section.name_or_path), longest, config.vocab_size)
        self.replicas = Replicas(start, replicas, chunk, silence_s)

    def close(self) -> None:
        """Stop the replicas."""
        self.replicas.close()


def start_vllm(
    section: ModelSection, adapters: Sequence[Path], longest: int, base_model: str, expected: Mapping[str, str]
) -> Callable[[Path | None], Engine]:
    """What a replica starts with: vLLM, which has asked its worker whether it gates.

    Raises:
        UserError: `base_model` or one of the adapters (`expected`: folder → sha256) is another one here, or is absent;
            as `VllmModel`.
    """
    for folder, sha256 in expected.items():
        if not Path(folder).is_dir() or files.sha256_of(Path(folder)) != sha256:
            what = "another adapter" if Path(folder).is_dir() else "no adapter"
            raise UserError(f"{folder} holds {what} here: every node has to see the driver's, on a shared disk")
    if _base_model_hash(section) != base_model:
        raise UserError(f"{section.name_or_path} is another base model here: every node has to see the driver's")
    return partial(VllmEngine, VllmModel(section, adapters, longest))


def _base_model_hash(section: ModelSection) -> str:
    """sha256 of a base model's file names and sizes and of its config; of a hub name the name alone.

    Its gigabytes are not read for it.
    """
    place = model_folder(section.name_or_path)
    folder, digest = Path(place), hashlib.sha256()
    if not folder.is_dir():
        return hashlib.sha256(place.encode()).hexdigest()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder)}\0{path.stat().st_size}\0".encode())
    digest.update((folder / "config.json").read_bytes())
    return digest.hexdigest()


class RayVllmEngine:
    """Asks replicas with one adapter, or with the base model alone.

    Args:
        replicas: running ones.
        tokens: of their base model.
        folder: of the adapter; None asks the base model.
    """

    def __init__(self, replicas: Replicas, tokens: Tokens, folder: Path | None = None) -> None:
        self.replicas, self.tokens = replicas, tokens
        self.folder = None if folder is None else Path(folder).resolve()

    def score(
        self,
        prompts: Sequence[Prompt],
        answers: Sequence[Sequence[str]],
        gate_weights: np.ndarray | None = None,
        length_normalised: bool = False,
        progress: str | None = None,
    ) -> np.ndarray:
        """Log-likelihood in nats of each answer after its prompt, terminator included: (N, C) float64.

        As `VllmEngine.score`.
        """
        scores = np.full((len(prompts), max(map(len, answers), default=0)), np.nan)
        rows = {"prompts": prompts, "answers": answers, "gate_weights": gate_weights}
        parts = self._ask("score", rows, {"length_normalised": length_normalised}, progress=progress)
        for span, part in zip(self.replicas.spans(len(prompts)), parts, strict=True):
            scores[span, : part.shape[1]] = part  # a chunk may have shorter lists than another
        return scores

    def num_tokens(self, answers: Sequence[Sequence[str]]) -> np.ndarray:
        """Tokens of each answer with its terminator, (N, C); 0 in the columns that a shorter list lacks."""
        return self.tokens.num_tokens(answers)

    def parts(self, answers: Sequence[str]) -> list[slice]:
        """Stretches of many answers that are scored with one prompt at once."""
        return [slice(start, start + PART_ANSWERS) for start in range(0, len(answers), PART_ANSWERS)]

    def rank_titles(
        self,
        prompts: Sequence[Prompt],
        trie: ItemTrie,
        width: int,
        k: int | None = None,
        excluded: Sequence[npt.ArrayLike] | None = None,
        gate_weights: np.ndarray | None = None,
        length_normalised: bool = False,
        progress: str | None = None,
    ) -> list[Ranking]:
        """The best titles of a whole catalogue, by beam search; as `VllmEngine.rank_titles`."""
        rows = {"prompts": prompts, "excluded": excluded, "gate_weights": gate_weights}
        options = {"width": width, "k": k, "length_normalised": length_normalised}
        parts = self._ask("rank_titles", rows, options, {"trie": trie}, progress)
        return list(itertools.chain.from_iterable(parts))

    def generate(
        self,
        prompts: Sequence[Prompt],
        gate_weights: np.ndarray | None = None,
        max_new_tokens: int = 32,
        listed: Sequence[bool] | None = None,
        progress: str | None = None,
        json_schema: Mapping[str, Any] | None = None,
    ) -> list[Generation]:
        """Greedy answers, one a prompt; as `VllmEngine.generate`."""
        rows = {"prompts": prompts, "listed": listed, "gate_weights": gate_weights}
        options = {"max_new_tokens": max_new_tokens, "json_schema": json_schema}
        return list(itertools.chain.from_iterable(self._ask("generate", rows, options, progress=progress)))

    def _ask(
        self,
        method: str,
        rows: dict[str, Any],
        options: dict[str, Any],
        shared: dict[str, Any] | None = None,
        progress: str | None = None,
    ) -> list[Any]:
        """Answers by chunk; `rows` have an entry a prompt, or are None."""
        count = len(rows["prompts"])
        for name, values in rows.items():
            if values is not None and len(values) != count:
                raise ValueError(f"{len(values)} {name} for {count} prompts: one a prompt is expected")
        chunks = (_part(rows, span) | options for span in self.replicas.spans(count))
        return self.replicas.ask(self.folder, method, chunks, shared, progress, count)


def _part(rows: Mapping[str, Any], span: slice) -> dict[str, Any]:
    return {name: None if values is None else values[span] for name, values in rows.items()}
