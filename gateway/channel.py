"""What a leader and a worker say to each other: MessagePack behind its length, on a pair of sockets that nobody else
can reach."""

from __future__ import annotations

import asyncio
import socket
from typing import TypeVar

import msgspec

from gateway.config import Config
from gateway.report import Report
from gateway.shared import Files

T = TypeVar("T")


class Start(msgspec.Struct, frozen=True):
    """To the worker, first and once: all it needs. Descriptors are as it inherits them."""

    worker: int
    config: Config
    listener: int
    shared: Files


class Ask(msgspec.Struct, frozen=True):
    """To the worker: say how it is now. It answers with a Report."""


class Up(msgspec.Struct, frozen=True, tag=True):
    """From the worker, once: every model can answer."""


class Told(msgspec.Struct, frozen=True, tag=True):
    """From the worker, when asked. None if it is at fault itself."""

    report: Report | None


class Channel:
    """One end. Whoever reads EOF knows that the other process is gone."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, end: socket.socket) -> Channel:
        return cls(*await asyncio.open_unix_connection(sock=end))

    def put(self, what: msgspec.Struct) -> None:
        """Say it, without waiting until the other takes it, which may hang. Raises ConnectionError once that has
        gone."""
        if self._writer.is_closing():  # uvloop has another error for it
            raise ConnectionResetError
        said = msgspec.msgpack.encode(what)
        self._writer.write(len(said).to_bytes(LENGTH_BYTES) + said)

    async def say(self, what: msgspec.Struct) -> None:
        """Say it. Raises ConnectionError once the other has gone."""
        self.put(what)
        await self._writer.drain()

    async def hear(self, what: msgspec.msgpack.Decoder[T]) -> T:
        """Raises EOFError once the other has gone."""
        try:
            size = int.from_bytes(await self._reader.readexactly(LENGTH_BYTES))
            said = await self._reader.readexactly(size)
        except (asyncio.IncompleteReadError, ConnectionError):
            raise EOFError from None
        return what.decode(said)

    def close(self) -> None:
        self._writer.close()


#: Of the length.
LENGTH_BYTES = 4

START, ASK = msgspec.msgpack.Decoder(Start), msgspec.msgpack.Decoder(Ask)
SAID: msgspec.msgpack.Decoder[Up | Told] = msgspec.msgpack.Decoder(Up | Told)
