"""Several workers behind one port: to clients, quotas, ledger and operator they are one gateway."""

from __future__ import annotations

import asyncio
import os
import re
import resource
import shutil
import signal
import socket
import sys
import textwrap
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
import tritonclient.grpc.aio
from tritonclient.utils import InferenceServerException

from loadtests.emulator import Emulator, Pace, serving
from loadtests.emulator.answer import Answer
from tests.e2e import servers
from tests.e2e.raw import Answer as Reply
from tests.e2e.raw import Connection, post, streaming
from tests.e2e.resources import at_rest
from tests.e2e.servers import GatewayProcess, Key, processes_of
from tests.e2e.test_refusals import CHAT
from tests.runtimes.test_vllm import CPU, ENGINE

WORKERS = 4
PLACES = 3
CONFIG = """
[server]
listen = "127.0.0.1:0"
grpc = "127.0.0.1:0"
admin = "127.0.0.1:0"
workers = {workers}
[[models]]
name = "echo"
replicas = [{{ kind = "echo" }}]
[[models]]
name = "slow"
replicas = [{{ kind = "echo", token_s = 0.02 }}]
[[models]]
name = "narrow"
replicas = [{{ kind = "remote", url = "{url}/v1", connections_max = {places} }}]
[[models]]
name = "wide"
replicas = [{{ kind = "remote", url = "{url}/v1", connections_max = 1000 }}]
"""
HELLO = {"model": "echo", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 1}


class Watched(Emulator):
    """Remembers how many calls it had at once."""

    peak = 0

    def take(self, *call: Any) -> Answer | None:
        answer = super().take(*call)
        self.peak = max(self.peak, self.running)
        return answer


@pytest.fixture(scope="module")
def engine() -> Iterator[tuple[Watched, str]]:
    """An engine that takes a while, and where it is."""
    emulator, address = Watched(Pace(first_token_s=0.03, tokens=4)), list[str]()
    started, ended = threading.Event(), threading.Event()

    async def serve() -> None:
        async with serving(emulator, "127.0.0.1:0") as where:
            address.append(where)
            started.set()
            await asyncio.to_thread(ended.wait)

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    assert started.wait(10)
    yield emulator, address[0]
    ended.set()
    thread.join(10)


