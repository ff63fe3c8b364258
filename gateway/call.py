"""A Call: one request on its way through the gateway, and the values that travel with it."""

from __future__ import annotations

import enum
import re
import secrets
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated

import msgspec
from msgspec import Meta

from runtimes.clock import Clock
from runtimes.contract import Exchange

if TYPE_CHECKING:
    from runtimes.dialect import Translation


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one tenant or key may use; None is no limit."""

    rpm: int | None = None
    """Requests a minute."""
    tpm: int | None = None
    """Tokens a minute, read and written together."""
    concurrent: int | None = None
    """Calls under way at once."""
    budget_day_nano: int | None = None
    """Money a day of UTC, in nano-units of the configured currency."""
    budget_month_nano: int | None = None
    """Money a calendar month of UTC."""


class Principal(msgspec.Struct, frozen=True):
    """Who is calling: what a valid key stands for."""

    tenant_id: str
    tenant: str
    key_id: str
    tenant_limits: Limits = Limits()
    key_limits: Limits = Limits()
    models: tuple[str, ...] = ("*",)
    """Globs of model names this key may use."""
    routes: tuple[str, ...] = ("*",)
    """Globs of paths this key may use."""
    expires_s: float | None = None
    """Unix time."""


#: What models and aliases are called.
MODEL_NAME = r"^[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}\Z"


def covered(globs: tuple[str, ...], name: str) -> bool:
    """Whether a scope takes in a model or a route."""
    return "*" in globs or name in globs or any(fnmatchcase(name, glob) for glob in globs)


class Bounds(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the doors accept before anything is parsed: section `[server.bounds]`."""

    connections_max: Annotated[int, Meta(ge=1)] = 4096
    header_bytes_max: Annotated[int, Meta(ge=256)] = 32 * 1024
    """Request line and all header fields together."""
    headers_max: Annotated[int, Meta(ge=4)] = 100
    header_s_max: Annotated[float, Meta(gt=0)] = 10.0
    """From the first byte of a request (or a new connection) to the end of its header."""
    body_bytes_max: Annotated[int, Meta(ge=1024)] = 10 * 1024 * 1024
    body_s_max: Annotated[float, Meta(gt=0)] = 30.0
    write_s_max: Annotated[float, Meta(gt=0)] = 60.0
    """How long a client may leave a full send buffer unread."""
    json_depth_max: Annotated[int, Meta(ge=1, le=500)] = 100
    choices_max: Annotated[int, Meta(ge=1)] = 128
    call_s_max: Annotated[float, Meta(gt=0, le=1e6)] = 600.0
    """A call's whole life, queue included."""


class Outcome(enum.StrEnum):
    """How a call ended; safe as a metric label."""

    served = "served"
    """Answered whole."""
    rejected = "rejected"
    """The engine refused it (its 4xx, passed on)."""
    refused = "refused"
    """The gateway refused it before any engine saw it."""
    failed = "failed"
    """An engine failed it, before or amid the answer."""
    cancelled = "cancelled"
    """The client left first."""


class Record(msgspec.Struct, gc=False):
    """What one call used and how it ended: the row in journal, store and `headrace usage`.

    The id exists before anything is asked of an engine, so folding a journal twice counts once.
    """

    id: str
    at_s: float
    """Unix time the call arrived."""
    tenant_id: str
    tenant: str
    key_id: str
    model: str
    route: str
    stream: bool
    replica: str = ""
    """Which replica answered; empty if none did."""
    outcome: Outcome = Outcome.refused
    status: int = 0
    """HTTP status sent; 0 if the client left before one was."""
    code: str = ""
    """Error code, empty if it went well."""
    tokens_in: int = 0
    tokens_out: int = 0
    tokens_cached: int = 0
    """Part of tokens_in that the engine had in its prefix cache, where it says so."""
    items: int = 0
    """Texts, lists of token ids or rows of tensors that the model was given; 0 for a call that generates text."""
    cost_nano: int = 0
    """In nano-units of the configured currency, at the price the model had when the call began; 0 without one."""
    estimated: bool = False
    """True if the engine's own count never arrived, so that tokens were counted by the gateway."""
    wait_s: float = 0.0
    """In the gateway's queue."""
    first_byte_s: float = 0.0
    """Arrival to first byte of the answer; 0 if there was none."""
    total_s: float = 0.0


