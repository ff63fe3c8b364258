"""How a process that serves keeps its heap: Python's collector of cycles, told what is known of this program."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

GC_OBJECTS = 20_000


@contextmanager
def imports() -> Iterator[None]:
    """Around the imports of a process that will serve: these make many objects and hardly any garbage, and collecting
    amid them is a sixth of the start. What there is afterwards stays."""
    gc.disable()
    yield
    gc.freeze()
    gc.enable()
    # Calls under way are thousands of live objects: by the default of 700, looking for garbage among them is a
    # twentieth of the work, and there is hardly any.
    gc.set_threshold(GC_OBJECTS, 20, 100)
