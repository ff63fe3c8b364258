"""Sounds with one label each: folders of WAV files. Their content lies in a file without a name from then on."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from msgspec import Struct

from runtimes import wav
from training.contract import Array, Classes, Examples, Rows, strings
from training.data import cleaning, labels, split
from training.data.spool import Contents, spooled_bytes
from training.errors import DataError, RecipeError
from training.spec.data import Audio

_SAMPLES_MAX = 1 << 31


class Row(Struct, frozen=True):
    """What stays in memory of a sound."""

    name: str
    same: int
    """64-bit hash of the file."""
    rate_hz: int
    groups: dict[str, str]


class Read(Struct, frozen=True):
    """One part's sounds."""

    rows: list[Row]
    contents: Contents

    def take(self, chosen: Array) -> Read:
        return Read([self.rows[at] for at in chosen], self.contents[chosen])


def load(spec: Audio) -> Rows:
    """Read the folders that the recipe names. A sound that is in both parts stays in the test part only."""
    try:
        pattern = re.compile(spec.pattern)
    except re.error as error:
        raise RecipeError(f"data.pattern is no regular expression: {error}") from error
    if "label" not in pattern.groupindex:
        raise RecipeError("data.pattern must have a group (?P<label>…)")
    train = _read(Path(spec.train), pattern)
    if spec.test is not None:
        test = _read(Path(spec.test), pattern)
    else:
        tested = np.array([split.held_out(it.name, spec.test_share) for it in train.rows])
        train, test = (train.take(np.flatnonzero(it)) for it in (~tested, tested))
    if not test.rows:
        raise DataError("there are no sounds to test with: set data.test, or give data.train more of them")
    leaked = cleaning.among(*(np.array([row.same for row in it.rows], np.uint64) for it in (train, test)))
    if leaked.size and leaked.all():
        raise DataError(f"there are no sounds to train with: each of {spec.train} is also in the test part")
    train = train.take(np.flatnonzero(~leaked))
    _require_one_rate([*train.rows, *test.rows])
    learnt, held = labels.classes(*([row.groups["label"] for row in it.rows] for it in (train, test)))
    notes = (f"{leaked.sum()} training sounds are also in the test part and were left out",) if leaked.any() else ()
    return Rows(_examples(train, learnt), _examples(test, held), notes)


def _read(folder: Path, pattern: re.Pattern[str]) -> Read:
    files = sorted(folder.rglob("*.wav"))
    if not files:
        raise DataError(f"{folder} has no file *.wav")
    rows: list[Row] = []

    def contents() -> Iterator[bytes]:
        for file in files:
            row, content = _row(file, file.relative_to(folder).with_suffix("").as_posix(), pattern)
            rows.append(row)
            yield content

    spooled = spooled_bytes(contents())
    return Read(rows, spooled)


def _row(file: Path, name: str, pattern: re.Pattern[str]) -> tuple[Row, bytes]:
    fits = pattern.fullmatch(name)
    if fits is None or None in fits.groupdict().values():
        raise DataError(f"{file}: {name!r} does not fit data.pattern, {pattern.pattern}")
    try:
        content = file.read_bytes()
        rate_hz = wav.rate_hz(content)
        wav.read(content, rate_hz=rate_hz, samples_max=_SAMPLES_MAX)
    except (OSError, ValueError) as error:
        raise DataError(f"{file} {error}") from error
    return Row(name, cleaning.hashed(content), rate_hz, fits.groupdict()), content


def _require_one_rate(rows: Sequence[Row]) -> None:
    first, wanted = rows[0].name, rows[0].rate_hz
    for row in rows:
        if row.rate_hz != wanted:
            raise DataError(f"{row.name}.wav has {row.rate_hz} samples a second, {first}.wav {wanted}: resample some")


def _examples(read: Read, targets: Classes) -> Examples:
    columns = [it for it in read.rows[0].groups if it != "label"]
    slices = {column: strings([row.groups[column] for row in read.rows]) for column in columns}
    return Examples({"audio": read.contents.column()}, targets, slices)
