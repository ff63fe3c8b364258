"""The configuration: one TOML file into frozen Structs, refused with the path of the wrong field.

Every runtime's own part is its Spec (see runtimes); `kind` says which. `$HEADRACE_STATE` overrides `[state] path`.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

import runtimes
from gateway.call import MODEL_NAME, Bounds
from gateway.errors import field_error
from gateway.price import Prices
from gateway.replica import replica_name
from runtimes.vllm import Vllm

Struct = msgspec.Struct
Address = Annotated[str, Meta(pattern=r"^(\[[0-9a-fA-F:]+\]|[A-Za-z0-9.-]+):[0-9]{1,5}\Z", description="host:port")]


class ConfigError(Exception):
    """The file can't be used; the message names the file and the field."""


class Server(Struct, frozen=True, forbid_unknown_fields=True):
    """`[server]`: the listeners. Port 0 takes a free one, which the ready line names."""

    listen: Address = "127.0.0.1:8000"
    """HTTP: OpenAI's API under `/v1`, the Open Inference Protocol under `/v2`."""
    grpc: Address = "127.0.0.1:8001"
    """The Open Inference Protocol over gRPC."""
    admin: Address = "127.0.0.1:8002"
    """Health, metrics and the admin API; never on the data listener."""
    workers: Annotated[int, Meta(ge=1, le=64)] = 1
    """Processes that serve the data listener, best one for each core; above 1 another one leads them."""
    unready_s: Annotated[float, Meta(ge=0)] = 0.0
    """How long after SIGTERM new calls are still taken, while `/readyz` says no already: longer than a load balancer
    needs to look away, and none of its calls is refused."""
    drain_s_max: Annotated[float, Meta(ge=0)] = 30.0
    """How long calls under way may go on after that."""
    bounds: Bounds = Bounds()


class State(Struct, frozen=True, forbid_unknown_fields=True):
    """`[state]`: where everything that must outlive the process is kept."""

    path: Annotated[str, Meta(pattern=r"^[^\x00]+\Z")] = ".headrace"
    shelf: Annotated[str, Meta(pattern=r"^[^\x00]+\Z")] | None = None
    """Where artifacts are: a folder, or a URL that fsspec knows, e.g. `s3://bucket/models` (with `headrace[remote]` and
    the store's own package installed). By default the folder `shelf` in `path`."""


class Model(Struct, frozen=True, forbid_unknown_fields=True):
    """`[[models]]`: a name clients call, and the replicas that answer it."""

    name: Annotated[str, Meta(pattern=MODEL_NAME)]
    replicas: Annotated[tuple[runtimes.Spec, ...], Meta(min_length=1)]
    waiting_max: Annotated[int, Meta(ge=0)] = 256
    """Calls that may wait for a place at once; more are refused with 503."""
    wait_s_max: Annotated[float, Meta(gt=0)] = 60.0
    """How long one may wait before it is given up with 504."""
    first_byte_s_max: Annotated[float, Meta(gt=0)] = 120.0
    """How long a replica may take to begin a stream, or embeddings and their kin, before another is asked. Any other
    answer begins when it is complete: only the call's deadline bounds it."""
    tokens_out_default: Annotated[int, Meta(ge=1)] = 512
    """Reserved from token quotas and budgets for a call that sets no `max_tokens`."""
    price: Prices | None = None
    """What its calls cost; without one they cost nothing."""


class Money(Struct, frozen=True, forbid_unknown_fields=True):
    """`[money]`: what prices, costs and budgets are in."""

    currency: Annotated[str, Meta(pattern=r"^[A-Z]{3}\Z")] = "USD"
    """Its ISO 4217 code. Nothing is ever converted: records hold numbers alone."""


class Tracing(Struct, frozen=True, forbid_unknown_fields=True):
    """`[trace]`: spans go nowhere unless a collector is named."""

    otlp: Annotated[str, Meta(pattern=r"^https?://[^\s/]\S*\Z")] | None = None
    """OTLP/HTTP endpoint, e.g. `http://127.0.0.1:4318/v1/traces`."""
    sample: Annotated[float, Meta(ge=0, le=1)] = 1.0
    """Share of calls traced; a caller's own sampling decision comes first."""


