"""Spans and metrics: what they say of a call, and what they never say."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from prometheus_client import CollectorRegistry, generate_latest

from gateway.call import Call, Outcome
from gateway.metrics import BatchMetrics, Gauge, LiveMetrics, Metrics
from gateway.replica import Replica
from gateway.trace import Trace
from tests.fakes import FakeBatching, FakeClock, FakeGenerator, a_call, fixed

CALLER = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def trace(exporter: InMemorySpanExporter, registry: CollectorRegistry) -> Iterator[Trace]:
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    metrics = Metrics(["chat"], currency="USD")
    registry.register(metrics)
    yield Trace(metrics=metrics, tracer=provider.get_tracer("test"))
    provider.shutdown()


async def ended(trace: Trace, call: Call, **became: object) -> None:
    with trace.span(call):
        for name, value in became.items():
            setattr(call, name, value)


def by_name(exporter: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    return {span.name: span for span in exporter.get_finished_spans()}


SERVED = {
    "outcome": Outcome.served,
    "status": 200,
    "replica": "chat-0",
    "tokens_in": 7,
    "tokens_out": 3,
    "wait_s": 0.5,
    "first_byte_s": 1.0,
    "total_s": 2.0,
}


async def test_a_span_of_an_alias_says_what_was_asked_for_and_what_answered(
    trace: Trace, exporter: InMemorySpanExporter
) -> None:
    await ended(trace, a_call(model="either"), alias="either", model="chat", **SERVED)
    span = by_name(exporter)["chat either"]
    assert span.attributes is not None
    names = [span.attributes[f"gen_ai.{which}.model"] for which in ("request", "response")]
    assert names == ["either", "chat"]


async def test_a_call_is_one_span_with_its_queue_and_engine_inside(
    trace: Trace, exporter: InMemorySpanExporter
) -> None:
    call = a_call(stream=True, tokens_out_max=9)
    await ended(trace, call, **SERVED)
    spans = by_name(exporter)
    assert set(spans) == {"chat chat", "queue", "engine chat-0"}
    root, queue, engine = spans["chat chat"], spans["queue"], spans["engine chat-0"]
    assert (root.kind, engine.kind) == (SpanKind.SERVER, SpanKind.CLIENT)
    assert {queue.parent.span_id, engine.parent.span_id} == {root.context.span_id}
    assert root.attributes is not None
    assert dict(root.attributes) == {
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": "chat",
        "gen_ai.request.choice.count": 1,
        "gen_ai.request.max_tokens": 9,
        "gen_ai.usage.input_tokens": 7,
        "gen_ai.usage.output_tokens": 3,
        "http.response.status_code": 200,
        "url.path": "/v1/chat/completions",
        "headrace.call.id": call.id,
        "headrace.tenant": call.principal.tenant,
        "headrace.key.id": call.principal.key_id,
        "headrace.outcome": "served",
        "headrace.replica": "chat-0",
    }
    assert (root.end_time - root.start_time, queue.end_time - queue.start_time) == (2_000_000_000, 500_000_000)
    assert [event.timestamp - root.start_time for event in engine.events] == [1_000_000_000]


async def test_a_classification_says_how_it_was_batched(
    trace: Trace, exporter: InMemorySpanExporter, registry: CollectorRegistry
) -> None:
    batched = {"items": 40, "batch_rows_max": 32, "inner_queue_s": 0.01, "compute_s": 0.2}
    await ended(trace, a_call(route="/v1/moderations"), **(SERVED | batched))
    spans = by_name(exporter)
    assert spans["moderate chat"].attributes["headrace.items"] == 40
    assert dict(spans["engine chat-0"].attributes) == {
        "headrace.batch.rows_max": 32,
        "headrace.batch.queue_s": 0.01,
        "headrace.batch.compute_s": 0.2,
    }
    assert 'headrace_items_total{model="chat"} 40.0' in generate_latest(registry).decode()


async def test_a_calls_cost_is_in_its_span_and_summed_exactly(
    trace: Trace, exporter: InMemorySpanExporter, registry: CollectorRegistry
) -> None:
    for _ in range(10):
        await ended(trace, a_call(), **(SERVED | {"cost_nano": 100_000_001}))
    assert by_name(exporter)["chat chat"].attributes["headrace.cost_nano"] == 100_000_001
    assert 'headrace_cost_total{currency="USD",model="chat"} 1.00000001\n' in generate_latest(registry).decode()


async def test_the_caller_s_trace_goes_on_through_the_gateway_to_the_engine(
    trace: Trace, exporter: InMemorySpanExporter
) -> None:
    call = a_call(traceparent=CALLER)
    await ended(trace, call, **SERVED)
    root = by_name(exporter)["chat chat"]
    assert f"{root.context.trace_id:032x}" == CALLER.split("-")[1]
    assert f"{root.parent.span_id:016x}" == CALLER.split("-")[2]
    headers = dict(call.exchange(model="chat", each_chunk=False, now_s=0.0, begin_by_s=math.inf).headers)
    assert headers[b"traceparent"].decode() == f"00-{root.context.trace_id:032x}-{root.context.span_id:016x}-01"


async def test_a_failure_is_an_error_with_its_code_and_a_refusal_is_not(
    trace: Trace, exporter: InMemorySpanExporter
) -> None:
    await ended(trace, a_call(), outcome=Outcome.failed, status=502, code="engine_failed")
    await ended(trace, a_call(), outcome=Outcome.refused, status=429, code="rate_limit_exceeded")
    failed, refused = exporter.get_finished_spans()
    assert (failed.status.status_code, refused.status.status_code) == (StatusCode.ERROR, StatusCode.UNSET)
    assert (failed.attributes["error.type"], refused.attributes["error.type"]) == (
        "engine_failed",
        "rate_limit_exceeded",
    )


async def test_a_span_ends_even_if_the_call_breaks(trace: Trace, exporter: InMemorySpanExporter) -> None:
    with pytest.raises(ZeroDivisionError), trace.span(a_call()):
        raise ZeroDivisionError
    assert len(exporter.get_finished_spans()) == 1


async def test_no_prompt_is_in_a_span_or_a_metric(
    trace: Trace, exporter: InMemorySpanExporter, registry: CollectorRegistry
) -> None:
    secret = "xyzzy"
    await ended(trace, a_call(body=f'{{"model":"chat","messages":["{secret}"]}}'.encode()), **SERVED)
    assert secret not in "".join(span.to_json() for span in exporter.get_finished_spans())
    assert secret not in generate_latest(registry).decode()


async def test_labels_are_no_client_s_or_engine_s_free_choice(trace: Trace, registry: CollectorRegistry) -> None:
    await ended(trace, a_call(model="made-up"), outcome=Outcome.refused, code="model_not_found")
    await ended(trace, a_call(), outcome=Outcome.failed, code="engines_own_word")
    text = generate_latest(registry).decode()
    assert "made-up" not in text
    assert "engines_own_word" not in text
    assert 'headrace_errors_total{code="model_not_found",model="unknown"} 1.0' in text
    assert 'headrace_errors_total{code="engine",model="chat"} 1.0' in text


async def test_without_a_collector_no_span_is_built_and_the_caller_s_context_is_handed_on() -> None:
    trace = Trace(metrics=Metrics(["chat"], currency="USD"), tracer=None)
    call = a_call(traceparent=CALLER)
    await ended(trace, call, **SERVED)
    assert (
        dict(call.exchange(model="chat", each_chunk=False, now_s=0.0, begin_by_s=math.inf).headers)[b"traceparent"]
        == CALLER.encode()
    )


async def test_a_call_that_is_not_sampled_gets_no_span_and_its_caller_decides_first(
    trace: Trace, exporter: InMemorySpanExporter
) -> None:
    trace.sample = 0.0
    await ended(trace, a_call(), **SERVED)
    await ended(trace, a_call(traceparent=CALLER[:-2] + "00"), **SERVED)
    assert exporter.get_finished_spans() == ()
    await ended(trace, a_call(traceparent=CALLER), **SERVED)
    assert "chat chat" in by_name(exporter)


def test_live_gauges_are_read_at_each_scrape() -> None:
    waiting = iter((1, 2))
    registry = CollectorRegistry()
    registry.register(LiveMetrics(lambda: [Gauge("headrace_waiting", {"model": "chat"}, next(waiting))]))
    assert b'headrace_waiting{model="chat"} 1.0' in generate_latest(registry)
    assert b'headrace_waiting{model="chat"} 2.0' in generate_latest(registry)


def test_batches_are_told_of_the_runtimes_that_make_them() -> None:
    registry = CollectorRegistry()
    runtimes = {"intent": FakeBatching(), "chat": FakeGenerator()}
    registry.register(
        BatchMetrics(
            Replica(name=f"{model}-0", model=model, kind="fake", source=fixed(it), slots=1, clock=FakeClock())
            for model, it in runtimes.items()
        )
    )
    shown = generate_latest(registry)
    assert b'headrace_batch_rows_bucket{le="2.0",model="intent",replica="intent-0"} 1.0' in shown
    assert b'headrace_batch_rows_sum{model="intent",replica="intent-0"} 5.0' in shown
    assert b'headrace_batch_queue_seconds_bucket{le="0.1",model="intent",replica="intent-0"} 1.0' in shown
    assert b"chat" not in shown
