"""How each fault is done to an answer. `fault.Kind` says what each is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import islice, repeat
from typing import TYPE_CHECKING

from loadtests.emulator.dialect import (
    LAST_CHUNK,
    STREAM_HEAD,
    TEXT_STARTS,
    Route,
    body,
    chunk,
    error,
    event,
    named_event,
    pieces,
    response,
    unframed,
)
from loadtests.emulator.fault import Kind
from loadtests.emulator.log import Ended

if TYPE_CHECKING:
    from loadtests.emulator.answer import Answer

SLOW_S = 0.05
ENDLESS_S = 0.005
HUGE_EVENT_BYTES, HUGE_BODY_BYTES = 16 * 1024 * 1024, 80 * 1024 * 1024
CUT_CHARACTER = b"\xe2\x82"
"""Two bytes of the three of a euro sign."""
PAGE = b"<html><head><title>502 Bad Gateway</title></head><body><h1>502 Bad Gateway</h1></body></html>\n"
FAILED = error("EngineCore encountered an issue.", kind="InternalServerError", code=500)
END = b"\r\n\r\n"


def strike(answer: Answer) -> None:
    """Do to it what its fault is; it is held until then. It ends, goes on, or stays held until the client leaves."""
    assert answer.fault is not None
    STRIKES[answer.fault.kind](answer)


# ---- before any byte of the answer -------------------------------------------------------------------------


def _close(answer: Answer) -> None:
    answer.connection.close()
    answer.end(Ended.faulted)


def _reset(answer: Answer) -> None:
    answer.connection.reset()
    answer.end(Ended.faulted)


def _hang(answer: Answer) -> None:
    pass


def _status(answer: Answer) -> None:
    assert answer.fault is not None
    status = answer.fault.number or 500
    answer.write(response(error("This error was asked for.", kind="emulated", code=status), f"{status} Emulated"))
    answer.end(Ended.faulted)


def _not_http(answer: Answer) -> None:
    answer.write(b"\x16\x03\x01\x00\xa5 this is not HTTP\r\n\r\n")
    _close(answer)


def _slow_head(answer: Answer) -> None:
    answer.begun = True
    head = STREAM_HEAD if answer.shape.stream else response(body(answer.shape, answer.id)).partition(END)[0] + END
    _trickle(answer, (head[at : at + 1] for at in range(len(head))), SLOW_S)


def _endless_head(answer: Answer) -> None:
    answer.write(b"HTTP/1.1 200 OK\r\n")
    _trickle(answer, repeat(b"x-more: %b\r\n" % (b"x" * 1000)), ENDLESS_S)


def _cut_head(answer: Answer) -> None:
    answer.write(b"HTTP/1.1 200 OK\r\ncontent-type: appl")
    _close(answer)


def _long_length(answer: Answer) -> None:
    _write_short(answer)
    _close(answer)


def _open_end(answer: Answer) -> None:
    _write_short(answer)


def _not_streamed(answer: Answer) -> None:
    answer.written = answer.shape.tokens
    answer.make(answer.shape.tokens)
    answer.write(response(body(answer.shape, answer.id)))
    answer.end(Ended.faulted)


# ---- behind the answer -------------------------------------------------------------------------------------


SURPLUS = b'HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{"id":"chatcmpl-foreign'


def surplus(answer: Answer) -> bytes:
    """What goes out with the last bytes of the answer: by themselves they could be read and the next call come before
    it, for which it would be the answer."""
    return SURPLUS if answer.fault is not None and answer.fault.kind is Kind.surplus else b""


def _surplus(answer: Answer) -> None:
    answer.end(Ended.faulted)  # it has gone out


# ---- amid the answer ---------------------------------------------------------------------------------------


def _rst(answer: Answer) -> None:
    _write_part(answer)
    _reset(answer)


def _fin(answer: Answer) -> None:
    _write_part(answer)
    _close(answer)


def _undone(answer: Answer) -> None:
    if answer.shape.stream:
        answer.write_head()
        answer.write(LAST_CHUNK)
    else:
        answer.write(response(_halves(answer)[0]))
    answer.end(Ended.faulted)


def _stall(answer: Answer) -> None:
    _write_part(answer)


def _second_head(answer: Answer) -> None:
    _write_part(answer)
    answer.write(response(FAILED, "500 Internal Server Error"))
    _close(answer)


def _not_sse(answer: Answer) -> None:
    if answer.shape.stream:
        answer.write_head()
        answer.write(chunk(PAGE) + LAST_CHUNK)
    else:
        answer.write(response(PAGE, content_type="text/html"))
    answer.end(Ended.faulted)


def _not_json(answer: Answer) -> None:
    if answer.shape.stream:
        answer.write_head()
        answer.write(event(b'{"choices":[nothing]}'))
        answer.release()
    else:
        answer.write(response(b'{"choices":[nothing]}'))
        answer.end(Ended.faulted)


def _not_utf8(answer: Answer) -> None:
    _write_other(answer, CUT_CHARACTER)


def _error_event(answer: Answer) -> None:
    if not answer.shape.stream:
        answer.write(response(FAILED))
    else:
        answer.write_head()
        if answer.shape.route is Route.responses:
            closing = named_event(b"error", 0, b'"code":"server_error","message":"EngineCore failed.","param":null')
        else:
            closing = event(FAILED) + event(b"[DONE]")
        answer.write(closing + LAST_CHUNK)
    answer.end(Ended.faulted)


def _huge_event(answer: Answer) -> None:
    _write_other(answer, b"x" * (HUGE_EVENT_BYTES if answer.shape.stream else HUGE_BODY_BYTES))


STRIKES: dict[Kind, Callable[[Answer], None]] = {
    Kind.close: _close,
    Kind.reset: _reset,
    Kind.hang: _hang,
    Kind.status: _status,
    Kind.not_http: _not_http,
    Kind.slow_head: _slow_head,
    Kind.endless_head: _endless_head,
    Kind.cut_head: _cut_head,
    Kind.long_length: _long_length,
    Kind.open_end: _open_end,
    Kind.not_streamed: _not_streamed,
    Kind.surplus: _surplus,
    Kind.rst: _rst,
    Kind.fin: _fin,
    Kind.undone: _undone,
    Kind.stall: _stall,
    Kind.second_head: _second_head,
    Kind.not_sse: _not_sse,
    Kind.not_json: _not_json,
    Kind.not_utf8: _not_utf8,
    Kind.error_event: _error_event,
    Kind.huge_event: _huge_event,
}


def _write_part(answer: Answer) -> None:
    """What comes before the fault and is not written yet: of a stream, at most its header."""
    if answer.shape.stream:
        answer.write_head()
    else:
        whole, first = body(answer.shape, answer.id), _halves(answer)[0]
        answer.write(response(whole)[: -len(whole)] + first)
        answer.written = answer.place


def _write_short(answer: Answer) -> None:
    """All of it, as the beginning of a body that is 100 bytes longer."""
    shape = answer.shape
    if shape.stream:
        kind, sent = b"text/event-stream", b"".join(unframed(pieces(shape, answer.id)))
    else:
        kind, sent = b"application/json", body(shape, answer.id)
    answer.written = shape.tokens
    answer.make(shape.tokens)
    head = b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\ncontent-length: %d\r\n\r\n" % (kind, len(sent) + 100)
    answer.write(head + sent)


def _write_other(answer: Answer, word: bytes) -> None:
    """Another text in the place of the next token's; then all goes on."""
    if answer.shape.stream:
        others = pieces(answer.shape._replace(word=word), answer.id)
        answer.write_piece(next(islice(others, answer.written, None)))
        answer.next_piece()  # which it is in the place of
    else:
        first, second = _halves(answer)
        answer.write_whole(response(first + word + second))
    answer.release()


def _halves(answer: Answer) -> tuple[bytes, bytes]:
    """A body, cut where the text of the tokens before the fault ends."""
    whole = body(answer.shape, answer.id)
    start = TEXT_STARTS[answer.shape.route]
    cut = whole.index(start) + len(start) + len(answer.shape.word) * answer.place
    return whole[:cut], whole[cut:]


def _trickle(answer: Answer, parts: Iterator[bytes], wait_s: float) -> None:
    """Write a part at a time, unless the client does not read; go on with the answer once there are no more."""

    def tick() -> None:
        if answer.over:
            return
        if not answer.connection.paused:
            part = next(parts, None)
            if part is None:
                answer.release()
                return
            answer.write(part)
        answer.connection.emulator.wheel.at(time.perf_counter() + wait_s, tick)

    tick()
