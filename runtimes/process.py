"""Supervises one engine: starts it, waits until it answers, restarts it, stops it, and ends its orphans.

An engine is a foreign program of several processes. Each start is a session of its own, led by `keeper.py`, which
writes the log and ends everything in it when this process goes away, however it goes. Linux only: processes
are told apart by what /proc says of them, because a number alone may by now belong to somebody else.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import msgspec

from runtimes import keeper
from runtimes.clock import Clock
from runtimes.contract import Site, Unavailable
from runtimes.pids import PidFile, Session, boot_id, end, exit_of, start_ticks

Phase = Literal["stopped", "starting", "ready", "restarting", "failed"]

#: What an engine may inherit of the gateway's environment. Everything else stays here: provider keys, above all.
ENVIRONMENT_KEPT = ("PATH", "HOME", "USER", "LANG", "LC_ALL", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "LD_PRELOAD")


SOCKET_BYTES_MAX = 107
"""Longest path that the kernel takes for a Unix socket; see unix(7)."""
SOCKET_NAME_BYTES = 37
"""Of that, an engine may use so many for its sockets' names: vLLM's processes do."""


class Dead(Unavailable):
    """An engine that still answers says that it will never work again."""


class Command(msgspec.Struct, frozen=True):
    """How to start an engine."""

    argv: tuple[str, ...]
    env: Mapping[str, str]
    """The whole environment; see `environment`."""
    scratch: Path | None = None
    """A folder for its sockets and temporary files, closed to other users, made anew before each start."""
    fill: Callable[[Path], object] = lambda _: None
    """Puts into it what the engine is to find there."""
    folder: Path | None = None
    """Where it is started; None is where the gateway was."""


class Limits(msgspec.Struct, frozen=True):
    """How long, how often, how much."""

    start_s_max: float = 300.0
    """From start to the first good probe."""
    stop_s_max: float = 15.0
    """From SIGTERM to SIGKILL."""
    probe_start_s: float = 0.1
    """Pause between probes while starting."""
    probe_s: float = 1.0
    """Pause between probes when ready."""
    hung_s_max: float = 60.0
    """A ready engine without a good probe for so long is restarted."""
    restart_s: float = 1.0
    """Pause before the first restart; doubled for each further failure in the window, ± 20 %."""
    restart_s_max: float = 60.0
    failures_max: int = 5
    """With so many failures within `failures_s` it is left alone for as long before the next try."""
    failures_s: float = 600.0
    log_bytes_max: int = 32 << 20


class Snapshot(msgspec.Struct, frozen=True):
    """What there is to know about an engine, at one instant."""

    phase: Phase
    attempt: int
    """1 for the first start, 2 for the first restart …; back to 1 when the failures are older than the window."""
    since_s: float
    """Clock time of the last change of phase."""
    pid: int | None = None
    """Of the session that holds all of the engine's processes."""
    retry_at_s: float | None = None
    """Clock time of the next start, while restarting."""
    reason: str = ""
    """Why it is down or was restarted, with the engine's last line; empty if it never failed."""


