"""A runtime as the gateway sees it: is it up, how busy is it, can it be trusted just now."""

from __future__ import annotations

import asyncio
import enum
import logging
from collections.abc import Callable
from functools import reduce
from typing import NamedTuple

import msgspec

from gateway.promotion import Source
from runtimes.clock import Clock
from runtimes.contract import Batching, Generator, Predictor, RuntimeFault
from runtimes.histogram import Histogram

log = logging.getLogger("headrace.replica")


def replica_name(model: str, number: int) -> str:
    """The name of a model's replica, fit for a folder and for one replica only: no model's name has a plus."""
    return f"{model.replace('/', '+')}-{number}"


class State(enum.StrEnum):
    starting = "starting"
    ready = "ready"
    down = "down"


class Batched(NamedTuple):
    """Rows of each batch, and how long each row waited for its batch."""

    rows: Histogram
    queue_s: Histogram

    def plus(self, other: Batched) -> Batched:
        return Batched(self.rows.plus(other.rows), self.queue_s.plus(other.queue_s))


class Health(msgspec.Struct, frozen=True):
    """A frozen look at one replica."""

    name: str
    kind: str
    state: State
    reason: str
    running: int
    slots: int
    ejected: bool


class Replica:
    """One runtime, opened and watched in the background.

    Only faults of the runtime itself count against it; what a client does wrong never does. After
    FAILURES_MAX of them in a row it is left alone for a while, longer each time, and one success clears it.
    """

    def __init__(self, *, name: str, model: str, kind: str, source: Source, slots: int, clock: Clock) -> None:
        self.name = name
        self.model = model
        self.kind = kind
        self.source = source
        self.version = source.version()
        self._use(source.build(self.version))
        self.slots = slots
        self.clock = clock
        self.state = State.starting
        self.reason = "it is starting"
        self.running = 0
        self.failures = 0
        """In a row."""
        self.ejections = 0
        """In a row."""
        self.ejected_until_s = 0.0
        self.up = asyncio.Event()
        """Set once it has been ready."""
        self.looked_at = asyncio.Event()
        """Set once it is known how it is, well or not."""
        self.watch: asyncio.Task[None] | None = None
        self._opened = False
        self._following: asyncio.Task[None] | None = None
        self._refused = ""
        """The version that could not be opened last."""
        self._retired: dict[str, Retired] = {}
        """Version → what ran it, while it may still have calls."""
        self._batched: Batched | None = None
        """By what ran before that."""

    @property
    def predictor(self) -> Predictor:
        assert self._predictor is not None
        return self._predictor

    def start(self) -> None:
        self.watch = asyncio.create_task(self._watch(), name=f"watch {self.name}")
        if self.source.follows:
            self._following = asyncio.create_task(self._follow(), name=f"follow {self.name}")

    async def aclose(self) -> None:
        if self.watch is not None:
            await _cancelled(self.watch)
        if self._following is not None:
            await _cancelled(self._following)
        await asyncio.gather(*(it.close() for it in self._retired.values()), self.runtime.aclose())

    def look(self) -> Health:
        ejected = self.clock.now_s() < self.ejected_until_s
        return Health(self.name, self.kind, self.state, self.reason, self.running, self.slots, ejected)

    @property
    def batched(self) -> Batched | None:
        """What has been put together here, whichever version it was for; None if its runtime makes no batches."""
        return self._counted(self.runtime, *(it.runtime for it in self._retired.values()))

    def trusted(self) -> bool:
        return self.state is State.ready and self.clock.now_s() >= self.ejected_until_s

    def succeeded(self) -> None:
        self.failures = self.ejections = 0
        self.ejected_until_s = 0.0

    def failed(self, why: str) -> None:
        now_s = self.clock.now_s()
        self.failures += 1
        if self.failures == 1:
            log.warning("replica %s failed a call: %s", self.name, why)
        # Calls that were under way when it was ejected, and fail now, are no reason to stay away longer.
        if self.failures >= FAILURES_MAX and now_s >= self.ejected_until_s:
            away_s = EJECTIONS_S[min(self.ejections, len(EJECTIONS_S) - 1)]
            self.ejections += 1
            self.ejected_until_s = now_s + away_s
            log.warning("replica %s failed again, left alone for %.0f s: %s", self.name, away_s, why)

    async def _watch(self) -> None:
        """Open the runtime, then keep `state` true. A runtime that can restart its engine does so itself."""
        retry_s = 1.0
        while True:
            runtime = self.runtime
            try:
                if not self._opened:
                    await runtime.open()
                    self._opened = True
                await runtime.ready()
            except RuntimeFault as fault:
                if runtime is not self.runtime:  # another has taken its place meanwhile
                    continue
                self._become(State.down, str(fault))
                pause_s = PROBE_S if self._opened else retry_s
                retry_s = min(REOPEN_S_MAX, retry_s * 2)
            except Exception:
                log.exception("replica %s: its runtime is at fault", self.name)
                self._become(State.down, "its runtime is at fault; see the gateway's log")
                pause_s = REOPEN_S_MAX
            else:
                self._become(State.ready, "")
                self.up.set()
                pause_s = PROBE_S
            await self.clock.sleep(pause_s)

    async def _follow(self) -> None:
        """Go over to whatever is promoted."""
        while True:
            await self.clock.sleep(self.source.look_s)
            version = ""
            try:
                version = await asyncio.to_thread(self.source.version)
                if version and version != self.version:
                    await self._go_over(version)
            except RuntimeFault as fault:
                if self._refused != version:
                    log.warning("replica %s goes on with %s: %s", self.name, self.version or "what it had", fault)
                self._refused = version
                await self.clock.sleep(self.source.retry_s)
            except Exception:  # no descriptor to be had, above all
                log.exception("replica %s goes on with %s", self.name, self.version or "what it had")
                await self.clock.sleep(self.source.retry_s)

    async def _go_over(self, version: str) -> None:
        """Have that version opened beside what runs, then send it the calls, and let what ran before end its own.
        Raises RuntimeFault if it cannot be."""
        retired = self._retired.get(version)
        if retired is not None and await retired.revived():
            successor = retired.runtime
        else:
            successor = self.source.build(version)
            try:
                await successor.open()
                await successor.ready()
                wanted = await asyncio.to_thread(self.source.version)
            except BaseException:
                await successor.aclose()
                raise
            if wanted != version:  # it took its time, and another one is promoted meanwhile
                await successor.aclose()
                return
        former, former_version = self.runtime, self.version
        self._use(successor)
        self.version = version
        self._opened = True
        log.info("replica %s has gone over from %s to %s", self.name, former_version or "nothing", version)
        self._become(State.ready, "")
        self.up.set()
        self._retired[former_version] = Retired(
            former, former_version, self._retired, self.source.retire_s, self.clock, closed=self._keep_count
        )

    def _keep_count(self, runtime: Generator | Predictor) -> None:
        self._batched = self._counted(runtime)

    def _counted(self, *runtimes: Generator | Predictor) -> Batched | None:
        """By these, and by those that are closed."""
        counted = [Batched(it.batch_rows, it.batch_queue_s) for it in runtimes if isinstance(it, Batching)]
        if self._batched:
            counted.append(self._batched)
        return reduce(Batched.plus, counted) if counted else None

    def _use(self, runtime: Generator | Predictor) -> None:
        self.runtime = runtime
        # Told apart once: asking a runtime which protocol it meets costs more than the rest of a dispatch.
        self.generator = runtime if isinstance(runtime, Generator) else None
        self._predictor = runtime if not isinstance(runtime, Generator) else None

    def _become(self, state: State, reason: str) -> None:
        if state is not self.state:
            if state is State.ready:
                self.succeeded()  # what failed before is another engine's past
            log.log(
                logging.INFO if state is State.ready else logging.WARNING,
                "replica %s is %s%s",
                self.name,
                state,
                f": {reason}" if reason else "",
            )
        self.state, self.reason = state, reason
        self.looked_at.set()


