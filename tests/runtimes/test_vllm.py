import asyncio
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from runtimes.artifact import Folder, Hub, Shelf
from runtimes.contract import PATHS, Broken, Exchange, Invalid, Reply, Site, Unavailable
from runtimes.environment import Environment
from runtimes.process import SOCKET_BYTES_MAX, SOCKET_NAME_BYTES, scratch
from runtimes.vllm import Vllm, VllmRuntime
from runtimes.vllm_command import command
from runtimes.vllm_stream import Watched
from tests import tiny
from tests.e2e.engine import MODEL, processes, socket
from tests.e2e.servers import GatewayProcess
from tests.fakes import work
from tests.runtimes.hostile import Peer, hostile

ENGINE = """\
    #!{python}
    # Behaves as vLLM's API server does, as far as these tests look: health, an answer, a death.
    import http.server, os, pathlib, socketserver, sys, time

    here = pathlib.Path(sys.argv[sys.argv.index("--uds") + 1])
    dead = False

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        def address_string(self): return "unix"
        def log_message(self, *_): pass
        def do_GET(self): self.answer(503 if dead else 200, b"")
        def do_POST(self):
            global dead
            said = self.rfile.read(int(self.headers["content-length"]))
            assert self.headers["content-type"] == "application/json"
            if b"die" in said:
                dead = True
            if b"fault" in said or dead:
                return self.answer(500, b'{{"error": {{}}}}')
            if b"wait" in said:
                (here.parent / "waiting").touch()
                while not (here.parent / "go").exists(): time.sleep(0.01)
            self.answer(200, said)
        def answer(self, status, body):
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
        daemon_threads = True

    Server(str(here), Handler).serve_forever()
"""


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """A state folder with a fake engine and a model for it."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").touch()
    state = tmp_path / "state"
    home = state / "engines" / "vllm-0.32.0"
    (home / "bin").mkdir(parents=True)
    (home / ".ready").write_bytes(msgspec.json.encode(CPU))
    (home / "bin" / "python").write_text(textwrap.dedent(ENGINE).format(python=sys.executable))
    (home / "bin" / "python").chmod(0o755)
    return Site(model="chat", replica="chat-0", state=state, shelf=Shelf(tmp_path / "shelf"))


CPU = Environment(name="vllm", version="0.32.0", device="cpu", lock="", packages={}, ready_s=0.0)
CUDA = msgspec.structs.replace(CPU, device="cuda")


@asynccontextmanager
async def opened(site: Site, **options: Any) -> AsyncIterator[VllmRuntime]:
    runtime = Vllm(artifact=str(site.state.parent / "model"), **options).build(site)
    try:
        await runtime.open()
        yield runtime
    finally:
        await runtime.aclose()


@asynccontextmanager
async def attached(url: str, site: Site, **options: Any) -> AsyncIterator[VllmRuntime]:
    """To an engine that somebody else looks after."""
    runtime = Vllm(url=url, **options).build(site)
    await runtime.open()
    try:
        yield runtime
    finally:
        await runtime.aclose()


async def say(runtime: VllmRuntime, body: Any, path: str = "/v1/chat/completions") -> tuple[int, Any]:
    request = Exchange(path, msgspec.json.encode(body), time.monotonic() + 120)
    async with runtime.exchange(request) as reply:
        content = b"".join([frame async for frame in reply.frames])
    return reply.status, msgspec.json.decode(content)


async def until(condition: Callable[[], object], *, s_max: float = 20) -> None:
    async with asyncio.timeout(s_max):
        while not condition():
            await asyncio.sleep(0.005)


async def test_calls_are_relayed_as_they_are(site: Site) -> None:
    async with opened(site) as runtime:
        await runtime.ready()
        assert await say(runtime, {"model": "chat", "unheard_of": [1]}) == (200, {"model": "chat", "unheard_of": [1]})
        assert work(runtime) == (0, 0)


async def test_an_error_of_a_living_engine_is_a_reply(site: Site) -> None:
    async with opened(site) as runtime:
        assert await say(runtime, "fault") == (500, {"error": {}})


async def test_an_engine_whose_first_start_failed_is_open_once_a_later_one_has_not(site: Site) -> None:
    python = site.state / "engines" / "vllm-0.32.0" / "bin" / "python"
    good = python.read_text()
    python.write_text("#!/bin/false\n")
    runtime = Vllm(artifact=str(site.state.parent / "model")).build(site)
    try:
        with pytest.raises(Unavailable, match="chat-0 did not start"):
            await runtime.open()
        with pytest.raises(Unavailable, match="chat-0 is restarting"):
            await runtime.open()
        python.write_text(good)
        await until(lambda: runtime.snapshot().phase == "ready")  # type: ignore[union-attr]
        await runtime.open()
        assert await say(runtime, "hello") == (200, "hello")
    finally:
        await runtime.aclose()
    with pytest.raises(Unavailable, match="being stopped"):
        await runtime.open()


async def test_a_dead_engine_is_unavailable_and_started_again(site: Site) -> None:
    async with opened(site) as runtime:
        with pytest.raises(Unavailable, match="its engine is dead"):
            await say(runtime, "die")
        await until(lambda: runtime.snapshot().phase != "ready")  # type: ignore[union-attr]
        with pytest.raises(Unavailable, match="chat-0 is restarting, attempt 2"):
            await say(runtime, "hello")
        await until(lambda: runtime.snapshot().phase == "ready")  # type: ignore[union-attr]
        assert await say(runtime, "hello") == (200, "hello")


async def test_closing_lets_calls_under_way_finish_and_takes_no_more(site: Site) -> None:
    async with opened(site) as runtime:
        call = asyncio.create_task(say(runtime, "wait"))
        await until((scratch(site) / "waiting").exists)
        closing = asyncio.create_task(runtime.aclose())
        await asyncio.sleep(0)
        assert work(runtime) == (1, 0)
        with pytest.raises(Unavailable, match="being stopped"):
            await say(runtime, "hello")
        (scratch(site) / "go").touch()
        assert await call == (200, "wait")
        await closing
        with pytest.raises(Unavailable):
            await runtime.ready()


async def test_the_sockets_are_closed_to_others_and_gone_afterwards(site: Site) -> None:
    async with opened(site):
        assert scratch(site).stat().st_mode & 0o777 == 0o700
        assert (scratch(site) / "api.sock").is_socket()
    assert not scratch(site).exists()


async def test_a_second_gateway_leaves_the_sockets_of_the_first_alone(site: Site) -> None:
    async with opened(site) as first:
        with pytest.raises(Unavailable, match="another gateway"):
            async with opened(site):
                pass
        assert await say(first, "hello") == (200, "hello")


async def test_a_state_folder_of_any_depth_will_do(site: Site, tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100)
    deep.symlink_to(site.state, target_is_directory=True)
    site = msgspec.structs.replace(site, state=deep)
    assert len(str(scratch(site))) + SOCKET_NAME_BYTES <= SOCKET_BYTES_MAX
    async with opened(site) as runtime:
        assert await say(runtime, "hello") == (200, "hello")
    assert not scratch(site).exists()


async def test_without_an_engine_it_says_how_to_get_one(site: Site) -> None:
    (site.state / "engines" / "vllm-0.32.0" / ".ready").unlink()
    with pytest.raises(Unavailable, match="chat-0: vllm is not installed: run `headrace engine install vllm`"):
        async with opened(site):
            pass


async def test_a_missing_artifact_is_named(site: Site) -> None:
    runtime = Vllm(artifact="nothing@stable").build(site)
    with pytest.raises(Unavailable, match=r"chat-0: the shelf .* has no artifact 'nothing'"):
        await runtime.open()
    await runtime.aclose()


async def test_before_it_is_open_nothing_is_answered(site: Site) -> None:
    runtime = Vllm(artifact="x").build(site)
    with pytest.raises(Unavailable, match="not open"):
        await runtime.ready()
    await runtime.aclose()


# ---- an engine that somebody else looks after --------------------------------------------------------------


def address(site: Site) -> str:
    return f"unix:{scratch(site) / 'api.sock'}"


async def test_an_engine_elsewhere_is_used_and_left_running(site: Site) -> None:
    async with opened(site) as owner:
        async with attached(address(site), site, model="theirs") as runtime:
            await runtime.ready()
            assert await say(runtime, "hello") == (200, "hello")
            assert (runtime.upstream_model, runtime.snapshot()) == ("theirs", None)
            assert work(runtime) == (0, 0)
        with pytest.raises(Unavailable, match="being stopped"):
            await runtime.ready()
        assert await say(owner, "hello") == (200, "hello")


async def test_another_process_reaches_the_engine_that_one_started(site: Site) -> None:
    spec = Vllm(artifact=str(site.state.parent / "model"), running_max=3, idle_s_max=7)
    elsewhere = spec.attached(site)
    assert Vllm(artifact="x", task="embed").attached(site).task == "embed"
    assert (elsewhere.slots, elsewhere.idle_s_max, elsewhere.artifact) == (3, 7, None)
    async with opened(site):
        runtime = elsewhere.build(site)
        await runtime.open()
        assert await say(runtime, "hello") == (200, "hello")
        await runtime.aclose()


async def test_an_engine_elsewhere_that_has_died_is_unavailable(site: Site) -> None:
    async with opened(site), attached(address(site), site) as runtime:
        with pytest.raises(Unavailable, match="its engine is dead"):
            await say(runtime, "die")


async def test_an_engine_elsewhere_that_is_not_there_keeps_nobody_from_starting(site: Site) -> None:
    async with attached(address(site), site) as runtime:
        with pytest.raises(Unavailable):
            await runtime.ready()
        with pytest.raises(Unavailable):
            await say(runtime, "hello")
        async with opened(site):
            await runtime.ready()


async def test_an_engine_elsewhere_is_shown_its_key_and_nobody_elses(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENGINE_KEY", "sesame")
    seen: list[bytes] = []

    async def script(peer: Peer) -> None:
        while True:
            head, _ = await peer.request()
            seen.append(head)
            await peer.send(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")

    async with hostile(script) as host, attached(host.url, site, key_env="ENGINE_KEY") as runtime:
        await runtime.ready()
        assert await say(runtime, {}) == (200, {})
    assert [head.partition(b"\r\n")[0] for head in seen] == [
        b"GET /health HTTP/1.1",
        b"POST /v1/chat/completions HTTP/1.1",
    ]
    assert all(b"\r\nauthorization: Bearer sesame\r\n" in head for head in seen)


@pytest.mark.parametrize(
    ("task", "paths"),
    [
        (
            "generate",
            {path: path for path in ("/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses")},
        ),
        ("embed", {"/v1/embeddings": "/v1/embeddings", "/v1/rerank": "/rerank", "/v1/score": "/score"}),
        ("score", {"/v1/rerank": "/rerank", "/v1/score": "/score"}),
        ("classify", {"/v1/classify": "/classify"}),
    ],
)
async def test_a_model_answers_what_it_is_for_where_vllm_has_it(site: Site, task: Any, paths: dict[str, str]) -> None:
    seen: list[str] = []

    async def script(peer: Peer) -> None:
        while True:
            head, _ = await peer.request()
            seen.append(head.split()[1].decode())
            await peer.send(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")

    async with hostile(script) as host, attached(host.url, site, task=task) as runtime:
        assert runtime.routes == paths.keys()
        for path in paths:
            assert await say(runtime, {}, path) == (200, {})
        for path in PATHS - paths.keys():
            with pytest.raises(Invalid, match="chat-0 answers only"):
                await say(runtime, {}, path)
    assert seen == list(paths.values())


async def test_a_server_that_is_no_vllm_is_told_apart_from_a_dead_one(site: Site) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n")

    async with hostile(script) as host, attached(host.url, site) as runtime:
        with pytest.raises(Unavailable, match=r"not as vLLM does \(HTTP 404"):
            await runtime.ready()


async def test_without_its_key_an_engine_elsewhere_is_not_opened(site: Site) -> None:
    with pytest.raises(Unavailable, match="chat-0: the environment variable ENGINE_KEY is not set"):
        async with attached("http://127.0.0.1:9", site, key_env="ENGINE_KEY"):
            pass


@pytest.mark.parametrize(
    ("fields", "wrong"),
    [
        ({}, "either `artifact`"),
        ({"artifact": "x", "url": "http://gpu1:8000"}, "either `artifact`"),
        ({"artifact": "x", "model": "y"}, "`model` means nothing beside `artifact`"),
        ({"url": "http://gpu1:8000", "threads": 2}, "`threads` means nothing beside `url`"),
        ({"url": "http://gpu1:8000", "args": ["--seed=1"]}, "`args` means nothing beside `url`"),
        ({"url": "http://gpu1:8000/v1"}, "without a path"),
        ({"url": "http://user:secret@gpu1"}, "without a path"),
        ({"url": "http://gpu1:65536"}, "without a path"),
        ({"url": "unix:relative"}, "unix:/PATH"),
    ],
)
def test_settings_that_contradict_each_other_are_refused_by_name(fields: dict[str, Any], wrong: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=wrong):
        msgspec.convert({"kind": "vllm", **fields}, Vllm)


# ---- how an engine is started ------------------------------------------------------------------------------


def options(spec: Vllm, site: Site, model: Folder | Hub, engine: Environment = CPU) -> tuple[list[str], dict[str, str]]:
    made = command(spec, site, model, engine, Path("/python"), socket=Path("/run/api.sock"))
    return list(made.argv), dict(made.env)


def test_the_engine_listens_on_its_socket_and_tells_nobody(site: Site) -> None:
    argv, env = options(Vllm(artifact="x"), site, Folder(site.state.parent / "model"))
    assert argv[argv.index("--uds") + 1] == "/run/api.sock"
    assert {"--host", "--port"}.isdisjoint(argv)
    assert argv[argv.index("--served-model-name") + 1] == "chat"
    assert (env["VLLM_HOST_IP"], env["VLLM_NO_USAGE_STATS"], env["DO_NOT_TRACK"]) == ("127.0.0.1", "1", "1")


def test_only_a_hub_model_may_reach_the_hub(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("HTTPS_PROXY", "http://user:secret@proxy")
    _, here = options(Vllm(artifact="x"), site, Folder(site.state.parent / "model"))
    argv, there = options(Vllm(artifact="x"), site, Hub("org/name"))
    assert here["HF_HUB_OFFLINE"] == "1"
    assert "secret" not in str(here)
    assert "HF_HUB_OFFLINE" not in there
    assert there["HF_TOKEN"] == "secret"
    assert argv[argv.index("--model") + 1] == "org/name"
    assert argv[argv.index("--load-format") + 1] == "safetensors"


@pytest.mark.parametrize(
    ("config", "dtype"), [("{}", "float32"), ('{"quantization_config": {}}', "bfloat16")], ids=["plain", "quantized"]
)
def test_a_cpu_computes_in_what_it_is_fast_in(site: Site, config: str, dtype: str) -> None:
    model = site.state.parent / "model"
    (model / "config.json").write_text(config)
    argv, _ = options(Vllm(artifact="x"), site, Folder(model))
    assert argv[argv.index("--dtype") + 1] == dtype
    argv, _ = options(Vllm(artifact="x", dtype="float16"), site, Folder(model))
    assert argv[argv.index("--dtype") + 1] == "float16"


def test_a_gpu_is_left_to_vllms_own_judgement(site: Site) -> None:
    argv, env = options(Vllm(artifact="x"), site, Folder(site.state.parent / "model"), CUDA)
    assert argv[argv.index("--dtype") + 1] == "auto"
    assert {"--enforce-eager", "--block-size", "--kv-cache-memory-bytes"}.isdisjoint(argv)
    assert "OMP_NUM_THREADS" not in env


@pytest.mark.parametrize("task", ["embed", "score", "classify"])
def test_a_model_that_reads_is_started_to_pool_and_calls_no_tools(site: Site, task: Any) -> None:
    argv, _ = options(Vllm(artifact="x", task=task), site, Folder(site.state.parent / "model"))
    assert argv[argv.index("--runner") + 1] == "pooling"
    assert {"--tool-call-parser", "--enable-auto-tool-choice"}.isdisjoint(argv)
    argv, _ = options(Vllm(artifact="x"), site, Folder(site.state.parent / "model"))
    assert "--runner" not in argv


async def test_an_artifact_made_for_something_else_is_not_served(site: Site, tmp_path: Path) -> None:
    tiny.publish(site.shelf, tmp_path / "model", task="classify")
    runtime = Vllm(artifact="tiny@stable", task="embed").build(site)
    with pytest.raises(Unavailable, match="a model to classify in onnx format; here is served one to embed"):
        await runtime.open()


def test_further_options_are_passed_on(site: Site) -> None:
    argv, _ = options(Vllm(artifact="x", args=("--reasoning-parser=qwen3",)), site, Folder(site.state.parent / "model"))
    assert argv[-1] == "--reasoning-parser=qwen3"


@pytest.mark.parametrize(
    "arg", ["--trust-remote-code", "--trust_remote_code", "--trust-rem", "--port=1", "--uds", "--runner=pooling"]
)
def test_options_that_are_ours_or_unsafe_are_refused(arg: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=r"args must not hold .* - at `\$`|args must not hold"):
        msgspec.convert({"kind": "vllm", "artifact": "x", "args": [arg]}, Vllm)


async def test_a_stream_of_a_dying_engine_is_broken_not_ended() -> None:
    async def frames() -> AsyncIterator[bytes]:
        yield b'data: {"choices":[{"delta":{"content":"say \\"data: {\\\\\\"error\\""}}]}\n\n'
        yield b'data: {"choices":[]}\n\ndata: {"error": {"code": 500}}\n\ndata: [DONE]\n\n'
        yield b"never seen"

    watched = Watched(Reply(200, (), frames()), "chat-0")
    assert (await anext(watched)).startswith(b'data: {"choices":[{"delta"')
    assert await anext(watched) == b'data: {"choices":[]}\n\n'
    with pytest.raises(Broken, match="chat-0: the engine failed amid the answer"):
        await anext(watched)


# ---- a real one --------------------------------------------------------------------------------------------


@pytest.fixture
async def real(engine_gateway: GatewayProcess, tmp_path: Path) -> AsyncIterator[VllmRuntime]:
    """Attached to the session's one engine, which its gateway supervises."""
    site = Site(model=MODEL, replica="chat-0", state=tmp_path, shelf=Shelf(tmp_path / "shelf"))
    async with attached(f"unix:{socket(engine_gateway)}", site) as runtime:
        yield runtime