class Process:
    """One supervised engine. Building it has no side effects.

    `probe` returns if the engine would answer now, and raises Unavailable if not, or Dead to have it restarted
    at once; it bounds its own wait. The state folder gets `logs/<name>.log` and `run/<name>.pid`; the latter is
    locked, so that of two gateways on one state folder only one runs the engine.
    """

    def __init__(
        self,
        *,
        name: str,
        state: Path,
        command: Command,
        probe: Callable[[], Awaitable[None]],
        clock: Clock,
        limits: Limits | None = None,
    ) -> None:
        self.name = name
        self.log = state / "logs" / f"{name}.log"
        self._pid_file = PidFile(state / "run" / f"{name}.pid")
        self._state = state
        self._command = command
        self._probe = probe
        self._clock = clock
        self._limits = limits or Limits()
        self._snapshot = Snapshot("stopped", attempt=0, since_s=clock.now_s())
        self._session: Session | None = None
        self._task: asyncio.Task[None] | None = None
        self._tried = asyncio.Event()

    async def open(self) -> None:
        """Start, and return when the first probe was good. Raises Unavailable when the first start fails, or
        another gateway runs this engine. After a failed start, supervision goes on until `aclose`, and opening
        again waits for nothing: it returns if the engine is ready by now, and raises Unavailable if it is not."""
        if self._task is not None:
            self.check()
            return
        self.log.parent.mkdir(parents=True, exist_ok=True)
        if not self._pid_file.lock():
            raise Unavailable(
                f"{self.name}: another gateway uses the state folder {self._state}; "
                "stop it, or give this one another state.path"
            )
        try:
            if orphan := self._pid_file.read():
                await end(orphan, stop_s_max=self._limits.stop_s_max, clock=self._clock)
        except BaseException:
            self._pid_file.unlock()
            raise
        self._task = asyncio.create_task(self._supervise(), name=f"supervise {self.name}")
        await first(self._tried.wait(), asyncio.shield(self._task))
        if self._snapshot.phase != "ready":
            raise Unavailable(f"{self.name} did not start: {self._snapshot.reason}. Its log is {self.log}")

    def snapshot(self) -> Snapshot:
        return self._snapshot

    def session(self) -> Session | None:
        """What holds the engine's processes now; None while there are none."""
        return self._session

    def check(self) -> None:
        """Raise Unavailable unless the engine is ready, saying what it is instead; costs next to nothing."""
        if self._snapshot.phase != "ready":
            raise Unavailable(f"{self.name} is {self.describe()}")

    def describe(self) -> str:
        """The snapshot in words fit for a client: nothing the engine said is in it."""
        it = self._snapshot
        if it.retry_at_s is not None:
            wait_s = max(0.0, it.retry_at_s - self._clock.now_s())
            if it.phase == "failed":
                return f"down: it failed {it.attempt} times, next try in {wait_s:.0f} s; see its log"
            return f"restarting, attempt {it.attempt}, next try in {wait_s:.0f} s"
        if it.phase == "starting" and it.attempt > 1:
            return f"restarting, attempt {it.attempt} is under way"
        return it.phase

    async def aclose(self) -> None:
        """Stop the engine and everything it started. Safe to call twice and after a failed `open`."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
            self._task = None
            self._turn("stopped", attempt=0)
        if self._pid_file.unlock() and self._command.scratch is not None:
            shutil.rmtree(self._command.scratch, ignore_errors=True)

    async def _supervise(self) -> None:
        limits = self._limits
        failures: deque[float] = deque(maxlen=limits.failures_max)
        while True:
            self._turn("starting", attempt=len(failures) + 1, reason=self._snapshot.reason)
            try:
                reason = await self._live()
            except (OSError, Unavailable) as error:  # no memory, no process to be had, a process that will not end
                reason = str(error)
            now_s = self._clock.now_s()
            failures.append(now_s)
            while failures[0] < now_s - limits.failures_s:
                failures.popleft()
            if len(failures) == limits.failures_max:
                wait_s = limits.failures_s
                self._turn("failed", attempt=len(failures), reason=reason, retry_at_s=now_s + wait_s)
            else:
                wait_s = backoff_s(len(failures), limits) * random.uniform(0.8, 1.2)  # noqa: S311 - not a secret
                self._turn("restarting", attempt=len(failures) + 1, reason=reason, retry_at_s=now_s + wait_s)
            self._tried.set()
            await self._clock.sleep(wait_s)

    async def _live(self) -> str:
        """One life of the engine, from start to the reason for its end. Nothing of it is left afterwards."""
        if self._command.scratch is not None:
            shutil.rmtree(self._command.scratch, ignore_errors=True)
            self._command.scratch.mkdir(mode=0o700)
            self._command.fill(self._command.scratch)
        child = self._spawn()
        session = Session(child.pid, start_ticks(child.pid) or 0, boot_id())
        self._pid_file.write(session)
        self._session = session
        self._snapshot = msgspec.structs.replace(self._snapshot, pid=child.pid)
        exited = asyncio.create_task(exit_of(child.pid))
        try:
            reason: str | None = await first(self._probing(), asyncio.shield(exited))
            if reason is None:
                status = child.wait()
                how = f"it was killed by signal {status - 128}" if status > 128 else f"it exited with {status}"
                return f"{how}; its last line: {last_line(self.log)}"
            return reason
        finally:
            # Closing the lifeline is all it takes: the keeper sees to the rest, or `end` does.
            assert child.stdin is not None
            child.stdin.close()
            patience = self._clock.sleep(2 * self._limits.stop_s_max + 5)
            await first(asyncio.shield(exited), patience)
            exited.cancel()
            await end(session, stop_s_max=0.0, clock=self._clock)
            child.wait()
            self._pid_file.write(None)
            self._session = None

    async def _probing(self) -> str:
        """Probe for as long as the answers are good enough; return why they no longer are."""
        limits, attempt = self._limits, self._snapshot.attempt
        good_s = self._clock.now_s()
        while True:
            try:
                await self._probe()
            except Unavailable as error:
                bad_s = self._clock.now_s() - good_s
                if isinstance(error, Dead):
                    return f"{error}; its last line: {last_line(self.log)}"
                if self._snapshot.phase != "ready" and bad_s > limits.start_s_max:
                    last = last_line(self.log)
                    return f"it was not ready within {limits.start_s_max:.0f} s; its last line: {last}"
                if self._snapshot.phase == "ready" and bad_s > limits.hung_s_max:
                    return f"it has not answered for {bad_s:.0f} s ({error})"
            else:
                good_s = self._clock.now_s()
                if self._snapshot.phase != "ready":
                    self._turn("ready", attempt=attempt, pid=self._snapshot.pid, reason=self._snapshot.reason)
                    self._tried.set()
            ready = self._snapshot.phase == "ready"
            await self._clock.sleep(limits.probe_s if ready else limits.probe_start_s)

    def _spawn(self) -> subprocess.Popen[bytes]:
        limits = self._limits
        return subprocess.Popen(  # noqa: S603 - argv comes from the operator's config, never from a client
            [
                sys.executable, "-I", "-S", keeper.__file__,
                str(self.log), str(limits.log_bytes_max), str(limits.stop_s_max), *self._command.argv,
            ],
            env=dict(self._command.env),
            cwd=self._command.folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip

    def _turn(
        self,
        phase: Phase,
        *,
        attempt: int,
        pid: int | None = None,
        retry_at_s: float | None = None,
        reason: str = "",
    ) -> None:
        self._snapshot = Snapshot(phase, attempt, self._clock.now_s(), pid, retry_at_s, reason)


async def first(*waits: Awaitable[Any]) -> Any:
    """Wait for whichever is done first, cancel the others and return its result."""
    tasks = [asyncio.ensure_future(it) for it in waits]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return next(it for it in tasks if it in done).result()
    finally:
        for it in tasks:
            it.cancel()
        await asyncio.wait(tasks)


def backoff_s(failures: int, limits: Limits) -> float:
    """Pause after so many failures in a row."""
    return float(min(limits.restart_s_max, limits.restart_s * 2 ** (failures - 1)))


def scratch(site: Site) -> Path:
    """Where an engine's sockets will be. In a deep state folder their names would be too long."""
    folder = site.state.absolute() / "run" / site.engine
    if len(os.fsencode(folder)) + SOCKET_NAME_BYTES <= SOCKET_BYTES_MAX:
        return folder
    name = hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"headrace-{os.getuid()}-{name}"


def environment(extra: Mapping[str, str], *, kept: Iterable[str] = ENVIRONMENT_KEPT) -> dict[str, str]:
    """What an engine gets to see: some of ours by name, and what it is given."""
    return {name: os.environ[name] for name in kept if name in os.environ} | dict(extra)


def last_line(log: Path) -> str:
    """The engine's last words of its last start, or its last line that says `error:`, cut to 300 characters."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 8192))
            lines = file.read().splitlines()
    except FileNotFoundError:
        return "none"
    since = max((at + 1 for at, line in enumerate(lines) if line.startswith(keeper.START)), default=0)
    said = [line for line in lines[since:] if line.strip()]
    errors = [line for line in said if line.startswith(b"error:")]
    return next(iter(errors[-1:] or said[-1:]), b"none").decode(errors="replace").strip()[:300]
