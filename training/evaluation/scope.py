"""Measures of a classifier that may refuse: how often it answers what it should, and notices what it cannot answer.

inside          of the rows that have a label: answered, and right
outside_recall  of the rows that have none: refused
auroc           chance that a row with a label is known better than one without
half_…          inside and outside_recall with another threshold: midway between the model's own, which comes from the
                training rows, and the one that a random half of these rows would set; measured with the other half.
                Means over the halves, and `…_sd`, their standard deviation
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from training.contract import Array, Scoped, Scores

NAMES = (
    *("inside", "outside_recall", "auroc"),
    *("half_inside", "half_inside_sd", "half_outside_recall", "half_outside_recall_sd"),
)

HALVES = 100
_TINY = 1e-30


def known(scores: Array) -> Array:
    """By how much the best label is preferred to refusing, in nats [n]; below zero the row is refused."""
    logs = np.log(np.maximum(scores.astype(np.float64), _TINY))
    found: Array = logs[:, :-1].max(1) - logs[:, -1]
    return found


def scope(targets: Scoped, scores: Array) -> Scores:
    """`scores` [n, labels], the last one that of refusing. Without what there are no rows for."""
    from training.evaluation.measures import auc

    score, inside = known(scores), targets.inside
    right = scores[:, :-1].argmax(1) == targets.index
    names = ("inside", "outside_recall")
    if inside.all() or not inside.any():
        return {}
    found = dict(zip(names, _at(0.0, score, right, inside), strict=True))
    found["auroc"] = auc(score, inside)
    halves = np.array([*_halves(targets, score, right)]).reshape(-1, 2)
    for name, values in zip(names, halves.T, strict=True):
        if len(values):
            found |= {f"half_{name}": float(values.mean()), f"half_{name}_sd": float(values.std())}
    return found


def tradeoff(targets: Scoped, scores: Array) -> Array:
    """`inside` and `outside_recall` for every threshold that there could be, [thresholds, 2], the lowest first."""
    score, inside = known(scores), targets.inside
    right = scores[:, :-1].argmax(1) == targets.index
    return np.array([_at(it, score, right, inside) for it in np.unique(score)])


def threshold(score: Array, recall: float) -> float:
    """The least at which this share of rows that are outside, `score` [n], is refused."""
    return float(np.quantile(score, recall))


def _at(least: float, score: Array, right: Array, inside: Array) -> tuple[float, float]:
    accepted = score >= least
    return float((right & accepted)[inside].mean()), float((~accepted)[~inside].mean())


def _halves(targets: Scoped, score: Array, right: Array) -> Iterator[tuple[float, float]]:
    chance = np.random.default_rng(0)
    inside = targets.inside
    for _ in range(HALVES):
        order = chance.permutation(len(score))
        half, other = np.split(order, [len(order) // 2])
        if inside[other].all() or not inside[other].any() or inside[half].all():
            continue  # too few rows to say anything with this half
        least = threshold(score[half][~inside[half]], targets.recall) / 2
        yield _at(least, score[other], right[other], inside[other])
