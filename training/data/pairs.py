"""Pairs of texts and how alike they are."""

from __future__ import annotations

import numpy as np

from training.contract import Examples, Rows, Values, strings
from training.data import tables
from training.spec.data import Pairs


def load(spec: Pairs) -> Rows:
    """All of them are to measure with: an embedder is taken as it is. `similarity`: any scale, higher is closer."""
    records = tables.read(spec.test, encoding=spec.encoding)
    tables.columns(records, ("left", "right", "similarity"), file=spec.test)
    numbered = list(enumerate(records, 1))
    test = Examples(
        {
            side: strings([tables.text(it, side, file=spec.test, number=at) for at, it in numbered])
            for side in ("left", "right")
        },
        Values(
            np.array([tables.number(it, "similarity", file=spec.test, number=at) for at, it in numbered], np.float32),
            "similarity",
        ),
    )
    return Rows(test.take(np.array([], np.int64)), test)
