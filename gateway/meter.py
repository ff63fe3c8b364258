"""The reply as the client gets it: relayed, its tokens counted, its errors raised.

Bytes pass through: of an event only the few fields that say usage, error or end are decoded, and only what the
client did not ask for is taken out. The engine's own counts are what is recorded wherever they arrive: a stream is
asked to carry them in every chunk where the engine can (vLLM), so that one cut short is still billed exactly for
what was delivered. Elsewhere, and where an engine's counts can't be true, the text's length is taken, and the record
says `estimated`.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from gateway.call import FIELDS, Call
from gateway.errors import BadRequest, DeadlineExceeded, EngineFailed, GatewayError, QuotaExceeded
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
    if reply.status < 400 and _header(reply, b"content-type").lower().startswith(b"text/event-stream"):
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


#: What can be a number of tokens; 2^53 is how far JSON's numbers are whole everywhere (RFC 8259 §6).
Tokens = Annotated[int, Meta(ge=0, le=2**53)]


class Details(msgspec.Struct):
    cached_tokens: Tokens | None = None


class Counts(msgspec.Struct):
    """Usage as chat and completions name it, and as responses and messages do."""

    prompt_tokens: Tokens | None = None
    completion_tokens: Tokens | None = None
    prompt_tokens_details: Details | None = None
    input_tokens: Tokens | None = None
    output_tokens: Tokens | None = None
    input_tokens_details: Details | None = None
    cache_read_input_tokens: Tokens | None = None
    cache_creation_input_tokens: Tokens | None = None

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

    usage: msgspec.Raw = LEFT_OUT


class Choice(msgspec.Struct):
    index: int = 0


class Event(msgspec.Struct):
    """The few fields of a streamed event, or of a whole answer, that the gateway reads; of any type at first."""

    type: Any = None
    choices: msgspec.Raw = LEFT_OUT
    delta: msgspec.Raw = LEFT_OUT
    usage: msgspec.Raw = LEFT_OUT
    response: msgspec.Raw = LEFT_OUT
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

#: What a decoder may raise: JSON nested beyond the interpreter's depth is as unreadable as none.
UNREADABLE = (msgspec.MsgspecError, RecursionError)

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
        usage = _usage(EVENT.decode(body).usage)
    except UNREADABLE:
        usage = None
    if usage is None:
        _estimate(call, len(body) // 4)
    else:
        _count(call, usage)


def _usage(said: msgspec.Raw) -> Counts | None:
    """The engine's counts; None if it says none, or none that can be true."""
    if not _given(said):
        return None
    try:
        counts = COUNTS.decode(said)
    except UNREADABLE:
        return None
    return None if counts.tokens_in is None and counts.tokens_out is None else counts


def _count(call: Call, usage: Counts) -> None:
    """Usage so far, never added up: every mention replaces the one before it."""
    call.estimated = False
    if (tokens_in := usage.tokens_in) is not None:
        call.tokens_in = tokens_in
    if (tokens_out := usage.tokens_out) is not None:
        call.tokens_out = tokens_out
    if (tokens_cached := usage.tokens_cached) is not None:
        call.tokens_cached = tokens_cached


def _estimate(call: Call, tokens_out: int) -> None:
    """So many tokens more, but never more in all than the call could have been given."""
    call.estimated = True
    call.tokens_in = call.tokens_in or call.tokens_in_estimate
    if call.tokens_out_max is not None:
        tokens_out = min(tokens_out, max(call.tokens_out_max * call.choices - call.tokens_out, 0))
    call.tokens_out += tokens_out


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
    payload = _payload(event)
    if payload == b"[DONE]":
        answer.end = whole
        return b""
    try:
        seen = EVENT.decode(payload)
    except UNREADABLE:
        if payload:  # it may well bring text, as a chunk with a NaN among its numbers does
            _estimate(call, 1)
        return whole
    kind = seen.type if isinstance(seen.type, str) else ""
    if kind == "error" or _given(seen.error):
        raise _fault(seen.error if _given(seen.error) else payload, None)
    _count_event(call, choices, seen, kind)
    if kind in CLOSING:
        answer.end = whole
        return b""
    if not _given(seen.usage) or not _given(seen.choices):
        return whole
    if seen.choices == NONE:
        return whole if call.usage_asked else b""
    if call.chunk_usage_asked:
        return whole
    lines = [line for line in event.split(b"\n") if not line.startswith(b"data:")]
    return b"\n".join([*lines, b"data: " + _without_usage(payload.replace(b"\n", b" "))]) + b"\n\n"


def _payload(event: bytes) -> bytes:
    """What an event's `data` lines say together (WHATWG HTML §9.2.6); empty for a comment."""
    if b"\n" not in event:
        return event[len(b"data:") :].strip() if event.startswith(b"data:") else b""
    return b"\n".join(line[len(b"data:") :] for line in event.split(b"\n") if line.startswith(b"data:")).strip()


