"""N-grams as one graph: the same numbers as scikit-learn's, on what a caller sends."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from runtimes.artifact import Shelf
from training import recipe as recipes
from training.contract import Array, Classes, Examples, Rows, strings
from training.evaluation import scoring
from training.export import export
from training.models.bag import Bag
from training.spec import Recipe
from training.spec.models import Ngrams
from training.spec.trainers import Logistic

Make = Callable[..., Recipe]

TEXTS = [
    "Where is my parcel, my PARCEL?", "the order has  not arrived\tyet", "Card payment declined twice, twice, twice",
    "please pay", "ça coûte 12 € à l'été", "这家酒店很好 很好很好", "酒店太差了，不好", "a b c",
    "order order pay the card",
]  # fmt: skip
NEW = [*TEXTS, "酒", "good", "?", "never seen words 很差 before", "PAY the  card twice\n\n\nplease", "x" * 40]
UNITS = [("word", 1, 1), ("word", 1, 2), ("word", 2, 3), ("char", 1, 1), ("char", 1, 3), ("char", 2, 4)]


def rows(texts: list[str], classes: int) -> Rows:
    labels = tuple("abc"[:classes])
    part = Examples({"text": strings(texts)}, Classes(np.arange(len(texts)) % classes, labels))
    return Rows(part, part)


def asked(model: Bag, texts: list[str], output: str) -> Array:
    """What ONNX Runtime says of them, all at once."""
    session = onnxruntime.InferenceSession(export(model).content, providers=["CPUExecutionProvider"])
    ids, mask = (it.numpy() for it in model.feed({"text": strings(texts)}))
    [found] = session.run([output], {"input_ids": ids, "attention_mask": mask})
    return np.asarray(found)


@pytest.mark.parametrize(("unit", "least", "most"), UNITS)
@pytest.mark.parametrize("classes", [2, 3])
def test_scores_are_those_of_scikit_learn(unit: str, least: int, most: int, classes: int) -> None:
    given = rows(TEXTS, classes)
    model = Ngrams(unit=unit, least=least, most=most, tokens_max=64).build(given)  # type: ignore[arg-type]
    assert isinstance(model, Bag)
    Logistic(c=3.0).fit(model, given.train, run=None)  # type: ignore[arg-type]
    peer = make_pipeline(
        TfidfVectorizer(analyzer=unit, ngram_range=(least, most), sublinear_tf=True),
        LogisticRegression(C=3.0, tol=1e-8),
    )
    assert isinstance(given.train.targets, Classes)
    peer.fit(TEXTS, given.train.targets.index)
    assert len(model.tfidf.pool) == len(peer[0].vocabulary_)
    np.testing.assert_allclose(asked(model, NEW, "scores"), peer.predict_proba(NEW), atol=2e-4)


@pytest.mark.parametrize(("unit", "least", "most"), UNITS)
def test_the_graph_counts_as_torch_does(unit: str, least: int, most: int) -> None:
    model = Ngrams(unit=unit, least=least, most=most, rows_min=1, tokens_max=64).build(rows(TEXTS, 2))  # type: ignore[arg-type]
    want = model(*model.feed({"text": strings(NEW)}))[1].detach().numpy()
    np.testing.assert_allclose(asked(model, NEW, "logits"), want, atol=1e-6)


def test_rare_n_grams_are_left_out() -> None:
    model = Ngrams(unit="word", most=1, rows_min=2).build(rows(["one two", "two three", "four two"], 2))
    assert isinstance(model, Bag)
    assert [[model.tokenizer.id_to_token(it) for it in gram] for gram in model.tfidf.pool] == [["two"]]


def test_rows_leave_each_other_alone() -> None:
    model = Ngrams(unit="char", most=3).build(rows(TEXTS, 2))
    together = asked(model, NEW, "logits")
    for text, answer in zip(NEW, together, strict=True):
        np.testing.assert_allclose(asked(model, [text], "logits")[0], answer, atol=1e-6)


def test_a_caller_sends_text_and_is_answered_with_a_label(classify: Make, tmp_path: Path) -> None:
    recipe = classify(
        model={"kind": "ngrams", "unit": "char", "most": 3},
        trainer={"kind": "logistic"},
        compress=[],
        gate={"accuracy_min": 0.9},
    )
    shelf = Shelf(tmp_path / "shelf")
    manifest = recipes.run(recipe, shelf, tmp_path / "runs")
    assert (manifest.task, manifest.lineage.base, manifest.pooling) == ("classify", "", None)
    answers = scoring.served(shelf.resolve("tiny"), {"text": strings(["where is my parcel", "card declined", "?"])})
    assert [*answers["label"]][:2] == ["delivery", "payment"]
    assert np.isfinite(answers["scores"]).all()
