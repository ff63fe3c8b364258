"""How often a value fell where: cheap to add to, and what Prometheus wants."""

from __future__ import annotations

from bisect import bisect_left


class Histogram:
    """How often a value fell up to each of `bounds`."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def plus(self, other: Histogram) -> Histogram:
        """Both as one; they have the same bounds."""
        both = Histogram(self.bounds)
        both.counts = [one + another for one, another in zip(self.counts, other.counts, strict=True)]
        both.sum = self.sum + other.sum
        return both

    def buckets(self) -> list[tuple[str, float]]:
        """As Prometheus has them: cumulative, each with its upper bound."""
        total, named = 0, []
        for bound, count in zip((*map(str, map(float, self.bounds)), "+Inf"), self.counts, strict=True):
            total += count
            named.append((bound, float(total)))
        return named
