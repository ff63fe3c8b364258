"""What every Store promises. A new one joins by its name in STORES and a line in the `reach` fixture."""

import asyncio
import sqlite3
import stat
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gateway.call import Limits, Outcome, Record
from gateway.sqlite import HEAD, THREADS_MAX, SqliteStore
from gateway.store import (
    AliasRow,
    By,
    KeyRow,
    Missing,
    Spent,
    Store,
    Taken,
    TenantRow,
    Unreachable,
    UsageFilter,
)
from gateway.tables import METADATA
from tests.fakes import until

STORES = ["sqlite"]
ALL = UsageFilter()
Change = Callable[[Store], Awaitable[object]]


@pytest.fixture(params=STORES)
def reach(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Store]:
    """Makes stores, not yet open, that all reach the same empty database."""
    makers: dict[str, Callable[[], Store]] = {"sqlite": lambda: SqliteStore(tmp_path / "store.db")}
    return makers[request.param]


@pytest.fixture
async def store(reach: Callable[[], Store]) -> AsyncIterator[Store]:
    store = reach()
    await store.open()
    yield store
    await store.aclose()


@pytest.fixture
async def neighbour(reach: Callable[[], Store], store: Store) -> AsyncIterator[Store]:
    """Another process's store on the same database."""
    neighbour = reach()
    await neighbour.open()
    yield neighbour
    await neighbour.aclose()


ACME = TenantRow(
    id="t1", name="acme", limits=Limits(rpm=10, tpm=None, concurrent=2, budget_month_nano=2**53 - 1), created_s=1.5
)
ZEBRA = TenantRow(id="t2", name="zebra", disabled=True, created_s=2.5)
KEY = KeyRow(
    id="k1",
    tenant_id="t1",
    env="live",
    digest=b"\x00digest",
    name="laptop",
    models=("chat", "support-*"),
    routes=("/v1/chat/*",),
    limits=Limits(tpm=5, budget_day_nano=6),
    created_s=3.5,
    expires_s=99.0,
)


BOTH = AliasRow(name="both", weights={"zebra": 90, "acme": 10}, changed_s=4.5)
ALL_OF_IT = AliasRow(name="all", weights={"x": 1}, changed_s=1.5)


def record(id: str, **fields: object) -> Record:
    base = Record(
        id=id,
        at_s=100.0,
        tenant_id="t1",
        tenant="acme",
        key_id="k1",
        model="chat",
        route="/v1/chat/completions",
        stream=True,
        replica="chat-0",
        outcome=Outcome.served,
        status=200,
        code="",
        tokens_in=7,
        tokens_out=3,
        tokens_cached=2,
        items=4,
        cost_nano=5,
        estimated=False,
        wait_s=0.25,
        first_byte_s=0.5,
        total_s=1.0,
    )
    return msgspec.structs.replace(base, **fields)


async def test_a_tenant_comes_back_as_it_was_added(store: Store) -> None:
    await store.add_tenant(ZEBRA)
    await store.add_tenant(ACME)
    assert await store.tenants() == [ACME, ZEBRA]
    assert await store.tenant("zebra") == ZEBRA


async def test_a_second_tenant_of_the_same_name_is_refused_by_name(store: Store) -> None:
    await store.add_tenant(ACME)
    with pytest.raises(Taken, match="'acme'"):
        await store.add_tenant(msgspec.structs.replace(ACME, id="t9"))
    assert await store.tenants() == [ACME]


async def test_setting_a_tenant_changes_what_is_named_and_nothing_else(store: Store) -> None:
    await store.add_tenant(ACME)
    await store.add_tenant(ZEBRA)
    changed = await store.set_tenant("acme", limits={"rpm": None, "tpm": 7}, disabled=None)
    assert changed == msgspec.structs.replace(
        ACME, limits=Limits(rpm=None, tpm=7, concurrent=2, budget_month_nano=2**53 - 1)
    )
    assert await store.tenants() == [changed, ZEBRA]
    disabled = await store.set_tenant("acme", limits={}, disabled=True)
    assert disabled == msgspec.structs.replace(changed, disabled=True)
    assert await store.set_tenant("acme", limits={}, disabled=None) == disabled


