"""Logistic regression on weighed n-grams, by scikit-learn: they are mostly zeros, which it makes use of."""

from __future__ import annotations

import logging

import numpy as np
import torch
from scipy import sparse
from sklearn.linear_model import LogisticRegression

from training.contract import Classes, Examples
from training.errors import RecipeError
from training.model import Model
from training.models.bag import Bag
from training.spec.trainers import Logistic

LOG = logging.getLogger("training")

_ROWS_AT_ONCE = 256


def fit(spec: Logistic, model: Model, examples: Examples) -> Model:
    """The model with its linear layer as the regression leaves it."""
    if not isinstance(model, Bag) or not isinstance(examples.targets, Classes):
        raise RecipeError("the trainer 'logistic' is for the model 'ngrams', and rows with one label each")
    texts = examples.inputs["text"]
    weights = sparse.vstack(
        [
            sparse.csr_matrix(model.weights({"text": texts[start : start + _ROWS_AT_ONCE]}))
            for start in range(0, len(texts), _ROWS_AT_ONCE)
        ]
    )
    LOG.info("logistic: %d n-grams, %.0f a row", weights.shape[1], weights.nnz / weights.shape[0])
    regression = LogisticRegression(
        C=spec.c, tol=1e-6, max_iter=1000, class_weight="balanced" if spec.balanced else None
    )
    regression.fit(weights, examples.targets.index)
    weight, bias = regression.coef_, regression.intercept_
    if len(model.labels) == 2:  # it keeps the log-odds of the second one only
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    with torch.no_grad():
        model.linear.weight.copy_(torch.from_numpy(weight))
        model.linear.bias.copy_(torch.from_numpy(bias))
    model.eval()
    return model
