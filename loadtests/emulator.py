"""An engine that computes nothing: answers OpenAI's chat calls at a set pace, and never is what limits a measurement.

Answers are fixed text, so a token is one chunk, one word, and counted exactly. Streams are shaped as vLLM shapes them:
a first event with the role, one per token, the last with its finish reason, usage if it was asked for, [DONE].
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated

import httptools
import msgspec
from msgspec import Meta

BODY_BYTES_MAX = 16 * 1024 * 1024
PROMPT_TOKENS = 8
"""Whatever the prompt: nothing is read that costs time."""


class Pace(msgspec.Struct, frozen=True):
    """How an answer comes: zeros are as fast as it can be written."""

    first_token_s: float = 0.0
    """From the request to the first token; of an answer that is not streamed, the pace of its tokens is part of
    this wait."""
    token_s: float = 0.0
    """From each token to the next."""
    tokens: int = 16
    """How many, unless the request's `max_tokens` is less."""


class Emulator:
    """Answers, and counts what it answered."""

    def __init__(self, pace: Pace) -> None:
        self.pace = pace
        self.calls = 0
        """Asked, and well-formed."""
        self.tokens = 0
        """Written."""
        self.serial = itertools.count(1)


@asynccontextmanager
async def serving(emulator: Emulator, listen: str) -> AsyncIterator[str]:
    """Serve on `host:port` or `unix:/path` while inside; the value is where, port 0 having become a real one. Raises
    ValueError for what is no address, OSError if it is taken."""
    loop = asyncio.get_running_loop()
    connections: set[Served] = set()
    if listen.startswith("unix:"):
        path = Path(listen.removeprefix("unix:"))
        server = await loop.create_unix_server(lambda: Served(emulator, connections), path)
        where = listen
    else:
        host, separator, port = listen.rpartition(":")
        if not separator or not port.isdigit():
            raise ValueError(f"{listen!r} is no address; write host:port or unix:/path")
        server = await loop.create_server(lambda: Served(emulator, connections), host.strip("[]"), int(port))
        where = f"http://{host}:{server.sockets[0].getsockname()[1]}"
    try:
        yield where
    finally:
        server.close()
        for connection in tuple(connections):
            connection.abort()
        await server.wait_closed()


