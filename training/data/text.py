"""Texts with one label each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from msgspec import Struct

from training.contract import Classes, Examples, Rows, strings
from training.data import split, tables
from training.errors import DataError
from training.spec.data import Text


class Row(Struct, frozen=True):
    text: str
    label: str
    slices: tuple[str, ...]


def load(spec: Text) -> Rows:
    """Read the files that the recipe names. A text that is in both parts stays in the test part only."""
    records = tables.read(spec.train, spec.header)
    if spec.test is not None:
        train, test = _rows(records, spec, spec.train), _rows(tables.read(spec.test, spec.header), spec, spec.test)
    else:
        rows = _rows(records, spec, spec.train)
        says = split.parts(records, spec.test_share, lambda it: str(it[spec.text]))
        train = [row for row, part in zip(rows, says, strict=True) if part == "train"]
        test = [row for row, part in zip(rows, says, strict=True) if part == "test"]
    if not test:
        raise DataError("there are no rows to test with: set data.test, or give data.train more rows")
    train, leaked = split.apart(train, test, lambda it: it.text)
    notes = (f"{leaked} training rows are also in the test part and were left out",) if leaked else ()
    labels = tuple(sorted({row.label for row in train}))
    if len(labels) < 2:
        raise DataError(f"the training rows have {len(labels)} labels; a classifier needs two or more")
    if unknown := sorted({row.label for row in test} - set(labels)):
        raise DataError(f"the label {unknown[0]!r} is in the test rows only: there is nothing to learn it from")
    return Rows(_examples(train, labels, spec), _examples(test, labels, spec), notes)


def _rows(records: Sequence[tables.Record], spec: Text, file: str) -> list[Row]:
    label = _label(set(records[0]), spec)
    tables.columns(records, [spec.text, label, *spec.slices], file=file)
    return [
        Row(
            tables.text(record, spec.text, file=file, number=number),
            _named(tables.text(record, label, file=file, number=number), spec),
            tuple(str(record[column]) for column in spec.slices),
        )
        for number, record in enumerate(records, 1)
    ]


def _named(label: str, spec: Text) -> str:
    return spec.names.get(label, label)


def _label(columns: set[str], spec: Text) -> str:
    """The column with the labels: as the recipe says, or what such files usually call it."""
    if spec.label in columns or spec.text not in columns:
        return spec.label
    usual = [it for it in ("category", "intent") if it in columns]
    others = sorted(columns - {spec.text})
    if len(usual) == 1:
        return usual[0]
    return others[0] if len(others) == 1 else spec.label


def _examples(rows: Sequence[Row], labels: tuple[str, ...], spec: Text) -> Examples:
    index = {label: at for at, label in enumerate(labels)}
    return Examples(
        {"text": strings([row.text for row in rows])},
        Classes(np.array([index[row.label] for row in rows], np.int64), labels),
        {column: strings([row.slices[at] for row in rows]) for at, column in enumerate(spec.slices)},
    )
