"""One client's connection: HTTP/1.1, one request at a time.

Nearly every request is a whole POST in one read, with nothing unusual about its header. Those are looked at directly
(`glance`), which costs two microseconds; all others are parsed.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from typing import TYPE_CHECKING

import httptools

from loadtests.emulator.answer import Answer
from loadtests.emulator.dialect import error, response
from loadtests.emulator.log import Ended
from loadtests.emulator.request import Refused

if TYPE_CHECKING:
    from loadtests.emulator.server import Emulator

BODY_BYTES_MAX = 16 * 1024 * 1024
LINGER_NOT = struct.pack("ii", 1, 0)
"""SO_LINGER with no time to linger: closing sends RST and forgets what is unsent."""


class Connection(asyncio.Protocol):
    """Closed by the client, by a fault, or with the emulator."""

    def __init__(self, emulator: Emulator) -> None:
        self.emulator = emulator
        self.paused = False
        """Not all of what was written has been taken by the kernel."""
        self._transport: asyncio.Transport
        self._parser = httptools.HttpRequestParser(self)
        self._answer: Answer | None = None
        self._amid = False
        """Of a request, half of which is here."""
        self._keep = True
        self._path = b""
        self._id = b""
        self._body = bytearray()

    def write(self, data: bytes) -> None:
        self._transport.write(data)

    def close(self) -> None:
        """Once all that was written is sent."""
        self._transport.close()

    def abort(self) -> None:
        """At once, whatever is under way."""
        self._transport.abort()

    def reset(self) -> None:
        """At once; the peer sees a reset, on TCP."""
        sock: socket.socket = self._transport.get_extra_info("socket")
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_NOT)
        self._transport.abort()

    def free(self) -> None:
        """The answer is over; ready for the next request, if the client meant to send one."""
        self._answer = None
        if not self._keep:
            self._transport.close()

    # ---- as asyncio calls it

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport
        # So that being paused says exactly that something is unsent.
        transport.set_write_buffer_limits(high=0)
        self.emulator.connections.add(self)

    def data_received(self, data: bytes) -> None:
        if self._answer is None and not self._amid:
            seen = glance(data)
            if seen is not None:
                self._ask(*seen)
                return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self._transport.abort()

    def pause_writing(self) -> None:
        self.paused = True

    def resume_writing(self) -> None:
        self.paused = False
        if self._answer is not None:
            self._answer.go_on()

    def connection_lost(self, exc: Exception | None) -> None:
        self.emulator.connections.discard(self)
        if self._answer is not None:
            self._answer.left = True
            self._answer.end(Ended.aborted)

    # ---- as httptools calls it

    def on_message_begin(self) -> None:
        self._amid = True
        self._path = self._id = b""
        self._body.clear()

    def on_url(self, url: bytes) -> None:
        self._path += url

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        if name == b"x-request-id":
            self._id = value
        elif name == b"expect":
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        self._body += body
        if len(self._body) > BODY_BYTES_MAX:
            self._transport.abort()

    def on_message_complete(self) -> None:
        self._amid = False
        if self._answer is not None:
            self._transport.abort()  # asked while an answer is under way
            return
        self._keep = self._parser.should_keep_alive()
        self._ask(self._path, self._id, bytes(self._body))

    def _ask(self, path: bytes, id: bytes, body: bytes) -> None:
        if len(id) > ID_BYTES_MAX or id.translate(None, ID_BYTES):
            id = b""
        try:
            answer = self.emulator.take(self, path.partition(b"?")[0], id, body)
        except Refused as refused:
            answer = None
            self._transport.write(response(error(str(refused)), "400 Bad Request"))
        if answer is None:
            self.free()
        elif not answer.over:
            self._answer = answer


ID_BYTES = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.:"
ID_BYTES_MAX = 128
LENGTHS = frozenset({b"\ncontent-l", b"\nContent-L"})


def glance(data: bytes) -> tuple[bytes, bytes, bytes] | None:
    """Path, id and body of a request that is a whole POST, nothing unusual about it. None says nothing: parse it."""
    if not data.startswith(b"POST /v1/"):
        return None
    end = data.find(b"\r\n\r\n")
    length = data.find(b"ength: ", 0, end)
    if end < 0 or data[length - 10 : length] not in LENGTHS or data.find(b"onnection:", 0, end) >= 0:
        return None
    try:
        if int(data[length + 7 : data.index(b"\r", length)]) != len(data) - end - 4:
            return None
    except ValueError:
        return None
    id = data.find(b"\nx-request-id: ", 0, end)
    if id >= 0:
        return data[5 : data.index(b" ", 5)], data[id + 15 : data.index(b"\r", id)], data[end + 4 :]
    if data.find(b"-Request-", 0, end) >= 0:
        return None
    return data[5 : data.index(b" ", 5)], b"", data[end + 4 :]
