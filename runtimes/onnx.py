"""Any ONNX model on ONNX Runtime, in this process: one session, worker threads that run it, a Batcher between calls."""

from __future__ import annotations

import asyncio
import math
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import msgspec

from runtimes.answer import Batch, Call, hand_out
from runtimes.artifact import Artifact, locate, verify
from runtimes.batch import BATCH_MAX, Batcher, Job, Policy, Row
from runtimes.clock import Clock, SystemClock
from runtimes.contract import (
    Batching,
    Expired,
    InferReply,
    InferRequest,
    Load,
    Predictor,
    RuntimeFault,
    Site,
    Tensor,
    Unavailable,
)
from runtimes.histogram import Histogram
from runtimes.integrity import ShelfFault

if TYPE_CHECKING:
    from runtimes.contract import Array
    from runtimes.session import Session

Count = Annotated[int, msgspec.Meta(ge=1)]


class Onnx(msgspec.Struct, tag="onnx", tag_field="kind", frozen=True, forbid_unknown_fields=True):
    """A model on ONNX Runtime: a quantized classifier or embedder, or any other graph."""

    artifact: str
    """On the shelf (`name`, `name@alias`, `name@version`) or a folder with a manifest."""
    threads: Count = 1
    """Cores that one batch may use."""
    batches: Count | None = None
    """That run at once; None for as many as there are cores. On a CPU two of one core each do more than one of two.
    Each worker of a gateway that has several has its own."""
    batch_max: Count | None = None
    """Rows that go through the graph at once. None: 16, or 1 for a graph that scales activations over all of
    them, unless its manifest states how far that moves an answer."""
    delay_s_max: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0
    """How long a batch may wait, beside a free worker, for callers who were here a moment ago."""
    waiting_max: Count = 256
    """Calls that may wait while others run; one more is refused as Overloaded."""
    provider: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes CUDA where there is one; `cuda` refuses to start without."""

    in_process: ClassVar[bool] = True

    @property
    def workers(self) -> int:
        return self.batches or max(1, len(os.sched_getaffinity(0)) // self.threads)

    @property
    def slots(self) -> int:
        """Enough to have each worker's next batch at hand when one ends; more than these wait where they are fair."""
        return min(self.waiting_max, 2 * (self.batch_max or BATCH_MAX) * self.workers)

    def build(self, site: Site, *, clock: Clock | None = None) -> OnnxRuntime:
        return OnnxRuntime(spec=self, site=site, clock=clock or SystemClock())


