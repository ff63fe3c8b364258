"""Real vLLM behind the gateway: what is asked of it holds, and who leaves sets it free."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from tests.e2e.engine import MADE, MODEL, READ, until_busy, until_free
from tests.e2e.raw import Connection, post, streaming
from tests.e2e.servers import GatewayProcess, Key
from tests.e2e.test_provider_faults import recorded
from tests.e2e.test_refusals import CHAT, COMPLETIONS, NULLABLE_CHAT, NULLABLE_COMPLETION

pytestmark = pytest.mark.engine

TOWN: Any = [{"role": "user", "content": "Name a town and its number of people."}]
SCHEMA = {
    "type": "object",
    "properties": {
        "town": {"type": "string", "enum": ["Ulm", "Bern", "Graz"]},
        "people": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["town", "people"],
    "additionalProperties": False,
}
LONG = 900
"""Tokens that nobody waits for: half a minute's work."""
UNWANTED_MAX = 60
"""Tokens made between a client's leaving and the engine's noticing; about what it makes in a second."""


@pytest.fixture
async def client(engine_gateway: GatewayProcess, engine_key: Key) -> Any:
    async with openai.AsyncOpenAI(
        base_url=engine_gateway.url, api_key=engine_key.text, max_retries=0, _strict_response_validation=True
    ) as client:
        yield client


def require_schema(text: str) -> None:
    made = json.loads(text)
    assert set(made) == {"town", "people"}
    assert made["town"] in ("Ulm", "Bern", "Graz")
    assert made["people"] in range(1, 10)


# ---- what is asked holds -----------------------------------------------------------------------------------


async def test_a_json_schema_holds(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model=MODEL,
        messages=TOWN,
        max_completion_tokens=100,
        temperature=0,  # left to chance, so small a model fills the space with blanks
        response_format={"type": "json_schema", "json_schema": {"name": "town", "schema": SCHEMA, "strict": True}},
    )
    require_schema(answer.choices[0].message.content or "")


@pytest.mark.parametrize("stream", [False, True])
async def test_a_strict_tool_schema_holds(client: openai.AsyncOpenAI, stream: bool) -> None:
    asked: dict[str, Any] = {
        "model": MODEL,
        "messages": TOWN,
        "max_completion_tokens": 100,
        "temperature": 0,
        "tools": [{"type": "function", "function": {"name": "note_town", "strict": True, "parameters": SCHEMA}}],
        "tool_choice": {"type": "function", "function": {"name": "note_town"}},
    }
    if stream:
        async with await client.chat.completions.create(**asked, stream=True) as chunks:
            calls = [call async for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
        name = next(call.function.name for call in calls if call.function and call.function.name)
        arguments = "".join(call.function.arguments or "" for call in calls if call.function)
    else:
        answer = await client.chat.completions.create(**asked)
        (call,) = answer.choices[0].message.tool_calls or []
        assert call.type == "function"
        name, arguments = call.function.name, call.function.arguments
    assert name == "note_town"
    require_schema(arguments)


async def test_parameters_that_only_the_engine_knows_arrive(client: openai.AsyncOpenAI) -> None:
    chosen = await client.chat.completions.create(
        model=MODEL, messages=TOWN, extra_body={"structured_outputs": {"choice": ["up", "down"]}}
    )
    assert chosen.choices[0].message.content in ("up", "down")
    long = await client.chat.completions.create(
        model=MODEL,
        messages=TOWN,
        max_completion_tokens=12,
        logit_bias={"2": 100},  # the model's word for "end of turn": it wants to stop at once
        extra_body={"min_tokens": 12, "prompt_logprobs": 1},
    )
    assert long.usage is not None and long.usage.completion_tokens == 12
    assert long.model_extra is not None and long.model_extra["prompt_logprobs"]
    refused = openai.BadRequestError
    with pytest.raises(refused):
        await client.chat.completions.create(
            model=MODEL, messages=TOWN, extra_body={"structured_outputs": {"regex": "("}}
        )


async def test_the_same_seed_says_the_same_and_another_does_not(client: openai.AsyncOpenAI) -> None:
    async def said(seed: int) -> str:
        answer = await client.chat.completions.create(
            model=MODEL, messages=TOWN, max_completion_tokens=16, temperature=1.5, seed=seed
        )
        return answer.choices[0].message.content or ""

    await said(1)  # from here on the prompt comes out of the engine's cache, each time alike
    assert await said(7) == await said(7)
    assert len({await said(seed) for seed in range(4)}) > 1


@pytest.mark.parametrize(("route", "fields"), [(CHAT, NULLABLE_CHAT), (COMPLETIONS, NULLABLE_COMPLETION)])
async def test_null_is_the_same_as_leaving_it_out(
    engine_gateway: GatewayProcess, engine_key: Key, route: str, fields: tuple[str, ...]
) -> None:
    body = {"messages": TOWN, "max_completion_tokens": 4} if route == CHAT else {"prompt": "Hi", "max_tokens": 4}
    nulls = {field: None for field in fields if field not in body}
    async with engine_gateway.client(engine_key.text) as client:
        answer = await client.post(route, json={"model": MODEL, **nulls, **body})
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] <= 4


