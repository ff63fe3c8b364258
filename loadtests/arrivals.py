"""When calls are due: pure functions of a Spec, so that two runs of a scenario ask at the same moments.

An open loop (`constant`, `poisson`) asks on schedule whether or not earlier calls were answered, as people do.
A closed one asks again when it was answered: it finds the most that a target can do, and its latencies say
little, because a slow target is asked less.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Annotated

import msgspec

Rate = Annotated[float, msgspec.Meta(gt=0, le=1_000_000)]


class Closed(msgspec.Struct, tag="closed", tag_field="kind", frozen=True, forbid_unknown_fields=True):
    """Every connection asks again as soon as it was answered."""

    def times_s(self, duration_s: float) -> Iterator[None]:
        """None for each call: due whenever a connection is free."""
        return itertools.repeat(None)


class Constant(msgspec.Struct, tag="constant", tag_field="kind", frozen=True, forbid_unknown_fields=True):
    """Evenly spaced."""

    rate_per_s: Rate

    def times_s(self, duration_s: float) -> Iterator[float]:
        """Seconds after the start, ascending, below `duration_s`."""
        numbered = (number / self.rate_per_s for number in itertools.count())
        return itertools.takewhile(lambda at_s: at_s < duration_s, numbered)


class Poisson(msgspec.Struct, tag="poisson", tag_field="kind", frozen=True, forbid_unknown_fields=True):
    """Independent callers: the gaps are exponential, and the same for the same seed."""

    rate_per_s: Rate
    seed: int = 1

    def times_s(self, duration_s: float) -> Iterator[float]:
        """Seconds after the start, ascending, below `duration_s`."""
        chance = random.Random(self.seed)  # noqa: S311 - repeatable is what it must be
        gaps_s = (chance.expovariate(self.rate_per_s) for _ in itertools.count())
        return itertools.takewhile(lambda at_s: at_s < duration_s, itertools.accumulate(gaps_s))


Arrivals = Closed | Constant | Poisson
