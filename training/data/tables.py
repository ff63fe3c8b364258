"""Files of records: CSV, TSV, columns with blanks between them, JSON Lines, Parquet, Hugging Face's data sets."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec

from training.data import cleaning, files
from training.errors import DataError

Record = dict[str, Any]

FLOAT32_MAX = 3.4028234663852886e38
"""What is learnt from and sent has numbers of 32 bits."""
_KEY = re.compile(r'"\s*:')
_DELIMITERS = MappingProxyType({".csv": ",", ".tsv": "\t", ".txt": " "})


def read(file: str, header: Sequence[str] = (), *, encoding: str = files.UTF_8) -> list[Record]:
    """Every record of `stream`."""
    return [*stream(file, header, encoding=encoding)]


def stream(file: str, header: Sequence[str] = (), *, encoding: str = files.UTF_8) -> Iterator[Record]:
    """One record after the other: column → value. `header` names the columns of a file of lines that does not. Raises
    DataError, also on the way."""
    empty = True
    for record in _records(file, header, encoding):
        empty = False
        yield record
    if empty:
        raise DataError(f"{file} has no rows")


def _records(file: str, header: Sequence[str], encoding: str) -> Iterable[Record]:
    from training.data import arrow  # it knows how to do without pyarrow until there is something to read

    path = Path(file)
    kind = files.suffix(path)
    if file.startswith(arrow.HUB):
        return arrow.hub(file)
    if path.is_dir():
        return arrow.saved(path)
    if kind == ".parquet":
        return arrow.parquet(path)
    if kind in _DELIMITERS:
        return _lines(path, header, _DELIMITERS[kind], encoding)
    if kind in {".jsonl", ".ndjson"}:
        return _objects(path, encoding)
    if kind == ".json":
        return _list(path, encoding)
    raise DataError(
        f"{path}: rows are read from .csv, .tsv, .txt, .json and .jsonl files, .gz or not, .parquet, a folder that "
        "save_to_disk has left, or hf:NAME"
    )


def columns(records: Sequence[Record], wanted: Sequence[str], *, file: str) -> None:
    """Raise DataError unless all of these columns are there, in the first record."""
    there = set(records[0])
    if missing := sorted(set(wanted) - there):
        raise DataError(f"{file} has no column {missing[0]!r}; it has {', '.join(sorted(there))}")


def text(record: Record, column: str, *, file: str, number: int) -> str:
    """The text in that column of row `number`, which counts from one, as `cleaning.plain` leaves it. Raises DataError
    if there is none."""
    value = record.get(column)
    if isinstance(value, dict | list | bytes):
        raise DataError(f"{file}, row {number}: {column!r} is {type(value).__name__}, not a text")
    found = "" if value is None else cleaning.plain(str(value))
    if not found.strip():
        raise DataError(f"{file}, row {number}: {column!r} is empty")
    return found


def number(record: Record, column: str, *, file: str, number: int) -> float:
    """The number in that column of row `number`, finite in float32 too. Raises DataError if there is none."""
    value = text(record, column, file=file, number=number)
    try:
        found = float(value)
    except ValueError:
        found = float("nan")
    if found - found != 0:
        raise DataError(f"{file}, row {number}: {column!r} is {value!r}, not a number")
    if abs(found) > FLOAT32_MAX:
        raise DataError(f"{file}, row {number}: {column!r} is {value!r}, more than float32 holds ({FLOAT32_MAX:.2g})")
    return found


def _lines(path: Path, header: Sequence[str], delimiter: str, encoding: str) -> Iterator[Record]:
    with files.opened(path, encoding) as opened:
        lines = (" ".join(it.split()) for it in opened) if delimiter == " " else opened
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        try:
            names = [*header] or next(reader, [])
            if twice := sorted({it for it in names if names.count(it) > 1}):
                raise DataError(f"{path}: two columns have the name {twice[0]!r}")
            for row, fields in enumerate((it for it in reader if it), 1):
                if len(fields) != len(names):
                    raise DataError(
                        f"{path}, row {row} (line {reader.line_num}): it does not have one field for each column, but "
                        f"{len(fields)} for {len(names)}"
                    )
                yield dict(zip(names, fields, strict=True))
        except csv.Error as error:
            raise DataError(f"{path} cannot be read: line {reader.line_num}: {error}") from error


def _list(path: Path, encoding: str) -> list[Record]:
    with files.opened(path, encoding) as opened:
        content = opened.read()
    try:
        records = msgspec.json.decode(content, type=list[Record])
        _check_keys(content, sum(map(len, records)))
    except (msgspec.DecodeError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    return records


def _objects(path: Path, encoding: str) -> Iterator[Record]:
    decoder = msgspec.json.Decoder(Record)
    with files.opened(path, encoding) as opened:
        for number, line in enumerate(opened, 1):
            if line.strip():
                try:
                    record = decoder.decode(line)
                    _check_keys(line, len(record))
                except (msgspec.DecodeError, ValueError) as error:
                    raise DataError(f"{path} cannot be read: line {number}: {error}") from error
                yield record


def _check_keys(content: str, known: int) -> None:
    """Raise ValueError for an object with a key twice, of which msgspec keeps the last and says nothing. Of what cannot
    have more keys than the `known` ones nothing is read again."""
    if len(_KEY.findall(content)) > known:
        json.loads(content, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> Record:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(it for it in names if names.count(it) > 1)
        raise ValueError(f"an object has the key {twice!r} twice")
    return found
