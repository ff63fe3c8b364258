"""Values that a caller may send, as numbers: what a graph does about names before it can compute with them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from training.contract import Array, objects, strings


class Vocabulary:
    """Strings or int64, numbered from one in their order; zero is any value that is none of them."""

    def __init__(self, values: Array) -> None:
        """`values`: as often as they like."""
        known = sorted(set(values))
        self.values = strings(known) if values.dtype == object else np.array(known, np.int64)

    def __len__(self) -> int:
        return len(self.values)

    def numbers(self, values: Array) -> Array:
        """int64 of the same shape."""
        if not len(self.values):
            return np.zeros(values.shape, np.int64)
        at = np.minimum(np.searchsorted(self.values, values), len(self.values) - 1)
        return np.where(self.values[at] == values, at + 1, 0).astype(np.int64)

    def of(self, numbers: Array) -> Array:
        """The values of these; of zero, -1 or the empty string."""
        nothing = np.array([-1]) if self.values.dtype == np.int64 else strings([""])
        return np.concatenate([nothing, self.values])[numbers]


def values_of(rows: Iterable[Iterable[Any]]) -> Array:
    """Those of all the rows, strings or numbers, one after the other."""
    flat = [it for row in rows for it in row]
    return objects(flat) if any(isinstance(it, str) for it in flat) else np.array(flat, np.int64)
