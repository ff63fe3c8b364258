"""Tables: columns of numbers and of categories, and one label a row.

A file is gone through twice: once to learn which columns hold numbers and which rows are equal, once to write each
row's numbers, and those of its categories, to where they lie on disk while they are used.
"""

from __future__ import annotations

import math
import struct
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import repeat
from typing import IO

import numpy as np

from training.contract import Array, Classes, Examples, Rows
from training.data import cleaning, split, tables
from training.data.categories import Categories, Named
from training.data.spool import mapped, unnamed
from training.errors import DataError
from training.spec.data import Table

MISSING = frozenset(("", "?", "na", "n/a", "nan", "null", "none"))
"""What stands for a value that nobody knows; upper and lower case alike."""


def load(spec: Table) -> Rows:
    """Read the files that the recipe names. Numbers are float32, NaN where one is missing; categories are strings,
    empty there. A row that is in both parts stays in the test part only."""
    known = _Survey(spec, spec.train, [spec.label, *spec.categories, *spec.ignore])
    if spec.test is not None:
        tested = np.zeros(len(known.hashes), bool)
        others = _Survey(spec, spec.test, [spec.label, *known.kinds], [*known.kinds]).hashes
    else:
        tested = known.tested()
        others = known.hashes[tested]
    leaked = ~tested & cleaning.among(known.hashes, others)
    if leaked.any() and (leaked | tested).all():
        raise DataError(f"there are no rows to train with: each of {spec.train} is also in the test part")
    places = zip(tested, leaked, strict=True)
    with unnamed() as one, unnamed() as other:
        train, test = (_Part(known.kinds, spec, it) for it in (one, other))
        _fill(spec, spec.train, (test if held else None if out else train for held, out in places))
        if spec.test is not None:
            _fill(spec, spec.test, repeat(test))
        labels = _labels(train.label.array(), test.label.array(), spec)
        rows = Rows(train.examples(labels), test.examples(labels), tuple(_notes(known, leaked)))
    for name, numeric in known.kinds.items():
        if numeric and np.isnan(rows.train.inputs[name]).all():
            raise DataError(f"{spec.train}: {name!r} is empty in every training row; name it in data.ignore")
    return rows


class _Survey:
    """The first pass over a file: what of all its rows has to be known before one is kept. `columns` are those that
    something is made of; if empty, all that are not left out."""

    def __init__(self, spec: Table, file: str, wanted: Sequence[str], columns: Sequence[str] = ()) -> None:
        self.kinds: dict[str, bool] = {}
        """Column → whether it holds numbers: every value in it is one, and the recipe does not say otherwise."""
        self.words: dict[str, tuple[int, int]] = {}
        """Column → the first row with a value that is no number, and how many there are."""
        self.missing = Counter[str]()
        self._same, self._held = array("Q"), array("b")
        self._says: list[str] = []
        for number, record in enumerate(tables.stream(file, spec.header), 1):
            if not self.kinds:
                tables.columns([record], wanted, file=file)
                columns = sorted(columns or _names(record, spec, file))
                self.kinds = {it: it not in spec.categories for it in record if it in columns}
                maybe = frozenset(columns) - {*spec.categories}
            cells = [_cell(record, it) for it in columns]
            self._same.append(cleaning.hashed("\0".join((*cells, _cell(record, spec.label)))))
            self._held.append(split.held_out(_line(record), spec.test_share))
            self._says.append(split.said(record))
            for name, cell in zip(columns, cells, strict=True):
                if not cell:
                    self.missing[name] += 1
                elif name in maybe and not _is_number(cell):
                    self.kinds[name] = False
                    first, count = self.words.get(name, (number, 0))
                    self.words[name] = first, count + 1

    @property
    def hashes(self) -> Array:
        """uint64, of each row: equal if the same is made of them, in whatever order their columns are."""
        return np.frombuffer(self._same, np.uint64)

    def tested(self) -> Array:
        """Which rows are to test with, if there is no other file; bool [n]."""
        return split.tested(self._says, np.frombuffer(self._held, np.bool_))


