"""Texts with one label each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from msgspec import Struct

from training.contract import Classes, Examples, Rows, Scoped, strings
from training.data import cleaning, split, tables
from training.errors import DataError
from training.spec.data import Text


class Row(Struct, frozen=True):
    text: str
    label: str
    slices: tuple[str, ...]
    number: int
    """In its file, from one."""
    changed: bool
    """The file has the text in another form."""


def load(spec: Text) -> Rows:
    """Read the files that the recipe names. A text that is in both parts stays in the test part only, which nothing
    else is done to; rows to learn from are there once."""
    records = tables.read(spec.train, spec.header, encoding=spec.encoding)
    if spec.test is not None:
        train = _rows(records, spec, spec.train)
        test = _rows(tables.read(spec.test, spec.header, encoding=spec.encoding), spec, spec.test)
    else:
        rows = _rows(records, spec, spec.train)
        says = split.parts(records, spec.test_share, lambda it: str(it[spec.text]))
        train = [row for row, part in zip(rows, says, strict=True) if part == "train"]
        test = [row for row, part in zip(rows, says, strict=True) if part == "test"]
    if not test:
        raise DataError("there are no rows to test with: set data.test, or give data.train more rows")
    notes = []
    if unused := sorted(records[0].keys() - {spec.text, _label({*records[0]}, spec), "split", *spec.slices}):
        notes.append(f"columns that nothing is made of: {', '.join(unused)}")
    if changed := sum(it.changed for it in (*train, *test)):
        notes.append(f"{changed} texts were composed (NFC) or rid of control characters")
    train, leaked = split.apart(train, test, lambda it: it.text)
    if leaked:
        notes.append(f"{leaked} training rows are also in the test part and were left out")
    train, repeated = cleaning.once(train, spec.conflicts, file=spec.train)
    notes += repeated
    if not train:
        raise DataError("there are no rows to train with: each is also in the test part, or it is the only part")
    labels = tuple(sorted({row.label for row in train} - {spec.outside}))
    if spec.outside is not None:
        labels += (spec.outside,)
        for part, rows, file in (("train", train, spec.train), ("test", test, spec.test or spec.train)):
            if all(row.label != spec.outside for row in rows):
                raise DataError(f"{file} has no row to {part} with that has the label {spec.outside!r} (data.outside)")
    if len(labels) < 2:
        raise DataError(f"the training rows have {len(labels)} labels; a classifier needs two or more")
    tested = spec.test or spec.train
    if unknown := next((row for row in test if row.label not in labels), None):
        raise DataError(
            f"{tested}, row {unknown.number}: the label {unknown.label!r} is in the test rows only: there is nothing "
            "to learn it from"
        )
    notes += cleaning.about(train, test, file=tested)
    return Rows(_examples(train, labels, spec), _examples(test, labels, spec), tuple(notes))


def _rows(records: Sequence[tables.Record], spec: Text, file: str) -> list[Row]:
    label = _label(set(records[0]), spec)
    tables.columns(records, [spec.text, label, *spec.slices], file=file)
    return [
        Row(
            tables.text(record, spec.text, file=file, number=number),
            _named(tables.text(record, label, file=file, number=number), spec),
            tuple(str(record.get(column, "")) for column in spec.slices),
            number,
            cleaning.plain(str(record[spec.text])) != str(record[spec.text]),
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
    place = {label: at for at, label in enumerate(labels)}
    index = np.array([place[row.label] for row in rows], np.int64)
    return Examples(
        {"text": strings([row.text for row in rows])},
        Classes(index, labels)
        if spec.outside is None
        else Scoped(index, labels, outside=spec.outside, recall=spec.outside_recall),
        {column: strings([row.slices[at] for row in rows]) for at, column in enumerate(spec.slices)},
    )
