"""One span of every sampled call, and the call's part in the metrics.

Spans follow OpenTelemetry's semantic conventions for generative AI and go out over OTLP if the configuration
names a collector; without one no span is built and the caller's `traceparent` is handed on as it came. Whether a call
is sampled is decided first, by its caller's flag or else by chance, so that a call that is not costs nothing. The
queue's and the engine's part are children made from the call's own facts when it ends, so no stage knows of
tracing. Neither prompts nor completions nor keys enter a span or a metric.
"""

from __future__ import annotations

import random
from types import TracebackType
from typing import TYPE_CHECKING

from gateway.call import Call, Outcome
from gateway.metrics import Metrics

if TYPE_CHECKING:
    from opentelemetry.trace import Span, Tracer

OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
    "/v1/responses": "chat",
    "/v1/messages": "chat",
    "/v1/score": "score",
    "/v1/rerank": "rerank",
    "/v1/classify": "classify",
    "/v1/moderations": "moderate",
    "/v2/infer": "infer",
}


class Trace:
    """`tracer` is None where spans go nowhere; `sample` is the share of calls that get one."""

    def __init__(self, *, metrics: Metrics, tracer: Tracer | None, sample: float = 1.0) -> None:
        self.metrics = metrics
        self.tracer = tracer
        self.sample = sample

    def span(self, call: Call) -> Spanned:
        """Everything inside is one span; its metrics are counted on the way out."""
        return Spanned(self, call)

    def sampled(self, call: Call) -> bool:
        """As its caller decided (W3C Trace Context §3.2.2.5), else by chance."""
        if call.traceparent is not None:
            return bool(int(call.traceparent[-2:], 16) & 1)
        return self.sample >= 1.0 or random.random() < self.sample  # noqa: S311 - not a secret


class Spanned:
    """See Trace.span."""

    __slots__ = ("_call", "_span", "_trace")

    def __init__(self, trace: Trace, call: Call) -> None:
        self._trace = trace
        self._call = call
        self._span: Span | None = None

    def __enter__(self) -> None:
        tracer = self._trace.tracer
        if tracer is not None and self._trace.sampled(self._call):
            self._span = _begin(tracer, self._call)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._trace.metrics.count(self._call)
        if self._span is not None:
            assert self._trace.tracer is not None
            _end(self._trace.tracer, self._span, self._call)


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
        if call.alias:
            span.set_attribute("gen_ai.response.model", call.model)
        if call.items:
            span.set_attribute("headrace.items", call.items)
        if call.cost_nano:
            span.set_attribute("headrace.cost_nano", call.cost_nano)
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
            if call.batch_rows_max:
                engine.set_attributes(
                    {
                        "headrace.batch.rows_max": call.batch_rows_max,
                        "headrace.batch.queue_s": call.inner_queue_s,
                        "headrace.batch.compute_s": call.compute_s,
                    }
                )
            if call.first_byte_s:
                engine.add_event("first byte", timestamp=_ns(call.at_s + call.first_byte_s))
            engine.end(_ns(call.at_s + call.total_s))
    span.end(_ns(call.at_s + call.total_s))


def _ns(at_s: float) -> int:
    return int(at_s * 1e9)
