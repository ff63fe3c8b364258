"""A scenario: what is asked, how often and for how long. A TOML file, its fields changed by `--set`."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from loadtests.arrivals import Arrivals, Closed

SHIPPED = Path(__file__).parent / "scenarios"
TENANT = "load"
"""Who calls."""


class ScenarioFault(Exception):
    """The scenario can't be used; the message names the file or the setting, and the field."""


class Scenario(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Chat calls, all alike. Ends by itself: `duration_s`, `calls_max` and `chunks_max` bound the asking, and
    `call_s_max` each answer."""

    about: str
    """One line for people."""
    model: Annotated[str, Meta(min_length=1)]
    prompt: str = "Say something about water."
    stream: bool = False
    tokens_max: Annotated[int, Meta(ge=1, le=1_000_000)] | None = None
    """Sent as `max_tokens`."""
    body: dict[str, Any] = {}
    """Further fields of the request's body, as they are."""
    arrivals: Arrivals = Closed()
    connections: Annotated[int, Meta(ge=1, le=10_000)] = 32
    """Calls under way at once; in an open loop, a call that is due while all are busy is sent late and measured
    from when it was due."""
    warmup_s: Annotated[float, Meta(ge=0, le=600)] = 1.0
    """The same load before it, not measured."""
    duration_s: Annotated[float, Meta(gt=0, le=86_400)] = 10.0
    calls_max: Annotated[int, Meta(ge=1, le=10_000_000)] = 1_000_000
    chunks_max: Annotated[int, Meta(ge=1, le=10_000_000)] = 5_000_000
    """Streamed chunks after which no further call is sent."""
    call_s_max: Annotated[float, Meta(gt=0, le=3_600)] = 60.0
    """An answer that takes longer is given up, within a second, and counted as `timeout`."""

    emulate: tuple[str, ...] = ()
    """For `peers run`: arguments of `emulate`, which is the engine then."""

    @property
    def models(self) -> tuple[str, ...]:
        """All names that are called."""
        return (self.model,)

    @property
    def tenants(self) -> tuple[str, ...]:
        """All that call."""
        return (TENANT,)

    def content(self) -> bytes:
        """The request's body."""
        fields: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": self.prompt}],
            "stream": self.stream,
        }
        if self.stream:
            # The engine's own count is the only exact one: a chunk may carry several tokens.
            fields["stream_options"] = {"include_usage": True}
        if self.tokens_max is not None:
            fields["max_tokens"] = self.tokens_max
        return msgspec.json.encode(fields | self.body)


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
    try:
        return msgspec.convert(data, Scenario)
    except msgspec.ValidationError as error:
        raise ScenarioFault(f"scenario {name}: {str(error).replace('$.', '')}") from None


def shipped() -> list[str]:
    """Names of the scenarios that come with the package."""
    return sorted(path.stem for path in SHIPPED.glob("*.toml"))


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
