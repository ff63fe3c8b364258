"""From a model's name to an answer that has begun: pick a replica, and fail over until the first byte.

After that byte nothing is retried: part of an answer may already be with the client.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from fnmatch import fnmatchcase

import msgspec

from gateway.call import Call, Principal
from gateway.errors import (
    BadRequest,
    DeadlineExceeded,
    EngineFailed,
    EngineUnavailable,
    ModelNotFound,
    Unsupported,
)
from gateway.replica import Replica
from runtimes.contract import (
    PATHS,
    Broken,
    Expired,
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
            names = [target.name for target in self.visible(principal)]
            raise ModelNotFound(
                f"The model {model[:200]!r} does not exist. This key may use: {', '.join(names) or 'none'}.",
                param="model",
            )
        return target

    def visible(self, principal: Principal) -> list[Target]:
        return [
            target for name, target in self.targets.items() if any(fnmatchcase(name, glob) for glob in principal.models)
        ]

    @asynccontextmanager
    async def dispatch(self, call: Call, target: Target) -> AsyncIterator[Reply]:
        """The reply of the first replica that begins one.

        Raises BadRequest for input the model can never take, EngineUnavailable (503) if no replica is up,
        EngineFailed (502) if those that are could not answer, DeadlineExceeded (504).
        """
        async with AsyncExitStack() as stack:
            reply, replica = await self._first(call, target, stack)
            call.replica = replica.name
            replica.running += 1
            stack.callback(_leave, replica)
            try:
                yield reply
            except (Broken, EngineFailed) as fault:
                replica.failed(str(fault))
                raise

    async def _first(self, call: Call, target: Target, stack: AsyncExitStack) -> tuple[Reply, Replica]:
        tried: list[str] = []
        candidates = _candidates(target)
        for number, replica in enumerate(candidates, start=1):
            attempt = AsyncExitStack()
            call.replica = replica.name
            try:
                reply = await attempt.enter_async_context(_ask(replica, call))
            except (Unavailable, Overloaded, Broken) as fault:
                if not isinstance(fault, Overloaded):
                    replica.failed(str(fault))
                tried.append(str(fault))
                continue
            except Expired:
                raise DeadlineExceeded(f"Model {call.model!r} did not begin to answer in time.") from None
            except Invalid as fault:
                raise BadRequest(str(fault), param=fault.param) from None
            if reply.status < 500:
                replica.succeeded()
            else:
                replica.failed(f"it answered {reply.status}")
                if number < len(candidates):
                    tried.append(f"{replica.name} answered {reply.status}")
                    await attempt.aclose()
                    continue
            stack.push_async_exit(attempt)
            return reply, replica
        call.replica = ""
        if tried:
            raise EngineFailed(
                f"No engine of model {call.model!r} could answer: {'; '.join(tried)}.", retry_after_s=1.0
            )
        reasons = "; ".join(f"{replica.name}: {replica.reason}" for replica in target.replicas)
        raise EngineUnavailable(
            f"No engine of model {call.model!r} is up ({reasons}); it is being started, retry.",
            retry_after_s=2.0,
        )


def _candidates(target: Target) -> list[Replica]:
    """Replicas to try, least busy first; those left alone only if there is no other."""
    ready = [replica for replica in target.replicas if replica.state == "ready"]
    trusted = [replica for replica in ready if replica.trusted()]
    return sorted(trusted or ready, key=lambda replica: replica.running / replica.slots)


@asynccontextmanager
async def _ask(replica: Replica, call: Call) -> AsyncIterator[Reply]:
    generator = replica.generator
    if generator is None:
        yield await _infer(replica.predictor, call)
        return
    if call.route not in PATHS:
        raise Unsupported(f"Model {call.model!r} generates text; it does not answer {call.route}.", param="model")
    exchange = call.exchange(model=generator.upstream_model or call.model, each_chunk=generator.meters_each_chunk)
    async with generator.exchange(exchange) as reply:
        if reply.status in CREDENTIALS_REFUSED:
            # Passing it on would tell the client that its own key is wrong.
            raise Unavailable(f"{replica.name} refused the gateway's own credentials ({reply.status})")
        yield reply


#: An upstream's words for "I don't know you", meant for the gateway and not for its client.
CREDENTIALS_REFUSED = frozenset({401, 403, 407})

#: What a model that speaks tensors answers, by its artifact's task.
ROUTE_OF_TASK = {"classify": "/v1/classify", "embed": "/v1/embeddings"}


async def _infer(predictor: Predictor, call: Call) -> Reply:
    translation = call.translation
    if translation is None or translation.task != predictor.task:
        answers = ROUTE_OF_TASK[predictor.task]
        raise Unsupported(f"Model {call.model!r} answers {answers}, not {call.route}.", param="model")
    asked = translation.parse(call.body, deadline_s=call.deadline_s)
    reply = await predictor.infer(asked.request)
    call.tokens_in = reply.tokens_in
    body = asked.answer(reply, model=call.model, labels=predictor.labels, id=call.id, created_s=int(call.at_s))
    return Reply(200, ((b"content-type", b"application/json"),), _once(body))


def _leave(replica: Replica) -> None:
    replica.running -= 1


async def _once(body: bytes) -> AsyncIterator[bytes]:
    yield body
