"""Several reports as one."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from gateway.fairness import Queue
from gateway.replica import Health, State
from gateway.report import ModelLook, Report, Shown, families, merged


def a_look(state: State = State.ready, reason: str = "") -> ModelLook:
    return ModelLook(
        name="chat",
        queue=Queue(running=1, running_max=4, waiting=2, waiting_max=256, tenants_waiting=1),
        replicas=(Health(name="chat-0", kind="echo", state=state, reason=reason, running=1, slots=4, ejected=False),),
    )


def test_what_is_counted_in_each_is_added_up() -> None:
    one = merged([(name, Report(models=(a_look(),))) for name in "abc"], shared=[]).models[0]
    assert one.queue == Queue(running=3, running_max=12, waiting=6, waiting_max=768, tenants_waiting=3)
    assert (one.replicas[0].running, one.replicas[0].slots) == (3, 12)


def test_places_that_all_share_are_not() -> None:
    one = merged([(name, Report(models=(a_look(),))) for name in "abc"], shared=["chat"]).models[0]
    assert (one.queue.running, one.queue.running_max) == (3, 4)
    assert one.replicas[0].slots == 4


def test_a_replica_is_as_well_as_where_it_is_worst_and_why_is_told() -> None:
    looks = {"worker 0": a_look(), "worker 1": a_look(State.down, "no answer"), "worker 2": a_look(State.starting, "x")}
    one = merged([(name, Report(models=(look,))) for name, look in looks.items()], shared=[]).models[0]
    assert one.replicas[0].state is State.down
    assert one.replicas[0].reason == "worker 1: no answer; worker 2: x"


def test_a_check_fails_if_it_does_in_any_and_names_which() -> None:
    reports = [("leader", Report(notes={"workers": "worker 2: no answer"}))]
    checks = ({"journal": None, "store": None}, {"journal": "full", "store": None})
    reports += [(f"worker {number}", Report(checks=of)) for number, of in enumerate(checks)]
    one = merged(reports, shared=[])
    assert one.checks == {"journal": "worker 1: full", "store": None}
    assert one.notes == {"workers": "worker 2: no answer"}


def some_metrics(factor: int) -> CollectorRegistry:
    registry = CollectorRegistry()
    calls = Counter("calls", "Calls", ["model"], registry=registry)
    calls.labels("chat").inc(2 * factor)
    wait_s = Histogram("wait_seconds", "Wait", registry=registry, buckets=(1, 5))
    for _ in range(factor):
        wait_s.observe(3)
    Gauge("headrace_replica_up", "Up", registry=registry).set(factor % 2)
    return registry


def lines(report: Report) -> set[str]:
    text = generate_latest(Shown(report.families)).decode()
    return {line for line in text.splitlines() if not line.startswith("#") and "_created" not in line}


def test_metrics_come_out_as_the_library_would_write_them() -> None:
    registry = some_metrics(3)
    written = {line for line in generate_latest(registry).decode().splitlines() if not line.startswith("#")}
    assert lines(Report(families=tuple(families(registry)))) == {line for line in written if "_created" not in line}


def test_metrics_of_several_are_those_of_one_that_did_it_all() -> None:
    several = merged([(str(it), Report(families=tuple(families(some_metrics(it))))) for it in (1, 2)], shared=[])
    alone = lines(Report(families=tuple(families(some_metrics(3)))))
    assert lines(several) == {line.replace("headrace_replica_up 1.0", "headrace_replica_up 0.0") for line in alone}
