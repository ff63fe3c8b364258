"""Clients that are slow on purpose: each is closed by its limit, holds little, and harms nobody."""

from __future__ import annotations

import asyncio
import socket
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from loadtests.emulator import Emulator, Pace, serving
from loadtests.process import usage
from tests.e2e.raw import post
from tests.e2e.servers import GatewayProcess
from tests.e2e.test_refusals import CHAT

SLOW = 200
"""Of each kind."""
HELD_BYTES_MAX, CALL_BYTES = 64 * 1024, 16 * 1024
"""Of resident memory for each: what is buffered, and what an open call takes by itself."""
GOOD = 50

CONFIG = """
[server]
listen = "127.0.0.1:0"
grpc = "127.0.0.1:0"
admin = "127.0.0.1:0"
[server.bounds]
header_s_max = 4
body_s_max = 4
write_s_max = 4
[[models]]
name = "chat"
waiting_max = 2000
replicas = [{{ kind = "remote", url = "{url}/v1", connections_max = 2000 }}]
"""
CONTENT = {"model": "chat", "messages": [{"role": "user", "content": "Say something."}], "max_tokens": 2}
#: 500 tokens of 1 KiB, more than all buffers on the way hold.
FLOOD = CONTENT | {"stream": True, "max_tokens": 500, "ignore_eos": True, "emulate": {"word": "x" * 1_000}}


Slow = Callable[[asyncio.StreamReader, asyncio.StreamWriter, str], Awaitable[str]]


async def slow_header(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, key: str) -> str:
    return await drip(reader, writer, b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\n", b"x: y\r\n")


async def slow_body(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, key: str) -> str:
    return await drip(reader, writer, post(CHAT, b"x" * 40_000, key)[:-20_000], b"x")


async def slow_read(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, key: str) -> str:
    """Asks for half a megabyte, and leaves it where it is until the server gives up."""
    writer.transport.pause_reading()  # type: ignore[attr-defined]
    writer.write(post(CHAT, FLOOD, key))
    raw: socket.socket = writer.get_extra_info("socket")
    while not raw.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
        await asyncio.sleep(0.1)
    return "reset"


async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, begin: bytes, drop: bytes) -> str:
    """The status that the server closes with."""
    writer.write(begin)
    answering = asyncio.create_task(reader.read())
    while not answering.done():
        writer.write(drop)
        await asyncio.wait((answering,), timeout=0.5)
    return (await answering)[9:12].decode()


@asynccontextmanager
async def connection(host: tuple[str, int]) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
    raw.setblocking(False)
    await asyncio.get_running_loop().sock_connect(raw, host)
    reader, writer = await asyncio.open_connection(sock=raw)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


@pytest.mark.parametrize(("slow", "end"), [(slow_header, "408"), (slow_body, "408"), (slow_read, "reset")])
async def test_the_slow_are_closed_hold_little_and_harm_nobody(tmp_path: Path, slow: Slow, end: str) -> None:
    async with serving(Emulator(Pace(token_s=0.01)), "127.0.0.1:0") as url, unlimited() as (control, kept):
        gateway = GatewayProcess(tmp_path, CONFIG.format(url=url))
        await asyncio.to_thread(gateway.start)
        naive = asyncio.create_task(asyncio.sleep(0, ""))
        try:
            key = await asyncio.to_thread(gateway.issue)
            async with gateway.client(key.text) as client:
                for _ in range(GOOD):
                    await client.post(CHAT, json=CONTENT)

            async def be_slow(host: tuple[str, int]) -> str:
                async with connection(host) as (reader, writer):
                    return await slow(reader, writer, key.text)

            before = usage(gateway.pid).rss_bytes
            naive = asyncio.create_task(be_slow(control))
            crowd = [asyncio.create_task(be_slow(gateway.host)) for _ in range(SLOW)]
            held_bytes = 0
            async with gateway.client(key.text) as client:
                for _ in range(GOOD):
                    answer = await client.post(CHAT, json=CONTENT)
                    assert answer.status_code == 200, answer.text
                    held_bytes = max(held_bytes, usage(gateway.pid).rss_bytes - before)
                    await asyncio.sleep(0.02)
            async with asyncio.timeout(60):
                while not all(task.done() for task in crowd):
                    held_bytes = max(held_bytes, usage(gateway.pid).rss_bytes - before)
                    await asyncio.sleep(0.1)
            ends = Counter([task.result() for task in crowd])
            assert ends == {end: SLOW}
            assert held_bytes / SLOW <= HELD_BYTES_MAX + CALL_BYTES
            assert kept and not naive.done(), "the control still has its slow client"
        finally:
            naive.cancel()
            await asyncio.gather(naive, return_exceptions=True)
            assert await asyncio.to_thread(gateway.stop) == 0


class Unlimited(asyncio.Protocol):
    """The control: waits for its clients as long as they like."""

    def __init__(self, kept: set[asyncio.BaseTransport]) -> None:
        self.kept = kept

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.kept.add(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self.kept.discard(self.transport)


@asynccontextmanager
async def unlimited() -> AsyncIterator[tuple[tuple[str, int], set[asyncio.BaseTransport]]]:
    kept: set[asyncio.BaseTransport] = set()
    server = await asyncio.get_running_loop().create_server(lambda: Unlimited(kept), "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname(), kept
    finally:
        server.close()
        for transport in kept:
            transport.close()
