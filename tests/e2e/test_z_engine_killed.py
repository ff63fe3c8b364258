"""An engine killed amid its answer. The last file by name: what follows would wait for the engine's second start."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from typing import Any

import httpx
import openai
import pytest

from tests.e2e.engine import MODEL
from tests.e2e.raw import streaming
from tests.e2e.servers import ENGINE_START_S_MAX, GatewayProcess, processes_of
from tests.e2e.test_refusals import CHAT, require_refusal

pytestmark = pytest.mark.engine

STORY: Any = [{"role": "user", "content": "Tell me a long story."}]
ASK = {"model": MODEL, "messages": STORY, "max_tokens": 4}
LONG = {**ASK, "max_tokens": 900, "min_tokens": 900}


async def test_an_engine_killed_amid_a_stream_is_told_refused_for_and_started_again(
    engine_gateway: GatewayProcess,
) -> None:
    gateway, key = engine_gateway, engine_gateway.issue()
    (before,) = engine_sessions(gateway)
    async with (
        gateway.client(key.text) as client,
        httpx.AsyncClient(base_url=f"http://{gateway.admin}", trust_env=False, timeout=30) as admin,
        streaming(gateway.host, key.text, LONG) as stream,
        openai.AsyncOpenAI(base_url=gateway.url, api_key=key.text, max_retries=0) as sdk,
    ):
        sdk_stream = await sdk.chat.completions.create(
            model=MODEL, messages=STORY, max_tokens=900, stream=True, extra_body={"min_tokens": 900}
        )
        await anext(sdk_stream)
        await stream.text(3)
        kill_engine(gateway)

        # Those amid their streams are told, and none is told that it was whole.
        events = await stream.rest()
        assert "[DONE]" not in events
        error = json.loads(events[-1])["error"]
        assert error["type"] == "server_error" and isinstance(error["code"], str)
        with pytest.raises(openai.APIError):
            async for _ in sdk_stream:
                pass

        # Until it is back: a 503 at once, not a wait; readiness names it; the other models go on.
        readiness = await until_status(admin, "/readyz", 503)
        assert f"{MODEL}-0" in readiness.json()["checks"][f"model {MODEL}"]["reason"]
        refused = await client.post(CHAT, json=ASK)
        require_refusal(
            refused.status_code, refused.headers, refused.content, expected=503, code="engine_unavailable", retry=True
        )
        assert float(refused.headers["retry-after"]) > 0
        other = await client.post("/v1/classify", json={"model": "support-intent", "input": "where is my order"})
        assert other.status_code == 200

        # And then it is back, by itself, with nothing left of the one before.
        await until_status(admin, "/readyz", 200)
        again = await client.post(CHAT, json=ASK)
        assert again.status_code == 200, again.text
    (after,) = engine_sessions(gateway)
    assert after != before
    assert processes_of({before}) == {}
    record = await gateway.record(key, stream.id)
    assert record["outcome"] == "failed"
    spoken = sum(bool(choice["delta"].get("content")) for chunk in stream.chunks[:-1] for choice in chunk["choices"])
    assert record["tokens_out"] >= spoken >= 3
    assert not record["estimated"]


def engine_sessions(gateway: GatewayProcess) -> set[int]:
    return gateway.sessions() - {gateway.pid}


def kill_engine(gateway: GatewayProcess) -> None:
    """SIGKILL to the engine itself, not to the keeper that leads its session."""
    sessions = engine_sessions(gateway)
    engine = [pid for pid in processes_of(sessions) if pid not in sessions]
    assert engine
    for pid in engine:
        os.kill(pid, signal.SIGKILL)


async def until_status(admin: httpx.AsyncClient, path: str, status: int) -> httpx.Response:
    async with asyncio.timeout(ENGINE_START_S_MAX):
        while (answer := await admin.get(path)).status_code != status:
            await asyncio.sleep(0.1)
    return answer
