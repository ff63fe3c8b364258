"""A name that clients call and that stands for one or several configured models, each with its share of the calls.

Chance decides, call by call, and remembers nothing: whoever calls in a rhythm meets the same mix as all others, and
workers need not agree.
"""

from __future__ import annotations

import logging
import random
import re
from collections.abc import Collection, Mapping, Sequence

import msgspec

from gateway.call import MODEL_NAME, Call
from gateway.key import Unfit
from gateway.replica import Replica, State
from gateway.store import AliasRow, Store
from gateway.target import Target, answers
from runtimes.clock import Clock

log = logging.getLogger("headrace.alias")


class Alias(msgspec.Struct, frozen=True):
    """What it stands for now; never changed, but replaced."""

    name: str
    created_s: int
    targets: tuple[Target, ...]
    """Those with a share, as they were given."""
    weights: tuple[int, ...]

    @property
    def replicas(self) -> tuple[Replica, ...]:
        """Of all its models."""
        return tuple(replica for target in self.targets for replica in target.replicas)

    def pick(self, call: Call) -> Target:
        """One that can answer the call, by weight. If none can, one that will say why."""
        fitness = [max(_fitness(replica, call) for replica in target.replicas) for target in self.targets]
        best = max(fitness)
        weights = [weight if fit == best else 0 for weight, fit in zip(self.weights, fitness, strict=True)]
        return random.choices(self.targets, weights)[0]  # noqa: S311 - not a secret


def _fitness(replica: Replica, call: Call) -> int:
    """The more, the better."""
    if replica.state is not State.ready:
        return 0
    if not answers(replica, call):
        return 1
    return 3 if replica.trusted() else 2


def resolved(rows: Sequence[AliasRow], targets: Mapping[str, Target]) -> dict[str, Alias]:
    """The aliases by name. The configuration may have changed since they were set: models that are gone have no
    share, and a model's own name is the model's."""
    found = {}
    for row in rows:
        shares = {model: weight for model, weight in row.weights.items() if weight and model in targets}
        gone = ", ".join(model for model in row.weights if model not in targets)
        if gone:
            log.warning("alias %s: the configuration has no %s any more; set the alias anew", row.name, gone)
        if row.name in targets:
            log.warning("alias %s is not used: a model has that name now; call the alias something else", row.name)
        elif not shares:
            log.warning("alias %s is not used: none of its models is left", row.name)
        else:
            models = tuple(targets[model] for model in shares)
            found[row.name] = Alias(row.name, int(row.changed_s), models, tuple(shares.values()))
    return found


class Aliases:
    """Sets and removes them; the command and the admin API both go through it."""

    def __init__(self, *, store: Store, models: Collection[str], clock: Clock) -> None:
        self.store = store
        self.models = models
        """The configured ones."""
        self.clock = clock

    async def set(self, name: str, weights: Mapping[str, int]) -> AliasRow:
        """From now on `name` stands for these models. Raises Unfit."""
        self._require(name, weights)
        row = AliasRow(name=name, weights=dict(weights), changed_s=self.clock.wall_s())
        await self.store.set_alias(row)
        return row

    def _require(self, name: str, weights: Mapping[str, int]) -> None:
        if not re.fullmatch(MODEL_NAME, name):
            raise Unfit(
                f"{name[:80]!r} is no name for an alias; use 1 to 128 letters, digits and any of . _ : / -, beginning "
                "with a letter or digit"
            )
        if name in self.models:
            raise Unfit(f"{name!r} is a configured model's name; choose another for the alias")
        for model, weight in weights.items():
            if model not in self.models:
                raise Unfit(f"there is no model {model[:80]!r}; an alias stands for some of: {', '.join(self.models)}")
            if not 0 <= weight <= WEIGHT_MAX:
                raise Unfit(f"the weight of {model} can't be {weight}; give a whole number from 0 to {WEIGHT_MAX}")
        if not any(weights.values()):
            raise Unfit(f"alias {name!r} needs a model with a weight above 0")


WEIGHT_MAX = 1_000_000
