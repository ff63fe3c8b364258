"""Dense layers over the columns of a table; several networks, of which each learns by itself, answer their mean."""

from __future__ import annotations

from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn

from training.contract import Classes, Inputs, Rows, Targets
from training.errors import RecipeError
from training.model import Model
from training.models.features import Features
from training.spec.models import Mlp


class TableModel(Model):
    """See Mlp. Columns of numbers are float32 [n], those of categories strings [n]."""

    task = "classify"
    names_out = ("scores", "logits")

    def __init__(self, spec: Mlp, inputs: Inputs, labels: tuple[str, ...]) -> None:
        super().__init__()
        self.features = Features(spec, inputs)
        self.names_in = self.features.names
        self.vocabularies = self.features.vocabularies
        self.labels = labels
        self.sample = {name: column[:2] for name, column in inputs.items()}
        self.networks = _networks(spec, self.features.width, len(labels))

    def feed(self, inputs: Inputs) -> tuple[Tensor, ...]:
        return tuple(
            torch.from_numpy(
                self.vocabularies[name].numbers(inputs[name]) if name in self.vocabularies else inputs[name]
            )
            for name in self.names_in
        )

    def forward(self, *columns: Tensor) -> tuple[Tensor, ...]:
        """→ scores [n, labels], and their logarithms; while learning those of each network, [networks, n, labels]."""
        features = self.features(*columns)
        logits = self.networks(features)
        if self.training:
            return logits.softmax(-1), logits
        scores = logits.softmax(-1).mean(0)
        return scores, scores.log()

    def loss(self, outputs: tuple[Tensor, ...], targets: Targets, weights: Tensor) -> Tensor:
        """The sum over the networks, so that each goes the way that it would go alone."""
        losses = [super(TableModel, self).loss(one, targets, weights) for one in zip(*outputs, strict=True)]
        return cast(Tensor, sum(losses))


def build(spec: Mlp, rows: Rows) -> TableModel:
    """New, drawn from torch's random numbers."""
    if not isinstance(rows.train.targets, Classes):
        raise RecipeError("the model 'mlp' is for tables with one label a row")
    for name in rows.train.inputs:
        if name in TableModel.names_out or (name.isascii() and name.isdigit()):
            # Of outputs' names there may be no other, and torch takes a number for one that it gave.
            raise RecipeError(f"no input of a graph can have the name {name!r}: rename that column, or data.ignore it")
    return TableModel(spec, rows.train.inputs, rows.train.targets.labels)


def _networks(spec: Mlp, width: int, labels: int) -> nn.Sequential:
    """Features [n, width] → logits of each network [networks, n, labels]."""
    parts: list[nn.Module] = []
    for one, other in pairwise((width, *spec.layers)):
        parts += [Abreast(spec.networks, one, other), nn.ReLU(), nn.Dropout(spec.dropout)]
    return nn.Sequential(*parts, Abreast(spec.networks, spec.layers[-1] if spec.layers else width, labels))


class Abreast(nn.Module):  # type: ignore[misc]  # torch is untyped here
    """As many linear layers as there are networks, in one product; each begins as torch's own do."""

    def __init__(self, networks: int, width: int, width_out: int) -> None:
        super().__init__()
        bound = width**-0.5
        self.weight = nn.Parameter(torch.empty(networks, width, width_out).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(networks * width_out).uniform_(-bound, bound))

    def forward(self, inputs: Tensor) -> Tensor:
        """[n, width] or [networks, n, width] → [networks, n, width_out]."""
        return inputs @ self.weight + self.bias.view(len(self.weight), 1, -1)
