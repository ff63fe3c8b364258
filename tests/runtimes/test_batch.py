"""The Batcher by itself: whatever is offered, left, late and taken in whatever order."""

import math
from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from runtimes.batch import LENGTH_LEAST, Batcher, Job, Policy, Row
from runtimes.contract import Overloaded

NEVER_S = math.inf


def batcher(*, rows_max: int = 4, delay_s_max: float = 0.0, waiting_max: int = 100) -> Batcher:
    return Batcher(Policy(rows_max=rows_max, delay_s_max=delay_s_max, waiting_max=waiting_max), who="intent-0")


def entered(to: Batcher, *lengths: int, flow: str = "a", deadline_s: float = NEVER_S, at_s: float = 0.0) -> Job:
    job = Job(flow=flow, deadline_s=deadline_s)
    to.enter(job)
    to.offer([Row(job, index, None, length=length) for index, length in enumerate(lengths)], at_s)
    return job


def taken(of: Batcher, at_s: float = 0.0) -> list[tuple[str, int]]:
    """Flow and index of each row of the next batch."""
    batch, _ = of.take(at_s)
    return [(row.job.flow, row.index) for row in batch]


class Life(RuleBasedStateMachine):
    """Calls come, wait, leave, get late; workers take and finish batches. What must hold holds after every step."""

    @initialize(
        rows_max=st.integers(1, 6),
        delay_s_max=st.sampled_from([0.0, 2.0]),
        waiting_max=st.integers(1, 6),
        workers=st.integers(1, 3),
    )
    def begin(self, rows_max: int, delay_s_max: float, waiting_max: int, workers: int) -> None:
        self.batcher = batcher(rows_max=rows_max, delay_s_max=delay_s_max, waiting_max=waiting_max)
        self.now_s = 0.0
        self.free = workers
        self.jobs: list[Job] = []
        self.offered: dict[str, list[Row]] = defaultdict(list)
        """Rows that must still run, by flow, in order."""
        self.running: list[list[Row]] = []
        self.ran: set[Row] = set()
        self.late: set[Job] = set()

    @rule(
        flow=st.sampled_from("abc"),
        lengths=st.lists(st.integers(1, 200), max_size=9),
        kind=st.sampled_from(["x", "x", "y"]),
        left_s=st.sampled_from([NEVER_S, 1.0, 3.0]),
    )
    def call(self, flow: str, lengths: list[int], kind: str, left_s: float) -> None:
        job = Job(flow=flow, deadline_s=self.now_s + left_s)
        waiting = sum(not it.running for it in self.jobs)
        if waiting >= self.batcher.policy.waiting_max:
            with pytest.raises(Overloaded, match="intent-0"):
                self.batcher.enter(job)
            return
        self.batcher.enter(job)
        self.jobs.append(job)
        self.offer(job, lengths, kind)

    @precondition(lambda self: self.jobs)
    @rule(data=st.data(), lengths=st.lists(st.integers(1, 200), max_size=9))
    def more(self, data: st.DataObject, lengths: list[int]) -> None:
        self.offer(data.draw(st.sampled_from(self.jobs)), lengths, "x")

    def offer(self, job: Job, lengths: list[int], kind: str) -> None:
        rows = [Row(job, index, None, length=length, kind=kind) for index, length in enumerate(lengths)]
        self.batcher.offer(rows, self.now_s)
        if job not in self.late:
            self.offered[job.flow] += rows

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        job = data.draw(st.sampled_from(self.jobs))
        self.batcher.leave(job)
        self.jobs.remove(job)
        self.strike(job)

    def strike(self, job: Job) -> None:
        self.offered[job.flow] = [row for row in self.offered[job.flow] if row.job is not job]

    @rule(by_s=st.sampled_from([0.5, 1.0, 5.0]))
    def pass_time(self, by_s: float) -> None:
        self.now_s += by_s

    @precondition(lambda self: self.free)
    @rule()
    def take(self) -> None:
        batch, late = self.batcher.take(self.now_s)
        assert {job for job in self.jobs if job.deadline_s <= self.now_s} - self.late == set(late)
        self.late |= set(late)
        for job in late:
            self.strike(job)
        if not batch:
            waits = sum(map(len, self.offered.values()))
            # Nothing to do, or soon more to do it with.
            assert not waits or self.now_s < self.batcher.due_s() <= self.now_s + self.batcher.policy.delay_s_max
            return
        self.free -= 1
        self.running.append(batch)
        policy, lengths = self.batcher.policy, [row.length for row in batch]
        assert len(batch) <= policy.rows_max
        assert len({row.kind for row in batch}) == 1
        assert len(batch) == 1 or len(batch) * max(lengths) <= policy.cells_max
        assert max(lengths) <= max(LENGTH_LEAST, 2 * min(lengths))
        for row in batch:
            assert row not in self.ran
            assert row is self.offered[row.job.flow].pop(0)
            assert row.job in self.jobs
            assert row.job.deadline_s > self.now_s
            self.ran.add(row)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        batch = data.draw(st.sampled_from(self.running))
        self.running.remove(batch)
        self.free += 1
        self.batcher.done(batch, now_s=self.now_s, compute_s=1.0)

    @invariant()
    def counts_are_true(self) -> None:
        if not hasattr(self, "batcher"):
            return
        assert self.batcher.waiting == sum(map(len, self.offered.values()))
        assert list(self.batcher.jobs) == self.jobs
        assert self.batcher.working == sum(bool(job.running) for job in self.jobs)
        assert sum(self.batcher.rows.counts) <= len(self.ran) == sum(self.batcher.queue_s.counts)

    def teardown(self) -> None:
        """Whoever is still there gets all that is his, in time that is bounded by what waits."""
        if not hasattr(self, "batcher"):
            return
        rows = sum(map(len, self.offered.values()))
        for _ in range(rows):
            self.now_s = max(self.now_s, min(self.batcher.due_s(), self.now_s + self.batcher.policy.delay_s_max))
            self.free = 1
            self.take()
        assert self.batcher.waiting == 0


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)


