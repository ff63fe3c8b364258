"""Images that lie on disk while they are used, so that a set of them may be larger than memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import numpy as np

from training.contract import Array


class Pixels:
    """Images uint8 [n, height, width] or [n, height, width, 3], of those in `images`, which may be a mapped file.
    Indexing gives one, or others of these, none of them read; numpy, where it computes with them, reads them all."""

    dtype = np.dtype(np.uint8)

    def __init__(self, images: Array, places: Array) -> None:
        self._images = images
        self._places = places
        """Which of them, int64 [n]."""

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self), *self._images.shape[1:])

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, chosen: Any) -> Any:
        if isinstance(chosen, int | np.integer):
            return self._images[self._places[chosen]]
        return Pixels(self._images, self._places[chosen])

    def __iter__(self) -> Iterator[Array]:
        return (self._images[place] for place in self._places)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        return self._images[self._places].astype(dtype or self.dtype, copy=False)

    def column(self) -> Array:
        """The same, by the name of what it stands for: all that rows are asked is what it can answer."""
        return cast(Array, self)
