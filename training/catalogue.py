"""Recipes as files: found, changed by settings, and known by a hash of all that decides what they make."""

from __future__ import annotations

import hashlib
import os
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from runtimes.artifact import Manifest, Shelf
from training.errors import RecipeError
from training.spec import Recipe
from training.spec.data import Data, Images

RECIPES = Path(__file__).parent / "recipes"

# Part of every recipe's hash. Raise it when the same recipe would make a different artifact.
_EDITION = 5

_FILES = ("train", "test", "path", "file")
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

    def hashed(part: str, path: str) -> str:
        found = expanded(path, part)
        labels = Images.labels_of(found) if isinstance(recipe.data, Images) else None
        return "".join(_hash(part, Path(it)) for it in (found, labels) if it)

    content["data"] = _changed(content["data"], hashed)
    return hashlib.sha256(msgspec.json.encode([_EDITION, content], order="deterministic")).hexdigest()


def with_files(recipe: Recipe) -> Recipe:
    """The same recipe, `$HEADRACE_DATA` in its paths replaced. Raises RecipeError if it is not set."""
    content = _changed(msgspec.to_builtins(recipe.data), lambda part, path: expanded(path, part))
    return msgspec.structs.replace(recipe, data=msgspec.convert(content, Data))


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


def _changed(data: dict[str, Any], change: Callable[[str, str], str], prefix: str = "") -> dict[str, Any]:
    """A recipe's `data` with every field that names a file or a folder changed, also in lists of tables; `change` is
    given where the field is and what it says."""

    def of(part: str, value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [
                _changed(it, change, f"{prefix}{part}.{at}.") if isinstance(it, dict) else it
                for at, it in enumerate(value)
            ]
        if part in _FILES and isinstance(value, str) and not value.startswith(ELSEWHERE):
            return change(f"{prefix}{part}", value)
        return value

    return {part: of(part, value) for part, value in data.items()}


def expanded(path: str, part: str) -> str:
    """With `$HEADRACE_DATA` replaced. Raises RecipeError if it is not set."""
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
                with file.open("rb") as opened:
                    digest.update(hashlib.file_digest(opened, "sha256").digest())
            elif not path.is_dir():
                raise FileNotFoundError(2, "there is no such file")
    except OSError as error:
        raise RecipeError(f"data.{part}: {path} cannot be read ({error.strerror})") from error
    return digest.hexdigest()


def _anchor(content: dict[str, Any], folder: Path) -> None:
    """Make the paths of the data files absolute; a path that is absolute already stays."""
    if isinstance(content.get("data"), dict):
        content["data"] = _changed(
            content["data"], lambda _, path: path if path.startswith("$") else str(folder / Path(path).expanduser())
        )


def _set(content: dict[str, Any], setting: str) -> None:
    """Apply `a.b=value`, or `a.0.b=value` in a list of tables. The value is TOML; what is not, is text, so that paths
    and names need no quotes."""
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
    table: Any = content
    for section in sections:
        if isinstance(table, list | tuple):
            table = table[int(section)] if section.isdecimal() and int(section) < len(table) else None
        else:
            table = table.setdefault(section, {})
        if not isinstance(table, dict | list | tuple):
            raise RecipeError(f"{key!r}: {section!r} is not a section")
    if not isinstance(table, dict):
        raise RecipeError(f"{key!r}: say which of {len(table)}, by its number from zero")
    table[field] = value
