"""Records on their way to the store: none lost, none twice."""

import asyncio
import errno
import logging
import os
from collections.abc import Iterable
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.call import Record
from gateway.errors import JournalFull
from gateway.journal import FOLD_S, Journal, unfolded
from gateway.store import Unreachable
from tests.fakes import FakeClock, MemoryUsage, until


def a_record(id: str) -> Record:
    return Record(
        id=id, at_s=1.5, tenant_id="t", tenant="acme", key_id="k", model="chat", route="/v1/completions", stream=False
    )


class Disk:
    """os.write, with room for so many bytes more; None is plenty."""

    def __init__(self, room: int | None = None) -> None:
        self.room = room

    def write(self, file: int, data: bytearray) -> int:
        if self.room is None:
            return os.write(file, data)
        if not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = os.write(file, data[: self.room])
        self.room -= written
        return written


async def a_journal(
    folder: Path, usage: MemoryUsage, disk: Disk | None = None, clock: FakeClock | None = None
) -> Journal:
    journal = Journal(
        folder=folder / "journal", sink=usage.append, clock=clock or FakeClock(), write=(disk or Disk()).write
    )
    await journal.open()
    return journal


async def put(journal: Journal, record: Record) -> None:
    journal.append(record)
    await asyncio.sleep(0)  # it is written at the end of this turn of the loop


def ids(count: int, since: int = 0) -> list[str]:
    return [f"r{number}" for number in range(since, count)]


async def test_every_record_arrives_once_and_nothing_stays_behind(tmp_path: Path) -> None:
    usage = MemoryUsage()
    journal = await a_journal(tmp_path, usage)
    for id in ids(100):
        await put(journal, a_record(id))
        if id.endswith("7"):
            await journal.fold()
    await journal.aclose()
    assert list(usage.records) == ids(100)
    assert usage.records["r3"] == a_record("r3")
    assert list((tmp_path / "journal").iterdir()) == []


async def test_folding_goes_on_in_the_background(tmp_path: Path) -> None:
    usage, clock = MemoryUsage(), FakeClock()
    journal = await a_journal(tmp_path, usage, clock=clock)
    running = asyncio.create_task(journal.run())
    await put(journal, a_record("r0"))
    await clock.until_asleep()
    clock.advance(FOLD_S)
    await until(lambda: "r0" in usage.records)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await journal.aclose()


async def test_what_follows_a_record_comes_once_it_is_on_disk_by_one_write_a_turn(
    tmp_path: Path,
) -> None:
    writes = 0

    def write(file: int, data: bytearray) -> int:
        nonlocal writes
        writes += 1
        return os.write(file, data)

    journal = Journal(folder=tmp_path / "journal", sink=MemoryUsage().append, clock=FakeClock(), write=write)
    await journal.open()
    found: list[list[Record]] = []
    for id in ids(3):
        journal.append(a_record(id))
        journal.when_written(lambda: found.append(unfolded(tmp_path / "journal")))
    assert (found, writes) == ([], 0)
    await asyncio.sleep(0)
    assert (found, writes) == ([[a_record(id) for id in ids(3)]] * 3, 1)
    journal.when_written(lambda: found.append([]))
    assert len(found) == 4, "nothing is on its way, so nothing is waited for"
    await journal.aclose()


async def test_a_fault_in_what_follows_one_record_keeps_nobody_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    journal = await a_journal(tmp_path, MemoryUsage())
    went_on: list[str] = []
    journal.append(a_record("r0"))
    journal.when_written(lambda: went_on[9])
    journal.when_written(lambda: went_on.append("r0"))
    await asyncio.sleep(0)
    assert went_on == ["r0"]
    assert "what was to follow a usage record failed" in caplog.text
    await journal.aclose()


async def test_what_a_killed_gateway_left_is_folded_by_the_next(tmp_path: Path) -> None:
    usage = MemoryUsage()
    killed = await a_journal(tmp_path, usage)
    for id in ids(10):
        await put(killed, a_record(id))
    os.close(killed.file)
    journal = await a_journal(tmp_path, usage)
    assert list(usage.records) == ids(10)
    assert list((tmp_path / "journal").iterdir()) == [journal.path]
    await journal.aclose()


