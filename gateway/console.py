"""How the command reads and writes: arguments that many commands share, JSON, tables, files, failures."""

from __future__ import annotations

import errno
import os
import re
import secrets
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn, TextIO, TypeVar

from cyclopts import Parameter

from gateway.money import amount_nano, amount_text

if TYPE_CHECKING:
    from gateway.call import Limits
    from runtimes.environment import Progress


T = TypeVar("T")


def duration_s(text: str) -> float:
    """Seconds of e.g. `90m`. Raises ValueError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", text)
    if not found:
        raise ValueError(f"{text!r} is no duration; write e.g. 45s, 90m, 12h, 30d or 2w")
    return float(found[1]) * {"s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 604_800}[found[2]]


def moment_s(text: str) -> float:
    """Unix time of a duration ago, of an ISO date or time (UTC unless it says otherwise), or of itself. Raises
    ValueError."""
    if re.fullmatch(r"\d+(\.\d+)?", text):
        return float(text)
    if re.fullmatch(r"\d+(?:\.\d+)?[smhdw]", text):
        from runtimes.clock import SystemClock

        return SystemClock().wall_s() - duration_s(text)
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f"{text!r} is no time; write e.g. 24h (ago), 2026-11-01 or 2026-11-01T09:30Z") from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _by(parse: Callable[[str], T]) -> Callable[..., T]:
    return lambda _, tokens: parse(tokens[0].value)


Duration = Annotated[float, Parameter(converter=_by(duration_s), metavar="DURATION", show_default=False)]
Moment = Annotated[float, Parameter(converter=_by(moment_s), metavar="TIME")]
Globs = Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative="", metavar="GLOB", show_default=False)]
EVERYTHING = ("*",)
LimitChange = int | Literal["none"] | None
Amount = Annotated[int, Parameter(converter=_by(amount_nano), metavar="AMOUNT", show_default=False)]
AmountChange = Annotated[
    int | Literal["none"],
    Parameter(converter=_by(lambda text: text if text == "none" else amount_nano(text)), metavar="AMOUNT"),
]


@Parameter(name="*")
@dataclass(frozen=True)
class Common:
    """What every command takes."""

    config: Annotated[Path | None, Parameter(show_default=False)] = None
    """Configuration file; without it ./headrace.toml, else the checkout's deploy/local.toml."""
    json: Annotated[bool, Parameter(negative="", show_default=False)] = False
    """Print JSON on stdout, and nothing else."""


COMMON = Common()


# ---- writing -----------------------------------------------------------------------------------------------


def tell(common: Common, data: object, text: str) -> None:
    """`data` for programs, `text` for people."""
    if common.json:
        print_json(data)
    else:
        _write(text)


def print_json(data: object) -> None:
    import msgspec

    _write(msgspec.json.encode(data).decode())


def _write(text: str) -> None:
    sys.stdout.write(text + "\n")


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns, box=None, header_style="bold", pad_edge=False)
    for row in rows:
        table.add_row(*(Text(_printable(cell)) for cell in row))
    # Into a pipe or a file a table is as wide as it needs to be, so that `grep` finds whole words.
    Console(width=None if sys.stdout.isatty() else 1_000).print(table)


def _printable(text: str) -> str:
    """A name may be a stranger's choice, and a terminal obeys what it is shown."""
    return text if text.isprintable() else text.encode("unicode_escape").decode()


def limits_text(limits: Limits) -> str:
    budgets = {"budget_day": limits.budget_day_nano, "budget_month": limits.budget_month_nano}
    named: dict[str, object] = {"rpm": limits.rpm, "tpm": limits.tpm, "concurrent": limits.concurrent}
    named |= {name: None if nano is None else amount_text(nano) for name, nano in budgets.items()}
    return " ".join(f"{name}={value}" for name, value in named.items() if value is not None)


def date_text(wall_s: float | None) -> str:
    if wall_s is None:
        return ""
    try:
        return datetime.fromtimestamp(wall_s, UTC).strftime("%Y-%m-%d %H:%M")
    except (ValueError, OverflowError, OSError):
        # No year of the calendar; one such row must not keep the others from being shown.
        return f"unix {wall_s:g}"


def fail(status: int, what: str) -> NoReturn:
    """End with one line on stderr."""
    sys.stderr.write(f"headrace: {' '.join(what.split()).rstrip('.')}.\n")
    sys.exit(status)


@contextmanager
def private_file(path: Path | None) -> Iterator[TextIO | None]:
    """A file that takes the place of `path` once the block has ended well: whole, and its owner's alone. It is made
    at the start, so that a folder that can't be written is known before anything is issued."""
    if path is None:
        yield None
        return
    if not path.name or path.is_dir():
        raise OSError(errno.EISDIR, "it is a folder; name a file", str(path))
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with os.fdopen(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def progress(out: TextIO, *, every_s: float = 15.0) -> Iterator[Callable[[Progress], None]]:
    """Shows how far something long is: on a terminal one line that keeps changing, elsewhere a line at each step and
    now and then within it."""
    shown: Progress | None = None

    def show(now: Progress) -> None:
        nonlocal shown
        if out.isatty():
            new_line = "\n" if shown is not None and shown.step != now.step else "\r\x1b[K"
            print(f"{new_line}{now}", end="", file=out, flush=True)
        elif shown is None or shown.step != now.step or now.elapsed_s - shown.elapsed_s >= every_s:
            print(now, file=out, flush=True)
        else:
            return
        shown = now

    try:
        yield show
    finally:
        if shown is not None and out.isatty():
            print(file=out)
