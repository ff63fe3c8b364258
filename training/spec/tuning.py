"""What `headrace-train tune` may change of a recipe."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct


class Range(Struct, frozen=True, forbid_unknown_fields=True):
    """Numbers from `low` to `high`, both included; whole ones if both are whole."""

    low: float | int
    high: float | int
    log: bool = False
    """Drawn evenly by their logarithm."""

    def __post_init__(self) -> None:
        if not self.low < self.high or (self.log and self.low <= 0):
            raise ValueError("`low` must be less than `high`, and with `log` more than 0")


class Tuning(Struct, frozen=True, forbid_unknown_fields=True):
    """Which fields, and what is to become best."""

    measure: str
    """One that such rows have; see `training.evaluation.measures`."""
    space: dict[str, Range | Annotated[list[str | float | int | bool], Meta(min_length=2)]]
    """Field, as in `--set` → a range, or the values to choose from."""
    held: Annotated[float, Meta(gt=0, lt=1)] = 0.2
    """Part of the training rows that trials are measured with. The test rows are never looked at."""
