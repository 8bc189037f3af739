"""Metrics of financial recommendation: hits of FLARKO's task, and the rankings of Conv-FinRe.

Answers as text, labels and utilities enter; one value an example leaves (N,), as in `metrics`. N examples, A
assets, C candidates of a ranking, L entries of the longest answer.

An answer is read strictly (`read_answers`): the whole text is one JSON list, and an entry is an asset only if it equals
an id or a name. An unfinished or unparsable answer is a miss and stays in the denominator; the shares of both are
reported beside every figure. Imports without torch.

Sources. FLARKO and RAG-FLARKO (Spadea & Seneviratne 2025, arXiv 2511.11583): Pref@3, Prof@3 and Comb@3, after the
README and the evaluation of github.com/brains-group/FLARKO. That code looks for ids as substrings, counts an id
anywhere in an answer without a list as first place, and leaves unfinished answers out unless they hit. None of that is
done here, so figures do not compare one to one. Conv-FinRe (Wang et al. 2026, arXiv 2602.16990), after its released
calibration (The-FinAI/Conv-FinRe) and evaluation (Yan2266336/FinBen, task ConvFinRe); the paper's text was not at hand.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from recllm.data.finance_utility import Views, finite
from recllm.evaluate import metrics

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Booleans = NDArray[np.bool_]

UNKNOWN = -1  # an entry of an answer that is no asset, or one that stood there before
_THOUGHT, _THINKING = "</think>", "<think>"


# ---- reading answers ----


@dataclass(frozen=True)
class Answers:
    """What N answers recommend, best first."""

    assets: Integers  # (N, L) asset numbers; UNKNOWN for other entries and behind the last
    lengths: Integers  # (N,) entries, the unknown ones included; 0 where nothing could be read
    json_valid: Booleans  # (N,) finished, and of the form asked for
    finished: Booleans  # (N,) the model ended by itself


def vocabulary(ids: Sequence[str], names: Sequence[str]) -> dict[str, int]:
    """Which text means which asset: ids, and the names that only one asset has. An id beats a name.

    >>> vocabulary(["GR1", "GR2", "GR3"], ["Bond", "Bond", "GR1"])
    {'GR1': 0, 'GR2': 1, 'GR3': 2}
    """
    owners: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        owners.setdefault(name.strip(), []).append(index)
    unique = {name: indices[0] for name, indices in owners.items() if name and len(indices) == 1}
    return unique | {text.strip(): index for index, text in enumerate(ids)}


def read_answers(
    texts: Sequence[str], finished: Sequence[bool], assets: Mapping[str, int], key: str | None = None
) -> Answers:
    """Read answers that are a JSON list of ids or names or, with `key`, a JSON object of that one key with such a list.

    What precedes the last "</think>" is no part of an answer, and one that is still thinking is not finished. Blanks
    around the answer and around an entry do not matter; any other text beside the JSON makes it unparsable. An entry
    that names no asset keeps its place and hits nothing, and so does an asset that the list named before.

    >>> read_answers(['["GR1", "GR", "GR1"]', "GR1"], [True, True], {"GR1": 0}).assets.tolist()
    [[0, -1, -1], [-1, -1, -1]]
    """
    ended = [bool(end) and _THINKING not in text.rpartition(_THOUGHT)[2] for text, end in zip(texts, finished)]
    lists = [_entries(text, key) if end else None for text, end in zip(texts, ended)]
    longest = max((len(entries) for entries in lists if entries), default=0)
    found = np.full((len(lists), longest), UNKNOWN, dtype=np.int64)
    for row, entries in zip(found, lists):
        seen: set[int] = set()
        for place, number in enumerate(assets.get(entry, UNKNOWN) for entry in entries or ()):
            row[place] = UNKNOWN if number in seen else number
            seen.add(number)
    return Answers(
        assets=found,
        lengths=np.array([len(entries or ()) for entries in lists], dtype=np.int64),
        json_valid=np.array([entries is not None for entries in lists], dtype=bool),
        finished=np.array(ended, dtype=bool),
    )


def _entries(text: str, key: str | None) -> list[str] | None:
    """The texts of the list; None for anything else. A number stands for its digits."""
    try:
        value = json.loads(text.rpartition(_THOUGHT)[2], object_pairs_hook=_pairs)
    except (ValueError, RecursionError):
        return None
    if key is not None:
        if not isinstance(value, _Object) or [name for name, _ in value.pairs] != [key]:
            return None
        value = value.pairs[0][1]
    if not isinstance(value, list) or not all(isinstance(entry, str | int) for entry in value):
        return None
    return None if any(isinstance(entry, bool) for entry in value) else [str(entry).strip() for entry in value]


class _Object(NamedTuple):
    """A JSON object that still knows when a key stands in it twice."""

    pairs: list[tuple[str, Any]]


def _pairs(pairs: list[tuple[str, Any]]) -> _Object:
    return _Object(pairs)


# ---- hits against preference, profit and both ----


def hits(answers: Answers, relevant: Booleans, k: int) -> Floats:
    """hits@k: 1 where one of the first k entries is a relevant asset, else 0 (FLARKO's Hits@3; relevant (N, A)).

    Entries stand in the order of the answer, so there are no ties. 0 for an unfinished or unparsable answer, for an
    empty list, and where nothing is relevant (`attainable`).

    >>> answers = read_answers(['["b", "a"]', "[]"], [True, True], {"a": 0, "b": 1})
    >>> [hits(answers, np.array([[True, False]] * 2), k).tolist() for k in (1, 2)]
    [[0.0, 0.0], [1.0, 0.0]]
    """
    if k < 1:
        raise ValueError(f"k is {k}: at least 1 is expected")
    first = answers.assets[:, :k]
    rows = np.arange(len(first))[:, None]
    found: Booleans = ((first != UNKNOWN) & relevant[rows, first]).any(axis=1)
    return found.astype(np.float64)


def attainable(relevant: Booleans) -> Floats:
    """1 where some asset is relevant: its mean is the highest mean that hits@k can reach.

    >>> attainable(np.array([[False, True], [False, False]])).tolist()
    [1.0, 0.0]
    """
    return (relevant.sum(axis=1) > 0).astype(np.float64)


def chance(relevant: Booleans, k: int, offered: Booleans | None = None) -> Floats:
    """Expected hits@k of k different assets drawn uniformly: 1 − C(A − R, k) / C(A, k) with R relevant of A assets.

    offered (N, A): only these are drawn from. Profit needs it beside it: in a rising market most assets are hits.

    >>> chance(np.array([[True, True, False, False]]), 2).tolist() == [1 - (2 / 4) * (1 / 3)]
    True
    """
    offered = np.ones_like(relevant) if offered is None else offered
    pool, good = offered.sum(axis=1), (offered & relevant).sum(axis=1)
    miss = np.ones(len(pool))
    for drawn in range(k):
        miss *= np.maximum(pool - good - drawn, 0) / np.maximum(pool - drawn, 1)
    return np.where(good > 0, 1 - miss, 0.0)


def recommendation(answers: Answers, labels: Mapping[str, Booleans], cutoffs: Sequence[int]) -> dict[str, Floats]:
    """All figures of FLARKO's task, by name; each (N,). labels: preference, profit, both, each (N, A).

    `unknown_share` is the share of an answer's entries that are no asset or repeat one (0 of an empty list).

    >>> answers = read_answers(['["a"]', "no"], [True, False], {"a": 0})
    >>> table = recommendation(answers, {"profit": np.ones((2, 1), bool)}, [3])
    >>> {name: float(values.mean()) for name, values in table.items()}["hits@3/profit"]
    0.5
    """
    table = {f"hits@{k}/{name}": hits(answers, relevant, k) for name, relevant in labels.items() for k in cutoffs}
    table |= {f"attainable/{name}": attainable(relevant) for name, relevant in labels.items()}
    unknown = answers.lengths - (answers.assets != UNKNOWN).sum(axis=1)
    return table | {
        "valid_ratio": metrics.valid_ratio(answers.json_valid),
        "finished": answers.finished.astype(np.float64),
        "unknown_share": unknown / np.maximum(answers.lengths, 1),
    }


# ---- rankings: Conv-FinRe ----


class Orders(NamedTuple):
    """Rankings of C candidates: which column stands at each place, best first."""

    columns: Integers  # (N, C); rows that are not valid hold 0, 1, 2, …
    valid: Booleans  # (N,) every candidate once, and nothing else


def orders(answers: Answers, candidates: Integers) -> Orders:
    """Answers as permutations of their candidates (N, C), different assets each; permutation validity of Conv-FinRe.

    >>> found = orders(read_answers(['["b", "a"]', '["b"]'], [True] * 2, {"a": 0, "b": 1}), np.array([[0, 1], [0, 1]]))
    >>> found.columns[0].tolist(), found.valid.tolist()
    ([1, 0], [True, False])
    """
    count, width = candidates.shape
    columns, valid = np.tile(np.arange(width), (count, 1)), answers.lengths == width
    if answers.assets.shape[1] >= width:
        same = answers.assets[:, :width, None] == candidates[:, None, :]  # (N, place, column)
        valid = valid & same.any(axis=2).all(axis=1)  # C entries, each a candidate; a repeated one is UNKNOWN
        columns[valid] = same[valid].argmax(axis=2)
    return Orders(columns, valid & (answers.lengths == width))


def choice_rank(order: Orders, chosen: Integers) -> Integers:
    """1-based place of the user's choice, a column (N,); `metrics.NO_RANK` where the ranking is not valid. Goes into
    `metrics.mrr` and `metrics.hit_rate`.

    >>> choice_rank(Orders(np.array([[2, 0, 1], [0, 1, 2]]), np.array([True, False])), np.array([0, 0])).tolist()
    [2, 0]
    """
    place = (order.columns == np.asarray(chosen)[:, None]).argmax(axis=1) + 1
    return np.where(order.valid, place, metrics.NO_RANK)


def utility_ndcg(order: Orders, utility: Floats, gain: Literal["rank", "utility"] = "rank") -> Floats:
    """uNDCG: Σ_p g(candidate at place p) / log2(1 + p), over that of the ideal order (Järvelin & Kekäläinen 2002).

    The gain g hangs on the utility (N, C) of the candidates:
    - "rank": C for the best, C − 1 for the second, … 1 for the last, as in Conv-FinRe's released evaluation; candidates
      of equal utility share the mean of their gains.
    - "utility": U − min U; summaries of the paper say that the utility itself is the relevance, and it may be negative.

    The published table gives random orders of ten 0.73. With gains 10…1 their expectation is 0.834: the table was made
    with another gain than the released code, which one could not be found out.

    Where all utilities are equal any ranking is ideal: 1. A ranking that is not valid: 0.

    >>> order = Orders(np.array([[1, 0]]), np.array([True]))
    >>> utility_ndcg(order, np.array([[5.0, 1.0]])).tolist() == [(1 + 2 / np.log2(3)) / (2 + 1 / np.log2(3))]
    True
    """
    gains = _gains(finite(utility), gain)
    found = _discounted(np.take_along_axis(gains, order.columns, axis=1))
    ideal = _discounted(-np.sort(-gains, axis=1))
    return np.where(order.valid, np.where(ideal > 0, found / np.where(ideal > 0, ideal, 1), 1.0), 0.0)


def _gains(utility: Floats, gain: str) -> Floats:
    return _rank_gains(utility) if gain == "rank" else utility - utility.min(axis=1, keepdims=True)


def _discounted(gains: Floats) -> Floats:
    """Σ_p gain at place p / log2(1 + p): (N, C) → (N,)."""
    discount: Floats = 1 / np.log2(2 + np.arange(gains.shape[1]))
    return gains @ discount


def _rank_gains(utility: Floats) -> Floats:
    """C … 1 by falling utility, ties share their mean: (worse + not better) / 2 + 1/2."""
    worse = (utility[:, :, None] > utility[:, None, :]).sum(axis=2)
    not_better = (utility[:, :, None] >= utility[:, None, :]).sum(axis=2)
    return (worse + not_better + 1) / 2


def kendall_tau(order: Orders, scores: Floats) -> Floats:
    """Kendall's τ of a ranking against scores (N, C): (concordant − discordant) / (C (C − 1) / 2) (Kendall 1938, τ_a).

    Pairs of equal scores are neither, which without ties is Conv-FinRe's 1 − 2 · discordant / pairs. 0 for a single
    candidate and, as in the released evaluation, where the ranking is not valid: read it beside permutation_valid.

    >>> order = Orders(np.array([[0, 1, 2]]), np.array([True]))
    >>> kendall_tau(order, np.array([[3.0, 1.0, 2.0]])).tolist() == [(2 - 1) / 3]
    True
    """
    scores = finite(scores)
    ranked = np.take_along_axis(scores, order.columns, axis=1)
    first, second = np.triu_indices(scores.shape[1], 1)
    signs = np.sign(ranked[:, first] - ranked[:, second]).sum(axis=1)
    return np.where(order.valid, signs / max(1, len(first)), 0.0)


def ranking(
    answers: Answers, candidates: Integers, chosen: Integers, seen: Views, cutoffs: Sequence[int] = (1, 3)
) -> dict[str, Floats]:
    """All figures of Conv-FinRe, by name; each (N,). chosen (N,): column of the user's choice among candidates (N, C).

    >>> answers = read_answers(['{"final_rank": ["a", "b"]}'], [True], {"a": 0, "b": 1}, key="final_rank")
    >>> flat = np.zeros((1, 2))
    >>> table = ranking(answers, np.array([[0, 1]]), np.array([1]), Views(flat, flat, flat))
    >>> table["mrr"].tolist(), table["permutation_valid"].tolist()
    ([0.5], [1.0])
    """
    order = orders(answers, candidates)
    rank = choice_rank(order, chosen)
    table = {
        "undcg/rank": utility_ndcg(order, seen.utility, "rank"),
        "undcg/utility": utility_ndcg(order, seen.utility, "utility"),
        "mrr": metrics.mrr(rank),
    }
    table |= {f"hit_rate@{k}": metrics.hit_rate(rank, k) for k in cutoffs}
    table |= {f"tau/{name}": kendall_tau(order, scores) for name, scores in seen._asdict().items()}
    return table | {
        "json_valid": answers.json_valid.astype(np.float64),
        "permutation_valid": order.valid.astype(np.float64),
        "finished": answers.finished.astype(np.float64),
    }


def expected_ranking(seen: Views, cutoffs: Sequence[int] = (1, 3)) -> dict[str, Floats]:
    """What `ranking` gives on average over all orders of the C candidates; each (N,).

    undcg: (Σ gains / C) · Σ_p 1 / log2(1 + p) over that of the ideal order; mrr: (1 + 1/2 + … + 1/C) / C; hit_rate@k:
    k / C; each τ: 0.

    >>> table = expected_ranking(Views(*np.array([[[2.0, 1.0]]] * 3)), [1])
    >>> table["undcg/rank"].tolist() == [(3 / 2) * (1 + 1 / np.log2(3)) / (2 + 1 / np.log2(3))]
    True
    >>> table["mrr"].tolist(), table["hit_rate@1"].tolist(), table["tau/utility"].tolist()
    ([0.75], [0.5], [0.0])
    """
    count, width = seen.utility.shape
    places = np.arange(1, width + 1)
    table = {}
    for name in ("rank", "utility"):
        gains = _gains(finite(seen.utility), name)
        ideal = _discounted(-np.sort(-gains, axis=1))
        found = gains.mean(axis=1) * _discounted(np.ones((count, width)))
        table[f"undcg/{name}"] = np.where(ideal > 0, found / np.where(ideal > 0, ideal, 1), 1.0)
    table["mrr"] = np.full(count, float((1 / places).mean()))
    table |= {f"hit_rate@{k}": np.full(count, min(k, width) / width) for k in cutoffs}
    return table | {f"tau/{name}": np.zeros(count) for name in Views._fields}
