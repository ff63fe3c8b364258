"""What a process and its descendants used, as Linux accounts it (proc(5), `stat` and `statm`)."""

from __future__ import annotations

import os
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
    """User and system time so far, in steps of 10 ms on most machines. Descendants that have ended count once
    their parent has waited for them."""
    rss_bytes: int
    """Resident memory, summed; pages shared by several processes count once in each."""


def usage(pid: int) -> Usage:
    """Of `pid` and all its descendants. Raises NoProcess."""
    ticks = pages = 0
    processes = _processes()
    if pid not in processes:
        raise NoProcess(f"there is no process {pid} to be measured; --pid takes the target's")
    for member in _tree(pid, processes):
        ticks += processes[member].ticks
        try:
            pages += int((PROC / str(member) / "statm").read_text().split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue  # ended since; its CPU time is in `ticks` already
    return Usage(cpu_s=ticks / TICKS_PER_S, rss_bytes=pages * PAGE_BYTES)


class _Process(msgspec.Struct, frozen=True):
    parent: int
    ticks: int


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
            found[int(folder.name)] = _Process(parent=int(fields[1]), ticks=sum(map(int, fields[11:15])))
    return found


def _tree(pid: int, processes: dict[int, _Process]) -> Iterator[int]:
    yield pid
    for child, process in processes.items():
        if process.parent == pid:
            yield from _tree(child, processes)
