"""A stream of server-sent events (WHATWG HTML §9.2) on its way from an engine to a client, looked into as little as
can be.

An event is decoded only if it says usage, error or end; any other is recognised by what is not in it and goes through
as it came. Nothing here waits, so that an engine's bytes can be handed on from within the read that brought them.
"""

from __future__ import annotations

import re
from contextlib import suppress
from typing import Any

import msgspec

from gateway.call import FIELDS, USAGE_ON_REQUEST, Call
from gateway.errors import EngineFailed, GatewayError
from gateway.failure import LEFT_OUT, UNREADABLE, fault_of, given
from gateway.tokens import COUNTS, Counts, count, estimate, said

#: As numbers, and what is longer by `find`: `in` takes bytes for a number at first, and makes an exception, which takes
#: ten times as long as to look.
QUOTE, BACKSLASH, LINE_END, RETURN = b'"\\\n\r'

#: Longest single event.
EVENT_BYTES_MAX = 8 * 1024 * 1024


class Stream:
    """`feed` takes bytes as they come and returns what the client gets of them now; `end` is the closing event once it
    is here, `fault` what the engine failed with. `settle` afterwards brings the call's counts up to date."""

    __slots__ = (
        "_around",
        "_choices",
        "_guessed",
        "_metered",
        "_pending",
        "_plain",
        "_trims",
        "_usage",
        "call",
        "end",
        "fault",
    )

    def __init__(self, call: Call) -> None:
        self.call = call
        self.end = b""
        """The closing event, held back."""
        self.fault: GatewayError | None = None
        self._pending = bytearray()
        """The beginning of an event."""
        self._choices: dict[int, Counts] = {}
        self._guessed = 0
        """Tokens of events that said no usage, not yet counted."""
        self._around = NOTHING
        """What stood before and behind the text of the last plain event."""
        self._usage = b""
        """The usage of the newest chunk, not looked into as long as another may replace it."""
        self._metered = 0
        """Chunks whose usage was not looked into."""
        self._plain = call.route in USAGE_ON_REQUEST
        self._trims = self._plain and call.choices == 1 and not call.chunk_usage_asked

    def feed(self, part: bytes) -> bytes:
        head, tail = self._around
        if head and part[: len(head)] == head and part[-len(tail) :] == tail and not self._pending:
            # An event like the plain one before it, but for the text. All else being equal, and the text within its
            # quotes, it can say neither usage nor error nor end.
            text = part[len(head) : -len(tail)]
            if not (QUOTE in text or BACKSLASH in text or LINE_END in text):
                self._guessed += len(text) // 4 or 1
                return part
        if self._pending or part[-2:] != b"\n\n":
            part = self._whole_events(part)
        if RETURN in part:
            part = part.replace(b"\r\n", b"\n")
        if part.find(b"\n\n", 0, -2) < 0:  # one event, as nearly always
            return self._event(part) if part and not self.end else b""
        return b"".join(
            self._event(event + b"\n\n")
            for event in part.split(b"\n\n")
            if event and not self.end and self.fault is None
        )

    def settle(self) -> None:
        if self._guessed:
            estimate(self.call, self._guessed)
            self._guessed = 0
        if self._usage:
            usage = said(msgspec.Raw(self._usage))
            if usage is not None:
                count(self.call, usage)
            else:
                estimate(self.call, self._metered)
            self._usage, self._metered = b"", 0

    def _whole_events(self, part: bytes) -> bytes:
        """Add `part` to what is pending, and take the whole events out of it."""
        pending = self._pending
        searched = max(0, len(pending) - 3)
        pending += part
        cut = max(pending.rfind(b"\n\n", searched) + 2, pending.rfind(b"\n\r\n", searched) + 3)
        if cut < 4:
            if len(pending) > EVENT_BYTES_MAX:
                self.fault = EngineFailed(f"The engine sent an event of more than {EVENT_BYTES_MAX} bytes.")
            return b""
        block = bytes(pending[:cut])
        del pending[:cut]
        return block

    def _event(self, whole: bytes) -> bytes:
        """One event as the client gets it; empty if it gets none, or if it is held back as the closing one."""
        if self._plain and whole[:7] == b"data: {" and whole.find(b'"error"') < 0:
            if whole.find(b'"usage"') < 0:
                if self._usage:
                    self.settle()  # it was said before this text
                head, tail = self._around = _around_text(whole)
                text = whole[len(head) : -len(tail)]
                is_plain = head and not (BACKSLASH in text or LINE_END in text)
                self._guessed += (len(text) if is_plain else _text_bytes(whole)) // 4 or 1
                return whole
            if self._trims and (trimmed := self._trimmed(whole)):
                return trimmed
        self.settle()
        return self._looked_into(whole)

    def _trimmed(self, whole: bytes) -> bytes:
        """The event without its usage, if that is its last field, as it is in vLLM's chunks: found without decoding,
        because inside a JSON string the quotes of `,"usage":{` would be escaped. Empty if it is not so plain."""
        rest, _, usage = whole.rpartition(b',"usage":')
        if not rest or rest.find(b'"choices":[]') >= 0 or not LAST_OBJECT.fullmatch(usage):
            return b""
        self._usage = usage[:-3]
        self._around = NOTHING
        self._metered += 1
        return rest + b"}\n\n"

    def _looked_into(self, whole: bytes) -> bytes:
        call, event = self.call, whole[:-2]
        payload = payload_of(event)
        if payload == b"[DONE]":
            self.end = whole
            return b""
        try:
            seen = EVENT.decode(payload)
        except UNREADABLE:
            if payload:  # it may well bring text, as a chunk with a NaN among its numbers does
                estimate(call, 1)
            return whole
        kind = seen.type if isinstance(seen.type, str) else ""
        if kind == "error" or given(seen.error):
            self.fault = fault_of(seen.error if given(seen.error) else payload, None)
            return b""
        self._count(seen, kind)
        if kind in CLOSING:
            self.end = whole
            return b""
        if not given(seen.usage) or not given(seen.choices):
            return whole
        if seen.choices == NONE:
            return whole if call.usage_asked else b""
        if call.chunk_usage_asked:
            return whole
        lines = [line for line in event.split(b"\n") if not line.startswith(b"data:")]
        return b"\n".join([*lines, b"data: " + _without_usage(payload.replace(b"\n", b" "))]) + b"\n\n"

    def _count(self, seen: Event, kind: str) -> None:
        call, brought = self.call, seen.usage
        carrier = seen.message if kind == "message_start" else seen.response
        if given(carrier):
            with suppress(*UNREADABLE):
                brought = CARRIER.decode(carrier).usage
        usage = said(brought)
        with_choices = given(seen.choices) and seen.choices != NONE
        numbered: list[Choice] = []
        if usage is not None and with_choices and call.choices > 1:
            try:
                numbered = CHOICES.decode(seen.choices)
            except UNREADABLE:
                usage = None
        if usage is not None and numbered:
            self._count_choice(numbered, usage)
        elif usage is not None:
            count(call, usage)
        elif with_choices or kind.endswith("delta"):
            # An event that brings text and says no usage: four bytes a token as for the input, but one at the least.
            estimate(call, max(_text_bytes(seen.choices if with_choices else b'"delta":' + bytes(seen.delta)) // 4, 1))
        elif given(brought):
            estimate(call, 0)

    def _count_choice(self, seen: list[Choice], usage: Counts) -> None:
        """A chunk's usage is that of its one choice and its prompt; the call's is the sum of the latest of each.

        So it is in vLLM, whose choices are numbered prompt by prompt.
        """
        call, choices = self.call, self._choices
        choices.update((choice.index, usage) for choice in seen if 0 <= choice.index < call.choices)
        per_prompt = call.choices // call.prompts
        prompts = {index // per_prompt: latest.tokens_in or 0 for index, latest in choices.items()}
        call.estimated = False
        call.tokens_in = sum(prompts.values())
        call.tokens_out = sum(latest.tokens_out or 0 for latest in choices.values())


class Carrier(msgspec.Struct):
    """An object inside an event that carries usage: `response` or `message`."""

    usage: msgspec.Raw = LEFT_OUT


class Choice(msgspec.Struct):
    index: int = 0


class Event(msgspec.Struct):
    """The few fields of an event, or of a whole answer, that the gateway reads; of any type at first."""

    type: Any = None
    choices: msgspec.Raw = LEFT_OUT
    delta: msgspec.Raw = LEFT_OUT
    usage: msgspec.Raw = LEFT_OUT
    response: msgspec.Raw = LEFT_OUT
    message: msgspec.Raw = LEFT_OUT
    error: msgspec.Raw = LEFT_OUT


EVENT = msgspec.json.Decoder(Event)
CARRIER = msgspec.json.Decoder(Carrier)
CHOICES = msgspec.json.Decoder(list[Choice])
NOTHING = b"", b""
#: An empty list.
NONE = msgspec.Raw(b"[]")
USAGE = b',"usage":{'
#: An object, at most two levels deep, the closing brace of the one around it, and the event's end.
LAST_OBJECT = re.compile(rb"\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\}\}\n\n")
#: Event types that end a stream of the routes that don't use `[DONE]`.
CLOSING = frozenset({"response.completed", "response.incomplete", "response.failed", "message_stop"})


def payload_of(event: bytes) -> bytes:
    """What an event's `data` lines say together (WHATWG HTML §9.2.6); empty for a comment."""
    if LINE_END not in event:
        return event[len(b"data:") :].strip() if event.startswith(b"data:") else b""
    return b"\n".join(line[len(b"data:") :] for line in event.split(b"\n") if line.startswith(b"data:")).strip()


def _around_text(whole: bytes) -> tuple[bytes, bytes]:
    """What stands before and behind a chunk's text, if that is the only string of its choices; else nothing."""
    before, found, behind = whole.rpartition(b'{"content":"')
    choices = before.rpartition(b'"choices":[')[2]
    _text, quote, behind = behind.partition(b'"')
    if not found or choices.find(b'":"') >= 0 or behind.find(b'":"') >= 0:
        return NOTHING
    return before + found, quote + behind


def _text_bytes(brought: bytes | msgspec.Raw) -> int:
    """How much text an event brings, tool calls and thoughts included: all strings that are fields."""
    return sum([_length(text) for name, text in STRINGS.findall(brought) if name not in NOT_TEXT])


def _length(text: bytes) -> int:
    if BACKSLASH in text:
        with suppress(*UNREADABLE):
            return len(TEXT.decode(b'"%b"' % text).encode())
    return len(text)


TEXT = msgspec.json.Decoder(str)
STRINGS = re.compile(rb'"(\w+)"\s*:\s*"([^"\\]*(?:\\.[^"\\]*)*)"')
#: Fields of a chunk that no model wrote, or that say again what it wrote.
NOT_TEXT = frozenset(
    {b"id", b"object", b"model", b"system_fingerprint", b"service_tier", b"type", b"role", b"finish_reason"}
    | {b"stop_reason", b"token", b"obfuscation"}
)


def _without_usage(payload: bytes) -> bytes:
    cut = payload.rfind(USAGE)
    try:
        COUNTS.decode(payload[cut + len(USAGE) - 1 : -1])
    except UNREADABLE:
        fields = FIELDS.decode(payload)
        del fields["usage"]
        return msgspec.json.encode(fields)
    return payload[:cut] + b"}"  # it was the last field, as in nearly all chunks: the rest stays as it is
