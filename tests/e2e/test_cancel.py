"""A client that leaves, in every phase of its call and in every way: what the call held is free, and its engine too."""

from __future__ import annotations

import asyncio
import random
import socket
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from loadtests.emulator import Entry
from tests.e2e.emulated import Emulation, emulating
from tests.e2e.raw import Connection, post
from tests.e2e.resources import Held, at_rest, held, until_back
from tests.e2e.servers import GatewayProcess, Key
from tests.e2e.test_refusals import CHAT

TOKENS = 20
PACE = ("--tokens", str(TOKENS), "--first-token-s", "0.01", "--token-s", "0.005")
SHUT_S_MAX = 10.0
"""How long an engine's connection may take to be closed: a bound to give up at, never a measure."""
REPEATS = 10
RANDOM_CALLS = 10_000
AT_ONCE = 32

CONFIG = """
[server]
listen = "127.0.0.1:0"
grpc = "127.0.0.1:0"
admin = "127.0.0.1:0"
[[models]]
name = "engine"
replicas = [{{ kind = "vllm", url = "{engine}", running_max = 64 }}]
[[models]]
name = "narrow"
replicas = [{{ kind = "remote", url = "{engine}/v1", connections_max = 1 }}]
[[models]]
name = "crowded"
replicas = [
  {{ kind = "remote", url = "{engine}/v1", connections_max = 4 }},
  {{ kind = "vllm", url = "{engine}", running_max = 2 }},
]
[[models]]
name = "unreachable"
replicas = [{{ kind = "remote", url = "{tarpit}/v1", connect_s_max = 60 }}]
"""


class Stage:
    """A gateway, its engine, and what it holds at rest."""

    def __init__(self, gateway: GatewayProcess, emulation: Emulation) -> None:
        self.gateway = gateway
        self.emulation = emulation
        self.baseline: Held = {}

    async def until(self, name: str, value: float) -> None:
        async with asyncio.timeout(SHUT_S_MAX):
            while held(self.gateway)[name] != value:
                await asyncio.sleep(0.01)

    async def logged(self, since_s: float, count: int) -> list[Entry]:
        """The engine's log of the calls since then, once there are so many."""
        async with asyncio.timeout(SHUT_S_MAX):
            while len(entries := [it for it in self.emulation.entries() if it.asked_s >= since_s]) < count:
                await asyncio.sleep(0.05)
        assert len(entries) == count
        return entries


@contextmanager
def tarpit() -> Iterator[str]:
    """The address of a server that answers on the first connection it gets, and lets no other come about: its queue is
    full, so the kernel leaves whoever connects waiting."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listening, socket.socket() as filler:

        def serve() -> None:
            with listening.accept()[0] as peer:
                filler.connect(listening.getsockname())
                while peer.recv(65_536):
                    peer.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    thread.join(SHUT_S_MAX)


@contextmanager
def staged(folder: Path, module: str = "gateway") -> Iterator[Stage]:
    with emulating(folder, *PACE) as emulation, tarpit() as pit:
        config = CONFIG.format(engine=emulation.url, tarpit=pit)
        gateway = GatewayProcess(folder, config, module=module).start()
        try:
            yield Stage(gateway, emulation)
        finally:
            assert gateway.stop() == 0, gateway.text
            assert "Traceback" not in gateway.text


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with staged(tmp_path_factory.mktemp("c")) as stage:
        key = stage.gateway.issue()
        asyncio.run(randomly(stage, key, 100))
        stage.baseline = asyncio.run(at_rest(stage.gateway))
        yield stage


def ask(model: str = "engine", **fields: Any) -> dict[str, Any]:
    fault = fields.pop("fault", None)
    emulate = {} if fault is None else {"emulate": {"fault": fault}}
    return {"model": model, "messages": [{"role": "user", "content": "Hello"}], **emulate, **fields}


# ---- in every phase ----------------------------------------------------------------------------------------


@asynccontextmanager
async def calling(stage: Stage, key: Key, body: dict[str, Any]) -> AsyncIterator[Connection]:
    async with Connection(stage.gateway.host) as connection:
        await connection.send(post(CHAT, body, key.text))
        yield connection


async def read_tokens(connection: Connection, count: int) -> None:
    """Return once so many have come."""
    _, headers = await connection.head()
    seen = b""
    async for part in connection.body(headers):
        seen += part
        if seen.count(b" water") >= count:
            return
    raise AssertionError(seen)


@asynccontextmanager
async def queued(stage: Stage, key: Key) -> AsyncIterator[Connection]:
    async with calling(stage, key, ask("narrow", fault="hang")):
        await stage.until("headrace_running narrow", 1)
        async with calling(stage, key, ask("narrow")) as connection:
            await stage.until("headrace_waiting narrow", 1)
            yield connection
            await stage.until("headrace_waiting narrow", 0)


@asynccontextmanager
async def connecting(stage: Stage, key: Key) -> AsyncIterator[Connection]:
    async with calling(stage, key, ask("unreachable")) as connection:
        await stage.until("headrace_runtime_connections unreachable unreachable-0", 1)
        yield connection


@asynccontextmanager
async def before_the_first_byte(stage: Stage, key: Key) -> AsyncIterator[Connection]:
    async with calling(stage, key, ask(fault="hang")) as connection:
        async with asyncio.timeout(SHUT_S_MAX):
            while not stage.emulation.running:
                await asyncio.sleep(0.01)
        yield connection


@asynccontextmanager
async def amid_the_stream(stage: Stage, key: Key) -> AsyncIterator[Connection]:
    async with calling(stage, key, ask(stream=True, fault="stall@3")) as connection:
        await read_tokens(connection, 3)
        yield connection


@asynccontextmanager
async def closing(stage: Stage, key: Key) -> AsyncIterator[Connection]:
    """All is there, but the gateway still waits a moment for the true end of the engine's answer."""
    async with calling(stage, key, ask(stream=True, fault="open-end")) as connection:
        await read_tokens(connection, TOKENS)
        yield connection


