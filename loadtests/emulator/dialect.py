"""What is answered, in bytes: OpenAI's chat, completions and responses, in the shapes that vLLM gives them.

Every function is pure, and an answer depends on its Shape and its id alone, so that the bytes of one call are those of
another with the id exchanged: that is what makes instant answers cheap (`Ready`).
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import msgspec


class Route(enum.StrEnum):
    """What generates text."""

    chat = "/v1/chat/completions"
    completions = "/v1/completions"
    responses = "/v1/responses"


class Shape(NamedTuple):
    """All that decides an answer's bytes, its id excepted."""

    route: Route
    stream: bool
    usage: bool
    """In a stream: an event with the usage of all choices (`stream_options.include_usage`)."""
    usage_each: bool
    """And in every event its choice's own so far (vLLM's `continuous_usage_stats`)."""
    choices: int
    tokens: int
    """Of each choice."""
    reason: str
    """Why it ended there: `length` or `stop`."""
    prompt_tokens: int
    cached_tokens: int | None
    """Of the prompt, found in the prefix cache; None if there is no such cache."""
    word: bytes
    """A token's text, as it stands in JSON."""


WORD = b" water"
STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
LAST_CHUNK = b"0\r\n\r\n"
CREATED_S = 1_700_000_000
TEXT_STARTS = {Route.chat: b'"content":"', Route.completions: b'"text":"', Route.responses: b'"text":"'}
"""What the text of a body that is not streamed stands behind."""
ID_PREFIX = {Route.chat: b"chatcmpl-", Route.completions: b"cmpl-", Route.responses: b"resp_"}


def pieces(shape: Shape, id: bytes) -> Iterator[bytes]:
    """A stream's events, framed as chunks: a piece for each token (of each choice). What opens the stream travels with
    the first, what closes it with the last. The header and the last chunk are the caller's."""
    events = STREAMS[shape.route](shape, ID_PREFIX[shape.route] + id)
    opening = next(events)
    for number in range(1, shape.tokens + 1):
        piece = next(events)
        if number == 1:
            piece = opening + piece
        if number == shape.tokens:
            piece += next(events)
        yield piece


def body(shape: Shape, id: bytes) -> bytes:
    """An answer in one piece."""
    return WHOLES[shape.route](shape, ID_PREFIX[shape.route] + id)


def response(body: bytes, status: str = "200 OK", content_type: str = "application/json") -> bytes:
    """A whole response."""
    head = f"HTTP/1.1 {status}\r\ncontent-type: {content_type}\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


def chunk(data: bytes) -> bytes:
    """One chunk of HTTP (RFC 9112, 7.1)."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def event(data: bytes) -> bytes:
    """One server-sent event, in a chunk of its own."""
    return chunk(b"data: %b\n\n" % data)


def named_event(kind: bytes, number: int, fields: bytes) -> bytes:
    """The same, as responses have them."""
    return chunk(b'event: %b\ndata: {"type":"%b","sequence_number":%d,%b}\n\n' % (kind, kind, number, fields))


def unframed(framed: Iterable[bytes]) -> Iterator[bytes]:
    """What chunks bring."""
    for piece in framed:
        while piece:
            size, _, piece = piece.partition(b"\r\n")
            yield piece[: int(size, 16)]
            piece = piece[int(size, 16) + 2 :]


def error(message: str, kind: str = "invalid_request_error", code: int = 400) -> bytes:
    """An error's body, as vLLM words it."""
    said = {"message": message, "type": kind, "param": None, "code": code}
    return msgspec.json.encode({"error": said})


def instant(shape: Shape, id_length: int) -> list[bytes]:
    """A whole response, header and framing included, as what stands before, between and behind the places of an id of
    this length: `id.join` makes it one call's."""
    place = b"\0" * id_length  # JSON has no NUL in it
    if not shape.stream:
        return response(body(shape, place)).split(place)
    return (STREAM_HEAD + b"".join(pieces(shape, place)) + LAST_CHUNK).split(place)


# ---- chat and completions ----------------------------------------------------------------------------------


