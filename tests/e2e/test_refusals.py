"""Bad input: every refusal has its status, OpenAI's shape, its code, and says whether to come back."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import httpx
import pytest

from tests.e2e.raw import Connection, exchange, post
from tests.e2e.servers import GatewayProcess, Key

CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
GENERATING = (CHAT, COMPLETIONS, "/v1/responses", "/v1/messages")
ROUTES = (*GENERATING, EMBEDDINGS, "/v1/classify", "/v1/moderations", "/v1/score", "/v1/rerank")
SECRET = "the-patient-in-room-12"
"""Stands in every prompt, and must never come back in an error or a log."""
FITTING: Mapping[str, Any] = {
    CHAT: {"model": "echo", "messages": [{"role": "user", "content": SECRET}]},
    COMPLETIONS: {"model": "echo", "prompt": SECRET},
    EMBEDDINGS: {"model": "echo", "input": SECRET},
    "/v1/responses": {"model": "echo", "input": SECRET},
    "/v1/messages": {"model": "echo", "messages": [{"role": "user", "content": SECRET}], "max_tokens": 4},
    "/v1/classify": {"model": "echo", "input": SECRET},
    "/v1/moderations": {"model": "echo", "input": SECRET},
    "/v1/score": {"model": "echo", "text_1": SECRET, "text_2": SECRET},
    "/v1/rerank": {"model": "echo", "query": SECRET, "documents": [SECRET]},
}


def require_refusal(
    status: int, headers: Mapping[str, str], body: bytes, *, expected: int, code: str, retry: bool = False
) -> Any:
    """The whole shape that OpenAI's SDKs read an error by."""
    assert status == expected, body
    assert headers["content-type"].split(";")[0] == "application/json"
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code, error
    assert isinstance(error["message"], str) and error["message"]
    assert isinstance(error["type"], str) and error["type"]
    assert headers["x-should-retry"] == ("true" if retry else "false")
    assert SECRET.encode() not in body
    return error


# ---- who calls ---------------------------------------------------------------------------------------------

KEYS: Mapping[str, tuple[str | None, int, str]] = {
    "none": (None, 401, "invalid_api_key"),
    "of another make": ("Bearer sk-0123456789abcdef", 401, "invalid_api_key"),
    "empty": ("Bearer", 401, "invalid_api_key"),
    "not a bearer's": ("Basic dXNlcjpwYXNz", 401, "invalid_api_key"),
    "well-formed but unknown": (
        "Bearer hr_live_AAAAAAAAAA_0123456789012345678901234567890123456789_000000",
        401,
        "invalid_api_key",
    ),
}


@pytest.mark.parametrize("route", [*ROUTES, "/v1/models", "/v1/models/echo"])
@pytest.mark.parametrize("presented", KEYS)
async def test_without_a_valid_key_nothing_is_answered(gateway: GatewayProcess, route: str, presented: str) -> None:
    value, status, code = KEYS[presented]
    headers = {} if value is None else {"authorization": value}
    async with gateway.client() as client:
        if route in FITTING:
            answer = await client.post(route, json=FITTING[route], headers=headers)
        else:
            answer = await client.get(route, headers=headers)
    require_refusal(answer.status_code, answer.headers, answer.content, expected=status, code=code)
    assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("route", [*ROUTES, "/v1/models"])
async def test_a_key_altered_in_one_letter_is_refused(gateway: GatewayProcess, key: Key, route: str) -> None:
    altered = key.text[:20] + ("x" if key.text[20] != "x" else "y") + key.text[21:]
    async with gateway.client(altered) as client:
        method = "POST" if route in FITTING else "GET"
        answer = await client.request(method, route, json=FITTING.get(route))
    require_refusal(answer.status_code, answer.headers, answer.content, expected=401, code="invalid_api_key")
    assert altered not in answer.text


@pytest.mark.parametrize("route", [*ROUTES, "/v1/models"])
async def test_an_expired_key_is_forbidden_not_unknown(gateway: GatewayProcess, expired: Key, route: str) -> None:
    async with gateway.client(expired.text) as client:
        method = "POST" if route in FITTING else "GET"
        answer = await client.request(method, route, json=FITTING.get(route))
    require_refusal(answer.status_code, answer.headers, answer.content, expected=403, code="key_expired")


