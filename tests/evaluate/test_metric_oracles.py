"""Our metrics against ranx and pytrec_eval on random rankings without ties, which the oracles break at will."""

import numpy as np
import pytest

from recllm.evaluate import metrics

N, C = 200, 30


@pytest.fixture(scope="module")
def rankings():
    rng = np.random.default_rng(0)
    scores = rng.permuted(np.tile(np.arange(C) / 7 + 1, (N, 1)), axis=1)  # no ties
    return scores, rng.integers(C, size=N)


def as_run(scores, target):
    qrels = {f"q{i}": {f"d{column}": 1} for i, column in enumerate(target)}
    return qrels, {f"q{i}": {f"d{c}": float(s) for c, s in enumerate(row)} for i, row in enumerate(scores)}


def test_pytrec_eval_agrees(rankings):
    pytrec_eval = pytest.importorskip("pytrec_eval")
    scores, target = rankings
    qrels, run = as_run(scores, target)
    wanted = {"ndcg_cut.5", "ndcg_cut.10", "recall.5", "recall.10", "recip_rank"}
    found = pytrec_eval.RelevanceEvaluator(qrels, wanted).evaluate(run)
    rank = metrics.ranks(scores, target)
    for k in (5, 10):
        assert metrics.hit_rate(rank, k) == pytest.approx([found[f"q{i}"][f"recall_{k}"] for i in range(N)])
        assert metrics.ndcg(rank, k) == pytest.approx([found[f"q{i}"][f"ndcg_cut_{k}"] for i in range(N)])
    assert metrics.mrr(rank) == pytest.approx([found[f"q{i}"]["recip_rank"] for i in range(N)])


def test_ranx_agrees(rankings):
    ranx = pytest.importorskip("ranx")
    scores, target = rankings
    qrels, run = as_run(scores, target)
    names = ["hit_rate@1", "hit_rate@5", "ndcg@5", "ndcg@10", "mrr@5", "mrr"]
    found = ranx.evaluate(ranx.Qrels(qrels), ranx.Run(run), names)
    ours = metrics.ranking(metrics.ranks(scores, target), np.ones(N, bool), [1, 5, 10])
    for name in names:
        assert np.mean(ours[name]) == pytest.approx(found[name]), name
