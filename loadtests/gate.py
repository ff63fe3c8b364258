"""A gate against growing dearer: our cost as a multiple of a neighbour's in the same run, against the stored one.

Ratios only, never times: a time is the machine's, a ratio is the code's.
"""

from __future__ import annotations

import statistics
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from loadtests.arrivals import Closed
from loadtests.report import ReportFault, Results
from loadtests.standings import OWN, columns, named, ratios

BASELINE = Path(__file__).with_name("baseline.toml")
NEIGHBOURS = ("sglang", "nginx")
TOLERANCE = 0.25


class Ratio(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What `headrace` costs, all policy on, as a multiple of a neighbour's."""

    scenario: str
    figure: str
    to: str
    """The neighbour."""
    ratio: Annotated[float, Meta(gt=0)]


class Baseline(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is held."""

    tolerance: Annotated[float, Meta(gt=0, le=10)]
    """How much worse is still alike: 0.25 is a quarter. Two runs on a shared machine differ by that much."""
    ratios: Annotated[tuple[Ratio, ...], Meta(min_length=1)]


class Verdict(msgspec.Struct, frozen=True):
    """One ratio, and what was found."""

    held: Ratio
    found: float | None
    """None if it was not measured."""
    worst: float
    """The most that passes."""

    @property
    def passed(self) -> bool:
        return self.found is not None and self.found <= self.worst

    def __str__(self) -> str:
        held = self.held
        what = f"{held.scenario}: {held.figure} of {held.to}'s"
        if self.found is None:
            return f"{what} was not measured; run {held.scenario} with --only {held.to},{OWN}"
        verdict = "passes" if self.passed else "is worse than it may be"
        return f"{what}: {self.found:.3g} times, was {held.ratio:.3g}, at most {self.worst:.3g}; it {verdict}"


def judge(results: Results, baseline: Baseline) -> tuple[Verdict, ...]:
    """Medians over the repetitions."""
    found = {(it.scenario, it.figure, it.to): it.ratio for it in measured(results)}
    return tuple(
        Verdict(
            held=held,
            found=found.get((held.scenario, held.figure, held.to)),
            worst=held.ratio * (1 + baseline.tolerance),
        )
        for held in baseline.ratios
    )


def measured(results: Results) -> Iterator[Ratio]:
    """Of every closed scenario, the cost that counts: in an open one it depends on how busy a server is."""
    ours = named(results, OWN)
    for scenario in results.scenarios:
        run = next(run for side in results.sides for run in side.of(scenario))
        if not isinstance(run.settings.arrivals, Closed):
            continue
        cost = columns(run)[0]
        for neighbour in NEIGHBOURS:
            if pairs := ratios(results, scenario, ours, named(results, neighbour), cost):
                yield Ratio(scenario=scenario, figure=cost.name, to=neighbour, ratio=statistics.median(pairs))


def load(path: Path) -> Baseline:
    """Raises ReportFault."""
    try:
        return msgspec.convert(tomllib.loads(path.read_text()), Baseline)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise ReportFault(f"the baseline {path} can't be used: {error}") from None


def written(ratios: tuple[Ratio, ...]) -> str:
    """A baseline of them, as TOML."""
    lines = (
        f'    {{ scenario = "{it.scenario}", figure = "{it.figure}", to = "{it.to}", ratio = {it.ratio:.3g} }},'
        for it in ratios
    )
    return "\n".join((HEAD, f"tolerance = {TOLERANCE}", "ratios = [", *lines, "]", ""))


HEAD = """# What a call or a chunk costs Headrace with all policy on, as a multiple of what it costs a neighbour in the
# same run. `headrace-load gate RESULTS.json` holds results against it; with --save they replace it."""
