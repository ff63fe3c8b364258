"""Files of records: CSV, TSV, JSON Lines, JSON with a list of them, and columns with blanks between them."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec

from training.errors import DataError

Record = dict[str, Any]


_DELIMITERS = MappingProxyType({".csv": ",", ".tsv": "\t", ".txt": " "})
_MORE, _LESS = "\0more", "\0less"
"""In a record that has more fields than there are columns, or fewer."""


def read(file: str, header: Sequence[str] = ()) -> list[Record]:
    """Every record: column → value. `header` names the columns of a file that does not. Raises DataError."""
    path = Path(file)
    try:
        with path.open(encoding="utf-8-sig", newline="") as opened:
            if path.suffix in _DELIMITERS:
                delimiter = _DELIMITERS[path.suffix]
                lines = (" ".join(it.split()) for it in opened) if delimiter == " " else opened
                records: list[Record] = list(
                    csv.DictReader(
                        lines, header or None, restkey=_MORE, restval=_LESS, delimiter=delimiter, strict=True
                    )
                )
                _rectangular(records, file)
            elif path.suffix in {".jsonl", ".ndjson"}:
                decoder = msgspec.json.Decoder(Record)
                records = [decoder.decode(line) for line in opened if line.strip()]
            elif path.suffix == ".json":
                records = msgspec.json.decode(opened.read(), type=list[Record])
            else:
                raise DataError(f"{path}: rows are read from .csv, .tsv, .txt, .jsonl and .json files")
    except (OSError, csv.Error, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if not records:
        raise DataError(f"{path} has no rows")
    return records


def _rectangular(records: Sequence[Record], file: str) -> None:
    for number, record in enumerate(records, 1):
        if _MORE in record or _LESS in record.values():
            raise DataError(f"{file}, row {number}: it does not have one field for each column")


def columns(records: Sequence[Record], wanted: Sequence[str], *, file: str) -> None:
    """Raise DataError unless all of these columns are there."""
    there = set(records[0])
    if missing := sorted(set(wanted) - there):
        raise DataError(f"{file} has no column {missing[0]!r}; it has {', '.join(sorted(there))}")


def text(record: Record, column: str, *, file: str, number: int) -> str:
    """The text in that column of row `number`, which counts from one. Raises DataError if there is none."""
    value = record.get(column)
    if value is None or not str(value).strip():
        raise DataError(f"{file}, row {number}: {column!r} is empty")
    if isinstance(value, dict | list):
        raise DataError(f"{file}, row {number}: {column!r} is {type(value).__name__}, not a text")
    return str(value)


def number(record: Record, column: str, *, file: str, number: int) -> float:
    """The finite number in that column of row `number`. Raises DataError if there is none."""
    value = text(record, column, file=file, number=number)
    try:
        found = float(value)
    except ValueError:
        found = float("nan")
    if found - found != 0:
        raise DataError(f"{file}, row {number}: {column!r} is {value!r}, not a number")
    return found
