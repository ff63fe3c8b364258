"""Memory that several processes of one host have in common, and locks on parts of it.

A file without a name (memfd): only processes that were handed it can open it, nothing of it is left once they are gone,
and none of it is ever written to a disk. Its locks are the kernel's (POSIX record locks), which lets go of them when
their holder dies, however it dies; what a holder had written by then stays, so whoever writes must write in an order in
which every part of the whole is harmless.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from typing import Literal


class Memory:
    """`file` is one that `make` made, in this process or in the one that handed it on."""

    def __init__(self, file: int) -> None:
        self.file = file
        self.bytes = mmap.mmap(file, 0)

    @classmethod
    def make(cls, name: str, size_bytes: int) -> Memory:
        """All zeros; `name` is for /proc alone."""
        file = os.memfd_create(name)
        os.ftruncate(file, size_bytes)
        return cls(file)

    def whole(self, start_bytes: int, count: int, kind: Literal["Q", "I"]) -> memoryview[int]:
        """So many whole numbers, of 8 bytes or 4."""
        return memoryview(self.bytes)[start_bytes : start_bytes + count * SIZES_BYTES[kind]].cast(kind)

    def lock(self, number: int) -> None:
        """Wait until no other process has this lock, or all of them. They are not counted: a process must let go of one
        before it takes another."""
        for _ in range(SPINS):
            try:
                fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
            except BlockingIOError:
                continue
            return
        fcntl.lockf(self.file, fcntl.LOCK_EX, 1, number)

    def lock_all(self) -> None:
        fcntl.lockf(self.file, fcntl.LOCK_EX)

    def unlock(self) -> None:
        """Let go of what this process has, one or all."""
        fcntl.lockf(self.file, fcntl.LOCK_UN)


SIZES_BYTES = {"Q": 8, "I": 4}

#: A lock is held for a few microseconds. To try again for some tens costs less than to be put to sleep and woken, which
#: would hold up a whole event loop for as long: two workers that one tenant keeps busy serve half as much again.
SPINS = 50
