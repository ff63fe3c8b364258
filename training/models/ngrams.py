"""TF-IDF of n-grams of token ids, as torch and as an ONNX operator, so that it needs no tokenizer of its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from training.contract import Array
from training.errors import RecipeError

PAD = 0
"""The id that rows are filled up with; no n-gram has it."""

Pool = list[tuple[int, ...]]
"""N-grams of few ids before those of more, each kind sorted."""


class TfIdf(nn.Module):  # type: ignore[misc]  # torch is untyped here
    """Ids [n, tokens], filled up with PAD → weights [n, n-grams] of length one: scikit-learn's TfidfVectorizer with
    `sublinear_tf`, on the n-grams of `shortest` to `longest` ids that `rows_min` of these rows have; of those, the
    `most` frequent."""

    def __init__(
        self,
        rows: Sequence[Sequence[int]],
        *,
        shortest: int = 1,
        longest: int,
        rows_min: int = 2,
        most: int | None = None,
    ) -> None:
        super().__init__()
        self.pool, counts = _pool(rows, range(shortest, longest + 1), rows_min, most)
        if not self.pool:
            raise RecipeError(f"no n-gram is in {rows_min} training rows: there is nothing to count")
        idf = np.log((1 + len(rows)) / (1 + np.array(counts))) + 1
        self.idf = nn.Parameter(torch.tensor(idf, dtype=torch.float32), requires_grad=False)

    def forward(self, ids: Tensor) -> Tensor:
        counts: Tensor = _Count.apply(ids, self.pool)
        # 1 + log(count), and zero for what is not there.
        weights = (counts.clamp(min=1.0).log() + counts.clamp(max=1.0)) * self.idf
        return nn.functional.normalize(weights, dim=-1)


class _Count(torch.autograd.Function):  # type: ignore[misc]
    """How often each n-gram of the pool is in each row, float32 [n, n-grams]."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, pool: Pool) -> Tensor:
        counts = np.zeros((len(ids), len(pool)), np.float32)
        base = _base(pool)
        start = 0
        for length in sorted({len(it) for it in pool}):
            wanted = codes(np.array([it for it in pool if len(it) == length]), length, base)[:, 0]
            found = codes(ids.numpy(), length, base)
            places = np.searchsorted(wanted, found).clip(max=len(wanted) - 1)
            row, at = np.nonzero(wanted[places] == found)
            np.add.at(counts, (row, start + places[row, at]), 1)
            start += len(wanted)
        return torch.from_numpy(counts)

    @staticmethod
    def symbolic(g: Any, ids: Any, pool: Pool) -> Any:
        longest = len(pool[-1])
        sizes = [sum(len(it) for it in pool if len(it) == length) for length in range(1, longest + 1)]
        return g.op(
            "TfIdfVectorizer",
            ids,
            mode_s="TF",
            min_gram_length_i=len(pool[0]),
            max_gram_length_i=longest,
            max_skip_count_i=0,
            ngram_counts_i=[sum(sizes[:at]) for at in range(longest)],
            ngram_indexes_i=[*range(len(pool))],
            pool_int64s_i=[*chain.from_iterable(pool)],
        )


def codes(ids: Array, length: int, base: int) -> Array:
    """One number for each n-gram of this many ids, in order, int64 [n, tokens - length + 1]. An id from `base` on
    stands in no n-gram, as PAD."""
    count = max(0, ids.shape[1] - length + 1)
    known = np.where(ids < base, ids, PAD).astype(np.int64)
    found = np.zeros((len(ids), count), np.int64)
    for at in range(length):
        found = found * base + known[:, at : at + count]
    return found


def _base(pool: Pool) -> int:
    """One more than the largest id, so that every n-gram has a number of its own."""
    base = 1 + max(map(max, pool))
    if base ** len(pool[-1]) >= 2**63:
        raise RecipeError(f"n-grams of {len(pool[-1])} of {base} different tokens are too many to tell apart")
    return base


def _pool(
    rows: Sequence[Sequence[int]], lengths: Sequence[int], rows_min: int, most: int | None
) -> tuple[Pool, list[int]]:
    """N-grams that are in the most rows, and in how many; ties in the order of their ids."""
    seen: Counter[tuple[int, ...]] = Counter()
    for row in rows:
        seen.update({tuple(row[at : at + size]) for size in lengths for at in range(len(row) - size + 1)})
    often = [(count, gram) for gram, count in seen.items() if count >= rows_min and PAD not in gram]
    often.sort(key=lambda it: (-it[0], it[1]))
    kept = sorted(often[:most], key=lambda it: (len(it[1]), it[1]))
    return [gram for _, gram in kept], [count for count, _ in kept]
