"""What a tenant or a key may use: reserve the worst case before a call, settle the truth after it.

Each limit is a GCRA (the Generic Cell Rate Algorithm of ITU-T I.371): one number, the theoretical arrival time,
holds the whole state, a burst of one minute's allowance is let through at once, and the wait until the next call
fits is known exactly. Money is counted by the day and the month (see gateway.budget). All checks of one call are taken
or left together, in one step of the event loop, so two calls can never both take the last of a budget.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from types import TracebackType
from typing import NamedTuple

from gateway.budget import Purse
from gateway.call import Call, Limits, Principal
from gateway.errors import DeadlineExceeded, Draining, QuotaExceeded, QuotaTooSmall
from gateway.price import Price
from gateway.store import Spent
from runtimes.clock import Clock


class Quota:
    """Counters of every tenant and key that has called lately, in memory."""

    def __init__(self, *, clock: Clock) -> None:
        self.clock = clock
        self.holders: dict[tuple[str, str], Holder] = {}
        self.holders_max = HOLDERS_KEPT
        self._pairs: dict[str, Pair] = {}
        """By the key's id: what a call of it must fit into."""
        self._purses: dict[tuple[str, str], Purse] = {}
        """Of those that spent something before this gateway began and have not called since."""

    def restore(self, spent: Iterable[Spent], at_s: float) -> None:
        """Know what the records of the day and the month of `at_s` say; before any call."""
        self._purses = purses_of(spent, at_s)

    def hold(self, call: Call, *, tokens_out_default: int, price: Price | None = None) -> Hold:
        """Reserve one request, one place, and the most tokens and money the call can use; settle on the way out, when
        the call is told its cost.

        The worst case is the input's estimate plus `max_tokens` for every choice. A client that sets no
        `max_tokens` is taken at `tokens_out_default`; what it uses beyond that is carried as debt, so the
        limit holds over time all the same. `price` is what it will be reckoned by.

        Entering raises QuotaExceeded with the exact wait, BudgetSpent with the one until the money renews,
        QuotaTooSmall if no wait would ever be long enough.
        """
        return Hold(self, call, tokens_out_default, price)

    @property
    def holds(self) -> int:
        """Calls that hold a reservation now."""
        return sum(holder.running for (kind, _), holder in self.holders.items() if kind == "tenant")

    def pair(self, principal: Principal) -> Pair:
        """The counters of the principal's tenant and key, with the limits it has now."""
        pair = self._pairs.get(principal.key_id)
        if pair is None or pair.principal is not principal:
            if len(self.holders) >= self.holders_max:
                self._forget_idle()
            tenant = self._holder("tenant", principal.tenant_id, principal.tenant, principal.tenant_limits)
            key = self._holder("key", principal.key_id, principal.key_id, principal.key_limits)
            pair = self._pairs[principal.key_id] = Pair(principal, tenant, key)
        return pair

    def _holder(self, kind: str, id: str, name: str, limits: Limits) -> Holder:
        holder = self.holders.get((kind, id))
        if holder is None:
            holder = self.holders[kind, id] = self._new_holder(kind, id, f"{kind} {name!r}", limits)
            holder.purse = self._purses.pop((kind, id), holder.purse)
        elif holder.limits != limits:
            holder.change(limits, self.clock.now_s())
        return holder

    def _new_holder(self, kind: str, id: str, name: str, limits: Limits) -> Holder:
        return Holder(name, limits)

    def _forget_idle(self) -> None:
        now_s, at_s = self.clock.now_s(), self.clock.wall_s()
        self.holders = {id: holder for id, holder in self.holders.items() if not holder.idle(now_s, at_s)}
        self._pairs.clear()
        # Twice what is busy now, so that looking for idle ones stays cheap however many are busy.
        self.holders_max = max(HOLDERS_KEPT, 2 * len(self.holders))


class Pair(NamedTuple):
    """A principal's counters."""

    principal: Principal
    tenant: Holder
    key: Holder