@pytest.fixture(scope="module")
def expired(gateway: GatewayProcess) -> Key:
    return gateway.issue(lifetime_s=1e-3)


async def test_a_revoked_key_is_no_longer_known(gateway: GatewayProcess) -> None:
    key = gateway.issue()
    gateway.command("key", "revoke", key.id)
    answer = await first_refusal(gateway, key)
    require_refusal(answer.status_code, answer.headers, answer.content, expected=401, code="invalid_api_key")


async def test_a_disabled_tenants_key_is_forbidden(gateway: GatewayProcess) -> None:
    key = gateway.issue()
    gateway.command("tenant", "disable", key.tenant)
    answer = await first_refusal(gateway, key)
    require_refusal(answer.status_code, answer.headers, answer.content, expected=403, code="insufficient_permissions")


async def first_refusal(gateway: GatewayProcess, key: Key) -> httpx.Response:
    """A running gateway looks at its store every half second."""
    async with gateway.client(key.text) as client, asyncio.timeout(10):
        while True:
            answer = await client.get("/v1/models")
            if answer.status_code != 200:
                return answer


@pytest.mark.parametrize("route", [CHAT, COMPLETIONS])
async def test_a_model_out_of_scope_is_forbidden(gateway: GatewayProcess, route: str) -> None:
    key = gateway.issue(models=["sl*"])
    async with gateway.client(key.text) as client:
        answer = await client.post(route, json=FITTING[route])
    error = require_refusal(
        answer.status_code, answer.headers, answer.content, expected=403, code="insufficient_permissions"
    )
    assert error["param"] == "model"


async def test_a_model_out_of_scope_is_neither_listed_nor_found(gateway: GatewayProcess) -> None:
    key = gateway.issue(models=["sl*"])
    async with gateway.client(key.text) as client:
        listed = await client.get("/v1/models")
        one = await client.get("/v1/models/echo")
    assert [model["id"] for model in listed.json()["data"]] == ["slow"]
    require_refusal(one.status_code, one.headers, one.content, expected=404, code="model_not_found")


async def test_a_route_out_of_scope_is_forbidden(gateway: GatewayProcess) -> None:
    key = gateway.issue(routes=["/v1/chat/*"])
    async with gateway.client(key.text) as client:
        good = await client.post(CHAT, json=FITTING[CHAT])
        bad = await client.post(COMPLETIONS, json=FITTING[COMPLETIONS])
    assert good.status_code == 200
    require_refusal(bad.status_code, bad.headers, bad.content, expected=403, code="insufficient_permissions")


@pytest.mark.parametrize("route", ROUTES)
async def test_an_unknown_model_is_answered_with_those_the_key_may_use(gateway: GatewayProcess, route: str) -> None:
    key = gateway.issue(models=["echo", "slow"])
    async with gateway.client(key.text) as client:
        answer = await client.post(route, json={**FITTING[route], "model": "gpt-5"})
    error = require_refusal(answer.status_code, answer.headers, answer.content, expected=404, code="model_not_found")
    assert error["param"] == "model"
    assert "echo, slow" in error["message"]
    assert "relay" not in error["message"]


# ---- what they send ----------------------------------------------------------------------------------------


class Bad(NamedTuple):
    body: bytes
    status: int
    code: str
    param: str | None = None


def but(**fields: Any) -> bytes:
    return json.dumps({**FITTING[CHAT], **fields}).encode()


