"""What every model that a graph is made of has in common. Which ones there are: `training.models`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from training.contract import Array, Classes, Flags, Inputs, Targets, Task, Values
from training.errors import RecipeError
from training.progress import progress
from training.vocabulary import Vocabulary

_COST_MAX = 8192
"""Sum of costs (tokens, padding included) that go through a model at once when nothing has to be kept for learning."""
_ROWS_MAX = 256


class Model(nn.Module):  # type: ignore[misc]  # torch is untyped here
    """The graph that will be served, as torch: what its runtime hands it comes in, what clients get goes out. What a
    graph cannot do (tokenizing, reading a file) is in `feed`, and is done by the runtime in the same way."""

    task: Task = "predict"
    names_in: tuple[str, ...]
    """Of forward's tensors, in order; the graph's inputs."""
    names_out: tuple[str, ...]
    labels: tuple[str, ...] = ()
    """What the columns of `scores` mean."""
    sample: Inputs
    """Two rows that it can take, for tracing it."""
    augments: bool = False
    """`augment` does something, so that rows have to be learnt from more than once."""
    vocabularies: Mapping[str, Vocabulary] = {}
    """Inputs and outputs that are values to its callers, and to `forward` their numbers."""

    def feed(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """What `forward` takes of these rows."""
        raise NotImplementedError

    def loss(self, outputs: tuple[Tensor, ...], targets: Targets, weights: Tensor) -> Tensor:
        """Mean over the rows, each counted by its weight [n]."""
        return weighted(row_losses(self.named(outputs), targets), weights)

    def costs(self, inputs: Inputs) -> Array:
        """How much work each row is, int64 [n]; rows of like cost go together. Tokens, where there are any."""
        return np.ones(len(next(iter(inputs.values()))), np.int64)

    def augment(self, inputs: Inputs, chance: np.random.Generator) -> Inputs:
        """The same rows, changed in ways that leave their targets true. For learning only."""
        return inputs

    def frozen(self, inputs: Inputs) -> dict[str, Array]:
        """What comes out of that part of it which a frozen model leaves as it is, [n, …]."""
        raise RecipeError(f"a {type(self).__name__.lower()} has no part that could be frozen; use trainer 'gradient'")

    def rest(self, features: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Its outputs, from these."""
        raise NotImplementedError

    def head(self) -> Sequence[nn.Parameter]:
        """Parameters that are new, and learn faster than those that come from elsewhere."""
        return ()

    def axes(self) -> dict[str, dict[int, str]]:
        """Which axes of its inputs and outputs are of any size, and their names."""
        return {name: {0: "n"} for name in (*self.names_in, *self.names_out)}

    def beside(self) -> dict[str, bytes]:
        """Files that its runtime needs beside the graph."""
        return {}

    def card(self) -> dict[str, Any]:
        """Fields of its `runtimes.artifact.Card`."""
        return {"task": self.task, "labels": self.labels}

    def relabel(self, labels: tuple[str, ...]) -> None:
        """Learn to tell these labels from now on: those it knows, then new ones."""
        if labels != self.labels:
            raise RecipeError(f"a {type(self).__name__} cannot learn new labels; the new rows have {labels[-1]!r}")

    def named(self, outputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
        return dict(zip(self.names_out, outputs, strict=True))


def row_losses(outputs: Mapping[str, Tensor], targets: Targets) -> Tensor:
    """What is usually minimised for such targets, row by row [n]: cross entropy of `logits` for classes, the mean
    binary one over the known flags, and squares for values."""
    match targets:
        case Classes():
            return nn.functional.cross_entropy(outputs["logits"], torch.from_numpy(targets.index), reduction="none")
        case Flags():
            wanted = torch.from_numpy(targets.values)
            known = ~wanted.isnan()
            losses = nn.functional.binary_cross_entropy_with_logits(
                outputs["logits"], wanted.nan_to_num(), reduction="none"
            )
            return (losses * known).sum(1) / known.sum(1).clamp(min=1)
        case Values():
            return (outputs["value"].flatten() - torch.from_numpy(targets.values)).square()
    raise TypeError(f"no loss is known for {type(targets).__name__}")


def weighted(losses: Tensor, weights: Tensor) -> Tensor:
    """Mean of [n], each counted by its weight [n]."""
    return (losses * weights).sum() / weights.sum()


def predict(model: Model, inputs: Inputs, *, title: str | None = None) -> dict[str, Array]:
    """Every output for every row, in the order of the rows, [n, …]. Leaves the model in evaluation mode. With a title,
    it is shown how far it has come; without, it is part of something that shows itself."""
    model.eval()
    costs = model.costs(inputs)
    order = np.argsort(costs, kind="stable")
    parts: list[tuple[Array, ...]] = []
    shown = progress(title, len(order)) if title else nullcontext(lambda _: None)
    with torch.inference_mode(), shown as advance:
        for chosen in _batches(order, costs):
            fed = model.feed({name: array[chosen] for name, array in inputs.items()})
            parts.append(tuple(it.numpy() for it in model(*fed)))
            advance(len(chosen))
    back = np.argsort(order, kind="stable")
    columns = zip(*parts, strict=True)
    found = {name: np.concatenate(column)[back] for name, column in zip(model.names_out, columns, strict=True)}
    return {name: model.vocabularies[name].of(it) if name in model.vocabularies else it for name, it in found.items()}


def finish(model: Model, features: Mapping[str, Array]) -> dict[str, Array]:
    """Every output for every row, from its features. Leaves the model in evaluation mode."""
    model.eval()
    count = len(next(iter(features.values())))
    parts = []
    with torch.inference_mode():
        for start in range(0, count, _ROWS_MAX):
            piece = {name: torch.from_numpy(it[start : start + _ROWS_MAX]) for name, it in features.items()}
            parts.append([it.numpy() for it in model.rest(piece)])
    return {name: np.concatenate(it) for name, it in zip(model.names_out, zip(*parts, strict=True), strict=True)}


def _batches(order: Array, costs: Array) -> list[Array]:
    """Neighbours in `order`, as many as are cheap together: padded to the last, which is the dearest."""
    batches, start = [], 0
    for at in range(1, len(order) + 1):
        full = at - start == _ROWS_MAX or (at < len(order) and (at - start + 1) * costs[order[at]] > _COST_MAX)
        if at == len(order) or full:
            batches.append(order[start:at])
            start = at
    return batches
