"""The Open Inference Protocol over HTTP: `/v2/…`, KServe's v2 with Triton's extensions.

Models that speak tensors answer `infer`; models that generate text answer `generate` and `generate_stream` too, and
are asked by way of `/v1/completions`, under which their calls are recorded. Errors are the protocol's own:
`{"error": "…"}`.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable, Coroutine, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple
from urllib.parse import unquote_to_bytes

import msgspec

from gateway.call import Bounds, Call, Principal
from gateway.edge.catalogue import VERSION, Catalogue
from gateway.edge.coding import compressed, decompressed
from gateway.edge.depth import require_depth
from gateway.edge.inference import IN_ONE_PIECE, Caller, Inference, bad, heard, whole
from gateway.edge.openai import JSON_LINES, STREAM_LINES, presented_key, traceparent
from gateway.edge.patience import patience_s
from gateway.edge.request import KEYLESS_BODY_BYTES_MAX, Handler, Request
from gateway.errors import BadRequest, Draining, GatewayError, MethodNotAllowed, NotFound, Unsupported
from gateway.meter import Receiver
from gateway.pipeline import Pipeline
from runtimes.clock import Clock
from runtimes.contract import Invalid
from runtimes.dialect import generation, kserve_rest
from runtimes.dialect.elements import Encoded, Message, joined
from runtimes.dialect.generation import Generation, Said

log = logging.getLogger("headrace.edge")

#: What ends in a verb, also in one of Triton's that is not served, is about a model and not its name; the slashes of a
#: name that ends so are to be quoted.
MODEL = re.compile(
    rb"/v2/models/(?P<model>.+?)(?:/versions/(?P<version>[^/]+))?"
    rb"(?:/(?P<verb>ready|config|stats|infer|generate|generate_stream|versions|trace/setting))?"
)
UNSERVED = (
    (re.compile(rb"/v2/(?:models/.+/)?trace/setting"), "Traces are not set from here; the configuration does."),
    (re.compile(rb"/v2/logging"), "Logging is not set from here; the gateway logs to its standard error."),
    (re.compile(rb"/v2/(?:system|cuda)sharedmemory(?:/.*)?"), "Shared memory is not served; send the tensors."),
    (re.compile(rb"/v2/models/.+/versions"), "Behind /versions/ goes a version; GET /v2/models/{model} lists them."),
)
CONTROL = re.compile(rb"/v2/repository/models/.+/(?:load|unload)")
WHOLE_NUMBER = re.compile(rb"[0-9]{1,12}")


class Asked(NamedTuple):
    """What a request's header says."""

    principal: Principal
    received_s: float
    model: str = ""
    version: str = ""


Action = Callable[[Asked, Request], Coroutine[Any, Any, None]]


