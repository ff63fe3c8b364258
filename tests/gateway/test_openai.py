"""OpenAI's HTTP API, through the application as it is served."""

import gzip
import json
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway.call import Bounds
from gateway.edge.openai import OpenAI, _require_utf8
from gateway.edge.request import error_headers
from gateway.edge.server import Server
from gateway.errors import BadRequest, GatewayError
from runtimes.clock import SystemClock
from runtimes.contract import Broken, Unavailable
from tests.fakes import FakeGenerator, FakeTenants, Script, Stages, a_principal, events, let_stand, limits

CHAT = "/v1/chat/completions"
OK = Script([b'{"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":1}}'])
CHUNK = b'data: {"choices":[{"index":0,"delta":{"content":"hi"}}]}\n\n'
SECRET = "xyzzy-from-the-prompt"
BODY = {"model": "chat", "messages": [{"role": "user", "content": SECRET}]}


def authorization(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"} if key else {}


class Site:
    def __init__(self, stages: Stages, client: httpx.AsyncClient) -> None:
        self.stages = stages
        self.client = client

    async def post(self, body: Any, path: str = CHAT, key: str = "good") -> httpx.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return await self.client.post(path, content=content, headers=authorization(key))

    @property
    def engine(self) -> Any:
        return self.stages.replicas["chat"][0].runtime


Open = Callable[..., Any]


@pytest.fixture
async def open_site(tmp_path: Path) -> AsyncIterator[Open]:
    sites: list[Site] = []
    opened = AsyncExitStack()

    async def make(*script: Any, bounds: Bounds | None = None, **given: Any) -> Site:
        clock = SystemClock()
        models: dict[str, list[Any]] = {
            "chat": [FakeGenerator(*(script or (OK,)))],
            "org/model:1": [FakeGenerator(OK)],
            "hidden": [FakeGenerator(OK)],
        }
        keys = {
            "good": a_principal(models=("chat", "org/*")),
            "expired": a_principal(expires_s=1.0),
            "narrow": a_principal(models=("org/*",)),
            "poor": a_principal("poor", tenant_limits=limits(rpm=1)),
            "nothing": a_principal("none", models=()),
        }
        stages = await Stages(tmp_path, clock, models, keys=keys, **given).__aenter__()
        doors = OpenAI(pipeline=stages.pipeline, bounds=bounds or Bounds(), translations={}, clock=clock)
        listening = socket.create_server(("127.0.0.1", 0))
        server = Server(door=doors, bounds=bounds or Bounds(), clock=clock)
        await opened.enter_async_context(server.serving(listening))
        client = httpx.AsyncClient(base_url=f"http://127.0.0.1:{listening.getsockname()[1]}", trust_env=False)
        opened.callback(listening.close)
        sites.append(Site(stages, client))
        return sites[-1]

    async with opened:
        yield make
        for site in sites:
            await site.client.aclose()
            assert site.stages.at_rest()
    for site in sites:
        await site.stages.__aexit__()


@pytest.fixture
async def site(open_site: Open) -> Site:
    return await open_site()


def refused(response: httpx.Response, status: int, code: str | None = None) -> dict[str, Any]:
    """The error, which must have OpenAI's shape and headers that SDKs obey."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error: dict[str, Any] = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"]
    assert isinstance(error["code"], str)
    assert code in (None, error["code"])
    assert response.headers["x-should-retry"] in ("true", "false")
    assert SECRET not in response.text
    return error


def test_a_byte_that_is_no_utf_8_is_named_wherever_it_stands() -> None:
    good = b'{"model":"m","user":"' + "é€😀".encode() * 30_000 + b'"}'
    _require_utf8(good)
    for at in (21, 21 + 9 * 7_000, 21 + 9 * 20_000):
        with pytest.raises(BadRequest, match=rf"\(byte {at}\)"):
            _require_utf8(good[:at] + b"\xff" + good[at + 1 :])
    with pytest.raises(BadRequest, match="UTF-8"):
        _require_utf8(good[:-4])


async def test_an_answer_is_relayed_with_the_call_s_id(site: Site) -> None:
    response = await site.post(BODY)
    assert response.status_code == 200
    assert response.content == b'{"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":1}}'
    (record,) = await site.stages.records()
    assert response.headers["x-request-id"] == record.id


async def test_a_compressed_body_is_refused_as_what_it_is(site: Site) -> None:
    headers = {**authorization("good"), "content-encoding": "gzip"}
    body = gzip.compress(json.dumps(BODY).encode())
    error = refused(await site.client.post("/v1/chat/completions", content=body, headers=headers), 400)
    assert "content-encoding 'gzip' is not taken" in error["message"]


async def test_a_stream_is_relayed_to_its_closing_event(open_site: Open) -> None:
    site = await open_site(events(CHUNK, CHUNK, b"data: [DONE]\n\n"))
    response = await site.post(BODY | {"stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.content == CHUNK * 2 + b"data: [DONE]\n\n"


async def test_a_stream_of_nothing_but_its_end_is_still_a_stream(open_site: Open) -> None:
    site = await open_site(events(b"data: [DONE]\n\n"))
    response = await site.post(BODY | {"stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.content == b"data: [DONE]\n\n"


async def test_a_failure_amid_a_stream_is_one_error_event_and_no_closing_event(open_site: Open) -> None:
    site = await open_site(events(CHUNK, Broken("cut")))
    response = await site.post(BODY | {"stream": True})
    assert response.status_code == 200
    chunk, error, rest = response.content.split(b"\n\n")
    assert (chunk + b"\n\n", rest) == (CHUNK, b"")
    assert json.loads(error.removeprefix(b"data: "))["error"]["code"] == "engine_failed"


async def test_on_anthropic_s_route_it_is_an_event_of_that_name(open_site: Open) -> None:
    start = b'event: message_start\ndata: {"type":"message_start","message":{}}\n\n'
    site = await open_site(events(start, Broken("cut")))
    response = await site.post(BODY | {"stream": True}, "/v1/messages")
    name, data = response.content.removeprefix(start).strip().split(b"\n")
    assert name == b"event: error"
    assert json.loads(data.removeprefix(b"data: "))["type"] == "error"


async def test_a_fault_of_the_gateway_itself_tells_where_to_look_and_nothing_else(open_site: Open) -> None:
    site = await open_site(Script([ZeroDivisionError(SECRET)]), events(CHUNK, ZeroDivisionError(SECRET)))
    error = refused(await site.post(BODY), 500, "internal_error")
    assert "hr-" in error["message"]
    response = await site.post(BODY | {"stream": True})
    assert b"internal_error" in response.content
    assert SECRET not in response.text


@pytest.mark.parametrize(
    ("key", "status", "code"),
    [("", 401, "invalid_api_key"), ("wrong", 401, "invalid_api_key"), ("expired", 403, "key_expired")],
)
async def test_keys_are_asked_for_before_anything_else(site: Site, key: str, status: int, code: str) -> None:
    refused(await site.post(b"{nonsense", key=key), status, code)
    models = await site.client.get("/v1/models", headers=authorization(key))
    refused(models, status, code)


async def test_anthropic_s_header_carries_a_key_too(site: Site) -> None:
    response = await site.client.post("/v1/messages", json=BODY, headers={"x-api-key": "good"})
    assert response.status_code == 200


async def test_a_401_says_how_to_authenticate(site: Site) -> None:
    response = await site.client.post(CHAT, json=BODY)
    refused(response, 401)
    assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("path", ["/", "/v1", "/v2/models", "/v1/chat", "/v1/chat/completions/x"])
async def test_unknown_paths_are_a_404(site: Site, path: str) -> None:
    refused(await site.client.get(path), 404, "not_found")
    refused(await site.client.post(path, json=BODY), 404, "not_found")


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [("GET", CHAT, "POST"), ("DELETE", "/v1/embeddings", "POST"), ("POST", "/v1/models", "GET")],
)
async def test_wrong_methods_are_a_405_that_names_the_right_one(site: Site, method: str, path: str, allow: str) -> None:
    response = await site.client.request(method, path, headers={"authorization": "Bearer good"})
    refused(response, 405, "method_not_allowed")
    assert allow in response.headers["allow"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": []}, "model"),
        ({"model": 5}, "model"),
        ({"model": None}, "model"),
        ({"model": "x" * 300}, "model"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": 3}, "stream_options"),
        ({"stream_options": {"include_usage": "x"}}, "stream_options.include_usage"),
        ({"n": 0}, "n"),
        ({"n": -1}, "n"),
        ({"n": 1.5}, "n"),
        ({"n": "2"}, "n"),
        ({"n": 129}, "n"),
        ({"n": 10**30}, "n"),
        ({"best_of": 1_000}, "best_of"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 2**40}, "max_tokens"),
        ({"max_completion_tokens": "many"}, "max_completion_tokens"),
    ],
)
async def test_wrong_types_are_a_400_that_names_the_field(site: Site, body: dict[str, Any], param: str) -> None:
    given = body if "messages" in body else BODY | body
    assert refused(await site.post(given), 400)["param"] == param


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"x"',
        b'{"model":"chat",}',
        b'{"model":"chat"} x',
        b'{"model":"chat","user":"\xff"}',
        b'{"model":"chat","n":' + b"9" * 10_000 + b"}",
        b'{"model":"\\ud800"}',
        b'{"model":"chat","x":' + b"[" * 2_000 + b"]" * 2_000 + b"}",
        b'{"model":"chat","x":' + b"[" * 150 + b"]" * 150 + b"}",
        b'{"model":"chat","x":' + b"[" * 100_000,
        b'{"model":"chat","x":' + b'{"a":' * 100_000,
    ],
)
async def test_what_is_not_sound_json_is_a_400(site: Site, body: bytes) -> None:
    refused(await site.post(body), 400, "invalid_request")
    assert await site.stages.records() == []


async def test_nulls_are_as_if_left_out(site: Site) -> None:
    nulls = dict.fromkeys(
        ["stream", "stream_options", "n", "best_of", "max_tokens", "max_completion_tokens", "prompt", "user"]
    )
    assert (await site.post(BODY | nulls)).status_code == 200


async def test_unknown_fields_and_odd_spelling_reach_the_engine_untouched(site: Site) -> None:
    body = b'{ "model":"chat", "x" : 1e-7, "\\u0079":[ ], "messages":[] }'
    assert (await site.post(body)).status_code == 200
    assert site.engine.got == body


async def test_of_a_key_given_twice_the_last_counts_as_for_any_engine(site: Site) -> None:
    assert (await site.post(b'{"model":"hidden","model":"chat"}')).status_code == 200
    refused(await site.post(b'{"model":"chat","model":"hidden"}'), 403)
    refused(await site.post(b'{"model":"chat","\\u006dodel":"hidden"}'), 403)


@pytest.mark.parametrize(
    ("prompt", "choices"),
    [
        ("one", 1),
        ([1, 2, 3], 1),
        ([], 1),
        ([[1, 2], [3]], 2),
        (["a", "b", "c"], 3),
        (['"', '\\"', "a,b", '","'], 4),
        ([""], 1),
    ],
)
async def test_prompts_are_reserved_for_one_by_one(site: Site, prompt: Any, choices: int) -> None:
    body = {"model": "chat", "prompt": prompt, "max_tokens": 1_000, "n": 2}
    fits = choices * 2_000 + len(json.dumps(body)) // 4 + 1
    for tpm, status in ((fits, 200), (fits - 1, 429)):
        key = a_principal(models=("chat",), tenant_limits=limits(tpm=tpm))
        site.stages.pipeline.tenants = FakeTenants(SystemClock(), metered=key)
        assert (await site.post(body, "/v1/completions", key="metered")).status_code == status


@pytest.mark.parametrize("path", ["/nothing", "/v1/models"])
async def test_nobody_reads_much_from_who_has_shown_no_key(open_site: Open, path: str) -> None:
    site = await open_site()
    refused(await site.post(b"x" * 5_000, path), 413, "request_too_large")


async def test_a_body_too_large_is_a_413(open_site: Open) -> None:
    site = await open_site(bounds=Bounds(body_bytes_max=1_024))
    refused(await site.post(BODY | {"user": "x" * 2_000}), 413, "request_too_large")


async def test_an_unknown_model_is_a_404_that_names_those_the_key_may_use(site: Site) -> None:
    error = refused(await site.post(BODY | {"model": "gpt-7"}), 404, "model_not_found")
    assert "chat, org/model:1" in error["message"]
    assert "hidden" not in error["message"]
    assert error["param"] == "model"


async def test_a_model_out_of_scope_is_a_403(site: Site) -> None:
    refused(await site.post(BODY, key="narrow"), 403)


async def test_a_429_says_when_to_come_back_rounded_up(site: Site) -> None:
    await site.post(BODY, key="poor")
    response = await site.post(BODY, key="poor")
    refused(response, 429, "rate_limit_exceeded")
    seconds, milliseconds = int(response.headers["retry-after"]), int(response.headers["retry-after-ms"])
    assert 59 <= seconds <= 60
    assert seconds * 1_000 >= milliseconds > 59_000
    assert response.headers["x-should-retry"] == "true"


async def test_what_an_engine_refuses_keeps_its_status_and_words(open_site: Open) -> None:
    said = b'{"error":{"message":"too long","type":"BadRequestError","param":"messages","code":400}}'
    site = await open_site(Script([said], status=400))
    response = await site.post(BODY)
    error = refused(response, 400, "400")
    assert (error["message"], error["type"], error["param"]) == ("too long", "BadRequestError", "messages")
    assert response.headers["x-should-retry"] == "false"
    assert (await site.stages.records())[0].outcome == "rejected"


async def test_an_engine_that_is_gone_is_worth_a_retry(open_site: Open) -> None:
    site = await open_site(Unavailable("/run/engine.sock: refused"))
    response = await site.post(BODY)
    refused(response, 502, "engine_failed")
    assert "engine.sock" not in response.text
    assert response.headers["x-should-retry"] == "true"
    assert response.headers["retry-after"] == "1"


def every(error: type[GatewayError]) -> list[type[GatewayError]]:
    return [error, *(found for child in error.__subclasses__() for found in every(child))]


@pytest.mark.parametrize("error", every(GatewayError), ids=lambda error: error.__name__)
def test_every_error_says_whether_to_come_back_and_if_so_when(error: type[GatewayError]) -> None:
    headers = error_headers(error("no"))
    assert headers["x-should-retry"] == ("true" if error.retryable else "false")
    assert ("retry-after" in headers) is ("retry-after-ms" in headers) is error.retryable


async def test_a_client_may_shorten_its_call_and_the_engine_is_told(open_site: Open) -> None:
    site = await open_site()
    for given, least_ms, most_ms in (("1500", 1_000, 1_500), ("99999999", 590_000, 600_000)):
        headers = {"authorization": "Bearer good", "x-envoy-expected-rq-timeout-ms": given}
        assert (await site.client.post(CHAT, json=BODY, headers=headers)).status_code == 200
        told_ms = int(dict(site.engine.got_headers)[b"x-envoy-expected-rq-timeout-ms"])
        assert least_ms < told_ms <= most_ms


async def test_a_call_without_time_left_is_a_504_and_asks_nobody(site: Site) -> None:
    headers = {"authorization": "Bearer good", "x-envoy-expected-rq-timeout-ms": "0"}
    response = await site.client.post(CHAT, json=BODY, headers=headers)
    refused(response, 504, "deadline_exceeded")
    assert response.headers["x-should-retry"] == "false"
    assert not site.engine.begun.is_set()


async def test_the_models_a_key_may_use_are_listed(site: Site) -> None:
    async def listed(key: str) -> list[str]:
        response = await site.client.get("/v1/models", headers={"authorization": f"Bearer {key}"})
        assert response.json()["object"] == "list"
        return [model["id"] for model in response.json()["data"]]

    assert await listed("good") == ["chat", "org/model:1"]
    assert await listed("narrow") == ["org/model:1"]
    assert await listed("nothing") == []


async def test_an_alias_is_listed_for_those_who_may_use_it(site: Site) -> None:
    let_stand(site.stages, "org/alias", {"hidden": 1})
    for key, expected in (("good", True), ("nothing", False)):
        listed = (await site.client.get("/v1/models", headers=authorization(key))).json()["data"]
        assert ("org/alias" in [it["id"] for it in listed]) is expected
    response = await site.client.get("/v1/models/org/alias", headers=authorization("good"))
    assert response.json() == {"id": "org/alias", "object": "model", "created": 1_700_000_000, "owned_by": "headrace"}
    assert (await site.post(BODY | {"model": "org/alias"})).status_code == 200


@pytest.mark.parametrize("name", ["chat", "org/model:1"])
async def test_one_model_is_described(site: Site, name: str) -> None:
    response = await site.client.get(f"/v1/models/{name}", headers={"authorization": "Bearer good"})
    assert response.json() == {"id": name, "object": "model", "created": 1_700_000_000, "owned_by": "headrace"}


@pytest.mark.parametrize("name", ["hidden", "gpt-7", "org/none"])
async def test_a_model_that_is_not_there_or_not_for_this_key_is_a_404(site: Site, name: str) -> None:
    response = await site.client.get(f"/v1/models/{name}", headers={"authorization": "Bearer good"})
    refused(response, 404, "model_not_found")


async def test_a_gateway_that_drains_takes_nothing_new(site: Site) -> None:
    site.stages.pipeline.draining = True
    response = await site.post(BODY)
    refused(response, 503, "draining")
    assert response.headers["retry-after"] == "1"


@pytest.mark.parametrize(
    ("given", "handed_on"),
    [
        ("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", True),
        ("00-00000000000000000000000000000000-b7ad6b7169203331-01", False),
        ("x-y", False),
    ],
)
async def test_only_a_wellformed_trace_context_is_handed_on(site: Site, given: str, handed_on: bool) -> None:
    response = await site.client.post(CHAT, json=BODY, headers={"authorization": "Bearer good", "traceparent": given})
    assert response.status_code == 200
    assert (dict(site.engine.got_headers).get(b"traceparent") == given.encode()) is handed_on


@pytest.mark.parametrize(
    ("path", "fields", "reserved"),
    [
        (CHAT, {"max_tokens": 10, "max_completion_tokens": 500}, 500),
        (CHAT, {"max_tokens": 500, "max_completion_tokens": 10}, 500),
        (CHAT, {"max_completion_tokens": 500, "max_output_tokens": 900}, 500),
        ("/v1/completions", {"max_tokens": 500, "max_completion_tokens": 900}, 500),
        ("/v1/messages", {"max_tokens": 500, "max_output_tokens": 1}, 500),
        ("/v1/responses", {"max_output_tokens": 500, "max_tokens": 1}, 500),
    ],
)
async def test_the_most_an_engine_may_make_of_it_is_reserved(
    site: Site, path: str, fields: dict[str, int], reserved: int
) -> None:
    body = BODY | fields
    fits = reserved + len(json.dumps(body)) // 4 + 1
    for tpm, status in ((fits, 200), (fits - 1, 429)):
        key = a_principal(models=("chat",), tenant_limits=limits(tpm=tpm))
        site.stages.pipeline.tenants = FakeTenants(SystemClock(), metered=key)
        assert (await site.post(body, path, key="metered")).status_code == status


@pytest.mark.parametrize(("prompts", "n", "status"), [(64, 2, 200), (65, 2, 400), (128, 1, 200), (129, 1, 400)])
async def test_the_choices_of_all_prompts_together_are_bounded(site: Site, prompts: int, n: int, status: int) -> None:
    response = await site.post({"model": "chat", "prompt": ["x"] * prompts, "n": n}, "/v1/completions")
    assert response.status_code == status
    if status == 400:
        assert refused(response, 400)["param"] == "prompt"
