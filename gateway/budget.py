"""Money that a tenant or a key may spend in a day or a month, both of UTC: reserve the most before a call, settle its
cost after it.

A call is of the day and the month it arrived in, whenever it ends. So what is counted as spent is the sum of the
records of that time, to the nano-unit, and can be had from them again after a restart.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from gateway.call import Limits
from gateway.errors import BudgetSpent, QuotaExceeded, QuotaTooSmall
from gateway.money import amount_text


class Purse:
    """What one tenant or key has spent this day and this month, and what its calls under way may cost at the most."""

    __slots__ = (
        "day_ends_s",
        "day_reserved_nano",
        "day_spent_nano",
        "day_starts_s",
        "month_ends_s",
        "month_reserved_nano",
        "month_spent_nano",
        "month_starts_s",
    )

    def __init__(self) -> None:
        self.day_starts_s = self.day_ends_s = self.month_starts_s = self.month_ends_s = 0.0
        self.day_spent_nano = self.day_reserved_nano = self.month_spent_nano = self.month_reserved_nano = 0

    def take(self, cost_nano: int, at_s: float, limits: Limits, name: str, currency: str) -> int:
        """Reserve so much for a call that arrived then; how much that is: nothing where `name` has no budget to keep.

        Raises BudgetSpent, with the time at which the budget renews; QuotaExceeded if it is only that calls under way
        have reserved what is left; QuotaTooSmall if the call would not fit at any time.
        """
        if at_s >= self.day_ends_s:
            self._turn(at_s)
        day, month = limits.budget_day_nano, limits.budget_month_nano
        if day is None and month is None:
            return 0
        if day is not None and self.day_spent_nano + self.day_reserved_nano + cost_nano > day:
            raise _refusal(name, currency, "day", day, self.day_spent_nano, cost_nano, self.day_ends_s, at_s)
        if month is not None and self.month_spent_nano + self.month_reserved_nano + cost_nano > month:
            raise _refusal(name, currency, "month", month, self.month_spent_nano, cost_nano, self.month_ends_s, at_s)
        if at_s >= self.day_starts_s:
            self.day_reserved_nano += cost_nano
            self.month_reserved_nano += cost_nano
        elif at_s >= self.month_starts_s:
            self.month_reserved_nano += cost_nano
        return cost_nano

    def settle(self, reserved_nano: int, cost_nano: int, at_s: float) -> None:
        """Of a call that arrived then. Of a day or a month that is over nothing is counted any more."""
        if at_s >= self.month_starts_s:
            self.month_spent_nano += cost_nano
            if reserved_nano:
                self.month_reserved_nano -= reserved_nano
            if at_s >= self.day_starts_s:
                self.day_spent_nano += cost_nano
                if reserved_nano:
                    self.day_reserved_nano -= reserved_nano

    def restore(self, day_spent_nano: int, month_spent_nano: int, at_s: float) -> None:
        """As the records of the day and the month of `at_s` have it."""
        self._turn(at_s)
        self.day_spent_nano, self.month_spent_nano = day_spent_nano, month_spent_nano

    def idle(self, at_s: float) -> bool:
        """Nothing is known here that a new one would not know."""
        return at_s >= self.month_ends_s or not (self.month_spent_nano or self.month_reserved_nano)

    def _turn(self, at_s: float) -> None:
        self.day_starts_s, self.day_ends_s = day_of(at_s)
        self.day_spent_nano = self.day_reserved_nano = 0
        if at_s >= self.month_ends_s:
            self.month_starts_s, self.month_ends_s = month_of(at_s)
            self.month_spent_nano = self.month_reserved_nano = 0


def day_of(at_s: float) -> tuple[float, float]:
    """Where the day begins and ends."""
    starts_s = at_s // DAY_S * DAY_S
    return starts_s, starts_s + DAY_S


def month_of(at_s: float) -> tuple[float, float]:
    """Where the month begins and ends."""
    first = datetime.fromtimestamp(at_s, UTC).replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    return first.timestamp(), (first + timedelta(days=32)).replace(day=1).timestamp()


DAY_S = 86_400.0


def _refusal(
    name: str, currency: str, period: str, limit_nano: int, spent_nano: int, cost_nano: int, ends_s: float, at_s: float
) -> QuotaExceeded:
    limit, spent, cost = amount_text(limit_nano), amount_text(spent_nano), amount_text(cost_nano)
    if cost_nano > limit_nano:
        return QuotaTooSmall(
            f"This call may cost {cost} {currency}, more than the whole budget of {name}, {limit} {currency} a "
            f"{period}; send less, or lower max_tokens or n if it generates.",
        )
    if spent_nano + cost_nano <= limit_nano:
        return QuotaExceeded(
            f"Calls under way have reserved what is left of the budget of {name}, {limit} {currency} a {period}, of "
            f"which {spent} are spent, and this one may cost {cost}; wait for one to end.",
            retry_after_s=1.0,
        )
    renews = datetime.fromtimestamp(ends_s, UTC).strftime("%Y-%m-%d %H:%M")
    return BudgetSpent(
        f"{name} has spent {spent} of its budget of {limit} {currency} a {period}, and this call may cost {cost}; the "
        f"budget renews at {renews} UTC.",
        retry_after_s=ends_s - at_s,
    )
