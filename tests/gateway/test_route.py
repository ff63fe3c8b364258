"""From a model's name to an answer that has begun."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from gateway.call import Call
from gateway.errors import (
    BadRequest,
    DeadlineExceeded,
    EngineFailed,
    EngineUnavailable,
    GatewayError,
    ModelNotFound,
    Unsupported,
)
from gateway.replica import FAILURES_MAX, State
from runtimes.contract import (
    Broken,
    Exchange,
    Generator,
    InferReply,
    InferRequest,
    Invalid,
    Overloaded,
    Predictor,
    Reply,
    RuntimeFault,
    Unavailable,
)
from tests.fakes import (
    FakeClient,
    FakeClock,
    FakeGenerator,
    FakePredictor,
    Script,
    Stages,
    a_call,
    a_principal,
    events,
    until,
)

OK = Script([b'{"usage":{"prompt_tokens":1,"completion_tokens":1}}'])
Open = Callable[..., Any]


@pytest.fixture
async def stages_of(tmp_path: Path) -> AsyncIterator[Open]:
    opened: list[Stages] = []

    async def make(*runtimes: Generator | Predictor, **models: list[Generator | Predictor]) -> Stages:
        stages = Stages(tmp_path, FakeClock(), {"chat": list(runtimes), **models}, slots=100)
        opened.append(await stages.__aenter__())
        return stages

    yield make
    for stages in opened:
        assert stages.at_rest()
        await stages.__aexit__()


async def ask(stages: Stages, call: Call | None = None) -> str:
    """The name of the replica that answered."""
    call = call or a_call()
    await stages.pipeline.run(call, FakeClient())
    return call.replica


@pytest.mark.parametrize(
    "fault",
    [Unavailable("reset"), Overloaded("full"), Broken("cut"), Script([b"oops"], status=500), Script([], status=503)],
)
async def test_a_replica_that_cannot_answer_is_passed_over(stages_of: Open, fault: Script | RuntimeFault) -> None:
    stages = await stages_of(FakeGenerator(fault), FakeGenerator(OK))
    assert await ask(stages) == "chat-1"


async def test_a_replica_that_was_passed_over_is_let_go_at_once(stages_of: Open) -> None:
    first, second = FakeGenerator(Script([b"oops"], status=500)), FakeGenerator(Script([asyncio.Event()]))
    stages = await stages_of(first, second)
    asking = asyncio.create_task(ask(stages))
    await second.begun.wait()
    assert (first.load().running, stages.replicas["chat"][0].running) == (0, 0)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)


class Slow(FakeGenerator):
    """One that fails after a minute."""

    clock: FakeClock

    @asynccontextmanager
    async def exchange(self, request: Exchange) -> AsyncIterator[Reply]:
        self.clock.advance(60.0)
        async with super().exchange(request) as reply:
            yield reply


async def test_who_has_no_time_left_for_another_replica_pays_for_none(stages_of: Open) -> None:
    first, second = Slow(Unavailable("reset")), FakeGenerator(OK)
    stages = await stages_of(first, second)
    first.clock = clock = stages.replicas["chat"][0].clock
    with pytest.raises(DeadlineExceeded):
        await ask(stages, a_call(deadline_s=clock.now_s() + 30.0))
    (record,) = await stages.records()
    assert (record.replica, record.tokens_in, record.estimated) == ("", 0, False)
    assert not second.begun.is_set()


async def test_nothing_is_retried_after_the_first_byte(stages_of: Open) -> None:
    second = FakeGenerator(OK)
    stages = await stages_of(FakeGenerator(events(b'data: {"choices":[{}]}\n\n', Broken("cut"))), second)
    with pytest.raises(EngineFailed):
        await ask(stages, a_call(stream=True))
    assert not second.begun.is_set()


async def test_the_last_engine_s_own_words_are_kept(stages_of: Open) -> None:
    said = {"error": {"message": "out of memory", "type": "oom", "param": None, "code": 500}}
    stages = await stages_of(FakeGenerator(Script([json.dumps(said).encode()], status=500)))
    with pytest.raises(EngineFailed) as failed:
        await ask(stages)
    fault = failed.value
    assert (fault.status, fault.message, fault.type, fault.code) == (500, "out of memory", "oom", "500")


async def test_no_detail_of_the_upstream_reaches_the_client(stages_of: Open) -> None:
    stages = await stages_of(FakeGenerator(Unavailable("unix:/var/state/engine.sock: refused")))
    with pytest.raises(EngineFailed) as failed:
        await ask(stages)
    assert "/var" not in failed.value.message
    assert "chat-0" in failed.value.message


@pytest.mark.parametrize("status", [401, 403, 407, 301, 307])
async def test_a_quarrel_between_gateway_and_upstream_is_not_the_client_s_fault(stages_of: Open, status: int) -> None:
    stages = await stages_of(FakeGenerator(Script([b'{"error":{"message":"bad key"}}'], status=status)))
    with pytest.raises(EngineFailed) as failed:
        await ask(stages)
    assert failed.value.status == 502


@pytest.mark.parametrize("status", [400, 404, 413, 422, 429])
async def test_what_clients_do_wrong_never_ejects(stages_of: Open, status: int) -> None:
    stages = await stages_of(FakeGenerator(Script([b"no"], status=status)))
    for _ in range(3 * FAILURES_MAX):
        with pytest.raises(GatewayError) as refused:
            await ask(stages)
        assert refused.value.status == status
    assert stages.replicas["chat"][0].failures == 0


async def test_a_client_s_error_amid_a_stream_never_ejects(stages_of: Open) -> None:
    bad = b'data: {"error":{"message":"bad grammar","type":"BadRequestError","code":400}}\n\n'
    stages = await stages_of(FakeGenerator(events(b'data: {"choices":[{}]}\n\n', bad)))
    for _ in range(3 * FAILURES_MAX):
        with pytest.raises(BadRequest):
            await ask(stages, a_call(stream=True))
    assert stages.replicas["chat"][0].trusted()


@pytest.mark.parametrize(
    "fault",
    [
        Unavailable("reset"),
        Script([b"oops"], status=500),
        Script([b"{", Broken("cut")]),
        events(b'data: {"choices":[{}]}\n\n', Broken("cut")),
        events(b'data: {"choices":[{}]}\n\n'),
    ],
)
async def test_repeated_faults_eject(stages_of: Open, fault: Script | RuntimeFault) -> None:
    stages = await stages_of(FakeGenerator(fault))
    for _ in range(FAILURES_MAX):
        with pytest.raises(EngineFailed):
            await ask(stages)
    assert not stages.replicas["chat"][0].trusted()


async def test_an_ejected_replica_is_left_alone_while_there_is_another(stages_of: Open) -> None:
    stages = await stages_of(FakeGenerator(OK), FakeGenerator(OK))
    for _ in range(FAILURES_MAX):
        stages.replicas["chat"][0].failed("reset")
    assert {await ask(stages) for _ in range(10)} == {"chat-1"}


async def test_the_only_replica_is_used_though_it_is_ejected(stages_of: Open) -> None:
    stages = await stages_of(FakeGenerator(OK))
    for _ in range(FAILURES_MAX):
        stages.replicas["chat"][0].failed("reset")
    assert await ask(stages) == "chat-0"
    assert stages.replicas["chat"][0].trusted()


async def test_the_least_busy_replica_is_asked_even_before_any_has_answered(stages_of: Open) -> None:
    pause = asyncio.Event()
    slow = Script([pause, b"{}"])
    stages = await stages_of(FakeGenerator(slow), FakeGenerator(slow))
    calls = [a_call() for _ in range(10)]
    tasks = [asyncio.create_task(ask(stages, call)) for call in calls]
    await until(lambda: all(call.replica for call in calls))
    assert [replica.running for replica in stages.replicas["chat"]] == [5, 5]
    pause.set()
    await asyncio.gather(*tasks)


async def test_a_model_without_a_ready_replica_is_unavailable(stages_of: Open) -> None:
    stages = await stages_of(FakeGenerator(OK))
    stages.replicas["chat"][0].state = State.down
    stages.replicas["chat"][0].reason = "see /var/log/engine.log"
    with pytest.raises(EngineUnavailable) as refused:
        await ask(stages)
    assert refused.value.retry_after_s
    assert "/var" not in refused.value.message
    # A remote engine that is down is started by nobody here.
    assert refused.value.message == "No engine of model 'chat' is up (chat-0 is down); retry later."


async def test_an_unknown_model_s_404_names_only_what_the_key_may_use(stages_of: Open) -> None:
    stages = await stages_of(FakeGenerator(OK), secret=[FakeGenerator(OK)], **{"chat-mini": [FakeGenerator(OK)]})
    with pytest.raises(ModelNotFound) as refused:
        await ask(stages, a_call(a_principal(models=("chat*",)), model="gpt-7"))
    assert "chat, chat-mini" in refused.value.message
    assert "secret" not in refused.value.message
    assert refused.value.param == "model"


class Verdicts:
    """A Translation that takes everything but `bad`."""

    tasks: ClassVar = frozenset({"classify"})
    request = InferRequest({"text": np.array(["a", "b"], object)}, deadline_s=1e9)

    @classmethod
    def parse(cls, body: bytes, **_: Any) -> "Verdicts":
        if b"bad" in body:
            raise Invalid("`input` is bad.", param="input")
        return cls()

    def answer(self, reply: InferReply, **_: Any) -> bytes:
        return b'{"data":[]}'


def classify(**given: Any) -> Call:
    return a_call(route="/v1/classify", translation=Verdicts, tokens_out_max=0, **given)


async def test_a_predictor_answers_its_own_route(stages_of: Open) -> None:
    stages = await stages_of(FakePredictor(task="classify", answer=InferReply({}, tokens_in=9)))
    assert await ask(stages, classify()) == "chat-0"
    (record,) = await stages.records()
    assert (record.tokens_in, record.tokens_out, record.items, record.estimated) == (9, 0, 2, False)


@pytest.mark.parametrize(
    ("answer", "body"), [(Invalid("too long", param="input"), b"{}"), (InferReply({}, tokens_in=1), b'"bad"')]
)
async def test_input_a_predictor_can_never_take_is_a_400_that_costs_nothing(
    stages_of: Open, answer: InferReply | RuntimeFault, body: bytes
) -> None:
    stages = await stages_of(FakePredictor(task="classify", answer=answer))
    with pytest.raises(BadRequest) as refused:
        await ask(stages, classify(body=body))
    assert (refused.value.status, refused.value.param) == (400, "input")
    assert stages.replicas["chat"][0].failures == 0
    (record,) = await stages.records()
    assert (record.outcome, record.tokens_in) == ("rejected", 0)


async def test_a_route_the_model_does_not_answer_is_told_by_the_one_it_does(stages_of: Open) -> None:
    stages = await stages_of(FakePredictor(task="embed", answer=InferReply({}, tokens_in=1)), text=[FakeGenerator(OK)])
    for call in (a_call(), classify()):
        with pytest.raises(Unsupported, match="/v1/embeddings"):
            await ask(stages, call)
    with pytest.raises(Unsupported, match="answers /v1/chat/completions, "):
        await ask(stages, classify(model="text"))


async def test_the_engine_gets_its_own_name_for_the_model_and_everything_else_as_it_came(stages_of: Open) -> None:
    engine = FakeGenerator(OK, upstream_model="Qwen/Qwen3-0.6B")
    stages = await stages_of(engine)
    body = b'{"model":"chat","x":1e5,"guided":{"a" : [1,2]},"messages":[]}'
    await ask(stages, a_call(body=body))
    assert engine.got == body.replace(b'"chat"', b'"Qwen/Qwen3-0.6B"')


async def test_without_a_need_not_a_byte_is_changed(stages_of: Open) -> None:
    engine = FakeGenerator(OK)
    stages = await stages_of(engine)
    body = b'{"model": "chat",  "temperature":0.10, "unknown": null}'
    await ask(stages, a_call(body=body))
    assert engine.got == body


@pytest.mark.parametrize("asked", [b"", b',"stream_options":null', b',"stream_options":{"include_usage":false,"x":1}'])
async def test_a_stream_is_always_asked_for_usage(stages_of: Open, asked: bytes) -> None:
    engine = FakeGenerator(events(b"data: [DONE]\n\n"), meters_each_chunk=True)
    stages = await stages_of(engine)
    await ask(stages, a_call(stream=True, body=b'{"model":"chat","stream":true' + asked + b"}"))
    options = json.loads(engine.got)["stream_options"]
    assert options == {"include_usage": True, "continuous_usage_stats": True} | ({"x": 1} if b"x" in asked else {})


async def test_an_engine_without_the_extension_is_not_asked_for_it(stages_of: Open) -> None:
    engine = FakeGenerator(events(b"data: [DONE]\n\n"))
    stages = await stages_of(engine)
    body = b'{"model":"chat","stream":true,"stream_options":{"continuous_usage_stats":true}}'
    await ask(stages, a_call(stream=True, body=body))
    assert json.loads(engine.got)["stream_options"] == {"include_usage": True}
