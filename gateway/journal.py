"""Records on their way to the store: written at once, folded behind the call.

The journal is a folder of JSON lines. All records of one turn of the event loop are written with one system call,
before the last bytes of their answers go out, so killing the process loses nothing that a client saw completed; who
waits for one record alone has it written at once. While the disk is full, up to UNWRITTEN_BYTES_MAX are kept in memory
and tried again; past that calls are refused rather than served unbilled.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import msgspec

from gateway.call import Record
from gateway.errors import JournalFull
from gateway.store import StoreFault
from runtimes.clock import Clock

log = logging.getLogger("headrace.journal")


class Journal:
    """Append-only records in `folder`, carried into `sink` by `fold` in the background.

    `write` is os.write; tests put a full disk in its place.
    """

    def __init__(
        self,
        *,
        folder: Path,
        sink: Callable[[Sequence[Record]], Awaitable[None]],
        clock: Clock,
        write: Callable[[int, bytearray], int] = os.write,
    ) -> None:
        self.folder = folder
        self.sink = sink
        self.clock = clock
        self.write = write
        self.unwritten = bytearray()
        self.faults: dict[str, str] = {}
        """What goes wrong now: writing, reading, storing or folding, and why."""
        self.set_aside = 0
        """Records that the store can never take; the log knows them by id, and the file ASIDE keeps them."""
        self.folded_bytes = 0
        self.written_bytes = 0
        self.path = Path()
        self.file = -1
        self.left: list[Path] = []
        """Segments of gateways before this one."""
        self.folding = asyncio.Lock()
        self._recent: list[Record] | None = []
        """The records of this segment that are still to be folded, so that they need not be read back; None if those
        at hand are not exactly the ones in the file, and it must be read."""
        self._writing = False
        """A write is due at the end of this turn of the event loop."""
        self._then: list[Callable[[], None]] = []

    @property
    def fault(self) -> str:
        """Why records do not get on; empty if they do."""
        return "; ".join(self.faults.values())

    async def open(self) -> None:
        """Start a fresh segment, and fold what a killed gateway left behind, its workers included: this one's own
        are not there yet."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for segment in _workers_segments(self.folder):
            segment.rename(self.folder / segment.name)
        self.left = _segments(self.folder)
        self._start()
        await self.fold()

    async def aclose(self) -> None:
        """Fold everything; a segment that could not be folded stays for the next start."""
        if self.file < 0:
            return
        await self.fold()
        if self.unwritten:
            log.critical("%d bytes of usage records are lost: %s", len(self.unwritten), self.fault)
        elif self.folded_bytes == self.written_bytes:
            self.path.unlink()
        os.close(self.file)
        self.file = -1

    def require_room(self) -> None:
        if len(self.unwritten) > UNWRITTEN_BYTES_MAX:
            raise JournalFull(
                "Usage can't be recorded, so calls are not served; the operator must free the state folder's disk.",
                retry_after_s=10.0,
            )

    def append(self, record: Record) -> None:
        """Written at the end of this turn of the event loop, together with whatever else ends in it."""
        self.unwritten += msgspec.json.encode(record) + b"\n"
        if self._recent is not None:
            self._recent.append(record)
        if not self._writing:
            self._writing = True
            asyncio.get_running_loop().call_soon(self.flush)

    def when_written(self, then: Callable[[], None]) -> None:
        """Call back once all that was appended so far is on its way to the disk, at once if it is already."""
        if self._writing:
            self._then.append(then)
        else:
            then()

    async def run(self) -> None:
        """Fold until cancelled."""
        while True:
            await self.clock.sleep(FOLD_S)
            try:
                await self.fold()
            except Exception as error:  # noqa: BLE001  it is logged, and said by `fault` until a fold goes well
                self._failed("folding", f"usage records can't be folded: {type(error).__name__}")

    async def fold(self) -> None:
        """Carry what is there since the last fold into the store. Doing so twice counts once."""
        async with self.folding:
            try:
                await self._fold_left()
                await self._fold_own()
            except StoreFault as fault:
                self._failed("storing", f"the store does not take usage records: {fault}")
            except OSError as error:
                self._failed("reading", f"the usage journal can't be read or begun anew: {error.strerror}")
            else:
                self.faults = {kind: why for kind, why in self.faults.items() if kind == "writing"}

    async def _fold_left(self) -> None:
        while self.left:
            segment, offset = self.left[0], 0
            while read_bytes := await self._carry(segment, offset):
                offset += read_bytes
            segment.unlink(missing_ok=True)
            del self.left[0]

    async def _fold_own(self) -> None:
        self.flush()
        while self.folded_bytes < self.written_bytes:
            if self._recent:
                await self._fold_recent(self._recent, self.written_bytes)
            else:
                read_bytes = await self._carry(self.path, self.folded_bytes)
                if not read_bytes:  # the disk took half a line; the other half is still to be written
                    return
                self.folded_bytes += read_bytes
            if self.folded_bytes < SEGMENT_BYTES_MAX:
                return  # what came meanwhile is the next fold's
            self.flush()
        if not self.unwritten:
            self._recent = []
        if self.folded_bytes > SEGMENT_BYTES_MAX:
            before, file = self.path, self.file
            self._start()
            os.close(file)
            before.unlink()

    async def _fold_recent(self, recent: list[Record], written_bytes: int) -> None:
        """What is at hand is all that is in the file and not folded, up to `written_bytes`."""
        self._recent = []
        try:
            await self._store(recent)
        except BaseException:
            self._recent = None
            raise
        self.folded_bytes = written_bytes

    async def _carry(self, segment: Path, offset: int) -> int:
        """Whole lines from `offset` on into the store; how many bytes they were, 0 at the end."""
        records, read_bytes = await asyncio.to_thread(_read_from, segment, offset)
        await self._store(records)
        return read_bytes

    async def _store(self, records: list[Record]) -> None:
        try:
            if records:
                await self.sink(records)
        except StoreFault:
            raise
        except Exception:  # noqa: BLE001  one of them is at fault, and must not hold up the others
            for record in records:
                await self._carry_one(record)

    async def _carry_one(self, record: Record) -> None:
        try:
            await self.sink([record])
        except StoreFault:
            raise
        except Exception as error:  # noqa: BLE001  it is logged
            await asyncio.to_thread(_keep, self.folder / ASIDE, record)
            self.set_aside += 1
            log.critical(
                "the store can't take usage record %s (%s); it is kept in %s, tell its tenant's bill by it",
                record.id,
                type(error).__name__,
                self.folder / ASIDE,
            )

    def _start(self) -> None:
        path = self.folder / f"{int(self.clock.wall_s() * 1e6)}-{secrets.token_hex(4)}.jsonl"
        self.file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self.path = path
        self.folded_bytes = self.written_bytes = 0

    def flush(self) -> None:
        """Write all that was appended so far, now. For who waits for one record alone; of those that share a turn each
        would pay for a write."""
        self._writing = False
        if self.unwritten:
            try:
                written = self.write(self.file, self.unwritten)
            except OSError as error:
                self._failed("writing", f"the usage journal can't be written: {error.strerror}")
            else:
                self.written_bytes += written
                del self.unwritten[:written]
        if self.unwritten or len(self._recent or ()) > RECENT_MAX:
            self._recent = None
        if not self.unwritten:
            self.faults.pop("writing", None)
        then, self._then = self._then, []
        for go_on in then:
            try:
                go_on()
            except Exception:
                log.exception("what was to follow a usage record failed")

    def _failed(self, kind: str, why: str) -> None:
        if kind not in self.faults:
            log.error("%s; calls go on while memory for their records lasts", why)
        self.faults[kind] = why


