"""What the workers of one gateway have in common: the counters of its quotas, the places at its engines, and how many
connections each of them has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from gateway.config import Config, Model
from gateway.counters import Counters
from gateway.memory import Memory
from gateway.places import Places


class Files(NamedTuple):
    """The descriptors to hand to a worker."""

    counters: int
    places: int
    crowd: int
    bells: tuple[int, ...]


class Shared:
    """As one process has it: `worker` is the number of that one."""

    def __init__(self, *, worker: int, counters: Counters, places: Places, crowd: Memory) -> None:
        self.worker = worker
        self.counters = counters
        self.places = places
        self._crowd = crowd
        self.crowd = crowd.whole(0, len(places.bells), "I")

    @property
    def files(self) -> Files:
        return Files(self.counters.memory.file, self.places.memory.file, self._crowd.file, tuple(self.places.bells))

    def strike_out(self, worker: int) -> None:
        """The worker has gone: nothing is under way in it any more."""
        self.counters.strike_out(worker)
        self.places.strike_out(worker)
        self.crowd[worker] = 0


def make(config: Config) -> Shared:
    """For the leader, which only hands it on, and strikes out what killed workers left in it."""
    workers = config.server.workers
    return Shared(
        worker=LEADER,
        counters=Counters.make(workers=workers),
        places=Places.make(running_max=_places(config.models), workers=workers),
        crowd=Memory.make("headrace-crowd", 4 * workers),
    )


def attach(config: Config, files: Files, worker: int) -> Shared:
    """For a worker, with what its leader made."""
    return Shared(
        worker=worker,
        counters=Counters(Memory(files.counters), workers=config.server.workers),
        places=Places(Memory(files.places), running_max=_places(config.models), bells=files.bells),
        crowd=Memory(files.crowd),
    )


def is_shared(model: Model) -> bool:
    """Whether all workers reach the same engines of it. Of a model that has both kinds, each replica's places are
    counted once: too few rather than too many."""
    return any(not spec.in_process for spec in model.replicas)


def _places(models: Sequence[Model]) -> dict[str, int]:
    return {model.name: sum(spec.slots for spec in model.replicas) for model in models if is_shared(model)}


LEADER = -1
