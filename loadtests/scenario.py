"""A scenario: what is asked, how often and for how long. A TOML file, its fields changed by `--set`."""

from __future__ import annotations

import math
import os
import random
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta
from msgspec.structs import replace

from loadtests.arrivals import Arrivals, Closed, Rate, Trace

SHIPPED = Path(__file__).parent / "scenarios"
TENANT = "load"
"""Who calls where a scenario names nobody."""


class ScenarioFault(Exception):
    """The scenario can't be used; the message names the file or the setting, and the field."""


class Words(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How long prompts are: lognormal, as people's are, and never longer than `most`."""

    median: Annotated[int, Meta(ge=1, le=1_000_000)]
    sigma: Annotated[float, Meta(ge=0, le=5)] = 1.0
    """Of the logarithm: at 1, one prompt in six has more than 2.7 times the median. 0 makes them all alike."""
    most: Annotated[int, Meta(ge=1, le=1_000_000)] = 8_000

    def draw(self, chance: random.Random) -> int:
        return max(1, min(self.most, round(self.median * math.exp(chance.gauss(0, self.sigma)))))


class Ask(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One kind of call: a chat, or a text to be classified."""

    model: Annotated[str, Meta(min_length=1)]
    texts: Annotated[tuple[str, ...], Meta(max_length=10_000)] = ()
    """To be classified, one a call and each as often as any other, instead of a chat."""
    prompt: str = "Say something about water."
    prompt_words: Words | None = None
    """Random words instead of `prompt`."""
    stream: bool = False
    tokens_max: Annotated[int, Meta(ge=1, le=1_000_000)] | None = None
    """Sent as `max_tokens`."""
    body: dict[str, Any] = {}
    """Further fields of the request's body, as they are."""
    weight: Annotated[float, Meta(gt=0, le=1_000_000)] = 1.0
    """Its share of the calls, among all weights of a `mix`."""

    @property
    def varies(self) -> bool:
        """From call to call."""
        return self.prompt_words is not None or len(self.texts) > 1

    @property
    def path(self) -> str:
        return "/v1/classify" if self.texts else "/v1/chat/completions"

    def content(self, prompt: str, tokens_max: int | None) -> bytes:
        """The request's body."""
        if self.texts:
            return msgspec.json.encode({"model": self.model, "input": prompt} | self.body)
        fields: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "stream": self.stream,
        }
        if self.stream:
            # The engine's own count is the only exact one: a chunk may carry several tokens.
            fields["stream_options"] = {"include_usage": True}
        if tokens_max is not None:
            fields["max_tokens"] = tokens_max
        return msgspec.json.encode(fields | self.body)


class Tenant(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Somebody who calls."""

    name: Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")]
    weight: Annotated[float, Meta(gt=0, le=1_000_000)] = 1.0
    """Its share of the calls, among all tenants' weights."""
    key_env: str | None = None
    """The environment variable that holds its API key; without it, and without a file, the command's `--key`."""
    key_file: str | None = None
    """The file that does, relative to the scenario's."""


class Cancels(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Callers who leave without their answer."""

    share: Annotated[float, Meta(gt=0, le=1)]
    early: Annotated[float, Meta(ge=0, le=1)] = 0.5
    """Of those with a stream: how many leave before its first byte; with a whole answer all do."""
    wait_s_max: Annotated[float, Meta(gt=0, le=600)] = 0.05
    """Those leave after any time up to this, unless they were answered by then."""
    chunks_max: Annotated[int, Meta(ge=1, le=1_000_000)] = 32
    """The others leave after any number of chunks up to this, unless the stream ended by then."""


class Objective(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a call must keep to be good, which is what goodput counts; None is no matter."""

    first_token_s_max: Annotated[float, Meta(gt=0)] | None = None
    gap_s_max: Annotated[float, Meta(gt=0)] | None = None
    """Of any two contents of a stream."""
    total_s_max: Annotated[float, Meta(gt=0)] | None = None


class Scenario(Ask, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Calls. Ends by itself: `duration_s`, `calls_max` and `chunks_max` bound the asking, and `call_s_max` each
    answer."""

    about: str
    """One line for people."""
    mix: tuple[Ask, ...] = ()
    """Several kinds of call; each has the scenario's own fields where it does not set them."""
    tenants: tuple[Tenant, ...] = ()
    cancels: Cancels | None = None
    slo: Objective | None = None
    seed: int = 1
    """Of what is left to chance but the arrivals, which have their own."""
    arrivals: Arrivals = Closed()
    rates_per_s: Annotated[tuple[Rate, ...], Meta(max_length=100)] = ()
    """Run it once at each of these rates instead of the arrivals' own."""
    callers_each: Annotated[tuple[Annotated[int, Meta(ge=1, le=10_000)], ...], Meta(max_length=100)] = ()
    """Run it once with each of these numbers of `connections` instead."""
    connections: Annotated[int, Meta(ge=1, le=10_000)] = 32
    """Calls under way at once; in an open loop, a call that is due while all are busy is sent late and measured
    from when it was due."""
    warmup_s: Annotated[float, Meta(ge=0, le=600)] = 1.0
    """The same load before it, not measured."""
    duration_s: Annotated[float, Meta(gt=0, le=86_400)] = 10.0
    calls_max: Annotated[int, Meta(ge=1, le=10_000_000)] = 1_000_000
    chunks_max: Annotated[int, Meta(ge=1, le=1_000_000_000)] = 5_000_000
    """Streamed chunks after which no further call is sent."""
    call_s_max: Annotated[float, Meta(gt=0, le=3_600)] = 60.0
    """An answer that takes longer is given up, within a second, and counted as `timeout`."""
    emulate: tuple[str, ...] = ()
    """For `peers run`: arguments of `emulate`, which is the engine then."""

    @property
    def asks(self) -> tuple[Ask, ...]:
        return self.mix or (self,)

    @property
    def callers(self) -> tuple[Tenant, ...]:
        return self.tenants or (Tenant(TENANT),)

    @property
    def models(self) -> tuple[str, ...]:
        """All names that are called."""
        return tuple(dict.fromkeys(ask.model for ask in self.asks))

    @property
    def streams(self) -> bool:
        """Some of its answers do."""
        return any(ask.stream for ask in self.asks)

    def steps(self, name: str) -> dict[str, Scenario]:
        """Itself by its name, or one for each of its rates or numbers of callers. Raises ScenarioFault."""
        if self.callers_each:
            return {
                f"{name} with {count}": replace(self, connections=count, callers_each=()) for count in self.callers_each
            }
        if not self.rates_per_s:
            return {name: self}
        if not hasattr(self.arrivals, "rate_per_s"):
            raise ScenarioFault(f"scenario {name}: rates_per_s needs arrivals with a rate, e.g. poisson")
        return {
            f"{name} at {rate:g}/s": replace(self, arrivals=replace(self.arrivals, rate_per_s=rate), rates_per_s=())
            for rate in self.rates_per_s
        }

    def keys(self, otherwise: str | None) -> dict[str, str]:
        """The tenants' API keys; `otherwise` for those that name none. Raises ScenarioFault."""
        found = {tenant.name: _key(tenant) or otherwise for tenant in self.callers}
        return {name: key for name, key in found.items() if key is not None}


def load(name: str, settings: Iterable[str] = ()) -> Scenario:
    """A shipped scenario by its name, or a TOML file by its path. A setting is `field=value`, dotted for a table
    (`arrivals.kind=poisson`), its value TOML or else taken as text. Raises ScenarioFault."""
    path = Path(name) if name.endswith(".toml") else SHIPPED / f"{name}.toml"
    try:
        data = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise ScenarioFault(
            f"there is no scenario {name!r}; name a .toml file, or one of: {', '.join(shipped())}"
        ) from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ScenarioFault(f"scenario {path} can't be read: {error}") from None
    for setting in settings:
        _apply(data, setting)
    _complete(data, path.parent)
    try:
        scenario = msgspec.convert(data, Scenario)
    except msgspec.ValidationError as error:
        raise ScenarioFault(f"scenario {name}: {str(error).replace('$.', '')}") from None
    if isinstance(scenario.arrivals, Trace):
        _require_trace(scenario.arrivals)
    return scenario


def shipped() -> list[str]:
    """Names of the scenarios that come with the package."""
    return sorted(path.stem for path in SHIPPED.glob("*.toml"))


def _complete(data: dict[str, Any], folder: Path) -> None:
    """What a file leaves to its own place, and to its own top."""
    own = {field: data[field] for field in Ask.__struct_fields__ if field in data}
    if isinstance(data.get("mix"), list):
        data["mix"] = [own | kind if isinstance(kind, dict) else kind for kind in data["mix"]]
    arrivals = data.get("arrivals")
    if isinstance(arrivals, dict) and isinstance(arrivals.get("path"), str):
        data["arrivals"] = arrivals | {"path": str(folder / arrivals["path"])}
    if isinstance(data.get("tenants"), list):
        for tenant in data["tenants"]:
            if isinstance(tenant, dict) and isinstance(tenant.get("key_file"), str):
                tenant["key_file"] = str(folder / tenant["key_file"])


def _require_trace(trace: Trace) -> None:
    number = 0
    try:
        for _ in trace.lines(math.inf):
            number += 1
    except OSError as error:
        raise ScenarioFault(f"trace {trace.path} can't be read: {error.strerror}") from None
    except msgspec.DecodeError as error:
        raise ScenarioFault(f"trace {trace.path}, line {number + 1}: {error}") from None


def _key(tenant: Tenant) -> str | None:
    if tenant.key_file is not None:
        try:
            return Path(tenant.key_file).read_text().strip()
        except OSError as error:
            raise ScenarioFault(f"the key of tenant {tenant.name}: {tenant.key_file}: {error.strerror}") from None
    if tenant.key_env is None:
        return None
    if tenant.key_env not in os.environ:
        raise ScenarioFault(f"the key of tenant {tenant.name} is to be in ${tenant.key_env}, which is not set")
    return os.environ[tenant.key_env]


def _apply(data: dict[str, Any], setting: str) -> None:
    field, separator, text = setting.partition("=")
    if not separator or not field:
        raise ScenarioFault(f"--set {setting!r}: write field=value, e.g. connections=8 or arrivals.rate_per_s=200")
    *tables, last = field.split(".")
    for table in tables:
        data = data.setdefault(table, {})
        if not isinstance(data, dict):
            raise ScenarioFault(f"--set {setting!r}: {table} is a value, not a table")
    try:
        data[last] = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        data[last] = text
