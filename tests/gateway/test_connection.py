"""What must not be read is refused before it is parsed: raw bytes against a real server on loopback."""

import asyncio
import json
import re
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest

from gateway.call import Bounds
from gateway.edge.request import Handler, Request
from gateway.edge.server import Server
from gateway.errors import Forbidden
from runtimes.clock import SystemClock
from tests.fakes import until

BOUNDS = {"header_bytes_max": 2_000, "headers_max": 8, "body_bytes_max": 4_096}
GET = b"GET /ok HTTP/1.1\r\nhost: a\r\n\r\n"


class Doorman:
    """Answers as its path says."""

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self.ended = asyncio.Event()
        self.go_on = asyncio.Event()

    def enter(self, request: Request) -> Handler:
        if request.path == b"/early":
            self.begun.set()
        if request.path == b"/closed":
            raise Forbidden("not through this door")
        return self.answer

    async def answer(self, request: Request) -> None:
        self.begun.set()
        try:
            await self._answer(request)
        except asyncio.CancelledError:
            self.ended.set()
            raise

    async def _answer(self, request: Request) -> None:
        body = request.body
        match request.path:
            case b"/wait":
                await self.go_on.wait()
            case b"/fault":
                raise ZeroDivisionError
            case b"/silent":
                return
            case b"/late":
                with suppress(asyncio.CancelledError):
                    await self.go_on.wait()
                if body:
                    request.keep_alive = False
            case b"/large":
                body = b"x" * 8_000_000
            case b"/key":
                body = b", ".join(name + b": " + value for name, value in request.headers)
            case b"/stream":
                request.begin(200, b"", b"first")
                await self.go_on.wait()
                request.write(b"second")
                request.end(b"last")
                return
            case b"/flood":
                request.begin(200, b"", b"x")
                while True:
                    if request.full:
                        await request.drained()
                    request.write(b"x" * 100_000)
        request.respond(200, b"", body or request.path)


class Peer:
    """A client that says exactly what it is told to."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def answer(self) -> tuple[int, bytes]:
        head = (await self.reader.readuntil(b"\r\n\r\n")).lower()
        status = int(head.split(b" ", 2)[1])
        length = int(head.split(b"content-length:", 1)[1].split(b"\r\n", 1)[0])
        return status, await self.reader.readexactly(length)

    async def refused(self) -> int:
        """The status of a refusal, which must have OpenAI's shape and end the connection."""
        status, body = await self.answer()
        error = json.loads(body)["error"]
        assert {"message", "type", "param", "code"} == error.keys()
        assert await self.reader.read() == b""
        return status

    async def closed(self) -> bool:
        try:
            return await self.reader.read() == b""
        except ConnectionResetError:
            return True


class Site:
    def __init__(self, app: Doorman, port: int, server: Server) -> None:
        self.app = app
        self.port = port
        self.server = server
        self.peers: list[Peer] = []

    async def peer(self) -> Peer:
        self.peers.append(Peer(*await asyncio.open_connection("127.0.0.1", self.port)))
        return self.peers[-1]


@asynccontextmanager
async def serving(**bounds: Any) -> AsyncIterator[Site]:
    app = Doorman()
    server = Server(door=app, bounds=Bounds(**{**BOUNDS, **bounds}), clock=SystemClock())
    with socket.create_server(("127.0.0.1", 0)) as listening:
        async with server.serving(listening):
            site = Site(app, listening.getsockname()[1], server)
            yield site
            for peer in site.peers:
                peer.writer.transport.abort()
            app.go_on.set()
            await until(lambda: not server.busy)


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    async with serving() as site:
        yield site


@pytest.fixture
async def peer(site: Site) -> Peer:
    return await site.peer()


def post(body: bytes, path: bytes = b"/ok", *headers: bytes) -> bytes:
    head = [b"POST " + path + b" HTTP/1.1", b"host: a", b"content-length: %d" % len(body), *headers]
    return b"\r\n".join(head) + b"\r\n\r\n" + body