class OnnxRuntime:
    """See Onnx. Of a long call only a few rows at a time are in line, so it does not hold up the short ones; left or
    late, it stops there."""

    def __init__(self, *, spec: Onnx, site: Site, clock: Clock) -> None:
        self.task = ""
        self.labels: tuple[str, ...] = ()
        self.thresholds: Mapping[str, float] = {}
        self.inputs: tuple[Tensor, ...] = ()
        self.outputs: tuple[Tensor, ...] = ()
        self.platform = "onnxruntime_onnx"
        self.version = ""
        self.versions: tuple[str, ...] = ()
        self._spec = spec
        self._site = site
        self._clock = clock
        self._session: Session | None = None
        self._tokenizer: ThreadPoolExecutor | None = None
        self._batcher = Batcher(Policy(rows_max=1, delay_s_max=0, waiting_max=spec.waiting_max), who=site.replica)
        self._lock = threading.Lock()
        """Held by whoever is in the batcher or `_free`: the event loop, or a worker."""
        self._workers: list[threading.Thread] = []
        self._free: list[SimpleQueue[None]] = []
        """What wakes each worker that waits for rows. The last one to begin is the first to go on: its core is still
        warm."""
        self._stopping = False
        self._idle = asyncio.Event()

    async def open(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            session = await loop.run_in_executor(None, self._load)
        except ShelfFault as error:
            raise Unavailable(f"{self._site.replica} cannot start: {error}") from error
        except ImportError as error:
            raise Unavailable(f"{self._site.replica} cannot start: {error}; install headrace[onnx]") from error
        self.task, self.labels, self.thresholds = session.task, session.labels, session.thresholds
        self.inputs, self.outputs, self.version = session.inputs, session.outputs, session.version
        self._batcher.policy = Policy(
            rows_max=(self._spec.batch_max or session.batch_max) if session.reading.batched else 1,
            delay_s_max=self._spec.delay_s_max,
            waiting_max=self._spec.waiting_max,
        )
        self._tokenizer = ThreadPoolExecutor(1, thread_name_prefix=f"{self._site.replica} tokenizer")
        for number in range(self._spec.workers):
            name = f"{self._site.replica} {number}"
            self._workers.append(threading.Thread(target=self._serve, args=(session, loop), name=name, daemon=True))
            self._workers[-1].start()
        self._session = session

    def load(self) -> Load:
        return Load(running=self._batcher.working, waiting=len(self._batcher.jobs) - self._batcher.working)

    @property
    def batch_rows(self) -> Histogram:
        return self._batcher.rows

    @property
    def batch_queue_s(self) -> Histogram:
        return self._batcher.queue_s

    async def ready(self) -> None:
        self._opened()

    async def aclose(self) -> None:
        self._session = None
        while self._batcher.jobs:
            self._idle.clear()
            await self._idle.wait()
        with self._lock:
            self._stopping = True
            while self._free:
                self._wake()
        workers, self._workers = self._workers, []
        for worker in workers:
            await asyncio.to_thread(worker.join)
        tokenizer, self._tokenizer = self._tokenizer, None
        if tokenizer:
            await asyncio.to_thread(tokenizer.shutdown)

    async def infer(self, request: InferRequest) -> InferReply:
        session = self._opened()
        session.check(request.inputs, request.outputs)
        reading = session.reading
        rows_max = self._batcher.policy.rows_max * self._spec.workers
        call = Call(request, rows=reading.count(request.inputs))
        if call.deadline_s <= self._clock.now_s():
            raise self._expired()
        with self._lock:
            self._batcher.enter(call)
        start = tokens = 0
        try:
            for piece, is_long in reading.pieces(request.inputs, rows_max):
                if is_long:
                    assert self._tokenizer is not None  # closing waits for the calls first
                    rows = await asyncio.get_running_loop().run_in_executor(self._tokenizer, reading.rows, piece)
                else:
                    rows = reading.rows(piece)
                offered = [
                    Row(call, start + index, content, length=cost, kind=kind)
                    for index, (content, cost, kind) in enumerate(rows)
                ]
                start += len(offered)
                tokens += sum([row.length for row in offered])
                if len(offered) > 1:
                    # Neighbours in length share a batch with little padding; whose row is first is nobody's concern.
                    offered.sort(key=_length)
                self._offer(offered)
                if start < call.rows:
                    await call.until(start - rows_max)
            await call.until(call.rows)
        finally:
            with self._lock:
                self._batcher.leave(call)
            if not self._batcher.jobs:
                self._idle.set()
        return call.reply(tokens if reading.counts_tokens else 0)

    def _offer(self, rows: Sequence[Row]) -> None:
        now_s = self._clock.now_s()
        with self._lock:
            self._batcher.offer(rows, now_s)
            self._wake()

    def _wake(self) -> None:
        if self._free:
            self._free.pop().put(None)

    def _serve(self, session: Session, loop: asyncio.AbstractEventLoop) -> None:
        """A worker's life: take a batch, run it, have the answers handed out."""
        woken: SimpleQueue[None] = SimpleQueue()
        ran: tuple[list[Row], float] | None = None
        while True:
            now_s = self._clock.now_s()
            with self._lock:
                if ran:
                    self._batcher.done(ran[0], now_s=now_s, compute_s=ran[1])
                    ran = None
                rows, late = self._batcher.take(now_s)
                if rows and self._batcher.waiting:
                    self._wake()  # another worker, for the rest
                idle = not rows and not late
                if idle:
                    if self._stopping:
                        return
                    due_s = self._batcher.due_s()
                    self._free.append(woken)
            if idle:
                self._wait(woken, None if due_s == math.inf else max(0.0, due_s - now_s))
                continue
            if late:
                loop.call_soon_threadsafe(self._fail, late)
            if rows:
                answers = list(self._run(session, rows, now_s))
                ran = rows, self._clock.now_s() - now_s
                loop.call_soon_threadsafe(hand_out, answers)

    def _wait(self, woken: SimpleQueue[None], s_max: float | None) -> None:
        """For a call of `_wake`, or for its time to be up."""
        try:
            woken.get(timeout=s_max)
        except Empty:
            with self._lock:
                if woken in self._free:
                    self._free.remove(woken)
                    return
            woken.get()  # somebody has called it at that very moment

    def _run(self, session: Session, rows: list[Row], taken_s: float) -> Iterator[Batch]:
        """A batch's answers; if it fails, those of each call by itself, so that none fails for its neighbours."""
        since_s = self._clock.now_s()
        try:
            found: dict[str, Array] | RuntimeFault = session.run([row.content for row in rows])
        except RuntimeFault as fault:
            found = fault
        except Exception as error:  # noqa: BLE001 - a worker outlives whatever happens; memory may have run out, say
            found = Unavailable(f"{self._site.replica} failed on a batch of {len(rows)} rows ({type(error).__name__})")
        calls: dict[Job, list[int]] = {}
        for at, row in enumerate(rows):
            calls.setdefault(row.job, []).append(at)
        if isinstance(found, RuntimeFault) and len(calls) > 1:
            for own in calls.values():
                yield from self._run(session, [rows[at] for at in own], taken_s)
        else:
            yield Batch(rows, calls, found, taken_s, self._clock.now_s() - since_s)

    def _fail(self, late: Iterable[Job]) -> None:
        for call in late:
            assert isinstance(call, Call)
            call.fail(self._expired())

    def _expired(self) -> Expired:
        return Expired(f"{self._site.replica} did not finish before the call's deadline")

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


def _length(row: Row) -> int:
    return row.length


def _conforms(it: OnnxRuntime) -> Predictor:
    return it


def _conforms_too(it: OnnxRuntime) -> Batching:
    return it
