"""Label by label: a logistic regression on an encoder's embeddings, one on n-grams, and one on what these two say."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from scipy import sparse
from sklearn.linear_model import LogisticRegression

from training.contract import Array, Classes, Flags, Targets
from training.errors import DataError, RecipeError
from training.evaluation.folds import stratified
from training.evaluation.measures import auprc
from training.model import Model
from training.models.blended import Blended
from training.models.ngrams import TfIdf
from training.spec.trainers import Blend

LOG = logging.getLogger("training")

_ROWS_AT_ONCE = 256


def learn(spec: Blend, model: Model, features: Mapping[str, Array], targets: Targets) -> Model:
    """The model with its layers as the regressions leave them, and its biases so that one half is the threshold."""
    if not isinstance(model, Blended) or not isinstance(targets, Flags):
        raise RecipeError("the trainer 'blend' is for the model 'blended-encoder'")
    sides = ((spec.meaning_c, features["embedding"]), (spec.wording_c, _tfidf(model.tfidf, features["ids"])))
    for column, label in enumerate(targets.labels):
        known = np.nonzero(~np.isnan(targets.values[:, column]))[0]
        wanted = targets.values[known, column] == 1
        if min(wanted.sum(), (~wanted).sum()) < spec.folds:
            raise DataError(
                f"of the rows to learn from {wanted.sum()} have the label {label!r} and {(~wanted).sum()} do not; "
                f"with {spec.folds} folds there have to be as many of both"
            )
        fold = stratified(Classes(wanted.astype(np.int64), ("no", "yes")), spec.folds, seed=0)
        said = np.stack([_held_out(c, side[known], wanted, fold) for c, side in sides], 1)
        both = LogisticRegression().fit(said, wanted)
        logits = both.decision_function(said)
        least = threshold(logits, wanted, spec.false_alarms_max)
        meaning, wording = (_regression(c).fit(side[known], wanted) for c, side in sides)
        shares = both.coef_[0]
        with torch.no_grad():
            model.meaning.weight[column] = torch.from_numpy(shares[0] * meaning.coef_[0])
            model.wording[:, column] = torch.from_numpy(shares[1] * wording.coef_[0])
            model.meaning.bias[column] = float(
                both.intercept_[0] + shares[0] * meaning.intercept_[0] + shares[1] * wording.intercept_[0] - least
            )
        LOG.info(
            "blend: %s  auprc by meaning %.3f, by wording %.3f, by both %.3f;  at the threshold recall %.3f, false "
            "alarms %.4f", label, *(auprc(it, wanted) for it in (*said.T, logits)),
            np.mean(logits[wanted] >= least), np.mean(logits[~wanted] >= least),
        )  # fmt: skip
    model.eval()
    return model


def threshold(logits: Array, wanted: Array, false_alarms_max: float) -> float:
    """The logit from which on a row is flagged: among those with no more false alarms the highest whose F1 is within a
    standard error of the best one.

    What these rows cannot tell apart is decided for those who should not be stopped: other people's texts lie nearer to
    the threshold than the texts that it was set on. The rule is that of Breiman et al., Classification and Regression
    Trees, 1984, 3.4.3. Of the rows that are flagged or should be, those that are both are a share j, and F1 is
    2 j / (1 + j).
    """
    order = np.argsort(-logits, kind="stable")
    hits, alarms = np.cumsum(wanted[order]), np.cumsum(~wanted[order])
    either = wanted.sum() + alarms
    share = hits / either
    f1 = 2 * share / (1 + share)
    f1[alarms > false_alarms_max * (~wanted).sum()] = -1
    best = int(f1.argmax())
    error = 2 / (1 + share[best]) ** 2 * np.sqrt(share[best] * (1 - share[best]) / either[best])
    last = int(np.argmax(f1 >= f1[best] - error))
    return float((logits[order[last]] + logits[order[min(last + 1, len(order) - 1)]]) / 2)


def _regression(c: float) -> LogisticRegression:
    return LogisticRegression(C=c, solver="liblinear", random_state=0)


def _held_out(c: float, side: Any, wanted: Array, fold: Array) -> Array:
    """Log-odds of each row, by a regression on the rows of other folds."""
    found = np.empty(len(wanted))
    for number in range(fold.max() + 1):
        held = fold == number
        found[held] = _regression(c).fit(side[~held], wanted[~held]).decision_function(side[held])
    return found


def _tfidf(tfidf: TfIdf, ids: Array) -> Any:
    """Of each row, sparse [n, n-grams]."""
    with torch.inference_mode():
        parts = [
            sparse.csr_matrix(tfidf(torch.from_numpy(ids[start : start + _ROWS_AT_ONCE])).numpy())
            for start in range(0, len(ids), _ROWS_AT_ONCE)
        ]
    return sparse.vstack(parts).tocsr()
