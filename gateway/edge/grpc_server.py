"""What serves gRPC at one address: its connections, what they may not do for ever, and how they end."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, NamedTuple, Protocol

from gateway.call import Bounds
from gateway.edge.connection import UNREAD_BYTES_MAX
from gateway.edge.grpc_call import Rpc, Share
from gateway.edge.outlet import Outlet
from gateway.edge.server import BACKLOG, CLOSE_S_MAX, LOOK_S
from gateway.errors import GatewayError
from runtimes.clock import Clock
from runtimes.http2.connection import Connection
from runtimes.http2.frames import Code


class Door(Protocol):
    """What the server leads to."""

    def enter(self, rpc: Rpc) -> Coroutine[Any, Any, None]:
        """Called with the header alone, before any message is read. Raises GatewayError to refuse it."""

    def refuse(self, rpc: Rpc, error: GatewayError) -> None: ...

    @property
    def at_rest(self) -> bool:
        """No call computes."""


class Patience(NamedTuple):
    """With connections that say nothing."""

    idle_s_max: float
    """Without any call."""
    keepalive_s: float
    """Silent, before it is asked whether it still lives; and the time that it has to say so."""
    keepalive_s_max: float


class GrpcServer:
    """What the connections of one listener share."""

    def __init__(self, *, door: Door, bounds: Bounds, streams_max: int, patience: Patience, clock: Clock) -> None:
        self.door = door
        self.bounds = bounds
        self.streams_max = streams_max
        self.patience = patience
        self.clock = clock
        self.loop = asyncio.get_running_loop()
        self.connections: set[GrpcConnection] = set()
        self.calls: dict[asyncio.Task[None], Rpc] = {}
        """Whatever has a handler."""

    def start(self, rpc: Rpc, handler: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        # By itself each would have a name of its own, made from a number.
        task = asyncio.Task(handler, loop=self.loop, name="rpc")
        self.calls[task] = rpc
        task.add_done_callback(self.calls.__delitem__)
        return task

    @asynccontextmanager
    async def serving(self, listening: socket.socket) -> AsyncIterator[None]:
        """Serve while inside."""
        server = await self.loop.create_server(lambda: GrpcConnection(self), sock=listening, backlog=BACKLOG)
        try:
            yield
        finally:
            server.close()
            await self.stop()
            await server.wait_closed()

    async def stop(self) -> None:
        """Take no more calls, let those end that compute, and end the others, which only wait."""
        for connection in tuple(self.connections):
            connection.http2.refuse_more()
        await self._until(lambda: self.door.at_rest)
        for rpc in tuple(self.calls.values()):
            rpc.stop()
        await self._until(lambda: not any(connection.http2.streams for connection in self.connections))
        for connection in tuple(self.connections):
            connection.transport.close()
        await self._until(lambda: not self.connections)
        for connection in tuple(self.connections):
            connection.transport.abort()

    def retire(self) -> None:
        """Have clients open their next calls on other connections."""
        for connection in tuple(self.connections):
            connection.http2.retire()

    async def _until(self, condition: Callable[[], bool]) -> None:
        until_s = self.clock.now_s() + CLOSE_S_MAX
        while not condition() and self.clock.now_s() < until_s:
            await self.clock.sleep(LOOK_S)


class GrpcConnection(Outlet):
    """One client's connection. One timer looks after all that it may not do for ever; it looks again when the first of
    that would be over, for setting it anew at each read would cost more."""

    def __init__(self, server: GrpcServer) -> None:
        self._server = server
        self._now_s = server.loop.time
        self.share = share = Share()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_s = 0.0
        self._heard_s = self._busy_s = self._pinged_s = self._full_s = self._now_s()
        """When something was read; when there was a call; when it was asked whether it lives; when it stopped to take
        what is written."""
        self._header_s: float | None = self._heard_s
        """When the header began that is still coming, or the greeting; None if there is nothing of that kind."""
        self.http2 = Connection(
            opened=lambda connection, id: Rpc(connection, id, server, share),
            write=self.write,
            now_s=self._now_s,
            streams_max=server.streams_max,
            header_bytes_max=server.bounds.header_bytes_max,
        )

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        if len(self._server.connections) >= self._server.bounds.connections_max:
            self.transport.abort()
            return
        self._server.connections.add(self)
        self.transport.set_write_buffer_limits(high=UNREAD_BYTES_MAX)
        self.http2.begin()
        self._look()

    def data_received(self, data: bytes) -> None:
        self.http2.receive(data)
        self._heard_s = now_s = self._now_s()
        if self.http2.greeted and not self.http2.reader.amid_header:
            self._header_s = None
        elif self._header_s is None:
            self._header_s = now_s
            self._look_by(now_s + self._server.bounds.header_s_max)
        if self.http2.streams:
            self._busy_s = now_s
        if self.http2.fault:
            self._close()

    def pause_writing(self) -> None:
        self.http2.out.full = True
        self._full_s = self._now_s()
        self._look_by(self._full_s + self._server.bounds.write_s_max)

    def resume_writing(self) -> None:
        self.http2.resume()

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.connections.discard(self)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self.http2.lost("the connection is gone")

    def _look(self) -> None:
        http2, bounds, patience, now_s = self.http2, self._server.bounds, self._server.patience, self._now_s()
        self._timer = None
        if http2.streams:
            self._busy_s = now_s
        untils = [(self._busy_s + patience.idle_s_max, self._leave)]
        if self._header_s is not None:
            untils.append((self._header_s + bounds.header_s_max, self.transport.abort))
        if http2.out.full:
            untils.append((self._full_s + bounds.write_s_max, self.transport.abort))
        if http2.pinged:
            untils.append((self._pinged_s + patience.keepalive_s_max, self.transport.abort))
        else:
            untils.append((self._heard_s + patience.keepalive_s, self._ask))
        until_s, act = min(untils, key=lambda it: it[0])
        if until_s > now_s:
            self._timer_s = until_s
            self._timer = self._server.loop.call_later(until_s - now_s, self._look)
        else:
            act()

    def _look_by(self, until_s: float) -> None:
        if self._timer is not None and until_s < self._timer_s:
            self._timer.cancel()
            self._look()

    def _ask(self) -> None:
        self._pinged_s = self._now_s()
        self.http2.ping()
        self._look()

    def _leave(self) -> None:
        self.http2.end(Code.NO_ERROR, "idle for too long")
        self._close()

    def _close(self) -> None:
        """Once what was written has gone out, or after a moment."""
        if not self.transport.is_closing():
            self.transport.close()
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self._server.loop.call_later(CLOSE_S_MAX, self.transport.abort)
