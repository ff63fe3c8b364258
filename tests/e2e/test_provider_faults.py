"""A provider that fails, in every way one can: the client gets one clear error, and nothing leaks."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

import httpx
import openai
import pytest

from tests.e2e.raw import Connection, post, streaming
from tests.e2e.servers import GatewayProcess, Key
from tests.e2e.test_refusals import CHAT, require_refusal
from tests.e2e.upstream import KEY, MODEL, USAGE, WORDS, Upstream

SECRET = "the-patient-in-room-13"


def ask(model: str = "relay", **fields: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": SECRET}], **fields}


async def test_a_call_arrives_as_it_was_sent_but_for_the_models_name(
    gateway: GatewayProcess, provider: Upstream, key: Key
) -> None:
    body = ask(temperature=0.5, seed=None, nobody_knows_this={"deep": [1, 2.50, "ünï", None]}, user="u-1")
    async with gateway.client(key.text) as client:
        answer = await client.post(CHAT, json=body, headers={"x-secret": "client's own"})
    assert answer.status_code == 200
    assert provider.seen[-1] == {**body, "model": MODEL}
    assert provider.keys[-1] == f"Bearer {KEY}"
    assert answer.json()["choices"][0]["message"]["content"] == "".join(WORDS)
    assert answer.json()["usage"] == USAGE


@pytest.mark.parametrize("options", [None, {}, {"include_usage": False}, {"include_usage": True}])
async def test_usage_is_streamed_to_who_asked_and_metered_for_all(
    gateway: GatewayProcess, provider: Upstream, key: Key, options: dict[str, bool] | None
) -> None:
    body = ask() if options is None else ask(stream_options=options)
    async with streaming(gateway.host, key.text, body) as stream:
        events = await stream.rest()
    assert events[-1] == "[DONE]"
    assert provider.seen[-1]["stream_options"] == {"include_usage": True}
    with_usage = [chunk for chunk in stream.chunks if chunk.get("usage")]
    if options and options["include_usage"] if options else False:
        assert with_usage == stream.chunks[-1:]
        assert with_usage[0]["choices"] == []
        assert with_usage[0]["usage"] == USAGE
    else:
        assert with_usage == []
        assert all("usage" not in chunk for chunk in stream.chunks)
    record = await gateway.record(key, stream.id)
    assert (record["tokens_in"], record["tokens_out"], record["estimated"]) == (7, 3, False)


# ---- before the first byte ---------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fault", ["resets_at_once", "garbage"])
async def test_no_answer_is_a_502(gateway: GatewayProcess, key: Key, fault: str, stream: bool) -> None:
    async with gateway.client(key.text) as client:
        answer = await client.post(CHAT, json=ask(fault=fault, stream=stream))
    require_refusal(answer.status_code, answer.headers, answer.content, expected=502, code="engine_failed", retry=True)
    assert SECRET not in answer.text and KEY not in answer.text


@pytest.mark.parametrize(
    ("fault", "status", "error"),
    [
        (
            "refuses",
            400,
            {"message": "Too hot.", "type": "invalid_request_error", "param": "temperature", "code": "400"},
        ),
        ("fails", 500, {"message": "It broke.", "type": "server_error", "param": None, "code": "5001"}),
        (
            "limits",
            429,
            {"message": "Slow down.", "type": "rate_limit_error", "param": None, "code": "rate_limit_exceeded"},
        ),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_providers_error_keeps_status_type_param_and_code(
    gateway: GatewayProcess, key: Key, fault: str, status: int, error: Mapping[str, Any], stream: bool
) -> None:
    async with gateway.client(key.text) as client:
        answer = await client.post(CHAT, json=ask(fault=fault, stream=stream))
    assert answer.status_code == status
    assert answer.json()["error"] == error
    assert (await gateway.record(key, answer.headers["x-request-id"]))["status"] == status


async def test_a_providers_retry_after_is_passed_on(gateway: GatewayProcess, key: Key) -> None:
    async with gateway.client(key.text) as client:
        answer = await client.post(CHAT, json=ask(fault="limits"))
    assert answer.headers["retry-after"] == "7"


async def test_a_page_that_is_no_error_object_is_not_passed_on(gateway: GatewayProcess, key: Key) -> None:
    async with gateway.client(key.text) as client:
        answer = await client.post(CHAT, json=ask(fault="not_json"))
    assert answer.status_code == 502
    assert answer.json()["error"]["code"] == "engine_failed"
    assert "secret" not in answer.text


async def test_the_providers_401_is_the_operators_problem_not_the_clients(gateway: GatewayProcess, key: Key) -> None:
    async with gateway.client(key.text) as client:
        answer = await client.post(CHAT, json=ask(fault="knows_us_not"))
    require_refusal(answer.status_code, answer.headers, answer.content, expected=502, code="engine_failed", retry=True)
    assert KEY not in answer.text


async def test_a_stream_that_begins_with_an_error_has_that_errors_status(gateway: GatewayProcess, key: Key) -> None:
    async with gateway.client(key.text) as client:
        answer = await client.post(CHAT, json=ask(fault="says_error_first", stream=True))
    assert answer.status_code == 503
    assert answer.headers["content-type"] == "application/json"
    assert answer.json()["error"] == {"message": "No room.", "type": "server_error", "param": None, "code": "503"}


async def test_an_answer_without_end_is_cut_off(gateway: GatewayProcess, key: Key) -> None:
    async with gateway.client(key.text) as client:
        answer = await client.post(CHAT, json=ask(fault="huge_answer"))
    require_refusal(answer.status_code, answer.headers, answer.content, expected=502, code="engine_failed", retry=True)


async def test_another_replica_answers_before_the_first_byte(gateway: GatewayProcess, key: Key) -> None:
    async with gateway.client(key.text) as client:
        answers = [await client.post(CHAT, json=ask("pair")) for _ in range(12)]
    assert [answer.status_code for answer in answers] == [200] * 12
    records = gateway.records(key.tenant)
    assert {records[answer.headers["x-request-id"]]["replica"] for answer in answers} == {"pair-1"}


async def test_what_clients_do_wrong_ejects_no_replica(gateway: GatewayProcess, key: Key) -> None:
    async with gateway.client(key.text) as client:
        for fault in ("refuses", "limits") * 10:
            await client.post(CHAT, json=ask(fault=fault))
        assert (await client.post(CHAT, json=ask())).status_code == 200
    with gateway.admin_client() as admin:
        relay = next(model for model in admin.get("/models").json() if model["name"] == "relay")
    assert [replica["ejected"] for replica in relay["replicas"]] == [False]


# ---- amid the stream ---------------------------------------------------------------------------------------

AMID = ("resets_amid", "closes_amid", "never_says_done", "stalls_amid", "says_error_amid", "huge_event")


@pytest.mark.parametrize("fault", AMID)
async def test_a_stream_cut_short_ends_in_an_error_and_never_in_done(
    gateway: GatewayProcess, key: Key, fault: str
) -> None:
    async with streaming(gateway.host, key.text, ask(fault=fault)) as stream:
        events = await stream.rest()
    assert stream.status == 200
    assert "[DONE]" not in events
    text, error = (json.loads(event) for event in events)
    assert text["choices"][0]["delta"]["content"] == WORDS[0]
    assert set(error["error"]) == {"message", "type", "param", "code"}
    assert error["error"]["type"] == "server_error"
    assert isinstance(error["error"]["code"], str)
    assert SECRET not in events[-1] and KEY not in events[-1]
    record = await gateway.record(key, stream.id)
    assert record["outcome"] == "failed"
    assert record["tokens_out"] == 1


@pytest.mark.parametrize("route", ["/v1/messages", "/v1/responses"])
async def test_where_events_have_names_the_error_has_one_too(gateway: GatewayProcess, key: Key, route: str) -> None:
    async with gateway.client(key.text) as client:
        answer = await client.post(route, json=ask(fault="resets_amid", stream=True))
    *_, last = answer.text.strip().split("\n\n")
    name, data = last.split("\n")
    assert name == "event: error"
    error = json.loads(data.removeprefix("data: "))
    assert error["type"] == "error"
    assert error["error"]["code"] == "engine_failed"


@pytest.mark.parametrize("fault", AMID)
async def test_the_python_sdk_raises_amid_the_stream(gateway: GatewayProcess, key: Key, fault: str) -> None:
    client = openai.AsyncOpenAI(base_url=gateway.url, api_key=key.text, max_retries=0, _strict_response_validation=True)
    words = []
    async with client:
        stream = await client.chat.completions.create(
            model="relay",
            messages=[{"role": "user", "content": SECRET}],
            stream=True,
            extra_body={"fault": fault},
        )
        async with stream:
            with pytest.raises(openai.APIError) as caught:
                async for chunk in stream:
                    words.append(chunk.choices[0].delta.content)  # noqa: PERF401  those before the fault count
    assert words == [WORDS[0]]
    assert not isinstance(caught.value, openai.APIConnectionError)


# ---- a client that leaves ----------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["leave", "drop"])
@pytest.mark.parametrize("stream", [False, True])
async def test_leaving_before_the_first_byte_hangs_up_on_the_provider(
    gateway: GatewayProcess, provider: Upstream, how: str, stream: bool
) -> None:
    key = gateway.issue()
    provider.left.clear()
    asked = len(provider.seen) and provider.seen[-1]
    async with Connection(gateway.host) as connection:
        await connection.send(post(CHAT, ask(fault="stalls_at_once", stream=stream, user=key.id), key.text))
        async with asyncio.timeout(10):
            while not provider.seen or provider.seen[-1] is asked:
                await asyncio.sleep(0.01)
        getattr(connection, how)()
        assert await asyncio.to_thread(provider.left.wait, 10), "the provider's connection stays open"
    record = await gateway.record(key)
    assert (record["outcome"], record["status"], record["tokens_out"]) == ("cancelled", 0, 0)
    assert await gateway.running("relay") == 0


@pytest.mark.parametrize("how", ["leave", "drop"])
async def test_leaving_amid_the_stream_hangs_up_on_the_provider(
    gateway: GatewayProcess, provider: Upstream, how: str
) -> None:
    key = gateway.issue()
    provider.left.clear()
    async with streaming(gateway.host, key.text, ask(fault="stalls_amid")) as stream:
        await stream.text(1)
        getattr(stream.connection, how)()
        assert await asyncio.to_thread(provider.left.wait, 10), "the provider's connection stays open"
    record = await gateway.record(key)
    assert (record["outcome"], record["status"], record["tokens_out"]) == ("cancelled", 200, 1)
    assert await gateway.running("relay") == 0


async def recorded(gateway: GatewayProcess, key: Key, count: int) -> list[Any]:
    """The key's records, once there are `count`."""
    async with asyncio.timeout(10):
        while len(found := list(gateway.records(key.tenant).values())) < count:
            await asyncio.sleep(0.05)
    return found


