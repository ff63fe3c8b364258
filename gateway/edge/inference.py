"""What the Open Inference Protocol's two doors have in common: how a request becomes a Call, and how one ends."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

import msgspec

from gateway.call import Call, CallIds, Principal
from gateway.edge.catalogue import COMPLETIONS, TENSORS, Catalogue
from gateway.errors import BadRequest, Draining, EngineFailed, GatewayError
from gateway.meter import Answer, Client, Receiver
from gateway.pipeline import Pipeline
from gateway.stream import payload_of
from runtimes.clock import Clock
from runtimes.contract import Invalid
from runtimes.dialect import generation
from runtimes.dialect.elements import Message
from runtimes.dialect.generation import Generation, Said

if TYPE_CHECKING:
    from runtimes.dialect.kserve import Write

log = logging.getLogger("headrace.edge")


#: Of a model's name, as OpenAI's routes have it.
MODEL_CHARS_MAX = 256


class Caller(msgspec.Struct, frozen=True, gc=False):
    """Who asks, and from when to when."""

    id: str
    principal: Principal
    received_s: float
    deadline_s: float
    traceparent: str | None


class Inference:
    """Makes Calls and runs them."""

    def __init__(self, *, pipeline: Pipeline, catalogue: Catalogue, clock: Clock) -> None:
        self.pipeline = pipeline
        self.catalogue = catalogue
        self.clock = clock
        self.ids = CallIds(clock)

    def tensors(self, caller: Caller, model: str, message: Message, write: Write, *, version: str, size: int) -> Call:
        """A call that gives and takes tensors; `message` is what its body, of so many bytes, says."""
        # Here, not above: it brings numpy, which a gateway without such a model must not pay for.
        from runtimes.dialect.kserve import Tensors

        call = self._call(caller, TENSORS, model, b"")
        call.read_bytes = size
        call.rows = message.rows
        call.translation = Tensors(message, write, version)
        call.tokens_out_max = 0
        return call

    def generation(self, caller: Caller, model: str, asked: Generation, *, stream: bool) -> Call:
        """A call that generates text."""
        call = self._call(caller, COMPLETIONS, model, asked.body(model, stream=stream))
        call.stream = stream
        call.tokens_out_max = asked.tokens_out_max
        return call

    async def run(self, call: Call, client: Client) -> Answer:
        """Raises GatewayError. Either way the call is on record by then, so that who sees its end can find it."""
        error: GatewayError
        try:
            answer = await self.pipeline.run(call, client)
        except asyncio.CancelledError:
            # Either the client has gone and nobody is left to answer, or the gateway stops amid its request.
            if not self.pipeline.stopped:
                raise
            error = Draining("This gateway stopped before the request was whole.")
        except GatewayError as fault:
            error = fault
        except Exception as fault:
            log.error("call %s ended in a fault of the gateway", call.id, exc_info=fault)
            error = GatewayError(f"The gateway failed; its log knows this call as {call.id}.")
        else:
            # At once: waiting for the others of this turn would be two turns more, and there are seldom others.
            self.pipeline.usage.flush()
            return answer
        self.pipeline.usage.flush()
        raise error

    def _call(self, caller: Caller, route: str, model: str, body: bytes) -> Call:
        if len(model) > MODEL_CHARS_MAX:  # it goes on record whatever it is
            raise BadRequest(f"model_name: no model's name is longer than {MODEL_CHARS_MAX} characters.", param="model")
        return Call(
            id=caller.id,
            route=route,
            principal=self.pipeline.tenants.renew(caller.principal),
            model=model,
            body=body,
            at_s=self.clock.wall_s(),
            received_s=caller.received_s,
            deadline_s=caller.deadline_s,
            traceparent=caller.traceparent,
        )


class InOnePiece:
    """A Client of calls that do not stream."""

    def begin(self, status: int, first: bytes, *, events: bool = True) -> Receiver:
        raise EngineFailed("The engine streamed what was to come in one piece; retry.", retry_after_s=1.0)


IN_ONE_PIECE = InOnePiece()


def bad(fault: Invalid) -> BadRequest:
    return BadRequest(str(fault), param=fault.param)


def whole(answer: Answer) -> Said:
    """The text of a completion in one piece. Raises EngineFailed."""
    said = _said(answer.body)
    if said is None:
        raise EngineFailed("The engine answered without any choice; retry.", retry_after_s=1.0)
    return said


def heard(events: bytes) -> list[Said]:
    """The texts of a stream's whole events. Raises EngineFailed."""
    payloads = (payload_of(event) for event in events.split(b"\n\n"))
    return [said for payload in payloads if payload and (said := _said(payload)) is not None]


def _said(completion: bytes) -> Said | None:
    try:
        return generation.said(completion)
    except Invalid as fault:
        raise EngineFailed(
            "The engine answered with something that is no completion; retry.", retry_after_s=1.0
        ) from fault
