from types import SimpleNamespace

import numpy as np
import pytest

from recllm.data.dataset import Dataset
from recllm.errors import UserError
from recllm.evaluate import baselines, metrics
from recllm.evaluate.baselines import Examples
from recllm.schema import TEST, TRAIN, UNUSED, VALID


def dataset_of(users, num_items):
    """users: one list of (item, split code) each."""
    flat = [pair for user in users for pair in user]
    sequences = SimpleNamespace(
        offsets=np.cumsum([0, *map(len, users)]),
        items=np.array([item for item, _ in flat], dtype=np.int32),
        splits=np.array([split for _, split in flat], dtype=np.int8),
        num_users=len(users),
    )

    def history(user, end, max_items):
        start = sequences.offsets[user]
        return sequences.items[max(start, start + end - max_items) : start + end]

    return SimpleNamespace(sequences=sequences, num_items=num_items, history=history)


def examples(*pairs):
    users, ends = (np.array(column, dtype=np.int32) for column in zip(*pairs))
    return Examples([f"next_item/{user}/{end}" for user, end in pairs], users, ends, ends)


@pytest.fixture
def small():
    # user 0 trains on 0 1 0 1 2 and is tested on 3; user 1 trains on 0 1 and has the rest held out
    return dataset_of(
        [
            [(0, TRAIN), (1, TRAIN), (0, TRAIN), (1, TRAIN), (2, TRAIN), (3, TEST)],
            [(0, TRAIN), (1, TRAIN), (4, VALID), (3, UNUSED), (4, TEST)],
            [(2, UNUSED), (3, TEST), (2, UNUSED)],
        ],
        num_items=6,
    )


def test_only_training_is_counted(small):
    read = baselines.training_interactions(small)
    assert read.tolist() == [True] * 5 + [False] + [True] * 2 + [False] * 3 + [False] * 3
    assert baselines.item_counts(small).tolist() == [3, 3, 1, 0, 0, 0]


def test_the_rest_of_a_held_out_session_is_no_training_though_training_follows():
    # a session split of one user: session 0 1, held-out session 2 3 with one target, session 4
    held = dataset_of([[(0, TRAIN), (1, TRAIN), (2, UNUSED), (3, TEST), (2, UNUSED), (4, TRAIN)]], num_items=5)
    assert baselines.training_interactions(held).tolist() == [True, True, False, False, False, True]


def test_popularity_is_the_training_count_for_everybody(small):
    scores = baselines.popularity(small)(examples((0, 5), (2, 1)))
    assert scores.tolist() == [[3, 3, 1, 0, 0, 0]] * 2


def test_item_to_item_by_hand(small):
    scores = baselines.item_to_item(small, window=2)(examples((0, 2)))  # history 0 1
    count = np.array([3, 3, 1, 0, 0, 0])
    steps = {(0, 1): 1 + 1 + 1, (1, 0): 1, (1, 2): 1 + 1 / 2 * 0, (0, 2): 1 / 2}  # one or two steps apart, j ≠ i

    def cosine(i, j):
        return steps.get((i, j), 0) / np.sqrt(count[i] * max(count[j], 1))

    expected = [cosine(1, j) + 1 / 2 * cosine(0, j) + 1e-6 * count[j] / count.sum() for j in range(6)]
    assert scores[0] == pytest.approx(expected, abs=1e-12)


def test_item_to_item_without_history_is_popularity(small):
    scores = baselines.item_to_item(small)(examples((2, 0)))
    assert np.argsort(-scores[0], kind="stable")[:3].tolist() == [0, 1, 2]


def test_random_hangs_on_seed_example_and_item_only(small):
    many = baselines.random(small, 0)(examples((0, 5), (1, 2), (2, 1)))
    assert (baselines.random(small, 0)(examples((2, 1)))[0] == many[2]).all()
    assert (baselines.random(small, 1)(examples((2, 1)))[0] != many[2]).all()
    assert len(np.unique(many)) == many.size


def test_candidates_and_full_ranks_agree_with_the_matrix(small, monkeypatch):
    wanted = examples((0, 5), (1, 2), (2, 1))
    score = baselines.random(small, 0)
    matrix, candidates = score(wanted), np.array([[1, 3], [4, 0], [5, 3]])
    monkeypatch.setattr(baselines, "_CHUNK", 7)  # one example a chunk
    target, asked = np.array([3, 4, 3]), []

    def counted(part):
        asked.extend(part.example_ids)
        return score(part)

    found, ranks, _ = baselines.score_examples(counted, small, wanted, candidates, target, True, False)
    assert (found == np.take_along_axis(matrix, candidates, 1)).all()
    assert ranks.tolist() == metrics.ranks(matrix, target).tolist()
    assert asked == wanted.example_ids  # the catalogue is scored once for both
    assert baselines.score_examples(score, small, wanted, candidates, target, False, False)[1] is None


def test_the_history_is_not_ranked_but_a_repeated_target_is(small):
    def ranks(target, exclude_history):
        given = (examples((0, 5)), np.array([[3]]), np.array([target]), True, exclude_history)  # history 0 1 0 1 2
        return baselines.score_examples(baselines.popularity(small), small, *given)[1].tolist()

    assert ranks(3, exclude_history=True) == [3]  # of 3 4 5, tied
    assert ranks(3, exclude_history=False) == [6]
    assert ranks(2, exclude_history=True) == [1]  # against 3 4 5, which nobody had


def test_constant_and_users_own_answers():
    labels, users = ["like", "dislike", "dislike", "dislike", "like"], [0, 0, 1, 1, 2]
    assert baselines.most_frequent_label(labels, ["like", "dislike"]) == "dislike"
    found = baselines.user_labels(labels, users, [0, 1, 2, 9], ["like", "dislike"])
    assert found == ["dislike", "dislike", "like", "dislike"]  # a tie and a stranger get the constant


def test_sasrec_scores_with_the_history_it_was_fitted_for(made):
    import torch

    from recllm.model.sequence_encoder import load_encoder

    dataset = Dataset.open(made.dataset)
    table = dataset.examples("test")
    wanted = Examples.of(table)
    name, score = baselines.sequence_encoder(dataset, made.encoder, batch_size=7)
    scores = score(wanted)
    assert name == "sasrec"
    encoder, _ = load_encoder(made.encoder)
    history = dataset.history(int(wanted.user_index[3]), int(wanted.history_end[3]), 20)
    with torch.no_grad():
        expected = encoder.scores(encoder(torch.tensor(history[None].astype(np.int64))))[0]
    assert scores[3] == pytest.approx(expected.numpy(), abs=1e-5)


def test_an_encoder_of_another_vocabulary_is_refused(made, tmp_path):
    from recllm.model.sequence_encoder import SASRec, save_encoder

    save_encoder(SASRec(40, 8, num_layers=1, num_heads=1), tmp_path / "other", "0" * 64, {})
    with pytest.raises(UserError, match=r"000000000000….*fit it again"):
        baselines.sequence_encoder(Dataset.open(made.dataset), tmp_path / "other")
