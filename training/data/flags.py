"""Texts with any number of labels each, from several files."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from msgspec import Struct

from training.contract import Examples, Flags, Rows, strings
from training.data import split, tables
from training.errors import DataError
from training.spec.data import Flagged, Source


class Row(Struct, frozen=True):
    text: str
    source: str
    values: tuple[float, ...]
    """1, 0 or NaN, one a label."""


def load(spec: Flagged) -> Rows:
    """Read the files that the recipe names. A text that is in both parts stays in the test part only."""
    labels = tuple(dict.fromkeys(label for source in spec.sources for label in source.flags))
    if not labels:
        raise DataError("data.sources name no flags: there is nothing to learn")
    for source in spec.sources:
        if unknown := sorted({*source.without} - {*labels}):
            raise DataError(f"the source {source.name!r} is without {unknown[0]!r}, which no source has a flag for")
    parts: dict[str, list[Row]] = {"train": [], "test": []}
    for source in spec.sources:
        for row in _rows(source, labels):
            hashed = "test" if split.held_out(row.text, spec.test_share) else "train"
            parts[hashed if source.part == "both" else source.part].append(row)
    for part, found in parts.items():
        if not found:
            raise DataError(f"no source has rows to {part} with")
    train, leaked = split.apart(parts["train"], parts["test"], lambda it: it.text)
    notes = [f"{leaked} training rows are also in the test part and were left out"] if leaked else []
    rows = Rows(_examples(train, labels), _examples(parts["test"], labels))
    for label, values in zip(labels, _flags(rows.train).values.T, strict=True):
        yes, no = int((values == 1).sum()), int((values == 0).sum())
        if not yes or not no:
            raise DataError(f"of the training rows {yes} have the label {label!r} and {no} do not; both are needed")
        notes.append(f"{label}: {yes} yes, {no} no, {len(train) - yes - no} unknown, to train")
    return Rows(rows.train, rows.test, tuple(notes))


def _rows(source: Source, labels: Sequence[str]) -> list[Row]:
    records = [_opening(it, source.text) for it in tables.read(source.file)[: source.rows]]
    wanted = {label: column.partition("=") for label, column in source.flags.items()}
    tables.columns(records, [source.text, *(it[0] for it in wanted.values() if it[1])], file=source.file)

    def value(record: tables.Record, label: str, number: int) -> float:
        if label in source.without:
            return 0.0
        if label not in wanted:
            return math.nan
        column, equals, yes = wanted[label]
        if equals:
            return float(tables.text(record, column, file=source.file, number=number) == yes)
        if record.get(column) in (None, ""):
            return math.nan
        found = tables.number(record, column, file=source.file, number=number)
        if found not in (0, 1):
            raise DataError(f"{source.file}, row {number}: {column!r} is {found:g}, neither 0 nor 1")
        return found

    return [
        Row(
            tables.text(record, source.text, file=source.file, number=number),
            source.name,
            tuple(value(record, label, number) for label in labels),
        )
        for number, record in enumerate(records, 1)
    ]


def _opening(record: tables.Record, column: str) -> tables.Record:
    turns = record.get(column)
    return record | {column: turns[0]} if isinstance(turns, list) and turns else record


def _examples(rows: Sequence[Row], labels: tuple[str, ...]) -> Examples:
    return Examples(
        {"text": strings([it.text for it in rows])},
        Flags(np.array([it.values for it in rows], np.float32), labels),
        {"source": strings([it.source for it in rows])},
    )


def _flags(examples: Examples) -> Flags:
    assert isinstance(examples.targets, Flags)
    return examples.targets