BODIES: Mapping[str, Bad] = {
    "nothing": Bad(b"", 400, "invalid_request"),
    "cut short": Bad(but()[:-5], 400, "invalid_request"),
    "no JSON": Bad(b"model=echo&prompt=hello", 400, "invalid_request"),
    "a list": Bad(b"[" + but() + b"]", 400, "invalid_request"),
    "a string": Bad(b'"' + SECRET.encode() + b'"', 400, "invalid_request"),
    "null": Bad(b"null", 400, "invalid_request"),
    "not UTF-8": Bad(but(model="?").replace(b"?", b"\xff\xfe"), 400, "invalid_request"),
    "two values": Bad(but() + but(), 400, "invalid_request"),
    "NaN": Bad(but(temperature=math.nan), 400, "invalid_request"),
    "2,000 lists deep": Bad(but(metadata="?").replace(b'"?"', b"[" * 2000 + b"]" * 2000), 400, "invalid_request"),
    "2,000 objects deep": Bad(
        but(metadata="?").replace(b'"?"', b'{"a":' * 2000 + b"1" + b"}" * 2000), 400, "invalid_request"
    ),
    "2,000 deep, never closed": Bad(b"[" * 2000, 400, "invalid_request"),
    "no model": Bad(b'{"messages": []}', 400, "invalid_request", "model"),
    "a number for the model": Bad(but(model=5), 400, "invalid_request", "model"),
    "null for the model": Bad(but(model=None), 400, "invalid_request", "model"),
    "a string for stream": Bad(but(stream="yes"), 400, "invalid_request", "stream"),
    "a list for stream_options": Bad(but(stream=True, stream_options=[]), 400, "invalid_request", "stream_options"),
    "a string for include_usage": Bad(
        but(stream=True, stream_options={"include_usage": "yes"}),
        400,
        "invalid_request",
        "stream_options.include_usage",
    ),
    "a string for max_tokens": Bad(but(max_tokens="many"), 400, "invalid_request", "max_tokens"),
    "a fraction for max_tokens": Bad(but(max_tokens=1.5), 400, "invalid_request", "max_tokens"),
    "less than no tokens": Bad(but(max_tokens=-1), 400, "invalid_request", "max_tokens"),
    "no choice": Bad(but(n=0), 400, "invalid_request", "n"),
    "too many choices": Bad(but(n=100_000), 400, "invalid_request", "n"),
    "too large": Bad(but(user="x" * 70_000), 413, "request_too_large"),
}


BAD_CALLS = [
    (name, route)
    for name, bad in BODIES.items()
    for route in (GENERATING if bad.param in ("max_tokens", "n") else ROUTES)
]


@pytest.mark.parametrize(("name", "route"), BAD_CALLS)
async def test_a_bad_body_is_refused(gateway: GatewayProcess, key: Key, name: str, route: str) -> None:
    bad = BODIES[name]
    async with gateway.client(key.text) as client:
        answer = await client.post(route, content=bad.body, headers={"content-type": "application/json"})
    error = require_refusal(answer.status_code, answer.headers, answer.content, expected=bad.status, code=bad.code)
    if bad.param is not None:
        assert error["param"] == bad.param
    assert answer.headers["x-request-id"].startswith("hr-")


async def test_a_body_too_large_is_refused_even_if_it_never_says_its_length(gateway: GatewayProcess, key: Key) -> None:
    head = f"POST {CHAT} HTTP/1.1\r\nhost: a\r\nauthorization: Bearer {key.text}\r\ntransfer-encoding: chunked\r\n\r\n"
    chunk = b"%x\r\n%b\r\n" % (10_000, b" " * 10_000)
    answer = await exchange(gateway.host, head.encode() + chunk * 8 + b"0\r\n\r\n")
    require_refusal(answer.status, answer.headers, answer.body, expected=413, code="request_too_large")