@pytest.fixture(scope="module")
def gateway(engine: tuple[Watched, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    yield from running(engine, tmp_path_factory.mktemp("w"), configured=1, options=("--workers", str(WORKERS)))


@pytest.fixture
def own(engine: tuple[Watched, str], tmp_path: Path) -> Iterator[GatewayProcess]:
    """One to be ill-treated."""
    yield from running(engine, tmp_path)


def running(
    engine: tuple[Watched, str], folder: Path, *, configured: int = WORKERS, options: tuple[str, ...] = ()
) -> Iterator[GatewayProcess]:
    gateway = GatewayProcess(folder, CONFIG.format(workers=configured, url=engine[1], places=PLACES))
    gateway.start("ready in", *options)
    session = {gateway.pid}
    yield gateway
    if gateway.runs:
        assert gateway.stop() == 0, gateway.text
    assert processes_of(session) == {}, "a gateway left processes behind"


@asynccontextmanager
async def connections(gateway: GatewayProcess, count: int) -> AsyncIterator[list[Connection]]:
    """Open ones; the kernel spreads them over the workers."""
    async with AsyncExitStack() as opened:
        yield [await opened.enter_async_context(Connection(gateway.host)) for _ in range(count)]


async def at_once(gateway: GatewayProcess, key: Key, count: int, body: dict[str, Any] | None = None) -> list[Reply]:
    """So many calls, each on a connection that is there already."""
    request = post(CHAT, HELLO if body is None else body, key.text)
    async with connections(gateway, count) as opened:
        await asyncio.gather(*(connection.send(request) for connection in opened))
        return await asyncio.gather(*(connection.answer() for connection in opened))


def statuses(answers: list[Reply]) -> dict[int, int]:
    found = [answer.status for answer in answers]
    return {status: found.count(status) for status in set(found)}


def gauges(gateway: GatewayProcess) -> dict[str, float]:
    """Every sample of /metrics, by its name and labels."""
    with gateway.admin_client() as admin:
        answer = admin.get("/metrics")
    assert answer.status_code == 200, f"{answer.text}\n{gateway.text}"
    pairs = (line.rsplit(" ", 1) for line in answer.text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, value in pairs}


# ---- what is decided together


async def test_of_two_hundred_at_once_exactly_the_budget_is_served(gateway: GatewayProcess) -> None:
    for _ in range(5):
        key = gateway.issue(limits={"rpm": 10})
        assert statuses(await at_once(gateway, key, 200)) == {200: 10, 429: 190}
    journals = [
        sum(file.stat().st_size for file in (gateway.state / "journal" / str(it)).glob("*.jsonl"))
        for it in range(WORKERS)
    ]
    assert all(journals), "not every worker was asked: this test could not fail"


async def test_a_limit_of_calls_at_once_is_one_for_all_workers(
    gateway: GatewayProcess, engine: tuple[Watched, str]
) -> None:
    key = gateway.issue(limits={"concurrent": 3})
    request = post(CHAT, {**HELLO, "model": "wide"}, key.text)
    refused = 0

    async def call(connection: Connection) -> None:
        nonlocal refused
        await connection.send(request)
        while (await connection.answer()).status == 429:
            refused += 1
            await asyncio.sleep(0.01)
            await connection.send(request)

    engine[0].peak = 0
    async with connections(gateway, 40) as opened:
        await asyncio.gather(*(call(connection) for connection in opened))
    assert engine[0].peak == 3
    assert refused


async def test_tokens_that_were_not_used_are_given_back_whichever_worker_took_them(gateway: GatewayProcess) -> None:
    key = gateway.issue(limits={"tpm": 1000})
    for _ in range(20):  # each reserves 900, uses a handful, and may reach another worker than the one before
        assert statuses(await at_once(gateway, key, 1, {**HELLO, "max_tokens": 900})) == {200: 1}


async def test_all_workers_together_hold_no_more_places_than_an_engine_has(
    gateway: GatewayProcess, engine: tuple[Watched, str]
) -> None:
    key = gateway.issue()
    engine[0].peak = 0
    assert statuses(await at_once(gateway, key, 60, {**HELLO, "model": "narrow"})) == {200: 60}
    assert engine[0].peak == PLACES
    with gateway.admin_client() as admin:
        look = next(it for it in admin.get("/models").json() if it["name"] == "narrow")
    assert look["queue"] == {
        "running": 0, "running_max": PLACES, "waiting": 0, "waiting_max": WORKERS * 256, "tenants_waiting": 0
    }  # fmt: skip


async def test_a_revoked_key_is_refused_by_every_worker(gateway: GatewayProcess) -> None:
    key = gateway.issue()
    assert statuses(await at_once(gateway, key, 40)) == {200: 40}
    with gateway.admin_client() as admin:
        assert admin.delete(f"/keys/{key.id}").is_success
    async with asyncio.timeout(10):
        while statuses(await at_once(gateway, key, 40)) != {401: 40}:
            pass


# ---- what is told as one


async def test_numbers_are_of_all_workers(gateway: GatewayProcess) -> None:
    key = gateway.issue()
    name = 'headrace_calls_total{model="echo",outcome="served",route="/v1/chat/completions"}'
    before = gauges(gateway).get(name, 0)
    await at_once(gateway, key, 100)
    after = gauges(gateway)
    assert after[name] == before + 100
    assert after["headrace_workers_up"] == WORKERS
    assert after['headrace_replica_up{model="echo",replica="echo-0"}'] == 1
    assert after['headrace_call_seconds_bucket{le="+Inf",model="echo"}'] >= after[name]


async def test_every_call_has_its_one_record(gateway: GatewayProcess) -> None:
    key = gateway.issue()
    answers = await at_once(gateway, key, 100)
    assert {answer.headers["x-request-id"] for answer in answers} == set(gateway.records(key.tenant))


async def test_a_worker_that_does_not_answer_is_said_and_the_others_serve(own: GatewayProcess) -> None:
    key = own.issue()
    await at_once(own, key, 100)
    before = gauges(own)
    stopped = own.workers[0]
    os.kill(stopped, signal.SIGSTOP)
    try:
        assert re.fullmatch(r"worker \d: no answer", trouble(own))
        assert statuses(await at_once(own, key, 20)) == {200: 20}
        after = gauges(own)
        assert after["headrace_workers_up"] == WORKERS - 1
        counted = [name for name in before if name.startswith("headrace_calls_total")]
        assert all(after[name] >= before[name] for name in counted)
    finally:
        os.kill(stopped, signal.SIGCONT)


async def test_what_a_worker_counted_that_ends_while_it_is_asked_for_is_counted_once(own: GatewayProcess) -> None:
    key = own.issue()
    await at_once(own, key, 100)
    name = 'headrace_calls_total{model="echo",outcome="served",route="/v1/chat/completions"}'
    counted = gauges(own)[name]
    slow, killed = own.workers[:2]
    os.kill(slow, signal.SIGSTOP)
    try:
        asked = asyncio.create_task(asyncio.to_thread(gauges, own))
        await asyncio.sleep(0.5)  # the others have answered, and for this one it waits a second
        os.kill(killed, signal.SIGKILL)
        assert (await asked)[name] == counted
    finally:
        os.kill(slow, signal.SIGCONT)
    await until_workers(own, without=killed)
    assert gauges(own)[name] == counted


async def test_a_worker_that_stops_leaves_new_calls_to_the_others(own: GatewayProcess) -> None:
    key, leaving = own.issue(), own.workers[0]
    async with AsyncExitStack() as opened:
        streams = [
            await opened.enter_async_context(streaming(own.host, key.text, words(150))) for _ in range(24)
        ]  # some in each
        os.kill(leaving, signal.SIGTERM)
        async with asyncio.timeout(10):
            while not re.fullmatch(r"worker \d: it is stopping", trouble(own)):
                await asyncio.sleep(0.01)
        for _ in range(20):
            assert statuses(await at_once(own, key, 8)) == {200: 8}
        ends = [(await stream.rest())[-1] for stream in streams]
    assert ends == ["[DONE]"] * len(streams)
    await until_workers(own, without=leaving)


async def test_a_worker_comes_back_though_its_leader_had_no_descriptor_for_it(own: GatewayProcess) -> None:
    key, killed = own.issue(), own.workers[0]
    limits = resource.prlimit(own.pid, resource.RLIMIT_NOFILE)
    with own.admin_client() as admin:
        admin.get("/healthz")  # a connection, to be had later
        resource.prlimit(own.pid, resource.RLIMIT_NOFILE, (3, limits[1]))
        try:
            os.kill(killed, signal.SIGKILL)
            own.wait_for("could not be kept; it is started again in")
        finally:
            resource.prlimit(own.pid, resource.RLIMIT_NOFILE, limits)
    await until_workers(own, without=killed)
    assert statuses(await at_once(own, key, 20)) == {200: 20}
    assert own.stop() == 0


async def test_what_its_leader_found_in_the_journal_is_told_too(own: GatewayProcess) -> None:
    key = own.issue()
    await at_once(own, key, 1)
    (record,) = own.records(key.tenant).values()
    assert own.stop() == 0
    left = own.state / "journal" / "1-left.jsonl"
    left.write_bytes(msgspec.json.encode({**record, "id": "left", "tokens_in": 2**63}) + b"\n")
    own.start()
    async with asyncio.timeout(10):
        while gauges(own)["headrace_journal_set_aside_total"] != 1:
            await asyncio.sleep(0.05)


async def test_a_worker_that_can_not_start_is_tried_again_while_the_others_serve(
    engine: tuple[Watched, str], tmp_path: Path
) -> None:
    own = GatewayProcess(tmp_path, CONFIG.format(workers=2, url=engine[1], places=PLACES))
    in_the_way = own.state / "journal" / "0"
    in_the_way.parent.mkdir(parents=True)
    in_the_way.touch()
    own.start("listening after")
    own.wait_for("worker 0 ended with 1; it is started again in")
    own.wait_for("worker 1 headrace.replica: replica wide-0 is ready")
    key = own.issue()
    assert statuses(await at_once(own, key, 20)) == {200: 20}
    in_the_way.unlink()
    own.wait_for("ready in")
    assert gauges(own)["headrace_workers_up"] == 2
    assert own.stop() == 0


def test_workers_run_the_code_of_their_leader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkout = tmp_path / "checkout"
    for package in ("gateway", "runtimes"):
        shutil.copytree(servers.REPOSITORY / package, checkout / package)
    module = checkout / "gateway" / "worker.py"
    said = 'print("a worker of the checkout", file=sys.stderr)'
    module.write_text(module.read_text().replace("async def work(", f"{said}\n\n\nasync def work("))
    monkeypatch.setattr(servers, "REPOSITORY", checkout)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    own = GatewayProcess(tmp_path, CONFIG.format(workers=2, url="http://127.0.0.1:9", places=PLACES))
    own.start("listening after")
    own.wait_for("a worker of the checkout")
    assert own.stop() == 0


async def test_a_worker_takes_calls_over_grpc_though_an_engine_does_not_say_how_it_is(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        own = GatewayProcess(tmp_path, CONFIG.format(workers=2, url=url, places=PLACES))
        own.start("listening after")
        async with tritonclient.grpc.aio.InferenceServerClient(own.grpc) as client, asyncio.timeout(20):
            while not await lives(client):
                await asyncio.sleep(0.05)
        assert "narrow-0 is" not in own.text, "it said how it is, so this shows nothing"
        assert own.stop() == 0


# ---- an engine that is started here


VLLM = """
[server]
listen = "127.0.0.1:0"
grpc = "127.0.0.1:0"
admin = "127.0.0.1:0"
workers = 2
[[models]]
name = "chat"
replicas = [{{ kind = "vllm", artifact = "{model}", running_max = 4 }}]
"""


async def test_one_engine_serves_all_workers_and_is_nobody_elses_to_end(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").touch()
    gateway = GatewayProcess(tmp_path, VLLM.format(model=model))
    home = gateway.state / "engines" / "vllm-0.32.0"
    (home / "bin").mkdir(parents=True)
    (home / ".ready").write_bytes(msgspec.json.encode(CPU))
    (home / "bin" / "python").write_text(textwrap.dedent(ENGINE).format(python=sys.executable))
    (home / "bin" / "python").chmod(0o755)
    gateway.start()
    key, session = gateway.issue(), gateway.sessions()
    assert len(session) == 2, "one gateway, one engine"
    hello = {**HELLO, "model": "chat"}
    assert statuses(await at_once(gateway, key, 20, hello)) == {200: 20}
    os.kill(gateway.workers[0], signal.SIGKILL)
    async with asyncio.timeout(30):
        while gauges(gateway)["headrace_workers_up"] < 2:
            await asyncio.sleep(0.05)
    assert gateway.sessions() == session, "the engine was started anew for one of its workers"
    async with asyncio.timeout(30):
        while statuses(await at_once(gateway, key, 20, hello)) != {200: 20}:
            await asyncio.sleep(0.05)
    assert gateway.stop() == 0
    assert processes_of(session) == {}


# ---- ends


async def test_a_killed_worker_is_started_again_and_leaves_nothing_taken(own: GatewayProcess) -> None:
    key = own.issue(limits={"concurrent": 8})
    killed = own.workers[0]
    async with AsyncExitStack() as opened:
        streams = [await opened.enter_async_context(streaming(own.host, key.text, words(100))) for _ in range(8)]
        assert statuses(await at_once(own, key, 8)) == {429: 8}
        os.kill(killed, signal.SIGKILL)
        ends = [(await stream.rest())[-1:] for stream in streams]
    await until_workers(own, without=killed)
    whole = [stream.id for stream, end in zip(streams, ends, strict=True) if end == ["[DONE]"]]
    records = own.records(key.tenant)
    assert {records[id]["outcome"] for id in whole} <= {"served"}
    await at_rest(own)
    async with AsyncExitStack() as opened:  # the whole limit is there again
        again = [await opened.enter_async_context(streaming(own.host, key.text, words(100))) for _ in range(8)]
        assert [stream.status for stream in again] == [200] * 8
        assert statuses(await at_once(own, key, 8)) == {429: 8}


async def test_places_a_killed_worker_held_are_there_again(own: GatewayProcess, engine: tuple[Watched, str]) -> None:
    key = own.issue()
    for _ in range(3):
        killed = own.workers[0]
        request = post(CHAT, {**HELLO, "model": "narrow"}, key.text)
        async with connections(own, 40) as opened:
            await asyncio.gather(*(connection.send(request) for connection in opened))
            os.kill(killed, signal.SIGKILL)
            answers = await asyncio.gather(*(answer_of(connection) for connection in opened))
        assert set(answers) <= {200, 0}
        await until_workers(own, without=killed)
    engine[0].peak = 0
    assert statuses(await at_once(own, key, 30, {**HELLO, "model": "narrow"})) == {200: 30}
    assert engine[0].peak == PLACES
    await at_rest(own)


async def test_no_record_of_a_completed_call_is_lost_with_a_worker(own: GatewayProcess) -> None:
    key, completed, enough = own.issue(), list[str](), asyncio.Event()

    async def call() -> None:
        while not enough.is_set():
            with suppress(OSError, asyncio.IncompleteReadError):
                async with Connection(own.host) as connection:
                    await connection.send(post(CHAT, HELLO, key.text))
                    answer = await connection.answer()
                    if answer.body.endswith(b"}"):
                        completed.append(answer.headers["x-request-id"])

    load = [asyncio.create_task(call()) for _ in range(8)]
    for _ in range(3):
        killed, begun = own.workers[0], len(completed)
        async with asyncio.timeout(20):
            while len(completed) < begun + 100:
                await asyncio.sleep(0.01)
        os.kill(killed, signal.SIGKILL)
        await until_workers(own, without=killed)
    enough.set()
    await asyncio.gather(*load)
    records = own.records(key.tenant)
    assert [id for id in completed if id not in records] == []
    assert {records[id]["outcome"] for id in completed} == {"served"}
    assert own.stop() == 0
    assert own.records(key.tenant).keys() == records.keys()


async def test_no_worker_outlives_a_killed_leader(own: GatewayProcess) -> None:
    session = {own.pid}
    key = own.issue()
    async with streaming(own.host, key.text, words(1000)) as stream:
        await stream.text(1)
        own.kill()
    async with asyncio.timeout(10):
        while processes_of(session):
            await asyncio.sleep(0.02)
    own.start()
    assert statuses(await at_once(own, key, 20)) == {200: 20}
    outcomes = {record["outcome"] for record in own.records(key.tenant).values()}
    assert "served" in outcomes


async def test_streams_in_all_workers_end_whole_before_the_gateway_does(own: GatewayProcess) -> None:
    key = own.issue()
    async with AsyncExitStack() as opened:
        streams = [await opened.enter_async_context(streaming(own.host, key.text, words(50))) for _ in range(16)]
        own.terminate()
        ends = [(await stream.rest())[-1] for stream in streams]
    assert ends == ["[DONE]"] * len(streams)
    assert await asyncio.to_thread(own.wait) == 0
    records = own.records(key.tenant)
    assert {records[stream.id]["outcome"] for stream in streams} == {"served"}
    assert "killed" not in own.text


# ---- helpers


def words(count: int) -> dict[str, Any]:
    return {"model": "slow", "messages": [{"role": "user", "content": "word " * count}]}


def trouble(gateway: GatewayProcess) -> str:
    """What is wrong with its workers, of which some serve; empty if nothing is."""
    with gateway.admin_client() as admin:
        ready = admin.get("/readyz")
    assert ready.status_code == 200, ready.text
    return str(ready.json()["checks"].get("workers", {}).get("reason") or "")


async def lives(client: tritonclient.grpc.aio.InferenceServerClient) -> bool:
    try:
        return bool(await client.is_server_live())
    except InferenceServerException:
        return False


async def answer_of(connection: Connection) -> int:
    """Its status; 0 if the connection broke first."""
    try:
        return (await connection.answer()).status
    except (OSError, asyncio.IncompleteReadError):
        return 0


async def until_workers(gateway: GatewayProcess, *, without: int, count: int = WORKERS) -> None:
    """Return once all of them answer, none of which is this process."""
    async with asyncio.timeout(30):
        while without in gateway.workers or gauges(gateway)["headrace_workers_up"] < count:
            await asyncio.sleep(0.05)
