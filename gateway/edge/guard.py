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
        self.header_bytes = 0
        self.refusal: GatewayError | None = None
        self.header_timer: asyncio.TimerHandle | None = None
        self.write_timer: asyncio.TimerHandle | None = None
        self.task: asyncio.Task[None] | None = None

    # -- the connection's life

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.bounds.connections_max:
            self._close_with(
                TooManyConnections(f"This gateway already has {self.bounds.connections_max} connections open.")
            )
        else:
            self._expect_header()

    def connection_lost(self, exc: Exception | None) -> None:
        self._header_seen()
        self.resume_writing()
        if self.task is not None and not self.cycle.response_complete:
            self.task.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.refusal is None:
            super().data_received(data)

    def pause_writing(self) -> None:
        super().pause_writing()
        # A client that stops reading holds an engine's place; it may do so only for so long.
        self.write_timer = self.loop.call_later(self.bounds.write_s_max, self.transport.abort)

    def resume_writing(self) -> None:
        if self.write_timer is not None:
            self.write_timer.cancel()
            self.write_timer = None
        super().resume_writing()

    # -- one request's header, as httptools reads it

    def on_message_begin(self) -> None:
        self.header_bytes = 0
        self._expect_header()
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._count_header(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count_header(len(name) + len(value) + len(b": \r\n"))
        if len(self.headers) >= self.bounds.headers_max:
            self._refuse(HeaderTooLarge(f"The request has more than {self.bounds.headers_max} header fields."))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._header_seen()
        hosts = [value for name, value in self.headers if name == b"host"]
        if len(hosts) != 1 or not HOST.fullmatch(hosts[0]):
            problem = "no" if not hosts else "more than one" if len(hosts) > 1 else "a malformed"
            self._refuse(BadRequest(f"The request has {problem} Host header; send exactly one host[:port]."))
        super().on_headers_complete()

    def _count_header(self, size: int) -> None:
        self.header_bytes += size
        if self.header_bytes > self.bounds.header_bytes_max:
            self._refuse(HeaderTooLarge(f"The request's header is longer than {self.bounds.header_bytes_max} bytes."))

    def _expect_header(self) -> None:
        if self.header_timer is None:
            self.header_timer = self.loop.call_later(
                self.bounds.header_s_max,
                self._close_with,
                RequestTimeout(f"The request's header did not arrive within {self.bounds.header_s_max:g} s."),
            )

    def _header_seen(self) -> None:
        if self.header_timer is not None:
            self.header_timer.cancel()
            self.header_timer = None

    # -- refusing

    def _refuse(self, refusal: GatewayError) -> NoReturn:
        """Stop the parser; it reports the error through `send_400_response`."""
        self.refusal = refusal
        raise ValueError(refusal.message)

    def send_400_response(self, msg: str) -> None:
        self._close_with(self.refusal or BadRequest("The request is not valid HTTP/1.1."))

    def _close_with(self, refusal: GatewayError) -> None:
        self.refusal = refusal
        self._header_seen()
        body = refusal.body()
        head = (
            f"HTTP/1.1 {refusal.status} {REASONS[refusal.status]}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nx-should-retry: {str(refusal.retryable).lower()}\r\n"
            "connection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        # As uvicorn does it, keeping the task so that it can be ended when the client leaves.
        self.task = self.loop.create_task(cycle.run_asgi(app))
        self.task.add_done_callback(self.tasks.discard)
        self.tasks.add(self.task)


HOST = re.compile(rb"(?:\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._~-]+)(?::[0-9]{1,5})?")
REASONS = {
    400: "Bad Request",
    408: "Request Timeout",
    431: "Request Header Fields Too Large",
    503: "Service Unavailable",
}


async def read_body(receive: Receive, length: bytes | None, bounds: Bounds) -> bytes:
    """The request's whole body.

    Raises TooLarge, RequestTimeout, or asyncio.CancelledError if the client left before its end. A body that is
    too large is read to its end, or to DISCARDED_BYTES_MAX, and thrown away: closing a socket with bytes unread
    resets it, and the client would never see why it was refused.
    """
    too_large = length is not None and (not length.isdigit() or int(length) > bounds.body_bytes_max)
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(bounds.body_s_max):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise asyncio.CancelledError
                part = message.get("body", b"")
                size += len(part)
                too_large = too_large or size > bounds.body_bytes_max
                if too_large:
                    parts.clear()
                else:
                    parts.append(part)
                if not message.get("more_body", False) or size > DISCARDED_BYTES_MAX:
                    break
    except TimeoutError:
        raise RequestTimeout(f"The request's body did not arrive within {bounds.body_s_max:g} s.") from None
    if too_large:
        raise TooLarge(f"The request's body is larger than {bounds.body_bytes_max} bytes.")
    return parts[0] if len(parts) == 1 else b"".join(parts)


DISCARDED_BYTES_MAX = 64 * 1024 * 1024


def require_depth(body: bytes, depth_max: int) -> None:
    """Raises BadRequest if the JSON nests deeper than `depth_max`.

    Innermost pairs are taken away layer by layer, each pass at the speed of a memory scan; most bodies have too
    few brackets to need one. JSON that is not well-formed is left for the decoder to name.
    """
    if body.count(b"[") + body.count(b"{") <= depth_max:
        return
    brackets = STRING.sub(b"", body).translate(None, NOT_BRACKETS)
    for _ in range(depth_max):
        inner = brackets.replace(b"[]", b"").replace(b"{}", b"")
        if len(inner) == len(brackets):
            break
        brackets = inner
    else:
        if brackets:
            raise BadRequest(f"The request's JSON nests deeper than {depth_max} levels.")


STRING = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)
NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
