"""One client's HTTP/1.1 connection, under limits: what must not be read is refused here, before it is parsed.

httptools (llhttp in its strict mode) frames what arrives: a length and chunks together, two lengths, a folded line
are a 400. What it leaves to its caller is bounded here: bytes and number of header fields, bytes of a body, the time
each may take, requests sent ahead of their answers, a client that stops reading. Host follows RFC 9112 §3.2: exactly
one, and a well-formed `host[:port]`. A client's leaving cancels its call's task, which is what frees the engine.

Ours rather than a server's that speaks ASGI, because between a socket and a door ASGI costs as much as all of the
gateway's policy: see DECISIONS.md.
"""

from __future__ import annotations

import asyncio
import logging
import re
import socket
import struct
from collections import deque
from typing import TYPE_CHECKING, NoReturn

import httptools

from gateway.edge.outlet import Outlet
from gateway.edge.request import Request, unhandled
from gateway.errors import (
    BadRequest,
    Draining,
    GatewayError,
    HeaderTooLarge,
    RequestTimeout,
    TooLarge,
    TooManyConnections,
)

if TYPE_CHECKING:
    from gateway.edge.server import Server

log = logging.getLogger("headrace.edge")

#: How long a refused client may take to read why, and how long a connection may lie idle between requests.
LINGER_S = 2.0
IDLE_S_MAX = 75.0
#: Of an answer, held for a client that reads more slowly than it is written to, before its engine is made to wait.
UNREAD_BYTES_MAX = 16_384
RESET = struct.pack("ii", 1, 0)
"""Of SO_LINGER: on, and for 0 seconds. See socket(7)."""
VERSIONS = frozenset({"1.0", "1.1"})
OFFERS = frozenset({b"upgrade", b"http2-settings"})
"""The fields that offer another protocol, and their names in `connection`."""
HOST = re.compile(rb"(?:\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._~-]+)(?::[0-9]{1,5})?")


