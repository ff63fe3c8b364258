"""Hyper-parameters, by Optuna: each trial learns from one part of the training rows and is measured with the rest."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import optuna

from training.catalogue import changed, fingerprint, with_files
from training.contract import Examples, Rows
from training.errors import Diverged, RecipeError
from training.evaluation.measures import LESS_IS_BETTER, MEASURES, kind, measure
from training.model import Model, predict
from training.run import Run
from training.spec import Recipe
from training.spec.tuning import Range

LOG = logging.getLogger("training")


class Best(msgspec.Struct, frozen=True):
    """The best trial."""

    settings: dict[str, Any]
    """Field → value."""
    value: float
    trials: int


def tune(recipe: Recipe, runs: Path, *, trials: int) -> Best:
    """Try until there are so many trials of this recipe, those of earlier calls included; they are kept in `runs`."""
    if recipe.tuning is None:
        raise RecipeError(
            "this recipe says nothing about tuning: give it a [tuning] table, see training/spec/tuning.py"
        )
    spec = recipe.tuning
    rows = with_files(recipe).data.load()
    if spec.measure not in MEASURES[kind(rows.train.targets)]:
        known = ", ".join(MEASURES[kind(rows.train.targets)])
        raise RecipeError(f"tuning.measure is {spec.measure!r}; such rows have {known}")
    parts = _parts(rows.train, spec.held, seed=recipe.seed)
    folder = runs / f"{recipe.name}-{fingerprint(recipe)[:12]}-tuning"
    folder.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        storage=f"sqlite:///{folder}/trials.db",
        study_name=recipe.name,
        load_if_exists=True,
        direction="minimize" if spec.measure in LESS_IS_BETTER else "maximize",
        sampler=optuna.samplers.TPESampler(seed=recipe.seed),
    )
    finished = [it for it in study.trials if it.state.is_finished()]
    study.optimize(_objective(recipe, parts, folder), n_trials=max(0, trials - len(finished)))
    return Best(study.best_params, study.best_value, len(study.trials))


def _objective(recipe: Recipe, parts: Rows, folder: Path) -> Callable[[optuna.Trial], float]:
    assert recipe.tuning is not None
    spec = recipe.tuning

    def objective(trial: optuna.Trial) -> float:
        tried = changed(recipe, {field: _drawn(trial, field, space) for field, space in spec.space.items()})
        run = Run(folder / "trial", seed=recipe.seed)
        with run.open(msgspec.json.encode(tried)):
            try:
                model = run.stage("train", lambda: _fitted(tried, parts, run))
            except Diverged as error:
                LOG.info("tune: trial %d: %s", trial.number, error)
                raise optuna.TrialPruned from None
        found = measure(parts.test.targets, predict(model, parts.test.inputs))[spec.measure]
        LOG.info("tune: trial %d: %s %.4f with %s", trial.number, spec.measure, found, trial.params)
        return found

    return objective


def _fitted(recipe: Recipe, parts: Rows, run: Run) -> Model:
    model = recipe.model.build(parts)
    if not isinstance(model, Model) or recipe.trainer is None:
        raise RecipeError("only models that learn from rows can be tuned")
    fitted = recipe.trainer.fit(model, parts.train, run)
    assert isinstance(fitted, Model)
    return fitted


def _drawn(trial: optuna.Trial, field: str, space: Range | list[Any]) -> Any:
    if isinstance(space, list):
        return trial.suggest_categorical(field, space)
    if isinstance(space.low, int) and isinstance(space.high, int):
        return trial.suggest_int(field, space.low, space.high, log=space.log)
    return trial.suggest_float(field, space.low, space.high, log=space.log)


def _parts(examples: Examples, held: float, *, seed: int) -> Rows:
    order = np.random.default_rng(seed).permutation(len(examples))
    count = max(1, round(held * len(examples)))
    return Rows(examples.take(np.sort(order[count:])), examples.take(np.sort(order[:count])))
