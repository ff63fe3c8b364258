"""A name that stands for several models."""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from gateway.alias import WEIGHT_MAX, Aliases
from gateway.call import Call
from gateway.errors import EngineUnavailable, Forbidden, ModelNotFound, Unsupported
from gateway.key import Unfit
from gateway.replica import FAILURES_MAX, State
from gateway.sqlite import SqliteStore
from runtimes.contract import Generator, Predictor, Unavailable
from tests.fakes import (
    FakeClient,
    FakeClock,
    FakeGenerator,
    FakePredictor,
    Script,
    Stages,
    a_call,
    a_principal,
    let_stand,
)

OK = Script([b'{"usage":{"prompt_tokens":3,"completion_tokens":2}}'])
Open = Callable[..., Any]


@pytest.fixture
async def stages_of(tmp_path: Path) -> AsyncIterator[Open]:
    """A gateway with these models, and the alias `chat` that stands for them."""
    opened: list[Stages] = []

    async def make(weights: dict[str, int], **models: list[Generator | Predictor]) -> Stages:
        stages = Stages(tmp_path, FakeClock(), models, slots=100)
        opened.append(await stages.__aenter__())
        let_stand(stages, "chat", weights)
        return stages

    yield make
    for stages in opened:
        assert stages.at_rest()
        await stages.__aexit__()


def found(stages: Stages, calls: int, **given: Any) -> Counter[str]:
    """What so many calls of the alias were sent to."""
    return Counter(stages.pipeline.route.find(a_call(**given)).name for _ in range(calls))


async def ask(stages: Stages, call: Call | None = None) -> Call:
    call = call or a_call()
    await stages.pipeline.run(call, FakeClient())
    return call


async def test_calls_are_shared_by_weight(stages_of: Open) -> None:
    stages = await stages_of(
        {"a": 80, "b": 20, "c": 0}, a=[FakeGenerator(OK)], b=[FakeGenerator(OK)], c=[FakeGenerator(OK)]
    )
    shares = found(stages, 10_000)
    assert abs(shares["a"] - 8_000) < 8 * 40, "eight standard deviations"
    assert shares["a"] + shares["b"] == 10_000


async def test_who_calls_in_a_rhythm_meets_the_same_mix(stages_of: Open) -> None:
    stages = await stages_of({"a": 1, "b": 1}, a=[FakeGenerator(OK)], b=[FakeGenerator(OK)])
    every_other = [stages.pipeline.route.find(a_call()).name for _ in range(2_000)][::2]
    assert abs(every_other.count("a") - 500) < 8 * 16


async def test_a_model_that_is_down_is_left_to_the_others(stages_of: Open) -> None:
    stages = await stages_of({"a": 99, "b": 1}, a=[FakeGenerator(OK), FakeGenerator(OK)], b=[FakeGenerator(OK)])
    stages.replicas["a"][0].state = State.down
    assert found(stages, 100)["a"] > 0
    stages.replicas["a"][1].state = State.down
    assert found(stages, 100) == {"b": 100}


async def test_a_model_that_keeps_failing_is_left_to_the_others_for_a_while(stages_of: Open) -> None:
    stages = await stages_of({"a": 99, "b": 1}, a=[FakeGenerator(OK)], b=[FakeGenerator(OK)])
    for _ in range(FAILURES_MAX):
        stages.replicas["a"][0].failed("reset")
    assert found(stages, 100) == {"b": 100}
    stages.replicas["b"][0].state = State.down
    assert found(stages, 100) == {"a": 100}


async def test_only_models_that_have_the_route_are_asked(stages_of: Open) -> None:
    classifier = FakePredictor(task="classify", answer=Unavailable("it is never asked"))
    stages = await stages_of({"a": 99, "b": 1}, a=[classifier], b=[FakeGenerator(OK)])
    assert found(stages, 100) == {"b": 100}


async def test_where_none_can_answer_one_says_why(stages_of: Open) -> None:
    stages = await stages_of({"a": 1, "b": 0}, a=[FakeGenerator(OK, routes=frozenset())], b=[FakeGenerator(OK)])
    with pytest.raises(Unsupported, match="'a'"):
        await ask(stages)
    stages.replicas["a"][0].state = State.down
    with pytest.raises(EngineUnavailable, match="'a'"):
        await ask(stages)


