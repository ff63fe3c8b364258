"""Cross-validation: what a recipe makes of rows that it has not seen, for every row once."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial

import numpy as np

from training.contract import Array, Classes, Examples, Rows, Scores, Targets
from training.errors import RecipeError
from training.evaluation import bootstrap
from training.evaluation.measures import measure, with_slices
from training.model import Model, finish, predict
from training.run import Run
from training.spec import Recipe
from training.spec.trainers import Frozen

LOG = logging.getLogger("training")

Outputs = dict[str, Array]


def validate(recipe: Recipe, examples: Examples, features: Mapping[str, Array], run: Run) -> tuple[Scores, Scores]:
    """Every measure of the recipe's model, and of its floor: `folds_<measure>`, mean over the folds, and
    `pooled_<measure>`, of all rows together. Each fold is a stage of its own. `features` are those of the rows, for a
    trainer that freezes a part of the model."""
    named = parted(recipe, examples)
    held = [*named.values()]
    found = [
        run.stage(f"fold-{name}", partial(_fold, recipe, examples, features, rows, run)) for name, rows in named.items()
    ]
    ours, floor = ([it[side] for it in found] for side in (0, 1))
    parts = _parts(examples, held, ours)
    for name, scores in zip(named, parts, strict=True):
        LOG.info("fold %s: %s", name, "  ".join(f"{it} {value:.4g}" for it, value in scores.items()))
    measured = _together(examples, held, ours, parts)
    if recipe.floor is None:
        return measured, {}
    _say_gain(examples, held, ours, floor, seed=recipe.seed)
    return measured, _together(examples, held, floor, _parts(examples, held, floor))


def parted(recipe: Recipe, examples: Examples) -> dict[str, Array]:
    """Fold → which rows are held out, int64. Raises RecipeError if they cannot be parted so."""
    return _by_value(examples, recipe.folds_by) if recipe.folds_by else _stratified(examples, recipe)


def _stratified(examples: Examples, recipe: Recipe) -> dict[str, Array]:
    assert recipe.folds is not None
    fold = stratified(examples.targets, recipe.folds, seed=recipe.seed)
    return {str(at): np.nonzero(fold == at)[0] for at in range(recipe.folds)}


def _by_value(examples: Examples, column: str) -> dict[str, Array]:
    if column not in examples.slices:
        have = ", ".join(examples.slices) or "none"
        raise RecipeError(f"folds_by is {column!r}, which is no slice of these rows; they have {have}")
    values = examples.slices[column]
    found = {str(value): np.nonzero(values == value)[0] for value in sorted(set(values))}
    if len(found) < 2:
        raise RecipeError(f"folds_by: all rows have the same {column}; two are needed, to learn from the one")
    return found


def stratified(targets: Targets, folds: int, *, seed: int) -> Array:
    """Fold of each row, int64 [n], with each class spread evenly where there are classes. Raises RecipeError if there
    are fewer rows than folds."""
    if folds > len(targets):
        raise RecipeError(f"folds is {folds}, and there are {len(targets)} rows: each fold needs one or more")
    chance = np.random.default_rng(seed)
    order = chance.permutation(len(targets))
    if isinstance(targets, Classes):
        order = order[np.argsort(targets.index[order], kind="stable")]
    fold = np.empty(len(order), np.int64)
    fold[order] = np.arange(len(order)) % folds
    return fold


def _fold(
    recipe: Recipe, examples: Examples, features: Mapping[str, Array], held: Array, run: Run
) -> tuple[Outputs, Outputs]:
    """Outputs for the held rows, of the recipe's model and of its floor."""
    rest = np.setdiff1d(np.arange(len(examples)), held)
    rows = Rows(examples.take(rest), examples.take(held))
    model = recipe.model.build(rows)
    trainer = recipe.trainer
    if not isinstance(model, Model) or trainer is None:
        raise RecipeError("folds are for models that learn from rows")
    if isinstance(trainer, Frozen):
        fitted = trainer.learn(model, {name: it[rest] for name, it in features.items()}, rows.train.targets)
        outputs = finish(fitted, {name: it[held] for name, it in features.items()})
    else:
        learnt = trainer.fit(model, rows.train, run)
        assert isinstance(learnt, Model)
        outputs = predict(learnt, rows.test.inputs)
    if recipe.floor is None:
        return outputs, {}
    return outputs, recipe.floor.predict(rows.train, rows.test, model=recipe.model, seed=recipe.seed)


def _parts(examples: Examples, held: list[Array], outputs: list[Outputs]) -> list[Scores]:
    """The measures of each fold."""
    return [measure(examples.targets.take(rows), it) for rows, it in zip(held, outputs, strict=True)]


def _together(examples: Examples, held: list[Array], outputs: list[Outputs], parts: list[Scores]) -> Scores:
    """Their means, and the measures of all rows at once."""
    everywhere = [name for name in parts[0] if all(name in it for it in parts)]
    means = {f"folds_{name}": float(np.mean([it[name] for it in parts])) for name in everywhere}
    pooled = with_slices(examples.take(np.concatenate(held)), _pooled(outputs))
    return means | {f"pooled_{name}": value for name, value in pooled.items()}


def _pooled(outputs: list[Outputs]) -> Outputs:
    return {name: np.concatenate([it[name] for it in outputs]) for name in outputs[0]}


def _say_gain(examples: Examples, held: list[Array], ours: list[Outputs], floor: list[Outputs], *, seed: int) -> None:
    """By how much the model is better than the floor on all rows, with intervals."""
    targets = examples.targets.take(np.concatenate(held))
    for name, (value, low, high) in bootstrap.differences(targets, _pooled(ours), _pooled(floor), seed=seed).items():
        LOG.info("folds: %s %+.4f on the floor, 95 %% interval %+.4f to %+.4f", name, value, low, high)
