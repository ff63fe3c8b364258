"""A purse that all workers of a host take from together.

It is two periods, the day and the month, each of so many words of 8 bytes: what is spent of it, what each worker has
reserved of it, when it begins and when it ends (Unix time). They are written in this order, so that a kill amid it
leaves more taken than there is use for; and what a killed worker had reserved is a column that can be struck out.
"""

from __future__ import annotations

from gateway.budget import Purse
from gateway.call import Limits

#: What a word holds; only engines that count without any sense could make anybody spend so much.
WORD_MAX = 2**64 - 1


def period_words(workers: int) -> int:
    """Of a day, or a month."""
    return workers + 3


def reserved_words(workers: int, worker: int) -> tuple[int, int]:
    """Where in a purse the worker's part of what is reserved is."""
    return 1 + worker, period_words(workers) + 1 + worker


class SharedPurse(Purse):
    """A Purse in `words` of memory that workers share; what it holds itself is but what it saw there last. `place` says
    where it lies. All else is to be asked under a lock that nobody else has who has to do with this purse."""

    __slots__ = ("_day", "_month", "_own", "_words", "_workers")

    def __init__(self, words: memoryview[int], *, workers: int, worker: int) -> None:
        super().__init__()
        self._words = words
        self._workers = workers
        self._own = 1 + worker
        self._day = self._month = 0

    def place(self, word: int) -> None:
        self._day, self._month = word, word + period_words(self._workers)

    def put(self, purse: Purse) -> None:
        """Be as that one, in which nothing is reserved."""
        for name in Purse.__slots__:
            setattr(self, name, getattr(purse, name))
        self._save()

    def take(self, cost_nano: int, at_s: float, limits: Limits, name: str, currency: str) -> int:
        if limits.budget_day_nano is None and limits.budget_month_nano is None:
            return 0
        self._load()
        reserved_nano = super().take(cost_nano, at_s, limits, name, currency)
        self._save()
        return reserved_nano

    def settle(self, reserved_nano: int, cost_nano: int, at_s: float) -> None:
        words, workers = self._words, self._workers
        if at_s >= words[self._day + workers + 2]:
            self._load()
            self._turn(at_s)
            self._save()
        for period in (self._month, self._day):
            if at_s < words[period + workers + 1]:
                return
            spent_nano = words[period] + cost_nano
            words[period] = spent_nano if spent_nano < WORD_MAX else WORD_MAX
            if reserved_nano:
                words[period + self._own] -= reserved_nano

    def _load(self) -> None:
        words, day, month = self._words, self._day, self._month
        self.day_spent_nano, *reserved, self.day_starts_s, self.day_ends_s = words[day:month].tolist()
        self.day_reserved_nano = sum(reserved)
        after = month + period_words(self._workers)
        self.month_spent_nano, *reserved, self.month_starts_s, self.month_ends_s = words[month:after].tolist()
        self.month_reserved_nano = sum(reserved)

    def _save(self) -> None:
        self._save_period(self._day, self.day_spent_nano, self.day_reserved_nano, self.day_starts_s, self.day_ends_s)
        self._save_period(
            self._month, self.month_spent_nano, self.month_reserved_nano, self.month_starts_s, self.month_ends_s
        )

    def _save_period(self, at: int, spent_nano: int, reserved_nano: int, starts_s: float, ends_s: float) -> None:
        """Of what is reserved this worker's part has changed, or all is forgotten with the day or month before."""
        words, starts_at = self._words, at + self._workers + 1
        words[at] = spent_nano
        if starts_s != words[starts_at]:
            for place in range(at + 1, starts_at):
                words[place] = 0
        words[at + self._own] += reserved_nano - sum(words[at + 1 : starts_at])
        words[starts_at], words[starts_at + 1] = int(starts_s), int(ends_s)
