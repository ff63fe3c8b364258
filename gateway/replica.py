"""A runtime as the gateway sees it: is it up, how busy is it, can it be trusted just now."""

from __future__ import annotations

import asyncio
import enum
import logging

import msgspec

from runtimes.clock import Clock
from runtimes.contract import Generator, Predictor, RuntimeFault

log = logging.getLogger("headrace.replica")


def replica_name(model: str, number: int) -> str:
    """The name of a model's replica, fit for a folder and for one replica only: no model's name has a plus."""
    return f"{model.replace('/', '+')}-{number}"


class State(enum.StrEnum):
    starting = "starting"
    ready = "ready"
    down = "down"


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

    def __init__(
        self, *, name: str, model: str, kind: str, runtime: Generator | Predictor, slots: int, clock: Clock
    ) -> None:
        self.name = name
        self.model = model
        self.kind = kind
        self.runtime = runtime
        # Told apart once: asking a runtime which protocol it meets costs more than the rest of a dispatch.
        self.generator = runtime if isinstance(runtime, Generator) else None
        self._predictor = runtime if not isinstance(runtime, Generator) else None
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
        self.watch: asyncio.Task[None] | None = None

    @property
    def predictor(self) -> Predictor:
        assert self._predictor is not None
        return self._predictor

    def start(self) -> None:
        self.watch = asyncio.create_task(self._watch(), name=f"watch {self.name}")

    async def aclose(self) -> None:
        if self.watch is not None:
            self.watch.cancel()
            await asyncio.gather(self.watch, return_exceptions=True)
        await self.runtime.aclose()

    def look(self) -> Health:
        ejected = self.clock.now_s() < self.ejected_until_s
        return Health(self.name, self.kind, self.state, self.reason, self.running, self.slots, ejected)

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
        opened = False
        retry_s = 1.0
        while True:
            try:
                if not opened:
                    await self.runtime.open()
                    opened = True
                await self.runtime.ready()
            except RuntimeFault as fault:
                self._become(State.down, str(fault))
                pause_s = PROBE_S if opened else retry_s
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


#: Faults in a row before a replica is left alone, and for how long the first time, the second, …
FAILURES_MAX = 5
EJECTIONS_S = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
#: Pause between two looks at a running replica, and the longest between two tries to open one.
PROBE_S = 1.0
REOPEN_S_MAX = 30.0