class KServe:
    """See above."""

    def __init__(
        self, *, pipeline: Pipeline, catalogue: Catalogue, inference: Inference, bounds: Bounds, clock: Clock
    ) -> None:
        self.pipeline = pipeline
        self.catalogue = catalogue
        self.inference = inference
        self.bounds = bounds
        self.clock = clock
        self.verbs: Mapping[str, tuple[bytes, Action]] = MappingProxyType(
            {
                "": (b"GET", self._metadata),
                "ready": (b"GET", self._ready),
                "config": (b"GET", self._config),
                "stats": (b"GET", self._statistics),
                "infer": (b"POST", self._infer),
                "generate": (b"POST", self._generate),
                "generate_stream": (b"POST", self._generate_stream),
            }
        )

    def enter(self, request: Request) -> Handler:
        """A call is known by its key before a byte of its body is read; health alone is told to everybody."""
        path, request.id = request.path.rstrip(b"/"), self.inference.ids.next()
        if path in HEALTH:
            request.body_bytes_max = min(request.body_bytes_max, KEYLESS_BODY_BYTES_MAX)
            _require(request, b"GET")
            return self._live if path == LIVE else self._server_ready
        asked = Asked(self.pipeline.identify(presented_key(request.fields)), self.clock.now_s())
        method: bytes
        action: Action
        if path == b"/v2":
            method, action = b"GET", self._server
        elif path == b"/v2/models/stats":
            method, action = b"GET", self._statistics
        elif path == b"/v2/repository/index":
            method, action = b"POST", self._index
        elif CONTROL.fullmatch(path):
            method, action = b"POST", self._control
        elif (found := MODEL.fullmatch(path)) is not None and (verb := (found["verb"] or b"").decode()) in self.verbs:
            method, action = self.verbs[verb]
            asked = asked._replace(model=_text(found["model"]), version=_text(found["version"] or b""))
        else:
            raise _not_here(path)
        _require(request, method)
        return partial(self._answer, action, asked)

    async def _answer(self, action: Action, asked: Asked, request: Request) -> None:
        """Cancelled the moment the client has gone."""
        try:
            await action(asked, request)
        except asyncio.CancelledError:
            if not self.pipeline.stopped:
                raise
            self._fail(request, Draining("This gateway stopped before the request was whole."))
        except Invalid as fault:
            self._fail(request, bad(fault))
        except GatewayError as error:
            self._fail(request, error)
        except Exception as error:
            log.error("call %s ended in a fault of the gateway", request.id, exc_info=error)
            self._fail(request, GatewayError(f"The gateway failed; its log knows this call as {request.id}."))

    def _fail(self, request: Request, error: GatewayError) -> None:
        if request.begun:
            request.end(b"data: " + error.plain_body() + b"\n\n")
        else:
            request.refuse(error)

    # ---- what there is

    async def _live(self, request: Request) -> None:
        request.respond(200, b"", b"")

    async def _server_ready(self, request: Request) -> None:
        request.respond(200 if self.catalogue.ready else 503, b"", b"")

    async def _server(self, asked: Asked, request: Request) -> None:
        _tell(request, self.catalogue.server())

    async def _ready(self, asked: Asked, request: Request) -> None:
        up = self.catalogue.model_ready(asked.model, asked.version, asked.principal)
        request.respond(200 if up else 503, b"", b"")

    async def _metadata(self, asked: Asked, request: Request) -> None:
        _tell(request, self.catalogue.metadata(asked.model, asked.version, asked.principal))

    async def _config(self, asked: Asked, request: Request) -> None:
        _tell(request, self.catalogue.config(asked.model, asked.version, asked.principal))

    async def _statistics(self, asked: Asked, request: Request) -> None:
        _tell(request, {"model_stats": self.catalogue.statistics(asked.model, asked.version, asked.principal)})

    async def _index(self, asked: Asked, request: Request) -> None:
        try:
            wants = INDEX.decode(request.body or b"{}")
        except (msgspec.MsgspecError, UnicodeDecodeError):
            raise BadRequest("The body must be a JSON object; `ready` in it is true or false.") from None
        _tell(request, self.catalogue.index(asked.principal, ready=wants.ready))

    async def _control(self, asked: Asked, request: Request) -> None:
        raise self.catalogue.refuse_control()

    # ---- what is computed

    async def _infer(self, asked: Asked, request: Request) -> None:
        wanted = self.catalogue.require_version(asked.model, asked.version, asked.principal)
        body, json_bytes = await self._body(request)
        message = kserve_rest.read(body, json_bytes)
        caller = self._caller(asked, request, stream=False)
        if self.catalogue.asks_generator(asked.model, message):
            call = self.inference.generation(caller, asked.model, generation.from_message(message), stream=False)
            said = whole(await self.inference.run(call, IN_ONE_PIECE))
            told = kserve_rest.write([_output(said, message)], id=message.id, model=call.model, version=VERSION)
            await self._respond(request, told.body, told.json_bytes)
            return
        written: list[int | None] = []

        def write(outputs: list[Encoded], model: str, version: str) -> bytes:
            told = kserve_rest.write(outputs, id=message.id, model=model, version=version)
            written.append(told.json_bytes)
            return told.body

        call = self.inference.tensors(caller, asked.model, message, write, version=wanted, size=len(body))
        answer = await self.inference.run(call, IN_ONE_PIECE)
        await self._respond(request, answer.body, written[-1])

    async def _generate(self, asked: Asked, request: Request) -> None:
        wants = await self._wants(asked, request)
        if wants.stream:
            raise BadRequest("`stream` is true, but this is `generate`; ask `generate_stream`.", param="stream")
        caller = self._caller(asked, request, stream=False)
        call = self.inference.generation(caller, asked.model, wants, stream=False)
        said = whole(await self.inference.run(call, IN_ONE_PIECE))
        await self._respond(request, _told(call.model, wants.id, said), None)

    async def _generate_stream(self, asked: Asked, request: Request) -> None:
        wants = await self._wants(asked, request)
        call = self.inference.generation(self._caller(asked, request, stream=True), asked.model, wants, stream=True)
        answer = await self.inference.run(call, Events(request, call, wants.id))
        if request.begun:
            request.end(b"")
        elif answer.events:  # nothing was said
            request.respond(200, STREAM_LINES % request.id.encode(), b"")
        else:
            request.respond(200, STREAM_LINES % request.id.encode(), _event(call.model, wants.id, whole(answer)))

    async def _wants(self, asked: Asked, request: Request) -> Generation:
        self.catalogue.require_version(asked.model, asked.version, asked.principal)
        if self.pipeline.route.get(asked.model) is not None and not self.catalogue.generates(asked.model):
            raise Unsupported(f"Model {asked.model!r} does not generate text; ask its /infer.", param="model")
        body, _ = await self._body(request)
        return generation.from_json(body)

    async def _body(self, request: Request) -> tuple[bytes, int | None]:
        """Decompressed, and how much of it is JSON if only some of it is."""
        fields = request.fields
        body = await decompressed(request.body, fields.get(b"content-encoding"), bytes_max=self.bounds.body_bytes_max)
        length = fields.get(JSON_BYTES)
        if length is not None and not WHOLE_NUMBER.fullmatch(length):
            raise BadRequest("Inference-Header-Content-Length must be a whole number of bytes.")
        json_bytes = None if length is None else int(length)
        await require_depth(body[:json_bytes], self.bounds.json_depth_max)
        return body, json_bytes

    def _caller(self, asked: Asked, request: Request, *, stream: bool) -> Caller:
        patience = patience_s(request.fields, stream=stream, s_max=self.bounds.call_s_max)
        return Caller(
            request.id, asked.principal, asked.received_s, asked.received_s + patience, traceparent(request.fields)
        )

    async def _respond(self, request: Request, body: bytes, json_bytes: int | None) -> None:
        body, coding = await compressed(body, request.fields.get(b"accept-encoding"))
        lines = JSON_LINES if json_bytes is None else BINARY_LINES % json_bytes
        request.respond(200, lines % request.id.encode() + coding, body)


