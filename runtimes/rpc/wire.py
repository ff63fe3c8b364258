"""A client's connection for gRPC: a socket, with HTTP/2 on it."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import cast

from runtimes.http2.connection import Connection
from runtimes.http2.frames import STREAM_MOST
from runtimes.rpc.call import Call
from runtimes.rpc.messages import framed

#: A connection that has been silent for so long while calls were under way is asked whether it lives, and has so long
#: to say so.
KEEPALIVE_S, KEEPALIVE_S_MAX = 20.0, 5.0
#: Of an answer's header.
HEADER_BYTES_MAX = 16_384
#: Of requests, held for a server that reads more slowly than it is written to.
UNREAD_BYTES_MAX = 1 << 20


class Wire(asyncio.Protocol):
    """`greeted` is done when the server's settings are here, or with an OSError; calls may `begin` then. It is among
    `wires` while it is open."""

    def __init__(self, wires: set[Wire]) -> None:
        self._loop = asyncio.get_running_loop()
        self._wires = wires
        self._transport: asyncio.Transport | None = None
        self._http2 = Connection(
            opened=None,
            write=self._write,
            now_s=self._loop.time,
            streams_max=0,
            header_bytes_max=HEADER_BYTES_MAX,
        )
        self.greeted: asyncio.Future[None] = self._loop.create_future()
        self.gone = asyncio.Event()
        self._waiting: deque[asyncio.Future[None]] = deque()
        """Who waits for a place among the streams that the server takes at once."""
        self._closed = False
        self._heard_s = self._pinged_s = 0.0
        self._timer: asyncio.TimerHandle | None = None

    @property
    def open(self) -> bool:
        """It takes calls, now or when others have ended."""
        leaving = self._closed or self._http2.leaving or self._http2.fault
        return not leaving and self._http2.next_stream <= STREAM_MOST

    @property
    def crowded(self) -> bool:
        """The server takes no more at once."""
        return len(self._http2.streams) >= self._http2.streams_max

    async def place(self) -> None:
        """Return when it may not be crowded any more, or is gone."""
        place = self._loop.create_future()
        self._waiting.append(place)
        try:
            await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():
                self._wake(1)  # it was given in the turn in which it was left
            raise

    def begin(self, block: bytes, message: bytes, *, bytes_max: int) -> Call:
        """Send a request."""
        call = Call(self._http2, self._http2.next_stream, bytes_max=bytes_max, loop=self._loop)
        if not self._http2.streams:
            self._heard_s = self._loop.time()
        self._http2.add(call)
        call.send_fields(block)
        call.send_data(framed(message), end=True)
        self._http2.out.flush()
        if self._timer is None:
            self._look()
        return call

    def end(self, call: Call) -> None:
        """Nobody waits for it any more; if it is not over, the server is told."""
        call.leave()
        self._wake(1)
        self._close_if_spent()

    def close(self) -> None:
        """At once."""
        self._closed = True
        if self._transport is not None:
            self._transport.abort()

    def _close_if_spent(self) -> None:
        if not self._http2.streams and not self.open:
            self.close()

    def _wake(self, number: int) -> None:
        while number and self._waiting:
            place = self._waiting.popleft()
            if not place.done():
                place.set_result(None)
                number -= 1

    def _write(self, data: bytes) -> None:
        assert self._transport is not None
        if not self._transport.is_closing():
            self._transport.write(data)

    def _look(self) -> None:
        """One timer, that outlives calls: to set one for each would cost more."""
        self._timer, now_s = None, self._loop.time()
        if not self._http2.streams or self._closed:
            return
        asked = self._http2.pinged
        until_s = self._pinged_s + KEEPALIVE_S_MAX if asked else self._heard_s + KEEPALIVE_S
        if now_s < until_s:
            self._timer = self._loop.call_later(until_s - now_s, self._look)
        elif asked:
            self.close()
        else:
            self._pinged_s = now_s
            self._http2.ping()
            self._look()

    # ---- asyncio calls these

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's transports only look like asyncio's
        self._wires.add(self)
        session = transport.get_extra_info("ssl_object")
        if self._closed or (session is not None and session.selected_alpn_protocol() != ALPN):
            self._transport.abort()
            return
        self._transport.set_write_buffer_limits(high=UNREAD_BYTES_MAX)
        self._http2.begin()

    def data_received(self, data: bytes) -> None:
        self._heard_s = self._loop.time()
        self._http2.receive(data)
        if self._http2.greeted and not self.greeted.done():
            self.greeted.set_result(None)
        if self._waiting and not self.crowded:
            self._wake(1)
        self._close_if_spent()

    def pause_writing(self) -> None:
        self._http2.out.full = True

    def resume_writing(self) -> None:
        self._http2.resume()

    def connection_lost(self, exc: Exception | None) -> None:
        self._closed = True
        self.gone.set()
        self._wires.discard(self)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._http2.lost(f"the connection failed: {exc}" if exc else "the connection was closed")
        if not self.greeted.done():
            self.greeted.set_exception(ConnectionError(self._http2.fault))
        self._wake(len(self._waiting))


#: HTTP/2's name in TLS, RFC 9113 §3.2.
ALPN = "h2"
