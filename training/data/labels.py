"""Labels as numbers."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from training.contract import Classes
from training.errors import DataError


def classes(train: Collection[str], test: Collection[str]) -> tuple[Classes, Classes]:
    """One label a row, of both parts; in alphabetical order. Raises DataError unless they can be learnt."""
    labels = tuple(sorted({*train}))
    if len(labels) < 2:
        raise DataError(f"the training rows have {len(labels)} labels; a classifier needs two or more")
    if unknown := sorted({*test} - {*labels}):
        raise DataError(f"the label {unknown[0]!r} is in the test rows only: there is nothing to learn it from")
    index = {label: at for at, label in enumerate(labels)}
    one, other = (Classes(np.array([index[it] for it in part], np.int64), labels) for part in (train, test))
    return one, other
