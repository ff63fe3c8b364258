"""One HTTP/1.1 connection, seen from the client: a request out, the bytes of its answer in.

httptools (llhttp in its strict mode) says where an answer ends; what it leaves to its caller is decided here:
which framings are believed (RFC 9112 §6.3), how much may be said that is not body, and what a cut connection
means. Nothing here raises into the event loop and nothing waits but for `news`.
"""

from __future__ import annotations

import asyncio
import math
import ssl
from collections.abc import Callable
from typing import NoReturn, cast

import httptools

from runtimes.clock import Clock
from runtimes.contract import Sink

#: Whatever of an answer is not body, in one piece: head, interim (1xx) answers, trailers, chunk extensions.
HEAD_BYTES_MAX = 65_536
HEADERS_MAX = 128
#: Body bytes held for a reader that is slower than the upstream, before the upstream is made to wait; what one read
#: brings may be more.
AHEAD_BYTES_MAX = 16_384
#: Below this, copying the body behind the head is cheaper than handing over two buffers.
JOIN_BYTES_MAX = 65_536
#: No loop takes infinity, which is what a deadline may be; looking once too often does no harm.
LOOK_S_MAX = 3_600.0

_HOP_BY_HOP = frozenset(
    {
        b"connection",
        b"content-length",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)


class Connection(asyncio.Protocol):
    """Answers one call at a time: `ask`, then `news` until `begun`, `go_on`, then `take` and `news` until `ended` or
    `stopped`, then `leave`.

    `lost` is called with it when it is gone. One timer looks after both bounds of a call, deadline and
    silence; it outlives the call, because setting one for every call costs more than an idle look now and
    then. Writing waits for nobody: a request is one buffer that is in memory anyway, so there is no more to
    hold back; `leave` sees whether all of it was sent.
    """

    __slots__ = (
        "_asked",
        "_begin_by_s",
        "_bodiless",
        "_clock",
        "_deadline_s",
        "_dry_bytes",
        "_fields",
        "_heard_s",
        "_idle_s_max",
        "_keep",
        "_loop",
        "_lost",
        "_parser",
        "_paused",
        "_refusal",
        "_sink",
        "_sink_fault",
        "_sink_full",
        "_timer",
        "_timer_s",
        "_transport",
        "_unread_bytes",
        "_until_close",
        "_waiter",
        "chunks",
        "ended",
        "headers",
        "heard",
        "late",
        "parked_s",
        "silent",
        "status",
        "stopped",
    )

    def __init__(
        self,
        *,
        loop: asyncio.AbstractEventLoop,
        clock: Clock,
        idle_s_max: float,
        lost: Callable[[Connection], None],
    ) -> None:
        self._loop = loop
        self._clock = clock
        self._idle_s_max = idle_s_max
        self._lost = lost
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._timer: asyncio.TimerHandle | None = None
        self._timer_s = 0.0
        self._waiter: asyncio.Future[None] | None = None
        self._sink: Sink | None = None
        """Where body bytes go at once, while somebody waits in `poured`."""
        self._paused = False
        self._refusal = ""
        self.stopped = ""
        """Why nothing more will come, for people; empty while something may."""
        self.late = False
        """It was the deadline that stopped it."""
        self.silent = False
        """Or the time by which the answer had to begin."""
        self.parked_s = 0.0
        self._asked = False
        self._reset(bodiless=False, deadline_s=0.0, begin_by_s=0.0)

    def _reset(self, *, bodiless: bool, deadline_s: float, begin_by_s: float) -> None:
        self._bodiless = bodiless
        self._deadline_s = deadline_s
        self._begin_by_s = begin_by_s
        self._fields: list[tuple[bytes, bytes]] = []
        self._dry_bytes = 0
        self._unread_bytes = 0
        self._heard_s = math.inf
        self._keep = False
        self._until_close = False
        self._sink_full = False
        self._sink_fault: Exception | None = None
        self.heard = False
        """Any byte of an answer has come."""
        self.status = 0
        self.headers: tuple[tuple[bytes, bytes], ...] = ()
        self.chunks: list[bytes] = []
        """Body bytes that nobody has taken yet."""
        self.ended = False
        """The body is here to its true end."""

    def ask(self, head: bytes, body: bytes, *, bodiless: bool, deadline_s: float, begin_by_s: float) -> None:
        """Send a request, after which there is `news` until `begun` or `stopped`. Nothing is waited for, so that
        nothing can come between choosing a parked connection and using it."""
        assert self._transport is not None, "asked before it was connected"
        self._reset(bodiless=bodiless, deadline_s=deadline_s, begin_by_s=begin_by_s)
        self._asked = True
        if not self.closing:
            if len(body) < JOIN_BYTES_MAX:
                self._transport.write(head + body)
            else:
                self._transport.writelines((head, body))
        self._look_by(deadline_s if deadline_s < begin_by_s else begin_by_s)

    def go_on(self) -> None:
        """The answer has begun: from now on its silence is bounded too."""
        if not self.ended:
            self._look_by(self._heard_s + self._idle_s_max)

    @property
    def begun(self) -> bool:
        """The first body bytes are here, or the end of an empty body."""
        return self.ended or bool(self.chunks)

    @property
    def closing(self) -> bool:
        return bool(self.stopped) or self._transport is None or self._transport.is_closing()

    def news(self) -> asyncio.Future[None]:
        """Done at body bytes, the end, or a stop. For one reader at a time."""
        self._waiter = self._loop.create_future()
        return self._waiter

    async def poured(self, sink: Sink) -> bool:
        """As `news`, but meanwhile body bytes go to the sink as they are read. False if it has had enough for now;
        raises what the sink raises."""
        self._sink, self._sink_full = sink, False
        try:
            await self.news()
        finally:
            self._sink = None
        if self._sink_fault is not None:
            raise self._sink_fault
        return not self._sink_full

    def take(self) -> bytes:
        """All that has come since it was last asked."""
        chunks = self.chunks
        frame = chunks[0] if len(chunks) == 1 else b"".join(chunks)
        chunks.clear()
        self._unread_bytes = 0
        if self._paused and self._transport is not None and not self.closing:
            self._paused = False
            # While it was held back, its silence was not its own.
            self._heard_s = self._clock.now_s()
            self._transport.resume_reading()
        return frame

    def leave(self) -> bool:
        """End the call. True if the connection may serve another: the answer is here to its end, nothing
        came after it, all of the request was sent, and the upstream means to stay. Otherwise it is closed."""
        self._asked = False
        if (
            self._keep
            and not self._paused
            and not self.stopped
            and self._transport is not None
            and not self._transport.get_write_buffer_size()
        ):
            self.chunks.clear()
            return True
        self.stop("its call was left")
        return False

    def stop(self, why: str) -> None:
        """Close at once, without waiting for anything to be flushed; the first reason stays."""
        if not self.stopped:
            self.stopped = why
        if self._transport is not None:
            self._transport.abort()
        self._wake()

    def _look_by(self, when_s: float) -> None:
        if self.stopped:
            return
        if self._timer is not None:
            if self._timer_s <= when_s:
                return
            self._timer.cancel()
        self._timer_s = when_s
        delay_s = min(max(0.0, when_s - self._clock.now_s()), LOOK_S_MAX)
        self._timer = self._loop.call_later(delay_s, self._look)

    def _look(self) -> None:
        self._timer = None
        if not self._asked or self.ended or self.stopped:
            return
        now_s = self._clock.now_s()
        # What lies here untaken is the reader's slowness, not the upstream's silence.
        silent_s = (now_s if self.chunks else self._heard_s) + self._idle_s_max
        next_s = silent_s if self._heard_s < math.inf else self._begin_by_s
        if now_s >= self._deadline_s:
            self.late = True
            self.stop("the deadline passed before the end of the answer")
        elif now_s < next_s:
            self._look_by(min(self._deadline_s, next_s))
        elif self._heard_s < math.inf:
            self.stop(f"nothing came for {self._idle_s_max:g} s in the midst of the answer")
        else:
            self.silent = True
            self.stop("it did not begin to answer in time")

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    # asyncio calls these.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's transports only look like asyncio's
        if self.stopped:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        if self.stopped:
            return
        if not self._asked:
            self.stop("it sent what nobody asked for")
            return
        self.heard = True
        self._dry_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self.stop(f"its answer is not valid HTTP/1.1: {self._refusal or error}")
            return
        if self.chunks or self.ended:
            self._wake()
        if self._dry_bytes > HEAD_BYTES_MAX:
            self.stop(f"it sent more than {HEAD_BYTES_MAX} bytes of framing without any body")
        elif self._unread_bytes > AHEAD_BYTES_MAX and not self._paused and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()

    def eof_received(self) -> None:
        if self._asked and self._until_close and not self.stopped and self._meant():
            self.ended = True
            self._wake()

    def connection_lost(self, error: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        del self._parser  # it knows this connection: a cycle, which would lie about until somebody looks for garbage
        self.stop(f"the connection failed: {error}" if error else "it closed the connection before the answer's end")
        self._lost(self)

    def _meant(self) -> bool:
        """Whether the peer itself ended the stream. asyncio reports a cut TLS connection as an end as well, but
        OpenSSL knows whether close_notify came (RFC 9112 §9.8): only then does it read nothing instead of failing."""
        session = self._transport.get_extra_info("ssl_object") if self._transport else None
        if session is None:
            return True
        try:
            return not session.read(1)
        except ssl.SSLError:
            return False

    # httptools calls these, from within feed_data.

    def on_message_begin(self) -> None:
        if self.ended:
            self._refuse("more bytes than the answer")

    def on_header(self, name: bytes, value: bytes) -> None:
        # Trailers come here as well, after the head was made of what came before, and go nowhere.
        self._fields.append((name.lower(), value.strip()))

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        fields, self._fields = self._fields, []
        if status < 200:
            if status == 101:
                self._refuse("an upgrade that was not asked for")
            return
        if status > 599:
            self._refuse(f"status {status}")
        named = _HOP_BY_HOP
        framed = False
        head_bytes = 0
        for name, value in fields:
            head_bytes += len(name) + len(value)
            if name == b"content-length":
                framed = True
            elif name == b"transfer-encoding":
                # Other codings would need decoding, and twice is a smuggler's trick; a 1.0 peer cannot mean it.
                if framed or value.lower() != b"chunked" or self._parser.get_http_version() != "1.1":
                    self._refuse("a Transfer-Encoding other than one `chunked`")
                framed = True
            elif name == b"connection":
                named = named.union(token.strip() for token in value.lower().split(b","))
        if len(fields) > HEADERS_MAX or head_bytes > HEAD_BYTES_MAX:
            self._refuse(f"more than {HEADERS_MAX} headers or {HEAD_BYTES_MAX} bytes of them")
        self.headers = tuple([field for field in fields if field[0] not in named])
        self.status = status
        self._until_close = not framed
        if self._bodiless:
            # llhttp does not know that this answers a HEAD: end here, and let the connection go with it.
            self.ended = True
            self._refuse("an answer to HEAD")

    def on_body(self, body: bytes) -> None:
        self._dry_bytes = 0
        self._heard_s = self._clock.now_s()
        if self._sink is None:
            self.chunks.append(body)
            self._unread_bytes += len(body)
            return
        try:
            if self._sink.take(body):
                return
            self._sink_full = True
        except Exception as fault:  # noqa: BLE001  it is raised where the pouring is waited for
            self._sink_fault = fault
        self._sink = None
        self._wake()

    def on_message_complete(self) -> None:
        if self.status:
            self.ended = True
            self._heard_s = self._clock.now_s()
            # Valid only here: llhttp forgets the connection's flags with the message.
            self._keep = self._parser.should_keep_alive()

    def _refuse(self, why: str) -> NoReturn:
        """Make feed_data raise; httptools wraps whatever a callback raises and loses its words."""
        self._refusal = why
        raise ValueError(why)