ASKED = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.mark.engine
async def test_it_holds_a_json_schema(real: VllmRuntime) -> None:
    properties = {"capital": {"type": "string", "maxLength": 12}, "rank": {"type": "integer", "maximum": 9}}
    schema = {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}
    asked = {"type": "json_schema", "json_schema": {"name": "city", "strict": True, "schema": schema}}
    body = {"model": MODEL, "messages": ASKED, "max_tokens": 100, "temperature": 0, "response_format": asked}
    status, answer = await say(real, body)
    assert status == 200
    assert set(msgspec.json.decode(answer["choices"][0]["message"]["content"])) == {"capital", "rank"}


@pytest.mark.engine
async def test_it_calls_a_strict_tool(real: VllmRuntime) -> None:
    parameters = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 12}},
        "required": ["city"],
        "additionalProperties": False,
    }
    function = {"name": "lookup", "strict": True, "parameters": parameters}
    body = {
        "model": MODEL, "messages": ASKED, "max_tokens": 100, "temperature": 0,
        "tools": [{"type": "function", "function": function}],
        "tool_choice": {"type": "function", "function": {"name": "lookup"}},
    }  # fmt: skip
    status, answer = await say(real, body)
    assert status == 200
    [call] = answer["choices"][0]["message"]["tool_calls"]
    assert set(msgspec.json.decode(call["function"]["arguments"])) == {"city"}


