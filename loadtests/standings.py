"""How the peers did, side by side: what a call and a chunk cost, how many a core can do, what was added to waiting."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import msgspec
from rich.table import Table

from loadtests.arrivals import Closed
from loadtests.client import CANCELLED
from loadtests.report import Cost, Report, Results, Side

DIRECT = "direct"
"""The side without a gateway."""
FACTOR = "{:,.3g}"
OWN = "headrace"
"""Whose figures are compared: every side whose name begins so."""


class Column(msgspec.Struct, frozen=True):
    """A figure of one trial; latencies need the trial on the bare engine of the same repetition."""

    name: str
    of: Callable[[Report, Report], float | None]
    format: str


def _added(percentile: str) -> Callable[[Report, Report], float | None]:
    def of(run: Report, direct: Report) -> float | None:
        ours, theirs = (it.first_token or it.total for it in (run, direct))
        return (
            None if ours is None or theirs is None else (getattr(ours, percentile) - getattr(theirs, percentile)) * 1e3
        )

    return of


def _whole(percentile: str) -> Callable[[Report, Report], float | None]:
    return lambda run, _: None if run.total is None else float(getattr(run.total, percentile)) * 1e3


def _cost(figure: Callable[[Cost], float | None]) -> Callable[[Report, Report], float | None]:
    return lambda run, _: None if run.cost is None else figure(run.cost)


CALL = Column("CPU µs/call", _cost(lambda cost: cost.cpu_us_per_call), "{:,.1f}")
CHUNK = Column("CPU µs/chunk", _cost(lambda cost: cost.cpu_us_per_chunk), "{:,.2f}")
SERVED = Column("served/s", lambda run, _: run.served / run.elapsed_s, "{:,.0f}")
GOOD = Column("good/s", lambda run, _: run.good_per_s, "{:,.0f}")
MEMORY = Column("RSS MB", _cost(lambda cost: cost.rss_bytes_max / 1e6), "{:,.0f}")
GROWTH = Column(
    "growth MB/h", _cost(lambda cost: None if (it := cost.rss_slope_bytes_per_h) is None else it / 1e6), "{:,.1f}"
)
BUSY = Column("cores", _cost(lambda cost: cost.cores), "{:.2f}")
WHOLE = (Column("p50 ms", _whole("p50_s"), "{:,.2f}"), Column("p99 ms", _whole("p99_s"), "{:,.2f}"))
ADDED = (Column("added p50 ms", _added("p50_s"), "{:,.2f}"), Column("added p99 ms", _added("p99_s"), "{:,.2f}"))


def columns(run: Report) -> tuple[Column, ...]:
    """Those that say something of this scenario, what counts first. In a closed loop all ask at once, and waiting is
    what is asked for; but a classifier's callers wait for a batch."""
    if run.settings.texts:
        return (SERVED, *WHOLE)
    costs = (CHUNK, CALL) if run.settings.streams else (CALL,)
    closed = isinstance(run.settings.arrivals, Closed)
    good, growth = (((column,) if column.of(run, run) is not None else ()) for column in (GOOD, GROWTH))
    return (*costs, SERVED, *good, *(() if closed else ADDED), MEMORY, *growth, BUSY)


def figures(results: Results, scenario: str, side: Side, column: Column) -> list[float]:
    """One per trial that has it."""
    runs = side.of(scenario)
    found = (column.of(run, base) for run, base in zip(runs, named(results, DIRECT).of(scenario) or runs, strict=False))
    return [it for it in found if it is not None]


def ratios(results: Results, scenario: str, side: Side, other: Side, column: Column) -> list[float]:
    """Trial by trial of the same repetition: what drifts on the machine falls out."""
    pairs = zip(*(figures(results, scenario, it, column) for it in (side, other)), strict=False)
    return [ours / theirs for ours, theirs in pairs if theirs]


def standings(results: Results, scenario: str) -> Table:
    """A row a side: medians, and in brackets the least and the most where there are several trials."""
    some = next(run for side in results.sides for run in side.of(scenario))
    shown = Table(box=None, header_style="bold", pad_edge=False)
    shown.add_column("")
    for column in columns(some):
        shown.add_column(column.name, justify="right")
    shown.add_column("not served")
    for side in results.sides:
        runs = side.of(scenario)
        if runs:
            cells = (cell(figures(results, scenario, side, column), column.format) for column in columns(some))
            shown.add_row(side.name, *cells, not_served(runs))
        else:
            shown.add_row(side.name, *("–" for _ in columns(some)), side.fault)
    return shown


def cross(results: Results, scenario: str) -> Table:
    """Ours as a multiple of everybody's: a column for each of ours, a row for each of the others."""
    some = next(run for side in results.sides for run in side.of(scenario))
    ours = [side for side in results.sides if side.name.startswith(OWN)]
    shown = Table(box=None, header_style="bold", pad_edge=False)
    shown.add_column("")
    cost = columns(some)[0]
    for side in ours:
        shown.add_column(f"{side.name}, {cost.name}", justify="right")
    for other in results.sides:
        if other.name != DIRECT and other not in ours:
            shown.add_row(
                f"of {other.name}'s", *(cell(ratios(results, scenario, it, other, cost), FACTOR) for it in ours)
            )
    return shown


def cell(values: Sequence[float], format: str) -> str:
    if not values:
        return "–"
    median = format.format(statistics.median(values))
    spread = f" ({format.format(min(values))}–{format.format(max(values))})" if len(values) > 1 else ""
    return median + spread


def not_served(runs: Sequence[Report]) -> str:
    """Share of calls, by outcome."""
    calls = sum(run.calls for run in runs)
    counts = {
        it: sum(run.outcomes.get(it, 0) for run in runs)
        for run in runs
        for it in run.outcomes
        if it not in ("served", CANCELLED)
    }
    return ", ".join(f"{count / calls:.1%} {outcome}" for outcome, count in sorted(counts.items()))


def named(results: Results, name: str) -> Side:
    """Without trials if it took no part."""
    return next((side for side in results.sides if side.name == name), Side(name=name))
