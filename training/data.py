"""Rows: read, checked, split and fingerprinted."""

from __future__ import annotations

import csv
import hashlib
import logging
from pathlib import Path
from typing import Any

import msgspec

from training.recipe import RecipeError
from training.spec import Data, Task

LOG = logging.getLogger(__name__)


class Labelled(msgspec.Struct, frozen=True):
    text: str
    label: str


class Pair(msgspec.Struct, frozen=True):
    """Two sentences and how close they are; any scale, higher is closer."""

    left: str
    right: str
    similarity: float


class Turn(msgspec.Struct, frozen=True):
    """A question and the answer hoped for."""

    prompt: str
    answer: str


Row = Labelled | Pair | Turn


class Rows(msgspec.Struct, frozen=True):
    train: list[Row]
    test: list[Row]

    @property
    def fingerprint(self) -> str:
        """Hash of every row, in order."""
        return hashlib.sha256(msgspec.json.encode([self.train, self.test])).hexdigest()[:16]


def load(spec: Data, task: Task) -> Rows:
    """Read the files that the recipe names. No text is in both parts: one that is, stays in the test part only."""
    train = _read(spec.train, spec, task) if spec.train else []
    test = _read(spec.test, spec, task) if spec.test else []
    if train and not test:
        train, test = _split(train, spec.test_share)
    rows = Rows(_apart([row for row, _ in train], [row for row, _ in test]), [row for row, _ in test])
    if not rows.test:
        raise RecipeError("there are no rows to test with: set data.test, or give data.train more rows")
    if task == "classify":
        _check_labels(rows)
    LOG.info("data: %d rows to train, %d to test, fingerprint %s", len(rows.train), len(rows.test), rows.fingerprint)
    return rows


def held_out(text: str, share: float) -> bool:
    """Whether a text belongs to the test part. By its own hash, so that adding rows never moves old ones."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) < share * 2**64


_TYPES: dict[Task, type[Row]] = {"classify": Labelled, "embed": Pair, "generate": Turn}


def _read(file: str, spec: Data, task: Task) -> list[tuple[Row, str]]:
    """Rows of one file, each with what its `split` column says, if there is one."""
    path = Path(file)
    records = _records(path)
    names = {"text": spec.text, "label": spec.label} if task == "classify" else {}
    columns = set(records[0])
    if task == "classify" and spec.label not in columns and spec.text in columns and len(columns) == 2:
        names["label"] = (columns - {spec.text}).pop()
    wanted = {field: names.get(field, field) for field in _TYPES[task].__struct_fields__}
    if missing := sorted(set(wanted.values()) - columns):
        raise RecipeError(f"{path} has no column {missing[0]!r}; it has {', '.join(sorted(columns))}")
    rows = []
    for number, record in enumerate(records, 1):
        fields = {field: record.get(column) for field, column in wanted.items()}
        try:
            row = msgspec.convert(fields, _TYPES[task], strict=False)
        except msgspec.ValidationError as error:
            raise RecipeError(f"{path}, row {number}: {error}") from error
        if empty := [wanted[field] for field, value in fields.items() if value == ""]:
            raise RecipeError(f"{path}, row {number}: {empty[0]!r} is empty")
        rows.append((row, str(record.get("split") or "")))
    return rows


def _records(path: Path) -> list[dict[str, Any]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as opened:
            if path.suffix == ".csv":
                records = list(csv.DictReader(opened, strict=True))
            elif path.suffix in {".jsonl", ".ndjson"}:
                decoder = msgspec.json.Decoder(dict[str, Any])
                records = [decoder.decode(line) for line in opened if line.strip()]
            else:
                raise RecipeError(f"{path}: rows are read from .csv and .jsonl files")
    except (OSError, csv.Error, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} cannot be read: {error}") from error
    if not records:
        raise RecipeError(f"{path} has no rows")
    return records


def _split(rows: list[tuple[Row, str]], share: float) -> tuple[list[tuple[Row, str]], list[tuple[Row, str]]]:
    splits = {split for _, split in rows}
    if splits == {""}:
        apart = [held_out(_text(row), share) for row, _ in rows]
    elif splits <= {"train", "test"}:
        apart = [split == "test" for _, split in rows]
    else:
        raise RecipeError(f"the column 'split' may say train or test, not {sorted(splits - {'train', 'test'})[0]!r}")
    return (
        [row for row, test in zip(rows, apart, strict=True) if not test],
        [row for row, test in zip(rows, apart, strict=True) if test],
    )


def _apart(train: list[Row], test: list[Row]) -> list[Row]:
    seen = {_text(row).casefold() for row in test}
    kept = [row for row in train if _text(row).casefold() not in seen]
    if len(kept) < len(train):
        LOG.info("data: %d training rows are also in the test part and were left out", len(train) - len(kept))
    return kept


def _text(row: Row) -> str:
    match row:
        case Labelled(text=text) | Pair(left=text) | Turn(prompt=text):
            return text


def _check_labels(rows: Rows) -> None:
    known = labels(rows.train)
    if len(known) < 2:
        raise RecipeError(f"the training rows have {len(known)} labels; a classifier needs two or more")
    if unknown := sorted(set(labels(rows.test)) - set(known)):
        raise RecipeError(f"the label {unknown[0]!r} is in the test rows only: there is nothing to learn it from")


def labels(rows: list[Row]) -> tuple[str, ...]:
    """The labels there are, sorted: the order of a classifier's scores."""
    return tuple(sorted({row.label for row in rows if isinstance(row, Labelled)}))
