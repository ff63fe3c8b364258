"""Where tenants, keys, aliases and usage rest: what is kept, and the protocol by which it is.

Nothing here is asked while a call runs. `gateway.tenant` keeps a snapshot in memory and polls `version`;
usage arrives in batches from the journal. Several processes may hold the same store: the running gateway
and every `headrace` command.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, Protocol, runtime_checkable

import msgspec

from gateway.call import Limits, Record

By = Literal["tenant", "model", "key", "day", "none"]


@runtime_checkable
class Store(Protocol):
    """Tenants, keys, aliases and usage, durable once a method has returned.

    Every method raises Unreachable when the database cannot answer; those that name a row raise Missing when
    it is not there, those that add one raise Taken when it is. Each change is one transaction, whole or not at all,
    when its caller is cancelled too. Safe to use concurrently, by several tasks and several processes.
    """

    async def open(self) -> None:
        """Connect, and create or migrate the schema. Two processes may do so at once."""

    async def aclose(self) -> None: ...

    async def ready(self) -> None:
        """Return if the database answers."""

    async def version(self) -> int:
        """A number that differs after anyone, in any process, changed tenants, keys or aliases. Cheap: meant to be
        polled several times a second."""

    async def snapshot(self) -> Snapshot:
        """Everything that is kept in memory, all of one instant."""

    async def tenants(self) -> list[TenantRow]: ...
    async def tenant(self, name: str) -> TenantRow: ...
    async def add_tenant(self, row: TenantRow) -> None: ...
    async def set_tenant(self, name: str, *, limits: Mapping[str, int | None], disabled: bool | None) -> TenantRow:
        """Change the limits that are named, and `disabled` unless it is None; what others change at the same time
        stays as they set it."""

    async def remove_tenant(self, tenant_id: str) -> None:
        """Remove a tenant and its keys. Its usage stays: a bill outlives its customer."""

    async def keys(self, *, tenant_id: str | None = None) -> list[KeyRow]: ...
    async def key(self, key_id: str) -> KeyRow: ...
    async def add_key(self, row: KeyRow) -> None: ...
    async def revoke_key(self, key_id: str, *, at_s: float) -> None:
        """Refuse the key from now on. Revoking twice keeps the first time."""

    async def rotate_key(self, key_id: str, *, digest: bytes, previous_until_s: float) -> None:
        """Make `digest` the key's secret and keep the one before valid until then; any older one ends now."""

    async def aliases(self) -> list[AliasRow]: ...
    async def set_alias(self, row: AliasRow) -> None:
        """Keep it in place of any other of that name."""

    async def remove_alias(self, name: str) -> None: ...

    async def append_usage(self, records: Sequence[Record]) -> None:
        """Keep these records; ids that are already there are left as they are, so a repeat counts once."""

    async def usage(self, where: UsageFilter, *, limit: int) -> list[Record]:
        """Matching records, newest first."""

    async def usage_totals(self, where: UsageFilter, *, by: By) -> list[UsageTotal]:
        """Sums over the matching records, one for each value of `by`, in its order; `none` is one sum."""

    async def spent(self, *, day_s: float, month_s: float) -> list[Spent]:
        """What each key has spent since two midnights of UTC, the day's not before the month's; those that spent
        nothing since the month's are left out. Cheap, however many calls that were."""


class TenantRow(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    name: str
    """Unique; what people call it by."""
    limits: Limits = Limits()
    disabled: bool = False
    created_s: float
    """Unix time."""


class KeyRow(msgspec.Struct, frozen=True, kw_only=True):
    """A key as it is kept: enough to recognise the secret, not enough to use it."""

    id: str
    tenant_id: str
    env: str
    digest: bytes
    """HMAC-SHA-256 of the secret under the pepper, which is not in the store."""
    previous: bytes | None = None
    """Digest of the secret before the last rotation."""
    previous_until_s: float | None = None
    """Unix time; until then `previous` is valid too."""
    name: str = ""
    models: tuple[str, ...] = ("*",)
    routes: tuple[str, ...] = ("*",)
    limits: Limits = Limits()
    created_s: float
    expires_s: float | None = None
    revoked_s: float | None = None


class AliasRow(msgspec.Struct, frozen=True, kw_only=True):
    """A name that clients call, and what it stands for."""

    name: str
    weights: dict[str, int]
    """Model → its share of the calls; in the order they were given."""
    changed_s: float
    """Unix time."""


class Snapshot(msgspec.Struct, frozen=True):
    version: int
    tenants: tuple[TenantRow, ...]
    keys: tuple[KeyRow, ...]
    aliases: tuple[AliasRow, ...]


class UsageFilter(msgspec.Struct, frozen=True, kw_only=True):
    """Which records; None matches all."""

    tenant: str | None = None
    """The tenant's name at the time of the call."""
    key: str | None = None
    model: str | None = None
    since_s: float | None = None
    """Unix time, inclusive."""
    until_s: float | None = None
    """Unix time, exclusive."""


class UsageTotal(msgspec.Struct, frozen=True):
    name: str
    """The tenant, model, key id or day of UTC (2026-11-25) summed over; empty for the sum of all."""
    calls: int
    served: int
    rejected: int
    refused: int
    failed: int
    cancelled: int
    estimated: int
    """Calls whose tokens the gateway counted because the engine did not say."""
    tokens_in: int
    tokens_out: int
    tokens_cached: int
    items: int
    """Texts and other rows that models were given."""
    cost_nano: int
    """In nano-units of the configured currency."""


class Spent(msgspec.Struct, frozen=True):
    """By one key, which is one tenant's."""

    tenant_id: str
    key_id: str
    day_nano: int
    month_nano: int


class StoreFault(Exception):
    """The store's refusal; the message is safe to show and holds no row's secrets."""


class Unreachable(StoreFault):
    """The database did not answer, or not in time."""


class Missing(StoreFault):
    """No such row."""


class Taken(StoreFault):
    """A row of that name or id exists."""
