"""The composition root: a Config becomes objects, opened in order and closed in reverse.

Nothing else in the gateway builds its own collaborators. Listeners open before the engines are up, so that health,
metrics and clear refusals are there from the first second; the ready line comes when every model can answer.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvloop
from prometheus_client import CollectorRegistry, ProcessCollector

from gateway.config import Config, ConfigError, Model, Tracing
from gateway.config import Server as Settings
from gateway.edge.admin import ModelLook, admin_app, admin_token
from gateway.edge.asgi import Asgi
from gateway.edge.connection import UNREAD_BYTES_MAX
from gateway.edge.openai import OpenAI
from gateway.edge.server import Server
from gateway.fairness import Fairness, Line
from gateway.journal import Journal
from gateway.key import pepper_of
from gateway.metrics import Gauge, LiveMetrics, Metrics
from gateway.pipeline import Pipeline
from gateway.quota import Quota
from gateway.replica import Replica, replica_name
from gateway.route import Retries, Route, Target
from gateway.store import SqliteStore
from gateway.tenant import Tenants
from gateway.trace import Trace
from gateway.usage import Usage
from runtimes.artifact import Shelf
from runtimes.clock import Clock, SystemClock
from runtimes.contract import Site

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

    from runtimes.dialect.openai import Translation

log = logging.getLogger("headrace")


def serve(config: Config) -> None:
    """Run until SIGTERM or SIGINT, then drain. Raises ConfigError if it can't start."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("alembic").setLevel(logging.WARNING)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(config))


async def _serve(config: Config) -> None:
    started_s = time.monotonic()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with gateway(config) as running:
        log.info(
            "listening after %.2f s on http://%s/v1, admin on http://%s; models are being opened",
            time.monotonic() - started_s,
            running.data.address,
            running.admin.address,
        )
        stopping = asyncio.create_task(stop.wait())
        up = asyncio.create_task(running.up())
        await asyncio.wait((up, stopping), return_when=asyncio.FIRST_COMPLETED)
        if up.done():
            log.info("ready in %.1f s: %s", time.monotonic() - started_s, running)
        await stopping
        await _cancel(up)
        log.info(
            "stopping: new calls are taken for %g s more, and those under way then have %g s",
            config.server.unready_s,
            config.server.drain_s_max,
        )
    log.info("stopped")


class Gateway:
    """What is running: addresses for people, `up` for whoever waits."""

    def __init__(self, *, replicas: Sequence[Replica], data: Listener, admin: Listener) -> None:
        self.replicas = replicas
        self.data = data
        self.admin = admin

    async def up(self) -> None:
        """Return once every replica has been ready."""
        for replica in self.replicas:
            await replica.up.wait()

    def __str__(self) -> str:
        names = ", ".join(dict.fromkeys(replica.model for replica in self.replicas))
        return f"http://{self.data.address}/v1 serves {names}; admin on http://{self.admin.address}"


@asynccontextmanager
async def gateway(config: Config, clock: Clock | None = None) -> AsyncIterator[Gateway]:
    """Everything, running while inside; leaving drains."""
    clock = clock or SystemClock()
    state = config.state_path
    shelf = Shelf(state / "shelf")
    async with AsyncExitStack() as opened:
        opened.enter_context(_owned(state))
        data_listener = Listener(config.server.listen, "listen")
        opened.callback(data_listener.close)
        admin_listener = Listener(config.server.admin, "admin")
        opened.callback(admin_listener.close)

        store = SqliteStore(state / "headrace.db")
        await store.open()
        opened.push_async_callback(store.aclose)
        tenants = Tenants(store=store, pepper=pepper_of(state), clock=clock)
        await tenants.open()
        opened.push_async_callback(tenants.aclose)
        journal = Journal(folder=state / "journal", sink=store.append_usage, clock=clock)
        await journal.open()
        opened.push_async_callback(journal.aclose)
        opened.push_async_callback(_cancel, asyncio.create_task(journal.run(), name="fold journal"))

        registry = CollectorRegistry()
        metrics = Metrics(model.name for model in config.models)
        registry.register(metrics)
        trace = Trace(metrics=metrics, tracer=_tracer(config.trace, opened), sample=config.trace.sample)
        targets = [_target(model, state=state, shelf=shelf, clock=clock) for model in config.models]
        lines = {
            model.name: Line(
                model=model.name,
                running_max=sum(spec.slots for spec in model.replicas),
                waiting_max=model.waiting_max,
                wait_s_max=model.wait_s_max,
                clock=clock,
            )
            for model in config.models
        }
        replicas = [replica for target in targets for replica in target.replicas]
        quota = Quota(clock=clock)
        pipeline = Pipeline(
            tenants=tenants,
            trace=trace,
            usage=Usage(journal=journal, clock=clock),
            quota=quota,
            fairness=Fairness(lines=lines),
            route=Route(targets=targets),
            clock=clock,
        )
        for replica in replicas:
            opened.push_async_callback(replica.aclose)
            replica.start()

        bounds = config.server.bounds
        doors = OpenAI(pipeline=pipeline, bounds=bounds, translations=_translations(config), clock=clock)
        data_server = Server(door=doors, bounds=bounds, clock=clock)
        admin = admin_app(
            tenants=tenants,
            store=store,
            models=lambda: _look(targets, lines),
            ready=lambda: _troubles(data_server, tenants, journal, targets),
            registry=registry,
            token=admin_token(state),
        )
        admin_server = Server(door=Asgi(admin), bounds=bounds, clock=clock)
        servers = {"data": data_server, "admin": admin_server}
        registry.register(LiveMetrics(lambda: _gauges(lines, targets, quota, servers, journal)))
        ProcessCollector(registry=registry)
        await opened.enter_async_context(data_server.serving(data_listener.socket))
        await opened.enter_async_context(admin_server.serving(admin_listener.socket))
        opened.push_async_callback(_drain, data_server, pipeline, config.server)
        yield Gateway(replicas=replicas, data=data_listener, admin=admin_listener)


