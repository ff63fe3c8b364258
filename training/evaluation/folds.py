"""Cross-validation: what a recipe makes of rows that it has not seen, for every row once."""

from __future__ import annotations

from functools import partial

import numpy as np

from training.contract import Array, Classes, Examples, Rows, Scores
from training.errors import RecipeError
from training.evaluation.measures import measure
from training.model import Model, predict
from training.run import Run
from training.spec import Recipe


def validate(recipe: Recipe, examples: Examples, run: Run) -> tuple[Scores, Scores]:
    """Means over the folds of every measure of the recipe's model, and of its floor: `folds_<measure>`. Each fold is a
    stage of its own."""
    assert recipe.folds is not None
    folds = stratified(examples, recipe.folds, seed=recipe.seed)
    found = [run.stage(f"fold-{at}", partial(_fold, recipe, examples, folds == at, run)) for at in range(recipe.folds)]
    return _mean([it[0] for it in found]), _mean([it[1] for it in found])


def stratified(examples: Examples, folds: int, *, seed: int) -> Array:
    """Fold of each row, int64 [n], with each class spread evenly where there are classes."""
    chance = np.random.default_rng(seed)
    order = chance.permutation(len(examples))
    if isinstance(examples.targets, Classes):
        order = order[np.argsort(examples.targets.index[order], kind="stable")]
    fold = np.empty(len(order), np.int64)
    fold[order] = np.arange(len(order)) % folds
    return fold


def _fold(recipe: Recipe, examples: Examples, held: Array, run: Run) -> tuple[Scores, Scores]:
    rows = Rows(examples.take(np.nonzero(~held)[0]), examples.take(np.nonzero(held)[0]))
    model = recipe.model.build(rows)
    if not isinstance(model, Model) or recipe.trainer is None:
        raise RecipeError("folds are for models that learn from rows")
    fitted = recipe.trainer.fit(model, rows.train, run)
    assert isinstance(fitted, Model)
    scores = measure(rows.test.targets, predict(fitted, rows.test.inputs))
    if recipe.floor is None:
        return scores, {}
    return scores, measure(
        rows.test.targets, recipe.floor.predict(rows.train, rows.test, model=recipe.model, seed=recipe.seed)
    )


def _mean(found: list[Scores]) -> Scores:
    return {f"folds_{name}": float(np.mean([it[name] for it in found])) for name in found[0]}
