"""Encoders made smaller and trained on: what is left, what that answers, and that it can be interrupted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from runtimes.artifact import Shelf
from training import recipe as recipes
from training.compression import distill, prune
from training.contract import Array, Graph, Rows
from training.errors import Interrupted, RecipeError
from training.export import export
from training.model import predict
from training.models.encoder import Classifier
from training.run import Run
from training.spec import Recipe
from training.spec.compression import Distill, PruneStructure, PruneWeights
from training.spec.trainers import Gradient, Probe

Make = Callable[..., Recipe]
LEARN = Gradient(epochs=20, rate=2e-3, batch=4)
STAY = Gradient(epochs=1, rate=1e-12, batch=4)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path, seed=0)


@pytest.fixture
def rows(classify: Make) -> Rows:
    return classify().data.load()


@pytest.fixture
def teacher(classify: Make, rows: Rows, run: Run) -> Classifier:
    torch.manual_seed(0)
    model = Probe().fit(classify().model.build(rows), rows.train, run)
    assert isinstance(model, Classifier)
    return model


def logits(model: Classifier, rows: Rows) -> Array:
    return predict(model, rows.train.inputs)["logits"]


def embeddings(model: Classifier, rows: Rows) -> Array:
    return predict(model.embedder, rows.train.inputs)["embedding"]


def test_a_student_has_the_layers_it_was_given_and_comes_closer(teacher: Classifier, rows: Rows, run: Run) -> None:
    with torch.no_grad():  # untrained, a layer hardly changes what goes through it, and would not be missed
        for parameter in teacher.embedder.encoder.encoder.layer[0].parameters():
            parameter += torch.randn_like(parameter) / 4
    fresh = distill.distill(Distill(trainer=STAY, layers=(1,)), teacher, rows, run)
    taught = distill.distill(Distill(trainer=LEARN, layers=(1,)), teacher, rows, run)
    kept = [it.attention.self.query.out_features for it in taught.embedder.encoder.encoder.layer]
    assert kept == [32]
    wanted = embeddings(teacher, rows)
    [before, after] = [(embeddings(it, rows) * wanted).sum(1).mean() for it in (fresh, taught)]
    assert after > before
    assert (logits(taught, rows).argmax(1) == rows.train.targets.index).mean() > 0.9  # type: ignore[attr-defined]


def test_teaching_leaves_the_teacher_as_it_was(teacher: Classifier, rows: Rows, run: Run) -> None:
    before = logits(teacher, rows)
    distill.distill(Distill(trainer=LEARN, layers=(0,)), teacher, rows, run)
    np.testing.assert_array_equal(logits(teacher, rows), before)


def test_a_layer_that_the_teacher_lacks_is_named(teacher: Classifier, rows: Rows, run: Run) -> None:
    with pytest.raises(RecipeError, match="has 5; the teacher's layers are 0 to 1"):
        distill.distill(Distill(trainer=LEARN, layers=(1, 5)), teacher, rows, run)


def test_as_many_weights_as_asked_are_zero_and_the_others_learn(teacher: Classifier, rows: Rows, run: Run) -> None:
    pruned = prune.weights(PruneWeights(trainer=LEARN, share=0.75), teacher, rows, run)
    for mine, old in zip(linear(pruned), linear(teacher), strict=True):
        gone = mine.weight == 0
        assert gone.float().mean() == pytest.approx(0.75, abs=0.01)
        assert (old.weight[gone].abs().max() <= old.weight[~gone].abs().min()).item()
        assert not torch.equal(mine.weight[~gone], old.weight[~gone])


def linear(model: Classifier | torch.nn.Module) -> list[torch.nn.Linear]:
    layers = model.embedder.encoder.encoder.layer
    return [it for it in layers.modules() if isinstance(it, torch.nn.Linear)]


def test_without_the_parts_that_did_nothing_the_answers_are_the_same(teacher: Classifier, rows: Rows, run: Run) -> None:
    with torch.no_grad():
        for layer in teacher.embedder.encoder.encoder.layer:
            layer.attention.output.dense.weight[:, :16] = 0  # the first of two heads
            layer.output.dense.weight[:, ::2] = 0
    small = prune.structure(PruneStructure(trainer=STAY, heads=0.5, columns=0.5), teacher, rows, run)
    assert isinstance(small, Classifier)
    assert [tuple(it.weight.shape) for it in linear(small)[:6]] == [
        *[(16, 32)] * 3, (32, 16), (32, 32), (32, 32),
    ]  # fmt: skip
    np.testing.assert_allclose(logits(small, rows), logits(teacher, rows), atol=1e-5)


def test_what_is_left_becomes_a_smaller_graph(teacher: Classifier, rows: Rows, run: Run) -> None:
    small = prune.structure(PruneStructure(trainer=LEARN), teacher, rows, run)
    [less, more] = [export(it) for it in (small, teacher)]
    assert isinstance(less, Graph)
    assert len(less.content) < len(more.content)


def test_a_distillation_that_was_interrupted_ends_with_the_same_bytes(
    classify: Make, tmp_path: Path, stop_at_the_third: Callable[[], list[int]]
) -> None:
    step = {"kind": "distill", "layers": [1], "trainer": {"epochs": 3, "rate": 1e-3, "batch": 4, "checkpoint_s": 1e-9}}
    recipe = classify(compress=[step, {"kind": "int8-dynamic"}], gate={"accuracy_min": 0.0})
    whole = recipes.run(recipe, Shelf(tmp_path / "one"), tmp_path / "runs")
    saved = stop_at_the_third()
    with pytest.raises(Interrupted, match="compress-1"):
        recipes.run(recipe, Shelf(tmp_path / "two"), tmp_path / "others")
    again = recipes.run(recipe, Shelf(tmp_path / "two"), tmp_path / "others", resume=True)
    assert saved[:4] == [1, 2, 3, 4]
    assert again.files == whole.files
    [page] = (tmp_path / "others").glob("tiny-*/report.html")
    assert "<th>1: distill</th>" in page.read_text()  # what it did is measured before the next one


@pytest.mark.parametrize("kind", ["distill", "prune-weights", "prune-structure"])
def test_what_has_no_layers_is_refused(classify: Make, tmp_path: Path, kind: str) -> None:
    recipe = classify(
        model={"kind": "ngrams"},
        trainer={"kind": "logistic"},
        compress=[{"kind": kind, "trainer": msgspec.to_builtins(LEARN)}],
        gate={"accuracy_min": 0.0},
    )
    with pytest.raises(RecipeError, match="encoder"):
        recipes.run(recipe, Shelf(tmp_path / "shelf"), tmp_path / "runs")
