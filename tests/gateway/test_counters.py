"""Quotas that workers count together."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from decimal import Decimal
from multiprocessing.synchronize import Barrier
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway import counters as module
from gateway.call import Call, Limits
from gateway.counters import Counters, SharedQuota, entry_hash
from gateway.errors import QuotaExceeded
from gateway.memory import Memory
from gateway.price import Price, Prices
from gateway.quota import Hold, Quota
from gateway.store import Spent
from runtimes.clock import SystemClock
from tests.fakes import FakeClock, a_call, a_principal, limits

WORKERS = 3


@pytest.fixture
def counters() -> Iterator[Counters]:
    made = Counters.make(workers=WORKERS)
    yield made
    os.close(made.memory.file)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def workers(counters: Counters, clock: FakeClock) -> list[SharedQuota]:
    return [SharedQuota(clock=clock, counters=counters, worker=number) for number in range(WORKERS)]


def asked(tenant: Limits, *, key: Limits | None = None, name: str = "acme", **given: Any) -> Call:
    principal = a_principal(name, tenant_limits=tenant, key=f"key of {name}", key_limits=key or Limits())
    return a_call(principal, **given)


def entered(quota: Quota, call: Call, price: Price | None = None) -> Hold | None:
    """The call's hold, None if it is refused."""
    hold = quota.hold(call, tokens_out_default=16, price=price)
    try:
        hold.__enter__()
    except QuotaExceeded:
        return None
    return hold


def left(hold: Hold | None) -> None:
    assert hold is not None
    hold.__exit__(None, None, None)


# ---- deciding


Step = tuple[str, int, int, int]
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("take"), st.integers(0, WORKERS - 1), st.integers(0, 60), st.integers(0, 1)),
        st.tuples(st.just("settle"), st.integers(0, 20), st.integers(0, 90), st.just(0)),
        st.tuples(st.just("pause"), st.integers(0, 20), st.just(0), st.just(0)),
        st.tuples(st.just("change"), st.integers(1, 30), st.integers(1, 400), st.integers(1, 4)),
    ),
    max_size=60,
)


@settings(deadline=None)
@given(steps=STEPS)
def test_workers_together_decide_as_one_would(steps: list[Step]) -> None:
    clock = FakeClock()
    table = Counters.make(workers=WORKERS)
    one: Quota = Quota(clock=clock)
    many = [SharedQuota(clock=clock, counters=table, worker=number) for number in range(WORKERS)]
    of_tenant = limits(rpm=10, tpm=200, concurrent=3)
    under_way: list[tuple[Call, Hold, Call, Hold]] = []
    for step, first, second, third in steps:
        match step:
            case "take":
                calls = [
                    a_call(
                        a_principal("acme", key=f"k{third}", tenant_limits=of_tenant, key_limits=limits(rpm=7)),
                        body=b"",
                        tokens_out_max=second,
                    )
                    for _ in range(2)
                ]
                by_one, by_many = entered(one, calls[0]), entered(many[first], calls[1])
                assert (by_one is None) == (by_many is None)
                if by_one is not None and by_many is not None:
                    under_way.append((calls[0], by_one, calls[1], by_many))
            case "settle" if under_way:
                call, hold, same, other = under_way.pop(first % len(under_way))
                call.tokens_out = same.tokens_out = second
                left(hold)
                left(other)
            case "pause":
                clock.advance(first)
            case "change":
                of_tenant = limits(rpm=first, tpm=second, concurrent=third)
    os.close(table.memory.file)


def test_calls_at_once_are_counted_over_all_workers(workers: list[SharedQuota]) -> None:
    holds = [entered(workers[number % WORKERS], asked(limits(concurrent=2))) for number in range(6)]
    assert [hold is not None for hold in holds] == [True, True, False, False, False, False]
    left(holds[0])
    assert entered(workers[2], asked(limits(concurrent=2))) is not None


def test_what_one_worker_did_not_use_another_may(workers: list[SharedQuota]) -> None:
    for number in range(30):
        hold = entered(workers[number % WORKERS], asked(limits(tpm=100), body=b"", tokens_out_max=99))
        left(hold)


def test_what_the_key_refuses_is_not_taken_from_the_tenant(workers: list[SharedQuota]) -> None:
    narrow = asked(limits(rpm=2), key=limits(rpm=1))
    left(entered(workers[0], narrow))
    assert entered(workers[1], narrow) is None
    wide = a_call(a_principal("acme", tenant_limits=limits(rpm=2), key="k2"))
    left(entered(workers[2], wide))
    assert entered(workers[0], wide) is None


def test_a_worker_that_has_not_heard_of_a_new_limit_gives_back_at_the_new_rate(
    workers: list[SharedQuota], clock: FakeClock
) -> None:
    begun_before = entered(workers[0], asked(limits(tpm=6_000), body=b"", tokens_out_max=9))
    assert entered(workers[1], asked(limits(tpm=60), body=b"", tokens_out_max=29))
    left(begun_before)
    clock.advance(0.5)  # at the old rate, all of it would be there again
    assert entered(workers[1], asked(limits(tpm=60), body=b"", tokens_out_max=30)) is None
    assert entered(workers[1], asked(limits(tpm=60), body=b"", tokens_out_max=29))