@pytest.mark.parametrize(
    ("route", "body", "param"),
    [
        (CHAT, {"model": "echo"}, "messages"),
        (CHAT, {"model": "echo", "messages": []}, "messages"),
        (CHAT, {"model": "echo", "messages": "hello"}, "messages"),
        (CHAT, {"model": "echo", "messages": [{"content": "hello"}]}, "messages"),
        (COMPLETIONS, {"model": "echo"}, "prompt"),
        (COMPLETIONS, {"model": "echo", "prompt": 5}, "prompt"),
    ],
)
async def test_an_engines_400_arrives_in_the_same_shape(
    gateway: GatewayProcess, key: Key, route: str, body: Any, param: str
) -> None:
    async with gateway.client(key.text) as client:
        answer = await client.post(route, json=body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"].startswith(param)
    assert isinstance(error["code"], str)


NULLABLE_CHAT = (
    *("audio", "frequency_penalty", "function_call", "functions", "logit_bias", "logprobs", "max_completion_tokens"),
    *("max_tokens", "metadata", "modalities", "n", "parallel_tool_calls", "prediction", "presence_penalty"),
    *("reasoning_effort", "response_format", "seed", "service_tier", "stop", "store", "stream", "stream_options"),
    *("temperature", "tool_choice", "tools", "top_logprobs", "top_p", "user"),
)
NULLABLE_COMPLETION = (
    *("best_of", "echo", "frequency_penalty", "logit_bias", "logprobs", "max_tokens", "n", "presence_penalty"),
    *("seed", "stop", "stream", "stream_options", "suffix", "temperature", "top_p", "user"),
)


@pytest.mark.parametrize(("route", "fields"), [(CHAT, NULLABLE_CHAT), (COMPLETIONS, NULLABLE_COMPLETION)])
async def test_null_is_the_same_as_leaving_it_out(
    gateway: GatewayProcess, key: Key, route: str, fields: tuple[str, ...]
) -> None:
    async with gateway.client(key.text) as client:
        answer = await client.post(route, json={**FITTING[route], **dict.fromkeys(fields)})
    assert answer.status_code == 200, answer.text


# ---- where they send it ------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/", "/v1/audio/speech", "/v3/models", "/metrics", "/schema", "/%00"])
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
async def test_an_unknown_route_is_a_404_like_any_other(
    gateway: GatewayProcess, key: Key, method: str, path: str
) -> None:
    async with gateway.client(key.text) as client:
        answer = await client.request(method, path)
    require_refusal(answer.status_code, answer.headers, answer.content, expected=404, code="not_found")


@pytest.mark.parametrize("method", ["GET", "PUT", "PATCH", "DELETE", "OPTIONS"])
@pytest.mark.parametrize("route", ROUTES)
async def test_a_wrong_method_is_a_405_that_names_the_right_one(
    gateway: GatewayProcess, key: Key, method: str, route: str
) -> None:
    async with gateway.client(key.text) as client:
        answer = await client.request(method, route)
    require_refusal(answer.status_code, answer.headers, answer.content, expected=405, code="method_not_allowed")
    assert answer.headers["allow"] == "POST"


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
@pytest.mark.parametrize("route", ["/v1/models", "/v1/models/echo"])
async def test_models_are_only_read(gateway: GatewayProcess, key: Key, method: str, route: str) -> None:
    async with gateway.client(key.text) as client:
        answer = await client.request(method, route)
    require_refusal(answer.status_code, answer.headers, answer.content, expected=405, code="method_not_allowed")
    assert "GET" in answer.headers["allow"]


async def test_an_unknown_model_cannot_be_looked_at(gateway: GatewayProcess, key: Key) -> None:
    async with gateway.client(key.text) as client:
        answer = await client.get("/v1/models/gpt-5")
    require_refusal(answer.status_code, answer.headers, answer.content, expected=404, code="model_not_found")


# ---- how they say it ---------------------------------------------------------------------------------------


def without_host(*hosts: str) -> bytes:
    lines = ["GET /v1/models HTTP/1.1", *(f"host: {host}" for host in hosts), "", ""]
    return "\r\n".join(lines).encode("latin-1")


FRAMING: Mapping[str, tuple[bytes, int, str]] = {
    "no Host": (without_host(), 400, "invalid_request"),
    "two Hosts": (without_host("a", "b"), 400, "invalid_request"),
    "two equal Hosts": (without_host("a", "a"), 400, "invalid_request"),
    "an empty Host": (without_host(""), 400, "invalid_request"),
    "a Host with a path": (without_host("a/b"), 400, "invalid_request"),
    "a Host with a user": (without_host("me@a"), 400, "invalid_request"),
    "a Host with a blank": (without_host("a b"), 400, "invalid_request"),
    "a Host with a port that is none": (without_host("a:port"), 400, "invalid_request"),
    "no HTTP": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400, "invalid_request"),
    "a length and chunks": (
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 4\r\ntransfer-encoding: chunked\r\n\r\n"
        b"0\r\n\r\n",
        400,
        "invalid_request",
    ),
    "two lengths": (
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 4\r\ncontent-length: 5\r\n\r\nabcde",
        400,
        "invalid_request",
    ),
    "a negative length": (
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ncontent-length: -4\r\n\r\n",
        400,
        "invalid_request",
    ),
    "a long header": (
        b"GET /v1/models HTTP/1.1\r\nhost: a\r\nx: " + b"y" * 40_000 + b"\r\n\r\n",
        431,
        "header_too_large",
    ),
    "a long path": (b"GET /v1/" + b"y" * 40_000 + b" HTTP/1.1\r\nhost: a\r\n\r\n", 431, "header_too_large"),
    "many headers": (
        b"GET /v1/models HTTP/1.1\r\nhost: a\r\n" + b"x: y\r\n" * 200 + b"\r\n",
        431,
        "header_too_large",
    ),
}