def _count_event(call: Call, choices: dict[int, Counts], seen: Event, kind: str) -> None:
    said = seen.usage
    carrier = seen.message if kind == "message_start" else seen.response
    if _given(carrier):
        with suppress(*UNREADABLE):
            said = CARRIER.decode(carrier).usage
    usage = _usage(said)
    with_choices = _given(seen.choices) and seen.choices != NONE
    numbered: list[Choice] = []
    if usage is not None and with_choices and call.choices > 1:
        try:
            numbered = CHOICES.decode(seen.choices)
        except UNREADABLE:
            usage = None
    if usage is not None and numbered:
        _count_choice(call, choices, numbered, usage)
    elif usage is not None:
        _count(call, usage)
    elif with_choices or kind.endswith("delta"):
        # An event that brings text and says no usage: four bytes a token as for the input, but one at the least.
        _estimate(call, max(_text_bytes(seen.choices if with_choices else seen.delta) // 4, 1))
    elif _given(said):
        _estimate(call, 0)


def _text_bytes(brought: msgspec.Raw) -> int:
    """How much text a chunk's choices or an event's `delta` bring, tool calls and thoughts included."""
    try:
        fields = [msgspec.json.decode(brought)]
    except UNREADABLE:
        return 0
    size = 0
    while fields:
        field = fields.pop()
        if isinstance(field, str):
            size += len(field.encode())
        elif isinstance(field, list):
            fields += field
        elif isinstance(field, dict):
            fields += (value for name, value in field.items() if name not in NOT_TEXT)
    return size


#: Fields of a choice that no model wrote, or that say again what it wrote.
NOT_TEXT = frozenset({"id", "type", "role", "index", "finish_reason", "stop_reason", "logprobs", "token_ids"})


def _without_usage(payload: bytes) -> bytes:
    cut = payload.rfind(USAGE)
    try:
        COUNTS.decode(payload[cut + len(USAGE) : -1])
    except UNREADABLE:
        fields = FIELDS.decode(payload)
        del fields["usage"]
        return msgspec.json.encode(fields)
    return payload[:cut] + b"}"  # it was the last field, as in nearly all chunks: the rest stays as it is


def _count_choice(call: Call, choices: dict[int, Counts], seen: list[Choice], usage: Counts) -> None:
    """A chunk's usage is that of its one choice and its prompt; the call's is the sum of the latest of each.

    So it is in vLLM, whose choices are numbered prompt by prompt.
    """
    choices.update((choice.index, usage) for choice in seen if 0 <= choice.index < call.choices)
    per_prompt = call.choices // call.prompts
    prompts = {index // per_prompt: latest.tokens_in or 0 for index, latest in choices.items()}
    call.estimated = False
    call.tokens_in = sum(prompts.values())
    call.tokens_out = sum(latest.tokens_out or 0 for latest in choices.values())


# ---- an engine's error -------------------------------------------------------------------------------------


def _refusal(reply: Reply, body: bytes) -> GatewayError:
    """An engine's error body in OpenAI's shape: one object, `code` a short name, else nothing lost that it said."""
    try:
        failure = FAILURE.decode(body)
    except UNREADABLE:
        failure = Failure()
        body = msgspec.json.encode(_plain(body))
    if _given(failure.detail) and not _given(failure.error):
        fault = _fault(msgspec.json.encode(_detail(failure.detail)), reply.status)
    else:
        fault = _fault(failure.error if _given(failure.error) else body, reply.status)
    after_s = _header(reply, b"retry-after")
    if RETRY_AFTER_S.fullmatch(after_s):
        fault.retry_after_s = float(after_s)
    return fault


def _fault(error: bytes | msgspec.Raw, status: int | None) -> GatewayError:
    """`status` is the engine's; None amid a stream, where the error's own code may say it."""
    try:
        said = SAID.decode(error)
    except UNREADABLE:
        said = Said()
    if isinstance(said, str):
        said = Said(message=said)
    if status is None:
        status = said.code if isinstance(said.code, int) and 400 <= said.code < 600 else EngineFailed.status
    # A log says the status alone: the engine's words, which the client gets, may quote its prompt.
    fault: GatewayError = (BadRequest if status < 500 else EngineFailed)(f"the engine answered {status}")
    fault.status = status
    if status == QuotaExceeded.status:
        fault.type = QuotaExceeded.type
    fault.retryable = status in RETRYABLE
    message = QUOTED.sub("…", _text(said.message))
    fault.message = message or f"The engine answered {status} without saying why."
    fault.type = _text(said.type) if _text(said.type) not in ("", "error") else fault.type
    fault.param = _text(said.param) or None
    # The code alone is recorded and traced. What is no name, or a very long one, could be a prompt.
    code = _text(said.code)
    fault.code = code if CODE.fullmatch(code) else fault.code
    return fault


#: Validators built on pydantic (vLLM's, FastAPI's) quote the offending input, maybe a prompt. The client knows it;
#: whoever else gets to read the error must not.
QUOTED = re.compile(r",? ?['\"]?input['\"]?: .*", re.DOTALL)
CODE = re.compile(r"[A-Za-z0-9_.-]{1,64}")
#: Whole seconds, up to some eleven days; anything else is no advice.
RETRY_AFTER_S = re.compile(rb"[0-9]{1,6}")
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
    except UNREADABLE:
        return Said()
    if isinstance(said, str):
        return Said(message=said)
    fields = [".".join(str(step) for step in item.loc if step != "body") for item in said]
    message = "; ".join(f"{field}: {item.msg}" for field, item in zip(fields, said, strict=True))
    return Said(message=message, param=fields[0] if fields else None)


def _header(reply: Reply, wanted: bytes) -> bytes:
    return next((value for name, value in reply.headers if name == wanted), b"")