def test_lifting_a_limit_and_setting_it_again_forgets_nothing_used_under_it(workers: list[SharedQuota]) -> None:
    left(entered(workers[0], asked(limits(rpm=1))))
    left(entered(workers[1], asked(limits())))
    assert entered(workers[0], asked(limits(rpm=1))) is None


# ---- a worker that is killed


def test_what_a_killed_worker_had_under_way_is_struck_out(workers: list[SharedQuota], counters: Counters) -> None:
    call = asked(limits(concurrent=2))
    assert entered(workers[0], call)
    kept = entered(workers[1], call)
    counters.strike_out(0)
    assert entered(workers[2], call)
    assert entered(workers[2], call) is None
    left(kept)
    assert entered(workers[2], call)


def test_what_a_killed_worker_had_reserved_is_not_free_before_its_time(
    workers: list[SharedQuota], counters: Counters, clock: FakeClock
) -> None:
    assert entered(workers[0], asked(limits(tpm=60), body=b"", tokens_out_max=59))
    counters.strike_out(0)
    again = asked(limits(tpm=60), body=b"", tokens_out_max=59)
    assert entered(workers[1], again) is None
    clock.advance(60)
    assert entered(workers[1], again)


# ---- a table that is full


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"BUCKET": 4, "BUCKETS": 1, "ENTRIES": 4}.items():
        monkeypatch.setattr(module, name, value)


def test_an_idle_entry_gives_way_to_another(small: None, workers: list[SharedQuota], clock: FakeClock) -> None:
    for number in range(20):  # two entries each
        left(entered(workers[number % WORKERS], asked(limits(rpm=1), name=f"t{number}")))
        clock.advance(60)


def test_nobody_is_let_in_uncounted(small: None, workers: list[SharedQuota], clock: FakeClock) -> None:
    first, second, third = (asked(limits(rpm=9), key=limits(rpm=9), name=name) for name in ("first", "second", "third"))
    holds = [entered(workers[0], first), entered(workers[1], second)]
    with pytest.raises(QuotaExceeded, match="More tenants and keys") as refused:
        workers[2].hold(third, tokens_out_default=16).__enter__()
    assert refused.value.retry_after_s
    for hold in holds:
        left(hold)
    clock.advance(60)
    left(entered(workers[2], third))


def test_an_entry_that_gave_way_is_made_again_from_nothing(
    small: None, workers: list[SharedQuota], clock: FakeClock
) -> None:
    call = asked(limits(rpm=1), name="a")
    for _ in range(3):
        left(entered(workers[0], call))
        assert entered(workers[1], call) is None
        clock.advance(60)
        for name in "bcd":
            left(entered(workers[2], asked(limits(), name=name)))


def test_names_do_not_run_into_each_other() -> None:
    assert len({entry_hash("tenant", "a"), entry_hash("key", "a"), entry_hash("key", "b")}) == 3


# ---- money

NOON_S = 1_764_072_000.0
DAY_S = 86_400
#: A nano-unit a token out.
PRICE = Prices(million_tokens_out=Decimal("0.001")).reckoned("USD")


def paid(quota: Quota, tokens: int, budget: Limits, *, at_s: float = NOON_S, name: str = "acme") -> Hold | None:
    return entered(quota, asked(budget, name=name, tokens_out_max=tokens, at_s=at_s), PRICE)


def cost(hold: Hold | None, tokens: int) -> None:
    assert hold is not None
    hold._call.tokens_out = tokens
    left(hold)


MONEY = st.lists(
    st.one_of(
        st.tuples(st.just("take"), st.integers(0, WORKERS - 1), st.integers(1, 60), st.integers(0, 1)),
        st.tuples(st.just("settle"), st.integers(0, 20), st.integers(0, 90), st.just(0)),
        st.tuples(st.just("pause"), st.integers(0, 20), st.just(0), st.just(0)),
        st.tuples(st.just("change"), st.integers(0, 150), st.integers(0, 400), st.integers(0, 1)),
    ),
    max_size=60,
)


@settings(deadline=None)
@given(steps=MONEY)
def test_workers_together_spend_as_one_would(steps: list[Step]) -> None:
    clock = FakeClock()
    table = Counters.make(workers=WORKERS)
    one: Quota = Quota(clock=clock)
    many = [SharedQuota(clock=clock, counters=table, worker=number) for number in range(WORKERS)]
    budget, at_s = limits(day=100, month=300), NOON_S
    under_way: list[tuple[Hold, Hold]] = []
    for step, first, second, third in steps:
        match step:
            case "take":
                by_one, by_many = (
                    entered(
                        quota,
                        a_call(
                            a_principal("acme", key=f"k{third}", tenant_limits=budget, key_limits=limits(day=70)),
                            at_s=at_s,
                            tokens_out_max=second,
                        ),
                        PRICE,
                    )
                    for quota in (one, many[first])
                )
                assert (by_one is None) == (by_many is None)
                if by_one is not None and by_many is not None:
                    under_way.append((by_one, by_many))
            case "settle" if under_way:
                for hold in under_way.pop(first % len(under_way)):
                    cost(hold, second)
            case "pause":
                at_s += first * DAY_S / 4
            case "change":
                budget = limits(day=first, month=second) if third else limits()
    os.close(table.memory.file)


