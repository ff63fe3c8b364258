"""OpenAI's HTTP API: `/v1/…`.

Decodes only what the gateway needs from a body, hands the bytes on, and encodes what comes back. Refusals are sent
before the 200; after it, a failure is one event with a top-level `error` and no closing event, which is what SDKs
raise on.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
from collections.abc import Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
from litestar import Litestar, Request, Response, asgi, get
from litestar.exceptions import HTTPException
from litestar.params import FromPath
from msgspec import Meta

from gateway.call import NULL, USAGE_ON_REQUEST, Bounds, Call, Principal, call_id
from gateway.edge.guard import Receive, read_body, require_depth
from gateway.edge.schema import documents
from gateway.errors import BadRequest, Draining, GatewayError, MethodNotAllowed, NotFound
from gateway.meter import Answer
from gateway.pipeline import Pipeline
from gateway.route import Target
from runtimes.clock import Clock

if TYPE_CHECKING:
    from runtimes.dialect.openai import Translation

log = logging.getLogger("headrace.edge")

Scope = Mapping[str, Any]
Send = Callable[[Any], Awaitable[None]]

Positive = Annotated[int, Meta(ge=1, le=2**31)]
Whole = Annotated[int, Meta(ge=0, le=2**31)]


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


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
    "/v1/classify": ASK,
}


class OpenAI:
    """The data plane. `translations` holds the routes that models speaking tensors can answer."""

    def __init__(
        self, *, pipeline: Pipeline, bounds: Bounds, translations: Mapping[str, type[Translation]], clock: Clock
    ) -> None:
        self.pipeline = pipeline
        self.bounds = bounds
        self.translations = translations
        self.clock = clock

    def app(self) -> Litestar:
        handlers = [self._handler(route) for route in DECODERS]
        return Litestar(
            [*handlers, *self._models(), *documents()],
            exception_handlers={GatewayError: _refused, HTTPException: _not_here, Exception: _broken},
            openapi_config=None,
            logging_config=None,
        )

    def _handler(self, route: str) -> Any:
        @asgi(route, copy_scope=False)
        async def handler(scope: Any, receive: Any, send: Any) -> None:
            await self.serve(route, scope, receive, send)

        return handler

    async def serve(self, route: str, scope: Scope, receive: Receive, send: Send) -> None:
        """One call, from its header to its last byte. Cancelled by the guard the moment the client has gone."""
        id = call_id()
        received_s = self.clock.now_s()
        try:
            if scope["method"] != "POST":
                raise MethodNotAllowed(f"{route} takes POST, not {scope['method']}.")
            headers = dict(scope["headers"])
            principal = self.pipeline.identify(presented_key(headers))
            body = await read_body(receive, headers.get(b"content-length"), self.bounds)
            call = self._call(id, route, principal, headers, body, received_s)
            await require_depth(body, self.bounds.json_depth_max)
            await self._answer(call, send)
        except asyncio.CancelledError:
            # Either the client has gone and nobody is left to answer, or the gateway stops amid its request.
            if self.pipeline.stopped:
                await _send_error(send, Draining("This gateway stopped before the request was whole."), id)
        except GatewayError as error:
            await _send_error(send, error, id)
        except Exception as error:  # noqa: BLE001  it is logged
            await _send_error(send, _own_fault(id, error), id)

    def _call(
        self, id: str, route: str, principal: Principal, headers: Mapping[bytes, bytes], body: bytes, received_s: float
    ) -> Call:
        ask = _decode(DECODERS[route], body)
        options = ask.stream_options or StreamOptions()
        call = Call(
            id=id,
            route=route,
            principal=principal,
            model=ask.model,
            body=body,
            at_s=self.clock.wall_s(),
            received_s=received_s,
            deadline_s=received_s + self.bounds.call_s_max,
            stream=bool(ask.stream),
            usage_asked=bool(options.include_usage),
            chunk_usage_asked=bool(options.include_usage and options.continuous_usage_stats),
            traceparent=_traceparent(headers),
            translation=self.translations.get(route),
        )
        if isinstance(ask, Generate):
            each, param = max((ask.n or 1, "n"), (ask.best_of or 1, "best_of"))
            if each > self.bounds.choices_max:
                raise BadRequest(f"{param}: at most {self.bounds.choices_max} choices are made at once.", param=param)
            call.prompts = _prompts(ask.prompt)
            call.choices = each * call.prompts
            if call.choices > self.bounds.choices_max:
                raise BadRequest(
                    f"prompt: {call.prompts} prompts with {param} {each} make {call.choices} choices; at most "
                    f"{self.bounds.choices_max} are made at once.",
                    param="prompt",
                )
            call.tokens_out_max = max(_limits(route, ask), default=None)
        else:
            call.tokens_out_max = 0
        return call

    async def _answer(self, call: Call, send: Send) -> None:
        begun = False
        try:
            async with self.pipeline.open(call) as answer:
                if answer.events is not None:
                    async with aclosing(answer.events) as events:  # type: ignore[type-var]
                        begun = True
                        await send(_start(call, answer, STREAM_HEADERS))
                        await send({"type": "http.response.body", "body": answer.body, "more_body": True})
                        async for event in events:
                            await send({"type": "http.response.body", "body": event, "more_body": True})
        except Exception as error:
            if not begun:
                raise
            fault = error if isinstance(error, GatewayError) else _own_fault(call.id, error)
            await send({"type": "http.response.body", "body": _error_event(call.route, fault)})
            return
        # By now the call is settled and recorded; only then does its client see that it is complete.
        if not begun:
            await send(_start(call, answer, JSON_HEADERS))
        await send({"type": "http.response.body", "body": answer.end if begun else answer.body})

    def _models(self) -> list[Any]:
        route, identify = self.pipeline.route, self.pipeline.identify

        @get("/v1/models", sync_to_thread=False)
        def models(request: Request[Any, Any, Any]) -> dict[str, Any]:
            """The models this key may use."""
            principal = identify(presented_key(dict(request.scope["headers"])))
            return {"object": "list", "data": [_model(target) for target in route.visible(principal)]}

        @get("/v1/models/{model:path}", sync_to_thread=False)
        def model(request: Request[Any, Any, Any], model: FromPath[str]) -> dict[str, Any]:
            """One of them."""
            principal = identify(presented_key(dict(request.scope["headers"])))
            name = model.removeprefix("/")
            for target in route.visible(principal):
                if target.name == name:
                    return _model(target)
            raise route.unknown(name, principal)

        return [models, model]


def presented_key(headers: Mapping[bytes, bytes]) -> str | None:
    """The key as OpenAI's clients send it (`authorization: Bearer …`) or as Anthropic's do (`x-api-key`)."""
    value = headers.get(b"authorization")
    if value is None:
        value = headers.get(b"x-api-key")
        return None if value is None else value.decode("latin-1")
    scheme, _, key = value.decode("latin-1").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else None


def _decode(decoder: msgspec.json.Decoder[Any], body: bytes) -> Any:
    try:
        ask = decoder.decode(body)
        if not body.isascii():
            body.decode()  # the decoder skips what nobody reads here, but an engine will
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


def _limits(route: str, ask: Generate) -> list[int]:
    """What bounds each choice's output on this route. Of two, engines differ in which one they obey."""
    fields = {
        "/v1/chat/completions": (ask.max_tokens, ask.max_completion_tokens),
        "/v1/responses": (ask.max_output_tokens,),
    }
    return [limit for limit in fields.get(route, (ask.max_tokens,)) if limit is not None]


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


