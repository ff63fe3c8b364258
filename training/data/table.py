"""Tables: columns of numbers and of categories, and one label a row."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from training.contract import Array, Classes, Examples, Rows, strings
from training.data import split, tables
from training.errors import DataError
from training.spec.data import Table

MISSING = frozenset(("", "?", "na", "n/a", "nan", "null", "none"))
"""What stands for a value that nobody knows; upper and lower case alike."""


def load(spec: Table) -> Rows:
    """Read the files that the recipe names. Numbers are float32, NaN where one is missing; categories are strings,
    empty there. Equal rows are in the same part."""
    records = tables.read(spec.train, spec.header)
    tables.columns(records, [spec.label, *spec.categories, *spec.ignore], file=spec.train)
    kinds = _kinds(records, spec)
    known = _arrays(records, kinds, spec, spec.train)
    keys = [_key(it) for it in records]
    if spec.test is not None:
        others = tables.read(spec.test, spec.header)
        tables.columns(others, [spec.label, *kinds], file=spec.test)
        test = _arrays(others, kinds, spec, spec.test)
        seen = {_key(it) for it in others}
        train = _taken(known, np.flatnonzero([key not in seen for key in keys]))  # no row is in both
    else:
        held = np.array([split.held_out(it, spec.test_share) for it in keys])
        tested = split.tested([split.said(it) for it in records], held)
        train, test = (_taken(known, np.flatnonzero(it)) for it in (~tested, tested))
    labels = _labels(train[spec.label], test[spec.label], spec)
    for name, numeric in kinds.items():
        if numeric and np.isnan(train[name]).all():
            raise DataError(f"{spec.train}: {name!r} is empty in every training row; name it in data.ignore")
    return Rows(_examples(train, labels, spec), _examples(test, labels, spec), tuple(_notes(keys, known, kinds)))


def _kinds(records: Sequence[tables.Record], spec: Table) -> dict[str, bool]:
    """Column → whether it holds numbers: every value in it is one, and the recipe does not say otherwise."""
    names = [it for it in records[0] if it not in {spec.label, "split", *spec.ignore}]
    if not names:
        raise DataError(f"{spec.train} has no column but the label {spec.label!r}")
    return {name: name not in spec.categories and all(_is_number(_cell(it, name)) for it in records) for name in names}


def _arrays(records: Sequence[tables.Record], kinds: Mapping[str, bool], spec: Table, file: str) -> dict[str, Array]:
    """Every column, the label's among them."""
    labels = [tables.text(it, spec.label, file=file, number=at) for at, it in enumerate(records, 1)]
    found: dict[str, Array] = {spec.label: strings([spec.labels.get(it, it) for it in labels])}
    for name, numeric in kinds.items():
        cells = [_cell(it, name) for it in records]
        if not numeric:
            found[name] = strings(cells)
            continue
        for at, cell in enumerate(cells, 1):
            if not _is_number(cell):
                raise DataError(f"{file}, row {at}: {name!r} is {cell!r}, not a number")
        found[name] = np.array([float(it or "nan") for it in cells], np.float32)
    return found


def _cell(record: tables.Record, column: str) -> str:
    """Empty if nobody knows it."""
    value = record.get(column)
    text = "" if value is None else str(value).strip()
    return "" if text.casefold() in MISSING else text


def _is_number(cell: str) -> bool:
    try:
        return math.isfinite(float(cell or "0"))
    except ValueError:
        return False


def _key(record: tables.Record) -> str:
    return "\0".join(str(value) for name, value in record.items() if name != "split")


def _taken(arrays: Mapping[str, Array], chosen: Array) -> dict[str, Array]:
    return {name: array[chosen] for name, array in arrays.items()}


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


def _examples(arrays: Mapping[str, Array], labels: tuple[str, ...], spec: Table) -> Examples:
    index = {label: at for at, label in enumerate(labels)}
    costs = tuple(spec.costs.get(it, 1.0) for it in labels) if spec.costs else ()
    wanted = np.array([index[it] for it in arrays[spec.label]], np.int64)
    return Examples(
        {name: array for name, array in arrays.items() if name != spec.label}, Classes(wanted, labels, costs)
    )


def _notes(keys: Sequence[str], known: Mapping[str, Array], kinds: Mapping[str, bool]) -> list[str]:
    """What to know about the rows."""
    numbers = sum(kinds.values())
    found = [f"{numbers} columns of numbers, {len(kinds) - numbers} of categories"]
    if repeated := len(keys) - len(set(keys)):
        found.append(f"{repeated} rows repeat another; such rows are in the same part")
    if missing := sum(int((it == "" if it.dtype == object else np.isnan(it)).sum()) for it in known.values()):
        found.append(f"{missing} values are missing")
    return found
