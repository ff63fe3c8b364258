"""What the commands of `headrace-train` have in common: where things are, and how artifacts are written down."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from runtimes.artifact import Manifest, Shelf
from runtimes.integrity import ShelfFault
from runtimes.remote_shelf import open_shelf

Where = Annotated[
    str | None,
    Parameter(name="--shelf", help="A folder or a URL. Default: shelf/ in $HEADRACE_STATE, or in .headrace."),
]
AsJson = Annotated[bool, Parameter(name="--json", negative="", help="Print JSON.")]


def state() -> Path:
    return Path(os.environ.get("HEADRACE_STATE") or ".headrace")


def shelf_at(given: str | None) -> Shelf:
    """Raises ShelfFault where there is none and none can be: later it would cost a run."""
    shelf = open_shelf(given or state() / "shelf", state())
    there = next(it for it in (shelf.root.absolute(), *shelf.root.absolute().parents) if os.path.lexists(it))
    if not there.is_dir():
        raise ShelfFault(
            f"{there} is not a folder, so {shelf.where} is no shelf; name one with --shelf or HEADRACE_STATE"
        )
    return shelf


def line_of(manifest: Manifest, meaning: Mapping[str, str]) -> str:
    """An artifact in one line, with its aliases, of all that its name has."""
    aliases = [f"@{alias}" for alias, it in meaning.items() if it == manifest.version]
    size = f"{manifest.size_bytes / 1e6:.1f} MB"
    return (
        f"{manifest.name}@{manifest.version}  {manifest.task}  {manifest.format}  {size}  {' '.join(aliases)}".rstrip()
    )


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Columns under their heads; the first to the left, numbers to the right."""
    rows = [head, *lines]
    widths = [max(len(row[at]) for row in rows) for at in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if at else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
