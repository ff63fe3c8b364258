"""The composition root: a Config becomes objects, opened in order and closed in reverse.

Here it is one process; `gateway.leader` and `gateway.worker` make the same of several, from the same parts. Nothing
else builds its own collaborators. Listeners open before the engines are up, so that health, metrics and clear
refusals are there from the first second; the ready line comes when every model can answer.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import uvloop

from gateway.alias import Aliases
from gateway.config import Config, ConfigError
from gateway.edge.admin import admin_app, admin_token
from gateway.edge.asgi import Asgi
from gateway.edge.connection import UNREAD_BYTES_MAX
from gateway.edge.server import Server
from gateway.key import pepper_of
from gateway.metrics import Gauge, LiveMetrics
from gateway.plane import cancel, open_plane
from gateway.report import Report, families, merged_families
from gateway.sqlite import SqliteStore
from gateway.store import Store
from gateway.tenant import Issuer
from runtimes.clock import Clock, SystemClock

log = logging.getLogger("headrace")

LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def serve(config: Config, opening: Callable[[Config], AbstractAsyncContextManager[Running]]) -> None:
    """Run until SIGTERM or SIGINT, then drain. Raises ConfigError if it can't start."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(config, opening))


def log_to_stderr(form: str = LOG_FORMAT) -> None:
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format=form)
    logging.getLogger("alembic").setLevel(logging.WARNING)


@contextmanager
def stop_signal() -> Iterator[asyncio.Event]:
    """Set once this process is asked to end. To be asked again is no other end of it, to the very last moment."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    # Not by the loop: as it takes its handler off, a signal would end the process.
    for number in STOPPING:
        signal.signal(number, lambda *_: loop.call_soon_threadsafe(stop.set))
    try:
        yield stop
    finally:
        for number in STOPPING:
            signal.signal(number, signal.SIG_IGN)


STOPPING = (signal.SIGTERM, signal.SIGINT)


async def _serve(config: Config, opening: Callable[[Config], AbstractAsyncContextManager[Running]]) -> None:
    started_s = time.monotonic()
    with stop_signal() as stop:
        async with opening(config) as running:
            log.info(
                "listening after %.2f s on http://%s/v1 and grpc://%s, admin on http://%s; models are being opened",
                time.monotonic() - started_s,
                running.data.address,
                running.grpc.address,
                running.admin.address,
            )
            stopping = asyncio.create_task(stop.wait())
            up = asyncio.create_task(running.up())
            await asyncio.wait((up, stopping), return_when=asyncio.FIRST_COMPLETED)
            if up.done():
                log.info(
                    "ready in %.1f s: http://%s/v1 and grpc://%s serve %s; admin on http://%s",
                    time.monotonic() - started_s,
                    running.data.address,
                    running.grpc.address,
                    ", ".join(model.name for model in config.models),
                    running.admin.address,
                )
            await stopping
            await cancel(up)
            log.info(
                "stopping: new calls are taken for %g s more, and those under way then have %g s",
                config.server.unready_s,
                config.server.drain_s_max,
            )
        log.info("stopped")


class Running(NamedTuple):
    """A gateway that listens: addresses for people, `up` for whoever waits until every model can answer."""

    data: Listener
    grpc: Reservation
    admin: Listener
    up: Callable[[], Coroutine[Any, Any, None]]


@asynccontextmanager
async def gateway(config: Config, clock: Clock | None = None) -> AsyncIterator[Running]:
    """Everything, running while inside; leaving drains."""
    clock = clock or SystemClock()
    state = config.state_path
    async with AsyncExitStack() as opened:
        data, grpc, admin, store = await open_state(opened, config)
        plane = await open_plane(
            opened,
            at(config, grpc),
            listening=data.socket,
            journal=state / "journal",
            store=store,
            clock=clock,
        )

        async def report() -> Report:
            return plane.report()

        await open_admin(opened, config, listening=admin.socket, store=store, report=report, clock=clock)
        opened.push_async_callback(plane.drain, config.server)
        yield Running(data, grpc, admin, plane.up)


async def open_state(opened: AsyncExitStack, config: Config) -> tuple[Listener, Reservation, Listener, Store]:
    """What a gateway has once, however many processes it is: the state folder, its listening sockets (data's, what is
    kept for gRPC's, admin's) and the store. Raises ConfigError."""
    state = config.state_path
    opened.enter_context(owned(state))
    data = opened.enter_context(Listener(config.server.listen, "listen"))
    grpc = opened.enter_context(Reservation(config.server.grpc, "grpc"))
    admin = opened.enter_context(Listener(config.server.admin, "admin"))
    store = SqliteStore(state / "headrace.db")
    await store.open()
    opened.push_async_callback(store.aclose)
    return data, grpc, admin, store


def at(config: Config, grpc: Reservation) -> Config:
    """The configuration with the port that was found for gRPC, if any would do."""
    return msgspec.structs.replace(config, server=msgspec.structs.replace(config.server, grpc=grpc.address))


async def open_admin(
    opened: AsyncExitStack,
    config: Config,
    *,
    listening: socket.socket,
    store: Store,
    report: Callable[[], Awaitable[Report]],
    clock: Clock,
) -> None:
    """The admin API, which serves `listening` until `opened` is left."""
    state = config.state_path

    async def whole() -> Report:
        told = await report()
        own = families(LiveMetrics(lambda: [Gauge("headrace_connections", LISTENER, len(server.connections))]))
        return msgspec.structs.replace(told, families=merged_families([*told.families, *own]))

    issuer = Issuer(store=store, pepper=pepper_of(state), clock=clock)
    aliases = Aliases(store=store, models=[model.name for model in config.models], clock=clock)
    app = admin_app(issuer=issuer, aliases=aliases, store=store, report=whole, token=admin_token(state))
    server = Server(door=Asgi(app), bounds=config.server.bounds, clock=clock)
    await opened.enter_async_context(server.serving(listening))


LISTENER = {"listener": "admin"}


@contextmanager
def owned(state: Path) -> Iterator[None]:
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


class Reservation:
    """A port that is known to be free before anything is started, and kept for those that share it: gRPC's servers, one
    in each worker, open their listening sockets themselves. This one only binds, so it gets no connection."""

    def __init__(self, address: str, field: str) -> None:
        with Listener(address, field) as free:  # two gateways could share what is only bound
            self.address = free.address
        host, _, port = self.address.rpartition(":")
        host = host.strip("[]")
        self.socket = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        try:
            self.socket.bind((host, int(port)))
        except OSError as error:
            self.socket.close()
            raise ConfigError(f"server.{field}: can't listen on {address}: {error}.") from None

    def __enter__(self) -> Reservation:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()


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
        self.address = f"{address.removesuffix(port)}{self.socket.getsockname()[1]}"

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()
