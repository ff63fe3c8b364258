"""How far something has come that takes long: a bar on a terminal, a line now and then elsewhere. On stderr, so that
what a command prints can be read by programs."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

LOG = logging.getLogger("training")

_LINE_S = 30.0

Advance = Callable[[int], None]
"""Called with how many more are done."""


@contextmanager
def progress(
    title: str, total: int, unit: str = "rows", *, now_s: Callable[[], float] = time.monotonic
) -> Iterator[Advance]:
    """Show it until the block ends; with its rate, and the time left by that rate. Nothing, where nobody wants to be
    told: of processes that work together one does the talking."""
    if not LOG.isEnabledFor(logging.INFO):
        yield lambda _: None
    elif sys.stderr.isatty():
        with _bar(title, total, unit) as advance:
            yield advance
    else:
        yield _Lines(title, total, unit, now_s).advance


class StderrHandler(logging.StreamHandler[TextIO]):
    """Writes to what `sys.stderr` is now, as a bar exchanges it to stay below the lines."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


class _Lines:
    def __init__(self, title: str, total: int, unit: str, now_s: Callable[[], float]) -> None:
        self._title = title
        self._total = total
        self._unit = unit
        self._now_s = now_s
        self._done = 0
        self._started_s = self._said_s = now_s()

    def advance(self, more: int) -> None:
        self._done += more
        now_s = self._now_s()
        if now_s - self._said_s < _LINE_S or self._done >= self._total:
            return
        self._said_s = now_s
        rate = self._done / (now_s - self._started_s)
        left_s = (self._total - self._done) / rate
        done = f"{self._done} of {self._total} {self._unit}"
        LOG.info("%s: %s, %s/s, %.0f s left", self._title, done, _said(rate, self._unit), left_s)


def _said(rate: float, unit: str) -> str:
    return f"{rate:.0f} {unit}" if rate >= 10 else f"{rate:.2g} {unit}"


@contextmanager
def _bar(title: str, total: int, unit: str) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TimeRemainingColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{_said(task.speed, unit)}/s" if task.speed else "")

    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), Rate(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=False) as shown:
        task = shown.add_task(title, total=total)
        yield lambda more: shown.advance(task, more)
