import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recllm.evaluate import action_metrics as am
from recllm.evaluate import metrics

NAN = np.nan
# Six examples of three classes, of which the last cannot be read
LABEL = np.array([0, 0, 0, 1, 1, 2])
PREDICTED = np.array([0, 0, 1, 1, 0, -1])
#        predicted  0  1  2  unreadable
CONFUSION = np.array([[2, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 1]])
F1 = [2 * 2 / (2 * 2 + 1 + 1), 2 * 1 / (2 * 1 + 1 + 1), 0 / (0 + 0 + 1)]
SUPPORT = [3, 2, 1]


def test_exact_match_is_averaged_within_a_session_first():
    right = np.array([1.0, 1.0, 0.0, 0.0, 1.0])
    session = np.array([4, 4, 4, 4, 2])
    assert am.session_means(right, session).tolist() == [1 / 1, 2 / 4]  # sessions in ascending order: 2, 4
    assert np.mean(am.session_means(right, session)) != np.mean(right)


def test_the_confusion_table_counts_everything_once():
    table = am.confusion(LABEL, PREDICTED, 3)
    assert table.tolist() == [CONFUSION.tolist()]
    assert table.sum() == len(LABEL)


def test_figures_of_each_class():
    found = am.class_figures(am.confusion(LABEL, PREDICTED, 3))
    assert found.precision[0, :2] == pytest.approx([2 / (2 + 1), 1 / (1 + 1)])
    assert np.isnan(found.precision[0, 2])  # nothing was predicted to be it
    assert found.recall[0] == pytest.approx([2 / 3, 1 / 2, 0 / 1])
    assert found.f1[0] == pytest.approx(F1)
    assert found.support.tolist() == [SUPPORT]


def test_macro_and_weighted_means():
    found = am.class_figures(am.confusion(LABEL, PREDICTED, 3))
    assert am.macro(found.f1) == pytest.approx([sum(F1) / 3])
    assert am.weighted(found.f1, found.support) == pytest.approx(
        [sum(n * f for n, f in zip(SUPPORT, F1, strict=True)) / 6]
    )
    assert am.macro(found.recall) == pytest.approx(metrics.balanced_accuracy(LABEL, PREDICTED))
    assert am.weighted(found.recall, found.support) == pytest.approx([np.mean(LABEL == PREDICTED)])


def test_a_class_that_a_resample_did_not_draw_keeps_its_value():
    """Of classes with recalls 2/3, 1/2 and 0 the last two are not drawn: the mean is still over all three."""
    whole = am.class_figures(am.confusion(LABEL, PREDICTED, 3)).recall[0]
    drawn = am.class_figures(am.confusion(LABEL, PREDICTED, 3, np.array([[1.0, 1, 0, 0, 0, 0]]))).recall
    assert am.macro(drawn) == pytest.approx([2 / 2])
    assert am.macro(drawn, whole=whole) == pytest.approx([(2 / 2 + 1 / 2 + 0) / 3])
    assert am.macro(drawn, np.array([True, False, True]), whole) == pytest.approx([(2 / 2 + 0) / 2])
    assert am.macro(np.full((1, 2), NAN), whole=np.array([1 / 4, NAN])) == pytest.approx([1 / 4])  # one never occurs


def test_head_and_tail_apart():
    head = am.head_classes(np.array([60, 25, 15]))
    assert head.tolist() == [True, False, False]
    found = am.class_figures(am.confusion(LABEL, PREDICTED, 3))
    assert am.macro(found.recall, head) == pytest.approx([2 / 3])
    assert am.macro(found.recall, ~head) == pytest.approx([(1 / 2 + 0) / 2])
    assert am.weighted(found.recall, found.support, ~head) == pytest.approx([(1 + 0) / (2 + 1)])


@pytest.mark.parametrize(
    ("counts", "share", "expected"),
    [
        ([50, 30, 20], 0.5, [True, False, False]),  # exactly half is enough
        ([49, 31, 20], 0.5, [True, True, False]),
        ([10, 80, 10], 0.8, [False, True, False]),
        ([5, 5], 0.5, [True, False]),  # of equals the first
        ([0, 0, 0], 0.5, [False, False, False]),
        ([3, 0], 1.0, [True, False]),  # what never occurs is no head
    ],
)
def test_head_classes_are_the_fewest_that_hold_the_share(counts, share, expected):
    assert am.head_classes(np.array(counts), share).tolist() == expected


def test_a_class_that_the_test_set_lacks_is_left_out_of_every_mean():
    """Predicting it is still wrong: it lowers the recall of the class that was meant, and has no figures of its own."""
    label, predicted = np.array([0, 0, 1]), np.array([0, 2, 1])
    found = am.class_figures(am.confusion(label, predicted, 3))
    assert np.isnan(found.f1[0, 2])
    assert np.isnan(found.recall[0, 2])
    assert am.macro(found.f1) == pytest.approx([(2 / (2 + 1) + 1) / 2])
    assert am.macro(found.recall) == pytest.approx([(1 / 2 + 1) / 2])
    empty = am.class_figures(am.confusion(np.array([], int), np.array([], int), 2))
    assert np.isnan(am.macro(empty.f1)).all()
    assert np.isnan(am.weighted(empty.f1, empty.support)).all()