@pytest.mark.parametrize("host", [b"a", b"localhost:8000", b"127.0.0.1", b"[::1]:80", b"A-b.example.com"])
async def test_a_wellformed_host_passes(peer: Peer, host: bytes) -> None:
    peer.send(b"GET /ok HTTP/1.1\r\nHost: " + host + b"\r\n\r\n")
    assert await peer.answer() == (200, b"/ok")


@pytest.mark.parametrize(
    "request_",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: a\r\nHost: a\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: \r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: a b\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: a/evil\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: a:b\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: a@b\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: a,b\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 4\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 4\r\ncontent-length: 5\r\n\r\nabcde",
        b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: -4\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 99999999999999999999999\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: gzip\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"GET / HTTP/1.1\r\nhost: a\r\n bad: folded\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost : a\r\n\r\n",
        b"GET / HTTP/9.9\r\nhost: a\r\n\r\n",
        b"NONSENSE\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    ],
)
async def test_what_is_not_clearly_http_is_a_400(peer: Peer, request_: bytes) -> None:
    peer.send(request_)
    assert await peer.refused() == 400


@pytest.mark.parametrize(
    "request_",
    [
        b"GET /" + b"a" * 3_000 + b" HTTP/1.1\r\nhost: a\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: a\r\nx: " + b"a" * 3_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: a\r\n" + b"x: y\r\n" * 20 + b"\r\n",
        b"GET / HTTP/1.1\r\nhost: a\r\n" + b"".join(b"x%d: %b\r\n" % (i, b"y" * 400) for i in range(6)) + b"\r\n",
    ],
)
async def test_a_header_too_large_is_a_431(peer: Peer, request_: bytes) -> None:
    peer.send(request_)
    assert await peer.refused() == 431


@pytest.mark.parametrize(
    "request_",
    [
        b"GET /v2 HTTP/1.1\r\n\r\n",
        b"GET /v2/models/a HTTP/1.1\r\nhost: a b\r\n\r\n",
        b"GET /v2/health/live HTTP/1.1\r\nhost: a\r\nx: " + b"a" * 5_000_000,
        b"GET /v2/health/live HTTP/1.1\r\nhost: a\r\nno field\r\n\r\n",
        b"POST /v2/models/a/infer HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\ntransfer-encoding: chunked\r\n\r\n",
    ],
    ids=["no host", "a malformed host", "too long", "no field", "two lengths"],
)
async def test_a_request_that_is_refused_under_v2_is_told_in_that_protocol_s_shape(peer: Peer, request_: bytes) -> None:
    peer.send(request_)
    status, body = await peer.answer()
    assert status in (400, 431)
    told = json.loads(body)
    assert [*told] == ["error"]
    assert isinstance(told["error"], str)
    assert await peer.closed()


async def test_a_refusal_can_be_read_while_still_sending(peer: Peer) -> None:
    peer.send(b"GET / HTTP/1.1\r\nhost: a\r\nx: " + b"a" * 5_000_000)
    assert await peer.refused() == 431


@pytest.mark.parametrize("begun", [b"", b"GET / HT", b"GET / HTTP/1.1\r\nhost: a\r\nx-", b"\r\n\r\n"])
async def test_a_slow_header_is_a_408(begun: bytes) -> None:
    async with serving(header_s_max=0.05) as site:
        peer = await site.peer()
        peer.send(begun)
        assert await peer.refused() == 408


@pytest.mark.parametrize("begun", [b"GET / HT", b"\r\n"])
async def test_a_slow_second_header_is_a_408_too(begun: bytes) -> None:
    async with serving() as site:
        peer = await site.peer()
        peer.send(GET)
        await peer.answer()
        (connection,) = site.server.connections
        connection._bounds = Bounds(header_s_max=0.05)  # only now: the first must not be late, however slow the machine
        peer.send(begun)
        assert await peer.refused() == 408


