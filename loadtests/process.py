"""What a process and its descendants used, as Linux accounts it: every process's own CPU clock, and proc(5)."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

PROC = Path("/proc")
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class NoProcess(Exception):
    """The process to be measured is not there."""


class Usage(msgspec.Struct, frozen=True):
    """Of a process tree, at one instant."""

    cpu_s: float
    """User and system time so far, to the nanosecond. Descendants that have ended count once their parent has waited
    for them, in steps of 10 ms on most machines."""
    rss_bytes: int
    """Resident memory, summed; pages shared by several processes count once in each."""


def usage(pid: int) -> Usage:
    """Of `pid` and all its descendants. Raises NoProcess."""
    cpu_s, pages = 0.0, 0
    processes = _processes()
    if pid not in processes:
        raise NoProcess(f"there is no process {pid} to be measured; --pid takes the target's")
    for member in _tree(pid, processes):
        try:
            cpu_s += time.clock_gettime(_clock(member)) + processes[member].ended_ticks / TICKS_PER_S
            pages += int((PROC / str(member) / "statm").read_text().split()[1])
        except OSError:
            continue  # ended since
    return Usage(cpu_s=cpu_s, rss_bytes=pages * PAGE_BYTES)


def _clock(pid: int) -> int:
    """What clock_getcpuclockid(3) answers: the clock of all threads of a process, those that ended included."""
    return (~pid << 3) | 2


class _Process(msgspec.Struct, frozen=True):
    parent: int
    ended_ticks: int
    """Of children that ended and were waited for."""


def _processes() -> dict[int, _Process]:
    found = {}
    for folder in PROC.iterdir():
        if folder.name.isdigit():
            try:
                stat = (folder / "stat").read_text()
            except (FileNotFoundError, ProcessLookupError):
                continue  # ended meanwhile
            # The command's name, in brackets, may itself hold brackets and blanks.
            fields = stat.rpartition(")")[2].split()
            found[int(folder.name)] = _Process(parent=int(fields[1]), ended_ticks=int(fields[13]) + int(fields[14]))
    return found


def _tree(pid: int, processes: dict[int, _Process]) -> Iterator[int]:
    yield pid
    for child, process in processes.items():
        if process.parent == pid:
            yield from _tree(child, processes)
