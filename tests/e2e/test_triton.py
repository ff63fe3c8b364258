"""A classifier on a real Triton, through the gateway that supervises it."""

from __future__ import annotations

import asyncio
import math
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtimes.artifact import Shelf
from runtimes.clock import SystemClock
from runtimes.contract import Expired, InferReply, InferRequest, Invalid, Predictor, Site
from runtimes.onnx import Onnx
from runtimes.triton import Triton
from runtimes.triton_command import SHARED_MEMORY, memory_prefix
from tests.e2e.servers import GatewayProcess, Key, processes_of
from tests.triton import socket

pytestmark = pytest.mark.engine

TEXTS = ["my card please", "login", "the money " * 20, "password", "refund my money"] * 6
LATE_S = 60.0


@pytest.fixture(scope="module")
def key(triton_gateway: GatewayProcess) -> Key:
    return triton_gateway.issue()


@pytest.fixture
def site(triton_gateway: GatewayProcess, tmp_path: Path) -> Site:
    return Site(model="tiny", replica="tiny-9", state=tmp_path, shelf=Shelf(triton_gateway.state / "shelf"))


@pytest.fixture
async def triton(triton_gateway: GatewayProcess, site: Site) -> AsyncIterator[Predictor]:
    """The gateway's server, past the gateway."""
    runtime = Triton(url=socket(triton_gateway), model="model").build(site)
    await runtime.open()
    yield runtime
    await runtime.aclose()


@pytest.fixture
async def onnx(site: Site) -> AsyncIterator[Predictor]:
    runtime = Onnx(artifact="tiny").build(site)
    await runtime.open()
    yield runtime
    await runtime.aclose()


async def classify(gateway: GatewayProcess, key: Key, *texts: str) -> Any:
    async with gateway.client(key.text) as client:
        answer = await client.post("/v1/classify", json={"model": "tiny", "input": texts})
    assert answer.status_code == 200, answer.text
    return answer.json()


async def test_an_artifact_is_on_triton_what_it_is_on_onnx_runtime(triton: Predictor, onnx: Predictor) -> None:
    for name in ("task", "labels", "thresholds", "inputs", "outputs", "version"):
        assert getattr(triton, name) == getattr(onnx, name), name
    for inputs in (
        {"text": np.array(TEXTS, object)},
        {"input_ids": np.array([[2, 4, 3], [2, 6, 3]]), "attention_mask": np.array([[1, 1, 1], [1, 1, 0]])},
    ):
        here, there = [await it.infer(InferRequest(inputs, math.inf)) for it in (onnx, triton)]
        assert here.tokens_in == there.tokens_in
        assert here.outputs.keys() == there.outputs.keys()
        assert here.outputs["label"].tolist() == there.outputs["label"].tolist()
        for name in ("scores", "logits"):
            np.testing.assert_allclose(here.outputs[name], there.outputs[name], atol=1e-6)


@pytest.mark.parametrize(
    ("inputs", "param"),
    [
        ({"text": np.array([b"\xff"], object)}, "text"),
        ({"input_ids": np.ones((1, 2), np.int64)}, "attention_mask"),
        (
            {"input_ids": np.array([[2, 4, 3]]), "attention_mask": np.array([[1, 0, 1]])},
            "attention_mask",
        ),
        ({"input_ids": np.array([[2, 99, 3]]), "attention_mask": np.ones((1, 3), np.int64)}, "input_ids"),
    ],
)
async def test_what_only_the_model_can_refuse_names_its_input_too(
    triton: Predictor, inputs: dict[str, Any], param: str
) -> None:
    with pytest.raises(Invalid) as refused:
        await triton.infer(InferRequest(inputs, math.inf))
    assert refused.value.param == param


async def test_calls_that_are_too_late_fail_no_others(triton: Predictor) -> None:
    """Triton says more of them, behind their end, than one would think."""
    clock, text = SystemClock(), {"text": np.array(TEXTS, object)}
    others = [asyncio.create_task(triton.infer(InferRequest(text, math.inf))) for _ in range(16)]
    for _ in range(4):
        late_s = clock.now_s() + 0.02
        late = (triton.infer(InferRequest(text, late_s)) for _ in range(64))
        found = await asyncio.gather(*late, return_exceptions=True)
        assert {type(it) for it in found} <= {Expired, InferReply}
        assert Expired in map(type, found)
    for it in others:
        assert len((await it).outputs["label"]) == len(TEXTS)


async def test_calls_are_metered_to_the_token(triton_gateway: GatewayProcess, key: Key) -> None:
    found = await classify(triton_gateway, key, "refund", "my card")
    assert [it["label"] for it in found["data"]] == ["refund", "card"]
    assert found["usage"]["prompt_tokens"] == 3 + 4
    assert (await triton_gateway.record(key, found["id"]))["tokens_in"] == 7


def test_it_listens_on_no_address_at_all(triton_gateway: GatewayProcess) -> None:
    engines = triton_gateway.sessions() - {triton_gateway.pid}
    pids = processes_of(engines)
    assert len(pids) >= 3, "its keeper, the server, the process that runs the model"
    sockets = {str(it.readlink()) for pid in pids for it in Path(f"/proc/{pid}/fd").iterdir()}
    lines = [it.split() for table in ("tcp", "tcp6") for it in Path(f"/proc/net/{table}").read_text().splitlines()[1:]]
    assert not [it for it in lines if f"socket:[{it[9]}]" in sockets]


@pytest.mark.parametrize("whom", ["triton_python_b", "tritonserver"], ids=["the model's process", "the server"])
async def test_what_is_killed_is_started_again_and_leaves_nothing(
    triton_gateway: GatewayProcess, key: Key, whom: str
) -> None:
    before = triton_gateway.sessions()
    [victim] = [pid for pid in processes_of(before) if Path(f"/proc/{pid}/comm").read_text().strip() == whom]
    os.kill(victim, signal.SIGKILL)
    async with asyncio.timeout(LATE_S), triton_gateway.client(key.text) as client:
        while before == triton_gateway.sessions() or len(triton_gateway.sessions()) < 2:
            await asyncio.sleep(0.1)
        while (await client.post("/v1/classify", json={"model": "tiny", "input": "card"})).status_code != 200:
            await asyncio.sleep(0.1)
        # That was one worker; the other sees it at its own next look, and a new connection may be the other's.
        with triton_gateway.admin_client() as admin:
            while admin.get("/readyz").status_code != 200:
                await asyncio.sleep(0.1)
    assert processes_of(before - {triton_gateway.pid}) == {}
    assert (await classify(triton_gateway, key, "login"))["data"][0]["label"] == "login"
    folder = Path(socket(triton_gateway).removeprefix("unix:")).parent
    assert len([*SHARED_MEMORY.glob(f"{memory_prefix(folder)}*")]) == 1
