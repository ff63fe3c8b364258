"""What a call costs the gateway, stage by stage: `make profile`.

Every stage is the real one, driven by hand in one process with sockets that are only pretended, so that figures are of
Python's work alone and repeat even on a busy machine; the kernel's part shows in `headrace-load`. Each figure is the
least of several rounds, in microseconds of this thread's CPU time.
"""

from __future__ import annotations

import asyncio
import itertools
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import uvloop

from gateway.call import Bounds, Call, Limits
from gateway.edge.connection import Connection
from gateway.edge.front import Front
from gateway.edge.openai import Asked, OpenAI, presented_key
from gateway.edge.request import Handler, Request
from gateway.edge.server import Server
from gateway.fairness import Fairness, Line
from gateway.journal import Journal
from gateway.key import Pepper, mint
from gateway.meter import meter
from gateway.metrics import Metrics
from gateway.money import NANO_MAX
from gateway.pipeline import Pipeline
from gateway.price import Prices
from gateway.quota import Quota
from gateway.replica import Replica, State
from gateway.route import Route
from gateway.store import KeyRow, Snapshot, TenantRow
from gateway.target import Retries, Target
from gateway.tenant import Tenants
from gateway.trace import Trace
from gateway.usage import Usage
from runtimes.artifact import Shelf
from runtimes.clock import SystemClock
from runtimes.connection import Connection as Upstream
from runtimes.contract import Site
from runtimes.remote import Remote, RemoteRuntime
from tests.fakes import fixed

