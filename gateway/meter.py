"""The reply as the client gets it: relayed, its tokens counted, its errors in one shape.

Bytes pass through. Only events that say usage, error or end are decoded, and only what the client did not ask for
is taken out of them. The engine's own counts are what is recorded wherever they arrive: a stream is asked to
carry them in every chunk where the engine can (vLLM), so that one cut short is still billed exactly for what was
delivered. Elsewhere events are counted, and the record says `estimated`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import msgspec

from gateway.call import FIELDS, Call
from gateway.errors import DeadlineExceeded, EngineFailed, GatewayError
from runtimes.clock import Clock
from runtimes.contract import Broken, Expired, Reply


class Answer(msgspec.Struct):
    """What the edge sends."""

    status: int
    body: bytes | None
    """The whole of it, or None for a stream."""
    events: AsyncIterator[bytes] | None = None
    """Whole server-sent events, the closing one held back. Raises GatewayError if the engine breaks off."""
    retry_after: bytes | None = None
    """The engine's own `retry-after`, if it sent one."""
    end: bytes = b""
    """The closing event. It goes out once everything has been settled: who sees it, has been recorded."""


async def meter(call: Call, reply: Reply, clock: Clock) -> Answer:
    """Raises EngineFailed or DeadlineExceeded if an answer that is not streamed does not arrive whole."""
    call.first_byte_s = clock.now_s() - call.received_s
    if reply.status < 400 and (_header(reply, b"content-type") or b"").startswith(b"text/event-stream"):
        call.status = reply.status
        answer = Answer(reply.status, None)
        answer.events = _stream(call, reply, answer)
        return answer
    body = await _whole(call, reply)
    call.status = reply.status
    if reply.status >= 400:
        body = _error_body(call, reply.status, body)
    elif not call.tokens_in:
        _count_whole(call, body)
    call.complete = True
    return Answer(reply.status, body, retry_after=_header(reply, b"retry-after"))


class Details(msgspec.Struct):
    cached_tokens: int | None = None


