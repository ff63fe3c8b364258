"""Connections, shared by several workers."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator

import pytest

from gateway.acceptor import Acceptor
from gateway.call import Bounds
from gateway.edge.server import Server
from runtimes.clock import SystemClock
from tests.fakes import until


class Refusing:
    """A door that nobody gets through."""

    def enter(self, request: object) -> object:
        raise AssertionError("nothing is sent here")


class Host:
    """Workers in one process, accepting on one socket."""

    def __init__(self, workers: int) -> None:
        self.listening = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.crowd = memoryview(bytearray(4 * workers)).cast("I")
        self.servers = [Server(door=Refusing(), bounds=Bounds(), clock=SystemClock()) for _ in range(workers)]  # type: ignore[arg-type]
        self.clients: list[socket.socket] = []
        self.away: set[int] = set()

    def accepting(self, worker: int) -> Acceptor:
        return Acceptor(
            self.servers[worker],
            self.listening.dup(),
            crowd=self.crowd,
            worker=worker,
            here=lambda: worker not in self.away,
        )

    def connect(self, count: int) -> None:
        for _ in range(count):
            self.clients.append(socket.create_connection(self.listening.getsockname()))

    @property
    def counts(self) -> list[int]:
        return [len(server.connections) for server in self.servers]

    async def until_accepted(self) -> None:
        async with asyncio.timeout(10):
            while sum(self.counts) < len(self.clients):
                await asyncio.sleep(0.001)


@pytest.fixture
async def host() -> AsyncIterator[Host]:
    made = Host(workers=2)
    yield made
    for client in (made.listening, *made.clients):
        client.close()
    await until(lambda: sum(made.counts) == 0)


@pytest.mark.parametrize("count", [8, 200])
async def test_what_comes_at_once_is_shared_evenly(host: Host, count: int) -> None:
    host.connect(count)
    acceptors = [host.accepting(0), host.accepting(1)]
    await host.until_accepted()
    assert max(host.counts) <= min(host.counts) * 9 // 8 + 3
    await close(*acceptors)


async def test_a_connection_is_counted_once_while_it_is_opened(host: Host) -> None:
    host.connect(100)
    acceptor = host.accepting(0)
    most = 0
    async with asyncio.timeout(10):
        while host.counts[0] < 100:
            await asyncio.sleep(0)
            most = max(most, host.crowd[0])
    assert most == 100 + 1
    await close(acceptor)


async def test_who_has_fewer_gets_the_next_ones(host: Host) -> None:
    first = host.accepting(0)
    host.connect(50)
    await host.until_accepted()
    second = host.accepting(1)
    host.connect(40)
    await host.until_accepted()
    assert host.counts[1] >= 30, "the fuller one takes only what is left waiting"
    await close(first, second)


async def test_nobody_waits_for_a_worker_that_hangs(host: Host) -> None:
    host.crowd[1] = 1  # it says that it accepts, and does not
    acceptor = host.accepting(0)
    host.connect(20)
    await host.until_accepted()
    assert host.counts == [20, 0]
    await close(acceptor)


async def test_one_that_would_refuse_leaves_all_to_another(host: Host) -> None:
    acceptors = [host.accepting(0), host.accepting(1)]
    host.connect(40)
    await host.until_accepted()
    host.away.add(0)
    kept = host.counts[0]
    for _ in range(10):
        host.connect(4)
        await host.until_accepted()
    assert host.counts == [kept, 80 - kept]
    assert host.crowd[0] == 0
    await close(acceptors.pop())
    host.connect(4)
    await host.until_accepted()
    assert host.counts[0] == kept + 4, "there is nobody else any more"
    host.away.clear()
    host.connect(40)
    await host.until_accepted()
    assert host.crowd[0] == host.counts[0] + 1
    await close(*acceptors)


async def test_those_that_would_all_refuse_take_what_comes(host: Host) -> None:
    host.away |= {0, 1}
    acceptors = [host.accepting(0), host.accepting(1)]
    host.connect(40)
    await host.until_accepted()
    await close(*acceptors)


async def test_one_that_would_refuse_does_so_for_another_that_hangs(host: Host) -> None:
    host.away.add(0)
    host.crowd[1] = 1
    acceptor = host.accepting(0)
    host.connect(3)
    await asyncio.sleep(0.2)
    assert host.counts[0] == 0
    await host.until_accepted()
    await close(acceptor)


async def test_one_that_closes_takes_no_more_and_is_waited_for_by_nobody(host: Host) -> None:
    acceptors = [host.accepting(0), host.accepting(1)]
    await close(acceptors[0])
    assert host.crowd[0] == 0
    host.connect(20)
    await host.until_accepted()
    assert host.counts == [0, 20]
    await close(acceptors[1])


async def test_without_descriptors_it_goes_on_when_there_are_some_again(
    host: Host, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("gateway.acceptor.FAULT_S", 0.001)
    faults = [OSError(24, "Too many open files")] * 3

    class Starved(socket.socket):
        def accept(self) -> tuple[socket.socket, object]:
            if faults:
                raise faults.pop()
            return super().accept()

    listening = Starved(fileno=host.listening.dup().detach())
    acceptor = Acceptor(host.servers[0], listening, crowd=host.crowd, worker=0, here=lambda: True)
    host.connect(3)
    await host.until_accepted()
    assert "Too many open files" in caplog.text
    await close(acceptor)


async def close(*acceptors: Acceptor) -> None:
    for acceptor in acceptors:
        acceptor.close()
        await acceptor.wait_closed()
