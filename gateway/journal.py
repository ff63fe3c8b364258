"""Records on their way to the store: written at once, folded behind the call.

The journal is a folder of JSON lines. A record is written with one system call before the last byte of its
answer goes out, so killing the process loses nothing that a client saw completed. While the disk is full, up to
UNWRITTEN_BYTES_MAX are kept in memory and tried again; past that calls are refused rather than served unbilled.
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
        self.fault = ""
        """Why the last write or fold failed; empty if it did not."""
        self.folded_bytes = 0
        self.written_bytes = 0
        self.path = Path()
        self.file = -1
        self.left: list[Path] = []
        """Segments of gateways before this one."""
        self.folding = asyncio.Lock()

    async def open(self) -> None:
        """Start a fresh segment, and fold what a killed gateway left behind."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.left = _segments(self.folder)
        self._start()
        await self.fold()

    async def aclose(self) -> None:
        """Fold everything; a segment that could not be folded stays for the next start."""
        if self.file < 0:
            return
        self._write()
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
            try:
                await self._fold_left()
                await self._fold_own()
            except StoreFault as fault:
                self._failed(f"the store does not take usage records: {fault}")
            except OSError as error:
                self._failed(f"the usage journal can't be read or begun anew: {error.strerror}")
            else:
                if not self.unwritten:
                    self.fault = ""

    async def _fold_left(self) -> None:
        while self.left:
            segment, offset = self.left[0], 0
            while read_bytes := await self._carry(segment, offset):
                offset += read_bytes
            segment.unlink(missing_ok=True)
            del self.left[0]

    async def _fold_own(self) -> None:
        while self.folded_bytes < self.written_bytes:
            read_bytes = await self._carry(self.path, self.folded_bytes)
            if not read_bytes:  # the disk took half a line; the other half is still to be written
                return
            self.folded_bytes += read_bytes
        if self.folded_bytes > SEGMENT_BYTES_MAX:
            before, file = self.path, self.file
            self._start()
            os.close(file)
            before.unlink()

    async def _carry(self, segment: Path, offset: int) -> int:
        """Whole lines from `offset` on into the store; how many bytes they were, 0 at the end."""
        records, read_bytes = await asyncio.to_thread(_read_from, segment, offset)
        if records:
            await self.sink(records)
        return read_bytes

    def _start(self) -> None:
        path = self.folder / f"{int(self.clock.wall_s() * 1e6)}-{secrets.token_hex(4)}.jsonl"
        self.file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self.path = path
        self.folded_bytes = self.written_bytes = 0

    def _write(self) -> None:
        try:
            written = self.write(self.file, self.unwritten)
        except OSError as error:
            self._failed(f"the usage journal can't be written: {error.strerror}")
        else:
            self.written_bytes += written
            del self.unwritten[:written]

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
        lines = segment.read_bytes()
    except FileNotFoundError:  # folded and removed between listing and reading
        return []
    return _records(lines[: lines.rfind(b"\n") + 1], segment)


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
