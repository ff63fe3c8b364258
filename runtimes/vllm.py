"""vLLM as a supervised engine: an API server in an environment of its own, on a Unix socket.

Nobody but this user's processes can reach the engine: its API listens on the socket only, in a folder that is closed
to others, and what its processes say among themselves stays on loopback. On a CPU it runs without
compilation, because that costs minutes at each start and gains at most a fifth, and with the model in the engine's
process instead of a worker's, which saves a third of the start and half a gigabyte.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from runtimes.artifact import Artifact, Folder, Hub, locate, verify
from runtimes.clock import Clock, SystemClock
from runtimes.contract import (
    PATHS,
    Broken,
    Exchange,
    Generator,
    Invalid,
    Load,
    Reply,
    RuntimeFault,
    Sink,
    Site,
    Unavailable,
)
from runtimes.environment import Environment, EnvironmentFault, Environments
from runtimes.integrity import ShelfFault
from runtimes.process import ENVIRONMENT_KEPT, Command, Dead, Limits, Process, Snapshot, environment, first
from runtimes.wire import Wire

MODULE = "vllm.entrypoints.launchers.api_server.entry"
"""The `vllm` command does not work in the CPU distribution, which has another name."""

SOCKET_BYTES_MAX = 107
"""Longest path that the kernel takes for a Unix socket; see unix(7)."""
SOCKET_NAME_BYTES = 37
"""Of that, vLLM's processes use so many for the names of the sockets between them."""

FAILED = (b'data: {"error"', b"event: error")
"""How vLLM says amid a stream that its engine is dead. It then ends the stream as if all were well."""

HUB_ENVIRONMENT = ("HF_HOME", "HF_TOKEN", "HF_ENDPOINT", "HTTPS_PROXY", "https_proxy", "NO_PROXY", "no_proxy")
"""What an engine that fetches its model gets to see in addition."""

REFUSED = frozenset(
    {
        # Headrace sets these itself.
        *("--model", "--served-model-name", "--uds", "--host", "--port", "--grpc", "--grpc-port", "--api-key"),
        *("--config", "--load-format", "--max-model-len", "--max-num-seqs", "--kv-cache-memory-bytes", "--dtype"),
        *("--tool-call-parser", "--enable-auto-tool-choice", "--allowed-media-domains", "--headless"),
        # These let a model's author or a request run code or read files here.
        *("--trust-remote-code", "--trust-request-chat-template", "--allowed-local-media-path"),
        *("--tool-parser-plugin", "--reasoning-parser-plugin", "--middleware", "--logits-processors"),
        *("--worker-cls", "--worker-extension-cls", "--scheduler-cls", "--io-processor-plugin"),
        # Prompts and completions are in no log.
        *("--enable-log-requests", "--enable-log-outputs", "--enable-log-deltas"),
    }
)

_JSON = (b"content-type", b"application/json")


class Vllm(msgspec.Struct, tag="vllm", tag_field="kind", frozen=True, forbid_unknown_fields=True):
    """A language model on vLLM. `headrace engine install vllm` makes the engine's environment."""

    artifact: str
    """Shelf alias (`smollm2@stable`), folder in Hugging Face's layout (`./model`), or Hugging Face id
    (`organisation/name`, fetched by the engine). Weights must be safetensors."""
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
        for arg in self.args:
            # vLLM takes underscores for dashes and any unambiguous beginning for the option.
            option = arg.partition("=")[0].replace("_", "-")
            if not option.startswith("--") or option == "--reasoning-parser":  # an option of its own
                continue
            if hit := [it for it in REFUSED if it.startswith(option)]:
                raise ValueError(f"args must not hold {arg!r}: {min(hit)} is Headrace's to set, or unsafe")

    @property
    def slots(self) -> int:
        return self.running_max

    def build(self, site: Site, *, clock: Clock | None = None) -> VllmRuntime:
        return VllmRuntime(spec=self, site=site, clock=clock or SystemClock())


