"""vLLM: a supervised engine, which is an API server in an environment of its own, or one that runs elsewhere.

How the gateway speaks to it, when it takes it for ready or dead, and what it never lets pass for a whole answer are the
same for both. How one of our own is started is in `runtimes.vllm_command`.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, ClassVar, Literal

import msgspec

from runtimes.artifact import Artifact, Folder, Hub, locate, verify
from runtimes.clock import Clock, SystemClock
from runtimes.contract import (
    GENERATING,
    Exchange,
    Generator,
    Invalid,
    Load,
    Reply,
    RuntimeFault,
    Site,
    Unavailable,
)
from runtimes.environment import EnvironmentFault, Environments
from runtimes.integrity import ShelfFault
from runtimes.process import Dead, Limits, Process, Snapshot, first, scratch
from runtimes.remote import authorization
from runtimes.vllm_adapter import Loader
from runtimes.vllm_command import REFUSED, command, quantized
from runtimes.vllm_stream import Watched
from runtimes.wire import Head, Wire

ROUTES = MappingProxyType(
    {
        "generate": GENERATING,
        "embed": frozenset({"/v1/embeddings", "/v1/score", "/v1/rerank"}),
        "score": frozenset({"/v1/score", "/v1/rerank"}),
        "classify": frozenset({"/v1/classify"}),
    }
)
"""What a model answers, by what it is for. Not moderation: vLLM's answers know labels, but no thresholds."""

OWN_PATHS = MappingProxyType({"/v1/score": "/score", "/v1/rerank": "/rerank", "/v1/classify": "/classify"})
"""Where vLLM has what is not OpenAI's."""

STARTED_HERE = frozenset(
    {
        *("artifact", "version", "dtype", "tokens_max", "kv_cache_bytes", "threads", "tool_parser", "args"),
        *("start_s_max", "drain_s_max", "adapters"),
    }
)
RUNS_ELSEWHERE = frozenset({"url", "model", "key_env", "base"})
"""Settings that only an engine has that is started here, or that is not. The others mean something to both."""

_URL = re.compile(r"https?://([0-9A-Za-z._-]+|\[[0-9A-Fa-f:.]+\])(:(?P<port>[0-9]{1,5}))?|unix:/[^\x00]+")
_JSON = (b"content-type", b"application/json")


