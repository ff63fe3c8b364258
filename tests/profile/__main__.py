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
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import uvloop

from gateway.call import Bounds, Call, Limits
from gateway.edge.connection import Connection
from gateway.edge.openai import OpenAI
from gateway.edge.server import Server
from gateway.fairness import Fairness, Line
from gateway.journal import Journal
from gateway.key import Pepper, mint
from gateway.meter import meter
from gateway.metrics import Metrics
from gateway.pipeline import Pipeline
from gateway.quota import Quota
from gateway.replica import Replica, State
from gateway.route import Route, Target
from gateway.store import KeyRow, Snapshot, TenantRow
from gateway.tenant import Tenants
from gateway.trace import Trace
from gateway.usage import Usage
from runtimes.artifact import Shelf
from runtimes.clock import SystemClock
from runtimes.connection import Connection as Upstream
from runtimes.contract import Site
from runtimes.remote import Remote, RemoteRuntime

ROUNDS, CALLS = 50, 400
RECORDS_A_TURN = 8
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

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...
    def abort(self) -> None: ...
    def close(self) -> None: ...


class Rig:
    """A gateway with one `remote` model, and pretended sockets on both sides."""

    def __init__(self, folder: Path) -> None:
        clock = self.clock = SystemClock()
        pepper = Pepper(b"x" * 32)
        minted = mint(pepper=pepper, env="live")
        limits = Limits(rpm=2_000_000_000, tpm=2_000_000_000, concurrent=1_000_000)
        tenant = TenantRow(id="t", name="acme", limits=limits, created_s=0.0)
        row = KeyRow(id=minted.id, tenant_id="t", env="live", digest=minted.digest, created_s=0.0)
        self.tenants = Tenants(store=None, pepper=pepper, clock=clock)  # type: ignore[arg-type]
        self.tenants.take(Snapshot(1, (tenant,), (row,)))
        self.key = minted.text
        self.runtime: RemoteRuntime = Remote(url="http://127.0.0.1:9/v1").build(
            Site(model="chat", replica="chat-0", state=folder, shelf=Shelf(folder / "shelf"))
        )
        replica = Replica(name="chat-0", model="chat", kind="remote", runtime=self.runtime, slots=4096, clock=clock)
        replica.state = State.ready
        self.target = Target(name="chat", created_s=0, replicas=(replica,), tokens_out_default=512)
        self.line = Line(model="chat", running_max=4096, waiting_max=256, wait_s_max=60, clock=clock)
        self.journal = Journal(folder=folder / "journal", sink=_kept_nowhere, clock=clock)
        self.pipeline = Pipeline(
            tenants=self.tenants,
            trace=Trace(metrics=Metrics(["chat"]), tracer=None),
            usage=Usage(journal=self.journal, clock=clock),
            quota=Quota(clock=clock),
            fairness=Fairness(lines={"chat": self.line}),
            route=Route(targets=[self.target]),
            clock=clock,
        )
        self.door = OpenAI(pipeline=self.pipeline, bounds=Bounds(), translations={}, clock=clock)
        self.server = Server(door=self.door, bounds=Bounds(), clock=clock)
        self.request = (
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:8000\r\nUser-Agent: profile\r\nAccept: */*\r\n"
            b"Content-Type: application/json\r\nAuthorization: Bearer %b\r\nContent-Length: %d\r\n\r\n%b"
            % (self.key.encode(), len(BODY), BODY)
        )

    def connected(self) -> tuple[Connection, Transport]:
        client, transport = Connection(self.server), Transport()
        client.connection_made(transport)
        return client, transport

    async def upstream(self) -> Upstream:
        """One more parked connection that answers whatever it is asked, in the loop's next turn."""
        wire = self.runtime.wire
        assert wire is not None
        loop = asyncio.get_running_loop()
        upstream = Upstream(loop=loop, clock=self.clock, idle_s_max=60, lost=lambda _: None)
        transport = Transport()
        upstream.connection_made(transport)
        transport.heard = lambda: loop.call_soon(upstream.data_received, ANSWER) and None
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


async def stages(rig: Rig) -> list[tuple[str, Work]]:
    pipeline, door = rig.pipeline, rig.door
    null = Server(door=_Null(), bounds=Bounds(), clock=rig.clock)
    reader = Connection(null)
    reader.connection_made(Transport())
    fields = {b"authorization": b"Bearer " + rig.key.encode()}
    call = rig.call()
    _, transport = rig.connected()
    client = Connection(rig.server)
    client.connection_made(transport)

    async def turned() -> None:
        async with pipeline.fairness.turn(call):
            pass

    def held() -> None:
        with pipeline.quota.hold(call, tokens_out_default=512):
            pass

    def spanned() -> None:
        with pipeline.trace.span(call):
            pass

    turns = itertools.count()

    async def recorded() -> None:
        with pipeline.usage.record(call):
            pass
        if next(turns) % RECORDS_A_TURN == 0:
            await asyncio.sleep(0)

    async def dispatched() -> None:
        async with pipeline.route.dispatch(call, rig.target) as reply:
            async for _ in reply.frames:
                pass

    async def metered() -> None:
        async with pipeline.route.dispatch(call, rig.target) as reply:
            call.tokens_in = 0
            await meter(call, reply, Nobody(), rig.clock)

    def found() -> None:
        pipeline.tenants.authorize(call.principal, pipeline.route.find("chat", call.principal).name, call.route)

    asked = door.enter
    request = _request(rig)
    return [
        ("read a request and write an answer", lambda: reader.data_received(rig.request)),
        ("identify", lambda: pipeline.identify(_key(fields)) and None),
        ("decode", lambda: _decoded(door, asked, request)),
        ("span and metrics", spanned),
        ("record and journal", recorded),
        ("find and authorize", found),
        ("hold", held),
        ("turn", turned),
        ("dispatch, and ask the engine", dispatched),
        ("the same, and meter", metered),
    ]


def _key(fields: dict[bytes, bytes]) -> str | None:
    from gateway.edge.openai import presented_key

    return presented_key(fields)


def _decoded(door: OpenAI, enter: Any, request: Any) -> None:
    door.call(request[1], request[0])


def _request(rig: Rig) -> Any:
    from gateway.edge.openai import Asked
    from gateway.edge.request import Request

    connection, _ = rig.connected()
    request = Request(
        connection,
        method=b"POST",
        target=b"/v1/chat/completions",
        headers=[],
        fields={},
        keep_alive=True,
        chunked=True,
    )
    request.id, request.body = "hr-1", BODY
    return request, Asked(rig.door, "/v1/chat/completions", rig.tenants.authenticate(rig.key), rig.clock.now_s())


class _Null:
    def enter(self, request: Any) -> Any:
        return _nothing


async def _nothing(request: Any) -> None:
    request.respond(200, b"content-type: application/json\r\n", ANSWER_BODY)


async def whole(rig: Rig) -> float:
    """One call from its first byte to its last, all stages on, with several under way."""
    clients = [rig.connected() for _ in range(RECORDS_A_TURN)]
    for _ in clients:
        await rig.upstream()

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
    upstream = await rig.upstream()
    loop = asyncio.get_running_loop()
    upstream._transport.heard = lambda: loop.call_soon(upstream.data_received, STREAM_HEAD + framed(event)) and None  # type: ignore[attr-defined,union-attr]
    body = BODY.replace(b'"max_tokens":16', b'"stream":true')
    client.data_received(
        rig.request.replace(BODY, body).replace(b"Content-Length: %d" % len(BODY), b"Content-Length: %d" % len(body))
    )
    for _ in range(10):
        await asyncio.sleep(0)
    piece = framed(event)
    us = await least_us(lambda: upstream.data_received(piece))
    upstream.stop("enough")
    for _ in range(10):
        await asyncio.sleep(0)
    return us


def framed(event: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(event), event)


async def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        rig = Rig(Path(folder))
        await rig.journal.open()
        await rig.runtime.open()
        await rig.upstream()
        for name, work in await stages(rig):
            print(f"{await least_us(work):8.1f} µs  {name}", flush=True)
            await asyncio.sleep(0)
        print(f"{await whole(rig):8.1f} µs  a whole call", flush=True)
        print(f"{await chunk(rig, PLAIN):8.1f} µs  a chunk without usage", flush=True)
        print(f"{await chunk(rig, METERED):8.1f} µs  a chunk with usage, taken out", flush=True)
        await rig.journal.aclose()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())
