"""The `headrace` command: serve · check · tenant · key · model · alias · usage · engine.

Tenants, keys, aliases and usage are read and changed in the state folder, so these commands work beside a running
gateway, which sees the change within half a second, and without one. What a command needs is imported by that
command: `--help` and `key add` wait for no framework.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from cyclopts import App, CycloptsError, Parameter
from cyclopts.validators import Number

from gateway import garbage
from gateway.alias_command import ALIAS
from gateway.console import (
    COMMON,
    Common,
    Moment,
    fail,
    print_json,
    print_table,
)
from gateway.engine_command import ENGINE
from gateway.home import asked, config_of, currency_of, fold, require_state
from gateway.key_command import KEY
from gateway.money import amount_text
from gateway.tenant_command import TENANT

if TYPE_CHECKING:
    from gateway.config import Config
    from gateway.tenant import Issuer

T = TypeVar("T")

EXAMPLES = """
Examples:

    headrace serve --config headrace.toml
    headrace tenant add acme --rpm 600 --tpm 100000
    headrace key add --tenant acme --models 'chat*' --expires 30d
    headrace usage --by model --since 24h --json
"""
USAGE_EXAMPLES = """
Examples:

    headrace usage --by model --since 24h
    headrace usage --by day --tenant acme --since 30d
    headrace usage --tenant acme --since 2026-11-01 --until 2026-12-01 --json
    headrace usage --records --limit 20
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
APP.command(TENANT)
APP.command(KEY)
MODEL = APP.command(App(name="model", help="Look at models.", help_epilogue=""))
APP.command(ALIAS)
APP.command(ENGINE)


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

        config = config_of(common)
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
    read = config_of(Common(config=config or common.config, json=common.json))
    models = [{"name": model.name, "replicas": [_kind(spec) for spec in model.replicas]} for model in read.models]
    if common.json:
        print_json({"ok": True, "state": str(read.state_path), "models": models})
        return
    names = ", ".join(f"{model.name} ({' '.join(map(_kind, model.replicas))})" for model in read.models)
    print(f"good: serves {names}; state in {read.state_path}")


@MODEL.command(name="list")
def model_list(common: Common = COMMON) -> None:
    """Show the configured models and, if the gateway is running, how they are."""
    config = config_of(common)
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
    by: Literal["tenant", "model", "key", "day", "none"] = "tenant",
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
        Sum for each of these (days are of UTC); none sums all.
    records
        Show each call instead of sums, newest first.
    limit
        How many calls at most.
    """
    from gateway.store import UsageFilter

    where = UsageFilter(tenant=tenant, key=key, model=model, since_s=since, until_s=until)

    async def ask(issuer: Issuer) -> Sequence[Any]:
        await fold(common, issuer.store)
        if records:
            return await issuer.store.usage(where, limit=limit)
        return await issuer.store.usage_totals(where, by=by)

    require_state(common)
    rows = asked(common, ask)
    if common.json:
        print_json(rows)
        return
    columns = ["at_s", "id", "tenant", "model", "status", "outcome", "tokens_in", "tokens_out", "total_s"]
    if not records:
        columns = ["name", "calls", "served", "rejected", "refused", "failed", "cancelled"]
        columns += ["tokens_in", "tokens_out", "tokens_cached", "items"]
    cells = [[*(str(getattr(row, column)) for column in columns), amount_text(row.cost_nano)] for row in rows]
    print_table([*columns, f"cost_{currency_of(common)}"], cells)


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
