"""What is promoted answers within two seconds, and no call fails for it: in one process, in several, and with an engine
that they share."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from runtimes.artifact import Shelf
from runtimes.integrity import Rejected
from tests import tiny
from tests.conftest import LISTEN
from tests.e2e.servers import GatewayProcess, Key

MODEL = """
[[models]]
name = "tiny"
replicas = [{ kind = "onnx", artifact = "tiny@stable" }]
"""
LATE_S = 60.0
TEXT = {"inputs": [{"name": "text", "datatype": "BYTES", "shape": [1], "data": ["my card"]}]}


@pytest.fixture(params=[1, 2], ids=["alone", "two workers"])
def gateway(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[GatewayProcess]:
    gateway = GatewayProcess(tmp_path, f"{LISTEN}workers = {request.param}\n{MODEL}")
    gateway.state.mkdir(mode=0o700)
    versions(gateway, tmp_path)
    gateway.start()
    yield gateway
    assert gateway.stop() == 0, gateway.text


def versions(gateway: GatewayProcess, folder: Path) -> tuple[Shelf, str, str]:
    """Two versions on the gateway's shelf, the first one promoted."""
    shelf = Shelf(gateway.state / "shelf")
    found = []
    for name, thresholds in (("one", {}), ("two", {"card": 0.5})):
        (folder / name).mkdir(exist_ok=True)
        found.append(tiny.publish(shelf, folder / name, thresholds=thresholds).version)
    shelf.promote("tiny", found[0])
    return shelf, found[0], found[1]


@asynccontextmanager
async def load(gateway: GatewayProcess, key: Key) -> AsyncIterator[list[tuple[float, str]]]:
    """Calls without end, over many connections; when each began, and which version answered it."""
    answered: list[tuple[float, str]] = []
    stop = asyncio.Event()

    async def caller() -> None:
        while not stop.is_set():
            async with gateway.client(key.text) as client:  # a new connection: perhaps the other worker
                for _ in range(5):
                    since_s = time.monotonic()
                    answer = await client.post("/v2/models/tiny/infer", json=TEXT)
                    assert answer.status_code == 200, answer.text
                    answered.append((since_s, answer.json()["model_version"]))

    async with asyncio.TaskGroup() as group:
        for _ in range(6):
            group.create_task(caller())
        try:
            yield answered
        finally:
            stop.set()


async def gone_over(answered: list[tuple[float, str]], version: str, since_s: float) -> float:
    """When the last call began that another version answered, seconds after `since_s`; waits for a second without."""
    async with asyncio.timeout(LATE_S):
        while True:
            others = [at for at, it in answered if it != version and at > since_s]
            last_s = max(others, default=since_s)
            if time.monotonic() - last_s > 1.0 and any(it == version and at > last_s + 0.5 for at, it in answered):
                return last_s - since_s
            await asyncio.sleep(0.05)


async def promoted_under_load(gateway: GatewayProcess, key: Key, shelf: Shelf, first: str, second: str) -> Any:
    async with load(gateway, key) as answered:
        await asyncio.sleep(0.5)
        for change, version in (
            (lambda: shelf.promote("tiny", second), second),
            (lambda: shelf.rollback("tiny"), first),
            (lambda: shelf.promote("tiny", second), second),
        ):
            since_s = time.monotonic()
            change()
            took_s = await gone_over(answered, version, since_s)
            print(f"gone over after {took_s:.2f} s")
    counts = Counter(version for _, version in answered)
    assert counts.keys() == {first, second}
    return counts


async def test_promotions_and_the_way_back_are_followed_without_a_failed_call(
    gateway: GatewayProcess, tmp_path: Path
) -> None:
    shelf, first, second = versions(gateway, tmp_path)
    await promoted_under_load(gateway, gateway.issue(), shelf, first, second)


async def test_a_damaged_artifact_is_not_gone_over_to(gateway: GatewayProcess, tmp_path: Path) -> None:
    shelf, first, second = versions(gateway, tmp_path)
    key = gateway.issue()
    graph = gateway.state / "shelf" / "tiny" / second / "model.onnx"
    graph.chmod(0o644)
    graph.write_bytes(graph.read_bytes() + b"\0")
    begin = len(gateway.log)
    with pytest.raises(Rejected, match="not the file that was published"):
        shelf.promote("tiny", second)
    # What moves the alias all the same has not looked, as a copy of another shelf's has not.
    aliases = gateway.state / "shelf" / "tiny" / "aliases.json"
    moves = msgspec.json.decode(aliases.read_bytes())
    moves["stable"].append(moves["stable"][-1] | {"version": second})
    draft = aliases.with_name("draft")
    draft.write_bytes(msgspec.json.encode(moves))
    draft.replace(aliases)
    assert "not the file that was published" in gateway.wait_for("goes on with", begin=begin)
    async with gateway.client(key.text) as client:
        answer = await client.post("/v2/models/tiny/infer", json=TEXT)
    assert answer.json()["model_version"] == first


@pytest.mark.engine
async def test_an_engine_is_followed_by_another_beside_it(triton_gateway: GatewayProcess, tmp_path: Path) -> None:
    """Its workers go over to the new one while the old one still has calls; then it is stopped."""
    shelf, first, second = versions(triton_gateway, tmp_path)
    await promoted_under_load(triton_gateway, triton_gateway.issue(), shelf, first, second)
    [folder] = (triton_gateway.state / "run").glob(f"tiny-0.{second}")
    assert (folder / "grpc:1").exists()
    async with asyncio.timeout(LATE_S):
        while len(triton_gateway.sessions()) > 2 or (triton_gateway.state / "run" / f"tiny-0.{first}").exists():
            await asyncio.sleep(0.1)
