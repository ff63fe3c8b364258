"""TF-IDF of n-grams of token ids, as torch and as an ONNX operator, so that it needs no tokenizer of its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from training.contract import Array

PAD = 0
"""The id that rows are filled up with; no n-gram has it."""
_BASE = 1 << 20
"""More than there are ids in any vocabulary, so that three of them fit in an int64."""
_ROWS_MIN = 2
"""Rows that an n-gram has to be in: what is in one only says nothing about another."""


class TfIdf(nn.Module):  # type: ignore[misc]  # torch is untyped here
    """Ids [n, tokens], filled up with PAD → weights [n, n-grams] of length one. How often an n-gram is there counts by
    its logarithm, as scikit-learn's `sublinear_tf`."""

    def __init__(self, rows: Sequence[Sequence[int]], *, longest: int, most: int) -> None:
        super().__init__()
        pool, counts = _pool(rows, longest, most)
        self.pool = pool
        """N-grams of one id, then of two, …, each kind sorted."""
        idf = np.log((1 + len(rows)) / (1 + np.array(counts))) + 1
        self.idf = nn.Parameter(torch.tensor(idf, dtype=torch.float32), requires_grad=False)

    def forward(self, ids: Tensor) -> Tensor:
        counts: Tensor = _Count.apply(ids, self.pool)
        weights = (counts.clamp(min=1.0).log() + 1.0) * (counts > 0).to(counts.dtype) * self.idf
        return nn.functional.normalize(weights, dim=-1)


class _Count(torch.autograd.Function):  # type: ignore[misc]
    """How often each n-gram of the pool is in each row, float32 [n, n-grams]."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, pool: list[tuple[int, ...]]) -> Tensor:
        counts = np.zeros((len(ids), len(pool)), np.float32)
        start = 0
        for length in sorted({len(it) for it in pool}):
            wanted = codes(np.array([it for it in pool if len(it) == length]), length)[:, 0]
            found = codes(ids.numpy(), length)
            places = np.searchsorted(wanted, found).clip(max=len(wanted) - 1)
            row, at = np.nonzero(wanted[places] == found)
            np.add.at(counts, (row, start + places[row, at]), 1)
            start += len(wanted)
        return torch.from_numpy(counts)

    @staticmethod
    def symbolic(g: Any, ids: Any, pool: list[tuple[int, ...]]) -> Any:
        lengths = range(1, max(map(len, pool)) + 1)
        sizes = [sum(len(it) for it in pool if len(it) == length) for length in lengths]
        return g.op(
            "TfIdfVectorizer",
            ids,
            mode_s="TF",
            min_gram_length_i=1,
            max_gram_length_i=lengths[-1],
            max_skip_count_i=0,
            ngram_counts_i=[sum(sizes[:at]) for at in range(len(sizes))],
            ngram_indexes_i=[*range(len(pool))],
            pool_int64s_i=[id for it in pool for id in it],
        )


def codes(ids: Array, length: int) -> Array:
    """One number for each n-gram of this many ids, in order, int64 [n, tokens - length + 1]."""
    ids = ids.astype(np.int64)
    count = ids.shape[1] - length + 1
    found = np.zeros((len(ids), max(0, count)), np.int64)
    for at in range(length):
        found = found * _BASE + ids[:, at : at + max(0, count)]
    return found


def _pool(rows: Sequence[Sequence[int]], longest: int, most: int) -> tuple[list[tuple[int, ...]], list[int]]:
    """N-grams that are in the most rows, and in how many; ties in the order of their ids."""
    seen: Counter[tuple[int, ...]] = Counter()
    for row in rows:
        seen.update({tuple(row[at : at + size]) for size in range(1, longest + 1) for at in range(len(row) - size + 1)})
    often = [(count, gram) for gram, count in seen.items() if count >= _ROWS_MIN and PAD not in gram]
    often.sort(key=lambda it: (-it[0], it[1]))
    kept = sorted(often[:most], key=lambda it: (len(it[1]), it[1]))
    return [gram for _, gram in kept], [count for count, _ in kept]
