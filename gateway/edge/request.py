"""One request as a door sees it, and the ways to answer it; and what the doors of all listeners have in common."""

from __future__ import annotations

import math
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, Protocol

from gateway.errors import GatewayError, MethodNotAllowed

if TYPE_CHECKING:
    from gateway.edge.connection import Connection


class Request:
    """A request's header, then its body, then its answer: once, in one piece (`respond`) or bit by bit (`begin`,
    `write`, `end`).

    Nothing here waits but `drained`; whoever writes much asks `full` in between. Writing to a client that has left
    does nothing: its call is being cancelled.
    """

    __slots__ = (
        "_chunked",
        "_connection",
        "begun",
        "body",
        "body_bytes_max",
        "complete",
        "fields",
        "full",
        "handler",
        "headers",
        "id",
        "keep_alive",
        "method",
        "parts",
        "path",
        "query",
        "refusal",
        "size",
    )

    def __init__(
        self,
        connection: Connection,
        *,
        method: bytes,
        target: bytes,
        headers: list[tuple[bytes, bytes]],
        fields: dict[bytes, bytes],
        keep_alive: bool,
        chunked: bool,
    ) -> None:
        self._connection = connection
        self._chunked = chunked
        self.method = method
        self.path, _, self.query = target.partition(b"?")
        self.headers = headers
        """Names in lower case, in the order they came."""
        self.fields = fields
        """The same by name; of one given twice, the last."""
        self.keep_alive = keep_alive
        self.id = ""
        """The call's id, once a door has given it one; it is on every answer."""
        self.body = b""
        """All of it, before the handler is called."""
        self.body_bytes_max = 0
        """Longest body, which its door may lower before any of it is read."""
        self.handler: Handler = unhandled
        self.refusal: GatewayError | None = None
        """It is answered with this, and what is left of its body is thrown away."""
        self.parts: list[bytes] = []
        self.size = 0
        self.full = False
        """The client reads more slowly than it is written to: `drained` tells when to go on."""
        self.begun = False
        """Some of the answer is out."""
        self.complete = False
        """All of it is."""

    async def drained(self) -> None:
        await self._connection.drained()

    def respond(self, status: int, lines: bytes, body: bytes) -> None:
        """The whole answer; `lines` are header fields, each with its line end."""
        lines = b"%bcontent-length: %d\r\n" % (lines, len(body))
        self._start(status, lines, b"" if self.method == b"HEAD" else body)
        self._finish()

    def begin(self, status: int, lines: bytes, first: bytes) -> None:
        """The head of an answer whose length nobody knows yet, and the first of its body. To a client of HTTP/1.0 its
        end is the connection's (RFC 9112 §6.3)."""
        if self._chunked:
            self._start(status, lines + b"transfer-encoding: chunked\r\n", _chunk(first))
        else:
            self.keep_alive = False
            self._start(status, lines, first)

    def write(self, part: bytes) -> None:
        # What a stream does most: without the call that _chunk would be.
        self._connection.write(b"%x\r\n%b\r\n" % (len(part), part) if self._chunked else part)

    def end(self, part: bytes) -> None:
        """The last of the body."""
        self._connection.write(_chunk(part) + b"0\r\n\r\n" if self._chunked else part)
        self._finish()

    def break_off(self) -> None:
        """End amid the answer, so that nobody takes it for a whole one."""
        self._connection.abort()

    def refuse(self, error: GatewayError) -> None:
        """The whole answer, in the shape of the protocol that is spoken under its path."""
        lines = [b"content-type: application/json\r\n"]
        lines += [b"%b: %b\r\n" % (name.encode(), value.encode()) for name, value in error_headers(error).items()]
        if self.id:
            lines.append(b"x-request-id: %b\r\n" % self.id.encode())
        body = error.plain_body() if speaks_v2(self.path) else error.body()
        self.respond(error.status, b"".join(lines), body)

    def _start(self, status: int, lines: bytes, body: bytes) -> None:
        self.begun = True
        server = self._connection.server
        if server.leaving:
            self.keep_alive = False
        close = b"" if self.keep_alive else b"connection: close\r\n"
        self._connection.write(b"%b%b%b\r\n%b" % (server.head(status), lines, close, body))

    def _finish(self) -> None:
        self.complete = True
        self._connection.finished(self)


def speaks_v2(path: bytes) -> bool:
    """Whether what lies under a path is the Open Inference Protocol's."""
    return path[:4] == b"/v2/" or path == b"/v2"


def _chunk(part: bytes) -> bytes:
    """RFC 9112 §7.1; nothing is no chunk, for one without length would end the body."""
    return b"%x\r\n%b\r\n" % (len(part), part) if part else b""


#: Answers a request whose body is here. It is cancelled the moment the client has gone.
Handler = Callable[[Request], Coroutine[Any, Any, None]]


#: Longest body where no key is asked for, which no such path has a use for.
KEYLESS_BODY_BYTES_MAX = 4_096


class Door(Protocol):
    """What a listener leads to."""

    def enter(self, request: Request) -> Handler:
        """Called with the header alone, before any of the body is read. Raises GatewayError to refuse it."""


async def unhandled(request: Request) -> None:
    raise AssertionError("a request was started before a door had seen it")


#: For an error that may be retried and knows no time of its own, so that the SDKs' half second never applies.
RETRY_AFTER_S = 1.0


def error_headers(error: GatewayError) -> dict[str, str]:
    """When to come back and whether to; the SDKs obey both."""
    headers = {"x-should-retry": "true" if error.retryable else "false"}
    after_s = RETRY_AFTER_S if error.retry_after_s is None and error.retryable else error.retry_after_s
    if after_s is not None:
        # Rounded up: a client that comes back exactly then must not be early.
        headers["retry-after"] = str(math.ceil(after_s))
        headers["retry-after-ms"] = str(math.ceil(after_s * 1000))
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    if isinstance(error, MethodNotAllowed):
        headers["allow"] = error.allow
    return headers
