"""The language-model systems of a report: the base model, the adapter of the run, its controls, further adapters.

Tasks (evaluation.Task) enter; predictions leave, system by system. The base model is loaded once; an adapter is put on
it, asked, and taken off again.
"""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from recllm.data.dataset import Dataset, pad_left
from recllm.errors import UserError
from recllm.evaluate.tasks import NEXT_ITEM, Prediction, Task
from recllm.recipe import Recipe

MAX_GENERATIONS = 50  # examples of a task that are also answered freely
_GATE_ROWS = 256  # histories that the gate reads at once

BASE_MODEL = "base_model"
CONTROLS = {
    "uniform": "the same adapter with the same weight on every expert",
    "shuffled": "the same adapter, each user with the gates of another",
}


class Adapter(NamedTuple):
    """An adapter to evaluate."""

    name: str
    folder: Path
    is_main: bool  # of this run: gets controls and gate plots


class System(NamedTuple):
    """One system's predictions, by task name."""

    name: str
    kind: str
    description: str
    predictions: dict[str, Prediction]
    seconds: float
    has_gate: bool = False


class Gates(NamedTuple):
    """What the gate of the run's adapter gives each evaluated example, by task name."""

    system: str
    weights: dict[str, npt.NDArray[np.float32]]  # (N, K)
    representations: dict[str, npt.NDArray[np.float32]]  # (N, D)


class LanguageModels:
    """The base model with its tokenizer, checked against every adapter before anything is scored."""

    def __init__(self, recipe: Recipe, dataset: Dataset, adapters: list[Adapter]) -> None:
        import torch

        from recllm.model.adapter import check_base_model, check_vocabulary
        from recllm.model.base_model import load_base_model

        for adapter in adapters:
            check_adapter_folder(adapter.folder)
            check_vocabulary(adapter.folder, dataset.vocabulary_sha256)
        self.recipe, self.dataset, self.adapters = recipe, dataset, adapters
        base, self.tokenizer = load_base_model(recipe.model)
        for adapter in adapters:
            check_base_model(base, adapter.folder)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.base = base.to(self.device)
        self.gates: Gates | None = None

    def check(self, tasks: list[Task]) -> None:
        """Find now what would stop the scoring later: prompts beyond the context, adapters with damaged weights.

        Raises:
            UserError: names the prompt or the file.
        """
        from recllm.infer.transformers_engine import TransformersEngine
        from recllm.model.adapter import load_adapter

        engine = TransformersEngine(self.base, self.tokenizer, self.recipe.evaluate.batch_size)
        limit = self.recipe.protocol.decoding.max_new_tokens
        for task in tasks:
            generated = MAX_GENERATIONS if task.kind == NEXT_ITEM else 0
            engine.check(task.prompts, task.answer_texts(self.dataset.titles), limit, generated)
        for adapter in self.adapters:
            self.base = load_adapter(self.base, adapter.folder).unload()

    def systems(self, tasks: list[Task]) -> Iterator[System]:
        """Score system by system, the base model first."""
        if BASE_MODEL in self.recipe.evaluate.baselines:
            yield self._ask(self.base, tasks, BASE_MODEL, BASE_MODEL, "the language model untuned", {}, True)
        for adapter in self.adapters:
            yield from self._adapter(adapter, tasks)

    def _adapter(self, adapter: Adapter, tasks: list[Task]) -> Iterator[System]:
        from recllm.model.adapter import accepts_history, load_adapter

        model = load_adapter(self.base, adapter.folder).to(self.device)
        try:
            has_gate = accepts_history(model)
            gates = self._read_gates(model, adapter, tasks) if has_gate else None
            weights = gates.weights if gates else {}
            what = "instance-wise LoRA" if has_gate else "plain LoRA"
            text = f"{what} of this run" if adapter.is_main else f"{what} from {adapter.folder}"
            yield self._ask(model, tasks, adapter.name, "adapter", text, weights, True)
            if adapter.is_main and gates:
                self.gates = gates
                for control in self.recipe.evaluate.controls:
                    changed = control_weights(control, weights, tasks, self.recipe.seed)
                    if changed is not None:
                        name = f"{adapter.name}_{control}"
                        yield self._ask(model, tasks, name, "control", CONTROLS[control], changed, False)
        finally:
            self.base = model.unload()

    def _ask(
        self,
        model: Any,
        tasks: list[Task],
        name: str,
        kind: str,
        description: str,
        weights: dict[str, npt.NDArray[np.float32]],
        generate: bool,
    ) -> System:
        from recllm.infer.transformers_engine import TransformersEngine

        engine = TransformersEngine(model, self.tokenizer, self.recipe.evaluate.batch_size)
        started = time.monotonic()
        predictions = {task.name: self._predict(engine, task, name, weights.get(task.name), generate) for task in tasks}
        return System(name, kind, description, predictions, time.monotonic() - started, bool(weights))

    def _predict(
        self, engine: Any, task: Task, name: str, weights: npt.NDArray[np.float32] | None, generate: bool
    ) -> Prediction:
        answers, decoding = task.answer_texts(self.dataset.titles), self.recipe.protocol.decoding
        label = f"{name}: {task.name}"
        mean = decoding.score == "mean"
        scores = engine.score(task.prompts, answers, gate_weights=weights, length_normalised=mean, progress=label)
        nats = -scores[np.arange(len(scores)), task.right_column]
        if mean:
            nats = nats * engine.num_tokens([[row[right]] for row, right in zip(answers, task.right_column)])[:, 0]
        prediction = Prediction(scores, nats=nats)
        if not generate or task.kind != NEXT_ITEM:
            return prediction
        few = slice(0, MAX_GENERATIONS)
        generated = engine.generate(
            task.prompts[few],
            gate_weights=None if weights is None else weights[few],
            max_new_tokens=decoding.max_new_tokens,
            listed=[end == "\n" for end in task.ends[few]],
            progress=f"{label}, generating",
        )
        return prediction._replace(generations=[(text.text, text.finished) for text in generated])

    def _read_gates(self, model: Any, adapter: Adapter, tasks: list[Task]) -> Gates:
        """Gate weights and representations of every example, from all of the history before its cut-off."""
        import torch

        longest = int(self.dataset.manifest["history_max_items"])
        weights, representations = {}, {}
        for task in tasks:
            states, gates = [], []
            for start in range(0, len(task.examples.example_ids), _GATE_ROWS):
                part = task.examples.part(slice(start, start + _GATE_ROWS))
                histories = [
                    self.dataset.history(int(user), int(end), longest)
                    for user, end in zip(part.user_index, part.history_end)
                ]
                with torch.inference_mode():
                    state = model.base_model.represent(torch.from_numpy(pad_left(histories)).to(self.device))
                    gates.append(model.base_model.gate_weights(representation=state).float().cpu().numpy())
                    states.append(state.cpu().numpy())
            weights[task.name], representations[task.name] = np.concatenate(gates), np.concatenate(states)
        return Gates(adapter.name, weights, representations)


