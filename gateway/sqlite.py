"""SQLite, the embedded store: one file, reached from threads of its own."""

from __future__ import annotations

import asyncio
import fcntl
import os
import sqlite3
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from functools import partial, wraps
from itertools import chain
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import msgspec
import sqlalchemy as sa
from sqlalchemy.dialects.sqlite import insert

from gateway.budget import DAY_S
from gateway.call import Record
from gateway.store import (
    AliasRow,
    By,
    KeyRow,
    Missing,
    Snapshot,
    Spent,
    Store,
    Taken,
    TenantRow,
    Unreachable,
    UsageFilter,
    UsageTotal,
)
from gateway.tables import (
    ADDITION,
    ALIASES,
    KEYS,
    REVISION,
    SPENDING,
    TENANTS,
    USAGE,
    alias_of,
    flat,
    insertion,
    key_of,
    matches,
    portions,
    record_of,
    row_of,
    sums,
    tenant_of,
)

#: The newest migration; `open` asks for Alembic only when the file is older than this.
HEAD = "0004"

P = ParamSpec("P")
T = TypeVar("T")


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
                tenants=tuple(map(tenant_of, connection.execute(sa.select(TENANTS)))),
                keys=tuple(map(key_of, connection.execute(sa.select(KEYS)))),
                aliases=tuple(map(alias_of, connection.execute(sa.select(ALIASES).order_by(ALIASES.c.name)))),
            )

    @_on_thread
    def tenants(self) -> list[TenantRow]:
        return [tenant_of(row) for row in self._read(sa.select(TENANTS).order_by(TENANTS.c.name))]

    @_on_thread
    def tenant(self, name: str) -> TenantRow:
        rows = self._read(sa.select(TENANTS).where(TENANTS.c.name == name))
        _require(len(rows), _no_tenant(name))
        return tenant_of(rows[0])

    @_on_thread
    def add_tenant(self, row: TenantRow) -> None:
        with self._change(f"there is already a tenant {row.name!r}; choose another name") as change:
            change.execute(sa.insert(TENANTS).values(flat(row)))

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
            return tenant_of(rows[0])

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
        return [key_of(row) for row in self._read(query)]

    @_on_thread
    def key(self, key_id: str) -> KeyRow:
        rows = self._read(sa.select(KEYS).where(KEYS.c.id == key_id))
        _require(len(rows), f"there is no key with id {key_id!r}; `headrace key list` shows those there are")
        return key_of(rows[0])

    @_on_thread
    def add_key(self, row: KeyRow) -> None:
        with self._change(f"key {row.id!r} cannot be added: its id is taken, or its tenant is gone") as change:
            change.execute(sa.insert(KEYS).values(flat(row)))

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
        return [alias_of(row) for row in self._read(sa.select(ALIASES).order_by(ALIASES.c.name))]

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
        free = [row_of(record) for record in records if not record.cost_nano]
        priced = [row_of(record) for record in records if record.cost_nano]
        with self._faults(), self._writer.begin() as connection:
            # Many rows a statement, and past SQLAlchemy's compiler: half the CPU, and SQLite, which lets go of the
            # interpreter for each statement, does not take it from the event loop again for every row.
            for rows in portions(free):
                connection.exec_driver_sql(insertion(len(rows), priced=False), tuple(chain.from_iterable(rows)))
            spending = Counter[tuple[int, str, str]]()
            for rows in portions(priced):
                query = insertion(len(rows), priced=True)
                for at_s, tenant_id, key_id, nano in connection.exec_driver_sql(
                    query, tuple(chain.from_iterable(rows))
                ):
                    spending[int(at_s // DAY_S), tenant_id, key_id] += nano
            if spending:
                connection.exec_driver_sql(ADDITION, [(*whose, nano) for whose, nano in spending.items()])

    @_on_thread
    def usage(self, where: UsageFilter, *, limit: int) -> list[Record]:
        newest = sa.select(USAGE).where(*matches(where)).order_by(USAGE.c.at_s.desc(), USAGE.c.id)
        return [record_of(row) for row in self._read(newest.limit(limit))]

    @_on_thread
    def usage_totals(self, where: UsageFilter, *, by: By) -> list[UsageTotal]:
        day = sa.func.coalesce(sa.func.date(USAGE.c.at_s, "unixepoch"), "")
        groups = {"tenant": USAGE.c.tenant, "model": USAGE.c.model, "key": USAGE.c.key_id, "day": day}
        if by == "none":
            query = sa.select(sa.literal("").label("name"), *sums())
        else:
            query = sa.select(groups[by].label("name"), *sums()).group_by(groups[by]).order_by(groups[by])
        return [UsageTotal(**row._asdict()) for row in self._read(query.where(*matches(where)))]

    @_on_thread
    def spent(self, *, day_s: float, month_s: float) -> list[Spent]:
        cost, whose = SPENDING.c.cost_nano, (SPENDING.c.tenant_id, SPENDING.c.key_id)
        of_day = sa.func.coalesce(sa.func.sum(sa.case((SPENDING.c.day >= int(day_s // DAY_S), cost))), 0)
        query = sa.select(*whose, of_day.label("day_nano"), sa.func.sum(cost).label("month_nano"))
        query = query.where(SPENDING.c.day >= int(month_s // DAY_S)).group_by(*whose)
        return [Spent(**row._asdict()) for row in self._read(query)]

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


def _no_tenant(name: str) -> str:
    return f"there is no tenant {name!r}; `headrace tenant list` shows those there are"


def _require(found: int, otherwise: str) -> None:
    if not found:
        raise Missing(otherwise)


def _conforms(it: SqliteStore) -> Store:
    return it
