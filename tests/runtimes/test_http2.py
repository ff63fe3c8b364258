"""HTTP/2 as RFC 9113 has it: one side in memory, spoken to in frames."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtimes.http2 import connection as http2
from runtimes.http2 import fields
from runtimes.http2 import stream as http2_stream
from runtimes.http2.fields import encoded
from runtimes.http2.frames import (
    ACK,
    CONTINUATION,
    DATA,
    ENABLE_PUSH,
    END_HEADERS,
    END_STREAM,
    FRAME_BYTES_MAX,
    GOAWAY,
    HEADERS,
    INITIAL_WINDOW_SIZE,
    MAX_CONCURRENT_STREAMS,
    MAX_FRAME_SIZE,
    PADDED,
    PING,
    PREFACE,
    PRIORITISED,
    PRIORITY,
    PUSH_PROMISE,
    RST_STREAM,
    SETTINGS,
    WINDOW_BYTES,
    WINDOW_BYTES_MOST,
    WINDOW_UPDATE,
    Code,
    frame,
    goaway,
    rst_stream,
    settings,
    window_update,
)
from tests.http2 import GREETING, REQUEST, RESPONSE, Heard, Said, Side, answers, data, frames, header

WHOLE = END_HEADERS | END_STREAM
BLOCK = header(1)[9:]


def code(said: Said) -> Code:
    """Of a reset, or of a goodbye."""
    return Code(int.from_bytes(said.payload[:4] if said.kind == RST_STREAM else said.payload[4:8], "big"))


# ---- a request and its answer ------------------------------------------------------------------------------


def test_a_request_is_heard_and_its_answer_goes_out_in_one_write() -> None:
    writes: list[bytes] = []
    side = Side()
    side.hear(header(1), data(1, b"question", end=True))
    heard = side.heard[1]
    assert (heard.data, heard.ended) == (b"question", True)
    assert heard.fields[0].pseudo[b":path"] == b"/s/m"
    side.connection.out._write = writes.append
    heard.send_fields(b"head")
    heard.send_data(b"answer")
    heard.send_fields(b"tail", end=True)
    side.connection.out.flush()
    (written,) = writes
    assert [it[1:] for it in frames(written)] == [
        (END_HEADERS, 1, b"head"),
        (0, 1, b"answer"),
        (WHOLE, 1, b"tail"),
    ]
    assert not side.connection.streams


def test_the_settings_come_first_and_are_confirmed() -> None:
    side = Side()
    assert side.hear(settings({MAX_CONCURRENT_STREAMS: 7})) == [Said(SETTINGS, ACK, 0, b"")]
    assert side.connection.streams_max == 7


def test_frames_may_come_in_any_pieces() -> None:
    whole = GREETING + header(1) + data(1, b"question") + header(1, [("t", "1")], flags=WHOLE)
    side = Side()
    for byte in whole[len(GREETING) :]:
        side.hear(bytes((byte,)))
    assert (side.heard[1].data, side.heard[1].ended) == (b"question", True)
    assert side.heard[1].fields[1].regular == {b"t": b"1"}


def test_padding_and_priorities_are_taken_off() -> None:
    side = Side()
    padded = bytes((3,)) + bytes(5) + BLOCK + bytes(3)
    side.hear(frame(HEADERS, END_HEADERS | PADDED | PRIORITISED, 1, padded))
    side.hear(frame(DATA, PADDED | END_STREAM, 1, b"\x02hello\0\0"))
    assert side.heard[1].data == b"hello"


def test_a_header_may_come_in_pieces() -> None:
    side = Side()
    begun, middle, end = BLOCK[:3], BLOCK[3:3], BLOCK[3:]
    side.hear(frame(HEADERS, END_STREAM, 1, begun), frame(CONTINUATION, 0, 1, middle))
    side.hear(frame(CONTINUATION, END_HEADERS, 1, end))
    assert side.heard[1].ended


def test_a_long_header_is_sent_in_pieces() -> None:
    side = Side()
    side.hear(header(1, flags=WHOLE))
    side.heard[1].send_fields(bytes(FRAME_BYTES_MAX + 1), end=True)
    side.connection.out.flush()
    assert [(it.kind, it.flags, len(it.payload)) for it in side.said()] == [
        (HEADERS, END_STREAM, FRAME_BYTES_MAX),
        (CONTINUATION, END_HEADERS, 1),
    ]


def test_what_is_unknown_is_passed_over() -> None:
    side = Side()
    assert side.hear(frame(0xFA, 0xFF, 0, b"what"), settings({0xFFFF: 1}))[-1].kind == SETTINGS
    assert not side.connection.fault


def test_a_ping_is_answered_with_what_it_says() -> None:
    assert Side().hear(frame(PING, 0, 0, b"01234567")) == [Said(PING, ACK, 0, b"01234567")]


def test_a_server_that_has_answered_needs_no_more_of_the_request() -> None:
    side = Side()
    side.hear(header(1))
    side.heard[1].send_fields(b"no", end=True)
    side.connection.out.flush()
    assert [(it.kind, it.stream) for it in side.said()] == [(HEADERS, 1), (RST_STREAM, 1)]
    assert answers(side.hear(data(1, b"too late", end=True))) == [], "it was on its way"
    assert side.heard[1].data == b""


def test_blanks_at_a_value_s_ends_are_taken_off() -> None:
    side = Side()
    side.hear(header(1, [*REQUEST, ("authorization", " Bearer \tkey\t "), ("empty", " ")], flags=WHOLE))
    regular = side.heard[1].fields[0].regular
    assert (regular[b"authorization"], regular[b"empty"]) == (b"Bearer \tkey", b"")


def test_a_client_s_header_may_be_preceded_by_others() -> None:
    side = Side(client=True)
    side.hear(header(1, [(":status", "103")]), header(1, RESPONSE), data(1, b"answer"))
    side.hear(header(1, [("grpc-status", "0")], flags=WHOLE))
    heard = side.heard[1]
    assert [it.pseudo for it in heard.fields] == [{b":status": b"200"}, {}]
    assert (heard.data, heard.ended, heard.broken) == (b"answer", True, None)
    assert not side.connection.streams


# ---- flow control ------------------------------------------------------------------------------------------


def sent(said: list[Said], stream: int = 1) -> bytes:
    return b"".join(it.payload for it in said if it.kind == DATA and it.stream == stream)


def test_no_more_is_sent_than_both_windows_have_room_for() -> None:
    side, whole = Side(), bytes(range(256)) * 1024
    side.hear(header(1, flags=WHOLE))
    side.heard[1].send_data(whole)
    side.heard[1].send_fields(b"tail", end=True)
    got = sent(side.said())
    assert len(got) == WINDOW_BYTES
    got += sent(side.hear(window_update(1, 1000)))
    assert len(got) == WINDOW_BYTES, "the connection's window is closed"
    got += sent(side.hear(window_update(0, 500)))
    assert len(got) == WINDOW_BYTES + 500
    rest = side.hear(window_update(0, len(whole)), window_update(1, len(whole)))
    assert got + sent(rest) == whole
    assert rest[-1] == Said(HEADERS, WHOLE, 1, b"tail")
    assert max(len(it.payload) for it in rest) == FRAME_BYTES_MAX
    assert side.heard[1].times_sent == 1
    assert not side.connection.streams


def test_streams_take_turns() -> None:
    side = Side()
    side.hear(window_update(0, 1 << 20), settings({INITIAL_WINDOW_SIZE: 0}))
    for id in (1, 3):
        side.hear(header(id, flags=WHOLE))
        side.heard[id].send_data(bytes(200_000), end=True)
    assert sent(side.said()) == b""
    said = side.hear(settings({INITIAL_WINDOW_SIZE: 200_000}))
    order = [it.stream for it in said if it.kind == DATA]
    assert order.index(3) < len(order) // 2, "the second does not wait for the first"
    assert not side.connection.streams


def test_a_window_may_shrink_below_nothing() -> None:
    side = Side()
    side.hear(header(1, flags=WHOLE))
    side.heard[1].send_data(bytes(1000))
    side.connection.out.flush()
    side.hear(settings({INITIAL_WINDOW_SIZE: 10}))
    side.heard[1].send_data(b"more", end=True)
    assert sent(side.said() + side.hear(window_update(1, 990))) == b""
    assert sent(side.hear(window_update(1, 4))) == b"more"


def test_a_transport_that_is_full_gets_no_more() -> None:
    side = Side()
    side.hear(header(1, flags=WHOLE))
    side.connection.out.full = True
    side.heard[1].send_data(b"answer", end=True)
    assert sent(side.said()) == b""
    side.connection.resume()
    assert sent(side.said()) == b"answer"


def test_who_takes_what_comes_lets_more_come() -> None:
    side = Side()
    side.hear(header(1))
    given = 0
    for _ in range(300):
        given += sum(
            int.from_bytes(it.payload, "big") for it in side.hear(data(1, bytes(10_000))) if it.kind == WINDOW_UPDATE
        )
    assert len(side.heard[1].data) == 3_000_000
    assert given > 4_500_000, "on both windows"


def test_who_does_not_take_it_holds_up_the_stream_and_not_the_connection() -> None:
    side = Side(hungry=False)
    side.hear(header(1), header(3))
    chunk = bytes(16_384)
    for _ in range(http2_stream.AHEAD_BYTES_MAX // len(chunk)):
        assert answers(side.hear(data(1, chunk))) == []
    (reset,) = answers(side.hear(data(1, b"x")))
    assert (reset.stream, code(reset)) == (1, Code.FLOW_CONTROL_ERROR)
    side.hear(data(3, b"still here"))
    assert side.heard[3].data == b"still here"


def test_a_padded_frame_counts_with_its_padding() -> None:
    side = Side(hungry=False)
    side.hear(header(1))
    padded = frame(DATA, PADDED, 1, b"\xff" + bytes(256))
    said: list[Said] = []
    for _ in range(http2_stream.AHEAD_BYTES_MAX // 257 + 1):
        side.now_s += 1
        said += answers(side.hear(padded))
    assert [code(it) for it in said if it.kind == RST_STREAM] == [Code.FLOW_CONTROL_ERROR]


# ---- what ends the connection ------------------------------------------------------------------------------

OPEN = header(1)
OVER = header(1, flags=WHOLE)
ENDS: dict[str, tuple[bytes, Code]] = {
    "a frame that is too large": (frame(DATA, 0, 1, bytes(FRAME_BYTES_MAX + 1)), Code.FRAME_SIZE_ERROR),
    "data on no stream": (data(0, b"x"), Code.PROTOCOL_ERROR),
    "a header on no stream": (header(0), Code.PROTOCOL_ERROR),
    "a priority on no stream": (frame(PRIORITY, 0, 0, bytes(5)), Code.PROTOCOL_ERROR),
    "a reset of no stream": (rst_stream(0, 0), Code.PROTOCOL_ERROR),
    "settings of a stream": (frame(SETTINGS, 0, 1), Code.PROTOCOL_ERROR),
    "a ping on a stream": (frame(PING, 0, 1, bytes(8)), Code.PROTOCOL_ERROR),
    "a goodbye on a stream": (frame(GOAWAY, 0, 1, bytes(8)), Code.PROTOCOL_ERROR),
    "a continuation of nothing": (frame(CONTINUATION, END_HEADERS, 1, BLOCK), Code.PROTOCOL_ERROR),
    "a continuation of another": (
        frame(HEADERS, 0, 1, BLOCK) + frame(CONTINUATION, END_HEADERS, 3),
        Code.PROTOCOL_ERROR,
    ),
    "a frame amid a header": (frame(HEADERS, 0, 1, BLOCK) + frame(PING, 0, 0, bytes(8)), Code.PROTOCOL_ERROR),
    "an unknown frame amid a header": (frame(HEADERS, 0, 1, BLOCK) + frame(0xFA, 0, 0), Code.PROTOCOL_ERROR),
    "a promise": (frame(PUSH_PROMISE, END_HEADERS, 1, bytes(4)), Code.PROTOCOL_ERROR),
    "an even stream": (header(2), Code.PROTOCOL_ERROR),
    "a stream below the last": (header(5) + header(3), Code.STREAM_CLOSED),
    "data on an idle stream": (data(1, b"x"), Code.PROTOCOL_ERROR),
    "a reset of an idle stream": (rst_stream(1, 0), Code.PROTOCOL_ERROR),
    "a window update of an idle stream": (window_update(1, 1), Code.PROTOCOL_ERROR),
    "a stream that is opened again": (OPEN + rst_stream(1, 8) + header(1), Code.STREAM_CLOSED),
    "a reset of another size": (OPEN + frame(RST_STREAM, 0, 1, bytes(3)), Code.FRAME_SIZE_ERROR),
    "a ping of another size": (frame(PING, 0, 0, bytes(6)), Code.FRAME_SIZE_ERROR),
    "settings of another size": (frame(SETTINGS, 0, 0, bytes(3)), Code.FRAME_SIZE_ERROR),
    "settings confirmed with something": (frame(SETTINGS, ACK, 0, bytes(6)), Code.FRAME_SIZE_ERROR),
    "a goodbye of another size": (frame(GOAWAY, 0, 0, bytes(7)), Code.FRAME_SIZE_ERROR),
    "a window update of another size": (frame(WINDOW_UPDATE, 0, 0, bytes(3)), Code.FRAME_SIZE_ERROR),
    "a priority of another size on an idle stream": (frame(PRIORITY, 0, 1, bytes(4)), Code.FRAME_SIZE_ERROR),
    "no priority where one was announced": (frame(HEADERS, WHOLE | PRIORITISED, 1, b"1234"), Code.FRAME_SIZE_ERROR),
    "padding that is too long": (OPEN + frame(DATA, PADDED, 1, b"\x05hell"), Code.PROTOCOL_ERROR),
    "padding without its length": (OPEN + frame(DATA, PADDED, 1), Code.PROTOCOL_ERROR),
    "a header's padding that is too long": (frame(HEADERS, WHOLE | PADDED, 1, b"\x05hell"), Code.PROTOCOL_ERROR),
    "a push that is neither wanted nor not": (settings({ENABLE_PUSH: 2}), Code.PROTOCOL_ERROR),
    "a window that is too large": (settings({INITIAL_WINDOW_SIZE: WINDOW_BYTES_MOST + 1}), Code.FLOW_CONTROL_ERROR),
    "a frame size that is too small": (settings({MAX_FRAME_SIZE: FRAME_BYTES_MAX - 1}), Code.PROTOCOL_ERROR),
    "a frame size that is too large": (settings({MAX_FRAME_SIZE: 1 << 24}), Code.PROTOCOL_ERROR),
    "a window update by nothing": (window_update(0, 0), Code.PROTOCOL_ERROR),
    "a window updated too far": (window_update(0, WINDOW_BYTES_MOST), Code.FLOW_CONTROL_ERROR),
    "streams' windows that settings widen too far": (
        OPEN + window_update(1, WINDOW_BYTES_MOST - WINDOW_BYTES) + settings({INITIAL_WINDOW_SIZE: WINDOW_BYTES + 1}),
        Code.FLOW_CONTROL_ERROR,
    ),
    "a header that cannot be read": (frame(HEADERS, WHOLE, 1, b"\x80"), Code.COMPRESSION_ERROR),
    "a field beyond the table": (frame(HEADERS, WHOLE, 1, b"\xff\xff\x01"), Code.COMPRESSION_ERROR),
    "a header that breaks off": (frame(HEADERS, WHOLE, 1, BLOCK[:-1]), Code.COMPRESSION_ERROR),
    "a number without end": (frame(HEADERS, WHOLE, 1, b"\xff" * 500), Code.COMPRESSION_ERROR),
    "a table larger than was allowed": (frame(HEADERS, WHOLE, 1, b"\x3f\xe2\x1f" + BLOCK), Code.COMPRESSION_ERROR),
    "a table resized amid a header": (frame(HEADERS, WHOLE, 1, BLOCK + b"\x20"), Code.COMPRESSION_ERROR),
    "an end of string amid one": (frame(HEADERS, WHOLE, 1, b"\x00\x84\xff\xff\xff\xff\x00"), Code.COMPRESSION_ERROR),
}


@pytest.mark.parametrize("what", ENDS)
def test_what_breaks_the_rules_ends_the_connection(what: str) -> None:
    sent, expected = ENDS[what]
    side = Side()
    said = side.hear(sent)
    assert (said[-1].kind, code(said[-1])) == (GOAWAY, expected), said[-1].payload[8:]
    assert side.connection.fault == said[-1].payload[8:].decode()
    assert not side.connection.streams
    assert side.hear(OPEN) == [], "nothing is said any more"


@pytest.mark.parametrize("began", [b"GET / HTTP/1.1\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSX", b"\x16\x03\x01"])
def test_who_speaks_something_else_is_told_so(began: bytes) -> None:
    side = Side()
    side.connection = http2.Connection(
        opened=side._opened, write=side._written.extend, now_s=float, streams_max=1, header_bytes_max=256
    )
    (said,) = side.hear(began)
    assert (said.kind, code(said)) == (GOAWAY, Code.PROTOCOL_ERROR)


@pytest.mark.parametrize("first", [frame(PING, 0, 0, bytes(8)), frame(SETTINGS, ACK, 0), OPEN])
def test_the_settings_must_come_first(first: bytes) -> None:
    side = Side()
    side.connection = http2.Connection(
        opened=side._opened, write=side._written.extend, now_s=float, streams_max=1, header_bytes_max=256
    )
    assert code(side.hear(PREFACE + first)[-1]) is Code.PROTOCOL_ERROR


CLIENT_ENDS = {
    "a promise": (frame(PUSH_PROMISE, END_HEADERS, 1, bytes(4)), Code.PROTOCOL_ERROR),
    "a push that is allowed to clients": (settings({ENABLE_PUSH: 1}), Code.PROTOCOL_ERROR),
    "a stream of the server's": (header(2, RESPONSE), Code.PROTOCOL_ERROR),
    "an answer that nobody asked for": (header(3, RESPONSE), Code.PROTOCOL_ERROR),
}


@pytest.mark.parametrize("what", CLIENT_ENDS)
def test_what_breaks_a_server_s_rules_ends_the_client_s_connection(what: str) -> None:
    sent, expected = CLIENT_ENDS[what]
    side = Side(client=True)
    assert code(side.hear(sent)[-1]) is expected
    assert side.heard[1].broken is not None


# ---- what ends a stream ------------------------------------------------------------------------------------


def wrong(*fields: tuple[str, str], without: str = "") -> bytes:
    return header(1, [*(it for it in REQUEST if it[0] != without), *fields])


STREAM_ENDS: dict[str, tuple[bytes, Code]] = {
    "data behind a reset": (OPEN + rst_stream(1, 8) + data(1, b"x"), Code.STREAM_CLOSED),
    "trailers behind a reset": (OPEN + rst_stream(1, 8) + header(1, [("t", "1")], flags=WHOLE), Code.STREAM_CLOSED),
    "data behind the end": (OVER + data(1, b"x"), Code.STREAM_CLOSED),
    "a header behind the end": (OVER + OVER, Code.STREAM_CLOSED),
    "a window update by nothing": (OPEN + window_update(1, 0), Code.PROTOCOL_ERROR),
    "a window updated too far": (OPEN + window_update(1, WINDOW_BYTES_MOST), Code.FLOW_CONTROL_ERROR),
    "a priority of another size": (OPEN + frame(PRIORITY, 0, 1, bytes(4)), Code.FRAME_SIZE_ERROR),
    "an empty header": (frame(HEADERS, WHOLE, 1), Code.PROTOCOL_ERROR),
    "no method": (wrong(without=":method"), Code.PROTOCOL_ERROR),
    "no scheme": (wrong(without=":scheme"), Code.PROTOCOL_ERROR),
    "no path": (wrong(without=":path"), Code.PROTOCOL_ERROR),
    "an empty path": (wrong((":path", ""), without=":path"), Code.PROTOCOL_ERROR),
    "a path twice": (wrong((":path", "/")), Code.PROTOCOL_ERROR),
    "a pseudo-header that nobody knows": (wrong((":test", "x")), Code.PROTOCOL_ERROR),
    "an answer's pseudo-header": (wrong((":status", "200")), Code.PROTOCOL_ERROR),
    "a pseudo-header behind others": (wrong(("a", "b"), (":path", "/"), without=":path"), Code.PROTOCOL_ERROR),
    "upper case": (wrong(("X-Test", "ok")), Code.PROTOCOL_ERROR),
    "a name with a blank": (wrong(("a b", "ok")), Code.PROTOCOL_ERROR),
    "no name": (wrong(("", "ok")), Code.PROTOCOL_ERROR),
    "a value with a line's end": (wrong(("a", "b\r\nc: d")), Code.PROTOCOL_ERROR),
    "a value with a zero": (wrong(("a", "b\0")), Code.PROTOCOL_ERROR),
    "a path that begins with a blank": (wrong((":path", " /"), without=":path"), Code.PROTOCOL_ERROR),
    "connection": (wrong(("connection", "keep-alive")), Code.PROTOCOL_ERROR),
    "transfer-encoding": (wrong(("transfer-encoding", "chunked")), Code.PROTOCOL_ERROR),
    "te with more than trailers": (wrong(("te", "trailers, deflate")), Code.PROTOCOL_ERROR),
    "trailers that do not end": (OPEN + header(1, [("t", "1")]), Code.PROTOCOL_ERROR),
    "trailers with a pseudo-header": (OPEN + header(1, [(":path", "/")], flags=WHOLE), Code.PROTOCOL_ERROR),
    "more than content-length": (wrong(("content-length", "1")) + data(1, b"ab"), Code.PROTOCOL_ERROR),
    "less than content-length": (wrong(("content-length", "3")) + data(1, b"ab", end=True), Code.PROTOCOL_ERROR),
    "nothing, but a content-length": (
        header(1, [*REQUEST, ("content-length", "3")], flags=WHOLE),
        Code.PROTOCOL_ERROR,
    ),
    "a content-length that is none": (wrong(("content-length", "+3")), Code.PROTOCOL_ERROR),
}


@pytest.mark.parametrize("what", STREAM_ENDS)
def test_what_is_wrong_with_a_stream_ends_only_the_stream(what: str) -> None:
    sent, expected = STREAM_ENDS[what]
    side = Side()
    (said,) = answers(side.hear(sent))
    assert (said.kind, said.stream, code(said)) == (RST_STREAM, 1, expected)
    assert 1 not in side.connection.streams
    side.hear(header(3), data(3, b"next", end=True))
    assert side.heard[3].data == b"next"


@pytest.mark.parametrize(
    "sent",
    [
        data(1, b"before a header"),
        header(1, REQUEST),
        header(1, [("grpc-status", "0")]),
        header(1, RESPONSE) + header(1, RESPONSE),
    ],
)
def test_an_answer_that_is_none_ends_its_stream(sent: bytes) -> None:
    side = Side(client=True)
    (said,) = answers(side.hear(sent))
    assert (said.kind, code(said)) == (RST_STREAM, Code.PROTOCOL_ERROR)
    assert side.heard[1].broken is not None


def test_a_peer_that_resets_a_stream_gets_no_more_of_it() -> None:
    side = Side()
    side.hear(settings({INITIAL_WINDOW_SIZE: 1}), header(1, flags=WHOLE))
    side.heard[1].send_data(b"answer", end=True)
    assert sent(side.said()) == b"a"
    assert side.hear(rst_stream(1, Code.CANCEL), window_update(0, 100)) == []
    assert side.heard[1].broken == (Code.CANCEL, "it was reset")
    assert answers(side.hear(window_update(1, 10), rst_stream(1, Code.CANCEL))) == [], "they were on their way"


def test_of_streams_that_ended_early_the_last_are_remembered() -> None:
    side = Side()
    ids = range(1, 2 * http2.LEFT_MAX + 2, 2)
    for id in ids:
        side.hear(header(id))
        side.heard[id].send_fields(b"no", end=True)
        side.connection.out.flush()
    side.said()
    assert answers(side.hear(data(ids[-1], b"x"), data(ids[1], b"x"))) == []
    assert len(side.connection._left) == http2.LEFT_MAX
    (said,) = answers(side.hear(data(ids[0], b"x")))
    assert (said.kind, said.stream, code(said)) == (RST_STREAM, ids[0], Code.STREAM_CLOSED)
    assert not side.connection.fault


def test_refused_calls_with_long_messages_do_not_cost_the_connection() -> None:
    """Each may have sent a whole window by the time that it hears of it."""
    side = Side(streams_max=400)
    ids = range(1, 801, 2)
    for id in ids:
        side.hear(header(id))
        side.heard[id].send_fields(b"no", end=True)
    side.connection.out.flush()
    for id in ids:
        side.hear(data(id, bytes(1_000)) * (http2_stream.AHEAD_BYTES_MAX // FRAME_BYTES_MAX), data(id, b"x", end=True))
    assert not side.connection.fault


# ---- what comes behind the end -----------------------------------------------------------------------------

EXPIRED = header(1, [*RESPONSE, ("grpc-status", "4")], flags=WHOLE)


def ask(side: Side) -> Heard:
    """A client's next call."""
    stream = Heard(side.connection, side.connection.next_stream)
    side.connection.add(stream)
    stream.send_fields(b"")
    stream.send_data(b"question", end=True)
    side.connection.out.flush()
    side.said()
    return stream