def check_adapter_folder(folder: Path) -> None:
    """Refuse what is no adapter.

    Raises:
        UserError: no folder, or no adapter_config.json in it.
    """
    if not (folder / "adapter_config.json").is_file():
        raise UserError(f"{folder} holds no adapter_config.json: a folder written by `recllm train` is expected")


def control_weights(
    control: str, weights: dict[str, npt.NDArray[np.float32]], tasks: list[Task], seed: int
) -> dict[str, npt.NDArray[np.float32]] | None:
    """Gate weights of a control, by task; None where it cannot be made (nobody to swap with)."""
    if control == "uniform":
        return {name: np.full_like(rows, 1 / rows.shape[1]) for name, rows in weights.items()}
    changed = {}
    for task in tasks:
        rows = swapped_rows(task.examples.user_index, np.random.default_rng([seed, 1]))
        if rows is None:
            return None
        changed[task.name] = weights[task.name][rows]
    return changed


def swapped_rows(users: npt.NDArray, rng: np.random.Generator) -> npt.NDArray[np.int64] | None:
    """For each example the row of another user's example: users in a random circle, each takes the next one's.

    None where all examples are of one user.

    >>> swapped_rows(np.array([3, 5]), np.random.default_rng(0)).tolist()
    [1, 0]
    """
    different, members = np.unique(users, return_inverse=True)
    if len(different) < 2:
        return None
    circle = rng.permutation(len(different))
    following = np.empty(len(different), dtype=np.int64)
    following[circle] = np.roll(circle, -1)
    rows_of = [np.flatnonzero(members == user) for user in range(len(different))]
    chosen = np.empty(len(users), dtype=np.int64)
    for user, rows in enumerate(rows_of):
        others = rows_of[following[user]]
        chosen[rows] = others[np.arange(len(rows)) % len(others)]
    return chosen


def strongest_experts(weights: npt.NDArray) -> npt.NDArray[np.int64]:
    """The expert with the largest weight of each row of (N, K); -1, no expert, where all weigh the same.

    >>> strongest_experts(np.array([[0.1, 0.9], [0.5, 0.5]])).tolist()
    [1, -1]
    """
    return np.where(np.ptp(weights, axis=1) > 0, weights.argmax(axis=1), -1)


def gates_table(gates: Gates, tasks: list[Task]) -> pa.Table:
    """gates.parquet: example_id, user_index, weights, strongest expert (-1: none); x, y: the representation by PCA."""
    weights = np.concatenate([gates.weights[task.name] for task in tasks])
    x, y = principal_components(np.concatenate([gates.representations[task.name] for task in tasks]))
    return pa.table(
        {
            "example_id": pa.array([name for task in tasks for name in task.examples.example_ids]),
            "user_index": pa.array(np.concatenate([task.examples.user_index for task in tasks]), pa.int32()),
            "weights": pa.array(list(weights), pa.list_(pa.float32())),
            "x": x,
            "y": y,
            "strongest": pa.array(strongest_experts(weights), pa.int32()),
        }
    )


def principal_components(rows: npt.NDArray) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """The first two principal components (N,), (N,) of rows (N, D), by SVD of the centred rows (Jolliffe 2002).

    Signs are fixed (the largest loading of a component is positive), so that a plot comes out the same again.
    """
    centred = np.asarray(rows, dtype=np.float64) - np.mean(rows, axis=0, dtype=np.float64)
    _, _, loadings = np.linalg.svd(centred, full_matrices=False)
    two = np.zeros((2, centred.shape[1]))
    two[: min(2, len(loadings))] = loadings[:2]
    signs = np.sign(two[[0, 1], np.abs(two).argmax(axis=1)])
    projected = centred @ (two * np.where(signs == 0, 1, signs)[:, None]).T
    return projected[:, 0], projected[:, 1]
