"""The report for people: one HTML page, whole in itself, that opens without a network."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

import msgspec

from loadtests import plot
from loadtests.arrivals import Closed
from loadtests.peer import ALL
from loadtests.report import TENANT_METRICS, Report, Results, Service, Side, Spread, tenant_rows
from loadtests.standings import DIRECT, FACTOR, OWN, Column, cell, columns, figures, not_served, ratios

HEAD = '<!doctype html><html lang="en"><meta charset="utf-8"><title>Load report</title>'
STYLE = Path(__file__).with_suffix(".css")
COLOURS = 8
"""The style sheet's."""


def page(results: Results) -> str:
    """Everything that the results hold."""
    first = next(run for side in results.sides for run in side.runs)
    steps = [name for name in results.scenarios if _step(_run(results, name)) is not None]
    whole = [name for name in results.scenarios if name not in steps]
    body = [
        f"<h1>Load report</h1><p>{escape(first.machine)} · {escape(first.at)} · load average at the start "
        f"{first.load_average:.1f} · client's CPU {_cores(results)} of its core</p>",
        _versions(results),
        *(_scenario(results, name) for name in whole),
        *([_ladder(results, steps)] if steps else []),
        "<h2>Settings</h2>",
        *(_settings(_run(results, name)) for name in results.scenarios),
    ]
    return HEAD + f"<style>{STYLE.read_text()}</style>{''.join(body)}</html>\n"


def _scenario(results: Results, name: str) -> str:
    run = _run(results, name)
    parts = [f"<h2>{escape(name)}</h2><p>{escape(run.settings.about)}</p>"]
    cost = columns(run)[0]
    parts += _bars(results, name, cost)
    what = "first token" if run.settings.streams else "whole call"
    closed = isinstance(run.settings.arrivals, Closed)
    parts.append(f"<h3>Latency: {what}{', in a closed loop' if closed else ', from when calls were due'}</h3>")
    parts.append(plot.lines(list(_curves(results, name)), x="milliseconds", y="% of calls", log_x=True))
    parts += _batches(results, name)
    if len(run.tenants) > 1:
        parts += _fairness(results, name)
    parts.append(_table(results, name))
    parts.append(_cross(results, name, cost))
    return "".join(parts)


def _bars(results: Results, name: str, column: Column) -> list[str]:
    rows = [
        plot.Bar(side.name, statistics.median(found), min(found), max(found), _style(results, side))
        for side in results.sides
        if side.name != DIRECT and (found := figures(results, name, side, column))
    ]
    if not rows:
        return []
    near = [row.most for row in rows if row.name.startswith((OWN, "sglang"))] or [row.most for row in rows]
    limit = min(max(row.most for row in rows), max(near) * 1.5)
    return [f"<h3>{escape(column.name)}</h3>", plot.bars(rows, format=column.format, limit=limit)]


def _curves(results: Results, name: str) -> Iterator[plot.Line]:
    for side in results.sides:
        found = [it for run in side.of(name) if (it := _spread(run)) is not None]
        if found:
            middle = [statistics.median(it.curve_s[percent] for it in found) for percent in range(101)]
            points = tuple((value_s * 1e3, float(percent)) for percent, value_s in enumerate(middle))
            yield plot.Line(side.name, points, _style(results, side))


def _batches(results: Results, name: str) -> Iterator[str]:
    """How calls were put together, where a server told."""
    told = [(side, runs[-1].batches) for side in results.sides if (runs := side.of(name)) and runs[-1].batches]
    if told:
        rows = [
            plot.Line(side.name, tuple((at, share * 100) for at, share in it.rows), _style(results, side))
            for side, it in told
            if it
        ]
        queue = [
            plot.Line(side.name, tuple((at * 1e3, share * 100) for at, share in it.queue_s), _style(results, side))
            for side, it in told
            if it
        ]
        yield f"<h3>Batch size</h3>{plot.lines(rows, x='rows, at most', y='% of batches', height=150, log_x=True)}"
        yield "<h3>Wait for a batch</h3>"
        yield plot.lines(queue, x="milliseconds, at most", y="% of rows", height=150, log_x=True)


