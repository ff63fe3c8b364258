"""Tokens, made when they are due: of each call by a plan of its own, or of all together in an engine's steps."""

from __future__ import annotations

import time
from itertools import islice
from typing import TYPE_CHECKING, Protocol

from loadtests.emulator.engine import Batching, Engine, Plan, Planner
from loadtests.emulator.scheduler import Scheduler, Sequence, Step

if TYPE_CHECKING:
    from loadtests.emulator.answer import Answer
    from loadtests.emulator.prefix import PrefixCache
    from loadtests.emulator.wheel import Wheel


class Pacer(Protocol):
    """Makes the tokens of all answers."""

    @property
    def waiting(self) -> int:
        """Calls for which there is no place yet."""

    @property
    def kv_usage(self) -> float:
        """Part of the KV cache that is in use."""

    @property
    def cache(self) -> PrefixCache | None:
        """None if there is none."""

    def plan(self, number: int) -> Plan:
        """What the call of this number gets."""

    def start(self, answer: Answer, plan: Plan) -> None:
        """Make its tokens from now on."""

    def stop(self, answer: Answer) -> None:
        """It is over."""


def pacer(engine: Engine, wheel: Wheel) -> Pacer:
    """Raises EngineFault if what the engine needs is not there."""
    return Batch(engine, wheel) if isinstance(engine, Batching) else Timed(engine.planner(), wheel)


class Timed:
    """Each call by its own plan."""

    waiting = 0
    kv_usage = 0.0
    cache: PrefixCache | None = None

    def __init__(self, planner: Planner, wheel: Wheel) -> None:
        self._planner = planner
        self._wheel = wheel

    def plan(self, number: int) -> Plan:
        return self._planner(number)

    def start(self, answer: Answer, plan: Plan) -> None:
        tokens = answer.shape.tokens
        if answer.shape.stream:
            _Stream(answer, plan, self._wheel).start()
            return
        # It comes in one piece, so that nobody sees the single tokens being made.
        wait_s = sum(islice(plan.waits_s, tokens))
        if wait_s:
            self._wheel.at(time.perf_counter() + wait_s, lambda: answer.make(tokens))
        else:
            answer.make(tokens)

    def stop(self, answer: Answer) -> None:
        """What is still due finds it over."""


class _Stream:
    """The tokens of one streamed answer."""

    def __init__(self, answer: Answer, plan: Plan, wheel: Wheel) -> None:
        self._answer = answer
        self._waits_s = plan.waits_s
        self._wheel = wheel
        self._due_s = time.perf_counter() + next(plan.waits_s)

    def start(self) -> None:
        self._go_on(0)

    def _tick(self) -> None:
        # That it is due is known: by the clock it may be a millisecond early.
        self._due_s += next(self._waits_s)
        self._go_on(1)

    def _go_on(self, made: int) -> None:
        """Make these, and all that are due by now; come back for the next."""
        answer = self._answer
        if answer.over:
            return
        left, now_s = answer.shape.tokens - answer.made, time.perf_counter()
        while made < left and self._due_s <= now_s:
            made += 1
            # From when it was due, not from now: lateness must not add up.
            self._due_s += next(self._waits_s)
        answer.make(made)
        if made < left and not answer.over:
            self._wheel.at(self._due_s, self._tick)


class Batch:
    """All calls in the steps of one scheduler."""

    def __init__(self, engine: Batching, wheel: Wheel) -> None:
        self._engine = engine
        self._wheel = wheel
        self._scheduler = Scheduler(engine)
        self.cache: PrefixCache | None = self._scheduler.cache
        self._sequences: dict[Answer, Sequence] = {}
        self._answers: dict[Sequence, Answer] = {}
        self._stepping = False

    @property
    def waiting(self) -> int:
        return len(self._scheduler.waiting)

    @property
    def kv_usage(self) -> float:
        return self._scheduler.blocks / self._engine.kv_blocks

    def plan(self, number: int) -> Plan:
        return Plan(self._engine.tokens, iter(()))  # its times come of what runs beside it

    def start(self, answer: Answer, plan: Plan) -> None:
        ask, shape = answer.ask, answer.shape
        sequence = Sequence(
            prompt=ask.prompt,
            prompt_tokens=ask.prompt_tokens,
            salt=ask.salt,
            choices=shape.choices,
            tokens=shape.tokens,
        )
        self._sequences[answer] = sequence
        self._answers[sequence] = answer
        self._scheduler.add(sequence)
        if not self._stepping:
            self._step(time.perf_counter())

    def stop(self, answer: Answer) -> None:
        sequence = self._sequences.pop(answer, None)
        if sequence is not None:
            del self._answers[sequence]
            self._scheduler.drop(sequence)

    def _step(self, begun_s: float) -> None:
        step = self._scheduler.step()
        self._stepping = step is not None
        if step is not None:
            # From when it was due, not from now: lateness must not add up.
            ended_s = begun_s + step.duration_s
            self._wheel.at(ended_s, lambda: self._end(step, ended_s))

    def _end(self, step: Step, ended_s: float) -> None:
        for sequence in step.given:
            answer = self._answers.get(sequence)
            if answer is not None:
                answer.find(sequence.cached_tokens)
                answer.make(1)
        self._step(ended_s)
