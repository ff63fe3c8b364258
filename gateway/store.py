"""Where tenants, keys, aliases and usage rest: the Store protocol, and SQLite as the embedded default.

Nothing here is asked while a call runs. `gateway.tenant` keeps a snapshot in memory and polls `version`;
usage arrives in batches from the journal. Several processes may hold the same file: the running gateway
and every `headrace` command.
"""

from __future__ import annotations

import asyncio
import fcntl
import operator
import os
import sqlite3
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from functools import partial, wraps
from itertools import chain
from pathlib import Path
from typing import Any, Concatenate, Literal, ParamSpec, Protocol, TypeVar, runtime_checkable

import msgspec
import sqlalchemy as sa
from sqlalchemy.dialects.sqlite import insert

from gateway.call import Limits, Outcome, Record

#: The newest migration; `open` asks for Alembic only when the file is older than this.
HEAD = "0003"

By = Literal["tenant", "model", "key", "none"]

P = ParamSpec("P")
T = TypeVar("T")


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
    """The tenant, model or key id summed over; empty for the sum of all."""
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


class StoreFault(Exception):
    """The store's refusal; the message is safe to show and holds no row's secrets."""


class Unreachable(StoreFault):
    """The database did not answer, or not in time."""


class Missing(StoreFault):
    """No such row."""


class Taken(StoreFault):
    """A row of that name or id exists."""


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
        sa.Column(field.name, _COLUMN_TYPES[field.type], primary_key=field.name == "id", nullable=False)
        for field in msgspec.structs.fields(Record)
    ),
    sa.Index("ix_usage_at_s", "at_s"),
    sa.Index("ix_usage_tenant_at_s", "tenant", "at_s"),
)


#: How many rows a statement inserts, within the parameters that SQLite takes in one (32,766 since 3.32). Of few sizes,
#: because each connection keeps its last 128 statements prepared, and one of 500 rows is half a megabyte.
ROWS_A_STATEMENT = (512, 64, 8, 1)


def _portions(rows: list[list[Any]]) -> Iterator[list[list[Any]]]:
    """Each as large as ROWS_A_STATEMENT lets it be."""
    start = 0
    for size in ROWS_A_STATEMENT:
        while len(rows) - start >= size:
            yield rows[start : start + size]
            start += size


def _insertion(rows: int) -> str:
    """Inserts so many records, leaving those that are there already as they are."""
    columns = ", ".join(USAGE.columns.keys())
    row = f"({', '.join('?' * len(USAGE.columns))})"
    return f"INSERT INTO usage ({columns}) VALUES {', '.join([row] * rows)} ON CONFLICT (id) DO NOTHING"  # noqa: S608


def _row(record: Record) -> list[Any]:
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


