"""A pooled HTTP/1.1 client (RFC 9112) for one origin: the only client on the hot path.

A call costs tens of microseconds here, where streams, tasks and timeout objects would make it hundreds. Three
rules keep the pool honest:

- Giving back is synchronous. Nothing is awaited on the way out, so neither a cancel, nor a second cancel
  during clean-up, nor a generator that is never finalised can leak a place or a socket.
- Places are counted per exchange, not per connection: a parked connection is opportunity, never property.
- A connection is parked only if its answer was read to its true end, with nothing behind it.
"""

from __future__ import annotations

import asyncio
import math
import re
import ssl
from collections import deque
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from types import TracebackType
from typing import NamedTuple
from urllib.parse import urlsplit

from runtimes.clock import Clock
from runtimes.connection import Connection
from runtimes.contract import (
    Broken,
    Expired,
    Invalid,
    Load,
    Overloaded,
    Reply,
    RuntimeFault,
    Silent,
    Sink,
    Unavailable,
)

#: uvicorn, and so vLLM, closes a connection that was silent for 5 s: be the one who leaves first.
PARKED_S_MAX = 4.0
#: Calls waiting for a place. The gateway's own queues keep them few; this bounds a mistake.
WAITING_MAX = 4_096

_TOKEN = re.compile(rb"[!#$%&'*+.^_`|~0-9a-z-]+")
_VALUE = re.compile(rb"[\t\x20-\x7e\x80-\xff]*")
_TARGET = re.compile(r"/[!-~]*")
_HOST = re.compile(r"[0-9A-Za-z._:-]+")
_OURS = frozenset({b"host", b"content-length", b"transfer-encoding", b"connection", b"upgrade", b"expect"})


Headers = tuple[tuple[bytes, bytes], ...]


class Head(NamedTuple):
    """See Wire.head."""

    text: bytes
    method: str


