"""Texts with any number of labels each, from several files."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Mapping
from itertools import islice

import numpy as np

from training.contract import Examples, Flags, Rows, strings
from training.data import cleaning, split, tables
from training.data.spool import spooled
from training.errors import DataError
from training.spec.data import Flagged, Source


def load(spec: Flagged) -> Rows:
    """Read the files that the recipe names. A text that is in both parts stays in the test part only."""
    labels = tuple(dict.fromkeys(label for source in spec.sources for label in source.flags))
    if not labels:
        raise DataError("data.sources name no flags: there is nothing to learn")
    for source in spec.sources:
        if unknown := sorted({*source.without} - {*labels}):
            raise DataError(f"the source {source.name!r} is without {unknown[0]!r}, which no source has a flag for")
    reading = _Reading(spec, labels)
    rows = reading.all()
    same, tested = np.frombuffer(reading.same, np.uint64), np.frombuffer(reading.tested, np.bool_)
    for part, there in (("train", ~tested), ("test", tested)):
        if not there.any():
            raise DataError(f"no source has rows to {part} with")
    leaked = ~tested & cleaning.among(same, same[tested])
    train, test = (rows.take(np.flatnonzero(it)) for it in (~tested & ~leaked, tested))
    notes = [f"{leaked.sum()} training rows are also in the test part and were left out"] if leaked.any() else []
    assert isinstance(train.targets, Flags)
    for label, values in zip(labels, train.targets.values.T, strict=True):
        yes, no = int((values == 1).sum()), int((values == 0).sum())
        if not yes or not no:
            raise DataError(f"of the training rows {yes} have the label {label!r} and {no} do not; both are needed")
        notes.append(f"{label}: {yes} yes, {no} no, {len(train) - yes - no} unknown, to train")
    return Rows(train, test, tuple(notes))


class _Reading:
    """One pass over every file: the texts go to disk, what is known of each row stays."""

    def __init__(self, spec: Flagged, labels: tuple[str, ...]) -> None:
        self.spec = spec
        self.labels = labels
        self.same, self.tested, self.values = array("Q"), array("b"), array("f")
        self.sources: list[str] = []

    def all(self) -> Examples:
        """Every row."""
        texts = spooled(text for source in self.spec.sources for text in self._texts(source))
        values = np.frombuffer(self.values, np.float32).reshape(len(texts), len(self.labels))
        return Examples({"text": texts.column()}, Flags(values, self.labels), {"source": strings(self.sources)})

    def _texts(self, source: Source) -> Iterator[str]:
        said = {label: column.partition("=") for label, column in source.flags.items()}
        for number, found in enumerate(islice(tables.stream(source.file), source.rows), 1):
            record = _opening(found, source.text)
            if number == 1:
                tables.columns([record], [source.text, *(it[0] for it in said.values() if it[1])], file=source.file)
            text = tables.text(record, source.text, file=source.file, number=number)
            self.same.append(cleaning.hashed(cleaning.same(text)))
            held = split.held_out(text, self.spec.test_share) if source.part == "both" else source.part == "test"
            self.tested.append(held)
            self.values.extend(_value(source, said, label, record, number) for label in self.labels)
            self.sources.append(source.name)
            yield text


def _value(
    source: Source, said: Mapping[str, tuple[str, str, str]], label: str, record: tables.Record, number: int
) -> float:
    """1, 0 or NaN; `said` has each of the source's flags in its two halves."""
    if label in source.without:
        return 0.0
    if label not in said:
        return math.nan
    column, equals, yes = said[label]
    if equals:
        return float(tables.text(record, column, file=source.file, number=number) == yes)
    if record.get(column) in (None, ""):
        return math.nan
    found = tables.number(record, column, file=source.file, number=number)
    if found not in (0, 1):
        raise DataError(f"{source.file}, row {number}: {column!r} is {found:g}, neither 0 nor 1")
    return found


def _opening(record: tables.Record, column: str) -> tables.Record:
    turns = record.get(column)
    return record | {column: turns[0]} if isinstance(turns, list) and turns else record
