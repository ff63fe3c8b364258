"""The Open Inference Protocol over gRPC, `inference.GRPCInferenceService` as Triton has it, and `grpc.health.v1`.

Messages arrive as bytes, and a call's answer leaves as the bytes that its translation made. What is not here, such as
shared memory, is UNIMPLEMENTED.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from types import MappingProxyType
from typing import Any

from gateway.call import Bounds, Call, Principal
from gateway.edge import grpc_facts
from gateway.edge.catalogue import VERSION, Catalogue
from gateway.edge.connection import UNREAD_BYTES_MAX
from gateway.edge.grpc_call import Rpc
from gateway.edge.grpc_facts import ANSWERS, SERVICE, encoded
from gateway.edge.grpc_server import GrpcServer, Patience
from gateway.edge.inference import IN_ONE_PIECE, Caller, Inference, bad, whole
from gateway.edge.openai import presented_key, traceparent
from gateway.edge.request import error_headers
from gateway.edge.texts import Texts
from gateway.errors import BadRequest, GatewayError, NotFound, RequestTimeout, TooManyConnections, Unsupported
from gateway.meter import Answer
from gateway.pipeline import Pipeline
from runtimes.clock import Clock
from runtimes.contract import Invalid
from runtimes.dialect import generation, kserve_grpc, messages
from runtimes.dialect.elements import Encoded, joined
from runtimes.dialect.generation import Generation, Said
from runtimes.dialect.protobuf import INFER_RESPONSE, field
from runtimes.rpc.messages import Body
from runtimes.rpc.status import Status

log = logging.getLogger("headrace.edge")

#: Answers a call: the message that ends it, if one does, is what it returns.
Action = Callable[[Rpc], Awaitable[bytes | None]]

INFER, STREAM = f"/{SERVICE}/ModelInfer", f"/{SERVICE}/ModelStreamInfer"
#: Calls on one connection at once; further ones wait in its client.
STREAMS_MAX = 1000
#: Who watches the health at once, of all and on one connection: nobody needs a key for that.
WATCHERS_MAX, WATCHERS_EACH_MAX = 64, 4
#: Of a message that needs no key.
OPEN_BYTES_MAX = 1_024
#: How long a connection, or a stream between two requests, may lie idle, and how long a connection that is asked
#: whether it still lives, which it is after so long a silence, may take to say so.
IDLE_S_MAX = 300.0
KEEPALIVE_S, KEEPALIVE_S_MAX = 60.0, 20.0
#: Of an error's message: it travels in a header.
MESSAGE_CHARS_MAX = 1024
#: Pause between two looks of a health watcher.
LOOK_S = 0.5


class Grpc:
    """What answers: a GrpcServer's Door. `serving` is that server."""

    def __init__(
        self, *, pipeline: Pipeline, catalogue: Catalogue, inference: Inference, bounds: Bounds, clock: Clock
    ) -> None:
        self.pipeline = pipeline
        self.catalogue = catalogue
        self.inference = inference
        self.bounds = bounds
        self.clock = clock
        self.running: set[asyncio.Task[Any]] = set()
        """Calls under way."""
        self.watchers = 0
        self._server: GrpcServer | None = None
        self._open: Mapping[str, Action] = MappingProxyType(
            {
                f"/{SERVICE}/ServerLive": self._live,
                f"/{SERVICE}/ServerReady": self._ready,
                "/grpc.health.v1.Health/Check": self._check,
                "/grpc.health.v1.Health/Watch": self._watch,
            }
        )
        """Answered without a key."""

    @asynccontextmanager
    async def serving(self, address: str) -> AsyncIterator[None]:
        """Serve while inside. Other processes may serve the same address."""
        self._server = GrpcServer(
            door=self,
            bounds=self.bounds,
            streams_max=STREAMS_MAX,
            patience=Patience(IDLE_S_MAX, KEEPALIVE_S, KEEPALIVE_S_MAX),
            clock=self.clock,
        )
        with _listening(address) as listening:
            async with self._server.serving(listening):
                yield

    def retire(self) -> None:
        """The gateway is about to stop: clients are asked to go elsewhere."""
        if self._server is not None:
            self._server.retire()

    @property
    def connections(self) -> int:
        """Open ones."""
        return 0 if self._server is None else len(self._server.connections)

    @property
    def at_rest(self) -> bool:
        return not self.running

    def cut_off(self) -> None:
        """End the calls under way; their clients are told why."""
        for task in tuple(self.running):
            task.cancel()

    def enter(self, rpc: Rpc) -> Coroutine[Any, Any, None]:
        """A call is known by its key before a byte of its message is read."""
        method = rpc.method
        action = self._open.get(method)
        bytes_max = self.bounds.body_bytes_max if action is None else OPEN_BYTES_MAX
        rpc.expect(bytes_max=bytes_max, number_max=None if method == STREAM else 1)
        if action is None:
            if method not in ANSWERS and method not in (INFER, STREAM):
                raise Unsupported(f"{method[: MESSAGE_CHARS_MAX // 2]} is not served here.")
            principal = self.pipeline.identify(presented_key(rpc.fields))
            if method == INFER:
                action = partial(self._model_infer, principal)
            elif method == STREAM:
                action = partial(self._model_stream_infer, principal)
            else:
                action = partial(self._told, method, principal)
        return self._answer(rpc, action)

    def refuse(self, rpc: Rpc, error: GatewayError) -> None:
        headers = error_headers(error)
        after_ms = headers.get("retry-after-ms", "-1") if error.retryable else "-1"
        trailing = [(name.encode(), value.encode()) for name, value in headers.items() if name in RETRYING]
        trailing.append((b"grpc-retry-pushback-ms", after_ms.encode()))
        rpc.refuse(Status[error.grpc], error.message[:MESSAGE_CHARS_MAX], trailing)

    # ---- one call, from its message to its end

    async def _answer(self, rpc: Rpc, action: Action) -> None:
        """Cancelled the moment the client has gone, or its deadline has passed."""
        try:
            rpc.finish(await action(rpc))
        except Exception as fault:  # noqa: BLE001 - what is nobody's fault is logged there
            self.refuse(rpc, _error(fault))
        try:
            await self._taken(rpc)
        except TimeoutError:
            rpc.give_up()

    async def _taken(self, rpc: Rpc) -> None:
        """Raises TimeoutError if the client leaves what was written unread for too long."""
        if rpc.unsent:
            async with asyncio.timeout(self.bounds.write_s_max):
                await rpc.drained()

    async def _write(self, rpc: Rpc, message: bytes) -> None:
        """A part of a stream."""
        rpc.write(message)
        await self._taken(rpc)

    async def _message(self, rpc: Rpc) -> Body:
        """The only one of a call that has one."""
        late = f"The message did not arrive within {self.bounds.body_s_max:g} s."
        message = await _read(rpc, self.bounds.body_s_max, late)
        if message is None:
            raise Unsupported("The call brings no message, and its method takes one.")
        return message

    # ---- what there is

    async def _live(self, rpc: Rpc) -> bytes:
        return grpc_facts.live(self.catalogue)

    async def _ready(self, rpc: Rpc) -> bytes:
        return grpc_facts.ready(self.catalogue)

    async def _check(self, rpc: Rpc) -> bytes:
        status = grpc_facts.health(self.catalogue, await self._message(rpc))
        if status == "SERVICE_UNKNOWN":
            raise NotFound(f"Health is told of {SERVICE}, and of all by an empty name.")
        return encoded(messages.HealthCheckResponse(status=status))

    async def _watch(self, rpc: Rpc) -> None:
        body, told = await self._message(rpc), ""
        if self.watchers >= WATCHERS_MAX:
            raise TooManyConnections(f"{WATCHERS_MAX} watch the health already; check it instead.")
        if rpc.share.watchers >= WATCHERS_EACH_MAX:
            said = f"{WATCHERS_EACH_MAX} watch the health on this connection already; check it instead."
            raise TooManyConnections(said)
        self.watchers += 1
        rpc.share.watchers += 1
        try:
            while True:
                status = grpc_facts.health(self.catalogue, body)
                if status != told:
                    await self._write(rpc, encoded(messages.HealthCheckResponse(status=status)))
                    told = status
                await self.clock.sleep(LOOK_S)
        finally:
            self.watchers -= 1
            rpc.share.watchers -= 1

    async def _told(self, method: str, principal: Principal, rpc: Rpc) -> bytes:
        return ANSWERS[method](self.catalogue, principal, await self._message(rpc))

    # ---- what is computed

    async def _model_infer(self, principal: Principal, rpc: Rpc) -> bytes:
        asked = kserve_grpc.read(await self._message(rpc))
        caller = self._caller(principal, rpc)
        rpc.trailing = ((b"x-request-id", caller.id.encode()),)
        if not self.catalogue.asks_generator(asked.model, asked.message):
            return await self._tensors(caller, asked, final=None)
        wants = generation.from_message(asked.message)
        if wants.stream:
            raise BadRequest("`stream` is true, but this is ModelInfer; ask ModelStreamInfer.", param="stream")
        return await self._in_one_piece(caller, asked, wants, final=None)

    async def _model_stream_infer(self, principal: Principal, rpc: Rpc) -> None:
        """One request after the other, as they come; what goes wrong with one is told, and the next is taken."""
        while (body := await self._next(rpc)) is not None:
            id = ""
            try:
                asked = kserve_grpc.read(body)
                id = asked.message.id
                caller = self._caller(principal, rpc)
                if not self.catalogue.asks_generator(asked.model, asked.message):
                    await self._write(rpc, _part(await self._tensors(caller, asked, final=True)))
                    continue
                wants = generation.from_message(asked.message)
                if wants.stream:
                    await self._texts(caller, asked, wants, rpc)
                else:
                    await self._write(rpc, _part(await self._in_one_piece(caller, asked, wants, final=True)))
            except (Invalid, GatewayError) as fault:
                answer = {"error_message": _error(fault).message, "infer_response": {"id": id}}
                await self._write(rpc, encoded(messages.ModelStreamInferResponse(**answer)))

    async def _next(self, rpc: Rpc) -> Body | None:
        """A stream's next request, None after the last."""
        late = f"No request came on this stream for {IDLE_S_MAX:g} s; open another."
        return await _read(rpc, IDLE_S_MAX, late)

    async def _tensors(self, caller: Caller, asked: kserve_grpc.Asked, *, final: bool | None) -> bytes:
        version = self.catalogue.require_version(asked.model, asked.version, caller.principal)

        def write(outputs: list[Encoded], model: str, told: str) -> bytes:
            return kserve_grpc.write(outputs, id=asked.message.id, model=model, version=told, final=final)

        call = self.inference.tensors(caller, asked.model, asked.message, write, version=version, size=asked.size)
        return (await self._run(call)).body

    async def _in_one_piece(
        self, caller: Caller, asked: kserve_grpc.Asked, wants: Generation, *, final: bool | None
    ) -> bytes:
        self.catalogue.require_version(asked.model, asked.version, caller.principal)
        call = self.inference.generation(caller, asked.model, wants, stream=False)
        return _text(call.model, wants, whole(await self._run(call)), final=final)

    async def _texts(self, caller: Caller, asked: kserve_grpc.Asked, wants: Generation, rpc: Rpc) -> None:
        self.catalogue.require_version(asked.model, asked.version, caller.principal)
        texts = Texts()
        call = self.inference.generation(caller, asked.model, wants, stream=True)
        running = asyncio.create_task(self.inference.run(call, texts))
        running.add_done_callback(texts.close)
        self.running.add(running)
        running.add_done_callback(self.running.discard)
        try:
            async for said in texts:
                await self._write(rpc, _part(_text(call.model, wants, said, final=False)))
            answer = await running
        finally:
            running.cancel()
            await asyncio.wait((running,))
        said = texts.last if answer.events else whole(answer)
        await self._write(rpc, _part(_text(call.model, wants, said, final=True)))

    async def _run(self, call: Call) -> Answer:
        """Its answer in one piece."""
        task = asyncio.current_task()
        assert task is not None
        self.running.add(task)
        try:
            return await self.inference.run(call, IN_ONE_PIECE)
        finally:
            self.running.discard(task)

    def _caller(self, principal: Principal, rpc: Rpc) -> Caller:
        now_s, left_s = self.clock.now_s(), rpc.left_s
        patience_s = self.bounds.call_s_max if left_s is None else min(left_s, self.bounds.call_s_max)
        id = self.inference.ids.next()
        return Caller(id, principal, now_s, now_s + patience_s, traceparent(rpc.fields))


