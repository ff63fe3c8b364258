"""OpenAI's Python SDK, unmodified and validating strictly, against a real engine."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import openai
import pytest

from tests.e2e.engine import MODEL
from tests.e2e.servers import GatewayProcess, Key

pytestmark = pytest.mark.engine

ASK: Any = [{"role": "user", "content": "Say hello to the town."}]
TEXTS = ["Where is my parcel?", "I want my money back.", "Thanks!"]


@pytest.fixture
def client(engine_gateway: GatewayProcess, engine_key: Key) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=engine_gateway.url, api_key=engine_key.text, max_retries=0, _strict_response_validation=True
    ) as client:
        yield client


@pytest.fixture
def lenient(engine_gateway: GatewayProcess, engine_key: Key) -> Iterator[openai.OpenAI]:
    """For where the SDK's own types refuse what its own API sends: embeddings as base64, and null for the reason to
    finish in a completion's chunk."""
    with openai.OpenAI(base_url=engine_gateway.url, api_key=engine_key.text, max_retries=0) as client:
        yield client


@pytest.fixture
async def async_client(engine_gateway: GatewayProcess, engine_key: Key) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=engine_gateway.url, api_key=engine_key.text, max_retries=0, _strict_response_validation=True
    ) as client:
        yield client


# ---- chat and completions ----------------------------------------------------------------------------------


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=ASK, max_completion_tokens=8, temperature=0)
    assert answer.model == MODEL
    assert answer.choices[0].message.content
    assert answer.usage is not None
    assert 0 < answer.usage.completion_tokens <= 8


async def test_chat_asynchronously_with_the_raw_response(async_client: openai.AsyncOpenAI) -> None:
    raw = await async_client.chat.completions.with_raw_response.create(
        model=MODEL, messages=ASK, max_completion_tokens=4, n=2
    )
    assert raw.status_code == 200
    assert raw.headers["x-request-id"].startswith("hr-")
    assert [choice.index for choice in raw.parse().choices] == [0, 1]


def test_chat_streamed(client: openai.OpenAI) -> None:
    with client.chat.completions.create(model=MODEL, messages=ASK, max_completion_tokens=8, stream=True) as stream:
        chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")
    assert all(chunk.usage is None for chunk in chunks)


async def test_chat_streamed_asynchronously_with_usage(async_client: openai.AsyncOpenAI) -> None:
    stream = await async_client.chat.completions.create(
        model=MODEL,
        messages=ASK,
        max_completion_tokens=8,
        stream=True,
        stream_options={"include_usage": True},
    )
    async with stream:
        chunks = [chunk async for chunk in stream]
    *before, last = chunks
    assert last.choices == []
    assert last.usage is not None and 0 < last.usage.completion_tokens <= 8
    assert all(chunk.usage is None for chunk in before)


async def test_the_sdks_own_accumulating_stream(async_client: openai.AsyncOpenAI) -> None:
    async with async_client.chat.completions.stream(
        model=MODEL,
        messages=ASK,
        stream_options={"include_usage": True},
        extra_body={"structured_outputs": {"choice": ["hello town"]}},
    ) as stream:
        kinds = {event.type async for event in stream}
        whole = await stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert whole.choices[0].message.content == "hello town"
    assert whole.usage is not None


@pytest.mark.parametrize(
    ("prompt", "choices"),
    [
        ("Once upon a time", 1),
        (["Once upon a time", "In the beginning"], 2),
        ([6403, 1980, 253, 655], 1),
        ([[6403, 1980, 253, 655], [788, 260, 4052]], 2),
    ],
    ids=["text", "texts", "token ids", "lists of token ids"],
)
@pytest.mark.parametrize("stream", [False, True])
def test_completions(client: openai.OpenAI, lenient: openai.OpenAI, prompt: Any, choices: int, stream: bool) -> None:
    if stream:
        with lenient.completions.create(model=MODEL, prompt=prompt, max_tokens=4, stream=True) as chunks:
            seen = {chunk.choices[0].index for chunk in chunks}
    else:
        answer = client.completions.create(model=MODEL, prompt=prompt, max_tokens=4)
        assert answer.usage is not None and answer.usage.completion_tokens <= 4 * choices
        seen = {choice.index for choice in answer.choices}
    assert seen == set(range(choices))


