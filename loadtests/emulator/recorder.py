"""Makes a recording of a real engine: streamed chats of many lengths, several at once."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Iterator

import httpx
import msgspec

from loadtests.emulator.recording import Recorded, RecordingFault
from loadtests.target import Target

CALL_S_MAX = 600.0
WORDS_MIN, WORDS_MAX = 8, 256
WORDS = ("river", "mill", "wheel", "stone", "water", "race", "gate", "weir", "bank", "flood", "grain", "flour")


async def record(
    target: Target, *, model: str, key: str | None, calls: int, concurrent: int, tokens: int, seed: int = 1
) -> list[Recorded]:
    """So many calls, in the order they were asked. Raises RecordingFault if any of them fails."""
    bodies = enumerate(_bodies(model=model, calls=calls, tokens=tokens, seed=seed))
    done: dict[int, Recorded] = {}

    async def ask_on(client: httpx.AsyncClient) -> None:
        for number, body in bodies:
            done[number] = await _ask(client, body)

    try:
        async with _client(target, key) as client, asyncio.TaskGroup() as group:
            for _ in range(concurrent):
                group.create_task(ask_on(client))
    except BaseExceptionGroup as faults:
        # Not `except*`: before Python 3.11.4 what is raised within one comes out as a group again.
        expected, others = faults.split((httpx.HTTPError, RecordingFault))
        if others is not None or expected is None:
            raise
        raise RecordingFault(f"{target.text}: {expected.exceptions[0]!s:.300}") from None
    return [done[number] for number in sorted(done)]


def _bodies(*, model: str, calls: int, tokens: int, seed: int) -> Iterator[bytes]:
    """Prompts that begin differently, so that no prefix cache shortens them; short ones are as common as long ones on a
    scale of doublings."""
    chance = random.Random(seed)  # noqa: S311 - repeatable is what it must be
    for number in range(calls):
        length = round(WORDS_MIN * (WORDS_MAX / WORDS_MIN) ** chance.random())
        text = f"{number}: tell on. " + " ".join(chance.choices(WORDS, k=length))
        yield msgspec.json.encode(
            {
                "model": model,
                "messages": [{"role": "user", "content": text}],
                "max_tokens": tokens,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
        )


def _client(target: Target, key: str | None) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        base_url=f"http://{target.authority}",
        transport=httpx.AsyncHTTPTransport(uds=target.socket),
        headers={"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {}),
        timeout=CALL_S_MAX,
    )


async def _ask(client: httpx.AsyncClient, body: bytes) -> Recorded:
    begun_s = time.perf_counter()
    times_s: list[float] = []
    prompt_tokens = 0
    async with client.stream("POST", "/v1/chat/completions", content=body) as response:
        if response.status_code != 200:
            raise RecordingFault(f"it answered {response.status_code}: {(await response.aread()).decode()}")
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = CHUNK.decode(line.removeprefix("data: "))
            if any(choice.delta.content for choice in chunk.choices):
                times_s.append(time.perf_counter())
            if chunk.usage is not None:
                prompt_tokens = chunk.usage.prompt_tokens
    if not times_s:
        raise RecordingFault("it answered without a single word")
    gaps_s = tuple(round(after - before, 6) for before, after in itertools.pairwise(times_s))
    return Recorded(prompt_tokens=prompt_tokens, first_token_s=round(times_s[0] - begun_s, 6), gaps_s=gaps_s)


class _Usage(msgspec.Struct):
    prompt_tokens: int


class _Delta(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta


class _Chunk(msgspec.Struct):
    choices: tuple[_Choice, ...] = ()
    usage: _Usage | None = None


CHUNK = msgspec.json.Decoder(_Chunk)
