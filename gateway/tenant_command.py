"""`headrace tenant`: who may call, and how much."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cyclopts import App

from gateway.console import (
    COMMON,
    Amount,
    AmountChange,
    Common,
    LimitChange,
    date_text,
    limits_text,
    print_json,
    print_table,
    tell,
)
from gateway.home import asked, currency_of, fold, require_state
from gateway.money import amount_text

if TYPE_CHECKING:
    from gateway.tenant import Issuer, TenantView

EXAMPLES = """
Examples:

    headrace tenant add acme --rpm 600 --tpm 100000
    headrace tenant set acme --rpm none --concurrent 8
    headrace tenant set acme --budget-month 250
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
    budget_day: Amount | None = None,
    budget_month: Amount | None = None,
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
    budget_day
        Money a day of UTC, e.g. 4.98, in the configured currency; only models with a price take from it.
    budget_month
        Money a calendar month of UTC.
    """
    from gateway.call import Limits

    limits = Limits(rpm, tpm, concurrent, budget_day, budget_month)
    _tell_tenant(common, asked(common, lambda issuer: issuer.add_tenant(name, limits)))


@TENANT.command(name="list")
def tenant_list(common: Common = COMMON) -> None:
    """Show all tenants, and what they have spent this day and this month (UTC)."""
    require_state(common)

    async def ask(issuer: Issuer) -> list[TenantView]:
        await fold(common, issuer.store)
        return await issuer.tenants()

    rows = asked(common, ask)
    if common.json:
        print_json(rows)
        return
    currency = currency_of(common)
    print_table(
        ["tenant", "limits", "state", "since", f"today_{currency}", f"month_{currency}"],
        [
            (
                row.name,
                limits_text(row.limits),
                "disabled" if row.disabled else "",
                date_text(row.created_s),
                amount_text(row.spent_day_nano),
                amount_text(row.spent_month_nano),
            )
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
    budget_day: AmountChange | None = None,
    budget_month: AmountChange | None = None,
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
    budget_day
        Money a day of UTC, or none. What was spent before counts.
    budget_month
        Money a calendar month of UTC, or none.
    """
    named = {
        "rpm": rpm,
        "tpm": tpm,
        "concurrent": concurrent,
        "budget_day_nano": budget_day,
        "budget_month_nano": budget_month,
    }
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
