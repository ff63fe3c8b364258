"""Images that lie on disk while they are used, so that a set of them may be larger than memory."""

from __future__ import annotations

from typing import Any

import numpy as np

from training.contract import Array
from training.data.spool import Chosen


class Pixels(Chosen):
    """Images uint8 [n, height, width] or [n, height, width, 3], of those in `images`, which may be a mapped file."""

    dtype = np.dtype(np.uint8)

    def __init__(self, images: Array, places: Array) -> None:
        super().__init__(places)
        self._images = images

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self), *self._images.shape[1:])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        return self._images[self._places].astype(dtype or self.dtype, copy=False)

    def _read(self, place: Any) -> Array:
        found: Array = self._images[place]
        return found
