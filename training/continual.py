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


def find(wanted: Recipe, shelf: Shelf, runs: Path) -> Base:
    """The recipe of the published artifact that this one goes on from, and its model as its run left it. Raises
    RecipeError if the run is gone, or if it is of another kind or another model."""
    assert wanted.continual is not None
    reference = wanted.continual.base
    manifest = shelf.describe(reference)
    folder = runs / f"{manifest.lineage.recipe}-{manifest.lineage.recipe_hash[:12]}"
    if not (folder / "run.json").exists():
        raise RecipeError(
            f"{reference} is {manifest.name}@{manifest.version}, and {folder}, where it was made, is not there: only "
            "its run has the weights that can learn on"
        )
    recipe = msgspec.json.decode((folder / "recipe.json").read_bytes(), type=Recipe)
    _require_alike(wanted, recipe, reference)
    return Base(recipe, Run(folder, seed=recipe.seed).product("train"))


def _require_alike(wanted: Recipe, base: Recipe, reference: str) -> None:
    """Raise RecipeError unless the base's model is the one that the recipe describes, for rows of its kind."""
    (data, model), (base_data, base_model) = (
        [msgspec.to_builtins(part) for part in (it.data, it.model)] for it in (wanted, base)
    )
    if data["kind"] != base_data["kind"]:
        raise RecipeError(
            f"--base {reference} learnt from {base_data['kind']!r}, and data.kind is {data['kind']!r}: go on from it "
            "with rows of its own kind"
        )
    for field in ("kind", *base_model, *model):
        if (said := model.get(field)) != (was := base_model.get(field)):
            raise RecipeError(
                f"--base goes on with the model as it is: model.{field} is {said!r}, and {was!r} in {reference}; leave "
                "it as it was, or start afresh without --base"
            )


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
    _require_joinable(old.train, new.train)
    new = _apart(old, new)
    count = min(len(old.train), round(replay * len(new.train)))
    kept = np.sort(np.random.default_rng(seed).permutation(len(old.train))[:count])
    notes = (*new.notes, f"{count} of {len(old.train)} old rows are learnt from again")
    train = _marked(old.train.take(kept), labels, "old").joined(_marked(new.train, labels, "new"))
    test = _marked(old.test, labels, "old").joined(_marked(new.test, labels, "new"))
    return Rows(train, test, notes)


def _require_joinable(old: Examples, new: Examples) -> None:
    """Raise DataError unless both have the same inputs."""
    for name in sorted({*old.inputs, *new.inputs}):
        was, there = (
            f"{it.inputs[name].dtype}{list(it.inputs[name].shape[1:]) or ''}" if name in it.inputs else "nothing"
            for it in (old, new)
        )
        if was != there:
            raise DataError(
                f"--base: its rows have {name!r} as {was}, the new ones as {there} (object: strings or files); give "
                "them the same columns, of the same kind and size"
            )


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
