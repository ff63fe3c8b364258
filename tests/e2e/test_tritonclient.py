"""Triton's own clients, unmodified, in all four forms: they must not notice that they talk to Headrace."""

from __future__ import annotations

import asyncio
import inspect
import queue
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.grpc.aio
import tritonclient.http
import tritonclient.http.aio
from tritonclient.utils import InferenceServerException

from runtimes.artifact import Shelf
from tests import tiny
from tests.conftest import LISTEN
from tests.e2e.servers import GatewayProcess, Key

CONFIG = f"""{LISTEN}
[server.bounds]
body_bytes_max = 262144
[[models]]
name = "tiny"
replicas = [{{ kind = "onnx", artifact = "tiny@stable" }}]
[[models]]
name = "team/echo:1"
replicas = [{{ kind = "echo" }}]
[[models]]
name = "slow"
replicas = [{{ kind = "echo", token_s = 0.05 }}]
[[models]]
name = "down"
replicas = [{{ kind = "onnx", artifact = "nowhere@stable" }}]
"""
FORMS = (tritonclient.http, tritonclient.http.aio, tritonclient.grpc, tritonclient.grpc.aio)
TEXTS = ["refund my money please", "login"]
WORDS = "one two three"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    folder = tmp_path_factory.mktemp("t")
    (folder / "artifact").mkdir()
    gateway = GatewayProcess(folder, CONFIG)
    gateway.state.mkdir(mode=0o700)
    tiny.publish(Shelf(gateway.state / "shelf"), folder / "artifact")
    gateway.start("listening after")
    gateway.wait_for("replica tiny-0 is ready")
    yield gateway
    assert gateway.stop() == 0, gateway.text


@pytest.fixture(scope="module")
def caller(served: GatewayProcess) -> Key:
    return served.issue()


class Client:
    """One form of the client, called as if it were asyncio's, with the caller's key."""

    def __init__(self, form: Any, served: GatewayProcess, key: Key | None) -> None:
        self.form = form
        self.http = form in (tritonclient.http, tritonclient.http.aio)
        self.key = key
        self.raw = form.InferenceServerClient(served.address if self.http else served.grpc)

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.raw, name)

        async def call(*arguments: Any, **named: Any) -> Any:
            if self.key is not None:
                named["headers"] = {"authorization": f"Bearer {self.key.text}"}
            found = method(*arguments, **named)
            return await found if inspect.isawaitable(found) else found

        return call

    def input(self, name: str, found: Any, **how: Any) -> Any:
        """An array of str, as BYTES, or of anything else."""
        array = np.array(found, object if isinstance(np.array(found).flat[0], str) else None)
        given = self.form.InferInput(name, list(array.shape), _datatype(array))
        given.set_data_from_numpy(array, **how)
        return given


def _datatype(array: Any) -> str:
    return {"O": "BYTES", "b": "BOOL", "i": "INT64"}[array.dtype.kind]


@asynccontextmanager
async def client(form: Any, served: GatewayProcess, key: Key | None) -> AsyncIterator[Client]:
    found = Client(form, served, key)
    try:
        yield found
    finally:
        closed = found.raw.close()
        if inspect.isawaitable(closed):
            await closed


@pytest.fixture(params=FORMS, ids=lambda form: form.__name__.removeprefix("tritonclient."))
async def triton(request: pytest.FixtureRequest, served: GatewayProcess, caller: Key) -> AsyncIterator[Client]:
    async with client(request.param, served, caller) as found:
        yield found


@pytest.fixture(params=FORMS[2:], ids=lambda form: form.__name__.removeprefix("tritonclient."))
async def triton_grpc(request: pytest.FixtureRequest, served: GatewayProcess, caller: Key) -> AsyncIterator[Client]:
    async with client(request.param, served, caller) as found:
        yield found


def as_json(found: Any) -> Any:
    """An answer of either wire as JSON has it."""
    from google.protobuf.json_format import MessageToDict

    if isinstance(found, dict | list):
        return found
    return MessageToDict(found, preserving_proto_field_name=True)


# ---- what there is -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
async def test_health_needs_no_key(form: Any, served: GatewayProcess) -> None:
    async with client(form, served, None) as triton:
        assert await triton.is_server_live()
        assert not await triton.is_server_ready(), "one of its models is down"


async def test_a_model_is_ready_or_not(triton: Client) -> None:
    assert await triton.is_model_ready("tiny")
    assert await triton.is_model_ready("team/echo:1")
    assert not await triton.is_model_ready("down")
    assert not await triton.is_model_ready("nobody")


