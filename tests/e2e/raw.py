"""A client that speaks HTTP by hand: it can be wrong, slow or gone at any byte, and sees every byte it got."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from types import TracebackType
from typing import Any, Self

ANSWER_S_MAX = 60.0


class Answer:
    """A whole response."""

    def __init__(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        self.status = status
        self.headers = headers
        self.body = body

    @property
    def error(self) -> Any:
        return json.loads(self.body)["error"]


class Connection:
    """One connection to `host`, used call by call."""

    def __init__(self, host: tuple[str, int]) -> None:
        self._host = host

    async def __aenter__(self) -> Self:
        self._reader, self._writer = await asyncio.open_connection(*self._host, limit=1 << 24)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()
        with suppress(OSError):  # reset by the other side, or by us: either way it is closed
            await self._writer.wait_closed()

    async def send(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    def leave(self) -> None:
        """Close our half: the server sees that we have gone, and we still get what it had sent by then."""
        self._writer.write_eof()

    def drop(self) -> None:
        """Vanish with a reset, unread bytes and all."""
        held = self._writer.get_extra_info("socket")
        held.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.transport.abort()

    async def answer(self) -> Answer:
        """The next response, read to its end."""
        status, headers = await self.head()
        return Answer(status, headers, b"".join([part async for part in self.body(headers)]))

    async def head(self) -> tuple[int, dict[str, str]]:
        async with asyncio.timeout(ANSWER_S_MAX):
            head = await self._reader.readuntil(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").strip().split("\r\n")
        pairs = (line.partition(":") for line in lines)
        return int(first.split(" ")[1]), {name.strip().lower(): value.strip() for name, _, value in pairs}

    async def body(self, headers: Mapping[str, str]) -> AsyncIterator[bytes]:
        """Its parts as they arrive. Ends early, without a fault, if the connection does."""
        async with asyncio.timeout(ANSWER_S_MAX):
            try:
                if headers.get("transfer-encoding") != "chunked":
                    yield await self._reader.readexactly(int(headers["content-length"]))
                    return
                while size := int(await self._reader.readuntil(b"\r\n"), 16):
                    yield await self._reader.readexactly(size)
                    await self._reader.readexactly(2)
                await self._reader.readexactly(2)
            except (asyncio.IncompleteReadError, ConnectionResetError):
                return

    async def until_closed(self) -> None:
        """Return once the server has closed the connection, whatever it still sends."""
        async with asyncio.timeout(ANSWER_S_MAX):
            try:
                await self._reader.read()
            except ConnectionResetError:
                return


class Stream:
    """A streamed call, its events as they arrive."""

    def __init__(self, connection: Connection, status: int, headers: Mapping[str, str]) -> None:
        self.connection = connection
        self.status = status
        self.id = headers["x-request-id"]
        self.events: list[str] = []
        """What every event said so far: the text after `data:`."""
        self._parts = connection.body(headers)
        self._pending = b""

    async def next(self) -> str | None:
        """The next event's data; None at the end."""
        while b"\n\n" not in self._pending:
            part = await anext(self._parts, None)
            if part is None:
                return None
            self._pending += part
        event, _, self._pending = self._pending.partition(b"\n\n")
        data = next(line[5:].strip() for line in event.decode().split("\n") if line.startswith("data:"))
        self.events.append(data)
        return data

    async def rest(self) -> list[str]:
        """All events, once there are no more."""
        while await self.next() is not None:
            pass
        return self.events

    async def text(self, count: int) -> None:
        """Return once `count` more events with a piece of the answer have come."""
        while count:
            data = await self.next()
            assert data is not None, f"the stream ended with {self.events[-1:]}"
            count -= spoken(data)

    @property
    def chunks(self) -> list[Any]:
        return [json.loads(event) for event in self.events if event != "[DONE]"]


def spoken(data: str) -> bool:
    """Whether an event of a chat carries text."""
    choices = [] if data == "[DONE]" else json.loads(data).get("choices") or []
    return any(choice["delta"].get("content") for choice in choices)


@asynccontextmanager
async def streaming(
    host: tuple[str, int], key: str, body: Mapping[str, Any], path: str = "/v1/chat/completions"
) -> AsyncIterator[Stream]:
    """A streamed call whose 200 has come."""
    async with Connection(host) as connection:
        await connection.send(post(path, {"stream": True, **body}, key))
        status, headers = await connection.head()
        stream = Stream(connection, status, headers)
        try:
            yield stream
        finally:
            await stream._parts.aclose()  # type: ignore[attr-defined]


def post(path: str, body: Mapping[str, Any] | bytes, key: str | None = None, *more: str) -> bytes:
    """A well-formed POST."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "host: gateway", "content-type: application/json"]
    lines += [f"content-length: {len(data)}", *more]
    if key is not None:
        lines.append(f"authorization: Bearer {key}")
    return "\r\n".join([*lines, "", ""]).encode() + data


async def exchange(host: tuple[str, int], data: bytes) -> Answer:
    """Send these bytes on a connection of their own, and read one response."""
    async with Connection(host) as connection:
        await connection.send(data)
        return await connection.answer()
