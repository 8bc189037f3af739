"""The language-model systems of a report: the base model, the adapter of the run, its controls, further adapters.

Tasks (evaluation.Task) enter; predictions leave, system by system. The base model is loaded once; an adapter is put on
it, asked, and taken off again.
"""

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from recllm.data.dataset import Dataset
from recllm.errors import UserError
from recllm.evaluate.calibration import fit_temperature
from recllm.evaluate.catalogue import Catalogue
from recllm.evaluate.explanations import NEW_TOKENS, Explanations
from recllm.evaluate.tasks import NEXT_ITEM, Prediction, Task
from recllm.recipe import Recipe

MAX_GENERATIONS = 50  # examples of a task that are also answered freely

BASE_MODEL = "base_model"
METHODS = {"ilora": "instance-wise LoRA", "soft_token": "LoRA beside a soft token", "lora": "plain LoRA"}
CONTROLS = {
    "ilora": {
        "uniform": "the same adapter with the same weight on every expert",
        "shuffled": "the same adapter, each user with the gates of another",
    },
    "soft_token": {
        "shuffled": "the same adapter, each user with the representation of another",
        "without_token": "the same adapter without its soft token, as for an empty history",
    },
    "lora": {},
}
_GIVEN_AS = {"ilora": "gate_weights", "soft_token": "representations"}  # argument of the engine


class Adapter(NamedTuple):
    """An adapter to evaluate."""

    name: str
    folder: Path
    is_main: bool  # of this run: gets controls and gate plots
    method: str = "lora"  # ilora, soft_token or lora


class System(NamedTuple):
    """One system's predictions, by task name."""

    name: str
    kind: str
    description: str
    predictions: dict[str, Prediction]
    seconds: float
    method: str | None = None  # of an adapter and its controls: ilora, soft_token or lora

    @property
    def has_gate(self) -> bool:
        """Whether its weights differ from user to user."""
        return self.method == "ilora"


class Gates(NamedTuple):
    """What the gate of the run's adapter gives each evaluated example, by task name."""

    system: str
    type: str  # softmax or sigmoid
    uniform: float  # the weight on every expert that makes the plain LoRA: 1/K of a softmax, 1/2 of a sigmoid
    weights: dict[str, npt.NDArray[np.float32]]  # (N, K), or (N, layers, K) with one gate a layer
    representations: dict[str, npt.NDArray[np.float32]]  # (N, D)

    def all_weights(self, tasks: list[Task]) -> npt.NDArray[np.float64]:
        """Of all tasks, one after the other."""
        return np.concatenate([self.weights[task.name] for task in tasks]).astype(np.float64)