async def test_the_server_says_what_it_is(triton: Client) -> None:
    found = as_json(await triton.get_server_metadata())
    assert found["name"] == "headrace"
    assert found["version"]
    assert "binary_tensor_data" in found["extensions"]


async def test_a_model_s_metadata_say_what_it_takes_and_gives(triton: Client) -> None:
    found = as_json(await triton.get_model_metadata("tiny"))
    inputs = {it["name"]: (it["datatype"], [*map(int, it["shape"])]) for it in found["inputs"]}
    outputs = {it["name"]: (it["datatype"], [*map(int, it["shape"])]) for it in found["outputs"]}
    assert inputs["text"] == ("BYTES", [-1, 1])
    assert inputs["input_ids"] == ("INT64", [-1, -1])
    assert outputs["scores"] == ("FP32", [-1, 3])
    assert outputs["label"] == ("BYTES", [-1, 1])
    assert (found["platform"], len(found["versions"])) == ("onnxruntime_onnx", 1)


async def test_a_generator_s_metadata_are_those_of_triton_s_backends(triton: Client) -> None:
    found = as_json(await triton.get_model_metadata("team/echo:1"))
    assert found["inputs"][0]["name"] == "text_input"
    assert [it["name"] for it in found["outputs"]] == ["text_output"]


@pytest.mark.parametrize(("model", "decoupled"), [("tiny", False), ("slow", True)])
async def test_a_model_s_configuration_is_read(triton: Client, model: str, decoupled: bool) -> None:
    found = as_json(await triton.get_model_config(model))
    config = found.get("config", found)
    assert config["name"] == model
    assert config["model_transaction_policy"].get("decoupled", False) is decoupled
    kinds = {it["name"]: it["data_type"] for it in [*config["input"], *config["output"]]}
    assert "TYPE_STRING" in kinds.values()
    needed = {it["name"] for it in config["input"] if not it.get("optional")}
    assert needed == ({"text_input"} if decoupled else set()), "text or token ids, neither alone"


async def test_the_index_holds_what_the_key_may_use(triton: Client, served: GatewayProcess) -> None:
    found = as_json(await triton.get_model_repository_index())
    models = {it["name"]: it["state"] for it in (found if isinstance(found, list) else found["models"])}
    assert models == {"tiny": "READY", "team/echo:1": "READY", "slow": "READY", "down": "UNAVAILABLE"}
    narrow = served.issue(models=["slow"])
    async with client(triton.form, served, narrow) as other:
        found = as_json(await other.get_model_repository_index())
        assert [it["name"] for it in (found if isinstance(found, list) else found["models"])] == ["slow"]


async def test_statistics_count_texts_and_batches(triton: Client) -> None:
    async def counted() -> tuple[int, int, set[int]]:
        found = as_json(await triton.get_inference_statistics("tiny"))
        (stats,) = found["model_stats"]
        computed = {
            int(stats["inference_stats"][f"compute_{it}"].get("count", 0)) for it in ("input", "infer", "output")
        }
        return int(stats.get("inference_count", 0)), int(stats.get("execution_count", 0)), computed

    rows, batches, computed = await counted()
    await triton.infer("tiny", [triton.input("text", TEXTS[:1] * 40)])
    rows_after, batches_after, computed_after = await counted()
    assert (rows_after, computed_after) == (rows + 40, {it + 1 for it in computed})
    assert batches_after - batches in range(2, 40)


async def test_no_model_is_loaded_by_a_client(triton: Client) -> None:
    for ask in (triton.load_model, triton.unload_model):
        with pytest.raises(InferenceServerException, match="configuration"):
            await ask("tiny")


# ---- classifiers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("texts", [TEXTS, [[text] for text in TEXTS]], ids=["list", "column"])
async def test_texts_get_scores_and_labels(triton: Client, texts: Any) -> None:
    result = await triton.infer("tiny", [triton.input("text", texts)], request_id="7")
    assert result.as_numpy("scores").shape == (2, 3)
    assert result.as_numpy("scores").dtype == np.float32
    assert [*map(_text, result.as_numpy("label")[:, 0])] == ["refund", "login"]
    response = as_json(result.get_response())
    assert (response["id"], response["model_name"]) == ("7", "tiny")


async def test_token_ids_get_the_same_scores(triton: Client) -> None:
    ids = [[2, 4, 8, 10, 7, 3]]
    by_ids = await triton.infer("tiny", [triton.input("input_ids", ids), triton.input("attention_mask", [[1] * 6])])
    by_text = await triton.infer("tiny", [triton.input("text", TEXTS[:1])])
    np.testing.assert_allclose(by_ids.as_numpy("scores"), by_text.as_numpy("scores"), atol=1e-6)


