"""The Open Inference Protocol over gRPC, `inference.GRPCInferenceService` as Triton has it, and `grpc.health.v1`.

Messages arrive as bytes, and a call's answer leaves as the bytes that its translation made. What is not here, such as
shared memory, is UNIMPLEMENTED.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from types import MappingProxyType
from typing import Any, NoReturn, Protocol

import grpc

from gateway.call import Bounds, Principal
from gateway.edge import grpc_facts
from gateway.edge.catalogue import VERSION, Catalogue
from gateway.edge.grpc_facts import ANSWERS, SERVICE, encoded
from gateway.edge.inference import IN_ONE_PIECE, Caller, Inference, bad, whole
from gateway.edge.openai import presented_key, traceparent
from gateway.edge.request import error_headers
from gateway.edge.server import CLOSE_S_MAX
from gateway.edge.texts import Texts
from gateway.errors import BadRequest, GatewayError, NotFound, RequestTimeout, TooManyConnections
from gateway.pipeline import Pipeline
from runtimes.clock import Clock
from runtimes.contract import Invalid
from runtimes.dialect import generation, kserve_grpc, messages
from runtimes.dialect.elements import Encoded, joined
from runtimes.dialect.generation import Generation, Said

log = logging.getLogger("headrace.edge")

Metadata = tuple[tuple[str, str | bytes], ...]


class Context(Protocol):
    """What is used of grpc.aio's ServicerContext."""

    async def abort(self, code: grpc.StatusCode, details: str, trailing_metadata: Metadata) -> NoReturn: ...
    async def write(self, message: bytes) -> None: ...
    async def read(self) -> bytes | object: ...
    def invocation_metadata(self) -> Metadata | None: ...
    def set_trailing_metadata(self, trailing_metadata: Metadata) -> None: ...
    def time_remaining(self) -> float | None: ...


Action = Callable[[Context], Awaitable[bytes | None]]

INFER, STREAM = f"/{SERVICE}/ModelInfer", f"/{SERVICE}/ModelStreamInfer"
#: Calls on one connection at once; further ones wait in its client.
STREAMS_MAX = 1000
#: Who watches the health at once: nobody needs a key for that.
WATCHERS_MAX = 64
#: How long a connection, or a stream between two requests, may lie idle, and how long a connection that is asked
#: whether it still lives, which it is after so long a silence, may take to say so.
IDLE_S_MAX = 300.0
KEEPALIVE_S, KEEPALIVE_S_MAX = 60.0, 20.0
#: How often a client may ask the same; who does so more often three times over is disconnected.
PING_S_MIN = 10.0
#: Of an error's message: it travels in a header.
MESSAGE_CHARS_MAX = 1024
#: Pause between two looks of a health watcher.
LOOK_S = 0.5


