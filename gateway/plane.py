"""The data plane of one process, composed: everything between a client's connection and an engine's."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prometheus_client import ProcessCollector

from gateway.acceptor import Acceptor
from gateway.budget import day_of, month_of
from gateway.config import Config, ConfigError, Model, Tracing
from gateway.config import Server as Settings
from gateway.counters import SharedQuota
from gateway.edge.catalogue import Catalogue
from gateway.edge.front import Front
from gateway.edge.inference import Inference
from gateway.edge.kserve import KServe
from gateway.edge.openai import OpenAI
from gateway.edge.server import Server
from gateway.fairness import Fairness, Line
from gateway.journal import Journal
from gateway.key import pepper_of
from gateway.metrics import BatchMetrics, Gauge, LiveMetrics, Metrics
from gateway.pipeline import Pipeline
from gateway.places import SharedLine
from gateway.promotion import Source
from gateway.quota import Quota
from gateway.replica import Replica, State, replica_name
from gateway.report import ModelLook, Report, families
from gateway.route import Route
from gateway.shared import Shared, is_shared
from gateway.store import Spent, Store
from gateway.target import Retries, Target
from gateway.tenant import Tenants
from gateway.trace import Trace
from gateway.usage import Usage
from runtimes.clock import Clock
from runtimes.contract import Site
from runtimes.integrity import ShelfFault
from runtimes.remote_shelf import open_shelf

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

    import runtimes
    from gateway.edge.grpc import Grpc
    from runtimes.dialect import Translation


class Plane:
    """What serves calls in this process, and what there is to be told of it."""

    def __init__(
        self,
        *,
        pipeline: Pipeline,
        server: Server,
        grpc: Grpc,
        targets: Sequence[Target],
        lines: Mapping[str, Line],
        tenants: Tenants,
        journal: Journal,
        metrics: Metrics,
    ) -> None:
        self.pipeline = pipeline
        self.server = server
        self.grpc = grpc
        self.targets = targets
        self.replicas = [replica for target in targets for replica in target.replicas]
        self.lines = lines
        self.tenants = tenants
        self.journal = journal
        self.metrics = metrics
        self.process = ProcessCollector(registry=None)

    async def up(self) -> None:
        """Return once every replica has been ready."""
        for replica in self.replicas:
            await replica.up.wait()

    async def drain(self, settings: Settings) -> None:
        """Be unready, then refuse what is new and let what is under way end, then cut it off with an error its client
        can see."""
        self.server.leaving = self.pipeline.leaving = True
        self.grpc.retire()
        await self.server.clock.sleep(settings.unready_s)
        self.pipeline.draining = True
        await self.server.drain(settings.drain_s_max, until=lambda: not self.grpc.running)
        self.pipeline.stopped = True
        self.server.cut_off()
        self.grpc.cut_off()

    def agree(self) -> None:
        """Another worker has rung: what it gave up may be for a call that waits here."""
        for line in self.lines.values():
            if isinstance(line, SharedLine):
                line.agree()

    def report(self) -> Report:
        models = tuple(
            ModelLook(target.name, self.lines[target.name].look(), tuple(replica.look() for replica in target.replicas))
            for target in self.targets
        )
        numbers = (self.metrics, LiveMetrics(self._gauges), BatchMetrics(self.replicas), self.process)
        numbered = tuple(it for them in numbers for it in families(them))
        return Report(models, self._checks(), families=numbered, away=_away(self.server, self.replicas))

    def _checks(self) -> dict[str, str | None]:
        checks = {
            "gateway": "it is stopping" if self.server.leaving else None,
            "tenants": self.tenants.trouble(),
            "journal": self.journal.fault or None,
        }
        for target in self.targets:
            down = [f"{replica.name}: {replica.reason}" for replica in target.replicas if replica.state != "ready"]
            # One replica that answers is enough to serve.
            checks[f"model {target.name}"] = "; ".join(down) if len(down) == len(target.replicas) else None
        return checks

    def _gauges(self) -> Iterator[Gauge]:
        for model, line in self.lines.items():
            yield Gauge("headrace_running", {"model": model}, line.running)
            yield Gauge("headrace_waiting", {"model": model}, line.waiting)
        for target in self.targets:
            yield Gauge("headrace_retries", {"model": target.name}, target.retries.taken)
            yield Gauge("headrace_retries_refused", {"model": target.name}, target.retries.refused)
            for replica in target.replicas:
                labels = {"model": target.name, "replica": replica.name}
                yield Gauge("headrace_replica_up", labels, replica.state == "ready")
                yield Gauge("headrace_replica_running", labels, replica.running)
                load = replica.runtime.load()
                yield Gauge("headrace_runtime_running", labels, load.running)
                yield Gauge("headrace_runtime_waiting", labels, load.waiting)
                yield Gauge("headrace_runtime_connections", labels, load.connections)
        yield Gauge("headrace_holds", {}, self.pipeline.quota.holds)
        yield Gauge("headrace_grpc_running", {}, len(self.grpc.running))
        yield Gauge("headrace_connections", {"listener": "data"}, len(self.server.connections))
        yield Gauge("headrace_connections", {"listener": "grpc"}, self.grpc.connections)
        yield Gauge("headrace_tasks", {}, len(asyncio.all_tasks()))
        yield from journal_gauges(self.journal)
        yield Gauge("headrace_tenants_age_seconds", {}, self.tenants.age_s())


def journal_gauges(journal: Journal) -> Iterator[Gauge]:
    yield Gauge("headrace_journal_unfolded_bytes", {}, journal.written_bytes - journal.folded_bytes)
    yield Gauge("headrace_journal_set_aside", {}, journal.set_aside)


async def open_plane(
    opened: AsyncExitStack,
    config: Config,
    *,
    listening: socket.socket,
    journal: Path,
    store: Store,
    clock: Clock,
    shared: Shared | None = None,
) -> Plane:
    """One that serves `listening` until `opened` is left. `shared` is what it has in common with other workers, None if
    it has none beside it."""
    state, bounds = config.state_path, config.server.bounds
    targets = [_target(model, config=config, clock=clock, attached=shared is not None) for model in config.models]
    route = Route(targets=targets)
    tenants = Tenants(store=store, pepper=pepper_of(state), clock=clock, listeners=(route.take,))
    await tenants.open()
    opened.push_async_callback(tenants.aclose)
    records = Journal(folder=journal, sink=store.append_usage, clock=clock)
    await records.open()
    opened.push_async_callback(records.aclose)
    opened.push_async_callback(cancel, asyncio.create_task(records.run(), name="fold journal"))

    metrics = Metrics((model.name for model in config.models), currency=config.money.currency)
    lines = {model.name: _line(model, shared, clock) for model in config.models}
    if shared is None:
        quota = Quota(clock=clock)
        quota.restore(await spent(config, store, clock), clock.wall_s())
    else:
        quota = SharedQuota(clock=clock, counters=shared.counters, worker=shared.worker)
    pipeline = Pipeline(
        tenants=tenants,
        trace=Trace(metrics=metrics, tracer=_tracer(config.trace, opened), sample=config.trace.sample),
        usage=Usage(journal=records, clock=clock),
        quota=quota,
        fairness=Fairness(lines=lines),
        route=route,
        clock=clock,
    )
    replicas = [replica for target in targets for replica in target.replicas]
    for replica in replicas:
        opened.push_async_callback(replica.aclose)
        replica.start()
    catalogue = Catalogue(pipeline=pipeline, version=version("headrace"))
    inference = Inference(pipeline=pipeline, catalogue=catalogue, clock=clock)
    door = Front(
        openai=OpenAI(pipeline=pipeline, bounds=bounds, translations=_translations(config), clock=clock),
        kserve=KServe(pipeline=pipeline, catalogue=catalogue, inference=inference, bounds=bounds, clock=clock),
    )
    server = Server(door=door, bounds=bounds, clock=clock)
    if shared is None:
        await opened.enter_async_context(server.serving(listening))
    else:
        acceptor = Acceptor(
            server,
            listening,
            crowd=shared.crowd,
            worker=shared.worker,
            here=lambda: not _away(server, replicas),
        )
        await opened.enter_async_context(server.accepting(acceptor))
        with suppress(TimeoutError):  # over gRPC a worker gets its part of the connections, whether it is there or not
            async with asyncio.timeout(LOOKED_AT_S_MAX):
                for replica in replicas:
                    await replica.looked_at.wait()
    from gateway.edge.grpc import Grpc  # it takes a moment, in which the first calls are served already

    grpc = Grpc(pipeline=pipeline, catalogue=catalogue, inference=inference, bounds=bounds, clock=clock)
    await opened.enter_async_context(grpc.serving(config.server.grpc))
    return Plane(
        pipeline=pipeline,
        server=server,
        grpc=grpc,
        targets=targets,
        lines=lines,
        tenants=tenants,
        journal=records,
        metrics=metrics,
    )


async def spent(config: Config, store: Store, clock: Clock) -> list[Spent]:
    """What there is on record of this day and this month, for budgets to go on from; asked only where calls cost
    something. Raises Unreachable."""
    if not any(model.price for model in config.models):
        return []
    at_s = clock.wall_s()
    return await store.spent(day_s=day_of(at_s)[0], month_s=month_of(at_s)[0])


def replica_of(spec: runtimes.Spec, site: Site, clock: Clock, *, attached: bool) -> Replica:
    """With `attached`, an engine that it needs is another process's to start."""
    return Replica(
        name=site.replica,
        model=site.model,
        kind=str(type(spec).__struct_config__.tag),
        source=Source(spec, site, attached=attached),
        slots=spec.slots,
        clock=clock,
    )


