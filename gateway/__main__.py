"""The `headrace` command: serve · check · tenant · key · model · alias · usage · engine.

Tenants, keys, aliases and usage are read and changed in the state folder, so these commands work beside a running
gateway, which sees the change within half a second, and without one. What a command needs is imported by that
command: `--help` and `key add` wait for no framework.
"""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from cyclopts import App, CycloptsError, Parameter
from cyclopts.validators import Number

from gateway import garbage
from gateway.console import (
    COMMON,
    EVERYTHING,
    Common,
    Duration,
    Globs,
    LimitChange,
    Moment,
    date_text,
    fail,
    limits_text,
    print_json,
    print_table,
    private_file,
    progress,
    tell,
)

if TYPE_CHECKING:
    from gateway.config import Config
    from gateway.store import AliasRow, Store
    from gateway.tenant import Issuer

T = TypeVar("T")

EXAMPLES = """
Examples:

    headrace serve --config headrace.toml
    headrace tenant add acme --rpm 600 --tpm 100000
    headrace key add --tenant acme --models 'chat*' --expires 30d
    headrace usage --by model --since 24h --json
"""
TENANT_EXAMPLES = """
Examples:

    headrace tenant add acme --rpm 600 --tpm 100000
    headrace tenant set acme --rpm none --concurrent 8
"""
KEY_EXAMPLES = """
Examples:

    headrace key add --tenant acme --models 'chat*' 'support-*' --expires 30d
    headrace key rotate J3u0PzY1aB --overlap 7d
"""
ALIAS_EXAMPLES = """
Examples:

    headrace alias set intent intent-onnx=90 intent-triton=10
    headrace alias remove intent
"""
USAGE_EXAMPLES = """
Examples:

    headrace usage --by model --since 24h
    headrace usage --tenant acme --since 2026-11-01 --until 2026-12-01 --json
    headrace usage --records --limit 20
"""
ENGINE_EXAMPLES = """
Examples:

    headrace engine install vllm
    headrace engine install vllm --torch-index https://download.pytorch.org/whl/cpu
"""


def main() -> None:
    """Run one command; a user's mistake is one line on stderr and status 1, or 2 if the command line is wrong."""
    try:
        _require_text(sys.argv[1:])
        APP(sys.argv[1:], print_error=False, exit_on_error=False, result_action="return_value")
        sys.stdout.flush()
    except CycloptsError as error:
        fail(2, f"{str(error).rstrip('.')}; `--help` shows what there is")
    except BrokenPipeError:
        # Whoever read our output has gone, e.g. `head`; writing at exit must not fail again.
        _drop_output()
        sys.exit(1)
    except OSError as error:
        if error.errno == errno.ENOSPC and error.filename is None:
            _drop_output()
            fail(1, f"the output can't be written: {error.strerror}")
        if error.filename is None:
            raise
        fail(1, f"{error.filename}: {error.strerror}")
    except _mistakes() as error:
        fail(1, str(error))
    except KeyboardInterrupt:
        sys.exit(130)


def _require_text(arguments: Sequence[str]) -> None:
    for number, argument in enumerate(arguments, start=1):
        # Python keeps bytes that are no UTF-8 as lone surrogates, which nothing can store or show.
        if any("\ud800" <= letter <= "\udfff" for letter in argument):
            fail(2, f"argument {number} is not UTF-8 text; `--help` shows what there is")


def _drop_output() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("headrace")
    except PackageNotFoundError:
        return "not installed: running from a checkout"


APP = App(
    name="headrace",
    help="Inference gateway: who may run which model, in which order, and what it cost.",
    help_epilogue=EXAMPLES,
    help_format="plaintext",
    version=_version,
)
TENANT = APP.command(App(name="tenant", help="Add, change and remove tenants.", help_epilogue=TENANT_EXAMPLES))
KEY = APP.command(App(name="key", help="Issue, rotate and revoke API keys.", help_epilogue=KEY_EXAMPLES))
MODEL = APP.command(App(name="model", help="Look at models.", help_epilogue=""))
ALIAS = APP.command(
    App(
        name="alias", help="Let names stand for models, each with its share of the calls.", help_epilogue=ALIAS_EXAMPLES
    )
)
ENGINE = APP.command(
    App(name="engine", help="Install and remove engines, each on its own.", help_epilogue=ENGINE_EXAMPLES)
)


