"""Who is calling: a presented key becomes a Principal, from a snapshot in memory.

Authentication fails closed for whatever the snapshot does not know. If the store fails, the last snapshot
stands: known keys keep working, `trouble` says since when, and revocations wait until the store is back.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import msgspec

from gateway.budget import day_of, month_of
from gateway.call import Limits, Principal, covered
from gateway.errors import Forbidden, KeyExpired, Unauthenticated
from gateway.key import Minted, Pepper, Unfit, mint, parse, random_id
from gateway.money import NANO_MAX
from gateway.store import KeyRow, Snapshot, Spent, Store, StoreFault, TenantRow
from runtimes.clock import Clock

log = logging.getLogger("headrace.tenant")


class Tenants:
    """The keys of this gateway. `open` before use; a change in any process is seen within POLL_S and the time
    the store takes to answer."""

    def __init__(
        self, *, store: Store, pepper: Pepper, clock: Clock, listeners: Sequence[Callable[[Snapshot], None]] = ()
    ) -> None:
        """`listeners` are told of each snapshot too: what else of the store is kept in memory."""
        self.store = store
        self.clock = clock
        self.pepper = pepper
        self._listeners = (self.take, *listeners)
        self._entries: dict[str, Entry] = {}
        self._version: int | None = None
        self._fault = ""
        self._seen_s = clock.now_s()
        self._follower: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Load the keys and keep following them. Raises Unreachable: without keys there is nothing to serve."""
        await self.refresh()
        self._follower = asyncio.create_task(self._follow(), name="follow tenants")

    async def aclose(self) -> None:
        if self._follower is not None:
            self._follower.cancel()
            await asyncio.gather(self._follower, return_exceptions=True)

    def authenticate(self, key: str | None) -> Principal:
        """Raises Unauthenticated (401) for whatever is not a live key, alike in words and in time for an unknown
        id and a wrong secret; Forbidden (403) for a live key whose time or tenant has ended."""
        if not key:
            raise Unauthenticated("No API key was given; send it as `Authorization: Bearer hr_…`.")
        presented = parse(key)
        if presented is None:
            raise Unauthenticated(_UNKNOWN)
        env, id, secret = presented
        entry = self._entries.get(id, NOBODY)
        digest = self.pepper.digest(secret)
        # Both are always compared, and for an unknown id too, so that time tells nothing.
        current = hmac.compare_digest(digest, entry.digest)
        previous = hmac.compare_digest(digest, entry.previous)
        if not (current or (previous and self.clock.wall_s() < entry.previous_until_s)) or entry.env != env:
            raise Unauthenticated(_UNKNOWN)
        self._require_live(entry)
        return entry.principal

    def renew(self, principal: Principal) -> Principal:
        """Who that is by now: between a key and its call there may be a long body, or the calls sent before it.
        Raises Unauthenticated (401) if the key has been revoked meanwhile, Forbidden (403) as `authenticate` does."""
        entry = self._entries.get(principal.key_id)
        if entry is None:
            raise Unauthenticated(_UNKNOWN)
        if entry.principal is not principal:
            self._require_live(entry)
        return entry.principal

    def _require_live(self, entry: Entry) -> None:
        principal = entry.principal
        if entry.disabled:
            raise Forbidden(f"Tenant {principal.tenant!r} is disabled; ask whoever runs this gateway.")
        if principal.expires_s is not None and self.clock.wall_s() >= principal.expires_s:
            raise KeyExpired(f"Key {principal.key_id} has expired; ask for a new one.")

    def authorize(self, principal: Principal, model: str, route: str) -> None:
        """Raises Forbidden (403) if the key's scopes leave out the model or the route."""
        self.authorize_model(principal, model)
        if not covered(principal.routes, route):
            may = ", ".join(principal.routes) or "none"
            raise Forbidden(f"Key {principal.key_id} may not use {route}; it may use: {may}.")

    def authorize_model(self, principal: Principal, model: str) -> None:
        """Raises Forbidden (403) if the key's scopes leave out the model."""
        if not covered(principal.models, model):
            may = ", ".join(principal.models) or "none"
            raise Forbidden(
                f"Key {principal.key_id} may not use model {model[:200]!r}; it may use: {may}.", param="model"
            )

    async def refresh(self) -> None:
        """Take over what the store holds, if it has changed."""
        version = await self.store.version()
        if version != self._version:
            snapshot = await self.store.snapshot()
            for listener in self._listeners:
                listener(snapshot)
        self._seen_s = self.clock.now_s()
        if self._fault:
            log.warning("the store answers again: keys and tenants are current")
            self._fault = ""

    def take(self, snapshot: Snapshot) -> None:
        """From now on these are the keys."""
        self._entries = _entries(snapshot)
        self._version = snapshot.version

    def trouble(self) -> str | None:
        """Why keys and tenants may be out of date; None if they are not."""
        if not self._fault and self.age_s() < STALE_S:
            return None
        why = self._fault or "the store takes long to answer"
        return f"keys and tenants are as of {self.age_s():.0f} s ago: {why}"

    def age_s(self) -> float:
        """Seconds since the snapshot was last known to be current."""
        return self.clock.now_s() - self._seen_s

    async def _follow(self) -> None:
        while True:
            await self.clock.sleep(POLL_S)
            try:
                await self.refresh()
            except Exception as fault:  # whatever it is, what changes later is to be followed
                if not self._fault:
                    unforeseen = not isinstance(fault, StoreFault)
                    log.error("keys and tenants stay as they are: %s", fault, exc_info=unforeseen)
                self._fault = str(fault)


