"""One of several processes that serve the data listener: started by its leader, and by nobody else.

It serves calls like a gateway of its own, from the same parts. What it must not do alone it has in common with the
other workers (`gateway.shared`), and what the leader does it leaves out: engines, the admin API, migrations, what
gateways before this one left in the journal. It ends with its leader, however that ends.
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import signal
import socket
import sys
from contextlib import AsyncExitStack

from gateway import garbage

with garbage.imports():
    import uvloop

    from gateway.app import LOG_FORMAT, log_to_stderr, stop_signal
    from gateway.channel import ASK, START, Channel, Told, Up
    from gateway.plane import Plane, cancel, open_plane
    from gateway.shared import attach
    from gateway.sqlite import SqliteStore
    from runtimes.clock import SystemClock


log = logging.getLogger("headrace.worker")


async def work(end: socket.socket) -> None:
    """Serve until SIGTERM, then drain."""
    async with AsyncExitStack() as opened:
        stop = opened.enter_context(stop_signal())
        channel = await Channel.open(end)
        opened.callback(channel.close)
        start = await channel.hear(START)
        config, clock = start.config, SystemClock()
        log_to_stderr(LOG_FORMAT.replace("%(name)s", f"worker {start.worker} %(name)s"))
        shared = attach(config, start.shared, start.worker)
        store = SqliteStore(config.state_path / "headrace.db")
        await store.open()
        opened.push_async_callback(store.aclose)
        plane = await open_plane(
            opened,
            config,
            listening=socket.socket(fileno=start.listener),
            journal=config.state_path / "journal" / str(start.worker),
            store=store,
            clock=clock,
            shared=shared,
        )
        bell, loop = shared.places.bells[start.worker], asyncio.get_running_loop()
        loop.add_reader(bell, _rung, bell, plane)
        opened.callback(loop.remove_reader, bell)
        for telling in (_tell(channel, plane), _up(channel, plane)):
            opened.push_async_callback(cancel, asyncio.create_task(telling))
        opened.push_async_callback(plane.drain, config.server)
        await stop.wait()


def _rung(bell: int, plane: Plane) -> None:
    os.eventfd_read(bell)
    plane.agree()


async def _tell(channel: Channel, plane: Plane) -> None:
    """Whatever fails of it: who does not answer is killed."""
    while True:
        await channel.hear(ASK)
        try:
            report = plane.report()
        except Exception:
            log.exception("this worker can't say how it is")
            report = None
        await channel.say(Told(report))


async def _up(channel: Channel, plane: Plane) -> None:
    await plane.up()
    await channel.say(Up())


def die_with(leader: int) -> None:
    """Ask the kernel to end this process the moment its leader has ended, even if its loop hangs."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL):
        raise OSError(ctypes.get_errno(), "prctl")
    if os.getppid() != leader:  # it was quicker
        os.kill(os.getpid(), signal.SIGKILL)


PR_SET_PDEATHSIG = 1


def main() -> None:
    leader, end = map(int, sys.argv[1:])
    die_with(leader)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(work(socket.socket(fileno=end)))


if __name__ == "__main__":
    main()
