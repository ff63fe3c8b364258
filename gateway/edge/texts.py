"""A generation's texts, for a door that sends them when its client takes them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator

from gateway.edge.inference import heard
from gateway.meter import Receiver
from runtimes.dialect.generation import Said

#: Texts made ahead of a client that reads slowly, before the engine is made to wait.
UNSENT_MAX = 64


class Texts:
    """A Client of the pipeline that is iterated over. The text that ends a generation is not among them, but `last`:
    what completes a call is told once the call is settled."""

    def __init__(self) -> None:
        self.last = Said("", finished=True)
        self._unsent: deque[Said] = deque()
        self._closed = False
        self._changed = asyncio.Event()
        self._taken = asyncio.Event()

    def close(self, _task: object) -> None:
        """No more will come."""
        self._closed = True
        self._changed.set()

    async def __aiter__(self) -> AsyncIterator[Said]:
        while True:
            while self._unsent:
                yield self._unsent.popleft()
                self._taken.set()
            if self._closed:
                return
            self._changed.clear()
            await self._changed.wait()

    # ---- a Client of the pipeline

    def begin(self, status: int, first: bytes, *, events: bool = True) -> Receiver:
        self.write(first)
        return self

    @property
    def full(self) -> bool:
        return len(self._unsent) >= UNSENT_MAX

    def write(self, part: bytes) -> None:
        for said in heard(part):
            if said.finished:
                self.last = said
            else:
                self._unsent.append(said)
        self._changed.set()

    async def drained(self) -> None:
        while self.full:
            self._taken.clear()
            await self._taken.wait()