#: Pause between two looks at the store's version.
POLL_S = 0.4
#: Age from which the snapshot is called old even if the store has not failed, only not answered.
STALE_S = 2.0

_UNKNOWN = "This API key is not valid; check it, or ask whoever runs this gateway for one."


class Entry(msgspec.Struct, frozen=True):
    """One key as authentication needs it."""

    principal: Principal
    env: str
    digest: bytes
    previous: bytes
    previous_until_s: float
    disabled: bool


NOBODY = Entry(Principal("", "", ""), "", bytes(32), bytes(32), 0.0, True)


def _entries(snapshot: Snapshot) -> dict[str, Entry]:
    tenants = {tenant.id: tenant for tenant in snapshot.tenants}
    return {
        key.id: Entry(
            principal=Principal(
                tenant_id=tenant.id,
                tenant=tenant.name,
                key_id=key.id,
                tenant_limits=tenant.limits,
                key_limits=key.limits,
                models=key.models,
                routes=key.routes,
                expires_s=key.expires_s,
            ),
            env=key.env,
            digest=key.digest,
            previous=key.previous or NOBODY.previous,
            previous_until_s=key.previous_until_s or 0.0,
            disabled=tenant.disabled,
        )
        for key in snapshot.keys
        if key.revoked_s is None and (tenant := tenants.get(key.tenant_id)) is not None
    }


# ---- issuing -----------------------------------------------------------------------------------------------


class Issuer:
    """Makes and changes tenants and keys; the command and the admin API both go through it.

    Every method raises Unfit for a value that can't be kept, and what the Store raises.
    """

    def __init__(self, *, store: Store, pepper: Pepper, clock: Clock) -> None:
        self.store = store
        self.clock = clock
        self._pepper = pepper

    async def add_tenant(self, name: str, limits: Limits) -> TenantRow:
        _require_name(name)
        _require_limits(limits)
        row = TenantRow(id=random_id(), name=name, limits=limits, created_s=self.clock.wall_s())
        await self.store.add_tenant(row)
        return row

    async def tenants(self) -> list[TenantView]:
        """All of them, by name."""
        day_nano, month_nano = Counter[str](), Counter[str]()
        for spent in await self._spent():
            day_nano[spent.tenant_id] += spent.day_nano
            month_nano[spent.tenant_id] += spent.month_nano
        return [
            TenantView(
                **msgspec.structs.asdict(row), spent_day_nano=day_nano[row.id], spent_month_nano=month_nano[row.id]
            )
            for row in await self.store.tenants()
        ]

    async def set_tenant(self, name: str, *, limits: Mapping[str, int | None], disabled: bool | None) -> TenantRow:
        """Change the limits that are named, and `disabled` unless it is None; the rest stays."""
        _require_limits(Limits(**limits))
        return await self.store.set_tenant(name, limits=limits, disabled=disabled)

    async def remove_tenant(self, name: str) -> None:
        await self.store.remove_tenant((await self.store.tenant(name)).id)

    async def keys(self, *, tenant: str | None = None) -> list[KeyView]:
        names = {row.id: row.name for row in await self.store.tenants()}
        tenant_id = None if tenant is None else (await self.store.tenant(tenant)).id
        spent = {row.key_id: row for row in await self._spent()}
        return [
            _view(row, names.get(row.tenant_id, ""), spent.get(row.id))
            for row in await self.store.keys(tenant_id=tenant_id)
        ]

    async def add_key(
        self,
        *,
        tenant: str,
        name: str = "",
        env: str = "live",
        models: tuple[str, ...] = ("*",),
        routes: tuple[str, ...] = ("*",),
        limits: Limits = Limits(),  # noqa: B008  frozen
        lifetime_s: float | None = None,
    ) -> Minted:
        _require_limits(limits)
        if lifetime_s is not None and not 0 < lifetime_s <= LIFETIME_S_MAX:
            raise Unfit(f"a key can't expire after {lifetime_s:g} s; give it a time above 0 and up to 100 years")
        _require_printable("name", name)
        _require_globs("models", models)
        _require_globs("routes", routes)
        now_s = self.clock.wall_s()
        minted = mint(pepper=self._pepper, env=env)
        await self.store.add_key(
            KeyRow(
                id=minted.id,
                tenant_id=(await self.store.tenant(tenant)).id,
                env=env,
                digest=minted.digest,
                name=name[:LABEL_CHARS_MAX],
                models=models,
                routes=routes,
                limits=limits,
                created_s=now_s,
                expires_s=None if lifetime_s is None else now_s + lifetime_s,
            )
        )
        return minted

    async def rotate_key(self, id: str, *, overlap_s: float) -> Minted:
        """A new secret for the key; the one before stays valid for `overlap_s`, any older one ends now."""
        row = await self.store.key(id)
        if row.revoked_s is not None:
            raise Unfit(f"key {id} has been revoked; add a new one instead")
        if not 0 <= overlap_s <= LIFETIME_S_MAX:
            raise Unfit(f"the overlap can't be {overlap_s:g} s; give 0, to end the old secret now, up to 100 years")
        minted = mint(pepper=self._pepper, env=row.env, id=id)
        until_s = self.clock.wall_s() + overlap_s
        await self.store.rotate_key(id, digest=minted.digest, previous_until_s=until_s)
        return minted

    async def revoke_key(self, id: str) -> None:
        await self.store.revoke_key(id, at_s=self.clock.wall_s())

    async def _spent(self) -> list[Spent]:
        at_s = self.clock.wall_s()
        return await self.store.spent(day_s=day_of(at_s)[0], month_s=month_of(at_s)[0])


