"""A provider's server that does as the request tells it: it answers well, badly, or not at all.

What it is to do stands in the request's own `fault`, a parameter that nobody in between knows: so it also shows that
unknown parameters arrive. It remembers what it was asked, to be looked at by tests.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

MODEL = "upstream-model"
KEY = "provider-secret-9731"

Writer = asyncio.StreamWriter


class Upstream:
    """Listens on loopback, in a thread of its own, while inside `upstream()`."""

    def __init__(self) -> None:
        self.port = 0
        self.seen: deque[Any] = deque(maxlen=100)
        """Bodies of the latest calls."""
        self.keys: deque[str | None] = deque(maxlen=100)
        """What they showed as `authorization`."""
        self.left = threading.Event()
        """Set when a client has gone amid an answer that stalls."""
        self.loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def broken_url(self) -> str:
        """It says it is well, and resets every call."""
        return f"http://127.0.0.1:{self.port}/broken"

    def run(self, started: threading.Event) -> None:
        asyncio.run(self._run(started))

    def stop(self) -> None:
        assert self.loop is not None and self._stop is not None
        self.loop.call_soon_threadsafe(self._stop.set)

    async def _run(self, started: threading.Event) -> None:
        self.loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        calls: set[asyncio.Task[None]] = set()

        async def accept(reader: asyncio.StreamReader, writer: Writer) -> None:
            task = asyncio.current_task()
            assert task is not None
            calls.add(task)
            try:
                await self._serve(reader, writer)
            except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
                pass  # the client has gone, or the test session is over
            finally:
                calls.discard(task)
                writer.close()

        server = await asyncio.start_server(accept, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        started.set()
        await self._stop.wait()
        server.close()
        for task in calls:
            task.cancel()
        await asyncio.gather(*calls, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: Writer) -> None:
        """One call per connection."""
        head = await reader.readuntil(b"\r\n\r\n")
        request, *lines = head.decode("latin-1").strip().split("\r\n")
        method, path, _ = request.split(" ")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        if method == "GET":
            await whole(writer, 200, {"object": "list", "data": [{"id": MODEL, "object": "model"}]})
            return
        body = json.loads(await reader.readexactly(int(headers["content-length"])))
        if path.startswith("/broken/"):
            reset(writer)
            return
        self.seen.append(body)
        self.keys.append(headers.get("authorization"))
        await FAULTS[body.get("fault", "none")](self, reader, writer, body)


@contextmanager
def upstream() -> Iterator[Upstream]:
    server = Upstream()
    started = threading.Event()
    thread = threading.Thread(target=server.run, args=(started,), daemon=True)
    thread.start()
    assert started.wait(10)
    try:
        yield server
    finally:
        server.stop()
        thread.join(10)


# ---- what it does ------------------------------------------------------------------------------------------

WORDS = ("All ", "is ", "well.")
USAGE = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}


async def well(self: Upstream, reader: asyncio.StreamReader, writer: Writer, body: Any) -> None:
    """A good answer, in the shape of OpenAI's."""
    head = {"id": "chatcmpl-1", "created": 1_700_000_000, "model": MODEL}
    if not body.get("stream"):
        message = {"role": "assistant", "content": "".join(WORDS), "refusal": None}
        choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}
        await whole(writer, 200, {**head, "object": "chat.completion", "choices": [choice], "usage": USAGE})
        return
    await start(writer)
    for word in WORDS:
        await event(writer, chunk(word))
    await event(writer, chunk("", "stop"))
    if (body.get("stream_options") or {}).get("include_usage"):
        await event(writer, {**head, "object": "chat.completion.chunk", "choices": [], "usage": USAGE})
    await part(writer, b"data: [DONE]\n\n")
    await part(writer, b"")


async def resets_at_once(self: Upstream, reader: asyncio.StreamReader, writer: Writer, body: Any) -> None:
    reset(writer)


async def resets_amid(self: Upstream, reader: asyncio.StreamReader, writer: Writer, body: Any) -> None:
    await start(writer)
    await event(writer, chunk(WORDS[0]))
    await asyncio.sleep(0.2)  # a reset overtakes what has not been read yet
    reset(writer)


async def closes_amid(self: Upstream, reader: asyncio.StreamReader, writer: Writer, body: Any) -> None:
    """FIN inside the chunked body."""
    await start(writer)
    await event(writer, chunk(WORDS[0]))


async def never_says_done(self: Upstream, reader: asyncio.StreamReader, writer: Writer, body: Any) -> None:
    """The body ends as it should, without its closing event."""
    await start(writer)
    await event(writer, chunk(WORDS[0]))
    await part(writer, b"")


async def stalls_at_once(self: Upstream, reader: asyncio.StreamReader, writer: Writer, body: Any) -> None:
    await reader.read()
    self.left.set()