@pytest.mark.engine
@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/v1/completions", {"prompt": "Once", "max_tokens": 4}, "completion_tokens"),
        ("/v1/responses", {"input": "Once", "max_output_tokens": 4}, "output_tokens"),
        ("/v1/messages", {"messages": ASKED, "max_tokens": 4}, "output_tokens"),
    ],
)
async def test_it_speaks_the_other_dialects(real: VllmRuntime, path: str, body: dict[str, Any], field: str) -> None:
    status, answer = await say(real, {"model": MODEL, **body}, path)
    assert (status, answer["usage"][field]) == (200, 4)


@pytest.mark.engine
async def test_every_chunk_carries_the_usage_so_far(real: VllmRuntime) -> None:
    wanted = {"include_usage": True, "continuous_usage_stats": True}
    body = {"model": MODEL, "messages": ASKED, "max_tokens": 5, "ignore_eos": True, "stream": True}
    request = Exchange(
        "/v1/chat/completions", msgspec.json.encode({**body, "stream_options": wanted}), time.monotonic() + 60
    )
    async with real.exchange(request) as reply:
        text = b"".join([frame async for frame in reply.frames]).decode()
    chunks = [msgspec.json.decode(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == 5


def addresses_of(pids: list[int]) -> set[str]:
    """Addresses that these processes listen on, as /proc/net writes them; see proc_pid_net(5)."""
    sockets = {str(it.readlink()) for pid in pids for it in Path(f"/proc/{pid}/fd").iterdir()}
    lines = [
        line.split() for table in ("tcp", "tcp6") for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]
    ]
    return {it[1] for it in lines if it[3] == "0A" and f"socket:[{it[9]}]" in sockets}


@pytest.mark.engine
def test_it_listens_on_nothing_but_loopback(engine_gateway: GatewayProcess) -> None:
    listening = addresses_of(processes(engine_gateway))
    assert listening
    assert {it.partition(":")[0] for it in listening} == {"0100007F"}
