"""A call that is cancelled, once or twice, in any turn of the loop: whatever it held is given back."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from gateway.meter import Answer
from loadtests.emulator import Emulator, Pace, serving
from runtimes.artifact import Shelf
from runtimes.clock import SystemClock
from runtimes.contract import Site
from runtimes.remote import Remote, RemoteRuntime
from tests.fakes import FakeClient, Stages, a_call, until, work

TURNS = 40
"""More than a whole call takes when its engine answers at once."""


@asynccontextmanager
async def staged(folder: Path) -> AsyncIterator[tuple[Stages, RemoteRuntime]]:
    """Every stage as in production, with a real engine's client, and one place."""
    async with serving(Emulator(Pace(tokens=4)), "127.0.0.1:0") as url:
        site = Site(model="chat", replica="chat-0", state=folder, shelf=Shelf(folder / "shelf"))
        runtime = Remote(url=f"{url}/v1", connections_max=1).build(site)
        async with Stages(folder, SystemClock(), {"chat": [runtime]}, slots=1) as stages:
            yield stages, runtime


async def call(stages: Stages, stream: bool) -> Answer:
    body = b'{"model":"chat","messages":[{"role":"user","content":"hello"}],"stream":%b}'
    asked = a_call(
        stream=stream, body=body % (b"true" if stream else b"false"), received_s=stages.pipeline.clock.now_s()
    )
    return await stages.pipeline.run(asked, FakeClient())


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("again_after", [None, 0, 1, 2, 3])
async def test_a_call_cancelled_in_any_turn_gives_back_all_it_held(
    tmp_path: Path, stream: bool, again_after: int | None
) -> None:
    """Of three calls the first runs, the second waits for its place, and both are cancelled; the third is served."""
    async with staged(tmp_path) as (stages, runtime):
        assert runtime.wire is not None
        wire, tasks = runtime.wire, len(asyncio.all_tasks())
        for turns in range(1, TURNS + 1):
            first, second, third = (asyncio.create_task(call(stages, stream)) for _ in range(3))
            for _ in range(turns):
                await asyncio.sleep(0)
            first.cancel()
            second.cancel()
            if again_after is not None:
                for _ in range(again_after):
                    await asyncio.sleep(0)
                first.cancel()
                second.cancel()
            assert (await third).status == 200
            ends = await asyncio.gather(first, second, return_exceptions=True)
            assert stages.at_rest()
            assert work(runtime) == (0, 0)
            await until(lambda: wire.connections == wire.parked)
        assert [getattr(end, "status", None) for end in ends] == [200, 200], "not every turn was one of a call's"
        assert len(asyncio.all_tasks()) == tasks
        assert len(await stages.records()) == 3 * TURNS
