"""What can be seen of a call: one span, one set of metrics, every name in one table.

Spans follow OpenTelemetry's semantic conventions for generative AI and go out over OTLP if the configuration
names a collector; without one no span is built and the caller's `traceparent` is handed on as it came. The
queue's and the engine's part are children made from the call's own facts when it ends, so no stage knows of
tracing. Neither prompts nor completions nor keys enter a span or a metric, and no label is a client's free choice.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import msgspec
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

import gateway.errors
from gateway.call import Call, Outcome

if TYPE_CHECKING:
    from opentelemetry.trace import Span, Tracer

OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
    "/v1/responses": "chat",
    "/v1/messages": "chat",
    "/v1/classify": "classify",
}
FIRST_BYTE_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
TOTAL_S = (0.005, 0.025, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Trace:
    """`models` are the only model names that ever become a label; any other is `unknown`."""

    def __init__(self, *, models: frozenset[str], registry: CollectorRegistry, tracer: Tracer | None) -> None:
        self.models = models
        self.tracer = tracer
        self.calls = Counter(
            "headrace_calls", "Calls by how they ended", ["model", "route", "outcome"], registry=registry
        )
        self.errors = Counter("headrace_errors", "Calls that ended in an error", ["model", "code"], registry=registry)
        self.tokens = Counter("headrace_tokens", "Tokens metered", ["model", "direction"], registry=registry)
        self.queue_s = Histogram(
            "headrace_queue_seconds", "Wait for a place", ["model"], registry=registry, buckets=FIRST_BYTE_S
        )
        self.first_byte_s = Histogram(
            "headrace_first_byte_seconds",
            "Arrival to first byte",
            ["model"],
            registry=registry,
            buckets=FIRST_BYTE_S,
        )
        self.token_s = Histogram(
            "headrace_token_seconds",
            "Time per output token after the first",
            ["model"],
            registry=registry,
            buckets=TOKEN_S,
        )
        self.total_s = Histogram(
            "headrace_call_seconds", "A call's whole life", ["model"], registry=registry, buckets=TOTAL_S
        )

        # Both are bounded: a model is one of `models` or unknown, routes and outcomes are a few.
        self._calls = cache(self.calls.labels)
        self._per = cache(self._of)

    @asynccontextmanager
    async def span(self, call: Call) -> AsyncIterator[None]:
        """Everything inside is one span; its metrics are counted on the way out."""
        span = None if self.tracer is None else _begin(self.tracer, call)
        try:
            yield
        finally:
            self._count(call)
            if span is not None and self.tracer is not None:
                _end(self.tracer, span, call)

    def _count(self, call: Call) -> None:
        model = call.model if call.model in self.models else "unknown"
        self._calls(model, call.route, call.outcome.value).inc()
        per = self._per(model)
        per.total_s.observe(call.total_s)
        if call.code and call.outcome is not Outcome.rejected:
            # An engine's own codes are not ours to count by: there may be any number of them.
            self.errors.labels(model, call.code if call.code in CODES else "engine").inc()
        if call.replica:
            per.queue_s.observe(call.wait_s)
            per.tokens_in.inc(call.tokens_in)
            per.tokens_out.inc(call.tokens_out)
        if call.first_byte_s:
            per.first_byte_s.observe(call.first_byte_s)
            if call.stream and call.tokens_out > 1:
                per.token_s.observe((call.total_s - call.first_byte_s) / (call.tokens_out - 1))

    def _of(self, model: str) -> PerModel:
        return PerModel(
            self.queue_s.labels(model),
            self.first_byte_s.labels(model),
            self.token_s.labels(model),
            self.total_s.labels(model),
            self.tokens.labels(model, "in"),
            self.tokens.labels(model, "out"),
        )


class PerModel(NamedTuple):
    """One model's metrics, looked up once: finding a labelled child costs more than adding to it."""

    queue_s: Histogram
    first_byte_s: Histogram
    token_s: Histogram
    total_s: Histogram
    tokens_in: Counter
    tokens_out: Counter