def _fairness(results: Results, name: str) -> Iterator[str]:
    yield "<h3>Fairness: calls served, by tenant</h3>"
    for side in results.sides:
        for run in side.of(name)[:1]:
            rows = [
                plot.Line(tenant, _by_second(it, until_s=run.settings.duration_s), f"c{number % COLOURS}")
                for number, (tenant, it) in enumerate(run.tenants.items())
            ]
            chart = plot.lines(rows, x="seconds", y="in each second", height=110)
            yield f"<h4>{escape(side.name)}</h4>{chart}{_tenants(side.of(name))}"


def _tenants(runs: Sequence[Report]) -> str:
    head = "".join(f"<th>{escape(metric.name)}" for metric in TENANT_METRICS)
    rows = ("".join(f"<td>{escape(it)}" for it in row) for row in tenant_rows(runs))
    return f"<table><tr><th>{head}{''.join(f'<tr>{row}' for row in rows)}</table>"


def _by_second(service: Service, *, until_s: float) -> tuple[tuple[float, float], ...]:
    """While calls were due: what still runs then is nobody's rate."""
    return tuple((float(second), float(count)) for second, count in enumerate(service.served_in[: int(until_s)]))


def _ladder(results: Results, steps: Sequence[str]) -> str:
    rows = []
    for side in results.sides:
        points = []
        for name in steps:
            offered = _step(_run(results, name))
            runs = side.of(name)
            if offered is not None and runs:
                # Over the time in which calls were due: what comes late is served, but not at this rate.
                points.append((offered, statistics.median(run.served / run.elapsed_s for run in runs)))
        rows.append(plot.Line(side.name, tuple(points), _style(results, side)))
    title = "<h2>Served against offered</h2>"
    about = f"<p>{escape(_run(results, steps[0]).settings.about)}</p>"
    chart = plot.lines(rows, x="calls offered per second", y="calls served per second")
    return title + about + chart + "".join(f"<h3>{escape(name)}</h3>{_table(results, name)}" for name in steps)


def _table(results: Results, name: str) -> str:
    shown = columns(_run(results, name))
    head = "".join(f"<th>{escape(it)}" for it in ("", *(column.name for column in shown), "not served"))
    rows = []
    for side in results.sides:
        runs = side.of(name)
        cells = [cell(figures(results, name, side, column), column.format) for column in shown]
        last = not_served(runs) if runs else side.fault
        rows.append("".join(f"<td>{escape(it)}" for it in (side.name, *cells, last)))
    return f"<table><tr>{head}{''.join(f'<tr>{row}' for row in rows)}</table>"


def _cross(results: Results, name: str, cost: Column) -> str:
    ours = [side for side in results.sides if side.name.startswith(OWN)]
    others = [side for side in results.sides if side not in ours and side.name != DIRECT]
    if not ours or not others:
        return ""
    head = "".join(f"<th>{escape(side.name)}, {escape(cost.name)}" for side in ours)
    rows = (
        f"<tr><td>of {escape(other.name)}’s"
        + "".join(f"<td>{cell(ratios(results, name, side, other, cost), FACTOR)}" for side in ours)
        for other in others
    )
    return f"<h3>Ours, as a multiple</h3><table><tr><th>{head}{''.join(rows)}</table>"


def _versions(results: Results) -> str:
    rows = (
        f"<tr><td>{escape(side.name)}<td>{escape(side.version)}<td>{escape(side.about)}"
        f"{f'<br><b>{escape(side.fault)}</b>' if side.fault else ''}"
        for side in results.sides
    )
    return f'<table class="text"><tr><th>side<th>version<th>set up as{"".join(rows)}</table>'


def _settings(run: Report) -> str:
    """All of them, seeds too."""
    text = msgspec.json.format(msgspec.json.encode(run.settings), indent=1).decode()
    return f"<details><summary>{escape(run.scenario)}</summary><pre>{escape(text)}</pre></details>"


def _run(results: Results, name: str) -> Report:
    return next(run for side in results.sides for run in side.of(name))


def _step(run: Report) -> float | None:
    """The rate, if it is one of several that were tried."""
    return getattr(run.settings.arrivals, "rate_per_s", None) if " at " in run.scenario else None


def _spread(run: Report) -> Spread | None:
    return run.first_token or run.total


def _style(results: Results, side: Side) -> str:
    """The same for the same peer on every page."""
    known = (DIRECT, *(peer.name for peer in ALL))
    names = known if side.name in known else tuple(it.name for it in results.sides)
    return f"c{names.index(side.name) % COLOURS}"


def _cores(results: Results) -> str:
    return cell([run.client_cores for side in results.sides for run in side.runs], "{:.0%}")
