"""What serves one listening socket: its door, its bounds, and the connections that came through it."""

from __future__ import annotations

import asyncio
import http
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from email.utils import formatdate
from typing import Protocol

from gateway.call import Bounds
from gateway.edge.connection import Connection
from gateway.edge.request import Door
from runtimes.clock import Clock

#: Connections the kernel holds for us until they are accepted.
BACKLOG = 2048
#: How long answers under way may take once everything else has stopped.
CLOSE_S_MAX = 2.0


class Accepting(Protocol):
    def close(self) -> object: ...
    async def wait_closed(self) -> object: ...


class Server:
    """What the connections of one listener share."""

    def __init__(self, *, door: Door, bounds: Bounds, clock: Clock) -> None:
        self.door = door
        self.bounds = bounds
        self.clock = clock
        self.connections: set[Connection] = set()
        self.leaving = False
        """The gateway is about to stop: every answer says that it is its connection's last."""
        self._second = 0
        self._heads: dict[int, bytes] = {}

    def head(self, status: int) -> bytes:
        """The status line, and the date, which a server with a clock must send (RFC 9110 §6.6.1)."""
        second = int(self.clock.wall_s())
        if second != self._second:
            self._second = second
            self._heads.clear()
        head = self._heads.get(status)
        if head is None:
            phrase = http.HTTPStatus(status).phrase if status in STATUSES else ""
            line = f"HTTP/1.1 {status} {phrase}\r\ndate: {formatdate(second, usegmt=True)}\r\n"
            head = self._heads[status] = line.encode()
        return head

    @asynccontextmanager
    async def serving(self, listening: socket.socket) -> AsyncIterator[None]:
        """Serve while inside. Leaving closes what is idle, and after a moment the rest."""
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: Connection(self), sock=listening, backlog=BACKLOG)
        async with self.accepting(server):
            yield

    @asynccontextmanager
    async def accepting(self, server: Accepting) -> AsyncIterator[None]:
        """The same, with something else that accepts connections."""
        try:
            yield
        finally:
            server.close()
            for connection in tuple(self.connections):
                connection.shut_down()
            await self._until(lambda: not self.connections, CLOSE_S_MAX)
            for connection in tuple(self.connections):
                connection.abort()
            await server.wait_closed()

    @property
    def busy(self) -> int:
        """Connections with a request that is not answered yet."""
        return sum(connection.busy for connection in self.connections)

    async def drain(self, drain_s_max: float, *, until: Callable[[], bool]) -> None:
        """Wait until nothing is being answered, here or elsewhere, but no longer than that."""
        await self._until(lambda: not self.busy and until(), drain_s_max)

    def cut_off(self) -> None:
        """End the calls under way; their doors say why."""
        for connection in tuple(self.connections):
            connection.cut_off()

    async def _until(self, condition: Callable[[], bool], s_max: float) -> None:
        until_s = self.clock.now_s() + s_max
        while not condition() and self.clock.now_s() < until_s:
            await self.clock.sleep(LOOK_S)


#: Pause between two looks at whether all has been answered.
LOOK_S = 0.05
STATUSES = frozenset(status.value for status in http.HTTPStatus)
