"""What a model may spend on asking one more replica, and that a call that goes well spends nothing."""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import DeadlineExceeded, EngineFailed, EngineTimeout
from gateway.target import RETRIES_KEPT, RETRIES_PER_CALL, RETRIES_PER_S, Retries
from runtimes.contract import Generator, Silent, Unavailable
from tests.fakes import FakeClient, FakeClock, FakeGenerator, Script, Stages, a_call, events

OK = Script([b'{"usage":{"prompt_tokens":1,"completion_tokens":1}}'])
DOWN = Unavailable("reset")
Open = Callable[..., Any]


class Unbudgeted(Retries):
    """The control: what a gateway does that always asks the next one."""

    def take(self) -> bool:
        self.taken += 1
        return True


@pytest.fixture
async def stages_of(tmp_path: Path) -> AsyncIterator[Open]:
    opened: list[Stages] = []

    async def make(*runtimes: Generator, retries: type[Retries] = Retries) -> tuple[Stages, Retries]:
        stages = Stages(tmp_path, FakeClock(), {"chat": list(runtimes)}, slots=100)
        opened.append(await stages.__aenter__())
        budget = stages.pipeline.route.targets["chat"].retries
        budget.__class__ = retries
        return stages, budget

    yield make
    for stages in opened:
        assert stages.at_rest()
        await stages.__aexit__()


def allowed(calls: int, elapsed_s: float) -> float:
    """Attempts that so many calls may make in that time; the first second's retries are there from the start."""
    return (1 + RETRIES_PER_CALL) * calls + RETRIES_PER_S * (elapsed_s + 1)


async def outage(stages: Stages, clock: Any, *, calls: int, calls_per_s: float) -> None:
    for _ in range(calls):
        with pytest.raises(EngineFailed):
            await stages.pipeline.run(a_call(), FakeClient())
        clock.advance(1 / calls_per_s)


@pytest.mark.parametrize(("calls", "calls_per_s"), [(60, 2.0), (300, 100.0), (300, 10_000.0)])
async def test_with_every_engine_down_attempts_stay_near_the_calls(
    stages_of: Open, calls: int, calls_per_s: float
) -> None:
    stages, budget = await stages_of(*[FakeGenerator(DOWN) for _ in range(8)])
    await outage(stages, budget.clock, calls=calls, calls_per_s=calls_per_s)
    assert calls + budget.taken <= allowed(calls, calls / calls_per_s)
    assert budget.refused


async def test_without_a_budget_they_would_not(stages_of: Open) -> None:
    stages, budget = await stages_of(*[FakeGenerator(DOWN) for _ in range(8)], retries=Unbudgeted)
    await outage(stages, budget.clock, calls=300, calls_per_s=100)
    assert 300 + budget.taken == 8 * 300 > allowed(300, 3)


async def test_one_replica_of_many_that_fails_is_made_up_for_by_the_others(stages_of: Open) -> None:
    stages, budget = await stages_of(FakeGenerator(DOWN), *[FakeGenerator(OK) for _ in range(3)])
    for _ in range(500):
        await stages.pipeline.run(a_call(), FakeClient())
        budget.clock.advance(0.001)
    assert budget.refused == 0


async def test_all_that_a_replica_drops_as_it_dies_goes_to_another(stages_of: Open) -> None:
    cut = asyncio.Event()

    class Dying(FakeGenerator):
        def exchange(self, request: Any) -> Any:
            return dropped(self, request)

    def dropped(engine: FakeGenerator, request: Any) -> Any:
        inner = FakeGenerator.exchange(engine, request)

        class Held:
            async def __aenter__(self) -> Any:
                await cut.wait()
                return await inner.__aenter__()

            async def __aexit__(self, *error: Any) -> Any:
                return await inner.__aexit__(*error)

        return Held()

    stages, budget = await stages_of(Dying(DOWN), FakeGenerator(OK))
    budget.clock.advance(60)
    second = stages.replicas["chat"][1]
    second.running = 100  # so that the first is asked
    calls = [asyncio.create_task(stages.pipeline.run(a_call(), FakeClient())) for _ in range(90)]
    while stages.replicas["chat"][0].running < 90:
        await asyncio.sleep(0)
    cut.set()
    await asyncio.gather(*calls)
    second.running -= 100
    assert (budget.taken, budget.refused) == (90, 0)


async def test_a_call_that_goes_well_spends_nothing(stages_of: Open) -> None:
    stages, budget = await stages_of(FakeGenerator(OK), FakeGenerator(OK))
    await stages.pipeline.run(a_call(), FakeClient())
    assert (budget.calls, budget.taken, budget.refused) == (1, 0, 0)


