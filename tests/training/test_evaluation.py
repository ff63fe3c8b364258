"""Measures against the textbooks, and the gate."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics

from training.contract import Classes, Examples, Flags, strings
from training.errors import GateFailed, RecipeError
from training.evaluation import bootstrap, gate, measures
from training.evaluation.gate import Evidence

CHANCE = np.random.default_rng(0)


def some_scores(rows: int, labels: int) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    scores = CHANCE.random((rows, labels)).round(2) + 0.01
    return scores / scores.sum(1, keepdims=True)


@pytest.mark.parametrize("labels", [2, 5])
def test_measures_of_classes_are_those_of_scikit_learn(labels: int) -> None:
    scores, index = some_scores(300, labels), CHANCE.integers(0, labels, 300)
    found = measures.measure(Classes(index, tuple("abcde"[:labels])), {"scores": scores})
    best = scores.argmax(1)
    assert found["accuracy"] == pytest.approx(metrics.accuracy_score(index, best))
    assert found["macro_f1"] == pytest.approx(metrics.f1_score(index, best, average="macro"))
    assert found["log_loss"] == pytest.approx(metrics.log_loss(index, scores))
    if labels == 2:
        assert found["auc"] == pytest.approx(metrics.roc_auc_score(index, scores[:, 1]))


def test_measures_of_flags_are_means_over_the_labels_with_enough_positives() -> None:
    values = (CHANCE.random((400, 3)) < (0.4, 0.3, 0.02)).astype(np.float32)
    values[::7, 0] = np.nan
    scores = CHANCE.random((400, 3)).round(2)
    found = measures.measure(Flags(values, ("a", "b", "rare")), {"scores": scores})
    known = ~np.isnan(values[:, 0])
    columns = [(values[known, 0], scores[known, 0]), (values[:, 1], scores[:, 1])]
    assert found["auprc"] == pytest.approx(np.mean([metrics.average_precision_score(*it) for it in columns]))
    assert found["auc"] == pytest.approx(np.mean([metrics.roc_auc_score(*it) for it in columns]))


def test_calibration_error_is_none_for_a_model_that_knows_how_often_it_is_right() -> None:
    confidence = np.repeat([0.25, 0.75], 400)
    right = np.tile([1, 0, 0, 0], 100).tolist() + np.tile([1, 1, 1, 0], 100).tolist()
    assert measures.ece(confidence, np.array(right, bool)) == pytest.approx(0)
    assert measures.ece(confidence, np.zeros(800, bool)) == pytest.approx(0.5)


def test_ranks_share_what_is_tied() -> None:
    assert measures.spearman(np.array([1, 2, 3, 4]), np.array([10, 20, 30, 400])) == pytest.approx(1)
    assert measures.spearman(np.array([1, 2, 3]), np.array([3, 2, 1])) == pytest.approx(-1)
    # ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4
    found = measures.spearman(np.array([1, 2, 2, 3]), np.array([1, 2, 3, 4]))
    assert found == pytest.approx(4.5 / np.sqrt(4.5 * 5))


def evidence(gain: float | None = None) -> Evidence:
    before, after = {"nll": 1.99, "accuracy": 0.9}, {"nll": 2.06, "accuracy": 0.89}
    return Evidence(before, after, {"accuracy": 0.8}, lambda _: gain)


@pytest.mark.parametrize(
    ("rules", "gain", "holds"),
    [
        ({"nll_increase_max": 0.1}, None, True),
        ({"nll_increase_max": 0.05}, None, False),
        ({"nll_max": 2.1}, None, True),
        ({"nll_max": 2.0}, None, False),
        ({"accuracy_drop_max": 0.02}, None, True),
        ({"accuracy_drop_max": 0.005}, None, False),
        ({"accuracy_min": 0.89}, None, True),
        ({"accuracy_min": 0.9, "nll_max": 3.0}, None, False),
        ({"accuracy_over_floor_min": 0.08}, None, True),
        ({"accuracy_over_floor_min": 0.1}, None, False),
        ({"nll_over_floor_min": 0.0}, None, False),
        ({"accuracy_over_stable_min": -0.01}, -0.005, True),
        ({"accuracy_over_stable_min": -0.01}, -0.02, False),
        ({"accuracy_over_stable_min": 0.5}, None, True),
    ],
)
def test_the_gate_holds_or_names_what_does_not(rules: dict[str, float], gain: float | None, holds: bool) -> None:
    found = gate.findings(rules, evidence(gain))
    if holds:
        gate.require(found)
    else:
        with pytest.raises(GateFailed, match=next(iter(rules))):
            gate.require(found)


def test_not_a_number_never_passes_a_gate() -> None:
    nothing = Evidence({"nll": 1.0}, {"nll": float("nan")}, {}, lambda _: float("nan"))
    for rule in ("nll_max", "nll_increase_max", "nll_min", "nll_over_stable_min", "nll_over_floor_min"):
        with pytest.raises(GateFailed):
            gate.require(gate.findings({rule: 0.0}, nothing))


def test_a_rule_about_nothing_is_refused() -> None:
    gate.check({"accuracy_min": 0.5, "folds_accuracy_min": 0.5, "speedup_1_min": 1.0}, ("accuracy",))
    for rule in ("auc_min", "accuracy", "accuracy_least", "folds_accuracy_over_stable_min", "pooled_auc_max"):
        with pytest.raises(RecipeError, match="bound"):
            gate.check({rule: 0.5}, ("accuracy",))


def test_a_gate_may_name_a_flag_and_a_slice() -> None:
    flags = Flags(np.zeros((2, 2), np.float32), ("rude", "late"))
    rows = Examples({}, flags, {"source": strings(["a", "b"])})
    known = measures.names(rows)
    rules = ("auprc_min", "recall_rude_min", "pooled_auc_late[source=b]_min", "false_alarms_rude[source=a]_max")
    gate.check(dict.fromkeys(rules, 0.5), known)
    for rule in ("recall_odd_min", "auc_late[source=c]_min", "pooled_auc_rude[source=a]_over_stable_min"):
        with pytest.raises(RecipeError, match="bound"):
            gate.check({rule: 0.5}, known)


def test_every_flag_has_measures_of_its_own() -> None:
    wanted = np.tile([1, 0], 60).astype(np.float32)
    scores = np.where(wanted == 1, np.where(np.arange(120) < 30, 0.3, 0.9), np.where(np.arange(120) < 12, 0.8, 0.1))
    found = measures.measure(Flags(np.stack([wanted, wanted], 1), ("a", "b")), {"scores": np.stack([scores] * 2, 1)})
    assert found["recall_a"] == found["recall_b"] == pytest.approx(45 / 60)
    assert found["false_alarms_a"] == pytest.approx(6 / 60)
    assert found["auc_a"] == pytest.approx(metrics.roc_auc_score(wanted, scores))
    assert found["auprc_a"] == found["auprc"]


def test_a_slice_is_measured_by_itself() -> None:
    rows = Examples({}, Classes(np.array([0, 0, 1, 1]), ("a", "b")), {"by": strings(["x", "y", "x", "y"])})
    found = measures.with_slices(rows, {"scores": np.array([[0.9, 0.1], [0.2, 0.8], [0.1, 0.9], [0.1, 0.9]])})
    assert (found["accuracy"], found["accuracy[by=x]"], found["accuracy[by=y]"]) == (0.75, 1, 0.5)


def test_a_paired_interval_sees_a_difference_that_two_intervals_would_not() -> None:
    index = CHANCE.integers(0, 2, 400)
    wrong = CHANCE.random(400) < 0.3

    def outputs(
        flipped: np.ndarray[tuple[int], np.dtype[np.bool_]],
    ) -> dict[str, np.ndarray[tuple[int, int], np.dtype[np.float64]]]:
        return {"scores": np.eye(2)[np.where(flipped, 1 - index, index)]}

    better = wrong & (np.arange(400) >= 40)
    value, low, high = bootstrap.difference(
        "accuracy", Classes(index, ("a", "b")), outputs(better), outputs(wrong), seed=0
    )
    assert value == pytest.approx((wrong.sum() - better.sum()) / 400)
    assert 0 < low < value < high
