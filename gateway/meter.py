"""The reply as the client gets it: relayed, its tokens counted, its errors raised.

Bytes pass through: of an event only the few fields that say usage, error or end are decoded, and only what the
client did not ask for is taken out. The engine's own counts are what is recorded wherever they arrive: a stream is
asked to carry them in every chunk where the engine can (vLLM), so that one cut short is still billed exactly for
what was delivered. Elsewhere events are counted, and the record says `estimated`.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import msgspec

from gateway.call import FIELDS, Call
from gateway.errors import BadRequest, DeadlineExceeded, EngineFailed, GatewayError
from runtimes.clock import Clock
from runtimes.contract import Broken, Expired, Reply


class Answer(msgspec.Struct):
    """What the edge sends: an answer that went well, at least until its first byte."""

    status: int
    body: bytes
    """The whole of it, or of a stream what is at hand already."""
    events: AsyncIterator[bytes] | None = None
    """The rest of a stream: whole server-sent events but the closing one. Raises GatewayError if the engine
    breaks off."""
    end: bytes = b""
    """The closing event. It goes out once everything has been settled: who sees it, has been recorded."""


async def meter(call: Call, reply: Reply, clock: Clock) -> Answer:
    """The answer, once its first event or, without a stream, all of it is here.

    Raises what the engine refused or failed with, in one shape: BadRequest with the engine's own 4xx,
    EngineFailed with its 5xx or if it breaks off, DeadlineExceeded.
    """
    call.first_byte_s = clock.now_s() - call.received_s
    if reply.status < 400 and _header(reply, b"content-type").startswith(b"text/event-stream"):
        answer = Answer(reply.status, b"")
        answer.events = _stream(call, reply, answer)
        # Waited for here, because an error that comes first can still be told with a status of its own.
        answer.body = await anext(answer.events, b"")
        call.status = reply.status
        return answer
    body = await _whole(call, reply)
    if reply.status >= 400:
        call.complete = True
        raise _refusal(reply, body)
    call.status = reply.status
    if not call.tokens_in:
        _count_whole(call, body)
    call.complete = True
    return Answer(reply.status, body)


#: A raw field that was not there, null, or an empty list.
LEFT_OUT, NULL, NONE = msgspec.Raw(b""), msgspec.Raw(b"null"), msgspec.Raw(b"[]")


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
    cache_creation_input_tokens: int | None = None

    @property
    def tokens_in(self) -> int | None:
        if self.input_tokens is None:
            return self.prompt_tokens
        # Anthropic counts what came out of the cache, or went into it, apart from the rest.
        return self.input_tokens + (self.cache_read_input_tokens or 0) + (self.cache_creation_input_tokens or 0)

    @property
    def tokens_out(self) -> int | None:
        return self.completion_tokens if self.output_tokens is None else self.output_tokens

    @property
    def tokens_cached(self) -> int | None:
        details = self.prompt_tokens_details or self.input_tokens_details
        return self.cache_read_input_tokens if details is None else details.cached_tokens


class Carrier(msgspec.Struct):
    """An object inside an event that carries usage: `response` or `message`."""

    usage: Counts | None = None


class Choice(msgspec.Struct):
    index: int = 0


class Event(msgspec.Struct):
    """The few fields of a streamed event, or of a whole answer, that the gateway reads."""

    type: str | None = None
    choices: msgspec.Raw = LEFT_OUT
    usage: Counts | None = None
    response: Carrier | None = None
    message: msgspec.Raw = LEFT_OUT
    error: msgspec.Raw = LEFT_OUT


class Failure(msgspec.Struct):
    """An error body: OpenAI's, or one of those that servers without an opinion send (FastAPI's `detail`)."""

    error: msgspec.Raw = LEFT_OUT
    detail: msgspec.Raw = LEFT_OUT


class Said(msgspec.Struct):
    """What an engine says of its error. Nothing is relied upon: a field of another type counts as left out."""

    message: Any = None
    type: Any = None
    param: Any = None
    code: Any = None


class Complaint(msgspec.Struct):
    """An item of FastAPI's `detail`; the rest of it would echo the request."""

    loc: list[str | int]
    msg: str


EVENT = msgspec.json.Decoder(Event)
COUNTS = msgspec.json.Decoder(Counts)
CARRIER = msgspec.json.Decoder(Carrier)
CHOICES = msgspec.json.Decoder(list[Choice])
FAILURE = msgspec.json.Decoder(Failure)
SAID = msgspec.json.Decoder(Said | str)
DETAIL = msgspec.json.Decoder(list[Complaint] | str)

#: Longest answer that is not streamed, longest single event of one that is, and longest error in plain text.
ANSWER_BYTES_MAX = 64 * 1024 * 1024
EVENT_BYTES_MAX = 8 * 1024 * 1024
PLAIN_ERROR_BYTES_MAX = 1024
#: How long an engine may take to end its body after its closing event.
AFTER_END_S_MAX = 1.0

USAGE = b',"usage":'