# ---- parts of the whole ------------------------------------------------------------------------------------


@contextmanager
def _owned(state: Path) -> Iterator[None]:
    """One gateway to a state folder: two would run the same engines twice."""
    state.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (state / "gateway.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"state.path: another gateway runs on {state}; stop it, or give this one a folder of its own."
            ) from None
        yield


def _target(model: Model, *, state: Path, shelf: Shelf, clock: Clock) -> Target:
    replicas = []
    for number, spec in enumerate(model.replicas):
        name = replica_name(model.name, number)
        site = Site(model=model.name, replica=name, state=state, shelf=shelf)
        kind = str(type(spec).__struct_config__.tag)
        replicas.append(
            Replica(name=name, model=model.name, kind=kind, runtime=spec.build(site), slots=spec.slots, clock=clock)
        )
    return Target(
        name=model.name,
        created_s=int(clock.wall_s()),
        replicas=tuple(replicas),
        tokens_out_default=model.tokens_out_default,
        first_byte_s_max=model.first_byte_s_max,
        retries=Retries(clock=clock),
    )


def _translations(config: Config) -> Mapping[str, type[Translation]]:
    """Only where a model speaks tensors: the translations bring numpy with them."""
    kinds = {type(spec).__struct_config__.tag for model in config.models for spec in model.replicas}
    if "onnx" not in kinds:
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


# ---- what it looks like from outside -----------------------------------------------------------------------


def _look(targets: Sequence[Target], lines: Mapping[str, Line]) -> list[ModelLook]:
    return [
        ModelLook(target.name, lines[target.name].look(), tuple(replica.look() for replica in target.replicas))
        for target in targets
    ]


def _troubles(server: Server, tenants: Tenants, journal: Journal, targets: Sequence[Target]) -> dict[str, str | None]:
    """Every collaborator and what keeps it from serving; None is well."""
    troubles = {"gateway": "it is stopping" if server.leaving else None, "tenants": tenants.trouble()}
    troubles["journal"] = journal.fault or None
    for target in targets:
        down = [f"{replica.name}: {replica.reason}" for replica in target.replicas if replica.state != "ready"]
        # One replica that answers is enough to serve.
        troubles[f"model {target.name}"] = "; ".join(down) if len(down) == len(target.replicas) else None
    return troubles


def _gauges(
    lines: Mapping[str, Line],
    targets: Sequence[Target],
    quota: Quota,
    servers: Mapping[str, Server],
    journal: Journal,
) -> Iterator[Gauge]:
    for model, line in lines.items():
        yield Gauge("headrace_running", {"model": model}, line.running)
        yield Gauge("headrace_waiting", {"model": model}, line.waiting)
    for target in targets:
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
    yield Gauge("headrace_holds", {}, quota.holds)
    for listener, server in servers.items():
        yield Gauge("headrace_connections", {"listener": listener}, len(server.connections))
    yield Gauge("headrace_tasks", {}, len(asyncio.all_tasks()))
    yield Gauge("headrace_journal_unfolded_bytes", {}, journal.written_bytes - journal.folded_bytes)
    yield Gauge("headrace_journal_set_aside", {}, journal.set_aside)


# ---- listeners ---------------------------------------------------------------------------------------------


class Listener:
    """A listening socket, so that a port in use is known before anything is started: bound alone, it could be
    shared with another that is bound too."""

    def __init__(self, address: str, field: str) -> None:
        host, _, port = address.rpartition(":")
        host = host.strip("[]")
        self.socket = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Its connections have it from here. By itself the kernel would take megabytes of an answer that nobody reads.
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNREAD_BYTES_MAX)
        try:
            self.socket.bind((host, int(port)))
            self.socket.listen()
        except (OSError, OverflowError) as error:
            self.socket.close()
            raise ConfigError(f"server.{field}: can't listen on {address}: {error}.") from None
        self.address = address if port != "0" else f"{host}:{self.socket.getsockname()[1]}"

    def close(self) -> None:
        self.socket.close()


async def _drain(server: Server, pipeline: Pipeline, settings: Settings) -> None:
    """Be unready, then refuse what is new and let what is under way end, then cut it off with an error its client can
    see."""
    server.leaving = True
    await server.clock.sleep(settings.unready_s)
    pipeline.draining = True
    await server.drain(settings.drain_s_max)
    pipeline.stopped = True
    server.cut_off()


async def _cancel(task: asyncio.Task[Any]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
