"""Exactly one record of every call, whatever becomes of it."""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from gateway.call import Call, Outcome, Record
from gateway.errors import (
    Draining,
    EngineFailed,
    EngineUnavailable,
    Forbidden,
    GatewayError,
    JournalFull,
    ModelNotFound,
    QueueFull,
    QuotaExceeded,
    Unsupported,
)
from runtimes.clock import SystemClock
from runtimes.contract import Broken, Expired, Overloaded, RuntimeFault, Unavailable
from tests.fakes import (
    FakeClient,
    FakeGenerator,
    Frame,
    Script,
    Stages,
    a_call,
    a_principal,
    events,
    limits,
    until,
)

WHOLE = b'{"choices":[{}],"usage":{"prompt_tokens":7,"completion_tokens":3}}'
CHUNK = b'data: {"choices":[{"delta":{"content":"hi"}}],"usage":{"prompt_tokens":7,"completion_tokens":1}}\n\n'
DONE = b"data: [DONE]\n\n"
REFUSED = Script([b'{"error":{"message":"too long","code":"context_length_exceeded"}}'], status=400)

Open = Callable[..., Any]


@pytest.fixture
async def stages_of(tmp_path: Path) -> AsyncIterator[Callable[..., Any]]:
    opened: list[Stages] = []

    async def make(*script: Script | RuntimeFault, **given: Any) -> Stages:
        stages = Stages(tmp_path, SystemClock(), {"chat": [FakeGenerator(*script)]}, **given)
        opened.append(await stages.__aenter__())
        return stages

    yield make
    for stages in opened:
        assert stages.at_rest()
        await stages.__aexit__()


async def consume(stages: Stages, call: Call) -> None:
    """As an edge would."""
    await stages.pipeline.run(call, FakeClient())


async def only(stages: Stages) -> Record:
    (record,) = await stages.records()
    return record


def ending(record: Record) -> tuple[Outcome, int, str]:
    return record.outcome, record.status, record.code


async def test_a_served_call_is_recorded_with_what_it_used(stages_of: Open) -> None:
    stages = await stages_of(Script([WHOLE]))
    call = a_call()
    await consume(stages, call)
    record = await only(stages)
    assert ending(record) == (Outcome.served, 200, "")
    assert (record.id, record.tenant, record.key_id, record.model) == (call.id, "acme", "k1", "chat")
    assert (record.replica, record.tokens_in, record.tokens_out, record.estimated) == ("chat-0", 7, 3, False)


async def test_a_served_stream_is_recorded_before_its_closing_event_is_out(stages_of: Open) -> None:
    stages = await stages_of(events(CHUNK, DONE))
    answer = await stages.pipeline.run(a_call(stream=True), FakeClient())
    record = await only(stages)
    assert answer.body == DONE
    assert ending(record) == (Outcome.served, 200, "")
    assert (record.tokens_in, record.tokens_out) == (7, 1)


@pytest.mark.parametrize(
    ("script", "error", "outcome", "status", "code"),
    [
        (REFUSED, GatewayError, Outcome.rejected, 400, "context_length_exceeded"),
        (Script([b"no"], status=429), GatewayError, Outcome.rejected, 429, "invalid_request"),
        (Script([b"oops"], status=500), EngineFailed, Outcome.failed, 500, "engine_failed"),
        (Unavailable("reset"), EngineFailed, Outcome.failed, 502, "engine_failed"),
        (Overloaded("full"), EngineFailed, Outcome.failed, 502, "engine_failed"),
        (Expired("late"), GatewayError, Outcome.failed, 504, "deadline_exceeded"),
        (Script([b"{", Broken("cut")]), EngineFailed, Outcome.failed, 502, "engine_failed"),
        (Script([b"{", Expired("late")]), GatewayError, Outcome.failed, 504, "deadline_exceeded"),
        (events(CHUNK, Broken("cut")), EngineFailed, Outcome.failed, 200, "engine_failed"),
        (events(CHUNK), EngineFailed, Outcome.failed, 200, "engine_failed"),
        (events(b'data: {"error":{"message":"x","code":500}}\n\n'), EngineFailed, Outcome.failed, 500, "500"),
        (events(b'data: {"error":{"message":"x","code":400}}\n\n'), GatewayError, Outcome.rejected, 400, "400"),
    ],
)
async def test_what_an_engine_refuses_or_fails_is_recorded(
    stages_of: Open,
    script: Script | RuntimeFault,
    error: type[GatewayError],
    outcome: Outcome,
    status: int,
    code: str,
) -> None:
    stages = await stages_of(script)
    with pytest.raises(error):
        await consume(stages, a_call(stream=True))
    assert ending(await only(stages)) == (outcome, status, code)


@pytest.mark.parametrize(
    ("call", "error", "status"),
    [
        (lambda: a_call(model="nope"), ModelNotFound, 404),
        (lambda: a_call(a_principal(models=("other",))), Forbidden, 403),
        (lambda: a_call(a_principal(key_limits=limits(rpm=0))), QuotaExceeded, 429),
        (lambda: a_call(route="/v1/classify"), Unsupported, 400),
    ],
)
async def test_what_the_gateway_refuses_is_recorded_without_a_replica(
    stages_of: Open, call: Callable[[], Call], error: type[GatewayError], status: int
) -> None:
    stages = await stages_of(Script([WHOLE]))
    with pytest.raises(error):
        await consume(stages, call())
    record = await only(stages)
    assert (record.outcome, record.status, record.replica) == (Outcome.refused, status, "")
    assert record.tokens_in + record.tokens_out == 0


