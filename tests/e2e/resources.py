"""What a gateway holds, as it says itself and as the kernel does: whatever was done to it, afterwards it is back."""

from __future__ import annotations

import asyncio
import re
import time
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.servers import GatewayProcess

#: Kept connections are closed after some seconds; more than that is a generous bound.
REST_S_MAX = 30.0

HELD = re.compile(
    r"headrace_(running|waiting|replica_running|runtime_running|runtime_waiting|runtime_connections|holds|grpc_running|connections|tasks)"
    r"|process_open_fds"
)

HELD_BY_CALLS = (
    "headrace_running",
    "headrace_waiting",
    "headrace_replica_running",
    "headrace_runtime",
    "headrace_holds",
    "headrace_grpc_running",
    "headrace_connections data",
)
#: Pools that fill when they are first needed, and then stay: the store's three threads, each with a connection of two
#: or three descriptors. Whether one of them was needed is the machine's mood; a leak is one for each call, or more.
LAZY = {"threads": 3, "process_open_fds": 9}

Held = dict[str, float]


def held(gateway: GatewayProcess) -> Held:
    """Every count, by name and labels. The look itself is one of the admin API's connections."""
    text = httpx.get(f"http://{gateway.admin}/metrics", trust_env=False).text
    found = {
        " ".join([sample.name, *sample.labels.values()]): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if HELD.fullmatch(sample.name)
    }
    status = Path(f"/proc/{gateway.pid}/status").read_text()
    return found | {"threads": float(status.partition("Threads:")[2].split()[0])}


async def at_rest(gateway: GatewayProcess) -> Held:
    """What it holds once it has nothing to do, and every connection that was kept for a next call has been closed."""

    def resting(now: Held) -> bool:
        return not any(value for name, value in now.items() if name.startswith(HELD_BY_CALLS))

    give_up_s = time.monotonic() + REST_S_MAX
    while not resting(now := held(gateway)):
        assert time.monotonic() < give_up_s, now
        await asyncio.sleep(0.1)
    return now


async def until_back(gateway: GatewayProcess, baseline: Held, *, s_max: float = REST_S_MAX) -> None:
    """Return once it holds what it held then; fail with what it still holds."""

    def left() -> dict[str, tuple[float | None, float]]:
        now = held(gateway)
        return {
            name: (baseline.get(name), value)
            for name, value in now.items()
            if not 0 <= value - baseline.get(name, 0.0) <= LAZY.get(name, 0)
        }

    give_up_s = time.monotonic() + s_max
    while found := left():
        assert time.monotonic() < give_up_s, f"held then, and still now: {found}"
        await asyncio.sleep(0.1)
