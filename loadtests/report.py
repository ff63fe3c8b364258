"""What trials found: one Report each, as JSON, as a table, and as ratios between two lots of them."""

from __future__ import annotations

import math
import os
import platform
import re
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import msgspec
from msgspec.structs import asdict, replace
from rich.table import Table
from rich.text import Text

from loadtests.client import CANCELLED
from loadtests.scenario import Scenario


class ReportFault(Exception):
    """The reports can't be read or compared; the message says which and why."""


class Spread(msgspec.Struct, frozen=True):
    """A sample's percentiles, by nearest rank: each is a value that occurred."""

    count: int
    p50_s: float
    p90_s: float
    p99_s: float
    max_s: float
    curve_s: tuple[float, ...] = ()
    """The percentiles 0 to 100, all of them, for plotting."""

    @classmethod
    def of(cls, values_s: Iterable[float]) -> Spread | None:
        """None if there are no values."""
        ordered = sorted(values_s)
        if not ordered:
            return None
        curve_s = tuple(percentile(ordered, percent) for percent in range(101))
        p50_s, p90_s, p99_s, max_s = (curve_s[percent] for percent in (50, 90, 99, 100))
        return cls(count=len(ordered), p50_s=p50_s, p90_s=p90_s, p99_s=p99_s, max_s=max_s, curve_s=curve_s)


def percentile(ordered: Sequence[float], percent: int) -> float:
    """The smallest of the values, which ascend, that at least `percent` of 100 of them do not exceed."""
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


class Cost(msgspec.Struct, frozen=True):
    """What the target's process tree used."""

    cpu_us_per_call: float
    """User and system time, over calls sent, whatever came of them."""
    cpu_us_per_chunk: float | None
    """The same time, all of it, over streamed chunks."""
    cores: float
    """CPU time over time: 1.0 is one core, busy."""
    rss_bytes_max: int
    rss_slope_bytes_per_h: float | None = None
    """By Theil and Sen, over the trial; None for one shorter than a minute, which says nothing of an hour."""


class Batches(msgspec.Struct, frozen=True):
    """What a server made of the calls it had at once, as shares of 1 that were at most so much."""

    rows: tuple[tuple[float, float], ...]
    """Of batches, by how many rows they had."""
    queue_s: tuple[tuple[float, float], ...]
    """Of rows, by how long they waited for one."""


class Service(msgspec.Struct, frozen=True, kw_only=True):
    """What came of calls: all of a trial's, or one tenant's. Latencies are those of served calls, counted from when a
    call was due."""

    calls: int
    outcomes: dict[str, int]
    """`served`; `cancelled` if the scenario had its caller leave; else an HTTP status, `connect`, `closed` (in
    mid-answer), `cut` (a stream that ended without [DONE]), `error-event`, `garbage`, `too-large`, `timeout`, `unsent`
    (due, and no connection got free)."""
    chunks: int
    tokens: int
    """Completion tokens that arrived, as the target counts them."""
    good_per_s: float | None
    """Goodput: served within the scenario's objective; None if it has none."""
    first_token: Spread | None
    gap: Spread | None
    """Between contents of a stream; zero for those read at once."""
    total: Spread | None
    late: Spread | None
    """How long after they were due calls were sent; None in a closed loop."""
    served_in: tuple[int, ...]
    """Calls served in the trial's first second, second, and so on."""
    tokens_in: tuple[int, ...]
    """Tokens of the calls that ended in it."""

    @property
    def served(self) -> int:
        return self.outcomes.get("served", 0)


class Report(Service, frozen=True, kw_only=True):
    """One trial."""

    scenario: str
    settings: Scenario
    target: str
    at: str
    machine: str
    load_average: float
    """Of the last minute, the trial's own load included: how much else went on."""
    elapsed_s: float
    """From the first call to the end of the last answer."""
    client_cores: float
    """CPU time of the client over time: near 1.0 it is the client that was measured."""
    tenants: dict[str, Service]
    cost: Cost | None
    batches: Batches | None = None


class Side(msgspec.Struct, frozen=True):
    """Whoever was loaded, and how it did."""

    name: str
    version: str = ""
    about: str = ""
    fault: str = ""
    """Why it did not take part in all of it."""
    runs: tuple[Report, ...] = ()

    def of(self, scenario: str) -> tuple[Report, ...]:
        return tuple(run for run in self.runs if run.scenario == scenario)


class Results(msgspec.Struct, frozen=True):
    """What `--json` says: all that were loaded in turn, in one run."""

    sides: tuple[Side, ...]

    @property
    def scenarios(self) -> tuple[str, ...]:
        """In the order they were run in."""
        return tuple(dict.fromkeys(run.scenario for side in self.sides for run in side.runs))


class Metric(msgspec.Struct, frozen=True):
    """A figure of a Report, as people read it."""

    name: str
    of: Callable[[Report], float | None]
    format: str = "{:,.2f}"


def _quantiles(name: str, spread: Callable[[Report], Spread | None]) -> tuple[Metric, ...]:
    def of(field: str) -> Callable[[Report], float | None]:
        return lambda report: None if (found := spread(report)) is None else getattr(found, field) * 1_000

    return tuple(Metric(f"{name} {field} ms", of(f"{field}_s")) for field in ("p50", "p90", "p99"))


def _cost(of: Callable[[Cost], float | None]) -> Callable[[Report], float | None]:
    return lambda report: None if report.cost is None else of(report.cost)


