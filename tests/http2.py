"""One side of HTTP/2 in memory, and what it says, for tests that speak to it in frames."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from runtimes.http2.connection import Connection
from runtimes.http2.fields import Fields, encoded
from runtimes.http2.frames import (
    DATA,
    END_HEADERS,
    END_STREAM,
    HEAD,
    HEADERS,
    PREFACE,
    SETTINGS,
    WINDOW_UPDATE,
    frame,
    settings,
)
from runtimes.http2.stream import Stream

REQUEST = ((":method", "POST"), (":scheme", "http"), (":path", "/s/m"), (":authority", "h"))
RESPONSE = ((":status", "200"), ("content-type", "application/grpc"))
GREETING = PREFACE + settings({})


class Said(NamedTuple):
    kind: int
    flags: int
    stream: int
    payload: bytes


def frames(data: bytes) -> list[Said]:
    """What was written, without a client's preface."""
    data, found = data.removeprefix(PREFACE), []
    while data:
        high, low, kind, flags, stream = HEAD.unpack_from(data)
        end = HEAD.size + (high << 8 | low)
        found.append(Said(kind, flags, stream, data[HEAD.size : end]))
        data = data[end:]
    return found


def header(stream: int, fields: Iterable[tuple[str, str]] = REQUEST, *, flags: int = END_HEADERS) -> bytes:
    return frame(HEADERS, flags, stream, encoded([(name.encode(), value.encode()) for name, value in fields]))


class Heard(Stream):
    """Takes what comes; more data only if it is `hungry`."""

    def __init__(self, connection: Connection, id: int, *, hungry: bool = True) -> None:
        super().__init__(connection, id)
        self.hungry = hungry
        self.fields: list[Fields] = []
        self.data = b""
        self.ended = False
        self.broken: tuple[int, str] | None = None
        self.times_sent = 0

    def take_fields(self, fields: Fields, *, ended: bool) -> None:
        assert not self.ended
        self.fields.append(fields)
        self.ended = ended

    def take_data(self, data: bytes, *, ended: bool) -> bool:
        assert not self.ended
        self.data += data
        self.ended = ended
        return self.hungry

    def cut(self, code: int, why: str) -> None:
        assert self.broken is None
        self.broken = (code, why)

    def sent(self) -> None:
        self.times_sent += 1


class Side:
    """A server, or a client with stream 1 already asked for."""

    def __init__(self, *, client: bool = False, streams_max: int = 10, hungry: bool = True) -> None:
        self.now_s = 0.0
        self.heard: dict[int, Heard] = {}
        self._written = bytearray()
        self.hungry = hungry
        self.connection = Connection(
            opened=None if client else self._opened,
            write=self._written.extend,
            now_s=lambda: self.now_s,
            streams_max=streams_max,
            header_bytes_max=4096,
        )
        self.connection.begin()
        if client:
            self.hear(settings({}))
            stream = self._opened(self.connection, self.connection.next_stream)
            self.connection.add(stream)
            stream.send_fields(b"")
            stream.send_data(b"", end=True)
            self.connection.out.flush()
        else:
            self.hear(GREETING)
        self.said()

    def _opened(self, connection: Connection, id: int) -> Heard:
        self.heard[id] = Heard(connection, id, hungry=self.hungry)
        return self.heard[id]

    def hear(self, *parts: bytes) -> list[Said]:
        """What it says to that."""
        for part in parts:
            self.connection.receive(part)
        return self.said()

    def said(self) -> list[Said]:
        data = bytes(self._written)
        self._written.clear()
        return frames(data)


def answers(found: Iterable[Said]) -> list[Said]:
    """Without what only keeps the connection going."""
    return [it for it in found if it.kind not in (WINDOW_UPDATE, SETTINGS)]


def data(stream: int, payload: bytes = b"", *, end: bool = False) -> bytes:
    return frame(DATA, END_STREAM if end else 0, stream, payload)
