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
from tests.e2e.engine import socket as vllm_socket
from tests.e2e.servers import GatewayProcess, Key
from tests.triton import socket

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
ENGINES = f"""{LISTEN}
workers = 2
[[models]]
name = "smollm2"
replicas = [{{{{ kind = "vllm", url = "unix:{{vllm}}" }}}}]
[[models]]
name = "tiny-triton"
replicas = [{{{{ kind = "triton", url = "{{triton}}", model = "model" }}}}]
[[models]]
name = "tiny-onnx"
replicas = [{{{{ kind = "onnx", artifact = "tiny@stable" }}}}]
"""
CALLS = 100
"""Of each door, under each setting: enough to tell a half from none and from all."""
ONE_TOKEN = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 1}
TEXT = {"name": "text", "datatype": "BYTES", "shape": [1], "data": ["my card"]}

Door = Callable[[httpx.AsyncClient, Any, str], Awaitable[str]]
"""Makes one call of an alias and tells which model answered."""


async def chat(client: httpx.AsyncClient, _: Any, alias: str) -> str:
    answer = await client.post("/v1/chat/completions", json={"model": alias, **ONE_TOKEN})
    return str(_ok(answer)["model"])


async def stream(client: httpx.AsyncClient, _: Any, alias: str) -> str:
    body = {"model": alias, **ONE_TOKEN, "stream": True}
    answer = await client.post("/v1/chat/completions", json=body)
    assert answer.text.endswith("data: [DONE]\n\n"), answer.text
    return answer.text.split('"model":"')[1].split('"')[0]


async def generate(client: httpx.AsyncClient, _: Any, alias: str) -> str:
    body = {"text_input": "hello", "max_tokens": 1}
    return str(_ok(await client.post(f"/v2/models/{alias}/generate", json=body))["model_name"])


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


GENERATE, CLASSIFY = (chat, stream, generate), (classify, infer, infer_by_grpc)


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

    async def shares(self, *weights: str) -> dict[Door, Counter[str]]:
        """Set the alias anew, and see who answers then."""
        await asyncio.to_thread(self.gateway.command, "alias", "set", self.alias, *weights)
        await asyncio.to_thread(self.gateway.until_known, self.key.text)
        answered = self.answered = {door: Counter() for door in self.doors}
        async with asyncio.timeout(60):
            while any(them.total() < CALLS for them in answered.values()):
                await asyncio.sleep(0.05)
        return answered

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


async def switched(
    gateway: GatewayProcess,
    first: str,
    second: str,
    doors: Sequence[Door],
    *,
    beside: str = "",
    others: Sequence[Door] = (),
) -> None:
    """`doors` go from one model to both to the other, and `others` on to the one `beside`. The key has no right to any
    of them but by the alias."""
    always = [f"{beside}=1"] if beside else []
    gateway.command("alias", "set", "it", *always, f"{first}=100", f"{second}=0")
    key = gateway.issue(models=["it"])
    load = Load(gateway, key, "it", (*doors, *others))
    async with load.on():
        for weights in ((100, 0), (50, 50), (0, 100)):
            answered = await load.shares(*always, f"{first}={weights[0]}", f"{second}={weights[1]}")
            for door in others:
                assert answered[door].keys() == {beside}
            for door in doors:
                calls = answered[door].total()
                assert sum(answered[door][it] for it in (first, second)) == calls
                # A half within eight standard deviations.
                off = abs(answered[door][first] - calls * weights[0] / 100)
                assert off <= (8 * 0.5 * calls**0.5 if weights[0] == 50 else 0), (weights, answered[door])
    records = gateway.records(key.tenant).values()
    assert {it["outcome"] for it in records} <= {"served", "cancelled"}, "the last ones are called off here"
    served = {it["model"] for it in records if it["outcome"] == "served"}
    assert served == {first, second, beside} - {""}


async def test_generators_are_switched_under_load(served: GatewayProcess) -> None:
    await switched(served, "echo-a", "echo-b", GENERATE)


async def test_classifiers_are_switched_under_load(served: GatewayProcess) -> None:
    await switched(served, "tiny-a", "tiny-b", CLASSIFY)


async def test_a_generator_and_classifiers_stand_under_one_name(served: GatewayProcess) -> None:
    await switched(served, "tiny-a", "tiny-b", CLASSIFY, beside="echo-a", others=GENERATE)


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
        answer = await client.post("/v1/chat/completions", json={"model": "team/listed", **ONE_TOKEN})
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
async def test_onnx_runtime_triton_and_vllm_stand_under_one_name(
    engine_gateway: GatewayProcess, triton_gateway: GatewayProcess, tmp_path: Path
) -> None:
    """One more gateway before the engines of two."""
    gateway = GatewayProcess(tmp_path, ENGINES.format(vllm=vllm_socket(engine_gateway), triton=socket(triton_gateway)))
    gateway.state.mkdir(mode=0o700)
    (gateway.state / "shelf").symlink_to(triton_gateway.state / "shelf")
    gateway.start()
    try:
        await switched(gateway, "tiny-onnx", "tiny-triton", CLASSIFY, beside="smollm2", others=GENERATE)
    finally:
        assert gateway.stop() == 0, gateway.text
