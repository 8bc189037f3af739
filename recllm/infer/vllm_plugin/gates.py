"""A request's gate: from what a client sends to the factors that the worker multiplies by.

Gate weights (a list of numbers) and the folder of the adapter that they are for enter; `Factors` leave, float32: what
the R activations between A and B are multiplied by, once for all decoder layers or once a layer. Everything that can
be wrong with a gate is found here, in the front end, before the engine hears of the request: the worker never raises.
Imports neither vLLM nor torch.
"""

import base64
import functools
import hashlib
import json
import math
import operator
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

GATE_WEIGHTS = "gate_weights"  # the key of a request's extra_args (HTTP: vllm_xargs)
FACTORS = "recllm_gate_factors"  # the key that the engine sees instead; a client may not send it
NAME_TAG = "|recllm-gate:"  # between a LoRA's name and a gate that rides in it
SUM_TOLERANCE = 1e-3  # of a softmax gate's weights, which sum to 1


class GateError(ValueError):
    """A gate that cannot be applied: value, expectation, next step."""


class Shape(NamedTuple):
    """What an adapter's gates look like."""

    gate_type: str  # softmax or sigmoid
    num_experts: int  # K; of a sigmoid R
    r: int
    layers: int | None  # decoder layers of a gate a layer, None of a shared one

    @property
    def rows(self) -> int:
        """Rows of factors: one, or one a layer."""
        return self.layers or 1


class Factors(NamedTuple):
    """Numbers of one gate, ready for the worker."""

    values: npt.NDArray[np.float32]  # (rows, R)

    def packed(self) -> list[Any]:
        """[rows, float32 bytes]: what travels to the engine."""
        return [len(self.values), self.values.astype("<f4").tobytes()]

    @property
    def digest(self) -> str:
        """Of the numbers: requests with equal ones may share keys and values, no others may."""
        return digest(self.packed())


# ---- what an adapter needs ----


def shape_of(folder: str | Path) -> Shape | None:
    """The shape of the gates of an adapter's folder; None of a plain LoRA.

    Raises:
        GateError: ilora.json is damaged.
    """
    place = Path(folder) / "ilora.json"
    try:
        stamp = place.stat().st_mtime_ns
    except OSError:
        return None
    return _read_shape(place, stamp)


def has_gate(folder: str | Path) -> bool:
    """Whether the folder holds an instance-wise adapter."""
    return (Path(folder) / "ilora.json").is_file()


@functools.lru_cache(maxsize=256)
def _read_shape(place: Path, _: int) -> Shape:
    try:
        document = json.loads(place.read_text(encoding="utf-8"))
        gate_type, num_experts, r = document.get("gate_type", "softmax"), document["num_experts"], document["r"]
        layers = None
        if document.get("gate_per_layer"):
            layers = json.loads((place.parent / "base_model.json").read_text(encoding="utf-8"))["num_hidden_layers"]
        shape = Shape(str(gate_type), int(num_experts), int(r), None if layers is None else int(layers))
        lora = json.loads((place.parent / "adapter_config.json").read_text(encoding="utf-8"))
        rank, trained = lora["r"], lora.get("target_modules") or ()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise GateError(f"{place} is damaged ({error!r}): copy the adapter's folder again") from None
    if not _is_shape(shape) or shape.r != rank:
        raise GateError(f"{place}: {shape} is no gate of a LoRA with r={_short(rank)}: copy the adapter's folder again")
    if any("lm_head" in name for name in ([trained] if isinstance(trained, str) else trained)):
        raise GateError(
            f"{place.parent} has a LoRA of lm_head, and vLLM has no place for a gate there: serve its users' exports, "
            "or train without it"
        )
    return shape


def _is_shape(shape: Shape) -> bool:
    if shape.num_experts < 1 or shape.r % shape.num_experts or shape.r < 1 or shape.rows < 1 or shape.layers == 0:
        return False
    return shape.gate_type == "softmax" or (shape.gate_type == "sigmoid" and shape.num_experts == shape.r)


# ---- from a request ----


