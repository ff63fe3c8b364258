"""The processes that learn together, each from its share of every batch. Alone, one.

Their gradients are put together by torch's DistributedDataParallel, so all of them hold the same weights at every step;
the first of them writes, measures and talks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from training.contract import Array


class Team:
    """As torch.distributed has been set up in this process."""

    def __init__(self) -> None:
        together = dist.is_available() and dist.is_initialized()
        self.rank: int = dist.get_rank() if together else 0
        self.size: int = dist.get_world_size() if together else 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def joined(self, model: nn.Module) -> nn.Module:
        """The model, its gradients those of all."""
        if self.size == 1:
            return model
        return nn.parallel.DistributedDataParallel(model, broadcast_buffers=False, find_unused_parameters=True)

    def share(self, chosen: Array) -> tuple[Array, bool]:
        """This process's rows of a batch. There may be none: then some row, which must not count, and False."""
        own = chosen[self.rank :: self.size]
        return (own, True) if len(own) else (chosen[:1], False)

    def total(self, value: float) -> float:
        """The sum over all."""
        if self.size == 1:
            return value
        found = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(found)
        return float(found)

    def told(self, value: Any) -> Any:
        """What the first of them has here."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]
