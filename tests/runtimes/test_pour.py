"""An answer that is poured is the answer that is read: the same bytes, the same end, and nothing more once the sink has
had enough, has failed, or its call was left."""

import asyncio
import itertools
import math
import random
from collections.abc import Awaitable, Callable, Sequence

import httpx
import pytest
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st

from runtimes.connection import AHEAD_BYTES_MAX
from runtimes.contract import Broken, Reply, RuntimeFault
from runtimes.wire import Wire
from tests.fakes import FakeClock, until
from tests.runtimes.hostile import Peer, answering, either_loop, hostile
from tests.runtimes.test_wire import CHUNKED, CUT, IDLE, OK, SOON_S, Answer, answers, only, wired

LOOPS = pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])


class Bucket:
    """A Sink that is full after each piece for as many turns of the loop as `full` says, one entry a piece and over
    again. It fails the test if it is given anything while it is full, is done, or has failed."""

    def __init__(self, full: Sequence[int] = (0,), *, done_at: float = math.inf, fails_at: float = math.inf) -> None:
        self.got = b""
        self.done = False
        self._full = itertools.cycle(full)
        self._turns = 0
        self._closed = False
        self._done_at = done_at
        self._fails_at = fails_at

    def take(self, part: bytes) -> bool:
        assert part, "a piece of nothing"
        assert not (self._turns or self.done or self._closed), "it had said that it was enough"
        if len(self.got) + len(part) >= self._fails_at:
            self._closed = True
            raise Overflow
        self.got += part
        self.done = len(self.got) >= self._done_at
        self._turns = next(self._full)
        return not (self._turns or self.done)

    async def drained(self) -> None:
        while self._turns:
            await asyncio.sleep(0)
            self._turns -= 1


class Overflow(Exception):
    """What a sink may raise."""


async def read(reply: Reply) -> bytes:
    return b"".join([frame async for frame in reply.frames])


async def outcome(wire: Wire, how: Callable[[Reply, bytearray], Awaitable[None]]) -> tuple[bytes, object]:
    """Status, headers and bytes that came, and what ended them."""
    got = bytearray()
    try:
        async with wire.exchange(wire.head("POST", "/v1/x"), (), b"{}", wire.clock.now_s() + 20) as reply:
            await how(reply, got)
    except RuntimeFault as fault:
        return bytes(got), type(fault)
    return bytes(got), (reply.status, reply.headers)


async def by_frames(reply: Reply, got: bytearray) -> None:
    async for frame in reply.frames:
        got += frame


def by_pouring(full: Sequence[int]) -> Callable[[Reply, bytearray], Awaitable[None]]:
    async def pour(reply: Reply, got: bytearray) -> None:
        bucket = Bucket(full)
        assert reply.pour is not None
        try:
            await reply.pour(bucket)
        finally:
            got += bucket.got

    return pour


FULL = st.lists(st.integers(0, 3), min_size=1, max_size=5)


def sliced(raw: bytes, data: st.DataObject) -> list[bytes]:
    points = sorted(data.draw(st.sets(st.integers(1, max(1, len(raw) - 1)), max_size=8)))
    return [raw[i:j] for i, j in itertools.pairwise([0, *points, len(raw)])]


@LOOPS
@settings(max_examples=100, deadline=None)
@given(answer=answers(), full=FULL, data=st.data())
def test_it_is_what_is_read_and_what_httpx_reads(
    loop: Callable[[], asyncio.AbstractEventLoop], answer: Answer, full: list[int], data: st.DataObject
) -> None:
    slices = sliced(answer.raw, data)

    async def script(peer: Peer) -> None:
        while True:
            await peer.request()
            await peer.send(*slices)
            if answer.closes:
                return

    async def compare() -> None:
        async with hostile(script) as host, wired(host) as wire:
            async with httpx.AsyncClient(trust_env=False, verify=False) as peer:
                theirs = await peer.post(host.url, content=b"{}")
            for _ in range(2):
                poured = await outcome(wire, by_pouring(full))
                assert poured == await outcome(wire, by_frames)
                assert poured[0] == theirs.content
            assert wire.parked == (0 if answer.closes else 1)

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(compare())


@st.composite
def spoiled(draw: st.DrawFn) -> bytes:
    """An answer with a few of its bytes changed, left out, doubled, or cut off."""
    raw = bytearray(draw(answers()).raw)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(raw) - 1)))
        match draw(st.sampled_from(["change", "leave out", "double", "cut"])):
            case "change":
                raw[at : at + 1] = draw(st.sampled_from([b"\r", b"\n", b"\0", b"0", b"f", b":", b" ", b";", b"\xff"]))
            case "leave out":
                del raw[at : at + draw(st.integers(1, 4))]
            case "double":
                raw[at:at] = raw[at : at + draw(st.integers(1, 40))]
            case _:
                del raw[at:]
    return bytes(raw)