@pytest.mark.parametrize("options", [None, {"include_usage": False}, {"include_usage": True}])
@pytest.mark.parametrize("route", [CHAT, COMPLETIONS])
async def test_usage_is_streamed_to_who_asked_and_metered_for_all(
    engine_gateway: GatewayProcess, engine_key: Key, route: str, options: dict[str, bool] | None
) -> None:
    body: dict[str, Any] = {"model": MODEL, "max_tokens": 5, "min_tokens": 5, "n": 2}
    body |= {"messages": TOWN} if route == CHAT else {"prompt": ["Hi", "Hello there"]}
    if options is not None:
        body["stream_options"] = options
    async with streaming(engine_gateway.host, engine_key.text, body, route) as stream:
        events = await stream.rest()
    assert events[-1] == "[DONE]"
    record = await engine_gateway.record(engine_key, stream.id)
    assert record["outcome"] == "served" and not record["estimated"]
    assert record["tokens_out"] == (10 if route == CHAT else 20)
    if options == {"include_usage": True}:
        *before, last = stream.chunks
        assert last["choices"] == []
        assert last["usage"]["prompt_tokens"] == record["tokens_in"]
        assert last["usage"]["completion_tokens"] == record["tokens_out"]
    else:
        before = stream.chunks
    assert all(chunk.get("usage") is None and chunk["choices"] for chunk in before)


@pytest.mark.parametrize("wrong", [{"temperature": -1}, {"temperature": "hot"}, {"top_p": 7}, {"max_tokens": 10**6}])
@pytest.mark.parametrize("stream", [False, True])
async def test_the_engines_own_400_is_passed_on_in_one_shape(
    engine_gateway: GatewayProcess, engine_key: Key, wrong: dict[str, Any], stream: bool
) -> None:
    async with engine_gateway.client(engine_key.text) as client:
        answer = await client.post(CHAT, json={"model": MODEL, "messages": TOWN, "stream": stream, **wrong})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["code"], str)
    assert error["message"] and not error["message"].startswith("{")
    assert answer.headers["x-should-retry"] == "false"
    record = await engine_gateway.record(engine_key, answer.headers["x-request-id"])
    assert (record["outcome"], record["status"], record["tokens_out"]) == ("rejected", 400, 0)


async def test_a_body_that_is_not_utf_8_is_a_400(engine_gateway: GatewayProcess, engine_key: Key) -> None:
    body = json.dumps({"model": MODEL, "messages": TOWN, "user": "?"}).encode()
    async with engine_gateway.client(engine_key.text) as client:
        answer = await client.post(CHAT, content=body.replace(b'"?"', b'"\xff\xfe"'))
    assert answer.status_code == 400
    assert isinstance(answer.json()["error"]["code"], str)


SECRET = "the-patient-in-room-14"
GOOD: Any = {"model": MODEL, "messages": [{"role": "user", "content": SECRET}], "max_tokens": 2}
WRONG: Any = ({"temperature": "hot"}, {"messages": SECRET}, {"messages": [{"content": SECRET}]}, {"stop": 5})


async def test_no_prompt_is_in_the_log_of_gateway_or_engine(engine_gateway: GatewayProcess, engine_key: Key) -> None:
    async with engine_gateway.client(engine_key.text) as client:
        assert (await client.post(CHAT, json=GOOD)).status_code == 200
        for wrong in WRONG:
            assert (await client.post(CHAT, json=GOOD | wrong)).status_code == 400
    log = next((engine_gateway.state / "logs").glob(f"{MODEL}-0.*.log")).read_text()
    assert "vllm" in log.lower()
    assert SECRET not in log
    assert SECRET not in engine_gateway.text


async def test_no_prompt_comes_back_in_an_error(engine_gateway: GatewayProcess, engine_key: Key) -> None:
    async with engine_gateway.client(engine_key.text) as client:
        for wrong in WRONG:
            assert SECRET not in (await client.post(CHAT, json=GOOD | wrong)).text


# ---- who leaves sets it free -------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["leave", "drop"])
async def test_leaving_before_the_first_byte_frees_the_engine(engine_gateway: GatewayProcess, how: str) -> None:
    key = engine_gateway.issue()
    before = await until_free(engine_gateway)
    async with Connection(engine_gateway.host) as connection:
        await connection.send(post(CHAT, long_call(), key.text))
        await until_busy(engine_gateway)
        getattr(connection, how)()
        after = await until_free(engine_gateway)
    assert after[MADE] - before[MADE] < LONG / 2
    record = await engine_gateway.record(key)
    assert (record["outcome"], record["status"], record["tokens_out"]) == ("cancelled", 0, 0)


@pytest.mark.parametrize("how", ["leave", "drop"])
async def test_leaving_amid_the_stream_frees_the_engine(engine_gateway: GatewayProcess, how: str) -> None:
    key = engine_gateway.issue()
    before = await until_free(engine_gateway)
    async with streaming(engine_gateway.host, key.text, long_call()) as stream:
        await stream.text(3)
        getattr(stream.connection, how)()
        after = await until_free(engine_gateway)
    made = after[MADE] - before[MADE]
    record = await engine_gateway.record(key)
    assert (record["outcome"], record["status"]) == ("cancelled", 200)
    assert 3 <= record["tokens_out"] <= made <= record["tokens_out"] + UNWANTED_MAX
    assert record["tokens_in"] == after[READ] - before[READ]


async def test_leaving_with_sixteen_calls_at_once_frees_the_engine_of_all(engine_gateway: GatewayProcess) -> None:
    key = engine_gateway.issue()
    await until_free(engine_gateway)
    connections = [Connection(engine_gateway.host) for _ in range(16)]
    try:
        for connection in connections:
            await connection.__aenter__()
            await connection.send(post(CHAT, long_call(), key.text))
        await until_busy(engine_gateway, calls=2)
    finally:
        for connection in connections:
            connection.drop()
            await connection.__aexit__(None, None, None)
    await until_free(engine_gateway)
    found = await recorded(engine_gateway, key, 16)
    assert {record["outcome"] for record in found} == {"cancelled"}
    assert await engine_gateway.running(MODEL) == 0


def long_call() -> dict[str, Any]:
    return {"model": MODEL, "messages": TOWN, "max_tokens": LONG, "min_tokens": LONG}
