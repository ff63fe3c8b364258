"""A model as calls reach it: the replicas that serve it, what they answer, and its budget for asking one more."""

from __future__ import annotations

import msgspec

from gateway.call import Call
from gateway.price import Price
from gateway.replica import Replica
from runtimes.clock import Clock


class Target(msgspec.Struct, frozen=True):
    """A model as clients see it and the replicas that serve it."""

    name: str
    created_s: int
    replicas: tuple[Replica, ...]
    tokens_out_default: int
    first_byte_s_max: float
    retries: Retries
    price: Price | None = None
    """None where calls cost nothing."""


class Retries:
    """A model's budget for asking one more replica: RETRIES_PER_CALL of its calls, and RETRIES_PER_S. What is not
    spent is kept, up to RETRIES_KEPT."""

    def __init__(self, *, clock: Clock) -> None:
        self.clock = clock
        self.calls = 0
        """Of the model; who makes one counts it, so that one that goes well costs nothing more than that."""
        self.taken = 0
        self.refused = 0
        self._left = RETRIES_PER_S
        self._counted = 0
        self._counted_s = clock.now_s()

    def take(self) -> bool:
        """Whether one may be made."""
        now_s = self.clock.now_s()
        earned = RETRIES_PER_CALL * (self.calls - self._counted) + RETRIES_PER_S * (now_s - self._counted_s)
        self._counted, self._counted_s = self.calls, now_s
        self._left = min(RETRIES_KEPT, self._left + earned)
        if self._left < 1:
            self.refused += 1
            return False
        self._left -= 1
        self.taken += 1
        return True


RETRIES_PER_CALL, RETRIES_PER_S = 0.2, 10.0
RETRIES_KEPT = 100.0
"""Ten idle seconds' worth: enough for all the calls that a replica drops as it dies."""


def answers(replica: Replica, call: Call) -> bool:
    """Whether it has the call's route."""
    if replica.generator is not None:
        return call.route in replica.generator.routes
    return call.translation is not None and replica.predictor.task in call.translation.tasks


def routes_text(replica: Replica) -> str:
    """Those it has, for people."""
    if replica.generator is not None:
        return ", ".join(sorted(replica.generator.routes))
    return ROUTES_OF_TASK[replica.predictor.task]


#: What a model that speaks tensors answers, by its artifact's task.
ROUTES_OF_TASK = {
    "classify": "/v1/classify, /v1/moderations, /v2/infer",
    "embed": "/v1/embeddings, /v1/rerank, /v1/score, /v2/infer",
    "predict": "/v2/infer",
}
