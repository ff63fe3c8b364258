"""Calls that each carry a canary, a word of their own that comes back as every token: no answer may hold another's.

Emulated answers depend on nothing but the request and the call's id, so what a call must get is known to the byte.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from tests.e2e.raw import Answer, Connection, post

ROUTES = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hello"}]},
    "/v1/completions": {"prompt": "Hello"},
    "/v1/responses": {"input": "Hello"},
}
TOKENS = 4
CANCELLED = 0.3
SENT_AHEAD = 0.1
"""The share of calls sent right behind another one, before that is answered."""
LEFT_S_MAX = 0.012
"""Longest wait before a client leaves, which is about what a call takes."""


class Ask(NamedTuple):
    model: str
    route: str
    stream: bool


ASKS = [Ask(model, route, stream) for model in ("instant", "paced") for route in ROUTES for stream in (True, False)]


class Found:
    """What came of the calls."""

    def __init__(self) -> None:
        self.calls = 0
        self.whole = 0
        self.left = 0
        self.foreign: list[str] = []
        """Answers, or parts of one, with another call's bytes in them."""
        self.wrong: list[str] = []
        """Answers that are wrong in any other way."""


class Canaries:
    """So many calls to a gateway, AT_ONCE connections at a time; `found` says what came of them."""

    def __init__(self, host: tuple[str, int], key: str, *, seed: int = 1) -> None:
        self.found = Found()
        self._host = host
        self._key = key
        self._chance = random.Random(seed)
        self._templates: dict[Ask, bytes] = {}
        """What each ask is answered with, its canary as `@` and its id as `#`."""

    async def fly(self, calls: int, *, within_s: float, at_once: int = 32) -> Found:
        """Until so many have been made, or for so long."""
        if not self._templates:
            await self._learn()
        until_s = time.monotonic() + within_s
        numbers = iter(range(calls))

        def more() -> Iterator[int]:
            while time.monotonic() < until_s and (number := next(numbers, None)) is not None:
                yield number

        await asyncio.gather(*(self._many(more()) for _ in range(at_once)))
        return self.found

    async def _learn(self) -> None:
        async with Connection(self._host) as connection:
            for ask in ASKS:
                canary = self._canary(999_999)
                await connection.send(self._request(ask, canary))
                answer = await connection.answer()
                assert answer.status == 200 and answer.body.count(canary) >= TOKENS, answer.body
                id = answer.headers["x-request-id"].encode()
                assert id in answer.body
                self._templates[ask] = answer.body.replace(canary, b"@").replace(id, b"#")

    async def _many(self, numbers: Iterator[int]) -> None:
        number = next(numbers, None)
        while number is not None:
            async with Connection(self._host) as connection:
                while number is not None:
                    stays = await self._one(connection, number)
                    number = next(numbers, None)
                    if not stays:
                        break

    async def _one(self, connection: Connection, number: int) -> bool:
        """Whether the connection can be used on."""
        chance = self._chance
        asked = [(chance.choice(ASKS), self._canary(number))]
        if chance.random() < SENT_AHEAD:
            asked.append((chance.choice(ASKS), self._canary(number + 500_000)))
        await connection.send(b"".join(self._request(ask, canary) for ask, canary in asked))
        self.found.calls += len(asked)
        if chance.random() < CANCELLED:
            self.found.left += len(asked)
            await self._leave(connection, asked)
            return False
        try:
            for ask, canary in asked:
                answer = await connection.answer()
                self._look(ask, canary, answer, whole=True)
                if answer.status != 200:
                    return False
        except (ConnectionError, asyncio.IncompleteReadError) as error:
            self.found.wrong.append(f"{asked}: {error!r}")
            return False
        return True

    async def _leave(self, connection: Connection, asked: Sequence[tuple[Ask, bytes]]) -> None:
        """At some moment, in some way; what comes until then, or behind a half-closed connection, is looked at."""
        await asyncio.sleep(self._chance.random() * LEFT_S_MAX)
        if self._chance.random() < 0.5:
            connection.drop()
            return
        connection.leave()
        try:
            for ask, canary in asked:
                status, headers = await connection.head()
                body = b"".join([part async for part in connection.body(headers)])
                self._look(ask, canary, Answer(status, headers, body), whole=False)
        except (asyncio.IncompleteReadError, ConnectionError):
            return  # the gateway has closed its half too, as it may

    def _look(self, ask: Ask, canary: bytes, answer: Answer, *, whole: bool) -> None:
        id = answer.headers.get("x-request-id", "").encode()
        expected = self._templates[ask].replace(b"@", canary).replace(b"#", id)
        if answer.status == 200 and (answer.body == expected or (not whole and expected.startswith(answer.body))):
            self.found.whole += whole
            return
        rest = answer.body.replace(canary, b"").replace(id, b"") if id else answer.body.replace(canary, b"")
        kind = self.found.foreign if b"canary-" in rest or b"-hr-" in rest else self.found.wrong
        kind.append(f"{ask}, {canary.decode()}: {answer.status} {answer.body[:500]!r}")

    def _canary(self, number: int) -> bytes:
        return b"canary-%06d-%08x" % (number, self._chance.getrandbits(32))

    def _request(self, ask: Ask, canary: bytes) -> bytes:
        body: dict[str, Any] = {"model": ask.model, "stream": ask.stream, "emulate": {"word": canary.decode()}}
        return post(ask.route, json.dumps(body | ROUTES[ask.route]).encode(), self._key)
