"""The order in which rows are learnt from. A function of seed and epoch, so that a run which goes on knows where."""

from __future__ import annotations

import numpy as np

from training.contract import Array

_POOL_BATCHES = 50
"""Batches whose rows are sorted among themselves by cost: enough to pad little, too few to order the whole epoch."""


def epoch(costs: Array, batch: int, *, seed: int) -> list[Array]:
    """Every row once, in batches of this size (the last one may be smaller), shuffled; rows of like cost together."""
    chance = np.random.default_rng(seed)
    order = chance.permutation(len(costs))
    if costs.min() != costs.max():
        pool = batch * _POOL_BATCHES
        order = np.concatenate(
            [part[np.argsort(costs[part], kind="stable")] for part in np.split(order, range(pool, len(order), pool))]
        )
    batches = np.split(order, range(batch, len(order), batch))
    return [batches[at] for at in chance.permutation(len(batches))]
