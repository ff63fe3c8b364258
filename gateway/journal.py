"""Records on their way to the store: written at once, folded behind the call.

The journal is a folder of JSON lines. A record is written with one system call before the last byte of its
answer goes out, so killing the process loses nothing that a client saw completed. While the disk is full, up to
UNWRITTEN_BYTES_MAX are kept in memory and tried again; past that calls are refused rather than served unbilled.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import msgspec

from gateway.call import Record
from gateway.errors import JournalFull
from gateway.store import StoreFault
from runtimes.clock import Clock

log = logging.getLogger("headrace.journal")


class Journal:
    """Append-only records in `folder`, carried into the store by `fold` in the background."""

    def __init__(self, *, folder: Path, sink: Callable[[Sequence[Record]], Awaitable[None]], clock: Clock) -> None:
        self.folder = folder
        self.sink = sink
        self.clock = clock
        self.unwritten = b""
        self.fault = ""
        """Why the last write or fold failed; empty if it did not."""
        self.folded_bytes = 0
        self.written_bytes = 0
        self.path = Path()
        self.file = -1
        self.folding = asyncio.Lock()

    async def open(self) -> None:
        """Start a fresh segment; what a killed gateway left behind is folded with the rest."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for segment in _segments(self.folder):
            await self.sink(await asyncio.to_thread(_read, segment))
            segment.unlink()
        self._start()

    async def aclose(self) -> None:
        """Fold everything; a segment that could not be folded stays for the next start."""
        if self.file < 0:
            return
        self._write()
        await self.fold()
        if self.folded_bytes == self.written_bytes:
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
        self.unwritten += msgspec.json.encode(record) + b"\n"
        self._write()

    async def run(self) -> None:
        """Fold until cancelled."""
        while True:
            await self.clock.sleep(FOLD_S)
            if self.unwritten:
                self._write()
            await self.fold()

    async def fold(self) -> None:
        """Carry what has been written since the last fold into the store. Doing so twice counts once."""
        async with self.folding:
            while self.folded_bytes < self.written_bytes:
                records, read_bytes = await asyncio.to_thread(_read_from, self.path, self.folded_bytes)
                if not read_bytes:
                    return
                try:
                    await self.sink(records)
                except StoreFault as fault:
                    self._failed(f"the store does not take usage records: {fault}")
                    return
                self.folded_bytes += read_bytes
            self.fault = "" if not self.unwritten else self.fault
            if self.folded_bytes > SEGMENT_BYTES_MAX:
                os.close(self.file)
                self.path.unlink()
                self._start()

    def _start(self) -> None:
        self.path = self.folder / f"{int(self.clock.wall_s() * 1e6)}-{os.getpid()}.jsonl"
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        self.file = os.open(self.path, flags, 0o600)
        self.folded_bytes = self.written_bytes = 0

    def _write(self) -> None:
        try:
            written = os.write(self.file, self.unwritten)
        except OSError as error:
            self._failed(f"the usage journal can't be written: {error.strerror}")
        else:
            self.written_bytes += written
            self.unwritten = self.unwritten[written:]

    def _failed(self, fault: str) -> None:
        if fault != self.fault:
            log.error("%s; calls go on while memory for their records lasts", fault)
        self.fault = fault


def unfolded(folder: Path) -> list[Record]:
    """Records still in the journal. Some may be in the store already: tell them by id."""
    return [record for segment in _segments(folder) for record in _read(segment)]


#: Pause between folds; how large a segment may grow; how much may wait in memory while the disk is full.
FOLD_S = 0.5
SEGMENT_BYTES_MAX = 8 * 1024 * 1024
UNWRITTEN_BYTES_MAX = 4 * 1024 * 1024
READ_BYTES_MAX = 1024 * 1024
LINE = msgspec.json.Decoder(Record)


def _segments(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.jsonl"))


def _read(segment: Path) -> list[Record]:
    """Every whole record of a segment. A last line cut by a crash was never completed: it is left out."""
    try:
        return _records(segment.read_bytes(), segment)
    except FileNotFoundError:  # folded and removed between listing and reading
        return []


def _read_from(segment: Path, offset: int) -> tuple[list[Record], int]:
    with segment.open("rb") as file:
        file.seek(offset)
        chunk = file.read(READ_BYTES_MAX)
    whole = chunk[: chunk.rfind(b"\n") + 1]
    return _records(whole, segment), len(whole)


def _records(lines: bytes, segment: Path) -> list[Record]:
    records = []
    for line in lines.split(b"\n"):
        if line:
            try:
                records.append(LINE.decode(line))
            except msgspec.MsgspecError:
                log.error("a damaged line in %s was skipped", segment.name)
    return records
