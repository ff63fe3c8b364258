"""Learning on: a published artifact's own model goes on with new rows, and some old ones so that it forgets little.

A published graph cannot learn any more, so the model is taken from the run that made it; the old rows are read again
from where that run's recipe says. Test rows of both kinds are measured, together and as the slices `rows=old` and
`rows=new`.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from runtimes.artifact import Shelf
from training.catalogue import with_files
from training.contract import Classes, Examples, Rows, strings
from training.data import cleaning
from training.errors import DataError, RecipeError
from training.model import Model
from training.run import Run
from training.spec import Recipe

LOG = logging.getLogger("training")

SLICE = "rows"


class Base(msgspec.Struct, frozen=True):
    """What is gone on from."""

    recipe: Recipe
    model: Any


def find(reference: str, shelf: Shelf, runs: Path) -> Base:
    """The recipe of a published artifact, and its model as its run left it. Raises RecipeError if the run is gone."""
    manifest = shelf.describe(reference)
    folder = runs / f"{manifest.lineage.recipe}-{manifest.lineage.recipe_hash[:12]}"
    if not (folder / "run.json").exists():
        raise RecipeError(
            f"{reference} is {manifest.name}@{manifest.version}, and {folder}, where it was made, is not there: only "
            "its run has the weights that can learn on"
        )
    recipe = msgspec.json.decode((folder / "recipe.json").read_bytes(), type=Recipe)
    return Base(recipe, Run(folder, seed=recipe.seed).product("train"))


def start(base: Base, rows: Rows) -> Model:
    """The base's model, ready to learn from these rows."""
    assert isinstance(rows.train.targets, Classes)
    model: Model = base.model
    model.relabel(rows.train.targets.labels)
    return model


def mixed(new: Rows, base: Base, *, replay: float, seed: int) -> Rows:
    """The new rows, and of the old ones `replay` for each new one to learn from and all to measure with. What is new
    in one part and old in the other is left out: nothing is measured with what was learnt from, now or by the base."""
    old = with_files(base.recipe).data.load()
    labels = _labels(old, new)
    new = _apart(old, new)
    count = min(len(old.train), round(replay * len(new.train)))
    kept = np.sort(np.random.default_rng(seed).permutation(len(old.train))[:count])
    notes = (*new.notes, f"{count} of {len(old.train)} old rows are learnt from again")
    train = _marked(old.train.take(kept), labels, "old").joined(_marked(new.train, labels, "new"))
    test = _marked(old.test, labels, "old").joined(_marked(new.test, labels, "new"))
    return Rows(train, test, notes)


def _apart(old: Rows, new: Rows) -> Rows:
    """Of the new rows those to learn from that the base is not measured with, and those to measure with that it has not
    learnt from. Raises DataError if a part is empty then."""
    train, tested = (cleaning.without(one, other) for one, other in ((new.train, old.test), (new.test, old.train)))
    notes = []
    if known := len(new.train) - len(train):
        notes.append(f"{known} new training rows are also in the base's test part and were left out")
    if known := len(new.test) - len(tested):
        notes.append(f"{known} new test rows were learnt from by the base and were left out")
    for title, part in (("train", train), ("test", tested)):
        if not len(part):
            raise DataError(f"--base: there are no new rows to {title} with: {'; '.join(notes)}")
    return Rows(train, tested, (*new.notes, *notes))


def _labels(old: Rows, new: Rows) -> tuple[str, ...]:
    """Those of the old rows as they were, then what is new: a model's columns keep their meaning."""
    if not isinstance(old.train.targets, Classes) or not isinstance(new.train.targets, Classes):
        raise RecipeError("--base: only a model of rows with one label each can learn on")
    known = old.train.targets.labels
    return (*known, *(it for it in new.train.targets.labels if it not in known))


def _marked(examples: Examples, labels: tuple[str, ...], kind: str) -> Examples:
    """The same rows by those labels, and a slice that says which kind they are."""
    assert isinstance(examples.targets, Classes)
    place = np.array([labels.index(it) for it in examples.targets.labels], np.int64)
    return Examples(
        examples.inputs,
        Classes(place[examples.targets.index], labels),
        {SLICE: strings([kind] * len(examples))},
    )
