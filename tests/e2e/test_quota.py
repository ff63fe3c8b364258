"""Quotas and queues: a refusal names the exact time to come back at, and coming back then works."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import openai

from tests.e2e.raw import streaming
from tests.e2e.servers import GatewayProcess, Key
from tests.e2e.test_refusals import CHAT, require_refusal
from tests.e2e.upstream import Upstream

HELLO = {"model": "echo", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 1}


async def test_requests_a_minute_are_refused_until_the_time_that_is_named(gateway: GatewayProcess) -> None:
    key = gateway.issue(limits={"rpm": 60})
    async with gateway.client(key.text) as client:
        answers = [await client.post(CHAT, json=HELLO) for _ in range(60)]
        while answers[-1].status_code == 200 and len(answers) < 200:
            answers.append(await client.post(CHAT, json=HELLO))
        refused = answers[-1]
        require_refusal(
            refused.status_code, refused.headers, refused.content, expected=429, code="rate_limit_exceeded", retry=True
        )
        wait_s = named_wait_s(refused)
        assert 0 < wait_s <= 1, "one of 60 a minute comes free every second"
        await asyncio.sleep(wait_s)
        assert (await client.post(CHAT, json=HELLO)).status_code == 200
    assert all(answer.status_code == 200 for answer in answers[:60]), "a minute's worth is let through at once"


async def test_a_key_has_limits_of_its_own_within_its_tenants(gateway: GatewayProcess) -> None:
    key = gateway.issue(limits={"rpm": 1000}, key_limits={"rpm": 1})
    async with gateway.client(key.text) as client:
        assert (await client.post(CHAT, json=HELLO)).status_code == 200
        refused = await client.post(CHAT, json=HELLO)
    assert refused.status_code == 429
    assert 0 < named_wait_s(refused) <= 60


async def test_the_python_sdk_comes_back_by_itself_and_passes(gateway: GatewayProcess) -> None:
    key = gateway.issue(limits={"rpm": 60})
    async with openai.AsyncOpenAI(base_url=gateway.url, api_key=key.text, max_retries=3) as client:
        for _ in range(63):
            await client.chat.completions.create(**HELLO)  # type: ignore[call-overload]
    outcomes = [record["outcome"] for record in gateway.records(key.tenant).values()]
    assert outcomes.count("served") == 63
    assert outcomes.count("refused") >= 1


async def test_tokens_a_minute_are_refused_until_the_time_that_is_named(gateway: GatewayProcess) -> None:
    key = gateway.issue(limits={"tpm": 6000})
    words = {**HELLO, "messages": [{"role": "user", "content": "word " * 1000}], "max_tokens": 1000}
    async with gateway.client(key.text) as client:
        answers = [await client.post(CHAT, json=words)]
        while answers[-1].status_code == 200 and len(answers) < 20:
            answers.append(await client.post(CHAT, json=words))
        refused = answers[-1]
        require_refusal(
            refused.status_code, refused.headers, refused.content, expected=429, code="rate_limit_exceeded", retry=True
        )
        used = sum(answer.json()["usage"]["total_tokens"] for answer in answers[:-1])
        assert 0 < used <= 6000
        # 100 tokens a second come back: a call small enough to wait for in a test.
        small = await client.post(CHAT, json={**HELLO, "max_tokens": 6000 - used + 100})
        assert small.status_code == 429
        await asyncio.sleep(named_wait_s(small))
        assert (await client.post(CHAT, json={**HELLO, "max_tokens": 6000 - used + 100})).status_code == 200


async def test_a_call_that_never_fits_is_not_told_to_come_back(gateway: GatewayProcess) -> None:
    key = gateway.issue(limits={"tpm": 1000})
    async with gateway.client(key.text) as client:
        refused = await client.post(CHAT, json={**HELLO, "max_tokens": 5000})
    require_refusal(refused.status_code, refused.headers, refused.content, expected=429, code="request_exceeds_limit")
    assert "retry-after" not in refused.headers


async def test_unused_tokens_are_given_back(gateway: GatewayProcess) -> None:
    key = gateway.issue(limits={"tpm": 1000})
    async with gateway.client(key.text) as client:
        for _ in range(20):  # each reserves 900 and uses a handful
            answer = await client.post(CHAT, json={**HELLO, "max_tokens": 900})
            assert answer.status_code == 200, answer.text


async def test_calls_at_once_are_limited_and_the_place_comes_free(gateway: GatewayProcess) -> None:
    key = gateway.issue(limits={"concurrent": 1})
    async with gateway.client(key.text) as client:
        async with streaming(gateway.host, key.text, long_echo()) as stream:
            await stream.text(1)
            refused = await client.post(CHAT, json=HELLO)
        require_refusal(
            refused.status_code, refused.headers, refused.content, expected=429, code="rate_limit_exceeded", retry=True
        )
        assert float(refused.headers["retry-after"]) > 0
        answer = await until_let_in(client, HELLO)
    assert answer.status_code == 200


async def test_nobody_gets_more_than_the_budget_however_many_ask_at_once(gateway: GatewayProcess) -> None:
    key = gateway.issue(limits={"rpm": 10})
    async with gateway.client(key.text) as client:
        answers = await asyncio.gather(*(client.post(CHAT, json=HELLO) for _ in range(40)))
    statuses = [answer.status_code for answer in answers]
    assert statuses.count(200) == 10
    assert statuses.count(429) == 30


async def test_a_full_queue_is_a_503_and_a_long_wait_a_504(
    gateway: GatewayProcess, provider: Upstream, key: Key
) -> None:
    stalled = {"model": "narrow", "messages": [], "fault": "stalls_amid"}
    async with gateway.client(key.text) as client, streaming(gateway.host, key.text, stalled) as stream:
        await stream.text(1)
        waiting = asyncio.create_task(client.post(CHAT, json={"model": "narrow", "messages": []}))
        await until_waiting(gateway, "narrow")
        full = await client.post(CHAT, json={"model": "narrow", "messages": []})
        late = await waiting
    require_refusal(full.status_code, full.headers, full.content, expected=503, code="queue_full", retry=True)
    assert float(full.headers["retry-after"]) >= 1
    require_refusal(late.status_code, late.headers, late.content, expected=504, code="deadline_exceeded")


async def test_who_waits_is_let_in_once_a_place_comes_free(gateway: GatewayProcess, key: Key) -> None:
    stalled = {"model": "narrow", "messages": [], "fault": "stalls_amid"}
    async with gateway.client(key.text) as client:
        async with streaming(gateway.host, key.text, stalled) as stream:
            await stream.text(1)
            waiting = asyncio.create_task(client.post(CHAT, json={"model": "narrow", "messages": []}))
            await until_waiting(gateway, "narrow")
        answer = await waiting
    assert answer.status_code == 200, answer.text


# ---- helpers -----------------------------------------------------------------------------------------------


def named_wait_s(refused: httpx.Response) -> float:
    """The wait that the headers name; the whole seconds are the fine ones rounded up."""
    wait_s = int(refused.headers["retry-after-ms"]) / 1000
    assert int(refused.headers["retry-after"]) == -(-wait_s // 1)
    return wait_s


def long_echo() -> dict[str, Any]:
    return {"model": "slow", "messages": [{"role": "user", "content": "word " * 500}]}


async def until_waiting(gateway: GatewayProcess, model: str) -> None:
    """Return once a call waits for this model."""
    with gateway.admin_client() as admin:
        async with asyncio.timeout(10):
            while not any(it["name"] == model and it["queue"]["waiting"] for it in admin.get("/models").json()):
                await asyncio.sleep(0.01)


async def until_let_in(client: httpx.AsyncClient, body: Any) -> httpx.Response:
    async with asyncio.timeout(10):
        while (answer := await client.post(CHAT, json=body)).status_code == 429:
            await asyncio.sleep(0.01)
    return answer
