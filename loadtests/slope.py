"""How fast something grows: the Theil–Sen estimate, which a few odd samples do not move."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import combinations

SAMPLES_MAX = 400
"""Used, evenly spread, of those there are: the pairs are counted, and they grow with the square."""


def slope_per_s(samples: Sequence[tuple[float, float]]) -> float | None:
    """The median slope between all pairs of (time in seconds, value); None for fewer than two times."""
    step = -(-len(samples) // SAMPLES_MAX)
    slopes = [
        (later - earlier) / (after_s - before_s)
        for (before_s, earlier), (after_s, later) in combinations(samples[:: step or 1], 2)
        if after_s > before_s
    ]
    return statistics.median(slopes) if slopes else None
