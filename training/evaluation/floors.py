"""The plainest things that could work: by scikit-learn, or the model that a recipe starts from as it is."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator
from sklearn.compose import make_column_transformer
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline, make_union
from sklearn.preprocessing import OneHotEncoder, OrdinalEncoder, StandardScaler

from runtimes import audio, wav
from training.contract import Array, Classes, Examples, Flags, Inputs, Rows
from training.errors import RecipeError
from training.evaluation import language
from training.models.generator import Generator
from training.models.spectrum import LogMel
from training.spec.floors import Logistic, Ngrams, Pixels, Spectrum
from training.spec.models import ModelSpec


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


def base(spec: ModelSpec, train: Examples, test: Examples) -> dict[str, Array]:
    """What a language model makes of the answers before it has learnt anything."""
    model = spec.build(Rows(train, test))
    if not isinstance(model, Generator):
        raise RecipeError("the floor 'base' is for language models: another model's head has learnt nothing before")
    return language.outputs(model.network, model.tokenizer, test)


def logistic(spec: Logistic, train: Examples, test: Examples, *, seed: int) -> dict[str, Array]:
    """`scores` [n, labels]."""
    return _fitted(
        train,
        test,
        OneHotEncoder(handle_unknown="ignore"),
        make_pipeline(SimpleImputer(strategy="median"), StandardScaler()),
        LogisticRegression(C=spec.c, max_iter=1000, random_state=seed),
    )


def boosting(train: Examples, test: Examples, *, seed: int) -> dict[str, Array]:
    """`scores` [n, labels]."""
    return _fitted(
        train,
        test,
        OrdinalEncoder(handle_unknown="use_encoded_value", unknown_value=np.nan),
        "passthrough",
        HistGradientBoostingClassifier(random_state=seed),
    )


def _fitted(
    train: Examples, test: Examples, categories: BaseEstimator, numbers: BaseEstimator | str, last: BaseEstimator
) -> dict[str, Array]:
    if not isinstance(train.targets, Classes) or "text" in train.inputs:
        raise RecipeError("the floors 'logistic' and 'boosting' are for tables with one label a row")
    columns = [*train.inputs.values()]
    named, counted = (
        [at for at, it in enumerate(columns) if (it.dtype == object) is wanted] for wanted in (True, False)
    )
    pipeline = make_pipeline(make_column_transformer((categories, named), (numbers, counted), sparse_threshold=0), last)
    pipeline.fit(_table(train.inputs), train.targets.index)
    return {"scores": pipeline.predict_proba(_table(test.inputs))}


def _table(inputs: Inputs) -> Array:
    return np.array([*inputs.values()], object).T


def pixels(spec: Pixels, train: Examples, test: Examples, *, seed: int) -> dict[str, Array]:
    """`scores` [n, labels] of logistic regression on pixels from 0 to 1."""
    if not isinstance(train.targets, Classes) or "image" not in train.inputs:
        raise RecipeError("the floor 'pixels' is for images with one label each")
    one, other = (np.asarray(part.inputs["image"]).reshape(len(part), -1) / 255 for part in (train, test))
    model = LogisticRegression(C=spec.c, max_iter=500, random_state=seed)
    model.fit(one, train.targets.index)
    return {"scores": model.predict_proba(other)}


def spectrum(spec: Spectrum, train: Examples, test: Examples, *, seed: int) -> dict[str, Array]:
    """`scores` [n, labels] of logistic regression on each sound's log-mel spectrum, time forgotten."""
    if not isinstance(train.targets, Classes) or "audio" not in train.inputs:
        raise RecipeError("the floor 'spectrum' is for sounds with one label each")
    rate_hz = wav.rate_hz(train.inputs["audio"][0])
    model = make_pipeline(StandardScaler(), LogisticRegression(C=spec.c, max_iter=1000, random_state=seed))
    model.fit(_statistics(spec, train, rate_hz), train.targets.index)
    return {"scores": model.predict_proba(_statistics(spec, test, rate_hz))}


def _statistics(spec: Spectrum, examples: Examples, rate_hz: int) -> Array:
    """[n, 2 · mels + 1]."""
    log_mel = LogMel(spec.mels, rate_hz=rate_hz)
    lines = []
    for content in examples.inputs["audio"]:
        sound = wav.read(content, rate_hz=rate_hz, samples_max=60 * rate_hz)
        fed = audio.window([sound], max(len(sound), log_mel.window))
        bands = log_mel.bands(torch.from_numpy(fed["samples"]))[0].numpy()
        lines.append(np.concatenate([bands.mean(1), bands.std(1), [np.log(len(sound))]]))
    return np.array(lines)
