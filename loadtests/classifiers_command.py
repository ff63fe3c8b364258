"""`headrace-load classifiers`: what each door to a text classifier takes from it."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
import uvloop
from rich.table import Table

from loadtests.classifiers import RAW, TRITON, classifiers
from loadtests.console import Repeat, Settings, fail, home, require_folder, say, show
from loadtests.page import page
from loadtests.report import Report, Results, Side
from loadtests.scenario import load
from loadtests.standings import FACTOR, cell, named

EXAMPLES = """
Examples:

    headrace-load classifiers --repeat 3 --html classifiers.html
    headrace-load classifiers --artifact .headrace/shelf/minilm/0123456789ab --set callers_each=[32]
"""
NAME = "support-intent"


def classifiers_(
    *,
    artifact: Path | None = None,
    repeat: Repeat = 2,
    settings: Settings = (),
    json: Path | None = None,
    html: Path | None = None,
) -> None:
    """Load a classifier through each of its doors, beside ONNX Runtime alone and beside Triton.

    Parameters
    ----------
    artifact
        Its folder, with a manifest; by default what `support-intent@stable` is on the shelf.
    repeat
        How many trials of each; their order turns over each time.
    settings
        Change a field of the scenario `classify`, e.g. duration_s=20; can be given several times.
    json
        Also write everything that was measured into this file.
    html
        Also write it as a page with plots.
    """
    for file in (json, html):
        require_folder(file)
    scenario = load("classify", settings)
    if not scenario.texts:
        fail(2, "the scenario has no texts to classify")
    folder = (artifact or _promoted(home() / "shelf" / NAME)).absolute()
    if not (folder / "model.onnx").is_file():
        fail(1, f"{folder} is no folder with a model.onnx; name an artifact's with --artifact")
    made = classifiers(scenario, name="classify", artifact=folder, state=home(), repeat=repeat, say=say)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        results = runner.run(made)
    if json is not None:
        json.write_bytes(msgspec.json.encode(results))
    if html is not None:
        html.write_text(page(results))
    for step in results.scenarios:
        show(f"{step}: {scenario.about}", _table(results, step))
    for side in results.sides:
        sys.stdout.write(f"{side.name} {side.version}: {side.about}\n")
    sys.stdout.write(f"{next(run.machine for side in results.sides for run in side.runs)}\n")


def _promoted(home: Path) -> Path:
    try:
        moves = msgspec.json.decode((home / "aliases.json").read_bytes())["stable"]
        return home / str(moves[-1]["version"])
    except (OSError, msgspec.DecodeError, LookupError):
        fail(1, f"there is no {home.name}@stable in {home.parent}; `make serve` makes it, or name another --artifact")


def _table(results: Results, step: str) -> Table:
    shown = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("", "rows/s", f"of {RAW}'s", f"of {TRITON}'s", "p50 ms", "p99 ms", "not served"):
        shown.add_column(column, justify="right" if column else "left")
    for side in results.sides:
        runs = side.of(step)
        shown.add_row(
            side.name,
            cell(_rates(runs), "{:,.0f}"),
            cell(_ratios(results, step, side, RAW), FACTOR),
            cell(_ratios(results, step, side, TRITON), FACTOR),
            *(cell([getattr(it.total, at) * 1e3 for it in runs if it.total], "{:,.2f}") for at in ("p50_s", "p99_s")),
            ", ".join(sorted({outcome for run in runs for outcome in run.outcomes if outcome != "served"})),
        )
    return shown


def _rates(runs: Sequence[Report]) -> list[float]:
    return [run.served / run.elapsed_s for run in runs]


def _ratios(results: Results, step: str, side: Side, other: str) -> list[float]:
    pairs = zip(_rates(side.of(step)), _rates(named(results, other).of(step)), strict=True)
    return [ours / theirs for ours, theirs in pairs if theirs]