async def stalls_amid(self: Upstream, reader: asyncio.StreamReader, writer: Writer, body: Any) -> None:
    await start(writer)
    await event(writer, chunk(WORDS[0]))
    await reader.read()
    self.left.set()


async def garbage(self: Upstream, reader: asyncio.StreamReader, writer: Writer, body: Any) -> None:
    writer.write(b"\x16\x03\x01 this is no HTTP\r\n\r\n")
    await writer.drain()


async def not_json(self: Upstream, reader: asyncio.StreamReader, writer: Writer, body: Any) -> None:
    """A proxy's page instead of the provider's error."""
    page = b"<html>upstream stack trace: /srv/secret/path</html>"
    writer.write(b"HTTP/1.1 502 Bad Gateway\r\ncontent-type: text/html\r\ncontent-length: %d\r\n\r\n" % len(page))
    writer.write(page)
    await writer.drain()


async def fails(self: Upstream, reader: asyncio.StreamReader, writer: Writer, body: Any) -> None:
    await whole(writer, 500, {"error": {"message": "It broke.", "type": "server_error", "param": None, "code": 5001}})


async def refuses(self: Upstream, reader: asyncio.StreamReader, writer: Writer, body: Any) -> None:
    error = {"message": "Too hot.", "type": "invalid_request_error", "param": "temperature", "code": 400}
    await whole(writer, 400, {"error": error})


async def limits(self: Upstream, reader: asyncio.StreamReader, writer: Writer, body: Any) -> None:
    error = {"message": "Slow down.", "type": "rate_limit_error", "param": None, "code": "rate_limit_exceeded"}
    await whole(writer, 429, {"error": error}, "retry-after: 7")


async def knows_us_not(self: Upstream, reader: asyncio.StreamReader, writer: Writer, body: Any) -> None:
    error = {"message": f"Incorrect key: {KEY}.", "type": "invalid_request_error", "code": "invalid_api_key"}
    await whole(writer, 401, {"error": error})


async def says_error_amid(self: Upstream, reader: asyncio.StreamReader, writer: Writer, body: Any) -> None:
    """As vLLM does when its engine fails: an event, then the end."""
    await start(writer)
    await event(writer, chunk(WORDS[0]))
    await asyncio.sleep(0.2)  # both in one piece would be an error before the first byte
    await event(writer, {"error": {"message": "Out of memory.", "type": "server_error", "param": None, "code": 500}})
    await part(writer, b"data: [DONE]\n\n")
    await part(writer, b"")


async def says_error_first(self: Upstream, reader: asyncio.StreamReader, writer: Writer, body: Any) -> None:
    await start(writer)
    await event(writer, {"error": {"message": "No room.", "type": "server_error", "param": None, "code": 503}})
    await part(writer, b"")


async def huge_event(self: Upstream, reader: asyncio.StreamReader, writer: Writer, body: Any) -> None:
    await start(writer)
    await event(writer, chunk(WORDS[0]))
    await part(writer, b"data: ")
    while True:
        await part(writer, b"x" * 65_536)


async def huge_answer(self: Upstream, reader: asyncio.StreamReader, writer: Writer, body: Any) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n")
    while True:
        await part(writer, b" " * 1_048_576)


FAULTS: dict[str, Callable[[Upstream, asyncio.StreamReader, Writer, Any], Awaitable[None]]] = {
    "none": well,
    **{
        act.__name__: act
        for act in (
            resets_at_once,
            resets_amid,
            closes_amid,
            never_says_done,
            stalls_at_once,
            stalls_amid,
            garbage,
            not_json,
            fails,
            refuses,
            limits,
            knows_us_not,
            says_error_amid,
            says_error_first,
            huge_event,
            huge_answer,
        )
    },
}


# ---- on the wire -------------------------------------------------------------------------------------------


async def whole(writer: Writer, status: int, body: Any, *headers: str) -> None:
    data = json.dumps(body).encode()
    lines = [f"HTTP/1.1 {status} Any", "content-type: application/json", f"content-length: {len(data)}"]
    writer.write("\r\n".join([*lines, "connection: close", *headers, "", ""]).encode() + data)
    await writer.drain()


async def start(writer: Writer) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n")
    writer.write(b"connection: close\r\n\r\n")
    await writer.drain()


async def part(writer: Writer, data: bytes) -> None:
    """One chunk of a chunked body; the empty one ends it."""
    writer.write(b"%x\r\n%b\r\n" % (len(data), data))
    await writer.drain()


async def event(writer: Writer, data: Any) -> None:
    await part(writer, b"data: " + json.dumps(data).encode() + b"\n\n")


def chunk(word: str, finish: str | None = None) -> Any:
    delta = {"role": "assistant", "content": word} if word else {}
    choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
    head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1_700_000_000, "model": MODEL}
    return {**head, "choices": [choice]}


def reset(writer: Writer) -> None:
    """RST instead of FIN."""
    held = writer.get_extra_info("socket")
    held.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