async def test_a_header_in_small_pieces_passes(peer: Peer) -> None:
    for byte in GET:
        peer.send(bytes([byte]))
        await peer.writer.drain()
    assert await peer.answer() == (200, b"/ok")


@pytest.mark.parametrize("framing", [b"content-length: 9", b"transfer-encoding: chunked"])
async def test_a_slow_body_is_a_408(framing: bytes) -> None:
    async with serving(body_s_max=0.05, header_s_max=0.05) as site:
        peer = await site.peer()
        peer.send(b"POST /ok HTTP/1.1\r\nhost: a\r\n" + framing + b"\r\n\r\n")
        assert (await peer.answer())[0] == 408
        assert await peer.closed()


async def test_blanks_around_a_field_s_value_are_none_of_it(peer: Peer) -> None:
    peer.send(b"GET /ok HTTP/1.1\r\nhost: \t a \t\r\n\r\n")
    assert await peer.answer() == (200, b"/ok")


async def test_a_body_of_the_largest_size_passes(peer: Peer) -> None:
    peer.send(post(b"x" * 4_096))
    assert await peer.answer() == (200, b"x" * 4_096)


async def test_a_body_too_large_is_a_413_and_the_connection_goes_on(peer: Peer) -> None:
    peer.send(post(b"x" * 4_097) + GET)
    assert (await peer.answer())[0] == 413
    assert await peer.answer() == (200, b"/ok")


async def test_a_chunked_body_too_large_is_a_413(peer: Peer) -> None:
    peer.send(b"POST /ok HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n")
    for _ in range(300):
        peer.send(b"1000\r\n" + b"x" * 4_096 + b"\r\n")
    assert (await peer.answer())[0] == 413
    peer.send(b"0\r\n\r\n" + GET)
    assert await peer.answer() == (200, b"/ok")


async def test_a_body_is_not_late_while_what_came_before_it_is_answered() -> None:
    async with serving(body_s_max=0.2) as site:
        peer = await site.peer()
        peer.send(post(b"", b"/wait"))
        await site.app.begun.wait()
        peer.send(GET + b"POST /ok HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\n\r\n")
        await asyncio.sleep(0.3)
        site.app.go_on.set()
        peer.send(b"hi")
        assert [await peer.answer() for _ in range(3)] == [(200, b"/wait"), (200, b"/ok"), (200, b"hi")]


async def test_a_413_comes_before_the_body_has_been_sent(peer: Peer) -> None:
    peer.send(b"POST /ok HTTP/1.1\r\nhost: a\r\ncontent-length: 1000000000000\r\n\r\nxxx")
    assert (await peer.answer())[0] == 413


async def test_the_rest_of_a_refused_body_is_not_waited_for_for_ever() -> None:
    async with serving(header_s_max=0.05) as site:
        peer = await site.peer()
        peer.send(b"POST /ok HTTP/1.1\r\nhost: a\r\ncontent-length: 1000000\r\n\r\nxxx")
        await peer.answer()
        assert await peer.closed()


async def test_a_connection_is_used_again(peer: Peer) -> None:
    for number in range(5):
        peer.send(post(b"%d" % number))
        assert await peer.answer() == (200, b"%d" % number)


async def test_pipelined_requests_are_answered_in_order(peer: Peer) -> None:
    peer.send(post(b"one") + GET + post(b"three"))
    assert [await peer.answer() for _ in range(3)] == [(200, b"one"), (200, b"/ok"), (200, b"three")]


@pytest.mark.parametrize(
    "garbage", [b"NONSENSE\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", post(b"", b"/ok")[:-4] + b"\0\r\n\r\n"]
)
async def test_garbage_behind_an_answer_under_way_is_told_behind_it(site: Site, peer: Peer, garbage: bytes) -> None:
    peer.send(post(b"", b"/stream"))
    await peer.reader.readuntil(b"first\r\n")
    peer.send(garbage + GET)
    site.app.go_on.set()
    assert await peer.reader.readuntil(b"0\r\n\r\n") == b"6\r\nsecond\r\n4\r\nlast\r\n0\r\n\r\n"
    assert await peer.refused() == 400


