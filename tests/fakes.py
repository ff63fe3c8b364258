"""Fakes that tests share. A fake behaves; it never records calls to be asserted on."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import msgspec

from gateway.call import Call, CallIds, Limits, Principal, Record
from gateway.errors import Forbidden, KeyExpired, Unauthenticated
from gateway.fairness import Fairness, Line
from gateway.journal import Journal
from gateway.metrics import Metrics
from gateway.pipeline import Pipeline
from gateway.price import Price
from gateway.quota import Quota
from gateway.replica import Replica
from gateway.route import Route
from gateway.store import AliasRow, Snapshot
from gateway.target import Retries, Target
from gateway.trace import Trace
from gateway.usage import Usage
from runtimes.clock import Clock, SystemClock
from runtimes.contract import (
    GENERATING,
    Exchange,
    Generator,
    InferReply,
    InferRequest,
    Load,
    Predictor,
    Reply,
    Runtime,
    RuntimeFault,
    Tensor,
    Unavailable,
)
from runtimes.histogram import Histogram


class FakeClock:
    """A Clock that moves only when told."""

    def __init__(self, now_s: float = 1_000.0, wall_s: float = 1_700_000_000.0) -> None:
        self._now_s = now_s
        self._wall_s = wall_s
        self._sleepers: dict[asyncio.Future[None], float] = {}
        self._changed = asyncio.Event()

    def now_s(self) -> float:
        return self._now_s

    def wall_s(self) -> float:
        return self._wall_s

    async def sleep(self, duration_s: float) -> None:
        woken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._sleepers[woken] = self._now_s + duration_s
        self._changed.set()
        try:
            await woken
        finally:
            self._sleepers.pop(woken, None)

    def advance(self, duration_s: float) -> None:
        """Move time and wake whoever is due; they run at the caller's next await."""
        self._now_s += duration_s
        self._wall_s += duration_s
        for woken, due_s in self._sleepers.items():
            if due_s <= self._now_s and not woken.done():
                woken.set_result(None)

    async def until_asleep(self, count: int = 1) -> None:
        """Return once `count` tasks sleep, so that a test knows what `advance` will wake."""
        while sum(not woken.done() for woken in self._sleepers) < count:
            self._changed.clear()
            await self._changed.wait()


async def until(condition: Callable[[], bool]) -> None:
    """Let the other tasks run until this is so; for state that has no event of its own. Gives up after 10 s."""
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0)


def work(runtime: Runtime) -> tuple[int, int]:
    """How many calls it works on, and how many wait for that."""
    load = runtime.load()
    return load.running, load.waiting


Frame = bytes | BaseException | asyncio.Event


class Script(msgspec.Struct):
    """One scripted reply: its frames are sent, raised, or waited for."""

    frames: list[Frame]
    status: int = 200
    headers: tuple[tuple[bytes, bytes], ...] = ((b"content-type", b"application/json"),)


def events(*frames: Frame) -> Script:
    """A scripted stream of server-sent events."""
    return Script(list(frames), headers=((b"content-type", b"text/event-stream; charset=utf-8"),))


class FakeSource:
    """What a replica runs, by version; `promote` says which."""

    def __init__(self, runtimes: dict[str, Generator | Predictor], promoted: str) -> None:
        self.runtimes = runtimes
        self.promoted = promoted
        self.fault: Exception | None = None
        self.follows = len(runtimes) > 1
        self.built: list[str] = []
        self.look_s, self.retry_s, self.retire_s = 0.5, 30.0, 1.0

    def version(self) -> str:
        if self.fault is not None:
            raise self.fault
        return self.promoted

    def build(self, version: str) -> Generator | Predictor:
        self.built.append(version)
        return self.runtimes[version]


def fixed(runtime: Generator | Predictor) -> FakeSource:
    """One that never changes."""
    return FakeSource({"": runtime}, "")