class Vllm(msgspec.Struct, tag="vllm", tag_field="kind", frozen=True, forbid_unknown_fields=True):
    """A model on vLLM: with `artifact` on an engine that is started and supervised here, whose environment
    `headrace engine install vllm` makes; with `url` on one that somebody else looks after."""

    artifact: str | None = None
    """Shelf alias (`smollm2@stable`), folder in Hugging Face's layout (`./model`), or Hugging Face id
    (`organisation/name`, fetched by the engine). Weights must be safetensors."""
    url: str | None = None
    """Where a vLLM answers that runs already: `http://HOST:PORT`, `https://HOST`, or `unix:/PATH` of its socket."""
    model: str | None = None
    """The name that one knows the model by; None if it is the gateway's own name for it."""
    key_env: str | None = None
    """The environment variable with that one's `--api-key`."""
    task: Literal["generate", "embed", "score", "classify"] = "generate"
    """What the model is for: to write text; or to read it, into vectors, a score for each pair of texts (which takes a
    cross-encoder), or probabilities of labels."""
    version: str | None = None
    """Version of the engine's environment; None takes the newest that is installed."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """`auto` on a CPU: bfloat16 for quantized weights, else float32, because few CPUs multiply bfloat16; on a
    GPU, and for a model that is still to be fetched: what the model says."""
    tokens_max: Annotated[int, msgspec.Meta(ge=16)] | None = None
    """Longest prompt and completion together; None takes as many as the model and the cache allow."""
    running_max: Annotated[int, msgspec.Meta(ge=1, le=4096)] = 16
    """Calls that the engine computes at once; what comes on top waits in the gateway, where it is fair."""
    kv_cache_bytes: Annotated[int, msgspec.Meta(ge=1 << 24)] | None = None
    """Memory for attention keys and values, taken at the start; None is 512 MiB on a CPU and vLLM's own
    choice on a GPU."""
    threads: Annotated[int, msgspec.Meta(ge=1, le=1024)] | None = None
    """Compute threads on a CPU; None is one per core but one. On a shared machine, too many are much worse than
    too few: they wait for each other by spinning."""
    adapters: dict[str, str] = {}
    """LoRA adapters that share this engine: one more model's name → its adapter, on the shelf or in a folder. An alias
    is followed: a version that is promoted is served within two seconds, and no call fails for it. Each has
    `running_max` places of its own; what is too much for the engine waits there. On a CPU `artifact` must not be
    quantized then."""
    adapter: str | None = None
    """What this model adds to one that an engine serves: another replica's here, or the one at `url`, which must read
    the shelf at the same path and run with `--enable-lora` and `VLLM_ALLOW_RUNTIME_LORA_UPDATING=True`."""
    shares: str | None = None
    """That replica's name, e.g. `base-0`, and `artifact` is what it serves. `adapters` there says the same, shorter."""
    base: str | None = None
    """What the engine at `url` serves, as `artifact` would say it, to check the adapter against. None: it is not."""
    adapter_rank_max: Literal[1, 8, 16, 32, 64, 128, 256, 320, 512] = 16
    """The engine keeps room for adapters up to this rank, and takes longer the larger it is."""
    tool_parser: str | None = "hermes"
    """How the model writes tool calls, by vLLM's name for it; None switches tool calls off."""
    args: tuple[str, ...] = ()
    """Further options of vLLM's server, as they are, e.g. `["--reasoning-parser=qwen3"]`."""
    start_s_max: Annotated[float, msgspec.Meta(gt=0)] = 600.0
    """From start to the first answer; a model that must be fetched needs longer."""
    idle_s_max: Annotated[float, msgspec.Meta(gt=0)] = 120.0
    """Longest silence within an answer that has begun."""
    drain_s_max: Annotated[float, msgspec.Meta(ge=0)] = 30.0
    """How long calls under way may go on when the engine is to stop."""

    def __post_init__(self) -> None:
        if (self.artifact is None) == (self.url is None):
            raise ValueError(
                "give either `artifact`, for an engine that is started here, or `url`, for one that is not"
            )
        if self.url is not None:
            found = _URL.fullmatch(self.url)
            if not found or int(found["port"] or 0) > 65_535:
                raise ValueError("`url` must be http(s)://HOST[:PORT] in plain ASCII and without a path, or unix:/PATH")
        alien, given = (RUNS_ELSEWHERE, "artifact") if self.url is None else (STARTED_HERE | {"shares"}, "url")
        if self.shares is not None:
            alien, given = RUNS_ELSEWHERE | STARTED_HERE - {"artifact"}, "shares"
        for field in msgspec.structs.fields(self):
            if field.name in alien and getattr(self, field.name) not in (field.default, {}):
                raise ValueError(f"`{field.name}` means nothing beside `{given}`; leave it out")
        for arg in self.args:
            # vLLM takes underscores for dashes and any unambiguous beginning for the option.
            option = arg.partition("=")[0].replace("_", "-")
            if not option.startswith("--") or option == "--reasoning-parser":  # an option of its own
                continue
            if hit := [it for it in REFUSED if it.startswith(option)]:
                raise ValueError(f"args must not hold {arg!r}: {min(hit)} is Headrace's to set, or unsafe")

        if (self.adapter is None) != (self.shares is None) and self.url is None:
            raise ValueError(
                "`adapter` and `shares` belong together; or put the adapter into `adapters` of that replica"
            )
        if self.model is not None and self.adapter is not None:
            raise ValueError("`model` means nothing beside `adapter`, whose name follows its version; leave it out")
        if self.adapters and self.task != "generate":
            raise ValueError('`adapters` are for language models; leave them out, or `task = "generate"`')

    in_process: ClassVar[bool] = False

    @property
    def slots(self) -> int:
        return self.running_max

    def attached(self, site: Site) -> Vllm:
        """The engine that one process starts here, as the others of this host reach it, and models that share it."""
        engine = site if self.shares is None else msgspec.structs.replace(site, replica=self.shares)
        return Vllm(
            url=f"unix:{_socket(engine)}",
            task=self.task,
            adapter=self.adapter,
            base=None if self.adapter is None else self.artifact,
            adapter_rank_max=self.adapter_rank_max,
            running_max=self.running_max,
            idle_s_max=self.idle_s_max,
        )

    def adapted(self, replica: str, adapter: str) -> Vllm:
        """One of `adapters`, as a replica of another model on the engine of this one, whose name is `replica`."""
        return Vllm(
            artifact=self.artifact,
            adapter=adapter,
            shares=replica,
            adapter_rank_max=self.adapter_rank_max,
            running_max=self.running_max,
            idle_s_max=self.idle_s_max,
        )

    def build(self, site: Site, *, clock: Clock | None = None) -> VllmRuntime:
        return VllmRuntime(spec=self, site=site, clock=clock or SystemClock())