class Config(Struct, frozen=True, forbid_unknown_fields=True):
    models: Annotated[tuple[Model, ...], Meta(min_length=1)]
    server: Server = Server()
    state: State = State()
    trace: Tracing = Tracing()
    money: Money = Money()

    @property
    def state_path(self) -> Path:
        return Path(os.environ.get("HEADRACE_STATE") or self.state.path).expanduser().absolute()


def load(path: Path) -> Config:
    """Raises ConfigError, whose message names the file and the path of the wrong field."""
    try:
        read = tomllib.loads(path.read_text())
        config = msgspec.convert(read, Config)
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file; name one with --config.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: can't be read: {error}.") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not TOML: {error}.") from None
    except RecursionError:
        raise ConfigError(f"{path}: it is nested too deeply; no setting is.") from None
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path}: {field_error(str(error))}") from None
    for wrong in (*_beyond(read), *_contradictions(config)):
        raise ConfigError(f"{path}: {wrong}.")
    return msgspec.structs.replace(config, models=(*config.models, *_adapters(config)))


def _adapters(config: Config) -> Iterator[Model]:
    """The models that others bring along: each adapter of an engine is one, with the bounds and prices of its base."""
    for model in config.models:
        sharing: dict[str, list[runtimes.Spec]] = {}
        for number, spec in enumerate(model.replicas):
            if isinstance(spec, Vllm):
                for name, adapter in spec.adapters.items():
                    sharing.setdefault(name, []).append(spec.adapted(replica_name(model.name, number), adapter))
        for name, replicas in sharing.items():
            yield msgspec.structs.replace(model, name=name, replicas=tuple(replicas))


def _beyond(value: Any, path: str = "") -> Iterator[str]:
    """Whole numbers that TOML does not have (TOML 1.0.0, Integer), and the library reads."""
    if isinstance(value, dict):
        for name, it in value.items():
            yield from _beyond(it, f"{path}.{name}" if path else name)
    elif isinstance(value, list):
        for number, it in enumerate(value):
            yield from _beyond(it, f"{path}[{number}]")
    elif isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
        yield f"{path}: {value} is beyond 64 bits"


def _contradictions(config: Config) -> Iterator[str]:
    """What no type can tell."""
    names = [model.name for model in config.models]
    for number, name in enumerate(names):
        if name in names[:number]:
            yield f"models[{number}].name: {name!r} is used twice"
    for number, model in enumerate(config.models):
        for name in sorted({it for spec in model.replicas if isinstance(spec, Vllm) for it in spec.adapters}):
            if name in names:
                yield f"models[{number}].replicas: the adapter {name!r} has another model's name"
            if not re.match(MODEL_NAME, name):
                yield f"models[{number}].replicas: {name!r} can't be an adapter's name; a model's matches {MODEL_NAME}"
            names.append(name)
    server = config.server
    for field in ("listen", "grpc", "admin"):
        address = getattr(server, field)
        if _endpoint(address)[1] > PORT_MAX:
            yield f"server.{field}: {address!r} has a port above {PORT_MAX}"
    for field, others in (("grpc", ("listen",)), ("admin", ("listen", "grpc"))):
        address = getattr(server, field)
        for other in others:
            if _endpoint(address) == _endpoint(getattr(server, other)) and _endpoint(address)[1]:
                yield f"server.{field}: {address!r} is server.{other}'s address too; give each its own"
    try:
        str(config.state_path).encode()
    except RuntimeError:
        yield f"state.path: {config.state.path!r} names the home of nobody here"
    except UnicodeEncodeError:
        yield f"state.path: {str(config.state_path)!r} is not UTF-8, as all is that the gateway says of it"


PORT_MAX = 65_535


def _endpoint(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.lower(), int(port)
