"""`headrace key`: what tenants show with their calls."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cyclopts import App

from gateway.console import (
    COMMON,
    EVERYTHING,
    Amount,
    Common,
    Duration,
    Globs,
    date_text,
    limits_text,
    print_json,
    print_table,
    private_file,
    tell,
)
from gateway.home import asked, currency_of, fold, require_state
from gateway.money import amount_text

if TYPE_CHECKING:
    from gateway.tenant import Issuer, KeyView

EXAMPLES = """
Examples:

    headrace key add --tenant acme --models 'chat*' 'support-*' --expires 30d
    headrace key rotate J3u0PzY1aB --overlap 7d
"""
KEY = App(name="key", help="Issue, rotate and revoke API keys.", help_epilogue=EXAMPLES)


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
    budget_day: Amount | None = None,
    budget_month: Amount | None = None,
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
    budget_day
        Money a day of UTC with this key, e.g. 4.98, in the configured currency.
    budget_month
        Money a calendar month of UTC with this key.
    expires
        How long it lives, e.g. 12h or 30d.
    save
        Also write it to this file, readable by its owner only.
    """
    from gateway.call import Limits

    limits = Limits(rpm, tpm, concurrent, budget_day, budget_month)
    with private_file(save) as file:
        minted = asked(
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
    """Show keys, without their secrets, and what they have spent this day and this month (UTC).

    Parameters
    ----------
    tenant
        Only this tenant's.
    """
    require_state(common)

    async def ask(issuer: Issuer) -> list[KeyView]:
        await fold(common, issuer.store)
        return await issuer.keys(tenant=tenant)

    keys = asked(common, ask)
    if common.json:
        print_json(keys)
        return
    currency = currency_of(common)
    print_table(
        [
            *("id", "tenant", "name", "models", "routes", "limits", "expires", "state"),
            f"today_{currency}",
            f"month_{currency}",
        ],
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
                amount_text(key.spent_day_nano),
                amount_text(key.spent_month_nano),
            )
            for key in keys
        ],
    )


@KEY.command(name="revoke")
def key_revoke(id: str, /, *, common: Common = COMMON) -> None:
    """Refuse a key from now on."""
    asked(common, lambda issuer: issuer.revoke_key(id))
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
        minted = asked(common, lambda issuer: issuer.rotate_key(id, overlap_s=overlap))
        if file is not None:
            file.write(minted.text + "\n")
    tell(common, {"id": minted.id, "key": minted.text}, f"key {minted.id}, shown this once:\n{minted.text}")