async def test_changes_of_different_columns_at_once_are_all_kept(store: Store, neighbour: Store) -> None:
    await store.add_tenant(ACME)
    await asyncio.gather(
        store.set_tenant("acme", limits={"rpm": 77}, disabled=None),
        neighbour.set_tenant("acme", limits={}, disabled=True),
        store.set_tenant("acme", limits={"tpm": 88}, disabled=None),
    )
    limits = Limits(rpm=77, tpm=88, concurrent=2, budget_month_nano=2**53 - 1)
    assert await store.tenant("acme") == msgspec.structs.replace(ACME, limits=limits, disabled=True)


async def test_removing_a_tenant_removes_its_keys_and_keeps_its_usage(store: Store) -> None:
    await store.add_tenant(ACME)
    await store.add_key(KEY)
    await store.append_usage([record("a")])
    await store.remove_tenant("t1")
    assert await store.tenants() == []
    assert await store.keys() == []
    assert await store.usage(ALL, limit=10) == [record("a")]


@pytest.mark.parametrize(
    "change",
    [
        lambda store: store.tenant("nobody"),
        lambda store: store.set_tenant("acme", limits={"rpm": 1}, disabled=None),
        lambda store: store.remove_tenant("t1"),
        lambda store: store.key("k1"),
        lambda store: store.revoke_key("k1", at_s=1.0),
        lambda store: store.rotate_key("k1", digest=b"d", previous_until_s=1.0),
        lambda store: store.remove_alias("both"),
    ],
    ids=["tenant", "set_tenant", "remove_tenant", "key", "revoke_key", "rotate_key", "remove_alias"],
)
async def test_naming_what_is_not_there_is_missing_and_changes_nothing(store: Store, change: Change) -> None:
    before = await store.version()
    with pytest.raises(Missing):
        await change(store)
    assert await store.version() == before


async def test_a_key_comes_back_as_it_was_added(store: Store) -> None:
    await store.add_tenant(ACME)
    await store.add_key(KEY)
    assert await store.key("k1") == KEY
    assert await store.keys(tenant_id="t1") == [KEY]
    assert await store.keys(tenant_id="t2") == []


async def test_a_key_needs_its_tenant(store: Store) -> None:
    with pytest.raises(Taken, match="tenant is gone"):
        await store.add_key(KEY)
    assert await store.keys() == []


async def test_revoking_twice_keeps_the_first_time(store: Store) -> None:
    await store.add_tenant(ACME)
    await store.add_key(KEY)
    await store.revoke_key("k1", at_s=10.0)
    await store.revoke_key("k1", at_s=20.0)
    assert (await store.key("k1")).revoked_s == 10.0


async def test_rotating_keeps_exactly_the_secret_before(store: Store) -> None:
    await store.add_tenant(ACME)
    await store.add_key(KEY)
    await store.rotate_key("k1", digest=b"second", previous_until_s=50.0)
    await store.rotate_key("k1", digest=b"third", previous_until_s=60.0)
    assert await store.key("k1") == msgspec.structs.replace(
        KEY, digest=b"third", previous=b"second", previous_until_s=60.0
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda store: store.add_tenant(ZEBRA),
        lambda store: store.set_tenant("acme", limits={}, disabled=True),
        lambda store: store.remove_tenant("t1"),
        lambda store: store.add_key(msgspec.structs.replace(KEY, id="k2")),
        lambda store: store.revoke_key("k1", at_s=1.0),
        lambda store: store.rotate_key("k1", digest=b"d", previous_until_s=1.0),
        lambda store: store.set_alias(BOTH),
        lambda store: store.remove_alias("all"),
    ],
    ids=[
        "add_tenant",
        "set_tenant",
        "remove_tenant",
        "add_key",
        "revoke_key",
        "rotate_key",
        "set_alias",
        "remove_alias",
    ],
)
async def test_a_neighbours_change_is_a_new_version(store: Store, neighbour: Store, change: Change) -> None:
    await store.add_tenant(ACME)
    await store.add_key(KEY)
    await store.set_alias(ALL_OF_IT)
    before = await store.version()
    assert await neighbour.version() == before
    await change(neighbour)
    assert await store.version() != before
    assert await store.version() == await neighbour.version()


async def test_usage_is_no_new_version(store: Store) -> None:
    before = await store.version()
    await store.append_usage([record("a")])
    assert await store.version() == before


