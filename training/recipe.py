"""An artifact's life, from rows to shelf. START HERE: `make` is the whole story, one line per stage.

What the stages hand to each other is in `training.contract`, what a recipe may say in `training.spec`, and what is kept
of a run, so that a killed one goes on, in `training.run`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from runtimes.artifact import Artifact, Manifest, Shelf, verify
from runtimes.integrity import ShelfFault
from training.catalogue import fingerprint, with_files
from training.errors import DataError, RecipeError
from training.run import Run
from training.spec import Recipe
from training.spec.trainers import Frozen

if TYPE_CHECKING:
    from training.continual import Base
    from training.contract import Array, Graph, Rows, Scores, Weights
    from training.evaluation.scoring import Measured

LOG = logging.getLogger("training")


def run(
    recipe: Recipe,
    shelf: Shelf,
    runs: Path,
    *,
    resume: bool = False,
    start: str | None = None,
    workers: int = 1,
    ray: bool = False,
) -> Manifest:
    """Make the artifact in a folder of its own below `runs`: afresh, or going on after an interruption, or with what is
    there before the stage `start`. With several `workers`, that many processes train together, with `ray` Ray's."""
    recipe_hash = fingerprint(recipe)
    folder = Run(runs / f"{recipe.name}-{recipe_hash[:12]}", seed=recipe.seed)
    content = msgspec.json.format(msgspec.json.encode(recipe), indent=2)
    with folder.open(content, resume=resume, start=start) as opened:
        return make(with_files(recipe), recipe_hash, shelf, opened, workers=workers, ray=ray)


def make(recipe: Recipe, recipe_hash: str, shelf: Shelf, run: Run, *, workers: int = 1, ray: bool = False) -> Manifest:
    """Make the artifact, measure it, and if the gate holds publish it and move its alias `stable` to it.

    Promotion is part of it because the gate is what stands between an artifact and its users: on an empty shelf
    somebody has to be first, and later `rollback` undoes it in one step. Raises GateFailed, and then publishes nothing.
    """
    from training import continual, package, report
    from training.evaluation import exams, folds, gate, measures

    base = None if recipe.continual is None else continual.find(recipe, shelf, run.folder.parent)
    rows = _rows(recipe, base)
    rows_hash = rows.fingerprint
    _say(rows, rows_hash)
    if recipe.trainer is not None and not len(rows.train):
        raise DataError("there are no rows to train with: set data.train, or take the trainer out")
    if run.stage("data", lambda: rows_hash) != rows_hash:  # `hf:` names a set, not its rows
        raise DataError("the rows are not those that this run began with: start over, without --resume and --from")
    known = measures.names(rows.test) | {name for exam in recipe.exams for name in exams.measures(exam)}
    gate.check(recipe.gate, known)  # a typing error must not cost a run
    if _crossed(recipe):
        # Nor must what cannot be parted; inputs decide nothing of that, and to join them would read them all.
        train, test = (msgspec.structs.replace(it, inputs={}) for it in (rows.train, rows.test))
        folds.parted(recipe, train.joined(test))
    features = _features(recipe, rows, run, base)
    model = run.stage("train", lambda: _trained(recipe, rows, features, run, base, workers, ray))
    floor = run.stage("floor", lambda: _floor(recipe, rows))
    before = run.stage("before", lambda: _whole(recipe, recipe_hash, rows, model, run))
    product = model
    steps: dict[str, Scores] = {}
    for number, step in enumerate(recipe.compress, 1):
        product = run.stage(f"compress-{number}", partial(step.apply, product, rows, run))
        if number < len(recipe.compress):
            so_far = run.stage(
                f"effect-{number}", partial(_so_far, recipe, recipe_hash, rows, product, model, before, run)
            )
            steps[f"{number}: {type(step).__struct_config__.tag}"] = so_far.scores
    bundle = run.stage("package", lambda: _bundle(recipe, recipe_hash, rows, product, model, run, "bundle"))
    verify(bundle)
    after = run.stage("after", lambda: _after(bundle, before, rows, model, run, title="after"))
    marks = run.stage("exams", lambda: _exams(recipe, bundle, rows)) if recipe.exams else {}
    crossed, crossed_floor = folds.validate(recipe, rows.both, features, run) if _crossed(recipe) else ({}, {})
    evidence = gate.Evidence(
        before.scores,
        after.scores | crossed | marks,
        floor | crossed_floor,
        partial(_gain_on_stable, recipe, rows, after, cache(partial(_stable, recipe, shelf, rows, bundle, model))),
        steps,
    )
    findings = gate.findings(recipe.gate, evidence)
    report.write(run, recipe, rows, before, after, evidence, findings)
    gate.require(findings)
    manifest = shelf.publish(bundle.path, package.card(bundle.manifest, before.scores, after.scores | crossed | marks))
    shelf.promote(manifest.name, manifest.version)
    return manifest


