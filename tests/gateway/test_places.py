"""Places that workers share."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.errors import DeadlineExceeded, QueueFull
from gateway.places import Places, SharedLine
from runtimes.clock import SystemClock
from tests.fakes import a_call, a_principal, until

WORKERS = 3


class Host:
    """Workers in one process; their bells are heard when a test says so."""

    def __init__(self, *, running_max: int, waiting_max: int = 1_000, wait_s_max: float = 60.0) -> None:
        self.places = Places.make(running_max={"other": 1, "chat": running_max}, workers=WORKERS)
        self.shared = self.places.of["chat"]
        self.lines = [
            SharedLine(
                model="chat",
                places=self.shared,
                worker=number,
                waiting_max=waiting_max,
                wait_s_max=wait_s_max,
                clock=SystemClock(),
            )
            for number in range(WORKERS)
        ]
        self.visits: list[Visit] = []
        self.killed: set[int] = set()

    def visit(self, worker: int) -> Visit:
        self.visits.append(Visit(self.lines[worker], worker))
        return self.visits[-1]

    def hear(self) -> None:
        """Every bell that rings."""
        for number in set(range(WORKERS)) - self.killed:
            try:
                os.eventfd_read(self.places.bells[number])
            except BlockingIOError:
                continue
            self.lines[number].agree()

    def kill(self, worker: int) -> None:
        """It does nothing more, and its leader has seen that."""
        self.killed.add(worker)
        self.places.strike_out(worker)

    async def rest(self) -> None:
        """Until nothing moves any more."""
        for _ in range(20):
            self.hear()
            await asyncio.sleep(0)

    @property
    def inside(self) -> int:
        return sum(visit.inside.is_set() and not visit.task.done() for visit in self.visits)

    def close(self) -> None:
        for visit in self.visits:
            visit.task.cancel()
        for file in (*self.places.bells, self.places.memory.file):
            os.close(file)


class Visit:
    """A call that holds its place until told to leave."""

    def __init__(self, line: SharedLine, worker: int) -> None:
        self.worker = worker
        self.inside = asyncio.Event()
        self.leave = asyncio.Event()
        call = a_call(a_principal(f"t{worker}"), deadline_s=1e12)
        self.task = asyncio.create_task(self._visit(line, call))

    async def _visit(self, line: SharedLine, call: object) -> None:
        async with line.turn(call):  # type: ignore[arg-type]
            self.inside.set()
            await self.leave.wait()


@pytest.fixture
async def host() -> Iterator[Host]:  # type: ignore[misc]
    made = Host(running_max=2)
    yield made
    made.close()
    await asyncio.gather(*(visit.task for visit in made.visits), return_exceptions=True)


async def test_all_workers_together_hold_no_more_than_there_are(host: Host) -> None:
    for number in range(9):
        host.visit(number % WORKERS)
    await host.rest()
    assert host.inside == 2
    assert sum(line.waiting for line in host.lines) == 7


async def test_a_place_given_back_by_one_worker_reaches_a_call_that_waits_in_another(host: Host) -> None:
    first, second = host.visit(0), host.visit(0)
    await host.rest()
    waiting = host.visit(1)
    await host.rest()
    assert not waiting.inside.is_set()
    first.leave.set()
    await host.rest()
    assert waiting.inside.is_set()
    assert (second.task.done(), host.inside) == (False, 2)


async def test_workers_take_turns_however_many_wait_in_each(host: Host) -> None:
    held = [host.visit(0), host.visit(0)]
    await host.rest()
    crowd = [host.visit(0) for _ in range(50)]
    await host.rest()
    one = host.visit(2)
    await host.rest()
    for visit in (*held, *crowd):
        visit.leave.set()
        await host.rest()
        if one.inside.is_set():
            break
    assert sum(visit.inside.is_set() for visit in crowd) <= 2


async def test_a_call_that_stops_waiting_passes_its_place_to_another_worker(host: Host) -> None:
    held = [host.visit(0), host.visit(0)]
    await host.rest()
    leaving, waiting = host.visit(1), host.visit(2)
    await host.rest()
    held[0].leave.set()
    await asyncio.sleep(0)  # handed to worker 1, whose bell has not been heard
    leaving.task.cancel()
    await host.rest()
    assert waiting.inside.is_set()


async def test_one_that_waits_too_long_is_told_and_leaves_nothing_behind() -> None:
    host = Host(running_max=1, wait_s_max=0.01)
    held = host.visit(0)
    await host.rest()
    late = host.visit(1)
    with pytest.raises(DeadlineExceeded):
        await late.task
    assert list(host.shared.waiting) == [0, 0, 0]
    held.leave.set()
    await held.task
    assert list(host.shared.running) == [0, 0, 0]
    host.close()


async def test_a_full_line_is_each_workers_own() -> None:
    host = Host(running_max=1, waiting_max=1)
    host.visit(0)
    await host.rest()
    for worker in range(WORKERS):
        host.visit(worker)
    await host.rest()
    full = host.visit(1)
    with pytest.raises(QueueFull):
        await full.task
    assert list(host.shared.waiting) == [1, 1, 1]
    host.close()


async def test_what_a_killed_worker_held_goes_to_those_who_wait(host: Host) -> None:
    for worker in (0, 0, 1, 2):
        host.visit(worker)
    await host.rest()
    host.kill(0)
    await host.rest()
    assert [visit.inside.is_set() for visit in host.visits[2:]] == [True, True]


async def test_a_place_that_was_handed_to_a_worker_and_then_killed_is_handed_on(host: Host) -> None:
    for worker in (0, 0, 1, 2):
        host.visit(worker)
    await until(lambda: host.lines[2].waiting == 1)
    host.visits[0].leave.set()
    await until(lambda: sum(host.shared.handed) == 1)
    host.kill([*host.shared.handed].index(1))
    await host.rest()
    assert sum(host.shared.handed) == 0
    assert sum(host.shared.running) == 2


@pytest.mark.parametrize("torn", ["running", "waiting", "handed"])
async def test_whatever_a_kill_left_half_done_comes_right_when_it_is_struck_out(host: Host, torn: str) -> None:
    """The dying worker handed worker 1 a place, and got only so far."""
    for worker in (0, 0, 1, 2):
        host.visit(worker)
    await host.rest()
    host.shared.running[0] -= 1
    host.shared.running[1] += 1
    if torn in ("waiting", "handed"):
        host.shared.waiting[1] -= 1
    if torn == "handed":
        host.shared.handed[1] += 1
    host.kill(0)
    await host.rest()
    assert [visit.inside.is_set() for visit in host.visits[2:]] == [True, True]
    assert list(host.shared.running) == [0, 1, 1]
    assert sum(host.shared.waiting) == sum(host.shared.handed) == 0


@settings(deadline=None, max_examples=200)
@given(seed=st.integers(0, 10**9), places=st.integers(1, 4), steps=st.integers(1, 80))
def test_no_order_of_events_oversteps_or_wastes_or_leaks_a_place(seed: int, places: int, steps: int) -> None:
    asyncio.run(_any_order(random.Random(seed), places, steps))


async def _any_order(chance: random.Random, places: int, steps: int) -> None:
    host = Host(running_max=places)
    for _ in range(steps):
        living = [visit for visit in host.visits if not visit.task.done()]
        match chance.choice(["enter", "enter", "leave", "cancel", "hear", "turn"]):
            case "enter":
                host.visit(chance.randrange(WORKERS))
            case "leave" if living:
                chance.choice(living).leave.set()
            case "cancel" if living:
                chance.choice(living).task.cancel()
            case "hear":
                host.hear()
        if chance.random() < 0.7:
            await asyncio.sleep(0)
        assert sum(line.running for line in host.lines) <= places
        assert sum(host.shared.running) <= places
    await host.rest()
    if any(line.waiting for line in host.lines):
        assert host.inside == places, "a place lies idle while a call waits for it"
    for visit in host.visits:
        visit.leave.set()
    while not all(visit.task.done() for visit in host.visits):
        await host.rest()
    assert [*host.shared.running, *host.shared.waiting, *host.shared.handed] == [0] * 3 * WORKERS
    assert [line.running for line in host.lines] == [0] * WORKERS
    host.close()