class LanguageModels:
    """Everything that is scored by language models, checked before anything is.

    `held` has validation examples of some closed tasks, by the task's name: they fit each system's temperature, and are
    reported nowhere. `explanations` judges the task explain, where that is asked.
    """

    def __init__(
        self,
        recipe: Recipe,
        dataset: Dataset,
        adapters: list[Adapter],
        held: Mapping[str, Task] | None = None,
        explanations: Explanations | None = None,
    ) -> None:
        from recllm.evaluate.engines import make_engines
        from recllm.model.adapter import check_vocabulary

        for adapter in adapters:
            check_adapter_folder(adapter.folder)
            check_vocabulary(adapter.folder, dataset.vocabulary_sha256)
        self.recipe, self.dataset, self.adapters, self.held = recipe, dataset, adapters, dict(held or {})
        self.engines = make_engines(recipe, [adapter.folder for adapter in adapters])
        self.gates: Gates | None = None  # of the run's own adapter
        self.notes: list[str] = []  # what was not scored, and why
        self.catalogue = Catalogue(recipe, dataset, self.engines.tokenizer)
        self.explanations = explanations

    def check(self, tasks: list[Task]) -> None:
        """Find now what would stop the scoring later: prompts beyond the context, adapters with damaged weights.

        Raises:
            UserError: names the prompt or the file.
        """
        tokens = self.engines.tokens
        for task in [*tasks, *self.held.values()]:
            answers = task.answer_texts(self.dataset.titles)
            if self.catalogue.is_asked(task):
                longest = max(self.dataset.titles, key=lambda title: tokens.num_tokens([[title]])[0, 0])
                answers = [[*row, f"{longest}{end}"] for row, end in zip(answers, task.ends)]
            tokens.pairs(task.prompts, answers)
            tokens.for_generation(task.prompts[: self._written(task)], self._room(task, answers))
            tokens.grammar(self._schema(task))
        self.engines.check([adapter.folder for adapter in self.adapters])

    def systems(self, tasks: list[Task]) -> Iterator[System]:
        """Score system by system, the base model first."""
        self.engines.start(self._longest(tasks))
        try:
            if BASE_MODEL in self.recipe.evaluate.baselines:
                with self.engines.engine(None) as engine:
                    text = "the language model untuned"
                    yield self._ask(engine, tasks, BASE_MODEL, BASE_MODEL, text, None, {}, True)
            for adapter in self.adapters:
                with self.engines.engine(adapter.folder) as engine:
                    yield from self._adapter(engine, adapter, tasks)
        finally:
            self.engines.close()

    def _longest(self, tasks: list[Task]) -> int:
        """Tokens of the longest prompt with what may follow it, within the model's context.

        A rationale is read again as the text that it is: a token that was a piece of a character has become U+FFFD
        there, three bytes, which may be three tokens.
        """
        tokens, lengths = self.engines.tokens, [1]
        for task in [*tasks, *self.held.values()]:
            answers = task.answer_texts(self.dataset.titles)
            rows, candidates = tokens.pairs(task.prompts, answers)
            ends = [max(map(len, texts)) for texts in candidates]
            if self.catalogue.is_asked(task):
                ends = [max(end, self.catalogue.trie(task.ends[0]).depth + 1) for end in ends]
            few = self._written(task)
            limit = self._room(task, answers) + (2 * self._limit(task) if task.is_reasoned else 0)
            lengths += [
                len(row) + max(end, limit if place < few else 0) for place, (row, end) in enumerate(zip(rows, ends))
            ]
        return min(max(lengths) + 1, tokens.context or sys.maxsize)

    def _adapter(self, engine: Any, adapter: Adapter, tasks: list[Task]) -> Iterator[System]:
        given = self._given(adapter, [*tasks, *self.held.values()])
        what = METHODS[adapter.method]
        text = f"{what} of this run" if adapter.is_main else f"{what} from {adapter.folder}"
        yield self._ask(engine, tasks, adapter.name, "adapter", text, adapter.method, given, True)
        for control in chosen_controls(self.recipe.evaluate.controls, adapter):
            neutral = self.gates.uniform if adapter.method == "ilora" and self.gates else 0.0
            changed = control_rows(control, given, neutral, tasks, self.recipe.seed)
            if changed is None:
                self.notes.append(f"No {control} control: all examples are of one user, so there is none to swap.")
                continue
            name, text = f"{adapter.name}_{control}", CONTROLS[adapter.method][control]
            yield self._ask(engine, tasks, name, "control", text, adapter.method, changed, False)

    def _given(self, adapter: Adapter, tasks: list[Task]) -> dict[str, npt.NDArray[np.float32]]:
        """What an adapter takes beside tokens, by task: gate weights, representations, or nothing of a plain LoRA."""
        if adapter.method == "lora":
            return {}
        states = self._represent(adapter, tasks)
        if adapter.method == "soft_token":
            return states
        gates = _weigh(adapter, states)
        if adapter.is_main:
            self.gates = gates
        return gates.weights

    def _ask(
        self,
        engine: Any,
        tasks: list[Task],
        name: str,
        kind: str,
        description: str,
        method: str | None,
        given: dict[str, npt.NDArray[np.float32]],
        generate: bool,
    ) -> System:
        started = time.monotonic()

        def rows(task: Task) -> dict[str, npt.NDArray[np.float32]]:
            return {_GIVEN_AS[method]: given[task.name]} if given and method else {}

        predictions = {task.name: self._predict(engine, task, name, rows(task), generate) for task in tasks}
        for task, held in self.held.items():
            if kind != "control" and (not given or held.name in given):  # a control shows the gate: no temperature
                scores = self._scores(engine, held, f"{name}: {held.name}", rows(held))[0]
                fit = fit_temperature(scores, held.right_column)
                predictions[task] = predictions[task]._replace(calibration=fit)
        return System(name, kind, description, predictions, time.monotonic() - started, method)

    def _predict(
        self, engine: Any, task: Task, name: str, given: dict[str, npt.NDArray[np.float32]], generate: bool
    ) -> Prediction:
        answers, label = task.answer_texts(self.dataset.titles), f"{name}: {task.name}"
        scores, rationales = self._scores(engine, task, label, given)
        nats = -scores[np.arange(len(scores)), task.right_column]
        if self.recipe.protocol.decoding.score == "mean":
            nats = nats * engine.num_tokens([[row[right]] for row, right in zip(answers, task.right_column)])[:, 0]
        full = self.catalogue.full_ranks(engine, task, label, given)
        prediction = Prediction(scores, nats=nats, rationales=rationales)
        if full is not None:
            prediction = prediction._replace(full_rank=full.ranks, beam=full.beam, top=full.top)
        if not task.is_written and (not generate or not _generated(task)):
            return prediction
        prompts = _behind(task.prompts, rationales)
        written = self._generate(engine, task, prompts, _generated(task), label, given, self._schema(task))
        prediction = prediction._replace(generations=written)
        if self._schema(task) is not None and generate:
            free = self._generate(engine, task, prompts, MAX_GENERATIONS, label, given, None)
            prediction = prediction._replace(free=free)
        if self.explanations is None or not task.is_explained:
            return prediction
        return prediction._replace(verdicts=self.explanations.verdicts(task, written))

    def _scores(
        self, engine: Any, task: Task, label: str, given: dict[str, npt.NDArray[np.float32]]
    ) -> tuple[npt.NDArray[np.float64], list[tuple[str, bool]] | None]:
        """Log-likelihoods of the answers (N, C), and of tasks with a rationale what was written before each of them.

        Such an answer stands behind the rationale that the system itself writes, which ends at its newline; one that
        was cut off is ended there.
        """
        rationales = None
        if task.is_reasoned:
            made = engine.generate(
                task.prompts,
                max_new_tokens=self._limit(task),
                listed=[True] * len(task.prompts),
                progress=f"{label}, rationales",
                **given,
            )
            rationales = [(one.text, one.finished) for one in made]
        at_once = {"one_forward": True} if task.is_closed and getattr(engine, "share_prompts", False) else {}
        scores = engine.score(
            _behind(task.prompts, rationales),
            task.answer_texts(self.dataset.titles),
            length_normalised=self.recipe.protocol.decoding.score == "mean",
            progress=label,
            **at_once,
            **given,
        )
        return scores, rationales

    def _generate(
        self,
        engine: Any,
        task: Task,
        prompts: Sequence[Any],
        count: int,
        label: str,
        given: dict[str, npt.NDArray[np.float32]],
        schema: Mapping[str, Any] | None,
    ) -> list[tuple[str, bool]]:
        """Answers to the first `count` prompts, under a JSON schema where there is one."""
        few = slice(0, count)
        made = engine.generate(
            prompts[few],
            max_new_tokens=self._limit(task),
            listed=[end == "\n" for end in task.ends[few]],
            progress=f"{label}, generating",
            **({} if schema is None else {"json_schema": schema}),
            **{argument: rows[few] for argument, rows in given.items()},
        )
        return [(one.text, one.finished) for one in made]

    def _schema(self, task: Task) -> dict[str, Any] | None:
        """What answers of a task are held to, if anything."""
        if task.events is None or not self.recipe.protocol.decoding.constrained:
            return None
        return task.events.json_schema

    def _written(self, task: Task) -> int:
        """How many of a task's prompts something is written behind: an answer, or a rationale before it."""
        if task.is_reasoned:
            return len(task.prompts)
        return 0 if any(task is held for held in self.held.values()) else _generated(task)

    def _room(self, task: Task, answers: Sequence[Sequence[str]]) -> int:
        """Tokens of what may be generated behind a prompt: a free answer, and a rationale before the longest answer."""
        if not task.is_reasoned:
            return self._limit(task)
        longest = max(map(max, self.engines.tokens.num_tokens(answers).tolist()), default=0)
        return self._limit(task) + max(longest, self._limit(task)) + 1  # the newline between them

    def _limit(self, task: Task) -> int:
        """Tokens of a free answer."""
        return NEW_TOKENS if task.is_explained else self.recipe.protocol.decoding.max_new_tokens

    def _represent(self, adapter: Adapter, tasks: list[Task]) -> dict[str, npt.NDArray[np.float32]]:
        """(N, D) by task: what the adapter's encoder says of the history that each example's gate reads.

        Each different history is encoded once, whatever the number of examples, controls and generations that read it.
        """
        import torch

        from recllm.model.adapter import ENCODER
        from recllm.model.sequence_encoder import encode_histories, load_encoder

        encoder, _ = load_encoder(adapter.folder / ENCODER)
        longest = int(self.dataset.manifest["history_max_items"])
        pairs = [pair for task in tasks for pair in zip(task.users.tolist(), task.examples.gate_end.tolist())]
        histories = [self.dataset.read(user, end, longest) for user, end in pairs]
        device = "cuda" if torch.cuda.is_available() and self.recipe.evaluate.engine == "transformers" else "cpu"
        states = encode_histories(encoder, histories, device=device).numpy()
        ends = np.cumsum([len(task.users) for task in tasks])[:-1]
        return {task.name: part for task, part in zip(tasks, np.split(states, ends), strict=True)}


