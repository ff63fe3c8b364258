"""gRPC's port as strangers meet it: spoken to in frames, by clients that do what no library does."""

from __future__ import annotations

import asyncio
import gc
import weakref
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from grpc_health.v1 import health_pb2
from hpack import Decoder

from gateway.call import Bounds
from gateway.edge import grpc as edge_grpc
from gateway.edge import grpc_call
from gateway.edge.grpc_facts import SERVICE
from runtimes.http2 import connection as http2
from runtimes.http2.frames import (
    ACK,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    INITIAL_WINDOW_SIZE,
    PING,
    PREFACE,
    RST_STREAM,
    Code,
    frame,
    rst_stream,
    settings,
)
from runtimes.rpc.messages import framed
from tests.gateway.oip import BOUNDS, chunk
from tests.gateway.test_grpc import Site, asked, generation, open_site
from tests.http2 import GREETING, Said, data, frames, header

LATE_S = 20.0
LIVE = f"/{SERVICE}/ServerLive"
INFER = f"/{SERVICE}/ModelInfer"
STREAM = f"/{SERVICE}/ModelStreamInfer"
WATCH = "/grpc.health.v1.Health/Watch"
CHECK = "/grpc.health.v1.Health/Check"
WHOLE = END_HEADERS | END_STREAM
HELLO = framed(asked().SerializeToString())


def call(
    stream: int, path: str = INFER, *fields: tuple[str, str], key: str = "good", flags: int = END_HEADERS
) -> bytes:
    given = [(":method", "POST"), (":scheme", "http"), (":path", path), ("content-type", "application/grpc")]
    return header(stream, [*given, ("authorization", f"Bearer {key}"), *fields], flags=flags)


