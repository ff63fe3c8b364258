"""Columns of strings of which many are equal."""

from __future__ import annotations

from array import array

import numpy as np

from training.contract import Array, strings


class Categories:
    """A column as it is read: of each value one string, however many rows have it."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self._rows = array("i")

    def append(self, value: str) -> None:
        """Behind the others."""
        self._rows.append(self._numbers.setdefault(value, len(self._numbers)))

    def array(self) -> Array:
        """Strings [n], 8 bytes each."""
        found: Array = strings([*self._numbers])[np.frombuffer(self._rows, np.int32)]
        return found
