"""What a leader and its workers say to each other comes whole, and a process that has gone is told as that."""

from __future__ import annotations

import asyncio
import math
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import pytest

from gateway.channel import SAID, START, Channel, Start, Told, Up
from gateway.config import Config
from gateway.report import Family, Report, Sample
from gateway.shared import Files


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


MODELS = [{"name": "chat", "replicas": [{"kind": "echo"}]}]
CONFIG = msgspec.convert({"models": MODELS, "server": {"drain_s_max": math.inf}}, Config)
LONG = Told(Report(families=(Family("f", "", "gauge", (Sample("f", {"l": "x" * 300_000}, math.inf),)),)))
ENDLESS = Start(1, CONFIG, 3, Files(4, 5, 6, (7, 8)))


def test_numbers_without_end_and_long_reports_come_as_they_are(runner: asyncio.Runner) -> None:
    async def said() -> tuple[object, object]:
        async with both_ends() as (ours, theirs):
            saying = asyncio.create_task(theirs.say(LONG))
            long = await ours.hear(SAID)
            await saying
            await ours.say(ENDLESS)
            return long, await theirs.hear(START)

    assert runner.run(said()) == (LONG, ENDLESS)


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
