"""Where commands find what they read and change: the configuration, the state folder, and the store in it."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from gateway.console import Common

if TYPE_CHECKING:
    from gateway.config import Config
    from gateway.store import Store
    from gateway.tenant import Issuer

T = TypeVar("T")


def config_of(common: Common) -> Config:
    """The named configuration, else the first of the usual places. Raises ConfigError."""
    from gateway.config import ConfigError, load

    path = _path(common)
    if path is None:
        raise ConfigError("there is no configuration here; name one with --config, or write ./headrace.toml")
    return load(path)


def _path(common: Common) -> Path | None:
    usual = (Path("headrace.toml"), Path(__file__).parents[1] / "deploy" / "local.toml")
    return common.config or next((path for path in usual if path.exists()), None)


def state_of(common: Common) -> Path:
    """The state folder: of the configuration, or if there is none the default one."""
    return _config(common).state_path


def currency_of(common: Common) -> str:
    """What amounts are in: as configured, or if there is no configuration the default one."""
    return _config(common).money.currency


def _config(common: Common) -> Config:
    from gateway.config import Config

    return config_of(common) if _path(common) else Config(models=())


def require_state(common: Common) -> None:
    """A command that only reads makes no state folder. Raises ConfigError."""
    from gateway.config import ConfigError

    state = state_of(common)
    if not state.is_dir():
        raise ConfigError(
            f"there is no state folder {state}; name the gateway's configuration with --config, or add a tenant first"
        )


async def fold(common: Common, store: Store) -> None:
    """Put what the gateway has journalled but not yet folded into the store; doing so twice counts once."""
    from gateway.journal import unfolded

    await store.append_usage(unfolded(state_of(common) / "journal"))


def asked(common: Common, question: Callable[[Issuer], Coroutine[Any, Any, T]]) -> T:
    """Ask with the state folder's store open."""
    import asyncio

    from gateway.key import pepper_of
    from gateway.sqlite import SqliteStore
    from gateway.tenant import Issuer
    from runtimes.clock import SystemClock

    state = state_of(common)

    async def run() -> T:
        store = SqliteStore(state / "headrace.db")
        try:
            await store.open()
            return await question(Issuer(store=store, pepper=pepper_of(state), clock=SystemClock()))
        finally:
            await store.aclose()

    return asyncio.run(run())