def factors_of(weights: Any, shape: Shape) -> Factors:
    """Gate weights as a client sends them → factors.

    Of a shared gate K numbers; of a gate a layer one such list a layer, or all of them in one list (HTTP's vllm_xargs
    take no nested lists). A softmax's K weights sum to 1, a sigmoid's are within 0 … 1.

        softmax: K · repeat(g, R/K)      sigmoid: 2 · g, with K = R          (model/gate.py rank_factor)

    Raises:
        GateError: no list of finite non-negative numbers of the right length, or weights that are no gate's.
    """
    rows = np.array(_numbers(weights, shape), dtype=np.float64).reshape(shape.rows, shape.num_experts)
    if shape.gate_type == "sigmoid":
        if rows.max() > 1 + SUM_TOLERANCE:
            raise GateError(f"{GATE_WEIGHTS} holds {rows.max():g}, at most 1 is expected of a sigmoid gate's weights")
        return Factors((2 * rows).astype(np.float32))
    sums = rows.sum(axis=1)
    worst = int(np.abs(sums - 1).argmax())
    if abs(sums[worst] - 1) > SUM_TOLERANCE:
        where = f" of layer {worst}" if shape.layers else ""
        raise GateError(
            f"{GATE_WEIGHTS}{where} sum to {sums[worst]:g}, 1 is expected: send the gate as recllm gives it"
        )
    return Factors((shape.num_experts * np.repeat(rows, shape.r // shape.num_experts, axis=1)).astype(np.float32))


def _numbers(weights: Any, shape: Shape) -> list[float]:
    """The weights as one flat list of checked numbers, layer by layer."""
    expected = f"a list of {shape.num_experts} numbers"
    if shape.layers:
        expected = f"{shape.layers} lists of {shape.num_experts} numbers, or one list of all of them"
    if isinstance(weights, np.ndarray):
        weights = weights.tolist()
    if not isinstance(weights, (list, tuple)):
        raise GateError(f"{GATE_WEIGHTS} is {_short(weights)}, {expected} is expected")
    flat: Sequence[Any] = weights
    if shape.layers and weights and all(isinstance(row, (list, tuple)) for row in weights):
        if any(len(row) != shape.num_experts for row in weights):
            lengths = _short(sorted({len(row) for row in weights}))
            raise GateError(f"{GATE_WEIGHTS} has rows of {lengths} numbers, {expected} is expected")
        flat = [value for row in weights for value in row]
    wanted = shape.rows * shape.num_experts
    if len(flat) != wanted:
        raise GateError(f"{GATE_WEIGHTS} has {len(flat)} numbers, {expected} is expected for this adapter")
    return [_number(value) for value in flat]


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise GateError(f"{GATE_WEIGHTS} holds {_short(value)}, a number is expected")
    try:
        number = float(value) + 0.0  # -0.0 becomes 0.0: equal gates have one hash
    except OverflowError:  # an integer of hundreds of digits
        number = math.inf
    if not math.isfinite(number) or number < 0:
        raise GateError(f"{GATE_WEIGHTS} holds {_short(value)}, finite numbers of at least 0 are expected")
    return number


def _short(value: Any) -> str:
    try:
        text = reprlib.repr(value)  # of any depth and length
    except ValueError:  # an integer of thousands of digits
        text = f"a huge {type(value).__name__}"
    return text if len(text) <= 40 else f"{text[:40]}…"


# ---- in a LoRA's name ----


def name_with_gate(name: str, weights: Any) -> str:
    """A LoRA's name with the gate in it, for calls that drop a request's extra_args (vLLM's beam search).

    >>> split_name(name_with_gate("mine", [0.5, 0.25, 0.25]))
    ('mine', [0.5, 0.25, 0.25])

    Raises:
        GateError: what can be no gate. Numbers are checked as those of every request, where it is started.
    """
    try:
        text = json.dumps(weights, default=operator.methodcaller("tolist"))  # arrays and tensors within
    except (AttributeError, TypeError, ValueError, RecursionError):
        text = "null"
    if text == "null":
        raise GateError(f"{GATE_WEIGHTS} is {_short(weights)}, a list of numbers is expected")
    return f"{name}{NAME_TAG}{base64.urlsafe_b64encode(text.encode()).decode()}"


def split_name(name: str) -> tuple[str, Any]:
    """The LoRA's own name and the gate that rides in it; None where there is none.

    Raises:
        GateError: what stands behind the tag is no gate.
    """
    plain, tag, coded = name.partition(NAME_TAG)
    if not tag:
        return name, None
    try:
        weights = json.loads(base64.b64decode(coded.encode(), altchars=b"-_", validate=True))
    except (ValueError, RecursionError):
        weights = None
    if weights is None:
        raise GateError(f"the LoRA name {_short(name)} holds a damaged gate: make it with gated_lora_request")
    return plain, weights


# ---- in the engine ----


def packed_of(extra_args: Mapping[str, Any] | None) -> list[Any] | None:
    """What `Factors.packed` made, from a request's extra_args; None where the request has no gate."""
    return extra_args.get(FACTORS) if extra_args else None


def digest(packed: Sequence[Any]) -> str:
    """Of packed factors."""
    return hashlib.blake2b(bytes(packed[1]), digest_size=16, key=str(packed[0]).encode()).hexdigest()


def unpack(packed: Sequence[Any]) -> npt.NDArray[np.float32]:
    """(rows, R) of packed factors."""
    return np.frombuffer(packed[1], dtype="<f4").reshape(packed[0], -1)
