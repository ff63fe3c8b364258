"""A runtime as the gateway sees it."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from gateway.replica import EJECTIONS_S, FAILURES_MAX, PROBE_S, Replica, State
from runtimes.contract import Unavailable
from tests.fakes import FakeClock, FakeGenerator, Script, fixed, until


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def runtime() -> FakeGenerator:
    return FakeGenerator(Script([b"{}"]))


@pytest.fixture
async def replica(clock: FakeClock, runtime: FakeGenerator) -> AsyncIterator[Replica]:
    replica = Replica(name="chat-0", model="chat", kind="fake", source=fixed(runtime), slots=2, clock=clock)
    yield replica
    await replica.aclose()


async def look_again(clock: FakeClock, pause_s: float = PROBE_S) -> None:
    await clock.until_asleep()
    clock.advance(pause_s)
    await clock.until_asleep()


async def test_it_is_starting_until_its_runtime_is_open(replica: Replica) -> None:
    assert replica.look().state is State.starting
    assert not replica.trusted()
    replica.start()
    await replica.up.wait()
    assert replica.look().state is State.ready
    assert replica.trusted()


async def test_a_runtime_that_does_not_start_is_tried_again_ever_more_slowly(
    replica: Replica, runtime: FakeGenerator, clock: FakeClock
) -> None:
    runtime.trouble = Unavailable("no model")
    replica.start()
    await look_again(clock, 0)
    assert (replica.state, replica.reason) == (State.down, "no model")
    await look_again(clock, 1)
    runtime.trouble = None
    await look_again(clock, 1)
    assert not replica.up.is_set()
    clock.advance(1)
    await replica.up.wait()


async def test_an_engine_that_goes_down_is_seen_and_its_return_too(
    replica: Replica, runtime: FakeGenerator, clock: FakeClock
) -> None:
    replica.start()
    await replica.up.wait()
    runtime.trouble = Unavailable("it is being restarted")
    await look_again(clock)
    assert (replica.state, replica.reason) == (State.down, "it is being restarted")
    runtime.trouble = None
    await look_again(clock)
    assert (replica.state, replica.reason) == (State.ready, "")


async def test_a_fault_of_the_runtime_itself_does_not_end_the_watch(
    replica: Replica, runtime: FakeGenerator, clock: FakeClock
) -> None:
    runtime.trouble = ZeroDivisionError()
    replica.start()
    await look_again(clock, 0)
    assert replica.state is State.down
    runtime.trouble = None
    clock.advance(60)
    await replica.up.wait()


async def ready(replica: Replica) -> None:
    replica.start()
    await replica.up.wait()


async def test_repeated_faults_eject_and_time_brings_back(replica: Replica, clock: FakeClock) -> None:
    await ready(replica)
    for _ in range(FAILURES_MAX - 1):
        replica.failed("reset")
    assert replica.trusted()
    replica.failed("reset")
    assert not replica.trusted()
    assert replica.look().ejected
    clock.advance(EJECTIONS_S[0])
    assert replica.trusted()


async def test_it_stays_away_longer_each_time_and_never_for_ever(replica: Replica, clock: FakeClock) -> None:
    await ready(replica)
    away_s = []
    for _ in range(FAILURES_MAX - 1):
        replica.failed("reset")
    for _ in range(2_000):
        replica.failed("reset")
        away_s.append(replica.ejected_until_s - clock.now_s())
        clock.advance(away_s[-1])
    assert tuple(away_s[: len(EJECTIONS_S)]) == EJECTIONS_S
    assert away_s[-1] == EJECTIONS_S[-1]


async def test_calls_that_fail_together_count_as_one_ejection(replica: Replica, clock: FakeClock) -> None:
    await ready(replica)
    for _ in range(100):
        replica.failed("reset")
    assert replica.ejected_until_s - clock.now_s() == EJECTIONS_S[0]


async def test_one_success_clears_it(replica: Replica) -> None:
    await ready(replica)
    for _ in range(FAILURES_MAX):
        replica.failed("reset")
    replica.succeeded()
    assert replica.trusted()
    for _ in range(FAILURES_MAX - 1):
        replica.failed("reset")
    assert replica.trusted()


async def test_an_engine_started_anew_is_trusted_at_once(
    replica: Replica, runtime: FakeGenerator, clock: FakeClock
) -> None:
    await ready(replica)
    for _ in range(FAILURES_MAX):
        replica.failed("reset")
    runtime.trouble = Unavailable("it died")
    await look_again(clock, 0.0)
    clock.advance(PROBE_S / 2)
    replica.ejected_until_s = clock.now_s() + 1_000
    await look_again(clock)
    runtime.trouble = None
    await look_again(clock)
    await until(replica.trusted)


async def test_closing_ends_the_watch_and_the_runtime(replica: Replica, runtime: FakeGenerator) -> None:
    await ready(replica)
    await replica.aclose()
    assert isinstance(runtime.trouble, Unavailable)
    assert replica.watch is not None
    assert replica.watch.done()
    await asyncio.sleep(0)
