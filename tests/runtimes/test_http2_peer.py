"""Our HTTP/2 and that of the `h2` library, each as client and server of the other: what goes in comes out."""

from __future__ import annotations

from collections.abc import Callable

import h2.config
import h2.connection
import h2.events
import h2.settings
from hypothesis import given, settings
from hypothesis import strategies as st

from runtimes.http2.connection import Connection
from runtimes.http2.fields import encoded
from runtimes.http2.frames import Code
from tests.http2 import Heard


class Sized(list[bytes]):
    """Parts of a body, told by their sizes."""

    def __init__(self, sizes: list[int]) -> None:
        super().__init__((PATTERN * (size // len(PATTERN) + 1))[:size] for size in sizes)
        self.sizes = sizes

    def __repr__(self) -> str:
        return f"Sized({self.sizes})"


PATTERN = bytes(range(251))
NAMES = st.from_regex(r"x-[a-z0-9_.-]{0,20}", fullmatch=True)
VALUES = st.from_regex(r"[!-~]([ -~]{0,100}[!-~])?", fullmatch=True)
FIELDS = st.lists(st.tuples(NAMES, VALUES), max_size=5, unique_by=lambda it: it[0])
SIZES = st.lists(st.integers(0, 100_000), max_size=3)
MESSAGES = st.lists(st.tuples(FIELDS, SIZES.map(Sized), FIELDS), min_size=1, max_size=4)
CUTS = st.integers(500, 70_000)
few = settings(max_examples=40, deadline=None)
REQUEST = [(":method", "POST"), (":scheme", "http"), (":path", "/s/m"), (":authority", "h")]


class Pair:
    """Ours, and theirs, and what each has written for the other, which goes over in pieces of `cut` bytes."""

    def __init__(self, cut: int, *, ours_is_client: bool) -> None:
        self.cut = cut
        self.written = bytearray()
        self.heard: dict[int, Heard] = {}
        self.events: list[h2.events.Event] = []
        config = h2.config.H2Configuration(client_side=not ours_is_client, header_encoding=None)
        self.theirs = h2.connection.H2Connection(config)
        self.ours = Connection(
            opened=None if ours_is_client else self.opened,
            write=self.written.extend,
            now_s=float,
            streams_max=100,
            header_bytes_max=8192,
        )
        self.theirs.initiate_connection()
        self.ours.begin()
        self.exchange()

    def opened(self, connection: Connection, id: int) -> Heard:
        self.heard[id] = Heard(connection, id)
        return self.heard[id]

    def exchange(self, go_on: Callable[[], bool] = bool) -> None:
        """Until neither has more to say."""
        while True:
            theirs = self.theirs.data_to_send()
            for at in range(0, len(theirs), self.cut):
                self.ours.receive(theirs[at : at + self.cut])
            ours = bytes(self.written)
            self.written.clear()
            for at in range(0, len(ours), self.cut):
                for event in self.theirs.receive_data(ours[at : at + self.cut]):
                    self.events.append(event)
                    if isinstance(event, h2.events.DataReceived) and event.flow_controlled_length:
                        self.theirs.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            if not theirs and not ours and not go_on():
                break
        assert not self.ours.fault

    def got(self, id: int, kind: type[h2.events.Event]) -> list[h2.events.Event]:
        return [it for it in self.events if type(it) is kind and it.stream_id == id]

    def body(self, id: int) -> bytes:
        return b"".join(it.data for it in self.got(id, h2.events.DataReceived))


def lines(fields: list[tuple[str, str]]) -> list[tuple[bytes, bytes]]:
    return [(name.encode(), value.encode()) for name, value in fields]


def say(stream: Heard, head: list[tuple[str, str]], parts: list[bytes], tail: list[tuple[str, str]]) -> None:
    stream.send_fields(encoded(lines(head)))
    for part in parts:
        stream.send_data(part)
    stream.send_fields(encoded(lines(tail)), end=True)
    stream.connection.out.flush()


class Sending:
    """Of what theirs has to say on its streams, as far as our windows let it."""

    def __init__(self, pair: Pair) -> None:
        self.pair = pair
        self.left: dict[int, tuple[bytes, list[tuple[str, str]]]] = {}

    def __call__(self) -> bool:
        theirs, before = self.pair.theirs, dict(self.left)
        for id, (body, tail) in before.items():
            room = min(theirs.local_flow_control_window(id), theirs.max_outbound_frame_size)
            part, rest = body[:room], body[room:]
            if part:
                # Padding has a byte that says how long it is.
                theirs.send_data(id, part, pad_length=min(max(room - len(part) - 1, 0), 7) or None)
            if not rest and tail:
                theirs.send_headers(id, tail, end_stream=True)
            elif not rest:
                theirs.end_stream(id)
            if rest:
                self.left[id] = rest, tail
            else:
                del self.left[id]
        return before != self.left


@few
@given(MESSAGES, MESSAGES, CUTS)
def test_their_requests_reach_us_and_our_answers_them(asked: list, answered: list, cut: int) -> None:
    pair = Pair(cut, ours_is_client=False)
    sending = Sending(pair)
    for number, (head, parts, tail) in enumerate(asked):
        pair.theirs.send_headers(2 * number + 1, REQUEST + head)
        sending.left[2 * number + 1] = b"".join(parts), tail
    pair.exchange(sending)
    for number, (head, parts, tail) in enumerate(asked):
        heard = pair.heard[2 * number + 1]
        assert (heard.ended, heard.data, heard.broken) == (True, b"".join(parts), None)
        assert [[*it.regular.items()] for it in heard.fields] == [lines(head), *([lines(tail)] if tail else [])]
    given = dict(zip(pair.heard, answered, strict=False))
    for id, (head, parts, tail) in given.items():
        say(pair.heard[id], [(":status", "200"), *head], parts, [("grpc-status", "0"), *tail])
    pair.exchange()
    for id, (head, parts, tail) in given.items():
        (header,), (trailers,) = pair.got(id, h2.events.ResponseReceived), pair.got(id, h2.events.TrailersReceived)
        assert [*map(tuple, header.headers)] == [(b":status", b"200"), *lines(head)]
        assert [*map(tuple, trailers.headers)] == [(b"grpc-status", b"0"), *lines(tail)]
        assert pair.body(id) == b"".join(parts)
        assert pair.got(id, h2.events.StreamEnded)
    assert pair.ours.streams.keys() == pair.heard.keys() - given.keys()


@few
@given(MESSAGES, MESSAGES, CUTS)
def test_our_requests_reach_them_and_their_answers_us(asked: list, answered: list, cut: int) -> None:
    pair = Pair(cut, ours_is_client=True)
    for head, parts, _ in asked:
        stream = pair.opened(pair.ours, pair.ours.next_stream)
        pair.ours.add(stream)
        stream.send_fields(encoded(lines(REQUEST + head)))
        stream.send_data(b"".join(parts) or b"-", end=True)
    pair.ours.out.flush()
    pair.exchange()
    sending = Sending(pair)
    given = dict(zip(pair.heard, answered, strict=False))
    for (id, _), (head, parts, _) in zip(pair.heard.items(), asked, strict=True):
        (header,) = pair.got(id, h2.events.RequestReceived)
        assert [*map(tuple, header.headers)] == lines(REQUEST + head)
        assert pair.body(id) == b"".join(parts) or b"-"
    for id, (head, parts, tail) in given.items():
        pair.theirs.send_headers(id, [(":status", "200"), *head])
        sending.left[id] = b"".join(parts), [("grpc-status", "0"), *tail]
    pair.exchange(sending)
    for id, (head, parts, tail) in given.items():
        heard = pair.heard[id]
        assert (heard.ended, heard.data, heard.broken) == (True, b"".join(parts), None)
        assert [[*it.regular.items()] for it in heard.fields] == [lines(head), lines([("grpc-status", "0"), *tail])]
    assert pair.ours.streams.keys() == pair.heard.keys() - given.keys()


def test_resets_reach_the_other_side() -> None:
    pair = Pair(9, ours_is_client=False)
    for id in (1, 3):
        pair.theirs.send_headers(id, REQUEST)
    pair.theirs.reset_stream(1, Code.CANCEL)
    pair.exchange()
    assert pair.heard[1].broken == (Code.CANCEL, "it was reset")
    pair.heard[3].reset(Code.INTERNAL_ERROR)
    pair.ours.out.flush()
    pair.exchange()
    (reset,) = pair.got(3, h2.events.StreamReset)
    assert reset.error_code == Code.INTERNAL_ERROR


def test_their_smaller_windows_and_larger_frames_are_kept_to() -> None:
    pair = Pair(100_000, ours_is_client=False)
    codes = h2.settings.SettingCodes
    pair.theirs.update_settings({codes.INITIAL_WINDOW_SIZE: 1000, codes.MAX_FRAME_SIZE: 100_000})
    pair.theirs.send_headers(1, REQUEST, end_stream=True)
    pair.exchange()
    say(pair.heard[1], [(":status", "200")], [bytes(500_000)], [("grpc-status", "0")])
    pair.exchange()
    assert pair.body(1) == bytes(500_000)
