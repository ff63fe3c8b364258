"""The Open Inference Protocol over HTTP, through the door as it is served."""

from __future__ import annotations

import asyncio
import gzip
import json
import socket
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway.edge.coding import MEMBERS_MAX
from gateway.edge.kserve import KServe
from gateway.edge.schema import OIP
from gateway.edge.server import Server
from runtimes.contract import Broken, Failed
from tests.fakes import Stages, let_stand
from tests.gateway.oip import BOUNDS, chunk, parts

INFER = {"inputs": [{"name": "text", "datatype": "BYTES", "shape": [1], "data": ["hello"]}]}


class Site:
    def __init__(self, stages: Stages, client: httpx.AsyncClient) -> None:
        self.stages = stages
        self.client = client

    async def get(self, path: str, key: str | None = "good") -> httpx.Response:
        return await self.client.get(f"/v2{path}", headers=_headers(key))

    async def post(self, path: str, body: Any, key: str | None = "good", **headers: str) -> httpx.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return await self.client.post(f"/v2{path}", content=content, headers=_headers(key) | named)


def _headers(key: str | None) -> dict[str, str]:
    return {"accept-encoding": "identity"} | ({} if key is None else {"authorization": f"Bearer {key}"})


@asynccontextmanager
async def open_site(folder: Path, *frames: Any) -> AsyncIterator[Site]:
    async with parts(folder, *frames) as found:
        server = Server(door=KServe(**found.given), bounds=BOUNDS, clock=found.given["clock"])
        with socket.create_server(("127.0.0.1", 0)) as listening:
            address = f"http://127.0.0.1:{listening.getsockname()[1]}"
            async with server.serving(listening), httpx.AsyncClient(base_url=address, trust_env=False) as client:
                yield Site(found.stages, client)


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with open_site(tmp_path) as found:
        yield found


def refused(response: httpx.Response, status: int, says: str = "") -> None:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error = response.json()
    assert error.keys() == {"error"}
    assert says in error["error"]
    assert response.headers["x-should-retry"] in ("true", "false")


# ---- what there is -----------------------------------------------------------------------------------------


async def test_health_is_told_to_everybody_and_nothing_else_is(site: Site) -> None:
    for path in ("/health/live", "/health/ready"):
        assert (await site.get(path, key=None)).status_code == 200
    for path in ("", "/models/llm", "/models/llm/ready", "/models/llm/config", "/models/stats", "/nothing"):
        refused(await site.get(path, key=None), 401)
    for path in ("/repository/index", "/models/llm/infer", "/models/llm/generate", "/repository/models/llm/load"):
        refused(await site.post(path, {}, key=None), 401)


@pytest.mark.parametrize("path", OIP)
async def test_whatever_is_documented_is_here(site: Site, path: str) -> None:
    method, _ = OIP[path]
    for versioned in (path, path.replace("{model}", "{model}/versions/1")):
        answer = await site.client.request(method, versioned.replace("{model}", "llm"), headers=_headers("good"))
        assert answer.status_code in (200, 400), answer.text


async def test_a_gateway_about_to_stop_is_not_ready(site: Site) -> None:
    site.stages.pipeline.leaving = True
    assert (await site.get("/health/ready", key=None)).status_code == 503
    assert (await site.get("/health/live", key=None)).status_code == 200


@pytest.mark.parametrize("path", ["/models/team/llm:1", "/models/team%2Fllm%3A1", "/models/team/llm:1/versions/1"])
async def test_a_name_may_hold_a_slash_however_it_is_quoted(site: Site, path: str) -> None:
    assert (await site.get(path)).json()["name"] == "team/llm:1"
    assert (await site.get(f"{path}/ready")).status_code == 200
    answer = await site.post(f"{path}/generate", {"text_input": "hi"})
    assert answer.json() == {"model_name": "team/llm:1", "model_version": "1", "text_output": "hello"}