async def test_garbage_behind_requests_in_hand_is_told_behind_their_answers(site: Site, peer: Peer) -> None:
    peer.send(post(b"", b"/wait") + GET + b"NONSENSE\r\n\r\n")
    await site.app.begun.wait()
    site.app.go_on.set()
    assert [await peer.answer() for _ in range(2)] == [(200, b"/wait"), (200, b"/ok")]
    assert await peer.refused() == 400


@pytest.mark.parametrize(
    "more",
    [
        GET,
        b"NONSENSE\0\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"POST /ok HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\nexpect: 100-continue\r\n\r\n",
    ],
)
async def test_behind_the_last_answer_nothing_is_said(site: Site, peer: Peer, more: bytes) -> None:
    site.server.leaving = True
    peer.send(GET.replace(b"/ok", b"/closed") + more)
    assert await peer.refused() == 403


async def test_who_reads_slowly_is_not_told_that_what_it_sent_ahead_is_late() -> None:
    async with serving(header_s_max=0.05) as site:
        peer = await site.peer()
        peer.send(GET.replace(b"/ok", b"/large") + GET + GET[:20])
        await until(lambda: any(connection.paused for connection in site.server.connections))
        peer.send(GET[20:])
        await asyncio.sleep(0.3)
        assert await peer.answer() == (200, b"x" * 8_000_000)
        assert [await peer.answer() for _ in range(2)] == [(200, b"/ok")] * 2


async def test_expecting_to_continue_is_answered_before_the_body(peer: Peer) -> None:
    peer.send(b"POST /ok HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\nexpect: 100-continue\r\n\r\n")
    assert await peer.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    peer.send(b"hi")
    assert await peer.answer() == (200, b"hi")


@pytest.mark.parametrize("protocol", [b"h2c", b"websocket"])
async def test_an_offer_to_upgrade_is_declined_and_the_request_answered(peer: Peer, protocol: bytes) -> None:
    offer = b"connection: keep-alive, Upgrade, HTTP2-Settings", b"upgrade: " + protocol, b"http2-settings: AAMAAABk"
    peer.send(post(b"hi", b"/ok", *offer) + post(b"ho", b"/ok", *offer) + post(b"ha", b"/ok"))
    assert [await peer.answer() for _ in range(3)] == [(200, b"hi"), (200, b"ho"), (200, b"ha")]
    peer.send(post(b"x" * 10, b"/ok", *offer)[:-9])
    peer.send(b"x" * 9)
    assert await peer.answer() == (200, b"x" * 10)


async def test_any_number_of_offers_is_declined(peer: Peer) -> None:
    offer = b"connection: upgrade", b"upgrade: h2c"
    peer.send(post(b"hi", b"/ok", *offer) * 2_000)
    assert [await peer.answer() for _ in range(2_000)] == [(200, b"hi")] * 2_000


async def test_http_1_0_needs_no_host_and_is_told_of_no_continuing(peer: Peer) -> None:
    old = b"POST /ok HTTP/1.0\r\nconnection: keep-alive\r\ncontent-length: 2\r\nexpect: 100-continue\r\n\r\nhi"
    peer.send(old)
    assert await peer.answer() == (200, b"hi")
    peer.send(old.replace(b"1.0", b"1.1"))
    assert await peer.refused() == 400


@pytest.mark.parametrize("version", [b"0.9", b"2.0"])
async def test_other_versions_are_refused(peer: Peer, version: bytes) -> None:
    peer.send(b"GET /ok HTTP/%b\r\nhost: a\r\n\r\n" % version)
    assert await peer.refused() == 400


async def test_a_proxy_s_tunnel_is_refused(peer: Peer) -> None:
    peer.send(b"CONNECT a:80 HTTP/1.1\r\nhost: a:80\r\n\r\n")
    assert await peer.refused() == 400


