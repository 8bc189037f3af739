"""Metrics of financial recommendation: hits of FLARKO's task, and the rankings and utilities of Conv-FinRe.

Answers as text, labels and price features enter; one value an example leaves (N,), as in `metrics`. N examples, A
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
from scipy.optimize import minimize

from recllm.evaluate import metrics

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Booleans = NDArray[np.bool_]

UNKNOWN = -1  # an entry of an answer that is no asset, or one that stood there before
PENALTY, LARGEST_TASTE = 0.01, 20.0  # of Conv-FinRe's fit
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


# ---- rankings: Conv-FinRe, a library: no task of a recipe asks for them yet ----


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
    utility = _finite(utility)
    gains = _rank_gains(utility) if gain == "rank" else utility - utility.min(axis=1, keepdims=True)
    discount = 1 / np.log2(2 + np.arange(utility.shape[1]))
    found = np.take_along_axis(gains, order.columns, axis=1) @ discount
    ideal = -np.sort(-gains, axis=1) @ discount
    return np.where(order.valid, np.where(ideal > 0, found / np.where(ideal > 0, ideal, 1), 1.0), 0.0)


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
    scores = _finite(scores)
    ranked = np.take_along_axis(scores, order.columns, axis=1)
    first, second = np.triu_indices(scores.shape[1], 1)
    signs = np.sign(ranked[:, first] - ranked[:, second]).sum(axis=1)
    return np.where(order.valid, signs / max(1, len(first)), 0.0)


# ---- utilities ----


class Views(NamedTuple):
    """What three advisers think of C candidates: scores (N, C), higher is better."""

    utility: Floats
    momentum: Floats
    safety: Floats


class Taste(NamedTuple):
    """What a user's choices say of risk: U = z(μ) − λ z(σ²) − γ z(drawdown)."""

    variance: float  # λ
    drawdown: float  # γ


def standardise(values: Floats) -> Floats:
    """z of each row of (N, C): (x − mean) / population deviation; 0 where a row is constant.

    >>> standardise(np.array([[1.0, 3.0], [2.0, 2.0]])).tolist()
    [[-1.0, 1.0], [0.0, 0.0]]
    """
    values = _finite(values)
    centred = values - values.mean(axis=1, keepdims=True)
    widest = np.abs(centred).max(axis=1, keepdims=True)
    flat = widest <= 1e-12 * np.abs(values).max(axis=1, keepdims=True)
    scaled = np.where(flat, 0.0, centred / np.where(flat, 1.0, widest))  # first, for squares of tiny numbers are 0
    return scaled / np.where(flat, 1.0, scaled.std(axis=1, keepdims=True))


def views(mean: Floats, variance: Floats, drawdown: Floats, tastes: Sequence[Taste]) -> Views:
    """The three orders of Conv-FinRe, from features (N, C) of prices before the cut-off and each example's taste (N).

    utility = z(μ) − λ z(σ²) − γ z(drawdown); momentum = μ; safety = −(λ z(σ²) + γ z(drawdown)), the same risk terms. A
    user whose λ and γ are both 0 fears nothing: all are equally safe.

    >>> one = views(*np.array([[[1.0, 3.0]], [[2.0, 4.0]], [[0.0, 0.0]]]), [Taste(0.5, 1.0)])
    >>> one.utility.tolist(), one.safety.tolist()
    ([[-0.5, 0.5]], [[0.5, -0.5]])
    """
    lam, gamma = np.array(tastes, dtype=np.float64).reshape(-1, 2).T[:, :, None]  # (N, 1) each
    safety = -(lam * standardise(variance) + gamma * standardise(drawdown))
    return Views(standardise(mean) + safety, _finite(mean), safety)


def fit_taste(mean: Floats, variance: Floats, drawdown: Floats, chosen: Integers) -> Taste:
    """λ and γ of one user from T choices among C candidates: features (T, C), chosen columns (T,).

    Minimises −Σ_t log softmax(U_t)[chosen_t] + 0.01 (λ² + γ²) within 0 ≤ λ, γ ≤ 20 by L-BFGS-B from (1, 1): a
    multinomial logit on standardised features, as in Conv-FinRe's released calibration. The objective is strictly
    convex: the minimum is one, and no generator has a part in it. Without choices both are 0.

    The released calibration reads the very choices that are scored afterwards. Give this the choices before an
    example's cut-off, or say that the utility is fitted in hindsight.

    >>> steady = np.array([[0.0, 0.0]] * 9), np.array([[1.0, 2.0]] * 9), np.array([[0.0, 0.0]] * 9)
    >>> taste = fit_taste(*steady, np.zeros(9, int))
    >>> taste.variance > 1, round(taste.drawdown, 6)
    (True, 0.0)
    """
    if not len(chosen):
        return Taste(0.0, 0.0)
    base = standardise(mean)
    risks = np.stack([standardise(variance), standardise(drawdown)])  # (2, T, C)
    rows, chosen = np.arange(len(chosen)), np.asarray(chosen)

    def loss(taste: Floats) -> tuple[float, Floats]:
        utility = base - np.tensordot(taste, risks, 1)
        shifted = utility - utility.max(axis=1, keepdims=True)
        total = np.exp(shifted).sum(axis=1, keepdims=True)
        share = np.exp(shifted) / total
        gradient = (risks[:, rows, chosen] - (share * risks).sum(axis=2)).sum(axis=1) + 2 * PENALTY * taste
        nats = float((np.log(total[:, 0]) - shifted[rows, chosen]).sum())
        return nats + PENALTY * float(taste @ taste), gradient

    options = {"ftol": 1e-14, "gtol": 1e-9, "maxiter": 1000}
    found = minimize(loss, np.ones(2), jac=True, method="L-BFGS-B", bounds=[(0.0, LARGEST_TASTE)] * 2, options=options)
    return Taste(float(found.x[0]), float(found.x[1]))


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


def _finite(values: Floats) -> Floats:
    values = np.asarray(values, dtype=np.float64)
    if not np.isfinite(values).all():
        raise ValueError("a candidate has no price features (NaN): candidates need prices before the cut-off")
    return values
