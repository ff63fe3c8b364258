"""What Prometheus sees: counters that calls add to as they end, and gauges read when they are scraped.

Nothing is looked up by label while a call runs: numbers are kept per model in plain lists and given their names and
labels at the scrape. No label is a client's free choice: a model that is not configured counts as `unknown`, an
engine's own error code as `engine`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator

import msgspec
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

import gateway.errors
from gateway.call import Call, Outcome
from gateway.money import NANO_A_UNIT
from gateway.replica import Batched, Replica
from runtimes.histogram import Histogram

FIRST_BYTE_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
TOTAL_S = (0.005, 0.025, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)

#: Codes that may become a label.
CODES = frozenset(
    {
        "client_left",
        "internal_error",
        *(error.code for error in vars(gateway.errors).values() if hasattr(error, "code")),
    }
)


class PerModel:
    """One model's numbers."""

    def __init__(self) -> None:
        self.calls: Counter[tuple[str, Outcome]] = Counter()
        """By route and outcome."""
        self.errors: Counter[str] = Counter()
        self.tokens_in = 0
        self.tokens_out = 0
        self.items = 0
        self.cost_nano = 0
        self.queue_s = Histogram(FIRST_BYTE_S)
        self.first_byte_s = Histogram(FIRST_BYTE_S)
        self.token_s = Histogram(TOKEN_S)
        self.total_s = Histogram(TOTAL_S)
        self.last_at_s = 0.0
        """When the last call came that went to an engine."""
        self.computed, self.compute_s = 0, 0.0
        """Calls whose runtime said how long it computed, and how long."""
        self.inner_queue_s = 0.0
        """Beside `queue_s`."""
        self.served_items, self.served_s = 0, 0.0
        """Of the calls that went well."""


class Metrics(Collector):
    """`models` are the only model names that ever become a label."""

    def __init__(self, models: Iterable[str], *, currency: str) -> None:
        self.currency = currency
        self.models = {model: PerModel() for model in models}
        self.unknown = PerModel()

    def count(self, call: Call) -> None:
        """A call that has ended."""
        per = self.models.get(call.model, self.unknown)
        per.calls[call.route, call.outcome] += 1
        per.total_s.observe(call.total_s)
        if call.code and call.outcome is not Outcome.rejected:
            # An engine's own codes are not ours to count by: there may be any number of them.
            per.errors[call.code if call.code in CODES else "engine"] += 1
        if call.outcome is Outcome.served:
            per.served_items += call.items
            per.served_s += call.total_s
        if call.replica:
            per.queue_s.observe(call.wait_s)
            per.tokens_in += call.tokens_in
            per.tokens_out += call.tokens_out
            per.items += call.items
            per.cost_nano += call.cost_nano
            per.last_at_s = call.at_s
            if call.compute_s:
                per.computed += 1
                per.compute_s += call.compute_s
                per.inner_queue_s += call.inner_queue_s
        if call.first_byte_s:
            per.first_byte_s.observe(call.first_byte_s)
            if call.stream and call.tokens_out > 1:
                per.token_s.observe((call.total_s - call.first_byte_s) / (call.tokens_out - 1))

    def collect(self) -> Iterator[Metric]:
        all_models = {**self.models, "unknown": self.unknown}
        calls = CounterMetricFamily("headrace_calls", "Calls by how they ended", labels=["model", "route", "outcome"])
        errors = CounterMetricFamily("headrace_errors", "Calls that ended in an error", labels=["model", "code"])
        tokens = CounterMetricFamily("headrace_tokens", "Tokens metered", labels=["model", "direction"])
        items = CounterMetricFamily("headrace_items", "Texts and other rows that models were given", labels=["model"])
        cost = CounterMetricFamily("headrace_cost", "What calls cost, in the currency", labels=["model", "currency"])
        for model, per in all_models.items():
            for (route, outcome), count in per.calls.items():
                calls.add_metric([model, route, outcome.value], count)
            for code, count in per.errors.items():
                errors.add_metric([model, code], count)
            tokens.add_metric([model, "in"], per.tokens_in)
            tokens.add_metric([model, "out"], per.tokens_out)
            items.add_metric([model], per.items)
            cost.add_metric([model, self.currency], per.cost_nano / NANO_A_UNIT)
        yield from (calls, errors, tokens, items, cost)
        for name, (meaning, of) in HISTOGRAMS.items():
            family = HistogramMetricFamily(name, meaning, labels=["model"])
            for model, per in all_models.items():
                family.add_metric([model], of(per).buckets(), of(per).sum)
            yield family