def test_all_workers_spend_from_one_budget(workers: list[SharedQuota]) -> None:
    holds = [paid(workers[number % WORKERS], 10, limits(day=50)) for number in range(9)]
    assert [hold is not None for hold in holds] == [True] * 5 + [False] * 4
    cost(holds[0], 4)
    assert paid(workers[1], 6, limits(day=50))
    assert paid(workers[2], 1, limits(day=50)) is None
    assert paid(workers[2], 50, limits(day=50), at_s=NOON_S + DAY_S)


def test_what_a_killed_worker_had_reserved_of_a_budget_is_struck_out_and_what_was_spent_is_not(
    workers: list[SharedQuota], counters: Counters
) -> None:
    cost(paid(workers[0], 10, limits(day=50)), 10)
    assert paid(workers[0], 30, limits(day=50))
    kept = paid(workers[1], 10, limits(day=50))
    assert paid(workers[2], 1, limits(day=50)) is None
    counters.strike_out(0)
    assert paid(workers[2], 31, limits(day=50)) is None
    cost(paid(workers[2], 30, limits(day=50)), 30)
    cost(kept, 10)
    assert paid(workers[0], 1, limits(day=50)) is None


def test_workers_know_what_was_spent_before_they_began(workers: list[SharedQuota], counters: Counters) -> None:
    spent = [Spent("id-acme", "key of acme", 30, 40), Spent("id-acme", "another", 0, 50)]
    counters.restore(spent, 0.0, NOON_S)
    assert paid(workers[0], 11, limits(month=100)) is None
    cost(paid(workers[1], 10, limits(month=100)), 10)
    assert paid(workers[2], 1, limits(month=100)) is None
    assert paid(workers[0], 10, limits(day=50))


def test_who_spent_something_keeps_its_entry_until_the_month_is_over(
    small: None, workers: list[SharedQuota], clock: FakeClock
) -> None:
    cost(paid(workers[0], 50, limits(day=50)), 50)
    for number in range(20):
        clock.advance(60)
        left(entered(workers[number % WORKERS], asked(limits(rpm=1), name=f"t{number}")))
    assert paid(workers[1], 1, limits(day=50)) is None
    after_s = NOON_S + 31 * DAY_S
    for name in "abc":
        cost(paid(workers[2], 50, limits(day=50), at_s=after_s, name=name), 0)
        clock.advance(60)


def test_more_spenders_than_there_is_room_for_are_refused_at_the_start(small: None, counters: Counters) -> None:
    with pytest.raises(QuotaExceeded):
        counters.restore([Spent(f"t{number}", f"k{number}", 1, 1) for number in range(3)], 0.0, NOON_S)


# ---- processes, in truth

RACES, RACERS, TRIES, BUDGET = 1_000, 4, 50, 10


def shared(file: int, number: int) -> Quota:
    return SharedQuota(clock=SystemClock(), counters=Counters(Memory(file), workers=RACERS), worker=number)


def unshared(file: int, number: int) -> Quota:
    return Quota(clock=SystemClock())


@pytest.mark.parametrize("price", [None, PRICE], ids=["requests", "money"])
@pytest.mark.parametrize(("make", "exact"), [(shared, True), (unshared, False)], ids=["shared", "control"])
def test_in_a_thousand_races_of_four_processes_nobody_passes_a_budget(
    make: Callable[[int, int], Quota], exact: bool, price: Price | None
) -> None:
    table = Counters.make(workers=RACERS)
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(RACERS), context.SimpleQueue()
    racers = [
        context.Process(target=race, args=(make, table.memory.file, number, barrier, results, price))
        for number in range(RACERS)
    ]
    for racer in racers:
        racer.start()
    admitted = [sum(of_race) for of_race in zip(*(results.get() for _ in racers), strict=True)]
    for racer in racers:
        racer.join(60)
    os.close(table.memory.file)
    assert len(admitted) == RACES
    if exact:
        assert set(admitted) == {BUDGET}
    else:
        assert max(admitted) > BUDGET, "quotas that are not shared pass for exact: this test could not fail"


def race(
    make: Callable[[int, int], Quota], file: int, number: int, barrier: Barrier, results: Any, price: Price | None
) -> None:
    """In each, everybody asks at once for a tenant that nobody has ever heard of."""
    quota = make(file, number)
    admitted = []
    for tenant in range(RACES):
        budget = limits(rpm=BUDGET) if price is None else limits(day=BUDGET)
        call = asked(budget, name=f"t{tenant}", tokens_out_max=1)
        barrier.wait(60)
        holds = [entered(quota, call, price) for _ in range(TRIES)]
        call.tokens_out = 1
        for hold in holds:
            if hold is not None:
                left(hold)
        admitted.append(len([hold for hold in holds if hold is not None]))
    results.put(admitted)
