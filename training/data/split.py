"""Which rows are learnt from and which are measured with."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import TypeVar

from training.data.cleaning import same
from training.data.tables import Record
from training.errors import DataError

T = TypeVar("T")


def held_out(key: str, share: float) -> bool:
    """Whether a row belongs to the test part. By its own hash, so that adding rows never moves old ones."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) < share * 2**64


def parts(records: Sequence[Record], share: float, key: Callable[[Record], str]) -> list[str]:
    """`train` or `test` for each record: what its `split` column says, or the hash of its `key`."""
    splits = [str(it.get("split") or "") for it in records]
    if not any(splits):
        return ["test" if held_out(key(it), share) else "train" for it in records]
    for number, part in enumerate(splits, 1):
        if part not in {"train", "test"}:
            raise DataError(f"row {number}: the column 'split' may say train or test, not {part!r}")
    return splits


def apart(train: Sequence[T], test: Sequence[T], key: Callable[[T], str]) -> tuple[list[T], int]:
    """The training rows that are not in the test part, case and white space aside, and how many were."""
    seen = {same(key(it)) for it in test}
    kept = [it for it in train if same(key(it)) not in seen]
    return kept, len(train) - len(kept)
