"""What a leader and its workers say to each other comes whole, and a process that has gone is told as that."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest
import uvloop

from gateway.channel import SAID, Channel, Up


@pytest.fixture(params=[uvloop.new_event_loop, asyncio.new_event_loop], ids=["uvloop", "asyncio"])
def runner(request: pytest.FixtureRequest) -> Iterator[asyncio.Runner]:
    with asyncio.Runner(loop_factory=request.param) as runner:
        yield runner


@asynccontextmanager
async def both_ends() -> AsyncIterator[tuple[Channel, Channel]]:
    ends = [await Channel.open(end) for end in socket.socketpair()]
    yield ends[0], ends[1]
    for end in ends:
        end.close()
    await asyncio.sleep(0.01)  # both are closed a turn or two later


def test_what_one_says_the_other_hears(runner: asyncio.Runner) -> None:
    async def said() -> object:
        async with both_ends() as (ours, theirs):
            await theirs.say(Up())
            theirs.close()
            return await ours.hear(SAID)

    assert runner.run(said()) == Up()


def test_to_hear_from_a_process_that_has_gone_is_the_end(runner: asyncio.Runner) -> None:
    async def heard() -> None:
        async with both_ends() as (ours, theirs):
            theirs.close()
            with pytest.raises(EOFError):
                await ours.hear(SAID)

    runner.run(heard())


@pytest.mark.parametrize("turns", [0, 1, 5])
def test_to_speak_on_a_closed_channel_is_a_connection_error_on_every_loop(runner: asyncio.Runner, turns: int) -> None:
    async def spoken() -> None:
        async with both_ends() as (ours, theirs):
            theirs.close()
            ours.close()
            for _ in range(turns):
                await asyncio.sleep(0)
            with pytest.raises(ConnectionError):
                await ours.say(Up())

    runner.run(spoken())


def test_to_speak_to_a_process_that_has_gone_soon_is_a_connection_error(runner: asyncio.Runner) -> None:
    async def spoken() -> None:
        async with both_ends() as (ours, theirs):
            theirs.close()
            with pytest.raises(ConnectionError):
                for _ in range(1_000):
                    await ours.say(Up())
                    await asyncio.sleep(0)

    runner.run(spoken())