class VllmRuntime:
    """See Vllm. A Generator."""

    meters_each_chunk = True
    upstream_model: str | None = None

    def __init__(self, *, spec: Vllm, site: Site, clock: Clock) -> None:
        self._spec = spec
        self._site = site
        self._clock = clock
        self._process: Process | None = None
        self._wire: Wire | None = None
        self._probe_wire: Wire | None = None
        self._running = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._closing = False

    async def open(self) -> None:
        """Verify the artifact, start the engine, and return when it answers. After a failed start it is tried
        again, until `aclose`; a missing artifact or engine is not."""
        if self._process is not None:
            raise Unavailable(f"{self._site.replica} has been opened already")
        try:
            model = await asyncio.to_thread(self._model)
            environments = Environments(self._site.state.absolute())
            engine = environments.find("vllm", self._spec.version)
        except (ShelfFault, EnvironmentFault) as error:
            raise Unavailable(f"{self._site.replica}: {error}") from error
        socket = scratch(self._site) / "api.sock"
        self._wire = self._connect(socket, connections_max=max(64, 4 * self._spec.running_max))
        # A pool of its own: a probe that waits behind calls would take a busy engine for a hung one.
        self._probe_wire = self._connect(socket, connections_max=1)
        self._heads = {path: self._wire.head("POST", path, (_JSON,)) for path in PATHS}
        self._health = self._wire.head("GET", "/health")
        python = environments.folder(engine) / "bin" / "python"
        self._process = Process(
            name=self._site.replica,
            state=self._site.state.absolute(),
            command=command(self._spec, self._site, model, engine, python, socket=socket),
            probe=self._probe,
            clock=self._clock,
            limits=Limits(start_s_max=self._spec.start_s_max),
        )
        await self._process.open()

    @asynccontextmanager
    async def exchange(self, request: Exchange) -> AsyncIterator[Reply]:
        wire = self._admit()
        head = self._heads.get(request.path)
        if head is None:
            raise Invalid(f"{self._site.replica} answers only {', '.join(sorted(PATHS))}")
        self._running += 1
        self._idle.clear()
        try:
            async with wire.exchange(head, request.headers, request.body, request.deadline_s) as reply:
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
        return Load(running=running, waiting=self._running - running)

    async def ready(self) -> None:
        self._admit()
        await self._probe()

    def snapshot(self) -> Snapshot | None:
        """The engine's process; None before `open`."""
        return None if self._process is None else self._process.snapshot()

    async def aclose(self) -> None:
        self._closing = True
        if self._process is not None and self._process.snapshot().phase == "ready":
            await first(self._idle.wait(), self._clock.sleep(self._spec.drain_s_max))
        for wire in (self._wire, self._probe_wire):
            if wire is not None:
                await wire.aclose()
        if self._process is not None:
            await self._process.aclose()

    def _admit(self) -> Wire:
        if self._process is None or self._wire is None:
            raise Unavailable(f"{self._site.replica} is not open")
        if self._closing:
            raise Unavailable(f"{self._site.replica} is being stopped")
        self._process.check()
        return self._wire

    async def _probe(self) -> None:
        assert self._probe_wire is not None
        who = self._site.replica
        try:
            async with self._probe_wire.exchange(self._health, (), b"", self._clock.now_s() + 5) as reply:
                async for _ in reply.frames:
                    pass
        except Unavailable:
            raise
        except RuntimeFault as error:
            raise Unavailable(f"{who} does not answer: {error}") from error
        if reply.status != 200:
            raise Dead(f"{who} answers, but says that its engine is dead (HTTP {reply.status})")

    def _model(self) -> Artifact | Folder | Hub:
        """What to serve; on the Shelf, proven to be what was published."""
        found = locate(self._spec.artifact, self._site.shelf)
        if isinstance(found, Artifact):
            if (found.manifest.task, found.manifest.format) != ("generate", "safetensors"):
                raise ShelfFault(
                    f"{self._spec.artifact} is a model to {found.manifest.task} in {found.manifest.format} format; "
                    "vLLM serves models to generate in safetensors format"
                )
            verify(found)
        return found

    def _connect(self, socket: Path, *, connections_max: int) -> Wire:
        return Wire(
            "http://localhost",
            uds=socket,
            connections_max=connections_max,
            connect_s_max=5.0,
            idle_s_max=self._spec.idle_s_max,
            clock=self._clock,
        )


class Watched:
    """The frames of a reply, of which none pretends that an answer cut short is whole."""

    __slots__ = ("_failed", "_next", "_pour", "_replica")

    def __init__(self, reply: Reply, replica: str) -> None:
        self._next = reply.frames.__anext__
        self._pour = reply.pour
        self._replica = replica
        self._failed = False

    def __aiter__(self) -> Watched:
        return self

    async def __anext__(self) -> bytes:
        while True:
            if self._failed:
                raise self._fault()
            if frame := self._sound(await self._next()):
                return frame

    async def pour(self, sink: Sink) -> None:
        assert self._pour is not None
        await self._pour(WatchedSink(self, sink))

    def _sound(self, frame: bytes) -> bytes:
        """The part of it before the engine said that it has failed."""
        for mark in FAILED:
            at = frame.find(mark)
            if at == 0 or (at > 0 and frame[at - 1] == 10):  # at the start of a line
                self._failed = True
                return frame[:at]
        return frame

    def _fault(self) -> Broken:
        return Broken(f"{self._replica}: the engine failed amid the answer; it is being restarted")


