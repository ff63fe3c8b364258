"""The ledger against the engine's own counters, and against what clients were really handed."""

from __future__ import annotations

import asyncio
from typing import Any, NamedTuple

import pytest

from tests.e2e.engine import ENDED, MADE, MODEL, READ, until_busy, until_free
from tests.e2e.raw import Connection, Stream, exchange, post, streaming
from tests.e2e.servers import GatewayProcess, Key
from tests.e2e.test_refusals import CHAT, COMPLETIONS, EMBEDDINGS

pytestmark = pytest.mark.engine

EACH_CHUNK = {"include_usage": True, "continuous_usage_stats": True}
LATE_MAX = 60
"""Tokens that an engine makes for a call between its client's leaving and its own noticing, at most."""


class Seen(NamedTuple):
    """One call as its client saw it: of an answered one, the usage that the engine itself put into the answer."""

    id: str
    outcome: str
    tokens_in: int = 0
    tokens_out: int = 0


async def test_the_ledger_is_the_engines_own_count_of_fifty_mixed_calls(engine_gateway: GatewayProcess) -> None:
    """34 calls answered or refused: to the token. 16 cancelled: what was handed over, of what the engine made."""
    gateway, key = engine_gateway, engine_gateway.issue()
    before = await until_free(gateway)
    whole = await asyncio.gather(
        *(chat(gateway, key, number) for number in range(8)),
        *(stream(gateway, key, number) for number in range(8)),
        *(completions(gateway, key, number) for number in range(4)),
        *(refused_by_engine(gateway, key) for _ in range(4)),
        *(classified(gateway, key) for _ in range(5)),
        *(embedded(gateway, key) for _ in range(5)),
    )
    between = await until_free(gateway)
    cancelled = [
        *await asyncio.gather(*(left_amid(gateway, key, number) for number in range(6))),
        *await asyncio.gather(*(dropped_amid(gateway, key, number) for number in range(6))),
    ]
    amid_end = await until_free(gateway)
    for _ in range(4):
        await left_before(gateway, key)
    after = await until_free(gateway)

    records = gateway.records(key.tenant)
    assert len(whole) + len(cancelled) + 4 == 50
    assert len(records) == 50, "exactly one record of each call"

    # Answered or refused: each record is what the engine told the client, and their sum what it counted itself.
    for seen in whole:
        record = records[seen.id]
        assert (record["outcome"], record["tokens_in"], record["tokens_out"]) == seen[1:], record
        assert not record["estimated"]
    generated = [records[seen.id] for seen in whole if records[seen.id]["model"] == MODEL]
    assert sum(record["tokens_in"] for record in generated) == between[READ] - before[READ]
    assert sum(record["tokens_out"] for record in generated) == between[MADE] - before[MADE]
    sequences = between[ENDED] - before[ENDED]
    assert sequences == 8 + 8 + 4 * 2, "as many sequences as were asked for"

    # Cancelled amid: exactly what was on the last chunk handed over, which is at most what the engine had made.
    for seen in cancelled:
        record = records[seen.id]
        assert (record["outcome"], record["tokens_in"]) == ("cancelled", seen.tokens_in)
        assert not record["estimated"]
    half_closed, reset = cancelled[:6], cancelled[6:]
    for seen in half_closed:  # these clients went on reading to the very end of what had been sent to them
        assert records[seen.id]["tokens_out"] == seen.tokens_out
    for seen in reset:  # what these had been sent and had not read yet is lost with the connection
        assert seen.tokens_out <= records[seen.id]["tokens_out"] <= seen.tokens_out + LATE_MAX
    handed_over = sum(records[seen.id]["tokens_out"] for seen in cancelled)
    made = amid_end[MADE] - between[MADE]
    assert handed_over <= made <= handed_over + LATE_MAX * len(cancelled)
    assert sum(records[seen.id]["tokens_in"] for seen in cancelled) == amid_end[READ] - between[READ]

    # Cancelled before anything was handed over: the input, which the engine had, is billed by its length.
    known = {seen.id for seen in (*whole, *cancelled)}
    rest = [record for id, record in records.items() if id not in known]
    assert {(it["outcome"], it["status"], it["tokens_out"]) for it in rest} == {("cancelled", 0, 0)}
    assert all(it["tokens_in"] > 0 and it["estimated"] for it in rest)
    assert after[MADE] - amid_end[MADE] <= LATE_MAX * len(rest)

    # And the sums that `headrace usage` shows are those of the records.
    (total,) = gateway.command("usage", "--tenant", key.tenant, "--by", "tenant")
    assert total["calls"] == 50
    assert (total["served"], total["rejected"], total["cancelled"]) == (30, 4, 16)
    for field in ("tokens_in", "tokens_out", "tokens_cached"):
        assert total[field] == sum(record[field] for record in records.values())


