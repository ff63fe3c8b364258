"""Classifiers that may refuse: data, measures, a whole run, and what a client is answered."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from sklearn import metrics

from runtimes.artifact import Manifest, Shelf
from runtimes.clock import SystemClock
from runtimes.contract import InferRequest, Site
from runtimes.onnx import Onnx
from training import recipe as recipes
from training.contract import Scoped, strings
from training.errors import DataError, RecipeError
from training.evaluation import scope
from training.spec import Recipe
from training.spec.data import Text

Make = Callable[..., Recipe]

OUTSIDE = ("help", "please", "help me", "please help", "help please")


SCOPED = {"kind": "scoped-encoder", "package": "tiny-base", "licence": "none", "tokens_max": 16}


@pytest.fixture
def scoped(classify: Make, tmp_path: Path) -> Recipe:
    """20 rows of two labels, and some that have none."""
    words = ("yet", "not", "has", "the", "order", "arrived")
    rows = [
        *(f"where is my parcel {word},delivery" for word in words),
        *(f"card payment declined {word},payment" for word in words),
        *(f"{text},none" for text in OUTSIDE),
    ]
    train, test = tmp_path / "train.csv", tmp_path / "test.csv"
    train.write_text("text,label\n" + "\n".join(rows))
    test.write_text(
        "text,label\nwhere is my parcel twice,delivery\nwhere is parcel,delivery\ncard payment declined twice,payment\n"
        "payment declined,payment\nplease please,none\nhelp help,none\nhelp please me,none\n"
    )
    return classify(
        data={"train": str(train), "test": str(test), "outside": "none"},
        model=SCOPED,
        trainer={"kind": "reject", "folds": 2},
        gate={"auroc_min": 0.5, "batch_drift_max": 1e-3},
    )


def test_the_label_outside_is_the_last_one(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("text,label,split\na,z,train\nb,none,train\nc,a,train\nd,none,test\ne,a,test\n")
    targets = Text(train=str(file), outside="none").load().train.targets
    assert isinstance(targets, Scoped)
    assert targets.labels == ("a", "z", "none")
    assert targets.inside.tolist() == [True, False, True]


def test_a_part_without_rows_outside_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("text,label,split\na,z,train\nb,none,train\nc,a,train\ne,a,test\n")
    with pytest.raises(DataError, match=r"rows\.csv has no row to test with that has the label 'none'"):
        Text(train=str(file), outside="none").load()


def test_a_row_is_refused_when_no_label_is_preferred_to_refusing() -> None:
    scores = np.array([[0.6, 0.1, 0.3], [0.1, 0.6, 0.3], [0.3, 0.1, 0.6], [0.2, 0.2, 0.6], [0.5, 0.1, 0.4]])
    targets = Scoped(np.array([0, 0, 0, 2, 2]), ("a", "b", "none"), outside="none", recall=0.8)
    found = scope.scope(targets, scores)
    assert found["inside"] == pytest.approx(1 / 3)  # right; wrong; right, but refused
    assert found["outside_recall"] == pytest.approx(1 / 2)
    known = scope.known(scores)
    assert found["auroc"] == pytest.approx(metrics.roc_auc_score([1, 1, 1, 0, 0], known))


def test_halves_cost_nothing_where_the_threshold_is_right_already() -> None:
    chance = np.random.default_rng(0)
    inside = np.arange(400) < 300
    best = np.where(inside, 0.9, 0.1) + chance.uniform(-0.05, 0.05, 400)
    scores = np.stack([best, 1 - best], 1)
    found = scope.scope(Scoped(np.where(inside, 0, 1), ("a", "none"), outside="none", recall=0.8), scores)
    assert (found["inside"], found["outside_recall"], found["auroc"]) == (1, 1, 1)
    assert found["half_inside"] == 1
    assert 0.9 < found["half_outside_recall"] <= 1


def test_every_threshold_is_in_the_tradeoff() -> None:
    scores = np.array([[0.9, 0.1], [0.7, 0.3], [0.4, 0.6]])
    curve = scope.tradeoff(Scoped(np.array([0, 0, 1]), ("a", "none"), outside="none", recall=0.8), scores)
    assert curve.tolist() == [[1, 0], [1, 1], [0.5, 1]]


def test_what_no_label_fits_is_answered_with_the_label_outside(scoped: Recipe, tmp_path: Path) -> None:
    shelf = Shelf(tmp_path / "shelf")
    manifest = recipes.run(scoped, shelf, tmp_path / "runs")
    assert manifest.labels == ("delivery", "payment", "none")
    assert manifest.after["auroc"] == 1
    labels, known, scores = _ask(shelf, manifest, ["where is my parcel", "payment declined", "help help", "help"])
    assert labels[:2] == ["delivery", "payment"]
    assert "none" in labels[2:]
    assert [label == "none" for label in labels] == (known[:, 0] < 0.5).tolist()
    assert scores.sum(1) == pytest.approx(1)


def test_the_trainer_needs_to_know_what_is_outside(classify: Make, tmp_path: Path) -> None:
    for changes in ({"model": SCOPED}, {"trainer": {"kind": "reject"}}):
        with pytest.raises(RecipeError, match=r"data\.outside"):
            recipes.run(classify(**changes), Shelf(tmp_path / "shelf"), tmp_path / "runs")


def _ask(shelf: Shelf, manifest: Manifest, texts: list[str]) -> tuple[list[str], np.ndarray, np.ndarray]:
    """What the runtime answers as the gateway would have it."""

    async def ask() -> tuple[list[str], np.ndarray, np.ndarray]:
        site = Site(model=manifest.name, replica="here", state=shelf.root, shelf=shelf)
        runtime = Onnx(artifact=manifest.name, provider="cpu").build(site)
        await runtime.open()
        reply = await runtime.infer(InferRequest({"text": strings(texts)}, deadline_s=SystemClock().now_s() + 60))
        await runtime.aclose()
        return list(reply.outputs["label"]), reply.outputs["known"], reply.outputs["scores"]

    return asyncio.run(ask())