def _chat_stream(shape: Shape, id: bytes) -> Iterator[bytes]:
    start, numbers = _start(id, b"chat.completion.chunk"), range(shape.choices)
    role = b'[{"index":%d,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]'
    usage = b',"usage":' + _usage(shape, 0) if shape.usage_each else b""
    unasked = b',"prompt_token_ids":null,"prompt_text":null}'
    yield b"".join(event(start + role % number + usage + unasked) for number in numbers)
    said = b'[{"index":%d,"delta":{"content":"%b"},"logprobs":null,"finish_reason":%b,"token_ids":null}]'
    reason = b'"%b","stop_reason":null' % shape.reason.encode()
    middles = [start + said % (number, shape.word, b"null") for number in numbers]
    lasts = [start + said % (number, shape.word, reason) for number in numbers]
    yield from _tokens(shape, middles, lasts)
    yield _end(shape, start)


def _completions_stream(shape: Shape, id: bytes) -> Iterator[bytes]:
    start, numbers = _start(id, b"text_completion"), range(shape.choices)
    yield b""
    said = (
        b'[{"index":%d,"text":"%b","logprobs":null,"finish_reason":%b,"stop_reason":null,"prompt_token_ids":null,'
        b'"token_ids":null}]'
    )
    middles = [start + said % (number, shape.word, b"null") for number in numbers]
    lasts = [start + said % (number, shape.word, b'"%b"' % shape.reason.encode()) for number in numbers]
    yield from _tokens(shape, middles, lasts)
    yield _end(shape, start)


def _tokens(shape: Shape, middles: list[bytes], lasts: list[bytes]) -> Iterator[bytes]:
    """An event of every choice for each token."""
    same = b"".join(event(middle + b"}") for middle in middles)
    for number in range(1, shape.tokens + 1):
        said = lasts if number == shape.tokens else middles
        if shape.usage_each:
            usage = b',"usage":' + _usage(shape, number) + b"}"
            yield b"".join([event(choice + usage) for choice in said])
        else:
            yield same if said is middles else b"".join(event(choice + b"}") for choice in said)


def _end(shape: Shape, start: bytes) -> bytes:
    done = event(b"[DONE]")
    if not shape.usage:
        return done
    return event(start + b'[],"usage":%b,"system_fingerprint":"emulated"}' % _usage_of_all(shape)) + done


def _chat_whole(shape: Shape, id: bytes) -> bytes:
    choice = (
        b'{"index":%d,"message":{"role":"assistant","content":"%b","refusal":null,"annotations":null,"audio":null,'
        b'"function_call":null,"reasoning":null},"logprobs":null,"finish_reason":"%b","stop_reason":null,'
        b'"token_ids":null}'
    )
    return _whole(shape, _start(id, b"chat.completion"), choice)


def _completions_whole(shape: Shape, id: bytes) -> bytes:
    choice = (
        b'{"index":%d,"text":"%b","logprobs":null,"finish_reason":"%b","stop_reason":null,"token_ids":null,'
        b'"prompt_logprobs":null,"prompt_token_ids":null}'
    )
    return _whole(shape, _start(id, b"text_completion"), choice)


def _whole(shape: Shape, start: bytes, choice: bytes) -> bytes:
    text, reason = shape.word * shape.tokens, shape.reason.encode()
    choices = b",".join(choice % (number, text, reason) for number in range(shape.choices))
    about = b'"service_tier":null,"system_fingerprint":"emulated","usage":%b,"kv_transfer_params":null,"metrics":null}'
    return start + b"[" + choices + b"]," + about % _usage_of_all(shape)


def _start(id: bytes, kind: bytes) -> bytes:
    return b'{"id":"%b","object":"%b","created":%d,"model":"emulated","choices":' % (id, kind, CREATED_S)


def _usage(shape: Shape, tokens: int, details: bytes = b"") -> bytes:
    prompt_tokens = shape.prompt_tokens
    counts = (prompt_tokens, prompt_tokens + tokens, tokens, details)
    return b'{"prompt_tokens":%d,"total_tokens":%d,"completion_tokens":%d%b}' % counts