def _say(rows: Rows, rows_hash: str) -> None:
    for note in rows.notes:
        LOG.info("data: %s", note)
    LOG.info("data: %d rows to train, %d to test, fingerprint %s", len(rows.train), len(rows.test), rows_hash)


def _rows(recipe: Recipe, base: Base | None) -> Rows:
    from training import continual

    rows = recipe.data.load()
    if base is None or recipe.continual is None:
        return rows
    return continual.mixed(rows, base, replay=recipe.continual.replay, seed=recipe.seed)


def _start(recipe: Recipe, rows: Rows, base: Base | None) -> Any:
    """The model that learns."""
    from training import continual

    return recipe.model.build(rows) if base is None else continual.start(base, rows)


def _crossed(recipe: Recipe) -> bool:
    """There are folds."""
    return bool(recipe.folds or recipe.folds_by)


def _features(recipe: Recipe, rows: Rows, run: Run, base: Base | None) -> Mapping[str, Array]:
    """What comes out of the frozen part of the model, of the training rows, and then of the test rows too if there are
    folds. Nothing for a trainer that freezes nothing."""
    from training.model import Model

    def make() -> Mapping[str, Array]:
        model = _start(recipe, rows, base)
        if not isinstance(model, Model):
            raise RecipeError(f"the trainer of {recipe.name} is for a model that can be frozen, and this one cannot")
        if model.augments:
            raise RecipeError(
                f"the trainer of {recipe.name} reads each row once, as it is: take out of the model what is to happen "
                "to rows by chance, or use trainer 'gradient'"
            )
        LOG.info("features: of the frozen part of the model")
        return model.frozen((rows.both if _crossed(recipe) else rows.train).inputs)

    return run.stage("features", make) if isinstance(recipe.trainer, Frozen) else {}


def _trained(
    recipe: Recipe, rows: Rows, features: Mapping[str, Array], run: Run, base: Base | None, workers: int, ray: bool
) -> Any:
    """The model that the recipe starts from, having learnt if it has a trainer."""
    together = workers > 1 or ray
    if together and base is not None:
        raise RecipeError("--workers, --ray and --base: an artifact is gone on from by one process")
    if together:
        from training import distributed

        return distributed.fit(recipe, run, workers=workers, ray=ray)
    model = _start(recipe, rows, base)
    if isinstance(recipe.trainer, Frozen):
        known = {name: it[: len(rows.train)] for name, it in features.items()}
        return recipe.trainer.learn(model, known, rows.train.targets)
    return model if recipe.trainer is None else recipe.trainer.fit(model, rows.train, run)


def _floor(recipe: Recipe, rows: Rows) -> dict[str, float]:
    from training.evaluation.measures import with_slices

    if recipe.floor is None:
        return {}
    outputs = recipe.floor.predict(rows.train, rows.test, model=recipe.model, seed=recipe.seed)
    found = with_slices(rows.test, outputs)
    LOG.info("floor: %s", "  ".join(f"{name} {value:.4g}" for name, value in found.items() if "[" not in name))
    return found