ROUNDS, CALLS = 50, 400
PRICE = Prices(Decimal("0.15"), Decimal("0.6"), Decimal("0.075")).reckoned("USD")
#: Calls that end in one turn of the loop, as under load.
TOGETHER = 8
BODY = (
    b'{"model":"chat","messages":[{"role":"system","content":"You are a helpful assistant."},'
    b'{"role":"user","content":"Say something about water, and about rivers too."}],"max_tokens":16,"temperature":0.7}'
)
ANSWER_BODY = (
    b'{"id":"chatcmpl-1","object":"chat.completion","created":1700000000,"model":"chat","choices":[{"index":0,"message":'
    b'{"role":"assistant","content":" water water water water water water water"},"logprobs":null,"finish_reason":'
    b'"length"}],"usage":{"prompt_tokens":8,"completion_tokens":16,"total_tokens":24}}'
)
ANSWER = b"HTTP/1.1 200 OK\r\nserver: engine\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (
    len(ANSWER_BODY),
    ANSWER_BODY,
)
EVENT = (
    b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1700000000,"model":"chat","choices":['
    b'{"index":0,"delta":{"content":" water"},"logprobs":null,"finish_reason":null}]%b}\n\n'
)
PLAIN = EVENT % b""
METERED = EVENT % b',"usage":{"prompt_tokens":8,"total_tokens":24,"completion_tokens":16}'
STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


class Transport(asyncio.Transport):
    """A socket that takes everything and says nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.written = 0
        self.heard: Callable[[], None] = lambda: None

    def write(self, data: Any) -> None:
        self.written += len(data)
        self.heard()

    def is_closing(self) -> bool:
        return False

    def get_write_buffer_size(self) -> int:
        return 0

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None: ...

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...
    def abort(self) -> None: ...
    def close(self) -> None: ...


class Client(Transport):
    """One that always holds something, so that all that is written comes by it."""

    def get_write_buffer_size(self) -> int:
        return 1

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self

    def fileno(self) -> int:
        return -1


class Rig:
    """A gateway with one `remote` model, and pretended sockets on both sides."""

    def __init__(self, folder: Path) -> None:
        clock = self.clock = SystemClock()
        pepper = Pepper(b"x" * 32)
        minted = mint(pepper=pepper, env="live")
        limits = Limits(2_000_000_000, 2_000_000_000, 1_000_000, budget_day_nano=NANO_MAX, budget_month_nano=NANO_MAX)
        tenant = TenantRow(id="t", name="acme", limits=limits, created_s=0.0)
        row = KeyRow(id=minted.id, tenant_id="t", env="live", digest=minted.digest, created_s=0.0)
        self.tenants = Tenants(store=None, pepper=pepper, clock=clock)  # type: ignore[arg-type]
        self.tenants.take(Snapshot(1, (tenant,), (row,), ()))
        self.key = minted.text
        self.runtime: RemoteRuntime = Remote(url="http://127.0.0.1:9/v1").build(
            Site(model="chat", replica="chat-0", state=folder, shelf=Shelf(folder / "shelf"))
        )
        replica = Replica(
            name="chat-0", model="chat", kind="remote", source=fixed(self.runtime), slots=4096, clock=clock
        )
        replica.state = State.ready
        self.target = Target(
            name="chat",
            created_s=0,
            replicas=(replica,),
            tokens_out_default=512,
            first_byte_s_max=120.0,
            retries=Retries(clock=clock),
        )
        self.line = Line(model="chat", running_max=4096, waiting_max=256, wait_s_max=60, clock=clock)
        self.journal = Journal(folder=folder / "journal", sink=_kept_nowhere, clock=clock)
        self.pipeline = Pipeline(
            tenants=self.tenants,
            trace=Trace(metrics=Metrics(["chat"], currency="USD"), tracer=None),
            usage=Usage(journal=self.journal, clock=clock),
            quota=Quota(clock=clock),
            fairness=Fairness(lines={"chat": self.line}),
            route=Route(targets=[self.target]),
            clock=clock,
        )
        self.door = OpenAI(pipeline=self.pipeline, bounds=Bounds(), translations={}, clock=clock)
        # Nothing here is for the other door, so whatever it leads to would do.
        front = Front(openai=self.door, kserve=self.door)
        self.server = Server(door=front, bounds=Bounds(), clock=clock)
        self.request = (
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:8000\r\nUser-Agent: profile\r\nAccept: */*\r\n"
            b"Content-Type: application/json\r\nAuthorization: Bearer %b\r\nContent-Length: %d\r\n\r\n%b"
            % (self.key.encode(), len(BODY), BODY)
        )

    def connected(self) -> tuple[Connection, Client]:
        client, transport = Connection(self.server), Client()
        client.connection_made(transport)
        return client, transport

    async def upstream(self, answer: bytes) -> Upstream:
        """One more parked connection that answers whatever it is asked, in the loop's next turn."""
        wire = self.runtime.wire
        assert wire is not None
        loop = asyncio.get_running_loop()
        upstream = Upstream(loop=loop, clock=self.clock, idle_s_max=60, lost=lambda _: None)
        transport = Transport()
        upstream.connection_made(transport)

        def heard() -> None:
            loop.call_soon(upstream.data_received, answer)

        transport.heard = heard
        wire.park(upstream)
        return upstream

    def call(self) -> Call:
        return Call(
            id="hr-1", route="/v1/chat/completions", principal=self.tenants.authenticate(self.key), model="chat",
            body=BODY, at_s=0.0, received_s=self.clock.now_s(), deadline_s=self.clock.now_s() + 600, tokens_out_max=16,
        )  # fmt: skip


async def _kept_nowhere(records: Any) -> None: ...


class Nobody:
    """A client that takes everything at once."""

    full = False

    def begin(self, status: int, first: bytes) -> Nobody:
        return self

    def write(self, part: bytes) -> None: ...
    async def drained(self) -> None: ...


Work = Callable[[], Awaitable[None] | None]


async def least_us(work: Work, *, calls: int = CALLS) -> float:
    """Of one call of `work`."""
    found = []
    for _ in range(ROUNDS):
        before_ns = time.thread_time_ns()
        for _ in range(calls):
            if (waiting := work()) is not None:
                await waiting
        found.append((time.thread_time_ns() - before_ns) / calls / 1_000)
    return min(found)


async def stages(rig: Rig) -> Iterator[tuple[str, Work]]:
    """Each stage by name, in the order a call meets them."""
    pipeline, door, call = rig.pipeline, rig.door, rig.call()
    reader = Connection(Server(door=Mirror(), bounds=Bounds(), clock=rig.clock))
    reader.connection_made(Client())
    fields = {b"authorization": b"Bearer " + rig.key.encode()}
    asked = Asked(door, call.route, call.principal, call.received_s)
    request = Request(reader, method=b"POST", target=b"/", headers=[], fields={}, keep_alive=True, chunked=True)
    request.body = BODY
    turns = itertools.count()

    def identified() -> None:
        pipeline.identify(presented_key(fields))

    def decoded() -> None:
        door.call(asked, request)

    def spanned() -> None:
        with pipeline.trace.span(call):
            pass

    async def recorded() -> None:
        with pipeline.usage.record(call):
            pass
        if next(turns) % TOGETHER == 0:
            await asyncio.sleep(0)

    def found() -> None:
        pipeline.route.find(call)
        pipeline.tenants.authorize(call.principal, call.alias or call.model, call.route)

    def held() -> None:
        with pipeline.quota.hold(call, tokens_out_default=512):
            pass

    def held_with_money() -> None:
        with pipeline.quota.hold(call, tokens_out_default=512, price=PRICE):
            pass

    async def turned() -> None:
        async with pipeline.fairness.turn(call):
            pass

    async def dispatched() -> None:
        async with pipeline.route.dispatch(call, rig.target):
            pass

    async def metered() -> None:
        call.tokens_in = 0
        async with pipeline.route.dispatch(call, rig.target) as reply:
            await meter(call, reply, Nobody(), rig.clock)

    return iter(
        [
            ("read a request, begin a task, write an answer", lambda: reader.data_received(rig.request)),
            ("identify", identified),
            ("decode", decoded),
            ("span, metrics", spanned),
            ("record, journal", recorded),
            ("find, authorize", found),
            ("hold", held),
            ("the same, where the model has a price and the tenant two budgets", held_with_money),
            ("turn", turned),
            ("dispatch: ask an engine, read its answer", dispatched),
            ("the same, and meter", metered),
        ]
    )


class Mirror:
    """A door that answers at once."""

    def enter(self, request: Request) -> Handler:
        return self.answer

    async def answer(self, request: Request) -> None:
        request.respond(200, b"content-type: application/json\r\n", ANSWER_BODY)


async def whole(rig: Rig) -> float:
    """One call from its first byte to its last, all stages on, with several under way."""
    clients = [rig.connected() for _ in range(TOGETHER)]
    for _ in clients:
        await rig.upstream(ANSWER)

    async def some() -> None:
        before = [transport.written for _, transport in clients]
        for client, _ in clients:
            client.data_received(rig.request)
        while any(transport.written == past for (_, transport), past in zip(clients, before, strict=True)):
            await asyncio.sleep(0)

    return await least_us(some, calls=CALLS // len(clients)) / len(clients)


async def chunk(rig: Rig, event: bytes) -> float:
    """One relayed event of a stream."""
    client, _ = rig.connected()
    upstream = await rig.upstream(STREAM_HEAD + framed(event))
    streamed = BODY.replace(b'"max_tokens":16', b'"stream":true')
    length = b"Content-Length: %d"
    client.data_received(rig.request.replace(BODY, streamed).replace(length % len(BODY), length % len(streamed)))
    await _turns(10)
    piece = framed(event)
    us = await least_us(lambda: upstream.data_received(piece))
    client.connection_lost(None)
    await _turns(10)
    return us


async def _turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


def framed(event: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(event), event)


async def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        rig = Rig(Path(folder))
        await rig.journal.open()
        await rig.runtime.open()
        await rig.upstream(ANSWER)
        for name, work in await stages(rig):
            print(f"{await least_us(work):8.1f} µs  {name}", flush=True)
            await _turns(1)
        print(f"{await whole(rig):8.1f} µs  a whole call", flush=True)
        print(f"{await chunk(rig, PLAIN):8.1f} µs  a chunk without usage", flush=True)
        print(f"{await chunk(rig, METERED):8.1f} µs  a chunk with usage, taken out", flush=True)
        await rig.journal.aclose()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())
