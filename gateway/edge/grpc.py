"""The Open Inference Protocol over gRPC, `inference.GRPCInferenceService` as Triton has it, and `grpc.health.v1`.

Messages arrive as bytes, and a call's answer leaves as the bytes its translation made. What is not here, such as
shared memory, is UNIMPLEMENTED.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from types import MappingProxyType
from typing import Any, NoReturn, Protocol

import grpc
from google.protobuf.message import DecodeError

from gateway.call import Bounds, Principal
from gateway.edge.catalogue import VERSION, Catalogue
from gateway.edge.inference import IN_ONE_PIECE, Caller, Inference, bad, heard, whole
from gateway.edge.openai import presented_key, traceparent
from gateway.edge.request import error_headers
from gateway.edge.server import CLOSE_S_MAX
from gateway.errors import BadRequest, GatewayError
from gateway.meter import Receiver
from gateway.pipeline import Pipeline
from runtimes.clock import Clock
from runtimes.contract import Invalid
from runtimes.dialect import generation, kserve_grpc, messages
from runtimes.dialect.elements import Encoded, joined
from runtimes.dialect.generation import Generation, Said

log = logging.getLogger("headrace.edge")


class Context(Protocol):
    """What is used of grpc.aio's ServicerContext."""

    async def abort(self, code: grpc.StatusCode, details: str, trailing_metadata: object = ()) -> NoReturn: ...
    async def write(self, message: bytes) -> None: ...
    def invocation_metadata(self) -> Metadata | None: ...
    def set_trailing_metadata(self, trailing_metadata: Metadata) -> None: ...
    def time_remaining(self) -> float | None: ...


Metadata = tuple[tuple[str, str | bytes], ...]
Unary = Callable[[Principal, bytes, Context], Awaitable[bytes]]

