"""gRPC's framing and its fields, and its client, with grpcio's server and with servers that do as they like."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtimes.http2.fields import encoded
from runtimes.http2.frames import (
    CONTINUATION,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    INITIAL_WINDOW_SIZE,
    MAX_CONCURRENT_STREAMS,
    PING,
    PREFACE,
    RST_STREAM,
    WINDOW_BYTES_MOST,
    Code,
    frame,
    goaway,
    rst_stream,
    settings,
    window_update,
)
from runtimes.rpc import channel as rpc_channel
from runtimes.rpc import wire as rpc_wire
from runtimes.rpc.call import RpcError
from runtimes.rpc.channel import Address, Channel
from runtimes.rpc.messages import Messages, TooLong, framed
from runtimes.rpc.status import Status, message, said, timeout, timeout_s
from tests.http2 import Said, data, frames

LATE_S = 20.0
ECHO = "/s/echo"

# ---- framing and fields ------------------------------------------------------------------------------------


@given(st.lists(st.binary(max_size=50), max_size=5), st.lists(st.integers(0, 300), max_size=10))
def test_messages_are_what_was_framed_however_it_is_cut(bodies: list[bytes], cuts: list[int]) -> None:
    whole, found = b"".join(map(framed, bodies)), []
    messages = Messages(bytes_max=50)
    for begin, end in zip([0, *sorted(cuts)], [*sorted(cuts), len(whole)], strict=True):
        found += [bytes(body) for _, body in messages.feed(whole[begin:end])]
    assert found == bodies
    assert not messages.torn


def test_a_message_that_breaks_off_is_torn() -> None:
    for end in range(1, 10):
        messages = Messages(bytes_max=50)
        assert messages.feed(framed(b"hello")[:end]) == []
        assert messages.torn


def test_a_message_that_is_too_long_is_refused_at_its_prefix() -> None:
    with pytest.raises(TooLong):
        Messages(bytes_max=50).feed(framed(bytes(51))[:5])


def test_that_it_is_compressed_is_told() -> None:
    assert Messages(bytes_max=50).feed(b"\1" + framed(b"x")[1:])[0][0]


@pytest.mark.parametrize(
    ("field", "seconds"),
    [(b"1H", 3600), (b"2M", 120), (b"3S", 3), (b"4m", 0.004), (b"5u", 5e-6), (b"6n", 6e-9), (b"99999999S", 99999999)],
)
def test_a_timeout_is_read_in_all_its_units(field: bytes, seconds: float) -> None:
    assert timeout_s(field) == pytest.approx(seconds)


@pytest.mark.parametrize("field", [b"", b"5", b"S", b"-1S", b"123456789S", b"1s", b"1 S", b"1.5S"])
def test_a_timeout_that_is_none_is_refused(field: bytes) -> None:
    with pytest.raises(ValueError, match="eight digits"):
        timeout_s(field)


@given(st.floats(1e-6, 9e7))
def test_a_timeout_is_never_shorter_than_what_is_left(left_s: float) -> None:
    assert left_s <= timeout_s(timeout(left_s)) <= left_s * 1.01 + 1e-5


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_a_status_s_words_survive_their_header(text: str) -> None:
    field = message(text)
    assert said(field) == text
    assert all(0x20 <= byte <= 0x7E for byte in field)


# ---- against grpcio's server -------------------------------------------------------------------------------


@asynccontextmanager
async def grpcio(handler: Callable[[bytes, Any], Any], folder: Path, **options: int) -> AsyncIterator[Address]:
    server = grpc.aio.server(options=[(f"grpc.{name}", value) for name, value in options.items()])
    handlers = {"echo": grpc.unary_unary_rpc_method_handler(handler)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("s", handlers),))
    server.add_insecure_port(f"unix:{folder}/socket")
    await server.start()
    try:
        yield Address(path=f"{folder}/socket")
    finally:
        await server.stop(0)


@asynccontextmanager
async def channel(address: Address, **options: Any) -> AsyncIterator[Channel]:
    opened = Channel(address, **{"bytes_max": 64 << 20, **options})
    try:
        yield opened
    finally:
        await opened.aclose()


async def ask(on: Channel, message: bytes = b"hello", *, timeout_s: float | None = LATE_S) -> bytes:
    return bytes(await on.ask(on.method(ECHO), message, timeout_s=timeout_s))


async def failed(call: Any) -> RpcError:
    with pytest.raises(RpcError) as found:
        await call
    return found.value


async def echo(request: bytes, _context: Any) -> bytes:
    return request


async def test_messages_of_every_size_come_back(tmp_path: Path) -> None:
    async with grpcio(echo, tmp_path, max_receive_message_length=-1) as address, channel(address) as on:
        for size in (0, 1, 16_379, 16_380, 65_531, 1_000_000, 20_000_000):
            assert await ask(on, bytes(size)) == bytes(size)


async def test_calls_share_a_connection_and_do_not_wait_for_each_other(tmp_path: Path) -> None:
    peers, both = set(), asyncio.Barrier(20)

    async def meet(request: bytes, context: Any) -> bytes:
        peers.add(context.peer())
        await both.wait()
        return request

    async with grpcio(meet, tmp_path) as address, channel(address) as on:
        asked = [bytes((number,)) * 100_000 for number in range(20)]
        assert await asyncio.gather(*(ask(on, it) for it in asked)) == asked
    assert len(peers) == 1


async def test_calls_beyond_what_the_server_takes_wait(tmp_path: Path) -> None:
    at_once = most = 0

    async def count(request: bytes, _context: Any) -> bytes:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        await asyncio.sleep(0.001)
        at_once -= 1
        return request

    async with grpcio(count, tmp_path, max_concurrent_streams=3) as address, channel(address) as on:
        assert await asyncio.gather(*(ask(on) for _ in range(30))) == [b"hello"] * 30
    assert most == 3


async def test_metadata_and_words_of_any_kind_arrive(tmp_path: Path) -> None:
    async def refuse(_request: bytes, context: Any) -> bytes:
        seen = dict(context.invocation_metadata())
        await context.abort(grpc.StatusCode.NOT_FOUND, f"{seen['x-who']}: 100% weg, é\n")
        return b""

    async with grpcio(refuse, tmp_path) as address, channel(address, metadata=[(b"x-who", b"me")]) as on:
        error = await failed(ask(on))
    assert (error.status, error.said) == (Status.NOT_FOUND, "me: 100% weg, é\n")


async def test_a_server_that_retires_its_connections_fails_no_call(tmp_path: Path) -> None:
    peers = set()

    async def note(request: bytes, context: Any) -> bytes:
        peers.add(context.peer())
        await asyncio.sleep(0.01)
        return request

    options = {"max_connection_age_ms": 50, "max_connection_age_grace_ms": 10_000}
    async with grpcio(note, tmp_path, **options) as address, channel(address) as on:
        for _ in range(50):
            assert await ask(on) == b"hello"
    # On a Unix socket all peers have one name, so it is the server's word alone that there were several.


# ---- against servers that do as they like ------------------------------------------------------------------

HEAD = encoded([(b":status", b"200"), (b"content-type", b"application/grpc")])
OK = encoded([(b"grpc-status", b"0")])


def answer(stream: int, body: bytes = b"hello") -> bytes:
    return b"".join(
        [
            frame(HEADERS, END_HEADERS, stream, HEAD),
            data(stream, framed(body)),
            frame(HEADERS, END_HEADERS | END_STREAM, stream, OK),
        ]
    )


class Scripted:
    """Answers the request of each stream with what `script` gives, and notes what it is told."""

    def __init__(self, script: Callable[[int], bytes], *, greeting: bytes = settings({})) -> None:
        self.script = script
        self.greeting = greeting
        self.heard: list[Said] = []
        self.news = asyncio.Condition()
        self.connections = 0

    @asynccontextmanager
    async def serving(self, folder: Path) -> AsyncIterator[Address]:
        tasks: set[Any] = set()

        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            tasks.add(asyncio.current_task())
            self.connections += 1
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
                await self._serve(reader, writer)
            writer.close()

        server = await asyncio.start_unix_server(connected, folder / "scripted")
        try:
            yield Address(path=str(folder / "scripted"))
        finally:
            server.close()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert await reader.readexactly(len(PREFACE)) == PREFACE
        writer.write(self.greeting)
        while True:
            head = await reader.readexactly(9)
            (said,) = frames(head + await reader.readexactly(int.from_bytes(head[:3], "big")))
            async with self.news:
                self.heard.append(said)
                self.news.notify_all()
            if said.kind == 0 and said.flags & END_STREAM:
                writer.write(self.script(said.stream))

    async def hears(self, kind: int) -> Said:
        async with asyncio.timeout(LATE_S), self.news:
            await self.news.wait_for(lambda: any(it.kind == kind for it in self.heard))
        return next(it for it in self.heard if it.kind == kind)


def trailers(*fields: tuple[bytes, bytes]) -> bytes:
    return encoded([(b":status", b"200"), (b"content-type", b"application/grpc"), *fields])


def ended(stream: int, block: bytes) -> bytes:
    return frame(HEADERS, END_HEADERS | END_STREAM, stream, block)


def http(status: bytes, kind: bytes = b"text/html") -> bytes:
    return encoded([(b":status", status), (b"content-type", kind)])


CONTINUED = frame(CONTINUATION, 0, 1, bytes(rpc_wire.HEADER_BYTES_MAX))
ODD: dict[str, tuple[Callable[[int], bytes], Status]] = {
    "only trailers": (lambda id: ended(id, trailers((b"grpc-status", b"7"))), Status.PERMISSION_DENIED),
    "no status": (lambda id: ended(id, HEAD), Status.UNKNOWN),
    "a status beyond all": (lambda id: ended(id, trailers((b"grpc-status", b"99"))), Status.UNKNOWN),
    "a status that is none": (lambda id: ended(id, trailers((b"grpc-status", b"OK"))), Status.UNKNOWN),
    "no message": (lambda id: ended(id, HEAD + OK), Status.INTERNAL),
    "half a message": (
        lambda id: frame(HEADERS, END_HEADERS, id, HEAD) + data(id, framed(b"hello")[:7]) + ended(id, OK),
        Status.INTERNAL,
    ),
    "two messages": (
        lambda id: frame(HEADERS, END_HEADERS, id, HEAD) + data(id, framed(b"a") * 2) + ended(id, OK),
        Status.INTERNAL,
    ),
    "a compressed message": (
        lambda id: frame(HEADERS, END_HEADERS, id, HEAD) + data(id, b"\1\0\0\0\1x") + ended(id, OK),
        Status.INTERNAL,
    ),
    "no trailers": (
        lambda id: frame(HEADERS, END_HEADERS, id, HEAD) + data(id, framed(b"a"), end=True),
        Status.INTERNAL,
    ),
    "a page": (lambda id: frame(HEADERS, END_HEADERS, id, http(b"502")) + data(id, b"<p>"), Status.UNAVAILABLE),
    "a page that is fine": (lambda id: frame(HEADERS, END_HEADERS, id, http(b"200")), Status.UNKNOWN),
    "nothing there": (lambda id: ended(id, http(b"404")), Status.UNIMPLEMENTED),
    "a refusal": (lambda id: rst_stream(id, Code.REFUSED_STREAM), Status.UNAVAILABLE),
    "a cancel": (lambda id: rst_stream(id, Code.CANCEL), Status.CANCELLED),
    "a reset": (lambda id: rst_stream(id, Code.INTERNAL_ERROR), Status.UNAVAILABLE),
    "nonsense": (lambda id: b"HTTP/1.1 400 Bad Request\r\n\r\n", Status.UNAVAILABLE),
    "a goodbye": (lambda id: goaway(0, Code.NO_ERROR), Status.UNAVAILABLE),
    "a header without measure": (lambda id: frame(HEADERS, 0, id, HEAD) + CONTINUED * 9, Status.UNAVAILABLE),
    "more than is taken": (
        lambda id: frame(HEADERS, END_HEADERS, id, HEAD) + data(id, framed(bytes(101))),
        Status.RESOURCE_EXHAUSTED,
    ),
}


@pytest.mark.parametrize("what", ODD)
async def test_an_odd_answer_is_an_error_of_its_own(tmp_path: Path, what: str) -> None:
    script, status = ODD[what]
    server = Scripted(script)
    async with server.serving(tmp_path) as address, channel(address, bytes_max=100) as on:
        assert (await failed(ask(on))).status is status
        server.script = answer
        assert await ask(on) == b"hello", "the next call is none the worse"


@pytest.mark.parametrize("broken", [rst_stream(1, Code.INTERNAL_ERROR), b"HTTP/1.1 400 Bad Request\r\n\r\n"])
async def test_a_call_that_broke_is_told_from_one_that_reached_nobody(tmp_path: Path, broken: bytes) -> None:
    server = Scripted(lambda _: broken)
    async with server.serving(tmp_path) as address, channel(address) as on:
        assert (await failed(ask(on))).broken
        server.script = lambda id: ended(id, trailers((b"grpc-status", b"14")))
        assert not (await failed(ask(on))).broken
    async with channel(Address(path=str(tmp_path / "nobody"))) as on:
        assert not (await failed(ask(on))).broken


async def test_a_call_that_is_too_late_for_its_server_harms_no_other(tmp_path: Path) -> None:
    """Triton says how it ended, that nothing more is wanted, and once more how it ended."""
    expired = trailers((b"grpc-status", b"4"))

    def script(stream: int) -> bytes:
        late = ended(stream, expired) + rst_stream(stream, Code.NO_ERROR) + ended(stream, expired)
        return late + answer(1) if stream > 1 else b""

    server = Scripted(script)
    async with server.serving(tmp_path) as address, channel(address) as on:
        first = asyncio.create_task(ask(on))
        await server.hears(HEADERS)
        assert (await failed(ask(on))).status is Status.DEADLINE_EXCEEDED
        assert await first == b"hello"
        assert server.connections == 1


@pytest.mark.parametrize("greeting", [b"HTTP/1.1 400 Bad Request\r\n\r\n", frame(PING, 0, 0, bytes(8)), b""])
async def test_a_server_that_does_not_speak_http_2_cannot_be_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, greeting: bytes
) -> None:
    monkeypatch.setattr(rpc_channel, "CONNECT_S_MAX", 0.3)
    async with Scripted(answer, greeting=greeting).serving(tmp_path) as address, channel(address) as on:
        error = await failed(ask(on))
    assert error.status is Status.UNAVAILABLE
    assert "cannot be reached" in error.said


async def test_a_server_that_goes_as_soon_as_it_comes_is_unavailable(tmp_path: Path) -> None:
    greeting = settings({}) + goaway(0, Code.NO_ERROR)
    async with Scripted(answer, greeting=greeting).serving(tmp_path) as address, channel(address) as on:
        assert (await failed(ask(on))).status is Status.UNAVAILABLE


async def test_nobody_listening_is_unavailable_at_once(tmp_path: Path) -> None:
    async with channel(Address(path=str(tmp_path / "nobody"))) as on:
        assert (await failed(ask(on, timeout_s=None))).status is Status.UNAVAILABLE


async def test_a_silent_server_is_asked_whether_it_lives_and_then_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rpc_wire, "KEEPALIVE_S", 0.05)
    monkeypatch.setattr(rpc_wire, "KEEPALIVE_S_MAX", 0.05)
    server = Scripted(lambda _: b"")
    async with server.serving(tmp_path) as address, channel(address) as on:
        assert (await failed(ask(on))).status is Status.UNAVAILABLE
        await server.hears(PING)


async def test_what_is_not_read_is_held_back(tmp_path: Path) -> None:
    """However much the server has promised to take."""
    greeted = asyncio.Event()

    async def connected(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(settings({INITIAL_WINDOW_SIZE: WINDOW_BYTES_MOST}) + window_update(0, 1 << 30))
        await greeted.wait()
        writer.close()

    async with await asyncio.start_unix_server(connected, tmp_path / "socket", limit=1) as server:
        async with channel(Address(path=str(tmp_path / "socket"))) as on:
            call = asyncio.create_task(ask(on, bytes(32 << 20), timeout_s=0.3))
            assert (await failed(call)).status is Status.DEADLINE_EXCEEDED
            [wire] = on._wires
            assert wire._transport is not None
            assert 0 < wire._transport.get_write_buffer_size() < 2 * rpc_wire.UNREAD_BYTES_MAX
            greeted.set()
        server.close()


async def test_who_leaves_tells_the_server_and_the_connection_stays(tmp_path: Path) -> None:
    server = Scripted(lambda _: b"")
    async with server.serving(tmp_path) as address, channel(address) as on:
        call = asyncio.create_task(ask(on))
        await server.hears(0)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert int.from_bytes((await server.hears(RST_STREAM)).payload, "big") == Code.CANCEL
        server.script = answer
        assert await ask(on) == b"hello"
        assert server.connections == 1


async def test_a_call_that_was_refused_unseen_is_sent_again(tmp_path: Path) -> None:
    server = Scripted(lambda id: answer(id) if id > 3 else rst_stream(id, Code.REFUSED_STREAM))
    async with server.serving(tmp_path) as address, channel(address) as on:
        assert await ask(on) == b"hello"
    assert [it.stream for it in server.heard if it.kind == HEADERS] == [1, 3, 5]


async def test_a_deadline_is_told_and_kept(tmp_path: Path) -> None:
    server = Scripted(lambda _: b"")
    async with server.serving(tmp_path) as address, channel(address) as on:
        assert (await failed(ask(on, timeout_s=0.05))).status is Status.DEADLINE_EXCEEDED
        assert b"grpc-timeout" in (await server.hears(HEADERS)).payload
        await server.hears(RST_STREAM)


async def test_who_waits_for_a_place_finds_another_connection_if_that_one_goes(tmp_path: Path) -> None:
    server = Scripted(lambda _: b"", greeting=settings({MAX_CONCURRENT_STREAMS: 1}))
    async with server.serving(tmp_path) as address, channel(address) as on:
        first = asyncio.create_task(ask(on))
        await server.hears(0)
        second = asyncio.create_task(ask(on))
        await asyncio.sleep(0)
        server.script = lambda id: answer(id) if server.connections > 1 else b""
        [wire] = on._wires
        wire.close()
        assert (await failed(first)).status is Status.UNAVAILABLE
        assert await second == b"hello"


async def test_a_place_that_is_left_in_the_turn_in_which_it_is_given_goes_to_the_next(tmp_path: Path) -> None:
    server = Scripted(lambda _: b"", greeting=settings({MAX_CONCURRENT_STREAMS: 1}))
    async with server.serving(tmp_path) as address, channel(address) as on:
        first = asyncio.create_task(ask(on))
        await server.hears(0)
        second, third = (asyncio.create_task(ask(on)) for _ in range(2))
        await asyncio.sleep(0)
        [wire] = on._wires
        server.script = answer
        wire.end(next(iter(wire._http2.streams.values())))
        second.cancel()
        assert await third == b"hello"
        first.cancel()
        await asyncio.wait((first, second))


async def test_closing_ends_calls_and_takes_no_more(tmp_path: Path) -> None:
    server = Scripted(lambda _: b"")
    async with server.serving(tmp_path) as address, channel(address) as on:
        call = asyncio.create_task(ask(on))
        await server.hears(0)
        await on.aclose()
        assert (await failed(call)).status is Status.UNAVAILABLE
        assert (await failed(ask(on))).status is Status.UNAVAILABLE


async def test_a_call_under_way_outlives_its_server_s_goodbye(tmp_path: Path) -> None:
    server = Scripted(lambda id: goaway(id, Code.NO_ERROR) + answer(id))
    async with server.serving(tmp_path) as address, channel(address) as on:
        for number in range(1, 4):
            assert await ask(on) == b"hello"
            assert server.connections == number
    assert GOAWAY not in {it.kind for it in server.heard}