async def test_a_snapshot_holds_everything_at_its_version(store: Store, neighbour: Store) -> None:
    await store.add_tenant(ACME)
    await neighbour.add_key(KEY)
    snapshot = await store.snapshot()
    assert snapshot.version == await neighbour.version()
    assert (snapshot.tenants, snapshot.keys) == ((ACME,), (KEY,))


async def test_many_writers_lose_no_change(store: Store, neighbour: Store) -> None:
    rows = [TenantRow(id=f"t{i}", name=f"tenant-{i:02}", created_s=0.0) for i in range(40)]
    before = await store.version()
    await asyncio.gather(*((store, neighbour)[i % 2].add_tenant(row) for i, row in enumerate(rows)))
    assert await store.tenants() == rows
    assert await store.version() == before + 40


async def test_a_cancelled_change_is_whole_or_never_was(store: Store, neighbour: Store) -> None:
    before = await store.version()
    for i in range(40):
        change = asyncio.create_task(store.add_tenant(TenantRow(id=f"c{i}", name=f"tenant-{i}", created_s=0.0)))
        for _ in range(i):
            await asyncio.sleep(0)
        change.cancel()
        await asyncio.gather(change, return_exceptions=True)
    await store.add_tenant(ACME)
    await store.aclose()
    assert len(await neighbour.tenants()) == await neighbour.version() - before


async def test_records_come_back_newest_first_and_whole(store: Store) -> None:
    old, new = record("a"), record("b", at_s=200.0, outcome=Outcome.cancelled, status=0, estimated=True)
    await store.append_usage([old, new])
    assert await store.usage(ALL, limit=10) == [new, old]
    assert await store.usage(ALL, limit=1) == [new]


async def test_appending_again_counts_once(store: Store, neighbour: Store) -> None:
    first = [record(f"r{i}") for i in range(5)]
    await asyncio.gather(store.append_usage(first), neighbour.append_usage(first))
    await store.append_usage([*first, record("new"), record("new")])
    totals = await store.usage_totals(ALL, by="none")
    assert [(total.calls, total.tokens_in) for total in totals] == [(6, 42)]


async def test_appending_nothing_is_nothing(store: Store) -> None:
    await store.append_usage([])
    assert await store.usage(ALL, limit=1) == []


@pytest.mark.parametrize(
    ("where", "ids"),
    [
        (UsageFilter(tenant="acme"), {"a", "c"}),
        (UsageFilter(key="k2"), {"b"}),
        (UsageFilter(model="relay"), {"c"}),
        (UsageFilter(since_s=200.0), {"b", "c"}),
        (UsageFilter(until_s=200.0), {"a"}),
        (UsageFilter(tenant="acme", since_s=150.0, until_s=301.0), {"c"}),
        (UsageFilter(tenant="' or 1=1 --"), set()),
    ],
    ids=["tenant", "key", "model", "since", "until", "together", "injection"],
)
async def test_a_filter_keeps_what_matches(store: Store, where: UsageFilter, ids: set[str]) -> None:
    await store.append_usage(
        [
            record("a"),
            record("b", tenant="zebra", key_id="k2", at_s=200.0),
            record("c", model="relay", at_s=300.0),
        ]
    )
    assert {found.id for found in await store.usage(where, limit=10)} == ids
    assert [total.calls for total in await store.usage_totals(where, by="none")] == [len(ids)]


@pytest.mark.parametrize(
    ("by", "sums"),
    [
        ("tenant", [("acme", 3, 21), ("zebra", 1, 7)]),
        ("model", [("chat", 2, 14), ("relay", 2, 14)]),
        ("key", [("k1", 3, 21), ("k2", 1, 7)]),
        ("none", [("", 4, 28)]),
    ],
)
async def test_totals_are_sums_by_name(store: Store, by: By, sums: list[tuple[str, int, int]]) -> None:
    await store.append_usage(
        [
            record("a"),
            record("b", tenant="zebra", key_id="k2"),
            record("c", model="relay"),
            record("d", model="relay"),
        ]
    )
    totals = await store.usage_totals(ALL, by=by)
    assert [(total.name, total.calls, total.tokens_in) for total in totals] == sums