class Retired:
    """What ran before: still there for calls that are about to reach it, then for those that it has, then closed.
    Until then it can be had back."""

    def __init__(
        self,
        runtime: Generator | Predictor,
        version: str,
        among: dict[str, Retired],
        retire_s: float,
        clock: Clock,
        *,
        closed: Callable[[Generator | Predictor], None],
    ) -> None:
        self.runtime = runtime
        self._version = version
        self._among = among
        self._closed = closed
        self._closing = False
        self._end = asyncio.create_task(self._close_after(clock, retire_s), name=f"retire {version}")

    async def revived(self) -> bool:
        """Whether it can be had back; if not, it is closed when this returns."""
        if self._closing:
            await asyncio.shield(self._end)
            return False
        await _cancelled(self._end)
        del self._among[self._version]
        return True

    async def close(self) -> None:
        if await self.revived():
            await self.runtime.aclose()

    async def _close_after(self, clock: Clock, retire_s: float) -> None:
        await clock.sleep(retire_s)
        self._closing = True
        try:
            await self.runtime.aclose()
        finally:
            del self._among[self._version]
            self._closed(self.runtime)


async def _cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


#: Faults in a row before a replica is left alone, and for how long the first time, the second, …
FAILURES_MAX = 5
EJECTIONS_S = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
#: Pause between two looks at a running replica, and the longest between two tries to open one.
PROBE_S = 1.0
REOPEN_S_MAX = 30.0
