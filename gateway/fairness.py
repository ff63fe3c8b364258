"""Whose turn it is: a bounded queue for every model, served round-robin over tenants.

Engines queue without limit and in order of arrival. Here a model's engines get no more calls than they have
places for; the rest wait where order, deadline and cancellation still mean something. One waiting tenant gets
every place, two get every other one, however many calls each has sent.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from types import TracebackType

import msgspec

from gateway.call import Call
from gateway.errors import DeadlineExceeded, QueueFull
from runtimes.clock import Clock


class Queue(msgspec.Struct, frozen=True):
    """A frozen look at one model's line."""

    running: int
    running_max: int
    waiting: int
    waiting_max: int
    tenants_waiting: int


class Fairness:
    """A line for every model; `lines` is fixed at start."""

    def __init__(self, *, lines: Mapping[str, Line]) -> None:
        self.lines = lines

    def turn(self, call: Call) -> Turn:
        """Hold one of the model's places while inside; see Line.turn."""
        return self.lines[call.model].turn(call)


class Line:
    """One model's places and the calls waiting for them."""

    def __init__(self, *, model: str, running_max: int, waiting_max: int, wait_s_max: float, clock: Clock) -> None:
        self.model = model
        self.running_max = running_max
        self.waiting_max = waiting_max
        self.wait_s_max = wait_s_max
        self.clock = clock
        self.running = 0
        self.waiting = 0
        self.served_s = 1.0
        """Moving mean of how long a place is held; only for telling the refused when to come back."""
        # First tenant is next. A tenant is in here only while it has a call waiting; dicts keep order and
        # give up any entry in constant time.
        self.tenants: dict[str, dict[asyncio.Future[None], None]] = {}

    def turn(self, call: Call) -> Turn:
        """Hold one of the model's places while inside.

        Entering raises QueueFull if too many wait already, DeadlineExceeded if none came free in time.
        """
        return Turn(self, call)

    async def enter(self, call: Call) -> None:
        if self.running < self.running_max and not self.waiting:
            self.running += 1
        else:
            await self._wait(call)

    def leave(self, held_s: float) -> None:
        """Give the place to whoever is next."""
        self.served_s += 0.1 * (held_s - self.served_s)
        self._pass_on()

    def look(self) -> Queue:
        return Queue(self.running, self.running_max, self.waiting, self.waiting_max, len(self.tenants))

    async def _wait(self, call: Call) -> None:
        tenant = call.principal.tenant_id
        if self.waiting >= self.waiting_max:
            self._make_room(tenant)
        place = self._join(tenant)
        since_s = self.clock.now_s()
        until_s = min(call.deadline_s, since_s + self.wait_s_max)
        timer = asyncio.get_running_loop().call_later(max(0.0, until_s - since_s), self._give_up, tenant, place)
        try:
            await place
        except BaseException:
            # Cancelled while waiting, or, if the place is already ours, in the very step that gave it.
            if place.done() and not place.cancelled() and place.exception() is None:
                self._pass_on()
            else:
                self._forget(tenant, place)
            raise
        finally:
            timer.cancel()
            call.wait_s = self.clock.now_s() - since_s

    def _join(self, tenant: str) -> asyncio.Future[None]:
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.tenants.setdefault(tenant, {})[place] = None
        self.waiting += 1
        return place

    def _make_room(self, tenant: str) -> None:
        """In a full line the newest call of whoever has the most waiting gives way to one who has fewer, so that
        nobody can keep the others from even standing in line."""
        longest = max(self.tenants, key=lambda it: len(self.tenants[it]), default=tenant)
        if len(self.tenants.get(longest, ())) <= len(self.tenants.get(tenant, ())) + 1:
            raise self._full()
        newest = next(reversed(self.tenants[longest]))
        self._forget(longest, newest)
        if not newest.done():
            newest.set_exception(self._full())

    def _full(self) -> QueueFull:
        ahead_s = self.served_s * self.waiting / max(1, self.running_max)
        return QueueFull(
            f"{self.waiting_max} calls already wait for model {self.model!r}, which is its limit; retry later.",
            retry_after_s=min(60.0, max(1.0, ahead_s)),
        )

    def _give_up(self, tenant: str, place: asyncio.Future[None]) -> None:
        if not place.done():
            self._forget(tenant, place)
            place.set_exception(
                DeadlineExceeded(f"No place for model {self.model!r} came free in time; retry when it is less busy.")
            )

    def _forget(self, tenant: str, place: asyncio.Future[None]) -> None:
        waiting = self.tenants.get(tenant)
        if waiting is not None and place in waiting:
            del waiting[place]
            self.waiting -= 1
            if not waiting:
                del self.tenants[tenant]

    def _pass_on(self) -> None:
        self.running -= 1
        while self.waiting and self.running < self.running_max:
            self._let_in()

    def _let_in(self) -> None:
        """Give a place to the next in line, unless it is leaving."""
        tenant, waiting = next(iter(self.tenants.items()))
        place = next(iter(waiting))
        self._forget(tenant, place)
        if waiting:  # back to the end of the round
            self.tenants[tenant] = self.tenants.pop(tenant)
        if not place.done():
            self.running += 1
            place.set_result(None)


class Turn:
    """See Line.turn."""

    __slots__ = ("_call", "_line", "_since_s")

    def __init__(self, line: Line, call: Call) -> None:
        self._line = line
        self._call = call

    async def __aenter__(self) -> None:
        await self._line.enter(self._call)
        self._since_s = self._line.clock.now_s()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._line.leave(self._line.clock.now_s() - self._since_s)
