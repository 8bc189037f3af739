import numpy as np
import pyarrow as pa
import pytest

from recllm.data.dataset import Dataset
from recllm.errors import UserError
from recllm.evaluate.tasks import candidate_matrix, choose, load_tasks


def table(candidates, target=1):
    ids = [f"next_item/u/{n}" for n in range(len(candidates))]
    return pa.table(
        {
            "example_id": ids,
            "target": pa.array([target] * len(ids), pa.int32()),
            "candidates": pa.array(candidates, pa.list_(pa.int32())),
        }
    )


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (None, "next_item/u/1 has no candidates"),
        ([1, 1, 3], r"next_item/u/1: its target \(item_index 1\) is among the candidates 2 times"),
        ([2, 3, 4], r"next_item/u/1: its target .* 0 times, exactly once is expected"),
        ([1, 3, 3], "next_item/u/1: item_index 3 is among the candidates twice"),
        ([1, 3], "next_item/u/1 has 2 candidates, next_item/u/0 has 3"),
    ],
)
def test_broken_candidates_are_refused_by_example(second, message):
    with pytest.raises(UserError, match=message):
        candidate_matrix(table([[2, 1, 3], second]))


def test_sound_candidates_become_a_matrix():
    assert candidate_matrix(table([[2, 1, 3], [1, 5, 0]])).tolist() == [[2, 1, 3], [1, 5, 0]]


def test_the_choice_hangs_on_seed_and_user_only():
    keys = np.arange(100, dtype=np.uint64) // np.uint64(2)  # two examples a user
    chosen = choose(np.arange(100), keys, 10, seed=0)
    assert len(chosen) == 10
    assert (np.diff(chosen) > 0).all()
    assert len(np.unique(keys[chosen])) == 5  # whole users
    backwards = keys[::-1][choose(np.arange(100), keys[::-1], 10, seed=0)]
    assert set(backwards) == set(keys[chosen])
    assert set(choose(np.arange(100), keys, 10, seed=1)) != set(chosen)
    assert choose(np.arange(100), keys, None, seed=0).tolist() == list(range(100))


def test_tasks_of_a_dataset(made):
    dataset = Dataset.open(made.dataset)
    next_item, like = load_tasks(dataset, "test", 10, seed=0)
    assert (next_item.name, like.name) == ("next_item", "like")
    assert set(next_item.users) == set(like.users)  # one example a user: the same users in both
    assert next_item.available == 60
    answers = next_item.answer_texts(dataset.titles)
    columns = next_item.right_column
    assert [row[c] for row, c in zip(answers, columns)] == [f"{dataset.titles[t]}\n" for t in next_item.target]
    assert like.answer_texts(dataset.titles)[0] == ["Yes", "No"]
    numbers = [int(dataset.titles[t].removeprefix("Film ")) for t in like.target]
    expected = ["like" if number % 2 else "dislike" for number in numbers]
    assert [like.labels[c] for c in like.right_column] == expected
