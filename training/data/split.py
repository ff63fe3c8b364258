"""Which rows are learnt from and which are measured with."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence

import numpy as np

from training.contract import Array
from training.data.tables import Record
from training.errors import DataError


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
