"""Texts that lie on disk while they are used, so that a set of them may be larger than memory."""

from __future__ import annotations

import mmap
import os
import tempfile
from array import array
from collections.abc import Iterable, Iterator
from typing import Any, cast

import numpy as np

from training.contract import Array, strings


def spooled(texts: Iterable[str]) -> Texts:
    """All of them, written one after the other into a file without a name: it is gone with the process, however that
    ends. Raises OSError if the disk is full."""
    ends = array("q", [0])
    # Not where temporary files are by default: on many machines /tmp lies in memory.
    folder = os.environ.get("TMPDIR", "/var/tmp")  # noqa: S108 - the file has no name
    with tempfile.TemporaryFile(dir=folder) as file:
        for text in texts:
            ends.append(ends[-1] + file.write(text.encode("utf-8", "surrogatepass")))
        file.flush()
        # A mapping lives on after its file is closed; one of nothing is refused.
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if ends[-1] else b""
    return Texts(content, np.frombuffer(ends, np.int64), np.arange(len(ends) - 1))


class Texts:
    """Strings [n], read from disk as they are asked for. Indexing gives one string, or others of these, still on disk;
    numpy, where it computes with them, makes an ordinary array of them."""

    dtype = np.dtype(object)

    def __init__(self, content: mmap.mmap | bytes, ends: Array, places: Array) -> None:
        self._content = content
        self._ends = ends
        self._places = places
        """Of each text, which one of the file it is."""

    @property
    def shape(self) -> tuple[int]:
        return (len(self),)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, chosen: Any) -> Any:
        if isinstance(chosen, int | np.integer):
            return self._read(int(self._places[chosen]))
        return Texts(self._content, self._ends, self._places[chosen])

    def __iter__(self) -> Iterator[str]:
        return map(self._read, self._places.tolist())

    def tolist(self) -> list[str]:
        return [*self]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        return strings(self.tolist())

    def column(self) -> Array:
        """The same, by the name of what it stands for: all that rows are asked is what it can answer."""
        return cast(Array, self)

    def _read(self, place: int) -> str:
        start, end = self._ends[place], self._ends[place + 1]
        return self._content[start:end].decode("utf-8", "surrogatepass")