class FakeGenerator:
    """A Generator that follows its script, one entry a call, the last one for ever: replies, or faults to raise
    before any reply."""

    def __init__(
        self,
        *script: Script | RuntimeFault,
        meters_each_chunk: bool = False,
        upstream_model: str | None = None,
        routes: frozenset[str] = GENERATING | {"/v1/embeddings"},
    ) -> None:
        self.meters_each_chunk = meters_each_chunk
        self.upstream_model = upstream_model
        self.routes = routes
        self.trouble: Exception | None = None
        """What `open` and `ready` raise; None while all is well."""
        self.begun = asyncio.Event()
        """Set once a call has arrived."""
        self.got = b""
        """The body of the newest call, as an engine would have read it."""
        self.got_headers: tuple[tuple[bytes, bytes], ...] = ()
        self._script = list(script)
        self._running = 0

    async def open(self) -> None:
        await self.ready()

    async def ready(self) -> None:
        if self.trouble is not None:
            raise self.trouble

    async def aclose(self) -> None:
        self.trouble = Unavailable("it is closed")

    def load(self) -> Load:
        return Load(running=self._running, waiting=0)

    @asynccontextmanager
    async def exchange(self, request: Exchange) -> AsyncIterator[Reply]:
        self._running += 1
        self.got = request.body
        self.got_headers = request.headers
        self.begun.set()
        try:
            turn = self._script.pop(0) if len(self._script) > 1 else self._script[0]
            if isinstance(turn, RuntimeFault):
                raise turn
            yield Reply(turn.status, turn.headers, played(turn.frames))
        finally:
            self._running -= 1


class FakeBatching(FakeGenerator):
    """Has put two and then three rows together, and let the latter wait."""

    def __init__(self) -> None:
        super().__init__()
        self.batch_rows, self.batch_queue_s = Histogram((2, 4)), Histogram((0.1,))
        for rows, waited_s in ((2, 0.0), (3, 0.5)):
            self.batch_rows.observe(rows)
            self.batch_queue_s.observe(waited_s)


async def played(frames: Iterable[Frame]) -> AsyncIterator[bytes]:
    """The frames of a reply, as they come."""
    for frame in frames:
        if isinstance(frame, asyncio.Event):
            await frame.wait()
        elif isinstance(frame, BaseException):
            raise frame
        else:
            yield frame


class FakeClient:
    """Where a stream goes: keeps what it gets, and reads on only when told while it is `full`."""

    def __init__(self) -> None:
        self.status = 0
        self.events = False
        self.parts: list[bytes] = []
        self.full = False
        self.reads = asyncio.Event()

    @property
    def got(self) -> bytes:
        return b"".join(self.parts)

    def begin(self, status: int, first: bytes, *, events: bool = True) -> "FakeClient":
        assert not self.status, "an answer begins once"
        self.status = status
        self.events = events
        self.parts.append(first)
        return self

    def write(self, part: bytes) -> None:
        assert self.status, "an answer begins before it goes on"
        self.parts.append(part)

    async def drained(self) -> None:
        await self.reads.wait()


class FakePredictor:
    """A Predictor that gives the same answer to everything, or always the same fault."""

    def __init__(self, *, task: str, answer: InferReply | RuntimeFault, labels: tuple[str, ...] = ()) -> None:
        self.task = task
        self.labels = labels
        self.thresholds: dict[str, float] = {}
        self.inputs: tuple[Tensor, ...] = (Tensor("text", "BYTES", (-1,), column=True),)
        self.outputs: tuple[Tensor, ...] = (Tensor("scores", "FP32", (-1, len(labels))),)
        self.platform = "fake"
        self.version = "1"
        self.versions: tuple[str, ...] = ()
        self.got: InferRequest | None = None
        """The newest."""
        self._answer = answer

    async def open(self) -> None: ...
    async def ready(self) -> None: ...
    async def aclose(self) -> None: ...

    def load(self) -> Load:
        return Load(running=0, waiting=0)

    async def infer(self, request: InferRequest) -> InferReply:
        self.got = request
        if isinstance(self._answer, RuntimeFault):
            raise self._answer
        return self._answer


class MemoryUsage:
    """Where a journal folds to: records by id, so that a repeat counts once, and a fault while there is one."""

    def __init__(self) -> None:
        self.records: dict[str, Record] = {}
        self.fault: Exception | None = None

    async def append(self, records: Iterable[Record]) -> None:
        if self.fault is not None:
            raise self.fault
        for record in records:
            self.records.setdefault(record.id, record)


def a_principal(tenant: str = "acme", key: str = "k1", **given: Any) -> Principal:
    return Principal(tenant_id=f"id-{tenant}", tenant=tenant, key_id=key, **given)


def a_call(principal: Principal | None = None, **given: Any) -> Call:
    """A chat call with all the time it may need, but for what is given."""
    return Call(
        **{
            "id": CallIds(SystemClock()).next(),
            "route": "/v1/chat/completions",
            "principal": principal or a_principal(),
            "model": "chat",
            "body": b'{"model":"chat","messages":[]}',
            "at_s": 1_700_000_000.0,
            "received_s": 1_000.0,
            "deadline_s": 1e9,
            **given,
        }
    )