def test_always_leaving_is_seen():
    """60% leave; who always says so is right as often, has macro recall 1/3 and nothing on the tail."""
    label = np.repeat([0, 1, 2], [6, 2, 2])
    found = am.class_figures(am.confusion(label, np.zeros(10, int), 3))
    head = am.head_classes(np.array([60, 20, 20]))
    assert am.weighted(found.recall, found.support) == pytest.approx([6 / 10])
    assert am.macro(found.recall) == pytest.approx([(1 + 0 + 0) / 3])
    assert am.macro(found.recall, ~head) == pytest.approx([0])
    assert am.macro(found.f1) == pytest.approx([(2 * 6 / (2 * 6 + 4)) / 3])


@settings(deadline=None)  # a busy machine is no failure
@given(st.lists(st.integers(0, 3), min_size=6, max_size=6))
def test_weights_are_copies_of_examples(copies):
    weights = np.array([[1] * 6, copies])
    copied = np.repeat(np.arange(6), copies)
    probability = np.array([[0.7, 0.2, 0.1], [0.4, 0.5, 0.1], [0.3, 0.3, 0.4], [0.2, 0.7, 0.1], [0.6, 0.2, 0.2]])
    probability = np.concatenate([probability, [[NAN] * 3]])
    users = np.array([1, 1, 2, 2, 2, 1])

    def figures(rows, w):
        label, predicted = LABEL[rows], PREDICTED[rows]
        table = am.class_figures(am.confusion(label, predicted, 3, w))
        return {
            "macro": am.macro(table.f1),
            "weighted": am.weighted(table.f1, table.support),
            "auc": am.one_vs_rest_auc(probability[rows], label, w),
            "grouped": am.grouped_one_vs_rest_auc(probability[rows], label, users[rows], w),
            "calibration": am.top_label_calibration_error(probability[rows], label, w),
        }

    resampled = figures(np.arange(6), weights)
    alone = figures(copied, None)
    for name, value in resampled.items():
        assert value[1] == pytest.approx(alone[name][0], nan_ok=True), name


def test_grouped_auc_is_weighted_by_examples_and_skips_users_of_one_class():
    score = np.array([0.9, 0.5, 0.1, 0.2, 0.8, 0.9, 0.3])
    positive = np.array([1, 0, 1, 1, 0, 1, 1], bool)
    user = np.array([5, 5, 5, 8, 8, 9, 9])  # user 9 has positives only
    first = (1 + 0) / 2  # of (0.9, 0.5) and (0.1, 0.5)
    second = 0.0  # (0.2, 0.8)
    assert am.grouped_auc(score, positive, user) == pytest.approx([(3 * first + 2 * second) / (3 + 2)])
    assert np.isnan(am.grouped_auc(score, np.ones(7, bool), user)).all()
    assert np.isnan(am.grouped_auc(score[:0], positive[:0], user[:0])).all()


def test_grouped_auc_of_ties_and_invalid_scores():
    score = np.array([0.5, 0.5, NAN, 0.1])
    positive = np.array([1, 0, 1, 0], bool)
    assert am.grouped_auc(score, positive, np.array([0, 0, 1, 1])) == pytest.approx([(2 * 1 / 2 + 2 * 0) / 4])


def test_invalid_scores_of_one_user_tie():
    score, user = np.full(4, NAN), np.array([0, 0, 1, 1])
    assert am.grouped_auc(score, np.array([1, 0, 0, 1], bool), user) == pytest.approx([1 / 2])


def test_grouped_auc_of_one_user_is_auc():
    rng = np.random.default_rng(3)
    score, positive = rng.integers(0, 4, 40).astype(float), rng.random(40) < 0.4
    assert am.grouped_auc(score, positive, np.zeros(40)) == pytest.approx(metrics.auc(score, positive))


def test_one_vs_rest_auc_of_two_classes_is_auc():
    rng = np.random.default_rng(4)
    first, label = rng.random(60), rng.integers(0, 2, 60)
    both = np.stack([first, 1 - first], axis=1)
    assert am.one_vs_rest_auc(both, label) == pytest.approx(metrics.auc(first, label == 0))


def test_brier_and_nats():
    probability = np.array([[0.7, 0.2, 0.1], [0.5, 0.5, 0.0], [NAN] * 3])
    label = np.array([0, 2, 1])
    assert am.multiclass_brier(probability, label) == pytest.approx(
        [0.3**2 + 0.2**2 + 0.1**2, 0.5**2 + 0.5**2 + 1**2, 2]
    )
    found = am.label_nats(probability, label)
    assert found[0] == pytest.approx(-np.log(0.7))
    assert found[1] == -np.log(np.finfo(float).tiny)  # of probability 0: as of the smallest one
    assert np.isnan(found[2])


