"""How a leader knows a worker, by what it says and by what it does not."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator

import pytest

from gateway import workers
from gateway.channel import ASK, Channel, Told
from gateway.report import Family, Report, Sample
from gateway.workers import Life
from runtimes.clock import SystemClock
from tests.fakes import until
from tests.gateway.test_channel import both_ends

COUNTED = Report(families=(Family("calls", "", "counter", (Sample("calls_total", {}, 40.0),)),))
LONG = Report(families=(Family("f", "", "gauge", (Sample("f", {"l": "x" * 2_000_000}, 1.0),)),))


@pytest.fixture
async def channel() -> AsyncIterator[tuple[Channel, Channel]]:
    """The leader's end, and the worker's."""
    async with both_ends() as ends:
        yield ends


@pytest.fixture
async def life(channel: tuple[Channel, Channel]) -> AsyncIterator[Life]:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        life = Life(process, channel[0], SystemClock())
        hearing = asyncio.create_task(life.hear(asyncio.Event()))
        yield life
        hearing.cancel()
        await asyncio.wait((hearing,))


async def test_a_worker_that_can_not_say_how_it_is_lives_and_keeps_what_it_had_counted(
    life: Life, channel: tuple[Channel, Channel]
) -> None:
    theirs = channel[1]
    for told, answer in ((COUNTED, COUNTED), (None, None), (COUNTED, COUNTED)):
        life.looks_missed = 3
        asking = asyncio.create_task(life.ask())
        await theirs.hear(ASK)
        await theirs.say(Told(told))
        assert await asking == answer
        assert (life.told, life.looks_missed) == (COUNTED, 0)


async def test_an_answer_that_comes_late_is_one(
    life: Life, channel: tuple[Channel, Channel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "ANSWER_S_MAX", 0.01)
    life.looks_missed = 3
    assert await life.ask() is None
    await channel[1].hear(ASK)
    await channel[1].say(Told(COUNTED))
    await until(lambda: life.looks_missed == 0)
    assert life.told == COUNTED


async def test_a_worker_that_never_read_a_word_is_waited_for_no_longer_than_others(
    life: Life, channel: tuple[Channel, Channel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "ANSWER_S_MAX", 0.01)
    channel[0].put(Told(LONG))  # more than the kernel takes; what its leader says first may be
    async with asyncio.timeout(5):
        assert await life.ask() is None
        assert await life.ask() is None