class Events:
    """A Client that streams a generation's texts as server-sent events."""

    def __init__(self, request: Request, call: Call, id: str) -> None:
        self.request = request
        self.call = call
        self.id = id

    def begin(self, status: int, first: bytes, *, events: bool = True) -> Receiver:
        self.write(first)
        return self

    @property
    def full(self) -> bool:
        return self.request.full

    def write(self, part: bytes) -> None:
        events = b"".join(_event(self.call.model, self.id, said) for said in heard(part))
        if not events:
            return
        if self.request.begun:
            self.request.write(events)
        else:
            self.request.begin(200, STREAM_LINES % self.request.id.encode(), events)

    async def drained(self) -> None:
        await self.request.drained()


class Index(msgspec.Struct):
    ready: bool = False


INDEX = msgspec.json.Decoder(Index)
LIVE = b"/v2/health/live"
HEALTH = frozenset({LIVE, b"/v2/health/ready"})
JSON_BYTES = b"inference-header-content-length"
BINARY_LINES = b"content-type: application/octet-stream\r\ninference-header-content-length: %d\r\nx-request-id: %%b\r\n"


def _require(request: Request, method: bytes) -> None:
    if request.method != method and not (method == b"GET" and request.method == b"HEAD"):
        got = request.method.decode("latin-1")
        raise MethodNotAllowed(f"This path takes {method.decode()}, not {got}.", allow=method.decode())


def _not_here(path: bytes) -> NotFound:
    for unserved, said in UNSERVED:
        if unserved.fullmatch(path):
            return NotFound(said)
    return NotFound("There is nothing of the Open Inference Protocol here; GET /openapi.json lists what there is.")


def _text(quoted: bytes) -> str:
    """A part of a path. What is no UTF-8 names no model."""
    return unquote_to_bytes(quoted).decode("utf-8", "replace")


def _tell(request: Request, what: Any) -> None:
    request.respond(200, JSON_LINES % request.id.encode(), msgspec.json.encode(what))


def _told(model: str, id: str, said: Said) -> bytes:
    head = {"id": id} if id else {}
    return msgspec.json.encode(head | {"model_name": model, "model_version": VERSION, "text_output": said.text})


def _event(model: str, id: str, said: Said) -> bytes:
    return b"data: " + _told(model, id, said) + b"\n\n"


def _output(said: Said, message: Message) -> Encoded:
    binary = message.outputs[0].binary if message.outputs else message.binary
    return Encoded("text_output", "BYTES", (1,), joined([said.text]) if binary else [said.text])