def test_brier_of_two_classes_is_twice_the_binary_one():
    p = np.array([0.9, 0.3])
    label = np.array([0, 1])
    assert am.multiclass_brier(np.stack([p, 1 - p], 1), label) == pytest.approx(2 * metrics.brier(p, label == 0))


def test_calibration_error_and_its_bins():
    probability = np.array([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.35, 0.65], [NAN, NAN]])
    label = np.array([0, 1, 1, 1, 0])
    first = 2 / 4 * abs(1 / 2 - 0.9)
    second = 2 / 4 * abs(1 - (0.6 + 0.65) / 2)
    assert am.top_label_calibration_error(probability, label) == pytest.approx([first + second])
    found = am.reliability(probability, label)
    assert [(one.low, one.num_examples, one.accuracy) for one in found] == [(0.6, 2, 1.0), (0.9, 2, 0.5)]
    assert [one.confidence for one in found] == pytest.approx([(0.6 + 0.65) / 2, 0.9])
    gap = sum(one.num_examples * abs(one.accuracy - one.confidence) for one in found) / 4
    assert am.top_label_calibration_error(probability, label) == pytest.approx([gap])
    assert np.isnan(am.top_label_calibration_error(np.full((1, 2), NAN), np.array([0]))).all()


@pytest.mark.parametrize("edge", [0.1, 0.3, 0.6, 0.7])
def test_an_edge_belongs_to_the_bin_above(edge):
    rest = np.full((1, 12), (1 - edge) / 11)
    probability = np.concatenate([[[edge]], rest], axis=1)
    assert am.reliability(probability, np.array([0]))[0].low == pytest.approx(edge)


# ---- OTTO ----

# The session that shows the labels in OTTO's own description of its data set, seen from its third event
TO_COME = [[np.array([3]), np.array([2, 3]), np.array([2, 3])]]


def test_recall_caps_what_is_to_be_found():
    many = np.arange(30)
    top = np.stack([np.arange(20), np.arange(20)])
    found = am.found_items(top, [[many, many[:0]], [np.array([40]), np.array([3, 25])]])
    assert found.hits.tolist() == [[20, 0], [0, 1]]
    assert found.possible.tolist() == [[20, 0], [1, 2]]
    assert am.recall_at_k(found)[0] == pytest.approx([(20 + 0) / (20 + 1), 1 / 2])


def test_recall_is_a_ratio_of_sums():
    top = np.array([[3, 9], [3, 9]])
    to_come = [TO_COME[0], [np.array([9]), np.array([], int), np.array([1, 5, 9])]]
    found = am.found_items(top, to_come, 2)
    # clicks: 3 and 9 found of 1 + 1; carts: 3 of 2; orders: 3 of 2, 9 of min(2, 3)
    assert am.recall_at_k(found)[0] == pytest.approx([(1 + 1) / (1 + 1), 1 / 2, (1 + 1) / (2 + 2)])
    score = am.otto_score(
        am.recall_at_k(found), ["clicks", "carts", "orders"], {"clicks": 0.1, "carts": 0.3, "orders": 0.6}
    )
    assert score == pytest.approx([0.1 * 1 + 0.3 / 2 + 0.6 / 2])


def test_an_action_that_never_comes_has_no_recall_and_no_score():
    found = am.found_items(np.array([[3]]), [[np.array([3]), np.array([], int)]])
    assert am.recall_at_k(found)[0, 0] == 1
    assert np.isnan(am.recall_at_k(found)[0, 1])
    assert np.isnan(am.otto_score(am.recall_at_k(found), ["clicks", "orders"], {"clicks": 0.4, "orders": 0.6})).all()


def test_places_behind_the_last_item_hit_nothing():
    assert am.found_items(np.array([[-1, -1]]), [[np.array([0])]]).hits.tolist() == [[0]]


# ---- ROUGE-L ----


@pytest.mark.parametrize(
    ("written", "right", "expected"),
    [
        ("police kill the gunman", "police killed the gunman", 3 / 4),  # Lin 2004, section 3.1
        ("the gunman kill police", "police killed the gunman", 2 / 4),
        ("red shoes", "Red, shoes!", 1),
        ("", "", 1),
        ("", "red", 0),
        ("…", "red", 0),
        ("…", "…", 1),
        ("…", "!", 0),  # without a word both, and not the same
        ("a b", "a x b y", 2 * (2 / 2) * (2 / 4) / (2 / 2 + 2 / 4)),
    ],
)
def test_rouge_l(written, right, expected):
    assert am.rouge_l(written, right) == pytest.approx(expected)


@given(st.text("abc", max_size=9), st.text("abc", max_size=9))
def test_the_longest_common_subsequence_equals_the_plain_table(a, b):
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    assert am.longest_common_subsequence(a, b) == table[-1][-1]