#: Codes that may become a label.
CODES = frozenset(
    {
        "client_left",
        "internal_error",
        *(error.code for error in vars(gateway.errors).values() if hasattr(error, "code")),
    }
)


class Gauge(msgspec.Struct, frozen=True):
    """One value as it is at the moment of a scrape."""

    name: str
    labels: dict[str, str]
    value: float


#: Gauges that LiveMetrics may carry, with what they mean.
GAUGES = {
    "headrace_running": "Calls that hold a place of the model",
    "headrace_waiting": "Calls waiting for a place of the model",
    "headrace_replica_up": "1 if the replica answers",
    "headrace_replica_running": "Calls at the replica",
    "headrace_journal_unfolded_bytes": "Usage records not yet in the store",
    "headrace_journal_set_aside": "Usage records the store can never take, since the start; see journal/aside",
}


class LiveMetrics(Collector):
    """Gauges read when they are scraped rather than kept up to date by every call."""

    def __init__(self, read: Callable[[], Iterable[Gauge]]) -> None:
        self.read = read

    def collect(self) -> Iterator[Metric]:
        families: dict[str, GaugeMetricFamily] = {}
        for gauge in self.read():
            family = families.get(gauge.name)
            if family is None:
                family = families[gauge.name] = GaugeMetricFamily(
                    gauge.name, GAUGES[gauge.name], labels=list(gauge.labels)
                )
            family.add_metric(list(gauge.labels.values()), gauge.value)
        yield from families.values()


def _begin(tracer: Tracer, call: Call) -> Span:
    from opentelemetry.trace import SpanKind
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    propagator = TraceContextTextMapPropagator()
    parent = propagator.extract({"traceparent": call.traceparent}) if call.traceparent else None
    operation = OPERATIONS[call.route]
    span = tracer.start_span(
        f"{operation} {call.model}", context=parent, kind=SpanKind.SERVER, start_time=_ns(call.at_s)
    )
    if span.is_recording():
        span.set_attributes(
            {
                "gen_ai.operation.name": operation,
                "gen_ai.request.model": call.model,
                "gen_ai.request.choice.count": call.choices,
                "url.path": call.route,
                "headrace.call.id": call.id,
                "headrace.tenant": call.principal.tenant,
                "headrace.key.id": call.principal.key_id,
            }
        )
        if call.tokens_out_max is not None:
            span.set_attribute("gen_ai.request.max_tokens", call.tokens_out_max)
    context = span.get_span_context()
    call.traceparent = f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"
    return span


def _end(tracer: Tracer, span: Span, call: Call) -> None:
    from opentelemetry.trace import SpanKind, StatusCode, set_span_in_context

    if span.is_recording():
        span.set_attributes(
            {
                "gen_ai.usage.input_tokens": call.tokens_in,
                "gen_ai.usage.output_tokens": call.tokens_out,
                "http.response.status_code": call.status,
                "headrace.outcome": call.outcome.value,
                "headrace.replica": call.replica,
            }
        )
        if call.code:
            span.set_attribute("error.type", call.code)
        if call.outcome is Outcome.failed:
            span.set_status(StatusCode.ERROR, call.code)
        inside = set_span_in_context(span)
        if call.wait_s:
            start_s = call.at_s
            tracer.start_span("queue", context=inside, start_time=_ns(start_s)).end(_ns(start_s + call.wait_s))
        if call.replica:
            engine = tracer.start_span(
                f"engine {call.replica}",
                context=inside,
                kind=SpanKind.CLIENT,
                start_time=_ns(call.at_s + call.wait_s),
            )
            if call.first_byte_s:
                engine.add_event("first byte", timestamp=_ns(call.at_s + call.first_byte_s))
            engine.end(_ns(call.at_s + call.total_s))
    span.end(_ns(call.at_s + call.total_s))


def _ns(at_s: float) -> int:
    return int(at_s * 1e9)