def purses_of(spent: Iterable[Spent], at_s: float) -> dict[tuple[str, str], Purse]:
    """Every tenant's and key's, by kind and id."""
    sums: dict[tuple[str, str], tuple[int, int]] = {}
    for row in spent:
        for whose in (("tenant", row.tenant_id), ("key", row.key_id)):
            day_nano, month_nano = sums.get(whose, (0, 0))
            sums[whose] = day_nano + row.day_nano, month_nano + row.month_nano
    purses = {whose: Purse() for whose in sums}
    for whose, purse in purses.items():
        purse.restore(*sums[whose], at_s)
    return purses


#: Past this many holders the idle ones, whose budgets are full anyway, are forgotten.
HOLDERS_KEPT = 10_000


LEFT = (asyncio.CancelledError, DeadlineExceeded)
"""How a call ends that its client does not wait for any longer."""


class Hold:
    """See Quota.hold."""

    __slots__ = ("_call", "_pair", "_price", "_quota", "_reserved", "_taken", "_tokens", "_tokens_out")

    def __init__(self, quota: Quota, call: Call, tokens_out_default: int, price: Price | None) -> None:
        self._quota = quota
        self._call = call
        self._price = price
        tokens_out = call.choices * (tokens_out_default if call.tokens_out_max is None else call.tokens_out_max)
        self._tokens_out = tokens_out
        self._tokens = call.tokens_in_estimate + tokens_out

    def __enter__(self) -> None:
        now_s, asked, tokens = self._quota.clock.now_s(), bool(self._call.tokens_out_max), self._tokens
        pair = self._pair = self._quota.pair(self._call.principal)
        held = pair.tenant.take(tokens, now_s, asked=asked)
        try:
            self._taken = held, pair.key.take(tokens, now_s, asked=asked)
        except BaseException:
            pair.tenant.untake(held)
            raise
        if self._price is not None:
            try:
                self._take_money(self._price)
            except BaseException:
                for holder, tokens_held in zip((pair.tenant, pair.key), self._taken, strict=True):
                    holder.untake(tokens_held)
                raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        call = self._call
        if error is not None and isinstance(error, LEFT) and call.replica:
            # An engine that had its prompt or rows by then has worked on them. Noted in the call, so that the record
            # says what was charged.
            call.items += call.rows_begun
            if not call.tokens_in:
                call.tokens_in, call.estimated = call.tokens_in_estimate, True
        elif isinstance(error, Draining) and not call.status:
            call.items = call.tokens_in = 0  # nothing was delivered
        used = call.tokens_in + call.tokens_out
        held, held_by_key = self._taken
        self._pair.tenant.settle(held, used)
        self._pair.key.settle(held_by_key, used)
        if self._price is not None:
            if error is None or used or call.items:
                call.cost_nano = self._price.cost_nano(call)
            reserved, reserved_by_key = self._reserved
            self._pair.tenant.purse.settle(reserved, call.cost_nano, call.at_s)
            self._pair.key.purse.settle(reserved_by_key, call.cost_nano, call.at_s)

    def _take_money(self, price: Price) -> None:
        at_s, (_, tenant, key) = self._call.at_s, self._pair
        cost_nano = price.cost_nano_max(self._call, self._tokens - self._tokens_out, self._tokens_out)
        reserved = tenant.purse.take(cost_nano, at_s, tenant.limits, tenant.name, price.currency)
        try:
            self._reserved = reserved, key.purse.take(cost_nano, at_s, key.limits, key.name, price.currency)
        except BaseException:
            tenant.purse.settle(reserved, 0, at_s)
            raise


