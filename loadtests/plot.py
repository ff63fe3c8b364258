"""Plots as SVG, drawn by hand: bars with their spread, and lines. Colours come from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from html import escape

import msgspec

WIDTH, LEFT, RIGHT = 720, 110, 96
BAR, BELOW, ABOVE = 30, 44, 26


class Bar(msgspec.Struct, frozen=True):
    """A value, and the least and most it was."""

    name: str
    value: float
    least: float
    most: float
    style: str


class Line(msgspec.Struct, frozen=True):
    name: str
    points: tuple[tuple[float, float], ...]
    style: str


def bars(rows: Sequence[Bar], *, format: str, limit: float) -> str:
    """Horizontal, from zero. One that is longer than `limit` is cut off, visibly: beside it the others would be
    nothing."""
    height = BAR * len(rows) + BELOW
    scale = (WIDTH - LEFT - RIGHT) / limit
    parts = [_grid(_round_ticks(0, limit), lambda value: LEFT + value * scale, BAR * len(rows) + 4)]
    for number, row in enumerate(rows):
        top, middle = BAR * number + 5, BAR * number + BAR / 2
        cut = row.value > limit
        end = LEFT + min(row.value, limit) * scale
        parts.append(_text(LEFT - 8, middle + 4, row.name, "end"))
        parts.append(
            f'<rect class="{row.style}" x="{LEFT}" y="{top}" width="{end - LEFT:.1f}" height="{BAR - 10}" rx="2"/>'
        )
        if cut:
            parts.append(f'<path class="tear" d="M{end - 26:.1f} {top - 2}l-7 {BAR - 6}m8 0l7 -{BAR - 6}"/>')
        elif row.most > row.least:
            left, right = (LEFT + min(it, limit * 1.02) * scale for it in (row.least, row.most))
            parts.append(
                f'<path class="spread" d="M{left:.1f} {middle}H{right:.1f}m0 -5v10M{left:.1f} {middle - 5}v10"/>'
            )
            end = max(end, right)
        parts.append(_text(end + 8, middle + 4, format.format(row.value), "start", "value"))
    return _svg(height, parts)


def lines(rows: Sequence[Line], *, x: str, y: str, height: int = 250, log_x: bool = False) -> str:
    """The names stand on the right, as high as the lines end, moved apart where they would meet."""
    every = [point for row in rows for point in row.points if point[0] > 0 or not log_x]
    x_most = max((it for it, _ in every), default=1.0) or 1.0
    x_least = min((it for it, _ in every), default=0.1) if log_x else 0.0
    y_most = max((it for _, it in every), default=1.0) or 1.0
    x_ticks = _log_ticks(x_least, x_most) if log_x else _round_ticks(x_least, x_most)
    y_ticks = _round_ticks(0, y_most)
    bottom = ABOVE + height
    least, most = x_least, max(x_most, x_least * 1.01)

    def at_x(value: float) -> float:
        share = (
            (math.log(value) - math.log(least)) / ((math.log(most) - math.log(least)) or 1) if log_x else value / most
        )
        return LEFT - 40 + share * (WIDTH - LEFT - RIGHT + 30)

    def at_y(value: float) -> float:
        return bottom - value / max(y_most, y_ticks[-1]) * height

    parts = [_grid(x_ticks, at_x, bottom, top=ABOVE)]
    parts += [
        f'<path class="grid" d="M{at_x(least):.1f} {at_y(tick):.1f}H{at_x(most):.1f}"/>'
        + _text(at_x(least) - 8, at_y(tick) + 4, _short(tick), "end")
        for tick in y_ticks
    ]
    ends: list[tuple[float, int, Line]] = []
    for row in rows:
        points = [(at_x(a), at_y(b)) for a, b in row.points if a > 0 or not log_x]
        if points:
            parts.append(f'<polyline class="{row.style}" points="{" ".join(f"{a:.1f},{b:.1f}" for a, b in points)}"/>')
            ends.append((points[-1][1], len(ends), row))
    ends.sort()
    for level, (_, _, row) in zip(_apart([it[0] for it in ends], most=bottom), ends, strict=True):
        parts.append(_text(at_x(most) + 8, level + 4, row.name, "start", f"label {row.style}"))
    parts.append(_text(at_x(most), bottom + 36, x, "end", "axis"))
    parts.append(_text(at_x(least), ABOVE - 12, y, "start", "axis"))
    return _svg(bottom + BELOW, parts)


def _apart(levels: Sequence[float], *, most: float, step: float = 15.0) -> list[float]:
    """Ascending, at least so far from each other, none beyond `most`."""
    moved: list[float] = []
    for level in levels:
        moved.append(max(level, moved[-1] + step) if moved else level)
    over = max(0.0, (moved[-1] if moved else 0.0) - most)
    return [level - over for level in moved]


def _grid(ticks: Iterable[float], at: Callable[[float], float], bottom: float, *, top: float = 0.0) -> str:
    return "".join(
        f'<path class="grid" d="M{at(tick):.1f} {top}V{bottom}"/>' + _text(at(tick), bottom + 17, _short(tick))
        for tick in ticks
    )


def _round_ticks(least: float, most: float) -> list[float]:
    """Some five round numbers."""
    rough = (most - least) / 5 or 1.0
    power = 10 ** math.floor(math.log10(rough))
    step = next(it * power for it in (1, 2, 5, 10) if it * power >= rough)
    return [number * step for number in range(math.ceil(least / step), math.floor(most / step) + 1)]


def _log_ticks(least: float, most: float) -> list[float]:
    """Powers of ten between them, with 2 and 5 times that if those are few; round numbers if there are hardly any."""
    powers = range(math.floor(math.log10(least)), math.ceil(math.log10(most)) + 1)
    ticks = [it * 10.0**power for power in powers for it in ((1, 2, 5) if len(powers) < 5 else (1,))]
    inside = [tick for tick in ticks if least <= tick <= most]
    return inside if len(inside) > 2 else _round_ticks(least, most)


def _short(value: float) -> str:
    return f"{value / 1_000:g}k" if value >= 10_000 else f"{value:g}"


def _text(x: float, y: float, text: str, anchor: str = "middle", style: str = "tick") -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(height: float, parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img">{"".join(parts)}</svg>'
