"""What a recipe file may say: one frozen Struct per choice, and the kind of each stage is its tag. Light, so that
asking for a recipe imports no torch; a Struct knows which module does its work, and imports it then."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Any

from msgspec import Meta, Struct, to_builtins

from runtimes.artifact import NAME_RULE, Name
from training.spec.compression import Compression
from training.spec.data import Data
from training.spec.exams import Exam
from training.spec.floors import Floor
from training.spec.models import ModelSpec
from training.spec.trainers import Trainer
from training.spec.tuning import Tuning


class Continual(Struct, frozen=True, forbid_unknown_fields=True):
    """Go on from a published artifact, with new rows and some of its old ones. `model` must be the one that it has."""

    base: str
    """NAME@VERSION; `--base` takes NAME@ALIAS too, and writes down which version that is."""
    replay: Annotated[float, Meta(ge=0)] = 1.0
    """Old rows learnt from again, for each new one."""


class Recipe(Struct, frozen=True, forbid_unknown_fields=True):
    """How one artifact is made."""

    name: str
    """Its name on the shelf."""
    about: str
    data: Data
    model: ModelSpec
    gate: dict[str, float]
    """What must hold, or nothing is published; see `training.evaluation.gate`."""
    trainer: Trainer | None = None
    """None: the model as it is."""
    compress: tuple[Compression, ...] = ()
    """In this order."""
    floor: Floor | None = None
    """The plainest thing that could work, made from the same rows and measured with the same: `floor_<measure>`."""
    exams: tuple[Exam, ...] = ()
    """What other models have been asked too."""
    continual: Continual | None = None
    folds: Annotated[int, Meta(ge=2)] | None = None
    """Also measure by cross-validation over all rows: `folds_<measure>`, mean over this many folds."""
    folds_by: str | None = None
    """The same, but each value of this slice (`speaker`) is a fold: how good on those that it has never met."""
    tuning: Tuning | None = None
    """What `headrace-train tune` may try."""
    seed: int = 0

    def __post_init__(self) -> None:
        """Before anything is made: the name is that of folders too, and no number may be infinite or none."""
        if not Name.fullmatch(self.name):
            raise ValueError(f"name: {self.name!r} {NAME_RULE}")
        for path, number in _numbers(to_builtins(self), ""):
            if not math.isfinite(number):
                raise ValueError(f"{path} is {number}, and must be a finite number")


def _numbers(content: Any, path: str) -> Iterator[tuple[str, float]]:
    """Each number that need not be whole, and where it stands, as `--set` names it."""
    match content:
        case float():
            yield path, content
        case dict():
            for name, value in content.items():
                yield from _numbers(value, f"{path}.{name}" if path else name)
        case list() | tuple():
            for at, value in enumerate(content):
                yield from _numbers(value, f"{path}.{at}")


__all__ = ["Recipe"]
