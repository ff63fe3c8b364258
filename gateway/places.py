"""Places at engines that several workers share, so that all of them together never hold more than there are.

Calls wait where they arrived, in their worker's own line. Whoever gives a place back hands it on in the same step: to
the next worker in turn with a call waiting, and rings that one's bell if it is another. So nobody polls, no place
lies idle while a call waits for it, and a busy worker can't keep all places to itself.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable, Mapping, Sequence

from gateway.call import Call
from gateway.fairness import Line
from gateway.memory import Memory
from runtimes.clock import Clock


class Places:
    """Of every model in `running_max`. `bells` are an eventfd for each worker."""

    def __init__(self, memory: Memory, *, running_max: Mapping[str, int], bells: Sequence[int]) -> None:
        self.bells = bells
        self.of = {
            model: ModelPlaces(memory, number, bells, running_max=places_max)
            for number, (model, places_max) in enumerate(running_max.items())
        }
        self.memory = memory

    @classmethod
    def make(cls, *, running_max: Mapping[str, int], workers: int) -> Places:
        size_bytes = 4 * max(1, len(running_max)) * (3 * workers + 1)
        bells = [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(workers)]
        return cls(Memory.make("headrace-places", size_bytes), running_max=running_max, bells=bells)

    def strike_out(self, worker: int) -> None:
        """The worker has gone, and its calls with it: what they held goes to those who wait."""
        self.memory.lock_all()
        for places in self.of.values():
            places.running[worker] = places.waiting[worker] = places.handed[worker] = 0
            places.hand_on()
        self.memory.unlock()
        # All of them: it may have handed somebody a place and not come to ring.
        self.ring(range(len(self.bells)))

    def ring(self, workers: Iterable[int]) -> None:
        for worker in workers:
            os.eventfd_write(self.bells[worker], 1)


class ModelPlaces:
    """One model's."""

    def __init__(self, memory: Memory, number: int, bells: Sequence[int], *, running_max: int) -> None:
        workers = len(bells)
        start_bytes = 4 * number * (3 * workers + 1)
        self.memory = memory
        self.number = number
        self.bells = bells
        self.running_max = running_max
        self.running = memory.whole(start_bytes, workers, "I")
        """Places that each worker holds, those handed to it included."""
        self.waiting = memory.whole(start_bytes + 4 * workers, workers, "I")
        """Calls that wait in each worker, and have been handed no place yet."""
        self.handed = memory.whole(start_bytes + 8 * workers, workers, "I")
        """Places handed to each worker that it has not seen yet."""
        self.turn = memory.whole(start_bytes + 12 * workers, 1, "I")
        """Which worker is asked first, when a place comes free."""

    def take(self, worker: int) -> bool:
        """Take a place, if one is free. None is while any call waits."""
        self.memory.lock(self.number)
        try:
            free = self._free() > 0
            if free:
                self.running[worker] += 1
        finally:
            self.memory.unlock()
        return free

    def agree(self, worker: int, *, running: int, waiting: int) -> int:
        """So many places the worker holds, and so many calls wait in it: what is free is handed on. How many have been
        handed to this worker meanwhile, never more than there are calls waiting in it; it holds them from now on."""
        self.memory.lock(self.number)
        try:
            handed = min(self.handed[worker], waiting)
            self.handed[worker] = 0
            self.running[worker] = running + handed
            self.waiting[worker] = waiting - handed
            rung = self.hand_on()
            handed += self.handed[worker]
            self.handed[worker] = 0
        finally:
            self.memory.unlock()
        for other in rung:
            if other != worker:
                os.eventfd_write(self.bells[other], 1)
        return handed

    def _free(self) -> int:
        return self.running_max - sum(self.running)

    def hand_on(self) -> set[int]:
        """Under the lock: give what is free to those who wait, worker by worker. To whom."""
        free = self._free()
        rung: set[int] = set()
        while free > 0 and any(self.waiting):
            worker = self.turn[0] % len(self.waiting)
            self.turn[0] = (worker + 1) % len(self.waiting)
            if self.waiting[worker]:
                # In this order, a kill in between leaves a place taken that nobody has, until its worker next agrees.
                self.running[worker] += 1
                self.waiting[worker] -= 1
                self.handed[worker] += 1
                free -= 1
                rung.add(worker)
        return rung


class SharedLine(Line):
    """A Line whose places are shared with other workers'."""

    def __init__(
        self, *, model: str, places: ModelPlaces, worker: int, waiting_max: int, wait_s_max: float, clock: Clock
    ) -> None:
        super().__init__(
            model=model, running_max=places.running_max, waiting_max=waiting_max, wait_s_max=wait_s_max, clock=clock
        )
        self._places = places
        self._worker = worker

    async def enter(self, call: Call) -> None:
        if not self.waiting and self._places.take(self._worker):
            self.running += 1
            return
        try:
            await self._wait(call)
        except BaseException:
            self.agree()
            raise

    def agree(self) -> None:
        """Tell the other workers how it is here, and let in whom they have made way for."""
        while handed := self._places.agree(self._worker, running=self.running, waiting=self.waiting):
            for _ in range(handed):
                self._let_in()

    def _join(self, tenant: str) -> asyncio.Future[None]:
        place = super()._join(tenant)
        self.agree()
        return place

    def _pass_on(self) -> None:
        self.running -= 1
        self.agree()
