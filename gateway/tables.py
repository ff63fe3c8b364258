"""What the store keeps, as tables of a database, and how rows become it and back."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import sqlalchemy as sa

from gateway.call import Limits, Outcome, Record
from gateway.store import AliasRow, KeyRow, TenantRow, UsageFilter

METADATA = sa.MetaData()

_COLUMN_TYPES = {str: sa.String, Outcome: sa.String, int: sa.Integer, float: sa.Float, bool: sa.Boolean}

REVISION = sa.Table("revision", METADATA, sa.Column("number", sa.Integer, nullable=False))

TENANTS = sa.Table(
    "tenants",
    METADATA,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("name", sa.String, nullable=False, unique=True),
    sa.Column("rpm", sa.Integer),
    sa.Column("tpm", sa.Integer),
    sa.Column("concurrent", sa.Integer),
    sa.Column("budget_day_nano", sa.BigInteger),
    sa.Column("budget_month_nano", sa.BigInteger),
    sa.Column("disabled", sa.Boolean, nullable=False),
    sa.Column("created_s", sa.Float, nullable=False),
)

KEYS = sa.Table(
    "keys",
    METADATA,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("tenant_id", sa.String, sa.ForeignKey("tenants.id", ondelete="CASCADE"), nullable=False, index=True),
    sa.Column("env", sa.String, nullable=False),
    sa.Column("digest", sa.LargeBinary, nullable=False),
    sa.Column("previous", sa.LargeBinary),
    sa.Column("previous_until_s", sa.Float),
    sa.Column("name", sa.String, nullable=False),
    sa.Column("models", sa.JSON, nullable=False),
    sa.Column("routes", sa.JSON, nullable=False),
    sa.Column("rpm", sa.Integer),
    sa.Column("tpm", sa.Integer),
    sa.Column("concurrent", sa.Integer),
    sa.Column("budget_day_nano", sa.BigInteger),
    sa.Column("budget_month_nano", sa.BigInteger),
    sa.Column("created_s", sa.Float, nullable=False),
    sa.Column("expires_s", sa.Float),
    sa.Column("revoked_s", sa.Float),
)

#: Models are the configuration's, so they are named here and not referred to.
ALIASES = sa.Table(
    "aliases",
    METADATA,
    sa.Column("name", sa.String, primary_key=True),
    sa.Column("weights", sa.JSON, nullable=False),
    sa.Column("changed_s", sa.Float, nullable=False),
)

#: One column a field of Record. Tenant and key are no foreign keys: records outlive both.
USAGE = sa.Table(
    "usage",
    METADATA,
    *(
        sa.Column(
            field.name,
            sa.BigInteger if field.name.endswith("_nano") else _COLUMN_TYPES[field.type],
            primary_key=field.name == "id",
            nullable=False,
        )
        for field in msgspec.structs.fields(Record)
    ),
    sa.Index("ix_usage_at_s", "at_s"),
    sa.Index("ix_usage_tenant_at_s", "tenant", "at_s"),
)

#: What the calls of a day cost, added up as their records come in: a month is some rows a key, however many its calls.
SPENDING = sa.Table(
    "spending",
    METADATA,
    sa.Column("day", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("tenant_id", sa.String, primary_key=True),
    sa.Column("key_id", sa.String, primary_key=True),
    sa.Column("cost_nano", sa.BigInteger, nullable=False),
)


#: How many rows a statement inserts, within the parameters that SQLite takes in one (32,766 since 3.32). Of few sizes,
#: because each connection keeps its last 128 statements prepared, and one of 500 rows is half a megabyte.
ROWS_A_STATEMENT = (512, 64, 8, 1)


def portions(rows: list[list[Any]]) -> Iterator[list[list[Any]]]:
    """Each as large as ROWS_A_STATEMENT lets it be."""
    start = 0
    for size in ROWS_A_STATEMENT:
        while len(rows) - start >= size:
            yield rows[start : start + size]
            start += size


def insertion(rows: int, *, priced: bool) -> str:
    """Inserts so many records, leaving those that are there already as they are. Of priced ones it returns what those
    that were not cost, and whom."""
    columns = ", ".join(USAGE.columns.keys())
    row = f"({', '.join('?' * len(USAGE.columns))})"
    returning = " RETURNING at_s, tenant_id, key_id, cost_nano" if priced else ""
    values = ", ".join([row] * rows)
    return f"INSERT INTO usage ({columns}) VALUES {values} ON CONFLICT (id) DO NOTHING{returning}"  # noqa: S608


#: Of what a key has spent on a day, to what it had spent before.
ADDITION = (
    "INSERT INTO spending (day, tenant_id, key_id, cost_nano) VALUES (?, ?, ?, ?) "
    "ON CONFLICT (day, tenant_id, key_id) DO UPDATE SET cost_nano = cost_nano + excluded.cost_nano"
)


def row_of(record: Record) -> list[Any]:
    """The record's fields in the order of the columns, as types the driver takes without looking for an adapter."""
    row: list[Any] = list(msgspec.structs.astuple(record))
    for place, plain in PLAIN:
        row[place] = plain(row[place])
    return row


#: Fields that are of subclasses of what they are in SQL, by their place.
PLAIN: tuple[tuple[int, Callable[[Any], int | str]], ...] = tuple(
    (place, int if field.type is bool else operator.attrgetter("value"))
    for place, field in enumerate(msgspec.structs.fields(Record))
    if field.type in (bool, Outcome)
)


def tenant_of(row: sa.Row[Any]) -> TenantRow:
    columns = row._asdict()
    return TenantRow(limits=_limits(columns), **columns)


def key_of(row: sa.Row[Any]) -> KeyRow:
    columns = row._asdict()
    models, routes = (tuple(columns.pop(name)) for name in ("models", "routes"))
    return KeyRow(limits=_limits(columns), models=models, routes=routes, **columns)


def alias_of(row: sa.Row[Any]) -> AliasRow:
    return AliasRow(**row._asdict())


def _limits(columns: dict[str, Any]) -> Limits:
    return Limits(**{name: columns.pop(name) for name in Limits.__struct_fields__})


def record_of(row: sa.Row[Any]) -> Record:
    columns = row._asdict()
    return Record(outcome=Outcome(columns.pop("outcome")), **columns)


def flat(row: TenantRow | KeyRow) -> dict[str, Any]:
    columns = msgspec.structs.asdict(row)
    limits = msgspec.structs.asdict(columns.pop("limits"))
    return {**columns, **limits}


def matches(where: UsageFilter) -> list[sa.ColumnElement[bool]]:
    conditions = [
        (USAGE.c.tenant, operator.eq, where.tenant),
        (USAGE.c.key_id, operator.eq, where.key),
        (USAGE.c.model, operator.eq, where.model),
        (USAGE.c.at_s, operator.ge, where.since_s),
        (USAGE.c.at_s, operator.lt, where.until_s),
    ]
    return [compare(column, value) for column, compare, value in conditions if value is not None]


def sums() -> list[sa.Label[int]]:
    """What UsageTotal holds beside its name."""
    counted = {outcome.value: USAGE.c.outcome == outcome.value for outcome in Outcome}
    counted["estimated"] = USAGE.c.estimated.is_(True)
    return [
        sa.func.count().label("calls"),
        *(sa.func.count(sa.case((condition, 1))).label(name) for name, condition in counted.items()),
        *(
            sa.func.coalesce(sa.func.sum(USAGE.c[name]), 0).label(name)
            for name in ("tokens_in", "tokens_out", "tokens_cached", "items", "cost_nano")
        ),
    ]
