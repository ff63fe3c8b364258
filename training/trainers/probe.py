"""Logistic regression on what a frozen model puts out before its last layer."""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

from training.contract import Classes, Examples, Flags
from training.errors import RecipeError
from training.model import Model, predict
from training.models.encoder import Classifier
from training.spec.trainers import Probe

LOG = logging.getLogger("training")


def fit(spec: Probe, model: Model, examples: Examples) -> Model:
    """The model with its linear layer as the regression leaves it."""
    if not isinstance(model, Classifier):
        raise RecipeError("the trainer 'probe' is for text classifiers: an encoder, and rows with labels")
    LOG.info("probe: embedding %d texts", len(examples))
    inputs = torch.from_numpy(predict(model.embedder, examples.inputs, title="probe")["embedding"])
    loss = regress(model.linear, inputs, examples, spec)
    LOG.info("probe: logistic regression over %d labels, loss %.4f", len(model.labels), loss)
    model.eval()
    return model


def regress(linear: nn.Linear, inputs: Tensor, examples: Examples, spec: Probe) -> float:
    """By L-BFGS. Convex: from zero, the same rows always end at the same weights. For flags, one regression each."""
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    optimizer = torch.optim.LBFGS(
        linear.parameters(), max_iter=spec.steps_max, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
    )
    targets = examples.targets

    def mean_loss() -> Tensor:
        logits = linear(inputs)
        if isinstance(targets, Classes):
            return nn.functional.cross_entropy(logits, torch.from_numpy(targets.index))
        assert isinstance(targets, Flags)
        wanted = torch.from_numpy(targets.values)
        known = ~wanted.isnan()
        losses = nn.functional.binary_cross_entropy_with_logits(logits, wanted.nan_to_num(), reduction="none")
        return (losses * known).sum() / known.sum() * wanted.shape[1]

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = mean_loss() + linear.weight.square().sum() / (2 * spec.c * len(targets))
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        return float(mean_loss())
