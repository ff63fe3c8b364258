"""Columns as a caller sends them → features, inside the graph: so that nobody has to prepare a row in the same way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from training.contract import Array, Inputs
from training.errors import RecipeError
from training.spec.models import Mlp
from training.vocabulary import Vocabulary

_ROWS_AT_ONCE = 1 << 14
_FAR = 8.0
"""Standard deviations beyond which a number is taken for this many."""


class Features(nn.Module):  # type: ignore[misc]  # torch is untyped here
    """Fitted to training rows. Numbers: ratios added, logarithms taken, mean 0 and variance 1; a missing one is the
    median, and said to be missing if that happened in training. Categories: one feature each, all of them zero for a
    value that was not there."""

    def __init__(self, spec: Mlp, inputs: Inputs) -> None:
        super().__init__()
        self.log = spec.log
        self.names = tuple(inputs)
        self.numbers = [name for name, column in inputs.items() if column.dtype != object]
        self.vocabularies = {name: Vocabulary(it) for name, it in inputs.items() if it.dtype == object}
        for name in (name for pair in spec.ratios for name in pair):
            if name not in self.numbers:
                raise RecipeError(f"model.ratios names {name!r}, which is no column of numbers")
        self.over = [self.numbers.index(it) for it, _ in spec.ratios]
        self.under = [self.numbers.index(it) for _, it in spec.ratios]
        for name, vocabulary in self.vocabularies.items():
            # Row 0 is any value that is not in it.
            self.register_buffer(_table(name), torch.eye(len(vocabulary) + 1)[:, 1:].contiguous())
        if self.numbers:
            self._fit([inputs[it] for it in self.numbers])

    @property
    def width(self) -> int:
        categories = sum(len(it) for it in self.vocabularies.values())
        return categories + (len(self.mean) + len(self.gaps) if self.numbers else 0)

    def forward(self, *columns: Tensor) -> Tensor:
        """Each column [n], numbers as float32 and categories as their vocabulary's → float32 [n, width]."""
        given = dict(zip(self.names, columns, strict=True))
        parts = [getattr(self, _table(name))[given[name]] for name in self.vocabularies]
        if self.numbers:
            numbers = torch.stack([given[it] for it in self.numbers], 1)
            scaled = (self._derived(numbers) - self.mean) / self.deviation
            parts.append(scaled.clamp(-_FAR, _FAR))
            parts.append(numbers.isnan().to(scaled.dtype)[:, self.gaps])
        return torch.cat(parts, 1)

    def _fit(self, columns: Sequence[Array]) -> None:
        """Of numbers, NaN where one is missing. Each is looked at for itself, then all of them some rows at a time."""
        count = len(columns[0])
        self.register_buffer("median", torch.tensor([float(np.nanmedian(it)) for it in columns]))
        self.register_buffer("gaps", torch.from_numpy(np.nonzero([np.isnan(it).any() for it in columns])[0]))

        def pieces() -> Iterator[Tensor]:
            for start in range(0, count, _ROWS_AT_ONCE):
                numbers = np.stack([it[start : start + _ROWS_AT_ONCE] for it in columns], 1)
                yield self._derived(torch.from_numpy(numbers)).double()

        mean = torch.stack([it.sum(0) for it in pieces()]).sum(0) / count
        variance = torch.stack([(it - mean).square().sum(0) for it in pieces()]).sum(0) / count
        self.register_buffer("mean", mean.float())
        self.register_buffer("deviation", torch.where(variance > 0, variance.sqrt(), 1.0).float())

    def _derived(self, numbers: Tensor) -> Tensor:
        """Nothing missing, ratios to the right."""
        known = torch.where(numbers.isnan(), self.median, numbers)
        ratios = known[:, self.over] / (known[:, self.under].abs() + 1)
        every = torch.cat([known, ratios], 1)
        return every.sign() * every.abs().log1p() if self.log else every


def _table(name: str) -> str:
    """A buffer's name cannot have dots in it."""
    return "of " + name.replace("%", "%25").replace(".", "%2E")