class VllmRuntime:
    """See Vllm. A Generator."""

    meters_each_chunk = True

    def __init__(self, *, spec: Vllm, site: Site, clock: Clock) -> None:
        self.upstream_model = spec.model
        self.routes = ROUTES[spec.task]
        self._spec = spec
        self._site = site
        self._clock = clock
        self._process: Process | None = None
        self._heads: dict[str, Head] = {}
        self._wire: Wire | None = None
        self._probe_wire: Wire | None = None
        self._adapter: Loader | None = None
        self._running = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._closing = False

    async def open(self) -> None:
        """Verify the artifact, start the engine, and return when it answers. After a failed start the engine is
        tried again by itself, until `aclose`; a missing artifact or environment is looked for when `open` is called
        again. Of an engine elsewhere only the configuration is checked: one that is down today must not keep the
        gateway from starting, and `ready` says so."""
        if self._closing:
            raise Unavailable(f"{self._site.replica} is being stopped")
        if self._spec.url is None:
            self._process = self._process or await self._prepare()
            await self._process.open()
        elif self._wire is None:
            self._reach(self._spec.url, *authorization(self._site, self._spec.url, self._spec.key_env))

    async def _prepare(self) -> Process:
        try:
            model = await asyncio.to_thread(self._model)
            environments = Environments(self._site.state.absolute())
            engine = environments.find("vllm", self._spec.version)
            if self._spec.adapters and engine.device == "cpu" and quantized(model):
                raise ShelfFault(
                    f"{self._spec.artifact} is quantized, and on a CPU vLLM puts adapters on plain weights only: name "
                    "its base in fp32, or merge the adapter and quantize the whole"
                )
        except (ShelfFault, EnvironmentFault) as error:
            raise Unavailable(f"{self._site.replica}: {error}") from error
        socket = _socket(self._site)
        self._reach(f"unix:{socket}")
        python = environments.folder(engine) / "bin" / "python"
        return Process(
            name=self._site.engine,
            state=self._site.state.absolute(),
            command=command(self._spec, self._site, model, engine, python, socket=socket),
            probe=self._probe,
            clock=self._clock,
            limits=Limits(start_s_max=self._spec.start_s_max),
        )

    @asynccontextmanager
    async def exchange(self, request: Exchange) -> AsyncIterator[Reply]:
        wire = self._admit()
        head = self._heads.get(request.path)
        if head is None:
            raise Invalid(f"{self._site.replica} answers only {', '.join(sorted(self.routes))}")
        self._running += 1
        self._idle.clear()
        try:
            async with wire.exchange(
                head, request.headers, request.body, request.deadline_s, request.begin_by_s
            ) as reply:
                if reply.status >= 500:
                    await self._probe()  # an engine that has just died says 500 to all; others may do it
                watched = Watched(reply, self._site.replica)
                yield Reply(reply.status, reply.headers, watched, watched.pour)
        finally:
            self._running -= 1
            if not self._running:
                self._idle.set()

    def load(self) -> Load:
        """The engine's own queue begins where `running_max` ends."""
        running = min(self._running, self._spec.running_max)
        connections = 0 if self._wire is None else self._wire.connections
        return Load(running=running, waiting=self._running - running, connections=connections)

    async def ready(self) -> None:
        self._admit()
        await self._probe()
        if self._adapter is not None:
            self.upstream_model = await self._adapter.loaded()

    def snapshot(self) -> Snapshot | None:
        """The engine's process; None before `open`, and of an engine elsewhere."""
        return None if self._process is None else self._process.snapshot()

    async def aclose(self) -> None:
        self._closing = True
        if self._process is None:
            await self._idle.wait()  # the engine stays, so nothing hurries but the calls' own deadlines
        elif self._process.snapshot().phase == "ready":
            await first(self._idle.wait(), self._clock.sleep(self._spec.drain_s_max))
        for wire in (self._wire, self._probe_wire):
            if wire is not None:
                await wire.aclose()
        if self._process is not None:
            await self._process.aclose()

    def _admit(self) -> Wire:
        if self._wire is None:
            raise Unavailable(f"{self._site.replica} is not open")
        if self._closing:
            raise Unavailable(f"{self._site.replica} is being stopped")
        if self._process is not None:
            self._process.check()
        return self._wire

    async def _probe(self) -> None:
        assert self._probe_wire is not None
        who = self._site.replica
        try:
            deadline_s = self._clock.now_s() + 5
            async with self._probe_wire.exchange(self._health, (), b"", deadline_s) as reply:
                async for _ in reply.frames:
                    pass
        except Unavailable:
            raise
        except RuntimeFault as error:
            raise Unavailable(f"{who} does not answer: {error}") from error
        if reply.status != 200:
            what = "says that its engine is dead" if reply.status == 503 else "not as vLLM does"
            raise Dead(f"{who} answers, but {what} (HTTP {reply.status} at /health)")

    def _model(self) -> Artifact | Folder | Hub:
        """What to serve; on the Shelf, proven to be what was published."""
        assert self._spec.artifact is not None
        found = locate(self._spec.artifact, self._site.shelf)
        if isinstance(found, Artifact):
            if (found.manifest.task, found.manifest.format) != (self._spec.task, "safetensors"):
                raise ShelfFault(
                    f"{self._spec.artifact} is a model to {found.manifest.task} in {found.manifest.format} format; "
                    f"here is served one to {self._spec.task}, in safetensors format"
                )
            verify(found)
        return found

    def _reach(self, url: str, *authorization: tuple[bytes, bytes]) -> None:
        self._wire = self._connect(url, connections_max=max(64, 4 * self._spec.running_max))
        self._heads = {
            path: self._wire.head("POST", OWN_PATHS.get(path, path), (_JSON, *authorization)) for path in self.routes
        }
        self._health = self._wire.head("GET", "/health", authorization)
        # A pool of its own: a probe that waits behind calls would take a busy engine for a hung one.
        self._probe_wire = self._connect(url, connections_max=1)
        if self._spec.adapter is not None:
            self._adapter = Loader(
                reference=self._spec.adapter,
                base=self._spec.base,
                rank_max=self._spec.adapter_rank_max,
                site=self._site,
                wire=self._probe_wire,
                authorization=authorization,
                clock=self._clock,
            )

    def _connect(self, url: str, *, connections_max: int) -> Wire:
        socket = Path(url.removeprefix("unix:")) if url.startswith("unix:") else None
        return Wire(
            "http://localhost" if socket else url,
            uds=socket,
            connections_max=connections_max,
            connect_s_max=5.0,
            idle_s_max=self._spec.idle_s_max,
            clock=self._clock,
        )


def _socket(site: Site) -> Path:
    return scratch(site) / "api.sock"


def _conforms(it: VllmRuntime) -> Generator:
    return it
