"""Which processes an engine consists of, told so surely that nobody else's is ever ended for it. Linux only."""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import IO

import msgspec

from runtimes.clock import Clock
from runtimes.contract import Unavailable


class Session(msgspec.Struct, frozen=True):
    """One start of an engine, so named that nobody else can be taken for it."""

    pid: int
    """Of its keeper, which is also the number of its session."""
    start_ticks: int
    """When the kernel started the keeper: field 22 of /proc/<pid>/stat."""
    boot: str
    """Start times count from boot."""


class PidFile:
    """Says which session a replica has, and by its lock whose replica it is. Never removed: two gateways
    could then each hold the lock on a file of that name."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[bytes] | None = None

    def lock(self) -> bool:
        """False if another process has it. The kernel frees it when its holder dies."""
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = self._path.open("a+b", buffering=0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return False
        self._file = file
        return True

    def unlock(self) -> bool:
        """Whether it was locked by us."""
        if self._file is None:
            return False
        self._file.close()
        self._file = None
        return True

    def read(self) -> Session | None:
        assert self._file is not None
        self._file.seek(0)
        try:
            return msgspec.json.decode(self._file.read(4096), type=Session)
        except msgspec.DecodeError:
            return None  # empty, or cut short by a power failure: then nothing of that boot is alive

    def write(self, session: Session | None) -> None:
        assert self._file is not None
        self._file.truncate(0)
        if session is not None:
            self._file.write(msgspec.json.encode(session))


async def end(session: Session, *, stop_s_max: float, clock: Clock) -> None:
    """End every process of a session that is really this one: SIGTERM to its keeper, then SIGKILL to all."""
    if not (pids := members(session)):
        return
    give_up_s = clock.now_s() + stop_s_max + 5
    if stop_s_max and session.pid in pids:
        kill([session.pid], signal.SIGTERM)
        kill_s = clock.now_s() + stop_s_max
        while clock.now_s() < kill_s and members(session):
            await clock.sleep(0.05)
    while pids := members(session):
        kill(pids, signal.SIGKILL)
        if clock.now_s() > give_up_s:
            raise Unavailable(f"processes {pids} of an earlier engine cannot be ended; end them, then start again")
        await clock.sleep(0.02)


def members(session: Session) -> list[int]:
    """Its live processes. The kernel hands out no number that still names a session, so while one of its
    processes lives the number is its own: unless it has been taken anew, which the start time tells."""
    if session.boot != boot_id():
        return []
    leader = start_ticks(session.pid)
    if leader is not None and leader != session.start_ticks:
        return []
    return [
        pid
        for pid, (_, state, own_session, ticks) in processes()
        if own_session == session.pid and ticks >= session.start_ticks and state not in "ZX"
    ]


def youngest(session: Session, program: str) -> int | None:
    """Of its live processes, the last that was started of those that run this program; None if none does."""
    found = [(it[3], pid) for pid in members(session) if (it := stat(pid)) and it[0] == program[:NAME_CHARS]]
    return max(found)[1] if found else None


NAME_CHARS = 15
"""Of a program's name, as much as the kernel keeps."""


def lives(session: Session, pid: int) -> bool:
    """Whether this process of it does. Cheap, unlike what looks for any."""
    it = stat(pid)
    return it is not None and it[1] not in "ZX" and it[2] == session.pid


def processes() -> Iterable[tuple[int, tuple[str, str, int, int]]]:
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal() and (it := stat(int(folder.name))):
            yield int(folder.name), it


def stat(pid: int) -> tuple[str, str, int, int] | None:
    """Name, state, session and start time of a process; None if there is none. See proc_pid_stat(5)."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    name, _, rest = text.partition("(")[2].rpartition(")")
    fields = rest.split()
    return name, fields[0], int(fields[3]), int(fields[19])


def start_ticks(pid: int) -> int | None:
    found = stat(pid)
    return found and found[3]


def boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def kill(pids: Iterable[int], number: signal.Signals) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


async def exit_of(pid: int) -> None:
    """Return when a child has exited. A pidfd works in any thread and loop, and needs no signal handler."""
    loop = asyncio.get_running_loop()
    exited: asyncio.Future[None] = loop.create_future()
    pidfd = os.pidfd_open(pid)
    loop.add_reader(pidfd, lambda: None if exited.done() else exited.set_result(None))
    try:
        await exited
    finally:
        loop.remove_reader(pidfd)
        os.close(pidfd)
