"""Our metrics of actions against scikit-learn on random labels and probabilities."""

import numpy as np
import pytest

from recllm.evaluate import action_metrics as am

sklearn_metrics = pytest.importorskip("sklearn.metrics")

N, C = 300, 4


@pytest.fixture(scope="module")
def made():
    rng = np.random.default_rng(0)
    label = rng.choice(C, N, p=[0.6, 0.25, 0.1, 0.05])
    logits = rng.normal(size=(N, C)) + 2 * np.eye(C)[label] * rng.random((N, 1))
    probability = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return label, probability, probability.argmax(axis=1)


@pytest.mark.parametrize("average", ["macro", "weighted"])
def test_f1_and_recall(made, average):
    label, _, predicted = made
    found = am.class_figures(am.confusion(label, predicted, C))
    ours = {
        "macro": lambda values: am.macro(values),
        "weighted": lambda values: am.weighted(values, found.support),
    }[average]
    for name, values in (("f1_score", found.f1), ("recall_score", found.recall)):
        theirs = getattr(sklearn_metrics, name)(label, predicted, average=average)
        assert ours(values) == pytest.approx([theirs]), name


def test_every_class_and_the_confusion_matrix(made):
    label, _, predicted = made
    theirs = sklearn_metrics.precision_recall_fscore_support(label, predicted, labels=range(C))
    ours = am.class_figures(am.confusion(label, predicted, C))
    for mine, other in zip(ours, theirs, strict=True):
        assert mine[0] == pytest.approx(other)
    matrix = sklearn_metrics.confusion_matrix(label, predicted, labels=range(C))
    assert am.confusion(label, predicted, C)[0, :, :-1].tolist() == matrix.tolist()


def test_classes_that_do_not_occur_are_left_out_as_by_naming_the_others(made):
    label, _, predicted = made
    kept = label < 2
    found = am.class_figures(am.confusion(label[kept], predicted[kept], C))
    theirs = sklearn_metrics.f1_score(label[kept], predicted[kept], labels=[0, 1], average="macro")
    assert am.macro(found.f1) == pytest.approx([theirs])


def test_one_vs_rest_auc(made):
    label, probability, _ = made
    theirs = sklearn_metrics.roc_auc_score(label, probability, multi_class="ovr", average="macro")
    assert am.one_vs_rest_auc(probability, label) == pytest.approx([theirs])


def test_grouped_auc(made):
    label, probability, _ = made
    users = np.random.default_rng(1).integers(0, 30, N)
    areas, sizes = [], []
    for user in np.unique(users):
        mine = users == user
        if len(np.unique(label[mine] == 0)) == 2:
            areas.append(sklearn_metrics.roc_auc_score(label[mine] == 0, probability[mine, 0]))
            sizes.append(mine.sum())
    expected = np.average(areas, weights=sizes)
    assert am.grouped_auc(probability[:, 0], label == 0, users) == pytest.approx([expected])


def test_brier_and_log_loss(made):
    label, probability, _ = made
    theirs = sklearn_metrics.log_loss(label, probability)
    assert np.mean(am.label_nats(probability, label)) == pytest.approx(theirs)
    classes = [sklearn_metrics.brier_score_loss(label == c, probability[:, c]) for c in range(C)]
    assert np.mean(am.multiclass_brier(probability, label)) == pytest.approx(sum(classes))


def test_reliability_bins(made):
    label, probability, predicted = made
    from sklearn.calibration import calibration_curve

    accuracy, confidence = calibration_curve(label == predicted, probability.max(axis=1), n_bins=10)
    ours = am.reliability(probability, label)
    assert [one.accuracy for one in ours] == pytest.approx(accuracy)
    assert [one.confidence for one in ours] == pytest.approx(confidence)
