"""The plainest things that could work, by scikit-learn."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_union

from training.contract import Array, Classes, Examples, Flags
from training.errors import RecipeError
from training.spec.floors import Ngrams


def ngrams(spec: Ngrams, train: Examples, test: Examples, *, seed: int) -> dict[str, Array]:
    """`scores` [n, labels] of logistic regression on TF-IDF."""
    targets = train.targets
    if not isinstance(targets, Classes | Flags) or "text" not in train.inputs:
        raise RecipeError("the floor 'ngrams' is for texts with labels")
    vectors = _vectors(spec)
    learnt, asked = vectors.fit_transform(train.inputs["text"]), vectors.transform(test.inputs["text"])
    if isinstance(targets, Classes):
        regression = LogisticRegression(C=spec.c, max_iter=1000, random_state=seed)
        return {"scores": regression.fit(learnt, targets.index).predict_proba(asked)}
    scores = np.zeros((len(test), len(targets.labels)))
    for column, values in enumerate(targets.values.T):
        known = ~np.isnan(values)
        regression = LogisticRegression(C=spec.c, solver="liblinear", random_state=seed)
        scores[:, column] = regression.fit(learnt[known], values[known]).predict_proba(asked)[:, 1]
    return {"scores": scores}


def _vectors(spec: Ngrams) -> Any:
    def tfidf(unit: str, least: int, most: int) -> TfidfVectorizer:
        return TfidfVectorizer(analyzer=unit, ngram_range=(least, most), sublinear_tf=True, lowercase=True)

    if spec.unit == "both":
        return make_union(tfidf("word", spec.least, spec.most), tfidf("char_wb", 2, 5))
    return tfidf(spec.unit, spec.least, spec.most)
