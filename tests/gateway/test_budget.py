"""Money a tenant or a key may spend in a day or a month."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.budget import DAY_S, day_of, month_of
from gateway.call import Call, Limits
from gateway.errors import BudgetSpent, QuotaExceeded, QuotaTooSmall
from gateway.money import NANO_MAX
from gateway.price import Price, Prices
from gateway.quota import Hold, Quota
from gateway.store import Spent
from tests.fakes import FakeClock, a_call, a_principal, limits

NOON_S = datetime(2026, 11, 25, 12, tzinfo=UTC).timestamp()
#: A nano-unit a token out, and nothing else: amounts below are tokens.
PRICE = Prices(million_tokens_out=Decimal("0.001")).reckoned("USD")


def call_of(limits: Limits, tokens: int, *, at_s: float = NOON_S, key: Limits | None = None, name: str = "k1") -> Call:
    principal = a_principal(tenant_limits=limits, key=name, key_limits=key or Limits())
    return a_call(principal, tokens_out_max=tokens, at_s=at_s)


def entered(quota: Quota, call: Call, price: Price | None = PRICE) -> Hold:
    hold = quota.hold(call, tokens_out_default=16, price=price)
    hold.__enter__()
    return hold


def settled(hold: Hold, call: Call, tokens: int) -> None:
    call.tokens_out = tokens
    hold.__exit__(None, None, None)


def spend(quota: Quota, limits: Limits, tokens: int, *, at_s: float = NOON_S, name: str = "k1") -> Call:
    call = call_of(limits, tokens, at_s=at_s, name=name)
    settled(entered(quota, call), call, tokens)
    return call


@pytest.fixture
def quota() -> Quota:
    return Quota(clock=FakeClock(wall_s=NOON_S))


# ---- days and months


@given(st.floats(0, 4e9))
def test_a_moment_is_in_its_day_and_its_month(at_s: float) -> None:
    moment = datetime.fromtimestamp(at_s, UTC)
    for starts_s, ends_s in (day_of(at_s), month_of(at_s)):
        assert starts_s <= at_s < ends_s
    day, month = (datetime.fromtimestamp(of(at_s)[0], UTC) for of in (day_of, month_of))
    assert (day.date(), day.time()) == (moment.date(), day.min.time())
    assert (month.year, month.month, month.day, month.time()) == (moment.year, moment.month, 1, day.min.time())
    assert datetime.fromtimestamp(month_of(at_s)[1], UTC).day == 1


# ---- deciding

Step = tuple[str, int, int]
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("take"), st.integers(1, 60), st.integers(0, 1)),
        st.tuples(st.just("settle"), st.integers(0, 20), st.integers(0, 100)),
        st.tuples(st.just("pause"), st.integers(0, 20), st.just(0)),
        st.tuples(st.just("change"), st.integers(0, 150), st.integers(0, 400)),
    ),
    max_size=60,
)


@settings(deadline=None)
@given(steps=STEPS)
def test_whatever_happens_no_budget_is_passed_and_what_is_spent_is_the_sum_of_the_records(steps: list[Step]) -> None:
    quota = Quota(clock=FakeClock())
    now_s, day, month = NOON_S, 100, 300
    highest: dict[tuple[int, int], int] = {}
    """The largest budget that each day and month had."""
    under_way: list[tuple[Call, Hold]] = []
    records: list[tuple[float, int]] = []
    for step, first, second in steps:
        match step:
            case "take":
                call = call_of(limits(day=day, month=month), first, at_s=now_s, name=f"k{second}")
                for period, limit in ((day_of(now_s), day), (month_of(now_s), month)):
                    highest[period] = max(highest.get(period, 0), limit)
                try:
                    under_way.append((call, entered(quota, call)))
                except QuotaExceeded:
                    purse = quota.holders["tenant", "id-acme"].purse
                    assert (
                        purse.day_spent_nano + purse.day_reserved_nano + first > day
                        or purse.month_spent_nano + purse.month_reserved_nano + first > month
                    )
            case "settle" if under_way:
                call, hold = under_way.pop(first % len(under_way))
                settled(hold, call, min(second, call.tokens_out_max or 0))
                records.append((call.at_s, call.cost_nano))
            case "pause":
                now_s += first * DAY_S / 4
            case "change":
                day, month = first, second
    for call, hold in under_way:
        settled(hold, call, 0)
    for (starts_s, ends_s), limit in highest.items():
        assert sum(cost for at_s, cost in records if starts_s <= at_s < ends_s) <= limit
    holder = quota.holders.get(("tenant", "id-acme"))
    if holder is not None:
        purse = holder.purse
        assert purse.day_reserved_nano == purse.month_reserved_nano == 0
        for spent, starts_s, ends_s in (
            (purse.day_spent_nano, purse.day_starts_s, purse.day_ends_s),
            (purse.month_spent_nano, purse.month_starts_s, purse.month_ends_s),
        ):
            assert spent == sum(cost for at_s, cost in records if starts_s <= at_s < ends_s)


async def test_two_hundred_at_once_never_spend_more_than_the_budget(quota: Quota) -> None:
    budget = limits(day=100)

    async def one() -> int:
        call = call_of(budget, 10)
        try:
            hold = entered(quota, call)
        except QuotaExceeded:
            return 0
        await asyncio.sleep(0)
        settled(hold, call, 10)
        return call.cost_nano

    assert sum(await asyncio.gather(*(one() for _ in range(200)))) == 100


def test_a_spent_budget_refuses_until_midnight_and_says_so(quota: Quota) -> None:
    budget = limits(day=100)
    spend(quota, budget, 100)
    with pytest.raises(BudgetSpent) as refused:
        spend(quota, budget, 1)
    error = refused.value
    assert (error.status, error.code, error.type, error.retryable) == (
        429,
        "insufficient_quota",
        "insufficient_quota",
        False,
    )
    assert error.retry_after_s == DAY_S / 2
    assert "tenant 'acme' has spent 0.0000001 of its budget of 0.0000001 USD a day" in error.message
    assert "renews at 2026-11-26 00:00 UTC" in error.message
    with pytest.raises(BudgetSpent):
        spend(quota, budget, 1, at_s=NOON_S + DAY_S / 2 - 0.001)
    spend(quota, budget, 100, at_s=NOON_S + DAY_S / 2)


def test_a_months_budget_renews_with_the_month(quota: Quota) -> None:
    budget = limits(day=80, month=100)
    spend(quota, budget, 80)
    with pytest.raises(BudgetSpent, match=r"USD a month.*renews at 2026-12-01 00:00 UTC"):
        spend(quota, budget, 30, at_s=NOON_S + DAY_S)
    spend(quota, budget, 20, at_s=NOON_S + DAY_S)
    spend(quota, budget, 80, at_s=datetime(2026, 12, 1, tzinfo=UTC).timestamp())


def test_what_calls_under_way_have_reserved_is_worth_coming_back_for(quota: Quota) -> None:
    call = call_of(limits(day=100), 80)
    hold = entered(quota, call)
    with pytest.raises(QuotaExceeded, match="under way have reserved") as refused:
        spend(quota, limits(day=100), 30)
    assert (refused.value.code, refused.value.retryable) == ("rate_limit_exceeded", True)
    settled(hold, call, 10)
    assert call.cost_nano == 10
    spend(quota, limits(day=100), 90)


@pytest.mark.parametrize("budget", [limits(day=0), limits(month=0), limits(day=29, month=1_000)])
def test_a_call_that_no_day_would_have_room_for_is_told_so_and_not_to_wait(quota: Quota, budget: Limits) -> None:
    with pytest.raises(QuotaTooSmall, match=r"whole budget of tenant 'acme'.* if it generates") as refused:
        spend(quota, budget, 30)
    assert (refused.value.retry_after_s, refused.value.retryable, refused.value.param) == (None, False, None)


def test_without_max_tokens_the_models_default_is_reserved(quota: Quota) -> None:
    call = a_call(a_principal(tenant_limits=limits(day=15)), at_s=NOON_S)
    with pytest.raises(QuotaTooSmall):
        entered(quota, call)


def test_what_costs_more_than_was_reserved_is_still_counted(quota: Quota) -> None:
    budget = limits(day=100)
    call = call_of(budget, 10)
    settled(entered(quota, call), call, 150)
    with pytest.raises(BudgetSpent, match=r"spent 0\.00000015 of"):
        spend(quota, budget, 1)


def test_a_model_without_a_price_is_free_to_those_who_have_nothing_left(quota: Quota) -> None:
    budget = limits(day=100)
    spend(quota, budget, 100)
    call = call_of(budget, 1_000)
    settled(entered(quota, call, price=None), call, 1_000)
    assert call.cost_nano == 0


def test_the_keys_budget_is_within_its_tenants(quota: Quota) -> None:
    tenant, key = limits(day=100), limits(day=30)
    call = call_of(tenant, 30, key=key)
    settled(entered(quota, call), call, 30)
    with pytest.raises(BudgetSpent, match="key 'k1'"):
        entered(quota, call_of(tenant, 1, key=key))
    spend(quota, tenant, 70, name="k2")
    with pytest.raises(BudgetSpent, match="tenant 'acme'"):
        spend(quota, tenant, 1, name="k2")


@pytest.mark.parametrize("key", [limits(rpm=1), limits(day=5), limits(tpm=20)])
def test_a_refusal_by_the_key_reserves_nothing_of_its_tenant(quota: Quota, key: Limits) -> None:
    tenant = limits(day=100)
    first = call_of(tenant, 5, key=key)
    settled(entered(quota, first), first, 5)
    for _ in range(50):
        with pytest.raises(QuotaExceeded):
            entered(quota, call_of(tenant, 20, key=key))
    spend(quota, tenant, 95, name="k2")


def test_a_budget_that_is_set_amid_the_month_counts_what_was_spent_before(quota: Quota) -> None:
    spend(quota, limits(), 80)
    with pytest.raises(BudgetSpent):
        spend(quota, limits(month=100), 30)
    spend(quota, limits(month=100), 20)


def test_a_call_that_ends_after_midnight_is_of_the_day_it_came_in(quota: Quota) -> None:
    budget, late = limits(day=100), call_of(limits(day=100), 100)
    hold = entered(quota, late)
    spend(quota, budget, 60, at_s=NOON_S + DAY_S)
    settled(hold, late, 100)
    assert late.cost_nano == 100
    spend(quota, budget, 40, at_s=NOON_S + DAY_S)


async def test_nobody_pays_for_what_no_engine_worked_on(quota: Quota) -> None:
    price = Prices(call=Decimal(1), million_tokens_in=Decimal(1)).reckoned("USD")
    call = call_of(limits(), 10)
    with pytest.raises(RuntimeError), quota.hold(call, tokens_out_default=16, price=price):
        raise RuntimeError
    assert call.cost_nano == 0
    call.replica = "chat-0"
    with pytest.raises(asyncio.CancelledError), quota.hold(call, tokens_out_default=16, price=price):
        raise asyncio.CancelledError
    assert call.cost_nano == 10**9 + 1_000 * call.tokens_in_estimate


def test_what_was_spent_before_the_gateway_began_is_known(quota: Quota) -> None:
    quota.restore([Spent("id-acme", "k1", 10, 70), Spent("id-acme", "k2", 20, 25)], NOON_S)
    with pytest.raises(BudgetSpent, match=r"spent 0\.000000095 of"):
        spend(quota, limits(month=100), 6)
    spend(quota, limits(day=33, month=100), 3, name="k3")
    with pytest.raises(BudgetSpent, match=r"spent 0\.000000033 of"):
        spend(quota, limits(day=33, month=100), 1)
    with pytest.raises(BudgetSpent, match="key 'k2'"):
        entered(quota, call_of(limits(), 1, name="k2", key=limits(day=20)))


def test_who_spent_something_this_month_is_not_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.quota.HOLDERS_KEPT", 10)
    clock = FakeClock(wall_s=NOON_S)
    quota = Quota(clock=clock)
    spend(quota, limits(day=100), 100, name="spender")
    for number in range(60):
        call = a_call(a_principal(f"t{number}", f"k{number}", tenant_limits=limits(rpm=1)), at_s=clock.wall_s())
        settled(entered(quota, call, price=None), call, 0)
        clock.advance(61)
    assert len(quota.holders) <= 16
    with pytest.raises(BudgetSpent):
        spend(quota, limits(day=100), 1, at_s=clock.wall_s())
    clock.advance(31 * DAY_S)
    assert all(holder.idle(clock.now_s(), clock.wall_s()) for holder in quota.holders.values())


def test_a_clock_that_is_set_back_over_midnight_brings_no_second_budget(quota: Quota) -> None:
    budget = limits(day=100)
    spend(quota, budget, 100, at_s=NOON_S + DAY_S)
    with pytest.raises(BudgetSpent):
        spend(quota, budget, 1, at_s=NOON_S)


def test_an_absurd_max_tokens_is_counted_as_the_most_there_is(quota: Quota) -> None:
    with pytest.raises(QuotaTooSmall, match=r"may cost 9007199\.254740991 USD"):
        entered(quota, call_of(limits(month=NANO_MAX - 1), 2**60))
