"""One trial: a scenario against a target, once, and what was measured.

Latency counts from when a call was *due*, not from when it was sent: a target that stalls keeps the client's
connections busy, the calls due meanwhile go out late, and that wait is the target's too ("coordinated omission" is
to leave it out). A loop's timers tick in milliseconds, so a call goes out up to one of them ahead of its time; it
then counts from when it went out.
"""

from __future__ import annotations

import asyncio
import os
import time
from array import array
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime

from loadtests import process
from loadtests.client import Answer, Connection, request
from loadtests.report import Cost, Report, Spread, machine
from loadtests.scenario import TENANT, Scenario
from loadtests.target import Access, Target, TargetFault

CONNECT_S_MAX = 5.0
RECONNECT_S = 0.1
LOOK_S = 0.5
"""How often overdue answers are given up and memory is looked at."""


async def trial(scenario: Scenario, *, name: str, target: Target, access: Access, pid: int | None) -> Report:
    """Raises TargetFault if nobody listens, NoProcess if `pid` is not there; later failures are counted."""
    wire = request(target, scenario.content(), access.of(TENANT))
    clients = [_Client(target, wire) for _ in range(scenario.connections)]
    try:
        await _connect(clients, target)
        if scenario.warmup_s:
            await _Round(scenario, clients, duration_s=scenario.warmup_s, pid=None).run()
        before = process.usage(pid) if pid is not None else None
        measured = _Round(scenario, clients, duration_s=scenario.duration_s, pid=pid)
        await measured.run()
        after = process.usage(pid) if pid is not None else None
    finally:
        for client in clients:
            client.connection.stop("closed")
    return measured.report(name=name, target=target.text, before=before, after=after)


async def _connect(clients: list[_Client], target: Target) -> None:
    try:
        for client in clients:
            await client.connect()
    except OSError as error:
        raise TargetFault(f"target {target.text}: cannot connect, is it running? {error or 'no answer'}") from None


class _Client:
    """A connection that is made again when it was lost."""

    def __init__(self, target: Target, wire: bytes) -> None:
        self.target = target
        self.wire = wire
        self.connection = Connection()
        self.sent_s = 0.0

    async def connect(self) -> None:
        """Raises OSError."""
        self.connection = await self.target.connect(Connection, within_s=CONNECT_S_MAX)
        if not self.connection.open:
            raise ConnectionResetError("it was closed as soon as it was open")

    async def ask(self, answer: Answer) -> None:
        self.sent_s = time.perf_counter()
        if not self.connection.open:
            try:
                await self.connect()
            except OSError:
                answer.fault, answer.end_s = "connect", time.perf_counter()
                await asyncio.sleep(RECONNECT_S)
                return
        await self.connection.ask(self.wire, answer)

    def give_up(self, sent_before_s: float) -> None:
        if self.connection.busy and self.sent_s < sent_before_s:
            self.connection.stop("timeout")


class _Round:
    """All clients asking until the schedule or a bound ends it; every call that was sent is then waited for."""

    def __init__(self, scenario: Scenario, clients: list[_Client], *, duration_s: float, pid: int | None) -> None:
        self.scenario = scenario
        self.clients = clients
        self.duration_s = duration_s
        self.pid = pid
        self.outcomes: Counter[str] = Counter()
        self.total_s = array("d")
        self.first_s = array("d")
        self.late_s = array("d")
        self.gaps_s = array("d")
        self.calls = self.chunks = self.tokens = 0
        self.rss_bytes_max = 0
        self.own_cpu_s = 0.0
        self.start_s = self.end_s = 0.0

    async def run(self) -> None:
        self.start_s, cpu_s = time.perf_counter(), time.process_time()
        due = self.scenario.arrivals.times_s(self.duration_s)
        watch = asyncio.create_task(self._watch())
        try:
            async with asyncio.TaskGroup() as group:
                for client in self.clients:
                    group.create_task(self._ask(client, due))
        finally:
            self.end_s, self.own_cpu_s = time.perf_counter(), time.process_time() - cpu_s
            watch.cancel()

    async def _ask(self, client: _Client, due: Iterator[float | None]) -> None:
        """One of the clients: takes the next call from the schedule they all share, as soon as it is free."""
        scenario = self.scenario
        asking_ends_s = self.start_s + self.duration_s
        for at_s in due:
            now_s = time.perf_counter()
            if self.calls >= scenario.calls_max or self.chunks >= scenario.chunks_max:
                return
            if at_s is None and now_s >= asking_ends_s:
                return
            self.calls += 1
            if now_s >= asking_ends_s + scenario.call_s_max:
                self.outcomes["unsent"] += 1
                continue
            due_s = now_s if at_s is None else self.start_s + at_s
            if due_s > now_s:
                # Whole milliseconds, rounded down: rather early than late, see above.
                await asyncio.sleep(int((due_s - now_s) * 1_000) / 1_000)
            answer = Answer(self.gaps_s)
            await client.ask(answer)
            self._count(answer, min(due_s, client.sent_s))
            if at_s is not None:
                self.late_s.append(max(0.0, client.sent_s - due_s))

    def _count(self, answer: Answer, since_s: float) -> None:
        outcome = answer.outcome
        self.outcomes[outcome] += 1
        self.chunks += answer.chunks
        self.tokens += answer.tokens
        if outcome != "served":
            return  # a refusal is quick, and would flatter the latencies
        self.total_s.append(answer.end_s - since_s)
        if answer.first_s is not None:
            self.first_s.append(answer.first_s - since_s)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            for client in self.clients:
                client.give_up(time.perf_counter() - self.scenario.call_s_max)
            if self.pid is not None:
                try:
                    self.rss_bytes_max = max(self.rss_bytes_max, process.usage(self.pid).rss_bytes)
                except process.NoProcess:
                    continue  # it died; the trial says so once every call has ended

    def report(self, *, name: str, target: str, before: process.Usage | None, after: process.Usage | None) -> Report:
        elapsed_s = self.end_s - self.start_s
        sent = self.calls - self.outcomes["unsent"]
        cost = None
        if before is not None and after is not None and sent:
            cpu_s = after.cpu_s - before.cpu_s
            cost = Cost(
                cpu_us_per_call=cpu_s * 1e6 / sent,
                cpu_us_per_chunk=cpu_s * 1e6 / self.chunks if self.chunks else None,
                cores=cpu_s / elapsed_s,
                rss_bytes_max=max(self.rss_bytes_max, after.rss_bytes),
            )
        return Report(
            scenario=name,
            settings=self.scenario,
            target=target,
            at=datetime.now(UTC).isoformat(timespec="seconds"),
            machine=machine(),
            load_average=os.getloadavg()[0],
            elapsed_s=elapsed_s,
            client_cores=self.own_cpu_s / elapsed_s,
            calls=self.calls,
            outcomes={outcome: count for outcome, count in sorted(self.outcomes.items()) if count},
            chunks=self.chunks,
            tokens=self.tokens,
            first_token=Spread.of(self.first_s),
            gap=Spread.of(self.gaps_s),
            total=Spread.of(self.total_s),
            late=Spread.of(self.late_s),
            cost=cost,
        )
