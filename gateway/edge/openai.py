"""OpenAI's HTTP API: `/v1/…`.

Decodes only what the gateway needs from a body, hands the bytes on, and encodes what comes back. Refusals are sent
before the 200; after it, a failure is one event with a top-level `error` and no closing event, which is what SDKs
raise on.
"""

from __future__ import annotations

import asyncio
import codecs
import logging
import re
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
from litestar import Litestar, Response, get
from litestar.connection import Request as LitestarRequest
from litestar.exceptions import HTTPException
from litestar.params import FromPath
from msgspec import Meta

from gateway.alias import Alias
from gateway.call import NULL, USAGE_ON_REQUEST, Bounds, Call, CallIds, Principal
from gateway.edge.asgi import Asgi
from gateway.edge.depth import require_depth
from gateway.edge.patience import patience_s
from gateway.edge.request import KEYLESS_BODY_BYTES_MAX, Handler, Request, error_headers
from gateway.edge.schema import documents
from gateway.errors import BadRequest, Draining, GatewayError, MethodNotAllowed, NotFound
from gateway.meter import Answer
from gateway.pipeline import Pipeline
from gateway.target import Target
from runtimes.clock import Clock

if TYPE_CHECKING:
    from runtimes.dialect import Translation

log = logging.getLogger("headrace.edge")

Positive = Annotated[int, Meta(ge=1, le=2**31)]
Whole = Annotated[int, Meta(ge=0, le=2**31)]


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


NO_OPTIONS = StreamOptions()


