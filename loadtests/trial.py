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
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import msgspec

from loadtests import process, slope
from loadtests.client import Answer, Connection
from loadtests.report import Cost, Report, machine
from loadtests.scenario import Scenario
from loadtests.tally import Tally, together
from loadtests.target import Access, Target, TargetFault
from loadtests.workload import Call, calls

if TYPE_CHECKING:
    from loadtests.grpc_client import GrpcConnection

CONNECT_S_MAX = 5.0
RECONNECT_S = 0.1
LOOK_S = 0.5
"""How often overdue answers are given up and memory is looked at."""
SLOPE_S_MIN = 60.0


async def trial(scenario: Scenario, *, name: str, target: Target, access: Access, pid: int | None) -> Report:
    """Raises TargetFault if nobody listens, NoProcess if `pid` is not there; later failures are counted."""
    headers = access.of(scenario.callers[0].name)
    clients = [_Client(target, headers) for _ in range(scenario.connections)]

    async def part(name: str, duration_s: float, pid: int | None) -> _Round:
        due = calls(scenario, target, access, duration_s=duration_s, part=name)
        made = _Round(scenario, clients, due, duration_s=duration_s, pid=pid)
        await made.run()
        return made

    try:
        await _connect(clients, target)
        if scenario.warmup_s:
            await part("warm-up", scenario.warmup_s, None)
        before = process.usage(pid) if pid is not None else None
        measured = await part("measured", scenario.duration_s, pid)
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

    def __init__(self, target: Target, headers: Mapping[str, str]) -> None:
        self.target = target
        self.headers = headers
        """Of a connection, where it is not each call that carries them."""
        self.connection: Connection | GrpcConnection = Connection()
        self.sent_s = 0.0

    async def connect(self) -> None:
        """Raises OSError."""
        if self.target.grpc:
            # Here, not above: only the development tools bring grpcio.
            from loadtests.grpc_client import GrpcConnection

            self.connection = GrpcConnection(self.target, self.headers)
            await self.connection.connect(within_s=CONNECT_S_MAX)
        else:
            self.connection = await self.target.connect(Connection, within_s=CONNECT_S_MAX)
        if not self.connection.open:
            raise ConnectionResetError("it was closed as soon as it was open")

    async def ask(self, call: Call, answer: Answer) -> None:
        self.sent_s = time.perf_counter()
        if not self.connection.open:
            try:
                await self.connect()
            except OSError:
                answer.fault, answer.end_s = "connect", time.perf_counter()
                await asyncio.sleep(RECONNECT_S)
                return
        if call.leaves_after_s is None:
            await self.connection.ask(call.wire, answer)
            return
        leaving = asyncio.get_running_loop().call_later(call.leaves_after_s, self.connection.leave)
        await self.connection.ask(call.wire, answer)
        leaving.cancel()

    def give_up(self, sent_before_s: float) -> None:
        if self.connection.busy and self.sent_s < sent_before_s:
            self.connection.stop("timeout")


class _Round:
    """All clients asking until the schedule or a bound ends it; every call that was sent is then waited for."""

    def __init__(
        self, scenario: Scenario, clients: list[_Client], due: Iterator[Call], *, duration_s: float, pid: int | None
    ) -> None:
        self.scenario = scenario
        self.clients = clients
        self.due = due
        self.duration_s = duration_s
        self.pid = pid
        self.tallies = {tenant.name: Tally(scenario.slo) for tenant in scenario.callers}
        self.calls = self.chunks = 0
        self.rss_bytes: list[tuple[float, float]] = []
        """When, and how much."""
        self.own_cpu_s = 0.0
        self.start_s = self.end_s = 0.0

    async def run(self) -> None:
        self.start_s, cpu_s = time.perf_counter(), time.process_time()
        watch = asyncio.create_task(self._watch())
        try:
            async with asyncio.TaskGroup() as group:
                for client in self.clients:
                    group.create_task(self._ask(client))
        finally:
            self.end_s, self.own_cpu_s = time.perf_counter(), time.process_time() - cpu_s
            watch.cancel()

    async def _ask(self, client: _Client) -> None:
        """One of the clients: takes the next call from the schedule they all share, as soon as it is free."""
        scenario = self.scenario
        asking_ends_s = self.start_s + self.duration_s
        for call in self.due:
            now_s, at_s, tally = time.perf_counter(), call.at_s, self.tallies[call.tenant]
            if self.calls >= scenario.calls_max or self.chunks >= scenario.chunks_max:
                return
            if at_s is None and now_s >= asking_ends_s:
                return
            self.calls += 1
            if now_s >= asking_ends_s + scenario.call_s_max:
                tally.outcomes["unsent"] += 1
                continue
            due_s = now_s if at_s is None else self.start_s + at_s
            if due_s > now_s:
                # Whole milliseconds, rounded down: rather early than late, see above.
                await asyncio.sleep(int((due_s - now_s) * 1_000) / 1_000)
            answer = Answer(tally.gaps_s, call.leaves_after_chunks)
            await client.ask(call, answer)
            self.chunks += answer.chunks
            tally.count(answer, since_s=min(due_s, client.sent_s), start_s=self.start_s)
            if at_s is not None:
                tally.late_s.append(max(0.0, client.sent_s - due_s))

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            for client in self.clients:
                client.give_up(time.perf_counter() - self.scenario.call_s_max)
            if self.pid is not None:
                try:
                    self.rss_bytes.append((time.perf_counter(), process.usage(self.pid).rss_bytes))
                except process.NoProcess:
                    continue  # it died; the trial says so once every call has ended

    def report(self, *, name: str, target: str, before: process.Usage | None, after: process.Usage | None) -> Report:
        elapsed_s = self.end_s - self.start_s
        whole = together(self.tallies.values(), self.scenario.slo)
        sent = whole.outcomes.total() - whole.outcomes["unsent"]
        cost = None
        if before is not None and after is not None and sent:
            cpu_s = after.cpu_s - before.cpu_s
            slope_per_s = slope.slope_per_s(self.rss_bytes) if elapsed_s >= SLOPE_S_MIN else None
            cost = Cost(
                cpu_us_per_call=cpu_s * 1e6 / sent,
                cpu_us_per_chunk=cpu_s * 1e6 / whole.chunks if whole.chunks else None,
                cores=cpu_s / elapsed_s,
                rss_bytes_max=int(max([after.rss_bytes, *(it for _, it in self.rss_bytes)])),
                rss_slope_bytes_per_h=None if slope_per_s is None else slope_per_s * 3_600,
            )
        return Report(
            **msgspec.structs.asdict(whole.service(elapsed_s)),
            scenario=name,
            settings=self.scenario,
            target=target,
            at=datetime.now(UTC).isoformat(timespec="seconds"),
            machine=machine(),
            load_average=os.getloadavg()[0],
            elapsed_s=elapsed_s,
            client_cores=self.own_cpu_s / elapsed_s,
            tenants={name: tally.service(elapsed_s) for name, tally in self.tallies.items()},
            cost=cost,
        )
