"""Which rows are learnt from and which are measured with."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from training.contract import Array
from training.data.cleaning import same
from training.data.tables import Record
from training.errors import DataError

T = TypeVar("T")


def held_out(key: str, share: float) -> bool:
    """Whether a row belongs to the test part. By its own hash, so that adding rows never moves old ones."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) < share * 2**64


def said(record: Record) -> str:
    """What its `split` column says, if it has one."""
    return sys.intern(str(record.get("split") or ""))


def tested(says: Sequence[str], held: Array) -> Array:
    """Whether each row is to test with, bool [n]: what its `split` column says or, where no row has that, its hash."""
    if not any(says):
        return held
    for number, part in enumerate(says, 1):
        if part not in {"train", "test"}:
            raise DataError(f"row {number}: the column 'split' may say train or test, not {part!r}")
    return np.array([it == "test" for it in says])


def apart(train: Sequence[T], test: Sequence[T], key: Callable[[T], str]) -> tuple[list[T], int]:
    """The training rows that are not in the test part, case and white space aside, and how many were."""
    seen = {same(key(it)) for it in test}
    kept = [it for it in train if same(key(it)) not in seen]
    return kept, len(train) - len(kept)