class TenantView(msgspec.Struct, frozen=True, kw_only=True):
    """A tenant as its operators see it."""

    id: str
    name: str
    limits: Limits
    disabled: bool
    created_s: float
    spent_day_nano: int
    """This day of UTC, as far as it is in the store."""
    spent_month_nano: int
    """This calendar month of UTC."""


class KeyView(msgspec.Struct, frozen=True):
    """A key as its operators see it: nothing in it helps to use or to forge it."""

    id: str
    tenant: str
    name: str
    env: str
    models: tuple[str, ...]
    routes: tuple[str, ...]
    limits: Limits
    created_s: float
    expires_s: float | None
    revoked_s: float | None
    previous_until_s: float | None
    spent_day_nano: int
    """This day of UTC, as far as it is in the store."""
    spent_month_nano: int
    """This calendar month of UTC."""


LABEL_CHARS_MAX = 100
GLOB_CHARS_MAX = 200
#: A century; what is meant to live longer needs no end.
LIFETIME_S_MAX = 100 * 365.25 * 86_400


def _view(row: KeyRow, tenant: str, spent: Spent | None) -> KeyView:
    fields = {name: getattr(row, name) for name in KeyView.__struct_fields__ if hasattr(row, name)}
    day_nano, month_nano = (spent.day_nano, spent.month_nano) if spent else (0, 0)
    return KeyView(tenant=tenant, spent_day_nano=day_nano, spent_month_nano=month_nano, **fields)


def _require_name(name: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
        raise Unfit(
            f"{name[:80]!r} is no name for a tenant; use 1 to 64 letters, digits, dots, dashes and underscores, "
            "beginning with a letter or digit"
        )


def _require_globs(field: str, globs: tuple[str, ...]) -> None:
    if not globs:
        raise Unfit(f"a key without {field} can be used for nothing; name some, or leave {field} out for all")
    for glob in globs:
        if not 0 < len(glob) <= GLOB_CHARS_MAX:
            raise Unfit(f"a glob has 1 to {GLOB_CHARS_MAX} characters, {glob[:40]!r} has {len(glob)}")
        _require_printable(field, glob)


def _require_printable(field: str, text: str) -> None:
    """These are shown on terminals, where a control character can hide or forge what stands beside it."""
    if not text.isprintable():
        raise Unfit(f"{field}: {text[:40]!r} has control characters; leave them out")


def _require_limits(limits: Limits) -> None:
    for name, value in msgspec.structs.asdict(limits).items():
        most = NANO_MAX if name.endswith("_nano") else LIMIT_MAX
        if value is not None and not 0 <= value <= most:
            raise Unfit(f"the limit {name} can't be {value}; give a whole number from 0 to {most}, or none")


#: What every database's integer column holds.
LIMIT_MAX = 2**31 - 1
