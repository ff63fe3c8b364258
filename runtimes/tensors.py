"""Arrays that a graph reads as they are given: images, tables, sound, ids without a tokenizer."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from runtimes.contract import Datatype, Invalid
from runtimes.graph import Graph

if TYPE_CHECKING:
    from runtimes.contract import Array

    Slice = tuple[Mapping[str, Array], int]
    """One row of a call's inputs."""


class Tensors:
    """What is read as it is. Safe for threads."""

    counts_tokens = False

    def __init__(self, graph: Graph, *, who: str) -> None:
        self._who = who
        self._axes = graph.axes
        self.inputs = graph.inputs
        self.outputs = graph.outputs
        self.batched = _batched(graph)
        """Its first axis is the batch's, of any size."""

    def check(self, inputs: Mapping[str, Array]) -> None:
        """Raise Invalid, naming the input, unless the graph takes these."""
        wanted = {it.name: it for it in self.inputs}
        for name in sorted(inputs.keys() ^ wanted.keys()):
            what = "is no input of" if name in inputs else "is missing; it is an input of"
            raise Invalid(f"`{name}` {what} {self._who}, which takes {sorted(wanted)}", param=name)
        sizes: dict[str, int] = {}
        for name, tensor in wanted.items():
            array = inputs[name]
            if array.dtype.kind != "O" and array.dtype != NUMPY[tensor.datatype]:
                raise Invalid(f"`{name}` must be {tensor.datatype}; got {array.dtype}", param=name)
            if (array.dtype.kind == "O") is not (tensor.datatype == "BYTES"):
                raise Invalid(f"`{name}` must be {tensor.datatype}; got {array.dtype}", param=name)
            if array.ndim != len(tensor.shape) or not array.size:
                raise self._misshapen(name, array)
            for axis, size in zip(self._axes[name], array.shape, strict=True):
                # Axes of one name have one size, whatever it is.
                expected = axis if isinstance(axis, int) else sizes.setdefault(axis, size) if axis else size
                if size != expected:
                    raise self._misshapen(name, array)
            if tensor.datatype == "BYTES" and not all(isinstance(it, str) for it in array.flat):
                raise Invalid(f"`{name}` must hold strings, and holds bytes that are not valid UTF-8", param=name)
        if self.batched and len(rows := {len(array) for array in inputs.values()}) > 1:
            raise Invalid(f"{self._who} got inputs of {sorted(rows)} rows; give all the same", param=min(inputs))

    def count(self, inputs: Mapping[str, Array]) -> int:
        return len(next(iter(inputs.values()))) if self.batched else 1

    def pieces(self, inputs: Mapping[str, Array], rows_max: int) -> Iterator[tuple[Mapping[str, Array], bool]]:
        """The same rows in the same order, a few at a time; `rows` never takes long with them."""
        if not self.batched:
            yield inputs, False
            return
        for start in range(0, self.count(inputs), rows_max):
            yield {name: array[start : start + rows_max] for name, array in inputs.items()}, False

    def rows(self, piece: Mapping[str, Array]) -> list[tuple[Slice, int, Hashable]]:
        """Each row, its cost, and what it goes together with: rows of the same shape, or none at all."""
        kind = tuple(array.shape[1:] for array in piece.values()) if self.batched else object()
        return [((piece, index), 1, kind) for index in range(self.count(piece))]

    def feed(self, contents: Sequence[Slice]) -> Mapping[str, Array]:
        """What the graph reads of one batch. Neighbours are not copied unless others are between them."""
        if not self.batched:
            [(whole, _)] = contents
            return whole
        runs: list[tuple[Mapping[str, Array], int, int]] = []
        for piece, index in contents:
            if runs and runs[-1][0] is piece and runs[-1][2] == index:
                runs[-1] = (piece, runs[-1][1], index + 1)
            else:
                runs.append((piece, index, index + 1))
        if len(runs) == 1:
            [(piece, start, stop)] = runs
            return {name: array[start:stop] for name, array in piece.items()}
        return {name: np.concatenate([piece[name][start:stop] for piece, start, stop in runs]) for name in runs[0][0]}

    def _misshapen(self, name: str, array: Array) -> Invalid:
        axes = ", ".join(str(axis or "any") for axis in self._axes[name])
        return Invalid(
            f"`{name}` must have the shape [{axes}], none of them 0 and those of one name alike; "
            f"got {list(array.shape)}",
            param=name,
        )


def _batched(graph: Graph) -> bool:
    """Whether every tensor's first axis is of any size, and by its name the same everywhere."""
    tensors = [*graph.inputs, *graph.outputs]
    names = {graph.axes[it.name][0] for it in tensors if it.shape}
    return all(it.shape[:1] == (-1,) for it in tensors) and len(names) == 1


NUMPY: Mapping[Datatype, type] = {
    "BOOL": np.bool_,
    "UINT8": np.uint8,
    "UINT16": np.uint16,
    "UINT32": np.uint32,
    "UINT64": np.uint64,
    "INT8": np.int8,
    "INT16": np.int16,
    "INT32": np.int32,
    "INT64": np.int64,
    "FP16": np.float16,
    "FP32": np.float32,
    "FP64": np.float64,
    "BYTES": np.object_,
}
"""The protocol's datatype → numpy's."""