async def test_what_an_older_gateway_left_is_folded_too(tmp_path: Path) -> None:
    usage = MemoryUsage()
    older = msgspec.to_builtins(a_record("r0"))
    del older["items"], older["cost_nano"]
    (tmp_path / "journal").mkdir()
    (tmp_path / "journal" / "1-a.jsonl").write_bytes(msgspec.json.encode(older) + b"\n")
    journal = await a_journal(tmp_path, usage)
    assert [(record.items, record.cost_nano) for record in usage.records.values()] == [(0, 0)]
    await journal.aclose()


async def test_what_was_folded_before_the_kill_counts_once(tmp_path: Path) -> None:
    usage = MemoryUsage()
    killed = await a_journal(tmp_path, usage)
    await put(killed, a_record("r0"))
    await killed.fold()
    await put(killed, a_record("r1"))
    os.close(killed.file)
    journal = await a_journal(tmp_path, usage)
    await journal.aclose()
    assert list(usage.records) == ids(2)


async def test_what_killed_workers_left_is_folded_by_the_next_gateway_however_many_it_has(tmp_path: Path) -> None:
    usage = MemoryUsage()
    for worker, id in enumerate(ids(3)):
        journal = Journal(folder=tmp_path / "journal" / str(worker), sink=usage.append, clock=FakeClock())
        await journal.open()
        await put(journal, a_record(id))
        os.close(journal.file)
    assert [record.id for record in unfolded(tmp_path / "journal")] == ids(3)
    assert not usage.records
    await (await a_journal(tmp_path, usage)).aclose()
    assert sorted(usage.records) == ids(3)
    assert unfolded(tmp_path / "journal") == []


async def test_a_last_line_cut_by_a_crash_is_left_out(tmp_path: Path) -> None:
    usage = MemoryUsage()
    killed = await a_journal(tmp_path, usage)
    for id in ids(2):
        await put(killed, a_record(id))
    os.truncate(killed.path, killed.path.stat().st_size - 5)
    os.close(killed.file)
    assert [record.id for record in unfolded(tmp_path / "journal")] == ids(1)
    journal = await a_journal(tmp_path, usage)
    await journal.aclose()
    assert list(usage.records) == ids(1)


async def test_a_damaged_line_costs_only_itself(tmp_path: Path) -> None:
    usage = MemoryUsage()
    journal = await a_journal(tmp_path, usage)
    await put(journal, a_record("r0"))
    os.write(journal.file, b'{"id": "broken"\n')
    journal.written_bytes += 16
    await put(journal, a_record("r1"))
    await journal.aclose()
    assert list(usage.records) == ids(2)


async def test_a_full_disk_loses_nothing_once_there_is_room(tmp_path: Path) -> None:
    usage, disk = MemoryUsage(), Disk(room=0)
    journal = await a_journal(tmp_path, usage, disk)
    for id in ids(5):
        await put(journal, a_record(id))
    await journal.fold()
    assert "No space left" in journal.fault
    assert list(usage.records) == []
    disk.room = None
    await put(journal, a_record("r5"))
    await journal.fold()
    assert journal.fault == ""
    assert list(usage.records) == ids(6)
    await journal.aclose()


async def test_a_device_that_is_really_full_raises_nothing(tmp_path: Path) -> None:
    journal = await a_journal(tmp_path, MemoryUsage())
    own, journal.file = journal.file, os.open("/dev/full", os.O_WRONLY)
    await put(journal, a_record("r0"))
    assert "No space left" in journal.fault
    os.close(journal.file)
    journal.file = own
    await journal.aclose()


@settings(deadline=None, max_examples=30)
@given(rooms=st.lists(st.integers(0, 400), max_size=20))
def test_half_written_lines_are_finished_later(tmp_path_factory: pytest.TempPathFactory, rooms: list[int]) -> None:
    asyncio.run(write_in_halves(tmp_path_factory.mktemp("journal"), rooms))


