"""How much of what costs its sender next to nothing is put up with."""

from __future__ import annotations


class Budget:
    """A bucket that holds `burst` at most, and gets `per_s` back each second and whatever is given."""

    __slots__ = ("_at_s", "_burst", "_left", "_per_s")

    def __init__(self, *, burst: float, per_s: float) -> None:
        self._burst = self._left = burst
        self._per_s = per_s
        self._at_s = 0.0

    def give(self, number: float) -> None:
        self._left = min(self._burst, self._left + number)

    def take(self, now_s: float) -> bool:
        """False if there is none left."""
        self._left = min(self._burst, self._left + (now_s - self._at_s) * self._per_s) - 1
        self._at_s = now_s
        return self._left >= 0
