"""Fakes that tests share. A fake behaves; it never records calls to be asserted on."""

import asyncio
from collections.abc import Callable


class FakeClock:
    """A Clock that moves only when told."""

    def __init__(self, now_s: float = 1_000.0, wall_s: float = 1_700_000_000.0) -> None:
        self._now_s = now_s
        self._wall_s = wall_s
        self._sleepers: dict[asyncio.Future[None], float] = {}
        self._changed = asyncio.Event()

    def now_s(self) -> float:
        return self._now_s

    def wall_s(self) -> float:
        return self._wall_s

    async def sleep(self, duration_s: float) -> None:
        woken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._sleepers[woken] = self._now_s + duration_s
        self._changed.set()
        try:
            await woken
        finally:
            self._sleepers.pop(woken, None)

    def advance(self, duration_s: float) -> None:
        """Move time and wake whoever is due; they run at the caller's next await."""
        self._now_s += duration_s
        self._wall_s += duration_s
        for woken, due_s in self._sleepers.items():
            if due_s <= self._now_s and not woken.done():
                woken.set_result(None)

    async def until_asleep(self, count: int = 1) -> None:
        """Return once `count` tasks sleep, so that a test knows what `advance` will wake."""
        while sum(not woken.done() for woken in self._sleepers) < count:
            self._changed.clear()
            await self._changed.wait()


async def until(condition: Callable[[], bool]) -> None:
    """Let the other tasks run until this is so; for state that has no event of its own. Gives up after 10 s."""
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0)