def unfolded(folder: Path) -> list[Record]:
    """Records still in the journal. Some may be in the store already: tell them by id."""
    segments = _segments(folder) + _workers_segments(folder)
    return [record for segment in segments for record in _read(segment)]


#: Pause between folds; how large a segment may grow; how much may wait in memory while the disk is full.
FOLD_S = 0.5
SEGMENT_BYTES_MAX = 8 * 1024 * 1024
UNWRITTEN_BYTES_MAX = 4 * 1024 * 1024
#: How many records are kept at hand for the next fold; past that it reads them back.
RECENT_MAX = 20_000
#: How much is read at once, and how much more to find the end of its last line.
READ_BYTES_MAX = 1024 * 1024
LINE_BYTES_MAX = 16 * 1024 * 1024
#: Not a segment: what is in it is never folded.
ASIDE = "aside"
LINE = msgspec.json.Decoder(Record)


def _segments(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.jsonl"))


def _workers_segments(folder: Path) -> list[Path]:
    """A worker's journal is a folder in its gateway's, named by its number."""
    return sorted(folder.glob("*/*.jsonl"))


def _read(segment: Path) -> list[Record]:
    """Every whole record of a segment. A last line cut by a crash was never completed: it is left out."""
    try:
        lines = segment.read_bytes()
    except FileNotFoundError:  # folded and removed between listing and reading
        return []
    return _records(lines[: lines.rfind(b"\n") + 1], segment)


def _read_from(segment: Path, offset: int) -> tuple[list[Record], int]:
    with segment.open("rb") as file:
        file.seek(offset)
        chunk = file.read(READ_BYTES_MAX)
        if not chunk.endswith(b"\n"):
            rest = file.readline(LINE_BYTES_MAX)
            chunk += rest
            if len(rest) == LINE_BYTES_MAX and not rest.endswith(b"\n"):
                return _records(chunk, segment), len(chunk)  # no record is so long: each part of it is a damaged line
    whole = chunk[: chunk.rfind(b"\n") + 1]
    return _records(whole, segment), len(whole)


def _keep(path: Path, record: Record) -> None:
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    with os.fdopen(file, "wb") as aside:
        aside.write(msgspec.json.encode(record) + b"\n")


def _records(lines: bytes, segment: Path) -> list[Record]:
    records = []
    for line in lines.split(b"\n"):
        if line:
            try:
                records.append(LINE.decode(line))
            except msgspec.MsgspecError:
                log.error("a damaged line in %s was skipped", segment.name)
    return records
