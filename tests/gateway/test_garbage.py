"""A call leaves nothing that only the garbage collector could find: looking for it cost a twentieth of all work."""

import asyncio
import gc
import math
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from runtimes.clock import SystemClock
from runtimes.wire import Wire
from tests.fakes import until
from tests.gateway.test_connection import GET, serving
from tests.profile.__main__ import ANSWER, BODY, PLAIN, STREAM_HEAD, Rig, framed
from tests.runtimes.hostile import answering, hostile

DONE = framed(b"data: [DONE]\n\n") + b"0\r\n\r\n"
ANSWERS = {"whole": (BODY, ANSWER), "streamed": (BODY[:-1] + b',"stream":true}', STREAM_HEAD + framed(PLAIN) + DONE)}
CALLS = 50


@pytest.mark.parametrize("kind", ANSWERS)
async def test_a_call_leaves_no_garbage(tmp_path: Path, kind: str) -> None:
    body, answer = ANSWERS[kind]
    rig = Rig(tmp_path)
    await rig.journal.open()
    await rig.runtime.open()
    await rig.upstream(answer)
    client, transport = rig.connected()
    length = b"Content-Length: %d"
    request = rig.request.replace(BODY, body).replace(length % len(BODY), length % len(body))

    async def call() -> None:
        before = rig.journal.written_bytes
        client.data_received(request)
        while rig.journal.written_bytes == before:
            await asyncio.sleep(0)

    await call()
    gc.collect()
    gc.disable()
    try:
        for _ in range(CALLS):
            await call()
        found = gc.collect()
    finally:
        gc.enable()
    assert transport.written > CALLS * 100
    assert found < CALLS, f"{found} objects of {CALLS} calls"
    client.connection_lost(None)
    await rig.journal.aclose()


async def garbage(of: Callable[[], Awaitable[None]]) -> int:
    """What is found after CALLS of these."""
    await of()
    await asyncio.sleep(0)
    gc.collect()
    gc.disable()
    try:
        for _ in range(CALLS):
            await of()
        await asyncio.sleep(0.05)
        return gc.collect()
    finally:
        gc.enable()


async def test_a_client_s_connection_leaves_no_garbage() -> None:
    async with serving() as site:

        async def visit() -> None:
            reader, writer = await asyncio.open_connection("127.0.0.1", site.port)
            writer.write(GET)
            await reader.readuntil(b"/ok")
            writer.close()
            await writer.wait_closed()

        assert await garbage(visit) < CALLS


async def test_nor_does_one_to_an_engine() -> None:
    closes = b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nhi"
    async with hostile(answering(closes)) as host:
        wire = Wire(host.url, connections_max=1, connect_s_max=5, idle_s_max=5, clock=SystemClock())
        head = wire.head("GET", "/")

        async def ask() -> None:
            async with wire.exchange(head, (), b"", math.inf) as reply:
                assert [frame async for frame in reply.frames] == [b"hi"]

        found = await garbage(ask)
        await wire.aclose()
    assert found < CALLS


async def test_an_upload_that_is_broken_off_leaves_no_garbage() -> None:
    async with serving() as site:

        async def visit() -> None:
            _, writer = await asyncio.open_connection("127.0.0.1", site.port)
            writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nhalf of it")
            await until(lambda: any(it.busy for it in site.server.connections))
            writer.transport.abort()
            await until(lambda: not site.server.connections)

        assert await garbage(visit) < CALLS
