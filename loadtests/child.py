"""A server that runs while it is needed: pinned to a core, its output in a file, ended with all it started."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path

import httpx

READY_S_MAX = 90.0
LOOK_S = 0.05
END_S_MAX = 10.0
"""From SIGTERM to SIGKILL."""
TAIL_LINES = 5


class ChildFault(Exception):
    """A server did not start; the message has its last words."""


@asynccontextmanager
async def running(
    name: str, command: Sequence[str], *, folder: Path, env: Mapping[str, str], core: int | None, ready: str
) -> AsyncIterator[int]:
    """Inside, `ready`, a URL, has answered 200; the value is its process id. It keeps to `core`, unless that is None.
    Raises ChildFault."""
    log = folder / f"{name}.log"
    with log.open("wb") as out:
        try:
            child = await asyncio.create_subprocess_exec(
                *command,
                cwd=folder,
                env={"HOME": str(folder), **env},
                stdin=asyncio.subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
                # Before it starts: many a server counts its cores once, and makes as many threads.
                preexec_fn=None if core is None else partial(os.sched_setaffinity, 0, {core}),
            )
        except OSError as error:
            raise ChildFault(f"{name} can't be started: {error}") from None
    try:
        await _until_ready(name, child, ready, log)
        yield child.pid
    finally:
        await _end(child)


async def _until_ready(name: str, child: asyncio.subprocess.Process, url: str, log: Path) -> None:
    async with httpx.AsyncClient(timeout=1.0, trust_env=False) as client:
        with suppress(TimeoutError):
            async with asyncio.timeout(READY_S_MAX):
                while child.returncode is None:
                    with suppress(httpx.HTTPError):
                        if (await client.get(url)).status_code == 200:
                            return
                    await asyncio.sleep(LOOK_S)
    ended = "is not ready yet" if child.returncode is None else f"ended with status {child.returncode}"
    raise ChildFault(f"{name} {ended}; its last words: {_tail(log) or 'none'}")


def _tail(log: Path) -> str:
    return " / ".join(log.read_text(errors="replace").strip().splitlines()[-TAIL_LINES:])


async def _end(child: asyncio.subprocess.Process) -> None:
    """Its whole session: what it started goes with it."""
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGTERM)
        with suppress(TimeoutError):
            async with asyncio.timeout(END_S_MAX):
                await child.wait()
        os.killpg(child.pid, signal.SIGKILL)
    await child.wait()
