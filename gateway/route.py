"""From a model's name to an answer that has begun: pick a replica, and fail over until the first byte.

After that byte nothing is retried: part of an answer may already be with the client. Before it, retries have a budget:
where every engine fails, each one more is one more call to engines that can't take those they have.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from types import TracebackType

from gateway.alias import Alias, resolved
from gateway.call import Call, Principal, covered
from gateway.errors import (
    BadRequest,
    DeadlineExceeded,
    EngineFailed,
    EngineTimeout,
    EngineUnavailable,
    ModelFailed,
    ModelNotFound,
    Unsupported,
)
from gateway.replica import Replica, State
from gateway.store import AliasRow, Snapshot
from gateway.target import Target, answers, routes_text
from runtimes.contract import (
    POOLING,
    Broken,
    Expired,
    Failed,
    InferReply,
    InferRequest,
    Invalid,
    Overloaded,
    Predictor,
    Reply,
    Silent,
    Unavailable,
)
from runtimes.dialect import Series, Steps


class Route:
    """All models of this gateway."""

    def __init__(self, *, targets: Sequence[Target]) -> None:
        self.targets: Mapping[str, Target] = {target.name: target for target in targets}
        self.aliases: Mapping[str, Alias] = {}
        self._kept: tuple[AliasRow, ...] = ()

    def take(self, snapshot: Snapshot) -> None:
        """From now on these are the aliases; calls that have found their model keep it."""
        if snapshot.aliases != self._kept:
            self.aliases, self._kept = resolved(snapshot.aliases, self.targets), snapshot.aliases

    def find(self, call: Call) -> Target:
        """The model that is to answer: of an alias one of its own, which is the call's model from here on. Raises
        ModelNotFound, naming what this key may use."""
        target = self.targets.get(call.model)
        if target is None:
            alias = self.aliases.get(call.model)
            if alias is None:
                raise self.unknown(call.model, call.principal)
            target = alias.pick(call)
            call.alias, call.model = call.model, target.name
        return target

    def get(self, name: str) -> Target | Alias | None:
        """What clients know by that name."""
        return self.targets.get(name) or self.aliases.get(name)

    def visible(self, principal: Principal) -> list[Target | Alias]:
        """What this key may use."""
        known: tuple[Target | Alias, ...] = (*self.targets.values(), *self.aliases.values())
        return [it for it in known if covered(principal.models, it.name)]

    def unknown(self, name: str, principal: Principal) -> ModelNotFound:
        names = ", ".join(it.name for it in self.visible(principal)) or "none"
        return ModelNotFound(f"The model {name!r} does not exist. This key may use: {names}.", param="model")

    def dispatch(self, call: Call, target: Target) -> Dispatch:
        """The reply of the first replica that begins one.

        Entering raises Unsupported for a route the model does not answer, EngineUnavailable (503) if no replica is
        up, EngineFailed (502) if those that are could not answer, EngineTimeout (504) if the last of them did not begin
        to, ModelFailed (502) if the model of the last of them failed, DeadlineExceeded (504).
        """
        return Dispatch(call, target)


class Dispatch:
    """See Route.dispatch."""

    __slots__ = ("_call", "_exchange", "_replica", "_target")

    def __init__(self, call: Call, target: Target) -> None:
        self._call = call
        self._target = target
        self._replica: Replica | None = None
        """Whose reply is open."""
        self._exchange: AbstractAsyncContextManager[Reply] | None = None

    async def __aenter__(self) -> Reply:
        call, retries = self._call, self._target.retries
        retries.calls += 1
        candidates = _candidates(self._target)
        asked, fault = 0, None
        for replica in candidates:
            if asked and not retries.take():
                break
            now_s = replica.clock.now_s()
            if now_s >= call.deadline_s:
                call.replica = ""
                raise DeadlineExceeded(f"The call's time was up before model {call.model!r} could begin.")
            asked += 1
            if not answers(replica, call):
                known = routes_text(replica)
                raise Unsupported(f"Model {call.model!r} answers {known}, not {call.route}.", param="model")
            call.replica = replica.name
            try:
                reply = await self._ask(replica, now_s)
            except Overloaded:
                continue
            except (Unavailable, Broken) as error:
                fault = error
                replica.failed(str(error))
                continue
            except Expired as error:
                raise DeadlineExceeded(f"Model {call.model!r} had not answered when the call's time was up.") from error
            if reply.status < 500 or asked == len(candidates):
                return reply
            replica.failed(f"it answered {reply.status}")
            await self._leave(None, None, None)
        call.replica = ""
        if candidates:
            names = ", ".join(replica.name for replica in candidates[:asked])
            if isinstance(fault, Silent):
                raise EngineTimeout(
                    f"No engine of model {call.model!r} began to answer within {self._target.first_byte_s_max:g} s "
                    f"({names}); retry.",
                    retry_after_s=1.0,
                )
            if isinstance(fault, Failed):
                raise ModelFailed(f"Model {call.model!r} failed at this call: {fault.said}")
            raise EngineFailed(f"No engine of model {call.model!r} could answer ({names}); retry.", retry_after_s=1.0)
        states = ", ".join(f"{replica.name} is {replica.state}" for replica in self._target.replicas)
        raise EngineUnavailable(f"No engine of model {call.model!r} is up ({states}); retry later.", retry_after_s=2.0)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        replica = self._replica
        assert replica is not None
        await self._leave(kind, error, traceback)
        if error is None:
            replica.succeeded()
        elif isinstance(error, EngineFailed):
            replica.failed(str(error.__cause__ or error))

    async def _ask(self, replica: Replica, now_s: float) -> Reply:
        """One replica's reply. Busy from here on, so that the next call sees it and goes elsewhere."""
        call = self._call
        self._replica = replica
        replica.running += 1
        try:
            if replica.generator is None:
                return await _infer(replica.predictor, call)
            model = replica.generator.upstream_model or call.model
            soon = call.stream or call.route in POOLING
            request = call.exchange(
                model=model,
                each_chunk=replica.generator.meters_each_chunk,
                now_s=now_s,
                begin_by_s=now_s + self._target.first_byte_s_max if soon else math.inf,
            )
            exchange = replica.generator.exchange(request)
            reply = await exchange.__aenter__()
            self._exchange = exchange
            if reply.status in REFUSED or 300 <= reply.status < 400:
                # Passing it on would tell the client that its own key, or its address, is wrong.
                raise Unavailable(f"{replica.name} refused the gateway's own credentials or redirects ({reply.status})")
            return reply
        except BaseException as error:
            await self._leave(type(error), error, error.__traceback__)
            raise

    async def _leave(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._replica is not None
        self._replica.running -= 1
        exchange, self._exchange, self._replica = self._exchange, None, None
        if exchange is not None:
            await exchange.__aexit__(kind, error, traceback)


#: An upstream's words for "I don't know you", meant for the gateway and not for its client.
REFUSED = frozenset({401, 403, 407})


def _candidates(target: Target) -> list[Replica]:
    """Replicas to try, least busy first; those that failed lately come last, for when there is no other."""
    if len(target.replicas) == 1:
        return [replica for replica in target.replicas if replica.state is State.ready]
    ready = [replica for replica in target.replicas if replica.state is State.ready]
    return sorted(ready, key=lambda replica: (not replica.trusted(), replica.running / replica.slots))


async def _infer(predictor: Predictor, call: Call) -> Reply:
    """The answer of a model that speaks tensors. Raises what the model does; Invalid is a reply, as an engine would say
    it, so that it counts as the engine's refusal."""
    assert call.translation is not None
    try:
        asked = call.translation.parse(
            call.body, predictor=predictor, deadline_s=call.deadline_s, flow=call.principal.tenant_id
        )
        if isinstance(asked, Series):
            steps = asked.steps(model=call.model, predictor=predictor, id=call.id, created_s=int(call.at_s))
            return await Writing(steps, asked.param, predictor, call).begun()
        call.rows_begun = _rows(asked.request)
        reply = await predictor.infer(asked.request)
        body = asked.answer(reply, model=call.model, predictor=predictor, id=call.id, created_s=int(call.at_s))
        _count(call, reply)
        return _whole(body)
    except Expired:
        raise  # for the work done by then its client is charged, as `Quota` knows
    except Exception as fault:
        call.items = call.tokens_in = 0  # nothing was delivered
        if not isinstance(fault, Invalid):
            raise
        body = BadRequest(str(fault), param=fault.param).body()
        return Reply(400, JSON, _once(body), body=body)


class Writing:
    """An answer that is written as its rows come back; see runtimes.dialect.Steps."""

    __slots__ = ("_call", "_param", "_predictor", "_step", "_steps")

    def __init__(self, steps: Steps, param: str, predictor: Predictor, call: Call) -> None:
        self._steps = steps
        self._param = param
        self._predictor = predictor
        self._call = call
        self._step: InferRequest | bytes | None = next(steps)

    async def begun(self) -> Reply:
        """Up to WHOLE_BYTES_MAX when it is whole, so that whatever goes wrong can be told with a status; a longer one
        once it has so many, the rest of it still to be made."""
        parts: list[bytes] = []
        size = 0
        while size <= WHOLE_BYTES_MAX:
            part = await self._part()
            if part is None:
                return _whole(b"".join(parts))
            parts.append(part)
            size += len(part)
        return Reply(200, JSON, self._amid(parts), counted=True)

    async def _amid(self, parts: list[bytes]) -> AsyncIterator[bytes]:
        for part in parts:
            yield part
        parts.clear()
        try:
            while (more := await self._part()) is not None:
                await asyncio.sleep(0)  # each takes its time to encode, and others wait
                yield more
        except Invalid as fault:
            raise BadRequest(str(fault), param=fault.param) from fault
        except (Unavailable, Overloaded) as fault:
            raise Broken(str(fault)) from fault

    async def _part(self) -> bytes | None:
        """The next one, None if there is no more."""
        while isinstance(self._step, InferRequest):
            self._call.rows_begun = _rows(self._step)
            try:
                reply = await self._predictor.infer(self._step)
            except Invalid as fault:  # it knows the tensor only
                raise Invalid(str(fault), param=self._param) from None
            _count(self._call, reply)
            self._step = self._steps.send(reply)
        part, self._step = self._step, next(self._steps, None)
        return part


def _rows(request: InferRequest) -> int:
    shape = next((tensor.shape for tensor in request.inputs.values()), ())
    return shape[0] if shape else 1


def _count(call: Call, reply: InferReply) -> None:
    call.items += call.rows_begun
    call.rows_begun = 0
    call.tokens_in += reply.tokens_in
    call.batch_rows_max = max(call.batch_rows_max, reply.batch_rows_max)
    call.inner_queue_s += reply.queue_s
    call.compute_s += reply.compute_s


def _whole(body: bytes) -> Reply:
    return Reply(200, JSON, _once(body), body=body, counted=True)


#: Longest answer of a model that speaks tensors that is kept until it is whole.
WHOLE_BYTES_MAX = 256 * 1024
JSON = ((b"content-type", b"application/json"),)


async def _once(body: bytes) -> AsyncIterator[bytes]:
    yield body
