"""Classifiers and embedders on ONNX Runtime, in this process: one session, one thread that owns it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, TypeVar

import msgspec

from runtimes.artifact import Artifact, locate, verify
from runtimes.clock import Clock, SystemClock
from runtimes.contract import (
    Expired,
    InferReply,
    InferRequest,
    Load,
    Overloaded,
    Predictor,
    Site,
    Tensor,
    Unavailable,
)
from runtimes.integrity import ShelfFault

if TYPE_CHECKING:
    from runtimes.contract import Array
    from runtimes.session import Session

T = TypeVar("T")
Count = Annotated[int, msgspec.Meta(ge=1)]


class Onnx(msgspec.Struct, tag="onnx", tag_field="kind", frozen=True, forbid_unknown_fields=True):
    """A quantized classifier or embedder on ONNX Runtime."""

    artifact: str
    """On the shelf (`name`, `name@alias`, `name@version`) or a folder with a manifest."""
    threads: Count = 1
    """Cores that one batch may use."""
    batch_max: Count = 1
    """Rows that go through the graph at once. INT8 graphs scale activations over all of them, so a text's answer would
    depend on its neighbours; raise it for graphs whose rows are independent (fp32), where it is faster."""
    waiting_max: Count = 256
    """Calls that may wait while another one runs; one more is refused as Overloaded."""
    provider: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes CUDA where there is one; `cuda` refuses to start without."""

    in_process: ClassVar[bool] = True

    @property
    def slots(self) -> int:
        """Enough to have the next call's batch at hand when one ends; more than these wait where they are fair."""
        return 8

    def build(self, site: Site, *, clock: Clock | None = None) -> OnnxRuntime:
        return OnnxRuntime(spec=self, site=site, clock=clock or SystemClock())


class OnnxRuntime:
    """See Onnx. Calls take turns, a piece of text to tokenize or a batch to run each, so a long call does not hold up
    the short ones; left or late, it stops at its next turn."""

    def __init__(self, *, spec: Onnx, site: Site, clock: Clock) -> None:
        self.task = ""
        self.labels: tuple[str, ...] = ()
        self.thresholds: Mapping[str, float] = {}
        self.inputs: tuple[Tensor, ...] = ()
        self.outputs: tuple[Tensor, ...] = ()
        self.platform = "onnxruntime_onnx"
        self.version = ""
        self._spec = spec
        self._site = site
        self._clock = clock
        self._session: Session | None = None
        self._worker: ThreadPoolExecutor | None = None
        self._calls = 0
        self._idle = asyncio.Event()

    async def open(self) -> None:
        self._worker = ThreadPoolExecutor(1, thread_name_prefix=self._site.replica)
        try:
            session = await asyncio.get_running_loop().run_in_executor(self._worker, self._load)
        except ShelfFault as error:
            raise Unavailable(f"{self._site.replica} cannot start: {error}") from error
        except ImportError as error:
            raise Unavailable(f"{self._site.replica} cannot start: {error}; install headrace[onnx]") from error
        self.task, self.labels, self.thresholds = session.task, session.labels, session.thresholds
        self.inputs, self.outputs, self.version = session.inputs, session.outputs, session.version
        self._session = session

    def load(self) -> Load:
        running = min(self._calls, 1)
        return Load(running=running, waiting=self._calls - running)

    async def ready(self) -> None:
        self._opened()

    async def aclose(self) -> None:
        self._session = None
        while self._calls:
            self._idle.clear()
            await self._idle.wait()
        worker, self._worker = self._worker, None
        if worker:
            await asyncio.to_thread(worker.shutdown)

    async def infer(self, request: InferRequest) -> InferReply:
        from runtimes.session import batches, merged, pieces

        session = self._opened()
        session.check(request.inputs)
        if self._calls > self._spec.waiting_max:
            raise Overloaded(f"{self._site.replica} has {self._calls - 1} calls waiting already; retry later")
        self._calls += 1
        try:
            rows: list[Array] = []
            for piece in pieces(request.inputs):
                rows += await self._work(partial(session.tokens, piece), request.deadline_s)
            plan = batches(rows, rows_max=self._spec.batch_max)
            parts = [
                await self._work(partial(session.run, [rows[index] for index in batch]), request.deadline_s)
                for batch in plan
            ]
            return InferReply(outputs=merged(plan, parts), tokens_in=sum(map(len, rows)))
        finally:
            self._calls -= 1
            if not self._calls:
                self._idle.set()

    async def _work(self, job: Callable[[], T], deadline_s: float) -> T:
        """Run on the worker. Cancelled or late while still in the queue, it never runs."""

        def in_time() -> T:
            if self._clock.now_s() >= deadline_s:
                raise Expired(f"{self._site.replica} did not finish before the call's deadline")
            return job()

        assert self._worker is not None  # closing waits for the calls first
        return await asyncio.get_running_loop().run_in_executor(self._worker, in_time)

    def _opened(self) -> Session:
        if self._session is None:
            raise Unavailable(f"{self._site.replica} is not open; send the call to another replica")
        return self._session

    def _load(self) -> Session:
        # Here, not above: a gateway without such a model must not pay for numpy and ONNX Runtime.
        from runtimes.session import Session

        found = locate(self._spec.artifact, self._site.shelf)
        if not isinstance(found, Artifact):
            raise ShelfFault(f"{self._spec.artifact!r} has no manifest; publish it with headrace-train first")
        verify(found)
        return Session(found, threads=self._spec.threads, provider=self._spec.provider)


def _conforms(it: OnnxRuntime) -> Predictor:
    return it
