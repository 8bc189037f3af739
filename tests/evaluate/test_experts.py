"""Whom each expert serves: groups found, shares and lifts by hand, and a plain word where nothing differs."""

import numpy as np
import pyarrow as pa
import pytest

from recllm.data.dataset import Dataset
from recllm.errors import UserError
from recllm.evaluate import experts, reading
from recllm.evaluate.experts import Users, guess_separator, item_groups, thirds


def table(**columns):
    count = len(next(iter(columns.values())))
    return pa.table({"item_index": range(count), "item_id": ["i"] * count, "title": ["t"] * count, **columns})


FILMS = ["Action|Comedy", "Action", "Comedy", "Drama|Action", "Drama", "", "Comedy", "Drama|Comedy"]


def test_an_attribute_with_several_values_is_guessed_before_others():
    years = [str(1990 + n % 3) for n in range(8)]  # numbers are no groups
    unique = [f"a {n}" for n in range(8)]
    found = item_groups(table(year=years, colour=["red", "blue"] * 4, genres=FILMS, unique=unique), None)
    assert (found.column, found.separator, found.guessed) == ("genres", "|", True)
    assert found.names == ["Action", "Comedy", "Drama"]
    assert found.members.sum(axis=0).tolist() == [3, 4, 3]
    assert found.members[5].sum() == 0


def test_without_a_fitting_attribute_nothing_is_guessed():
    assert item_groups(table(year=["1990"] * 8, unique=[f"a{n}" for n in range(8)]), None) is None
    assert item_groups(table(genres=FILMS), "") is None


@pytest.mark.parametrize(
    ("asked", "separator", "names"),
    [
        ("tags", ",", ["a b", "c"]),
        ("tags by ,", ",", ["a b", "c"]),
        ("tags by space", " ", ["a", "b", "b,c", "c", "c,a"]),
    ],
)
def test_a_named_attribute_is_split_as_asked(asked, separator, names):
    found = item_groups(table(tags=["a b", "c", "a b,c", "c,a b"]), asked)
    assert (found.separator, found.names, found.guessed) == (separator, names, False)


def test_an_attribute_that_is_not_there_is_refused_with_those_that_are():
    with pytest.raises(UserError, match='called "tags", attributes there: genres'):
        item_groups(table(genres=FILMS), "tags by |")
    with pytest.raises(UserError, match="has 1 values"):
        item_groups(table(genres=["x"] * 8), "genres")


def test_lists_are_several_values():
    assert item_groups(table(genres=[["A", "B"], ["A"], ["B"], ["A"]]), "genres by |").names == ["A", "B"]


def test_a_separator_must_leave_fewer_parts_than_values():
    assert guess_separator(["Film Noir", "Science Fiction", "Drama"]) == ""
    assert guess_separator(["A;B", "A", "B", "B;A"]) == ";"


def test_thirds_never_part_equal_values():
    names, order = thirds(np.array([0.0] * 5 + [1, 2, 3]), str)
    assert len({*names[:5]}) == 1
    assert set(names) <= set(order)


def summarised(made, weights, **changes):
    dataset = Dataset.open(made.dataset)
    groups = experts.load_groups(made.recipe, dataset)._replace(**changes)
    users = np.arange(dataset.sequences.num_users)
    ends = np.diff(dataset.sequences.offsets) - 1
    return experts.summarise("ilora", weights, users, ends, ends, dataset, groups, made.recipe)


