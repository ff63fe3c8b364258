"""Which rows go through a model together, and when. Pure: no thread, no event loop, and time only as it is told.

A Job is one call. Its rows wait in its flow's line, in order; flows take turns weighted by what their rows cost, so
that one with ten thousand rows holds up nobody. A worker that is free gets what waits at once, so calls gather only
while all workers are busy; it may wait a little for those that were here a moment ago and are about to come back.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Hashable, Sequence
from typing import Any

import msgspec

from runtimes.contract import Overloaded
from runtimes.histogram import Histogram


class Policy(msgspec.Struct, frozen=True):
    """What bounds a batch, and what waits for one."""

    rows_max: int
    delay_s_max: float
    """How long rows may wait for others beside a worker that is free."""
    waiting_max: int
    """Jobs, those that a worker is at not counted."""

    @property
    def cells_max(self) -> int:
        """Rows times the longest of them. A larger batch is hardly faster on a CPU, and all of it is late."""
        return CELLS_PER_ROW * self.rows_max


BATCH_MAX = 16
"""Rows that go together where nothing speaks against it."""
CELLS_PER_ROW = 64
LENGTH_LEAST = 16
"""Shorter rows than this are as good as that long."""

ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
QUEUE_S = (0.0001, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5)


class Job:
    """One call, from `enter` to `leave`."""

    def __init__(self, *, flow: str, deadline_s: float) -> None:
        self.flow = flow
        self.deadline_s = deadline_s
        self.waiting = 0
        """Its rows in line."""
        self.running = 0
        """Its rows that workers are at."""
        self.gone = False
        """It has left or is late; nothing of it runs any more."""


class Row:
    """One row of a job."""

    __slots__ = ("content", "index", "job", "kind", "length", "offered_s")

    def __init__(self, job: Job, index: int, content: Any, *, length: int, kind: Hashable = None) -> None:
        self.job = job
        self.index = index
        """Which of the job's rows it is."""
        self.content = content
        self.length = length
        """What it costs, in tokens; a batch is padded to its longest row."""
        self.kind = kind
        """Only rows of one kind go together."""
        self.offered_s = 0.0


class Flow:
    """A line of rows, and what those that were in it before have cost."""

    __slots__ = ("cost", "rows")

    def __init__(self, cost: float) -> None:
        self.rows: deque[Row] = deque()
        self.cost = cost


class Batcher:
    """Its owner makes sure that only one thread at a time is in it."""

    def __init__(self, policy: Policy, *, who: str) -> None:
        self.policy = policy
        self.who = who
        self.jobs: dict[Job, None] = {}
        self.working = 0
        """Jobs that workers are at."""
        self.waiting = 0
        """Rows in line."""
        self.rows = Histogram(ROWS)
        """Of batches taken."""
        self.queue_s = Histogram(QUEUE_S)
        """Of rows taken."""
        self._flows: dict[str, Flow] = {}
        self._served = 0.0
        """What each flow would have been given by now had all had the same: new ones begin with it."""
        self._crowd = 0
        """Jobs there were when a batch was last taken."""
        self._freed_s = -math.inf
        """When a worker last came free."""
        self._held_s = math.inf
        """Since when rows wait beside a free worker."""
        self._compute_s = 0.0
        """Moving mean of a batch's time in the model."""

    def enter(self, job: Job) -> None:
        """Count it among those that wait. Raises Overloaded if they are too many."""
        if len(self.jobs) - self.working >= self.policy.waiting_max:
            raise Overloaded(f"{self.who} has {self.policy.waiting_max} calls waiting already; retry later")
        self.jobs[job] = None

    def offer(self, rows: Sequence[Row], now_s: float) -> None:
        """More rows of jobs that have entered, behind the others of their flows."""
        for row in rows:
            job = row.job
            if job.gone:
                continue
            flow = self._flows.get(job.flow)
            if flow is None:
                flow = self._flows[job.flow] = Flow(self._served)
            elif not flow.rows:
                flow.cost = max(flow.cost, self._served)
            row.offered_s = now_s
            flow.rows.append(row)
            job.waiting += 1
            self.waiting += 1

    def leave(self, job: Job) -> None:
        """It is answered, or nobody wants it any more: what waits of it never runs."""
        self._drop(job)
        self.working -= bool(job.running)
        del self.jobs[job]

    def take(self, now_s: float) -> tuple[list[Row], list[Job]]:
        """For a worker that is free: rows to run at once, and jobs whose time is up, each told once. No rows if none
        wait, or it is better to wait for more until `due_s`."""
        late = [job for job in self.jobs if job.deadline_s <= now_s and not job.gone]
        for job in late:
            self._drop(job)
        if not self.waiting:
            self._held_s = math.inf
            return [], late
        self._held_s = min(self._held_s, now_s)
        if now_s < self.due_s():
            return [], late
        self._held_s = math.inf
        self._crowd = len(self.jobs)
        batch = self._choose()
        for row in batch:
            job = row.job
            self.working += not job.running
            job.running += 1
            self.queue_s.observe(now_s - row.offered_s)
        self.rows.observe(len(batch))
        return batch, late

    def due_s(self) -> float:
        """When a free worker should take what waits, if no more comes; infinite if nothing does."""
        if not self.waiting:
            return math.inf
        if self.waiting >= self.policy.rows_max or len(self.jobs) >= self._crowd:
            return -math.inf
        # Some of those that were answered lately may be about to ask again.
        most_s = min(self._freed_s, self._held_s) + self.policy.delay_s_max
        return min(most_s, min(job.deadline_s for job in self.jobs) - self._compute_s)

    def done(self, batch: Sequence[Row], *, now_s: float, compute_s: float) -> None:
        """What was taken has been through the model, for better or worse."""
        self._freed_s = now_s
        self._compute_s += 0.1 * (compute_s - self._compute_s)
        for row in batch:
            job = row.job
            job.running -= 1
            self.working -= not job.running and job in self.jobs

    def _choose(self) -> list[Row]:
        """Rows by turn. A flow whose next row does not fit sits this batch out, so that each stays in order; whose
        turn it is has a place in any case."""
        turns: list[tuple[float, int, Flow]] = []
        for name, flow in list(self._flows.items()):
            if flow.rows:
                turns.append((flow.cost, len(turns), flow))
            elif flow.cost <= self._served:
                del self._flows[name]
        heapq.heapify(turns)
        share = 1 / len(turns)
        batch: list[Row] = []
        shortest, longest = math.inf, 0
        while turns and len(batch) < self.policy.rows_max:
            _, order, flow = turns[0]
            row = flow.rows[0]
            low, high = min(shortest, row.length), max(longest, row.length)
            if batch and not (row.kind == batch[0].kind and self._fit(len(batch) + 1, low, high)):
                heapq.heappop(turns)
                continue
            shortest, longest = low, high
            batch.append(flow.rows.popleft())
            row.job.waiting -= 1
            flow.cost += row.length
            self._served += row.length * share
            if flow.rows:
                heapq.heapreplace(turns, (flow.cost, order, flow))
            else:
                heapq.heappop(turns)
        self.waiting -= len(batch)
        return batch

    def _fit(self, rows: int, shortest: float, longest: float) -> bool:
        """Little of a batch may be padding."""
        return longest <= max(LENGTH_LEAST, 2 * shortest) and rows * longest <= self.policy.cells_max

    def _drop(self, job: Job) -> None:
        job.gone = True
        if job.waiting:
            flow = self._flows[job.flow]
            flow.rows = deque(row for row in flow.rows if row.job is not job)
            self.waiting -= job.waiting
            job.waiting = 0
