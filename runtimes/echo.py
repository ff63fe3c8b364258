"""A Generator without a model: it says back what it was told, in OpenAI's dialect, at a chosen pace.

Deterministic and weightless. For demos, tests and load: the chunks of a stream are shaped as vLLM shapes
them, so that what stands in front can be built and measured without an engine. A token is a piece of
text with the white space before it.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import aclosing, asynccontextmanager
from types import MappingProxyType
from typing import Annotated, Any, ClassVar

import msgspec

from runtimes.clock import Clock, SystemClock
from runtimes.contract import Exchange, Expired, Generator, Invalid, Load, Reply, Site, Unavailable
from runtimes.dialect import TextOrTokens, decoded, rows

Pace = Annotated[float, msgspec.Meta(ge=0)]
Count = Annotated[int, msgspec.Meta(ge=1)]
Json = dict[str, Any]


class Echo(msgspec.Struct, tag="echo", tag_field="kind", frozen=True, forbid_unknown_fields=True):
    """Answers with the last user message (chat) or the prompt (completions)."""

    first_token_s: Pace = 0.0
    """Pause before the first token."""
    token_s: Pace = 0.0
    """Pause before every further one."""

    in_process: ClassVar[bool] = True

    @property
    def slots(self) -> int:
        """Nothing is computed, so this only bounds the open answers."""
        return 4096

    def build(self, site: Site, *, clock: Clock | None = None) -> EchoRuntime:
        return EchoRuntime(spec=self, site=site, clock=clock or SystemClock())


class EchoRuntime:
    """See Echo. Calls under way when it closes may still finish: they hold nothing but their own text."""

    meters_each_chunk = True
    upstream_model: str | None = None
    routes = frozenset({"/v1/chat/completions", "/v1/completions"})

    def __init__(self, *, spec: Echo, site: Site, clock: Clock) -> None:
        self._spec = spec
        self._site = site
        self._clock = clock
        self._serial = itertools.count(1)
        self._running = 0
        self._open = False

    async def open(self) -> None:
        self._open = True

    def load(self) -> Load:
        return Load(running=self._running, waiting=0)

    async def ready(self) -> None:
        if not self._open:
            raise Unavailable(f"{self._site.replica} is not open; send the call to another replica")

    async def aclose(self) -> None:
        self._open = False

    @asynccontextmanager
    async def exchange(self, request: Exchange) -> AsyncIterator[Reply]:
        await self.ready()
        self._running += 1
        try:
            status, kind, answer = self._answer(request)
            async with aclosing(answer):
                first = await anext(answer)
                async with aclosing(_resumed(first, answer)) as frames:
                    yield Reply(status, ((b"content-type", kind),), frames)
        finally:
            self._running -= 1

    def _answer(self, request: Exchange) -> tuple[int, bytes, AsyncGenerator[bytes, None]]:
        decoder = _DECODERS.get(request.path)
        if decoder is None:
            known = ", ".join(_DECODERS)
            return 404, _JSON, _refused(f"Invalid URL (POST {request.path}): an echo answers {known}.", None)
        try:
            asked = decoded(decoder, request.body)
            says = [said for turn in asked.turns() for said in [_said(*turn, asked)] * (asked.n or 1)]
        except Invalid as error:
            return 400, _JSON, _refused(str(error), error.param)
        head = {
            "id": f"{asked.id_prefix}-{self._site.replica}-{next(self._serial)}",
            "object": asked.chunk_object if asked.stream else asked.whole_object,
            "created": int(self._clock.wall_s()),
            "model": self._site.model,
        }
        if asked.stream:
            return 200, _EVENTS, self._streamed(asked, says, head, request.deadline_s)
        return 200, _JSON, self._whole(asked, says, head, request.deadline_s)

    async def _whole(self, asked: Call, says: list[Said], head: Json, deadline_s: float) -> AsyncGenerator[bytes, None]:
        async for _ in self._steps(says, deadline_s):
            pass
        choices = [asked.whole(index, "".join(it.tokens), it.finish) for index, it in enumerate(says)]
        yield msgspec.json.encode(head | {"choices": choices, "usage": _total(says, asked.n)})

    async def _streamed(
        self, asked: Call, says: list[Said], head: Json, deadline_s: float
    ) -> AsyncGenerator[bytes, None]:
        options = asked.stream_options or StreamOptions()
        metered = options.include_usage and options.continuous_usage_stats
        async for step in self._steps(says, deadline_s):
            for said, spoken, choice in _spoken(asked, says, step):
                usage = {"usage": _counted(said.tokens_in, spoken)} if metered else {}
                yield _event(head | {"choices": [choice]} | usage)
        if options.include_usage:
            yield _event(head | {"choices": [], "usage": _total(says, asked.n)})
        yield b"data: [DONE]\n\n"

    async def _steps(self, says: list[Said], deadline_s: float) -> AsyncGenerator[int, None]:
        """One step per token, all choices at once, as an engine decodes them."""
        for step in range(max(1, *(len(said.tokens) for said in says))):
            left_s = deadline_s - self._clock.now_s()
            pause_s = self._spec.token_s if step else self._spec.first_token_s
            if pause_s and left_s > 0:
                await self._clock.sleep(min(pause_s, left_s))
            if self._clock.now_s() >= deadline_s:
                raise Expired(f"{self._site.replica} did not finish before the call's deadline")
            yield step


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class Asked(msgspec.Struct, kw_only=True):
    """What both endpoints take. Unknown parameters are ignored: they cannot change what an echo says."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, msgspec.Meta(ge=1, le=16)] | None = None
    max_tokens: Count | None = None
    stop: str | list[str] | None = None