@pytest.mark.parametrize("name", FRAMING)
async def test_bad_framing_is_refused_and_the_connection_closed(gateway: GatewayProcess, name: str) -> None:
    data, status, code = FRAMING[name]
    async with Connection(gateway.host) as connection:
        await connection.send(data)
        answer = await connection.answer()
        await connection.until_closed()
    require_refusal(answer.status, answer.headers, answer.body, expected=status, code=code)


@pytest.mark.parametrize("host", ["a", "a.example:8000", "127.0.0.1:80", "[::1]:8000", "xn--nxasmq6b.example"])
async def test_a_good_host_is_let_in(gateway: GatewayProcess, key: Key, host: str) -> None:
    lines = ["GET /v1/models HTTP/1.1", f"host: {host}", f"authorization: Bearer {key.text}", "", ""]
    answer = await exchange(gateway.host, "\r\n".join(lines).encode())
    assert answer.status == 200


async def test_a_header_that_takes_too_long_is_given_up(gateway: GatewayProcess) -> None:
    async with Connection(gateway.host) as connection:
        await connection.send(b"GET /v1/models HTTP/1.1\r\nhost: a\r\n")
        answer = await connection.answer()
        await connection.until_closed()
    require_refusal(answer.status, answer.headers, answer.body, expected=408, code="request_timeout", retry=True)


async def test_a_body_that_takes_too_long_is_given_up(gateway: GatewayProcess, key: Key) -> None:
    async with Connection(gateway.host) as connection:
        await connection.send(post(CHAT, FITTING[CHAT], key.text)[:-10])
        answer = await connection.answer()
    require_refusal(answer.status, answer.headers, answer.body, expected=408, code="request_timeout", retry=True)


# ---- and afterwards ----------------------------------------------------------------------------------------


async def test_refusals_harm_nobody_else(gateway: GatewayProcess, key: Key) -> None:
    async with gateway.client(key.text) as client:
        for _ in range(30):
            assert (await client.post(CHAT, json={"model": "echo", "messages": []})).status_code == 400
        assert (await client.post(CHAT, json=FITTING[CHAT])).status_code == 200
    with gateway.admin_client() as admin:
        models = admin.get("/models").json()
    assert all(not replica["ejected"] for model in models if model["name"] == "echo" for replica in model["replicas"])


async def test_no_prompt_and_no_key_is_in_the_log_or_in_a_metric(gateway: GatewayProcess, key: Key) -> None:
    async with gateway.client(key.text) as client:
        await client.post(CHAT, json=FITTING[CHAT])
        await client.post(CHAT, json={**FITTING[CHAT], "model": SECRET})
    with gateway.admin_client() as admin:
        metrics = admin.get("/metrics").text
    assert "headrace_" in metrics
    for said in (gateway.text, metrics):
        assert SECRET not in said
        assert key.text not in said
        assert key.text.split("_")[3] not in said
