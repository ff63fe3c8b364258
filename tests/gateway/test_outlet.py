"""What is written goes out at once, in its order, and to nobody else."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from gateway.edge.outlet import Outlet

SMALL_BYTES = 4_096


@asynccontextmanager
async def connected() -> AsyncIterator[tuple[Outlet, socket.socket]]:
    """One, and its client, whose kernel takes little ahead."""
    ours, theirs = socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL_BYTES)
    ours.setblocking(False)
    theirs.setblocking(False)
    _, outlet = await asyncio.get_running_loop().connect_accepted_socket(Outlet, ours)
    with theirs:
        yield outlet, theirs
    outlet.transport.abort()


async def read(client: socket.socket, size: int) -> bytes:
    found = b""
    while len(found) < size:
        found += await asyncio.get_running_loop().sock_recv(client, 65_536)
    return found


def test_what_is_written_is_there_before_the_loop_goes_on(runner: asyncio.Runner) -> None:
    async def check() -> None:
        async with connected() as (outlet, client):
            outlet.write(b"first")
            assert client.recv(100) == b"first"

    runner.run(check())


def test_what_the_kernel_does_not_take_follows_in_its_order(runner: asyncio.Runner) -> None:
    async def check() -> None:
        async with connected() as (outlet, client):
            parts = [bytes([index]) * 30_000 for index in range(50)]
            for part in parts[:25]:
                outlet.write(part)
            assert outlet.transport.get_write_buffer_size() > 0
            half = await read(client, 400_000)  # what follows is written while some of the above is still held
            for part in parts[25:]:
                outlet.write(part)
            whole = b"".join(parts)
            assert half + await read(client, len(whole) - len(half)) == whole

    runner.run(check())


def test_behind_what_the_transport_was_given_it_waits_for_it(runner: asyncio.Runner) -> None:
    async def check() -> None:
        async with connected() as (outlet, client):
            outlet.transport.write(b"1" * 100_000)  # more than the kernel takes, under either loop
            outlet.write(b"2")
            assert await read(client, 100_001) == b"1" * 100_000 + b"2"

    runner.run(check())


@pytest.mark.parametrize("end", ["abort", "close"])
def test_whoever_has_its_descriptor_next_gets_nothing_of_it(runner: asyncio.Runner, end: str) -> None:
    async def check() -> None:
        async with connected() as (outlet, _):
            number = outlet.transport.get_extra_info("socket").fileno()
            getattr(outlet.transport, end)()
            for _ in range(10):  # until it is closed for good
                outlet.write(b"secret")
                await asyncio.sleep(0)
        ours, other = socket.socketpair()
        with ours, other:
            if ours.fileno() != number:
                os.dup2(ours.fileno(), number)
            other.setblocking(False)
            outlet.write(b"secret")
            with pytest.raises(BlockingIOError):
                other.recv(100)
            if ours.fileno() != number:
                os.close(number)

    runner.run(check())


def test_who_has_left_is_written_to_in_vain(runner: asyncio.Runner) -> None:
    async def check() -> None:
        lost = asyncio.Event()

        class Watched(Outlet):
            def connection_lost(self, exc: Exception | None) -> None:
                lost.set()

        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        _, outlet = await asyncio.get_running_loop().connect_accepted_socket(Watched, ours)
        theirs.close()
        outlet.write(b"anything")  # the socket says no, and the transport is told of it
        async with asyncio.timeout(5):
            await lost.wait()
        assert outlet.transport.is_closing()
        outlet.write(b"more")

    runner.run(check())