def _exams(recipe: Recipe, bundle: Artifact, rows: Rows) -> dict[str, float]:
    """What the bundle answers, beside what the recipe started from."""
    from training.evaluation import exams, scoring
    from training.models.generator import Generator

    base = recipe.model.build(rows)
    if bundle.manifest.task != "generate" or not isinstance(base, Generator):
        raise RecipeError("exams are for language models: leave them out")
    made = scoring.as_generator(bundle, base)
    scores: dict[str, float] = {}
    for exam in recipe.exams:
        with made.asked() as network:
            marks = exams.take(exam, network, made.tokenizer)
        scores |= exams.compare(exam, marks, exams.take(exam, base.network, base.tokenizer), seed=recipe.seed)
    return scores


def _whole(recipe: Recipe, recipe_hash: str, rows: Rows, model: Any, run: Run) -> Measured:
    """The model as trained, in fp32, through the runtime that serves its like. Nothing of a language model that is
    published as it was trained: it would be asked the same questions twice."""
    from training.evaluation import scoring
    from training.models.generator import Generator

    if isinstance(model, Generator) and not recipe.compress:
        return scoring.Measured({}, {})
    if isinstance(model, Generator):
        return scoring.score(model, rows.test, title="before")
    return scoring.score(_bundle(recipe, recipe_hash, rows, model, model, run, "whole"), rows.test, title="before")


def _bundle(
    recipe: Recipe, recipe_hash: str, rows: Rows, made: Graph | Weights | Any, model: Any, run: Run, where: str
) -> Artifact:
    from training import package
    from training.export import served

    return package.build(recipe, recipe_hash, rows, served(made), model, run.scratch(where))


def _so_far(
    recipe: Recipe, recipe_hash: str, rows: Rows, product: Any, model: Any, before: Measured, run: Run
) -> Measured:
    """What the compressions up to here have done, as if this were the end."""
    bundle = _bundle(recipe, recipe_hash, rows, product, model, run, "so-far")
    return _after(bundle, before, rows, model, run, title="so far")


def _after(bundle: Artifact, before: Measured, rows: Rows, model: Any, run: Run, *, title: str) -> Measured:
    """The bundle, and what it gained and lost by being made small."""
    from runtimes.artifact import open_folder
    from training.evaluation import scoring

    after = scoring.score(bundle, rows.test, title=title, base=model)
    if bundle.manifest.format == "onnx":
        whole = open_folder(run.folder / "whole")
        assert isinstance(whole, Artifact)
        after.scores["size_ratio"] = bundle.manifest.size_bytes / whole.manifest.size_bytes
        after.scores.update(scoring.speedups(whole, bundle, rows.test))
        if "left" in after.outputs:
            after.scores.update(scoring.closeness(after, before))
    return after


def _stable(recipe: Recipe, shelf: Shelf, rows: Rows, bundle: Artifact, model: Any) -> Measured | None:
    """What the promoted artifact makes of the same rows; None without one."""
    from training.evaluation import scoring

    try:
        stable = shelf.resolve(recipe.name)
    except ShelfFault:
        LOG.info("gate: nothing of the name %s is promoted yet, so there is nothing to compare with", recipe.name)
        return None
    if stable.manifest.version == bundle.manifest.version:
        stable = bundle  # the same files; if those on the shelf are damaged, these will put them right
    verify(stable)
    return scoring.score(stable, rows.test, title=f"stable, {stable.manifest.version}", base=model)


def _gain_on_stable(
    recipe: Recipe, rows: Rows, after: Measured, stable: Callable[[], Measured | None], name: str
) -> float | None:
    """By how much, at least, the bundle is better than the promoted artifact; None without one."""
    from training.evaluation import bootstrap, scoring

    old = stable()
    if old is None:
        return None
    measure, targets, new_outputs = scoring.sliced(name, rows.test, after.outputs)
    _, _, old_outputs = scoring.sliced(name, rows.test, old.outputs)
    value, low, high = bootstrap.difference(measure, targets, new_outputs, old_outputs, seed=recipe.seed)
    LOG.info("gate: %s %+.4f on what is promoted, 95 %% interval %+.4f to %+.4f", name, value, low, high)
    return low
