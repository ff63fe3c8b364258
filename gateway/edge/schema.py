"""What the data plane answers, as OpenAPI 3.1 and as a page to read.

Requests are described by the fields that matter; every other field goes to the engine untouched, so each schema is
open. The page needs no network: it is written out from the same document.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from litestar import Response, get

Json = dict[str, Any]


class Message(msgspec.Struct):
    """One turn of a chat."""

    role: str
    content: str | list[Json] | None = None


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None
    """Send the usage as the last chunk before `[DONE]`."""


class ChatRequest(msgspec.Struct):
    """OpenAI's chat request. Fields that are not listed (tools, response_format, seed, …) reach the engine as sent."""

    model: str
    messages: list[Message]
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_completion_tokens: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    n: int | None = 1


class CompletionRequest(msgspec.Struct):
    """OpenAI's legacy completion request; a prompt is text, token ids, or a list of either."""

    model: str
    prompt: str | list[Any]
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    n: int | None = 1


class EmbeddingRequest(msgspec.Struct):
    """OpenAI's embedding request."""

    model: str
    input: str | list[Any]
    encoding_format: str | None = "float"


class ResponsesRequest(msgspec.Struct):
    """OpenAI's responses request, for engines that answer it."""

    model: str
    input: str | list[Json]
    stream: bool | None = False
    max_output_tokens: int | None = None


class MessagesRequest(msgspec.Struct):
    """Anthropic's messages request, for engines that answer it."""

    model: str
    messages: list[Message]
    max_tokens: int
    stream: bool | None = False


class ClassifyRequest(msgspec.Struct):
    """Text for a classifier; one label and its probabilities come back for each."""

    model: str
    input: str | list[str]


class ModerationRequest(msgspec.Struct):
    """OpenAI's moderation request, for classifiers with thresholds: their labels are the categories."""

    model: str
    input: str | list[Any]


class ScoreRequest(msgspec.Struct):
    """How alike texts are: one with each of many, or pair by pair. `queries` and `documents` say the same."""

    model: str
    text_1: str | list[str] | None = None
    text_2: str | list[str] | None = None


class RerankRequest(msgspec.Struct):
    """Documents by their likeness to a query, the best first, as Cohere and Jina have it."""

    model: str
    query: str
    documents: list[Any]
    top_n: int | None = None
    return_documents: bool | None = True


class Problem(msgspec.Struct):
    """What went wrong, to whom, and what to do."""

    message: str
    type: str
    code: str
    param: str | None = None


class ErrorBody(msgspec.Struct):
    """Every refusal has this shape; amid a stream it is the last event, and no `[DONE]` follows."""

    error: Problem


POSTS: Mapping[str, tuple[str, type[msgspec.Struct]]] = {
    "/v1/chat/completions": ("Chat, streamed or not", ChatRequest),
    "/v1/completions": ("Complete a prompt, streamed or not", CompletionRequest),
    "/v1/embeddings": ("Vectors for texts", EmbeddingRequest),
    "/v1/responses": ("OpenAI's responses API, relayed to engines that have it", ResponsesRequest),
    "/v1/messages": ("Anthropic's messages API, relayed to engines that have it", MessagesRequest),
    "/v1/score": ("How alike texts are", ScoreRequest),
    "/v1/rerank": ("Documents by their likeness to a query", RerankRequest),
    "/v1/classify": ("Labels and probabilities for texts", ClassifyRequest),
    "/v1/moderations": ("What to flag in texts, by a classifier with thresholds", ModerationRequest),
}

OIP: Mapping[str, tuple[str, str]] = {
    "/v2": ("get", "The server's name, version and extensions"),
    "/v2/health/live": ("get", "Whether it runs; needs no key"),
    "/v2/health/ready": ("get", "Whether every model can answer; needs no key"),
    "/v2/models/stats": ("get", "How calls of each model went"),
    "/v2/models/{model}": ("get", "What a model takes and gives"),
    "/v2/models/{model}/ready": ("get", "Whether it can answer"),
    "/v2/models/{model}/config": ("get", "Its configuration, as Triton has it"),
    "/v2/models/{model}/stats": ("get", "How its calls went"),
    "/v2/models/{model}/infer": ("post", "Tensors or texts in, tensors out; as JSON, or as bytes behind it"),
    "/v2/models/{model}/generate": ("post", "`text_input` and parameters in, `text_output` out"),
    "/v2/models/{model}/generate_stream": ("post", "The same, as server-sent events"),
    "/v2/repository/index": ("post", "The models this key may use, and whether they can answer"),
}
"""The Open Inference Protocol: path → method, and what it is for. Behind a model's name there may be
`/versions/{version}`. Refusals are `{"error": "…"}`."""

ERRORS: Mapping[int, str] = {
    400: "Malformed JSON, a wrong type, or a model that does not answer this route",
    401: "No key, or not a valid one",
    403: "The key has expired, or may not use this model or route",
    404: "No such model; the message names those the key may use",
    408: "The request did not arrive in time",
    413: "The body is too large",
    429: "Over quota; `retry-after` is exact",
    502: "No engine could answer, or one broke off before the answer began",
    503: "The model's queue is full, or no engine of it is up; see `retry-after`",
    504: "Waited or ran too long",
}