# ---- responses and messages --------------------------------------------------------------------------------


async def test_responses(async_client: openai.AsyncOpenAI, engine_gateway: GatewayProcess, engine_key: Key) -> None:
    raw = await async_client.responses.with_raw_response.create(model=MODEL, input="Say hello.", max_output_tokens=8)
    answer = raw.parse()
    assert answer.output_text
    assert answer.usage is not None
    record = await engine_gateway.record(engine_key, raw.headers["x-request-id"])
    assert (record["tokens_in"], record["tokens_out"]) == (answer.usage.input_tokens, answer.usage.output_tokens)


async def test_responses_streamed(async_client: openai.AsyncOpenAI) -> None:
    async with async_client.responses.stream(model=MODEL, input="Say hello.", max_output_tokens=8) as stream:
        kinds = [event.type async for event in stream]
    assert kinds[0] == "response.created"
    assert "response.output_text.delta" in kinds
    assert kinds[-1] in ("response.completed", "response.incomplete")


async def test_messages_as_anthropics_clients_send_them(engine_gateway: GatewayProcess, engine_key: Key) -> None:
    headers = {"x-api-key": engine_key.text, "anthropic-version": "2023-06-01"}
    async with engine_gateway.client() as client:
        answer = await client.post(
            "/v1/messages", headers=headers, json={"model": MODEL, "max_tokens": 8, "messages": ASK}
        )
        refused = await client.post(
            "/v1/messages", headers=headers, json={"model": "claude", "max_tokens": 8, "messages": ASK}
        )
    assert answer.status_code == 200, answer.text
    message = answer.json()
    assert message["content"][0]["text"]
    usage = message["usage"]
    read = usage["input_tokens"] + usage["cache_read_input_tokens"] + usage["cache_creation_input_tokens"]
    record = await engine_gateway.record(engine_key, answer.headers["x-request-id"])
    assert (record["tokens_in"], record["tokens_out"]) == (read, usage["output_tokens"])
    assert refused.status_code == 404
    assert refused.json()["type"] == "error"


async def test_messages_streamed(engine_gateway: GatewayProcess, engine_key: Key) -> None:
    headers = {"x-api-key": engine_key.text}
    body = {"model": MODEL, "max_tokens": 8, "messages": ASK, "stream": True}
    async with engine_gateway.client() as client:
        answer = await client.post("/v1/messages", headers=headers, json=body)
    events = [json.loads(line[5:]) for line in answer.text.split("\n") if line.startswith("data:")]
    assert events[0]["type"] == "message_start"
    assert events[-1]["type"] == "message_stop"
    record = await engine_gateway.record(engine_key, answer.headers["x-request-id"])
    said = next(event["usage"] for event in reversed(events) if event.get("usage"))
    assert (record["outcome"], record["tokens_out"]) == ("served", said["output_tokens"])
    assert record["tokens_in"] > 0 and not record["estimated"]


# ---- embeddings and models ---------------------------------------------------------------------------------


def test_embeddings_are_the_same_as_numbers_and_as_the_sdk_asks_for_them(
    client: openai.OpenAI, lenient: openai.OpenAI
) -> None:
    numbers = client.embeddings.create(model="minilm", input=TEXTS, encoding_format="float")
    default = lenient.embeddings.create(model="minilm", input=TEXTS)
    assert [item.index for item in default.data] == [0, 1, 2]
    for one, other in zip(numbers.data, default.data, strict=True):
        assert one.embedding == pytest.approx(other.embedding, abs=1e-6)
        assert sum(value * value for value in one.embedding) == pytest.approx(1, abs=1e-3)
    assert numbers.usage == default.usage
    assert numbers.usage.prompt_tokens > 0


async def test_a_batch_of_embeddings_is_its_single_ones(async_client: openai.AsyncOpenAI) -> None:
    batch = await async_client.embeddings.create(model="minilm", input=TEXTS, encoding_format="float")
    for text, item in zip(TEXTS, batch.data, strict=True):
        single = await async_client.embeddings.create(model="minilm", input=text, encoding_format="float")
        # near, not equal: int8 activations are scaled by batch, its padding included
        assert cosine(single.data[0].embedding, item.embedding) > 1 - 1e-5