#: What tells a client when to come back and whether to; `grpc-retry-pushback-ms` says both to gRPC's own retries.
RETRYING = frozenset({"retry-after", "retry-after-ms", "x-should-retry"})


@contextmanager
def _listening(address: str) -> Iterator[socket.socket]:
    """Beside others that listen there like this. Raises OSError."""
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        # As the data listener's: by itself the kernel would take megabytes of an answer that nobody reads.
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNREAD_BYTES_MAX)
        try:
            listening.bind((host, int(port)))
        except OSError as error:
            raise OSError(error.errno, "gRPC can't listen there; another program may", address) from None
        yield listening


async def _read(rpc: Rpc, s_max: float, late: str) -> Body | None:
    """The call's next message, None after its last; `late` is said if it does not come in time."""
    if rpc.here:
        return await rpc.read()
    try:
        async with asyncio.timeout(s_max):
            return await rpc.read()
    except TimeoutError:
        raise RequestTimeout(late) from None


def _error(fault: Exception) -> GatewayError:
    if isinstance(fault, Invalid):
        return bad(fault)
    if isinstance(fault, GatewayError):
        return fault
    if isinstance(fault, TimeoutError):
        return RequestTimeout("The client left its answer unread for too long.")
    log.error("an RPC ended in a fault of the gateway", exc_info=fault)
    return GatewayError("The gateway failed; its log says why.")


def _text(model: str, wants: Generation, said: Said, *, final: bool | None) -> bytes:
    output = Encoded("text_output", "BYTES", (1,), joined([said.text]))
    return kserve_grpc.write([output], id=wants.id, model=model, version=VERSION, final=final)


def _part(answer: bytes) -> bytes:
    """A ModelInferResponse as part of a stream, as protobuf writes it, so that it is not taken apart to be put together
    again."""
    return b"".join(field(INFER_RESPONSE, answer))