class Holder:
    """One tenant's or key's counters."""

    def __init__(self, name: str, limits: Limits) -> None:
        self.name = name
        self.limits = limits
        self.free = limits == UNLIMITED
        self.closed = _closed(limits)
        self.running = 0
        self.requests = Gcra(limits.rpm)
        self.tokens = Gcra(limits.tpm)
        self.purse = Purse()

    def take(self, tokens: int, now_s: float, *, asked: bool) -> int | None:
        """One request, one place and so many tokens, or none of it: raises QuotaExceeded. The tokens that are now
        reserved, None while they are not limited. `asked` says that the client itself set how many."""
        limits = self.limits
        if self.free:
            self.running += 1
            return None
        if self.closed:
            raise QuotaTooSmall(f"A limit of {self.name} is 0, so it may make no calls; ask whoever runs this gateway.")
        if limits.concurrent is not None and self.running >= limits.concurrent:
            raise QuotaExceeded(
                f"{self.name} already has {limits.concurrent} calls under way, which is its limit; "
                "wait for one to end.",
                retry_after_s=1.0,
            )
        if wait_s := self.requests.take(1, now_s):
            raise QuotaExceeded(
                f"{self.name} has used its {limits.rpm} requests a minute; retry in {wait_s:.3f} s.",
                retry_after_s=wait_s,
            )
        if limits.tpm is not None:
            self._take_tokens(tokens, limits.tpm, now_s, asked=asked)
        self.running += 1
        return None if limits.tpm is None else tokens

    def _take_tokens(self, tokens: int, tpm: int, now_s: float, *, asked: bool) -> None:
        if asked and tokens > tpm:
            self.requests.give_back(1)
            raise QuotaTooSmall(
                f"This call may use {tokens} tokens (its input and max_tokens for every choice), more than the "
                f"{tpm} tokens a minute of {self.name}; lower max_tokens or n.",
                param="max_tokens",
            )
        if wait_s := self.tokens.take(tokens, now_s):
            self.requests.give_back(1)
            raise QuotaExceeded(
                f"{self.name} has used or reserved its {tpm} tokens a minute; retry in {wait_s:.3f} s.",
                retry_after_s=wait_s,
            )

    def untake(self, reserved: int | None) -> None:
        """As if the call had never been."""
        self.requests.give_back(1)
        self.settle(reserved, 0)

    def settle(self, reserved: int | None, used: int) -> None:
        self.running -= 1
        # A call that began without a limit reserved nothing: there is nothing to return, and no debt.
        if reserved is not None:
            self.tokens.give_back(reserved - used)

    def change(self, limits: Limits, now_s: float) -> None:
        """New limits for calls to come; what is under way, used or owed stays so."""
        self.limits = limits
        self.free = limits == UNLIMITED
        self.closed = _closed(limits)
        self.requests.change(limits.rpm, now_s)
        self.tokens.change(limits.tpm, now_s)

    def idle(self, now_s: float, at_s: float) -> bool:
        rested = self.requests.full_at_s <= now_s and self.tokens.full_at_s <= now_s
        return not self.running and rested and self.purse.idle(at_s)


class Gcra:
    """`per_minute` units a minute with a burst of one minute's worth; None, and 0, is no limit."""

    __slots__ = ("full_at_s", "unit_s")

    def __init__(self, per_minute: int | None) -> None:
        self.unit_s = _unit_s(per_minute)
        self.full_at_s = 0.0
        """When the whole burst is there again: the theoretical arrival time."""

    def take(self, cost: int, now_s: float) -> float:
        """0 if `cost` fits, which is then taken; else the seconds until it would. A cost above the burst waits for the
        whole burst."""
        if not self.unit_s:
            return 0.0
        full_at_s, cost_s = self.full_at_s, cost * self.unit_s
        if full_at_s < now_s:
            full_at_s = now_s
        wait_s = full_at_s - now_s + (cost_s if cost_s < BURST_S else BURST_S) - BURST_S
        if wait_s > ROUNDING_S:
            return wait_s
        self.full_at_s = full_at_s + cost_s
        return 0.0

    def give_back(self, unused: int) -> None:
        """Return what was reserved and not used; a negative amount is debt."""
        self.full_at_s -= unused * self.unit_s

    def change(self, per_minute: int | None, now_s: float) -> None:
        """Another rate; as many units as were used or owed under the old one still are."""
        before_s, self.unit_s = self.unit_s, _unit_s(per_minute)
        if before_s:
            self.full_at_s = now_s + (self.full_at_s - now_s) / before_s * self.unit_s


BURST_S = 60.0
#: Sums of seconds are true to about a nanosecond: less than this is no wait.
ROUNDING_S = 1e-6


def _unit_s(per_minute: int | None) -> float:
    return 60.0 / per_minute if per_minute else 0.0


UNLIMITED = Limits()


def _closed(limits: Limits) -> bool:
    return 0 in (limits.rpm, limits.tpm, limits.concurrent)