def of(stream: int, sent: bytes) -> bytes:
    """The same frames, of another stream."""
    return b"".join(frame(it.kind, it.flags, stream, it.payload) for it in frames(sent))


#: What gRPC's C core says once a call's deadline has passed: its status, that it needs no more, and a second status.
LATE = EXPIRED + rst_stream(1, Code.NO_ERROR) + EXPIRED


@pytest.mark.parametrize(
    "late",
    [EXPIRED, data(1, b"x"), data(1, b"x", end=True), rst_stream(1, 8) + EXPIRED],
    ids=["a header", "data", "an end", "another reset"],
)
def test_what_a_server_says_behind_the_end_of_a_call_is_nothing_to_the_others(late: bytes) -> None:
    side = Side(client=True)
    other = ask(side)
    assert answers(side.hear(EXPIRED + rst_stream(1, Code.NO_ERROR) + late)) == []
    side.hear(header(other.id, RESPONSE), data(other.id, b"answer"), header(other.id, [("t", "1")], flags=WHOLE))
    assert (other.data, other.ended, other.broken) == (b"answer", True, None)


def test_a_header_that_comes_too_late_is_read_for_those_behind_it() -> None:
    """It may have changed the table."""
    side = Side(client=True)
    other = ask(side)
    entry = b"\x40\x01a\x01b"
    side.hear(EXPIRED, rst_stream(1, Code.NO_ERROR), frame(HEADERS, WHOLE, 1, entry))
    side.hear(frame(HEADERS, WHOLE, other.id, encoded([(b":status", b"200")]) + b"\xbe"))
    assert other.fields[0].regular == {b"a": b"b"}