# ---- serving -----------------------------------------------------------------------------------------------


@APP.command(help_epilogue="")
def serve(
    *,
    workers: Annotated[int, Parameter(validator=Number(gte=1, lte=64), show_default=False)] | None = None,
    common: Common = COMMON,
) -> None:
    """Run the gateway in the foreground, until SIGTERM; it then lets calls under way finish.

    Parameters
    ----------
    workers
        How many processes serve, best one for each core [default: as configured, else 1].
    """
    with garbage.imports():
        from msgspec.structs import replace

        from gateway import app

        config = _config(common)
        if workers is not None:
            config = replace(config, server=replace(config.server, workers=workers))
        if config.server.workers > 1:
            from gateway import leader
    app.log_to_stderr()
    app.serve(config, app.gateway if config.server.workers == 1 else leader.leading)


@APP.command(help_epilogue="")
def check(config: Path | None = None, /, *, common: Common = COMMON) -> None:
    """Read a configuration: succeed, or name the field that is wrong.

    Parameters
    ----------
    config
        The file; without it, the one that `serve` would take.
    """
    read = _config(Common(config=config or common.config, json=common.json))
    models = [{"name": model.name, "replicas": [_kind(spec) for spec in model.replicas]} for model in read.models]
    if common.json:
        print_json({"ok": True, "state": str(read.state_path), "models": models})
        return
    names = ", ".join(f"{model.name} ({' '.join(map(_kind, model.replicas))})" for model in read.models)
    print(f"good: serves {names}; state in {read.state_path}")


# ---- tenants -----------------------------------------------------------------------------------------------


@TENANT.command(name="add")
def tenant_add(
    name: str,
    /,
    *,
    rpm: int | None = None,
    tpm: int | None = None,
    concurrent: int | None = None,
    common: Common = COMMON,
) -> None:
    """Add a tenant.

    Parameters
    ----------
    name
        What people will call it by: letters, digits, dots, dashes, underscores.
    rpm
        Requests a minute, all its keys together.
    tpm
        Tokens a minute, read and written.
    concurrent
        Calls under way at once.
    """
    from gateway.call import Limits

    limits = Limits(rpm=rpm, tpm=tpm, concurrent=concurrent)
    _tell_tenant(common, _run(common, lambda issuer: issuer.add_tenant(name, limits)))


@TENANT.command(name="list")
def tenant_list(common: Common = COMMON) -> None:
    """Show all tenants."""
    _require_state(common)
    rows = _run(common, lambda issuer: issuer.store.tenants())
    if common.json:
        print_json(rows)
        return
    print_table(
        ["tenant", "limits", "state", "since"],
        [
            (row.name, limits_text(row.limits), "disabled" if row.disabled else "", date_text(row.created_s))
            for row in rows
        ],
    )


@TENANT.command(name="set")
def tenant_set(
    name: str,
    /,
    *,
    rpm: LimitChange = None,
    tpm: LimitChange = None,
    concurrent: LimitChange = None,
    common: Common = COMMON,
) -> None:
    """Change limits; those not named stay, `none` lifts one.

    Parameters
    ----------
    rpm
        Requests a minute, or none.
    tpm
        Tokens a minute, or none.
    concurrent
        Calls under way at once, or none.
    """
    named = {"rpm": rpm, "tpm": tpm, "concurrent": concurrent}
    changed = {key: None if value == "none" else value for key, value in named.items() if value is not None}
    _tell_tenant(common, _run(common, lambda issuer: issuer.set_tenant(name, limits=changed, disabled=None)))


@TENANT.command(name="disable")
def tenant_disable(name: str, /, *, common: Common = COMMON) -> None:
    """Refuse all keys of a tenant until it is enabled again."""
    _tell_tenant(common, _run(common, lambda issuer: issuer.set_tenant(name, limits={}, disabled=True)))


@TENANT.command(name="enable")
def tenant_enable(name: str, /, *, common: Common = COMMON) -> None:
    """Undo `disable`."""
    _tell_tenant(common, _run(common, lambda issuer: issuer.set_tenant(name, limits={}, disabled=False)))


@TENANT.command(name="remove")
def tenant_remove(name: str, /, *, common: Common = COMMON) -> None:
    """Remove a tenant and its keys for good; its usage stays."""
    _run(common, lambda issuer: issuer.remove_tenant(name))
    tell(common, {"removed": name}, f"removed tenant {name} and its keys; its usage stays")


