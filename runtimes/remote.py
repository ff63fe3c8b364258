"""A Generator that lives elsewhere: any server with OpenAI's HTTP dialect, under a URL.

What is sent is what the gateway hands over, with the provider's key instead of the tenant's. What comes back
is relayed as it is, error statuses included; a redirect is an answer like any other and is not followed.
"""

from __future__ import annotations

import os
import re
from contextlib import AbstractAsyncContextManager
from typing import Annotated, ClassVar
from urllib.parse import urlsplit

import msgspec

from runtimes.clock import Clock, SystemClock
from runtimes.contract import GENERATING, Exchange, Generator, Invalid, Load, Reply, Site, Unavailable
from runtimes.wire import Head, Wire

#: The longest a look at a remote server's readiness may take, its connection included.
READY_S_MAX = 5.0

_URL = re.compile(r"https?://([0-9A-Za-z._-]+|\[[0-9A-Fa-f:.]+\])(:(?P<port>[0-9]{1,5}))?(/[!\"$->@-~]*)?")
_KEY = re.compile(r"[!-~]+")

Seconds = Annotated[float, msgspec.Meta(gt=0)]


class Remote(msgspec.Struct, tag="remote", tag_field="kind", frozen=True, forbid_unknown_fields=True):
    """An OpenAI-compatible server: a provider's, a neighbour's, or an engine somebody else looks after."""

    url: str
    """Where the dialect begins, e.g. `http://127.0.0.1:9100/v1`: `/v1/chat/completions` goes to
    `<url>/chat/completions`."""
    model: str | None = None
    """The name that server knows the model by; None if it is the gateway's own name for it."""
    key_env: str | None = None
    """The environment variable with the provider's key, which goes along as a bearer token."""
    connections_max: Annotated[int, msgspec.Meta(ge=1)] = 128
    """Calls at once; more than these wait in the gateway."""
    connect_s_max: Seconds = 5.0
    """For name, TCP and TLS together."""
    idle_s_max: Seconds = 120.0
    """The longest silence amid an answer before it is given up as broken."""

    def __post_init__(self) -> None:
        """Refuse a URL that is not a plain base, before anything is sent to it."""
        if "@" in self.url:
            raise ValueError("`url` must not hold credentials; name the variable that does in `key_env`")
        found = _URL.fullmatch(self.url)
        if not found or int(found["port"] or 0) > 65_535:
            raise ValueError(
                "`url` must be http(s)://HOST[:PORT][/PATH] in plain ASCII, e.g. `http://127.0.0.1:9100/v1`"
            )

    in_process: ClassVar[bool] = False

    @property
    def slots(self) -> int:
        """One per connection: what the server does with them is its own affair."""
        return self.connections_max

    def build(self, site: Site, *, clock: Clock | None = None) -> RemoteRuntime:
        return RemoteRuntime(spec=self, site=site, clock=clock or SystemClock())


class RemoteRuntime:
    """See Remote. Opening checks the configuration only: a server that is down today must not keep the
    gateway from starting, and `ready` says so. Closing ends the calls under way."""

    meters_each_chunk = False  # vLLM's extension; a provider would refuse it
    routes = GENERATING | {"/v1/embeddings"}

    def __init__(self, *, spec: Remote, site: Site, clock: Clock) -> None:
        self.upstream_model = spec.model
        self._spec = spec
        self._site = site
        self._clock = clock
        base = urlsplit(spec.url).path.rstrip("/")
        self._paths = {path: base + path.removeprefix("/v1") for path in self.routes}
        self._heads: dict[str, Head] = {}
        self._models_path = f"{base}/models"
        self.wire: Wire | None = None
        self._probe: Wire | None = None

    async def open(self) -> None:
        spec = self._spec
        key = authorization(self._site, spec.url, spec.key_env)
        self.wire = self._wired(spec.connections_max)
        headers = ((b"content-type", b"application/json"), *key)
        self._heads = {path: self.wire.head("POST", at, headers) for path, at in self._paths.items()}
        self._look = self.wire.head("GET", self._models_path, key)
        # Its own connection: a full pool is busy, not unready.
        self._probe = self._wired(1)

    def exchange(self, request: Exchange) -> AbstractAsyncContextManager[Reply]:
        if self.wire is None:
            raise Unavailable(f"{self._site.replica} is not open; send the call to another replica")
        head = self._heads.get(request.path)
        if head is None:
            raise Invalid(f"{self._site.replica} answers only {', '.join(sorted(self.routes))}")
        return self.wire.exchange(head, request.headers, request.body, request.deadline_s, request.begin_by_s)

    def load(self) -> Load:
        if self.wire is None:
            return Load(running=0, waiting=0)
        return msgspec.structs.replace(self.wire.load(), connections=self.wire.connections)

    async def ready(self) -> None:
        """Reachable is whatever answers `GET <url>/models` with less than 500: a server that has no such
        route, or wants another key for it, is there all the same."""
        if self._probe is None:
            raise Unavailable(f"{self._site.replica} is not open")
        deadline_s = self._clock.now_s() + READY_S_MAX
        async with self._probe.exchange(self._look, (), b"", deadline_s) as reply:
            if reply.status >= 500:
                raise Unavailable(f"{self._site.replica}: {self._probe.name} answers with {reply.status}")

    async def aclose(self) -> None:
        for wire in (self.wire, self._probe):
            if wire is not None:
                await wire.aclose()

    def _wired(self, connections_max: int) -> Wire:
        return Wire(
            self._spec.url,
            connections_max=connections_max,
            connect_s_max=self._spec.connect_s_max,
            idle_s_max=self._spec.idle_s_max,
            clock=self._clock,
        )


def authorization(site: Site, url: str, key_env: str | None) -> tuple[tuple[bytes, bytes], ...]:
    """The header that carries the server's key, none if it needs none. Raises Unavailable if there is no such key."""
    if key_env is None:
        return ()
    key = os.environ.get(key_env, "")
    if not _KEY.fullmatch(key):
        state = "has blanks or non-ASCII characters in it" if key else "is not set"
        raise Unavailable(
            f"{site.replica}: the environment variable {key_env} {state}; "
            f"put the key for {urlsplit(url).hostname or url} there"
        )
    return ((b"authorization", b"Bearer " + key.encode()),)


def _conforms(it: RemoteRuntime) -> Generator:
    return it
