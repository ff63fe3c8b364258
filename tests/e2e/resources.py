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
    r"headrace_(running|waiting|replica_running|runtime_running|runtime_waiting|runtime_connections|holds|connections|tasks)"
    r"|process_open_fds"
)

HELD_BY_CALLS = (
    "headrace_running",
    "headrace_waiting",
    "headrace_replica_running",
    "headrace_runtime",
    "headrace_holds",
    "headrace_connections data",
)
#: More than its store has threads for.
STORE_CALLS = 20

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

    # What is opened when it is first needed, and then stays: the store's threads, each with its connection.
    async with httpx.AsyncClient(trust_env=False, base_url=f"http://{gateway.admin}") as admin:
        await asyncio.gather(*(admin.get("/readyz") for _ in range(STORE_CALLS)))
    give_up_s = time.monotonic() + REST_S_MAX
    while not resting(now := held(gateway)):
        assert time.monotonic() < give_up_s, now
        await asyncio.sleep(0.1)
    return now


async def until_back(gateway: GatewayProcess, baseline: Held, *, s_max: float = REST_S_MAX) -> None:
    """Return once it holds exactly what it held then; fail with what it still holds."""
    give_up_s = time.monotonic() + s_max
    while (now := held(gateway)) != baseline:
        left = {name: (baseline.get(name), value) for name, value in now.items() if baseline.get(name) != value}
        assert time.monotonic() < give_up_s, f"held then, and still now: {left}"
        await asyncio.sleep(0.1)
