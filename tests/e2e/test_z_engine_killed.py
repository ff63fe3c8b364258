"""An engine killed amid its answer, whole or in part. The last file by name: what follows waits for new starts."""

from __future__ import annotations

import asyncio
import json
import math
import os
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from runtimes.artifact import Shelf
from runtimes.contract import Broken, Exchange, Site, Unavailable
from runtimes.vllm import Vllm, VllmRuntime
from tests.e2e.engine import MODEL, core, processes, sessions, socket
from tests.e2e.raw import streaming
from tests.e2e.servers import ENGINE_START_S_MAX, GatewayProcess, processes_of
from tests.e2e.test_refusals import CHAT, require_refusal

pytestmark = pytest.mark.engine

STORY: Any = [{"role": "user", "content": "Tell me a long story."}]
ASK = {"model": MODEL, "messages": STORY, "max_tokens": 4}
LONG = {**ASK, "max_tokens": 900, "min_tokens": 900}


@pytest.fixture
async def attached(engine_gateway: GatewayProcess, tmp_path: Path) -> AsyncIterator[VllmRuntime]:
    """What the gateway speaks to its engine with, a second time."""
    site = Site(model=MODEL, replica="second", state=tmp_path, shelf=Shelf(tmp_path / "shelf"))
    runtime = Vllm(url=f"unix:{socket(engine_gateway)}").build(site)
    await runtime.open()
    yield runtime
    await runtime.aclose()


@pytest.mark.parametrize("killed", [processes, core], ids=["all of it", "its core"])
async def test_an_engine_killed_amid_a_stream_is_told_refused_for_and_started_again(
    engine_gateway: GatewayProcess, attached: VllmRuntime, killed: Callable[[GatewayProcess], list[int]]
) -> None:
    gateway, key = engine_gateway, engine_gateway.issue()
    (before,) = sessions(gateway)
    async with (
        gateway.client(key.text) as client,
        httpx.AsyncClient(base_url=f"http://{gateway.admin}", trust_env=False, timeout=30) as admin,
        streaming(gateway.host, key.text, LONG) as stream,
        attached.exchange(Exchange(CHAT, json.dumps(LONG | {"stream": True}).encode(), math.inf)) as reply,
        openai.AsyncOpenAI(base_url=gateway.url, api_key=key.text, max_retries=0) as sdk,
    ):
        sdk_stream = await sdk.chat.completions.create(
            model=MODEL, messages=STORY, max_tokens=900, stream=True, extra_body={"min_tokens": 900}
        )
        await anext(sdk_stream)
        await stream.text(3)
        victims = killed(gateway)
        assert victims
        for pid in victims:
            os.kill(pid, signal.SIGKILL)

        # Those amid their streams are told, and none is told that it was whole.
        events = await stream.rest()
        assert "[DONE]" not in events
        error = json.loads(events[-1])["error"]
        assert error["type"] == "server_error" and isinstance(error["code"], str)
        with pytest.raises(openai.APIError):
            async for _ in sdk_stream:
                pass
        with pytest.raises(Broken):
            async for _ in reply.frames:
                pass
        with pytest.raises(Unavailable):
            await attached.ready()

        # Until it is back: a 503 at once, not a wait; readiness names it; the other models go on.
        await until_readyz(admin, 503, " is restarting, attempt")
        assert processes_of({before}) == {}
        refused = await client.post(CHAT, json=ASK)
        require_refusal(
            refused.status_code, refused.headers, refused.content, expected=503, code="engine_unavailable", retry=True
        )
        assert float(refused.headers["retry-after"]) > 0
        other = await client.post("/v1/classify", json={"model": "support-intent", "input": "where is my order"})
        assert other.status_code == 200

        # And then it is back, by itself.
        await until_readyz(admin, 200)
        again = await client.post(CHAT, json=ASK)
        assert again.status_code == 200, again.text
        await attached.ready()
    (after,) = sessions(gateway)
    assert after != before
    record = await gateway.record(key, stream.id)
    assert record["outcome"] == "failed"
    spoken = sum(bool(choice["delta"].get("content")) for chunk in stream.chunks[:-1] for choice in chunk["choices"])
    assert record["tokens_out"] >= spoken >= 3
    assert not record["estimated"]


async def until_readyz(admin: httpx.AsyncClient, status: int, said: str = "") -> None:
    async with asyncio.timeout(ENGINE_START_S_MAX):
        while (answer := await admin.get("/readyz")).status_code != status or said not in answer.text:
            await asyncio.sleep(0.1)
