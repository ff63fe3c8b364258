"""Bounds that no other test reaches."""

from __future__ import annotations

import asyncio
import math

import pytest

import gateway.edge.connection
import runtimes.wire
from runtimes.clock import SystemClock
from runtimes.contract import Overloaded
from runtimes.wire import Wire
from tests.fakes import until
from tests.gateway.test_connection import GET, post, serving
from tests.runtimes.hostile import hostile

READ_BYTES_MAX = 262_144


async def test_requests_sent_ahead_stay_in_the_socket() -> None:
    count = 100_000
    async with serving() as site:
        peer = await site.peer()
        peer.send(post(b"", b"/wait") + GET * count)
        await site.app.begun.wait()
        (connection,) = site.server.connections
        await until(lambda: connection._held)
        waiting = len(connection._waiting)
        for _ in range(100):
            await asyncio.sleep(0)
        assert len(connection._waiting) == waiting <= READ_BYTES_MAX / len(GET) < count


async def test_an_idle_connection_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway.edge.connection, "IDLE_S_MAX", 0.05)
    async with serving() as site:
        peer = await site.peer()
        peer.send(GET)
        assert await peer.answer() == (200, b"/ok")
        assert await peer.closed()


async def test_a_refused_client_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway.edge.connection, "LINGER_S", 0.05)
    async with serving() as site:
        peer = await site.peer()
        peer.send(b"NONSENSE\r\n\r\n")
        await peer.answer()  # and does not hang up
        await until(lambda: not site.server.connections)


async def test_calls_that_wait_for_a_connection_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtimes.wire, "WAITING_MAX", 2)

    async def silent(peer: object) -> None:
        await asyncio.get_running_loop().create_future()

    async with hostile(silent) as host:
        wire = Wire(host.url, connections_max=1, connect_s_max=5, idle_s_max=5, clock=SystemClock())
        head = wire.head("POST", "/")

        async def ask() -> None:
            async with wire.exchange(head, (), b"", math.inf):
                raise AssertionError("it was answered")

        calls = [asyncio.create_task(ask()) for _ in range(3)]
        await until(lambda: wire.load().waiting == 2)
        with pytest.raises(Overloaded):
            await ask()
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        await wire.aclose()