class Wire:
    """Up to `connections_max` exchanges at once with the origin of `url`, or with what listens on `uds`.

    The path of `url` is not used: `exchange` takes whole paths. An https url is verified against the
    system's authorities unless `ssl_context` says otherwise. `connect_s_max` covers name, TCP and TLS;
    `idle_s_max` bounds the silence inside an answer that has begun; before that only the call's own bounds do,
    because a long prompt is silent for long. Proxies from the environment are not honoured and redirects
    not followed: both let somebody else choose where a prompt goes. What time it is says `clock`; what
    wakes up to look at it are the loop's timers, because nothing else can wake a selector. Belongs to the
    event loop that uses it first.
    """

    def __init__(
        self,
        url: str,
        *,
        uds: Path | None = None,
        ssl_context: ssl.SSLContext | None = None,
        connections_max: int,
        connect_s_max: float,
        idle_s_max: float,
        clock: Clock,
    ) -> None:
        parts = urlsplit(url)
        authority = parts.netloc.rpartition("@")[2]
        if parts.scheme not in ("http", "https") or not _HOST.fullmatch(parts.hostname or ""):
            raise ValueError("the upstream's address must be an http:// or https:// URL with a plain ASCII host")
        secure = parts.scheme == "https"
        self.name = f"unix:{uds}" if uds else f"{parts.scheme}://{authority}"
        self.clock = clock
        self._idle_s_max = idle_s_max
        self._uds = uds
        self._host = parts.hostname or ""
        self._port = parts.port or (443 if secure else 80)
        self._ssl = (ssl_context or ssl.create_default_context()) if secure else None
        self._line_end = b" HTTP/1.1\r\nhost: %b\r\n" % authority.encode("ascii")
        self._connections_max = connections_max
        self._connect_s_max = connect_s_max
        self._free = connections_max
        self._waiting: dict[asyncio.Future[bool], None] = {}
        self._open: set[Connection] = set()
        self._none_open = asyncio.Event()
        self._none_open.set()
        self._parked: deque[Connection] = deque()
        self._sweeper: asyncio.TimerHandle | None = None
        self._closed = False

    def head(self, method: str, path: str, headers: Headers = ()) -> Head:
        """The beginning of a request, for `exchange`, to be made once for many. Header names are lower case; Invalid
        is raised for a path or header that would say something else on the wire than it says here."""
        if not _TARGET.fullmatch(path):
            raise Invalid(f"{self.name}: a path must be plain ASCII without blanks and begin with `/`")
        line = b"%b %b%b" % (method.encode(), path.encode(), self._line_end)
        return Head(line + self._fields(headers), method)

    def exchange(
        self, head: Head, headers: Headers, body: bytes, deadline_s: float, begin_by_s: float = math.inf
    ) -> AbstractAsyncContextManager[Reply]:
        """One call, with further headers. Entering waits for status, headers and the first body bytes, or the end of
        an empty body; what stops it before is Unavailable, Overloaded, Expired, or Silent if it is the server that
        has not begun to answer by `begin_by_s`; afterwards Broken or Expired. Leaving before the body's end closes the
        connection at once."""
        fields = self._fields(headers)
        length = b"content-length: %d\r\n\r\n" % len(body) if body or head.method == "POST" else b"\r\n"
        return _Exchange(self, head.text + fields + length, body, head.method == "HEAD", deadline_s, begin_by_s)

    def _fields(self, headers: Headers) -> bytes:
        for name, value in headers:
            if not _TOKEN.fullmatch(name) or name in _OURS:
                raise Invalid(f"{self.name}: a request header's name is malformed, or is the client's own to set")
            if not _VALUE.fullmatch(value):
                raise Invalid(f"{self.name}: request header `{name.decode()}` has control characters in its value")
        return b"".join([b"%b: %b\r\n" % field for field in headers])

    def load(self) -> Load:
        return Load(running=self._connections_max - self._free, waiting=len(self._waiting))

    @property
    def connections(self) -> int:
        """Open connections: being made, in use, or parked."""
        return len(self._open)

    @property
    def parked(self) -> int:
        """Connections kept for the next call."""
        return len(self._parked)

    async def aclose(self) -> None:
        """Close every connection, and return when they are closed. Calls under way end as Unavailable or
        Broken, so whoever wants to drain waits for `load` first. Safe to call twice."""
        self._closed = True
        for place in self._waiting:
            if not place.done():
                place.set_result(False)
        for connection in tuple(self._open):
            connection.stop("this client was closed")
        if self._sweeper is not None:
            self._sweeper.cancel()
            self._sweeper = None
        await self._none_open.wait()

    # What follows is for _Exchange.

    def take_place(self) -> bool:
        """Take a free place, if there is one. While one is free, nobody waits."""
        if not self._free or self._closed:
            return False
        self._free -= 1
        return True

    async def wait_for_place(self, deadline_s: float) -> None:
        if self._closed:
            raise Unavailable(f"{self.name}: this client was closed")
        if len(self._waiting) >= WAITING_MAX:
            raise Overloaded(f"{self.name}: {WAITING_MAX} calls already wait for a connection")
        place: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._waiting[place] = None
        granted = False
        left_s = deadline_s - self.clock.now_s()
        try:
            async with asyncio.timeout(left_s if math.isfinite(left_s) else None):
                granted = await place
        except TimeoutError:
            raise Expired(
                f"{self.name}: all {self._connections_max} connections stayed busy until the deadline"
            ) from None
        finally:
            self._waiting.pop(place, None)
            if not granted and place.done() and not place.cancelled() and place.result():
                # Granted and cancelled in the same turn of the loop: it must go on to the next one.
                self.give_place()
        if not granted:
            raise Unavailable(f"{self.name}: this client was closed")

    def give_place(self) -> None:
        """To the call that has waited longest, or back to the free ones."""
        for place in self._waiting:
            if not place.done():
                place.set_result(True)
                del self._waiting[place]
                return
        self._free += 1

    async def connect(self, deadline_s: float) -> Connection:
        if self._closed:
            raise Unavailable(f"{self.name}: this client was closed")
        loop = asyncio.get_running_loop()
        connection = Connection(loop=loop, clock=self.clock, idle_s_max=self._idle_s_max, lost=self._forget)
        server_name = self._host if self._ssl else None
        left_s = deadline_s - self.clock.now_s()
        connected = False
        self._open.add(connection)
        self._none_open.clear()
        try:
            async with asyncio.timeout(min(left_s, self._connect_s_max)):
                if self._uds:
                    await loop.create_unix_connection(
                        lambda: connection, str(self._uds), ssl=self._ssl, server_hostname=server_name
                    )
                else:
                    await loop.create_connection(
                        lambda: connection, self._host, self._port, ssl=self._ssl, server_hostname=server_name
                    )
            connected = True
        except TimeoutError:
            if left_s <= self._connect_s_max:
                raise Expired(f"{self.name}: not connected before the deadline") from None
            raise Unavailable(f"{self.name}: not connected within {self._connect_s_max:g} s") from None
        except OSError as error:
            raise Unavailable(f"{self.name}: cannot connect: {error}") from error
        finally:
            if not connected:
                # Marked even if there is no socket yet: should the loop finish connecting after its caller
                # was cancelled, connection_made sees the mark and closes what nobody owns. Forgotten here
                # because uvloop never calls connection_lost if that cancel comes in the turn of connection_made.
                connection.stop("its call left while it was connecting")
                self._forget(connection)
        if connection.stopped:
            raise Unavailable(f"{self.name}: {connection.stopped}")
        return connection

    def park(self, connection: Connection) -> None:
        connection.parked_s = self.clock.now_s()
        self._parked.append(connection)
        if self._sweeper is None:
            self._sweeper = asyncio.get_running_loop().call_later(PARKED_S_MAX, self._sweep)

    def unpark(self) -> Connection | None:
        """The one parked last: the likeliest to be alive, and the others get to grow old and go."""
        while self._parked:
            connection = self._parked.pop()
            if self.clock.now_s() - connection.parked_s < PARKED_S_MAX:
                return connection
            connection.stop("it was parked for too long")
        return None

    def _sweep(self) -> None:
        too_old_s = self.clock.now_s() - PARKED_S_MAX
        while self._parked and self._parked[0].parked_s <= too_old_s:
            self._parked.popleft().stop("it was parked for too long")
        self._sweeper = None
        if self._parked:
            self._sweeper = asyncio.get_running_loop().call_later(PARKED_S_MAX, self._sweep)

    def _forget(self, connection: Connection) -> None:
        self._open.discard(connection)
        if connection in self._parked:
            self._parked.remove(connection)
        if not self._open:
            self._none_open.set()