HISTOGRAMS: dict[str, tuple[str, Callable[[PerModel], Histogram]]] = {
    "headrace_queue_seconds": ("Wait for a place", lambda per: per.queue_s),
    "headrace_first_byte_seconds": ("Arrival to first byte", lambda per: per.first_byte_s),
    "headrace_token_seconds": ("Time per output token after the first", lambda per: per.token_s),
    "headrace_call_seconds": ("A call's whole life", lambda per: per.total_s),
}


class Gauge(msgspec.Struct, frozen=True):
    """One value as it is at the moment of a scrape."""

    name: str
    labels: dict[str, str]
    value: float


#: What LiveMetrics may carry, and what it means.
GAUGES = {
    "headrace_running": "Calls that hold a place of the model",
    "headrace_waiting": "Calls waiting for a place of the model",
    "headrace_replica_up": "1 if the replica answers",
    "headrace_replica_running": "Calls at the replica",
    "headrace_runtime_running": "Calls that the replica's runtime works on, by its own count",
    "headrace_runtime_waiting": "Calls that wait inside the replica's runtime, by its own count",
    "headrace_runtime_connections": "Open connections of the replica's runtime, those kept for the next call included",
    "headrace_holds": "Calls that hold a reservation of their tenant's quota",
    "headrace_grpc_running": "Calls under way that came over gRPC",
    "headrace_connections": "Open connections of clients",
    "headrace_tasks": "Tasks of the event loop",
    "headrace_journal_unfolded_bytes": "Usage records not yet in the store",
    "headrace_tenants_age_seconds": "Age of the keys and tenants in memory",
    "headrace_workers_up": "Workers that answer",
}


#: And those of them that only ever grow.
COUNTERS = {
    "headrace_retries": "Further replicas that calls were sent to, because one failed before its first byte",
    "headrace_retries_refused": "Calls that failed because the model's retries were used up",
    "headrace_journal_set_aside": "Usage records the store can never take, since the start; see journal/aside",
}


class BatchMetrics(Collector):
    """Of runtimes that make batches themselves."""

    def __init__(self, replicas: Iterable[Replica]) -> None:
        self.replicas = list(replicas)

    def collect(self) -> Iterator[Metric]:
        counted = [(replica, batched) for replica in self.replicas if (batched := replica.batched)]
        for name, (meaning, of) in BATCHES.items() if counted else ():
            family = HistogramMetricFamily(name, meaning, labels=["model", "replica"])
            for replica, batched in counted:
                histogram = of(batched)
                family.add_metric([replica.model, replica.name], histogram.buckets(), histogram.sum)
            yield family


BATCHES: dict[str, tuple[str, Callable[[Batched], Histogram]]] = {
    "headrace_batch_rows": ("Rows that went through the model together", lambda it: it.rows),
    "headrace_batch_queue_seconds": ("A row's wait for its batch", lambda it: it.queue_s),
}


class LiveMetrics(Collector):
    """Numbers read when they are scraped rather than kept up to date by every call."""

    def __init__(self, read: Callable[[], Iterable[Gauge]]) -> None:
        self.read = read

    def collect(self) -> Iterator[Metric]:
        families: dict[str, GaugeMetricFamily | CounterMetricFamily] = {}
        for gauge in self.read():
            family = families.get(gauge.name)
            if family is None:
                name, labels = gauge.name, list(gauge.labels)
                family = families[name] = (
                    CounterMetricFamily(name, COUNTERS[name], labels=labels)
                    if name in COUNTERS
                    else GaugeMetricFamily(name, GAUGES[name], labels=labels)
                )
            family.add_metric(list(gauge.labels.values()), gauge.value)
        yield from families.values()