class Connection(Outlet):
    """Reads requests one behind the other, and answers one at a time, in their order."""

    __slots__ = (
        "_advancing",
        "_bounds",
        "_drained",
        "_dry_bytes",
        "_due_s",
        "_expected",
        "_headers",
        "_held",
        "_host",
        "_hung_up",
        "_in_header",
        "_loop",
        "_messages",
        "_moved",
        "_parser",
        "_read_bytes",
        "_reading",
        "_refusal",
        "_target",
        "_task",
        "_timer",
        "_timer_s",
        "_waiting",
        "_write_timer",
        "paused",
        "running",
        "server",
    )

    def __init__(self, server: Server) -> None:
        self.server = server
        self._bounds = server.bounds
        self._loop = asyncio.get_running_loop()
        self._parser = self._new_parser()
        self._refusal: GatewayError | None = None
        """Nothing is read any more; this is said once what came before is answered."""
        self._hung_up = False
        """All has been said; the client is given time to read it."""

        self._messages = 0
        self._in_header = False
        self._target = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._host: bytes | None = b" "
        """What the last request named, and was found well-formed; at first what none can be."""
        self._read_bytes = 0
        """In this read, and those before it that ended amid the same header."""
        self._moved = False
        """In this read a request has begun or ended, or some of a body has come."""
        self._dry_bytes = 0
        """Read since then."""
        self._reading: Request | None = None
        """Its body is still arriving."""
        self._waiting: deque[Request] = deque()
        """Sent ahead, and not begun yet. Reading stops while there are any, so one read bounds them."""
        self._held = False
        """Reading has stopped."""
        self.running: Request | None = None
        """Being answered."""
        self._task: asyncio.Task[None] | None = None
        self._advancing = False

        self.paused = False
        """The client does not read what was written."""
        self._drained: list[asyncio.Future[None]] = []
        self._write_timer: asyncio.TimerHandle | None = None
        self._expected = ""
        """What must come in time: `header`, `body`, the `rest` of a refused body, or a next request to an `idle`
        connection."""
        self._due_s = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._timer_s = 0.0

    # ---- for Request and Server

    async def drained(self) -> None:
        """Return once the client has read most of what was written, or has gone."""
        while self.paused:
            resumed = self._loop.create_future()
            self._drained.append(resumed)
            await resumed

    def finished(self, request: Request) -> None:
        """The request's whole answer is written."""
        if request is self.running:
            self.running = self._task = None
        if self.transport.is_closing():
            return  # the client left in the last moment
        if not request.keep_alive:
            self._hang_up()
        else:
            self._advance()

    @property
    def busy(self) -> bool:
        """A request has been let in and is not answered yet."""
        return self.running is not None or self._reading is not None or bool(self._waiting)

    def cut_off(self) -> None:
        """End what is under way, because the gateway stops."""
        if self._task is not None:
            self._task.cancel()  # its door says why
        elif self._reading is not None and self._reading.refusal is None:
            self._refuse_one(self._reading, Draining("This gateway stopped before the request was whole."))

    def abort(self) -> None:
        self.transport.abort()

    def shut_down(self) -> None:
        """Close, now or behind the answer under way."""
        if self.running is None:
            self.transport.close()
        else:
            self.running.keep_alive = False

    # ---- asyncio calls these

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.transport.set_write_buffer_limits(high=UNREAD_BYTES_MAX)
        if len(self.server.connections) >= self._bounds.connections_max:
            self._close_with(
                TooManyConnections(f"This gateway already has {self._bounds.connections_max} connections open.")
            )
            return
        self.server.connections.add(self)
        self._expect("header")

    def connection_lost(self, exc: Exception | None) -> None:
        self.server.connections.discard(self)
        for timer in (self._timer, self._write_timer):
            if timer is not None:
                timer.cancel()
        self._timer = self._write_timer = None
        del self._parser  # it knows this connection: a cycle, which would lie about until somebody looks for garbage
        self._resume()
        self._end_call()
        self._reading = None
        self._waiting.clear()

    def data_received(self, data: bytes) -> None:
        if self._refusal is not None:
            return
        self._moved = False
        self._read_bytes = len(data) + (self._read_bytes if self._in_header else 0)
        messages = self._messages
        try:
            self._feed(data)
        except httptools.HttpParserError:
            self._close_with(self._refusal or BadRequest("The request is not valid HTTP/1.1."))
            return
        # Headers, trailers and chunk extensions are reported only once they are whole, if ever: what has no end must be
        # counted as it comes.
        self._dry_bytes = 0 if self._moved else self._dry_bytes + len(data)
        if self._dry_bytes > self._bounds.header_bytes_max:
            self._close_with(self._header_too_long())
        elif self._in_header:
            self._expect("header")
        elif self._reading is not None:
            self._expect("rest" if self._reading.refusal is not None else "body")
        elif self.running is None and messages == self._messages:
            self._expect("header")  # empty lines, which may come before a request, and nothing else
        if self._waiting and not self._held:
            self._held = True
            self.transport.pause_reading()

    def pause_writing(self) -> None:
        self.paused = True
        if self.running is not None:
            self.running.full = True
        self._must_be_read()

    def resume_writing(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None
        self._resume()
        self._advance()

    # ---- httptools calls these

    def on_message_begin(self) -> None:
        self._messages += 1
        self._in_header = self._moved = True
        self._target = b""
        self._headers = []

    def on_url(self, url: bytes) -> None:
        self._target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_header:  # else it is a trailer, which comes too late to say anything: RFC 9110 §6.5.1
            self._headers.append((name.lower(), value.rstrip()))  # before it the parser has stripped

    def on_headers_complete(self) -> None:
        self._in_header = False
        headers, bounds = self._headers, self._bounds
        fields = dict(headers)
        if len(headers) > bounds.headers_max:
            self._refuse(HeaderTooLarge(f"The request has more than {bounds.headers_max} header fields."))
        if self._read_bytes > bounds.header_bytes_max:  # it may be so only because of what follows the header
            size = len(self._target) + sum([len(name) + len(value) + 4 for name, value in headers])
            if size > bounds.header_bytes_max:
                self._refuse(self._header_too_long())
        version = self._parser.get_http_version()
        if version not in VERSIONS:
            self._refuse(BadRequest(f"This server speaks HTTP/1.1, not HTTP/{version}."))
        host = fields.get(b"host")
        unseen = host != self._host or len(fields) != len(headers)
        if unseen and (host is not None or version == "1.1"):  # health checks of old leave it out
            self._require_host([value for name, value in headers if name == b"host"])
            self._host = host
        if not self._target.startswith(b"/"):
            self._target = self._origin_form()
        if self._parser.should_upgrade():
            if self._parser.get_method() == b"CONNECT":
                self._refuse(BadRequest("This server is no proxy: it takes no CONNECT."))
            return  # see _without_offer
        request = self._reading = Request(
            self,
            method=self._parser.get_method(),
            target=self._target,
            headers=headers,
            fields=fields,
            keep_alive=self._parser.should_keep_alive(),
            chunked=version == "1.1",
        )
        request.body_bytes_max = bounds.body_bytes_max
        try:
            request.handler = self.server.door.enter(request)
            length = request.fields.get(b"content-length")
            if length is not None and int(length) > request.body_bytes_max:
                raise _too_large(request)
        except GatewayError as error:
            self._refuse_one(request, error)
        else:
            if b"expect" in fields and self._may_continue(fields[b"expect"]):
                self.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        self._moved = True
        request = self._reading
        if request is None or request.refusal is not None:
            return
        request.parts.append(body)
        request.size += len(body)
        if request.size > request.body_bytes_max:
            self._refuse_one(request, _too_large(request))

    def on_message_complete(self) -> None:
        self._moved = True
        request, self._reading = self._reading, None
        if request is None:
            return
        self._expected = ""
        if request.refusal is None:
            request.body = request.parts[0] if len(request.parts) == 1 else b"".join(request.parts)
            request.parts.clear()
            self._waiting.append(request)
            self._advance()
        elif request.complete:
            self._expect("idle")

    def _feed(self, data: bytes) -> None:
        rest = memoryview(data)
        while True:
            try:
                self._parser.feed_data(rest)
                return
            except httptools.HttpParserUpgrade as offer:
                head = self._without_offer()
                self._parser = self._new_parser()
                self._parser.feed_data(head)
                rest = rest[offer.args[0] :]

    def _without_offer(self) -> bytes:
        """The last header as if no other protocol had been offered, which is how a server says no (RFC 9110 §7.8): the
        parser stops behind an offer, and would take the body for that protocol's."""
        kept = []
        for name, value in self._headers:
            if name == b"connection":
                value = b", ".join(it for it in value.split(b",") if it.strip().lower() not in OFFERS)
            if name not in OFFERS:
                kept.append(b"%b: %b\r\n" % (name, value))
        method, version = self._parser.get_method(), self._parser.get_http_version().encode()
        return b"%b %b HTTP/%b\r\n%b\r\n" % (method, self._target, version, b"".join(kept))

    def _new_parser(self) -> httptools.HttpRequestParser:
        parser = httptools.HttpRequestParser(self)
        # A request that says `close` must not fail because another was sent right behind it.
        parser.set_dangerous_leniencies(lenient_data_after_close=True)
        return parser

    def _may_continue(self, expected: bytes) -> bool:
        # Nothing goes out between the parts of another answer, or behind the last.
        first = self.running is None and not self._waiting and not self._hung_up
        return first and expected.lower() == b"100-continue" and self._parser.get_http_version() == "1.1"

    def _require_host(self, hosts: list[bytes]) -> None:
        if len(hosts) != 1 or not HOST.fullmatch(hosts[0]):
            problem = "no" if not hosts else "more than one" if len(hosts) > 1 else "a malformed"
            self._refuse(BadRequest(f"The request has {problem} Host header; send exactly one host[:port]."))

    def _origin_form(self) -> bytes:
        """Of a target that names the server too, as to a proxy, which must be taken (RFC 9112 §3.2.2)."""
        try:
            url = httptools.parse_url(self._target)
        except httptools.HttpParserInvalidURLError:
            self._refuse(BadRequest("The request's target is no URL."))
        return b"%b?%b" % (url.path or b"/", url.query or b"")

    def _header_too_long(self) -> HeaderTooLarge:
        return HeaderTooLarge(
            f"The request's header, or its header and trailer, is longer than {self._bounds.header_bytes_max} bytes."
        )

    # ---- one request after the other

    def _advance(self) -> None:
        """Begin the next request, if none is being answered and the client reads its answers."""
        if self._advancing or self._hung_up:
            return
        self._advancing = True  # a refusal is answered at once, and leads back to here
        while self.running is None and self._waiting and not self.paused and not self.transport.is_closing():
            request = self.running = self._waiting.popleft()
            if request.refusal is not None:
                request.refuse(request.refusal)
            else:
                # Taken off the request, which its handler knows: a cycle is garbage that must be looked for.
                handler, request.handler = request.handler, unhandled
                # By itself each would have a name of its own, made from a number.
                self._task = asyncio.Task(handler(request), loop=self._loop, name="request")
                self._task.add_done_callback(self._done)
        self._advancing = False
        if self.running is None and not self._waiting and not self._hung_up:
            if self._held:
                self._held = False
                self.transport.resume_reading()
            if self._reading is None and not self._in_header:
                self._expect("idle")

    def _done(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a request ended in a fault of the gateway", exc_info=error)
        if task is self._task:  # it has ended without an answer, or amid one: nobody must take that for a whole one
            self.transport.abort()

    def _end_call(self) -> None:
        if self._task is not None:
            self._task.cancel()
        self.running = self._task = None

    def _resume(self) -> None:
        self.paused = False
        if self.running is not None:
            self.running.full = False
        for resumed in self._drained:
            if not resumed.done():
                resumed.set_result(None)
        self._drained.clear()

    # ---- waiting for the client

    def _expect(self, what: str) -> None:
        """One timer looks after all that must come in time, and outlives what it was set for: a request that arrives
        in one piece, as nearly all do, sets none."""
        if what == self._expected:
            return
        self._expected = what
        bounds = self._bounds
        wait_s = {"idle": IDLE_S_MAX, "body": bounds.body_s_max}.get(what, bounds.header_s_max)
        self._due_s = self._loop.time() + wait_s
        self._look_by(self._due_s)

    def _look_by(self, when_s: float) -> None:
        if self._timer is not None:
            if self._timer_s <= when_s:
                return
            self._timer.cancel()
        self._timer_s = when_s
        self._timer = self._loop.call_at(when_s, self._look)

    def _look(self) -> None:
        self._timer = None
        what = self._expected
        if not what or self._refusal is not None:
            return
        if self._loop.time() < self._due_s:
            self._look_by(self._due_s)
        elif what == "idle":
            self.transport.close()
            self._must_be_read()
        elif self.running is not None or self._held:
            # What comes behind it may take as long as the answer under way; all the more as nothing more is read while
            # a whole request waits already.
            self._due_s += self._bounds.header_s_max
            self._look_by(self._due_s)
        elif what == "rest":
            self.transport.abort()
        elif what == "body":
            assert self._reading is not None
            late = RequestTimeout(f"The request's body did not arrive within {self._bounds.body_s_max:g} s.")
            self._refuse_one(self._reading, late)
            self._expect("rest")
        else:
            self._close_with(
                RequestTimeout(f"The request's header did not arrive within {self._bounds.header_s_max:g} s.")
            )

    def _must_be_read(self) -> None:
        """A client that stops reading holds a connection, and maybe an engine's place; only for so long."""
        if self._write_timer is None:
            self._write_timer = self._loop.call_later(self._bounds.write_s_max, self._give_up)

    def _give_up(self) -> None:
        """With a reset, or the kernel would go on offering what it holds to somebody who does not read."""
        self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        self.transport.abort()

    # ---- refusing

    def _refuse_one(self, request: Request, error: GatewayError) -> None:
        """Answer this request so, in its turn; the connection goes on."""
        request.refusal = error
        request.parts.clear()
        self._waiting.append(request)
        self._advance()

    def _refuse(self, error: GatewayError) -> NoReturn:
        """Stop the parser; `data_received` closes the connection with the error."""
        self._refusal = error
        raise ValueError(error.message)

    def _close_with(self, error: GatewayError) -> None:
        """Say so, and close: from here on nobody knows where a request begins. What came before it is answered first,
        or its client would take this for the answer."""
        if self._hung_up:
            return
        self._refusal = error
        self._reading = None
        # As much as is known of its path, which says in whose shape it is told.
        request = Request(self, method=b"", target=self._target, headers=[], fields={}, keep_alive=False, chunked=False)
        if self.running is None and not self._waiting:
            request.refuse(error)
        else:
            self._refuse_one(request, error)

    def _hang_up(self) -> None:
        """Close once all is written. With the client still sending, closing now would reset the connection before
        the answer is read."""
        self._hung_up = True
        self._refusal = self._refusal or BadRequest("This connection is being closed.")
        self._must_be_read()
        self.transport.write_eof()
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(LINGER_S, self._linger)

    def _linger(self) -> None:
        if self.transport.get_write_buffer_size():
            self._timer = self._loop.call_later(LINGER_S, self._linger)
        else:
            self.transport.abort()


def _too_large(request: Request) -> TooLarge:
    return TooLarge(f"The request's body is larger than {request.body_bytes_max} bytes.")
