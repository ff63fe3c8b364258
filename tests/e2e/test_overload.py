"""Ten times more calls than there is room for: what fits is served whole, the rest is refused at once."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any

import httpx

from loadtests.emulator import Emulator, Pace, serving
from loadtests.process import usage
from tests.e2e.servers import GatewayProcess
from tests.e2e.test_refusals import CHAT, require_refusal

PLACES, WAITING = 8, 16
ROOM = PLACES + WAITING
CALLS = 10 * ROOM
CALL_BYTES_MAX = 64 * 1024
CONFIG = """
[server]
listen = "127.0.0.1:0"
grpc = "127.0.0.1:0"
admin = "127.0.0.1:0"
[[models]]
name = "chat"
waiting_max = {waiting}
replicas = [{{ kind = "remote", url = "{url}/v1", connections_max = {places} }}]
"""
CONTENT: dict[str, Any] = {"model": "chat", "messages": [{"role": "user", "content": "Say something."}]}


async def test_what_fits_is_served_and_the_rest_refused_before_any_of_it_is_done(tmp_path: Path) -> None:
    emulator = Emulator(Pace(first_token_s=3.0, tokens=2))
    async with serving(emulator, "127.0.0.1:0") as url:
        gateway = GatewayProcess(tmp_path, CONFIG.format(url=url, waiting=WAITING, places=PLACES))
        await asyncio.to_thread(gateway.start)
        try:
            key = await asyncio.to_thread(gateway.issue)
            before = usage(gateway.pid).rss_bytes
            order: list[int] = []
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
            async with gateway.client(key.text) as client, httpx.AsyncClient(limits=limits, trust_env=False) as admin:

                async def call() -> httpx.Response:
                    answer = await client.post(CHAT, json=CONTENT)
                    order.append(answer.status_code)
                    return answer

                calls = [asyncio.create_task(call()) for _ in range(CALLS)]
                while len(order) < CALLS - ROOM:  # while all the places are taken
                    health = await admin.get(f"http://{gateway.admin}/healthz")
                    assert health.status_code == 200
                    await asyncio.sleep(0.01)
                assert emulator.running == PLACES, "nothing beyond the engine's places reached it"
                answers = await asyncio.gather(*calls)
            grown = usage(gateway.pid).rss_bytes - before
            records = gateway.records(key.tenant)
        finally:
            assert await asyncio.to_thread(gateway.stop) == 0
    assert order[: CALLS - ROOM] == [503] * (CALLS - ROOM), "the refused did not wait"
    assert order[CALLS - ROOM :] == [200] * ROOM
    for answer in answers:
        if answer.status_code == 503:
            content = answer.content
            require_refusal(503, answer.headers, content, expected=503, code="queue_full", retry=True)
            assert float(answer.headers["retry-after"]) >= 1
    assert Counter(record["outcome"] for record in records.values()) == {"served": ROOM, "refused": CALLS - ROOM}
    assert emulator.calls == ROOM
    assert grown / CALLS <= CALL_BYTES_MAX