def test_near_meanings_have_near_embeddings(lenient: openai.OpenAI) -> None:
    texts = ["Where is my package?", "My parcel has not arrived yet.", "The cat sleeps on the sofa."]
    package, parcel, cat = (item.embedding for item in lenient.embeddings.create(model="minilm", input=texts).data)
    assert cosine(package, parcel) > cosine(package, cat) + 0.2


def cosine(one: list[float], other: list[float]) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True))


def test_models_are_the_real_ones(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["smollm2", "minilm", "support-intent"]
    assert client.models.retrieve("smollm2").id == "smollm2"


async def test_a_key_sees_only_its_models(engine_gateway: GatewayProcess) -> None:
    key = engine_gateway.issue(models=["smol*", "support-intent"])
    async with openai.AsyncOpenAI(base_url=engine_gateway.url, api_key=key.text, max_retries=0) as client:
        assert [model.id async for model in client.models.list()] == ["smollm2", "support-intent"]
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve("minilm")
        with pytest.raises(openai.PermissionDeniedError):
            await client.embeddings.create(model="minilm", input="hello")


async def test_what_answers_a_question_ranks_first(async_client: openai.AsyncOpenAI) -> None:
    documents = ["The cat sleeps on the sofa.", "My parcel has not arrived yet.", "We open at nine."]
    ask = {"model": "minilm", "query": "Where is my package?", "documents": documents}
    ranked: Any = await async_client.post("/rerank", body=ask, cast_to=object)
    assert ranked["results"][0]["document"]["text"] == documents[1]
    pairs = {"model": "minilm", "text_1": ask["query"], "text_2": documents}
    scored: Any = await async_client.post("/score", body=pairs, cast_to=object)
    assert scored["data"][1]["score"] == pytest.approx(ranked["results"][0]["relevance_score"], abs=1e-3)


async def test_a_classifier_without_thresholds_moderates_nothing(async_client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await async_client.moderations.create(model="support-intent", input="hello")
    assert caught.value.param == "model"
    assert "no thresholds" in caught.value.message


# ---- errors ------------------------------------------------------------------------------------------------


def test_a_wrong_key_is_an_authentication_error(engine_gateway: GatewayProcess) -> None:
    with (
        openai.OpenAI(base_url=engine_gateway.url, api_key="sk-wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError) as caught,
    ):
        client.chat.completions.create(model=MODEL, messages=ASK)
    assert caught.value.code == "invalid_api_key"


def test_an_unknown_model_is_a_not_found_error(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-5", messages=ASK)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    assert "smollm2, minilm, support-intent" in caught.value.message


@pytest.mark.parametrize("stream", [False, True])
def test_what_the_engine_refuses_is_a_bad_request_error(client: openai.OpenAI, stream: bool) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=ASK, temperature=-5, stream=stream)
    assert caught.value.param == "temperature"
    assert isinstance(caught.value.code, str)
    assert "temperature" in caught.value.message
    assert "{" not in caught.value.message, "an error object, not a string inside a string"


def test_a_route_the_model_does_not_have_is_a_bad_request_error(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="minilm", messages=ASK)
    assert caught.value.code == "unsupported_route"
    with pytest.raises(openai.APIStatusError) as other:
        client.embeddings.create(model=MODEL, input="hello")
    assert other.value.status_code in (400, 404)


async def test_a_spent_quota_is_a_rate_limit_error(engine_gateway: GatewayProcess) -> None:
    key = engine_gateway.issue(limits={"rpm": 1})
    async with openai.AsyncOpenAI(base_url=engine_gateway.url, api_key=key.text, max_retries=0) as client:
        await client.embeddings.create(model="minilm", input="hello")
        with pytest.raises(openai.RateLimitError) as caught:
            await client.embeddings.create(model="minilm", input="hello")
    assert caught.value.code == "rate_limit_exceeded"
    assert float(caught.value.response.headers["retry-after"]) > 0
