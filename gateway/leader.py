"""Several workers behind one port, composed: what one gateway has once, the leader has; calls are its workers'.

It holds the state folder, the listening sockets, the engines, the store's migrations and what gateways before it left
in the journal; it serves the admin API, and adds up what its workers say.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from prometheus_client import ProcessCollector

from gateway.app import Running, at, open_admin, open_state
from gateway.config import Config, ConfigError, Model
from gateway.errors import QuotaExceeded
from gateway.journal import Journal
from gateway.metrics import LiveMetrics
from gateway.plane import cancel, journal_gauges, replica_of, sites, spent
from gateway.promotion import is_engine
from gateway.replica import Replica
from gateway.report import Report, families
from gateway.shared import Shared, make
from gateway.store import Spent
from gateway.workers import Workers
from runtimes.clock import Clock, SystemClock


@asynccontextmanager
async def leading(config: Config, clock: Clock | None = None) -> AsyncIterator[Running]:
    """Everything, running while inside; leaving drains."""
    clock = clock or SystemClock()
    state = config.state_path
    async with AsyncExitStack() as opened:
        data, grpc, admin, store = await open_state(opened, config)
        journal = Journal(folder=state / "journal", sink=store.append_usage, clock=clock)
        await journal.open()
        opened.push_async_callback(journal.aclose)
        opened.push_async_callback(cancel, asyncio.create_task(journal.run(), name="fold journal"))
        engines = [replica for model in config.models for replica in _engines(model, config, clock)]
        for engine in engines:
            opened.push_async_callback(engine.aclose)
            engine.start()
        shared = make(config)
        _restore(shared, await spent(config, store, clock), clock)
        workers = Workers(config=at(config, grpc), listening=data.socket, shared=shared, clock=clock)

        process = ProcessCollector(registry=None)

        async def report() -> Report:
            own = Report(
                checks={"journal": journal.fault or None},
                notes={f"engine {it.name}": it.reason for it in engines if it.reason},
                families=(*families(process), *families(LiveMetrics(lambda: journal_gauges(journal)))),
            )
            return await workers.report(own)

        await open_admin(opened, config, listening=admin.socket, store=store, report=report, clock=clock)
        workers.start()
        opened.push_async_callback(workers.stop)
        yield Running(data, grpc, admin, workers.up)


def _restore(shared: Shared, spent: list[Spent], clock: Clock) -> None:
    try:
        shared.counters.restore(spent, clock.now_s(), clock.wall_s())
    except QuotaExceeded:
        raise ConfigError(
            f"server.workers: {len(spent)} keys have spent something this month, more than several workers can count "
            "together; serve with one."
        ) from None


def _engines(model: Model, config: Config, clock: Clock) -> list[Replica]:
    """Those of its replicas that are engines to be started here; workers reach them, and the leader never calls
    them."""
    replicas = zip(model.replicas, sites(model, config), strict=True)
    return [replica_of(spec, site, clock, attached=False) for spec, site in replicas if is_engine(spec)]
