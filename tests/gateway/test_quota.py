"""What a tenant or a key may use."""

import asyncio
from contextlib import AsyncExitStack

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.call import Call, Limits
from gateway.errors import DeadlineExceeded, QuotaExceeded, QuotaTooSmall
from gateway.quota import Gcra, Quota
from tests.fakes import FakeClock, a_call, a_principal, limits

#: More than the machine's rounding of sums of seconds, less than anybody could wait for.
HAIR_S = 2e-6


def tenant_call(tenant: Limits, key: Limits | None = None, **given: object) -> Call:
    return a_call(a_principal(tenant_limits=tenant, key_limits=key or Limits()), **given)


async def spend(quota: Quota, call: Call, *, tokens_in: int = 0, tokens_out: int = 0) -> None:
    with quota.hold(call, tokens_out_default=16):
        call.tokens_in, call.tokens_out = tokens_in, tokens_out
        call.complete = True


async def admitted(quota: Quota, call: Call) -> bool:
    try:
        await spend(quota, call)
    except QuotaExceeded:
        return False
    return True


@settings(deadline=None)
@given(
    per_minute=st.integers(1, 1_000),
    steps=st.lists(st.tuples(st.floats(0, 30), st.integers(1, 400)), max_size=40),
)
def test_no_window_admits_more_than_its_rate_and_one_burst(per_minute: int, steps: list[tuple[float, int]]) -> None:
    limit, now_s = Gcra(per_minute), 1_000.0
    passed: list[tuple[float, int]] = []
    for pause_s, tries in steps:
        now_s += pause_s
        fitting = 0
        while fitting < tries and limit.take(1, now_s) == 0:
            fitting += 1
        passed.append((now_s, fitting))
    for first, (since_s, _) in enumerate(passed):
        for last, (until_s, _) in enumerate(passed[first:], start=first):
            allowed = per_minute * (until_s - since_s + HAIR_S) / 60 + per_minute
            assert sum(count for _, count in passed[first : last + 1]) <= allowed


@settings(deadline=None)
@given(
    per_minute=st.integers(1, 100_000),
    costs=st.lists(st.integers(1, 5_000), min_size=1, max_size=50),
    now_s=st.floats(0, 1e7),
)
def test_the_wait_is_exact(per_minute: int, costs: list[int], now_s: float) -> None:
    limit = Gcra(per_minute)
    for cost in costs:
        if wait_s := limit.take(cost, now_s):
            if wait_s > HAIR_S:
                assert limit.take(cost, now_s + wait_s - HAIR_S) > 0
            now_s += wait_s
            assert limit.take(cost, now_s) == 0


async def test_what_the_key_refuses_is_not_taken_from_the_tenant() -> None:
    quota = Quota(clock=FakeClock())
    narrow = a_principal(tenant_limits=limits(rpm=2, tpm=1_000, concurrent=2), key="k1", key_limits=limits(rpm=1))
    assert await admitted(quota, a_call(narrow, tokens_out_max=1))
    assert not await admitted(quota, a_call(narrow, tokens_out_max=1))
    wide = a_principal(tenant_limits=limits(rpm=2, tpm=1_000, concurrent=2), key="k2")
    assert await admitted(quota, a_call(wide, tokens_out_max=1))
    assert not await admitted(quota, a_call(wide, tokens_out_max=1))


async def test_two_hundred_at_once_never_pass_through_a_budget_of_ten() -> None:
    quota = Quota(clock=FakeClock())
    calls = [tenant_call(limits(rpm=10)) for _ in range(200)]
    assert sum(await asyncio.gather(*(admitted(quota, call) for call in calls))) == 10


@pytest.mark.parametrize("per_minute", [3, 7, 11, 13, 997])
async def test_the_whole_budget_is_there_at_once(per_minute: int) -> None:
    quota = Quota(clock=FakeClock(now_s=123_456.789))
    passed = [await admitted(quota, tenant_call(limits(rpm=per_minute))) for _ in range(per_minute + 1)]
    assert passed == [True] * per_minute + [False]


