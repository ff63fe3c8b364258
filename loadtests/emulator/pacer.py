"""An answer's tokens, made when they are due."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loadtests.emulator.answer import Answer
    from loadtests.emulator.wheel import Wheel


class Pacer:
    """Of one answer; ends with it."""

    def __init__(self, answer: Answer, waits_s: Iterator[float], wheel: Wheel) -> None:
        self._answer = answer
        self._waits_s = waits_s
        self._wheel = wheel
        self._due_s = 0.0

    def start(self) -> None:
        """From now on."""
        answer = self._answer
        if answer.shape.stream:
            self._due_s = time.perf_counter() + next(self._waits_s)
        else:
            # Nobody sees the first ones being made.
            self._due_s = time.perf_counter() + sum(islice(self._waits_s, answer.shape.tokens))
            answer.made = answer.shape.tokens - 1
        if self._due_s > time.perf_counter():
            self._wheel.at(self._due_s, self._tick)
        else:
            self._tick()

    def _tick(self) -> None:
        answer = self._answer
        left = answer.shape.tokens - answer.made
        now_s = time.perf_counter()
        made = 0
        while made < left and (not made or self._due_s <= now_s):
            made += 1
            # From when it was due, not from now: lateness must not add up.
            self._due_s += next(self._waits_s)
        answer.make(made)
        if made < left and not answer.over:
            self._wheel.at(self._due_s, self._tick)