async def test_totals_count_every_outcome_in_its_own_column(store: Store) -> None:
    outcomes = list(Outcome)
    await store.append_usage([record(f"{o}{i}", outcome=o) for n, o in enumerate(outcomes, 1) for i in range(n)])
    (total,) = await store.usage_totals(ALL, by="none")
    assert {o: getattr(total, o.value) for o in outcomes} == {o: n for n, o in enumerate(outcomes, 1)}
    assert total.calls == sum(range(len(outcomes) + 1))
    assert (total.tokens_out, total.tokens_cached, total.estimated) == (total.calls * 3, total.calls * 2, 0)
    assert total.items == total.calls * 4


async def test_totals_of_days_are_those_of_utc(store: Store) -> None:
    midnight_s = 1_764_028_800.0
    for id, at_s in (("a", midnight_s - 0.5), ("b", midnight_s), ("c", midnight_s + 86_399.9)):
        await store.append_usage([record(id, at_s=at_s)])
    totals = await store.usage_totals(ALL, by="day")
    assert [(it.name, it.calls, it.cost_nano) for it in totals] == [("2025-11-24", 1, 5), ("2025-11-25", 2, 10)]


async def test_what_was_spent_is_known_by_key_of_the_day_and_the_month(store: Store) -> None:
    month_s, day_s = 3 * 86_400.0, 5 * 86_400.0
    costs = [(month_s - 0.5, 1), (month_s, 2), (day_s - 0.5, 4), (day_s, 8), (day_s + 50, 16), (day_s + 50, 0)]
    await store.append_usage([record(f"k1-{it}", at_s=at_s, cost_nano=cost) for it, (at_s, cost) in enumerate(costs)])
    await store.append_usage([record("k2", key_id="k2", at_s=month_s, cost_nano=2**53 - 1)])
    await store.append_usage([record("free", key_id="k3", at_s=day_s, cost_nano=0)])
    found = await store.spent(day_s=day_s, month_s=month_s)
    assert sorted(found, key=lambda it: it.key_id) == [
        Spent("t1", "k1", 24, 30),
        Spent("t1", "k2", 0, 2**53 - 1),
    ]


async def test_costs_add_up_exactly_beyond_what_floats_hold(store: Store) -> None:
    await store.append_usage([record(str(it), cost_nano=2**53 - 1) for it in range(3)])
    (total,) = await store.usage_totals(ALL, by="tenant")
    assert total.cost_nano == 3 * (2**53 - 1)


async def test_a_record_that_comes_twice_is_spent_once(store: Store, neighbour: Store) -> None:
    """In one batch, in another, from another process, and beside others."""
    once = [record(str(it), at_s=86_400.0 + it, cost_nano=10, key_id=f"k{it % 2}") for it in range(600)]
    await store.append_usage([*once[:300], *once[200:300]])
    await neighbour.append_usage(once)
    await store.append_usage([*once[100:], record("another", at_s=86_400.0, cost_nano=1)])
    found = await store.spent(day_s=86_400.0, month_s=0.0)
    assert {it.key_id: (it.day_nano, it.month_nano) for it in found} == {"k0": (3_000, 3_000), "k1": (3_001, 3_001)}
    (total,) = await store.usage_totals(ALL, by="none")
    assert total.cost_nano == 6_001


async def test_totals_of_nothing_are_zero_not_null(store: Store) -> None:
    (total,) = await store.usage_totals(ALL, by="none")
    assert (total.calls, total.tokens_in) == (0, 0)
    assert await store.usage_totals(ALL, by="tenant") == []


async def test_what_was_written_outlives_the_process(reach: Callable[[], Store]) -> None:
    first = reach()
    await first.open()
    await first.add_tenant(ACME)
    await first.aclose()
    second = reach()
    await second.open()
    assert await second.tenants() == [ACME]
    await second.aclose()


async def test_two_that_open_a_new_database_at_once_both_succeed(reach: Callable[[], Store]) -> None:
    stores = [reach() for _ in range(4)]
    await asyncio.gather(*(store.open() for store in stores))
    assert [await store.tenants() for store in stores] == [[], [], [], []]
    for store in stores:
        await store.aclose()


# What follows is SQLite's own.


async def test_the_files_are_their_owners_alone(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "state" / "store.db")
    await store.open()
    await store.add_tenant(ACME)
    files = sorted((tmp_path / "state").iterdir())
    assert [file.name for file in files] == ["store.db", "store.db-shm", "store.db-wal"]
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o700
    await store.aclose()


