"""Figures of the tasks about actions, from made-up predictions, worked out by hand."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from recllm.convert.actions import write_answer
from recllm.evaluate import action_figures, action_metrics, figures
from recllm.evaluate.baselines import Examples
from recllm.evaluate.calibration import Fitted
from recllm.evaluate.language_model import System
from recllm.evaluate.next_events import NextEvents
from recllm.evaluate.tasks import Prediction, Task
from recllm.recipe import Protocol, TaskSection

LABELS, WORDS = ["view", "buy", "leave"], ["view", "buy", "leave the shop"]
VIEW, BUY, LEAVE = range(3)
PROTOCOL = Protocol.model_validate({"name": "p", "bootstrap": {"samples": 200}, "ranking": {"k": [1]}})


def make_task(right, sessions, users=None, kind="next_action", labels=LABELS, words=WORDS, events=None) -> Task:
    count = len(right)
    users = np.zeros(count, np.int32) if users is None else np.array(users, np.int32)
    ends = np.arange(1, count + 1, dtype=np.int32)
    return Task(
        name=kind,
        kind=kind,
        examples=Examples([f"{kind}/u/{n}" for n in range(count)], users, ends, ends),
        prompts=[[{"role": "user", "content": "?"}]] * count,
        target=np.full(count, -1),
        candidates=None,
        right_column=np.array(right) if events is None else np.zeros(count, np.int64),
        ends=[""] * count,
        labels=list(labels),
        words=list(words),
        available=count,
        choices=None if events is None else [[text] for text in events.right],
        section=TaskSection(task=kind, template="t"),
        sessions=np.array(sessions),
        events=events,
    )


def system(name, prediction, task="next_action", kind="baseline") -> System:
    return System(name, kind, "", {task: prediction}, 0.0)


def answers(*places, classes=3) -> Prediction:
    """Sure of each answer; -1 is an answer that cannot be read."""
    scores = np.full((len(places), classes), -9.0)
    for row, place in enumerate(places):
        scores[row] = np.nan if place < 0 else scores[row]
        scores[row, place] = scores[row, place] + 9 if place >= 0 else np.nan
    return Prediction(scores)


# Session 5 has three examples, session 2 one
TASK = make_task([VIEW, VIEW, LEAVE, BUY], [5, 5, 5, 2])
GUESS = answers(VIEW, LEAVE, LEAVE, LEAVE)
TRAINING = np.array([60, 10, 30])


def entries(task, *predictions, training=TRAINING, protocol=PROTOCOL):
    return action_figures.entries(task, predictions, protocol, training)


def test_figures_by_hand():
    (found,) = entries(TASK, GUESS)
    values = {name: one["value"] for name, one in found["metrics"].items()}
    assert values["exact_match"] == pytest.approx((0 / 1 + 2 / 3) / 2)
    f1 = {"view": 2 * 1 / (2 * 1 + 0 + 1), "buy": 0.0, "leave": 2 * 1 / (2 * 1 + 2 + 0)}
    assert values["macro_f1"] == pytest.approx(sum(f1.values()) / 3)
    assert values["weighted_f1"] == pytest.approx((2 * f1["view"] + f1["buy"] + f1["leave"]) / 4)
    assert values["macro_recall"] == pytest.approx((1 / 2 + 0 + 1) / 3)
    assert values["weighted_recall"] == pytest.approx(2 / 4)
    assert values["macro_recall/head"] == pytest.approx(1 / 2)  # view holds 60% of training
    assert values["macro_recall/tail"] == pytest.approx((0 + 1) / 2)
    assert values["weighted_recall/tail"] == pytest.approx(1 / 2)
    assert [one["label"] for one in found["classes"]["per_class"]] == LABELS
    assert [one["head"] for one in found["classes"]["per_class"]] == [True, False, False]
    assert [one["f1"]["value"] for one in found["classes"]["per_class"]] == pytest.approx(list(f1.values()))
    assert found["classes"]["per_class"][BUY]["precision"]["value"] is None  # nobody was said to buy
    assert found["classes"]["confusion"] == [[1, 0, 1, 0], [0, 0, 1, 0], [0, 0, 1, 0]]


def test_the_favourite_answer_is_seen():
    (found,) = entries(TASK, GUESS)
    often = found["classes"]["most_frequent"]
    assert often["label"] == "leave"
    assert often["share"]["value"] == 3 / 4
    assert often["rest_recall"]["value"] == pytest.approx((1 / 2 + 0) / 2)


def test_answers_that_cannot_be_read_are_wrong_and_counted():
    (found,) = entries(TASK, answers(-1, VIEW, LEAVE, BUY))
    assert found["classes"]["confusion"][VIEW] == [1, 0, 0, 1]
    assert found["metrics"]["exact_match"]["value"] == pytest.approx((1 + 2 / 3) / 2)
    (none,) = entries(TASK, answers(-1, -1, -1, -1))
    assert none["classes"]["most_frequent"] is None
    assert none["metrics"]["exact_match"]["value"] == 0


def test_intervals_are_over_sessions():
    """Two sessions, one all right and one all wrong: a resample has 0, 1 or 1/2."""
    task = make_task([VIEW] * 8, [0] * 6 + [1] * 2)
    (found,) = entries(task, answers(*[VIEW] * 6, *[BUY] * 2))
    assert found["metrics"]["exact_match"] == {"value": 1 / 2, "low": 0.0, "high": 1.0}


def test_probabilities_of_two_answers_and_of_more():
    scores = np.log([[0.7, 0.3], [0.4, 0.6], [0.8, 0.2]])
    task = make_task([0, 0, 1], [0, 1, 2], kind="outcome", labels=["yes", "no"], words=["Yes", "No"])
    (found,) = entries(task, Prediction(scores), training=np.array([3, 7]))
    assert found["metrics"]["auc"]["value"] == pytest.approx(0)  # 0.8 of the no stands above both
    assert found["metrics"]["brier"]["value"] == pytest.approx((0.3**2 + 0.6**2 + 0.8**2) / 3)
    assert found["metrics"]["label_nats"]["value"] == pytest.approx(-np.mean(np.log([0.7, 0.4, 0.2])))
    assert not [name for name in found["metrics"] if name.startswith(("multiclass", "macro_auc"))]
    (many,) = entries(TASK, GUESS)
    assert not [name for name in many["metrics"] if name in ("auc", "brier")]
    assert {"macro_auc", "macro_grouped_auc", "multiclass_brier"} <= set(many["metrics"])


def test_what_has_no_probabilities_has_no_figures_of_them():
    (found,) = entries(TASK, GUESS._replace(has_probabilities=False))
    assert not [name for name in found["metrics"] if "auc" in name or "brier" in name or "nats" in name]
    assert found["reliability"] is None
    assert found["calibration"] is None


def test_calibration_before_and_after():
    scores = np.log([[0.9, 0.05, 0.05]] * 4)
    (found,) = entries(TASK, Prediction(scores, calibration=Fitted(2.0, 30)))
    after = np.sqrt([0.9, 0.05, 0.05]) / np.sqrt([0.9, 0.05, 0.05]).sum()
    assert found["calibration"]["temperature"] == 2.0
    assert found["calibration"]["num_examples"] == 30
    before = found["calibration"]["before"]
    assert before["top_label_calibration_error"]["value"] == pytest.approx(abs(2 / 4 - 0.9))
    assert found["calibration"]["after"]["top_label_calibration_error"]["value"] == pytest.approx(abs(2 / 4 - after[0]))
    right = [after[0], after[0], after[2], after[1]]
    assert found["calibration"]["after"]["label_nats"]["value"] == pytest.approx(-np.mean(np.log(right)))
    assert before["multiclass_brier"] == found["metrics"]["multiclass_brier"]
    assert [one["confidence"] for one in found["reliability"]["before"]] == pytest.approx([0.9])
    assert [one["confidence"] for one in found["reliability"]["after"]] == pytest.approx([after[0]])


def test_no_temperature_is_no_calibration_and_said_once_a_reason():
    scores = np.log([[0.9, 0.05, 0.05]] * 4)
    said = Prediction(scores, calibration=Fitted(None, 9, "all right"))
    (found,) = entries(TASK, said)
    assert found["calibration"] is None
    assert set(found["reliability"]) == {"before"}
    assert action_figures.uncalibrated(
        TASK, {"a": said, "b": said._replace(calibration=Fitted(2.0, 9)), "c": said, "d": GUESS}
    ) == ["next_action: no calibration of a, c: all right."]


def test_a_probability_of_zero_leaves_figures():
    """The first example is given 0 for its right label, which counts as the smallest double; the others 1."""
    scores = np.array([[-np.inf, 0.0, -np.inf], *[[0.0, -np.inf, -np.inf]] * 9])
    (found,) = entries(make_task([VIEW] * 10, range(10)), Prediction(scores))
    nats = found["metrics"]["label_nats"]
    assert nats["value"] == pytest.approx(-np.log(np.finfo(float).tiny) / 10)
    assert 0 == nats["low"] < nats["value"] < nats["high"]


def test_intervals_of_means_over_classes_hold_their_value():
    """Three classes of 60 with 90% right, and eight of one session each, all wrong, which most resamples lack."""
    labels = [f"c{place}" for place in range(11)]
    right = np.array([place for place in range(3) for _ in range(60)] + list(range(3, 11)))
    said = np.where(right < 3, np.where(np.arange(188) % 10 == 9, (right + 1) % 3, right), 0)
    task = make_task(right, np.arange(188), labels=labels, words=labels)
    (found,) = entries(task, answers(*said, classes=11), training=np.array([60] * 3 + [1] * 8))
    recall = found["metrics"]["macro_recall"]
    assert recall["value"] == pytest.approx((3 * 54 / 60 + 8 * 0) / 11)
    for name in ("macro_f1", "macro_recall", "macro_auc", "macro_grouped_auc"):
        one = found["metrics"][name]
        assert one["low"] <= one["value"] <= one["high"], name
    rest = found["classes"]["most_frequent"]["rest_recall"]  # c0 is said most often: of the others two of 54 in 60
    assert rest["value"] == pytest.approx(2 * (54 / 60) / 10)
    assert rest["low"] <= rest["value"] <= rest["high"]
    # 6 of 60 sessions of c0 are wrong: its own figures move; one session of c3 says nothing of how far
    first, rare = found["classes"]["per_class"][0], found["classes"]["per_class"][3]
    assert first["recall"]["low"] < 54 / 60 < first["recall"]["high"]
    assert rare["recall"] == {"value": 0.0, "low": None, "high": None}


@pytest.mark.parametrize(("sessions", "has"), [(1, False), (4, False), (5, True)])
def test_a_class_that_few_sessions_hold_has_no_interval(sessions, has):
    """Each of these sessions has two views: of the first both are right, of any other one."""
    right = [VIEW, VIEW] * sessions + [BUY] * 6
    said = [VIEW, VIEW] + [VIEW, BUY] * (sessions - 1) if sessions > 1 else [VIEW, BUY]
    task = make_task(right, [*np.repeat(np.arange(sessions), 2), *range(100, 106)])
    (found,) = entries(task, answers(*said, *[BUY] * 6))
    view = found["classes"]["per_class"][VIEW]
    assert view["recall"]["value"] == pytest.approx((sessions + 1) / (2 * sessions) if sessions > 1 else 1 / 2)
    for name in ("recall", "f1"):
        assert (view[name]["low"] is not None) == (view[name]["high"] is not None) == has, name


def test_precision_has_an_interval_where_enough_sessions_hold_the_answer():
    """view is right in one session and said in six; buy is right in six and said in one."""
    task = make_task([VIEW, BUY, BUY, BUY, BUY, BUY, BUY], range(7))
    (found,) = entries(task, answers(VIEW, VIEW, VIEW, VIEW, VIEW, VIEW, BUY))
    view, buy, _ = found["classes"]["per_class"]
    assert view["precision"]["value"] == pytest.approx(1 / 6)
    assert view["precision"]["low"] is not None
    assert view["recall"] == {"value": 1.0, "low": None, "high": None}
    assert buy["precision"]["low"] is None
    assert buy["recall"]["low"] is not None


def test_a_class_without_an_example_is_named():
    task = make_task([VIEW, VIEW], [0, 1])
    assert action_figures.warnings(task) == [
        f'next_action: none of the 2 evaluated examples has the label "{label}": it has no recall and no F1, and means '
        "over classes leave it out."
        for label in ("buy", "leave")
    ]
    (found,) = entries(task, answers(VIEW, BUY))
    assert found["metrics"]["macro_recall"]["value"] == 1 / 2
    assert found["metrics"]["macro_recall/tail"]["value"] is None


# ---- the whole event ----


EVENTS = [write_answer("view", {"item": "Film 1"}), write_answer("buy", {"item": "Film 2"}), write_answer("leave", {})]


def event_task(sessions=(0, 0, 1)) -> Task:
    judge = NextEvents(EVENTS, np.array([VIEW, BUY, LEAVE]), ["view", "buy", "leave"], ["item"])
    return make_task([0] * 3, sessions, kind="next_event", words=["view", "buy", "leave"], events=judge)


def written(*texts, finished=True) -> Prediction:
    return Prediction(np.zeros((len(texts), 0)), generations=[(text, finished) for text in texts])


def test_events_are_judged_in_whole_and_in_part():
    task = event_task()
    said = written(write_answer("view", {"item": "Film 1"}), write_answer("buy", {"item": "Film 1"}), "I leave")
    table = figures.example_metrics(task, said, [1])
    assert table["type_accuracy"].tolist() == [1, 1, 0]
    assert table["valid_ratio"].tolist() == [1, 1, 0]
    (found,) = entries(task, said)
    assert found["metrics"]["exact_match"]["value"] == pytest.approx((1 / 2 + 0) / 2)
    rouge = (1 + 2 * (1 / 2) * (1 / 2) / (1 / 2 + 1 / 2)) / 2  # of the two whose right answer has an item
    assert found["metrics"]["rouge_l/item"]["value"] == pytest.approx(rouge)
    assert found["classes"]["confusion"] == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]]
    assert found["reliability"] is None
    assert figures._verdicts(task, said) == {"no JSON": 1}


def test_an_answer_without_the_field_is_not_similar_to_one_without_words():
    """The right text is one sign: not read, left out, another sign, the same sign."""
    right = write_answer("view", {"item": "…"})
    judge = NextEvents([right] * 4, np.array([VIEW] * 4), ["view", "buy", "leave"], ["item"])
    texts = ["nothing", write_answer("view", {}), write_answer("view", {"item": "!"}), right]
    assert judge.figures([(text, True) for text in texts])["rouge_l/item"].tolist() == [0, 0, 0, 1]


def test_an_unfinished_event_says_nothing():
    (found,) = entries(event_task(), written(*EVENTS, finished=False))
    assert found["metrics"]["exact_match"]["value"] == 0
    assert found["metrics"]["rouge_l/item"]["value"] == 0


def test_a_right_answer_that_cannot_be_read_is_an_error():
    from recllm.errors import UserError

    with pytest.raises(UserError, match="convert again"):
        NextEvents(['{"action": "vieww"}'], np.array([0]), ["view"], [])
    with pytest.raises(UserError, match="another action"):
        NextEvents(['{"action": "buy"}'], np.array([0]), ["view", "buy"], [])


def test_free_events_are_counted_beside_the_held_ones():
    task = event_task()
    said = written(*EVENTS)._replace(free=[("no idea", True), (EVENTS[1], True)])
    found = figures.generation_figures(task, said, [], PROTOCOL)
    assert found["num_examples"] == 2
    assert found["valid_ratio"]["value"] == 1 / 2
    assert found["exact_hit"]["value"] == 1 / 2
    assert figures.generation_figures(task, written(*EVENTS), [], PROTOCOL) is None


def test_free_answers_are_words_and_nothing_else():
    said = GUESS._replace(generations=[("view", True), ("buy", False), ("leave", True), ("leave the shop ", True)])
    found = figures.generation_figures(TASK, said, [], PROTOCOL)
    assert found["valid_ratio"]["value"] == 2 / 4
    assert found["exact_hit"]["value"] == 1 / 4  # the last is "buy"
    assert "cannot be read" in found["note"]


# ---- comparisons and segments ----


def test_exact_match_is_tested_by_sessions():
    rng = np.random.default_rng(0)
    sessions = np.repeat(np.arange(30), 4)
    right = rng.integers(0, 3, 120)
    task = make_task(right, sessions)
    good, bad = answers(*right), answers(*((right + 1) % 3))
    tests = figures.comparisons(task, [system("good", good), system("bad", bad)], "good", PROTOCOL)
    assert [(one["metric"], one["method"]) for one in tests] == [("exact_match", "mcnemar_clustered")]
    (test,) = tests
    assert (test["difference"], test["num_examples"], test["num_sessions"]) == (1, 120, 30)
    assert "num_users" not in test
    from scipy.stats import chi2

    assert test["p_value"] == pytest.approx(chi2.sf(30**2 / 30, 1))


def test_one_example_a_session_takes_mcnemars_exact_test():
    task = make_task([VIEW] * 6, range(6))
    systems = [system("a", answers(*[VIEW] * 6)), system("b", answers(*[BUY] * 6))]
    (test,) = figures.comparisons(task, systems, "a", PROTOCOL)
    assert (test["method"], test["p_value"]) == ("mcnemar", pytest.approx(2 / 2**6))


def test_few_sessions_have_no_test():
    task = make_task([VIEW] * 8, [0, 0, 1, 1, 2, 2, 3, 3])
    systems = [system("a", answers(*[VIEW] * 8)), system("b", answers(*[BUY] * 8))]
    (test,) = figures.comparisons(task, systems, "a", PROTOCOL)
    assert test["p_value"] is None
    assert (test["num_examples"], test["num_sessions"]) == (8, 4)


def test_sizes_are_of_examples_users_and_sessions():
    task = make_task([VIEW] * 4, [0, 0, 1, 2], users=[0, 0, 0, 7])
    assert figures.size_of(task, np.arange(4)) == {"num_examples": 4, "num_users": 2, "num_sessions": 3}


def test_predictions_of_actions_keep_sessions_rationales_and_classes():
    said = GUESS._replace(rationales=[("why", True)] * 4)
    rows = figures.predictions_table(TASK, system("a", said), [1]).to_pylist()
    assert [row["predicted"] for row in rows] == ["view", "leave", "leave", "leave"]
    assert [row["session"] for row in rows] == [5, 5, 5, 2]
    assert [row["target"] for row in rows] == [None] * 4
    assert rows[0]["rationale"] == "why"
    events = figures.predictions_table(event_task(), system("a", written(*EVENTS), "next_event"), [1]).to_pylist()
    assert [row["predicted"] for row in events] == ["view", "buy", "leave"]
    assert [row["label"] for row in events] == EVENTS
    assert dict(events[0]["figures"])["exact"] == 1
    assert "rouge_l/item" not in dict(events[2]["figures"])  # the right answer has no item
    assert json.loads(events[0]["text"])["item"] == "Film 1"


def test_cut_off_rationales_are_counted():
    said = GUESS._replace(rationales=[("why", True), ("be", False), ("", False), ("why", True)])
    assert figures.example_metrics(TASK, said, [1])["rationale_finished"].tolist() == [1, 0, 0, 1]


# ---- below the constant ----


def of_systems(task, *systems):
    return figures.system_entries(task, systems, [], PROTOCOL, TRAINING)


def below(task, *systems, main="ilora"):
    """Against the constant answer, which is to view."""
    return action_figures.below_constant(task, of_systems(task, *systems), main, answers(*[VIEW] * 4))


def test_a_model_below_the_constant_is_said_to_be_so():
    leaves = system("ilora", answers(*[LEAVE] * 4), kind="adapter")
    assert below(TASK, leaves) == [
        {
            "task": "next_action",
            "system": "ilora",
            "metric": "exact_match",
            "value": pytest.approx((0 + 1 / 3) / 2),
            "constant": pytest.approx((0 + 2 / 3) / 2),
            "answer": "leave",
            "answer_share": 1.0,
            "rest_recall": 0.0,
        }
    ]


def test_adapters_and_the_base_model_are_named_after_the_main_system():
    """The constant answer need not be among the systems; controls and baselines are not named."""
    said = answers(*[LEAVE] * 4)
    kinds = {
        "base": "base_model",
        "other": "adapter",
        "main": "adapter",
        "main_uniform": "control",
        "markov": "baseline",
    }
    found = below(TASK, *[system(name, said, kind=kind) for name, kind in kinds.items()], main="main")
    assert [one["system"] for one in found] == ["main", "base", "other"]
    good = system("main", answers(VIEW, VIEW, LEAVE, BUY), kind="adapter")
    assert [one["system"] for one in below(TASK, good, system("base", said, kind="base_model"), main="main")] == [
        "base"
    ]


def test_plain_accuracy_may_be_below_where_exact_match_is_not():
    """The model has the one buy of session 2 and nothing of the three of session 5, of which the constant has two."""
    model = system("m", answers(LEAVE, LEAVE, VIEW, BUY), kind="adapter")
    (found,) = below(TASK, model, main="m")
    assert (found["metric"], found["value"], found["constant"]) == ("accuracy", 1 / 4, 2 / 4)
    assert (0 + 1) / 2 > (2 / 3 + 0) / 2  # exact match


@pytest.mark.parametrize("kind", ["adapter", "base_model"])
def test_a_model_that_is_not_below_is_not_said_to_be(kind):
    model = system("m", answers(VIEW, VIEW, LEAVE, BUY), kind=kind)
    assert below(TASK, model, main="m") == []
    assert below(TASK, model._replace(predictions={"next_action": answers(*[VIEW] * 4)}), main="m") == []


def test_of_events_the_action_alone_may_be_below():
    """Neither is right in whole; the constant answer has one action of three right."""
    task = event_task()
    wrong = system("m", written("?", "?", "?"), "next_event", "adapter")
    constant = written(*[write_answer("view", {"item": "none"})] * 3)
    (found,) = action_figures.below_constant(task, of_systems(task, wrong), "m", constant)
    assert (found["metric"], found["value"], found["answer"]) == ("type_accuracy", 0, None)


# ---- OTTO ----


def test_items_to_come_are_those_of_the_session_by_action():
    # one user: the session of OTTO's own description, then another one
    small = SimpleNamespace(
        actions=["clicks", "carts", "orders"],
        manifest={"split": {"cutoffs": {"test": 80}}},
        sequences=SimpleNamespace(
            offsets=np.array([0, 10]),
            items=np.array([0, 1, 2, 2, 3, 3, 4, 2, 3, 9]),
            actions=np.array([0, 0, 0, 1, 0, 1, 0, 2, 2, 0]),
            timestamps=np.array([10, 20, 30, 40, 50, 60, 70, 80, 80, 90]),
            sessions=np.array([0] * 9 + [1]),
        ),
    )
    task = make_task([0] * 3, [0] * 3, kind="next_action")
    task = task._replace(examples=task.examples._replace(history_end=np.array([3, 8, 9], np.int32)))
    found = action_figures.items_to_come(task, small, "test", ["clicks"])
    # the labels of the third event, of the eighth, and of a session of its own
    assert [[part.tolist() for part in row] for row in found] == [
        [[3], [2, 3], [2, 3]],
        [[], [], [3]],
        [[9], [], []],
    ]
    assert [part.tolist() for part in action_figures.items_to_come(task, small, "test", [])[0]] == [
        [3, 4],
        [2, 3],
        [2, 3],
    ]
    early = action_figures.items_to_come(task, small, "valid", ["clicks"])[0]
    assert [part.tolist() for part in early] == [[3], [2, 3], []]  # the orders are of the days of test


def test_otto_figures_have_a_score_and_what_was_to_be_found():
    protocol = PROTOCOL.model_copy(
        update={"actions": PROTOCOL.actions.model_copy(update={"otto_k": 2, "otto_weights": {"view": 0.4, "buy": 0.6}})}
    )
    to_come = [[np.array([3]), np.array([1, 2, 5]), np.array([], int)]] * 4
    said = GUESS._replace(top=np.array([[3, 1], [3, 1], [0, 7], [0, 7]]))
    with_rank, without = action_figures.otto(TASK, [said, GUESS], to_come, LABELS, protocol)
    assert without is None
    assert with_rank["k"] == 2
    assert with_rank["possible"] == {"view": 4, "buy": 8, "leave": 0}
    assert with_rank["recall"]["view"]["value"] == 2 / 4
    assert with_rank["recall"]["buy"]["value"] == 2 / 8
    assert with_rank["recall"]["leave"]["value"] is None
    assert with_rank["score"]["value"] == pytest.approx(0.4 * 2 / 4 + 0.6 * 2 / 8)
    assert action_metrics.recall_at_k(action_metrics.found_items(said.top, to_come, 2)).shape == (1, 3)
