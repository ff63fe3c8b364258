"""How the command reads and writes: arguments that several commands share, tables, progress, failures."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, NoReturn

from cyclopts import Parameter
from cyclopts.validators import Number
from rich.console import Console
from rich.table import Table
from rich.text import Text

Flag = Annotated[bool, Parameter(negative="", show_default=False)]
Key = Annotated[str | None, Parameter(env_var="HEADRACE_KEY", show_default=False)]
Repeat = Annotated[int, Parameter(validator=Number(gte=1, lte=1_000))]
Settings = Annotated[tuple[str, ...], Parameter(name="--set", negative="", show_default=False)]


def home() -> Path:
    """The folder that Headrace keeps its state in."""
    return Path(os.environ.get("HEADRACE_STATE") or ".headrace").expanduser().absolute()


def state() -> Path:
    """Where peers are installed."""
    return home() / "peers"


def require_folder(file: Path | None) -> None:
    """End, unless the file can be written."""
    if file is not None and not file.absolute().parent.is_dir():
        fail(1, f"{file} can't be written: there is no folder {file.parent}")


def show(title: str, figures: Table) -> None:
    """On stdout."""
    # Into a pipe or a file a line is as long as it needs to be.
    console = Console(width=None if sys.stdout.isatty() else 1_000, highlight=False)
    console.print(Text(title, style="bold"))
    console.print(figures, end="\n\n")


def say(what: str) -> None:
    """Progress, on stderr."""
    sys.stderr.write(f"{what}\n")


def fail(status: int, what: str) -> NoReturn:
    """One line on stderr, and out."""
    sys.stderr.write(f"headrace-load: {' '.join(what.split()).rstrip('.')}.\n")
    sys.exit(status)