async def test_only_the_outputs_that_are_asked_for_come(triton: Client) -> None:
    wanted = [triton.form.InferRequestedOutput("label")]
    result = await triton.infer("tiny", [triton.input("text", TEXTS)], outputs=wanted)
    assert [it["name"] for it in as_json(result.get_response())["outputs"]] == ["label"]
    assert result.as_numpy("scores") is None


async def test_a_version_is_the_artifact_s_or_the_first(triton: Client) -> None:
    (version,) = as_json(await triton.get_model_metadata("tiny"))["versions"]
    for named in (version, "1", ""):
        result = await triton.infer("tiny", [triton.input("text", TEXTS)], model_version=named)
        assert as_json(result.get_response())["model_version"] == version
    with pytest.raises(InferenceServerException, match="no version 'other'"):
        await triton.infer("tiny", [triton.input("text", TEXTS)], model_version="other")


@pytest.mark.parametrize("form", FORMS[:2], ids=lambda form: form.__name__)
@pytest.mark.parametrize("coding", ["gzip", "deflate"])
@pytest.mark.parametrize("binary", [True, False])
async def test_bodies_are_compressed_both_ways(
    form: Any, coding: str, binary: bool, served: GatewayProcess, caller: Key
) -> None:
    async with client(form, served, caller) as triton:
        result = await triton.infer(
            "tiny",
            [triton.input("text", TEXTS * 100, binary_data=binary)],
            outputs=[form.InferRequestedOutput(name, binary_data=binary) for name in ("scores", "label")],
            request_compression_algorithm=coding,
            response_compression_algorithm=coding,
        )
        assert [*map(_text, result.as_numpy("label")[:, 0])] == ["refund", "login"] * 100
        assert result.as_numpy("scores").shape == (200, 3)


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
async def test_messages_are_compressed(triton_grpc: Client, coding: str) -> None:
    result = await triton_grpc.infer("tiny", [triton_grpc.input("text", TEXTS * 100)], compression_algorithm=coding)
    assert len(result.as_numpy("label")) == 200


async def test_a_call_is_on_record_as_any_other(triton: Client, served: GatewayProcess) -> None:
    key = served.issue()
    async with client(triton.form, served, key) as other:
        await other.infer("tiny", [other.input("text", TEXTS)])
    record = await served.record(key)
    assert (record["route"], record["model"], record["outcome"]) == ("/v2/infer", "tiny", "served")
    assert record["tokens_in"] > 0


def _text(label: Any) -> str:
    return label.decode() if isinstance(label, bytes) else str(label)


# ---- what is refused ---------------------------------------------------------------------------------------

WRONG = {
    "no key": ("401", "StatusCode.UNAUTHENTICATED", "key"),
    "an unknown model": ("404", "StatusCode.NOT_FOUND", "does not exist"),
    "a model the key may not use": ("403", "StatusCode.PERMISSION_DENIED", "may not use"),
    "a model that is down": ("503", "StatusCode.UNAVAILABLE", "down-0"),
    "an unknown input": ("400", "StatusCode.INVALID_ARGUMENT", "`nobody`"),
    "a wrong datatype": ("400", "StatusCode.INVALID_ARGUMENT", "`text` is INT64"),
    "a body too large": ("413", "StatusCode.RESOURCE_EXHAUSTED", "arger"),
}


@pytest.mark.parametrize("what", WRONG)
async def test_a_refusal_has_the_protocol_s_own_shape(
    triton: Client, served: GatewayProcess, caller: Key, what: str
) -> None:
    status, code, says = WRONG[what]
    key = {"no key": None, "a model the key may not use": served.issue(models=["slow"])}.get(what, caller)
    model = {"an unknown model": "nobody", "a model that is down": "down"}.get(what, "tiny")
    async with client(triton.form, served, key) as other:
        inputs = [
            other.input("nobody", TEXTS)
            if what == "an unknown input"
            else other.input(
                "text", [1, 2] if what == "a wrong datatype" else ["x" * 2**19 if "large" in what else "x"]
            )
        ]
        with pytest.raises(InferenceServerException) as refused:
            await other.infer(model, inputs)
    assert says in str(refused.value.message())
    assert refused.value.status() == (status if triton.http else code)


async def test_what_was_refused_leaves_the_server_well(triton: Client) -> None:
    with pytest.raises(InferenceServerException):
        await triton.infer("tiny", [triton.input("input_ids", [[1, 99]]), triton.input("attention_mask", [[1, 1]])])
    assert len((await triton.infer("tiny", [triton.input("text", TEXTS)])).as_numpy("label")) == 2


