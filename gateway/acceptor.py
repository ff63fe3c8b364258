"""Accepts on a socket that several workers accept on, so that each has about as many connections as the others.

Whoever wakes first would take all that came at once, and keep it: clients hold their connections for hours. So a worker
that has clearly more of them than the emptiest looks away for a moment, in which that one can take what is waiting;
after it takes one itself, so that nobody waits for a worker that hangs. One that starts or stops, and would only refuse
calls, looks away as long as another takes them.
"""

from __future__ import annotations

import asyncio
import logging
import select
import socket
from collections.abc import Callable

from gateway.edge.connection import Connection
from gateway.edge.server import Server

log = logging.getLogger("headrace.acceptor")


class Acceptor:
    """`crowd` is how many connections each worker has, and one more; 0 if it is not there for new ones. `here` says
    whether this one is."""

    def __init__(
        self,
        server: Server,
        listening: socket.socket,
        *,
        crowd: memoryview[int],
        worker: int,
        here: Callable[[], bool],
    ) -> None:
        self._server = server
        self._listening = listening
        self._crowd = crowd
        self._worker = worker
        self._here = here
        self._loop = asyncio.get_running_loop()
        self._opening: dict[asyncio.Task[object], Connection] = {}
        self._away: asyncio.TimerHandle | None = None
        self._left = 0
        """Times in a row that it was not there for calls, looked away, and found one waiting."""
        self._waiting = select.poll()
        self._waiting.register(listening, select.POLLIN)
        listening.setblocking(False)
        self._look()

    def close(self) -> None:
        self._crowd[self._worker] = 0
        if self._away is not None:
            self._away.cancel()
        self._loop.remove_reader(self._listening)
        self._listening.close()

    async def wait_closed(self) -> None:
        await asyncio.gather(*self._opening, return_exceptions=True)

    def _look(self) -> None:
        self._away = None
        self._loop.add_reader(self._listening, self._ready)
        self._count()

    def _count(self) -> None:
        """Exactly: others judge by it. A connection is the server's some turns before its opening is done."""
        made = self._server.connections
        count = len(made) + sum(it not in made for it in self._opening.values()) + 1
        self._crowd[self._worker] = count if self._here() else 0

    @property
    def _absent(self) -> bool:
        """It is not there for calls, and another is."""
        return not self._crowd[self._worker] and any(self._crowd)

    def _ready(self) -> None:
        self._count()
        for _ in range(TAKE_MAX):
            if self._absent:
                self._look_away(ABSENT_S)
                return
            fewest = min((count for count in self._crowd if count), default=0)
            if self._crowd[self._worker] > fewest + fewest // 8 + MORE:
                self._look_away(AWAY_S)
                return
            if not self._take():
                return

    def _look_away(self, away_s: float) -> None:
        self._loop.remove_reader(self._listening)
        self._away = self._loop.call_later(away_s, self._come_back)

    def _come_back(self) -> None:
        self._look()
        self._left = self._left + 1 if self._absent and self._waiting.poll(0) else 0
        if not self._absent or self._left > LEFT_MAX:
            self._take()

    def _take(self) -> bool:
        """One connection; False if there is none, or it can't be had."""
        try:
            accepted, _ = self._listening.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return False
        except OSError as error:  # no descriptors, no memory: those of others may come free
            log.error("no connection can be accepted for now: %s", error)
            self._look_away(FAULT_S)
            return False
        accepted.setblocking(False)
        connection = Connection(self._server)
        opening = self._loop.create_task(self._loop.connect_accepted_socket(lambda: connection, accepted))
        self._opening[opening] = connection
        opening.add_done_callback(self._opening.pop)
        if self._crowd[self._worker]:
            self._crowd[self._worker] += 1
        return True


#: Taken in one turn of the loop.
TAKE_MAX = 16
#: How many more than the emptiest has, beside an eighth, are no reason to look away; and for how long that is.
MORE = 2
AWAY_S = 0.001
#: How long one looks away that is not there for calls, while another is.
ABSENT_S = 0.05
#: Times in a row that there was one waiting all the same: about a second, for which the other hangs.
LEFT_MAX = 20
FAULT_S = 1.0
