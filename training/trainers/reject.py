"""A text classifier, and how sure it is that one of its labels fits; see `training.models.scoped`."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from training.contract import Array, Classes, Scoped, Targets
from training.errors import RecipeError
from training.evaluation.folds import stratified
from training.evaluation.scope import threshold
from training.model import Model
from training.models.scoped import ScopedClassifier
from training.spec.trainers import Reject
from training.trainers.probe import regress

LOG = logging.getLogger("training")


def learn(spec: Reject, model: Model, features: Mapping[str, Array], targets: Targets) -> Model:
    """The model with its layers as the regressions leave them, and its threshold where the targets want it: all on rows
    that the layers had not seen when they were asked."""
    if not isinstance(model, ScopedClassifier) or not isinstance(targets, Scoped):
        raise RecipeError("the trainer 'reject' is for texts of which some have no label: set data.outside")
    embedding = torch.from_numpy(features["embedding"])
    signals = _held_out(spec, model, embedding, targets)
    _fit(spec, model, embedding, targets)
    _mix(spec, model.mix, signals, targets)
    with torch.inference_mode():
        sure = model.mix(signals).flatten().numpy()
        least = threshold(sure[~targets.inside], targets.recall)
        model.mix.bias -= least
    LOG.info(
        "reject: of the training rows, held out in turn, %.1f %% inside are kept and %.1f %% outside refused",
        100 * np.mean(sure[targets.inside] >= least), 100 * np.mean(sure[~targets.inside] < least),
    )  # fmt: skip
    model.eval()
    return model


def _held_out(spec: Reject, model: ScopedClassifier, embedding: Tensor, targets: Scoped) -> Tensor:
    """Signals [n, signals], each row's by layers that were fitted to the rows of other folds."""
    fold = stratified(targets, spec.folds, seed=0)
    signals = torch.empty(len(targets), model.mix.in_features)
    for number in range(spec.folds):
        held = np.nonzero(fold == number)[0]
        rest = np.nonzero(fold != number)[0]
        _fit(spec, model, embedding[rest], targets.take(rest))
        with torch.inference_mode():
            signals[held] = model.signals(embedding[held])
    return signals


def _fit(spec: Reject, model: ScopedClassifier, embedding: Tensor, targets: Scoped) -> None:
    """Everything but the mixture. Rows outside have no part in it: they would be no strangers any more, and it is they
    who find the threshold."""
    inside = targets.inside
    learnt = Classes(targets.index[inside], targets.labels[:-1])
    regress(model.linear, embedding[inside], learnt, spec)
    with torch.no_grad():
        sums = torch.zeros_like(model.means).index_add_(0, torch.from_numpy(learnt.index), embedding[inside])
        model.means.copy_(nn.functional.normalize(sums, dim=1))


def _mix(spec: Reject, mix: nn.Linear, signals: Tensor, targets: Scoped) -> None:
    """How much each signal counts: log-odds of a row inside."""
    deviation, mean = torch.std_mean(signals, 0)
    layer = nn.Linear(signals.shape[1], 2)
    sides = Classes(targets.inside.astype(np.int64), ("outside", "inside"))
    regress(layer, (signals - mean) / deviation, sides, spec)
    with torch.no_grad():
        weight = (layer.weight[1] - layer.weight[0]) / deviation
        mix.weight.copy_(weight[None])
        mix.bias.copy_(layer.bias[1] - layer.bias[0] - weight @ mean)