SERVICE, HEALTH = "inference.GRPCInferenceService", "grpc.health.v1.Health"
#: Calls on one connection at once; further ones wait in its client.
STREAMS_MAX = 1000
#: How long a connection may lie idle, and how long after silence its other end is asked whether it still lives.
IDLE_S_MAX = 300.0
KEEPALIVE_S, KEEPALIVE_S_MAX = 60.0, 20.0
#: How often a client may ask the same; who does so more often three times over is disconnected.
PING_S_MIN = 10.0
#: Of an error's message: it travels in a header.
MESSAGE_CHARS_MAX = 1024
#: Texts made ahead of a client that reads slowly, before the engine is made to wait.
UNSENT_MAX = 64
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
        self._open: Mapping[str, Any] = MappingProxyType(
            {
                f"/{SERVICE}/ServerLive": grpc.unary_unary_rpc_method_handler(self._live),
                f"/{SERVICE}/ServerReady": grpc.unary_unary_rpc_method_handler(self._ready),
                f"/{HEALTH}/Check": grpc.unary_unary_rpc_method_handler(self._check),
                f"/{HEALTH}/Watch": grpc.unary_stream_rpc_method_handler(self._watch),
            }
        )
        """Answered without a key."""
        self._unary: Mapping[str, Unary] = MappingProxyType(
            {
                f"/{SERVICE}/ServerMetadata": self._server_metadata,
                f"/{SERVICE}/ModelReady": self._model_ready,
                f"/{SERVICE}/ModelMetadata": self._model_metadata,
                f"/{SERVICE}/ModelConfig": self._model_config,
                f"/{SERVICE}/ModelStatistics": self._model_statistics,
                f"/{SERVICE}/RepositoryIndex": self._repository_index,
                f"/{SERVICE}/RepositoryModelLoad": self._repository_control,
                f"/{SERVICE}/RepositoryModelUnload": self._repository_control,
                f"/{SERVICE}/ModelInfer": self._model_infer,
            }
        )

    @asynccontextmanager
    async def serving(self, address: str) -> AsyncIterator[None]:
        """Serve while inside. Other processes may serve the same address."""
        server = grpc.aio.server(options=self._options(), maximum_concurrent_rpcs=self.bounds.connections_max)
        server.add_generic_rpc_handlers((self,))
        server.add_insecure_port(address)
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
        unary = self._unary.get(method)
        if unary is None and method != STREAM:
            return None
        try:
            principal = self.pipeline.identify(presented_key(_fields(handler_call_details.invocation_metadata)))
        except GatewayError as error:
            # As one that takes a stream, because such a one is not made to wait for a message.
            return grpc.stream_unary_rpc_method_handler(partial(_refuse, error))
        if unary is None:
            return grpc.stream_stream_rpc_method_handler(partial(self._stream, principal))
        return grpc.unary_unary_rpc_method_handler(partial(self._answer, unary, principal))

    def _options(self) -> list[tuple[str, int]]:
        return [
            ("grpc.so_reuseport", 1),
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

    # ---- health

    async def _live(self, body: bytes, context: Context) -> bytes:
        return _bytes(messages.ServerLiveResponse(live=True))

    async def _ready(self, body: bytes, context: Context) -> bytes:
        return _bytes(messages.ServerReadyResponse(ready=self.catalogue.ready))

    async def _check(self, body: bytes, context: Context) -> bytes:
        status = self._status(body)
        if status == "SERVICE_UNKNOWN":
            await context.abort(grpc.StatusCode.NOT_FOUND, f"health is told of {SERVICE}, and of all by an empty name")
        return _bytes(messages.HealthCheckResponse(status=status))

    async def _watch(self, body: bytes, context: Context) -> None:
        told = ""
        while True:
            status = self._status(body)
            if status != told:
                await context.write(_bytes(messages.HealthCheckResponse(status=status)))
                told = status
            await self.clock.sleep(LOOK_S)

    def _status(self, body: bytes) -> str:
        if _decoded(messages.HealthCheckRequest, body).service not in ("", SERVICE):
            return "SERVICE_UNKNOWN"
        return "SERVING" if self.catalogue.ready else "NOT_SERVING"

    # ---- what there is

    async def _server_metadata(self, principal: Principal, body: bytes, context: Context) -> bytes:
        return _bytes(messages.ServerMetadataResponse(**self.catalogue.server()))

    async def _model_ready(self, principal: Principal, body: bytes, context: Context) -> bytes:
        asked = _decoded(messages.ModelReadyRequest, body)
        ready = self.catalogue.model_ready(asked.name, asked.version, principal)
        return _bytes(messages.ModelReadyResponse(ready=ready))

    async def _model_metadata(self, principal: Principal, body: bytes, context: Context) -> bytes:
        asked = _decoded(messages.ModelMetadataRequest, body)
        return _bytes(messages.ModelMetadataResponse(**self.catalogue.metadata(asked.name, asked.version, principal)))

    async def _model_config(self, principal: Principal, body: bytes, context: Context) -> bytes:
        asked = _decoded(messages.ModelConfigRequest, body)
        config = self.catalogue.config(asked.name, asked.version, principal)
        return _bytes(messages.ModelConfigResponse(config=config))

    async def _model_statistics(self, principal: Principal, body: bytes, context: Context) -> bytes:
        asked = _decoded(messages.ModelStatisticsRequest, body)
        found = self.catalogue.statistics(asked.name, asked.version, principal)
        return _bytes(messages.ModelStatisticsResponse(model_stats=found))

    async def _repository_index(self, principal: Principal, body: bytes, context: Context) -> bytes:
        asked = _decoded(messages.RepositoryIndexRequest, body)
        return _bytes(messages.RepositoryIndexResponse(models=self.catalogue.index(principal, ready=asked.ready)))

    async def _repository_control(self, principal: Principal, body: bytes, context: Context) -> bytes:
        raise self.catalogue.refuse_control()

    # ---- what is computed

    async def _answer(self, action: Unary, principal: Principal, body: bytes, context: Context) -> bytes:
        """Cancelled the moment the client has gone, or its deadline has passed."""
        try:
            return await action(principal, body, context)
        except Invalid as fault:
            error: GatewayError = bad(fault)
        except GatewayError as fault:
            error = fault
        except grpc.aio.AbortError:
            raise
        except Exception as fault:
            log.error("an RPC ended in a fault of the gateway", exc_info=fault)
            error = GatewayError("The gateway failed; its log says why.")
        return await _refuse(error, None, context)

    async def _model_infer(self, principal: Principal, body: bytes, context: Context) -> bytes:
        asked = kserve_grpc.read(body)
        caller = self._caller(principal, context)
        context.set_trailing_metadata((("x-request-id", caller.id),))
        if not self.catalogue.generates(asked.model):
            return await self._tensors(caller, asked, body, final=None)
        wants = generation.from_message(asked.message)
        if wants.stream:
            raise BadRequest("`stream` is true, but this is ModelInfer; ask ModelStreamInfer.", param="stream")
        return _text(asked.model, wants, await self._in_one_piece(caller, asked, wants), final=None)

    async def _stream(self, principal: Principal, requests: AsyncIterator[bytes], context: Context) -> None:
        """One request after the other, as they come; what goes wrong with one is told, and the next is taken."""
        async for body in requests:
            id = ""
            try:
                asked = kserve_grpc.read(body)
                id = asked.message.id
                caller = self._caller(principal, context)
                if not self.catalogue.generates(asked.model):
                    await _send(context, await self._tensors(caller, asked, body, final=True))
                    continue
                wants = generation.from_message(asked.message)
                if wants.stream:
                    await self._texts(caller, asked, wants, context)
                else:
                    said = await self._in_one_piece(caller, asked, wants)
                    await _send(context, _text(asked.model, wants, said, final=True))
            except (Invalid, GatewayError) as fault:
                error = bad(fault) if isinstance(fault, Invalid) else fault
                answer = {"error_message": error.message, "infer_response": {"id": id}}
                await context.write(_bytes(messages.ModelStreamInferResponse(**answer)))

    async def _tensors(self, caller: Caller, asked: kserve_grpc.Asked, body: bytes, *, final: bool | None) -> bytes:
        self.catalogue.require_version(asked.model, asked.version, caller.principal)

        def write(outputs: list[Encoded], version: str) -> bytes:
            return kserve_grpc.write(outputs, id=asked.message.id, model=asked.model, version=version, final=final)

        call = self.inference.tensors(caller, asked.model, body, asked.message, write)
        with self._under_way():
            return (await self.inference.run(call, IN_ONE_PIECE)).body

    async def _in_one_piece(self, caller: Caller, asked: kserve_grpc.Asked, wants: Generation) -> Said:
        self.catalogue.require_version(asked.model, asked.version, caller.principal)
        call = self.inference.generation(caller, asked.model, wants, stream=False)
        with self._under_way():
            return whole(await self.inference.run(call, IN_ONE_PIECE))

    async def _texts(self, caller: Caller, asked: kserve_grpc.Asked, wants: Generation, context: Context) -> None:
        self.catalogue.require_version(asked.model, asked.version, caller.principal)
        texts = Texts()
        call = self.inference.generation(caller, asked.model, wants, stream=True)
        running = asyncio.create_task(self.inference.run(call, texts))
        running.add_done_callback(texts.close)
        self.running.add(running)
        try:
            async for said in texts:
                await _send(context, _text(asked.model, wants, said, final=False))
            answer = await running
        finally:
            running.cancel()
            await asyncio.wait((running,))
            self.running.discard(running)
        said = texts.last if answer.events else whole(answer)
        await _send(context, _text(asked.model, wants, said, final=True))

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


class Texts:
    """A Client that takes a generation's texts to be iterated over, all but the last one: what completes a call is told
    once it is settled."""

    def __init__(self) -> None:
        self.last = Said("", finished=True)
        self._texts: deque[Said] = deque()
        self._closed = False
        self._changed = asyncio.Event()
        self._drained = asyncio.Event()

    def close(self, _task: object) -> None:
        self._closed = True
        self._changed.set()

    def begin(self, status: int, first: bytes) -> Receiver:
        self.write(first)
        return self

    @property
    def full(self) -> bool:
        return len(self._texts) >= UNSENT_MAX

    def write(self, part: bytes) -> None:
        for said in heard(part):
            if said.finished:
                self.last = said
            else:
                self._texts.append(said)
        self._changed.set()

    async def drained(self) -> None:
        while self.full:
            self._drained.clear()
            await self._drained.wait()

    async def __aiter__(self) -> AsyncIterator[Said]:
        while True:
            while self._texts:
                yield self._texts.popleft()
                self._drained.set()
            if self._closed:
                return
            self._changed.clear()
            await self._changed.wait()


STREAM = f"/{SERVICE}/ModelStreamInfer"
#: Of a caller's metadata, what is looked at.
LOOKED_AT = frozenset({"authorization", "x-api-key", "traceparent"})


async def _refuse(error: GatewayError, _requests: object, context: Context) -> bytes:
    headers = error_headers(error)
    after_ms = headers.get("retry-after-ms", "-1")
    trailing = [(name, value) for name, value in headers.items() if name in RETRYING]
    await context.abort(
        grpc.StatusCode[error.grpc],
        error.message[:MESSAGE_CHARS_MAX],
        (*trailing, ("grpc-retry-pushback-ms", after_ms if error.retryable else "-1")),
    )


#: What tells a client when to come back and whether to; `grpc-retry-pushback-ms` says both to gRPC's own retries.
RETRYING = frozenset({"retry-after", "retry-after-ms", "x-should-retry"})


async def _send(context: Context, answer: bytes) -> None:
    """A ModelInferResponse as part of a stream: its field 2, as protobuf writes it, so that it is not taken apart to be
    put together again."""
    await context.write(b"\x12" + _varint(len(answer)) + answer)


def _text(model: str, wants: Generation, said: Said, *, final: bool | None) -> bytes:
    output = Encoded("text_output", "BYTES", (1,), joined([said.text]))
    return kserve_grpc.write([output], id=wants.id, model=model, version=VERSION, final=final)


def _fields(metadata: Metadata | None) -> dict[bytes, bytes]:
    return {name.encode(): str(value).encode() for name, value in metadata or () if name in LOOKED_AT}


def _decoded(message: Any, body: bytes) -> Any:
    try:
        return message.FromString(body)
    except DecodeError:
        raise BadRequest(f"The message is no {message.DESCRIPTOR.full_name}.") from None


def _varint(number: int) -> bytes:
    found = bytearray()
    while number > 0x7F:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes((*found, number))


def _bytes(message: Any) -> bytes:
    body: bytes = message.SerializeToString()
    return body