class _Part:
    """Rows to learn from or to test with, as they come from the second pass: in `rows`, one behind the other, since a
    batch takes some of them with all of their columns. Of a category its number is there."""

    def __init__(self, kinds: Mapping[str, bool], spec: Table, rows: IO[bytes]) -> None:
        self.spec = spec
        self.label = Categories()
        self._values: dict[str, dict[str, int] | None] = {name: None if it else {} for name, it in kinds.items()}
        """Column → category → its number; of a column of numbers, None."""
        self._cells = [(name, "f" if it is None else "i") for name, it in self._values.items()]
        """Column and what is written of it, as struct and numpy both call it."""
        self._row = struct.Struct("=" + "".join(kind for _, kind in self._cells))
        self._rows = rows

    def append(self, record: tables.Record, *, file: str, number: int) -> None:
        label = tables.text(record, self.spec.label, file=file, number=number)
        self.label.append(self.spec.labels.get(label, label))
        cells = []
        for name, values in self._values.items():
            cell = _cell(record, name)
            try:
                cells.append(_number(cell) if values is None else values.setdefault(cell, len(values)))
            except ValueError as error:
                raise DataError(f"{file}, row {number}: {name!r} is {error}") from None
        self._rows.write(self._row.pack(*cells))

    def examples(self, labels: tuple[str, ...]) -> Examples:
        place = {label: at for at, label in enumerate(labels)}
        costs = tuple(self.spec.costs.get(it, 1.0) for it in labels) if self.spec.costs else ()
        wanted = np.fromiter((place[it] for it in self.label.array()), np.int64)
        rows = np.frombuffer(mapped(self._rows), np.dtype(self._cells))
        inputs = {
            name: rows[name] if values is None else Named([*values], rows[name]).column()
            for name, values in self._values.items()
        }
        return Examples(inputs, Classes(wanted, labels, costs))


def _fill(spec: Table, file: str, parts: Iterable[_Part | None]) -> None:
    """The second pass: each row goes to its part, or to none."""
    for number, (record, part) in enumerate(zip(tables.stream(file, spec.header), parts, strict=False), 1):
        if part is not None:
            part.append(record, file=file, number=number)


def _names(record: tables.Record, spec: Table, file: str) -> list[str]:
    """Of the columns that something is made of."""
    names = [it for it in record if it not in {spec.label, "split", *spec.ignore}]
    if not names:
        raise DataError(f"{file} has no column but the label {spec.label!r}")
    if nameless := [at for at, it in enumerate(record, 1) if it in names and not it.strip()]:
        raise DataError(
            f"{file}: column {nameless[0]} has no name, by which a caller could send it: name it in the first line, or "
            "leave it out (pandas writes its index so: to_csv(…, index=False))"
        )
    return names


def _cell(record: tables.Record, column: str) -> str:
    """Empty if nobody knows it."""
    value = record.get(column)
    text = "" if value is None else str(value).strip()
    return "" if text.casefold() in MISSING else text


def _number(cell: str) -> float:
    """NaN if nobody knows it. Raises ValueError if it is none, or too large."""
    if not _is_number(cell):
        raise ValueError(f"{cell!r}, not a number")
    value = float(cell or "nan")
    if abs(value) > tables.FLOAT32_MAX:
        raise ValueError(
            f"{cell!r}, more than float32 holds ({tables.FLOAT32_MAX:.2g}): correct it, empty it if it is unknown, or "
            "name the column in data.categories or data.ignore"
        )
    return value


def _is_number(cell: str) -> bool:
    try:
        return math.isfinite(float(cell or "0"))
    except ValueError:
        return False


def _line(record: tables.Record) -> str:
    """All that its file says of a row, by which it is held out: columns that are left out later change nothing then."""
    return "\0".join(str(value) for name, value in record.items() if name != "split")


def _labels(train: Array, test: Array, spec: Table) -> tuple[str, ...]:
    """In the recipe's order, or sorted."""
    if not len(test):
        raise DataError("there are no rows to test with: set data.test, or give data.train more rows")
    there = set(train)
    if len(there) < 2:
        raise DataError(f"the training rows have {len(there)} labels; a classifier needs two or more")
    if unknown := sorted(set(test) - there):
        raise DataError(f"the label {unknown[0]!r} is in the test rows only: there is nothing to learn it from")
    if unknown := sorted(set(spec.costs) - there):
        raise DataError(f"data.costs names {unknown[0]!r}; the labels are {', '.join(sorted(there))}")
    named = dict.fromkeys(it for it in spec.labels.values() if it in there)
    return tuple(dict.fromkeys((*named, *sorted(there))))


def _notes(known: _Survey, leaked: Array) -> list[str]:
    """What to know about the rows."""
    numbers = sum(known.kinds.values())
    found = [f"{numbers} columns of numbers, {len(known.kinds) - numbers} of categories"]
    if repeated := len(known.hashes) - len(np.unique(known.hashes)):
        found.append(f"{repeated} rows repeat another")
    if leaked.any():
        found.append(f"{leaked.sum()} training rows are also in the test part and were left out")
    if missing := known.missing.total():
        found.append(f"{missing} values are missing")
    for name, (first, count) in known.words.items():
        if count < (there := len(known.hashes) - known.missing[name]) / 2:
            found.append(
                f"column {name!r} is taken as categories because of row {first}: {there - count} of its {there} values "
                "are numbers"
            )
    return found
