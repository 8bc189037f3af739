"""Requests whose gates cannot be applied, of every kind, for `engines.py`; hypothesis strategies.

The adapter "ad" takes 4 numbers that sum to 1, "sigmoid" 8 of at most 1, "plain" and the base model none.
"""

import base64
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from hypothesis import strategies as st

from recllm.infer.vllm_plugin import gated_lora_request
from recllm.infer.vllm_plugin.gates import FACTORS, NAME_TAG

GOOD = [0.5, 0.25, 0.125, 0.125]
HUGE = 10**400  # no float


class Bad(NamedTuple):
    """A request: its adapter, what it sends, and what becomes of its LoRA before it is sent."""

    kind: str
    adapter: str | None
    extra_args: Any
    lora: Callable[[Any], Any] = lambda lora: lora


def is_gate(value: Any) -> bool:
    """Whether "ad" takes it."""
    if not isinstance(value, (list, tuple)) or len(value) != 4:
        return False
    if any(isinstance(number, bool) or not isinstance(number, (int, float)) for number in value):
        return False
    if any(isinstance(number, int) and abs(number) > 1 for number in value):
        return False
    return all(math.isfinite(number) and number >= 0 for number in value) and abs(sum(value) - 1) <= 1e-3


scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.binary(), st.complex_numbers(), st.just(HUGE)
)
no_numbers = st.one_of(st.none(), st.booleans(), st.text(), st.binary(), st.lists(st.floats(), max_size=2), st.just({}))
no_weights = st.one_of(no_numbers, st.floats(max_value=-1e-9), st.sampled_from([math.nan, math.inf, HUGE, -HUGE, -1]))
junk = st.recursive(
    scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner, inner)
)
gates = st.permutations(GOOD)


def spoilt(gate: list[float], place: int, value: Any) -> list[Any]:
    """A gate with one value in place of a number."""
    return [*gate[:place], value, *gate[place + 1 :]]


def bad_values() -> st.SearchStrategy[tuple[str, Any]]:
    """What "ad" cannot take as its gate, with the kind."""
    few = st.lists(st.floats(0, 1), max_size=3) | st.lists(st.floats(0, 1), min_size=5, max_size=40)
    long = st.integers(1000, 200_000).map(lambda count: [0.25] * count)
    off = st.lists(st.floats(0, 1e300), min_size=4, max_size=4).filter(lambda value: not is_gate(value))
    return st.one_of(
        few.map(lambda value: ("length", value)),
        long.map(lambda value: ("long", value)),
        off.map(lambda value: ("sum", value)),
        st.builds(spoilt, gates, st.integers(0, 3), no_weights).map(lambda value: ("number", value)),
        scalars.map(lambda value: ("no list", value)),
        junk.filter(lambda value: not is_gate(value)).map(lambda value: ("junk", value)),
        st.lists(gates, min_size=1, max_size=5).map(lambda value: ("nested", value)),
    )


def _named(value: Any) -> Callable[[Any], Any]:
    return lambda lora: gated_lora_request(lora, value)


def _tagged(coded: str) -> Callable[[Any], Any]:
    def damaged(lora: Any) -> Any:
        lora.lora_name += f"{NAME_TAG}{coded}"
        return lora

    return damaged


def requests() -> st.SearchStrategy[Bad]:
    """Requests that must all be refused."""
    values = bad_values()
    text = st.text().filter(lambda value: "|" not in value)
    no_gate = st.sampled_from(["plain", None])
    factors = st.one_of(st.just([1, b"\0\0\x80\x3f" * 8]), junk)
    return st.one_of(
        values.map(lambda kind_value: Bad(kind_value[0], "ad", {"gate_weights": kind_value[1]})),
        values.map(lambda kind_value: Bad(f"{kind_value[0]}, by name", "ad", None, _named(kind_value[1]))),
        text.map(lambda coded: Bad("damaged name", "ad", None, _tagged(coded))),
        text.map(
            lambda said: Bad("no gate in the name", "ad", None, _tagged(base64.b64encode(said.encode()).decode()))
        ),
        st.builds(lambda name, gate: Bad(f"gate for {name}", name, {"gate_weights": gate}), no_gate, gates),
        gates.map(lambda gate: Bad("gate for plain, by name", "plain", None, _named(gate))),
        st.builds(
            lambda name, gate: Bad("null", name, {"gate_weights": None}), st.sampled_from(["ad", "plain", None]), gates
        ),
        factors.map(lambda value: Bad("internal key", "ad", {FACTORS: value})),
        st.builds(
            lambda value, gate: Bad("internal key", "ad", {FACTORS: value, "gate_weights": gate}), factors, gates
        ),
        st.builds(lambda a, b: Bad("two gates", "ad", {"gate_weights": a}, _named(b)), gates, gates),
        st.lists(st.floats(1.01, 1e300), min_size=8, max_size=8).map(
            lambda v: Bad("above 1", "sigmoid", {"gate_weights": v})
        ),
        junk.filter(bool).filter(lambda v: not isinstance(v, dict)).map(lambda v: Bad("extra_args", "ad", v)),
    )


def _deep() -> Any:
    value: Any = 1.0
    for _ in range(50_000):
        value = [value]
    return value


EXTREMES = [
    Bad("deep", "ad", {"gate_weights": _deep()}),
    Bad("deep", "ad", {"gate_weights": [_deep(), 0, 0, 0]}),
    Bad("deep, by name", "ad", None, _named(_deep())),
    Bad("deep, by name", "ad", None, _tagged(base64.b64encode(b"[" * 100_000).decode())),
    Bad("huge number", "ad", {"gate_weights": [10**5000, 0, 0, 0]}),
    Bad("huge number", "ad", {"gate_weights": 10**5000}),
    Bad("huge number, by name", "ad", None, _named([10**5000, 0, 0, 0])),
    Bad("long", "ad", {"gate_weights": [0.25] * 1_000_000}),
    Bad("long text", "ad", {"gate_weights": "0.25, " * 1_000_000}),
    Bad("object", "ad", {"gate_weights": object()}),
    Bad("object, by name", "ad", None, _named(object())),
    Bad("set", "ad", {"gate_weights": {0.5, 0.25}}),
    Bad("gate for layered", "layered", {"gate_weights": [[0.25] * 4] * 2}),
]
