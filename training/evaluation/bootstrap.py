"""Intervals for differences between two models that were measured with the same rows."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from training.contract import Array, Targets
from training.evaluation.measures import measure

RESAMPLES = 1000


def difference(
    name: str, targets: Targets, one: Mapping[str, Array], other: Mapping[str, Array], *, seed: int
) -> tuple[float, float, float]:
    """Of the measure `name`, of `one` minus of `other`: the value, and the ends of its 95 % interval by a paired
    percentile bootstrap over the rows."""
    chance = np.random.default_rng(seed)

    def of(chosen: Array) -> float:
        rows = targets.take(chosen)
        scores = [measure(rows, {key: array[chosen] for key, array in it.items()}) for it in (one, other)]
        return scores[0][name] - scores[1][name]

    count = len(targets)
    found = [of(chance.integers(0, count, count)) for _ in range(RESAMPLES)]
    low, high = np.nanpercentile(found, (2.5, 97.5))
    return of(np.arange(count)), float(low), float(high)


def gain(one: Array, other: Array, *, seed: int) -> tuple[float, float, float]:
    """Of the mean over rows [n], of `one` minus of `other`: the same."""
    chance = np.random.default_rng(seed)
    apart = one.astype(float) - other.astype(float)
    found = [apart[chance.integers(0, len(apart), len(apart))].mean() for _ in range(RESAMPLES)]
    low, high = np.percentile(found, (2.5, 97.5))
    return float(apart.mean()), float(low), float(high)
