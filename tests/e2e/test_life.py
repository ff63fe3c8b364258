"""Starting, stopping, and being killed: what a gateway owes its operator and its ledger."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.raw import Connection, post, streaming
from tests.e2e.servers import GatewayProcess, Key, headrace
from tests.e2e.test_refusals import CHAT, COMPLETIONS, require_refusal

ECHO = """
[server]
listen = "127.0.0.1:0"
grpc = "127.0.0.1:0"
admin = "127.0.0.1:0"
drain_s_max = {drain_s_max}
[[models]]
name = "echo"
replicas = [{{ kind = "echo" }}]
[[models]]
name = "slow"
replicas = [{{ kind = "echo", token_s = 0.05 }}]
"""

Make = Callable[..., GatewayProcess]


@pytest.fixture
def make(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Make]:
    """Makes gateways of their own, not yet started, and ends whatever of them still runs."""
    made: list[GatewayProcess] = []

    def build(drain_s_max: float = 30) -> GatewayProcess:
        made.append(GatewayProcess(tmp_path_factory.mktemp("l"), ECHO.format(drain_s_max=drain_s_max)))
        return made[-1]

    yield build
    for gateway in made:
        if gateway.runs:
            gateway.kill()


def words(count: int, model: str = "slow") -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": "word " * count}]}


# ---- starting ----------------------------------------------------------------------------------------------


def test_a_second_gateway_on_the_same_state_is_refused(gateway: GatewayProcess) -> None:
    second = headrace("serve", "--config", str(gateway.config))
    assert second.returncode == 1
    assert f"another gateway runs on {gateway.state}" in second.stderr
    assert "Traceback" not in second.stderr


def test_a_port_in_use_is_named(make: Make) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        gateway = make()
        gateway.config.write_text(gateway.config.read_text().replace('listen = "127.0.0.1:0"', f'listen = "{address}"'))
        refused = headrace("serve", "--config", str(gateway.config))
    assert refused.returncode == 1
    assert "server.listen" in refused.stderr
    assert address in refused.stderr
    assert "Traceback" not in refused.stderr


MODEL = '[[models]]\nname = "echo"\nreplicas = [{ kind = "echo" }]\n'
WRONG = {
    "not TOML": ("models = [", "not TOML"),
    "no models": ("[server]\n", "models"),
    "a field nobody knows": (MODEL + "[server]\nlisten_on = 5\n", "server: "),
    "a model without replicas": ('[[models]]\nname = "a"\nreplicas = []\n', "models[0].replicas"),
    "a kind nobody knows": ('[[models]]\nname = "a"\nreplicas = [{ kind = "tgi" }]\n', "models[0].replicas[0]"),
    "no kind": ('[[models]]\nname = "a"\nreplicas = [{}]\n', "models[0].replicas[0]"),
    "a replica's field of the wrong type": (
        MODEL + '[[models]]\nname = "b"\nreplicas = [{ kind = "echo" }, { kind = "echo", token_s = "fast" }]\n',
        "models[1].replicas[1].token_s",
    ),
    "a replica's field nobody knows": (
        '[[models]]\nname = "a"\nreplicas = [{ kind = "echo", speed = 1 }]\n',
        "models[0].replicas[0]",
    ),
    "a number out of range": (MODEL + "[server.bounds]\njson_depth_max = 0\n", "server.bounds.json_depth_max"),
    "an address without a port": (MODEL + '[server]\nlisten = "localhost"\n', "server.listen"),
    "a name with a blank": ('[[models]]\nname = "my model"\nreplicas = [{ kind = "echo" }]\n', "models[0].name"),
    "a name used twice": (MODEL + MODEL, "models[1].name"),
    "an engine option that is not the operator's": (
        '[[models]]\nname = "a"\nreplicas = [{ kind = "vllm", artifact = "x", args = ["--trust-remote-code"] }]\n',
        "models[0].replicas[0]",
    ),
    "a URL that is none": (
        '[[models]]\nname = "a"\nreplicas = [{ kind = "remote", url = "localhost" }]\n',
        "models[0].replicas[0]",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_bad_configuration_is_refused_with_the_path_of_the_field(tmp_path: Path, name: str) -> None:
    text, field = WRONG[name]
    file = tmp_path / "headrace.toml"
    file.write_text(f'{text}\n[state]\npath = "{tmp_path}/s"\n')
    refused = headrace("check", str(file))
    assert refused.returncode == 1
    assert str(file) in refused.stderr
    assert field in refused.stderr
    assert len(refused.stderr.splitlines()) == 1, "one line says it all"


def test_what_check_refuses_serve_refuses_too(tmp_path: Path) -> None:
    file = tmp_path / "headrace.toml"
    file.write_text(f'{MODEL}\n[server]\nlisten = 5\n[state]\npath = "{tmp_path}/s"\n')
    refused = headrace("serve", "--config", str(file))
    assert refused.returncode == 1
    assert "server.listen" in refused.stderr
    assert not (tmp_path / "s").exists(), "nothing is begun with a bad configuration"


def test_a_configuration_that_is_not_there_is_named(tmp_path: Path) -> None:
    refused = headrace("check", str(tmp_path / "none.toml"))
    assert refused.returncode == 1
    assert "none.toml" in refused.stderr


# ---- stopping ----------------------------------------------------------------------------------------------


async def test_a_stream_under_way_ends_as_it_should_while_the_gateway_stops(make: Make) -> None:
    gateway = make().start()
    key = gateway.issue()
    async with (
        Connection(gateway.host) as idle,
        httpx.AsyncClient(base_url=f"http://{gateway.admin}", trust_env=False) as admin,
        streaming(gateway.host, key.text, words(40)) as stream,
    ):
        assert (await admin.get("/readyz")).status_code == 200
        await stream.text(2)
        gateway.terminate()
        await asyncio.to_thread(gateway.wait_for, "stopping")
        readiness = await until_unready(admin)
        await idle.send(post(CHAT, words(1), key.text))
        refused = await idle.answer()
        events = await stream.rest()
    assert await asyncio.to_thread(gateway.wait) == 0
    assert "stopping" in readiness.json()["checks"]["gateway"]["reason"]
    require_refusal(refused.status, refused.headers, refused.body, expected=503, code="draining", retry=True)
    assert float(refused.headers["retry-after"]) > 0
    assert events[-1] == "[DONE]"
    assert gateway.records(key.tenant)[stream.id]["outcome"] == "served"
    assert "Traceback" not in gateway.text


async def test_a_stream_that_outlasts_the_drain_ends_in_an_error(make: Make) -> None:
    gateway = make(drain_s_max=0.5).start()
    key = gateway.issue()
    async with streaming(gateway.host, key.text, words(1000)) as stream:
        await stream.text(2)
        gateway.terminate()
        events = await stream.rest()
    assert await asyncio.to_thread(gateway.wait) == 0
    assert "[DONE]" not in events
    assert '"code":"draining"' in events[-1]
    record = gateway.records(key.tenant)[stream.id]
    assert record["code"] == "draining"
    assert record["tokens_out"] == sum(bool(chunk.get("choices")) for chunk in stream.chunks) - 1  # the opening one
    assert "Traceback" not in gateway.text


async def test_a_request_that_is_still_being_sent_when_the_gateway_stops_is_told_so(make: Make) -> None:
    gateway = make(drain_s_max=0.2).start()
    key = gateway.issue()
    async with Connection(gateway.host) as connection:
        await connection.send(post(CHAT, words(1), key.text)[:-1])
        gateway.terminate()
        answer = await connection.answer()
    assert await asyncio.to_thread(gateway.wait) == 0
    require_refusal(answer.status, answer.headers, answer.body, expected=503, code="draining", retry=True)


async def until_unready(admin: httpx.AsyncClient) -> httpx.Response:
    async with asyncio.timeout(10):
        while (answer := await admin.get("/readyz")).status_code == 200:
            await asyncio.sleep(0.01)
    return answer


def test_an_idle_gateway_stops_at_once_and_starts_again(make: Make) -> None:
    gateway = make().start()
    assert gateway.stop() == 0
    gateway.start()
    assert gateway.stop() == 0


@pytest.mark.parametrize("workers", [1, 2])
def test_to_be_asked_to_stop_again_and_again_is_no_other_end(make: Make, workers: int) -> None:
    gateway = make().start("ready in", "--workers", str(workers))
    while gateway.runs:
        gateway.terminate()
        time.sleep(0.001)
    assert gateway.wait() == 0, gateway.text


# ---- being killed ------------------------------------------------------------------------------------------


async def test_a_killed_gateway_loses_no_call_that_a_client_saw_completed(make: Make) -> None:
    gateway = make().start()
    key = gateway.issue()
    completed: list[str] = []
    enough = asyncio.Event()
    load = [asyncio.create_task(call_on(gateway, key, number, completed, enough)) for number in range(8)]
    await enough.wait()
    gateway.kill()
    await asyncio.gather(*load)

    before = gateway.records(key.tenant)  # the command folds what a killed gateway left
    gateway.start()
    after = gateway.records(key.tenant)
    assert gateway.stop() == 0
    assert len(completed) >= ENOUGH
    for records in (before, after, gateway.records(key.tenant)):
        assert [id for id in completed if id not in records] == []
        assert {records[id]["outcome"] for id in completed} == {"served"}
        assert len(records) <= len(completed) + len(load), "only calls under way may have a record besides"


ENOUGH = 300


async def call_on(gateway: GatewayProcess, key: Key, number: int, completed: list[str], enough: asyncio.Event) -> None:
    """Call until the gateway is gone: chats, completions and streams in turn. Note whom it answered whole."""
    while True:
        try:
            if number % 2:
                async with streaming(gateway.host, key.text, words(5, "echo")) as stream:
                    if (await stream.rest())[-1:] == ["[DONE]"]:
                        completed.append(stream.id)
            else:
                async with Connection(gateway.host) as connection:
                    await connection.send(post(COMPLETIONS, {"model": "echo", "prompt": "a b c"}, key.text))
                    answer = await connection.answer()
                    if answer.body.endswith(b"}"):
                        completed.append(answer.headers["x-request-id"])
        except (OSError, asyncio.IncompleteReadError):
            return  # it is gone
        if len(completed) >= ENOUGH:
            enough.set()
