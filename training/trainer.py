"""Fitting a model to rows."""

from __future__ import annotations

import logging

import torch
from torch import nn

from training import data, model
from training.recipe import RecipeError
from training.spec import Probe

LOG = logging.getLogger(__name__)


def fit(spec: Probe | None, base: model.Embedder | model.Generator, rows: list[data.Row]) -> model.Model:
    """The base model as it is when the recipe has no trainer, else one that has learnt from the rows."""
    if spec is None:
        return base
    if not isinstance(base, model.Embedder):
        raise RecipeError("the trainer 'probe' makes classifiers: set task = \"classify\"")
    labelled = [row for row in rows if isinstance(row, data.Labelled)]
    classifier = model.Classifier(base, data.labels(rows))
    LOG.info("trainer: embedding %d texts", len(labelled))
    inputs = torch.from_numpy(model.outputs(base, [row.text for row in labelled]))
    targets = torch.tensor([classifier.labels.index(row.label) for row in labelled])
    loss = _regress(classifier.head, inputs, targets, spec)
    LOG.info("trainer: logistic regression over %d labels, loss %.4f", len(classifier.labels), loss)
    classifier.eval()
    return classifier


def _regress(head: nn.Linear, inputs: torch.Tensor, targets: torch.Tensor, spec: Probe) -> float:
    """Multinomial logistic regression by L-BFGS. Convex: from zero, the same rows always end at the same weights."""
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.LBFGS(
        head.parameters(), max_iter=spec.steps_max, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        penalty = head.weight.square().sum() / (2 * spec.c * len(targets))
        loss = nn.functional.cross_entropy(head(inputs), targets) + penalty
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        return float(nn.functional.cross_entropy(head(inputs), targets))