#: Event types that end a stream of the routes that don't use `[DONE]`.
CLOSING = frozenset({"response.completed", "response.incomplete", "response.failed", "message_stop"})


# ---- an answer in one piece --------------------------------------------------------------------------------


async def _whole(call: Call, reply: Reply) -> bytes:
    parts, size = [], 0
    try:
        async for part in reply.frames:
            size += len(part)
            if size > ANSWER_BYTES_MAX:
                raise EngineFailed(f"Model {call.model!r} answered more than {ANSWER_BYTES_MAX} bytes.")
            parts.append(part)
    except Broken as fault:
        raise EngineFailed(f"Model {call.model!r} broke off its answer; retry.", retry_after_s=1.0) from fault
    except Expired as fault:
        raise DeadlineExceeded(f"Model {call.model!r} did not finish its answer in time.") from fault
    return b"".join(parts)


def _count_whole(call: Call, body: bytes) -> None:
    try:
        usage = EVENT.decode(body).usage
    except msgspec.MsgspecError:
        usage = None
    if usage is not None:
        _count(call, usage)
        return
    call.estimated = True
    call.tokens_in = call.tokens_in_estimate
    # Four bytes a token as for the input, but never more than the call could have been given.
    allowed = len(body) if call.tokens_out_max is None else call.tokens_out_max * call.choices
    call.tokens_out = min(len(body) // 4, allowed)


def _count(call: Call, usage: Counts) -> None:
    """Usage so far, never added up: every mention replaces the one before it."""
    call.estimated = False
    if (tokens_in := usage.tokens_in) is not None:
        call.tokens_in = tokens_in
    if (tokens_out := usage.tokens_out) is not None:
        call.tokens_out = tokens_out
    if (tokens_cached := usage.tokens_cached) is not None:
        call.tokens_cached = tokens_cached


# ---- a stream of events ------------------------------------------------------------------------------------


async def _stream(call: Call, reply: Reply, answer: Answer) -> AsyncIterator[bytes]:
    """Relay whole events up to the closing one, which becomes the answer's `end`."""
    choices: dict[int, Counts] = {}
    pending = bytearray()
    try:
        async for part in reply.frames:
            if pending or not part.endswith(b"\n\n"):
                block = _whole_events(pending, part)
                if not block:
                    continue
            else:
                block = part
            relayed, fault = _relay(call, answer, choices, block)
            if relayed:
                yield relayed
            if fault is not None:
                raise fault
            if answer.end:
                break
    except Broken as fault:
        raise EngineFailed(f"Model {call.model!r} broke off its answer.") from fault
    except Expired as fault:
        raise DeadlineExceeded(f"Model {call.model!r} did not finish its answer in time.") from fault
    if not answer.end:
        raise EngineFailed(f"Model {call.model!r} ended its answer early, without the closing event.")
    call.complete = True
    # Read to the true end, so that the connection can be used again; but nobody waits long for that.
    with suppress(Broken, Expired, TimeoutError):
        async with asyncio.timeout(AFTER_END_S_MAX):
            async for _ in reply.frames:
                pass


def _whole_events(pending: bytearray, part: bytes) -> bytes:
    """Add `part` to what is pending, and take the whole events out of it."""
    searched = max(0, len(pending) - 3)
    pending += part
    cut = max(pending.rfind(b"\n\n", searched) + 2, pending.rfind(b"\n\r\n", searched) + 3)
    if cut < 4:
        if len(pending) > EVENT_BYTES_MAX:
            raise EngineFailed(f"The engine sent an event of more than {EVENT_BYTES_MAX} bytes.")
        return b""
    block = bytes(pending[:cut])
    del pending[:cut]
    return block


def _relay(call: Call, answer: Answer, choices: dict[int, Counts], block: bytes) -> tuple[bytes, GatewayError | None]:
    """Whole events as the client gets them, up to one that says the engine failed."""
    if b"\r" in block:
        block = block.replace(b"\r\n", b"\n")
    relayed: list[bytes] = []
    for event in block.split(b"\n\n"):
        if event and not answer.end:
            try:
                relayed.append(_relay_event(call, answer, choices, event))
            except GatewayError as fault:
                return b"".join(relayed), fault
    return b"".join(relayed), None


def _relay_event(call: Call, answer: Answer, choices: dict[int, Counts], event: bytes) -> bytes:
    """The event as the client gets it; empty if it gets none, or if it is held back as the closing one."""
    whole = event + b"\n\n"
    start = (0 if event.startswith(b"data:") else event.find(b"\ndata:") + 1) + len(b"data:")
    payload = event[start:].strip()
    if payload == b"[DONE]":
        answer.end = whole
        return b""
    try:
        seen = EVENT.decode(payload)
    except msgspec.MsgspecError:
        return whole
    if seen.type == "error" or _given(seen.error):
        raise _fault(seen.error if _given(seen.error) else payload, None)
    usage = seen.usage if seen.response is None else seen.response.usage
    if seen.type == "message_start" and _given(seen.message):
        usage = CARRIER.decode(seen.message).usage
    if usage is None:
        if (_given(seen.choices) and seen.choices != NONE) or (seen.type or "").endswith("delta"):
            # An event that brings text and says no usage: about one token.
            call.estimated = True
            call.tokens_in = call.tokens_in or call.tokens_in_estimate
            call.tokens_out += 1
    elif call.choices == 1 or not _given(seen.choices) or seen.choices == NONE:
        _count(call, usage)
    else:
        _count_choice(call, choices, CHOICES.decode(seen.choices), usage)
    if seen.type in CLOSING:
        answer.end = whole
        return b""
    if seen.usage is None or not _given(seen.choices):
        return whole
    if seen.choices == NONE:
        return whole if call.usage_asked else b""
    if call.chunk_usage_asked:
        return whole
    return event[:start] + b" " + _without_usage(payload) + b"\n\n"


def _without_usage(payload: bytes) -> bytes:
    cut = payload.rfind(USAGE)
    try:
        COUNTS.decode(payload[cut + len(USAGE) : -1])
    except msgspec.MsgspecError:
        fields = FIELDS.decode(payload)
        del fields["usage"]
        return msgspec.json.encode(fields)
    return payload[:cut] + b"}"  # it was the last field, as in nearly all chunks: the rest stays as it is


def _count_choice(call: Call, choices: dict[int, Counts], seen: list[Choice], usage: Counts) -> None:
    """A chunk's usage is that of its one choice and its prompt; the call's is the sum of the latest of each.

    So it is in vLLM, whose choices are numbered prompt by prompt.
    """
    choices.update((choice.index, usage) for choice in seen)
    per_prompt = call.choices // call.prompts
    prompts = {index // per_prompt: latest.tokens_in or 0 for index, latest in choices.items()}
    call.estimated = False
    call.tokens_in = sum(prompts.values())
    call.tokens_out = sum(latest.tokens_out or 0 for latest in choices.values())


# ---- an engine's error -------------------------------------------------------------------------------------


def _refusal(reply: Reply, body: bytes) -> GatewayError:
    """An engine's error body in OpenAI's shape: one object, `code` a string, nothing lost that it said."""
    try:
        failure = FAILURE.decode(body)
    except msgspec.MsgspecError:
        failure = Failure()
        body = msgspec.json.encode(_plain(body))
    if _given(failure.detail) and not _given(failure.error):
        fault = _fault(msgspec.json.encode(_detail(failure.detail)), reply.status)
    else:
        fault = _fault(failure.error if _given(failure.error) else body, reply.status)
    after_s = _header(reply, b"retry-after")
    fault.retry_after_s = float(after_s) if after_s.isdigit() else None
    return fault


def _fault(error: bytes | msgspec.Raw, status: int | None) -> GatewayError:
    """`status` is the engine's; None amid a stream, where the error's own code may say it."""
    try:
        said = SAID.decode(error)
    except msgspec.MsgspecError:
        said = Said()
    if isinstance(said, str):
        said = Said(message=said)
    if status is None:
        status = said.code if isinstance(said.code, int) and 400 <= said.code < 600 else EngineFailed.status
    fault: GatewayError = BadRequest("") if status < 500 else EngineFailed("")
    fault.status = status
    fault.retryable = status in RETRYABLE
    message = QUOTED.sub("…", _text(said.message))
    fault.message = message or f"The engine answered {status} without saying why."
    fault.type = _text(said.type) if _text(said.type) not in ("", "error") else fault.type
    fault.param = _text(said.param) or None
    fault.code = _text(said.code) or fault.code
    return fault


#: Validators built on pydantic (vLLM's, FastAPI's) quote the offending input, maybe a prompt. The client knows it;
#: whoever else gets to read the error must not.
QUOTED = re.compile(r",? ?['\"]?input['\"]?: .*", re.DOTALL)
#: Statuses after which the same call may well succeed.
RETRYABLE = frozenset({408, 409, 429, 500, 502, 503, 504})


def _given(field: msgspec.Raw) -> bool:
    return field != LEFT_OUT and field != NULL


def _text(value: Any) -> str:
    return str(value) if isinstance(value, str | int) else ""


def _plain(body: bytes) -> str:
    text = body[:PLAIN_ERROR_BYTES_MAX].decode("utf-8", "replace").strip()
    return "" if text.startswith("<") else text  # a web page explains nothing to a program


def _detail(detail: msgspec.Raw) -> Said:
    try:
        said = DETAIL.decode(detail)
    except msgspec.MsgspecError:
        return Said()
    if isinstance(said, str):
        return Said(message=said)
    fields = [".".join(str(step) for step in item.loc if step != "body") for item in said]
    message = "; ".join(f"{field}: {item.msg}" for field, item in zip(fields, said, strict=True))
    return Said(message=message, param=fields[0] if fields else None)


def _header(reply: Reply, wanted: bytes) -> bytes:
    return next((value for name, value in reply.headers if name == wanted), b"")
