"""Money, through the doors as they are served: a language model and a classifier with prices, one tenant's budget, and
a clock that is moved to midnight."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from gateway.app import Reservation
from gateway.budget import DAY_S
from gateway.call import Bounds, Outcome
from gateway.edge.catalogue import Catalogue
from gateway.edge.front import Front
from gateway.edge.grpc import Grpc
from gateway.edge.inference import Inference
from gateway.edge.kserve import KServe
from gateway.edge.openai import OpenAI
from gateway.edge.server import Server
from gateway.money import NANO_A_UNIT
from gateway.price import Prices
from runtimes.clock import SystemClock
from runtimes.contract import Broken, InferReply
from runtimes.dialect.openai import TRANSLATIONS
from tests.fakes import FakeClock, FakeGenerator, FakePredictor, Script, Stages, a_principal, events, let_stand, limits

MILLI = NANO_A_UNIT // 1_000
#: 10 milli-units of input and 20 of output.
ANSWER = (
    b'{"choices":[],"usage":{"prompt_tokens":10,"completion_tokens":5,"prompt_tokens_details":{"cached_tokens":4}}}'
)
CHAT_PRICE = {"million_tokens_in": 1_000, "million_tokens_out": 4_000, "million_tokens_cached": 500}
PRICES = {
    "chat": Prices(**{name: Decimal(price) for name, price in CHAT_PRICE.items()}).reckoned("EUR"),
    "broken": Prices(million_tokens_out=Decimal(1_000)).reckoned("EUR"),
    "intent": Prices(thousand_items=Decimal(2), call=Decimal("0.001")).reckoned("EUR"),
}
CHAT_COST = 6 * MILLI + 2 * MILLI + 20 * MILLI
INTENT_COST = 3 * MILLI
NOON_S = datetime(2026, 11, 25, 12, tzinfo=UTC).timestamp()
BROKEN_OFF = events(b'data: {"choices":[{"index":0,"delta":{"content":"abcdefgh"}}]}\n\n', Broken("it broke off"))


class Site:
    def __init__(self, stages: Stages, clock: FakeClock, http: httpx.AsyncClient, channel: grpc.aio.Channel) -> None:
        self.stages = stages
        self.clock = clock
        self.http = http
        self.inference: Any = service_pb2_grpc.GRPCInferenceServiceStub(channel)

    async def chat(self, model: str = "chat", **given: Any) -> httpx.Response:
        body = {"model": model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5} | given
        return await self.http.post("/v1/chat/completions", json=body)

    async def classify(self) -> httpx.Response:
        return await self.http.post("/v1/classify", json={"model": "intent", "input": "Where is my parcel?"})

    async def infer(self) -> Any:
        text = {"name": "text", "datatype": "BYTES", "shape": [1]}
        request = service_pb2.ModelInferRequest(
            model_name="intent", inputs=[text], raw_input_contents=[b"\5\0\0\0hello"]
        )
        return await self.inference.ModelInfer(request, metadata=(("authorization", "Bearer good"),))

    async def costs(self) -> list[int]:
        return [record.cost_nano for record in await self.stages.records()]


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    clock = FakeClock(wall_s=NOON_S)
    scores = InferReply({"scores": np.array([[0.25, 0.75]], np.float32)}, 3)
    models: dict[str, list[Any]] = {
        "chat": [FakeGenerator(Script([ANSWER]))],
        "free": [FakeGenerator(Script([ANSWER]))],
        "broken": [FakeGenerator(BROKEN_OFF)],
        "intent": [FakePredictor(task="classify", answer=scores, labels=("a", "b"))],
    }
    keys = {"good": a_principal(tenant_limits=limits(day=250 * MILLI, month=300 * MILLI))}
    async with Stages(tmp_path, clock, models, keys=keys, prices=PRICES) as stages:
        pipeline, bounds = stages.pipeline, Bounds()
        catalogue = Catalogue(pipeline=pipeline, version="0")
        inference = Inference(pipeline=pipeline, catalogue=catalogue, clock=clock)
        oip = {"pipeline": pipeline, "catalogue": catalogue, "inference": inference, "bounds": bounds, "clock": clock}
        front = Front(
            openai=OpenAI(pipeline=pipeline, bounds=bounds, translations=TRANSLATIONS, clock=clock),
            kserve=KServe(**oip),
        )
        # Connections end by real time, as they came.
        server = Server(door=front, bounds=bounds, clock=SystemClock())
        door = Grpc(**(oip | {"clock": SystemClock()}))
        with socket.create_server(("127.0.0.1", 0)) as listening, Reservation("127.0.0.1:0", "grpc") as kept:
            async with (
                server.serving(listening),
                door.serving(kept.address),
                grpc.aio.insecure_channel(kept.address) as channel,
                httpx.AsyncClient(
                    base_url=f"http://127.0.0.1:{listening.getsockname()[1]}",
                    headers={"authorization": "Bearer good"},
                    trust_env=False,
                ) as http,
            ):
                yield Site(stages, clock, http, channel)
        assert stages.at_rest()
        for holder in pipeline.quota.holders.values():
            assert holder.purse.day_reserved_nano == holder.purse.month_reserved_nano == 0


async def test_each_call_costs_what_it_used_at_the_price_of_its_model(site: Site) -> None:
    assert (await site.chat()).status_code == 200
    assert (await site.classify()).status_code == 200
    await site.infer()
    assert (await site.chat("free")).status_code == 200
    assert sorted(await site.costs()) == [0, INTENT_COST, INTENT_COST, CHAT_COST]


async def test_an_answer_says_nothing_of_money(site: Site) -> None:
    answer = await site.chat()
    assert answer.content == ANSWER
    assert not [name for name in answer.headers if "cost" in name or "budget" in name]


async def test_an_aliass_call_is_priced_as_the_model_that_served_it(site: Site) -> None:
    let_stand(site.stages, "assistant", {"chat": 1})
    assert (await site.chat("assistant")).status_code == 200
    [record] = await site.stages.records()
    assert (record.model, record.cost_nano) == ("chat", CHAT_COST)


async def test_a_budget_that_is_spent_amid_the_day_is_there_again_at_midnight(site: Site) -> None:
    while (answer := await site.chat()).status_code == 200:
        pass
    spent_nano = sum(await site.costs())
    assert 250 * MILLI - 2 * CHAT_COST < spent_nano <= 250 * MILLI
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["code"]) == (429, "insufficient_quota", "insufficient_quota")
    assert f"has spent 0.{spent_nano // MILLI} of its budget of 0.25 EUR a day" in error["message"]
    assert "renews at 2026-11-26 00:00 UTC" in error["message"]
    assert (answer.headers["x-should-retry"], answer.headers["retry-after"]) == ("false", "43200")

    with pytest.raises(grpc.aio.AioRpcError) as refused:
        while True:
            await site.infer()
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "EUR a day" in (refused.value.details() or "")
    assert dict(refused.value.trailing_metadata())["grpc-retry-pushback-ms"] == "-1"
    assert 250 * MILLI - INTENT_COST < sum(await site.costs()) <= 250 * MILLI
    assert (await site.chat("free")).status_code == 200, "what costs nothing is nobody's to refuse"

    site.clock.advance(DAY_S / 2 - 1)
    assert (await site.classify()).status_code == 429
    site.clock.advance(1)
    assert (await site.classify()).status_code == 200
    while (answer := await site.chat()).status_code == 200:
        pass
    assert "EUR a month" in answer.json()["error"]["message"]
    assert "renews at 2026-12-01 00:00 UTC" in answer.json()["error"]["message"]
    assert sum(await site.costs()) <= 300 * MILLI


async def test_a_refusal_costs_nothing_and_is_on_record(site: Site) -> None:
    assert (await site.chat(max_tokens=10**6)).status_code == 429
    [record] = await site.stages.records()
    assert (record.outcome, record.code, record.cost_nano) == (Outcome.refused, "request_exceeds_limit", 0)


async def test_a_stream_that_breaks_off_costs_what_was_delivered(site: Site) -> None:
    answer = await site.chat("broken", stream=True)
    assert "error" in answer.text
    [record] = await site.stages.records()
    assert record.outcome is Outcome.failed
    assert record.tokens_out > 0
    assert record.cost_nano == record.tokens_out * MILLI


async def test_what_an_engine_refuses_costs_nothing(site: Site) -> None:
    site.stages.replicas["chat"][0].runtime._script[:] = [Script([b'{"error":{"message":"no"}}'], status=400)]
    assert (await site.chat()).status_code == 400
    assert await site.costs() == [0]
