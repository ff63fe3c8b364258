"""What lies on disk while it is used, so that a set may be larger than memory: texts, the content of files, structs.

What is written goes into a file without a name: it is gone with the process, however that ends.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from typing import IO, Any, TypeVar, cast

import msgspec
import numpy as np

from training.contract import Array, objects

T = TypeVar("T")


def spooled(texts: Iterable[str]) -> Texts:
    """All of them, one after the other. Raises OSError if the disk is full."""
    return Texts(*_written(text.encode("utf-8", "surrogatepass") for text in texts))


def spooled_bytes(contents: Iterable[bytes]) -> Contents:
    """The same, of bytes."""
    return Contents(*_written(contents))


def unnamed() -> IO[bytes]:
    """A new file, gone when it is closed and mapped no more."""
    # Not where temporary files are by default: on many machines /tmp lies in memory.
    return tempfile.TemporaryFile(dir=os.environ.get("TMPDIR", "/var/tmp"))  # noqa: S108 - the file has no name


def mapped(file: IO[bytes]) -> mmap.mmap | bytes:
    """All that it holds, for reading; lives on after it is closed."""
    file.flush()
    # A mapping of nothing is refused.
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if os.fstat(file.fileno()).st_size else b""


def _written(contents: Iterable[bytes]) -> tuple[mmap.mmap | bytes, Array, Array]:
    """The file that holds them, where each ends behind the one before, and which of them there are."""
    ends = array("q", [0])
    with unnamed() as file:
        for content in contents:
            ends.append(ends[-1] + file.write(content))
        return mapped(file), np.frombuffer(ends, np.int64), np.arange(len(ends) - 1)


class Chosen:
    """Some of what lies elsewhere [n], each read as it is asked for. Indexing gives one, or others of these, of which
    none is read; numpy, where it computes with them, makes an ordinary array of them."""

    dtype = np.dtype(object)

    def __init__(self, places: Array) -> None:
        self._places = places
        """Where each one is, integers [n]."""

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self),)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, chosen: Any) -> Any:
        if isinstance(chosen, int | np.integer):
            return self._read(self._places[chosen])
        others = copy(self)
        others._places = self._places[chosen]
        return others

    def __iter__(self) -> Iterator[Any]:
        return map(self._read, self._places)

    def tolist(self) -> list[Any]:
        return [*self]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        return objects(self.tolist())

    def column(self) -> Array:
        """The same, by the name of what it stands for: all that rows are asked is what it can answer."""
        return cast(Array, self)

    def _read(self, place: Any) -> Any:
        raise NotImplementedError


class Contents(Chosen):
    """Bytes [n], on disk."""

    def __init__(self, content: mmap.mmap | bytes, ends: Array, places: Array) -> None:
        super().__init__(places)
        self._content = content
        self._ends = ends

    def _read(self, place: Any) -> Any:
        return self._content[self._ends[place] : self._ends[place + 1]]


class Texts(Contents):
    """The same, of strings."""

    def _read(self, place: Any) -> str:
        return str(super()._read(place), "utf-8", "surrogatepass")


class Stored(Sequence[T]):
    """Structs of one type, read from disk as they are asked for."""

    def __init__(self, items: Iterable[T], kind: type[T]) -> None:
        self._contents = spooled_bytes(map(msgspec.msgpack.Encoder().encode, items))
        self._decoder = msgspec.msgpack.Decoder(kind)

    def __len__(self) -> int:
        return len(self._contents)

    def __getitem__(self, at: Any) -> Any:
        return self._decoder.decode(self._contents[at])