async def test_what_was_reserved_and_not_used_is_refunded() -> None:
    quota = Quota(clock=FakeClock())
    call = tenant_call(limits(tpm=100), body=b"", tokens_out_max=80)
    for _ in range(20):
        await spend(quota, call, tokens_in=0, tokens_out=1)
    assert not await admitted(quota, call)


async def test_what_was_used_beyond_the_reservation_is_debt() -> None:
    clock = FakeClock()
    quota = Quota(clock=clock)
    await spend(quota, tenant_call(limits(tpm=60)), tokens_in=10, tokens_out=170)
    with pytest.raises(QuotaExceeded) as refused:
        await spend(quota, tenant_call(limits(tpm=60), tokens_out_max=0, body=b"{}"))
    assert refused.value.retry_after_s == pytest.approx(121)
    clock.advance(refused.value.retry_after_s or 0)
    await spend(quota, tenant_call(limits(tpm=60), tokens_out_max=0, body=b"{}"))


async def test_a_call_that_can_never_fit_is_told_so_and_not_to_wait() -> None:
    with pytest.raises(QuotaTooSmall) as refused:
        await spend(Quota(clock=FakeClock()), tenant_call(limits(tpm=100), tokens_out_max=101))
    assert refused.value.retry_after_s is None
    assert not refused.value.retryable
    assert refused.value.param == "max_tokens"


async def test_a_default_reservation_above_the_limit_does_not_lock_anybody_out() -> None:
    quota = Quota(clock=FakeClock())
    with quota.hold(tenant_call(limits(tpm=100)), tokens_out_default=512):
        pass


@pytest.mark.parametrize("none", [limits(rpm=0), limits(tpm=0), limits(concurrent=0)])
async def test_a_limit_of_nothing_admits_nothing(none: Limits) -> None:
    quota = Quota(clock=FakeClock())
    for _ in range(2):
        with pytest.raises(QuotaTooSmall):
            await spend(quota, tenant_call(none))


@pytest.mark.parametrize("key", [limits(rpm=1), limits(tpm=30), limits(concurrent=1)])
async def test_a_refusal_by_the_key_takes_nothing_from_the_tenant(key: Limits) -> None:
    quota = Quota(clock=FakeClock())
    tenant = limits(rpm=3, tpm=60, concurrent=2)
    async with AsyncExitStack() as held:
        first = tenant_call(tenant, key, tokens_out_max=12)
        held.enter_context(quota.hold(first, tokens_out_default=16))
        for _ in range(50):
            with pytest.raises(QuotaExceeded):
                await spend(quota, tenant_call(tenant, key, tokens_out_max=12))
        other = a_call(a_principal(key="k2", tenant_limits=tenant), tokens_out_max=12)
        held.enter_context(quota.hold(other, tokens_out_default=16))


async def test_a_place_is_free_again_however_its_call_ended() -> None:
    quota = Quota(clock=FakeClock())
    entered = asyncio.Semaphore(0)

    async def hold(end: BaseException | None) -> None:
        with quota.hold(tenant_call(limits(concurrent=30)), tokens_out_default=1):
            entered.release()
            if end is not None:
                raise end
            await asyncio.Event().wait()

    ends = [None, RuntimeError(), asyncio.CancelledError()] * 10
    tasks = [asyncio.create_task(hold(end)) for end in ends]
    for _ in tasks:
        await entered.acquire()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert [holder.running for holder in quota.holders.values()] == [0, 0]


async def test_what_fails_amid_reserving_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    quota, call = Quota(clock=FakeClock()), tenant_call(limits(concurrent=1), limits(tpm=10))

    def take(budget: Gcra, cost: int, now_s: float) -> float:
        if budget.unit_s:
            raise OverflowError("no machine could count that")
        return 0.0

    monkeypatch.setattr(Gcra, "take", take)
    with pytest.raises(OverflowError), quota.hold(call, tokens_out_default=1):
        pass
    assert [holder.running for holder in quota.holders.values()] == [0, 0]


