"""A gateway that is told to stop: it says so, lets calls end, tells the rest, and nobody's call fails by it."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from loadtests.emulator import Emulator, Pace, serving
from tests.e2e.raw import Connection, Stream, post, streaming
from tests.e2e.servers import GatewayProcess, Key
from tests.e2e.test_refusals import CHAT, require_refusal

CONFIG = """
[server]
listen = "{listen}"
grpc = "127.0.0.1:0"
admin = "{admin}"
unready_s = {unready_s}
drain_s_max = {drain_s_max}
[[models]]
name = "chat"
waiting_max = 1000
replicas = [{{ kind = "remote", url = "{url}/v1", connections_max = 500 }}]
"""
ANY = "127.0.0.1:0"
STREAMS, ENDLESS = 200, 50


@asynccontextmanager
async def engine(**pace: Any) -> AsyncIterator[str]:
    async with serving(Emulator(Pace(**pace)), ANY) as url:
        yield url


@contextmanager
def gateway(folder: Path, url: str, *, listen: str = ANY, admin: str = ANY, **given: float) -> Iterator[GatewayProcess]:
    settings = {"unready_s": 0, "drain_s_max": 30, **given}
    process = GatewayProcess(folder, CONFIG.format(url=url, listen=listen, admin=admin, **settings))
    try:
        yield process
    finally:
        if process.runs:
            process.kill()


def chat(**given: Any) -> dict[str, Any]:
    return {"model": "chat", "messages": [{"role": "user", "content": "Say something."}], **given}


async def started(gateway: GatewayProcess) -> Key:
    """In a thread: the engine that it looks for is on this loop."""
    await asyncio.to_thread(gateway.start)
    return await asyncio.to_thread(gateway.issue)


async def until_unready(gateway: GatewayProcess) -> httpx.Response:
    async with httpx.AsyncClient(base_url=f"http://{gateway.admin}", trust_env=False) as admin, asyncio.timeout(20):
        while (answer := await admin.get("/readyz")).status_code == 200:
            await asyncio.sleep(0.01)
    return answer


async def test_of_two_hundred_streams_all_that_end_in_the_grace_end_well_and_the_rest_are_told(tmp_path: Path) -> None:
    async with engine(token_s=0.05, tokens=40) as url, AsyncExitStack() as opened:
        running = opened.enter_context(gateway(tmp_path, url, drain_s_max=6))
        key = await started(running)

        async def begin(number: int) -> Stream:
            endless = {"max_tokens": 100_000, "ignore_eos": True} if number < ENDLESS else {}
            stream = await opened.enter_async_context(streaming(running.host, key.text, chat(**endless)))
            await stream.text(1)
            return stream

        idle = await opened.enter_async_context(Connection(running.host))
        streams = await asyncio.gather(*[begin(number) for number in range(STREAMS)])
        running.terminate()
        readiness = await until_unready(running)
        late = await opened.enter_async_context(Connection(running.host))
        refused = []
        for connection in (idle, late):
            await connection.send(post(CHAT, chat(), key.text))
            refused.append(await connection.answer())
            await connection.until_closed()
        ends = await asyncio.gather(*[stream.rest() for stream in streams])
        status = await asyncio.to_thread(running.wait)
        records = running.records(key.tenant)

    assert status == 0
    assert "stopping" in readiness.json()["checks"]["gateway"]["reason"]
    for answer in refused:
        require_refusal(answer.status, answer.headers, answer.body, expected=503, code="draining", retry=True)
        assert answer.headers["connection"] == "close"
        assert float(answer.headers["retry-after"]) > 0
    assert [events[-1] for events in ends[ENDLESS:]] == ["[DONE]"] * (STREAMS - ENDLESS)
    assert all('"code":"draining"' in events[-1] and "[DONE]" not in events for events in ends[:ENDLESS])
    assert Counter(record["code"] for record in records.values()) == {"": STREAMS - ENDLESS, "draining": ENDLESS}
    assert {records[stream.id]["outcome"] for stream in streams[ENDLESS:]} == {"served"}
    assert "Traceback" not in running.text


async def test_readiness_drops_before_anything_is_refused(tmp_path: Path) -> None:
    async with engine() as url:
        with gateway(tmp_path, url, unready_s=5) as running:
            key = await started(running)
            async with Connection(running.host) as kept:
                await kept.send(post(CHAT, chat(), key.text))
                assert "connection" not in (await kept.answer()).headers
                running.terminate()
                await until_unready(running)
                await kept.send(post(CHAT, chat(), key.text))
                answer = await kept.answer()
                await kept.until_closed()  # politely: behind an answer that said so
            assert (answer.status, answer.headers["connection"]) == (200, "close")
            assert await asyncio.to_thread(running.wait) == 0
            assert {record["outcome"] for record in running.records(key.tenant).values()} == {"served"}


# ---- behind a load balancer ---------------------------------------------------------------------------------

BALANCER = """
defaults
    mode http
    timeout connect 2s
    timeout check 5s
    timeout client 30s
    timeout server 30s
