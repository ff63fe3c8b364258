"""Continuous batching without a clock: who runs, who waits, and how long the next step takes."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from loadtests.emulator.engine import Batching
from loadtests.emulator.prefix import PrefixCache


class Sequence:
    """A call, as its engine sees it."""

    def __init__(self, *, prompt: bytes, prompt_tokens: int, salt: str, choices: int, tokens: int) -> None:
        self.prompt = prompt
        self.salt = salt
        self.choices = choices
        self.unread = prompt_tokens
        """Tokens of the prompt that are neither read nor cached."""
        self.tokens = prompt_tokens + tokens * choices
        """That it needs room for, at the most."""
        self.left = tokens
        """To be generated, of each choice."""
        self.cached_tokens = 0


class Step(NamedTuple):
    """One turn of the engine."""

    duration_s: float
    given: list[Sequence]
    """Those that have a token more at its end."""


class Scheduler:
    """First come, first served. Prompts that are being read go on before new ones are begun."""

    def __init__(self, engine: Batching) -> None:
        self.cache = PrefixCache(blocks=engine.kv_blocks, block_tokens=engine.block_tokens)
        self.running: dict[Sequence, None] = {}
        self.waiting: deque[Sequence] = deque()
        self._engine = engine

    @property
    def blocks(self) -> int:
        """Of the KV cache, in use: what a call needs at the most is kept for it, so that none is ever set back."""
        return sum(map(self._blocks, self.running))

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def drop(self, sequence: Sequence) -> None:
        """Its client left, or it is done; there need be no such one."""
        self.running.pop(sequence, None)
        if sequence in self.waiting:
            self.waiting.remove(sequence)

    def step(self) -> Step | None:
        """The next one; None if there is nothing to do."""
        self._admit()
        if not self.running:
            return None
        engine = self._engine
        budget = engine.max_num_batched_tokens
        decoded = 0
        given = []
        for sequence in tuple(self.running):
            if sequence.unread:
                read = min(sequence.unread, budget)
                budget -= read
                sequence.unread -= read
                if sequence.unread:
                    continue
                self.cache.store(sequence.prompt, sequence.salt)
            else:
                decoded += sequence.choices
            given.append(sequence)
            sequence.left -= 1
            if not sequence.left:
                del self.running[sequence]
        read = engine.max_num_batched_tokens - budget
        duration_s = engine.step_s + read / engine.prefill_tokens_per_s + decoded / engine.decode_tokens_per_s
        return Step(duration_s, given)

    def _admit(self) -> None:
        """Let in who has waited longest, as long as there is room. Who needs more than there is runs alone."""
        engine = self._engine
        while self.waiting:
            sequence = self.waiting[0]
            choices = sum(other.choices for other in self.running) + sequence.choices
            full = choices > engine.max_num_seqs or self.blocks + self._blocks(sequence) > engine.kv_blocks
            if self.running and full:
                return
            self.waiting.popleft()
            self.running[sequence] = None
            sequence.cached_tokens = self.cache.look_up(sequence.prompt, sequence.salt)
            sequence.unread -= sequence.cached_tokens

    def _blocks(self, sequence: Sequence) -> int:
        return -(-sequence.tokens // self._engine.block_tokens)