@LOOPS
@settings(max_examples=150, deadline=None)
@given(raw=spoiled(), full=FULL, data=st.data())
def test_what_is_spoiled_ends_alike(
    loop: Callable[[], asyncio.AbstractEventLoop], raw: bytes, full: list[int], data: st.DataObject
) -> None:
    slices = sliced(raw, data)

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(*slices)

    async def compare() -> None:
        async with hostile(script) as host, wired(host) as wire:
            poured = await outcome(wire, by_pouring(full))
            await until(lambda: wire.connections == 0)
            assert poured == await outcome(wire, by_frames)

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(compare())


@pytest.mark.parametrize(("answer", "closes"), [(raw, closes) for raw, _, closes in CUT.values()], ids=CUT)
@either_loop
async def test_a_cut_at_any_byte_is_never_taken_for_the_end(answer: bytes, closes: bool) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(answer[: next(offsets)])

    offsets = iter([offset for offset in range(len(answer)) for _ in range(2)])
    async with hostile(script) as host, wired(host) as wire:
        for _ in range(len(answer)):
            poured = await outcome(wire, by_pouring([0, 1]))
            assert poured == await outcome(wire, by_frames)
            assert closes or isinstance(poured[1], type)
            await until(lambda: wire.connections == 0)


STREAM = [CHUNKED, *(b"1\r\n%c\r\n" % byte for byte in b"abcdefgh"), b"0\r\n\r\n"]


@pytest.mark.parametrize("full", [[0], [1], [0, 2]])
@pytest.mark.parametrize("fails_at", range(1, 9))
@either_loop
async def test_what_a_sink_raises_is_raised_and_ends_the_pouring(fails_at: int, full: list[int]) -> None:
    async with hostile(answering(*STREAM)) as host, wired(host) as wire:
        bucket = Bucket(full, fails_at=fails_at)
        with pytest.raises(Overflow):
            async with wire.exchange(wire.head("POST", "/"), (), b"", math.inf) as reply:
                assert reply.pour is not None
                await reply.pour(bucket)
        assert b"abcdefgh".startswith(bucket.got)
        assert len(bucket.got) < fails_at
        assert wire.load() == IDLE
        assert await outcome(wire, by_frames) == (b"abcdefgh", (200, ()))


@pytest.mark.parametrize("full", [[0], [1], [0, 2]])
@pytest.mark.parametrize("done_at", range(1, 9))
@either_loop
async def test_a_sink_that_is_done_gets_no_more_and_the_rest_can_be_read(done_at: int, full: list[int]) -> None:
    async with hostile(answering(*STREAM)) as host, wired(host) as wire:
        bucket = Bucket(full, done_at=done_at)
        async with wire.exchange(wire.head("POST", "/"), (), b"", math.inf) as reply:
            assert reply.pour is not None
            await reply.pour(bucket)
            assert bucket.done
            assert len(bucket.got) >= done_at
            assert bucket.got + await read(reply) == b"abcdefgh"
        assert wire.parked == 1


@either_loop
async def test_a_sink_that_is_done_does_not_wait_for_the_end() -> None:
    async with hostile(answering(CHUNKED + b"5\r\nhello\r\n")) as host, wired(host) as wire:
        bucket = Bucket(done_at=5)
        async with wire.exchange(wire.head("POST", "/"), (), b"", math.inf) as reply:
            assert reply.pour is not None
            await reply.pour(bucket)
        assert (bucket.got, wire.parked) == (b"hello", 0)


@pytest.mark.parametrize("cancels", [1, 2])
@pytest.mark.parametrize("full", [[0], [3], [0, 1, 2]], ids=str)
@either_loop
async def test_a_cancel_in_any_turn_ends_the_pouring_and_leaves_nothing(full: list[int], cancels: int) -> None:
    async with hostile(answering(*STREAM)) as host, wired(host, connections_max=1) as wire:
        cancelled = 0
        for turns in itertools.count():
            bucket = Bucket(full)

            async def pour(bucket: Bucket = bucket) -> None:
                async with wire.exchange(wire.head("POST", "/"), (), b"", math.inf) as reply:
                    assert reply.pour is not None
                    await reply.pour(bucket)

            task = asyncio.create_task(pour())
            for _ in range(turns):
                await asyncio.sleep(0)
            for _ in range(cancels):
                task.cancel()
                await asyncio.sleep(0)
            await asyncio.gather(task, return_exceptions=True)
            cancelled += task.cancelled()
            got = bucket.got
            assert wire.load() == IDLE
            await until(lambda: wire.connections == wire.parked)
            assert bucket.got is got, "poured on after the call was left"
            if not task.cancelled():
                break
        assert got == b"abcdefgh"
        assert cancelled > 5