async def test_a_file_that_others_could_read_is_closed_to_them(tmp_path: Path) -> None:
    (tmp_path / "store.db").touch(mode=0o644)
    store = SqliteStore(tmp_path / "store.db")
    await store.open()
    assert stat.S_IMODE((tmp_path / "store.db").stat().st_mode) == 0o600
    await store.aclose()


async def test_a_file_that_is_no_database_is_unreachable_and_named(tmp_path: Path) -> None:
    (tmp_path / "store.db").write_bytes(b"not a database at all" * 100)
    store = SqliteStore(tmp_path / "store.db")
    with pytest.raises(Unreachable, match=r"store\.db does not answer: file is not a database"):
        await store.open()
    await store.aclose()


async def test_a_folder_that_cannot_be_made_is_unreachable(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(Unreachable, match="cannot be made"):
        await SqliteStore(tmp_path / "file" / "store.db").open()


async def test_a_writer_that_never_ends_makes_the_others_unreachable(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "store.db", busy_s_max=0.05)
    await store.open()
    hog = sqlite3.connect(tmp_path / "store.db", isolation_level=None)
    hog.execute("BEGIN IMMEDIATE")
    with pytest.raises(Unreachable, match="locked"):
        await store.add_tenant(ACME)
    assert await store.tenants() == []
    hog.execute("ROLLBACK")
    hog.close()
    await store.add_tenant(ACME)
    assert await store.tenants() == [ACME]
    await store.aclose()


class Held(SqliteStore):
    """Each change stops on its thread, before its transaction or amid it, until all are let go."""

    def __init__(self, path: Path, *, amid: bool, busy_s_max: float = 5.0) -> None:
        super().__init__(path, busy_s_max=busy_s_max)
        self.amid = amid
        self.stopped = 0
        self.let_go = threading.Event()

    @contextmanager
    def _change(self, taken: str = "") -> Iterator[Any]:
        if not self.amid:
            self._stop()
        with super()._change(taken) as change:
            yield change
            if self.amid:
                self._stop()

    def _stop(self) -> None:
        self.stopped += 1
        assert self.let_go.wait(20)


async def test_a_change_cancelled_amid_its_transaction_is_made_whole_and_its_connection_comes_back(
    tmp_path: Path,
) -> None:
    store = Held(tmp_path / "store.db", amid=True)
    await store.open()
    before = await store.version()
    change = asyncio.create_task(store.add_tenant(ACME))
    await until(lambda: store.stopped == 1)
    change.cancel()
    with pytest.raises(asyncio.CancelledError):
        await change
    store.let_go.set()
    await store.set_tenant("acme", limits={"rpm": 1}, disabled=None)
    assert await store.version() == before + 2
    await store.aclose()
    # SQLite removes its other files with the last connection.
    assert [file.name for file in tmp_path.iterdir()] == ["store.db"]


async def test_closing_waits_for_a_change_that_nobody_waits_for(tmp_path: Path) -> None:
    store = Held(tmp_path / "store.db", amid=True)
    await store.open()
    change = asyncio.create_task(store.add_tenant(ACME))
    await until(lambda: store.stopped == 1)
    change.cancel()
    closing = asyncio.create_task(store.aclose())
    await asyncio.sleep(0)
    assert not closing.done()
    store.let_go.set()
    await closing
    assert [file.name for file in tmp_path.iterdir()] == ["store.db"]
    with pytest.raises(Unreachable, match="has no thread"):
        await store.tenants()


async def test_a_call_that_gets_no_thread_in_time_or_leaves_never_happens(tmp_path: Path) -> None:
    store = Held(tmp_path / "store.db", amid=False, busy_s_max=0.5)
    await store.open()
    rows = [TenantRow(id=f"c{i}", name=f"tenant-{i}", created_s=0.0) for i in range(THREADS_MAX)]
    changes = []
    for row in rows:
        changes.append(asyncio.create_task(store.add_tenant(row)))
        await until(lambda: store.stopped == len(changes))
    leaving = asyncio.create_task(store.add_tenant(ZEBRA))
    await asyncio.sleep(0)
    leaving.cancel()
    with pytest.raises(Unreachable, match="busy"):
        await store.add_tenant(ACME)
    store.let_go.set()
    await asyncio.gather(*changes)
    await store.aclose()
    after = SqliteStore(tmp_path / "store.db")
    assert await after.tenants() == rows
    await after.aclose()


async def test_a_failing_statement_keeps_its_parameters_to_itself(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "store.db")
    await store.open()
    await store.add_tenant(ACME)
    with sqlite3.connect(tmp_path / "store.db") as other:
        other.execute("DROP TABLE keys")
    other.close()
    with pytest.raises(Unreachable) as fault:
        await store.add_key(KEY)
    chain = f"{fault.value!r} {fault.value.__cause__}"
    assert "digest" not in chain.replace("keys.digest", "").replace("env, digest", "")
    assert "laptop" not in chain
    await store.aclose()


async def test_the_migrations_make_exactly_the_tables_of_the_code(tmp_path: Path) -> None:
    import sqlalchemy as sa
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    store = SqliteStore(tmp_path / "store.db")
    await store.open()
    await store.aclose()
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'store.db'}")
    with engine.connect() as connection:
        context = MigrationContext.configure(connection)
        assert compare_metadata(context, METADATA) == []
    engine.dispose()


