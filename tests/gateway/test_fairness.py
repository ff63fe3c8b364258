"""Whose turn it is."""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.errors import DeadlineExceeded, QueueFull
from gateway.fairness import Line
from runtimes.clock import Clock, SystemClock
from tests.fakes import FakeClock, a_call, a_principal, until


def a_line(
    *, running_max: int = 1, waiting_max: int = 1_000, wait_s_max: float = 60, clock: Clock | None = None
) -> Line:
    return Line(
        model="chat",
        running_max=running_max,
        waiting_max=waiting_max,
        wait_s_max=wait_s_max,
        clock=clock or SystemClock(),
    )


class Visitor:
    """A call that holds its place until told to leave."""

    def __init__(self, line: Line, tenant: str, served: list[str] | None = None) -> None:
        self.tenant = tenant
        self.inside = asyncio.Event()
        self.leave = asyncio.Event()
        self.call = a_call(a_principal(tenant), deadline_s=1e12)
        self.task = asyncio.create_task(self._visit(line, [] if served is None else served))

    async def _visit(self, line: Line, served: list[str]) -> None:
        async with line.turn(self.call):
            served.append(self.tenant)
            self.inside.set()
            await self.leave.wait()


@asynccontextmanager
async def full(line: Line) -> AsyncIterator[list[Visitor]]:
    """Every place taken."""
    inside = [Visitor(line, "first") for _ in range(line.running_max)]
    for visitor in inside:
        await visitor.inside.wait()
    yield inside
    for visitor in inside:
        visitor.leave.set()
    await asyncio.gather(*(visitor.task for visitor in inside), return_exceptions=True)


async def queued(line: Line, tenant: str, served: list[str] | None = None) -> Visitor:
    before = line.waiting
    visitor = Visitor(line, tenant, served)
    await until(lambda: line.waiting > before or visitor.task.done())
    return visitor


async def test_a_tenant_with_a_hundred_waiting_delays_another_by_one_round() -> None:
    line, served = a_line(), list[str]()
    async with full(line):
        crowd = [await queued(line, "crowd", served) for _ in range(100)]
        one = await queued(line, "one", served)
        for visitor in (*crowd, one):
            visitor.leave.set()
    await asyncio.gather(*(visitor.task for visitor in (*crowd, one)))
    assert served.index("one") <= 1


async def test_tenants_take_turns_one_by_one() -> None:
    line, served = a_line(), list[str]()
    async with full(line):
        visitors = [await queued(line, tenant, served) for tenant in "aaabbbccc"]
        for visitor in visitors:
            visitor.leave.set()
    await asyncio.gather(*(visitor.task for visitor in visitors))
    assert "".join(served) == "abcabcabc"


async def test_a_full_line_refuses_and_says_when_to_come_back() -> None:
    line = a_line(waiting_max=2)
    async with full(line):
        waiting = [await queued(line, "a") for _ in range(2)]
        late = await queued(line, "a")
        with pytest.raises(QueueFull) as refused:
            await late.task
        assert 1 <= (refused.value.retry_after_s or 0) <= 60
        assert line.waiting == 2
        for visitor in waiting:
            visitor.leave.set()


async def test_nobody_can_keep_others_from_standing_in_line() -> None:
    line, served = a_line(waiting_max=4), list[str]()
    async with full(line):
        crowd = [await queued(line, "crowd", served) for _ in range(4)]
        one = Visitor(line, "one", served)
        with pytest.raises(QueueFull):
            await crowd[-1].task
        for visitor in (*crowd, one):
            visitor.leave.set()
    await asyncio.gather(*(visitor.task for visitor in (*crowd[:-1], one)))
    assert served == ["crowd", "one", "crowd", "crowd"]


async def test_a_call_is_not_driven_out_for_one_of_its_own_kind() -> None:
    line = a_line(waiting_max=2)
    async with full(line):
        waiting = [await queued(line, tenant) for tenant in "ab"]
        late = await queued(line, "b")
        with pytest.raises(QueueFull):
            await late.task
        assert line.waiting == 2
        for visitor in waiting:
            visitor.leave.set()


async def test_waiting_too_long_is_given_up_and_leaks_no_place() -> None:
    line = a_line(wait_s_max=0.01)
    async with full(line):
        with pytest.raises(DeadlineExceeded):
            await Visitor(line, "a").task
        assert line.waiting == 0
    assert line.running == 0
    last = Visitor(line, "a")
    await last.inside.wait()
    last.leave.set()
    await last.task


async def test_a_deadline_that_has_passed_is_not_waited_for() -> None:
    clock = FakeClock()
    line = a_line(clock=clock)
    async with full(line):
        visitor = Visitor(line, "a")
        visitor.call.deadline_s = clock.now_s() - 1
        with pytest.raises(DeadlineExceeded):
            await visitor.task


async def test_how_long_a_call_waited_is_noted_on_it() -> None:
    clock = FakeClock()
    line = a_line(clock=clock)
    async with full(line):
        visitor = await queued(line, "a")
        clock.advance(7)
    await visitor.inside.wait()
    visitor.leave.set()
    await visitor.task
    assert visitor.call.wait_s == 7


async def test_leaving_in_the_very_step_that_gives_the_place_leaks_nothing() -> None:
    line = a_line()
    async with full(line) as (inside,):
        waiting = await queued(line, "a")
        inside.leave.set()
        await asyncio.gather(inside.task)
        # The place has just been given to `waiting`, which has not run since.
        assert (line.running, line.waiting) == (1, 0)
        waiting.task.cancel()
        await asyncio.gather(waiting.task, return_exceptions=True)
    assert (line.running, line.waiting) == (0, 0)


async def test_leaving_in_the_very_step_that_gives_up_leaks_nothing() -> None:
    line = a_line()
    async with full(line):
        waiting = await queued(line, "a")
        (place,) = line.tenants["id-a"]
        line._give_up("id-a", place)
        waiting.task.cancel()
        await asyncio.gather(waiting.task, return_exceptions=True)
        assert (line.running, line.waiting, line.tenants) == (1, 0, {})


@settings(deadline=None, max_examples=150)
@given(running_max=st.integers(1, 4), waiting_max=st.integers(0, 8), seed=st.integers())
def test_any_order_of_coming_leaving_and_giving_up_keeps_the_books(
    running_max: int, waiting_max: int, seed: int
) -> None:
    asyncio.run(come_and_go(running_max, waiting_max, random.Random(seed)))


async def come_and_go(running_max: int, waiting_max: int, chance: random.Random) -> None:
    line = a_line(running_max=running_max, waiting_max=waiting_max)
    visitors: list[Visitor] = []
    for _ in range(80):
        match chance.choice(["come", "come", "leave", "cancel", "give up", "step"]):
            case "come":
                visitors.append(Visitor(line, chance.choice("abc")))
            case "leave" if visitors:
                chance.choice(visitors).leave.set()
            case "cancel" if visitors:
                chance.choice(visitors).task.cancel()
            case "give up" if line.tenants:
                tenant = chance.choice(list(line.tenants))
                line._give_up(tenant, chance.choice(list(line.tenants[tenant])))
            case _:
                await asyncio.sleep(0)
        assert line.running <= running_max
        assert line.waiting <= waiting_max
        assert line.waiting == sum(map(len, line.tenants.values()))
        assert line.running == running_max or not line.waiting, "a free place while someone waits"
    for visitor in visitors:
        visitor.leave.set()
    await asyncio.gather(*(visitor.task for visitor in visitors), return_exceptions=True)
    assert (line.running, line.waiting, line.tenants) == (0, 0, {})