class Stranger:
    """A connection, and what the other side has said on it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._decoder = Decoder()

    def say(self, *parts: bytes) -> None:
        self._writer.write(b"".join(parts))

    async def hears(self, kind: int, stream: int | None = None) -> Said:
        """The next frame of a kind."""
        while (said := await self.next()) is not None:
            if said.kind == kind and stream in (None, said.stream):
                return said
        raise AssertionError("the connection has ended")

    async def next(self) -> Said | None:
        """The next frame; None at the end."""
        async with asyncio.timeout(LATE_S):
            try:
                head = await self._reader.readexactly(9)
                (said,) = frames(head + await self._reader.readexactly(int.from_bytes(head[:3], "big")))
            except (asyncio.IncompleteReadError, ConnectionError):
                return None
        return said

    async def ending(self, stream: int) -> dict[str, str]:
        """The trailers of a call."""
        while True:
            said = await self.hears(HEADERS, stream)
            fields = dict(self._decoder.decode(said.payload))
            if said.flags & END_STREAM:
                return fields

    async def is_hung_up(self) -> bool:
        while await self.next() is not None:
            pass
        return True


@asynccontextmanager
async def stranger(site: Site, *, greeting: bytes = GREETING) -> AsyncIterator[Stranger]:
    host, _, port = site.address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        found = Stranger(reader, writer)
        found.say(greeting)
        yield found
    finally:
        writer.close()


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with open_site(tmp_path) as found:
        yield found


async def rests(site: Site) -> None:
    """No call is under way any more."""
    async with asyncio.timeout(LATE_S):
        while site.door._server is None or site.door._server.calls or not site.stages.at_rest():
            await asyncio.sleep(0.01)


async def is_well(site: Site) -> bool:
    return (await site.health.Check(health_pb2.HealthCheckRequest())).status == health_pb2.HealthCheckResponse.SERVING


# ---- what is no call ---------------------------------------------------------------------------------------


NO_CALLS: dict[str, tuple[list[tuple[str, str]], str]] = {
    "another method": ([(":method", "GET")], "12"),
    "a path that is not served": ([(":path", "/nothing")], "12"),
    "a path of any bytes": ([(":path", "/\x80\xff")], "12"),
    "a deadline that is none": ([("grpc-timeout", "soon")], "3"),
    "many fields": ([(f"x-{number}", "") for number in range(BOUNDS.headers_max)], "8"),
    "long fields": ([("x-long", "x" * BOUNDS.header_bytes_max)], "8"),
}


@pytest.mark.parametrize("what", NO_CALLS)
async def test_what_is_no_call_is_refused_and_the_next_one_is_taken(site: Site, what: str) -> None:
    changes, status = NO_CALLS[what]
    fields = {":method": "POST", ":scheme": "http", ":path": LIVE, "content-type": "application/grpc"} | dict(changes)
    block = header(1, fields.items(), flags=0)[9:]
    async with stranger(site) as peer:
        for at in range(0, len(block), 16_000):
            flags = END_HEADERS if at + 16_000 >= len(block) else 0
            peer.say(frame(CONTINUATION if at else HEADERS, flags, 1, block[at : at + 16_000]))
        assert (await peer.ending(1))["grpc-status"] == status
        peer.say(call(3, LIVE, flags=WHOLE))
        assert (await peer.ending(3))["grpc-status"] == "0"


@pytest.mark.parametrize(
    "kind", ["", "text/html", "application/grpc-web+proto", "application/grpcx", "application/grpc+json"]
)
async def test_what_is_not_grpc_is_told_so_in_http_s_words(site: Site, kind: str) -> None:
    """With 200 it would look as if all were well."""
    async with stranger(site) as peer:
        fields = [(":method", "POST"), (":scheme", "http"), (":path", LIVE)] + [("content-type", kind)] * bool(kind)
        peer.say(header(1, fields, flags=WHOLE))
        found = await peer.ending(1)
        assert (found[":status"], found["grpc-status"]) == ("415", "12")


@pytest.mark.parametrize("kind", ["application/grpc", "application/grpc+proto", "Application/gRPC; charset=utf-8"])
async def test_grpc_has_more_names_than_one(site: Site, kind: str) -> None:
    async with stranger(site) as peer:
        fields = [(":method", "POST"), (":scheme", "http"), (":path", LIVE), ("content-type", kind)]
        peer.say(header(1, fields, flags=WHOLE))
        assert (await peer.ending(1))["grpc-status"] == "0"


async def test_who_has_no_key_costs_no_task_and_no_memory(site: Site) -> None:
    async with stranger(site) as peer:
        peer.say(call(1, key="wrong"), data(1, HELLO), data(1, bytes(10_000)))
        assert (await peer.ending(1))["grpc-status"] == "16"
        assert (await peer.hears(RST_STREAM)).payload == bytes(4), "nothing more is wanted, and nothing is wrong"
        peer.say(data(1, b"it was on its way", end=True), call(3), data(3, HELLO, end=True))
        assert (await peer.ending(3))["grpc-status"] == "0"


async def test_a_refusal_waits_a_moment_for_the_message_and_no_longer(site: Site) -> None:
    """A client that is still sending may take a quicker one for a failure of its own."""
    async with stranger(site) as peer:
        peer.say(call(1, key="wrong"), frame(PING, 0, 0, bytes(8)))
        while (said := await peer.next()) is not None and said.kind != PING:
            assert said.kind != HEADERS
        assert (await peer.ending(1))["grpc-status"] == "16"
        peer.say(call(3, key="wrong"), header(3, [("x", "trailers")], flags=WHOLE))
        assert (await peer.ending(3))["grpc-status"] == "16"
        peer.say(call(5, key="wrong"), rst_stream(5, Code.CANCEL), call(7, LIVE, flags=WHOLE))
        assert (await peer.ending(7))["grpc-status"] == "0"


async def test_a_message_that_breaks_off_is_refused(site: Site) -> None:
    async with stranger(site) as peer:
        peer.say(call(1), data(1, HELLO[:-1], end=True))
        assert (await peer.ending(1))["grpc-status"] == "3"
        peer.say(call(3), data(3, HELLO[:-1]), header(3, [("x", "trailers")], flags=WHOLE))
        assert (await peer.ending(3))["grpc-status"] == "3"


@pytest.mark.parametrize("path", [INFER, WATCH, CHECK])
async def test_a_second_message_where_there_is_one_is_refused(site: Site, path: str) -> None:
    message = HELLO if path == INFER else framed(b"")
    async with stranger(site) as peer:
        peer.say(call(1, path), data(1, message * 2, end=True))
        assert (await peer.ending(1))["grpc-status"] == "12"
        peer.say(call(3), data(3, HELLO, end=True))
        assert (await peer.ending(3))["grpc-status"] == "0"
    await rests(site)


async def test_a_second_message_ends_what_has_begun_with_the_first(site: Site) -> None:
    async with stranger(site) as peer:
        peer.say(call(1, WATCH), data(1, framed(b"")))
        await peer.hears(DATA, 1)
        peer.say(data(1, framed(b"")))
        assert (await peer.ending(1))["grpc-status"] == "12"
    await rests(site)
    assert site.door.watchers == 0


@pytest.mark.parametrize(
    ("coding", "message", "status"),
    [
        ("gzip", zlib.compress(asked().SerializeToString(), wbits=31), "0"),
        ("deflate", zlib.compress(asked().SerializeToString()), "0"),
        ("deflate", b"nothing of the kind", "3"),
        ("br", b"whatever", "12"),
        ("identity", asked().SerializeToString(), "12"),
    ],
)
async def test_messages_may_be_compressed_in_two_ways(site: Site, coding: str, message: bytes, status: str) -> None:
    async with stranger(site) as peer:
        peer.say(call(1, INFER, ("grpc-encoding", coding)), data(1, b"\1" + framed(message)[1:], end=True))
        assert (await peer.ending(1))["grpc-status"] == status


# ---- memory ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [WATCH, CHECK])
async def test_a_message_that_needs_no_key_is_short(site: Site, path: str) -> None:
    limit = edge_grpc.OPEN_BYTES_MAX
    bomb = zlib.compress(bytes(limit + 1), wbits=31)
    async with stranger(site) as peer:
        peer.say(call(1, path, key="wrong"), data(1, framed(bytes(limit + 1))[:5]))
        assert (await peer.ending(1))["grpc-status"] == "8", "none of it is waited for"
        peer.say(call(3, path, ("grpc-encoding", "gzip"), key="wrong"), data(3, b"\1" + framed(bomb)[1:], end=True))
        assert (await peer.ending(3))["grpc-status"] == "8"
        peer.say(call(5, CHECK, key="wrong"), data(5, framed(b"\x0a\x7f" + b"x" * 127), end=True))
        assert (await peer.ending(5))["grpc-status"] == "5", "long enough for any name"


def unread_bytes(site: Site) -> list[int]:
    """Of each connection: what has come, and nobody has read."""
    server = site.door._server
    assert server is not None
    return [it.share.unread_bytes for it in server.connections]


async def test_messages_that_do_not_end_hold_little_together(site: Site) -> None:
    """Each alone is no longer than it may be."""
    limit = grpc_call.LARGEST_UNREAD_MAX * BOUNDS.body_bytes_max
    part = framed(bytes(BOUNDS.body_bytes_max))[:16_384]
    number = limit // len(part)
    async with stranger(site) as patient, stranger(site) as peer:
        patient.say(call(1), data(1, HELLO[:-1]))
        for id in range(1, 2 * number, 2):
            peer.say(call(id), data(id, part))
        peer.say(frame(PING, 0, 0, bytes(8)))
        while (said := await peer.next()) is not None and said.kind != PING:
            assert said.kind not in (HEADERS, RST_STREAM)
        assert max(unread_bytes(site)) == number * len(part)
        last = 2 * number + 1
        peer.say(call(last), data(last, part))
        refusal = await peer.ending(last)
        assert (refusal["grpc-status"], refusal["x-should-retry"]) == ("8", "true")
        assert max(unread_bytes(site)) == number * len(part)
        peer.say(*(rst_stream(id, Code.CANCEL) for id in range(1, 2 * number, 2)))
        peer.say(call(last + 2), data(last + 2, HELLO, end=True))
        assert (await peer.ending(last + 2))["grpc-status"] == "0", "there is room again"
        patient.say(data(1, HELLO[-1:], end=True))
        assert (await patient.ending(1))["grpc-status"] == "0", "other connections have their own"
        assert unread_bytes(site) == [0, 0]
    await rests(site)


async def test_many_messages_without_content_are_not_held_for_nothing(tmp_path: Path) -> None:
    """They are five bytes each on the wire, and more here."""
    empty = framed(b"") * 3_000
    assert 3 * len(empty) < grpc_call.LARGEST_UNREAD_MAX * BOUNDS.body_bytes_max < 6_000 * grpc_call.PIECE_BYTES
    async with open_site(tmp_path, chunk("he"), asyncio.Event()) as site, stranger(site) as peer:
        for id in (1, 3, 5):
            peer.say(call(id, STREAM), data(id, framed(generation().SerializeToString())))
            await peer.hears(DATA, id)
        peer.say(data(1, empty), data(3, empty), data(5, empty))
        while not (said := await peer.hears(HEADERS)).flags & END_STREAM:
            pass
        assert said.stream == 5
    await rests(site)


# ---- floods ------------------------------------------------------------------------------------------------


async def test_calls_that_are_opened_and_reset_cost_their_connection(site: Site) -> None:
    async with stranger(site) as peer:
        for id in range(1, 4 * http2.RESETS_MAX, 2):
            peer.say(call(id), data(id, HELLO, end=True), rst_stream(id, Code.CANCEL))
        assert Code((await peer.hears(GOAWAY)).payload[7]) is Code.ENHANCE_YOUR_CALM
        assert await peer.is_hung_up()
    await rests(site)
    assert await is_well(site)


@pytest.mark.parametrize("flood", [frame(PING, 0, 0, bytes(8)), settings({}), frame(CONTINUATION, 0, 1)])
async def test_frames_that_bring_nothing_cost_their_connection(site: Site, flood: bytes) -> None:
    async with stranger(site) as peer:
        if flood[3] == CONTINUATION:
            peer.say(call(1, flags=0))
        peer.say(flood * 2 * http2.IDLE_FRAMES_MAX)
        assert Code((await peer.hears(GOAWAY)).payload[7]) is Code.ENHANCE_YOUR_CALM
        assert await peer.is_hung_up()
    assert await is_well(site)


# ---- time --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("said", [b"", PREFACE[:10], PREFACE, GREETING + call(1, flags=0), GREETING + call(1)[:20]])
async def test_a_header_that_does_not_come_in_time_costs_its_connection(tmp_path: Path, said: bytes) -> None:
    async with open_site(tmp_path, bounds=Bounds(header_s_max=0.2)) as site, stranger(site, greeting=said) as peer:
        assert await peer.is_hung_up()


async def test_a_header_must_come_in_time_on_an_old_connection_too(tmp_path: Path) -> None:
    async with open_site(tmp_path, bounds=Bounds(header_s_max=0.1)) as site, stranger(site) as peer:
        peer.say(call(1, LIVE, flags=WHOLE))
        await peer.ending(1)
        await asyncio.sleep(0.3)
        peer.say(call(3, flags=0))
        assert await peer.is_hung_up()


async def test_a_header_that_trickles_is_too_late_all_the_same(tmp_path: Path) -> None:
    async with open_site(tmp_path, bounds=Bounds(header_s_max=0.2)) as site, stranger(site) as peer:
        peer.say(call(1, flags=0))
        trickling = asyncio.create_task(_trickle(peer))
        assert await peer.is_hung_up()
        trickling.cancel()


async def _trickle(peer: Stranger) -> None:
    while True:
        peer.say(b"\0")
        await asyncio.sleep(0.02)


async def test_who_opens_no_window_is_given_up(tmp_path: Path) -> None:
    """The answer waits for a window that never comes."""
    async with open_site(tmp_path, bounds=Bounds(write_s_max=0.2)) as site:
        async with stranger(site, greeting=PREFACE + settings({INITIAL_WINDOW_SIZE: 0})) as peer:
            peer.say(call(1), data(1, HELLO, end=True))
            assert Code((await peer.hears(RST_STREAM, 1)).payload[3]) is Code.CANCEL
        await rests(site)


async def test_who_stops_reading_altogether_is_hung_up_on(tmp_path: Path) -> None:
    texts = [chunk("x" * 100_000) for _ in range(200)]
    wide = PREFACE + settings({INITIAL_WINDOW_SIZE: 2**31 - 1}) + frame(8, 0, 0, (1 << 30).to_bytes(4, "big"))
    async with open_site(tmp_path, *texts, asyncio.Event(), bounds=Bounds(write_s_max=0.3)) as site:
        async with stranger(site, greeting=wide) as peer:
            peer.say(call(1, STREAM), data(1, framed(generation().SerializeToString()), end=True))
            server = site.door._server
            assert server is not None
            async with asyncio.timeout(LATE_S):
                while not server.calls:
                    await asyncio.sleep(0.01)
                while server.connections:
                    await asyncio.sleep(0.01)
        await rests(site)


async def test_a_silent_connection_is_asked_whether_it_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge_grpc, "KEEPALIVE_S", 0.1)
    monkeypatch.setattr(edge_grpc, "KEEPALIVE_S_MAX", 0.3)
    async with open_site(tmp_path) as site, stranger(site) as peer:
        peer.say(call(1, WATCH, flags=END_HEADERS), data(1, framed(b""), end=True))
        for _ in range(2):
            peer.say(frame(PING, ACK, 0, (await peer.hears(PING)).payload))
        assert await peer.is_hung_up(), "it does not answer any more"


async def test_a_call_s_deadline_ends_what_only_waits(site: Site) -> None:
    async with stranger(site) as peer:
        peer.say(call(1, STREAM, ("grpc-timeout", "100m")))
        assert (await peer.ending(1))["grpc-status"] == "4"
    await rests(site)


async def test_connections_and_calls_that_have_ended_leave_no_garbage(site: Site) -> None:
    gc.collect()
    gc.disable()
    try:
        async with stranger(site) as peer:
            peer.say(call(1), data(1, HELLO, end=True))
            await peer.ending(1)
            peer.say(call(3, STREAM), call(5, STREAM, ("grpc-timeout", "5S")), rst_stream(5, Code.CANCEL))
            peer.say(frame(PING, 0, 0, bytes(8)))
            await peer.hears(PING)
            server = site.door._server
            assert server is not None
            kept = [weakref.ref(it) for connection in server.connections for it in (connection, connection.http2)]
            assert len(kept) == 2
        async with asyncio.timeout(LATE_S):
            while server.connections or server.calls:
                await asyncio.sleep(0.01)
            while any(it() is not None for it in kept):
                await asyncio.sleep(0.01)
    finally:
        gc.enable()


# ---- stopping ----------------------------------------------------------------------------------------------


async def test_a_gateway_that_stops_says_goodbye_and_ends_what_only_waits(tmp_path: Path) -> None:
    async with open_site(tmp_path) as site, stranger(site) as peer:
        peer.say(call(1, STREAM), call(3, WATCH), data(3, framed(b""), end=True))
        await peer.hears(DATA, 3)
        site.door.retire()
        assert (await peer.hears(GOAWAY)).payload[:4] == (2**31 - 1).to_bytes(4, "big")
        peer.say(call(5), data(5, HELLO, end=True))
        assert (await peer.ending(5))["grpc-status"] == "0", "whoever had not heard it is served"
        stopping = asyncio.create_task(_stop(site))
        assert (await peer.hears(GOAWAY)).payload[:4] == (5).to_bytes(4, "big")
        ends = [await peer.ending(1), await peer.ending(3)]
        assert [(it["grpc-status"], it["grpc-message"]) for it in ends] == [("14", "This gateway is stopping.")] * 2
        assert await peer.is_hung_up()
        await stopping


async def _stop(site: Site) -> None:
    assert site.door._server is not None
    await site.door._server.stop()


async def test_a_call_that_computes_is_waited_for(tmp_path: Path) -> None:
    go_on = asyncio.Event()
    async with open_site(tmp_path, chunk("he"), go_on, chunk("llo", "stop")) as site, stranger(site) as peer:
        peer.say(call(1, STREAM), data(1, framed(generation().SerializeToString()), end=True))
        await peer.hears(DATA, 1)
        stopping = asyncio.create_task(_stop(site))
        await peer.hears(GOAWAY)
        go_on.set()
        await peer.hears(DATA, 1)
        assert (await peer.ending(1))["grpc-status"] == "0"
        await stopping