class Call(msgspec.Struct, gc=False):
    """One request: what was asked, by whom, and what has become of it so far.

    The edge fills the first part; stages write the second as things happen, and `gateway.usage` turns it into
    the Record at the end, however the call ended.
    """

    id: str
    route: str
    """Path as routed, e.g. `/v1/chat/completions`; one of runtimes.contract.PATHS, or one that only a
    Translation answers."""
    principal: Principal
    model: str
    body: bytes
    at_s: float
    """Unix time of arrival."""
    received_s: float
    """Clock time of arrival."""
    deadline_s: float
    """Clock time; nothing about this call is of use after it."""
    stream: bool = False
    usage_asked: bool = False
    """The client asked for usage in the stream (`stream_options.include_usage`)."""
    chunk_usage_asked: bool = False
    """The client asked for usage in every chunk (`stream_options.continuous_usage_stats`)."""
    choices: int = 1
    """`n` times the number of prompts."""
    prompts: int = 1
    tokens_out_max: int | None = None
    """`max_tokens` or its kin, per choice, if the client set one."""
    traceparent: str | None = None
    """W3C trace context to hand on: the caller's, or this call's own span."""
    read_bytes: int = 0
    """How long a body was that is not kept, because a door has read all of it."""
    rows: int = 0
    """How many rows of tensors it brings, where a door knows that."""
    translation: Translation | None = None
    """How the body becomes tensors and back, if any model speaking tensors is served."""

    alias: str = ""
    """What the client called, if that stands for `model`."""
    replica: str = ""
    status: int = 0
    code: str = ""
    complete: bool = False
    """The whole answer was handed over."""
    tokens_in: int = 0
    tokens_out: int = 0
    tokens_cached: int = 0
    items: int = 0
    rows_begun: int = 0
    """What a model that speaks tensors has been given and not answered yet: items soon."""
    cost_nano: int = 0
    estimated: bool = False
    wait_s: float = 0.0
    inner_queue_s: float = 0.0
    """Spent waiting inside a runtime that says so."""
    compute_s: float = 0.0
    """Spent by its model."""
    batch_rows_max: int = 0
    """Rows of the largest batch that any of the call's went through the model in."""
    first_byte_s: float = 0.0
    total_s: float = 0.0
    outcome: Outcome = Outcome.refused

    @property
    def tokens_in_estimate(self) -> int:
        """Four bytes of body a token: near the truth for English prose, above it for most JSON."""
        return (self.read_bytes or len(self.body)) // 4 + 1

    @property
    def items_estimate(self) -> int:
        """No fewer than a model that does not generate will be given: each is a string or a list in the body."""
        return self.rows or self.body.count(b'"') // 2 + self.body.count(b"[")

    def exchange(self, *, model: str, each_chunk: bool, now_s: float, begin_by_s: float) -> Exchange:
        """The call as an engine gets it at `now_s`, to be answered from `begin_by_s` on at the latest.

        The client's bytes go through as they are, unknown parameters included, except for what must change:
        the model's name where the engine knows it by another, and the usage that a stream must carry for
        the call to be metered. `each_chunk` asks for exact usage in every chunk, which only engines that know
        vLLM's extension understand. A null `n`, which OpenAI allows and vLLM's completions refuse, is left out.
        """
        forced_usage = self.stream and self.route in USAGE_ON_REQUEST
        null_n = self.route == "/v1/completions" and NULL_N.search(self.body) is not None
        renamed = model != (self.alias or self.model)
        if not forced_usage and not null_n and not renamed:
            return Exchange(self.route, self.body, self.deadline_s, self._headers(now_s), begin_by_s)
        fields = FIELDS.decode(self.body)
        if null_n and fields.get("n") == NULL:
            del fields["n"]
        if renamed:
            fields["model"] = msgspec.Raw(msgspec.json.encode(model))
        if forced_usage:
            asked = fields.get("stream_options")
            options = FIELDS.decode(asked) if asked is not None and asked != NULL else {}
            options["include_usage"] = TRUE
            options.pop("continuous_usage_stats", None)
            if each_chunk:
                options["continuous_usage_stats"] = TRUE
            fields["stream_options"] = msgspec.Raw(msgspec.json.encode(options))
        return Exchange(self.route, msgspec.json.encode(fields), self.deadline_s, self._headers(now_s), begin_by_s)

    def _headers(self, now_s: float) -> tuple[tuple[bytes, bytes], ...]:
        own = ((b"x-request-id", self.id.encode()), (LEFT_MS, b"%d" % ((self.deadline_s - now_s) * 1000)))
        return own if self.traceparent is None else (*own, (b"traceparent", self.traceparent.encode()))


#: What is left of a call's deadline, in milliseconds: Envoy's name for it, which those built on it understand, and so
#: does a Headrace behind this one.
LEFT_MS = b"x-envoy-expected-rq-timeout-ms"
#: Routes whose streams carry usage only if `stream_options.include_usage` asks for it.
USAGE_ON_REQUEST = frozenset({"/v1/chat/completions", "/v1/completions"})
FIELDS = msgspec.json.Decoder(dict[str, msgspec.Raw])
NULL_N = re.compile(rb'"n"\s*:\s*null')
TRUE, NULL = msgspec.Raw(b"true"), msgspec.Raw(b"null")


class CallIds:
    """Fresh ids: unguessable, so that one can serve as a handle, and ascending by time, so that the store appends
    rather than inserts. 12 hex digits of Unix milliseconds, then 16 of chance (in the manner of RFC 9562 §5.7)."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._chances: list[str] = []

    def next(self) -> str:
        if not self._chances:
            ahead = secrets.token_hex(8 * IDS_AHEAD)  # the kernel is asked once for many
            self._chances = [ahead[start : start + 16] for start in range(0, len(ahead), 16)]
        return f"hr-{int(self._clock.wall_s() * 1000):012x}{self._chances.pop()}"


IDS_AHEAD = 256