class Ask(msgspec.Struct):
    """What the gateway reads of any request; the rest is the engine's."""

    model: Annotated[str, Meta(max_length=256)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None


class Generate(Ask):
    n: Positive | None = None
    best_of: Positive | None = None
    max_tokens: Whole | None = None
    max_completion_tokens: Whole | None = None
    max_output_tokens: Whole | None = None
    prompt: msgspec.Raw = NULL


GENERATE, ASK = msgspec.json.Decoder(Generate), msgspec.json.Decoder(Ask)
DECODERS: Mapping[str, msgspec.json.Decoder[Any]] = {
    "/v1/chat/completions": GENERATE,
    "/v1/completions": GENERATE,
    "/v1/responses": GENERATE,
    "/v1/messages": GENERATE,
    "/v1/embeddings": ASK,
    "/v1/score": ASK,
    "/v1/rerank": ASK,
    "/v1/classify": ASK,
    "/v1/moderations": ASK,
}


class OpenAI:
    """The data plane. `translations` holds the routes that models speaking tensors can answer."""

    def __init__(
        self, *, pipeline: Pipeline, bounds: Bounds, translations: Mapping[str, Translation], clock: Clock
    ) -> None:
        self.pipeline = pipeline
        self.bounds = bounds
        self.translations = translations
        self.clock = clock
        self.ids = CallIds(clock)
        self.routes = {route.encode(): route for route in DECODERS}
        self.rest = Asgi(
            Litestar(
                [*self._models(), *documents()],
                exception_handlers={GatewayError: _refused, HTTPException: _not_here, Exception: _broken},
                openapi_config=None,
                logging_config=None,
            )
        )

    def enter(self, request: Request) -> Handler:
        """A call is known by its key before a byte of its body is read. Whatever is not hot is Litestar's."""
        route = self.routes.get(request.path)
        if route is None:
            request.body_bytes_max = min(request.body_bytes_max, KEYLESS_BODY_BYTES_MAX)
            return self.rest.serve
        request.id = self.ids.next()
        if request.method != b"POST":
            raise MethodNotAllowed(f"{route} takes POST, not {request.method.decode('latin-1')}.")
        principal = self.pipeline.identify(presented_key(request.fields))
        return Asked(self, route, principal, self.clock.now_s()).answer

    def call(self, asked: Asked, request: Request) -> Call:
        """Raises BadRequest; and, if the key has lost its rights since it was shown, Unauthenticated or Forbidden."""
        route, body = asked.route, request.body
        try:
            ask = _decode(DECODERS[route], body)
        except BadRequest:
            coding = request.fields.get(b"content-encoding")
            if coding is None:
                raise
            name = coding.decode("latin-1")[:32]
            raise BadRequest(
                f"The body's content-encoding {name!r} is not taken here; send it as plain JSON."
            ) from None
        options = ask.stream_options or NO_OPTIONS
        call = Call(
            id=request.id,
            route=route,
            principal=self.pipeline.tenants.renew(asked.principal),
            model=ask.model,
            body=body,
            at_s=self.clock.wall_s(),
            received_s=asked.received_s,
            deadline_s=asked.received_s
            + patience_s(request.fields, stream=bool(ask.stream), s_max=self.bounds.call_s_max),
            stream=bool(ask.stream),
            usage_asked=bool(options.include_usage),
            chunk_usage_asked=bool(options.include_usage and options.continuous_usage_stats),
            traceparent=traceparent(request.fields),
            translation=self.translations.get(route),
            tokens_out_max=0,
        )
        if isinstance(ask, Generate):
            each, param = (ask.n or 1, "n") if ask.best_of is None else max((ask.n or 1, "n"), (ask.best_of, "best_of"))
            if each > self.bounds.choices_max:
                raise BadRequest(f"{param}: at most {self.bounds.choices_max} choices are made at once.", param=param)
            call.prompts = 1 if ask.prompt is NULL else _prompts(ask.prompt)
            call.choices = each * call.prompts
            if call.choices > self.bounds.choices_max:
                raise BadRequest(
                    f"prompt: {call.prompts} prompts with {param} {each} make {call.choices} choices; at most "
                    f"{self.bounds.choices_max} are made at once.",
                    param="prompt",
                )
            call.tokens_out_max = _limit(route, ask)
        return call

    def _models(self) -> list[Any]:
        route, identify = self.pipeline.route, self.pipeline.identify

        @get("/v1/models", sync_to_thread=False)
        def models(request: LitestarRequest[Any, Any, Any]) -> dict[str, Any]:
            """The models this key may use, aliases included."""
            principal = identify(presented_key(dict(request.scope["headers"])))
            return {"object": "list", "data": [_model(it) for it in route.visible(principal)]}

        @get("/v1/models/{model:path}", sync_to_thread=False)
        def model(request: LitestarRequest[Any, Any, Any], model: FromPath[str]) -> dict[str, Any]:
            """One of them."""
            principal = identify(presented_key(dict(request.scope["headers"])))
            name = model.removeprefix("/")
            for it in route.visible(principal):
                if it.name == name:
                    return _model(it)
            raise route.unknown(name, principal)

        return [models, model]


class Asked:
    """One call at the door, from its key to its last byte."""

    __slots__ = ("door", "events", "principal", "received_s", "request", "route")

    def __init__(self, door: OpenAI, route: str, principal: Principal, received_s: float) -> None:
        self.door = door
        self.route = route
        self.principal = principal
        self.received_s = received_s
        self.events = True
        """What has begun are events."""

    async def answer(self, request: Request) -> None:
        """Cancelled the moment the client has gone."""
        self.request = request
        pipeline = self.door.pipeline
        try:
            call = self.door.call(self, request)
            await require_depth(request.body, self.door.bounds.json_depth_max)
            answer = await pipeline.run(call, self)
        except asyncio.CancelledError:
            # Either the client has gone and nobody is left to answer, or the gateway stops amid its request.
            if not pipeline.stopped:
                raise
            self._fail(Draining("This gateway stopped before the request was whole."))
        except GatewayError as error:
            self._fail(error)
        except Exception as error:
            log.error("call %s ended in a fault of the gateway", request.id, exc_info=error)
            self._fail(GatewayError(f"The gateway failed; its log knows this call as {request.id}."))
        else:
            # By now the call is settled, and recorded with this turn of the loop; only then does its client see how it
            # ended.
            pipeline.usage.when_recorded(partial(self._complete, answer))

    # ---- a Client of the pipeline

    def begin(self, status: int, first: bytes, *, events: bool = True) -> Request:
        self.events = events
        self.request.begin(status, (STREAM_LINES if events else JSON_LINES) % self.request.id.encode(), first)
        return self.request

    # ---- its end

    def _complete(self, answer: Answer) -> None:
        if self.request.begun:
            self.request.end(answer.body)
        else:
            lines = STREAM_LINES if answer.events else JSON_LINES
            self.request.respond(answer.status, lines % self.request.id.encode(), answer.body)

    def _fail(self, error: GatewayError) -> None:
        self.door.pipeline.usage.when_recorded(partial(self._tell, error))

    def _tell(self, error: GatewayError) -> None:
        if not self.request.begun:
            self.request.refuse(error)
        elif self.events:
            self.request.end(_error_event(self.route, error))
        else:
            self.request.break_off()


def presented_key(headers: Mapping[bytes, bytes]) -> str | None:
    """The key as OpenAI's clients send it (`authorization: Bearer …`) or as Anthropic's do (`x-api-key`)."""
    value = headers.get(b"authorization")
    if value is not None and value.startswith(b"Bearer "):  # as nearly all send it
        return value[7:].decode("latin-1").strip()
    if value is None:
        value = headers.get(b"x-api-key")
        return None if value is None else value.decode("latin-1")
    scheme, _, key = value.decode("latin-1").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else None


def _decode(decoder: msgspec.json.Decoder[Any], body: bytes) -> Any:
    try:
        ask = decoder.decode(body)
        if not body.isascii():
            _require_utf8(body)  # the decoder skips what nobody reads here, but an engine will
    except msgspec.ValidationError as error:
        missing = re.search(r"missing required field `(\w+)`", str(error))
        if missing is not None:
            param = missing.group(1)
            raise BadRequest(f"{param}: this field is required.", param=param) from None
        what, at, where = str(error).rpartition(" - at `$")
        param = where.rstrip("`").lstrip(".") if at else None
        raise BadRequest(f"{param or 'body'}: {what if at else error}.", param=param) from None
    except UnicodeDecodeError as error:
        raise BadRequest(f"The request's body is not valid UTF-8 (byte {error.start}).") from None
    except msgspec.DecodeError as error:
        raise BadRequest(f"The request's body is not valid JSON: {error}.") from None
    except RecursionError:
        raise BadRequest("The request's JSON nests too deeply.") from None
    return ask


def _require_utf8(body: bytes) -> None:
    """Piece by piece: as text, all of it could take four times its size."""
    decoder = UTF8()
    for start in range(0, len(body), PIECE_BYTES):
        before = len(decoder.getstate()[0])
        try:
            decoder.decode(body[start : start + PIECE_BYTES], start + PIECE_BYTES >= len(body))
        except UnicodeDecodeError as error:
            byte = start - before + error.start
            raise BadRequest(f"The request's body is not valid UTF-8 (byte {byte}).") from None


UTF8 = codecs.getincrementaldecoder("utf-8")
PIECE_BYTES = 64 * 1024


def _limit(route: str, ask: Generate) -> int | None:
    """What bounds each choice's output on this route. Of two, engines differ in which one they obey."""
    if route == "/v1/responses":
        return ask.max_output_tokens
    if route != "/v1/chat/completions" or ask.max_completion_tokens is None:
        return ask.max_tokens
    return max(ask.max_completion_tokens, ask.max_tokens or 0)


def _prompts(prompt: msgspec.Raw) -> int:
    """How many prompts a completion asks for: one string or list of token ids is one, a list of those is many."""
    text = bytes(prompt)
    if LIST_OF_LISTS.match(text):
        return text.count(b"[") - 1
    if LIST_OF_STRINGS.match(text):
        if b"\\" in text:
            text = text.replace(b"\\\\", b"").replace(b'\\"', b"")
        return (len(text) - len(text.translate(None, b'"'))) // 2
    return 1


LIST_OF_LISTS, LIST_OF_STRINGS = re.compile(rb"\s*\[\s*\["), re.compile(rb'\s*\[\s*"')


def traceparent(headers: Mapping[bytes, bytes]) -> str | None:
    """The caller's trace context (https://www.w3.org/TR/trace-context/), if it is well-formed."""
    value = headers.get(b"traceparent", b"")
    return value.decode() if TRACEPARENT.fullmatch(value) else None


TRACEPARENT = re.compile(rb"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")


# ---- what goes out -----------------------------------------------------------------------------------------

JSON_LINES = b"content-type: application/json\r\nx-request-id: %b\r\n"
STREAM_LINES = (
    b"content-type: text/event-stream; charset=utf-8\r\ncache-control: no-cache\r\nx-accel-buffering: no\r\n"
    b"x-request-id: %b\r\n"
)


def _error_event(route: str, error: GatewayError) -> bytes:
    data = b"data: " + error.body() + b"\n\n"
    return data if route in USAGE_ON_REQUEST else b"event: error\n" + data


def _model(it: Target | Alias) -> dict[str, Any]:
    return {"id": it.name, "object": "model", "created": it.created_s, "owned_by": "headrace"}


def _refused(request: LitestarRequest[Any, Any, Any], error: GatewayError) -> Response[bytes]:
    return Response(error.body(), status_code=error.status, media_type="application/json", headers=error_headers(error))


def _not_here(request: LitestarRequest[Any, Any, Any], error: HTTPException) -> Response[bytes]:
    """Litestar's own refusals: an unknown path or a wrong method."""
    method, path = request.scope["method"], request.scope["path"][:200]
    if error.status_code == 405:
        response = _refused(request, MethodNotAllowed(f"{path} does not take {method}."))
        response.headers.update(error.headers or {})
        return response
    if error.status_code == 404:
        return _refused(request, NotFound(f"There is no {method} {path} here; GET /openapi.json lists what there is."))
    return _refused(request, BadRequest(str(error.detail)))


def _broken(request: LitestarRequest[Any, Any, Any], error: Exception) -> Response[bytes]:
    log.error("%s %s ended in a fault of the gateway", request.scope["method"], request.scope["path"], exc_info=error)
    return _refused(request, GatewayError("The gateway failed; its log says why."))