def _tell_tenant(common: Common, row: Any) -> None:
    state = ", disabled" if row.disabled else ""
    tell(common, row, f"tenant {row.name}: {limits_text(row.limits) or 'no limits'}{state}")


# ---- keys --------------------------------------------------------------------------------------------------


@KEY.command(name="add")
def key_add(
    *,
    tenant: str,
    name: str = "",
    env: str = "live",
    models: Globs = EVERYTHING,
    routes: Globs = EVERYTHING,
    rpm: int | None = None,
    tpm: int | None = None,
    concurrent: int | None = None,
    expires: Duration | None = None,
    save: Path | None = None,
    common: Common = COMMON,
) -> None:
    """Issue a key and show it, this once.

    Parameters
    ----------
    tenant
        Whose key it is.
    name
        A note for people, e.g. who holds it.
    env
        A word inside the key that tells what it is for.
    models
        Globs of the models it may use; without it all.
    routes
        Globs of the paths it may use, e.g. '/v1/chat/*'; without it all.
    rpm
        Requests a minute with this key, within its tenant's.
    tpm
        Tokens a minute with this key.
    concurrent
        Calls under way at once with this key.
    expires
        How long it lives, e.g. 12h or 30d.
    save
        Also write it to this file, readable by its owner only.
    """
    from gateway.call import Limits

    limits = Limits(rpm=rpm, tpm=tpm, concurrent=concurrent)
    with private_file(save) as file:
        minted = _run(
            common,
            lambda issuer: issuer.add_key(
                tenant=tenant,
                name=name,
                env=env,
                models=models,
                routes=routes,
                limits=limits,
                lifetime_s=expires,
            ),
        )
        if file is not None:
            file.write(minted.text + "\n")
    tell(common, {"id": minted.id, "key": minted.text}, f"key {minted.id}, shown this once:\n{minted.text}")


@KEY.command(name="list")
def key_list(*, tenant: str | None = None, common: Common = COMMON) -> None:
    """Show keys, without their secrets.

    Parameters
    ----------
    tenant
        Only this tenant's.
    """
    _require_state(common)
    keys = _run(common, lambda issuer: issuer.keys(tenant=tenant))
    if common.json:
        print_json(keys)
        return
    print_table(
        ["id", "tenant", "name", "models", "routes", "limits", "expires", "state"],
        [
            (
                key.id,
                key.tenant,
                key.name,
                " ".join(key.models),
                " ".join(key.routes),
                limits_text(key.limits),
                date_text(key.expires_s),
                "" if key.revoked_s is None else f"revoked {date_text(key.revoked_s)}",
            )
            for key in keys
        ],
    )


@KEY.command(name="revoke")
def key_revoke(id: str, /, *, common: Common = COMMON) -> None:
    """Refuse a key from now on."""
    _run(common, lambda issuer: issuer.revoke_key(id))
    tell(common, {"revoked": id}, f"revoked key {id}")


@KEY.command(name="rotate")
def key_rotate(id: str, /, *, overlap: Duration = 86_400.0, save: Path | None = None, common: Common = COMMON) -> None:
    """Give a key a new secret; the one before stays valid for a while.

    Parameters
    ----------
    overlap
        How long both are valid, e.g. 0s, 1h or 7d [default: 1d].
    save
        Also write it to this file, readable by its owner only.
    """
    with private_file(save) as file:
        minted = _run(common, lambda issuer: issuer.rotate_key(id, overlap_s=overlap))
        if file is not None:
            file.write(minted.text + "\n")
    tell(common, {"id": minted.id, "key": minted.text}, f"key {minted.id}, shown this once:\n{minted.text}")


# ---- aliases -----------------------------------------------------------------------------------------------


@ALIAS.command(name="set")
def alias_set(name: str, /, *shares: str, common: Common = COMMON) -> None:
    """Let a name stand for these models, whatever it stood for before.

    Parameters
    ----------
    name
        What clients call: as models are named, and no model's.
    shares
        MODEL=WEIGHT, e.g. intent-onnx=90; with 0 the model gets no calls.
    """
    config = _config(common)
    weights = _weights(shares)

    async def ask(issuer: Issuer) -> AliasRow:
        from gateway.alias import Aliases

        models = [model.name for model in config.models]
        return await Aliases(store=issuer.store, models=models, clock=issuer.clock).set(name, weights)

    row = _run(common, ask)
    tell(common, row, f"alias {row.name}: {_shares_text(row)}")


