"""Models that read, on a real vLLM: an embedder and a classifier of random weights behind the doors that ONNX Runtime's
have too."""

from __future__ import annotations

import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from runtimes.environment import Environments
from tests.conftest import LISTEN
from tests.e2e.servers import ENGINE_START_S_MAX, GatewayProcess, Key

pytestmark = pytest.mark.engine

MODELS = """
[[models]]
name = "reader"
replicas = [{{ kind = "vllm", task = "embed", artifact = "{folder}/embedder" }}]
[[models]]
name = "judge"
replicas = [{{ kind = "vllm", task = "classify", artifact = "{folder}/classifier" }}]
"""

MAKE = """
import sys, torch
from pathlib import Path
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, BertModel, PreTrainedTokenizerFast

torch.manual_seed(0)
words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "refund", "card", "login", "my", "money"]
text = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
text.pre_tokenizer = pre_tokenizers.Whitespace()
text.post_processor = processors.TemplateProcessing(
    single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
)
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=text, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
    mask_token="[MASK]", model_max_length=128,
)
size = dict(
    vocab_size=len(words), hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128,
    max_position_embeddings=128,
)
labels = {0: "refund", 1: "card", 2: "login"}
names = {name: number for number, name in labels.items()}
for folder, model in {
    "embedder": BertModel(BertConfig(**size)),
    "classifier": BertForSequenceClassification(BertConfig(**size, num_labels=3, id2label=labels, label2id=names)),
}.items():
    model.eval().save_pretrained(Path(sys.argv[1]) / folder)
    tokenizer.save_pretrained(Path(sys.argv[1]) / folder)
"""


@pytest.fixture(scope="module")
def gateway(engine_state: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    folder = tmp_path_factory.mktemp("p")
    environments = Environments(engine_state)
    python = environments.folder(environments.find("train", None)) / "bin" / "python"
    subprocess.run([python, "-c", MAKE, folder], check=True, capture_output=True, timeout=120)
    gateway = GatewayProcess(folder, LISTEN + MODELS.format(folder=folder))
    gateway.state.mkdir(mode=0o700)
    for shared in ("engines", "cache"):
        (engine_state / shared).mkdir(exist_ok=True)
        (gateway.state / shared).symlink_to(engine_state / shared)
    gateway.start(start_s_max=ENGINE_START_S_MAX)
    yield gateway
    assert gateway.stop() == 0, gateway.text


@pytest.fixture(scope="module")
def key(gateway: GatewayProcess) -> Key:
    return gateway.issue()


@pytest.fixture
async def client(gateway: GatewayProcess, key: Key) -> AsyncIterator[httpx.AsyncClient]:
    async with gateway.client(key.text) as client:
        yield client


async def asked(client: httpx.AsyncClient, route: str, **body: Any) -> Any:
    answer = await client.post(route, json=body)
    assert answer.status_code == 200, answer.text
    return answer


async def test_an_embedder_answers_what_it_does_on_onnx(
    gateway: GatewayProcess, key: Key, client: httpx.AsyncClient
) -> None:
    with openai.OpenAI(base_url=gateway.url, api_key=key.text, max_retries=0) as sdk:
        vectors = sdk.embeddings.create(model="reader", input=["refund my money", "my card"])
    assert (len(vectors.data), len(vectors.data[0].embedding)) == (2, 64)
    documents = ["my card", "refund", "my money"]
    scored = await asked(client, "/v1/score", model="reader", text_1="refund", text_2=documents)
    ranked = await asked(client, "/v1/rerank", model="reader", query="refund", documents=documents, top_n=2)
    scores = [it["score"] for it in scored.json()["data"]]
    assert scores[1] == pytest.approx(1, abs=1e-4)
    best = ranked.json()["results"]
    assert (best[0]["index"], best[0]["document"]["text"], len(best)) == (1, "refund", 2)
    record = await gateway.record(key, ranked.headers["x-request-id"])
    assert record["tokens_in"] == ranked.json()["usage"]["prompt_tokens"]
    assert (record["items"], record["outcome"], record["estimated"]) == (4, "served", False)


async def test_a_classifier_answers_with_its_labels(
    gateway: GatewayProcess, key: Key, client: httpx.AsyncClient
) -> None:
    answer = await asked(client, "/v1/classify", model="judge", input=["refund my money", "my card"])
    data = answer.json()["data"]
    assert {it["label"] for it in data} <= {"refund", "card", "login"}
    assert [sum(it["probs"]) for it in data] == pytest.approx([1, 1], abs=1e-3)
    record = await gateway.record(key, answer.headers["x-request-id"])
    assert (record["items"], record["tokens_in"]) == (2, answer.json()["usage"]["prompt_tokens"])


@pytest.mark.parametrize(
    ("model", "route", "answers"),
    [
        ("reader", "/v1/chat/completions", "/v1/embeddings, /v1/rerank, /v1/score"),
        ("reader", "/v1/classify", "/v1/embeddings, /v1/rerank, /v1/score"),
        ("judge", "/v1/embeddings", "/v1/classify"),
        ("judge", "/v1/moderations", "/v1/classify"),
    ],
)
async def test_what_it_is_not_for_is_refused_with_what_it_is(
    client: httpx.AsyncClient, model: str, route: str, answers: str
) -> None:
    answer = await client.post(route, json={"model": model, "input": "x", "messages": []})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, "unsupported_route")
    assert f"answers {answers}, not {route}" in error["message"]


async def test_what_the_engine_refuses_keeps_its_status(client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/score", json={"model": "reader", "text_1": ["a", "b"], "text_2": ["a"]})
    assert answer.status_code == 400
