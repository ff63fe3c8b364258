"""What the gateway may ask of a runtime, and how a runtime says no.

There are two kinds, told apart by what they speak: a Generator speaks OpenAI's HTTP dialect (vLLM, any
OpenAI-compatible server), a Predictor speaks named tensors (ONNX Runtime, Triton). Neither knows tenants,
quotas or the HTTP server in front of it.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, runtime_checkable

import msgspec

from runtimes.histogram import Histogram

if TYPE_CHECKING:
    import numpy as np

    from runtimes.artifact import Shelf

    Array = np.ndarray[Any, np.dtype[Any]]

#: What generates text, and may be streamed.
GENERATING = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"})
#: What reads text only, and answers in one piece.
POOLING = frozenset({"/v1/embeddings", "/v1/score", "/v1/rerank", "/v1/classify"})
#: Every path the gateway ever asks an engine for. Nothing a client sends can add to it.
PATHS = GENERATING | POOLING


class Site(msgspec.Struct, frozen=True):
    """Where a runtime lives: what building one needs beside its Spec."""

    model: str
    """The name clients call it by, and the name an engine must serve it under."""
    replica: str
    """Unique in this gateway and stable over restarts, e.g. `chat-0`."""
    state: Path
    """The state folder: engines, shelf, logs, run."""
    shelf: Shelf
    generation: str = ""
    """Which of the replica's engines it is, where one follows another while it still runs."""

    @property
    def engine(self) -> str:
        """Names an engine's log, sockets and pid file."""
        return f"{self.replica}.{self.generation}" if self.generation else self.replica


class Exchange(msgspec.Struct, frozen=True, gc=False):
    """One HTTP call in OpenAI's dialect, to be relayed as it is."""

    path: str
    """One of PATHS; the method is POST."""
    body: bytes
    deadline_s: float
    """Clock time after which the answer is of no use to anyone."""
    headers: tuple[tuple[bytes, bytes], ...] = ()
    """Extra request headers, e.g. `traceparent`; lower case. Never a client's own headers."""
    begin_by_s: float = math.inf
    """Clock time by which an engine elsewhere must have begun to answer; after it the call is Silent."""


class Sink(Protocol):
    """Where a body is poured."""

    @property
    def done(self) -> bool:
        """Nothing more is wanted."""

    def take(self, part: bytes) -> bool:
        """One more piece; False if it is enough, for ever if it is done, else until `drained`. May be called from
        within the read that brought it, so it neither waits nor takes long; what it raises ends the pouring and is
        raised there."""

    async def drained(self) -> None:
        """Return when more can be taken."""


class Reply(msgspec.Struct):
    """The answer to an Exchange, open: status and headers are here, the body is still arriving."""

    status: int
    headers: tuple[tuple[bytes, bytes], ...]
    """End-to-end headers, names lower case, hop-by-hop and framing headers removed."""
    frames: AsyncIterator[bytes]
    """Body bytes as they were read. Ends only at the true end of the body (RFC 9112 §6.3): a connection
    cut before that raises `Broken`, so a clean end is never mistaken for a whole answer."""
    pour: Callable[[Sink], Awaitable[None]] | None = None
    """The same bytes without a task's waking up for each piece, where a runtime can do that: returns at the true end or
    once the sink is done, and raises as `frames` does."""
    body: bytes | None = None
    """All of it, if it came together with the header; `frames` says the same."""
    counted: bool = False
    """Who made it has counted what it used, up to the frames that have been taken."""


#: Datatypes by the names that the Open Inference Protocol v2 gives them.
Datatype = Literal[
    "BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64", "FP16", "FP32", "FP64", "BYTES"
]


class Tensor(msgspec.Struct, frozen=True):
    """What a Predictor takes or gives under one name."""

    name: str
    datatype: Datatype
    shape: tuple[int, ...]
    """-1 where any length will do; the first axis is the batch's."""
    column: bool = False
    """Each row has one element, and no axis for it here. On the Open Inference Protocol it has one, as in Triton, where
    no row is without axes."""
    optional: bool = False
    """A request may do without it: another says the same, or there is a default."""

    @property
    def told(self) -> tuple[int, ...]:
        """Its shape on the Open Inference Protocol."""
        return (*self.shape, 1) if self.column else self.shape


class InferRequest(msgspec.Struct, frozen=True):
    """Named arrays in. BYTES go in as object arrays, of `str` if they are text: the one named `text`, shape [n]."""

    inputs: Mapping[str, Array]
    deadline_s: float
    """Clock time after which the answer is of no use to anyone."""
    flow: str = ""
    """Whose it is, to nobody's knowledge here: flows that wait for the same model take turns."""
    outputs: tuple[str, ...] = ()
    """Which are wanted; empty for all."""
    classes: Mapping[str, int] = MappingProxyType({})
    """Output → how many of its best places are wanted instead of it, in the words of a server elsewhere."""
    version: str = ""
    """Which of `Predictor.versions` is to answer; empty for whichever the server takes."""
    id: str = ""
    """The client's own name for it."""
    parameters: Mapping[str, bool | int | float | str] = MappingProxyType({})
    """What it says beside its tensors; for models of servers elsewhere, which may read it."""


