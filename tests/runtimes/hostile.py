"""A server that says whatever a test wants, byte by byte, and a client's view of how it went."""

import asyncio
import functools
import inspect
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import uvloop


class Peer:
    """The server's end of one connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, serial: int) -> None:
        self._reader = reader
        self._writer = writer
        self.serial = serial
        """Which connection this is, from 0."""
        self.sent_bytes = 0
        self.tls: Any = writer.get_extra_info("ssl_object")

    async def request(self) -> tuple[bytes, bytes]:
        """Head and body of the next request. IncompleteReadError when the client leaves instead."""
        head = await self._reader.readuntil(b"\r\n\r\n")
        _, found, rest = head.lower().partition(b"content-length:")
        return head, await self._reader.readexactly(int(rest.split(b"\r\n")[0]) if found else 0)

    async def send(self, *pieces: bytes) -> None:
        for piece in pieces:
            self._writer.write(piece)
            await self._writer.drain()
            self.sent_bytes += len(piece)
            await asyncio.sleep(0)

    def reset(self) -> None:
        """RST instead of FIN."""
        raw: socket.socket = self._writer.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.transport.abort()

    def cut(self) -> None:
        """Close without TLS's goodbye."""
        self._writer.transport.abort()

    async def gone(self) -> None:
        """Return when the client has closed its end."""
        try:
            while await self._reader.read(65_536):
                pass
        except OSError:
            pass


class Hostile:
    """What a test can see of the server."""

    def __init__(self) -> None:
        self.url = ""
        self.peers: list[Peer] = []
        self.open = 0
        self.requests = 0


@asynccontextmanager
async def hostile(
    script: Callable[[Peer], Awaitable[None]], *, uds: Path | None = None, tls: ssl.SSLContext | None = None
) -> AsyncIterator[Hostile]:
    """Runs `script` for each connection and closes it afterwards; a client that leaves ends the script."""
    host = Hostile()
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        tasks.add(task)
        peer = Peer(reader, writer, len(host.peers))
        host.peers.append(peer)
        host.open += 1
        try:
            await script(peer)
        except (asyncio.IncompleteReadError, asyncio.CancelledError, OSError):
            pass
        finally:
            host.open -= 1
            tasks.discard(task)
            writer.close()

    if uds:
        server = await asyncio.start_unix_server(serve, str(uds))
        host.url = "http://localhost"
    else:
        server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls)
        host.url = f"{'https' if tls else 'http'}://localhost:{server.sockets[0].getsockname()[1]}"
    try:
        yield host
    finally:
        server.close()
        for task in tuple(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await server.wait_closed()


def answering(*pieces: bytes) -> Callable[[Peer], Awaitable[None]]:
    """The same answer to every request, in these pieces, until the client leaves."""

    async def script(peer: Peer) -> None:
        while True:
            await peer.request()
            await peer.send(*pieces)

    return script


def either_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run an async test twice, on asyncio's own loop and on the one that serves in production, and fail it if
    anything went wrong where only the loop could see it."""

    def run(*args: Any, loop: Callable[[], asyncio.AbstractEventLoop], **named: Any) -> None:
        unseen: list[dict[str, Any]] = []
        with asyncio.Runner(loop_factory=loop) as runner:
            runner.get_loop().set_exception_handler(lambda _, context: unseen.append(context))
            runner.run(test(*args, **named))
        assert unseen == []

    functools.update_wrapper(run, test)
    del run.__wrapped__  # type: ignore[attr-defined]
    signature = inspect.signature(test)
    extra = inspect.Parameter("loop", inspect.Parameter.KEYWORD_ONLY)
    run.__signature__ = signature.replace(parameters=[*signature.parameters.values(), extra])  # type: ignore[attr-defined]
    loops = [asyncio.new_event_loop, uvloop.new_event_loop]
    both: Callable[..., None] = pytest.mark.parametrize("loop", loops, ids=["asyncio", "uvloop"])(run)
    return both
