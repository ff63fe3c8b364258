"""From a model's name to an answer that has begun: pick a replica, and fail over until the first byte.

After that byte nothing is retried: part of an answer may already be with the client.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager

import msgspec

from gateway.call import Call, Principal, covered
from gateway.errors import (
    BadRequest,
    DeadlineExceeded,
    EngineFailed,
    EngineUnavailable,
    ModelNotFound,
    Unsupported,
)
from gateway.replica import Replica, State
from runtimes.contract import (
    PATHS,
    Broken,
    Expired,
    Generator,
    Invalid,
    Overloaded,
    Predictor,
    Reply,
    Unavailable,
)


class Target(msgspec.Struct, frozen=True):
    """A model as clients see it and the replicas that serve it."""

    name: str
    created_s: int
    replicas: tuple[Replica, ...]
    tokens_out_default: int


class Route:
    """All models of this gateway."""

    def __init__(self, *, targets: Sequence[Target]) -> None:
        self.targets: Mapping[str, Target] = {target.name: target for target in targets}

    def find(self, model: str, principal: Principal) -> Target:
        """Raises ModelNotFound, naming the models this key may use."""
        target = self.targets.get(model)
        if target is None:
            raise self.unknown(model, principal)
        return target

    def unknown(self, model: str, principal: Principal) -> ModelNotFound:
        names = ", ".join(target.name for target in self.visible(principal)) or "none"
        return ModelNotFound(f"The model {model!r} does not exist. This key may use: {names}.", param="model")

    def visible(self, principal: Principal) -> list[Target]:
        return [target for name, target in self.targets.items() if covered(principal.models, name)]

    @asynccontextmanager
    async def dispatch(self, call: Call, target: Target) -> AsyncIterator[Reply]:
        """The reply of the first replica that begins one.

        Raises Unsupported for a route the model does not answer, EngineUnavailable (503) if no replica is up,
        EngineFailed (502) if those that are could not answer, DeadlineExceeded (504).
        """
        async with AsyncExitStack() as stack:
            reply, replica = await self._first(call, target, stack)
            try:
                yield reply
            except EngineFailed as fault:
                replica.failed(str(fault.__cause__ or fault))
                raise
            replica.succeeded()

    async def _first(self, call: Call, target: Target, stack: AsyncExitStack) -> tuple[Reply, Replica]:
        candidates = _candidates(target)
        for number, replica in enumerate(candidates, start=1):
            _require_route(replica, call)
            call.replica = replica.name
            try:
                reply = await stack.enter_async_context(_ask(replica, call))
            except Overloaded:
                continue
            except (Unavailable, Broken) as fault:
                replica.failed(str(fault))
                continue
            except Expired as fault:
                raise DeadlineExceeded(f"Model {call.model!r} did not begin to answer in time.") from fault
            if reply.status < 500 or number == len(candidates):
                return reply, replica
            replica.failed(f"it answered {reply.status}")
            await stack.aclose()
        call.replica = ""
        if candidates:
            names = ", ".join(replica.name for replica in candidates)
            raise EngineFailed(f"No engine of model {call.model!r} could answer ({names}); retry.", retry_after_s=1.0)
        states = ", ".join(f"{replica.name} is {replica.state}" for replica in target.replicas)
        raise EngineUnavailable(f"No engine of model {call.model!r} is up ({states}); retry later.", retry_after_s=2.0)


def _candidates(target: Target) -> list[Replica]:
    """Replicas to try, least busy first; those that failed lately come last, for when there is no other."""
    ready = [replica for replica in target.replicas if replica.state is State.ready]
    return sorted(ready, key=lambda replica: (not replica.trusted(), replica.running / replica.slots))


def _require_route(replica: Replica, call: Call) -> None:
    if replica.generator is not None:
        if call.route not in PATHS:
            raise Unsupported(f"Model {call.model!r} generates text; it does not answer {call.route}.", param="model")
        return
    task = replica.predictor.task
    if call.translation is None or call.translation.task != task:
        raise Unsupported(f"Model {call.model!r} answers {ROUTE_OF_TASK[task]}, not {call.route}.", param="model")


#: What a model that speaks tensors answers, by its artifact's task.
ROUTE_OF_TASK = {"classify": "/v1/classify", "embed": "/v1/embeddings"}


@asynccontextmanager
async def _ask(replica: Replica, call: Call) -> AsyncIterator[Reply]:
    """One replica's reply. Busy from here on, so that the next call sees it and goes elsewhere."""
    replica.running += 1
    try:
        if replica.generator is None:
            yield await _infer(replica.predictor, call)
        else:
            async with _exchange(replica.generator, call) as reply:
                if reply.status in REFUSED or 300 <= reply.status < 400:
                    # Passing it on would tell the client that its own key, or its address, is wrong.
                    raise Unavailable(
                        f"{replica.name} refused the gateway's own credentials or redirects ({reply.status})"
                    )
                yield reply
    finally:
        replica.running -= 1


#: An upstream's words for "I don't know you", meant for the gateway and not for its client.
REFUSED = frozenset({401, 403, 407})


def _exchange(generator: Generator, call: Call) -> AbstractAsyncContextManager[Reply]:
    model = generator.upstream_model or call.model
    return generator.exchange(call.exchange(model=model, each_chunk=generator.meters_each_chunk))


async def _infer(predictor: Predictor, call: Call) -> Reply:
    assert call.translation is not None
    try:
        asked = call.translation.parse(call.body, deadline_s=call.deadline_s)
        reply = await predictor.infer(asked.request)
        body = asked.answer(reply, model=call.model, labels=predictor.labels, id=call.id, created_s=int(call.at_s))
    except Invalid as fault:
        # As an engine would say it: a reply with its status, so that it counts as the engine's refusal.
        return Reply(400, JSON, _once(BadRequest(str(fault), param=fault.param).body()))
    call.tokens_in = reply.tokens_in
    return Reply(200, JSON, _once(body))


JSON = ((b"content-type", b"application/json"),)


async def _once(body: bytes) -> AsyncIterator[bytes]:
    yield body