def _usage_of_all(shape: Shape) -> bytes:
    """Every choice's, and what the cache saved."""
    details = (
        b"" if shape.cached_tokens is None else b',"prompt_tokens_details":{"cached_tokens":%d}' % shape.cached_tokens
    )
    return _usage(shape, shape.tokens * shape.choices, details)


# ---- responses ---------------------------------------------------------------------------------------------


def _responses_stream(shape: Shape, id: bytes) -> Iterator[bytes]:
    text = shape.word * shape.tokens
    item = b'"item_id":"msg_0","output_index":0,"content_index":0'
    empty = _response(shape, id, b"in_progress", b"[]", b"null")
    yield b"".join(
        (
            named_event(b"response.created", 0, b'"response":' + empty),
            named_event(b"response.in_progress", 1, b'"response":' + empty),
            named_event(b"response.output_item.added", 2, b'"output_index":0,"item":' + _item(b"in_progress", b"[]")),
            named_event(b"response.content_part.added", 3, item + b',"part":' + _part(b"")),
        )
    )
    delta = item + b',"delta":"%b","logprobs":[]' % shape.word
    for number in range(4, shape.tokens + 4):
        yield named_event(b"response.output_text.delta", number, delta)
    last = shape.tokens + 4
    done = _item(b"completed", b"[" + _part(text) + b"]")
    answer = _response(shape, id, b"completed", b"[" + done + b"]", _usage_of_responses(shape))
    yield b"".join(
        (
            named_event(b"response.output_text.done", last, item + b',"text":"%b","logprobs":[]' % text),
            named_event(b"response.content_part.done", last + 1, item + b',"part":' + _part(text)),
            named_event(b"response.output_item.done", last + 2, b'"output_index":0,"item":' + done),
            named_event(b"response.completed", last + 3, b'"response":' + answer),
        )
    )


def _responses_whole(shape: Shape, id: bytes) -> bytes:
    done = _item(b"completed", b"[" + _part(shape.word * shape.tokens) + b"]")
    return _response(shape, id, b"completed", b"[" + done + b"]", _usage_of_responses(shape))


def _item(status: bytes, content: bytes) -> bytes:
    return b'{"id":"msg_0","type":"message","role":"assistant","status":"%b","content":%b}' % (status, content)


def _part(text: bytes) -> bytes:
    return b'{"type":"output_text","text":"%b","annotations":[],"logprobs":[]}' % text


def _response(shape: Shape, id: bytes, status: bytes, output: bytes, usage: bytes) -> bytes:
    if status == b"completed" and shape.reason == "length":
        status, details = b"incomplete", b'{"reason":"max_output_tokens"}'
    else:
        details = b"null"
    return (
        b'{"id":"%b","object":"response","created_at":%d,"model":"emulated","status":"%b","incomplete_details":%b,'
        b'"error":null,"instructions":null,"metadata":null,"parallel_tool_calls":true,"temperature":1.0,'
        b'"tool_choice":"auto","tools":[],"top_p":1.0,"output":%b,"usage":%b}'
    ) % (id, CREATED_S, status, details, output, usage)


def _usage_of_responses(shape: Shape) -> bytes:
    return (
        b'{"input_tokens":%d,"input_tokens_details":{"cached_tokens":%d},"output_tokens":%d,'
        b'"output_tokens_details":{"reasoning_tokens":0},"total_tokens":%d}'
    ) % (shape.prompt_tokens, shape.cached_tokens or 0, shape.tokens, shape.prompt_tokens + shape.tokens)


STREAMS: dict[Route, Callable[[Shape, bytes], Iterator[bytes]]] = {
    Route.chat: _chat_stream,
    Route.completions: _completions_stream,
    Route.responses: _responses_stream,
}
WHOLES: dict[Route, Callable[[Shape, bytes], bytes]] = {
    Route.chat: _chat_whole,
    Route.completions: _completions_whole,
    Route.responses: _responses_whole,
}
