"""An alias is switched from one model to another while calls come in by every door: none fails, and the shares are as
they were set, in all workers."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.grpc.aio

from runtimes.artifact import Shelf
from tests import tiny
from tests.conftest import LISTEN
from tests.e2e.servers import GatewayProcess, Key

CONFIG = f"""{LISTEN}
workers = 2
[[models]]
name = "echo-a"
replicas = [{{ kind = "echo" }}]
[[models]]
name = "echo-b"
replicas = [{{ kind = "echo" }}]
[[models]]
name = "tiny-a"
replicas = [{{ kind = "onnx", artifact = "tiny@stable" }}]
[[models]]
name = "tiny-b"
replicas = [{{ kind = "onnx", artifact = "tiny@stable" }}]
"""
CALLS = 200
"""Of each door, under each setting: enough to tell a half from none and from all."""
MESSAGES = [{"role": "user", "content": "hello"}]
TEXT = {"name": "text", "datatype": "BYTES", "shape": [1], "data": ["my card"]}

Door = Callable[[httpx.AsyncClient, Any, str], Awaitable[str]]
"""Makes one call of an alias and tells which model answered."""


async def chat(client: httpx.AsyncClient, _: Any, alias: str) -> str:
    answer = await client.post("/v1/chat/completions", json={"model": alias, "messages": MESSAGES})
    return str(_ok(answer)["model"])


async def stream(client: httpx.AsyncClient, _: Any, alias: str) -> str:
    body = {"model": alias, "messages": MESSAGES, "stream": True}
    answer = await client.post("/v1/chat/completions", json=body)
    assert answer.text.endswith("data: [DONE]\n\n"), answer.text
    return answer.text.split('"model":"')[1].split('"')[0]


async def generate(client: httpx.AsyncClient, _: Any, alias: str) -> str:
    return str(_ok(await client.post(f"/v2/models/{alias}/generate", json={"text_input": "hello"}))["model_name"])


async def classify(client: httpx.AsyncClient, _: Any, alias: str) -> str:
    told = _ok(await client.post("/v1/classify", json={"model": alias, "input": "my card"}))
    assert told["data"][0]["label"] == "card"
    return str(told["model"])


async def infer(client: httpx.AsyncClient, _: Any, alias: str) -> str:
    return str(_ok(await client.post(f"/v2/models/{alias}/infer", json={"inputs": [TEXT]}))["model_name"])


async def infer_by_grpc(client: httpx.AsyncClient, triton: Any, alias: str) -> str:
    text = tritonclient.grpc.aio.InferInput("text", [1], "BYTES")
    text.set_data_from_numpy(np.array(["my card"], object))
    headers = {"authorization": client.headers["authorization"]}
    found = await triton.infer(alias, [text], headers=headers)
    assert found.as_numpy("label")[0] == b"card"
    return str(found.get_response().model_name)


def _ok(answer: httpx.Response) -> Any:
    assert answer.status_code == 200, answer.text
    return answer.json()


class Load:
    """Calls of an alias by each of these doors, two at a time, for as long as it is on."""

    def __init__(self, gateway: GatewayProcess, key: Key, alias: str, doors: Sequence[Door]) -> None:
        self.gateway = gateway
        self.key = key
        self.alias = alias
        self.doors = doors
        self.answered: dict[Door, Counter[str]] = {}
        """By whom, since the last setting was known to all workers; of calls that began after that."""

    @asynccontextmanager
    async def on(self) -> AsyncIterator[None]:
        """Leaving raises what any call has."""
        async with asyncio.TaskGroup() as group, AsyncExitStack() as opened:
            callers = []
            for door in self.doors * 2:
                client = await opened.enter_async_context(self.gateway.client(self.key.text))
                triton = await opened.enter_async_context(
                    tritonclient.grpc.aio.InferenceServerClient(self.gateway.grpc)
                )
                callers.append(group.create_task(self._call(door, client, triton)))
            yield
            for caller in callers:
                caller.cancel()
            await asyncio.wait(callers)

    async def shares(self, *weights: str) -> list[Counter[str]]:
        """Set the alias anew, and see who answers then."""
        await asyncio.to_thread(self.gateway.command, "alias", "set", self.alias, *weights)
        await asyncio.to_thread(self.gateway.until_known, self.key.text)
        answered = self.answered = {door: Counter() for door in self.doors}
        async with asyncio.timeout(60):
            while any(them.total() < CALLS for them in answered.values()):
                await asyncio.sleep(0.05)
        return list(answered.values())

    async def _call(self, door: Door, client: httpx.AsyncClient, triton: Any) -> None:
        while True:
            answered = self.answered.get(door)
            by = await door(client, triton, self.alias)
            if answered is not None:
                answered[by] += 1


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    folder = tmp_path_factory.mktemp("a")
    (folder / "artifact").mkdir()
    gateway = GatewayProcess(folder, CONFIG)
    gateway.state.mkdir(mode=0o700)
    tiny.publish(Shelf(gateway.state / "shelf"), folder / "artifact")
    gateway.start()
    yield gateway
    assert gateway.stop() == 0, gateway.text


async def switched(gateway: GatewayProcess, alias: str, first: str, second: str, doors: Sequence[Door]) -> None:
    """From one model to both to the other. The key has no right to either but by the alias."""
    gateway.command("alias", "set", alias, f"{first}=1")
    key = gateway.issue(models=[alias])
    load = Load(gateway, key, alias, doors)
    async with load.on():
        for answered in await load.shares(f"{first}=100", f"{second}=0"):
            assert answered.keys() == {first}
        for answered in await load.shares(f"{first}=50", f"{second}=50"):
            assert answered.keys() == {first, second}
            # Eight standard deviations either way.
            assert abs(answered[first] - answered.total() / 2) < 8 * 0.5 * answered.total() ** 0.5
        for answered in await load.shares(f"{first}=0", f"{second}=100"):
            assert answered.keys() == {second}
    records = gateway.records(key.tenant).values()
    assert {it["outcome"] for it in records} <= {"served", "cancelled"}, "the last ones are called off here"
    assert {it["model"] for it in records if it["outcome"] == "served"} == {first, second}


async def test_generators_are_switched_under_load(served: GatewayProcess) -> None:
    await switched(served, "chat", "echo-a", "echo-b", [chat, stream, generate])


async def test_classifiers_are_switched_under_load(served: GatewayProcess) -> None:
    await switched(served, "intent", "tiny-a", "tiny-b", [classify, infer, infer_by_grpc])


async def test_an_alias_is_listed_while_it_is_there(served: GatewayProcess) -> None:
    served.command("alias", "set", "team/listed", "echo-a=3", "echo-b=1")
    assert {"team/listed": {"echo-a": 3, "echo-b": 1}}.items() <= {
        it["name"]: it["weights"] for it in served.command("alias", "list")
    }.items()
    key = served.issue(models=["team/*"])
    async with served.client(key.text) as client:
        assert [it["id"] for it in _ok(await client.get("/v1/models"))["data"]] == ["team/listed"]
        assert [it["name"] for it in _ok(await client.post("/v2/repository/index"))] == ["team/listed"]
        with served.admin_client() as admin:
            assert admin.delete("/aliases/team/listed").status_code == 204
        served.until_known(key.text)
        assert _ok(await client.get("/v1/models"))["data"] == []
        answer = await client.post("/v1/chat/completions", json={"model": "team/listed", "messages": MESSAGES})
        assert answer.status_code == 404


async def test_an_alias_outlives_its_gateway(tmp_path: Path) -> None:
    gateway = GatewayProcess(tmp_path, f'{LISTEN}\n[[models]]\nname = "echo"\nreplicas = [{{ kind = "echo" }}]\n')
    gateway.command("alias", "set", "chat", "echo=1")
    for _ in range(2):
        gateway.start()
        async with gateway.client(gateway.issue().text) as client:
            assert await chat(client, None, "chat") == "echo"
        assert gateway.stop() == 0, gateway.text


@pytest.mark.engine
async def test_one_artifact_moves_from_onnx_runtime_to_a_real_triton_under_load(triton_gateway: GatewayProcess) -> None:
    await switched(triton_gateway, "intent", "tiny-onnx", "tiny", [classify, infer, infer_by_grpc])