@pytest.mark.parametrize("left", [asyncio.CancelledError, DeadlineExceeded("The deadline has passed.")])
async def test_who_waits_no_longer_while_the_engine_works_has_used_the_prompt(left: BaseException) -> None:
    quota = Quota(clock=FakeClock())
    call = tenant_call(limits(tpm=100), body=b"x" * 196, tokens_out_max=10)
    with pytest.raises((asyncio.CancelledError, DeadlineExceeded)), quota.hold(call, tokens_out_default=16):
        call.replica = "chat-0"
        raise left
    assert (call.tokens_in, call.tokens_out, call.estimated) == (50, 0, True)
    with pytest.raises(QuotaExceeded):
        await spend(quota, tenant_call(limits(tpm=100), body=b"", tokens_out_max=50))
    await spend(quota, tenant_call(limits(tpm=100), body=b"", tokens_out_max=49))


async def test_who_leaves_before_any_engine_worked_has_used_nothing() -> None:
    quota = Quota(clock=FakeClock())
    call = tenant_call(limits(tpm=100), tokens_out_max=80)
    with pytest.raises(asyncio.CancelledError), quota.hold(call, tokens_out_default=16):
        raise asyncio.CancelledError
    await spend(quota, tenant_call(limits(tpm=100), body=b"", tokens_out_max=99))


async def test_a_raised_limit_helps_at_once_and_keeps_what_was_used() -> None:
    quota = Quota(clock=FakeClock())
    for _ in range(10):
        await spend(quota, tenant_call(limits(rpm=10)))
    assert not await admitted(quota, tenant_call(limits(rpm=10)))
    passed = [await admitted(quota, tenant_call(limits(rpm=100))) for _ in range(91)]
    assert passed == [True] * 90 + [False]


async def test_a_call_under_way_settles_with_the_limits_of_today() -> None:
    quota = Quota(clock=FakeClock())
    call = tenant_call(limits(tpm=1_000), body=b"", tokens_out_max=999)
    with quota.hold(call, tokens_out_default=16):
        assert not await admitted(quota, tenant_call(limits(tpm=100, concurrent=2), tokens_out_max=1))
        call.tokens_in, call.tokens_out = 1, 49
    assert await admitted(quota, tenant_call(limits(tpm=100), body=b"", tokens_out_max=49))
    await spend(quota, tenant_call(limits(tpm=100), body=b"", tokens_out_max=49), tokens_in=50)
    assert not await admitted(quota, tenant_call(limits(tpm=100), body=b"", tokens_out_max=49))


async def test_a_limit_that_appears_owes_nothing_to_calls_from_before() -> None:
    quota = Quota(clock=FakeClock())
    call = tenant_call(limits(), tokens_out_max=500)
    with quota.hold(call, tokens_out_default=16):
        await spend(quota, tenant_call(limits(tpm=100), body=b"", tokens_out_max=50), tokens_in=51)
        call.tokens_out = 300
    assert await admitted(quota, tenant_call(limits(tpm=100), body=b"", tokens_out_max=48))
    assert not await admitted(quota, tenant_call(limits(tpm=100), body=b"", tokens_out_max=49))


async def test_holders_that_are_idle_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.quota.HOLDERS_KEPT", 10)
    clock = FakeClock()
    quota = Quota(clock=clock)
    for number in range(100):
        await spend(quota, a_call(a_principal(f"t{number}", f"k{number}", tenant_limits=limits(rpm=1))))
        clock.advance(61)
    assert len(quota.holders) <= 12


async def test_holders_that_used_something_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.quota.HOLDERS_KEPT", 10)
    quota = Quota(clock=FakeClock())
    for _ in range(2):
        passed = [
            await admitted(quota, a_call(a_principal(f"t{number}", f"k{number}", tenant_limits=limits(rpm=1))))
            for number in range(50)
        ]
    assert passed == [False] * 50