async def test_a_call_refused_a_retry_names_only_whom_it_asked(stages_of: Open) -> None:
    stages, _ = await stages_of(*[FakeGenerator(DOWN) for _ in range(4)])
    for _ in range(5):
        with pytest.raises(EngineFailed) as failed:
            await stages.pipeline.run(a_call(), FakeClient())
    assert failed.value.message.count("chat-") == 1
    assert failed.value.retryable and failed.value.retry_after_s
    assert (await stages.records())[-1].outcome == "failed"


@given(st.lists(st.tuples(st.integers(0, 50), st.floats(0, 30)), max_size=60))
def test_in_any_run_of_calls_and_pauses_no_more_is_given_than_was_earned(steps: list[tuple[int, float]]) -> None:
    clock = FakeClock()
    budget = Retries(clock=clock)
    began_s = clock.now_s()
    for calls, pause_s in steps:
        for _ in range(calls):
            budget.calls += 1
            budget.take()
        clock.advance(pause_s)
    elapsed_s = clock.now_s() - began_s
    assert budget.calls + budget.taken <= allowed(budget.calls, elapsed_s) + 1e-6


def test_what_is_saved_is_bounded_and_is_enough_for_a_replica_s_calls() -> None:
    clock = FakeClock()
    budget = Retries(clock=clock)
    budget.calls = 10_000_000
    clock.advance(86_400)
    assert sum(budget.take() for _ in range(1_000)) == RETRIES_KEPT == 100


# ---- an engine that takes a call and is silent ---------------------------------------------------------------


async def test_a_silent_engine_is_passed_over(stages_of: Open) -> None:
    stages, _ = await stages_of(FakeGenerator(Silent("nothing came")), FakeGenerator(OK))
    call = a_call()
    await stages.pipeline.run(call, FakeClient())
    assert call.replica == "chat-1"
    assert stages.replicas["chat"][0].failures == 1


async def test_if_the_last_one_is_silent_too_it_is_a_504_worth_a_retry(stages_of: Open) -> None:
    stages, _ = await stages_of(FakeGenerator(DOWN), FakeGenerator(Silent("nothing came")))
    with pytest.raises(EngineTimeout) as failed:
        await stages.pipeline.run(a_call(), FakeClient())
    assert (failed.value.status, failed.value.code, failed.value.retryable) == (504, "engine_timeout", True)
    assert "60 s" in failed.value.message


@pytest.mark.parametrize(
    ("call", "bounded"),
    [
        ({"stream": True}, True),
        ({"route": "/v1/embeddings"}, True),
        ({"stream": False}, False),  # it begins when it is complete: a long answer is no silent engine
    ],
)
async def test_only_what_must_begin_soon_is_bounded_before_its_first_byte(
    stages_of: Open, call: dict[str, Any], bounded: bool
) -> None:
    asked: list[Any] = []

    class Engine(FakeGenerator):
        def exchange(self, request: Any) -> Any:
            asked.append(request)
            return super().exchange(request)

    answer = events(b"data: [DONE]\n\n") if call.get("stream") else OK
    stages, budget = await stages_of(Engine(answer))
    await stages.pipeline.run(a_call(**call), FakeClient())
    assert (asked[0].begin_by_s == budget.clock.now_s() + 60) is bounded
    assert (asked[0].begin_by_s == float("inf")) is not bounded


# ---- deadlines ----------------------------------------------------------------------------------------------


async def test_what_is_left_of_the_deadline_goes_along_and_shrinks(stages_of: Open) -> None:
    class Late(FakeGenerator):
        def exchange(self, request: Any) -> Any:
            budget.clock.advance(0.25)
            return super().exchange(request)

    first, second = Late(DOWN), FakeGenerator(OK)
    stages, budget = await stages_of(first, second)
    await stages.pipeline.run(a_call(deadline_s=budget.clock.now_s() + 2), FakeClient())
    left = [dict(engine.got_headers)[b"x-envoy-expected-rq-timeout-ms"] for engine in (first, second)]
    assert left == [b"2000", b"1750"]


async def test_nothing_is_begun_once_the_time_is_up(stages_of: Open) -> None:
    engine = FakeGenerator(OK)
    stages, budget = await stages_of(engine)
    with pytest.raises(DeadlineExceeded):
        await stages.pipeline.run(a_call(deadline_s=budget.clock.now_s()), FakeClient())
    assert not engine.begun.is_set()
    (record,) = await stages.records()
    assert (record.outcome, record.code, record.replica) == ("refused", "deadline_exceeded", "")


async def test_nor_tried_again(stages_of: Open) -> None:
    class Late(FakeGenerator):
        def exchange(self, request: Any) -> Any:
            budget.clock.advance(2)
            return super().exchange(request)

    second = FakeGenerator(OK)
    stages, budget = await stages_of(Late(DOWN), second)
    with pytest.raises(DeadlineExceeded):
        await stages.pipeline.run(a_call(deadline_s=budget.clock.now_s() + 1), FakeClient())
    assert not second.begun.is_set()