class Counts(msgspec.Struct):
    """Usage as chat and completions name it, and as responses and messages do."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: Details | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    input_tokens_details: Details | None = None
    cache_read_input_tokens: int | None = None


class Carrier(msgspec.Struct):
    """An object inside an event that carries usage: `response` or `message`."""

    usage: Counts | None = None


ABSENT = msgspec.Raw(b"")
NOTHING = (b"", b"null")


class Event(msgspec.Struct):
    """The few fields of a streamed event, or of a whole answer, that the gateway reads."""

    type: str | None = None
    # A Raw in a union takes nothing but the other types: absent is the empty one.
    choices: msgspec.Raw = ABSENT
    usage: Counts | None = None
    response: Carrier | None = None
    message: msgspec.Raw = ABSENT
    error: msgspec.Raw = ABSENT


class Fault(msgspec.Struct):
    """An engine's error, in the shape of OpenAI's or nearly so."""

    message: str | None = None
    type: str | None = None
    param: str | None = None
    code: str | int | None = None


EVENT = msgspec.json.Decoder(Event)
CARRIER = msgspec.json.Decoder(Carrier)
FAULT = msgspec.json.Decoder(Fault)

#: Longest answer that is not streamed, and longest single event of one that is.
ANSWER_BYTES_MAX = 64 * 1024 * 1024
EVENT_BYTES_MAX = 8 * 1024 * 1024

#: Event types that end a stream of the routes that don't use `[DONE]`.
CLOSING = frozenset({"response.completed", "response.incomplete", "response.failed", "message_stop"})


async def _whole(call: Call, reply: Reply) -> bytes:
    parts, size = [], 0
    try:
        async for part in reply.frames:
            size += len(part)
            if size > ANSWER_BYTES_MAX:
                raise EngineFailed(f"Model {call.model!r} answered more than {ANSWER_BYTES_MAX} bytes.")
            parts.append(part)
    except Broken as fault:
        raise EngineFailed(f"The engine broke off its answer: {fault}.", retry_after_s=1.0) from None
    except Expired:
        raise DeadlineExceeded(f"Model {call.model!r} did not finish its answer in time.") from None
    return b"".join(parts)


def _count_whole(call: Call, body: bytes) -> None:
    try:
        usage = EVENT.decode(body).usage
    except msgspec.MsgspecError:
        usage = None
    if usage is None:
        call.estimated = True
        call.tokens_in, call.tokens_out = call.tokens_in_estimate, len(body) // 4
    else:
        _count(call, usage)


def _count(call: Call, usage: Counts) -> None:
    """Usage so far, never added up: every mention replaces the one before it."""
    call.estimated = False
    tokens_in = usage.prompt_tokens if usage.input_tokens is None else usage.input_tokens
    tokens_out = usage.completion_tokens if usage.output_tokens is None else usage.output_tokens
    details = usage.prompt_tokens_details or usage.input_tokens_details
    cached = usage.cache_read_input_tokens if details is None else details.cached_tokens
    if tokens_in is not None:
        call.tokens_in = tokens_in
    if tokens_out is not None:
        call.tokens_out = tokens_out
    if cached is not None:
        call.tokens_cached = cached


async def _stream(call: Call, reply: Reply, answer: Answer) -> AsyncIterator[bytes]:
    """Relay whole events; decode only those that say usage, error or end."""
    call.estimated = True
    call.tokens_in = call.tokens_in_estimate
    pending = b""
    try:
        async for part in reply.frames:
            if answer.end:
                continue  # read to the true end, so that the connection can be used again
            pending += part
            cut = max(pending.rfind(b"\n\n") + 2, pending.rfind(b"\r\n\r\n") + 4 if b"\r" in pending else 0)
            if cut < 2:
                if len(pending) > EVENT_BYTES_MAX:
                    raise EngineFailed(f"The engine sent an event of more than {EVENT_BYTES_MAX} bytes.")
                continue
            block, pending = pending[:cut], pending[cut:]
            relayed = _relay(call, answer, block)
            if relayed:
                yield relayed
    except Broken as fault:
        raise EngineFailed(f"The engine broke off its answer: {fault}.") from None
    except Expired:
        raise DeadlineExceeded(f"Model {call.model!r} did not finish its answer in time.") from None
    if not answer.end:
        raise EngineFailed(f"The engine ended its answer early, without its closing event ({call.replica}).")
    call.complete = True


def _relay(call: Call, answer: Answer, block: bytes) -> bytes:
    if b'"usage"' not in block and b'"error"' not in block and b"[DONE]" not in block and b'"type"' not in block:
        call.tokens_out += block.count(b"\ndata:") + block.startswith(b"data:")
        return block
    events = block.replace(b"\r\n", b"\n").split(b"\n\n")
    return b"".join(_relay_event(call, answer, event) for event in events if event and not answer.end)


def _relay_event(call: Call, answer: Answer, event: bytes) -> bytes:
    """The event as the client gets it; empty if it gets none, or if it is held back as the closing one."""
    whole = event + b"\n\n"
    start = 0 if event.startswith(b"data:") else event.find(b"\ndata:") + 1
    payload = event[start + 5 :].strip()
    if payload == b"[DONE]":
        answer.end = whole
        return b""
    try:
        seen = EVENT.decode(payload)
    except msgspec.MsgspecError:
        return whole
    if bytes(seen.error) not in NOTHING:
        raise _fault(seen.error, EngineFailed("The engine failed amid its answer."))
    if seen.response is not None and seen.response.usage is not None:
        _count(call, seen.response.usage)
    elif seen.usage is not None:
        _count(call, seen.usage)
    elif seen.type == "message_start" and seen.message != ABSENT:
        _count(call, CARRIER.decode(seen.message).usage or Counts())
    elif call.estimated:
        call.tokens_out += 1
    if seen.type in CLOSING:
        answer.end = whole
        return b""
    if seen.usage is None or seen.choices == ABSENT:
        return whole
    if bytes(seen.choices) == b"[]":
        return whole if call.usage_asked else b""
    if call.chunk_usage_asked:
        return whole
    fields = FIELDS.decode(payload)
    del fields["usage"]
    return b"data: " + msgspec.json.encode(fields) + b"\n\n"


def _error_body(call: Call, status: int, body: bytes) -> bytes:
    """An engine's error body in OpenAI's shape: one object, `code` a string, nothing lost that it said."""
    plain = EngineFailed(f"The engine answered {status} without saying why.")
    try:
        error = EVENT.decode(body).error
    except msgspec.MsgspecError:
        error = ABSENT
    silent = bytes(error) in NOTHING
    fault = plain if silent else _fault(error, plain)
    if silent and status < 500:
        fault.type = "invalid_request_error"
    call.code = fault.code
    return fault.body()


def _fault(error: msgspec.Raw, fault: GatewayError) -> GatewayError:
    try:
        said = FAULT.decode(error)
    except msgspec.MsgspecError:
        try:
            said = Fault(message=msgspec.json.decode(error, type=str))
        except msgspec.MsgspecError:
            return fault
    fault.message = said.message or fault.message
    fault.type = said.type or fault.type
    fault.param = said.param
    fault.code = fault.code if said.code is None else str(said.code)
    return fault


def _header(reply: Reply, wanted: bytes) -> bytes | None:
    return next((value for name, value in reply.headers if name == wanted), None)