def _on_thread(
    method: Callable[Concatenate[SqliteStore, P], T],
) -> Callable[Concatenate[SqliteStore, P], Coroutine[Any, Any, T]]:
    """Run a method that waits for the disk on one of its store's threads, from beginning to end."""

    @wraps(method)
    async def call(self: SqliteStore, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await self._call(partial(method, self, *args, **kwargs))

    return call


class SqliteStore:
    """A Store in one SQLite file (WAL), readable by its owner only.

    A writer waits up to `busy_s_max` for another process's transaction to end, and a call as long for one of
    THREADS_MAX threads, then raises Unreachable. A call that is cancelled while it waits never happens; one that
    has begun runs to its end, unwatched, so that a transaction is always whole and its connection comes back.
    """

    def __init__(self, path: Path, *, busy_s_max: float = 5.0) -> None:
        self.path = path
        self._busy_s_max = busy_s_max
        self._threads = ThreadPoolExecutor(THREADS_MAX, thread_name_prefix="store")
        self._reader = sa.create_engine(
            sa.URL.create("sqlite", database=str(path)),
            # isolation_level None: transactions are begun by `_begin` below, not guessed by the driver.
            connect_args={"timeout": busy_s_max, "isolation_level": None},
            pool_size=THREADS_MAX,
            max_overflow=0,
            # A failing statement must not carry its parameters into a traceback.
            hide_parameters=True,
        )
        self._writer = self._reader.execution_options(writes=True)
        sa.event.listen(self._reader, "connect", _prepare)
        sa.event.listen(self._reader, "begin", _begin)

    @_on_thread
    def open(self) -> None:
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            _create_private(self.path)
        except OSError as fault:
            raise Unreachable(f"the store {self.path} cannot be made: {fault.strerror}") from None
        with self._faults():
            _keep_ahead_log(self.path)
        with self._faults():
            if self._schema() != HEAD:
                from gateway.migrations.upgrade import upgrade

                with self._writer.begin() as connection:
                    upgrade(connection)

    async def aclose(self) -> None:
        """Let the calls that have begun come to their end, then close the file."""
        await asyncio.to_thread(self._threads.shutdown)
        self._reader.dispose()

    async def ready(self) -> None:
        await self.version()

    @_on_thread
    def version(self) -> int:
        with self._faults(), self._reader.connect() as connection:
            return _revision(connection)

    @_on_thread
    def snapshot(self) -> Snapshot:
        with self._faults(), self._reader.connect() as connection:
            return Snapshot(
                version=_revision(connection),
                tenants=tuple(map(_tenant, connection.execute(sa.select(TENANTS)))),
                keys=tuple(map(_key, connection.execute(sa.select(KEYS)))),
                aliases=tuple(map(_alias, connection.execute(sa.select(ALIASES).order_by(ALIASES.c.name)))),
            )

    @_on_thread
    def tenants(self) -> list[TenantRow]:
        return [_tenant(row) for row in self._read(sa.select(TENANTS).order_by(TENANTS.c.name))]

    @_on_thread
    def tenant(self, name: str) -> TenantRow:
        rows = self._read(sa.select(TENANTS).where(TENANTS.c.name == name))
        _require(len(rows), _no_tenant(name))
        return _tenant(rows[0])

    @_on_thread
    def add_tenant(self, row: TenantRow) -> None:
        with self._change(f"there is already a tenant {row.name!r}; choose another name") as change:
            change.execute(sa.insert(TENANTS).values(_flat(row)))

    async def set_tenant(self, name: str, *, limits: Mapping[str, int | None], disabled: bool | None) -> TenantRow:
        values = {**limits} if disabled is None else {**limits, "disabled": disabled}
        return await (self._set_tenant(name, values) if values else self.tenant(name))

    @_on_thread
    def _set_tenant(self, name: str, values: Mapping[str, object]) -> TenantRow:
        with self._change() as change:
            # Only these columns: a whole row, read before, would undo what another has changed since.
            query = sa.update(TENANTS).where(TENANTS.c.name == name).values(values).returning(TENANTS)
            rows = change.execute(query).all()
            _require(len(rows), _no_tenant(name))
            return _tenant(rows[0])

    @_on_thread
    def remove_tenant(self, tenant_id: str) -> None:
        with self._change() as change:
            done = change.execute(sa.delete(TENANTS).where(TENANTS.c.id == tenant_id))
            _require(done.rowcount, f"there is no tenant with id {tenant_id!r}")

    @_on_thread
    def keys(self, *, tenant_id: str | None = None) -> list[KeyRow]:
        query = sa.select(KEYS).order_by(KEYS.c.created_s, KEYS.c.id)
        if tenant_id is not None:
            query = query.where(KEYS.c.tenant_id == tenant_id)
        return [_key(row) for row in self._read(query)]

    @_on_thread
    def key(self, key_id: str) -> KeyRow:
        rows = self._read(sa.select(KEYS).where(KEYS.c.id == key_id))
        _require(len(rows), f"there is no key with id {key_id!r}; `headrace key list` shows those there are")
        return _key(rows[0])

    @_on_thread
    def add_key(self, row: KeyRow) -> None:
        with self._change(f"key {row.id!r} cannot be added: its id is taken, or its tenant is gone") as change:
            change.execute(sa.insert(KEYS).values(_flat(row)))

    @_on_thread
    def revoke_key(self, key_id: str, *, at_s: float) -> None:
        with self._change() as change:
            done = change.execute(
                sa.update(KEYS).where(KEYS.c.id == key_id).values(revoked_s=sa.func.coalesce(KEYS.c.revoked_s, at_s))
            )
            _require(done.rowcount, f"there is no key with id {key_id!r}")

    @_on_thread
    def rotate_key(self, key_id: str, *, digest: bytes, previous_until_s: float) -> None:
        with self._change() as change:
            done = change.execute(
                sa.update(KEYS)
                .where(KEYS.c.id == key_id)
                .values(digest=digest, previous=KEYS.c.digest, previous_until_s=previous_until_s)
            )
            _require(done.rowcount, f"there is no key with id {key_id!r}")

    @_on_thread
    def aliases(self) -> list[AliasRow]:
        return [_alias(row) for row in self._read(sa.select(ALIASES).order_by(ALIASES.c.name))]

    @_on_thread
    def set_alias(self, row: AliasRow) -> None:
        columns = msgspec.structs.asdict(row)
        with self._change() as change:
            query = insert(ALIASES).values(columns)
            change.execute(query.on_conflict_do_update(index_elements=[ALIASES.c.name], set_=columns))

    @_on_thread
    def remove_alias(self, name: str) -> None:
        with self._change() as change:
            done = change.execute(sa.delete(ALIASES).where(ALIASES.c.name == name))
            _require(done.rowcount, f"there is no alias {name!r}; `headrace alias list` shows those there are")

    @_on_thread
    def append_usage(self, records: Sequence[Record]) -> None:
        if not records:
            return
        with self._faults(), self._writer.begin() as connection:
            # Many rows a statement, and past SQLAlchemy's compiler: half the CPU, and SQLite, which lets go of the
            # interpreter for each statement, does not take it from the event loop again for every row.
            for rows in _portions([_row(record) for record in records]):
                connection.exec_driver_sql(_insertion(len(rows)), tuple(chain.from_iterable(rows)))

    @_on_thread
    def usage(self, where: UsageFilter, *, limit: int) -> list[Record]:
        newest = sa.select(USAGE).where(*_matches(where)).order_by(USAGE.c.at_s.desc(), USAGE.c.id)
        return [_record(row) for row in self._read(newest.limit(limit))]

    @_on_thread
    def usage_totals(self, where: UsageFilter, *, by: By) -> list[UsageTotal]:
        groups = {"tenant": USAGE.c.tenant, "model": USAGE.c.model, "key": USAGE.c.key_id}
        if by == "none":
            query = sa.select(sa.literal("").label("name"), *_sums())
        else:
            query = sa.select(groups[by].label("name"), *_sums()).group_by(groups[by]).order_by(groups[by])
        return [UsageTotal(**row._asdict()) for row in self._read(query.where(*_matches(where)))]

    def _schema(self) -> str | None:
        """The migration the file is at, asked with one select; None for a new file."""
        stamp = sa.select(sa.column("version_num", sa.String)).select_from(sa.table("alembic_version"))
        with self._reader.connect() as connection, suppress(sa.exc.OperationalError):
            return connection.scalar(stamp)
        return None

    def _read(self, query: sa.Executable) -> Sequence[sa.Row[Any]]:
        with self._faults(), self._reader.connect() as connection:
            return connection.execute(query).all()

    @contextmanager
    def _change(self, taken: str = "that row exists already") -> Iterator[sa.Connection]:
        """One transaction that changes tenants, keys or aliases, and says so in the revision."""
        with self._faults():
            try:
                with self._writer.begin() as connection:
                    yield connection
                    connection.execute(sa.update(REVISION).values(number=REVISION.c.number + 1))
            except sa.exc.IntegrityError:
                raise Taken(taken) from None

    @contextmanager
    def _faults(self) -> Iterator[None]:
        try:
            yield
        except (sa.exc.SQLAlchemyError, sqlite3.Error) as fault:
            cause = fault.orig if isinstance(fault, sa.exc.DBAPIError) else fault
            why = str(cause) if isinstance(cause, sqlite3.Error) else type(fault).__name__
            raise Unreachable(f"the store {self.path} does not answer: {why}") from fault

    async def _call(self, work: Callable[[], T]) -> T:
        """`work` on a thread. Raises Unreachable if none gets free in time, and then nothing was done."""
        try:
            job = self._threads.submit(work)
        except RuntimeError as fault:
            raise Unreachable(f"the store {self.path} has no thread: {fault}") from None
        done = asyncio.wrap_future(job)
        try:
            await asyncio.wait((done,), timeout=self._busy_s_max)
            # Only what still waits for a thread can be taken back.
            if job.cancel():
                raise Unreachable(f"the store {self.path} is busy: no thread got free within {self._busy_s_max:g} s")
            return await done
        finally:
            done.cancel()


#: Connections too; what is asked at once is a poll, a fold, and now and then an operator's call.
THREADS_MAX = 3


def _create_private(path: Path) -> None:
    """Make the file before SQLite does, with nobody else's permissions; -wal and -shm take after it."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except FileExistsError:
        # By path: closing a descriptor of an open database would drop this process's locks on it.
        path.chmod(0o600)


def _keep_ahead_log(path: Path) -> None:
    """Put the file into WAL mode, where it stays. One process at a time: of several that change a new file's mode
    at once, SQLite turns all but one away without waiting."""
    folder = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("PRAGMA journal_mode = WAL")
    finally:
        os.close(folder)


def _prepare(connection: Any, _: object) -> None:
    """Give a new connection its settings; FULL because a journal is deleted once its fold is committed."""
    try:
        cursor = connection.cursor()
        for pragma in ("synchronous = FULL", "foreign_keys = ON"):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()
    except sqlite3.Error:
        connection.close()
        raise


def _begin(connection: sa.Connection) -> None:
    # A writer takes the lock at once: one that reads first and upgrades later may fail without waiting.
    writes = connection.get_execution_options().get("writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _revision(connection: sa.Connection) -> int:
    number: int = connection.execute(sa.select(REVISION.c.number)).scalar_one()
    return number


def _tenant(row: sa.Row[Any]) -> TenantRow:
    columns = row._asdict()
    return TenantRow(limits=_limits(columns), **columns)


def _key(row: sa.Row[Any]) -> KeyRow:
    columns = row._asdict()
    models, routes = (tuple(columns.pop(name)) for name in ("models", "routes"))
    return KeyRow(limits=_limits(columns), models=models, routes=routes, **columns)


def _alias(row: sa.Row[Any]) -> AliasRow:
    return AliasRow(**row._asdict())


def _limits(columns: dict[str, Any]) -> Limits:
    return Limits(**{name: columns.pop(name) for name in Limits.__struct_fields__})


def _record(row: sa.Row[Any]) -> Record:
    columns = row._asdict()
    return Record(outcome=Outcome(columns.pop("outcome")), **columns)


def _flat(row: TenantRow | KeyRow) -> dict[str, Any]:
    columns = msgspec.structs.asdict(row)
    limits = msgspec.structs.asdict(columns.pop("limits"))
    return {**columns, **limits}


def _no_tenant(name: str) -> str:
    return f"there is no tenant {name!r}; `headrace tenant list` shows those there are"


def _require(found: int, otherwise: str) -> None:
    if not found:
        raise Missing(otherwise)


def _matches(where: UsageFilter) -> list[sa.ColumnElement[bool]]:
    conditions = [
        (USAGE.c.tenant, operator.eq, where.tenant),
        (USAGE.c.key_id, operator.eq, where.key),
        (USAGE.c.model, operator.eq, where.model),
        (USAGE.c.at_s, operator.ge, where.since_s),
        (USAGE.c.at_s, operator.lt, where.until_s),
    ]
    return [compare(column, value) for column, compare, value in conditions if value is not None]


def _sums() -> list[sa.Label[int]]:
    """What UsageTotal holds beside its name."""
    counted = {outcome.value: USAGE.c.outcome == outcome.value for outcome in Outcome}
    counted["estimated"] = USAGE.c.estimated.is_(True)
    return [
        sa.func.count().label("calls"),
        *(sa.func.count(sa.case((condition, 1))).label(name) for name, condition in counted.items()),
        *(
            sa.func.coalesce(sa.func.sum(USAGE.c[name]), 0).label(name)
            for name in ("tokens_in", "tokens_out", "tokens_cached", "items")
        ),
    ]


def _conforms(it: SqliteStore) -> Store:
    return it