# ---- generators --------------------------------------------------------------------------------------------


async def test_a_generator_is_asked_in_one_piece(triton: Client) -> None:
    inputs = [triton.input("text_input", [WORDS])]
    result = await triton.infer("team/echo:1", inputs, parameters={"max_tokens": 2})
    assert [*map(_text, result.as_numpy("text_output"))] == ["one two"]


async def test_a_generation_is_streamed_over_grpc(triton_grpc: Client, served: GatewayProcess) -> None:
    key = served.issue()
    async with client(triton_grpc.form, served, key) as triton:
        inputs = [triton.input("text_input", [[WORDS]]), triton.input("stream", [[True]])]
        answers = await streamed(triton, "slow", [(inputs, "7")])
    texts = [_text(it.as_numpy("text_output")[0]) for it in answers]
    finals = [it.get_response().parameters["triton_final_response"].bool_param for it in answers]
    assert "".join(texts) == WORDS
    assert len(texts) >= 3
    assert finals == [False] * (len(texts) - 1) + [True]
    assert {it.get_response().id for it in answers} == {"7"}
    record = await served.record(key)
    assert (record["route"], record["outcome"], record["tokens_out"]) == ("/v1/completions", "served", 3)


async def test_a_stream_outlives_what_is_wrong_with_one_of_its_requests(triton_grpc: Client) -> None:
    sound = [triton_grpc.input("text", TEXTS)]
    wrong = [triton_grpc.input("nobody", TEXTS)]
    first, fault, last = await streamed(triton_grpc, "tiny", [(sound, "1"), (wrong, "2"), (sound, "3")])
    assert (first.get_response().id, last.get_response().id) == ("1", "3")
    assert first.get_response().parameters["triton_final_response"].bool_param
    assert "`nobody`" in str(fault)


async def streamed(triton: Client, model: str, asked: list[tuple[list[Any], str]]) -> list[Any]:
    """All that comes back on one stream: results, and faults, up to the last request's end."""
    headers = {"authorization": f"Bearer {triton.key.text}"} if triton.key else {}
    found: list[Any] = []

    def take(result: Any, error: Any) -> bool:
        """Whether it is some request's last."""
        found.append(error or result)
        return error is not None or result.get_response().parameters["triton_final_response"].bool_param

    left = len(asked)
    if triton.form is tritonclient.grpc:
        arrived: queue.Queue[tuple[Any, Any]] = queue.Queue()
        triton.raw.start_stream(lambda result, error: arrived.put((result, error)), headers=headers)
        for inputs, id in asked:
            triton.raw.async_stream_infer(model, inputs, request_id=id)
        while left:
            left -= take(*await asyncio.to_thread(arrived.get, timeout=20))
        triton.raw.stop_stream()
        return found

    async def ask() -> AsyncIterator[dict[str, Any]]:
        for inputs, id in asked:
            yield {"model_name": model, "inputs": inputs, "request_id": id}

    async with asyncio.timeout(20):
        async for result, error in triton.raw.stream_infer(ask(), headers=headers):
            left -= take(result, error)
    assert not left
    return found


# ---- leaving early -----------------------------------------------------------------------------------------


async def test_a_cancelled_stream_frees_the_engine(served: GatewayProcess) -> None:
    key = served.issue()
    async with client(tritonclient.grpc.aio, served, key) as triton:
        inputs = [triton.input("text_input", ["word " * 1000]), triton.input("stream", [True])]

        async def ask() -> AsyncIterator[dict[str, Any]]:
            yield {"model_name": "slow", "inputs": inputs}

        stream = triton.raw.stream_infer(ask(), headers={"authorization": f"Bearer {key.text}"})
        await anext(aiter(stream))
        stream.cancel()
    record = await served.record(key)
    assert (record["outcome"], record["code"]) == ("cancelled", "client_left")
    assert 1 <= record["tokens_out"] < 100
    assert await served.running("slow") == 0


@pytest.mark.parametrize("form", FORMS[2:], ids=lambda form: form.__name__)
async def test_a_deadline_ends_the_call_on_both_sides(form: Any, served: GatewayProcess) -> None:
    key = served.issue()
    async with client(form, served, key) as triton:
        with pytest.raises(InferenceServerException, match=r"Deadline Exceeded|time"):
            await triton.infer("slow", [triton.input("text_input", ["word " * 1000])], client_timeout=0.5)
    record = await served.record(key)
    assert record["code"] in ("client_left", "deadline_exceeded"), "whoever looked at the clock first"
    assert await served.running("slow") == 0
