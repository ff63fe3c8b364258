"""No call ever gets a byte of another's answer, whoever leaves when."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvloop

from tests.e2e.canary import CANCELLED, TOKENS, Canaries, Found
from tests.e2e.emulated import emulating
from tests.e2e.servers import GatewayProcess

CALLS = 50_000
S_MAX = 40.0
"""As many as fit; a slow machine makes fewer calls, not a longer test."""
CALLS_MIN = 2_000

CONFIG = """
[server]
listen = "127.0.0.1:0"
grpc = "127.0.0.1:0"
admin = "127.0.0.1:0"
[[models]]
name = "instant"
replicas = [{{ kind = "remote", url = "{instant}/v1", connections_max = 24 }}]
[[models]]
name = "paced"
replicas = [{{ kind = "vllm", url = "{paced}", running_max = 24 }}]
"""


@contextmanager
def serving(folder: Path, module: str) -> Iterator[GatewayProcess]:
    """Two engines: one that answers at once, and one whose tokens come one by one."""
    (folder / "paced").mkdir()
    tokens = ("--tokens", str(TOKENS))
    with (
        emulating(folder, *tokens) as instant,
        emulating(folder / "paced", *tokens, "--first-token-s", "0.003", "--token-s", "0.001") as paced,
    ):
        config = CONFIG.format(instant=instant.url, paced=paced.url)
        gateway = GatewayProcess(folder, config, module=module).start()
        try:
            yield gateway
        finally:
            assert gateway.stop() == 0, gateway.text


def flown(gateway: GatewayProcess, calls: int) -> Found:
    canaries = Canaries(gateway.host, gateway.issue().text)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(canaries.fly(calls, within_s=S_MAX))


def test_no_answer_has_a_byte_of_another(tmp_path: Path) -> None:
    with serving(tmp_path, "gateway") as gateway:
        begun_s = time.monotonic()
        found = flown(gateway, CALLS)
        print(f"{found.calls} calls, {found.left} left, in {time.monotonic() - begun_s:.1f} s")
    assert found.foreign == []
    assert found.wrong == []
    assert found.calls == found.whole + found.left
    assert found.calls >= CALLS_MIN
    assert found.left > found.calls * CANCELLED * 0.9


def test_a_pool_that_keeps_half_read_connections_is_found_out(tmp_path: Path) -> None:
    with serving(tmp_path, "tests.e2e.half_read") as gateway:
        found = flown(gateway, CALLS_MIN)
    print(f"{len(found.foreign)} foreign answers of {found.calls} calls, {len(found.wrong)} wrong ones")
    assert found.foreign != []
