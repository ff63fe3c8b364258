"""Budgets as operators and clients see them: real processes, one or several, stopped, killed and started again."""

from __future__ import annotations

import os
import re
import signal
from collections import Counter
from collections.abc import Iterator

import grpc
import openai
import pytest
from tritonclient.grpc import InferenceServerClient, InferenceServerException, InferInput

from gateway.money import NANO_A_UNIT
from runtimes.artifact import Shelf
from tests import tiny
from tests.e2e.servers import GatewayProcess, Key, processes_of
from tests.e2e.test_refusals import CHAT, require_refusal
from tests.e2e.test_workers import at_once, statuses, until_workers

CONFIG = """
[server]
listen = "127.0.0.1:0"
grpc = "127.0.0.1:0"
admin = "127.0.0.1:0"
workers = {workers}
[money]
currency = "EUR"
[[models]]
name = "llm"
replicas = [{{ kind = "echo" }}]
price = {{ million_tokens_in = 1000, million_tokens_out = 4000 }}
[[models]]
name = "fee"
replicas = [{{ kind = "echo" }}]
price = {{ call = 1 }}
[[models]]
name = "free"
replicas = [{{ kind = "echo" }}]
[[models]]
name = "tiny"
replicas = [{{ kind = "onnx", artifact = "tiny@stable" }}]
price = {{ thousand_items = 1000 }}
"""
WORKERS = 3
FEE = {"model": "fee", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 1}


