"""What a gateway says of itself at one moment: its models, what is wrong, its numbers; and several reports as one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from operator import add

import msgspec
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from gateway.fairness import Queue
from gateway.replica import Health, State


class ModelLook(msgspec.Struct, frozen=True):
    """A frozen look at one model."""

    name: str
    queue: Queue
    replicas: tuple[Health, ...]


class Sample(msgspec.Struct, frozen=True, array_like=True):
    name: str
    labels: dict[str, str]
    value: float


class Family(msgspec.Struct, frozen=True):
    """One metric, as Prometheus has it."""

    name: str
    meaning: str
    type: str
    samples: tuple[Sample, ...]


class Report(msgspec.Struct, frozen=True):
    models: tuple[ModelLook, ...] = ()
    checks: dict[str, str | None] = {}
    """Every collaborator and what keeps it from serving; None is well."""
    notes: dict[str, str] = {}
    """What is not as it should be, and keeps nothing from being served."""
    families: tuple[Family, ...] = ()
    away: str = ""
    """Why this one of several is not there for new calls, which then are the others'; empty if it is."""


def families(collector: Collector) -> Iterator[Family]:
    for metric in collector.collect():
        samples = tuple(Sample(it.name, it.labels, float(it.value)) for it in metric.samples)
        yield Family(metric.name, metric.documentation, metric.type, samples)


class Shown(Collector):
    """Families, for the library that writes them out."""

    def __init__(self, families: Iterable[Family]) -> None:
        self.families = families

    def collect(self) -> Iterator[Metric]:
        for family in self.families:
            metric = Metric(family.name, family.meaning, family.type)
            for sample in family.samples:
                metric.add_sample(sample.name, sample.labels, sample.value)
            yield metric


# ---- several as one ----------------------------------------------------------------------------------------


def merged(reports: Sequence[tuple[str, Report]], *, shared: Collection[str]) -> Report:
    """One report of all that are named; `shared` are the models whose places all of them share."""
    looks: dict[str, list[tuple[str, ModelLook]]] = {}
    checks: dict[str, str | None] = {}
    notes: dict[str, str] = {}
    for name, report in reports:
        for look in report.models:
            looks.setdefault(look.name, []).append((name, look))
        for check, trouble in report.checks.items():
            found = [it for it in (checks.get(check), trouble and f"{name}: {trouble}") if it]
            checks[check] = "; ".join(found) or None
        notes |= report.notes
    models = tuple(_model(named, shared=model in shared) for model, named in looks.items())
    return Report(models, checks, notes, merged_families(family for _, report in reports for family in report.families))


def merged_families(families: Iterable[Family]) -> tuple[Family, ...]:
    """Values of one name and labels are added up, unless LEAST_OR_MOST says otherwise."""
    known: dict[str, Family] = {}
    values: dict[str, dict[tuple[str, tuple[tuple[str, str], ...]], float]] = {}
    for family in families:
        known.setdefault(family.name, family)
        of = values.setdefault(family.name, {})
        join: Callable[[float, float], float] = LEAST_OR_MOST.get(family.name, add)
        for sample in family.samples:
            key = sample.name, tuple(sample.labels.items())
            of[key] = join(of[key], sample.value) if key in of else sample.value
    return tuple(
        Family(
            family.name,
            family.meaning,
            family.type,
            tuple(Sample(name, dict(labels), value) for (name, labels), value in values[family.name].items()),
        )
        for family in known.values()
    )


#: A replica is up if every worker reaches it; keys are as old as where they are oldest; each process may have its own
#: number of files open.
LEAST_OR_MOST: dict[str, Callable[[float, float], float]] = {
    "headrace_replica_up": min,
    "headrace_tenants_age_seconds": max,
    "process_start_time_seconds": min,
    "process_max_fds": min,
}


def _model(named: list[tuple[str, ModelLook]], *, shared: bool) -> ModelLook:
    looks = [look for _, look in named]
    queues = [look.queue for look in looks]
    queue = Queue(
        running=sum(it.running for it in queues),
        running_max=queues[0].running_max if shared else sum(it.running_max for it in queues),
        waiting=sum(it.waiting for it in queues),
        waiting_max=sum(it.waiting_max for it in queues),
        tenants_waiting=sum(it.tenants_waiting for it in queues),
    )
    by_replica = zip(*(look.replicas for look in looks), strict=True)
    names = [name for name, _ in named]
    return ModelLook(looks[0].name, queue, tuple(_replica(names, replicas, shared=shared) for replicas in by_replica))


def _replica(names: list[str], replicas: Sequence[Health], *, shared: bool) -> Health:
    """The worst of what the workers find."""
    first = replicas[0]
    return Health(
        name=first.name,
        kind=first.kind,
        state=max((it.state for it in replicas), key=WORSE.index),
        reason="; ".join(f"{name}: {it.reason}" for name, it in zip(names, replicas, strict=True) if it.reason),
        running=sum(it.running for it in replicas),
        slots=first.slots if shared else sum(it.slots for it in replicas),
        ejected=any(it.ejected for it in replicas),
    )


WORSE = (State.ready, State.starting, State.down)
