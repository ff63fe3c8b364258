"""Memory does not grow with the number of calls, however they end. How it is over a longer time,
`headrace-load peers run soak` says."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import uvloop

from loadtests.process import usage
from tests.e2e.canary import Canaries
from tests.e2e.servers import GatewayProcess
from tests.e2e.test_cross_talk import serving

WARM_UP, CALLS = 6_000, 12_000
CALL_BYTES_MAX = 512
"""Half of what the hoarding gateway keeps of each."""
WITHIN_S = 120.0


@pytest.mark.parametrize(("module", "grows"), [("gateway", False), ("tests.e2e.hoarding", True)])
def test_a_gateway_does_not_grow_with_its_calls_and_one_that_does_is_found(
    tmp_path: Path, module: str, grows: bool
) -> None:
    with serving(tmp_path, module) as gateway, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        call_bytes = runner.run(grown(gateway))
    print(f"{call_bytes:.0f} bytes a call")
    assert (call_bytes > CALL_BYTES_MAX) is grows


async def grown(gateway: GatewayProcess) -> float:
    """Resident memory that stays after a call, on average."""
    canaries = Canaries(gateway.host, gateway.issue().text)
    await canaries.fly(WARM_UP, within_s=WITHIN_S)
    before = usage(gateway.pid).rss_bytes
    await canaries.fly(CALLS, within_s=WITHIN_S)
    assert canaries.found.calls >= (WARM_UP + CALLS) * 0.9
    assert canaries.found.wrong == []
    return (usage(gateway.pid).rss_bytes - before) / CALLS