def limits(
    rpm: int | None = None,
    tpm: int | None = None,
    concurrent: int | None = None,
    *,
    day: int | None = None,
    month: int | None = None,
) -> Limits:
    return Limits(rpm=rpm, tpm=tpm, concurrent=concurrent, budget_day_nano=day, budget_month_nano=month)


def let_stand(stages: "Stages", alias: str, weights: dict[str, int]) -> None:
    """The only alias there is."""
    row = AliasRow(name=alias, weights=weights, changed_s=1_700_000_000.5)
    stages.pipeline.route.take(Snapshot(1, (), (), (row,)))


class FakeTenants:
    """Keys that are what they say, without a store."""

    def __init__(self, clock: Clock, **keys: Principal) -> None:
        self._clock = clock
        self._keys = keys

    def authenticate(self, key: str | None) -> Principal:
        principal = self._keys.get(key or "")
        if principal is None:
            raise Unauthenticated("This API key is not valid.")
        if principal.expires_s is not None and self._clock.wall_s() >= principal.expires_s:
            raise KeyExpired(f"Key {principal.key_id} has expired.")
        return principal

    def renew(self, principal: Principal) -> Principal:
        return principal

    def authorize(self, principal: Principal, model: str, route: str) -> None:
        self.authorize_model(principal, model)
        self._require(principal, principal.routes, route)

    def authorize_model(self, principal: Principal, model: str) -> None:
        self._require(principal, principal.models, model)

    def _require(self, principal: Principal, globs: tuple[str, ...], name: str) -> None:
        if not any(fnmatchcase(name, glob) for glob in globs):
            raise Forbidden(f"Key {principal.key_id} may not use {name}.")


class Stages:
    """A real Pipeline over fake runtimes: every stage as in production, the journal in `folder`."""

    def __init__(
        self,
        folder: Path,
        clock: Clock,
        models: dict[str, list[Generator | Predictor]],
        *,
        keys: dict[str, Principal] | None = None,
        slots: int = 4,
        waiting_max: int = 4,
        prices: dict[str, Price] | None = None,
    ) -> None:
        self.usage = MemoryUsage()
        self.journal = Journal(folder=folder / "journal", sink=self.usage.append, clock=clock)
        self.replicas = {
            model: tuple(
                Replica(name=f"{model}-{number}", model=model, kind="fake", source=fixed(it), slots=slots, clock=clock)
                for number, it in enumerate(runtimes)
            )
            for model, runtimes in models.items()
        }
        lines = {
            model: Line(
                model=model,
                running_max=slots * len(replicas),
                waiting_max=waiting_max,
                wait_s_max=60,
                clock=clock,
            )
            for model, replicas in self.replicas.items()
        }
        self.lines = lines
        tenants: Any = FakeTenants(clock, **({"good": a_principal()} if keys is None else keys))
        self.pipeline = Pipeline(
            tenants=tenants,
            trace=Trace(metrics=Metrics(models, currency="USD"), tracer=None),
            usage=Usage(journal=self.journal, clock=clock),
            quota=Quota(clock=clock),
            fairness=Fairness(lines=lines),
            route=Route(
                targets=[
                    Target(
                        name=model,
                        created_s=1_700_000_000,
                        replicas=replicas,
                        tokens_out_default=16,
                        first_byte_s_max=60.0,
                        retries=Retries(clock=clock),
                        price=(prices or {}).get(model),
                    )
                    for model, replicas in self.replicas.items()
                ]
            ),
            clock=clock,
        )

    async def __aenter__(self) -> "Stages":
        await self.journal.open()
        for replica in self._all():
            replica.start()
            await replica.up.wait()
        return self

    async def __aexit__(self, *_: object) -> None:
        for replica in self._all():
            await replica.aclose()
        await self.journal.aclose()

    async def records(self) -> list[Record]:
        await self.journal.fold()
        return list(self.usage.records.values())

    def at_rest(self) -> bool:
        """Nothing is held by anybody."""
        return not (
            any(replica.running or replica.runtime.load().running for replica in self._all())
            or any(line.running or line.waiting for line in self.lines.values())
            or any(holder.running for holder in self.pipeline.quota.holders.values())
        )

    def _all(self) -> list[Replica]:
        return [replica for replicas in self.replicas.values() for replica in replicas]