frontend all
    bind 127.0.0.1:{port}
    default_backend gateways
backend gateways
    balance roundrobin
    option httpchk
    http-check send meth GET uri /readyz ver HTTP/1.1 hdr Host headrace
    default-server check inter 100ms fastinter 50ms fall 1 rise 1
    server one {hosts[0]} port {admins[0]}
    server two {hosts[1]} port {admins[1]}
"""


@pytest.mark.skipif(shutil.which("haproxy") is None, reason="HAProxy is not installed")
async def test_a_rolling_restart_behind_a_load_balancer_fails_no_call(tmp_path_factory: pytest.TempPathFactory) -> None:
    balancer, *ports = free_ports(5)
    hosts = [f"127.0.0.1:{port}" for port in ports]
    async with engine(token_s=0.01) as url, AsyncExitStack() as opened:
        pair = [
            opened.enter_context(
                gateway(tmp_path_factory.mktemp("g"), url, listen=hosts[number], admin=hosts[2 + number], unready_s=1)
            )
            for number in range(2)
        ]
        key = await started(pair[0])
        assert await asyncio.to_thread(pair[0].stop) == 0
        shutil.copytree(pair[0].state, pair[1].state)  # two gateways that know the same key
        for running in pair:
            await asyncio.to_thread(running.start)
        opened.enter_context(balancing(tmp_path_factory.mktemp("b"), balancer, hosts[:2], ports[2:]))
        load = Load(f"http://127.0.0.1:{balancer}", key.text)
        loading = asyncio.create_task(load.run())
        for running in pair:
            await until_served(running)
            running.terminate()
            assert await asyncio.to_thread(running.wait) == 0
            await asyncio.to_thread(running.start)
            await until_served(running)
        load.enough = True
        await loading
    assert set(load.outcomes) == {"served"}, load.outcomes
    assert load.outcomes["served"] > 200


class Load:
    """A hundred calls a second, every other one streamed, each on the next kept connection."""

    def __init__(self, url: str, key: str) -> None:
        self.outcomes: Counter[str] = Counter()
        self.enough = False
        self._client = httpx.AsyncClient(
            base_url=url, headers={"authorization": f"Bearer {key}"}, trust_env=False, timeout=30
        )

    async def run(self) -> None:
        async with self._client, asyncio.TaskGroup() as calls:
            while not self.enough:
                calls.create_task(self._call(stream=self.outcomes.total() % 2 == 0))
                await asyncio.sleep(0.01)

    async def _call(self, *, stream: bool) -> None:
        try:
            answer = await self._client.post(CHAT, json=chat(stream=stream))
        except httpx.HTTPError as error:
            self.outcomes[type(error).__name__] += 1
            return
        whole = answer.text.endswith("data: [DONE]\n\n") if stream else "usage" in answer.text
        self.outcomes["served" if answer.status_code == 200 and whole else str(answer.status_code)] += 1


async def until_served(running: GatewayProcess) -> None:
    """Return once the balancer has given it a call."""
    async with httpx.AsyncClient(base_url=f"http://{running.admin}", trust_env=False) as admin, asyncio.timeout(30):
        while 'outcome="served"' not in (await admin.get("/metrics")).text:
            await asyncio.sleep(0.05)


@contextmanager
def balancing(folder: Path, port: int, hosts: list[str], admins: list[int]) -> Iterator[None]:
    (folder / "haproxy.cfg").write_text(BALANCER.format(port=port, hosts=hosts, admins=admins))
    process = subprocess.Popen(["haproxy", "-db", "-q", "-f", folder / "haproxy.cfg"])
    try:
        until_listening(port)
        yield
    finally:
        process.terminate()
        process.wait()


def until_listening(port: int) -> None:
    give_up_s = time.monotonic() + 20
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except ConnectionRefusedError:
            assert time.monotonic() < give_up_s, "the balancer does not listen"
            time.sleep(0.02)
        else:
            return


def free_ports(count: int) -> list[int]:
    """So many that nobody listens on, and that no outgoing connection is given while their gateway is away."""
    first = 20_000 + os.getpid() % 10_000
    ports: list[int] = []
    while len(ports) < count:
        with suppress(OSError), socket.create_server(("127.0.0.1", first)):
            ports.append(first)
        first += 1
    return ports