# ---- nobody there ------------------------------------------------------------------------------------------


async def test_a_model_without_a_live_replica_is_a_503_and_readiness_names_it(tmp_path_factory: Any) -> None:
    gateway = GatewayProcess(
        tmp_path_factory.mktemp("n"),
        """
[server]
listen = "127.0.0.1:0"
grpc = "127.0.0.1:0"
admin = "127.0.0.1:0"
[[models]]
name = "away"
replicas = [{ kind = "remote", url = "http://127.0.0.1:9/v1" }]
[[models]]
name = "echo"
replicas = [{ kind = "echo" }]
""",
    ).start(until="listening")
    try:
        key = gateway.issue()
        async with gateway.client(key.text) as client:
            away = await client.post(CHAT, json=ask("away"))
            here = await client.post(CHAT, json=ask("echo"))
        readiness = httpx.get(f"http://{gateway.admin}/readyz", trust_env=False)
    finally:
        assert gateway.stop() == 0
    require_refusal(away.status_code, away.headers, away.content, expected=503, code="engine_unavailable", retry=True)
    assert float(away.headers["retry-after"]) > 0
    assert here.status_code == 200
    assert readiness.status_code == 503
    checks = readiness.json()["checks"]
    assert "away-0" in checks["model away"]["reason"]
    assert checks["model echo"]["ready"]