class Part(msgspec.Struct):
    """A piece of a message; pictures and sounds have no text."""

    type: str
    text: str | None = None


class Message(msgspec.Struct):
    role: str
    content: str | list[Part] | None = None

    def text(self) -> str:
        if isinstance(self.content, list):
            return "".join(part.text or "" for part in self.content)
        return self.content or ""


class Chat(Asked, kw_only=True):
    messages: Annotated[list[Message], msgspec.Meta(min_length=1)]
    max_completion_tokens: Count | None = None

    id_prefix: ClassVar[str] = "chatcmpl"
    whole_object: ClassVar[str] = "chat.completion"
    chunk_object: ClassVar[str] = "chat.completion.chunk"

    def turns(self) -> list[tuple[str, int]]:
        """Per prompt: the text to say back, and the tokens that were read."""
        last = next((it.text() for it in reversed(self.messages) if it.role == "user"), "")
        return [(last, sum(len(_tokens(it.text())) for it in self.messages))]

    def tokens_max(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    def whole(self, index: int, text: str, finish: str) -> Json:
        """A choice of an answer in one piece."""
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": None, "finish_reason": finish}

    def opening(self, index: int) -> Json:
        """The choice of a stream's first chunk, before any text."""
        return self._delta(index, {"role": "assistant", "content": ""}, None)

    def piece(self, index: int, text: str, finish: str | None) -> Json:
        """The choice of any further chunk."""
        return self._delta(index, {"content": text} if text else {}, finish)

    def _delta(self, index: int, delta: Json, finish: str | None) -> Json:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}


class Completion(Asked, kw_only=True):
    prompt: TextOrTokens

    id_prefix: ClassVar[str] = "cmpl"
    whole_object: ClassVar[str] = "text_completion"
    chunk_object: ClassVar[str] = "text_completion"

    def turns(self) -> list[tuple[str, int]]:
        return [
            (row, len(_tokens(row))) if isinstance(row, str) else (f"token ids: {len(row)}", len(row))
            for row in rows(self.prompt, param="prompt", rows_max=_PROMPTS_MAX)
        ]

    def tokens_max(self) -> int | None:
        return self.max_tokens

    def whole(self, index: int, text: str, finish: str) -> Json:
        return self.piece(index, text, finish)

    def opening(self, index: int) -> None:
        return None

    def piece(self, index: int, text: str, finish: str | None) -> Json:
        return {"index": index, "text": text, "logprobs": None, "finish_reason": finish}


Call = Chat | Completion


class Said(msgspec.Struct, frozen=True):
    """One choice of the answer."""

    tokens: list[str]
    finish: str
    tokens_in: int


_PROMPTS_MAX = 128
_JSON = b"application/json"
_EVENTS = b"text/event-stream; charset=utf-8"
_TOKEN = re.compile(r"\s*\S+|\s+")
_DECODERS: Mapping[str, msgspec.json.Decoder[Call]] = MappingProxyType(
    {
        "/v1/chat/completions": msgspec.json.Decoder(Chat),
        "/v1/completions": msgspec.json.Decoder(Completion),
    }
)


def _said(text: str, tokens_in: int, asked: Call) -> Said:
    stops = [asked.stop] if isinstance(asked.stop, str) else asked.stop or []
    ends = [text.find(stop) for stop in stops if stop and stop in text]
    tokens = _tokens(text[: min(ends, default=len(text))])
    tokens_max = asked.tokens_max() or len(tokens)
    return Said(tokens[:tokens_max], "length" if len(tokens) > tokens_max else "stop", tokens_in)


def _tokens(text: str) -> list[str]:
    return _TOKEN.findall(text)


def _spoken(asked: Call, says: list[Said], step: int) -> Iterator[tuple[Said, int, Json]]:
    """The choices that this step of the stream adds, each with the tokens its answer has by then."""
    for index, said in enumerate(says):
        opening = asked.opening(index) if step == 0 else None
        if opening:
            yield said, 0, opening
        if step < len(said.tokens):
            yield said, step + 1, asked.piece(index, said.tokens[step], None)
        if step == max(0, len(said.tokens) - 1):
            yield said, len(said.tokens), asked.piece(index, "", said.finish)


def _total(says: list[Said], n: int | None) -> Json:
    # The n choices of one prompt share its tokens.
    return _counted(sum(said.tokens_in for said in says[:: n or 1]), sum(len(said.tokens) for said in says))


def _counted(tokens_in: int, tokens_out: int) -> Json:
    return {
        "prompt_tokens": tokens_in,
        "completion_tokens": tokens_out,
        "total_tokens": tokens_in + tokens_out,
    }


def _event(chunk: Json) -> bytes:
    return b"data: " + msgspec.json.encode(chunk) + b"\n\n"


async def _refused(message: str, param: str | None) -> AsyncGenerator[bytes, None]:
    error = {"message": message, "type": "invalid_request_error", "param": param, "code": None}
    yield msgspec.json.encode({"error": error})


async def _resumed(first: bytes, rest: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
    yield first
    async for frame in rest:
        yield frame


def _conforms(it: EchoRuntime) -> Generator:
    return it
