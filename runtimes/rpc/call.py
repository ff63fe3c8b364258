"""One call over gRPC, seen from the client: one message out, one in."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from types import MappingProxyType

from runtimes.http2.connection import Connection
from runtimes.http2.fields import Fields
from runtimes.http2.frames import Code
from runtimes.http2.stream import Stream
from runtimes.rpc.messages import Body, Messages, TooLong
from runtimes.rpc.status import OF_HTTP, Status, is_grpc, said

#: What a reset means, by gRPC's own table; any other is UNAVAILABLE.
OF_RESET: Mapping[int, Status] = MappingProxyType(
    {Code.CANCEL: Status.CANCELLED, Code.ENHANCE_YOUR_CALM: Status.RESOURCE_EXHAUSTED}
)


CODES: Mapping[bytes, Status] = MappingProxyType({b"%d" % status: status for status in Status})


class RpcError(Exception):
    """A call ended in another status than OK."""

    def __init__(self, status: Status, said: str, *, unseen: bool = False, broken: bool = False) -> None:
        super().__init__(f"{status.name}: {said}")
        self.status = status
        self.said = said
        """In the server's words, or in ours if it had none."""
        self.unseen = unseen
        """The server has not begun with it, so it may be sent again, RFC 9113 §8.7."""
        self.broken = broken
        """It was under way when its connection broke, or the server reset it."""


class Call(Stream):
    """`answer` is done with the message, or with an RpcError. Whoever stops waiting for it leaves the call."""

    __slots__ = ("_bytes_max", "_message", "_messages", "answer")

    def __init__(self, connection: Connection, id: int, *, bytes_max: int, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(connection, id)
        self.answer: asyncio.Future[Body] = loop.create_future()
        self._messages = Messages(bytes_max=bytes_max)
        self._bytes_max = bytes_max
        self._message: Body | None = None

    def leave(self) -> None:
        """Tell the server, if it does not know the end already."""
        if not self.ended_there:
            self.reset(Code.CANCEL)
            self.connection.out.flush()

    def take_fields(self, fields: Fields, *, ended: bool) -> None:
        status = fields.pseudo.get(b":status")
        if status is not None and not (status == b"200" and is_grpc(fields.regular.get(b"content-type", b""))):
            self._fail(OF_HTTP.get(status, Status.UNKNOWN), f"it answered with HTTP status {status.decode('latin-1')}")
            self.leave()
        elif ended:
            self._end(fields)

    def take_data(self, data: bytes, *, ended: bool) -> bool:
        try:
            for compressed, body in self._messages.feed(data):
                if compressed or self._message is not None:
                    self._fail(Status.INTERNAL, "it sent a second message, or a compressed one, which nobody asked for")
                self._message = body
        except TooLong:
            self._fail(Status.RESOURCE_EXHAUSTED, f"its answer is larger than {self._bytes_max} bytes")
        if ended:
            self._fail(Status.INTERNAL, "its answer has no trailers")
        if self.answer.done():
            self.leave()
            return False
        return True

    def cut(self, code: int, why: str) -> None:
        if not self.answer.done():
            status = OF_RESET.get(code, Status.UNAVAILABLE)
            error = RpcError(status, why, unseen=code == Code.REFUSED_STREAM, broken=True)
            self.answer.set_exception(error)

    def _end(self, fields: Fields) -> None:
        code = fields.regular.get(b"grpc-status", b"")
        status = CODES.get(code, Status.UNKNOWN)
        if status is not Status.OK:
            self._fail(status, said(fields.regular.get(b"grpc-message", b"")))
        elif self._message is None or self._messages.torn:
            self._fail(Status.INTERNAL, "its answer has no message")
        elif not self.answer.done():
            self.answer.set_result(self._message)

    def _fail(self, status: Status, why: str) -> None:
        if not self.answer.done():
            self.answer.set_exception(RpcError(status, why))