async def write_in_halves(folder: Path, rooms: list[int]) -> None:
    usage, disk = MemoryUsage(), Disk(room=0)
    journal = await a_journal(folder, usage, disk)
    for number, room in enumerate(rooms):
        disk.room = room
        await put(journal, a_record(f"r{number}"))
        await journal.fold()
    disk.room = None
    await journal.aclose()
    assert list(usage.records) == ids(len(rooms))


async def test_past_the_bound_calls_are_refused_and_then_taken_again(tmp_path: Path) -> None:
    usage, disk = MemoryUsage(), Disk(room=0)
    journal = await a_journal(tmp_path, usage, disk)
    journal.require_room()
    large = a_record("r0")
    large.code = "x" * 5 * 1024 * 1024
    await put(journal, large)
    with pytest.raises(JournalFull) as refused:
        journal.require_room()
    assert refused.value.retry_after_s
    disk.room = None
    await put(journal, a_record("r1"))
    journal.require_room()
    await journal.aclose()


async def test_a_grown_segment_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.journal.SEGMENT_BYTES_MAX", 1_000)
    usage = MemoryUsage()
    journal = await a_journal(tmp_path, usage)
    first = journal.path
    for id in ids(20):
        await put(journal, a_record(id))
    await journal.fold()
    assert list((tmp_path / "journal").iterdir()) == [journal.path]
    assert journal.path != first
    await put(journal, a_record("r20"))
    await journal.aclose()
    assert list(usage.records) == ids(21)


async def test_a_store_that_fails_gets_everything_when_it_is_back(tmp_path: Path) -> None:
    usage = MemoryUsage()
    journal = await a_journal(tmp_path, usage)
    usage.fault = Unreachable("the disk is gone")
    for id in ids(3):
        await put(journal, a_record(id))
    await journal.fold()
    assert "the disk is gone" in journal.fault
    usage.fault = None
    await journal.fold()
    assert journal.fault == ""
    assert list(usage.records) == ids(3)
    await journal.aclose()


async def test_a_store_that_fails_at_the_start_or_the_end_loses_nothing(tmp_path: Path) -> None:
    usage = MemoryUsage()
    first = await a_journal(tmp_path, usage)
    usage.fault = Unreachable("the disk is gone")
    await put(first, a_record("r0"))
    await first.aclose()
    second = await a_journal(tmp_path, usage)
    await put(second, a_record("r1"))
    await second.aclose()
    usage.fault = None
    third = await a_journal(tmp_path, usage)
    await third.aclose()
    assert sorted(usage.records) == ids(2)
    assert list((tmp_path / "journal").iterdir()) == []


async def test_records_are_readable_by_their_owner_only(tmp_path: Path) -> None:
    journal = await a_journal(tmp_path, MemoryUsage())
    assert journal.path.stat().st_mode & 0o777 == 0o600
    assert journal.folder.stat().st_mode & 0o777 == 0o700
    await journal.aclose()


async def test_a_line_longer_than_one_read_is_folded_like_any_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.journal.READ_BYTES_MAX", 1_000)
    long = a_record("r1")
    long.code = "x" * 5_000
    usage = MemoryUsage()
    killed = await a_journal(tmp_path, usage)
    for record in (a_record("r0"), long, a_record("r2")):
        await put(killed, record)
    await killed.fold()
    assert list(usage.records) == ids(3)
    os.close(killed.file)
    usage.records.clear()
    journal = await a_journal(tmp_path, usage)
    await journal.aclose()
    assert list(usage.records) == ids(3)


async def test_a_line_too_long_to_be_a_record_costs_only_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.journal.READ_BYTES_MAX", 500)
    monkeypatch.setattr("gateway.journal.LINE_BYTES_MAX", 1_000)
    long = a_record("r1")
    long.code = "x" * 5_000
    usage = MemoryUsage()
    killed = await a_journal(tmp_path, usage)
    for record in (a_record("r0"), long, a_record("r2")):
        await put(killed, record)
    os.close(killed.file)
    journal = await a_journal(tmp_path, usage)
    await journal.aclose()
    assert list(usage.records) == ["r0", "r2"]


