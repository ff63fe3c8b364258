"""The gate: a table of rules, all of which must hold before anything is published. A measure of some of the rows
only is written `<measure>[<column>=<value>]`, for the columns that the data has as slices.

<measure>_min, <measure>_max      of the bundle as it will be served
<measure>_drop_max                of the fp32 model minus of the bundle; `_increase_max` the other way round
<measure>_over_floor_min          of the bundle minus of the floor; `_under_floor_min` the other way round
<measure>_times_floor_min         of the bundle, as a multiple of the floor's; `_times_floor_max` where less is better
<measure>_over_stable_min         of the bundle minus of the promoted artifact, on the same rows: the lower end of the
                                  95 % interval; holds while nothing is promoted
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import msgspec

from training.contract import Scores
from training.errors import GateFailed, RecipeError

KINDS = (
    "_over_floor_min", "_under_floor_min", "_times_floor_min", "_times_floor_max", "_over_stable_min", "_drop_max",
    "_increase_max", "_min", "_max",
)  # fmt: skip
ALWAYS = ("size_bytes", "size_ratio", "speedup_1", "speedup_8", "latency_ms", "batch_drift")
"""Measured of every graph."""


class Evidence(msgspec.Struct, frozen=True):
    """What a gate decides on."""

    before: Scores
    after: Scores
    floor: Scores
    stable: Callable[[str], float | None]
    """Measure → lower end of the interval of the gain on the promoted artifact; None if there is none."""
    steps: Mapping[str, Scores] = {}
    """Compression that others follow → what was measured after it. For the report; no rule is about it."""


class Finding(msgspec.Struct, frozen=True):
    rule: str
    bound: float
    value: float | None
    """None: there was nothing to compare with."""

    @property
    def holds(self) -> bool:
        if self.value is None:
            return True
        # A NaN fails either way.
        return self.value >= self.bound if self.rule.endswith("_min") else self.value <= self.bound


def check(gate: Mapping[str, float], measures: Collection[str]) -> None:
    """Raise RecipeError for a rule about something that will not be measured."""
    every = ", ".join((*sorted(it for it in measures if "[" not in it), *ALWAYS))
    for rule in gate:
        name, kind = _parts(rule)
        plain = name.removeprefix("folds_").removeprefix("pooled_")
        if plain not in measures and name not in ALWAYS:
            raise RecipeError(f"the gate's {rule!r} is a bound on nothing; measured are {every}")
        if kind == "_over_stable_min" and name not in measures:
            raise RecipeError(f"the gate's {rule!r} is a bound on nothing: the promoted artifact is not measured so")


def findings(gate: Mapping[str, float], evidence: Evidence) -> list[Finding]:
    """Every rule and what it found."""
    return [Finding(rule, bound, _value(rule, evidence)) for rule, bound in gate.items()]


def require(found: list[Finding]) -> None:
    """Raise GateFailed naming every rule that does not hold, and by how much."""
    failed = [
        f"{it.rule} is {it.bound:g}, measured {it.value:.4f}" for it in found if not it.holds and it.value is not None
    ]
    if failed:
        raise GateFailed(f"nothing was published: {'; '.join(failed)}")


def _parts(rule: str) -> tuple[str, str]:
    for kind in KINDS:
        if rule.endswith(kind):
            return rule.removesuffix(kind), kind
    raise RecipeError(f"the gate's {rule!r} is no bound: end it with one of {', '.join(KINDS)}")


def _value(rule: str, evidence: Evidence) -> float | None:
    name, kind = _parts(rule)
    nan = float("nan")
    after = evidence.after.get(name, nan)
    match kind:
        case "_min" | "_max":
            return after
        case "_drop_max":
            return evidence.before.get(name, nan) - after
        case "_increase_max":
            return after - evidence.before.get(name, nan)
        case "_over_floor_min":
            return after - evidence.floor.get(name, nan)
        case "_under_floor_min":
            return evidence.floor.get(name, nan) - after
        case "_times_floor_min" | "_times_floor_max":
            return after / (evidence.floor.get(name, nan) or nan)
        case _:
            return evidence.stable(name)
