"""The quantized classifier through the gateway: sensible on sentences it has never seen, alike in any batch."""

from __future__ import annotations

from typing import Any

import pytest

from tests.e2e.servers import GatewayProcess, Key

pytestmark = pytest.mark.engine

UTTERANCES = {
    "I forgot my password and the reset mail never comes": "account_access",
    "please stop the order I placed ten minutes ago": "cancel_order",
    "I moved house, ship it to my new flat instead": "change_address",
    "has the courier picked up my parcel yet?": "order_status",
    "my card was charged twice for one purchase": "payment_problem",
    "the jacket does not fit, I would like to send it back": "return_refund",
    "can I speak with a real person please": "talk_to_human",
    "the app crashes each time I open it": "technical_problem",
}


async def classify(gateway: GatewayProcess, key: Key, given: Any) -> Any:
    async with gateway.client(key.text) as client:
        answer = await client.post("/v1/classify", json={"model": "support-intent", "input": given})
    assert answer.status_code == 200, answer.text
    return answer.json()


async def test_unseen_utterances_get_sensible_labels(engine_gateway: GatewayProcess, engine_key: Key) -> None:
    found = await classify(engine_gateway, engine_key, list(UTTERANCES))
    labels = [item["label"] for item in found["data"]]
    right = sum(label == expected for label, expected in zip(labels, UTTERANCES.values(), strict=True))
    assert right >= len(UTTERANCES) - 1, dict(zip(UTTERANCES, labels, strict=True))


async def test_the_scores_are_probabilities_by_name(engine_gateway: GatewayProcess, engine_key: Key) -> None:
    (item,) = (await classify(engine_gateway, engine_key, "where is my order"))["data"]
    assert sum(item["scores"].values()) == pytest.approx(1, abs=1e-3)
    assert list(item["scores"].values()) == item["probs"]
    assert max(item["scores"], key=item["scores"].get) == item["label"] == "order_status"
    assert item["num_classes"] == len(item["scores"]) >= 8


async def test_a_batch_says_what_single_calls_say(engine_gateway: GatewayProcess, engine_key: Key) -> None:
    batch = await classify(engine_gateway, engine_key, list(UTTERANCES))
    singles = [await classify(engine_gateway, engine_key, text) for text in UTTERANCES]
    for one, other in zip((single["data"][0] for single in singles), batch["data"], strict=True):
        assert one["label"] == other["label"]
        assert one["probs"] == pytest.approx(other["probs"], abs=1e-5)
    assert batch["usage"]["prompt_tokens"] == sum(single["usage"]["prompt_tokens"] for single in singles)


@pytest.mark.parametrize("given", [[], {"text": "x"}, 5, None, ["a", 5], [[1, "a"]]])
async def test_an_input_that_is_none_is_a_400_naming_it(
    engine_gateway: GatewayProcess, engine_key: Key, given: Any
) -> None:
    async with engine_gateway.client(engine_key.text) as client:
        answer = await client.post("/v1/classify", json={"model": "support-intent", "input": given})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"].startswith("input")