@ALIAS.command(name="list")
def alias_list(common: Common = COMMON) -> None:
    """Show all aliases."""
    _require_state(common)
    rows = _run(common, lambda issuer: issuer.store.aliases())
    if common.json:
        print_json(rows)
        return
    print_table(["alias", "models", "since"], [(row.name, _shares_text(row), date_text(row.changed_s)) for row in rows])


@ALIAS.command(name="remove")
def alias_remove(name: str, /, *, common: Common = COMMON) -> None:
    """Remove an alias; its models stay."""
    _run(common, lambda issuer: issuer.store.remove_alias(name))
    tell(common, {"removed": name}, f"removed alias {name}; its models stay")


def _weights(shares: Sequence[str]) -> dict[str, int]:
    """Raises Unfit."""
    from gateway.key import Unfit

    weights: dict[str, int] = {}
    for share in shares:
        model, _, weight = share.rpartition("=")
        if not model or not re.fullmatch("[0-9]{1,9}", weight):
            raise Unfit(f"{share[:80]!r} is no share; write MODEL=WEIGHT, e.g. intent-onnx=90")
        if model in weights:
            raise Unfit(f"{model} is given twice; give each model one weight")
        weights[model] = int(weight)
    return weights


def _shares_text(row: AliasRow) -> str:
    return " ".join(f"{model}={weight}" for model, weight in row.weights.items())


# ---- models and usage --------------------------------------------------------------------------------------


@MODEL.command(name="list")
def model_list(common: Common = COMMON) -> None:
    """Show the configured models and, if the gateway is running, how they are."""
    config = _config(common)
    live = _live_models(config) or {}
    kinds = {model.name: [_kind(spec) for spec in model.replicas] for model in config.models}
    if common.json:
        print_json([{"name": name, "kinds": kinds[name], "live": live.get(name)} for name in kinds])
        return
    rows = [(name, " ".join(kinds[name]), _now(live.get(name))) for name in kinds]
    print_table(["model", "replicas", "now"], rows)


@APP.command(help_epilogue=USAGE_EXAMPLES)
def usage(
    *,
    tenant: str | None = None,
    key: str | None = None,
    model: str | None = None,
    since: Moment | None = None,
    until: Moment | None = None,
    by: Literal["tenant", "model", "key", "none"] = "tenant",
    records: Annotated[bool, Parameter(negative="", show_default=False)] = False,
    limit: Annotated[int, Parameter(validator=Number(gte=1, lte=1_000_000))] = 1000,
    common: Common = COMMON,
) -> None:
    """Show what was used, up to the last call that ended.

    Parameters
    ----------
    tenant
        Only this tenant.
    key
        Only the key with this id.
    model
        Only this model.
    since
        From then on: 24h (ago), 2026-11-01, 2026-11-01T09:30Z or Unix time.
    until
        Before then.
    by
        Sum for each of these; none sums all.
    records
        Show each call instead of sums, newest first.
    limit
        How many calls at most.
    """
    from gateway.store import UsageFilter

    where = UsageFilter(tenant=tenant, key=key, model=model, since_s=since, until_s=until)

    async def ask(issuer: Issuer) -> Sequence[Any]:
        await _fold(_state(common), issuer.store)
        if records:
            return await issuer.store.usage(where, limit=limit)
        return await issuer.store.usage_totals(where, by=by)

    _require_state(common)
    rows = _run(common, ask)
    if common.json:
        print_json(rows)
        return
    columns = ["at_s", "id", "tenant", "model", "status", "outcome", "tokens_in", "tokens_out", "total_s"]
    if not records:
        columns = ["name", "calls", "served", "rejected", "refused", "failed", "cancelled"]
        columns += ["tokens_in", "tokens_out", "tokens_cached", "items"]
    print_table(columns, [[str(getattr(row, column)) for column in columns] for row in rows])


async def _fold(state: Path, store: Store) -> None:
    """Put what the gateway has journalled but not yet folded into the store; doing so twice counts once."""
    from gateway.journal import unfolded

    await store.append_usage(unfolded(state / "journal"))


