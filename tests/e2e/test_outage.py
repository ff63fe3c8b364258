"""Engines that are down, hang, and come back: attempts are bounded, clients are told, and soon all is as before."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import openai
import pytest

from loadtests.emulator import Emulator, Fault, Faults, Kind, Pace, serving
from tests.e2e.raw import streaming
from tests.e2e.servers import GatewayProcess, Key
from tests.e2e.test_refusals import CHAT, require_refusal

CONFIG = """
[server]
listen = "127.0.0.1:0"
grpc = "127.0.0.1:0"
admin = "127.0.0.1:0"
[[models]]
name = "chat"
first_byte_s_max = 0.5
replicas = [
    { kind = "remote", url = "URL/v1" },
    { kind = "remote", url = "URL/v1" },
    { kind = "remote", url = "URL/v1" },
    { kind = "remote", url = "URL/v1" },
]
[[models]]
name = "pair"
first_byte_s_max = 0.5
replicas = [{ kind = "remote", url = "HANGS/v1" }, { kind = "remote", url = "URL/v1" }]
"""
DOWN = Faults({Fault(Kind.reset): 1.0})
HANGS = Faults({Fault(Kind.hang): 1.0})
UP = Faults({})


def chat(**given: Any) -> dict[str, Any]:
    return {"model": "chat", "messages": [{"role": "user", "content": "Say something."}], **given}


class Site:
    def __init__(self, engine: Emulator, gateway: GatewayProcess, key: Key, began_s: float) -> None:
        self.began_s = began_s
        """When the gateway was started."""
        self.engine = engine
        self.gateway = gateway
        self.key = key

    async def metric(self, name: str) -> float:
        def read() -> float:
            with self.gateway.admin_client() as admin:
                lines = admin.get("/metrics").text.splitlines()
            return next(float(line.split()[-1]) for line in lines if line.startswith(name))

        return await asyncio.to_thread(read)


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with running(tmp_path) as site:
        yield site


@asynccontextmanager
async def running(folder: Path) -> AsyncIterator[Site]:
    engine = Emulator(Pace())
    async with (
        serving(engine, "127.0.0.1:0") as url,
        serving(Emulator(Pace(), faults=HANGS), "127.0.0.1:0") as hangs,
    ):
        gateway = GatewayProcess(folder, CONFIG.replace("URL", url).replace("HANGS", hangs))
        began_s = asyncio.get_running_loop().time()
        await asyncio.to_thread(gateway.start)
        try:
            yield Site(engine, gateway, await asyncio.to_thread(gateway.issue), began_s)
        finally:
            assert await asyncio.to_thread(gateway.stop) == 0
            assert "Traceback" not in gateway.text


async def test_with_all_engines_down_attempts_stay_near_the_calls_and_every_error_says_what_to_do(site: Site) -> None:
    calls = 400
    site.engine.faults = DOWN
    async with site.gateway.client(site.key.text) as client:
        answers = [
            answer
            for _ in range(calls // 20)
            for answer in await asyncio.gather(*[client.post(CHAT, json=chat()) for _ in range(20)])
        ]
    elapsed_s = asyncio.get_running_loop().time() - site.began_s
    for answer in answers:
        require_refusal(
            answer.status_code, answer.headers, answer.content, expected=502, code="engine_failed", retry=True
        )
        assert float(answer.headers["retry-after"]) > 0
    assert calls <= site.engine.calls <= 1.2 * calls + 10 * (elapsed_s + 1)
    assert await site.metric('headrace_retries_total{model="chat"}') == site.engine.calls - calls
    assert await site.metric('headrace_retries_refused_total{model="chat"}') > 0


async def test_after_an_outage_the_sdks_clients_are_all_served_again(site: Site) -> None:
    outcomes: Counter[str] = Counter()
    streak = [0] * 8

    async def call_on(worker: int) -> None:
        async with openai.AsyncOpenAI(base_url=site.gateway.url, api_key=site.key.text) as client:
            while site.engine.faults is not UP or streak[worker] < 30:
                try:
                    await client.chat.completions.create(**chat())
                except openai.APIStatusError as error:
                    outcomes[str(error.status_code)] += 1
                    streak[worker] = 0
                else:
                    outcomes["served"] += 1
                    streak[worker] += 1

    site.engine.faults = DOWN
    async with asyncio.timeout(60), asyncio.TaskGroup() as workers:
        for worker in range(len(streak)):
            workers.create_task(call_on(worker))
        while outcomes["502"] < 8:
            await asyncio.sleep(0.1)
        site.engine.faults = UP
    assert set(outcomes) == {"served", "502"}
    assert min(streak) >= 30


@pytest.mark.parametrize("stream", [False, True])
async def test_an_engine_that_hangs_holds_no_stream_if_there_is_another(site: Site, stream: bool) -> None:
    if not stream:  # an answer in one piece begins when it is complete: only its own time bounds it
        async with site.gateway.client(site.key.text) as client:
            client.headers["x-envoy-expected-rq-timeout-ms"] = "700"
            answer = await client.post(CHAT, json=chat(model="pair"))
        require_refusal(answer.status_code, answer.headers, answer.content, expected=504, code="deadline_exceeded")
        return
    async with streaming(site.gateway.host, site.key.text, chat(model="pair")) as begun:
        assert (await begun.rest())[-1] == "[DONE]"
    assert (await site.gateway.record(site.key, begun.id))["replica"] == "pair-1"