@pytest.mark.parametrize(
    "request_",
    [
        post(b"", b"/wait"),
        post(b"", b"/stream"),
        post(b"", b"/flood"),
    ],
    ids=["before an answer", "amid an answer", "amid a flood"],
)
async def test_leaving_ends_the_call_at_once(site: Site, peer: Peer, request_: bytes) -> None:
    peer.send(request_)
    await site.app.begun.wait()
    peer.writer.transport.abort()
    async with asyncio.timeout(5):
        await site.app.ended.wait()
    await until(lambda: site.server.busy == 0 and not site.server.connections)


async def test_a_client_that_does_not_read_is_cut_off() -> None:
    async with serving(write_s_max=0.05) as site:
        peer = await site.peer()
        peer.writer.transport.pause_reading()  # type: ignore[attr-defined]
        peer.send(post(b"", b"/flood"))
        async with asyncio.timeout(5):
            await site.app.ended.wait()
        await until(lambda: not site.server.connections)
        peer.writer.transport.abort()


async def test_connections_are_limited_and_then_free_again() -> None:
    async with serving(connections_max=2) as site:
        peers = [await site.peer() for _ in range(2)]
        for peer in peers:
            peer.send(GET)
            await peer.answer()
        late = await site.peer()
        assert await late.refused() == 503
        peers[0].writer.close()
        await until(lambda: len(site.server.connections) == 1)
        again = await site.peer()
        again.send(GET)
        assert await again.answer() == (200, b"/ok")


CHUNKED = b"POST /key HTTP/1.1\r\nhost: a\r\nauthorization: Bearer good\r\ntransfer-encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    "trailer", [b"", b"authorization: Bearer bad\r\n", b"host: b\r\nhost: c\r\n", b"x-api-key: bad\r\n"]
)
async def test_a_trailer_is_dropped_and_never_mistaken_for_the_header(peer: Peer, trailer: bytes) -> None:
    peer.send(CHUNKED + b"2\r\nhi\r\n0\r\n" + trailer + b"\r\n" + GET)
    assert await peer.answer() == (200, b"host: a, authorization: Bearer good, transfer-encoding: chunked")
    assert await peer.answer() == (200, b"/ok")


@pytest.mark.parametrize("piece", [b"x: y\r\n", b"x" * 6], ids=["of fields", "of one field"])
async def test_a_trailer_without_end_is_a_431(peer: Peer, piece: bytes) -> None:
    peer.send(CHUNKED + b"2\r\nhi\r\n0\r\n")
    for _ in range(10):
        peer.send(piece * 1_000)
        await peer.writer.drain()
        await asyncio.sleep(0)
    assert await peer.refused() == 431


async def test_a_chunk_extension_without_end_is_a_431(peer: Peer) -> None:
    peer.send(CHUNKED + b"2;" + b"x" * 10_000)
    for _ in range(10):
        peer.send(b"x" * 10_000)
        await peer.writer.drain()
        await asyncio.sleep(0)
    assert await peer.refused() == 431


async def test_a_trailer_that_stalls_is_a_408() -> None:
    async with serving(body_s_max=0.05, header_s_max=0.05) as site:
        peer = await site.peer()
        peer.send(CHUNKED + b"2\r\nhi\r\n0\r\nx: ")
        assert (await peer.answer())[0] == 408
        assert await peer.closed()


async def test_thousands_of_small_requests_on_one_connection_are_no_large_header(peer: Peer) -> None:
    count = 3_000
    peer.send(GET * count)
    for _ in range(count):
        assert await peer.answer() == (200, b"/ok")


async def test_a_body_in_many_pieces_is_no_large_header(peer: Peer) -> None:
    peer.send(CHUNKED.replace(b"/key", b"/ok"))
    for _ in range(600):
        peer.send(b"1\r\nx\r\n")
        await peer.writer.drain()
    peer.send(b"0\r\n\r\n")
    assert await peer.answer() == (200, b"x" * 600)


