"""The gRPC listener's life: it opens with the gateway, serves from every worker, drains, and closes."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from tests.conftest import LISTEN
from tests.e2e.servers import GatewayProcess, Key, headrace

MODELS = """
[[models]]
name = "echo"
replicas = [{ kind = "echo" }]
[[models]]
name = "slow"
replicas = [{ kind = "echo", token_s = 0.02 }]
"""
WORDS = " ".join(["word"] * 50)
Start = Callable[..., GatewayProcess]
#: One connection a channel: by itself gRPC shares them between channels.
OWN = (("grpc.use_local_subchannel_pool", 1),)


@asynccontextmanager
async def channels(gateway: GatewayProcess, count: int) -> AsyncIterator[list[Any]]:
    async with AsyncExitStack() as opened:
        made = [grpc.aio.insecure_channel(gateway.grpc, options=OWN) for _ in range(count)]
        yield [await opened.enter_async_context(channel) for channel in made]


def asked(model: str, *, stream: bool) -> Any:
    inputs = [{"name": "text_input", "datatype": "BYTES", "shape": [1]}]
    inputs.append({"name": "stream", "datatype": "BOOL", "shape": [1]})
    raws = [len(WORDS).to_bytes(4, "little") + WORDS.encode(), bytes([stream])]
    return service_pb2.ModelInferRequest(model_name=model, inputs=inputs, raw_input_contents=raws)


def shown(key: Key) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {key.text}"),)


async def answers(channel: Any, key: Key) -> bool:
    """Whether a call gets its answer; again, if its worker was killed amid it."""
    stub: Any = service_pb2_grpc.GRPCInferenceServiceStub(channel)
    while True:
        try:
            answer = await stub.ModelInfer(asked("echo", stream=False), metadata=shown(key), timeout=20)
        except grpc.aio.AioRpcError as error:
            assert error.code() is grpc.StatusCode.UNAVAILABLE
            await asyncio.sleep(0.05)
        else:
            return bool(answer.raw_output_contents[0][4:].decode() == WORDS)


def text(answer: Any) -> str:
    return str(answer.infer_response.raw_output_contents[0][4:].decode())


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts gateways, and ends those that a test has left running."""
    gateways: list[GatewayProcess] = []

    def begin(server: str = "") -> GatewayProcess:
        folder = tmp_path / str(len(gateways))
        folder.mkdir()
        gateways.append(GatewayProcess(folder, LISTEN + server + MODELS))
        return gateways[-1].start()

    yield begin
    for gateway in gateways:
        if gateway.runs:
            gateway.kill()


async def test_a_stream_under_way_ends_whole_while_health_says_no(start: Start) -> None:
    gateway = start("unready_s = 0.5\n")
    key = gateway.issue()
    async with channels(gateway, 1) as (channel,):
        watch = aiter(health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest()))
        assert (await anext(watch)).status == health_pb2.HealthCheckResponse.SERVING
        stub: Any = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        stream = aiter(stub.ModelStreamInfer(iter([asked("slow", stream=True)]), metadata=shown(key)))
        first = text(await anext(stream))
        gateway.terminate()
        assert (await anext(watch)).status == health_pb2.HealthCheckResponse.NOT_SERVING
        rest = [text(answer) async for answer in stream]
        assert first + "".join(rest) == WORDS
    assert gateway.wait() == 0, gateway.text


async def test_what_does_not_end_in_time_is_told_so(start: Start) -> None:
    gateway = start("drain_s_max = 0.1\n")
    key = gateway.issue()
    async with channels(gateway, 1) as (channel,):
        stub: Any = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        stream = aiter(stub.ModelStreamInfer(iter([asked("slow", stream=True)]), metadata=shown(key)))
        await anext(stream)
        gateway.terminate()
        said = [answer.error_message async for answer in stream]
        assert "stopped" in said[-1]
    assert gateway.wait() == 0, gateway.text
    (record,) = gateway.records(key.tenant).values()
    assert record["code"] == "draining"


async def test_every_worker_serves_the_one_port(start: Start) -> None:
    gateway = start("workers = 2\n")
    key = gateway.issue()
    async with channels(gateway, 20) as made:
        assert all(await asyncio.gather(*(answers(channel, key) for channel in made)))
        for worker in gateway.workers:
            os.kill(worker, signal.SIGKILL)
        assert all(await asyncio.gather(*(answers(channel, key) for channel in made)))
    assert gateway.stop() == 0, gateway.text


@pytest.mark.parametrize("workers", [1, 2])
def test_two_gateways_do_not_share_a_port_by_accident(start: Start, tmp_path: Path, workers: int) -> None:
    gateway = start(f"workers = {workers}\n")
    other = tmp_path / "other.toml"
    taken = LISTEN.replace('grpc = "127.0.0.1:0"', f'grpc = "{gateway.grpc}"')
    other.write_text(f'[state]\npath = "{tmp_path}/s"\n{taken}{MODELS}')
    refused = headrace("serve", "--config", str(other))
    assert refused.returncode != 0
    assert f"server.grpc: can't listen on {gateway.grpc}" in refused.stderr
    assert gateway.stop() == 0, gateway.text