def test_users_of_whom_the_gate_has_read_nothing_do_not_count(made):
    """They would have a share of 0 in every genre and uniform gates: a lift of all genres at once."""
    dataset = Dataset.open(made.dataset)
    groups = experts.load_groups(made.recipe, dataset)
    count = dataset.sequences.num_users
    users, ends = np.arange(count), np.diff(dataset.sequences.offsets) - 1
    unread = users % 2 == 0
    weights = np.where(unread[:, None], 0.5, np.array([[0.9, 0.1]]))
    gate_ends = np.where(unread, 0, ends)
    found = experts.summarise("ilora", weights, users, ends, gate_ends, dataset, groups, made.recipe)
    assert found["num_users"] == count - unread.sum()
    for mine in found["parts"]:
        for group in mine["groups"]:
            assert [lift["value"] for lift in group["lifts"]] == pytest.approx([1.0, 1.0])
    nobody = np.zeros(count, dtype=np.int64)
    assert experts.summarise("ilora", weights, users, ends, nobody, dataset, groups, made.recipe) is None


def part(found, name):
    (mine,) = [part for part in found["parts"] if part["name"] == name]
    return {group["name"]: group for group in mine["groups"]}


def test_lifts_are_weighted_shares_over_shares_of_all(made):
    dataset = Dataset.open(made.dataset)
    num_users = dataset.sequences.num_users
    weights = np.random.default_rng(0).dirichlet([1, 1], size=num_users)
    found = summarised(made, weights)
    shares = np.zeros(num_users)
    for user, length in enumerate(np.diff(dataset.sequences.offsets)):
        texts = [dataset.items["genres"][int(item)].as_py() for item in dataset.history(user, int(length) - 1, 200)]
        shares[user] = np.mean(["Comedy" in text for text in texts])
    comedy = part(found, "genres")["Comedy"]
    assert comedy["share"] == pytest.approx(shares.mean())
    for expert in (0, 1):
        expected = weights[:, expert] @ shares / weights[:, expert].sum() / shares.mean()
        lift = comedy["lifts"][expert]
        assert lift["value"] == pytest.approx(expected)
        assert lift["low"] < expected < lift["high"]


def test_an_expert_of_one_gender_is_told_and_an_even_gate_tells_nothing(made):
    ids = Dataset.open(made.dataset).sequences.user_ids.to_pylist()
    women = np.array([int(name[1:]) % 2 == 1 for name in ids], dtype=float)
    found = summarised(made, np.stack([0.1 + 0.8 * women, 0.9 - 0.8 * women], axis=1))
    lifts = part(found, "gender")
    assert lifts["F"]["share"] == women.mean()
    assert lifts["F"]["lifts"][0]["value"] == pytest.approx(0.9 / 0.5)
    text = " ".join(sentence.text for sentence in reading.about_experts(found))
    assert "Expert 1 serves 0.20 times" in text
    assert 'users with gender "F"' in text
    (sentence,) = reading.about_experts(summarised(made, np.full((len(ids), 2), 0.5)))
    assert sentence.text.startswith("Nothing distinguishes the experts")


def test_each_user_counts_once_at_their_last_example():
    rows = experts.last_examples(np.array([1, 1, 0, 1]), np.array([3, 9, 2, 5]))
    assert rows.tolist() == [2, 1]


def test_user_groups_cover_every_user_once(made):
    dataset = Dataset.open(made.dataset)
    ends = np.diff(dataset.sequences.offsets) - 1
    users = Users(np.arange(len(ends)), ends, ends)
    parts = list(experts.user_parts(dataset, users, {"gender": ["M", "F"] * (len(ends) // 2)}))
    assert {"history length", "gender"} <= {part.name for part in parts}
    for mine in parts:
        assert (mine.shares.sum(axis=1) == 1).all(), mine.name


def test_attributes_that_cannot_be_read_are_a_note_and_no_error(made):
    users = made.recipe.data.users.model_copy(update={"path": "nowhere.csv"})
    data = made.recipe.data.model_copy(update={"users": users})
    groups = experts.load_groups(made.recipe.model_copy(update={"data": data}), Dataset.open(made.dataset))
    assert groups.attributes == {}
    assert "attributes of data.users were not read" in groups.notes[0]


def test_one_expert_has_nobody_to_differ_from(made):
    assert summarised(made, np.ones((60, 1))) is None
