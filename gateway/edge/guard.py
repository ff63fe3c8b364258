"""Limits before parsing: what must not be read is refused here, in OpenAI's shape, and the connection closed.

uvicorn with httptools frames HTTP strictly (a length and chunks together are a 400), but sets no limit on header
bytes, header count, or the time a client takes, and lets Host be anything. This protocol adds those, and ends a
call's task the moment its client has gone, which is what frees the engine.

Host follows RFC 9112 §3.2: exactly one, and a well-formed `host[:port]`.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from itertools import accumulate
from typing import Any, NoReturn

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from gateway.call import Bounds
from gateway.errors import (
    BadRequest,
    GatewayError,
    HeaderTooLarge,
    RequestTimeout,
    TooLarge,
    TooManyConnections,
)

Receive = Callable[[], Awaitable[Any]]


class GuardedProtocol(HttpToolsProtocol):
    """One client's connection, under `bounds`."""

    def __init__(self, *args: Any, bounds: Bounds, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.bounds = bounds
        self.in_header = False
        self.header_bytes = 0
        self.unended_bytes = 0
        self.refusal: GatewayError | None = None
        self.read_timer: asyncio.TimerHandle | None = None
        self.write_timer: asyncio.TimerHandle | None = None
        self.task: asyncio.Task[None] | None = None
        self.running: RequestResponseCycle | None = None
        """The request that `task` answers; `cycle` may already be one that waits behind it."""

    # -- the connection's life

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.bounds.connections_max:
            self.connections.discard(self)
            self._close_with(
                TooManyConnections(f"This gateway already has {self.bounds.connections_max} connections open.")
            )
        else:
            self._expect()

    def connection_lost(self, exc: Exception | None) -> None:
        self._expect_nothing()
        self.resume_writing()
        self._end_call()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.refusal is not None:
            return
        # A field is reported only once it is whole: what has no end must be counted as it comes. Whatever the parser
        # reports begins the count anew.
        self.unended_bytes += len(data)
        super().data_received(data)
        if self.unended_bytes > self.bounds.header_bytes_max and self.refusal is None:
            self._close_with(self._header_too_long())
        # What arrives in one piece, as nearly all requests do, never costs a timer.
        if self.refusal is None and (self.in_header or self.cycle is None or self.cycle.response_complete):
            self._expect()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._expect_to_be_read()

    def resume_writing(self) -> None:
        if self.write_timer is not None:
            self.write_timer.cancel()
            self.write_timer = None
        super().resume_writing()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self._expect_to_be_read()
        elif self.cycle.response_complete and self.cycle.more_body:
            self._expect()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._expect_to_be_read()

    # -- one request, as httptools reads it

    def on_message_begin(self) -> None:
        self.in_header = True
        self.header_bytes = self.unended_bytes = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self.unended_bytes = 0
        self._count_header(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self.unended_bytes = 0
        self._count_header(len(name) + len(value) + len(b": \r\n"))
        if not self.in_header:
            return  # a trailer, which comes too late to say anything: RFC 9110 §6.5.1 lets it be dropped
        if len(self.headers) >= self.bounds.headers_max:
            self._refuse(HeaderTooLarge(f"The request has more than {self.bounds.headers_max} header fields."))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self.in_header = False
        self._expect_nothing()
        hosts = [value for name, value in self.headers if name == b"host"]
        if len(hosts) != 1 or not HOST.fullmatch(hosts[0]):
            problem = "no" if not hosts else "more than one" if len(hosts) > 1 else "a malformed"
            self._refuse(BadRequest(f"The request has {problem} Host header; send exactly one host[:port]."))
        if self.parser.should_upgrade():
            # The parser stops at such a header, and the body behind it would be lost without a word.
            self._refuse(BadRequest("This server speaks HTTP/1.1 and upgrades to nothing; leave Upgrade out."))
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self.unended_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self.unended_bytes = 0
        self._expect_nothing()
        if self.cycle.response_complete:
            self.cycle.more_body = False
        super().on_message_complete()

    def _count_header(self, size: int) -> None:
        self.header_bytes += size
        if self.header_bytes > self.bounds.header_bytes_max:
            self._refuse(self._header_too_long())

    def _header_too_long(self) -> HeaderTooLarge:
        return HeaderTooLarge(
            f"The request's header, or its header and trailer, is longer than {self.bounds.header_bytes_max} bytes."
        )

    # -- waiting for the client

    def _expect(self) -> None:
        """A header, or the rest of a body that has been answered already, must arrive in time."""
        if self.read_timer is None:
            self.read_timer = self.loop.call_later(self.bounds.header_s_max, self._late)

    def _expect_nothing(self) -> None:
        if self.read_timer is not None:
            self.read_timer.cancel()
            self.read_timer = None

    def _late(self) -> None:
        self.read_timer = None
        if self.running is not None and not self.running.response_complete:
            self._expect()  # the next request's header may take as long as this one's answer
        elif self.cycle is not None and self.cycle.more_body and not self.in_header:
            self.transport.abort()
        else:
            self._close_with(
                RequestTimeout(f"The request's header did not arrive within {self.bounds.header_s_max:g} s.")
            )

    def _expect_to_be_read(self) -> None:
        """A client that stops reading holds a connection, and maybe an engine's place; only for so long."""
        if self.write_timer is None:
            self.write_timer = self.loop.call_later(self.bounds.write_s_max, self.transport.abort)

    # -- refusing

    def _refuse(self, refusal: GatewayError) -> NoReturn:
        """Stop the parser; it reports the error through `send_400_response`."""
        self.refusal = refusal
        raise ValueError(refusal.message)

    def send_400_response(self, msg: str) -> None:
        self._close_with(self.refusal or BadRequest("The request is not valid HTTP/1.1."))

    def _close_with(self, refusal: GatewayError) -> None:
        self.refusal = refusal
        self._expect_nothing()
        answering = self.running is not None and self.running.response_started and not self.running.response_complete
        self._end_call()
        if answering:
            self.transport.abort()  # another answer is half out: nothing said now would be understood
            return
        body = refusal.body()
        head = (
            f"HTTP/1.1 {refusal.status} {REASONS[refusal.status]}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nx-should-retry: {str(refusal.retryable).lower()}\r\n"
            "connection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        # Closing now, with the client still sending, would reset the connection before the answer is read.
        self.transport.write_eof()
        self.read_timer = self.loop.call_later(LINGER_S, self.transport.abort)

    def _end_call(self) -> None:
        if self.task is not None and self.running is not None and not self.running.response_complete:
            self.running.disconnected = True
            self.task.cancel()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        # As uvicorn does it, keeping the task so that it can be ended when the client leaves.
        self.running = cycle
        self.task = self.loop.create_task(cycle.run_asgi(app))
        self.task.add_done_callback(self.tasks.discard)
        self.tasks.add(self.task)


HOST = re.compile(rb"(?:\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._~-]+)(?::[0-9]{1,5})?")
#: How long a refused client may take to read why.
LINGER_S = 2.0
REASONS = {
    400: "Bad Request",
    408: "Request Timeout",
    431: "Request Header Fields Too Large",
    503: "Service Unavailable",
}


async def read_body(receive: Receive, length: bytes | None, bounds: Bounds) -> bytes:
    """The request's whole body.

    Raises TooLarge as soon as that is known, RequestTimeout, or asyncio.CancelledError if the client left before its
    end. What a refused client goes on sending is thrown away by GuardedProtocol, so that it can read the refusal.
    """
    if length is not None and int(length) > bounds.body_bytes_max:
        raise _too_large(bounds)
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(bounds.body_s_max):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise asyncio.CancelledError
                parts.append(message["body"])
                size += len(parts[-1])
                if size > bounds.body_bytes_max:
                    raise _too_large(bounds)
                if not message["more_body"]:
                    break
    except TimeoutError:
        raise RequestTimeout(f"The request's body did not arrive within {bounds.body_s_max:g} s.") from None
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _too_large(bounds: Bounds) -> TooLarge:
    return TooLarge(f"The request's body is larger than {bounds.body_bytes_max} bytes.")


async def require_depth(body: bytes, depth_max: int) -> None:
    """Raises BadRequest if `body`, which must be well-formed JSON, nests deeper than `depth_max`.

    Most bodies have too few brackets for that. A large one with many is looked at piece by piece, so that none holds
    up the other calls for more than a few milliseconds.
    """
    if body.count(b"[") + body.count(b"{") <= depth_max:
        return
    start = depth = in_string = 0
    while start < len(body):
        piece = body[start : start + PIECE_BYTES]
        if (len(piece) - len(piece.rstrip(b"\\"))) % 2:  # never between a backslash and what it escapes
            piece = body[start : start + PIECE_BYTES + 1]
        start += len(piece)
        texts = piece.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')
        brackets = b"".join(texts[in_string::2]).translate(STEPS, NOT_BRACKETS)
        in_string = (in_string + len(texts) - 1) % 2
        depths = list(accumulate(memoryview(brackets).cast("b"), initial=depth))
        if max(depths) > depth_max:
            raise BadRequest(f"The request's JSON nests deeper than {depth_max} levels.")
        depth = depths[-1]
        if start < len(body):
            await asyncio.sleep(0)


PIECE_BYTES = 64 * 1024
NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
#: One level down is +1, one level up is -1, as signed bytes.
STEPS = bytes.maketrans(b"[{]}", b"\x01\x01\xff\xff")
