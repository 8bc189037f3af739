"""Baselines of actions on made-up logs, with probabilities worked out by hand."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recllm.convert.targets import Sequences
from recllm.data.dataset import Dataset
from recllm.errors import UserError
from recllm.evaluate import action_baselines as ab
from recllm.evaluate.action_baselines import Asked, Log, Training
from recllm.recipe import TaskSection
from recllm.schema import TEST, TRAIN, UNUSED

LABELS = ["view", "cart", "buy"]
VIEW, CART, BUY = range(3)


def make_log(users: list[list[tuple]]) -> Log:
    """Users with events (session, action, split, item, timestamp); item and time may be left out."""
    events = [[(*event, -1, 0)[:5] if len(event) == 3 else (*event, 0)[:5] for event in user] for user in users]
    flat = [event for user in events for event in user]
    actions = np.array([event[1] for event in flat], np.int64)
    offsets = np.concatenate([[0], np.cumsum([len(user) for user in events])])
    sequences = Sequences(
        offsets=offsets,
        items=np.array([event[3] for event in flat], np.int32),
        timestamps=np.array([event[4] for event in flat], np.int64),
        splits=np.array([event[2] for event in flat], np.int8),
        actions=pa.array([LABELS[action] for action in actions]),
        user_index=np.arange(len(users), dtype=np.int32),
        user_key=np.arange(len(users), dtype=np.uint64),
        user_id=pa.array([f"u{user}" for user in range(len(users))]),
        sessions=np.array([event[0] for event in flat], np.int32),
    )
    return Log(sequences, actions, LABELS)


def section(task: str, **more) -> TaskSection:
    return TaskSection(task=task, template="t", **more)


def ask(log: Log, *flat: int) -> Asked:
    places = np.array(flat)
    return Asked(places, np.searchsorted(log.sequences.offsets, places, side="right") - 1)


# Sessions: view view cart | view buy || view cart (test) || view view view
LOG = make_log(
    [
        [(0, VIEW, TRAIN), (0, VIEW, TRAIN), (0, CART, TRAIN), (1, VIEW, TRAIN), (1, BUY, TRAIN)],
        [(0, VIEW, TEST), (0, CART, TEST)],
        [(0, VIEW, TRAIN), (0, VIEW, TRAIN), (0, VIEW, TRAIN)],
    ]
)
NEXT = ab.training_of(LOG, section("next_action"), LABELS)


def test_training_asks_about_all_but_the_first_event_of_each_session_of_training():
    assert NEXT.asked.flat.tolist() == [1, 2, 4, 8, 9]
    assert NEXT.asked.user.tolist() == [0, 0, 0, 2, 2]
    assert NEXT.label.tolist() == [VIEW, CART, BUY, VIEW, VIEW]


def test_more_training_targets_than_the_model_is_given():
    few = ab.training_of(LOG, section("next_action", max_train_targets=1), LABELS)
    assert few.asked.flat.tolist() == NEXT.asked.flat.tolist()


def test_constant_is_the_share_of_training_with_one_more_of_each():
    found = ab.constant(NEXT)(ask(LOG, 6, 1))
    assert found.tolist() == [[(3 + 1) / (5 + 3), (1 + 1) / (5 + 3), (1 + 1) / (5 + 3)]] * 2


def test_a_users_most_frequent_action():
    share = np.array([4, 2, 2]) / 8
    found = ab.most_frequent_of(ab.of_user, NEXT)(ask(LOG, 2, 6, 9))
    assert found[0] == pytest.approx((np.array([1, 1, 1]) + share) / (3 + 1))
    assert found[0].argmax() == VIEW  # all once: the more frequent overall
    assert found[1] == pytest.approx(share)  # a user without training
    assert found[2] == pytest.approx((np.array([2, 0, 0]) + share) / (2 + 1))


def test_no_share_outweighs_a_count():
    training = Training(Asked(np.arange(101), np.array([0] * 100 + [1])), np.array([0] * 100 + [1]), 2)
    assert ab.most_frequent_of(ab.of_user, training)(Asked(np.array([0]), np.array([1]))).argmax() == 1


def test_the_last_action_again():
    found = ab.last_action(LOG, NEXT, section("next_action"))(ask(LOG, 2, 4, 6, 3))
    assert found[:3].tolist() == [[1, 0, 0], [1, 0, 0], [1, 0, 0]]
    assert found[3] == pytest.approx(np.array([4, 2, 2]) / 8)  # the first of its session


def test_a_markov_chain_within_sessions():
    share = np.array([4, 2, 2]) / 8
    found = ab.markov(LOG, NEXT, section("next_action"))(ask(LOG, 6, 3))
    assert found[0] == pytest.approx((np.array([3, 1, 1]) + share) / (5 + 1))  # after view: all five of training
    assert found[1] == pytest.approx(share)  # nothing before, in the session
    after_cart = ab.markov(LOG, NEXT, section("next_action"))(Asked(np.array([4]), np.array([0])))
    assert after_cart[0] == pytest.approx(found[0])  # the cart of the session before does not count


# One user, whose first session ends in a search (of no item), and whose second one is asked about. SEARCH has no item
SEARCHED = ["view", "cart", "buy", "search"]
SEARCH = 3


def on_items(splits: tuple[int, int] = (TRAIN, TRAIN)) -> Log:
    """view 4, cart 4, search | search, view 5, cart 5, and a user whose first event with an item is a view."""
    first, second = splits
    log = make_log(
        [
            [
                (0, VIEW, first, 4),
                (0, CART, first, 4),
                (0, VIEW, first),  # a search, see below
                (1, VIEW, second),
                (1, VIEW, second, 5),
                (1, CART, second, 5),
            ],
            [(0, VIEW, TRAIN), (0, VIEW, TRAIN, 6), (0, BUY, TRAIN, 6)],
        ]
    )
    actions = log.actions.copy()
    actions[[2, 3, 6]] = SEARCH
    return Log(log.sequences, actions, SEARCHED)


def test_what_comes_before_an_action_on_an_item_is_on_an_item_of_any_session():
    log = on_items()
    asked = ask(log, 0, 1, 4, 5, 7, 8)
    assert ab.action_before(log, asked, section("action_on_item")).tolist() == [-1, VIEW, CART, VIEW, -1, VIEW]
    within = section("action_on_item", within_session=True)
    assert ab.action_before(log, asked, within).tolist() == [-1, VIEW, -1, VIEW, -1, VIEW]
    assert ab.action_before(log, ask(log, 2, 4), section("next_action")).tolist() == [CART, SEARCH]


def test_the_last_action_on_an_item_again():
    log, task = on_items(), section("action_on_item")
    training = ab.training_of(log, task, SEARCHED)
    assert training.asked.flat.tolist() == [1, 4, 5, 8]  # with an item, and one before
    found = ab.last_action(log, training, task)(ask(log, 4, 7))
    assert found[0].tolist() == [0, 1, 0, 0]  # the cart, though a search came after it
    assert found[1] == pytest.approx(np.array([1 + 1, 2 + 1, 1 + 1, 0 + 1]) / (4 + 4))  # nothing with an item before


def test_a_markov_chain_over_actions_on_items():
    """view → cart twice and view → buy once, cart → view over the searches and the end of a session."""
    log, task = on_items(), section("action_on_item")
    training = ab.training_of(log, task, SEARCHED)
    share = np.array([1 + 1, 2 + 1, 1 + 1, 0 + 1]) / (4 + 4)
    found = ab.markov(log, training, task)(ask(log, 5, 4, 7))
    assert found[0] == pytest.approx((np.array([0, 2, 1, 0]) + share) / (3 + 1))
    assert found[1] == pytest.approx((np.array([1, 0, 0, 0]) + share) / (1 + 1))
    assert found[2] == pytest.approx(share)
    within = section("action_on_item", within_session=True)
    training = ab.training_of(log, within, SEARCHED)
    assert training.asked.flat.tolist() == [1, 5, 8]
    share = np.array([0 + 1, 2 + 1, 1 + 1, 0 + 1]) / (3 + 4)
    assert ab.markov(log, training, within)(ask(log, 4))[0] == pytest.approx(share)  # the first of its session


def test_actions_on_items_are_counted_in_training_alone():
    log, task = on_items((TRAIN, TEST)), section("action_on_item")
    training = ab.training_of(log, task, SEARCHED)
    assert training.asked.flat.tolist() == [1, 8]
    share = np.array([0 + 1, 1 + 1, 1 + 1, 0 + 1]) / (2 + 4)
    asked = ask(log, 4, 5)  # of test: after the cart of training, and after the view of test
    found = ab.markov(log, training, task)(asked)
    assert found[0] == pytest.approx(share)  # no step of training begins at a cart
    assert found[1] == pytest.approx((np.array([0, 1, 1, 0]) + share) / (2 + 1))
    assert ab.last_action(log, training, task)(asked).tolist() == [[0, 1, 0, 0], [1, 0, 0, 0]]


def test_the_chain_to_a_positive_action():
    """Of view, 3 steps go to view, 1 to cart, 1 to buy and 1 to the end; of cart 1 and of buy 1 to the end."""
    counts = np.array([[3, 1, 1, 1], [0, 0, 0, 1], [0, 0, 0, 1]])
    assert ab._steps(LOG).tolist() == counts.tolist()
    share = (counts.sum(axis=0) + 1) / (counts.sum() + 4)
    view, cart = (counts[0] + share) / (6 + 1), (counts[1] + share) / (1 + 1)
    # h_view = view·view h_view + view·cart h_cart + view·buy; the same of cart
    reach = np.linalg.solve([[1 - view[0], -view[1]], [-cart[0], 1 - cart[1]]], [view[2], cart[2]])
    # after a view, and the session is known to go on: to view, cart or buy
    chance = (view[0] * reach[0] + view[1] * reach[1] + view[2] * 1) / (1 - view[3])
    found = ab.markov_outcome(LOG, ["buy"], yes=0)(ask(LOG, 6))
    assert found[0] == pytest.approx([chance, 1 - chance])
    assert ab.markov_outcome(LOG, ["buy"], yes=1)(ask(LOG, 6))[0] == pytest.approx([1 - chance, chance])


def test_the_chain_agrees_with_playing_it():
    share = np.array([0.4, 0.2, 0.1, 0.3])
    rng, wins, asked = np.random.default_rng(0), 0, 0
    log = make_log([[(session, action, TRAIN) for session in range(300) for action in play(rng, share)]])
    chance = ab.markov_outcome(log, ["buy"], yes=0)(ask(log, 1))[0, 0]
    for _ in range(20_000):
        session = play(rng, share)
        asked += len(session) > 1  # as of those that are asked about
        wins += BUY in session
    assert chance == pytest.approx(wins / asked, abs=0.05)
    assert chance == pytest.approx(0.1 / (0.1 + 0.3) * 0.6 / 0.7 + 0.1 / 0.7, abs=0.05)  # h = 1/4 of view and cart


def play(rng: np.random.Generator, share: np.ndarray) -> list[int]:
    """A session: a view, then whatever comes, until it ends or somebody buys."""
    found = [VIEW]
    while (step := rng.choice(4, p=share)) < 3:
        found.append(int(step))
        if step == BUY:
            break
    return found


def test_sessions_that_are_partly_held_out_give_no_step():
    log = make_log([[(0, VIEW, TRAIN), (0, CART, UNUSED)], [(0, VIEW, TRAIN), (0, BUY, TRAIN)]])
    assert ab._steps(log).tolist() == [[0, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 1]]


def test_outcome_asks_once_a_session():
    log = make_log([[(0, VIEW, TRAIN), (0, VIEW, TRAIN), (0, BUY, TRAIN)], [(0, VIEW, TRAIN), (0, VIEW, TRAIN)]])
    found = ab.training_of(log, section("outcome", positive=["buy"], after=1), ["yes", "no"])
    assert found.asked.flat.tolist() == [1, 4]
    assert found.label.tolist() == [0, 1]


TIMED = make_log(
    [
        [
            (0, VIEW, TRAIN, 4, 3600 * 5),
            (0, CART, TRAIN, 4, 3600 * 5 + 10),
            (0, VIEW, TRAIN, 7, 3600 * 5 + 40),
            (1, VIEW, TRAIN, 4, 3600 * 9),
            (1, BUY, TRAIN, 4, 3600 * 9 + 5),
        ]
    ]
)


def test_features_are_of_the_session_and_of_what_was_before():
    table, categories = ab.features(TIMED, ask(TIMED, 2, 4, 0), within_session=True)
    nan = np.nan
    # counts of view, cart, buy; last three actions; number, last pause, mean pause, hour, position
    expected = [
        [1, 1, 0, CART, VIEW, nan, 2, 10, 10, 5, 2],
        [1, 0, 0, VIEW, nan, nan, 1, nan, nan, 9, 4],
        [0, 0, 0, nan, nan, nan, 0, nan, nan, nan, 0],
    ]
    np.testing.assert_array_equal(table, expected)
    assert np.flatnonzero(categories).tolist() == [3, 4, 5]
    of_user, _ = ab.features(TIMED, ask(TIMED, 4), within_session=False)
    np.testing.assert_array_equal(of_user[0, :7], [3, 1, 0, VIEW, VIEW, CART, 4])
    assert of_user[0, 8] == pytest.approx((3600 * 9 - 3600 * 5) / (4 - 1))


def test_what_is_observed_of_the_event_that_is_asked_about_is_a_category():
    log = TIMED._replace(observed={"device": np.array([0, 1, -1, 2, 0]), "page": np.array([5, 5, 5, 5, 6])})
    table, categories = ab.features(log, ask(log, 1, 2, 4), within_session=True)
    np.testing.assert_array_equal(table[:, -2:], [[1, 5], [np.nan, 5], [0, 6]])
    assert np.flatnonzero(categories).tolist() == [3, 4, 5, 11, 12]
    np.testing.assert_array_equal(table[:, :-2], ab.features(TIMED, ask(TIMED, 1, 2, 4), True)[0])


def test_rare_values_are_one_category_and_so_is_what_training_lacks():
    often = [f"v{place:03}" for place in range(ab.MAX_CATEGORIES - 1)]
    texts = [pa.array(often), pa.array(often), pa.array(["rare", "", "rarer", "new"])]
    in_training = np.array([True] * (2 * len(often) + 3) + [False])
    found = ab.categories(texts, in_training)
    assert found[: len(often)].tolist() == list(range(254))  # as often: in the order of the log
    assert found[-4:].tolist() == [254, -1, 254, 254]


def test_what_is_blank_and_what_training_lacks_altogether():
    assert ab.categories([pa.array(["z", None, "", "a", "a"])], np.ones(5, bool)).tolist() == [1, -1, -1, 0, 0]
    assert ab.categories([pa.array(["z", None])], np.zeros(2, bool)).tolist() == [0, -1]
    with pytest.raises(ValueError, match="1 texts of 2 positions"):
        ab.categories([pa.array(["z"])], np.ones(2, bool))


def test_no_more_than_what_is_observed_is_read_of_a_log_and_that_in_batches(tmp_path, monkeypatch):
    """6,000 users of two events each with a page of 2,000 characters, all different: 24 MB of text."""
    users, page = 6000, "x" * 2000
    lists = {
        "items": [[-1, -1]] * users,
        "timestamps": [[1, 2]] * users,
        "splits": [[TRAIN, TRAIN]] * users,
        "actions": [["view", "buy"]] * users,
        "sessions": [[0, 0]] * users,
        "attribute:page": [[f"{user} {page}", f"{user} {page}"] for user in range(users)],
        "attribute:device": [["phone", "desk" if user % 3 else ""] for user in range(users)],
    }
    types = {"items": pa.int32(), "splits": pa.int8(), "sessions": pa.int32()}
    columns = {name: pa.array(of, pa.list_(types[name])) if name in types else of for name, of in lists.items()}
    numbers = {"user_index": pa.array(range(users), pa.int32()), "user_key": pa.array(range(users), pa.uint64())}
    table = pa.table(numbers | {"user_id": [f"u{user}" for user in range(users)]} | columns)
    pq.write_table(table, tmp_path / "sequences.parquet", row_group_size=500)
    read = []
    for name in ("read", "iter_batches"):
        monkeypatch.setattr(pq.ParquetFile, name, _seen(getattr(pq.ParquetFile, name), read))

    def log_of(observed: list[str]) -> Log:
        read.clear()
        manifest = {
            "events": True,
            "actions": {"labels": ["view", "buy"], "words": ["view", "buy"]},
            "recipe": {"actions": {"observed": observed}},
        }
        return Log.of(Dataset(tmp_path, manifest, pa.table({"item_id": pa.array([], pa.string())})))

    log = log_of(["device"])
    assert log.observed["device"][:6].tolist() == [0, -1, 0, 1, 0, 1]
    assert "attribute:device" in read
    assert "attribute:page" not in read
    assert log.sequences.actions[:2].to_pylist() == ["view", "buy"]
    before = pa.total_allocated_bytes()
    dataset_batches = Dataset(tmp_path, {}, pa.table({})).attribute_batches("page")
    largest = max(pa.total_allocated_bytes() - before for _ in dataset_batches)
    assert largest < users * 2 * len(page) / 4
    assert (log_of(["page"]).observed["page"][: 2 * 254] == np.repeat(np.arange(254), 2)).all()
    with pytest.raises(UserError, match='no column "attribute:colour"'):
        log_of(["colour"])


def _seen(method, read: list[str]):
    def call(self, *args, **kwargs):
        read.extend(kwargs["columns"])
        return method(self, *args, **kwargs)

    return call


def test_boosted_trees_see_what_is_observed():
    """Nothing before an event says what it is, its device does."""
    pytest.importorskip("sklearn")
    draw = np.random.default_rng(0)
    log = make_log([[(session, int(draw.integers(3)), TRAIN) for session in range(80) for _ in range(4)]])
    log = log._replace(observed={"device": (log.actions + 1) % 3})
    training = ab.training_of(log, section("next_action"), LABELS)
    found = ab.boosted_trees(log, training, section("next_action"), seed=0)(training.asked)
    assert (found.argmax(axis=1) == training.label).all()


def test_boosted_trees_take_more_actions_than_they_have_bins():
    """300 actions, of which the last two take turns: as categories these would be refused."""
    pytest.importorskip("sklearn")
    labels = [f"a{place}" for place in range(300)]
    log = make_log([[(session, VIEW, TRAIN) for session in range(10) for _ in range(3)]])
    log = Log(log.sequences, np.arange(30) % 2 + 298, labels)
    assert not ab.features(log, ask(log, 1), True)[1].any()
    training = ab.training_of(log, section("next_action"), labels)
    assert ab.boosted_trees(log, training, section("next_action"), seed=0)(ask(log, 1)).shape == (1, 300)


@pytest.mark.parametrize("within", [True, False])
def test_features_know_nothing_of_what_is_asked_or_comes_later(within):
    asked = ask(TIMED, 2)
    table, _ = ab.features(TIMED, asked, within)
    later = TIMED._replace(actions=np.array([VIEW, CART, BUY, BUY, CART]))
    later.sequences.timestamps[2:] += 999
    try:
        np.testing.assert_array_equal(ab.features(later, asked, within)[0], table)
    finally:
        later.sequences.timestamps[2:] -= 999


def test_sessions_that_interleave_are_kept_apart():
    log = make_log([[(0, VIEW, TRAIN), (1, BUY, TRAIN), (0, CART, TRAIN), (1, VIEW, TRAIN)]])
    assert ab.last_actions(log, ask(log, 2, 3), log.sequences.by_session).tolist() == [VIEW, BUY]
    assert ab.features(log, ask(log, 3), True)[0][0, :3].tolist() == [0, 0, 1]


def test_what_was_done_with_the_item_before():
    assert ab.item_features(TIMED, ask(TIMED, 0, 1, 2, 4)).tolist() == [[0, 0, 0], [1, 0, 0], [0, 0, 0], [2, 1, 0]]


def test_an_items_most_frequent_action():
    training = ab.training_of(TIMED, section("action_on_item"), LABELS)
    assert training.asked.flat.tolist() == [1, 2, 3, 4]  # with an item, and something before
    share = np.array([2 + 1, 1 + 1, 1 + 1]) / (4 + 3)
    found = ab.most_frequent_of(ab.of_item(TIMED), training)(ask(TIMED, 2))
    assert found[0] == pytest.approx((np.array([1, 0, 0]) + share) / (1 + 1))


def long_log(sessions: int) -> Log:
    """view, cart, buy, view, … in every session, so that two steps back say what comes next."""
    return make_log([[(session, step % 3, TRAIN) for session in range(sessions) for step in range(9)]])


@pytest.mark.parametrize("sessions", [40, 300])  # without and with early stopping
def test_boosted_trees_learn_what_hangs_on_the_past(sessions):
    pytest.importorskip("sklearn")
    log = long_log(sessions)
    training = ab.training_of(log, section("next_action"), LABELS)
    found = ab.boosted_trees(log, training, section("next_action"), seed=0)(training.asked)
    assert found.shape == (sessions * 8, 3)
    assert found.sum(axis=1) == pytest.approx(np.ones(len(found)))
    assert (found.argmax(axis=1) == training.label).all()
    again = ab.boosted_trees(log, training, section("next_action"), seed=0)(training.asked)
    assert np.array_equal(found, again)


def test_boosted_trees_of_sessions_of_two_events_do_without_pauses():
    """view view, view buy, by turns of the user's: no question has two events before it, so no pause has a value."""
    pytest.importorskip("sklearn")
    log = make_log([[(s, action, TRAIN) for s in range(40) for action in (VIEW, [VIEW, BUY][s % 2])]])
    training = ab.training_of(log, section("next_action"), LABELS)
    found = ab.boosted_trees(log, training, section("next_action"), seed=0)(training.asked)
    assert found[:, [VIEW, BUY]].sum(axis=1) == pytest.approx(np.ones(40), abs=1e-5)


def test_boosted_trees_leave_something_to_a_class_that_training_lacks():
    pytest.importorskip("sklearn")
    log = make_log([[(s, step % 2, TRAIN) for s in range(30) for step in range(6)]])
    training = ab.training_of(log, section("next_action"), LABELS)
    found = ab.boosted_trees(log, training, section("next_action"), seed=0)(training.asked)
    assert (found > 0).all()
    assert found[:, BUY].max() < 1e-5


def test_boosted_trees_of_one_class_are_the_constant():
    pytest.importorskip("sklearn")
    log = make_log([[(0, VIEW, TRAIN)] * 5])
    training = ab.training_of(log, section("next_action"), LABELS)
    found = ab.boosted_trees(log, training, section("next_action"), seed=0)(ask(log, 2))
    assert found.tolist() == ab.constant(training)(ask(log, 2)).tolist()


def test_boosted_trees_without_scikit_learn_say_what_to_install(monkeypatch):
    import sys

    from recllm.errors import UserError

    monkeypatch.setitem(sys.modules, "sklearn.ensemble", None)
    with pytest.raises(UserError, match=r"recllm\[actions\]"):
        ab.boosted_trees(LOG, NEXT, section("next_action"), seed=0)
