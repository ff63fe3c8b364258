"""The emulator, and its listener."""

from __future__ import annotations

import asyncio
import itertools
import time
from array import array
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from loadtests.emulator.answer import Answer
from loadtests.emulator.connection import Connection
from loadtests.emulator.dialect import Shape, instant
from loadtests.emulator.engine import Engine, Pace
from loadtests.emulator.fault import Fault, Faults, Kind
from loadtests.emulator.log import Ended, Entry, Log
from loadtests.emulator.pacer import pacer
from loadtests.emulator.page import page
from loadtests.emulator.request import Ask, read
from loadtests.emulator.wheel import Wheel

REMEMBERED_BYTES_MAX = 4096
INSTANT_TOKENS_MAX = 64
"""What is longer is written piece by piece, so that a client that leaves is seen to leave."""
SILENCES_MAX = 100_000


class Emulator:
    """Answers, and counts what it answered."""

    def __init__(self, engine: Engine, *, faults: Faults | None = None, log: Log | None = None) -> None:
        """Raises EngineFault if what the engine needs is not there."""
        self.engine = engine
        self.wheel = Wheel()
        self.pacer = pacer(engine, self.wheel)
        self.faults = faults or Faults({})
        """Those that calls meet by chance; can be exchanged at any time."""
        self.calls = 0
        """Asked, and well-formed."""
        self.prompt_tokens = 0
        """Of all those."""
        self.made = 0
        """Tokens generated, read or not."""
        self.tokens = 0
        """Written, of those that have ended."""
        self.finished = 0
        """Calls by how they ended, as in the log."""
        self.aborted = 0
        self.faulted: Counter[Kind] = Counter()
        self.silences_s = array("d")
        """From the last write to the client's close, of the first 100,000 calls that were left by it."""
        self.connections: set[Connection] = set()
        self._log = log
        self._serial = itertools.count(1)
        self._known = lru_cache(maxsize=1024)(self._know)
        self._instant = lru_cache(maxsize=512)(instant)

    @property
    def running(self) -> int:
        """Calls under way."""
        return self.calls - self.finished - self.aborted - self.faulted.total()

    def take(self, connection: Connection, path: bytes, id: bytes, body: bytes) -> Answer | None:
        """Answer a request. None if that has been done already. Raises Refused."""
        id = id or b"%d" % next(self._serial)
        known = (self._known if len(body) <= REMEMBERED_BYTES_MAX else self._know)(path, body, len(id))
        if known is None:
            connection.write(page(self, path, body))
            return None
        ask = known.ask
        self.calls += 1
        self.prompt_tokens += ask.prompt_tokens
        fault = ask.fault or self.faults.draw()
        if known.parts and fault is None:
            connection.write(id.join(known.parts))
            self.finished += 1
            self.made += known.tokens
            self.tokens += known.tokens
            if self._log is not None:
                self._log.write(_at_once(known, id))
            return None
        return self._start(connection, ask, id, fault)

    def end(self, answer: Answer, ended: Ended) -> None:
        """Count a call that is over."""
        self.pacer.stop(answer)
        ask, shape = answer.ask, answer.shape
        if answer.fault is not None:
            self.faulted[answer.fault.kind] += 1
        elif ended is Ended.finished:
            self.finished += 1
        else:
            self.aborted += 1
        tokens = answer.taken * shape.choices
        self.tokens += tokens
        silent_s = None
        if answer.left and answer.wrote_s is not None:
            silent_s = time.perf_counter() - answer.wrote_s
            if len(self.silences_s) < SILENCES_MAX:
                self.silences_s.append(silent_s)
        if self._log is not None:
            self._log.write(
                Entry(
                    id=answer.id.decode(),
                    route=ask.route,
                    model=ask.model,
                    stream=ask.stream,
                    choices=ask.choices,
                    prompt_tokens=ask.prompt_tokens,
                    cached_tokens=shape.cached_tokens or 0,
                    tokens=tokens,
                    tokens_made=max(answer.made, answer.written) * shape.choices,
                    ended=ended,
                    fault="" if answer.fault is None else str(answer.fault),
                    asked_s=answer.asked_s,
                    ended_s=time.time(),
                    silent_s=silent_s,
                )
            )

    def _know(self, path: bytes, body: bytes, id_length: int) -> _Known | None:
        """A request, read; None if it does not ask to generate."""
        ask = read(path, body)
        if ask is None:
            return None
        if not (isinstance(self.engine, Pace) and self.engine.instant):
            return _Known(ask, 0, [])
        tokens = ask.tokens(self.engine.tokens) * ask.choices
        if tokens > INSTANT_TOKENS_MAX:
            return _Known(ask, 0, [])
        return _Known(ask, tokens, self._instant(_shape(ask, self.engine.tokens), id_length))

    def _start(self, connection: Connection, ask: Ask, id: bytes, fault: Fault | None) -> Answer:
        plan = self.pacer.plan(self.calls - 1)
        answer = Answer(connection, ask, id, _shape(ask, plan.tokens), fault)
        answer.start()
        if not answer.over:
            self.pacer.start(answer, plan)
        return answer


class _Known(NamedTuple):
    ask: Ask
    tokens: int
    """Of the response that is written at once."""
    parts: list[bytes]
    """What it is, less the id; none if it takes its time."""


def _at_once(known: _Known, id: bytes) -> Entry:
    ask, now_s = known.ask, time.time()
    return Entry(
        id=id.decode(),
        route=ask.route,
        model=ask.model,
        stream=ask.stream,
        choices=ask.choices,
        prompt_tokens=ask.prompt_tokens,
        cached_tokens=0,
        tokens=known.tokens,
        tokens_made=known.tokens,
        ended=Ended.finished,
        fault="",
        asked_s=now_s,
        ended_s=now_s,
        silent_s=None,
    )


def _shape(ask: Ask, tokens: int) -> Shape:
    """The answer's, where one would by itself have so many tokens."""
    length = ask.tokens(tokens)
    return Shape(
        route=ask.route,
        stream=ask.stream,
        usage=ask.usage,
        usage_each=ask.usage_each,
        choices=ask.choices,
        tokens=length,
        reason="length" if length == ask.tokens_max else "stop",
        prompt_tokens=ask.prompt_tokens,
        cached_tokens=None,
        word=ask.word,
    )


@asynccontextmanager
async def serving(emulator: Emulator, listen: str) -> AsyncIterator[str]:
    """Serve on `host:port` or `unix:/path` while inside; the value is where, port 0 having become a real one. Raises
    ValueError for what is no address, OSError if it is taken."""
    loop = asyncio.get_running_loop()
    if listen.startswith("unix:"):
        path = Path(listen.removeprefix("unix:"))
        server = await loop.create_unix_server(lambda: Connection(emulator), path)
        where = listen
    else:
        host, separator, port = listen.rpartition(":")
        if not separator or not port.isdigit():
            raise ValueError(f"{listen!r} is no address; write host:port or unix:/path")
        server = await loop.create_server(lambda: Connection(emulator), host.strip("[]"), int(port), backlog=BACKLOG)
        where = f"http://{host}:{server.sockets[0].getsockname()[1]}"
    try:
        yield where
    finally:
        server.close()
        for connection in tuple(emulator.connections):
            connection.abort()
        await server.wait_closed()
        # The loop tells them in its next turn; then every call has been counted.
        while emulator.connections:  # noqa: ASYNC110 - nothing waits for longer than that
            await asyncio.sleep(0)
        emulator.wheel.stop()


BACKLOG = 4096