def _generated(task: Task) -> int:
    """How many of a task's examples are also answered freely: some titles, some actions, all that is judged as text."""
    if task.is_written:
        return len(task.prompts)
    return MAX_GENERATIONS if task.kind == NEXT_ITEM or task.is_action else 0


def _behind(prompts: list[Any], rationales: Sequence[tuple[str, bool]] | None) -> list[Any]:
    """Prompts whose answers have begun with the rationales, or as they are."""
    from recllm.infer.tokens import continued

    return prompts if rationales is None else continued(prompts, [text for text, _ in rationales])


def _weigh(adapter: Adapter, states: dict[str, npt.NDArray[np.float32]]) -> Gates:
    """The gate weights of representations, by task."""
    from recllm.model.user_gate import UserGate

    own = UserGate.load(adapter.folder)
    weights = {task: own.weigh(rows) for task, rows in states.items()}
    return Gates(adapter.name, own.gate.gate_type, own.gate.uniform, weights, states)


def check_adapter_folder(folder: Path) -> None:
    """Refuse what is no adapter.

    Raises:
        UserError: no folder, or no adapter_config.json in it.
    """
    if not (folder / "adapter_config.json").is_file():
        raise UserError(f"{folder} holds no adapter_config.json: a folder written by `recllm train` is expected")