class Served(asyncio.Protocol):
    """One client's connection: one request at a time, as HTTP clients do."""

    def __init__(self, emulator: Emulator, connections: set[Served]) -> None:
        self._emulator = emulator
        self._connections = connections
        self._loop = asyncio.get_running_loop()
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport
        self._path = b""
        self._body = b""
        self._pieces: Iterator[bytes] = iter(())
        self._left = 0
        """How many pieces are still to be written."""
        self._due_s = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._paused = False

    # ---- as asyncio calls it

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport
        self._connections.add(self)

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self.abort()

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self._go_on()

    def connection_lost(self, exc: Exception | None) -> None:
        self._connections.discard(self)
        self._left = 0
        if self._timer is not None:
            self._timer.cancel()

    def abort(self) -> None:
        """Close at once, whatever is under way."""
        self._transport.abort()

    # ---- as httptools calls it

    def on_message_begin(self) -> None:
        self._path = self._body = b""

    def on_url(self, url: bytes) -> None:
        self._path += url

    def on_body(self, body: bytes) -> None:
        self._body += body
        if len(self._body) > BODY_BYTES_MAX:
            self.abort()

    def on_message_complete(self) -> None:
        if self._left:
            self.abort()  # asked while an answer is under way
        elif self._path == b"/v1/chat/completions":
            self._chat()
        elif self._path == b"/v1/models":
            self._transport.write(_response(MODELS))
        elif self._path == b"/health":
            self._transport.write(_response(b"{}"))
        else:
            self._transport.write(_response(NOT_HERE, "404 Not Found"))

    # ---- answering

    def _chat(self) -> None:
        try:
            ask = ASK.decode(self._body)
        except msgspec.DecodeError:
            self._transport.write(_response(BAD, "400 Bad Request"))
            return
        emulator, pace = self._emulator, self._emulator.pace
        emulator.calls += 1
        limits = (pace.tokens, ask.max_tokens, ask.max_completion_tokens)
        tokens = min(limit for limit in limits if limit is not None)
        id = b"chatcmpl-emulated-%d" % next(emulator.serial)
        self._due_s = time.perf_counter() + pace.first_token_s
        if ask.stream:
            usage_asked = ask.stream_options is not None and bool(ask.stream_options.include_usage)
            self._pieces, self._left = self._streamed(id, tokens, usage=usage_asked), tokens
        else:
            self._due_s += (tokens - 1) * pace.token_s
            self._pieces, self._left = self._whole(id, tokens), 1
        self._go_on()

    def _go_on(self) -> None:
        """Write what is due, and come back when more is; a client that does not read is waited for."""
        while self._left and not self._paused:
            wait_s = self._due_s - time.perf_counter()
            if wait_s > 0:
                if self._timer is not None:
                    self._timer.cancel()
                self._timer = self._loop.call_later(wait_s, self._go_on)
                return
            self._left -= 1
            # From when it was due, not from now: lateness must not add up.
            self._due_s += self._emulator.pace.token_s
            self._transport.write(next(self._pieces))

    def _whole(self, id: bytes, tokens: int) -> Iterator[bytes]:
        self._emulator.tokens += tokens
        yield _response(WHOLE % (id, WORD * tokens, tokens, PROMPT_TOKENS + tokens))

    def _streamed(self, id: bytes, tokens: int, *, usage: bool) -> Iterator[bytes]:
        """A piece per token. What frames the stream travels with the first and the last of them."""
        token = _chunk(CHUNK % (id, WORD, b"null"))
        for number in range(1, tokens + 1):
            piece = token if number < tokens else _chunk(CHUNK % (id, WORD, b'"length"'))
            if number == 1:
                piece = STREAM_HEAD + _chunk(ROLE % id) + piece
            if number == tokens:
                piece += (_chunk(USAGE % (id, tokens, PROMPT_TOKENS + tokens)) if usage else b"") + STREAM_END
            self._emulator.tokens += 1
            yield piece


class _StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class _Ask(msgspec.Struct):
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    max_tokens: Annotated[int, Meta(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Meta(ge=1)] | None = None


ASK = msgspec.json.Decoder(_Ask)


def _response(body: bytes, status: str = "200 OK") -> bytes:
    head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


def _chunk(data: bytes) -> bytes:
    """One event, in one chunk of HTTP (RFC 9112, 7.1)."""
    event = b"data: " + data + b"\n\n"
    return b"%x\r\n%b\r\n" % (len(event), event)


WORD = b" water"
STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
STREAM_END = _chunk(b"[DONE]") + b"0\r\n\r\n"
_EVENT = b'{"id":"%b","object":"chat.completion.chunk","created":1700000000,"model":"emulated","choices":'
_COUNT = b'"usage":{"prompt_tokens":8,"completion_tokens":%d,"total_tokens":%d}}'
ROLE = _EVENT + b'[{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]}'
CHUNK = _EVENT + b'[{"index":0,"delta":{"content":"%b"},"logprobs":null,"finish_reason":%b}]}'
USAGE = _EVENT + b"[]," + _COUNT
WHOLE = (
    b'{"id":"%b","object":"chat.completion","created":1700000000,"model":"emulated","choices":[{"index":0,"message":'
    b'{"role":"assistant","content":"%b"},"logprobs":null,"finish_reason":"length"}],' + _COUNT
)
MODELS = (
    b'{"object":"list","data":[{"id":"emulated","object":"model","created":1700000000,"owned_by":"headrace-load"}]}'
)
BAD = b'{"error":{"message":"The body is no chat request.","type":"invalid_request_error","code":null}}'
NOT_HERE = b'{"error":{"message":"The emulator has no such path.","type":"invalid_request_error","code":null}}'