# ---- one call each -----------------------------------------------------------------------------------------


def ask(number: int, **fields: Any) -> dict[str, Any]:
    """Prompts of different lengths; some share their beginning, so that the engine's prefix cache is at work."""
    text = "Tell me about the town. " * (1 + number % 4)
    return {"model": MODEL, "messages": [{"role": "user", "content": text}], "max_tokens": 4 + number, **fields}


async def chat(gateway: GatewayProcess, key: Key, number: int) -> Seen:
    async with gateway.client(key.text) as client:
        answer = await client.post(CHAT, json=ask(number))
    usage = answer.json()["usage"]
    return Seen(answer.headers["x-request-id"], "served", usage["prompt_tokens"], usage["completion_tokens"])


async def stream(gateway: GatewayProcess, key: Key, number: int) -> Seen:
    """Half of them ask for usage. The others don't, and see only how much they sent and how much they asked for."""
    if number % 2:
        async with streaming(gateway.host, key.text, ask(number, stream_options={"include_usage": True})) as answer:
            await answer.rest()
        usage = answer.chunks[-1]["usage"]
        return Seen(answer.id, "served", usage["prompt_tokens"], usage["completion_tokens"])
    ids = list(range(1000, 1040 + number))
    body = {"model": MODEL, "prompt": ids, "max_tokens": 4 + number, "min_tokens": 4 + number}
    async with streaming(gateway.host, key.text, body, COMPLETIONS) as answer:
        assert (await answer.rest())[-1] == "[DONE]"
    return Seen(answer.id, "served", len(ids), 4 + number)


async def completions(gateway: GatewayProcess, key: Key, number: int) -> Seen:
    """Two prompts in one call."""
    body = {"model": MODEL, "prompt": ["Once upon", "In the town"], "max_tokens": 3 + number}
    async with gateway.client(key.text) as client:
        answer = await client.post(COMPLETIONS, json=body)
    usage = answer.json()["usage"]
    return Seen(answer.headers["x-request-id"], "served", usage["prompt_tokens"], usage["completion_tokens"])


async def refused_by_engine(gateway: GatewayProcess, key: Key) -> Seen:
    answer = await exchange(gateway.host, post(CHAT, ask(1, temperature=-1), key.text))
    assert answer.status == 400
    return Seen(answer.headers["x-request-id"], "rejected")


async def classified(gateway: GatewayProcess, key: Key) -> Seen:
    return await predicted(gateway, key, "/v1/classify", {"model": "support-intent", "input": "where is it"})


async def embedded(gateway: GatewayProcess, key: Key) -> Seen:
    return await predicted(gateway, key, EMBEDDINGS, {"model": "minilm", "input": ["one", "two and three"]})


async def predicted(gateway: GatewayProcess, key: Key, route: str, body: Any) -> Seen:
    async with gateway.client(key.text) as client:
        answer = await client.post(route, json=body)
    return Seen(answer.headers["x-request-id"], "served", answer.json()["usage"]["prompt_tokens"])


async def left_amid(gateway: GatewayProcess, key: Key, number: int) -> Seen:
    """Closes its half after a few chunks, and reads on until the gateway closes the other."""
    async with streaming(gateway.host, key.text, endless(number)) as answer:
        await answer.text(2 + number)
        answer.connection.leave()
        assert "[DONE]" not in await answer.rest()
    return handed_over(answer)


async def dropped_amid(gateway: GatewayProcess, key: Key, number: int) -> Seen:
    async with streaming(gateway.host, key.text, endless(number)) as answer:
        await answer.text(2 + number)
        answer.connection.drop()
    return handed_over(answer)


async def left_before(gateway: GatewayProcess, key: Key) -> None:
    """Leaves an answer that is not streamed while the engine is at it."""
    async with Connection(gateway.host) as connection:
        await connection.send(post(CHAT, {**endless(1), "stream": False, "stream_options": None}, key.text))
        await until_busy(gateway)
        connection.drop()
    await until_free(gateway)


def endless(number: int) -> dict[str, Any]:
    return ask(number, max_tokens=900, min_tokens=900, stream_options=EACH_CHUNK)


def handed_over(answer: Stream) -> Seen:
    usage = answer.chunks[-1]["usage"]
    return Seen(answer.id, "cancelled", usage["prompt_tokens"], usage["completion_tokens"])
