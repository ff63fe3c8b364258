"""The session's one vLLM, past the gateway that supervises it: its address, its own counters, its processes."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.servers import GatewayProcess, processes_of

MODEL = "smollm2"


def socket(gateway: GatewayProcess) -> str:
    [found] = (gateway.state / "run").glob(f"{MODEL}-0.*/api.sock")
    return str(found)


def sessions(gateway: GatewayProcess) -> set[int]:
    """The process sessions of the engines, each led by its keeper."""
    return gateway.sessions() - {gateway.pid}


def processes(gateway: GatewayProcess) -> list[int]:
    """The engine's own processes, without the keeper that leads their session."""
    leaders = sessions(gateway)
    return [pid for pid in processes_of(leaders) if pid not in leaders]


def core(gateway: GatewayProcess) -> list[int]:
    """Of those, the one that computes. The one that answers HTTP outlives it for a while."""
    return [pid for pid in processes(gateway) if "EngineCor" in Path(f"/proc/{pid}/comm").read_text()]


async def counters(gateway: GatewayProcess) -> Counter[str]:
    """Every sample of vLLM's metrics, summed over its labels."""
    transport = httpx.AsyncHTTPTransport(uds=socket(gateway))
    async with httpx.AsyncClient(transport=transport, base_url="http://engine", timeout=30) as client:
        answer = await client.get("/metrics")
    assert answer.status_code == 200
    found: Counter[str] = Counter()
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            found[sample.name] += int(sample.value) if sample.name in WHOLE else 0
    return found


READ, MADE = "vllm:prompt_tokens_total", "vllm:generation_tokens_total"
RUNNING, WAITING, ENDED = "vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:request_success_total"
WHOLE = {READ, MADE, RUNNING, WAITING, ENDED}


async def until_busy(gateway: GatewayProcess, calls: int = 1) -> None:
    async with asyncio.timeout(60):
        while (await counters(gateway))[RUNNING] < calls:
            await asyncio.sleep(0.01)


async def until_free(gateway: GatewayProcess) -> Counter[str]:
    """The counters once the engine has nothing left to do."""
    async with asyncio.timeout(60):
        while (found := await counters(gateway))[RUNNING] or found[WAITING]:
            await asyncio.sleep(0.01)
    return found