@pytest.fixture(scope="module", params=[1, WORKERS], ids=["one process", "several"])
def gateway(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    """One that every test leaves as it was, but for its tenants."""
    folder = tmp_path_factory.mktemp("b")
    gateway = GatewayProcess(folder, CONFIG.format(workers=request.param))
    (folder / "tiny").mkdir()
    tiny.publish(Shelf(gateway.state / "shelf"), folder / "tiny")
    gateway.start()
    yield gateway
    assert gateway.stop() == 0, gateway.text
    assert processes_of({gateway.pid}) == {}


def of(units: float) -> dict[str, int]:
    return {"budget_month_nano": int(units * NANO_A_UNIT)}


async def answers(gateway: GatewayProcess, key: Key, count: int) -> dict[int, int]:
    return statuses(await at_once(gateway, key, count, FEE))


async def test_of_a_hundred_at_once_exactly_the_budget_is_served_before_and_after_a_restart(
    gateway: GatewayProcess,
) -> None:
    key = gateway.issue(limits=of(10))
    assert await answers(gateway, key, 100) == {200: 10, 429: 90}
    assert gateway.stop() == 0
    as_it_was = gateway.config.read_text()
    gateway.config.write_text(as_it_was.replace("call = 1", "call = 2"))
    gateway.start()
    assert await answers(gateway, key, 20) == {429: 20}
    gateway.command("tenant", "set", key.tenant, "--budget-month", "15")
    gateway.until_looked()
    assert await answers(gateway, key, 20) == {200: 2, 429: 18}
    costs = Counter(row["cost_nano"] // NANO_A_UNIT for row in gateway.records(key.tenant).values())
    assert costs == {0: 128, 1: 10, 2: 2}, "what is on record keeps its cost when prices change"
    assert gateway.stop() == 0
    gateway.config.write_text(as_it_was)
    gateway.start()


async def test_what_a_killed_gateway_had_served_stays_spent(gateway: GatewayProcess) -> None:
    key = gateway.issue(limits=of(10))
    assert await answers(gateway, key, 7) == {200: 7}
    gateway.kill()
    gateway.start()
    assert await answers(gateway, key, 20) == {200: 3, 429: 17}


async def test_a_key_has_a_budget_of_its_own_within_its_tenants(gateway: GatewayProcess) -> None:
    key = gateway.issue(limits=of(10), key_limits=of(4))
    assert await answers(gateway, key, 20) == {200: 4, 429: 16}


async def test_sdks_are_told_what_is_spent_and_do_not_try_again(gateway: GatewayProcess) -> None:
    key = gateway.issue(limits=of(2))
    assert await answers(gateway, key, 2) == {200: 2}
    async with openai.AsyncOpenAI(base_url=gateway.url, api_key=key.text, max_retries=3) as client:
        with pytest.raises(openai.RateLimitError, match=r"has spent 2\.00 of its budget of 2\.00 EUR a month") as found:
            await client.chat.completions.create(**FEE)  # type: ignore[call-overload]
    refused = found.value.response
    require_refusal(refused.status_code, refused.headers, refused.content, expected=429, code="insufficient_quota")
    assert found.value.code == found.value.type == "insufficient_quota"
    assert int(refused.headers["retry-after"]) <= 31 * 86_400
    outcomes = [row["outcome"] for row in gateway.records(key.tenant).values()]
    assert outcomes.count("refused") == 1, "an SDK that tries again would be refused again"


async def test_a_classifiers_rows_are_charged_whichever_door_they_come_through(gateway: GatewayProcess) -> None:
    key = gateway.issue(limits=of(20))
    async with gateway.client(key.text) as client:
        answer = await client.post("/v1/classify", json={"model": "tiny", "input": ["refund", "card", "login"]})
        assert answer.status_code == 200, answer.text
    texts = InferInput("text", [17], "BYTES")
    texts.set_data_from_numpy(tiny_texts(17))
    with InferenceServerClient(gateway.grpc) as triton:
        headers = {"authorization": f"Bearer {key.text}"}
        triton.infer("tiny", [texts], headers=headers)
        with pytest.raises(InferenceServerException, match=r"has spent 20\.00 of its budget of 20\.00 EUR") as found:
            triton.infer("tiny", [texts], headers=headers)
    assert found.value.status() == str(grpc.StatusCode.RESOURCE_EXHAUSTED)
    costs = sorted(row["cost_nano"] for row in gateway.records(key.tenant).values())
    assert costs == [0, 3 * NANO_A_UNIT, 17 * NANO_A_UNIT]


async def test_operators_see_what_was_spent_by_whom_on_what_and_when(gateway: GatewayProcess) -> None:
    key = gateway.issue()
    async with gateway.client(key.text) as client:
        used = [
            (await client.post(CHAT, json=FEE | {"model": "llm", "max_tokens": 5})).json()["usage"] for _ in range(3)
        ]
        assert (await client.post(CHAT, json=FEE | {"model": "free"})).status_code == 200
    cost_nano = sum(it["prompt_tokens"] * 1_000_000 + it["completion_tokens"] * 4_000_000 for it in used)
    assert cost_nano
    for by, names in (("tenant", [key.tenant]), ("key", [key.id]), ("model", ["free", "llm"]), ("day", None)):
        totals = gateway.command("usage", "--tenant", key.tenant, "--by", by)
        assert sum(it["cost_nano"] for it in totals) == cost_nano
        assert names in (None, [it["name"] for it in totals])
    [tenant] = [it for it in gateway.command("tenant", "list") if it["name"] == key.tenant]
    assert tenant["spent_month_nano"] == cost_nano
    with gateway.admin_client() as admin:
        metrics = admin.get("/metrics").text
    found = re.search(r'^headrace_cost_total\{currency="EUR",model="llm"\} (\S+)$', metrics, re.MULTILINE)
    assert found
    assert float(found[1]) == pytest.approx(cost_nano / NANO_A_UNIT)


@pytest.mark.parametrize("gateway", [WORKERS], indirect=True)
async def test_a_killed_worker_takes_nothing_of_a_budget_with_it(gateway: GatewayProcess) -> None:
    key = gateway.issue(limits=of(10))
    assert await answers(gateway, key, 6) == {200: 6}
    victim = gateway.workers[0]
    os.kill(victim, signal.SIGKILL)
    await until_workers(gateway, without=victim, count=WORKERS)
    assert await answers(gateway, key, 20) == {200: 4, 429: 16}


def tiny_texts(count: int) -> object:
    import numpy as np

    return np.array([b"refund"] * count, object)
