"""An artifact's life, from rows to shelf. START HERE: `run` is the whole story, one line per stage."""

from __future__ import annotations

import hashlib
import tempfile
import tomllib
from pathlib import Path
from typing import Any

import msgspec

from runtimes.artifact import Manifest, Shelf
from training.spec import Recipe

RECIPES = Path(__file__).parent / "recipes"

# Part of every recipe's hash. Raise it when the same recipe would make a different artifact.
_EDITION = 2


def run(recipe: Recipe, shelf: Shelf) -> Manifest:
    """Make the artifact, measure it, and if the gate holds publish it and move its alias `stable` to it.

    Promotion is part of it because the gate is what stands between an artifact and its users: on an empty shelf
    somebody has to be first, and later `rollback` undoes it in one step. Raises GateFailed, and then publishes nothing.
    """
    from training import data, evaluation, model, package, quantization, trainer

    evaluation.check(recipe.gate, recipe.task)  # a typing error must not cost a training run
    rows = data.load(recipe.data, recipe.task)
    base = model.load(recipe.base, recipe.task, seed=recipe.seed)
    trained = trainer.fit(recipe.trainer, base, rows.train)
    before = evaluation.score(trained, rows.test)
    small = quantization.quantize(recipe.quantization, trained)
    with tempfile.TemporaryDirectory(prefix="headrace-train-") as folder:
        bundle = package.build(recipe, fingerprint(recipe), rows, trained, small, Path(folder))
        after = evaluation.score(bundle, rows.test, reference=trained)
        evaluation.require(recipe.gate, before, after)
        manifest = shelf.publish(bundle.path, package.card(bundle.manifest, before, after))
    shelf.promote(manifest.name, manifest.version)
    return manifest


def read(reference: str, settings: tuple[str, ...] = ()) -> Recipe:
    """The shipped recipe of that name, or the TOML file at that path, with `section.field=value` settings on top."""
    path = RECIPES / f"{reference}.toml"
    if not path.is_file():
        path = Path(reference)
    if not path.is_file():
        raise RecipeError(f"there is no recipe {reference!r}; shipped are {', '.join(shipped())}; or name a TOML file")
    try:
        content = tomllib.loads(path.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: {error}") from error
    _anchor(content, path.parent)
    for setting in settings:
        _set(content, setting)
    _anchor(content, Path.cwd())
    try:
        return msgspec.convert(content, Recipe)
    except msgspec.ValidationError as error:
        raise RecipeError(f"{path}: {error}") from error


def shipped() -> list[str]:
    """Names of the recipes in the package."""
    return sorted(it.stem for it in RECIPES.glob("*.toml"))


def fingerprint(recipe: Recipe) -> str:
    """Hash of the recipe and of the data files' content, wherever they lie."""
    content = msgspec.to_builtins(recipe)
    for part in ("train", "test"):
        if path := content["data"][part]:
            try:
                content["data"][part] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
            except OSError as error:
                raise RecipeError(f"data.{part}: {path} cannot be read ({error.strerror})") from error
    return hashlib.sha256(msgspec.json.encode([_EDITION, content], order="deterministic")).hexdigest()


def made(recipe: Recipe, shelf: Shelf) -> Manifest | None:
    """The promoted artifact of that name, if this recipe has been published already. It may be another version, then
    somebody moved the alias on purpose."""
    if recipe.name not in shelf.names() or "stable" not in shelf.aliases(recipe.name):
        return None
    wanted = fingerprint(recipe)
    published = (shelf.resolve(f"{recipe.name}@{it}").manifest for it in shelf.versions(recipe.name))
    if any(it.lineage.recipe_hash == wanted for it in published):
        return shelf.resolve(recipe.name).manifest
    return None


class GateFailed(Exception):
    """The bundle is not good enough, and was not published. The message says by which measure."""


class RecipeError(ValueError):
    """The recipe, or a file that it names, cannot be used. The message says where and why."""


def _anchor(content: dict[str, Any], folder: Path) -> None:
    """Make the paths of the data files absolute; a path that is absolute already stays."""
    table = content.get("data")
    for part in ("train", "test"):
        if isinstance(table, dict) and isinstance(table.get(part), str):
            table[part] = str(folder / Path(table[part]).expanduser())


def _set(content: dict[str, Any], setting: str) -> None:
    """Apply `a.b=value`. The value is TOML; what is not, is text, so that paths and names need no quotes."""
    key, equals, text = setting.partition("=")
    *sections, field = key.strip().split(".")
    if not equals or not all([*sections, field]):
        raise RecipeError(f"--set {setting!r}: write it as section.field=value")
    try:
        value = tomllib.loads(f"it = {text}")["it"]
    except tomllib.TOMLDecodeError:
        value = text
    table = content
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise RecipeError(f"--set {setting!r}: {section!r} is not a section")
    table[field] = value
