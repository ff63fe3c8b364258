"""Columns of strings of which many are equal."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np

from training.contract import Array, strings
from training.data.spool import Chosen


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


class Named(Chosen):
    """Strings [n], each of them one of `values`; which one, int32 [n], may be a mapped file."""

    def __init__(self, values: Sequence[str], places: Array) -> None:
        super().__init__(places)
        self._values = strings(values)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        found: Array = self._values[self._places]
        return found

    def _read(self, place: Any) -> str:
        return str(self._values[place])
