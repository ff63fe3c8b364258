"""Intervals for differences between two models that were measured with the same rows."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from training.contract import Array, Scores, Targets
from training.evaluation.measures import measure

RESAMPLES = 1000


Interval = tuple[float, float, float]
"""A value, and the ends of its 95 % interval."""


def difference(
    name: str, targets: Targets, one: Mapping[str, Array], other: Mapping[str, Array], *, seed: int
) -> Interval:
    """Of the measure `name`, of `one` minus of `other`."""
    return differences(targets, one, other, seed=seed)[name]


def differences(
    targets: Targets, one: Mapping[str, Array], other: Mapping[str, Array], *, seed: int
) -> dict[str, Interval]:
    """Of every measure, of `one` minus of `other`, by a paired percentile bootstrap over the rows."""
    chance = np.random.default_rng(seed)

    def of(chosen: Array) -> Scores:
        rows = targets.take(chosen)
        ours, theirs = (measure(rows, {key: array[chosen] for key, array in it.items()}) for it in (one, other))
        return {name: value - theirs[name] for name, value in ours.items() if name in theirs}

    count = len(targets)
    values = of(np.arange(count))
    found = [of(chance.integers(0, count, count)) for _ in range(RESAMPLES)]
    ends = {name: np.nanpercentile([it.get(name, np.nan) for it in found], (2.5, 97.5)) for name in values}
    return {name: (value, float(ends[name][0]), float(ends[name][1])) for name, value in values.items()}


def gain(one: Array, other: Array, *, seed: int) -> Interval:
    """Of the mean over rows [n], of `one` minus of `other`: the same."""
    chance = np.random.default_rng(seed)
    apart = one.astype(float) - other.astype(float)
    found = [apart[chance.integers(0, len(apart), len(apart))].mean() for _ in range(RESAMPLES)]
    low, high = np.percentile(found, (2.5, 97.5))
    return float(apart.mean()), float(low), float(high)