class WatchedSink:
    """See Watched."""

    __slots__ = ("_sink", "_watched", "drained")

    def __init__(self, watched: Watched, sink: Sink) -> None:
        self._watched = watched
        self._sink = sink
        self.drained = sink.drained

    @property
    def done(self) -> bool:
        return self._sink.done

    def take(self, part: bytes) -> bool:
        go_on = self._sink.take(self._watched._sound(part))
        if self._watched._failed:
            raise self._watched._fault()
        return go_on


def scratch(site: Site) -> Path:
    """Where the engine's sockets will be. In a deep state folder their names would be too long."""
    folder = site.state.absolute() / "run" / site.replica
    if len(os.fsencode(folder)) + SOCKET_NAME_BYTES <= SOCKET_BYTES_MAX:
        return folder
    name = hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"headrace-{os.getuid()}-{name}"


def command(
    spec: Vllm,
    site: Site,
    model: Artifact | Folder | Hub,
    engine: Environment,
    python: Path,
    *,
    socket: Path,
) -> Command:
    """How to start vLLM for this. A pure function, but for what it inherits of the environment."""
    hub = isinstance(model, Hub)
    where = model.id if isinstance(model, Hub) else str(model.path)
    options = {
        "--model": where,
        "--served-model-name": site.model,
        "--uds": str(socket),
        "--load-format": "safetensors",
        "--max-model-len": str(spec.tokens_max or "auto"),
        "--max-num-seqs": str(spec.running_max),
        # Otherwise the engine would fetch whatever URL a client puts into a message.
        "--allowed-media-domains": "none.invalid",
        "--uvicorn-log-level": "warning",
    }
    flags = ["--disable-uvicorn-access-log", "--disable-fastapi-docs", "--enable-prompt-tokens-details"]
    env = {
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_COLOR": "1",
        "TMPDIR": str(socket.parent),
        # Holds what vLLM finds out about a model's class, which takes it 10 s the first time.
        "VLLM_CACHE_ROOT": str(site.state.absolute() / "cache" / "vllm"),
    }
    if not hub:
        env["HF_HUB_OFFLINE"] = "1"
    if engine.device == "cpu":
        options["--dtype"] = spec.dtype if spec.dtype != "auto" else cpu_dtype(model)
        options["--kv-cache-memory-bytes"] = str(spec.kv_cache_bytes or 512 << 20)
        options["--block-size"] = "32"  # the least it takes: prompts are reused in whole blocks
        options["--distributed-executor-backend"] = "uni"
        flags.append("--enforce-eager")
        env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # else "uni" becomes "mp" on a CPU
        # Else the first call with `prompt_logprobs` compiles for half a minute while every other call waits.
        env["TORCHDYNAMO_DISABLE"] = "1"
        env["OMP_NUM_THREADS"] = str(spec.threads or max(1, cores() - 1))
    else:
        options["--dtype"] = spec.dtype
        if spec.kv_cache_bytes is not None:
            options["--kv-cache-memory-bytes"] = str(spec.kv_cache_bytes)
    if spec.tool_parser is not None:
        options["--tool-call-parser"] = spec.tool_parser
        flags.append("--enable-auto-tool-choice")
    kept = (*ENVIRONMENT_KEPT, "CUDA_VISIBLE_DEVICES", *(HUB_ENVIRONMENT if hub else ()))
    # -P: modules come from the engine's environment, never from the folder the gateway was started in.
    argv = [str(python), "-P", "-m", MODULE, *(part for pair in options.items() for part in pair), *flags]
    return Command((*argv, *spec.args), environment(env, kept=kept), socket.parent)


def cpu_dtype(model: Artifact | Folder | Hub) -> str:
    """Unquantized bfloat16 has no instructions on most CPUs and is four times slower than float32; quantized
    weights are computed by integer instructions and are fastest, some only right, beside bfloat16."""
    if isinstance(model, Hub):
        return "auto"
    config = msgspec.json.decode((model.path / "config.json").read_bytes(), type=dict[str, Any])
    return "bfloat16" if "quantization_config" in config else "float32"


def cores() -> int:
    """Physical cores this process may use; threads of one core share its arithmetic."""
    siblings = set()
    for cpu in os.sched_getaffinity(0):
        try:
            listed = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text()
        except FileNotFoundError:
            listed = str(cpu)
        siblings.add(listed)
    return len(siblings)


def _conforms(it: VllmRuntime) -> Generator:
    return it
