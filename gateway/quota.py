"""What a tenant or a key may use: reserve the worst case before a call, settle the truth after it.

Each limit is a GCRA (the Generic Cell Rate Algorithm of ITU-T I.371): one number, the theoretical arrival time,
holds the whole state, a burst of one minute's allowance is let through at once, and the wait until the next call
fits is known exactly. All checks of one call are taken or left together, in one step of the event loop, so two
calls can never both take the last of a budget.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from gateway.call import Call, Limits
from gateway.errors import QuotaExceeded, QuotaTooSmall
from runtimes.clock import Clock


class Quota:
    """Counters of every tenant and key that has called lately, in memory."""

    def __init__(self, *, clock: Clock) -> None:
        self.clock = clock
        self.holders: dict[str, Holder] = {}

    @asynccontextmanager
    async def hold(self, call: Call, *, tokens_out_default: int) -> AsyncIterator[None]:
        """Reserve one request, one place, and the most tokens the call can use; settle on the way out.

        The worst case is the input's estimate plus `max_tokens` for every choice. A client that sets no
        `max_tokens` is taken at `tokens_out_default`; what it uses beyond that is carried as debt, so the
        limit holds over time all the same.

        Raises QuotaExceeded with the exact wait, QuotaTooSmall if no wait would ever be long enough.
        """
        principal = call.principal
        tokens_out = call.tokens_out_max if call.tokens_out_max is not None else tokens_out_default
        reserved = call.tokens_in_estimate + tokens_out * call.choices
        holders = [
            self._holder(f"tenant {principal.tenant!r}", principal.tenant_id, principal.tenant_limits),
            self._holder(f"key {principal.key_id!r}", principal.key_id, principal.key_limits),
        ]
        now_s = self.clock.now_s()
        for holder in holders:
            holder.check(reserved, now_s, asked=call.tokens_out_max is not None)
        for holder in holders:
            holder.take(reserved, now_s)
        try:
            yield
        finally:
            used = call.tokens_in + call.tokens_out
            if call.replica and not call.complete and not used:
                # An engine has read the prompt even if the client left before the answer: that much was used.
                used = call.tokens_in_estimate
            for holder in holders:
                holder.settle(reserved, used)

    def _holder(self, name: str, id: str, limits: Limits) -> Holder:
        holder = self.holders.get(id)
        if holder is None or holder.limits != limits:
            if len(self.holders) >= HOLDERS_KEPT:
                self._forget_idle()
            holder = self.holders[id] = Holder(name, limits, holder)
        return holder

    def _forget_idle(self) -> None:
        now_s = self.clock.now_s()
        self.holders = {id: holder for id, holder in self.holders.items() if not holder.idle(now_s)}


#: Past this many holders the idle ones, whose budgets are full anyway, are forgotten.
HOLDERS_KEPT = 10_000


class Holder:
    """One tenant's or key's counters. Changed limits keep what is under way and what is owed."""

    def __init__(self, name: str, limits: Limits, before: Holder | None) -> None:
        self.name = name
        self.limits = limits
        self.running: Running = Running() if before is None else before.running
        self.requests: Gcra = Gcra(limits.rpm, None if before is None else before.requests)
        self.tokens: Gcra = Gcra(limits.tpm, None if before is None else before.tokens)

    def check(self, tokens: int, now_s: float, *, asked: bool) -> None:
        limits = self.limits
        if limits.concurrent is not None and self.running.calls >= limits.concurrent:
            raise QuotaExceeded(
                f"{self.name} already has {limits.concurrent} calls under way, which is its limit; "
                "wait for one to end.",
                retry_after_s=1.0,
            )
        wait_s = self.requests.wait_s(1, now_s)
        if wait_s > 0:
            raise QuotaExceeded(
                f"{self.name} has used its {limits.rpm} requests a minute; retry in {wait_s:.3f} s.",
                retry_after_s=wait_s,
            )
        if limits.tpm is not None and tokens > limits.tpm and asked:
            raise QuotaTooSmall(
                f"This call may use {tokens} tokens (its input and max_tokens for every choice), more than the "
                f"{limits.tpm} tokens a minute of {self.name}; lower max_tokens or n.",
                param="max_tokens",
            )
        wait_s = self.tokens.wait_s(tokens, now_s)
        if wait_s > 0:
            raise QuotaExceeded(
                f"{self.name} has used or reserved its {limits.tpm} tokens a minute; retry in {wait_s:.3f} s.",
                retry_after_s=wait_s,
            )

    def take(self, tokens: int, now_s: float) -> None:
        self.running.calls += 1
        self.requests.take(1, now_s)
        self.tokens.take(tokens, now_s)

    def settle(self, reserved: int, used: int) -> None:
        self.running.calls -= 1
        self.tokens.give_back(reserved - used)

    def idle(self, now_s: float) -> bool:
        return not self.running.calls and self.requests.full(now_s) and self.tokens.full(now_s)


class Running:
    """Calls under way; shared between a holder and its successor when limits change."""

    __slots__ = ("calls",)

    def __init__(self) -> None:
        self.calls = 0


class Gcra:
    """`per_minute` units a minute with a burst of one minute's worth; None is no limit."""

    __slots__ = ("burst_s", "full_at_s", "unit_s")

    def __init__(self, per_minute: int | None, before: Gcra | None = None) -> None:
        self.unit_s = None if per_minute is None else (60.0 / per_minute if per_minute else float("inf"))
        self.burst_s = 60.0
        self.full_at_s: float = 0.0 if before is None else before.full_at_s
        """When the whole burst is there again: the theoretical arrival time."""

    def wait_s(self, cost: int, now_s: float) -> float:
        """Seconds until `cost` fits, 0 if it does. A cost above the burst waits for the whole burst."""
        if self.unit_s is None:
            return 0.0
        cost_s = min(cost * self.unit_s, self.burst_s)
        return max(0.0, max(self.full_at_s, now_s) + cost_s - self.burst_s - now_s)

    def take(self, cost: int, now_s: float) -> None:
        if self.unit_s is not None:
            self.full_at_s = max(self.full_at_s, now_s) + cost * self.unit_s

    def give_back(self, unused: int) -> None:
        """Return what was reserved and not used; a negative amount is debt."""
        if self.unit_s is not None:
            self.full_at_s += -unused * self.unit_s

    def full(self, now_s: float) -> bool:
        return self.full_at_s <= now_s
