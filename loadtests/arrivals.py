"""When calls are due: pure functions of a Spec, so that two runs of a scenario ask at the same moments.

An open loop asks on schedule whether or not earlier calls were answered, as people do. A closed one asks again when it
was answered: it finds the most that a target can do, and its latencies say little, because a slow target is asked less.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from pathlib import Path
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
        return _after(duration_s, (chance.expovariate(self.rate_per_s) for _ in itertools.count()))


class Bursty(msgspec.Struct, tag="bursty", tag_field="kind", frozen=True, forbid_unknown_fields=True):
    """Callers who come together: the gaps are of a Gamma distribution. At a burstiness of 1 that is Poisson's; at
    0.25, say, most are much shorter and some much longer, at the same rate."""

    rate_per_s: Rate
    burstiness: Annotated[float, msgspec.Meta(gt=0, le=100)] = 0.25
    """Gamma's shape, as vLLM's own benchmark has it: the gaps' variation is 1/√ of it."""
    seed: int = 1

    def times_s(self, duration_s: float) -> Iterator[float]:
        """Seconds after the start, ascending, below `duration_s`."""
        chance = random.Random(self.seed)  # noqa: S311
        scale_s = 1 / (self.rate_per_s * self.burstiness)
        return _after(duration_s, (chance.gammavariate(self.burstiness, scale_s) for _ in itertools.count()))


class Trace(msgspec.Struct, tag="trace", tag_field="kind", frozen=True, forbid_unknown_fields=True):
    """As others were once asked: a file of Mooncake's format, a JSON object a line with `timestamp` in milliseconds,
    `input_length` and `output_length` in tokens, and `hash_ids`, equal where prompts are equal, 512 tokens each."""

    path: str
    """Relative to the scenario's file."""
    speed: Annotated[float, msgspec.Meta(gt=0, le=10_000)] = 1.0
    """2 asks in half the time."""

    def lines(self, duration_s: float) -> Iterator[TraceLine]:
        """Those due below `duration_s`. Raises OSError, and msgspec.DecodeError for what is no trace."""
        with Path(self.path).open("rb") as file:
            for text in file:
                line = TRACE_LINE.decode(text)
                if line.timestamp / 1_000 / self.speed >= duration_s:
                    return
                yield line

    def times_s(self, duration_s: float) -> Iterator[float]:
        """Seconds after the start, ascending, below `duration_s`."""
        return (line.timestamp / 1_000 / self.speed for line in self.lines(duration_s))


class TraceLine(msgspec.Struct, frozen=True):
    """A call that somebody made. The names are the format's."""

    timestamp: Annotated[float, msgspec.Meta(ge=0)]
    input_length: Annotated[int, msgspec.Meta(ge=0, le=10_000_000)]
    output_length: Annotated[int, msgspec.Meta(ge=0, le=10_000_000)]
    hash_ids: tuple[int, ...] = ()


TRACE_LINE = msgspec.json.Decoder(TraceLine)
Arrivals = Closed | Constant | Poisson | Bursty | Trace


def _after(duration_s: float, gaps_s: Iterator[float]) -> Iterator[float]:
    return itertools.takewhile(lambda at_s: at_s < duration_s, itertools.accumulate(gaps_s))
