"""Tuning: on a part of the training rows, kept between calls, and honest about what it cannot do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest

from training import tuning
from training.contract import Rows
from training.errors import RecipeError
from training.spec import Recipe
from training.spec.data import Text

Make = Callable[..., Recipe]
SPACE = {"measure": "log_loss", "space": {"trainer.c": {"low": 0.01, "high": 100.0, "log": True}}}


def test_the_best_of_some_trials_is_found_and_the_trials_are_kept(classify: Make, tmp_path: Path) -> None:
    recipe = classify(tuning=SPACE)
    first = tuning.tune(recipe, tmp_path, trials=3)
    assert first.trials == 3
    assert 0.01 <= first.settings["trainer.c"] <= 100
    again = tuning.tune(recipe, tmp_path, trials=5)
    assert again.trials == 5
    assert again.value <= first.value
    assert tuning.tune(recipe, tmp_path, trials=5) == again


def test_the_test_rows_are_never_looked_at(classify: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = Text.load

    def blind(spec: Text) -> Rows:
        return msgspec.structs.replace(load(spec), test=load(spec).test.take(np.array([], np.int64)))

    monkeypatch.setattr(Text, "load", blind)
    assert tuning.tune(classify(tuning=SPACE), tmp_path, trials=1).trials == 1


def test_a_recipe_without_a_space_and_a_measure_that_is_none_are_refused(classify: Make, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"\[tuning\]"):
        tuning.tune(classify(), tmp_path, trials=1)
    with pytest.raises(RecipeError, match="such rows have accuracy"):
        tuning.tune(classify(tuning=SPACE | {"measure": "rmse"}), tmp_path, trials=1)
    with pytest.raises(RecipeError, match=r"trainer\.speed"):
        tuning.tune(classify(tuning=SPACE | {"space": {"trainer.speed": [1, 2]}}), tmp_path, trials=1)