class Grpc:
    """What answers, as a grpc.GenericRpcHandler; `serving` is its server."""

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
        self._open: Mapping[str, Any] = MappingProxyType(
            {
                f"/{SERVICE}/ServerLive": self._unary(self._live),
                f"/{SERVICE}/ServerReady": self._unary(self._ready),
                "/grpc.health.v1.Health/Check": self._unary(self._check),
                "/grpc.health.v1.Health/Watch": self._stream(self._watch),
            }
        )
        """Answered without a key."""

    @asynccontextmanager
    async def serving(self, address: str) -> AsyncIterator[None]:
        """Serve while inside. Other processes may serve the same address."""
        server = grpc.aio.server(options=self._options(), maximum_concurrent_rpcs=self.bounds.connections_max)
        server.add_generic_rpc_handlers((self,))
        try:
            server.add_insecure_port(address)
        except RuntimeError:  # it says no more than that
            raise OSError(errno.EADDRINUSE, "gRPC can't listen there; another program may", address) from None
        await server.start()
        try:
            yield
        finally:
            await server.stop(CLOSE_S_MAX)

    def cut_off(self) -> None:
        """End the calls under way; their clients are told why."""
        for task in tuple(self.running):
            task.cancel()

    def service(self, handler_call_details: Any) -> Any:
        """A call is known by its key before a byte of its message is read."""
        method = handler_call_details.method
        if method in self._open:
            return self._open[method]
        if method not in ANSWERS and method not in (INFER, STREAM):
            return None
        try:
            principal = self.pipeline.identify(presented_key(_fields(handler_call_details.invocation_metadata)))
        except GatewayError as error:
            return self._unary(partial(_raise, error))
        if method == STREAM:
            return self._stream(partial(self._model_stream_infer, principal))
        if method == INFER:
            return self._unary(partial(self._model_infer, principal))
        return self._unary(partial(self._told, method, principal))

    def _options(self) -> list[tuple[str, int]]:
        return [
            ("grpc.so_reuseport", 1),
            ("grpc.max_allowed_incoming_connections", self.bounds.connections_max),
            ("grpc.max_receive_message_length", self.bounds.body_bytes_max),
            ("grpc.max_send_message_length", -1),
            ("grpc.max_metadata_size", self.bounds.header_bytes_max),
            ("grpc.absolute_max_metadata_size", self.bounds.header_bytes_max),
            ("grpc.max_concurrent_streams", STREAMS_MAX),
            ("grpc.server_handshake_timeout_ms", int(self.bounds.header_s_max * 1000)),
            ("grpc.max_connection_idle_ms", int(IDLE_S_MAX * 1000)),
            ("grpc.keepalive_time_ms", int(KEEPALIVE_S * 1000)),
            ("grpc.keepalive_timeout_ms", int(KEEPALIVE_S_MAX * 1000)),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.min_ping_interval_without_data_ms", int(PING_S_MIN * 1000)),
            ("grpc.http2.max_ping_strikes", 2),
        ]

    # ---- one RPC, from its message to its end

    def _unary(self, action: Action) -> Any:
        # As one that takes a stream: for the message of any other gRPC waits before it asks us, however long it takes.
        return grpc.stream_unary_rpc_method_handler(partial(self._answer, action))

    def _stream(self, action: Action) -> Any:
        return grpc.stream_stream_rpc_method_handler(partial(self._answer, action))

    async def _answer(self, action: Action, _messages: object, context: Context) -> bytes | None:
        """Cancelled the moment the client has gone, or its deadline has passed."""
        try:
            return await action(context)
        except Exception as fault:  # noqa: BLE001 - what is nobody's fault is logged there
            error = _error(fault)
        headers = error_headers(error)
        after_ms = headers.get("retry-after-ms", "-1") if error.retryable else "-1"
        trailing = [(name, value) for name, value in headers.items() if name in RETRYING]
        # To a client that does not read, this goes out when it does, or never; nothing of ours waits for that.
        with suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_S_MAX):
                await context.abort(
                    grpc.StatusCode[error.grpc],
                    error.message[:MESSAGE_CHARS_MAX],
                    (*trailing, ("grpc-retry-pushback-ms", after_ms)),
                )
        return None

    async def _write(self, context: Context, message: bytes) -> None:
        """A part of a stream. Raises TimeoutError if the client leaves it unread for too long."""
        async with asyncio.timeout(self.bounds.write_s_max):
            await context.write(message)

    async def _message(self, context: Context) -> bytes:
        """The only one of a call that has one."""
        try:
            async with asyncio.timeout(self.bounds.body_s_max):
                message = await context.read()
        except TimeoutError:
            raise RequestTimeout(f"The message did not arrive within {self.bounds.body_s_max:g} s.") from None
        if not isinstance(message, bytes):
            raise BadRequest("The call brings no message.")
        return message

    # ---- what there is

    async def _live(self, context: Context) -> bytes:
        return grpc_facts.live(self.catalogue)

    async def _ready(self, context: Context) -> bytes:
        return grpc_facts.ready(self.catalogue)

    async def _check(self, context: Context) -> bytes:
        status = grpc_facts.health(self.catalogue, await self._message(context))
        if status == "SERVICE_UNKNOWN":
            raise NotFound(f"Health is told of {SERVICE}, and of all by an empty name.")
        return encoded(messages.HealthCheckResponse(status=status))

    async def _watch(self, context: Context) -> None:
        body, told = await self._message(context), ""
        if self.watchers >= WATCHERS_MAX:
            raise TooManyConnections(f"{WATCHERS_MAX} watch the health already; check it instead.")
        self.watchers += 1
        try:
            while True:
                status = grpc_facts.health(self.catalogue, body)
                if status != told:
                    await self._write(context, encoded(messages.HealthCheckResponse(status=status)))
                    told = status
                await self.clock.sleep(LOOK_S)
        finally:
            self.watchers -= 1

    async def _told(self, method: str, principal: Principal, context: Context) -> bytes:
        return ANSWERS[method](self.catalogue, principal, await self._message(context))

    # ---- what is computed

    async def _model_infer(self, principal: Principal, context: Context) -> bytes:
        asked = kserve_grpc.read(await self._message(context))
        caller = self._caller(principal, context)
        context.set_trailing_metadata((("x-request-id", caller.id),))
        if not self.catalogue.asks_generator(asked.model, asked.message):
            return await self._tensors(caller, asked, final=None)
        wants = generation.from_message(asked.message)
        if wants.stream:
            raise BadRequest("`stream` is true, but this is ModelInfer; ask ModelStreamInfer.", param="stream")
        return await self._in_one_piece(caller, asked, wants, final=None)

    async def _model_stream_infer(self, principal: Principal, context: Context) -> None:
        """One request after the other, as they come; what goes wrong with one is told, and the next is taken."""
        while (body := await self._next(context)) is not None:
            id = ""
            try:
                asked = kserve_grpc.read(body)
                id = asked.message.id
                caller = self._caller(principal, context)
                if not self.catalogue.asks_generator(asked.model, asked.message):
                    await self._write(context, _part(await self._tensors(caller, asked, final=True)))
                    continue
                wants = generation.from_message(asked.message)
                if wants.stream:
                    await self._texts(caller, asked, wants, context)
                else:
                    await self._write(context, _part(await self._in_one_piece(caller, asked, wants, final=True)))
            except (Invalid, GatewayError) as fault:
                answer = {"error_message": _error(fault).message, "infer_response": {"id": id}}
                await self._write(context, encoded(messages.ModelStreamInferResponse(**answer)))

    async def _next(self, context: Context) -> bytes | None:
        """A stream's next request, None after the last."""
        try:
            async with asyncio.timeout(IDLE_S_MAX):
                message = await context.read()
        except TimeoutError:
            raise RequestTimeout(f"No request came on this stream for {IDLE_S_MAX:g} s; open another.") from None
        return message if isinstance(message, bytes) else None

    async def _tensors(self, caller: Caller, asked: kserve_grpc.Asked, *, final: bool | None) -> bytes:
        self.catalogue.require_version(asked.model, asked.version, caller.principal)

        def write(outputs: list[Encoded], model: str, version: str) -> bytes:
            return kserve_grpc.write(outputs, id=asked.message.id, model=model, version=version, final=final)

        call = self.inference.tensors(caller, asked.model, asked.message, write, size=asked.size)
        with self._under_way():
            return (await self.inference.run(call, IN_ONE_PIECE)).body

    async def _in_one_piece(
        self, caller: Caller, asked: kserve_grpc.Asked, wants: Generation, *, final: bool | None
    ) -> bytes:
        self.catalogue.require_version(asked.model, asked.version, caller.principal)
        call = self.inference.generation(caller, asked.model, wants, stream=False)
        with self._under_way():
            said = whole(await self.inference.run(call, IN_ONE_PIECE))
        return _text(call.model, wants, said, final=final)

    async def _texts(self, caller: Caller, asked: kserve_grpc.Asked, wants: Generation, context: Context) -> None:
        self.catalogue.require_version(asked.model, asked.version, caller.principal)
        texts = Texts()
        call = self.inference.generation(caller, asked.model, wants, stream=True)
        running = asyncio.create_task(self.inference.run(call, texts))
        running.add_done_callback(texts.close)
        self.running.add(running)
        try:
            async for said in texts:
                await self._write(context, _part(_text(call.model, wants, said, final=False)))
            answer = await running
        finally:
            running.cancel()
            await asyncio.wait((running,))
            self.running.discard(running)
        said = texts.last if answer.events else whole(answer)
        await self._write(context, _part(_text(call.model, wants, said, final=True)))

    @contextmanager
    def _under_way(self) -> Iterator[None]:
        task = asyncio.current_task()
        assert task is not None
        self.running.add(task)
        try:
            yield
        finally:
            self.running.discard(task)

    def _caller(self, principal: Principal, context: Context) -> Caller:
        now_s, left_s = self.clock.now_s(), context.time_remaining()
        patience_s = self.bounds.call_s_max if left_s is None else min(left_s, self.bounds.call_s_max)
        fields = _fields(context.invocation_metadata())
        return Caller(self.inference.ids.next(), principal, now_s, now_s + patience_s, traceparent(fields))


#: Of a caller's metadata, what is looked at.
LOOKED_AT = frozenset({"authorization", "x-api-key", "traceparent"})
#: What tells a client when to come back and whether to; `grpc-retry-pushback-ms` says both to gRPC's own retries.
RETRYING = frozenset({"retry-after", "retry-after-ms", "x-should-retry"})


def _fields(metadata: Metadata | None) -> dict[bytes, bytes]:
    return {name.encode(): str(value).encode() for name, value in metadata or () if name in LOOKED_AT}


async def _raise(error: GatewayError, context: Context) -> NoReturn:
    raise error


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
    """A ModelInferResponse as part of a stream: field 2 of a ModelStreamInferResponse, as protobuf writes it, so that
    it is not taken apart to be put together again."""
    return b"\x12" + _varint(len(answer)) + answer


def _varint(number: int) -> bytes:
    found = bytearray()
    while number > 0x7F:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes((*found, number))
