"""The reply as the client gets it: relayed, its tokens counted, its errors raised.

The engine's own counts are what is recorded wherever they arrive: a stream is asked to carry them in every chunk where
the engine can (vLLM), so that one cut short is still billed exactly for what was delivered. Elsewhere, and where an
engine's counts can't be true, the text's length is taken, and the record says `estimated`.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Protocol

import msgspec

from gateway.call import Call
from gateway.errors import DeadlineExceeded, EngineFailed
from gateway.failure import LEFT_OUT, UNREADABLE, fault_of, given, header, refusal
from gateway.stream import Stream
from gateway.tokens import count, entries, estimate, said
from runtimes.clock import Clock
from runtimes.contract import GENERATING, POOLING, Broken, Expired, Reply

#: Longest answer that is not streamed.
ANSWER_BYTES_MAX = 64 * 1024 * 1024
#: How long an engine may take to end its body after its closing event.
AFTER_END_S_MAX = 1.0


class Receiver(Protocol):
    """A client that has begun to get an answer."""

    @property
    def full(self) -> bool:
        """It has not yet taken what it was given."""

    def write(self, part: bytes) -> None:
        """More of it."""

    async def drained(self) -> None:
        """Return when it can be given more."""


class Client(Protocol):
    """Where an answer goes that comes bit by bit."""

    def begin(self, status: int, first: bytes, *, events: bool = True) -> Receiver:
        """The first part, and where the others go. From here on a failure can only be told as an event; or, if the
        answer is none of events but JSON, by breaking off."""


class Answer(msgspec.Struct, frozen=True, gc=False):
    """What completes a call, to be sent once everything has been settled: who sees it, has been recorded."""

    status: int
    body: bytes
    """The whole answer, or a stream's closing event."""
    events: bool = False
    """It is a stream's."""


async def meter(call: Call, reply: Reply, client: Client, clock: Clock) -> Answer:
    """Relay a stream, or a long answer that is made here, to `client`, all but its end; collect any other answer.

    Raises what the engine refused or failed with, in one shape: BadRequest with the engine's own 4xx,
    EngineFailed with its 5xx or if it breaks off, DeadlineExceeded.
    """
    call.first_byte_s = clock.now_s() - call.received_s
    try:
        if reply.status < 400 and header(reply, b"content-type").lower().startswith(b"text/event-stream"):
            return await _relay(call, reply, client)
        if reply.counted and reply.body is None:
            return await _pass_on(call, reply, client)
        body = await _whole(call, reply) if reply.body is None else reply.body
    except Broken as fault:
        raise EngineFailed(f"Model {call.model!r} broke off its answer; retry.", retry_after_s=1.0) from fault
    except Expired as fault:
        raise DeadlineExceeded(f"Model {call.model!r} did not finish its answer in time.") from fault
    if reply.status >= 400:
        call.complete = True
        raise refusal(reply, body)
    if not reply.counted:
        _look_into(call, body)
    call.status, call.complete = reply.status, True
    return Answer(reply.status, body)


# ---- an answer in one piece --------------------------------------------------------------------------------


async def _whole(call: Call, reply: Reply) -> bytes:
    parts, size = [], 0
    async for part in reply.frames:
        size += len(part)
        if size > ANSWER_BYTES_MAX:
            raise EngineFailed(f"Model {call.model!r} answered more than {ANSWER_BYTES_MAX} bytes.")
        parts.append(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


async def _pass_on(call: Call, reply: Reply, client: Client) -> Answer:
    """One that is too long to be collected, and whose use is counted by who makes it. Its last part waits for the call
    to be settled."""
    receiver, held = None, b""
    async for part in reply.frames:
        if receiver is not None:
            receiver.write(held)
        elif held:
            call.status = reply.status
            receiver = client.begin(reply.status, held, events=False)
        held = part
        if receiver is not None and receiver.full:
            await _drained(call, receiver)
    call.status, call.complete = reply.status, True
    return Answer(reply.status, held)


async def _drained(call: Call, receiver: Receiver) -> None:
    try:
        async with asyncio.timeout_at(call.deadline_s):  # the clock's time base is the event loop's
            await receiver.drained()
    except TimeoutError:
        raise Expired("the client did not read its answer before the call's deadline") from None


class Whole(msgspec.Struct):
    """What the gateway reads of an answer."""

    usage: msgspec.Raw = LEFT_OUT
    error: msgspec.Raw = LEFT_OUT


WHOLE = msgspec.json.Decoder(Whole)


def _look_into(call: Call, body: bytes) -> None:
    """Count what it used. Raises what it says went wrong: SDKs take any 200 for an answer."""
    try:
        seen = WHOLE.decode(body)
    except UNREADABLE as fault:
        raise EngineFailed(
            f"Model {call.model!r} answered with something that is no JSON object; retry.", retry_after_s=1.0
        ) from fault
    if given(seen.error):
        raise fault_of(seen.error, None)
    if call.stream and call.route in GENERATING:
        raise EngineFailed(f"Model {call.model!r} answered in one piece what was to be streamed.")
    if call.route in POOLING:
        call.items = entries(call.body)
    usage = said(seen.usage)
    if usage is None:
        estimate(call, len(body) // 4)
    else:
        count(call, usage)


# ---- a stream of events ------------------------------------------------------------------------------------


async def _relay(call: Call, reply: Reply, client: Client) -> Answer:
    relay = Relay(call, reply.status, client)
    try:
        if reply.pour is not None:
            await reply.pour(relay)
        else:
            async for part in reply.frames:
                if not relay.take(part):
                    await relay.drained()
                if relay.done:
                    break
    finally:
        relay.stream.settle()
    if not relay.done:
        raise EngineFailed(f"Model {call.model!r} ended its answer early, without the closing event.")
    call.status, call.complete = reply.status, True
    # Read to the true end, so that the connection can be used again; but nobody waits long for that.
    with suppress(Broken, Expired, TimeoutError):
        async with asyncio.timeout(AFTER_END_S_MAX):
            async for _ in reply.frames:
                pass
    return Answer(reply.status, relay.stream.end, events=True)


class Relay:
    """A Sink (see runtimes.contract) that hands a stream on to a client."""

    __slots__ = (
        "call",
        "client",
        "receiver",
        "status",
        "stream",
    )

    def __init__(self, call: Call, status: int, client: Client) -> None:
        self.call = call
        self.status = status
        self.client = client
        self.stream = Stream(call)
        self.receiver: Receiver | None = None

    @property
    def done(self) -> bool:
        return bool(self.stream.end)

    def take(self, part: bytes) -> bool:
        stream, receiver = self.stream, self.receiver
        events = stream.feed(part)
        if events:
            if receiver is not None:
                receiver.write(events)
            else:
                # Not before: an error that comes first can still be told with a status of its own.
                self.call.status = self.status
                receiver = self.receiver = self.client.begin(self.status, events)
        if stream.fault is not None:
            raise stream.fault
        return not stream.end and (receiver is None or not receiver.full)

    async def drained(self) -> None:
        if self.receiver is not None and self.receiver.full:
            await _drained(self.call, self.receiver)