async def test_a_model_that_the_key_may_not_use_is_told_nothing_of(site: Site) -> None:
    for path in ("", "/config", "/ready", "/stats"):
        refused(await site.get(f"/models/classifier{path}", key="narrow"), 403)
        refused(await site.get(f"/models/nobody{path}", key="narrow"), 404, "This key may use: llm.")
    index = (await site.post("/repository/index", b"", key="narrow")).json()
    assert [it["name"] for it in index] == ["llm"]
    stats = (await site.get("/models/stats", key="narrow")).json()["model_stats"]
    assert [it["name"] for it in stats] == ["llm"]


async def test_statistics_say_when_a_model_was_last_asked_and_how_long_it_computed(site: Site) -> None:
    before = (await site.get("/models/classifier/stats")).json()["model_stats"][0]
    assert (before["last_inference"], before["inference_stats"]["compute_infer"]) == (0, {"count": 0, "ns": 0})
    for _ in range(2):
        await site.post("/models/classifier/infer", INFER)
    *_, last = await site.stages.records()
    after = (await site.get("/models/classifier/stats")).json()["model_stats"][0]
    assert after["last_inference"] == int(last.at_s * 1000)
    assert after["inference_stats"]["compute_infer"] == {"count": 2, "ns": 500_000_000}
    # What Triton's perf_analyzer wants, and ends without: a number for a version, and counts that are the same.
    assert after["version"].isdigit()
    assert (after["inference_count"], after["inference_stats"]["fail"]) == (2, {"count": 0, "ns": 0})
    await site.post("/models/broken/infer", INFER)
    failed = (await site.get("/models/broken/stats")).json()["model_stats"][0]
    assert (failed["inference_count"], failed["inference_stats"]["success"]) == (0, {"count": 0, "ns": 0})
    assert failed["inference_stats"]["fail"]["ns"] > 0
    assert {after["inference_stats"][f"compute_{it}"]["count"] for it in ("input", "infer", "output")} == {2}


async def test_an_unknown_version_is_a_404(site: Site) -> None:
    refused(await site.get("/models/classifier/versions/9"), 404, "no version '9'")
    refused(await site.post("/models/classifier/versions/9/infer", INFER), 404, "no version '9'")
    refused(await site.post("/models/llm/versions/9/generate", {"text_input": "hi"}), 404, "no version '9'")


async def test_versions_that_are_models_of_their_own_are_asked_for_by_number(site: Site) -> None:
    predictor: Any = site.stages.replicas["classifier"][0].runtime
    predictor.version, predictor.versions = "10", ("2", "10")
    assert (await site.get("/models/classifier")).json()["versions"] == ["2", "10"]
    refused(await site.post("/models/classifier/versions/1/infer", INFER), 404, "no version '1'; it has 2, 10")
    for path, version in (("", ""), ("/versions/2", "2")):
        answer = await site.post(f"/models/classifier{path}/infer", INFER)
        assert (answer.status_code, predictor.got.version) == (200, version)
    let_stand(site.stages, "either", {"classifier": 1})
    await site.post("/models/either/versions/1/infer", INFER)
    assert predictor.got.version == "", "of an alias's models none is the caller's to choose"


async def test_a_model_that_fails_says_why_and_is_not_to_be_asked_again(site: Site) -> None:
    broken: Any = site.stages.replicas["broken"][0].runtime
    broken._answer = Failed("broken-0: its server failed (INTERNAL)", "there is no such voice")
    answer = await site.post("/models/broken/infer", INFER)
    refused(answer, 502, "there is no such voice")
    assert answer.headers["x-should-retry"] == "false"


async def test_an_alias_is_told_of_as_its_first_model_that_is_up(site: Site) -> None:
    let_stand(site.stages, "either", {"llm": 0, "classifier": 9, "broken": 1})
    told, model = [(await site.get(f"/models/{name}")).json() for name in ("either", "classifier")]
    assert told == model | {"name": "either"}
    assert (await site.get("/models/either/ready")).status_code == 200
    assert (await site.get("/models/either/config")).json()["name"] == "either"
    stats = (await site.get("/models/either/stats")).json()["model_stats"]
    assert [it["name"] for it in stats] == ["classifier", "broken"]
    index = (await site.post("/repository/index", b"")).json()
    assert {"name": "either", "version": "1", "state": "READY", "reason": ""} in index


