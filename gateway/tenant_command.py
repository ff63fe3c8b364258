"""`headrace tenant`: who may call, and how much."""

from __future__ import annotations

from typing import Any

from cyclopts import App

from gateway.console import (
    COMMON,
    Common,
    LimitChange,
    date_text,
    limits_text,
    print_json,
    print_table,
    tell,
)
from gateway.home import asked, require_state

EXAMPLES = """
Examples:

    headrace tenant add acme --rpm 600 --tpm 100000
    headrace tenant set acme --rpm none --concurrent 8
"""
TENANT = App(name="tenant", help="Add, change and remove tenants.", help_epilogue=EXAMPLES)


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
    _tell_tenant(common, asked(common, lambda issuer: issuer.add_tenant(name, limits)))


@TENANT.command(name="list")
def tenant_list(common: Common = COMMON) -> None:
    """Show all tenants."""
    require_state(common)
    rows = asked(common, lambda issuer: issuer.store.tenants())
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
    _tell_tenant(common, asked(common, lambda issuer: issuer.set_tenant(name, limits=changed, disabled=None)))


@TENANT.command(name="disable")
def tenant_disable(name: str, /, *, common: Common = COMMON) -> None:
    """Refuse all keys of a tenant until it is enabled again."""
    _tell_tenant(common, asked(common, lambda issuer: issuer.set_tenant(name, limits={}, disabled=True)))


@TENANT.command(name="enable")
def tenant_enable(name: str, /, *, common: Common = COMMON) -> None:
    """Undo `disable`."""
    _tell_tenant(common, asked(common, lambda issuer: issuer.set_tenant(name, limits={}, disabled=False)))


@TENANT.command(name="remove")
def tenant_remove(name: str, /, *, common: Common = COMMON) -> None:
    """Remove a tenant and its keys for good; its usage stays."""
    asked(common, lambda issuer: issuer.remove_tenant(name))
    tell(common, {"removed": name}, f"removed tenant {name} and its keys; its usage stays")


def _tell_tenant(common: Common, row: Any) -> None:
    state = ", disabled" if row.disabled else ""
    tell(common, row, f"tenant {row.name}: {limits_text(row.limits) or 'no limits'}{state}")
