"""A model that is an adapter on a vLLM follows its alias while calls go on, and survives the engine's restarts."""

import asyncio
import http.server
import json
import socketserver
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gateway.promotion import Source
from gateway.replica import Replica
from runtimes.artifact import Manifest, Shelf
from runtimes.clock import SystemClock
from runtimes.contract import Exchange, Site, Unavailable
from runtimes.process import scratch
from runtimes.vllm import Vllm, VllmRuntime
from runtimes.vllm_command import command
from tests import lora
from tests.runtimes.test_vllm import CPU

LAYERS = {"model.layers.0.self_attn.q_proj.weight": (8, 6)}


class Engine(http.server.ThreadingHTTPServer):
    """Behaves as vLLM does, as far as adapters are concerned."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.loaded: dict[str, str] = {}
        """Name → path."""
        self.loads = 0
        self.refuses = False
        self.asked = 0
        self.go_on = threading.Event()
        """Answers wait for it."""
        self.go_on.set()

    @property
    def engine(self) -> "Engine":
        return self

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Any
    """An Engine, or its socket."""

    def address_string(self) -> str:
        return "somewhere"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.answer(HTTPStatus.OK, {"data": [{"id": name} for name in ("base", *self.server.engine.loaded)]})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.path != "/v1/load_lora_adapter":
            self.server.engine.asked += 1
            self.server.engine.go_on.wait(20)
            there = asked["model"] in self.server.engine.loaded
            return self.answer(HTTPStatus.OK if there else HTTPStatus.NOT_FOUND, {"model": asked["model"]})
        self.server.engine.loads += 1
        if self.server.engine.refuses or asked["lora_name"] in self.server.engine.loaded:
            return self.answer(HTTPStatus.BAD_REQUEST, {"error": {"message": "it does not please me\nat all"}})
        self.server.engine.loaded[asked["lora_name"]] = asked["lora_path"]
        return self.answer(HTTPStatus.OK, "Success")

    def answer(self, status: HTTPStatus, content: object) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def engine() -> Iterator[Engine]:
    with Engine() as engine:
        thread = threading.Thread(target=engine.serve_forever, args=(0.01,))
        thread.start()
        yield engine
        engine.shutdown()
        thread.join()


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """A shelf with a base and `persona@stable`, an adapter for it."""
    shelf = Shelf(tmp_path / "shelf")
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    lora.safetensors(base / "model.safetensors", LAYERS)
    lora.published(shelf, base, name="base")
    put(shelf, tmp_path / "first", rank=2)
    return Site(model="persona", replica="persona-0", state=tmp_path, shelf=shelf)


def put(shelf: Shelf, folder: Path, *, rank: int, fits: str = "tiny 1.0") -> Manifest:
    """Publish and promote one more version of the adapter."""
    return lora.published(shelf, lora.adapter(folder, LAYERS, rank=rank), name="persona", format="adapter", fits=fits)


@asynccontextmanager
async def opened(engine: Engine, site: Site) -> AsyncIterator[VllmRuntime]:
    runtime = Vllm(url=engine.url, adapter="persona@stable", base="base@stable").build(site)
    try:
        await runtime.open()
        await runtime.ready()
        yield runtime
    finally:
        await runtime.aclose()


async def say(runtime: VllmRuntime) -> tuple[int, Any]:
    body = msgspec.json.encode({"model": runtime.upstream_model})
    async with runtime.exchange(Exchange("/v1/chat/completions", body, time.monotonic() + 60)) as reply:
        content = b"".join([frame async for frame in reply.frames])
    return reply.status, msgspec.json.decode(content)


def name(site: Site) -> str:
    return f"persona@{site.shelf.resolve('persona').manifest.version}"


async def test_it_answers_under_the_name_of_its_version(engine: Engine, site: Site) -> None:
    async with opened(engine, site) as runtime:
        assert await say(runtime) == (200, {"model": name(site)})
    assert engine.loaded == {name(site): str(site.shelf.resolve("persona").path)}


async def test_one_that_the_engine_refuses_is_told_with_its_words(engine: Engine, site: Site) -> None:
    engine.refuses = True
    with pytest.raises(Unavailable, match=r"persona-0: the engine does not take persona@stable \(400\): it does not p"):
        async with opened(engine, site):
            pass


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"rank": 32}, r"persona-0: .* has rank 32, and the engine was started for 16 at most"),
        ({"rank": 2, "fits": "other 2.0"}, "trained on other 2.0"),
    ],
)
async def test_one_that_does_not_fit_never_reaches_the_engine(
    engine: Engine, site: Site, tmp_path: Path, change: Any, match: str
) -> None:
    put(site.shelf, tmp_path / "bad", **change)
    with pytest.raises(Unavailable, match=match):
        async with opened(engine, site):
            pass
    assert engine.loads == 0


async def test_an_engine_that_was_restarted_gets_it_again(engine: Engine, site: Site) -> None:
    async with opened(engine, site) as runtime:
        engine.loaded.clear()
        await runtime.ready()
        assert (await say(runtime))[0] == 200


async def test_a_second_process_uses_what_the_first_has_loaded(engine: Engine, site: Site) -> None:
    async with opened(engine, site), opened(engine, site) as second:
        assert (await say(second))[0] == 200
    assert engine.loads == 1


# ---- on an engine that another replica starts --------------------------------------------------------------


class Local(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    """Engine's socket, where another replica's is."""

    daemon_threads = True

    def __init__(self, path: str, engine: Engine) -> None:
        self.engine = engine
        super().__init__(path, Handler)


@pytest.fixture
def shared(engine: Engine, site: Site) -> Iterator[Source]:
    """What a replica of `persona` runs, as an adapter on the engine of `base-0`."""
    generation = site.shelf.resolve("base").manifest.version
    folder = scratch(msgspec.structs.replace(site, replica="base-0", generation=generation))
    folder.mkdir(parents=True)
    spec = Vllm(artifact="base@stable", adapters={"persona": "persona@stable"}).adapted("base-0", "persona@stable")
    with Local(str(folder / "api.sock"), engine) as local:
        thread = threading.Thread(target=local.serve_forever, args=(0.01,))
        thread.start()
        yield Source(spec, site, attached=False)
        local.shutdown()
        thread.join()


@asynccontextmanager
async def running(source: Source) -> AsyncIterator[Replica]:
    replica = Replica(name="persona-0", model="persona", kind="vllm", source=source, slots=2, clock=SystemClock())
    replica.start()
    try:
        async with asyncio.timeout(20):
            await replica.up.wait()
        yield replica
    finally:
        await replica.aclose()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


def used(replica: Replica) -> str | None:
    assert replica.generator is not None
    return replica.generator.upstream_model


async def test_a_promotion_is_followed_and_a_rollback_too(
    engine: Engine, site: Site, shared: Source, tmp_path: Path
) -> None:
    async with running(shared) as replica:
        first = used(replica)
        assert first == name(site)
        put(site.shelf, tmp_path / "second", rank=3)
        await until(lambda: used(replica) == name(site) != first)
        assert first in engine.loaded, "calls under way may still name it"
        site.shelf.rollback("persona")
        await until(lambda: used(replica) == first)
    assert engine.loads == 2, "going back loads nothing again"


@pytest.mark.parametrize(
    ("change", "match"), [({"rank": 32}, "has rank 32"), ({"rank": 2, "fits": "other 2.0"}, "trained on other 2.0")]
)
async def test_a_promoted_one_that_does_not_fit_leaves_the_one_before_in_use(
    site: Site, shared: Source, tmp_path: Path, change: Any, match: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(shared) as replica:
        first = used(replica)
        put(site.shelf, tmp_path / "bad", **change)
        await until(lambda: any("goes on with" in it for it in caplog.messages))
        assert used(replica) == first
        assert replica.generator is not None
        await replica.generator.ready()
    assert match in next(it for it in caplog.messages if "goes on with" in it)


async def test_a_call_under_way_ends_on_the_version_that_it_began_with(
    engine: Engine, site: Site, shared: Source, tmp_path: Path
) -> None:
    async with running(shared) as replica:
        former = replica.generator
        assert isinstance(former, VllmRuntime)
        engine.go_on.clear()
        first = used(replica)
        call = asyncio.create_task(say(former))
        await until(lambda: engine.asked)
        put(site.shelf, tmp_path / "second", rank=3)
        await until(lambda: used(replica) != first)
        await until(lambda: former._closing)
        engine.go_on.set()
        assert await call == (200, {"model": first})


async def test_another_base_is_another_engine(site: Site, shared: Source, tmp_path: Path) -> None:
    before = shared.build(shared.version())
    (tmp_path / "base" / "config.json").write_text('{"changed": true}')
    lora.published(site.shelf, tmp_path / "base", name="base")
    after = shared.build(shared.version())
    assert isinstance(before, VllmRuntime)
    assert isinstance(after, VllmRuntime)
    assert before._spec.url != after._spec.url


def test_an_engine_with_adapters_is_started_for_them(site: Site, tmp_path: Path) -> None:
    spec = Vllm(artifact="base@stable", adapters={"persona": "persona@stable"}, adapter_rank_max=8)
    found = command(spec, site, site.shelf.resolve("base"), CPU, Path("python"), socket=tmp_path / "s")
    options = dict(zip(found.argv, found.argv[1:], strict=False))
    assert (options["--max-lora-rank"], options["--max-loras"]) == ("8", "2")
    assert "--enable-lora" in found.argv
    assert found.env["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "True"


def test_an_engine_without_adapters_can_load_none(site: Site, tmp_path: Path) -> None:
    found = command(
        Vllm(artifact="base@stable"), site, site.shelf.resolve("base"), CPU, Path("python"), socket=tmp_path / "s"
    )
    assert "--enable-lora" not in found.argv
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING" not in found.env


async def test_a_quantized_base_takes_none_on_a_cpu(site: Site, tmp_path: Path) -> None:
    base = tmp_path / "small"
    base.mkdir()
    (base / "config.json").write_text('{"quantization_config": {}}')
    (base / "model.safetensors").touch()
    home = site.state / "engines" / "vllm-0.32.0"
    home.mkdir(parents=True)
    (home / ".ready").write_bytes(msgspec.json.encode(CPU))
    runtime = Vllm(artifact=str(base), adapters={"persona": "persona@stable"}).build(site)
    with pytest.raises(Unavailable, match="is quantized, and on a CPU vLLM puts adapters on plain weights only"):
        await runtime.open()
    await runtime.aclose()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"artifact": "x", "adapter": "y"}, "`adapter` and `shares` belong together"),
        ({"url": "http://h", "adapters": {"a": "y"}}, "`adapters` means nothing beside `url`"),
        ({"artifact": "x", "shares": "y-0"}, "`adapter` and `shares` belong together"),
        ({"artifact": "x", "adapter": "y", "shares": "z-0", "threads": 2}, "`threads` means nothing beside `shares`"),
        ({"url": "http://h", "adapter": "y", "shares": "z-0"}, "`url` means nothing beside `shares`"),
        ({"url": "http://h", "adapter": "y", "model": "z"}, "`model` means nothing beside `adapter`"),
        ({"artifact": "x", "task": "embed", "adapters": {"a": "y"}}, "`adapters` are for language models"),
        ({"artifact": "x", "args": ["--enable-lora"]}, "--enable-lora is Headrace's to set"),
    ],
)
def test_contradictions_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=match):
        msgspec.convert({"kind": "vllm"} | options, Vllm)