async def test_an_alias_has_no_versions_of_its_own(site: Site) -> None:
    predictor: Any = site.stages.replicas["classifier"][0].runtime
    predictor.version = "7"
    let_stand(site.stages, "either", {"classifier": 1})
    assert (await site.get("/models/either/versions/1")).json()["versions"] == ["1"]
    refused(await site.post("/models/either/versions/7/infer", INFER), 404, "no version '7'")
    answer = (await site.post("/models/either/infer", INFER)).json()
    assert (answer["model_name"], answer["model_version"]) == ("classifier", "7")


async def test_an_alias_of_a_generator_generates(site: Site) -> None:
    let_stand(site.stages, "writer", {"team/llm:1": 1})
    answer = (await site.post("/models/writer/generate", {"text_input": "hi"})).json()
    assert answer == {"model_name": "team/llm:1", "model_version": "1", "text_output": "hello"}
    let_stand(site.stages, "writer", {"llm": 1})
    events = said(await site.post("/models/writer/generate_stream", {"text_input": "hi"}))
    assert {it["model_name"] for it in events} == {"llm"}
    let_stand(site.stages, "writer", {"classifier": 1})
    refused(await site.post("/models/writer/generate", {"text_input": "hi"}), 400, "does not generate")


async def test_of_an_alias_of_both_kinds_each_gets_what_it_understands(site: Site) -> None:
    let_stand(site.stages, "all", {"team/llm:1": 1, "classifier": 1})
    for _ in range(20):
        assert (await site.post("/models/all/infer", INFER)).json()["model_name"] == "classifier"
        assert (await site.post("/models/all/generate", {"text_input": "hi"})).json()["model_name"] == "team/llm:1"
        prompt = {"inputs": [INFER["inputs"][0] | {"name": "text_input"}]}
        assert (await site.post("/models/all/infer", prompt)).json()["model_name"] == "team/llm:1"


@pytest.mark.parametrize(("method", "path"), [("GET", "/models/llm/infer"), ("POST", "/models/llm"), ("PUT", "")])
async def test_a_wrong_method_is_told_the_right_one(site: Site, method: str, path: str) -> None:
    response = await site.client.request(method, f"/v2{path}", headers=_headers("good"))
    refused(response, 405)
    assert response.headers["allow"] == ("POST" if method == "GET" else "GET")


async def test_models_are_not_controlled_from_here(site: Site) -> None:
    for what in ("load", "unload"):
        refused(await site.post(f"/repository/models/llm/{what}", {}), 403, "configuration")


UNSERVED = {
    "/trace/setting": "Traces are not set from here",
    "/models/team/llm:1/trace/setting": "Traces are not set from here",
    "/models/nobody/versions/1/trace/setting": "Traces are not set from here",
    "/logging": "Logging is not set from here",
    "/systemsharedmemory/status": "Shared memory is not served",
    "/systemsharedmemory/region/a/register": "Shared memory is not served",
    "/cudasharedmemory/unregister": "Shared memory is not served",
    "/models/llm/versions": "Behind /versions/ goes a version",
    "/models/team/llm:1/versions/": "Behind /versions/ goes a version",
    "/trace": "nothing of the Open Inference Protocol",
}


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("path", UNSERVED)
async def test_what_triton_has_and_is_not_served_is_told_as_such(site: Site, path: str, method: str) -> None:
    refused(await site.client.request(method, f"/v2{path}", headers=_headers("good")), 404, UNSERVED[path])
    refused(await site.client.request(method, f"/v2{path}", headers=_headers(None)), 401)


async def test_a_model_whose_name_ends_like_what_is_not_served_is_asked_with_its_slashes_quoted(site: Site) -> None:
    for name in ("a/trace/setting", "a/versions", "a/infer"):
        let_stand(site.stages, name, {"classifier": 1})
        quoted = name.replace("/", "%2F")
        assert (await site.get(f"/models/{quoted}")).json()["name"] == name
        assert (await site.post(f"/models/{quoted}/infer", INFER)).status_code == 200


# ---- inference ---------------------------------------------------------------------------------------------