def _traceparent(headers: Mapping[bytes, bytes]) -> str | None:
    """The caller's trace context (https://www.w3.org/TR/trace-context/), if it is well-formed."""
    value = headers.get(b"traceparent", b"")
    return value.decode() if TRACEPARENT.fullmatch(value) else None


TRACEPARENT = re.compile(rb"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")


# ---- what goes out -----------------------------------------------------------------------------------------

JSON_HEADERS = ((b"content-type", b"application/json"),)
STREAM_HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)


def _start(call: Call, answer: Answer, headers: tuple[tuple[bytes, bytes], ...]) -> dict[str, Any]:
    own = [*headers, (b"x-request-id", call.id.encode())]
    if answer.events is None:
        own.append((b"content-length", str(len(answer.body)).encode()))
    return {"type": "http.response.start", "status": answer.status, "headers": own}


def _error_event(route: str, error: GatewayError) -> bytes:
    data = b"data: " + error.body() + b"\n\n"
    return data if route in USAGE_ON_REQUEST else b"event: error\n" + data


def error_headers(error: GatewayError) -> dict[str, str]:
    """When to come back and whether to; the SDKs obey both."""
    headers = {"x-should-retry": "true" if error.retryable else "false"}
    if error.retry_after_s is not None:
        # Rounded up: a client that comes back exactly then must not be early.
        headers["retry-after"] = str(math.ceil(error.retry_after_s))
        headers["retry-after-ms"] = str(math.ceil(error.retry_after_s * 1000))
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    if isinstance(error, MethodNotAllowed):
        headers["allow"] = "POST"
    return headers


async def _send_error(send: Send, error: GatewayError, id: str) -> None:
    body = error.body()
    headers = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        "x-request-id": id,
        **error_headers(error),
    }
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


def _own_fault(id: str, error: Exception) -> GatewayError:
    log.error("call %s ended in a fault of the gateway", id, exc_info=error)
    return GatewayError(f"The gateway failed; its log knows this call as {id}.")


def _model(target: Target) -> dict[str, Any]:
    return {"id": target.name, "object": "model", "created": target.created_s, "owned_by": "headrace"}


def _refused(request: Request[Any, Any, Any], error: GatewayError) -> Response[bytes]:
    return Response(error.body(), status_code=error.status, media_type="application/json", headers=error_headers(error))


def _not_here(request: Request[Any, Any, Any], error: HTTPException) -> Response[bytes]:
    """Litestar's own refusals: an unknown path or a wrong method."""
    method, path = request.scope["method"], request.scope["path"][:200]
    if error.status_code == 405:
        response = _refused(request, MethodNotAllowed(f"{path} does not take {method}."))
        response.headers.update(error.headers or {})
        return response
    if error.status_code == 404:
        return _refused(request, NotFound(f"There is no {method} {path} here; GET /openapi.json lists what there is."))
    return _refused(request, BadRequest(str(error.detail)))


def _broken(request: Request[Any, Any, Any], error: Exception) -> Response[bytes]:
    log.error("%s %s ended in a fault of the gateway", request.scope["method"], request.scope["path"], exc_info=error)
    return _refused(request, GatewayError("The gateway failed; its log says why."))