async def test_a_model_that_is_down_is_recorded_as_failed(stages_of: Open) -> None:
    stages = await stages_of(Script([WHOLE]))
    stages.replicas["chat"][0].state = "down"
    with pytest.raises(EngineUnavailable):
        await consume(stages, a_call())
    assert ending(await only(stages)) == (Outcome.failed, 503, "engine_unavailable")


async def test_a_full_queue_is_recorded(stages_of: Open) -> None:
    stages = await stages_of(Script([asyncio.Event()]), slots=1, waiting_max=0)
    first = asyncio.create_task(consume(stages, a_call()))
    await stages.replicas["chat"][0].runtime.begun.wait()
    with pytest.raises(QueueFull):
        await consume(stages, a_call())
    assert ending(await only(stages)) == (Outcome.refused, 503, "queue_full")
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    assert len(await stages.records()) == 2


async def leave(stages: Stages, call: Call, when: asyncio.Event) -> Record:
    task = asyncio.create_task(consume(stages, call))
    await when.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    return await only(stages)


async def test_leaving_before_the_first_byte_is_recorded(stages_of: Open) -> None:
    stages = await stages_of(Script([asyncio.Event()]))
    call = a_call()
    record = await leave(stages, call, stages.replicas["chat"][0].runtime.begun)
    assert ending(record) == (Outcome.cancelled, 0, "client_left")
    # The engine had the prompt: the record says what the quota was charged for it.
    assert (record.tokens_in, record.tokens_out, record.estimated) == (call.tokens_in_estimate, 0, True)


async def test_leaving_while_in_line_is_recorded_without_a_replica(stages_of: Open) -> None:
    stages = await stages_of(Script([asyncio.Event()]), slots=1)
    first = asyncio.create_task(consume(stages, a_call()))
    await stages.replicas["chat"][0].runtime.begun.wait()
    second = asyncio.create_task(consume(stages, a_call()))
    await until(lambda: stages.lines["chat"].waiting > 0)
    second.cancel()
    await asyncio.gather(second, return_exceptions=True)
    record = await only(stages)
    assert (*ending(record), record.replica) == (Outcome.cancelled, 0, "client_left", "")
    assert (record.tokens_in, record.estimated) == (0, False)
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)


async def test_leaving_amid_a_stream_is_billed_for_what_was_delivered(stages_of: Open) -> None:
    more: list[Frame] = [CHUNK.replace(b'tokens":1', b'tokens":%d' % number) for number in (1, 2, 3)]
    stages = await stages_of(events(*more, asyncio.Event()))
    client = FakeClient()
    task = asyncio.create_task(stages.pipeline.run(a_call(stream=True), client))
    await until(lambda: len(client.parts) == 3)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    record = await only(stages)
    assert ending(record) == (Outcome.cancelled, 200, "client_left")
    assert (record.tokens_in, record.tokens_out, record.estimated) == (7, 3, False)


async def test_a_stream_cut_off_because_the_gateway_stops_is_no_client_that_left(stages_of: Open) -> None:
    stages = await stages_of(events(CHUNK, asyncio.Event()))
    client = FakeClient()
    task = asyncio.create_task(stages.pipeline.run(a_call(stream=True), client))
    await until(lambda: bool(client.parts))
    stages.pipeline.stopped = True
    task.cancel()
    with pytest.raises(Draining):
        await task
    assert ending(await only(stages)) == (Outcome.failed, 200, "draining")


async def test_nobody_pays_for_an_answer_that_had_not_begun_when_the_gateway_stopped(stages_of: Open) -> None:
    stages = await stages_of(Script([asyncio.Event()]))
    task = asyncio.create_task(consume(stages, a_call()))
    await stages.replicas["chat"][0].runtime.begun.wait()
    stages.pipeline.stopped = True
    task.cancel()
    with pytest.raises(Draining):
        await task
    record = await only(stages)
    assert ending(record) == (Outcome.failed, 503, "draining")
    assert (record.tokens_in, record.estimated) == (0, False)


async def test_a_fault_of_the_gateway_itself_is_recorded(stages_of: Open) -> None:
    stages = await stages_of(Script([ZeroDivisionError()]))
    with pytest.raises(ZeroDivisionError):
        await consume(stages, a_call())
    assert ending(await only(stages)) == (Outcome.failed, 500, "internal_error")


async def test_nothing_is_served_that_could_not_be_recorded(stages_of: Open) -> None:
    stages = await stages_of(Script([WHOLE]))
    stages.journal.unwritten += b" " * 5 * 1024 * 1024
    with pytest.raises(JournalFull):
        await consume(stages, a_call())
    assert not stages.replicas["chat"][0].runtime.begun.is_set()
    stages.journal.unwritten.clear()