async def test_an_engine_is_asked_by_its_own_name_for_the_model(stages_of: Open) -> None:
    engine = FakeGenerator(OK)
    stages = await stages_of({"a": 1}, a=[engine])
    await ask(stages, a_call(body=b'{"model":"chat","messages":[],"extra":{"x":1.50}}'))
    assert json.loads(engine.got) == {"model": "a", "messages": [], "extra": {"x": 1.5}}
    assert b"1.50" in engine.got


async def test_the_record_and_the_metrics_are_the_models_that_answered(stages_of: Open) -> None:
    stages = await stages_of({"a": 1}, a=[FakeGenerator(OK)])
    call = await ask(stages)
    [record] = await stages.records()
    assert (record.id, record.model, record.replica) == (call.id, "a", "a-0")
    assert (record.tokens_in, record.tokens_out) == (3, 2)
    assert sum(stages.pipeline.trace.metrics.models["a"].calls.values()) == 1


async def test_who_may_use_the_alias_needs_no_right_to_its_models(stages_of: Open) -> None:
    stages = await stages_of({"a": 1}, a=[FakeGenerator(OK)])
    assert (await ask(stages, a_call(a_principal(models=("chat",))))).replica == "a-0"
    with pytest.raises(Forbidden):
        await ask(stages, a_call(a_principal(models=("a",))))
    with pytest.raises(Forbidden):
        await ask(stages, a_call(a_principal(models=("chat",)), model="a"))


async def test_an_unknown_name_is_told_the_aliases_too(stages_of: Open) -> None:
    stages = await stages_of({"a": 1}, a=[FakeGenerator(OK)])
    with pytest.raises(ModelNotFound, match="may use: a, chat"):
        await ask(stages, a_call(model="nothing"))


async def test_a_call_under_way_stays_with_its_model(stages_of: Open) -> None:
    go_on = asyncio.Event()
    engine = FakeGenerator(Script([go_on, *OK.frames]))
    stages = await stages_of({"a": 1}, a=[engine], b=[FakeGenerator(OK)])
    under_way = asyncio.create_task(ask(stages))
    await engine.begun.wait()
    let_stand(stages, "chat", {"b": 1})
    assert (await ask(stages)).replica == "b-0"
    go_on.set()
    assert (await under_way).replica == "a-0"


async def test_a_model_of_that_name_comes_first(stages_of: Open, caplog: pytest.LogCaptureFixture) -> None:
    stages = await stages_of({"a": 1}, a=[FakeGenerator(OK)], chat=[FakeGenerator(OK)])
    assert found(stages, 10) == {"chat": 10}
    assert "alias chat is not used" in caplog.text


async def test_models_that_are_configured_no_more_have_no_share(
    stages_of: Open, caplog: pytest.LogCaptureFixture
) -> None:
    stages = await stages_of({"gone": 99, "a": 1}, a=[FakeGenerator(OK)])
    assert found(stages, 10) == {"a": 10}
    assert "alias chat: the configuration has no gone any more" in caplog.text
    let_stand(stages, "chat", {"gone": 1})
    with pytest.raises(ModelNotFound):
        await ask(stages)
    assert "alias chat is not used" in caplog.text


@pytest.mark.parametrize(
    ("name", "weights", "why"),
    [
        ("a", {"b": 1}, "'a' is a configured model's name"),
        ("both", {"a": 1, "c": 1}, "no model 'c'"),
        ("both", {"both": 1}, "no model 'both'"),
        ("both", {}, "a weight above 0"),
        ("both", {"a": 0, "b": 0}, "a weight above 0"),
        ("both", {"a": -1}, "can't be -1"),
        ("both", {"a": WEIGHT_MAX + 1}, "can't be"),
        ("", {"a": 1}, "no name"),
        ("two words", {"a": 1}, "no name"),
        ("x" * 129, {"a": 1}, "no name"),
    ],
)
async def test_what_can_be_no_alias_is_refused_and_told_why(
    tmp_path: Path, name: str, weights: dict[str, int], why: str
) -> None:
    store = SqliteStore(tmp_path / "headrace.db")
    await store.open()
    with pytest.raises(Unfit, match=why):
        await Aliases(store=store, models=["a", "b"], clock=FakeClock()).set(name, weights)
    assert await store.aliases() == []
    await store.aclose()
