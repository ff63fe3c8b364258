"""The hot path's client against servers that misbehave. Waits are ended by events; where only a timer can
end one, it is milliseconds long and nothing is asserted about its length."""

import asyncio
import itertools
import math
import random
import shutil
import ssl
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtimes.clock import Clock, SystemClock
from runtimes.connection import AHEAD_BYTES_MAX, HEAD_BYTES_MAX, HEADERS_MAX, Connection
from runtimes.contract import Broken, Expired, Invalid, Load, Reply, RuntimeFault, Silent, Unavailable
from runtimes.wire import PARKED_S_MAX, Wire
from tests.fakes import FakeClock, until
from tests.runtimes.hostile import Hostile, Peer, answering, either_loop, hostile

CLOCK = SystemClock()
IDLE = Load(running=0, waiting=0)
SOON_S = 0.05
READ_BYTES_MAX = 262_144
"""The most that either loop hands over at once."""
OK = b"HTTP/1.1 200 OK\r\n"
HELLO = OK + b"content-length: 5\r\n\r\nhello"
CHUNKED = OK + b"transfer-encoding: chunked\r\n\r\n"


@asynccontextmanager
async def wired(
    host: Hostile, *, connections_max: int = 4, clock: Clock = CLOCK, **options: Any
) -> AsyncIterator[Wire]:
    """A client that must be clean when its test is over."""
    bounds: dict[str, Any] = {"connect_s_max": 10.0, "idle_s_max": 10.0, **options}
    wire = Wire(host.url, connections_max=connections_max, clock=clock, **bounds)
    try:
        yield wire
        assert wire.load() == IDLE
        await until(lambda: wire.connections == wire.parked)
    finally:
        await wire.aclose()
    assert wire.connections == 0


def only(wire: Wire) -> Connection:
    """Its connection, for tests that must know what has come: what a server has sent may still be on its way."""
    [connection] = wire._open
    return connection


async def call(wire: Wire, body: bytes = b"{}", *, within_s: float = 20.0, method: str = "POST") -> tuple[Reply, bytes]:
    async with wire.exchange(wire.head(method, "/v1/x"), (), body, wire.clock.now_s() + within_s) as reply:
        return reply, b"".join([frame async for frame in reply.frames])


async def outcome(wire: Wire, *, within_s: float = 20.0) -> tuple[bytes, type[RuntimeFault] | None]:
    """The bytes that came, and what ended them."""
    got = bytearray()
    try:
        async with wire.exchange(wire.head("POST", "/v1/x"), (), b"{}", wire.clock.now_s() + within_s) as reply:
            async for frame in reply.frames:
                got += frame
    except RuntimeFault as fault:
        return bytes(got), type(fault)
    return bytes(got), None