async def fin(connection: Connection) -> None:
    connection.leave()


async def rst(connection: Connection) -> None:
    connection.drop()


async def fin_then_rst(connection: Connection) -> None:
    """The second comes while the first is being seen to."""
    connection.leave()
    await asyncio.sleep(0.001)
    connection.drop()


AT_THE_ENGINE = (before_the_first_byte, amid_the_stream, closing)
WAYS = (fin, rst, fin_then_rst)


@pytest.mark.parametrize("leave", WAYS)
@pytest.mark.parametrize("phase", [queued, connecting, *AT_THE_ENGINE])
async def test_whoever_leaves_gives_everything_back(
    stage: Stage, phase: Callable[[Stage, Key], Any], leave: Callable[[Connection], Awaitable[None]]
) -> None:
    key = stage.gateway.issue(limits={"concurrent": 2, "tpm": 10_000_000})
    begun_s, left_s = time.time(), []
    for _ in range(REPEATS):
        async with phase(stage, key) as connection:
            left_s.append(time.time())
            await leave(connection)
        await stage.until("headrace_holds", 0)
        async with asyncio.timeout(SHUT_S_MAX):
            while stage.emulation.running:
                await asyncio.sleep(0.005)
    await until_back(stage.gateway, stage.baseline)
    if phase in AT_THE_ENGINE:
        entries = await stage.logged(begun_s, REPEATS)
        took_s = sorted(entry.ended_s - left for entry, left in zip(entries, left_s, strict=True))
        print(f"{phase.__name__} {leave.__name__}: engine closed after {1e3 * took_s[-1]:.1f} ms at most")


async def test_what_was_left_is_recorded_as_cancelled_and_billed_as_delivered(stage: Stage) -> None:
    key = stage.gateway.issue()
    for phase in (queued, connecting, before_the_first_byte, amid_the_stream):
        async with phase(stage, key) as connection:
            await rst(connection)
    await until_back(stage.gateway, stage.baseline)
    records = list(stage.gateway.records(key.tenant).values())
    assert {record["outcome"] for record in records} == {"cancelled"}
    assert sorted(
        (record["model"], record["replica"], record["status"], record["tokens_out"]) for record in records
    ) == [
        ("engine", "engine-0", 0, 0),
        ("engine", "engine-0", 200, 3),
        ("narrow", "", 0, 0),
        ("narrow", "narrow-0", 0, 0),  # it held the only place
        ("unreachable", "unreachable-0", 0, 0),
    ]


# ---- at random ---------------------------------------------------------------------------------------------


async def randomly(stage: Stage, key: Key, calls: int) -> int:
    """So many calls, nine of ten of which are left at some moment in some way; how many ended of themselves."""
    chance = random.Random(calls)
    numbers = iter(range(calls))
    whole = 0

    async def one() -> None:
        nonlocal whole
        body = ask(
            chance.choice(("engine", "engine", "crowded")),
            stream=chance.random() < 0.7,
            max_tokens=chance.choice((TOKENS, 5_000)),
            fault=chance.choice((None,) * 8 + ("hang", "stall@3", "open-end")),
        )
        stays = "emulate" not in body and chance.random() < 0.1
        leave, after_s = chance.choice(WAYS), chance.random() * 0.13
        async with Connection(stage.gateway.host) as connection:
            await connection.send(post(CHAT, body, key.text))
            if not stays:
                await asyncio.sleep(after_s)
                await leave(connection)
                return
            answer = await connection.answer()
            assert answer.status == 200, answer.body
            assert answer.body.count(b" water") == TOKENS
            whole += 1

    async def many() -> None:
        for _ in numbers:
            await one()

    await asyncio.gather(*(many() for _ in range(AT_ONCE)))
    return whole


async def test_after_ten_thousand_random_cancels_nothing_is_held(stage: Stage) -> None:
    """Limits are such that leaving a few places or reservations behind would have calls refused."""
    key = stage.gateway.issue(limits={"concurrent": 3 * AT_ONCE, "tpm": 2_000_000})
    begun_s = time.time()
    whole = await randomly(stage, key, RANDOM_CALLS)
    print(f"{RANDOM_CALLS} calls, of which {whole} stayed, in {time.time() - begun_s:.1f} s")
    assert whole > RANDOM_CALLS / 30
    await until_back(stage.gateway, stage.baseline)
    assert stage.emulation.running == 0
    records = stage.gateway.records(key.tenant)
    assert {record["outcome"] for record in records.values()} == {"served", "cancelled"}
    for entry in stage.emulation.entries():
        if entry.asked_s >= begun_s:
            record = records[entry.id]  # of every call that the engine has seen
            made = entry.tokens if record["outcome"] == "served" else entry.tokens_made
            assert record["estimated"] or record["tokens_out"] <= made, (record, entry)


async def test_a_gateway_that_leaks_is_found_out(tmp_path: Path) -> None:
    with staged(tmp_path, "tests.e2e.leaky") as stage:
        key = stage.gateway.issue()
        baseline = await at_rest(stage.gateway)
        async with calling(stage, key, ask("crowded", stream=True, fault="stall@3")) as connection:
            await read_tokens(connection, 3)
            await fin(connection)
        with pytest.raises(AssertionError, match="headrace_runtime_running crowded crowded-0"):
            await until_back(stage.gateway, baseline, s_max=3)