class InferReply(msgspec.Struct, frozen=True):
    """Named arrays out, first axis n as in the request; e.g. `embedding` [n, width] float32, or `scores` [n, labels]
    float32 in the order of the Manifest's labels, and `label` [n] BYTES, the best one's name."""

    outputs: Mapping[str, Array]
    tokens_in: int
    """Tokens the model read, padding not counted; 0 for a model that reads none."""
    batch_rows_max: int = 0
    """Rows of the largest batch that any of these went through the model in; 0 if unknown."""
    queue_s: float = 0.0
    """The longest that any of these waited inside the runtime."""
    compute_s: float = 0.0
    """Spent by the model, on the whole of the batches that these were in."""
    version: str = ""
    """Which of `Predictor.versions` has answered; empty where there are none."""


class Spec(Protocol):
    """A runtime's part of the configuration: a frozen msgspec Struct, tagged by `kind`. Decoding one checks it,
    `build` has no side effects, and the runtime's own `open` starts it."""

    in_process: ClassVar[bool]
    """It computes in the process that opens it, so another process has its own one, with slots of its own; else all
    reach the same one."""

    @property
    def slots(self) -> int:
        """How many calls it can work on at once; more than these wait in the gateway, not in the engine."""

    def build(self, site: Site) -> Generator | Predictor: ...


class Load(msgspec.Struct, frozen=True):
    """How busy a runtime is, at one instant, as it knows it itself."""

    running: int
    waiting: int
    connections: int = 0
    """Open ones, those kept for the next call included; of a runtime that has any."""


@runtime_checkable
class Runtime(Protocol):
    """What both kinds have in common. Building one has no side effects; `open` starts it."""

    async def open(self) -> None:
        """Start, and return once the first call can be answered. Raises Unavailable when it cannot start."""

    def load(self) -> Load: ...

    async def ready(self) -> None:
        """Return at once if a call would be answered now; otherwise raise Unavailable saying why."""

    async def aclose(self) -> None:
        """Drain, stop and free everything. Safe to call twice and after a failed `open`."""


@runtime_checkable
class Generator(Runtime, Protocol):
    """Speaks OpenAI's dialect."""

    meters_each_chunk: bool
    """True if `stream_options.continuous_usage_stats` is understood, so that every streamed chunk can carry
    the exact usage so far (vLLM's extension); a stream that is cut short can then be billed exactly."""
    upstream_model: str | None
    """The name the engine knows the model by, None if it is the gateway's own."""
    routes: frozenset[str]
    """Those of PATHS that it answers."""

    def exchange(self, request: Exchange) -> AbstractAsyncContextManager[Reply]:
        """Send the call. Entering waits for the status line and the first body bytes, so whatever keeps the
        answer from starting raises there (Unavailable, Silent, Expired) and failover is a loop around `async with`.
        An HTTP error is a Reply with its status, not an exception. Leaving early closes the connection, which
        is how an engine learns that nobody wants the rest. Safe to run concurrently."""


@runtime_checkable
class Predictor(Runtime, Protocol):
    """Speaks tensors."""

    task: str
    """`classify`, `embed`, or `predict` for one that only takes and gives tensors: which outputs, and so which routes,
    it can answer. This and what follows is known once it is open."""
    labels: tuple[str, ...]
    """What the columns of `scores` mean; empty for an embedder."""
    thresholds: Mapping[str, float]
    """Label → least score at which it may be believed; a label without one is always believed."""
    inputs: tuple[Tensor, ...]
    """All that it can be given. A text model takes either `text` or token ids, so not all of them at once."""
    outputs: tuple[Tensor, ...]
    platform: str
    """What runs it, as the Open Inference Protocol names it, e.g. `onnxruntime_onnx`."""
    version: str
    """Of the artifact; `1` where nothing better is known."""
    versions: tuple[str, ...]
    """That a request may ask for, each a model of its own; empty where there is only one, by whatever name."""

    async def infer(self, request: InferRequest) -> InferReply:
        """Run the model. Raises Invalid, Expired, Overloaded, Unavailable or Failed. Safe to run concurrently."""


@runtime_checkable
class Batching(Protocol):
    """A runtime that puts rows of several calls together, and counts them."""

    @property
    def batch_rows(self) -> Histogram:
        """Rows of each batch."""

    @property
    def batch_queue_s(self) -> Histogram:
        """How long each row waited for its batch."""


class RuntimeFault(Exception):
    """A runtime's refusal. The message says what happened to which replica, without any of the payload."""


class Unavailable(RuntimeFault):
    """Nothing has been answered and another replica may do it: not started, refused, reset, crashed."""


class Failed(Unavailable):
    """The model was asked and failed; `said` is why, in its own words, which may be about what it was given."""

    def __init__(self, message: str, said: str) -> None:
        super().__init__(message)
        self.said = said


class Silent(Unavailable):
    """The engine has the call and did not begin to answer in time, whatever it says of its health."""


class Overloaded(RuntimeFault):
    """A bounded queue inside the runtime is full; another replica may do it."""


class Expired(RuntimeFault):
    """The deadline passed first."""


class Broken(RuntimeFault):
    """The answer stopped after it had begun. Never retried."""


class Invalid(RuntimeFault):
    """The request can never work on this model; retrying it anywhere is useless."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        """The request's field, or the input tensor, that is wrong."""