def sites(model: Model, config: Config) -> list[Site]:
    """Where each of the model's replicas lives. Raises ConfigError if there can be no such shelf."""
    state = config.state_path
    try:
        shelf = open_shelf(config.state.shelf or state / "shelf", state)
    except ShelfFault as fault:
        raise ConfigError(f"state.shelf: {fault}.") from fault
    names = [replica_name(model.name, number) for number in range(len(model.replicas))]
    return [Site(model=model.name, replica=name, state=state, shelf=shelf) for name in names]


async def cancel(task: asyncio.Task[Any]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def _away(server: Server, replicas: Iterable[Replica]) -> str:
    """Why this process is not there for new calls as long as another one is; empty if it is."""
    if server.leaving:
        return "it is stopping"
    return "it is starting" if any(it.state is State.starting for it in replicas) else ""


#: How long a worker waits for its replicas to say how they are before it takes calls over gRPC.
LOOKED_AT_S_MAX = 2.0

# ---- parts of the whole ------------------------------------------------------------------------------------


def _target(model: Model, *, config: Config, clock: Clock, attached: bool) -> Target:
    placed = zip(model.replicas, sites(model, config), strict=True)
    replicas = [replica_of(spec, site, clock, attached=attached) for spec, site in placed]
    return Target(
        name=model.name,
        created_s=int(clock.wall_s()),
        replicas=tuple(replicas),
        tokens_out_default=model.tokens_out_default,
        first_byte_s_max=model.first_byte_s_max,
        retries=Retries(clock=clock),
        price=None if model.price is None else model.price.reckoned(config.money.currency),
    )


def _line(model: Model, shared: Shared | None, clock: Clock) -> Line:
    if shared is not None and is_shared(model):
        return SharedLine(
            model=model.name,
            places=shared.places.of[model.name],
            worker=shared.worker,
            waiting_max=model.waiting_max,
            wait_s_max=model.wait_s_max,
            clock=clock,
        )
    return Line(
        model=model.name,
        running_max=sum(spec.slots for spec in model.replicas),
        waiting_max=model.waiting_max,
        wait_s_max=model.wait_s_max,
        clock=clock,
    )


def _translations(config: Config) -> Mapping[str, Translation]:
    """Only where a model speaks tensors: the translations bring numpy with them."""
    kinds = {type(spec).__struct_config__.tag for model in config.models for spec in model.replicas}
    if kinds.isdisjoint({"onnx", "triton"}):
        return {}
    from runtimes.dialect.openai import TRANSLATIONS

    return TRANSLATIONS


def _tracer(tracing: Tracing, opened: AsyncExitStack) -> Tracer | None:
    if tracing.otlp is None:
        return None
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider(resource=Resource.create({"service.name": "headrace"}), shutdown_on_exit=False)
    # Its queue is bounded and drops the newest: a collector that is down costs spans, never calls.
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=tracing.otlp, timeout=TRACE_EXPORT_S_MAX)))
    opened.push_async_callback(asyncio.to_thread, provider.shutdown)
    return provider.get_tracer("headrace")


TRACE_EXPORT_S_MAX = 3.0