async def test_records_that_are_too_many_to_be_kept_at_hand_are_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.journal.RECENT_MAX", 3)
    usage = MemoryUsage()
    journal = await a_journal(tmp_path, usage)
    for id in ids(10):
        await put(journal, a_record(id))
    await journal.fold()
    assert list(usage.records) == ids(10)
    for id in ids(12, since=10):
        await put(journal, a_record(id))
    await journal.aclose()
    assert list(usage.records) == ids(12)


async def test_a_record_made_while_others_are_folded_is_neither_lost_nor_behind(tmp_path: Path) -> None:
    storing, go_on = asyncio.Event(), asyncio.Event()

    class Slow(MemoryUsage):
        async def append(self, records: Iterable[Record]) -> None:
            storing.set()
            await go_on.wait()
            await super().append(records)

    usage = Slow()
    journal = await a_journal(tmp_path, usage)
    await put(journal, a_record("r0"))
    folding = asyncio.create_task(journal.fold())
    await storing.wait()
    await put(journal, a_record("r1"))
    journal.append(a_record("r2"))
    go_on.set()
    await folding
    assert journal.folded_bytes < journal.written_bytes
    await journal.fold()
    assert (list(usage.records), journal.folded_bytes) == (ids(3), journal.written_bytes)
    await journal.aclose()
    assert list((tmp_path / "journal").iterdir()) == []


class Picky(MemoryUsage):
    """A store that can't take one of the records, whatever is tried."""

    async def append(self, records: Iterable[Record]) -> None:
        given = list(records)
        if any(record.id == "r1" for record in given):
            raise OverflowError
        await super().append(given)


async def test_a_record_that_the_store_can_never_take_is_set_aside_and_holds_up_no_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    usage = Picky()
    journal = await a_journal(tmp_path, usage)
    for id in ids(3):
        await put(journal, a_record(id))
    await journal.fold()
    assert list(usage.records) == ["r0", "r2"]
    assert (journal.set_aside, journal.fault) == (1, "")
    assert "r1" in caplog.text
    await journal.aclose()
    (aside,) = (tmp_path / "journal").iterdir()
    assert msgspec.json.decode(aside.read_bytes(), type=Record) == a_record("r1")
    assert aside.stat().st_mode & 0o777 == 0o600


async def test_folding_goes_on_after_a_fault_nobody_thought_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage, clock = MemoryUsage(), FakeClock()
    journal = await a_journal(tmp_path, usage, clock=clock)

    def odd(journal: Journal) -> None:
        raise ZeroDivisionError

    with monkeypatch.context() as patched:
        patched.setattr("gateway.journal.Journal._fold_own", odd)
        running = asyncio.create_task(journal.run())
        await put(journal, a_record("r0"))
        await clock.until_asleep()
        clock.advance(FOLD_S)
        await until(lambda: "ZeroDivisionError" in journal.fault)
    await clock.until_asleep()
    clock.advance(FOLD_S)
    await until(lambda: "r0" in usage.records)
    await until(lambda: journal.fault == "")
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await journal.aclose()


async def test_two_faults_at_once_are_logged_once_each(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    usage, disk = MemoryUsage(), Disk()
    journal = await a_journal(tmp_path, usage, disk)
    await put(journal, a_record("r0"))
    disk.room, usage.fault = 0, Unreachable("the store is gone")
    with caplog.at_level(logging.ERROR):
        for id in ids(5, since=1):
            await put(journal, a_record(id))
            await journal.fold()
    assert len(caplog.records) == 2
    assert "No space left" in journal.fault and "the store is gone" in journal.fault
    disk.room, usage.fault = None, None
    await put(journal, a_record("r5"))
    await journal.fold()
    assert journal.fault == ""
    await journal.aclose()
    assert list(usage.records) == ids(6)
