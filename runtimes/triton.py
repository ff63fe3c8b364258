"""Triton: a supervised server for one artifact, whose environment `headrace engine install triton` makes, or any model
on one that runs elsewhere.

How calls are sent, and what becomes of the server's errors, is the same for both. How one of our own is started is in
`runtimes.triton_command`, what it runs in `runtimes.triton_model`.
"""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import msgspec

from runtimes.artifact import Artifact, locate, verify
from runtimes.clock import Clock, SystemClock
from runtimes.contract import Expired, InferReply, InferRequest, Load, Predictor, Site, Tensor, Unavailable
from runtimes.environment import EnvironmentFault, Environments
from runtimes.integrity import ShelfFault
from runtimes.pids import Session, lives, youngest
from runtimes.process import Dead, Limits, Process, Snapshot, first, scratch
from runtimes.remote import authorization
from runtimes.triton_command import MODEL, STUB, command, served

if TYPE_CHECKING:
    from runtimes.triton_client import Client, Described

Count = Annotated[int, msgspec.Meta(ge=1)]

STARTED_HERE = frozenset({"artifact", "threads", "batch_max", "start_s_max"})
RUNS_ELSEWHERE = frozenset({"url", "model", "version", "task", "labels", "key_env"})
"""Settings that only a server has that is started here, or that is not. The others mean something to both."""

_URL = re.compile(r"grpcs?://([0-9A-Za-z._-]+|\[[0-9A-Fa-f:.]+\])(:(?P<port>[0-9]{1,5}))?|unix:/[^\x00]+")


class Triton(msgspec.Struct, tag="triton", tag_field="kind", frozen=True, forbid_unknown_fields=True):
    """A model that takes and gives tensors: with `artifact` a classifier or embedder on a Triton that is started and
    supervised here; with `url` and `model` whatever runs on a Triton that somebody else looks after."""

    artifact: str | None = None
    """On the shelf (`name`, `name@alias`, `name@version`) or a folder with a manifest."""
    url: str | None = None
    """Where a Triton answers gRPC: `grpc://HOST:8001`, `grpcs://HOST` for TLS, or `unix:/PATH` of its socket."""
    model: str | None = None
    """The name that one knows the model by."""
    version: str | None = None
    """The model's version there; None is the one which that Triton prefers."""
    task: Literal["classify", "embed"] | None = None
    """What that model is for, if it answers `scores` [n, labels] or `embedding` [n, width]; None if it does neither."""
    labels: tuple[str, ...] = ()
    """What the columns of those `scores` mean."""
    key_env: str | None = None
    """The environment variable with the key that it wants as a bearer token."""
    threads: Count = 1
    """Cores that one batch may use."""
    batch_max: Count | None = None
    """Rows that go through the graph at once; see `onnx`."""
    running_max: Annotated[int, msgspec.Meta(ge=1, le=4096)] = 64
    """Calls that the server has at once and makes batches of; what comes on top waits in the gateway, where it is
    fair."""
    start_s_max: Annotated[float, msgspec.Meta(gt=0)] = 120.0
    """From start to the first answer."""
    drain_s_max: Annotated[float, msgspec.Meta(ge=0)] = 30.0
    """How long calls under way may go on when the replica is to stop."""

    def __post_init__(self) -> None:
        if (self.artifact is None) == (self.url is None):
            raise ValueError("give either `artifact`, for a server that is started here, or `url`, for one that is not")
        if self.url is not None:
            found = _URL.fullmatch(self.url)
            if not found or int(found["port"] or 0) > 65_535:
                raise ValueError("`url` must be grpc(s)://HOST[:PORT] in plain ASCII and without a path, or unix:/PATH")
            if not self.model:
                raise ValueError("beside `url`, `model` must say which of that server's models it is")
        if (self.task == "classify") != bool(self.labels):
            raise ValueError('`task = "classify"` and `labels` go together: the one says what the other is for')
        alien, given = (RUNS_ELSEWHERE, "artifact") if self.url is None else (STARTED_HERE, "url")
        for field in msgspec.structs.fields(self):
            if field.name in alien and getattr(self, field.name) != field.default:
                raise ValueError(f"`{field.name}` means nothing beside `{given}`; leave it out")

    in_process: ClassVar[bool] = False

    @property
    def slots(self) -> int:
        return self.running_max

    def attached(self, site: Site) -> Triton:
        """The server that one process starts here, as the others of this host reach it."""
        return Triton(url=f"unix:{_socket(site)}", model=MODEL, running_max=self.running_max)

    def build(self, site: Site, *, clock: Clock | None = None) -> TritonRuntime:
        return TritonRuntime(spec=self, site=site, clock=clock or SystemClock())