async def test_a_store_of_an_older_version_keeps_its_usage(tmp_path: Path) -> None:
    import sqlalchemy as sa
    from alembic import command

    from gateway.migrations.upgrade import configuration

    engine = sa.create_engine(f"sqlite:///{tmp_path / 'store.db'}")
    with engine.begin() as connection:
        command.upgrade(configuration(connection), "0001")
        known = [name for name in msgspec.structs.fields(Record) if name.name not in ("items", "cost_nano")]
        columns = ", ".join(field.name for field in known)
        values = [getattr(record("old"), field.name) for field in known]
        connection.exec_driver_sql(
            f"INSERT INTO usage ({columns}) VALUES ({', '.join('?' * len(known))})",
            tuple(value.value if isinstance(value, Outcome) else value for value in values),
        )
    engine.dispose()
    store = SqliteStore(tmp_path / "store.db")
    await store.open()
    await store.append_usage([record("new")])
    found = {it.id: (it.items, it.cost_nano) for it in await store.usage(ALL, limit=9)}
    assert found == {"old": (0, 0), "new": (4, 5)}
    await store.aclose()


def test_head_is_the_newest_migration() -> None:
    from alembic.script import ScriptDirectory

    from gateway.migrations.upgrade import configuration

    assert ScriptDirectory.from_config(configuration()).get_heads() == [HEAD]


async def test_a_current_schema_asks_for_no_migration_tool(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "store.db")
    await store.open()
    await store.aclose()
    program = (
        "import asyncio, pathlib, sys\n"
        "from gateway.sqlite import SqliteStore\n"
        "async def main():\n"
        "    store = SqliteStore(pathlib.Path(sys.argv[1]))\n"
        "    await store.open()\n"
        "    await store.aclose()\n"
        "asyncio.run(main())\n"
        "print('alembic' in sys.modules)\n"
    )
    root = Path(__file__).parents[2]
    python = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, tmp_path / "store.db", cwd=root, stdout=asyncio.subprocess.PIPE
    )
    out, _ = await python.communicate()
    assert (python.returncode, out) == (0, b"False\n")


# ---- aliases


async def test_an_alias_comes_back_as_it_was_set_last(store: Store, neighbour: Store) -> None:
    await store.set_alias(BOTH)
    await store.set_alias(ALL_OF_IT)
    changed = msgspec.structs.replace(BOTH, weights={"acme": 1}, changed_s=9.0)
    await neighbour.set_alias(changed)
    found = await store.aliases()
    assert found == [ALL_OF_IT, changed]
    assert (await store.snapshot()).aliases == tuple(found)


async def test_an_aliass_models_keep_their_order(store: Store) -> None:
    await store.set_alias(BOTH)
    [row] = await store.aliases()
    assert list(row.weights) == ["zebra", "acme"]


async def test_an_alias_that_was_removed_is_gone(store: Store) -> None:
    await store.set_alias(BOTH)
    await store.remove_alias("both")
    assert await store.aliases() == []
    with pytest.raises(Missing, match="'both'"):
        await store.remove_alias("both")
