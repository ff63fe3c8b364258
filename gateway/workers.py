"""The processes that serve calls: started, asked how they are, started again when one ends, and stopped together."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress

import msgspec

from gateway.channel import SAID, Ask, Channel, Start, Up
from gateway.config import Config
from gateway.edge.server import CLOSE_S_MAX
from gateway.metrics import Gauge, LiveMetrics
from gateway.plane import cancel
from gateway.report import Family, Report, families, merged, merged_families
from gateway.shared import Shared, is_shared
from runtimes.clock import Clock
from runtimes.pids import exit_of
from runtimes.process import first

log = logging.getLogger("headrace.workers")


class Workers:
    """`config.server.workers` of them, numbered from 0. What one that has ended held of `shared` is struck out."""

    def __init__(self, *, config: Config, listening: socket.socket, shared: Shared, clock: Clock) -> None:
        self._config = config
        self._listening = listening
        self._shared = shared
        self._clock = clock
        self._models_shared = {model.name for model in config.models if is_shared(model)}
        self._lives: dict[int, Life] = {}
        """Those that run."""
        self._keepers: list[asyncio.Task[None]] = []
        self._been_up = [asyncio.Event() for _ in range(config.server.workers)]
        self._counted: tuple[Family, ...] = ()
        """What those that have ended had counted: a sum that shrinks would be taken for one that began anew."""
        self._striker = ThreadPoolExecutor(1)
        """One thread, as a process does not lock itself out, and one that is there when no further one is to be had."""
        self._stopping = asyncio.Event()

    def start(self) -> None:
        self._striker.submit(int)
        numbers = range(self._config.server.workers)
        self._keepers = [asyncio.create_task(self._keep(number), name=f"keep worker {number}") for number in numbers]
        self._watch = asyncio.create_task(self._look(), name="look after workers")

    async def up(self) -> None:
        """Return once every worker has had every model ready."""
        for up in self._been_up:
            await up.wait()

    async def report(self, leader: Report) -> Report:
        """All of them and their leader as one. Of one that does not answer in time only what it had counted before is
        in it."""
        asked = dict(self._lives)
        told = await asyncio.gather(*(life.ask() for life in asked.values()))
        answers = zip(asked.items(), told, strict=True)
        # What one that has ended meanwhile had counted is in `_counted` by now.
        answered = {number: it for (number, life), it in answers if it is not None and self._lives.get(number) is life}
        counted = [life.told.families for number, life in self._lives.items() if number not in answered]
        silent = [f"worker {it}" for it in range(self._config.server.workers) if it not in answered]
        away = {number: it.away for number, it in answered.items() if it.away}
        if len(away) == len(answered):
            away = {}  # calls are theirs all the same
        troubles = [f"{', '.join(silent)}: no answer"] if silent else []
        troubles += [f"worker {number}: {why}" for number, why in away.items()]
        said = "; ".join(troubles)
        up = families(LiveMetrics(lambda: [Gauge("headrace_workers_up", {}, len(answered))]))
        own = Report(
            checks={"workers": None if answered else said},
            notes={"workers": said} if said and answered else {},
            families=(*up, *self._counted, *(it for them in counted for it in them if it.type in COUNTED)),
        )
        named = [
            (f"worker {number}", msgspec.structs.replace(it, checks={}) if number in away else it)
            for number, it in answered.items()
        ]
        return merged([("leader", leader), ("leader", own), *named], shared=self._models_shared)

    async def stop(self) -> None:
        """Let all of them drain, and return once none is left."""
        self._stopping.set()
        await cancel(self._watch)
        for life in self._lives.values():
            life.process.terminate()
        settings = self._config.server
        await asyncio.wait(self._keepers, timeout=settings.unready_s + settings.drain_s_max + 2 * CLOSE_S_MAX)
        for number, life in self._lives.items():
            log.error("worker %d did not stop in time and is killed", number)
            life.process.kill()
        await asyncio.gather(*self._keepers)
        self._striker.shutdown()

    async def _keep(self, number: int) -> None:
        pause_s = RESTART_S
        while not self._stopping.is_set():
            begun_s, ended = self._clock.now_s(), "could not be kept"
            try:
                ended = f"ended with {await self._live(number)}"
            except Exception:  # no process or no descriptor to be had, above all: the next try may go well
                log.exception("worker %d", number)
            if not self._stopping.is_set():
                if self._clock.now_s() - begun_s >= STEADY_S:
                    pause_s = RESTART_S
                log.error("worker %d %s; it is started again in %g s", number, ended, pause_s)
                await first(self._clock.sleep(pause_s), self._stopping.wait())
                pause_s = min(RESTART_S_MAX, 2 * pause_s)

    async def _live(self, number: int) -> int:
        """One life of a worker, and its exit status. Nothing of it is left afterwards."""
        life = await Life.begin(number, self._config, self._listening, self._shared, self._clock)
        self._lives[number] = life
        if self._stopping.is_set():
            life.process.terminate()
        hearing = asyncio.create_task(life.hear(self._been_up[number]), name=f"hear worker {number}")
        try:
            await exit_of(life.process.pid)
        finally:
            life.process.kill()  # it has ended, unless that can't be waited for
            status = life.process.wait()
            await asyncio.wait((hearing,))  # to what it said last
            del self._lives[number]
            self._counted = merged_families([*self._counted, *(it for it in life.told.families if it.type in COUNTED)])
            # On a thread: one of the others may hang amid a lock, and is then still to be killed from here.
            await asyncio.get_running_loop().run_in_executor(self._striker, self._shared.strike_out, number)
        hearing.result()  # raises if what it said could not be read
        return status

    async def _look(self) -> None:
        """Ask all of them again and again, so that little of what one had counted is lost with it, and kill one that
        hangs. One at a time: a process that is stopped amid a lock makes all the others wait for it."""
        while True:
            await self._clock.sleep(LOOK_S)
            lives = dict(self._lives)
            for life in lives.values():
                life.looks_missed += 1  # until it says something
            await asyncio.gather(*(life.ask() for life in lives.values()))
            number, longest = min(lives.items(), key=lambda it: it[1].answered_s, default=(-1, None))
            if longest is not None and longest.looks_missed >= LOOKS_MISSED_MAX:
                log.error("worker %d has not answered %d times and is killed", number, LOOKS_MISSED_MAX)
                longest.process.kill()
                await self._clock.sleep(LOOK_S)


class Life:
    """One worker, from its start to its end."""

    def __init__(self, process: subprocess.Popen[bytes], channel: Channel, clock: Clock) -> None:
        self.process = process
        self.channel = channel
        self._clock = clock
        self.answered_s = clock.now_s()
        self.looks_missed = 0
        """In a row. Not seconds: of those in which the leader itself was stopped it knows nothing."""
        self.told = Report()
        """What it said last."""
        self._answer: asyncio.Future[Report | None] | None = None
        """Asked for, and not here yet."""

    @classmethod
    async def begin(cls, number: int, config: Config, listening: socket.socket, shared: Shared, clock: Clock) -> Life:
        ours, theirs = socket.socketpair()
        files = shared.files
        with ExitStack() as undone:
            undone.callback(ours.close)
            with theirs:
                # From the main thread, as all of the loop is: the worker asks to be killed when the thread that started
                # it ends. In a group of its own, so that Ctrl-C in a terminal reaches the leader alone.
                process = subprocess.Popen(  # noqa: ASYNC220, S603 - a fork; nothing of it is anybody's input
                    [sys.executable, "-P", "-m", "gateway.worker", str(os.getpid()), str(theirs.fileno())],
                    # The same code as ours, wherever that was found: they must understand each other.
                    env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
                    stdin=subprocess.DEVNULL,
                    pass_fds=(
                        theirs.fileno(),
                        listening.fileno(),
                        files.counters,
                        files.places,
                        files.crowd,
                        *files.bells,
                    ),
                    process_group=0,
                )
            undone.callback(process.wait)
            undone.callback(process.kill)
            channel = await Channel.open(ours)
            with suppress(ConnectionError):  # it has ended already
                channel.put(Start(number, config, listening.fileno(), files))
            undone.pop_all()
        return cls(process, channel, clock)

    async def hear(self, up: asyncio.Event) -> None:
        """Until it has gone."""
        with suppress(EOFError):
            while True:
                said = await self.channel.hear(SAID)
                if isinstance(said, Up):
                    up.set()
                else:
                    self.told, self.answered_s = said.report or self.told, self._clock.now_s()
                    self.looks_missed = 0
                    if self._answer is not None:
                        self._answer.set_result(said.report)
                        self._answer = None
        if self._answer is not None:
            self._answer.cancel()
        self.channel.close()

    async def ask(self) -> Report | None:
        """How it is; None if it does not say so in time, or can't, or has gone. All who ask meanwhile get the same
        answer."""
        if self._answer is None:
            try:
                self.channel.put(Ask())
            except ConnectionError:
                return None
            self._answer = asyncio.get_running_loop().create_future()
        answer = self._answer
        await asyncio.wait((answer,), timeout=ANSWER_S_MAX)
        return answer.result() if answer.done() and not answer.cancelled() else None


#: Pause between two looks at all of them, how long one may take to answer, and how many looks one may miss: that takes
#: half a minute.
LOOK_S = 1.0
ANSWER_S_MAX = 1.0
LOOKS_MISSED_MAX = 15
#: Pause before one is started again, doubled each time it did not last for STEADY_S.
RESTART_S = 0.1
RESTART_S_MAX = 30.0
STEADY_S = 10.0
#: Metrics that only ever grow.
COUNTED = frozenset({"counter", "histogram"})