def test_data_that_comes_too_late_is_given_back_to_the_connection_s_window() -> None:
    side = Side(client=True)
    side.hear(LATE)
    chunk = bytes(FRAME_BYTES_MAX)
    said = [it for _ in range(http2.AHEAD_OF_ALL_BYTES // len(chunk)) for it in side.hear(data(1, chunk))]
    assert sum(int.from_bytes(it.payload, "big") for it in said) > http2.AHEAD_OF_ALL_BYTES // 2
    assert {it.kind for it in said} == {WINDOW_UPDATE}


@pytest.mark.parametrize("left", [False, True], ids=["expired", "left"])
def test_calls_that_end_early_all_at_once_do_not_trip_the_bound(left: bool) -> None:
    side = Side(client=True)
    calls = [ask(side) for _ in range(4_096)]
    late = window_update(1, 8) + window_update(1, 8) + LATE
    for _ in range(3):
        for call in calls:
            if left:
                call.reset(Code.CANCEL)
            side.hear(of(call.id, late))
        assert not side.connection.fault
        calls = [ask(side) for _ in range(4_096)]


@pytest.mark.parametrize(
    "late",
    [EXPIRED, data(1, b"x"), rst_stream(1, 8), window_update(1, 1), header(3, [(":status", "103")])],
    ids=["headers", "data", "resets", "windows", "interim answers"],
)
def test_a_server_may_not_say_what_brings_nothing_for_ever(late: bytes) -> None:
    side = Side(client=True)
    ask(side)
    side.hear(LATE)
    side.hear(late * (http2.SERVER_IDLE_FRAMES_MAX // 4))
    assert not side.connection.fault
    side.hear(late * http2.SERVER_IDLE_FRAMES_MAX)
    assert "bring nothing" in side.connection.fault


# ---- goodbyes ----------------------------------------------------------------------------------------------


def test_going_is_said_twice_and_what_comes_in_between_is_taken() -> None:
    side = Side()
    side.hear(header(1))
    side.connection.retire()
    assert struct.unpack(">LL", side.said()[0].payload) == (2**31 - 1, Code.NO_ERROR)
    side.hear(header(3))
    side.connection.refuse_more()
    assert struct.unpack(">LL", side.said()[0].payload) == (3, Code.NO_ERROR)
    assert answers(side.hear(header(5))) == []
    assert side.connection.streams.keys() == {1, 3}


def test_a_client_knows_which_of_its_calls_came_too_late() -> None:
    side = Side(client=True)
    late = Heard(side.connection, side.connection.next_stream)
    side.connection.add(late)
    side.hear(goaway(1, Code.NO_ERROR))
    assert late.broken is not None and late.broken[0] is Code.REFUSED_STREAM
    assert side.heard[1].broken is None
    assert side.connection.leaving


def test_a_lost_connection_ends_its_streams() -> None:
    side = Side()
    side.hear(header(1), header(3, flags=WHOLE))
    side.connection.lost("the cable was cut")
    assert {it.broken for it in side.heard.values()} == {(Code.INTERNAL_ERROR, "the cable was cut")}


# ---- floods ------------------------------------------------------------------------------------------------


def test_more_streams_than_were_promised_are_refused() -> None:
    side = Side(streams_max=2)
    side.hear(header(1), header(3))
    (said,) = answers(side.hear(header(5)))
    assert (said.stream, code(said)) == (5, Code.REFUSED_STREAM)
    assert 5 not in side.heard


IDLE = {
    "pings": frame(PING, 0, 0, bytes(8)),
    "settings": settings({}),
    "empty data": data(1),
    "padding alone": frame(DATA, PADDED, 1, b"\x04" + bytes(4)),
    "priorities": frame(PRIORITY, 0, 1, bytes(5)),
    "window updates": window_update(1, 1),
    "unknown frames": frame(0xFA, 0, 0),
    "resets of what is over": rst_stream(3, 8),
    "data for what is over": data(3, b"x"),
    "goodbyes": goaway(0, 0),
}


@pytest.mark.parametrize("what", IDLE)
def test_frames_that_bring_nothing_are_put_up_with_only_for_so_long(what: str) -> None:
    """CVE-2019-9512, -9515, -9518 and their like."""
    side = Side(hungry=False)
    side.hear(header(1), header(3))
    side.heard[3].send_fields(b"", end=True)
    for number in range(10 * http2.IDLE_FRAMES_MAX):
        side.hear(IDLE[what])
        if side.connection.fault:
            assert "bring nothing" in side.connection.fault
            assert number >= http2.IDLE_FRAMES_MAX
            return
    raise AssertionError(f"{what} go on for ever")


def test_the_same_frames_now_and_then_are_no_flood() -> None:
    side = Side()
    side.hear(header(1))
    for _ in range(3 * http2.IDLE_FRAMES_MAX):
        side.now_s += 1 / http2.IDLE_FRAMES_PER_S
        side.hear(frame(PING, 0, 0, bytes(8)))
    for _ in range(3 * http2.IDLE_FRAMES_MAX):
        side.hear(data(1, b"x"), frame(PING, 0, 0, bytes(8)), window_update(0, 1))
    assert not side.connection.fault


def resets(side: Side, number: int, by: bytes = b"") -> None:
    for id in range(side.connection.last_stream + 2 - (not side.connection.last_stream), 2 * number + 1, 2):
        side.hear(header(id), by.replace(b"\0\0\0\1", id.to_bytes(4, "big"), 1) if by else rst_stream(id, Code.CANCEL))


@pytest.mark.parametrize("by", [b"", window_update(1, 0), header(1)], ids=["itself", "a fault", "another"])
def test_streams_that_are_opened_and_reset_are_counted(by: bytes) -> None:
    """CVE-2023-44487, and CVE-2025-8671, which has the server reset them."""
    side = Side()
    resets(side, 2 * http2.RESETS_MAX, by)
    assert "broken off" in side.connection.fault
    assert http2.RESETS_MAX <= len(side.heard) <= http2.RESETS_MAX + 2


def test_calls_that_are_cancelled_now_and_then_are_no_flood() -> None:
    side = Side()
    for id in range(1, 6 * http2.RESETS_MAX, 2):
        side.now_s += 1 / http2.RESETS_PER_S
        side.hear(header(id), rst_stream(id, Code.CANCEL))
    assert not side.connection.fault


@pytest.mark.parametrize("piece", [b"", b"\x00\x01a\x01b"])
def test_a_header_without_end_ends_the_connection(piece: bytes) -> None:
    """CVE-2024-27316."""
    side = Side()
    side.hear(frame(HEADERS, 0, 1, BLOCK))
    for _ in range(10_000):
        if side.hear(frame(CONTINUATION, 0, 1, piece)):
            break
    assert side.connection.fault == "a header that does not end"
    assert side.connection.reader.amid_header


def test_a_header_in_large_pieces_is_not_kept_beyond_its_bound() -> None:
    side = Side()
    assert answers(side.hear(frame(HEADERS, 0, 1, BLOCK), frame(CONTINUATION, 0, 1, bytes(8000)))) == []
    assert code(side.hear(frame(CONTINUATION, 0, 1, bytes(8000)))[-1]) is Code.ENHANCE_YOUR_CALM


def test_a_short_header_that_becomes_a_long_one_ends_the_connection() -> None:
    """An entry of the table, named again and again in a byte each."""
    side = Side()
    entry = b"\x40\x01a\x7f\x81\x0f" + b"x" * 2048
    side.hear(frame(HEADERS, WHOLE, 1, BLOCK + entry))
    assert code(side.hear(frame(HEADERS, WHOLE, 3, BLOCK + b"\xbe" * 2000))[-1]) is Code.ENHANCE_YOUR_CALM


def test_a_block_that_was_read_before_is_read_anew_once_the_table_has_changed() -> None:
    side = Side()
    entry, named = b"\x40\x01a\x01%b", b"\xbe"
    for id, block in (
        (1, BLOCK + entry % b"1"),
        (3, BLOCK + named),
        (5, BLOCK + named),
        (7, BLOCK + entry % b"2"),
        (9, BLOCK + named),
        (11, b"\x20\x3f\xe1\x1f" + BLOCK + entry % b"3"),
        (13, BLOCK + named),
    ):
        side.hear(frame(HEADERS, WHOLE, id, block))
    assert [it.fields[0].regular[b"a"] for it in side.heard.values()] == [b"1", b"1", b"1", b"2", b"2", b"3", b"3"]
    side.hear(frame(HEADERS, WHOLE, 15, b"\x20\x3f\xe1\x1f" + BLOCK))
    assert code(side.hear(frame(HEADERS, WHOLE, 17, BLOCK + named))[-1]) is Code.COMPRESSION_ERROR


def test_few_header_blocks_are_remembered() -> None:
    decoder = fields.Decoder(bytes_max=4096)
    for number in range(10 * fields.KNOWN_MAX):
        block = fields.encoded([(b":path", b"/%d" % number)])
        assert decoder.read(block).pseudo == {b":path": b"/%d" % number}
    assert len(decoder._known) == fields.KNOWN_MAX


# ---- anything ----------------------------------------------------------------------------------------------

PAYLOADS = st.one_of(
    st.binary(max_size=40),
    st.sampled_from(
        [BLOCK, encoded([(b"t", b"1")]), bytes(4), bytes(5), bytes(6), b"\0\0\0\1", bytes(8), bytes(16_384)]
    ),
    st.builds(lambda name, value: struct.pack(">HL", name, value), st.integers(0, 7), st.integers(0, 2**32 - 1)),
)
FRAMES = st.builds(frame, st.integers(0, 10), st.integers(0, 63), st.integers(0, 6), PAYLOADS)
ACTS = st.lists(
    st.one_of(FRAMES, FRAMES, st.tuples(st.integers(1, 6), st.sampled_from(["head", "data", "tail", "reset"]))),
    max_size=25,
)


@given(ACTS, st.booleans(), st.integers(1, 100))
def test_whatever_comes_is_understood_or_refused_and_nothing_else(acts: list, client: bool, cut: int) -> None:
    side = Side(client=client, streams_max=2, hungry=cut > 50)
    for act in acts:
        if isinstance(act, bytes):
            for at in range(0, len(act), cut * 200):
                side.hear(act[at : at + cut * 200])
        elif act[0] in side.heard:
            stream, what = side.heard[act[0]], act[1]
            if what == "head":
                stream.send_fields(b"head")
            elif what == "data":
                stream.send_data(bytes(70_000))
            elif what == "tail":
                stream.send_fields(b"tail", end=True)
            else:
                stream.reset(Code.CANCEL)
            side.connection.out.flush()
        http2 = side.connection
        assert len(http2.streams) <= 2
        assert not (http2.fault and http2.streams)
        assert 0 <= http2.out.window <= WINDOW_BYTES_MOST
        for id, stream in http2.streams.items():
            assert stream is side.heard[id]
            assert stream.window <= WINDOW_BYTES_MOST
            assert not (stream.ended_here and stream.ended_there and not stream.unsent)
    for stream in side.heard.values():
        assert stream.broken is None or stream.id not in side.connection.streams