@either_loop
async def test_a_sink_that_stays_full_makes_the_server_wait() -> None:
    piece = b"x" * 65_536
    pieces = 1_000

    class Stuck(Bucket):
        def __init__(self) -> None:
            super().__init__([1])
            self.opened = asyncio.Event()
            self.size = 0

        def take(self, part: bytes) -> bool:
            self.size += len(part)
            return self.opened.is_set()

        async def drained(self) -> None:
            await self.opened.wait()

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(OK + b"content-length: %d\r\n\r\n" % (len(piece) * pieces), *[piece] * pieces)
        await peer.gone()

    async with hostile(script) as host, wired(host) as wire:
        async with wire.exchange(wire.head("POST", "/"), (), b"", math.inf) as reply:
            assert reply.pour is not None
            stuck = Stuck()
            pouring = asyncio.ensure_future(reply.pour(stuck))
            sent_bytes = -1
            while sent_bytes != host.peers[0].sent_bytes:  # until the buffers between the two are full
                sent_bytes = host.peers[0].sent_bytes
                await asyncio.sleep(SOON_S)
            assert sent_bytes < len(piece) * pieces / 2
            assert stuck.size <= AHEAD_BYTES_MAX + len(piece)
            stuck.opened.set()
            await pouring
        assert stuck.size == len(piece) * pieces
        assert wire.parked == 1


@either_loop
async def test_silence_amid_the_pouring_breaks_it_and_a_full_sink_is_no_silence() -> None:
    clock, more = FakeClock(), asyncio.Event()

    class Slow(Bucket):
        async def drained(self) -> None:
            connection = only(wire)
            await until(lambda: connection.chunks == [b"llo"])
            clock.advance(2 * SOON_S)  # longer than the server may be silent
            await asyncio.sleep(3 * SOON_S)
            assert not connection.stopped, connection.stopped
            more.set()
            await until(lambda: connection.chunks == [b"llo", b"!"])
            await super().drained()

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(CHUNKED + b"2\r\nhe\r\n")
        await until(lambda: bucket.got == b"he")
        await peer.send(b"3\r\nllo\r\n")
        await more.wait()
        await peer.send(b"1\r\n!\r\n")
        await until(lambda: bucket.got == b"hello!")
        clock.advance(SOON_S)
        await peer.gone()

    bucket = Slow([1, 0])
    async with hostile(script) as host, wired(host, clock=clock, idle_s_max=SOON_S) as wire:
        with pytest.raises(Broken, match="nothing came for"):
            async with asyncio.timeout(10), wire.exchange(wire.head("POST", "/"), (), b"", math.inf) as reply:
                assert reply.pour is not None
                await reply.pour(bucket)
    assert bucket.got == b"hello!"


@either_loop
async def test_thousands_of_pours_leak_nothing_and_mix_nothing_up() -> None:
    """As the whole client does in test_wire, with sinks that fill, fail, end early and are left."""
    chance = random.Random(11)

    async def script(peer: Peer) -> None:
        while True:
            _, canary = await peer.request()
            if canary[-1] % 2:
                await peer.send(CHUNKED, *(b"1\r\n%c\r\n" % byte for byte in canary), b"0\r\n\r\n")
            else:
                await peer.send(OK + b"content-length: %d\r\n\r\n" % len(canary), canary[:5], canary[5:])

    async def one(number: int) -> bytes | None:
        canary = b"%d-%d" % (number, chance.getrandbits(64))
        ends_at = chance.choice((math.inf, math.inf, 3, 8))
        bucket = Bucket(
            [chance.randrange(3) for _ in range(4)],
            **{chance.choice(("done_at", "fails_at")): ends_at},
        )
        try:
            async with wire.exchange(wire.head("POST", "/"), (), canary, math.inf) as reply:
                assert reply.pour is not None
                await reply.pour(bucket)
                if ends_at == math.inf:
                    assert bucket.got == canary
        except Overflow:
            assert ends_at != math.inf
        finally:
            assert canary.startswith(bucket.got)
        return bucket.got

    async def troubled(number: int) -> bool:
        task = asyncio.create_task(one(number))
        if number % 3:
            for _ in range(chance.randrange(60)):
                await asyncio.sleep(0)
            task.cancel()
        (result,) = await asyncio.gather(task, return_exceptions=True)
        assert isinstance(result, bytes | asyncio.CancelledError), result
        return isinstance(result, bytes)

    async with hostile(script) as host, wired(host, connections_max=5) as wire:
        ended = 0
        for start in range(0, 2_000, 20):
            ended += sum(await asyncio.gather(*(troubled(number) for number in range(start, start + 20))))
            assert wire.load() == IDLE
        await until(lambda: wire.connections == wire.parked)
        assert 0 < ended < 2_000