def documents() -> Sequence[Any]:
    """The routes that serve both; the only ones, with refusals, that need no key."""
    document = openapi()
    encoded, rendered = msgspec.json.encode(document), page(document)

    @get("/openapi.json", sync_to_thread=False)
    def machines() -> Response[bytes]:
        return Response(encoded, media_type="application/json")

    @get("/docs", sync_to_thread=False)
    def people() -> Response[str]:
        return Response(rendered, media_type="text/html")

    return [machines, people]


def openapi() -> Json:
    """The data plane's OpenAPI document."""
    structs: Sequence[type] = [*(request for _, request in POSTS.values()), ErrorBody]
    _, schemas = msgspec.json.schema_components(structs, ref_template="#/components/schemas/{name}")
    paths: Json = {path: {"post": _post(summary, request)} for path, (summary, request) in POSTS.items()}
    paths["/v1/models"] = {"get": _get("The models this key may use", "listModels")}
    paths["/v1/models/{model}"] = {
        "get": {
            **_get("One of them", "getModel"),
            "parameters": [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}],
        }
    }
    for path, (method, summary) in OIP.items():
        paths[path] = {method: _oip(path, method, summary)}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Headrace",
            "version": "1",
            "description": "OpenAI's HTTP API, and the Open Inference Protocol, in front of every model this gateway "
            "serves.",
        },
        "paths": paths,
        "components": {"schemas": schemas, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "security": [{"key": []}],
    }


def _post(summary: str, request: type[msgspec.Struct]) -> Json:
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{request.__name__}"}}}
    answers: Json = {"200": {"description": "The answer; `text/event-stream` if `stream` is true"}}
    return {
        "summary": summary,
        "operationId": request.__name__.removesuffix("Request").lower(),
        "requestBody": {"required": True, "content": content},
        "responses": answers | _errors(ERRORS),
    }


def _get(summary: str, operation: str) -> Json:
    asked = {status: ERRORS[status] for status in (401, 403, 404)}
    return {
        "summary": summary,
        "operationId": operation,
        "responses": {"200": {"description": "Models"}} | _errors(asked),
    }


def _oip(path: str, method: str, summary: str) -> Json:
    name = path.removeprefix("/v2").replace("{model}", "model").replace("/", "_") or "_server"
    content = {"application/json": {"schema": {"type": "object", "properties": {"error": {"type": "string"}}}}}
    operation: Json = {
        "summary": summary,
        "operationId": f"oip{name}",
        "responses": {"200": {"description": summary}, "default": {"description": "A refusal", "content": content}},
    }
    if "{model}" in path:
        operation["parameters"] = [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}]
    if path.startswith("/v2/health"):
        operation["security"] = []
    if method == "post":
        operation["requestBody"] = {"content": {"application/json": {"schema": {"type": "object"}}}}
    return operation


def _errors(statuses: Mapping[int, str]) -> Json:
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorBody"}}}
    return {str(status): {"description": text, "content": content} for status, text in statuses.items()}


def page(document: Json) -> str:
    """The document as one page of plain HTML."""
    rows = "".join(
        f"<tr><td><code>{method.upper()} {html.escape(path)}</code></td>"
        f"<td>{html.escape(operation['summary'])}</td></tr>"
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
    )
    errors = "".join(f"<tr><td>{status}</td><td>{html.escape(text)}</td></tr>" for status, text in ERRORS.items())
    schemas = "".join(
        f"<h3>{html.escape(name)}</h3><p>{html.escape(schema.get('description', ''))}</p>"
        f"<pre>{html.escape(_pretty(schema.get('properties', {})))}</pre>"
        for name, schema in document["components"]["schemas"].items()
    )
    return PAGE.format(rows=rows, errors=errors, schemas=schemas)


def _pretty(value: Json) -> str:
    return msgspec.json.format(msgspec.json.encode(value), indent=2).decode()


PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Headrace</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}
table {{ border-collapse: collapse; width: 100%; }} td {{ border-top: 1px solid #ccc; padding: .4rem .6rem; }}
pre {{ background: #f4f4f4; padding: .8rem; overflow: auto; font-size: 13px; }}
</style>
<h1>Headrace</h1>
<p>Send your key as <code>Authorization: Bearer hr_…</code>. Any OpenAI client works with <code>base_url</code> set to
<code>/v1</code> of this address, and any client of the Open Inference Protocol (tritonclient, KServe's) with this
address itself. For machines: <a href="/openapi.json">openapi.json</a>.</p>
<table>{rows}</table>
<h2>Refusals</h2>
<p>Every one has OpenAI's error object, or under <code>/v2</code> the Open Inference Protocol's,
<code>x-should-retry</code>, and <code>retry-after</code> where waiting helps.</p>
<table>{errors}</table>
<h2>Requests</h2>{schemas}
</html>
"""