class _Exchange:
    """One call's holdings, a place and a connection; and the frames of its answer."""

    __slots__ = ("_begin_by_s", "_bodiless", "_body", "_connection", "_deadline_s", "_head", "_wire")

    def __init__(
        self, wire: Wire, head: bytes, body: bytes, bodiless: bool, deadline_s: float, begin_by_s: float
    ) -> None:
        self._wire = wire
        self._head = head
        self._body = body
        self._bodiless = bodiless
        self._deadline_s = deadline_s
        self._begin_by_s = begin_by_s
        self._connection: Connection | None = None

    async def __aenter__(self) -> Reply:
        wire = self._wire
        if wire.clock.now_s() >= self._deadline_s:
            raise Expired(f"{wire.name}: the deadline passed before the call was sent")
        if not wire.take_place():
            await wire.wait_for_place(self._deadline_s)
        try:
            connection = wire.unpark()
            if connection is not None:
                self._ask(connection)
                while not (connection.begun or connection.stopped):
                    await connection.news()
            if connection is None or not (connection.heard or connection.late or connection.silent):
                connection = await wire.connect(self._deadline_s)
                self._ask(connection)
                while not (connection.begun or connection.stopped):
                    await connection.news()
            if not connection.begun:
                raise self._fault(connection, Silent if connection.silent else Unavailable)
        except BaseException:
            self._leave()
            raise
        connection.go_on()
        body = b"".join(connection.chunks) if connection.ended else None
        return Reply(connection.status, connection.headers, self, self.pour, body)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave()

    def __aiter__(self) -> _Exchange:
        return self

    async def __anext__(self) -> bytes:
        while True:
            connection = self._current()
            if connection.chunks:
                return connection.take()
            if connection.ended:
                raise StopAsyncIteration
            if connection.stopped:
                raise self._fault(connection, Broken)
            await connection.news()

    async def pour(self, sink: Sink) -> None:
        """See Reply. While the sink takes, the connection hands over what it reads as it reads it."""
        while not sink.done:
            connection = self._current()
            if connection.chunks:
                if not sink.take(connection.take()):
                    await sink.drained()
            elif connection.ended:
                return
            elif connection.stopped:
                raise self._fault(connection, Broken)
            elif not await connection.poured(sink):
                await sink.drained()

    def _ask(self, connection: Connection) -> None:
        """On a fresh connection, or on a parked one; if that was closed without a single byte of an answer, the call
        is sent again, once.

        It is the ordinary race with a server that closes idle connections, and the only case in which anything is sent
        twice. RFC 9110 §9.2.2 wants a reason for that with POST: nothing was answered, a completion changes nothing
        upstream, and the worst that can happen is that a dying engine began it in vain."""
        self._connection = connection
        connection.ask(
            self._head,
            self._body,
            bodiless=self._bodiless,
            deadline_s=self._deadline_s,
            begin_by_s=self._begin_by_s,
        )

    def _current(self) -> Connection:
        """Looked at after every wait: by now the connection may be answering somebody else."""
        if self._connection is None:
            raise RuntimeError("the frames of a reply were read after its exchange was left")
        return self._connection

    def _fault(self, connection: Connection, kind: type[RuntimeFault]) -> RuntimeFault:
        return (Expired if connection.late else kind)(f"{self._wire.name}: {connection.stopped}")

    def _leave(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None and connection.leave():
            self._wire.park(connection)
        self._wire.give_place()