def _live_models(config: Config) -> dict[str, Any] | None:
    """What the running gateway's admin API says of its models; None if there is none."""
    import httpx

    token = config.state_path / "admin.token"
    try:
        headers = {"authorization": f"Bearer {token.read_text().strip()}"}
        answer = httpx.get(
            f"http://{config.server.admin}/models", headers=headers, timeout=2.0, trust_env=False
        ).raise_for_status()
    except (OSError, httpx.HTTPError):
        return None
    return {model["name"]: model for model in answer.json()}


def _now(live: dict[str, Any] | None) -> str:
    if live is None:
        return "not running"
    queue = live["queue"]
    states = " ".join(replica["state"] for replica in live["replicas"])
    return f"{states} · {queue['running']} running, {queue['waiting']} waiting"


# ---- engines -----------------------------------------------------------------------------------------------


@ENGINE.command(name="install")
def engine_install(
    name: str, /, *, version: str | None = None, torch_index: str | None = None, common: Common = COMMON
) -> None:
    """Install an engine, or finish an interrupted installation.

    Parameters
    ----------
    name
        E.g. vllm.
    version
        Which version, if not the one this release was tested with.
    torch_index
        Package index for torch, e.g. https://download.pytorch.org/whl/cpu.
    """
    from runtimes.environment import Environments

    with progress(sys.stderr) as say:
        made = Environments(_state(common)).install(name, version=version, torch_index=torch_index, say=say)
    tell(common, made, f"{made.name} {made.version} ({made.device}) is installed")


@ENGINE.command(name="list")
def engine_list(common: Common = COMMON) -> None:
    """Show installed engines."""
    from runtimes.environment import Environments

    made = Environments(_state(common)).list()
    if common.json:
        print_json(made)
        return
    print_table(["engine", "version", "device"], [(it.name, it.version, it.device) for it in made])


@ENGINE.command(name="remove")
def engine_remove(name: str, version: str, /, *, common: Common = COMMON) -> None:
    """Delete an installed engine."""
    from runtimes.environment import Environments

    Environments(_state(common)).remove(name, version)
    tell(common, {"removed": name, "version": version}, f"removed {name} {version}")


# ---- what commands stand on --------------------------------------------------------------------------------


def _config(common: Common) -> Config:
    """The named configuration, else the first of the usual places. Raises ConfigError."""
    from gateway.config import ConfigError, load

    path = _config_path(common)
    if path is None:
        raise ConfigError("there is no configuration here; name one with --config, or write ./headrace.toml")
    return load(path)


def _config_path(common: Common) -> Path | None:
    usual = (Path("headrace.toml"), Path(__file__).parents[1] / "deploy" / "local.toml")
    return common.config or next((path for path in usual if path.exists()), None)


def _state(common: Common) -> Path:
    """The state folder: of the configuration, or if there is none the default one."""
    from gateway.config import Config

    return (_config(common) if _config_path(common) else Config(models=())).state_path


def _require_state(common: Common) -> None:
    """A command that only reads makes no state folder. Raises ConfigError."""
    from gateway.config import ConfigError

    state = _state(common)
    if not state.is_dir():
        raise ConfigError(
            f"there is no state folder {state}; name the gateway's configuration with --config, or add a tenant first"
        )


def _run(common: Common, ask: Callable[[Issuer], Coroutine[Any, Any, T]]) -> T:
    """Ask with the state folder's store open."""
    import asyncio

    from gateway.key import pepper_of
    from gateway.store import SqliteStore
    from gateway.tenant import Issuer
    from runtimes.clock import SystemClock

    state = _state(common)

    async def run() -> T:
        store = SqliteStore(state / "headrace.db")
        try:
            await store.open()
            return await ask(Issuer(store=store, pepper=pepper_of(state), clock=SystemClock()))
        finally:
            await store.aclose()

    return asyncio.run(run())


def _kind(spec: Any) -> str:
    return str(type(spec).__struct_config__.tag)


def _mistakes() -> tuple[type[Exception], ...]:
    """What a user can mend; anything else is a fault of ours and keeps its traceback."""
    from gateway.config import ConfigError
    from gateway.key import Unfit
    from gateway.store import StoreFault
    from runtimes.environment import EnvironmentFault

    return (ConfigError, Unfit, StoreFault, EnvironmentFault)


if __name__ == "__main__":
    main()
