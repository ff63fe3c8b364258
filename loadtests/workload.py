"""What the calls are: who makes each, what it asks, and whether its caller will leave; the same for the same seed."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from functools import lru_cache

import msgspec

from loadtests.arrivals import Closed, Trace, TraceLine
from loadtests.client import request
from loadtests.grpc_client import infer_request
from loadtests.scenario import Ask, Cancels, Scenario
from loadtests.target import Access, Target

BLOCK_WORDS = 512
"""Of a trace: a hash id stands for so many tokens, for each of which a word stands here."""
WORDS = ("the", "mill", "turns", "while", "water", "runs", "and", "grain", "is", "ground", "by", "stone", "in", "it")


class Call(msgspec.Struct, frozen=True):
    """One call as it is to be made."""

    wire: bytes
    tenant: str
    at_s: float | None = None
    """Seconds after the start; None for as soon as a connection is free."""
    leaves_after_s: float | None = None
    """Its caller leaves so long after asking, if not a byte has come."""
    leaves_after_chunks: int | None = None
    """Its caller leaves amid the stream."""


def calls(scenario: Scenario, target: Target, access: Access, *, duration_s: float, part: str) -> Iterator[Call]:
    """All that are due. `part`, the warm-up or the measured one, has its own draw, so that no prompt of one is cached
    from the other."""
    chance = random.Random(f"{scenario.seed} {part}")  # noqa: S311 - repeatable is what it must be
    draw = _Draw(scenario, target, access, chance)
    arrivals = scenario.arrivals
    if isinstance(arrivals, Trace):
        lines = arrivals.lines(duration_s)
        return (draw.call(line.timestamp / 1_000 / arrivals.speed, line) for line in lines)
    if draw.constant is not None and isinstance(arrivals, Closed):
        return itertools.repeat(draw.constant)
    return (draw.call(at_s, None) for at_s in arrivals.times_s(duration_s))


class _Draw:
    """What is left to chance."""

    def __init__(self, scenario: Scenario, target: Target, access: Access, chance: random.Random) -> None:
        self.scenario = scenario
        self.target = target
        self.headers = {it.name: access.of(it.name) for it in scenario.callers}
        self.chance = chance
        self.callers = scenario.callers
        self.asks = scenario.asks
        self.block = lru_cache(maxsize=4_096)(block)
        self.caller_weights = list(itertools.accumulate(it.weight for it in self.callers))
        self.ask_weights = list(itertools.accumulate(it.weight for it in self.asks))
        only = len(self.callers) == len(self.asks) == 1 and not self.asks[0].varies
        plain = only and scenario.cancels is None
        self.fixed = self._wire(self.callers[0].name, self.asks[0], None) if only else None
        self.constant = Call(self.fixed, self.callers[0].name) if self.fixed is not None and plain else None
        """Every call is this one."""

    def call(self, at_s: float | None, line: TraceLine | None) -> Call:
        tenant = self.chance.choices(self.callers, cum_weights=self.caller_weights)[0].name
        ask = self.chance.choices(self.asks, cum_weights=self.ask_weights)[0]
        wire = self.fixed if self.fixed is not None and line is None else self._wire(tenant, ask, line)
        after_s, after_chunks = _leaving(self.scenario.cancels, ask, self.chance)
        return Call(wire, tenant, at_s=at_s, leaves_after_s=after_s, leaves_after_chunks=after_chunks)

    def _wire(self, tenant: str, ask: Ask, line: TraceLine | None) -> bytes:
        prompt, tokens_max = ask.prompt, ask.tokens_max
        if line is not None:
            prompt, tokens_max = traced(line, self.block), max(1, line.output_length)
        elif ask.texts:
            prompt = self.chance.choice(ask.texts)
        elif ask.prompt_words is not None:
            prompt = " ".join(self.chance.choices(WORDS, k=ask.prompt_words.draw(self.chance)))
        if self.target.grpc:
            return infer_request(ask.model, prompt)
        return request(self.target, ask.path, ask.content(prompt, tokens_max), self.headers[tenant])


def traced(line: TraceLine, block: Callable[[int], list[str]]) -> str:
    """A prompt as long as the traced one, and as equal to others as it was to theirs."""
    words = list(itertools.chain.from_iterable(map(block, line.hash_ids)))
    missing = line.input_length - len(words)
    return " ".join(words[: line.input_length] + [WORDS[0]] * missing)


def block(id: int) -> list[str]:
    """The words that a hash id stands for."""
    return random.Random(id).choices(WORDS, k=BLOCK_WORDS)  # noqa: S311


def _leaving(cancels: Cancels | None, ask: Ask, chance: random.Random) -> tuple[float | None, int | None]:
    if cancels is None or chance.random() >= cancels.share:
        return None, None
    if not ask.stream or chance.random() < cancels.early:
        return chance.uniform(0, cancels.wait_s_max), None
    return None, chance.randint(1, cancels.chunks_max)
