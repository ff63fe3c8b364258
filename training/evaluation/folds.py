"""Cross-validation: what a recipe makes of rows that it has not seen, for every row once."""

from __future__ import annotations

import logging
from functools import partial

import numpy as np

from training.contract import Array, Classes, Examples, Rows, Scores
from training.errors import RecipeError
from training.evaluation.measures import measure
from training.model import Model, predict
from training.run import Run
from training.spec import Recipe

LOG = logging.getLogger("training")


def validate(recipe: Recipe, examples: Examples, run: Run) -> tuple[Scores, Scores]:
    """Means over the folds of every measure of the recipe's model, and of its floor: `folds_<measure>`. Each fold is a
    stage of its own."""
    held = _by_value(examples, recipe.folds_by) if recipe.folds_by else _stratified(examples, recipe)
    found = [run.stage(f"fold-{name}", partial(_fold, recipe, examples, rows, run)) for name, rows in held.items()]
    for name, (scores, _) in zip(held, found, strict=True):
        LOG.info("fold %s: %s", name, "  ".join(f"{it} {value:.4g}" for it, value in scores.items()))
    return _mean([it[0] for it in found]), _mean([it[1] for it in found])


def _stratified(examples: Examples, recipe: Recipe) -> dict[str, Array]:
    """Fold → which rows are held out."""
    assert recipe.folds is not None
    folds = stratified(examples, recipe.folds, seed=recipe.seed)
    return {str(at): folds == at for at in range(recipe.folds)}


def _by_value(examples: Examples, column: str) -> dict[str, Array]:
    """Value → its rows, which are held out."""
    if column not in examples.slices:
        have = ", ".join(examples.slices) or "none"
        raise RecipeError(f"folds_by is {column!r}, which is no slice of these rows; they have {have}")
    values = examples.slices[column]
    found = {str(value): values == value for value in sorted(set(values))}
    if len(found) < 2:
        raise RecipeError(f"folds_by: all rows have the same {column}; two are needed, to learn from the one")
    return found


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
    scores = measure(rows.test.targets, predict(fitted, rows.test.inputs))
    if recipe.floor is None:
        return scores, {}
    return scores, measure(rows.test.targets, recipe.floor.predict(rows.train, rows.test, seed=recipe.seed))


def _mean(found: list[Scores]) -> Scores:
    return {f"folds_{name}": float(np.mean([it[name] for it in found])) for name in found[0]}