METRICS = (
    Metric("calls", lambda report: report.calls, "{:,.0f}"),
    Metric("served", lambda report: report.served, "{:,.0f}"),
    Metric("served/s", lambda report: report.served / report.elapsed_s, "{:,.1f}"),
    Metric("good/s", lambda report: report.good_per_s, "{:,.1f}"),
    Metric("tokens/s", lambda report: report.tokens / report.elapsed_s, "{:,.1f}"),
    *_quantiles("first token", lambda report: report.first_token),
    *_quantiles("token gap", lambda report: report.gap),
    *_quantiles("whole call", lambda report: report.total),
    *_quantiles("sent late", lambda report: report.late),
    Metric("CPU µs per call", _cost(lambda cost: cost.cpu_us_per_call), "{:,.1f}"),
    Metric("CPU µs per chunk", _cost(lambda cost: cost.cpu_us_per_chunk), "{:,.1f}"),
    Metric("CPU cores", _cost(lambda cost: cost.cores)),
    Metric("memory MB", _cost(lambda cost: cost.rss_bytes_max / 1e6), "{:,.1f}"),
    Metric("growth MB/h", _cost(lambda cost: None if (it := cost.rss_slope_bytes_per_h) is None else it / 1e6)),
    Metric("client's CPU cores", lambda report: report.client_cores),
    Metric("load average", lambda report: report.load_average, "{:,.1f}"),
)


TENANT_METRICS = tuple(
    metric
    for metric in METRICS
    if metric.name in ("calls", "served/s", "good/s", "tokens/s", "first token p50 ms", "first token p99 ms")
)


def heading(runs: Sequence[Report]) -> str:
    """What was done, to whom, where."""
    first = runs[0]
    trials = "1 trial" if len(runs) == 1 else f"{len(runs)} trials"
    return f"{first.scenario}: {first.settings.about}\n{first.target}, {trials}, {first.machine}"


def table(runs: Sequence[Report]) -> Table:
    """Medians over the trials, with the least and the most if there are several."""
    shown = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("", "median", *(("least", "most") if len(runs) > 1 else ())):
        shown.add_column(column, justify="right" if column else "left")
    for metric in METRICS:
        values = [value for value in map(metric.of, runs) if value is not None]
        if values:
            figures = (statistics.median(values), *((min(values), max(values)) if len(runs) > 1 else ()))
            shown.add_row(metric.name, *map(metric.format.format, figures))
    for outcome in sorted({outcome for run in runs for outcome in run.outcomes} - {"served"}):
        counts = [run.outcomes.get(outcome, 0) for run in runs]
        figures = (statistics.median(counts), *((min(counts), max(counts)) if len(runs) > 1 else ()))
        asked = outcome == CANCELLED
        label = Text(outcome) if asked else Text(f"not served: {outcome}", style="red")
        shown.add_row(label, *map("{:,.0f}".format, figures))
    return shown


def tenants(runs: Sequence[Report]) -> Table:
    """A row a tenant."""
    shown = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("", *(metric.name for metric in TENANT_METRICS)):
        shown.add_column(column, justify="right" if column else "left")
    for row in tenant_rows(runs):
        shown.add_row(*row)
    return shown


def tenant_rows(runs: Sequence[Report]) -> Iterator[tuple[str, ...]]:
    """A tenant's name and its TENANT_METRICS, medians over the trials."""
    for name in runs[0].tenants:
        own = [replace(run, **asdict(run.tenants[name])) for run in runs]
        found = ([it for run in own if (it := metric.of(run)) is not None] for metric in TENANT_METRICS)
        yield (
            name,
            *(
                metric.format.format(statistics.median(values)) if values else "–"
                for metric, values in zip(TENANT_METRICS, found, strict=True)
            ),
        )


def comparison(a: Sequence[Report], b: Sequence[Report]) -> Table:
    """Ratios b/a, of the first to the first, the second to the second, and so on, so that what drifts on the machine
    falls out when the trials alternated. Raises ReportFault if they don't pair."""
    ratios = compare(a, b)
    shown = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("", "A", "B", "B/A", "least", "most"):
        shown.add_column(column, justify="right" if column else "left")
    for metric in METRICS:
        if metric.name in ratios:
            medians = [
                statistics.median(value for run in runs if (value := metric.of(run)) is not None) for runs in (a, b)
            ]
            pairs = ratios[metric.name]
            spread = (statistics.median(pairs), min(pairs), max(pairs))
            shown.add_row(metric.name, *map(metric.format.format, medians), *map("{:.3f}".format, spread))
    return shown


def compare(a: Sequence[Report], b: Sequence[Report]) -> dict[str, list[float]]:
    """Every metric's ratio b/a, pair by pair, where both have the figure and a's is not zero."""
    if not a or len(a) != len(b):
        raise ReportFault(f"trials are compared in pairs, and there are {len(a)} and {len(b)}; use the same --repeat")
    ratios: dict[str, list[float]] = {}
    for metric in METRICS:
        pairs = [(metric.of(one), metric.of(other)) for one, other in zip(a, b, strict=True)]
        found = [theirs / ours for ours, theirs in pairs if ours and theirs is not None]
        if found:
            ratios[metric.name] = found
    return ratios


def read(path: Path) -> Results:
    """What `run --json` wrote. Raises ReportFault."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Results)
    except OSError as error:
        raise ReportFault(f"{path} can't be read: {error.strerror}") from None
    except msgspec.DecodeError as error:
        raise ReportFault(f"{path} is not what `--json` makes: {error}") from None


def machine() -> str:
    """One line: what a figure must be read with."""
    found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return (
        f"{os.cpu_count()} cores of {found[1] if found else platform.machine()}, "
        f"{platform.system()} {platform.release()}, Python {platform.python_version()}"
    )
