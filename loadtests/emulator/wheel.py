"""Callbacks at set times, with one timer of the loop for all of them.

A thousand streams that each have a token due every 10 ms would set 100,000 of the loop's timers a second. Here what is
due in the same millisecond is one list.
"""

from __future__ import annotations

import asyncio
import heapq
import time
from collections.abc import Callable

TICKS_PER_S = 1_000


class Wheel:
    """Times are `time.perf_counter` seconds; the loop is the one that `at` is called in. Nothing can be taken back: who
    is called must know whether it still matters."""

    def __init__(self) -> None:
        self._due: dict[int, list[Callable[[], None]]] = {}
        self._ticks: list[int] = []
        """The keys of `_due`, as a heap."""
        self._timer: asyncio.TimerHandle | None = None

    def at(self, due_s: float, callback: Callable[[], None]) -> None:
        """Call back in the tick after `due_s`, or up to a millisecond before it: a loop's timers are no finer."""
        tick = int(due_s * TICKS_PER_S) + 1
        due = self._due.get(tick)
        if due is not None:
            due.append(callback)
            return
        self._due[tick] = [callback]
        heapq.heappush(self._ticks, tick)
        if self._ticks[0] == tick:
            self._set()

    def stop(self) -> None:
        """Call nobody back any more."""
        self._due.clear()
        self._ticks.clear()
        if self._timer is not None:
            self._timer.cancel()

    def _set(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        wait_s = self._ticks[0] / TICKS_PER_S - time.perf_counter()
        # Never less than a tick, which the loop would take for none, and turn in circles until it is time.
        self._timer = asyncio.get_running_loop().call_later(max(wait_s, 1 / TICKS_PER_S), self._turn)

    def _turn(self) -> None:
        now = time.perf_counter() * TICKS_PER_S + 1
        while self._ticks and self._ticks[0] <= now:
            for callback in self._due.pop(heapq.heappop(self._ticks)):
                callback()
        if self._ticks:
            self._set()