class TritonRuntime:
    """See Triton. A Predictor. Each supervised replica has a server of its own: one that dies, or is stopped, takes no
    other model with it, and 50 MB is all that sharing would save."""

    def __init__(self, *, spec: Triton, site: Site, clock: Clock) -> None:
        self.task = ""
        self.labels: tuple[str, ...] = ()
        self.thresholds: Mapping[str, float] = {}
        self.inputs: tuple[Tensor, ...] = ()
        self.outputs: tuple[Tensor, ...] = ()
        self.platform = ""
        self.version = ""
        self.versions: tuple[str, ...] = ()
        self._spec = spec
        self._site = site
        self._clock = clock
        self._process: Process | None = None
        self._client: Client | None = None
        self._described: Described | None = None
        self._known = False
        self._model: tuple[Session, int] | None = None
        """The process that runs the model, and the start of the server that it belongs to."""
        self._running = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._closing = False

    async def open(self) -> None:
        """Verify the artifact, start the server, and return when the model answers. After a failed start it is tried
        again by itself, until `aclose`. Of a server elsewhere, the model must be ready: only it knows what it takes."""
        if self._closing:
            raise Unavailable(f"{self._site.replica} is being stopped")
        if self._spec.url is None:
            self._process = self._process or await self._prepare()
            await self._process.open()
        elif self._client is None:
            key = authorization(self._site, self._spec.url, self._spec.key_env)
            assert self._spec.model
            self._reach(self._spec.url, self._spec.model, self._spec.version or "", *key)
        await self._describe()

    async def _prepare(self) -> Process:
        try:
            artifact = await asyncio.to_thread(self._artifact)
            environments = Environments(self._site.state.absolute())
            engine = environments.folder(environments.find("triton"))
        except (ShelfFault, EnvironmentFault) as error:
            raise Unavailable(f"{self._site.replica}: {error}") from error
        self._reach(f"unix:{_socket(self._site)}", MODEL, "")
        what = served(artifact, threads=self._spec.threads, batch_max=self._spec.batch_max)
        return Process(
            name=self._site.engine,
            state=self._site.state.absolute(),
            command=command(what, engine, scratch(self._site)),
            probe=self._alive,
            clock=self._clock,
            limits=Limits(start_s_max=self._spec.start_s_max),
        )

    async def infer(self, request: InferRequest) -> InferReply:
        client, described = self._admit()
        self._running += 1
        self._idle.clear()
        try:
            return await client.infer(described, request, self._left_s)
        except Unavailable:
            if self._closing:
                raise Unavailable(f"{self._site.replica} was stopped amid the call") from None
            raise
        finally:
            self._running -= 1
            if not self._running:
                self._idle.set()

    def load(self) -> Load:
        return Load(running=self._running, waiting=0)

    async def ready(self) -> None:
        """After an outage the model may be another one, and of a server elsewhere at any time, so what it is is asked
        anew."""
        if self._client is None or self._closing:
            raise self._refusal()
        if self._process is not None:
            self._process.check()
        try:
            await self._probe()
        except Unavailable:
            self._known = False
            raise
        if self._process is None or not self._known:
            await self._describe()

    def snapshot(self) -> Snapshot | None:
        """The server's process; None before `open`, and of a server elsewhere."""
        return None if self._process is None else self._process.snapshot()

    async def aclose(self) -> None:
        self._closing = True
        if self._running:
            await first(self._idle.wait(), self._clock.sleep(self._spec.drain_s_max))
        if self._client is not None:
            await self._client.aclose()
        if self._process is not None:
            await self._process.aclose()

    def _admit(self) -> tuple[Client, Described]:
        if self._client is None or self._described is None or self._closing:
            raise self._refusal()
        if self._process is not None:
            self._process.check()
        return self._client, self._described

    def _refusal(self) -> Unavailable:
        return Unavailable(f"{self._site.replica} is {'being stopped' if self._closing else 'not open'}")

    async def _probe(self) -> None:
        assert self._client is not None
        await self._client.ready()

    async def _alive(self) -> None:
        """What its supervisor asks. Triton goes on calling a model ready whose process is dead, and fails each call."""
        await self._probe()
        assert self._process is not None
        session = self._process.session()
        assert session is not None
        if self._model is None or self._model[0] != session:
            self._model = session, youngest(session, STUB) or 0
        if not lives(*self._model):
            raise Dead(f"{self._site.replica}: the process that runs its model is dead")

    async def _describe(self) -> None:
        assert self._client is not None
        found = await self._client.describe(task=self._spec.task or "predict", labels=self._spec.labels)
        self.task, self.labels, self.thresholds = found.task, found.labels, found.thresholds
        self.inputs, self.outputs = found.inputs, found.outputs
        self.platform, self.version, self.versions = found.platform, found.version, found.versions
        self._described, self._known = found, True

    def _left_s(self, deadline_s: float) -> float | None:
        """What is left until then, None if for ever. Raises Expired if nothing is."""
        if deadline_s == math.inf:
            return None
        left_s = deadline_s - self._clock.now_s()
        if left_s <= 0:
            raise Expired(f"{self._site.replica} did not finish before the call's deadline")
        return left_s

    def _artifact(self) -> Artifact:
        """What to serve, proven to be what was published."""
        assert self._spec.artifact is not None
        found = locate(self._spec.artifact, self._site.shelf)
        if not isinstance(found, Artifact):
            raise ShelfFault(f"{self._spec.artifact!r} has no manifest; publish it with headrace-train first")
        if found.manifest.format != "onnx":
            raise ShelfFault(f"{self._spec.artifact} is in {found.manifest.format} format; Triton serves onnx here")
        verify(found)
        return found

    def _reach(self, url: str, model: str, version: str, *metadata: tuple[bytes, bytes]) -> None:
        # Here, not above: a gateway without such a model must not pay for numpy.
        from runtimes.triton_client import Client

        self._client = Client(url, model, version, replica=self._site.replica, metadata=metadata)


def _socket(site: Site) -> Path:
    return scratch(site) / "grpc:1"


def _conforms(it: TritonRuntime) -> Predictor:
    return it