def method_of(folder: Path) -> str:
    """The method of an adapter's folder, by its files."""
    return next((name for name in ("ilora", "soft_token") if (folder / f"{name}.json").is_file()), "lora")


def chosen_controls(asked: Sequence[str] | None, adapter: Adapter) -> list[str]:
    """Controls of the run's own adapter: those asked for that its method has; None asks for all."""
    possible = CONTROLS[adapter.method] if adapter.is_main else {}
    return [name for name in possible if asked is None or name in asked]


def control_notes(asked: Sequence[str] | None, adapter: Adapter) -> list[str]:
    """A sentence for each control that was asked for and does not go with the run's adapter."""
    reasons = {
        ("ilora", "without_token"): "an instance-wise LoRA has no soft token, its gate is switched off by uniform",
        ("soft_token", "uniform"): "a soft token has no gate, it is switched off by without_token",
    }
    return [
        f"No {name} control: {reasons.get((adapter.method, name), 'a plain LoRA is the same for every user')}."
        for name in dict.fromkeys(asked or [])
        if adapter.is_main and name not in CONTROLS[adapter.method]
    ]


def control_rows(
    control: str, given: dict[str, npt.NDArray[np.float32]], neutral: float, tasks: list[Task], seed: int
) -> dict[str, npt.NDArray[np.float32]] | None:
    """Gate weights or representations of a control, by task; None where it cannot be made (nobody to swap with).

    `neutral` is what switches them off: the uniform weight of a gate, zero for a representation.
    """
    if control != "shuffled":
        return {task.name: np.full_like(given[task.name], neutral) for task in tasks}
    changed = {}
    for task in tasks:
        rows = swapped_rows(task.examples.user_index, np.random.default_rng([seed, 1]))
        if rows is None:
            return None
        changed[task.name] = given[task.name][rows]
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


def by_expert(weights: npt.NDArray) -> npt.NDArray:
    """(N, K) of gate weights: as they are, or the mean over layers of (N, layers, K)."""
    return weights if weights.ndim == 2 else weights.mean(axis=1)


def strongest_experts(weights: npt.NDArray) -> npt.NDArray[np.int64]:
    """The expert with the largest weight of each row of (N, K); -1, no expert, where all weigh the same.

    >>> strongest_experts(np.array([[0.1, 0.9], [0.5, 0.5]])).tolist()
    [1, -1]
    """
    return np.where(np.ptp(weights, axis=1) > 0, weights.argmax(axis=1), -1)


def gates_table(gates: Gates, tasks: list[Task]) -> pa.Table:
    """gates.parquet: example_id, user_index, weights, strongest expert (-1: none); x, y: the representation by PCA.

    With one gate a layer `weights` is the mean over layers, and layer_weights holds a list a layer.
    """
    rows = np.concatenate([gates.weights[task.name] for task in tasks])
    weights = by_expert(rows)
    x, y = principal_components(np.concatenate([gates.representations[task.name] for task in tasks]))
    columns = {
        "example_id": pa.array([name for task in tasks for name in task.examples.example_ids]),
        "user_index": pa.array(np.concatenate([task.examples.user_index for task in tasks]), pa.int32()),
        "weights": pa.array(list(weights), pa.list_(pa.float32())),
        "x": x,
        "y": y,
        "strongest": pa.array(strongest_experts(weights), pa.int32()),
    }
    if rows.ndim == 3:
        columns["layer_weights"] = pa.array(rows.tolist(), pa.list_(pa.list_(pa.float32())))
    return pa.table(columns)


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