async def test_scores_come_as_json_or_behind_it(site: Site) -> None:
    answer = await site.post("/models/classifier/infer", INFER | {"id": "7"})
    assert answer.json() == {
        "id": "7",
        "model_name": "classifier",
        "model_version": "1",
        "outputs": [{"name": "scores", "datatype": "FP32", "shape": [1, 2], "data": [0.25, 0.75]}],
    }
    answer = await site.post("/models/classifier/infer", INFER | {"parameters": {"binary_data_output": True}})
    json_bytes = int(answer.headers["inference-header-content-length"])
    assert answer.content[json_bytes:] == b"\0\0\x80\x3e\0\0\x40\x3f"
    assert answer.headers["content-type"] == "application/octet-stream"
    (record, _) = await site.stages.records()
    assert (record.route, record.outcome, record.tokens_in, record.tokens_out) == ("/v2/infer", "served", 3, 0)


@pytest.mark.parametrize("length", ["-1", "+5", "1e2", "0x10", "99999999999999", ""])
async def test_a_length_that_is_none_is_refused(site: Site, length: str) -> None:
    answer = await site.post("/models/classifier/infer", INFER, inference_header_content_length=length)
    refused(answer, 400, "Inference-Header-Content-Length")


async def test_a_length_beyond_the_body_is_refused(site: Site) -> None:
    refused(await site.post("/models/classifier/infer", INFER, inference_header_content_length="9999"), 400, "9999")


async def test_json_that_nests_too_deeply_is_refused(site: Site) -> None:
    deep = b'{"inputs":' + b"[" * 30 + b"]" * 30 + b"}"
    refused(await site.post("/models/classifier/infer", deep), 400, "nests deeper")


async def test_health_takes_no_long_body_from_anybody(site: Site) -> None:
    answer = await site.client.request("GET", "/v2/health/live", content=b"x" * 5_000)
    refused(answer, 413, "4096 bytes")


async def test_a_body_too_large_is_refused_in_the_protocol_s_shape(site: Site) -> None:
    refused(await site.post("/models/classifier/infer", b" " * (BOUNDS.body_bytes_max + 1)), 413)


async def test_a_model_that_fails_is_a_502(site: Site) -> None:
    refused(await site.post("/models/broken/infer", INFER), 502, "broken")


async def test_a_key_s_scopes_and_quotas_are_those_of_all_routes(site: Site) -> None:
    assert (await site.post("/models/classifier/infer", INFER, key="tensors")).status_code == 200
    refused(await site.post("/models/llm/generate", {"text_input": "hi"}, key="tensors"), 403)
    assert (await site.post("/models/classifier/infer", INFER, key="poor")).status_code == 200
    over = await site.post("/models/classifier/infer", INFER, key="poor")
    refused(over, 429)
    assert int(over.headers["retry-after"]) > 0


# ---- compression -------------------------------------------------------------------------------------------

COMPRESS = {"gzip": gzip.compress, "deflate": zlib.compress}


@pytest.mark.parametrize("coding", COMPRESS)
async def test_a_compressed_body_is_read(site: Site, coding: str) -> None:
    body = COMPRESS[coding](json.dumps(INFER).encode())
    answer = await site.post("/models/classifier/infer", body, content_encoding=coding)
    assert answer.status_code == 200, answer.text
    assert "content-encoding" not in answer.headers, "a short answer goes as it is"