FRAMINGS = {
    "length": (HELLO, 200, b"hello"),
    "empty": (OK + b"content-length: 0\r\n\r\n", 200, b""),
    "chunked": (CHUNKED + b"2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n", 200, b"hello"),
    "no chunks": (CHUNKED + b"0\r\n\r\n", 200, b""),
    "extensions": (CHUNKED + b'5;a=b;c="d"\r\nhello\r\n0;e\r\n\r\n', 200, b"hello"),
    "trailers": (CHUNKED + b"5\r\nhello\r\n0\r\nx-sum: 1\r\nset-cookie: a\r\n\r\n", 200, b"hello"),
    "no content": (b"HTTP/1.1 204 No Content\r\ncontent-length: 5\r\n\r\n", 204, b""),
    "not modified": (b"HTTP/1.1 304 Not Modified\r\ncontent-length: 5\r\n\r\n", 304, b""),
    "interim": (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Hints\r\nlink: x\r\n\r\n" + HELLO, 200, b"hello"),
    "error status": (b"HTTP/1.1 529 Busy\r\ncontent-length: 2\r\n\r\nno", 529, b"no"),
    "no reason": (b"HTTP/1.1 200\r\ncontent-length: 2\r\n\r\nok", 200, b"ok"),
}


@pytest.mark.parametrize(("answer", "status", "body"), FRAMINGS.values(), ids=FRAMINGS)
@either_loop
async def test_each_framing_gives_its_body_and_keeps_the_connection(answer: bytes, status: int, body: bytes) -> None:
    async with hostile(answering(*(answer[i : i + 1] for i in range(len(answer))))) as host, wired(host) as wire:
        for _ in range(2):
            reply, got = await call(wire)
            assert (reply.status, got) == (status, body)
        assert len(host.peers) == 1
        assert wire.parked == 1


@either_loop
async def test_a_body_may_end_with_the_connection() -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(OK + b"x: y\r\n\r\n", b"hel", b"lo")

    async with hostile(script) as host, wired(host) as wire:
        reply, got = await call(wire)
        assert (reply.headers, got) == (((b"x", b"y"),), b"hello")
        assert wire.parked == 0


@either_loop
async def test_an_old_server_is_understood_and_let_go() -> None:
    async with hostile(answering(b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nok")) as host, wired(host) as wire:
        assert (await call(wire))[1] == b"ok"
        assert wire.parked == 0


@either_loop
async def test_an_answer_to_head_has_no_body() -> None:
    async with hostile(answering(OK + b"content-length: 5\r\n\r\n")) as host, wired(host) as wire:
        reply, got = await call(wire, b"", method="HEAD")
        assert (reply.status, got) == (200, b"")


@either_loop
async def test_headers_are_end_to_end_and_lower_case() -> None:
    answer = (
        OK + b"Content-Type: a/b \r\nConnection: keep-alive, X-Private\r\nX-Private: 1\r\nKeep-Alive: timeout=5\r\n"
        b"Trailer: x\r\nSet-Cookie: a\r\nSet-Cookie: b\r\nContent-Length: 2\r\nX-Empty:\r\n\r\nok"
    )
    async with hostile(answering(answer)) as host, wired(host) as wire:
        reply, _ = await call(wire)
    expected = ((b"content-type", b"a/b"), (b"set-cookie", b"a"), (b"set-cookie", b"b"), (b"x-empty", b""))
    assert reply.headers == expected


@either_loop
async def test_a_request_is_what_was_asked(tmp_path: Path) -> None:
    seen: list[tuple[bytes, bytes]] = []

    async def script(peer: Peer) -> None:
        while True:
            seen.append(await peer.request())
            await peer.send(HELLO)

    big = random.Random(1).randbytes(3_000_000)
    async with hostile(script, uds=tmp_path / "s") as host, wired(host, uds=tmp_path / "s") as wire:
        async with wire.exchange(
            wire.head("POST", "/v1/x?y=%0A"), ((b"traceparent", b"00-1"),), b"{}", math.inf
        ) as reply:
            assert [frame async for frame in reply.frames] == [b"hello"]
        await call(wire, big)
        await call(wire, b"", method="GET")
    assert seen == [
        (b"POST /v1/x?y=%0A HTTP/1.1\r\nhost: localhost\r\ntraceparent: 00-1\r\ncontent-length: 2\r\n\r\n", b"{}"),
        (b"POST /v1/x HTTP/1.1\r\nhost: localhost\r\ncontent-length: 3000000\r\n\r\n", big),
        (b"GET /v1/x HTTP/1.1\r\nhost: localhost\r\n\r\n", b""),
    ]


REFUSED = {
    "line break in a value": ("/v1/x", (b"a", b"b\r\nc: d")),
    "zero byte in a value": ("/v1/x", (b"a", b"b\0")),
    "line break in a name": ("/v1/x", (b"a\r\n", b"b")),
    "upper case": ("/v1/x", (b"A", b"b")),
    "empty name": ("/v1/x", (b"", b"b")),
    "our host": ("/v1/x", (b"host", b"other")),
    "our framing": ("/v1/x", (b"transfer-encoding", b"chunked")),
    "blank in a path": ("/v1/x HTTP/1.1", (b"a", b"b")),
    "line break in a path": ("/v1/x\r\n", (b"a", b"b")),
    "not ASCII": ("/v1/ü", (b"a", b"b")),
    "not a path": ("http://other/", (b"a", b"b")),
}


@pytest.mark.parametrize(("path", "header"), REFUSED.values(), ids=REFUSED)
async def test_what_would_say_something_else_on_the_wire_is_refused(path: str, header: tuple[bytes, bytes]) -> None:
    async with hostile(answering(HELLO)) as host, wired(host) as wire:
        with pytest.raises(Invalid):
            wire.exchange(wire.head("POST", path), (header,), b"", math.inf)


@pytest.mark.parametrize("url", ["", "ftp://host", "//host", "http://", "http://hö.st", "http://a b", "http://a:x"])
def test_an_address_must_be_a_plain_url(url: str) -> None:
    with pytest.raises(ValueError):
        Wire(url, connections_max=1, connect_s_max=1, idle_s_max=1, clock=CLOCK)


# What is sliced, cut or spoiled.


class Answer:
    """A valid answer and what is in it."""

    def __init__(self, raw: bytes, status: int, body: bytes, head_bytes: int, closes: bool) -> None:
        self.raw, self.status, self.body, self.head_bytes, self.closes = raw, status, body, head_bytes, closes


@st.composite
def answers(draw: st.DrawFn) -> Answer:
    status = draw(st.sampled_from([200, 200, 201, 400, 404, 429, 500, 503, 599]))
    chunks = draw(st.lists(st.binary(min_size=1, max_size=300), max_size=6))
    body = b"".join(chunks)
    interim = b"".join(
        draw(st.lists(st.sampled_from([b"HTTP/1.1 100 C\r\n\r\n", b"HTTP/1.1 102 P\r\nA: b\r\n\r\n"]), max_size=2))
    )
    value = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), max_size=20)
    extra = b"".join(b"X-%d: %b\r\n" % (i, v.encode()) for i, v in enumerate(draw(st.lists(value, max_size=4))))
    framing = draw(st.sampled_from(["length", "chunked", "close"]))
    head = interim + b"HTTP/1.1 %d Some reason\r\n" % status + extra
    if framing == "length":
        head += b"Content-Length: %d\r\n\r\n" % len(body)
        raw = head + body
    elif framing == "chunked":
        head += b"Transfer-Encoding: chunked\r\n\r\n"
        extension = draw(st.sampled_from([b"", b";a", b";a=b", b';a="b c"']))
        pad = b"0" * draw(st.integers(0, 3))
        trailer = draw(st.sampled_from([b"", b"X-T: 1\r\n"]))
        raw = (
            head
            + b"".join(b"%b%x%b\r\n%b\r\n" % (pad, len(c), extension, c) for c in chunks)
            + b"0\r\n"
            + trailer
            + b"\r\n"
        )
    else:
        head += b"Connection: close\r\n\r\n"
        raw = head + body
    return Answer(raw, status, body, len(head), framing == "close")


@settings(max_examples=120, deadline=None)
@given(answer=answers(), data=st.data())
def test_an_answer_cut_into_any_slices_is_read_as_httpx_reads_it(answer: Answer, data: st.DataObject) -> None:
    points = sorted(data.draw(st.sets(st.integers(1, max(1, len(answer.raw) - 1)), max_size=8)))
    slices = [answer.raw[i:j] for i, j in itertools.pairwise([0, *points, len(answer.raw)])]

    async def script(peer: Peer) -> None:
        while True:
            await peer.request()
            await peer.send(*slices)
            if answer.closes:
                return

    async def compare() -> None:
        async with (
            hostile(script) as host,
            wired(host) as wire,
            httpx.AsyncClient(trust_env=False, verify=False) as peer,
        ):
            theirs = await peer.post(host.url, content=b"{}")
            for _ in range(2):
                reply, body = await call(wire)
                assert (reply.status, body) == (answer.status, answer.body) == (theirs.status_code, theirs.content)
                extra = {name: value for name, value in theirs.headers.raw if name.startswith(b"X-")}
                assert dict(reply.headers) == {name.lower(): value for name, value in extra.items()}
            assert wire.parked == (0 if answer.closes else 1)

    asyncio.run(compare())


CUT = {
    "length": (HELLO, len(HELLO) - 5, False),
    "chunked": (CHUNKED + b"2\r\nhe\r\n3;x=y\r\nllo\r\n0\r\nx: y\r\n\r\n", len(CHUNKED) + 3, False),
    "close": (OK + b"connection: close\r\n\r\nhello", len(OK) + 21, True),
    "interim": (b"HTTP/1.1 100 C\r\n\r\n" + HELLO, len(HELLO) + 13, False),
}


@pytest.mark.parametrize(("answer", "body_at", "closes"), CUT.values(), ids=CUT)
@either_loop
async def test_a_cut_at_any_byte_is_never_taken_for_the_end(answer: bytes, body_at: int, closes: bool) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(answer[: next(offsets)])

    offsets = iter(range(len(answer)))
    async with hostile(script) as host, wired(host) as wire:
        for offset in range(len(answer)):
            got, ended = await outcome(wire)
            assert b"hello".startswith(got)
            if closes and offset >= body_at:
                assert ended is None
            else:
                assert ended is (Broken if offset > body_at else Unavailable), offset
            await until(lambda: wire.connections == 0)


@pytest.mark.parametrize(("answer", "body_at", "closes"), CUT.values(), ids=CUT)
@either_loop
async def test_a_reset_at_any_byte_is_never_taken_for_the_end(answer: bytes, body_at: int, closes: bool) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(answer[: next(offsets)])
        peer.reset()

    offsets = iter(range(len(answer)))
    async with hostile(script) as host, wired(host) as wire:
        for offset in range(len(answer)):
            got, ended = await outcome(wire)
            assert b"hello".startswith(got)
            # A reset may overtake what was sent before it.
            assert ended is Unavailable or (ended is Broken and offset > body_at)


GARBAGE = {
    "not http": b"SSH-2.0-OpenSSH_9.6\r\n",
    "both framings": OK + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    "both framings, other way": OK + b"transfer-encoding: chunked\r\ncontent-length: 5\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    "two lengths": OK + b"content-length: 5\r\ncontent-length: 6\r\n\r\nhello!",
    "list of lengths": OK + b"content-length: 5, 6\r\n\r\nhello!",
    "negative length": OK + b"content-length: -5\r\n\r\nhello",
    "signed length": OK + b"content-length: +5\r\n\r\nhello",
    "huge length": OK + b"content-length: 99999999999999999999999\r\n\r\nhello",
    "gzip, chunked": OK + b"transfer-encoding: gzip, chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    "chunked twice": OK + b"transfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    "nearly chunked": OK + b"transfer-encoding: xchunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    "chunked of old": b"HTTP/1.0 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    "negative chunk": CHUNKED + b"-5\r\nhello\r\n0\r\n\r\n",
    "huge chunk": CHUNKED + b"fffffffffffffffff\r\nhello\r\n0\r\n\r\n",
    "bare line feeds": b"HTTP/1.1 200 OK\ncontent-length: 5\n\nhello",
    "folded header": OK + b"a: b\r\n c\r\ncontent-length: 5\r\n\r\nhello",
    "blank before colon": OK + b"content-length : 5\r\n\r\nhello",
    "zero byte": OK + b"a: b\0c\r\ncontent-length: 5\r\n\r\nhello",
    "upgrade": b"HTTP/1.1 101 Go\r\nconnection: upgrade\r\nupgrade: x\r\n\r\nhello",
    "status 99": b"HTTP/1.1 99 No\r\ncontent-length: 5\r\n\r\nhello",
    "status 600": b"HTTP/1.1 600 No\r\ncontent-length: 5\r\n\r\nhello",
    "one huge header": OK + b"a: " + b"b" * (HEAD_BYTES_MAX + 1) + b"\r\ncontent-length: 5\r\n\r\nhello",
    "many headers": OK + b"a: b\r\n" * (HEADERS_MAX + 1) + b"content-length: 5\r\n\r\nhello",
}


@pytest.mark.parametrize("answer", GARBAGE.values(), ids=GARBAGE)
@either_loop
async def test_garbage_instead_of_an_answer_is_unavailable(answer: bytes) -> None:
    async with hostile(answering(answer)) as host, wired(host) as wire:
        assert await outcome(wire) == (b"", Unavailable)
        await until(lambda: host.open == 0)
        assert len(host.peers) == 1


SPOILED = {
    "no end of chunk": b"helloX\r\n0\r\n\r\n",
    "bad size": b"hello\r\nxyz\r\n",
    "negative size": b"hello\r\n-1\r\n",
    "huge size": b"hello\r\nffffffffffffffffff\r\n",
    "bad trailer": b"hello\r\n0\r\na b\r\n\r\n",
}


@pytest.mark.parametrize("rest", SPOILED.values(), ids=SPOILED)
@either_loop
async def test_garbage_amid_an_answer_breaks_it_after_what_was_good(rest: bytes) -> None:
    async with hostile(answering(CHUNKED + b"5\r\n" + rest)) as host, wired(host) as wire:
        assert await outcome(wire) == (b"hello", Broken)
        await until(lambda: host.open == 0)


FLOODS = {
    "interim answers": (b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 40, b"", Unavailable),
    "headers": (OK, b"a: b\r\n" * 100, b"", Unavailable),
    "one header": (OK + b"a: ", b"b" * 1000, b"", Unavailable),
    "one extension": (CHUNKED + b"5;a=", b"b" * 1000, b"", Unavailable),
    "late extension": (CHUNKED + b"5\r\nhello\r\n5;a=", b"b" * 1000, b"hello", Broken),
    "trailers": (CHUNKED + b"5\r\nhello\r\n0\r\n", b"a: b\r\n" * 100, b"hello", Broken),
}


@pytest.mark.parametrize(("start", "flood", "body", "ended"), FLOODS.values(), ids=FLOODS)
@either_loop
async def test_a_flood_of_what_is_not_body_is_bounded(
    start: bytes, flood: bytes, body: bytes, ended: type[RuntimeFault]
) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(start)
        while True:
            await peer.send(flood)

    async with hostile(script) as host, wired(host) as wire:
        assert await outcome(wire) == (body, ended)
        await until(lambda: host.open == 0)


# Time.


@either_loop
async def test_a_call_that_is_late_already_is_not_sent() -> None:
    async with hostile(answering(HELLO)) as host, wired(host) as wire:
        assert await outcome(wire, within_s=0) == (b"", Expired)
        assert not host.peers


@pytest.mark.parametrize(
    ("sent", "got"), [(b"", b""), (OK, b""), (CHUNKED, b""), (CHUNKED + b"5\r\nhello\r\n", b"hello")]
)
@either_loop
async def test_the_deadline_ends_an_answer_wherever_it_is_and_the_server_sees_it(sent: bytes, got: bytes) -> None:
    clock, here = FakeClock(), asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(HELLO)
        await peer.request()
        await peer.send(sent)
        here.set()
        await peer.gone()

    async with hostile(script) as host, wired(host, clock=clock) as wire:
        await outcome(wire)
        late = asyncio.create_task(outcome(wire, within_s=SOON_S))
        await here.wait()
        await until(lambda: only(wire).heard or not sent)
        clock.advance(SOON_S)
        assert await late == (got, Expired)
        await until(lambda: host.open == 0)


@either_loop
async def test_the_deadline_takes_nothing_back_that_is_here_and_leaves_parked_connections_alone() -> None:
    clock = FakeClock()
    async with hostile(answering(HELLO)) as host, wired(host, clock=clock) as wire:
        await outcome(wire)
        async with wire.exchange(wire.head("POST", "/"), (), b"", clock.now_s() + SOON_S) as reply:
            clock.advance(SOON_S)
            await asyncio.sleep(3 * SOON_S)
            assert [frame async for frame in reply.frames] == [b"hello"]
        await outcome(wire, within_s=SOON_S)
        clock.advance(SOON_S)
        await asyncio.sleep(3 * SOON_S)
        assert await outcome(wire) == (b"hello", None)
        assert len(host.peers) == 1


@either_loop
async def test_silence_amid_an_answer_breaks_it() -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(CHUNKED + b"5\r\nhello\r\n")
        await peer.gone()

    async with hostile(script) as host, wired(host, idle_s_max=SOON_S) as wire:
        assert await outcome(wire) == (b"hello", Broken)
        await until(lambda: host.open == 0)


@either_loop
async def test_silence_before_an_answer_is_patience() -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await asyncio.sleep(4 * SOON_S)
        await peer.send(HELLO)

    async with hostile(script) as host, wired(host, idle_s_max=SOON_S) as wire:
        assert await outcome(wire) == (b"hello", None)


@pytest.mark.parametrize("sent", [b"", OK, CHUNKED], ids=["nothing", "half a header", "a header"])
@pytest.mark.parametrize("parked", [False, True])
@either_loop
async def test_silence_before_an_answer_that_must_begin_soon_is_no_patience(sent: bytes, parked: bool) -> None:
    clock, here = FakeClock(), asyncio.Event()

    async def script(peer: Peer) -> None:
        if parked:
            await peer.request()
            await peer.send(HELLO)
        await peer.request()
        await peer.send(sent)
        here.set()
        await peer.gone()

    async def ask(wire: Wire) -> None:
        async with wire.exchange(wire.head("POST", "/"), (), b"", math.inf, clock.now_s() + SOON_S):
            raise AssertionError("it began")

    async with hostile(script) as host, wired(host, clock=clock) as wire:
        if parked:
            await outcome(wire)
        asking = asyncio.create_task(ask(wire))
        await here.wait()
        await until(lambda: only(wire).heard or not sent)
        clock.advance(SOON_S)
        with pytest.raises(Silent):
            await asking
        await until(lambda: host.open == 0)
        assert len(host.peers) == 1, "it was sent again"


@either_loop
async def test_an_answer_that_began_soon_enough_may_take_its_time() -> None:
    clock, go_on = FakeClock(), asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(HELLO[:-2])
        await go_on.wait()
        await peer.send(HELLO[-2:])

    async with (
        hostile(script) as host,
        wired(host, clock=clock) as wire,
        wire.exchange(wire.head("POST", "/"), (), b"", math.inf, clock.now_s() + SOON_S) as reply,
    ):
        clock.advance(2 * SOON_S)
        await asyncio.sleep(2 * SOON_S)
        go_on.set()
        assert b"".join([frame async for frame in reply.frames]) == b"hello"


@either_loop
async def test_a_slow_reader_is_not_the_servers_silence() -> None:
    clock, read = FakeClock(), asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(HELLO[:-2])
        await read.wait()
        await peer.send(HELLO[-2:])

    async with (
        hostile(script) as host,
        wired(host, clock=clock, idle_s_max=SOON_S) as wire,
        wire.exchange(wire.head("POST", "/"), (), b"", math.inf) as reply,
    ):
        connection = only(wire)
        clock.advance(2 * SOON_S)
        await asyncio.sleep(3 * SOON_S)
        read.set()
        await until(lambda: connection.ended)
        assert b"".join([frame async for frame in reply.frames]) == b"hello"


@either_loop
async def test_an_early_timer_of_one_call_does_not_end_the_next() -> None:
    clock, go = FakeClock(), asyncio.Event()

    async def script(peer: Peer) -> None:
        for _ in range(2):
            await peer.request()
            await peer.send(HELLO)
        await peer.request()
        await go.wait()
        await peer.send(HELLO)

    async with hostile(script) as host, wired(host, clock=clock) as wire:
        await outcome(wire)
        await outcome(wire, within_s=SOON_S)
        last = asyncio.create_task(outcome(wire))
        clock.advance(SOON_S)
        await asyncio.sleep(3 * SOON_S)
        go.set()
        assert await last == (b"hello", None)
        assert len(host.peers) == 1


@asynccontextmanager
async def mute() -> AsyncIterator[Hostile]:
    """A port that takes connections and never says a word of TLS."""

    async def script(peer: Peer) -> None:
        await peer.gone()

    async with hostile(script) as host:
        host.url = host.url.replace("http:", "https:")
        yield host


@pytest.mark.parametrize(
    ("within_s", "connect_s_max", "ended"), [(20, SOON_S, Unavailable), (SOON_S, 20, Expired)], ids=["own", "deadline"]
)
@either_loop
async def test_connecting_is_bounded_by_its_own_limit_and_the_deadline(
    within_s: float, connect_s_max: float, ended: type[RuntimeFault]
) -> None:
    async with mute() as host, wired(host, connect_s_max=connect_s_max) as wire:
        assert await outcome(wire, within_s=within_s) == (b"", ended)
        await until(lambda: host.open == 0)


@either_loop
async def test_nobody_there_is_unavailable(tmp_path: Path) -> None:
    async with hostile(answering(HELLO)) as host:
        pass
    async with wired(host) as wire:
        assert await outcome(wire) == (b"", Unavailable)
    async with wired(host, uds=tmp_path / "none") as wire:
        assert await outcome(wire) == (b"", Unavailable)


# The pool.


@either_loop
async def test_the_connection_used_last_is_used_next() -> None:
    async def script(peer: Peer) -> None:
        while True:
            await peer.request()
            await peer.send(OK + b"content-length: 1\r\n\r\n%d" % peer.serial)

    async with hostile(script) as host, wired(host) as wire:
        deadline_s = wire.clock.now_s() + 20
        first = wire.exchange(wire.head("POST", "/"), (), b"", deadline_s)
        async with first, wire.exchange(wire.head("POST", "/"), (), b"", deadline_s):
            pass
        assert wire.parked == 2
        assert [(await call(wire))[1] for _ in range(3)] == [b"0"] * 3


NOT_KEPT = {
    "close": OK + b"connection: close\r\ncontent-length: 5\r\n\r\nhello",
    "surplus answer": HELLO + HELLO,
    "surplus byte": HELLO + b"H",
    "surplus garbage": HELLO + b"\0",
    "surplus after chunks": CHUNKED + b"5\r\nhello\r\n0\r\n\r\n0\r\n\r\n",
}


@pytest.mark.parametrize("answer", NOT_KEPT.values(), ids=NOT_KEPT)
@either_loop
async def test_a_connection_that_is_not_clean_is_not_kept(answer: bytes) -> None:
    async with hostile(answering(answer)) as host, wired(host) as wire:
        for serial in range(3):
            assert await outcome(wire) == (b"hello", None)
            assert wire.parked == 0
            assert len(host.peers) == serial + 1
        await until(lambda: host.open == 0)


@pytest.mark.parametrize(
    "surplus", [HELLO.replace(b"hello", b"ghost"), b"\r\n", b"\0"], ids=["answer", "blank", "byte"]
)
@either_loop
async def test_surplus_that_comes_late_closes_the_parked_connection(
    surplus: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtimes.wire.PARKED_S_MAX", 3_600.0)
    more = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(HELLO)
        if peer.serial == 0:
            await more.wait()
            await peer.send(surplus)
        await peer.gone()

    async with hostile(script) as host, wired(host) as wire:
        assert await outcome(wire) == (b"hello", None)
        assert wire.parked == 1
        more.set()
        await until(lambda: wire.parked == 0)
        assert await outcome(wire) == (b"hello", None)


@either_loop
async def test_leaving_amid_an_answer_closes_and_after_its_arrival_keeps() -> None:
    async with hostile(answering(CHUNKED + b"5\r\nhello\r\n")) as host, wired(host) as wire:
        async with wire.exchange(wire.head("POST", "/"), (), b"", math.inf) as reply:
            assert await anext(reply.frames) == b"hello"
        assert wire.parked == 0
        await until(lambda: host.open == 0)
    async with hostile(answering(HELLO)) as host, wired(host) as wire:
        async with wire.exchange(wire.head("POST", "/"), (), b"", math.inf):
            pass
        assert wire.parked == 1
        assert await outcome(wire) == (b"hello", None)
        assert len(host.peers) == 1


@either_loop
async def test_an_answer_before_the_whole_request_was_sent_costs_the_connection() -> None:
    async def script(peer: Peer) -> None:
        await peer.send(b"HTTP/1.1 413 Too Large\r\ncontent-length: 5\r\n\r\nhello")
        await asyncio.Event().wait()

    async with hostile(script) as host, wired(host) as wire:
        reply, body = await call(wire, bytes(50_000_000))
        assert (reply.status, body) == (413, b"hello")
        assert wire.parked == 0


@either_loop
async def test_a_parked_connection_that_the_server_closes_is_dropped() -> None:
    close = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(HELLO)
        await close.wait()

    async with hostile(script) as host, wired(host) as wire:
        await outcome(wire)
        assert wire.parked == 1
        close.set()
        await until(lambda: wire.connections == 0)
        assert wire.parked == 0


@pytest.mark.parametrize("reset", [False, True], ids=["fin", "reset"])
@either_loop
async def test_a_call_that_meets_a_closing_connection_is_sent_again_once(reset: bool) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(HELLO)
        await peer.request()
        if reset:
            peer.reset()

    async with hostile(script) as host, wired(host) as wire:
        for _ in range(3):
            assert await outcome(wire) == (b"hello", None)
        assert len(host.peers) == 3


@either_loop
async def test_a_call_is_not_sent_again_on_a_fresh_connection_or_after_a_byte() -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        if peer.serial == 0:
            return
        await peer.send(HELLO)
        await peer.request()
        await peer.send(b"H")

    async with hostile(script) as host, wired(host) as wire:
        assert await outcome(wire) == (b"", Unavailable)
        assert len(host.peers) == 1
        assert await outcome(wire) == (b"hello", None)
        assert await outcome(wire) == (b"", Unavailable)
        assert len(host.peers) == 2


@either_loop
async def test_a_connection_parked_for_too_long_is_not_used() -> None:
    clock = FakeClock()
    async with hostile(answering(HELLO)) as host, wired(host, clock=clock) as wire:
        await outcome(wire)
        clock.advance(PARKED_S_MAX / 2)
        await outcome(wire)
        assert len(host.peers) == 1
        clock.advance(PARKED_S_MAX)
        await outcome(wire)
        assert len(host.peers) == 2
        await until(lambda: host.open == 1)


@either_loop
async def test_parked_connections_close_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtimes.wire.PARKED_S_MAX", SOON_S)
    clock = FakeClock()
    async with hostile(answering(HELLO)) as host, wired(host, clock=clock) as wire:
        await outcome(wire)
        await asyncio.sleep(3 * SOON_S)
        assert wire.parked == 1
        clock.advance(SOON_S)
        await until(lambda: host.open == 0)
        assert wire.connections == 0


@either_loop
async def test_calls_beyond_the_places_wait_in_order_and_no_longer_than_their_deadline() -> None:
    async with hostile(answering(HELLO)) as host, wired(host, connections_max=1) as wire:
        done: list[int] = []

        async def numbered(number: int) -> None:
            await call(wire)
            done.append(number)

        async with wire.exchange(wire.head("POST", "/"), (), b"", math.inf):
            calls = [asyncio.create_task(numbered(number)) for number in range(5)]
            await until(lambda: wire.load() == Load(running=1, waiting=5))
            assert await outcome(wire, within_s=SOON_S) == (b"", Expired)
            calls[1].cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        assert done == [0, 2, 3, 4]
        assert len(host.peers) == 1


@either_loop
async def test_a_place_granted_to_a_call_that_is_cancelled_goes_to_the_next() -> None:
    async with hostile(answering(HELLO)) as host, wired(host, connections_max=1) as wire:
        async with wire.exchange(wire.head("POST", "/"), (), b"", math.inf):
            first, second = (asyncio.create_task(call(wire)) for _ in range(2))
            await until(lambda: wire.load().waiting == 2)
        # Leaving has just granted the place to the first, which has not run since.
        first.cancel()
        assert (await second)[1] == b"hello"
        await asyncio.gather(first, return_exceptions=True)
        assert first.cancelled()


# Leaving.


@pytest.mark.parametrize("cancels", [1, 2])
@either_loop
async def test_a_cancel_while_connecting_leaves_nothing(cancels: int) -> None:
    async with mute() as host, wired(host, connections_max=1) as wire:
        for _ in range(3):
            task = asyncio.create_task(outcome(wire))
            await until(lambda: host.open == 1)
            for _ in range(cancels):
                task.cancel()
                await asyncio.sleep(0)
            await asyncio.gather(task, return_exceptions=True)
            assert task.cancelled()
            assert wire.load() == IDLE
            await until(lambda: host.open == 0)


@either_loop
async def test_a_cancel_at_any_turn_of_connecting_leaves_nothing() -> None:
    async with hostile(answering(HELLO)) as host, wired(host, connections_max=1) as wire:
        for turns in range(30):
            task = asyncio.create_task(call(wire))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            assert wire.load() == IDLE
            await until(lambda: wire.connections == wire.parked)
            for connection in tuple(wire._parked):
                wire._parked.remove(connection)
                connection.stop("the test wants a fresh one")
            await until(lambda: host.open == 0)
        assert (await call(wire))[1] == b"hello"


@pytest.mark.parametrize("sent", [b"", OK, CHUNKED + b"5\r\nhello\r\n"], ids=["request", "head", "body"])
@pytest.mark.parametrize("cancels", [1, 2])
@either_loop
async def test_a_cancelled_call_closes_its_connection_even_if_cancelled_twice(sent: bytes, cancels: int) -> None:
    here = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(sent)
        here.set()
        await peer.gone()

    async with hostile(script) as host, wired(host, connections_max=1) as wire:
        task = asyncio.create_task(outcome(wire))
        await here.wait()
        for _ in range(cancels):
            task.cancel()
            await asyncio.sleep(0)
        await asyncio.gather(task, return_exceptions=True)
        assert task.cancelled()
        assert (wire.load(), wire.parked) == (IDLE, 0)
        await until(lambda: host.open == 0)


@either_loop
async def test_frames_end_with_their_exchange_and_never_show_another_call() -> None:
    async with hostile(answering(HELLO)) as host, wired(host) as wire:
        async with wire.exchange(wire.head("POST", "/"), (), b"", math.inf) as reply:
            pass
        async with wire.exchange(wire.head("POST", "/"), (), b"", math.inf):
            with pytest.raises(RuntimeError):
                await anext(reply.frames)


@either_loop
async def test_closing_ends_every_call_and_socket() -> None:
    streaming = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.request()
        if peer.serial == 0:
            await peer.send(CHUNKED + b"5\r\nhello\r\n")
            streaming.set()
        await peer.gone()

    async with hostile(script) as host, wired(host, connections_max=2) as wire:
        first = asyncio.create_task(outcome(wire))
        await streaming.wait()
        others = [asyncio.create_task(outcome(wire)) for _ in range(3)]
        await until(lambda: len(host.peers) == 2)
        await wire.aclose()
        assert await first == (b"hello", Broken)
        assert await asyncio.gather(*others) == [(b"", Unavailable)] * 3
        assert await outcome(wire) == (b"", Unavailable)
        await until(lambda: host.open == 0)


@either_loop
async def test_a_slow_reader_makes_the_server_wait() -> None:
    piece = b"x" * 65_536
    pieces = 1_000

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(OK + b"content-length: %d\r\n\r\n" % (len(piece) * pieces), *[piece] * pieces)
        await peer.gone()

    async with hostile(script) as host, wired(host) as wire:
        async with wire.exchange(wire.head("POST", "/"), (), b"", math.inf) as reply:
            peer = host.peers[0]
            sent_bytes = -1
            while sent_bytes != peer.sent_bytes:  # until the buffers between the two are full
                sent_bytes = peer.sent_bytes
                await asyncio.sleep(SOON_S)
            assert sent_bytes < len(piece) * pieces / 2
            sizes = [len(frame) async for frame in reply.frames]
        assert sum(sizes) == len(piece) * pieces
        assert max(sizes) <= AHEAD_BYTES_MAX + READ_BYTES_MAX
        assert wire.parked == 1


@either_loop
async def test_thousands_of_cancels_leak_nothing_and_mix_nothing_up() -> None:
    rng = random.Random(7)

    async def script(peer: Peer) -> None:
        while True:
            _, canary = await peer.request()
            style = canary[-1] % 4
            for _ in range(canary[-2] % 5):
                await asyncio.sleep(0)
            if style == 0:
                await peer.send(OK + b"content-length: %d\r\n\r\n" % len(canary), canary)
            elif style == 1:
                await peer.send(OK + b"content-length: %d\r\nconnection: close\r\n\r\n" % len(canary) + canary)
                return
            else:
                await peer.send(CHUNKED, *(b"1\r\n%c\r\n" % byte for byte in canary), b"0\r\n\r\n")

    finished = 0

    async def one(number: int) -> None:
        nonlocal finished
        canary = b"%d-%d" % (number, rng.getrandbits(64))
        async with wire.exchange(wire.head("POST", "/"), (), canary, math.inf) as reply:
            got = b""
            async for frame in reply.frames:
                got += frame
                assert canary.startswith(got)
                if number % 11 == 0:
                    return
        assert got == canary
        finished += 1

    async def troubled(number: int) -> None:
        task = asyncio.create_task(one(number))
        if number % 3:
            for _ in range(rng.randrange(60)):
                await asyncio.sleep(0)
            task.cancel()
            if number % 2:
                await asyncio.sleep(0)
                task.cancel()
        (result,) = await asyncio.gather(task, return_exceptions=True)
        assert result is None or isinstance(result, asyncio.CancelledError), result

    async with hostile(script) as host, wired(host, connections_max=5) as wire:
        for start in range(0, 3_000, 20):
            await asyncio.gather(*(troubled(number) for number in range(start, start + 20)))
            assert wire.load() == IDLE
            assert wire.parked <= wire.connections
        await until(lambda: wire.connections == wire.parked)
        await until(lambda: host.open == wire.parked)
        assert wire.parked <= 5
        assert 0 < finished < 3_000
        await wire.aclose()
        await until(lambda: host.open == 0)


@either_loop
async def test_closing_waits_for_the_call_that_connects() -> None:
    async with mute() as host, wired(host) as wire:
        task = asyncio.create_task(outcome(wire))
        await until(lambda: host.open == 1)
        closing = asyncio.create_task(wire.aclose())
        await asyncio.sleep(0)
        assert not closing.done()
        task.cancel()
        await closing
        await until(lambda: host.open == 0)


@either_loop
async def test_closing_at_any_turn_of_a_call_leaves_nothing() -> None:
    async with hostile(answering(HELLO)) as host:
        for turns in range(20):
            async with wired(host) as wire:
                task = asyncio.create_task(outcome(wire))
                for _ in range(turns):
                    await asyncio.sleep(0)
                await wire.aclose()
                assert await task in ((b"", Unavailable), (b"hello", None))
            await until(lambda: host.open == 0)


# TLS.


@pytest.fixture(scope="module")
def certified(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ssl.SSLContext, ssl.SSLContext]]:
    """A server's context and a client's that trusts it."""
    openssl = shutil.which("openssl")
    if not openssl:
        pytest.skip("needs the openssl command to make a certificate")
    folder = tmp_path_factory.mktemp("tls")
    key, certificate = folder / "key.pem", folder / "cert.pem"
    made = f"req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -keyout {key} -out {certificate}"
    whose = "-subj /CN=localhost -addext subjectAltName=DNS:localhost"
    subprocess.run([openssl, *made.split(), *whose.split()], check=True, capture_output=True)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(certificate, key)
    yield server, ssl.create_default_context(cafile=certificate)


Certified = tuple[ssl.SSLContext, ssl.SSLContext]


@either_loop
async def test_tls_is_verified_names_its_host_and_keeps_alive(certified: Certified) -> None:
    server, client = certified
    names: list[str | None] = []
    server.sni_callback = lambda _socket, name, _context: names.append(name)
    async with hostile(answering(HELLO), tls=server) as host:
        async with wired(host, ssl_context=client) as wire:
            assert [await outcome(wire) for _ in range(2)] == [(b"hello", None)] * 2
            assert len(host.peers) == 1
        async with wired(host) as wire:
            assert await outcome(wire) == (b"", Unavailable)
    assert set(names) == {"localhost"}


@pytest.mark.parametrize("goodbye", [True, False], ids=["close_notify", "cut"])
@either_loop
async def test_only_a_said_goodbye_ends_a_body_over_tls(certified: Certified, goodbye: bool) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(OK + b"connection: close\r\n\r\nhello")
        if not goodbye:
            peer.cut()

    server, client = certified
    async with hostile(script, tls=server) as host, wired(host, ssl_context=client) as wire:
        assert await outcome(wire) == (b"hello", None if goodbye else Broken)


@either_loop
async def test_leaving_over_tls_closes_the_connection(certified: Certified) -> None:
    server, client = certified
    script = answering(CHUNKED + b"5\r\nhello\r\n")
    async with hostile(script, tls=server) as host, wired(host, ssl_context=client) as wire:
        async with wire.exchange(wire.head("POST", "/"), (), b"", math.inf):
            pass
        await until(lambda: host.open == 0)
