"""Recipes as files: found, changed by settings, and known by a hash of all that decides what they make."""

from __future__ import annotations

import hashlib
import os
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from runtimes.artifact import Manifest, Shelf
from training.errors import RecipeError
from training.spec import Recipe
from training.spec.data import Images

RECIPES = Path(__file__).parent / "recipes"

# Part of every recipe's hash. Raise it when the same recipe would make a different artifact.
_EDITION = 3

ELSEWHERE = ("hf:", "sklearn:")
"""How data that is no file begins."""


def read(reference: str, settings: tuple[str, ...] = ()) -> Recipe:
    """The shipped recipe of that name, or the file at that path (TOML, or a run's `recipe.json`), with settings
    `section.field=value` on top."""
    path = RECIPES / f"{reference}.toml"
    if not path.is_file():
        path = Path(reference)
    if not path.is_file():
        raise RecipeError(f"there is no recipe {reference!r}; shipped are {', '.join(shipped())}; or name a file")
    try:
        text = path.read_text("utf-8")
        content = msgspec.json.decode(text, type=dict[str, Any]) if path.suffix == ".json" else tomllib.loads(text)
    except (tomllib.TOMLDecodeError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: {error}") from error
    _anchor(content, path.parent)
    for setting in settings:
        _set(content, setting)
    _anchor(content, Path.cwd())
    try:
        return msgspec.convert(content, Recipe)
    except msgspec.ValidationError as error:
        raise RecipeError(f"{path}: {error}") from error


def changed(recipe: Recipe, settings: dict[str, Any]) -> Recipe:
    """The same recipe with these fields, named as in `--set`. Raises RecipeError."""
    content = msgspec.to_builtins(recipe)
    for key, value in settings.items():
        _put(content, key, value)
    try:
        return msgspec.convert(content, Recipe)
    except msgspec.ValidationError as error:
        raise RecipeError(f"{', '.join(settings)}: {error}") from error


def shipped() -> list[str]:
    """Names of the recipes in the package."""
    return sorted(it.stem for it in RECIPES.glob("*.toml"))


def fingerprint(recipe: Recipe) -> str:
    """Hash of the recipe and of the data files' content, wherever they lie."""
    content = msgspec.to_builtins(recipe)
    del content["tuning"]  # it decides nothing of what a run makes
    for part, path in _files(content["data"]):
        found = _expanded(path, part)
        labels = Images.labels_of(found) if isinstance(recipe.data, Images) else None
        content["data"][part] = [_hash(part, Path(it)) for it in (found, labels) if it]
    return hashlib.sha256(msgspec.json.encode([_EDITION, content], order="deterministic")).hexdigest()


def with_files(recipe: Recipe) -> Recipe:
    """The same recipe, `$HEADRACE_DATA` in its paths replaced. Raises RecipeError if it is not set."""
    changes = {part: _expanded(path, part) for part, path in _files(msgspec.to_builtins(recipe.data))}
    return msgspec.structs.replace(recipe, data=msgspec.structs.replace(recipe.data, **changes))


def made(recipe: Recipe, shelf: Shelf) -> Manifest | None:
    """The promoted artifact of that name, if this recipe has been published already. It may be another version, then
    somebody moved the alias on purpose."""
    if not shelf.has(recipe.name) or "stable" not in shelf.aliases(recipe.name):
        return None
    wanted = fingerprint(recipe)
    published = (shelf.describe(f"{recipe.name}@{it}") for it in shelf.versions(recipe.name))
    if any(it.lineage.recipe_hash == wanted for it in published):
        return shelf.describe(recipe.name)
    return None


def _files(data: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Fields of a recipe's `data` that name a file or a folder, and what they say."""
    for part in ("train", "test", "path"):
        if isinstance(data.get(part), str) and not data[part].startswith(ELSEWHERE):
            yield part, data[part]


def _expanded(path: str, part: str) -> str:
    found = os.path.expandvars(path)
    if "$HEADRACE_DATA" in found:
        raise RecipeError(
            f"data.{part} is {path}: set HEADRACE_DATA to the folder of those data sets, or name a file of your own "
            f"with --set data.{part}=FILE"
        )
    return found


def _hash(part: str, path: Path) -> str:
    """Of a file's content, or of those below a folder and their names."""
    digest = hashlib.sha256()
    try:
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                digest.update(str(file.relative_to(path)).encode())
                digest.update(hashlib.sha256(file.read_bytes()).digest())
            elif not path.is_dir():
                raise FileNotFoundError(2, "there is no such file")
    except OSError as error:
        raise RecipeError(f"data.{part}: {path} cannot be read ({error.strerror})") from error
    return digest.hexdigest()


def _anchor(content: dict[str, Any], folder: Path) -> None:
    """Make the paths of the data files absolute; a path that is absolute already stays."""
    table = content.get("data")
    if isinstance(table, dict):
        for part, path in _files(table):
            if not path.startswith("$"):
                table[part] = str(folder / Path(path).expanduser())


def _set(content: dict[str, Any], setting: str) -> None:
    """Apply `a.b=value`. The value is TOML; what is not, is text, so that paths and names need no quotes."""
    key, equals, text = setting.partition("=")
    if not equals or not all(key.strip().split(".")):
        raise RecipeError(f"--set {setting!r}: write it as section.field=value")
    try:
        value = tomllib.loads(f"it = {text}")["it"]
    except tomllib.TOMLDecodeError:
        value = text
    _put(content, key.strip(), value)


def _put(content: dict[str, Any], key: str, value: Any) -> None:
    *sections, field = key.split(".")
    table = content
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise RecipeError(f"{key!r}: {section!r} is not a section")
    table[field] = value
