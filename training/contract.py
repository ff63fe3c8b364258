"""What the stages of a run hand to each other. A new kind of data or model plugs in here, and the line stays as it is.

spec.data.load()   → Rows        what callers would send, and what they should get back
spec.model.build() → Model       the graph that will be served, as torch
trainer.fit()      → Model       the same, having learnt
compression.apply()→ Model | Graph | Weights
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, Self

import msgspec
import numpy as np

Task = Literal["generate", "classify", "embed", "predict"]
"""What runtimes call it; see `runtimes.artifact.Card`."""

Array = np.ndarray[Any, np.dtype[Any]]
Inputs = Mapping[str, Array]
"""Name → what a caller of the served model sends under it: strings, pixels, the bytes of a file… [n, …]. They may lie
on disk, in what is indexed, counted and gone through as an array of them would be (`training.data.spool`, `pixels`);
`np.asarray` reads all that was chosen, `pieces` some at a time."""

_PIECE_BYTES = 1 << 20

Scores = dict[str, float]
"""Measure → value; what each means is said by `training.evaluation`."""


class Targets(msgspec.Struct, frozen=True):
    """What should come back. Its type decides what is measured. Fields that are arrays have one entry a row; strings
    may lie on disk as those of inputs do."""

    def __len__(self) -> int:
        return len(next(filter(_is_column, msgspec.structs.astuple(self))))

    def take(self, chosen: Array) -> Self:
        """The rows of these indices, int64 [m]."""
        return self._changed(lambda _, array: array[chosen])

    def joined(self, other: Self) -> Self:
        """The rows of both."""
        return self._changed(lambda name, array: np.concatenate([array, getattr(other, name)]))

    def _changed(self, change: Callable[[str, Array], Array]) -> Self:
        arrays = {name: it for name, it in msgspec.structs.asdict(self).items() if _is_column(it)}
        return msgspec.structs.replace(self, **{name: change(name, it) for name, it in arrays.items()})


class Classes(Targets, frozen=True):
    """One label a row."""

    index: Array
    """int64 [n], into `labels`."""
    labels: tuple[str, ...]
    costs: tuple[float, ...] = ()
    """What it costs to answer a row of each label wrong; empty: nobody said."""


class Scoped(Classes, frozen=True, kw_only=True):
    """One label a row, and one of them says that none of the others fits: such a row is to be refused."""

    outside: str
    """That label, the last one."""
    recall: float
    """Share of the rows outside that is to be refused, at the cost of some of those inside."""

    @property
    def inside(self) -> Array:
        """Whether another label fits, bool [n]."""
        found: Array = self.index != len(self.labels) - 1
        return found


class Flags(Targets, frozen=True):
    """Any number of labels a row."""

    values: Array
    """float32 [n, labels]: 1 yes, 0 no, NaN unknown."""
    labels: tuple[str, ...]


class Values(Targets, frozen=True):
    """A number a row: a rating, or how alike two texts are."""

    values: Array
    """float32 [n]."""
    meaning: Literal["rating", "similarity"]


class Choices(Targets, frozen=True):
    """What a user took, and what they thought of it."""

    items: Array
    """Tuples of strings or numbers [n]."""
    ratings: Array
    """Tuples of numbers [n], as long as those."""
    liked_min: float
    """The rating from which on it was worth recommending."""

    def liked(self) -> list[frozenset[Any]]:
        """Of each row, the items that were."""
        return [
            frozenset(item for item, rating in zip(items, ratings, strict=True) if rating >= self.liked_min)
            for items, ratings in zip(self.items, self.ratings, strict=True)
        ]


class Answers(Targets, frozen=True):
    """The text hoped for."""

    texts: Array
    """Strings [n]."""


class Preferred(Targets, frozen=True):
    """Two answers a row, the first the better one."""

    chosen: Array
    """Strings [n]."""
    rejected: Array


class Examples(msgspec.Struct, frozen=True):
    """Rows as columns."""

    inputs: dict[str, Array]
    targets: Targets
    slices: dict[str, Array] = {}
    """Column → strings [n]: measures are also given for each of its values."""

    def __len__(self) -> int:
        return len(self.targets)

    def take(self, chosen: Array) -> Examples:
        """The rows of these indices, int64 [m]."""
        return Examples(
            {name: array[chosen] for name, array in self.inputs.items()},
            self.targets.take(chosen),
            {name: array[chosen] for name, array in self.slices.items()},
        )

    def joined(self, other: Examples) -> Examples:
        """These rows, then those, which must be of the same kind."""
        return Examples(
            {name: np.concatenate([array, other.inputs[name]]) for name, array in self.inputs.items()},
            self.targets.joined(other.targets),
            {name: np.concatenate([array, other.slices[name]]) for name, array in self.slices.items()},
        )


class Rows(msgspec.Struct, frozen=True):
    """What a recipe learns from, and what it is measured with. Nothing is in both."""

    train: Examples
    test: Examples
    notes: tuple[str, ...] = ()
    """What was cleaned, and what to know about the data; for the log and the report."""

    @property
    def both(self) -> Examples:
        """All rows."""
        return self.train.joined(self.test)

    @property
    def fingerprint(self) -> str:
        """Hash of every row, in order."""
        digest = hashlib.sha256()
        for part in (self.train, self.test):
            for name, array in sorted(part.inputs.items()):
                digest.update(name.encode())
                _digest(digest, array)
            for value in msgspec.structs.astuple(part.targets):
                _digest(digest, value if _is_column(value) else np.array(value, object))
        return digest.hexdigest()[:16]


def _is_column(value: Any) -> bool:
    """Whether it is an array, or what stands for one."""
    return hasattr(value, "shape")


def _digest(digest: Any, array: Array) -> None:
    digest.update(f"{array.dtype}{array.shape}".encode())
    if array.dtype != object:
        for piece in pieces(array):
            digest.update(np.ascontiguousarray(piece).data)
    elif array.shape:
        # As msgpack has it of the whole list, which need not be in memory.
        digest.update(_list_head(len(array)))
        for value in array:
            digest.update(msgspec.msgpack.encode(value))
    else:
        digest.update(msgspec.msgpack.encode(array.tolist()))


def _list_head(length: int) -> bytes:
    """How a list of this many begins in msgpack."""
    if length < 1 << 4:
        return bytes([0x90 | length])
    return b"\xdc" + length.to_bytes(2) if length < 1 << 16 else b"\xdd" + length.to_bytes(4)


class Graph(msgspec.Struct, frozen=True):
    """A whole model as one ONNX file."""

    content: bytes
    beside: dict[str, bytes] = {}
    """Files that its runtime reads with it (`tokenizer.json`)."""
    card: dict[str, Any] = {}
    """Fields of its `runtimes.artifact.Card`."""


class Weights(msgspec.Struct, frozen=True):
    """A generator for vLLM: Hugging Face's layout."""

    tensors: dict[str, Any]
    config: dict[str, Any]
    """What `config.json` has to say about them, on top of the model's own."""


class Beside(msgspec.Struct, frozen=True):
    """A LoRA adapter for vLLM, to be put on the model that the recipe starts from: peft's layout."""

    files: Mapping[str, bytes]


def strings(values: Sequence[str]) -> Array:
    """An array of strings [n]; numpy's own would be padded to the longest."""
    return objects(values)


def objects(values: Sequence[Any]) -> Array:
    """An array of anything [n]; of tuples, numpy would make a table."""
    array = np.empty(len(values), object)
    for at, value in enumerate(values):
        array[at] = value
    return array


def pieces(array: Array) -> Iterator[Array]:
    """All rows of an array of numbers, in order, as arrays of a MB or so in memory."""
    rows = max(1, _PIECE_BYTES // max(1, array.dtype.itemsize * math.prod(array.shape[1:])))
    return (np.asarray(array[start : start + rows]) for start in range(0, len(array), rows))
