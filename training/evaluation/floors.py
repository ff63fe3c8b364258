"""The plainest things that could work: by scikit-learn, or the model that a recipe starts from as it is."""

from __future__ import annotations

from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from training.contract import Array, Classes, Examples, Rows
from training.errors import RecipeError
from training.evaluation import language
from training.models.generator import Generator
from training.spec.floors import Ngrams
from training.spec.models import ModelSpec


def ngrams(spec: Ngrams, train: Examples, test: Examples, *, seed: int) -> dict[str, Array]:
    """`scores` [n, labels] of logistic regression on TF-IDF."""
    if not isinstance(train.targets, Classes) or "text" not in train.inputs:
        raise RecipeError("the floor 'ngrams' is for texts with one label each")
    vectors = TfidfVectorizer(
        analyzer=spec.unit, ngram_range=(spec.least, spec.most), sublinear_tf=True, lowercase=True
    )
    pipeline = make_pipeline(vectors, LogisticRegression(C=spec.c, max_iter=1000, random_state=seed))
    pipeline.fit(train.inputs["text"], train.targets.index)
    return {"scores": pipeline.predict_proba(test.inputs["text"])}


def base(spec: ModelSpec, train: Examples, test: Examples) -> dict[str, Array]:
    """What a language model makes of the answers before it has learnt anything."""
    model = spec.build(Rows(train, test))
    if not isinstance(model, Generator):
        raise RecipeError("the floor 'base' is for language models: another model's head has learnt nothing before")
    return language.outputs(model.network, model.tokenizer, test)