@pytest.mark.parametrize("body", [b"", b"and close"])
async def test_an_answer_to_a_client_that_has_just_left_goes_nowhere(site: Site, peer: Peer, body: bytes) -> None:
    peer.send(post(body, b"/late"))
    await site.app.begun.wait()
    (connection,) = site.server.connections
    peer.writer.transport.abort()
    await until(lambda: not site.server.connections)
    for _ in range(5):
        await asyncio.sleep(0)
    assert (connection.busy, connection._timer, connection._write_timer) == (False, None, None)


async def test_leaving_amid_the_body_leaves_nothing_behind(site: Site, peer: Peer) -> None:
    peer.send(b"POST /early HTTP/1.1\r\nhost: a\r\ncontent-length: 9\r\n\r\nhalf")
    await site.app.begun.wait()
    peer.writer.transport.abort()
    await until(lambda: site.server.busy == 0 and not site.server.connections)


async def test_a_door_refuses_by_the_header_alone_and_the_connection_goes_on(peer: Peer) -> None:
    peer.send(b"POST /closed HTTP/1.1\r\nhost: a\r\ncontent-length: 4\r\n\r\n")
    assert (await peer.answer())[0] == 403
    peer.send(b"body" + GET)
    assert await peer.answer() == (200, b"/ok")


async def test_thousands_of_refusals_in_one_read_are_answered_one_by_one(peer: Peer) -> None:
    peer.send(post(b"x", b"/closed") * 2_000 + GET)
    for _ in range(2_000):
        assert (await peer.answer())[0] == 403
    assert await peer.answer() == (200, b"/ok")


@pytest.mark.parametrize("path", [b"/fault", b"/silent"])
async def test_a_handler_that_ends_without_an_answer_is_no_empty_answer(peer: Peer, path: bytes) -> None:
    peer.send(post(b"", path))
    assert await peer.closed()


async def test_a_request_that_says_close_is_answered_whole_and_then_closed(peer: Peer) -> None:
    peer.send(post(b"x" * 4_000, b"/ok", b"connection: close"))
    assert await peer.answer() == (200, b"x" * 4_000)
    assert await peer.closed()


async def test_to_an_http_1_0_client_a_stream_ends_with_the_connection(site: Site, peer: Peer) -> None:
    peer.send(b"GET /stream HTTP/1.0\r\nhost: a\r\n\r\n")
    site.app.go_on.set()
    head, _, body = (await peer.reader.read()).partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in head.lower()
    assert body == b"firstsecondlast"


async def test_head_has_the_header_of_an_answer_and_no_body(peer: Peer) -> None:
    peer.send(GET.replace(b"GET", b"HEAD") + GET)
    assert b"content-length: 3" in (await peer.reader.readuntil(b"\r\n\r\n")).lower()
    assert await peer.answer() == (200, b"/ok")


async def test_a_target_that_names_the_server_too_is_taken(peer: Peer) -> None:
    peer.send(b"GET http://a/ok?x=1 HTTP/1.1\r\nhost: a\r\n\r\n")
    assert await peer.answer() == (200, b"/ok")


async def test_answers_carry_the_date(peer: Peer) -> None:
    peer.send(GET)
    assert re.search(
        rb"\r\ndate: \w{3}, \d\d \w{3} \d{4} [\d:]{8} gmt\r\n", (await peer.reader.readuntil(b"\r\n\r\n")).lower()
    )


async def test_stopping_lets_what_is_under_way_end_and_closes_the_rest(site: Site) -> None:
    busy, idle = await site.peer(), await site.peer()
    busy.send(post(b"", b"/wait"))
    await site.app.begun.wait()
    for connection in site.server.connections:
        connection.shut_down()
    assert await idle.closed()
    site.app.go_on.set()
    assert (await busy.answer())[0] == 200
    assert await busy.closed()