@pytest.mark.parametrize("pieces", [1, 10, MEMBERS_MAX])
async def test_gzip_may_come_in_several_members_and_by_its_old_name(site: Site, pieces: int) -> None:
    text = json.dumps(INFER).encode().ljust(MEMBERS_MAX)
    size = -(-len(text) // pieces)
    body = b"".join(gzip.compress(text[at : at + size]) for at in range(0, len(text), size))
    for coding in ("gzip", "x-gzip", "X-GZIP"):
        answer = await site.post("/models/classifier/infer", body, content_encoding=coding)
        assert answer.status_code == 200, answer.text


async def test_many_members_that_become_a_long_body_are_refused(site: Site) -> None:
    piece = gzip.compress(bytes(BOUNDS.body_bytes_max // 4))
    refused(await site.post("/models/classifier/infer", piece * 5, content_encoding="gzip"), 413, "decompressed")
    empty = gzip.compress(b"") * (MEMBERS_MAX + 1)
    refused(await site.post("/models/classifier/infer", empty, content_encoding="gzip"), 400, "256 members")


@pytest.mark.parametrize("coding", COMPRESS)
async def test_a_short_body_that_becomes_a_long_one_is_refused(site: Site, coding: str) -> None:
    bomb = COMPRESS[coding](bytes(50_000_000))
    assert len(bomb) < BOUNDS.body_bytes_max
    refused(await site.post("/models/classifier/infer", bomb, content_encoding=coding), 413, "decompressed")


@pytest.mark.parametrize(
    ("body", "coding", "says"),
    [
        (b"not compressed", "gzip", "not valid gzip"),
        (zlib.compress(b"{}"), "gzip", "not valid gzip"),
        (gzip.compress(b"{}")[:-9], "gzip", "one whole gzip stream"),
        (gzip.compress(b"{}") + b"more", "gzip", "not valid gzip"),
        (zlib.compress(b"{}") * 2, "deflate", "one whole deflate stream"),
        (b"{}", "br", "'br' is not taken"),
        (b"{}", "gzip, gzip", "is not taken"),
    ],
)
async def test_a_body_that_is_not_what_its_coding_says_is_refused(
    site: Site, body: bytes, coding: str, says: str
) -> None:
    refused(await site.post("/models/classifier/infer", body, content_encoding=coding), 400, says)


# ---- generators --------------------------------------------------------------------------------------------


def said(response: httpx.Response) -> list[Any]:
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    return [json.loads(event.removeprefix("data: ")) for event in response.text.split("\n\n") if event]


async def test_a_generation_is_streamed_as_events(site: Site) -> None:
    events = said(await site.post("/models/llm/generate_stream", {"text_input": "hi", "id": "7"}))
    assert [it["text_output"] for it in events] == ["he", "llo"]
    assert {(it["id"], it["model_name"], it["model_version"]) for it in events} == {("7", "llm", "1")}
    (record,) = await site.stages.records()
    assert (record.route, record.stream, record.outcome) == ("/v1/completions", True, "served")


async def test_a_connection_serves_the_next_request_after_a_stream(site: Site) -> None:
    for _ in range(2):
        assert len(said(await site.post("/models/llm/generate_stream", {"text_input": "hi"}))) == 2


async def test_parameters_go_on_to_the_engine(site: Site) -> None:
    llm: Any = site.stages.replicas["team/llm:1"][0].runtime
    asked = {
        "text_input": "hi",
        "max_tokens": 5,
        "parameters": {"temperature": "0.5", "random_seed": 7, "stop_words": ["x"], "odd": {"a": 1}},
        "exclude_input_in_output": False,
    }
    await site.post("/models/team/llm:1/generate", asked)
    given = {"max_tokens": 5, "temperature": 0.5, "seed": 7, "stop": ["x"], "odd": {"a": 1}, "echo": True}
    assert json.loads(llm.got) == {"model": "team/llm:1", "prompt": "hi", "stream": False} | given


@pytest.mark.parametrize("given", [{}, {"parameters": {"seed": 7}}, {"seed": 7}])
async def test_sampling_parameters_go_on_like_those_beside_them_which_win(site: Site, given: dict[str, Any]) -> None:
    llm: Any = site.stages.replicas["team/llm:1"][0].runtime
    sampling = json.dumps({"max_tokens": "3", "temperature": 0, "seed": 5})
    for text in sampling, [sampling]:
        asked = {"text_input": "hi", "sampling_parameters": text} | given
        assert (await site.post("/models/team/llm:1/generate", asked)).status_code == 200
        expected = {"max_tokens": 3, "temperature": 0, "seed": 7 if given else 5}
        assert json.loads(llm.got) == {"model": "team/llm:1", "prompt": "hi", "stream": False} | expected


async def test_sampling_parameters_are_heard_by_a_stream_and_reserved_for(site: Site) -> None:
    llm: Any = site.stages.replicas["llm"][0].runtime
    asked = {"text_input": "hi", "sampling_parameters": '{"max_tokens": 3}'}
    said(await site.post("/models/llm/generate_stream", asked))
    assert json.loads(llm.got)["max_tokens"] == 3
    asked["sampling_parameters"] = '{"max_tokens": -1}'
    refused(await site.post("/models/llm/generate_stream", asked), 400, "`max_tokens` must be from 0")


@pytest.mark.parametrize(
    ("words", "given"),
    [
        ({"bad_words": "", "stop_words": ""}, {}),
        ({"bad_words": [""], "stop_words": []}, {}),
        ({"bad_words": None, "stop_words": None}, {}),
        ({"bad_words": "x", "stop_words": "a, b"}, {"bad_words": ["x"], "stop": ["a, b"]}),
        ({"bad_words": ["x", ""], "stop_words": ["y", "z"]}, {"bad_words": ["x"], "stop": ["y", "z"]}),
        ({"stop": "a", "stop_words": ""}, {"stop": "a"}),
    ],
)
async def test_words_are_lists_without_empty_ones(site: Site, words: dict[str, Any], given: dict[str, Any]) -> None:
    llm: Any = site.stages.replicas["team/llm:1"][0].runtime
    for asked in words, {"parameters": words}, {"sampling_parameters": json.dumps(words)}:
        answer = await site.post("/models/team/llm:1/generate", {"text_input": "hi", "max_tokens": 20} | asked)
        assert answer.status_code == 200
        body = {"model": "team/llm:1", "prompt": "hi", "stream": False, "max_tokens": 20}
        assert json.loads(llm.got) == body | given
    sampling = INFER["inputs"][0] | {"name": "sampling_parameters", "data": [json.dumps(words)]}
    inputs = [INFER["inputs"][0] | {"name": "text_input"}, sampling]
    assert (await site.post("/models/team/llm:1/infer", {"inputs": inputs})).status_code == 200
    assert json.loads(llm.got) == {"model": "team/llm:1", "prompt": "hello", "stream": False} | given


WRONG = {
    "no text": ({}, "`text_input` must be one string"),
    "several texts": ({"text_input": ["a", "b"]}, "`text_input` must be one string"),
    "an empty text": ({"text_input": ""}, "`text_input` is empty"),
    "an empty text in a list": ({"text_input": [""]}, "`text_input` is empty"),
    "a number as text": ({"text_input": 5}, "`text_input` must be one string"),
    "a stream that is none": ({"text_input": "a", "stream": "yes"}, "`stream` must be true or false"),
    "a stream in one piece": ({"text_input": "a", "stream": True}, "ask `generate_stream`"),
    "a number that is none": ({"text_input": "a", "max_tokens": "many"}, "`max_tokens` must be a number"),
    "a string that is no number": ({"text_input": "a", "temperature": "nan"}, "`temperature` must be a finite number"),
    "a string without end": ({"text_input": "a", "parameters": {"top_p": "-inf"}}, "`top_p` must be a finite number"),
    "very many values": ({"text_input": "a", "parameters": {"stop": [[]] * 4096}}, "more than 4096 values"),
    "less than nothing": ({"text_input": "a", "max_tokens": -1}, "`max_tokens` must be from 0"),
    "more than any number": ({"text_input": "a", "parameters": {"max_tokens": 10**400}}, "`max_tokens` must be from 0"),
    "another model": ({"text_input": "a", "model": "classifier"}, "`model` is not taken here"),
    "many texts out": ({"text_input": "a", "parameters": {"n": 1000}}, "`n` is not taken here"),
    "another model to sample from": (
        {"text_input": "a", "sampling_parameters": '{"model": "classifier"}'}, "`model` is not taken here"
    ),
    "very many values to sample by": (
        {"text_input": "a", "sampling_parameters": json.dumps({"stop": [[]] * 4096})}, "more than 4096 values"
    ),
    "sampling parameters that are no string": (
        {"text_input": "a", "sampling_parameters": {"seed": 5}}, "`sampling_parameters` must be one string that holds"
    ),
    "words that are none": ({"text_input": "a", "stop_words": 5}, "`stop_words` must be a string or a list of strings"),
    "a list of words of another type": ({"text_input": "a", "bad_words": ["x", 5]}, "`bad_words` must be a string or"),
    "parameters that are none": ({"text_input": "a", "parameters": 5}, "`parameters` must be an object"),
    "an id that is none": ({"text_input": "a", "id": 5}, "`id` must be a string"),
    "no object": ([], ""),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
async def test_a_generation_that_can_t_be_asked_for_is_refused(site: Site, what: str) -> None:
    body, says = WRONG[what]
    refused(await site.post("/models/team/llm:1/generate", body), 400, says)


@pytest.mark.parametrize(("given", "says"), [("{", "`sampling_parameters` is not valid JSON"), ("5", "object")])
async def test_sampling_parameters_that_are_none_are_named(site: Site, given: str, says: str) -> None:
    inputs = [
        {"name": name, "datatype": "BYTES", "shape": [1], "data": [text]}
        for name, text in (("text_input", "a"), ("sampling_parameters", given))
    ]
    refused(await site.post("/models/team/llm:1/infer", {"inputs": inputs}), 400, says)
    body = {"text_input": "a", "sampling_parameters": given}
    refused(await site.post("/models/team/llm:1/generate", body), 400, says)


async def test_a_model_that_answers_only_openai_s_routes_says_so(site: Site) -> None:
    refused(await site.get("/models/pooling"), 400, "/v1/embeddings")
    refused(await site.post("/models/pooling/infer", INFER), 400, "/v1/embeddings")
    refused(await site.post("/models/pooling/generate", {"text_input": "a"}), 400, "does not generate text")
    assert (await site.get("/models/pooling/ready")).status_code == 200


async def test_a_model_that_takes_tensors_generates_nothing(site: Site) -> None:
    for path in ("generate", "generate_stream"):
        refused(await site.post(f"/models/classifier/{path}", {"text_input": "a"}), 400, "does not generate text")
        refused(await site.post(f"/models/nobody/{path}", {"text_input": "a"}), 404)


async def test_a_fault_before_the_first_text_has_a_status(tmp_path: Path) -> None:
    async with open_site(tmp_path, b'data: {"error":{"message":"no","code":500}}\n\n') as site:
        refused(await site.post("/models/llm/generate_stream", {"text_input": "hi"}), 500, "no")


async def test_a_fault_amid_the_stream_is_its_last_event(tmp_path: Path) -> None:
    async with open_site(tmp_path, chunk("he"), Broken("reset")) as site:
        first, last = said(await site.post("/models/llm/generate_stream", {"text_input": "hi"}))
        assert first["text_output"] == "he"
        assert "broke off" in last["error"]


async def test_an_engine_that_says_no_completion_has_failed(tmp_path: Path) -> None:
    async with open_site(tmp_path, b'data: {"choices":[{"text":5}]}\n\n') as site:
        refused(await site.post("/models/llm/generate_stream", {"text_input": "hi"}), 502, "no completion")


async def test_a_client_that_leaves_frees_the_engine(tmp_path: Path) -> None:
    never = asyncio.Event()
    async with open_site(tmp_path, chunk("he"), never) as site:
        ask = site.client.stream(
            "POST", "/v2/models/llm/generate_stream", json={"text_input": "hi"}, headers=_headers("good")
        )
        async with ask as response:
            await anext(response.aiter_bytes())
        async with asyncio.timeout(10):
            while not site.stages.at_rest():
                await asyncio.sleep(0.01)
        (record,) = await site.stages.records()
        assert (record.outcome, record.code) == ("cancelled", "client_left")


async def test_a_gateway_that_stops_says_so_amid_a_stream(tmp_path: Path) -> None:
    never = asyncio.Event()
    async with parts(tmp_path, chunk("he"), never) as found:
        server = Server(door=KServe(**found.given), bounds=BOUNDS, clock=found.given["clock"])
        with socket.create_server(("127.0.0.1", 0)) as listening:
            address = f"http://127.0.0.1:{listening.getsockname()[1]}"
            async with server.serving(listening), httpx.AsyncClient(base_url=address, trust_env=False) as client:
                ask = client.stream(
                    "POST", "/v2/models/llm/generate_stream", json={"text_input": "hi"}, headers=_headers("good")
                )
                async with ask as response:
                    events = response.aiter_bytes()
                    await anext(events)
                    found.stages.pipeline.stopped = True
                    server.cut_off()
                    assert "stopped" in b"".join([part async for part in events]).decode()