def test_a_lone_call_waits_for_nobody() -> None:
    it = batcher(delay_s_max=5.0)
    entered(it, 7)
    assert taken(it) == [("a", 0)]


def test_a_batch_closes_by_size() -> None:
    it = batcher(rows_max=3)
    entered(it, *[7] * 4)
    assert len(taken(it)) == 3
    assert len(taken(it)) == 1


def test_a_batch_closes_by_cells() -> None:
    it = batcher(rows_max=4)
    entered(it, *[100] * 4)
    assert [len(taken(it)) for _ in range(2)] == [2, 2]


def crowd_of_two(deadline_s: float = NEVER_S) -> Batcher:
    """Two had been answered together, after a second; one of them is back."""
    it = batcher(rows_max=4, delay_s_max=5.0)
    both = [entered(it, 7), entered(it, 7)]
    batch, _ = it.take(0)
    for job in both:
        it.leave(job)
    it.done(batch, now_s=1.0, compute_s=1.0)
    entered(it, 7, deadline_s=deadline_s, at_s=2.0)
    return it


def test_a_batch_waits_for_those_who_were_here_a_moment_ago() -> None:
    it = crowd_of_two()
    assert taken(it, 2.0) == []
    entered(it, 7, at_s=3.0)
    assert len(taken(it, 3.0)) == 2


def test_a_batch_closes_by_age() -> None:
    it = crowd_of_two()
    assert taken(it, 2.0) == []
    assert it.due_s() == 1.0 + 5.0
    assert len(taken(it, 6.0)) == 1


def test_a_batch_closes_by_the_earliest_deadline() -> None:
    it = crowd_of_two(deadline_s=4.0)
    assert taken(it, 2.0) == []
    assert it.due_s() == pytest.approx(4.0 - 0.1)  # less what a batch is thought to take
    assert len(taken(it, 3.95)) == 1


def test_one_with_many_rows_and_one_with_few_take_turns() -> None:
    it = batcher(rows_max=2)
    entered(it, *[7] * 100, flow="many")
    entered(it, *[7] * 2, flow="few")
    assert taken(it) == [("many", 0), ("few", 0)]
    assert taken(it) == [("many", 1), ("few", 1)]


def test_turns_are_weighted_by_tokens() -> None:
    it = batcher(rows_max=1)
    entered(it, *[30] * 100, flow="long")
    entered(it, *[10] * 100, flow="short")
    flows = [taken(it)[0][0] for _ in range(40)]
    assert (flows.count("long"), flows.count("short")) == (10, 30)


def test_a_flow_that_was_away_has_saved_nothing_and_owes_no_more_than_it_had() -> None:
    it = batcher(rows_max=1)
    entered(it, *[10] * 100, flow="there")
    for _ in range(20):
        taken(it)
    entered(it, *[10] * 100, flow="new")
    flows = [taken(it)[0][0] for _ in range(20)]
    assert flows.count("new") == 10


@given(newcomers=st.integers(1, 50))
def test_newcomers_without_end_keep_nobody_waiting_for_ever(newcomers: int) -> None:
    it = batcher(rows_max=1)
    entered(it, 20, 20, flow="patient")
    assert taken(it) == [("patient", 0)]
    served: list[str] = []
    for at in range(newcomers + 50):
        entered(it, 10, flow=f"new {at}")
        entered(it, 10, flow=f"newer {at}")
        served += [flow for flow, _ in taken(it)]
        if "patient" in served:
            break
    assert "patient" in served
    assert len(it._flows) <= 2 * len(served) + 1


def test_flows_that_have_gone_are_forgotten() -> None:
    it = batcher()
    for at in range(1_000):
        job = entered(it, 10, flow=f"tenant {at}")
        batch, _ = it.take(0)
        it.leave(job)
        it.done(batch, now_s=0, compute_s=0)
    assert len(it._flows) <= 2
