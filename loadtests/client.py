"""One connection that asks over HTTP, one call at a time, and says what came back and when.

On asyncio's protocols and httptools, because a client that costs more than the gateway measures itself. Times are
`time.perf_counter` seconds, taken once per read: what arrives together has arrived at the same time.
"""

from __future__ import annotations

import asyncio
import time
from array import array
from collections.abc import Iterator, Mapping
from typing import Any

import httptools
import msgspec

from loadtests.target import Target

#: Of one answer, or one event, kept in memory until it is whole.
HELD_BYTES_MAX = 16 * 1024 * 1024
CANCELLED = "cancelled"
"""The outcome of a call whose caller left, as the scenario wanted it."""


class Answer:
    """What came back for one call, filled while it arrives."""

    __slots__ = (
        *("chunks", "complete", "end_s", "fault", "first_s", "gap_s_max", "gaps_s", "last_s", "leaves_after_chunks"),
        *("status", "tokens"),
    )

    def __init__(self, gaps_s: array[float], leaves_after_chunks: int | None = None) -> None:
        self.status = 0
        self.fault: str | None = None
        """Why it is not a whole answer, in a word; None for an answer with any status."""
        self.complete = False
        """A stream has said [DONE], another answer has been decoded."""
        self.chunks = 0
        """Events of a stream, [DONE] not counted."""
        self.tokens = 0
        """As the server counted them; without its count, events with content."""
        self.first_s: float | None = None
        """When a stream's first content arrived."""
        self.last_s = 0.0
        self.end_s = 0.0
        self.gaps_s = gaps_s
        """Where the times between contents go."""
        self.gap_s_max = 0.0
        self.leaves_after_chunks = leaves_after_chunks

    @property
    def outcome(self) -> str:
        """`served`, or the error it is counted as: an HTTP status, or one word."""
        if self.fault is not None:
            return self.fault
        if self.status != 200:
            return str(self.status)
        return "served" if self.complete else "cut"

    def take_body(self, body: bytes) -> None:
        """All of an answer that is not a stream."""
        try:
            completion = COMPLETION.decode(body)
        except msgspec.DecodeError:
            self.fault = "garbage"
            return
        self.tokens = completion.usage.completion_tokens
        self.complete = True

    def take_event(self, event: bytes, now_s: float) -> None:
        """One event of a stream."""
        data = event.removeprefix(b"data:").strip()
        if data == b"[DONE]":
            self.complete = True
            return
        self.chunks += 1
        try:
            chunk = CHUNK.decode(data)
        except msgspec.DecodeError:
            self.fault = "garbage"
            return
        if chunk.error is not None:
            self.fault = "error-event"
        if any(choice.delta.content for choice in chunk.choices):
            if self.first_s is None:
                self.first_s = now_s
            else:
                gap_s = now_s - self.last_s
                self.gaps_s.append(gap_s)
                if gap_s > self.gap_s_max:
                    self.gap_s_max = gap_s
            self.last_s = now_s
            self.tokens += 1
        if chunk.usage is not None:
            # Comes last, and replaces the count of events.
            self.tokens = chunk.usage.completion_tokens


class Connection(asyncio.Protocol):
    """Kept alive from call to call; `open` says whether it can take another one."""

    def __init__(self) -> None:
        self.open = False
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._answer: Answer | None = None
        self._ended: asyncio.Future[None] | None = None
        self._events: Events | None = None
        self._body: list[bytes] = []
        self._held_bytes = 0
        self._begun = False
        """A byte of the answer has come."""
        self._now_s = 0.0

    @property
    def busy(self) -> bool:
        return self._answer is not None

    def ask(self, request: bytes, answer: Answer) -> asyncio.Future[None]:
        """Send; the future is done once `answer` is whole or has a fault. One call at a time."""
        assert self._transport is not None and self._answer is None
        self._answer = answer
        self._begun = False
        self._ended = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return self._ended

    def leave(self) -> None:
        """Stop, if not a byte of an answer has come."""
        if self._answer is not None and not self._begun:
            self.stop(CANCELLED)

    def stop(self, fault: str) -> None:
        """Close at once; a call under way ends with this fault."""
        self.open = False
        self._now_s = time.perf_counter()
        if self._transport is not None:
            self._transport.abort()
        if self._answer is not None:
            self._answer.fault = self._answer.fault or fault
            self._end()

    # ---- as asyncio calls it

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport
        self.open = True

    def data_received(self, data: bytes) -> None:
        self._now_s = time.perf_counter()
        self._begun = True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self.stop("garbage")

    def connection_lost(self, exc: Exception | None) -> None:
        self.stop("closed")

    # ---- as httptools calls it

    def on_message_begin(self) -> None:
        self._body.clear()
        self._held_bytes = 0
        self._events = None

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"content-type" and value.startswith(b"text/event-stream"):
            self._events = Events()

    def on_body(self, body: bytes) -> None:
        if self._answer is None:
            return
        self._held_bytes += len(body)
        if self._events is None:
            self._body.append(body)
        else:
            for event in self._events.feed(body):
                self._answer.take_event(event, self._now_s)
                if self._answer.leaves_after_chunks == self._answer.chunks:
                    self.stop(CANCELLED)
                    return
            self._held_bytes = self._events.held_bytes
        if self._held_bytes > HELD_BYTES_MAX:
            self.stop("too-large")

    def on_message_complete(self) -> None:
        status = self._parser.get_status_code()
        if self._answer is None:
            self.stop("unasked")
            return
        if status < 200:
            return  # 103 and the like: the answer is still to come
        self.open = self._parser.should_keep_alive()
        self._answer.status = status
        if status == 200 and self._events is None:
            self._answer.take_body(b"".join(self._body))
        self._end()

    def _end(self) -> None:
        answer, ended = self._answer, self._ended
        assert answer is not None and ended is not None
        self._answer = self._ended = None
        answer.end_s = self._now_s
        if not ended.done():
            ended.set_result(None)


class Events:
    """Server-sent events out of pieces of any size (HTML standard, 9.2.6), for servers that end lines with LF or
    CR LF."""

    def __init__(self) -> None:
        self._rest = b""

    @property
    def held_bytes(self) -> int:
        """Of an event that has only begun."""
        return len(self._rest)

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Every event that is whole by now, comments left out."""
        if self._rest:
            data = self._rest + data
        if b"\r" in data:
            data = data.replace(b"\r\n", b"\n")
        *whole, self._rest = data.split(b"\n\n")
        return (event for event in whole if event.startswith(b"data:"))


def request(target: Target, path: str, content: bytes, headers: Mapping[str, str]) -> bytes:
    """A call as it goes over the wire."""
    further = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    head = (
        f"POST {path} HTTP/1.1\r\nhost: {target.authority}\r\n{further}"
        f"content-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content


class _Usage(msgspec.Struct):
    completion_tokens: int


class _Completion(msgspec.Struct):
    usage: _Usage


class _Delta(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta


class _Chunk(msgspec.Struct):
    choices: tuple[_Choice, ...] = ()
    usage: _Usage | None = None
    error: Any = None


COMPLETION, CHUNK = msgspec.json.Decoder(_Completion), msgspec.json.Decoder(_Chunk)
