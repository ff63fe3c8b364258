"""Real engines behind the Open Inference Protocol, as Triton's own client sees them."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import openai
import pytest
import tritonclient.grpc
import tritonclient.grpc.aio

from tests.e2e.engine import MADE, MODEL, READ, until_busy, until_free
from tests.e2e.servers import GatewayProcess, Key

pytestmark = pytest.mark.engine

PROMPT = "The capital of France is"
SAMPLING = {"max_tokens": 12, "temperature": 0}


@pytest.fixture
async def triton(engine_gateway: GatewayProcess) -> AsyncIterator[Any]:
    async with tritonclient.grpc.aio.InferenceServerClient(engine_gateway.grpc) as client:
        yield client


def asked(text: str, *, stream: bool, sampling: dict[str, Any]) -> list[Any]:
    given = {"text_input": [text], "stream": [stream], "sampling_parameters": [json.dumps(sampling)]}
    inputs = []
    for name, value in given.items():
        found = np.array(value, object if isinstance(value[0], str) else bool)
        inputs.append(tritonclient.grpc.InferInput(name, [1], "BYTES" if found.dtype == object else "BOOL"))
        inputs[-1].set_data_from_numpy(found)
    return inputs


def text(result: Any) -> str:
    return str(result.as_numpy("text_output")[0].decode())


def shown(key: Key) -> dict[str, str]:
    return {"authorization": f"Bearer {key.text}"}


async def test_texts_are_those_of_openai_s_door_streamed_or_not(engine_gateway: GatewayProcess, triton: Any) -> None:
    key = engine_gateway.issue()
    async with openai.AsyncOpenAI(base_url=engine_gateway.url, api_key=key.text) as client:
        answer = await client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=12, temperature=0)
    expected = answer.choices[0].text
    whole = await triton.infer(MODEL, asked(PROMPT, stream=False, sampling=SAMPLING), headers=shown(key))
    assert text(whole) == expected

    async def requests() -> AsyncIterator[dict[str, Any]]:
        yield {"model_name": MODEL, "inputs": asked(PROMPT, stream=True, sampling=SAMPLING)}

    parts = [result async for result, _ in triton.stream_infer(requests(), headers=shown(key))]
    assert len(parts) > 3
    assert "".join(text(part) for part in parts) == expected
    counted = {
        (it["tokens_in"], it["tokens_out"], it["estimated"]) for it in engine_gateway.records(key.tenant).values()
    }
    assert counted == {(answer.usage.prompt_tokens, answer.usage.completion_tokens, False)}  # type: ignore[union-attr]


async def test_a_stream_that_is_cancelled_sets_the_engine_free(engine_gateway: GatewayProcess, triton: Any) -> None:
    key = engine_gateway.issue()
    before = await until_free(engine_gateway)

    async def requests() -> AsyncIterator[dict[str, Any]]:
        sampling = {"max_tokens": 900, "ignore_eos": True}
        yield {"model_name": MODEL, "inputs": asked(PROMPT, stream=True, sampling=sampling)}

    stream = triton.stream_infer(requests(), headers=shown(key))
    await anext(aiter(stream))
    await until_busy(engine_gateway)
    stream.cancel()
    after = await until_free(engine_gateway)
    record = await engine_gateway.record(key)
    assert record["outcome"] == "cancelled"
    assert record["tokens_in"] == after[READ] - before[READ]
    assert record["tokens_out"] <= after[MADE] - before[MADE] < 200


async def test_a_classifier_answers_as_openai_s_door_does(engine_gateway: GatewayProcess, triton: Any) -> None:
    key, texts = engine_gateway.issue(), ["Where is my parcel?", "I was charged twice this month"]
    given = tritonclient.grpc.InferInput("text", [2], "BYTES")
    given.set_data_from_numpy(np.array(texts, object))
    result = await triton.infer("support-intent", [given], headers=shown(key))
    async with engine_gateway.client(key.text) as client:
        answer = await client.post("/v1/classify", json={"model": "support-intent", "input": texts})
    rows = answer.json()["data"]
    assert [label.decode() for label in result.as_numpy("label")[:, 0]] == [row["label"] for row in rows]
    np.testing.assert_allclose(result.as_numpy("scores"), [row["probs"] for row in rows], atol=1e-6)
