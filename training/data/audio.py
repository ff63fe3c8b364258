"""Sounds with one label each: folders of WAV files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from msgspec import Struct

from runtimes import wav
from training.contract import Classes, Examples, Rows, strings
from training.data import labels, split
from training.errors import DataError, RecipeError
from training.spec.data import Audio

_SAMPLES_MAX = 1 << 31


class Row(Struct, frozen=True):
    name: str
    content: bytes
    groups: dict[str, str]


def load(spec: Audio) -> Rows:
    """Read the folders that the recipe names. A sound that is in both parts stays in the test part only."""
    try:
        pattern = re.compile(spec.pattern)
    except re.error as error:
        raise RecipeError(f"data.pattern is no regular expression: {error}") from error
    if "label" not in pattern.groupindex:
        raise RecipeError("data.pattern must have a group (?P<label>…)")
    rows = _read(Path(spec.train), pattern)
    if spec.test is not None:
        train, test = rows, _read(Path(spec.test), pattern)
    else:
        train = [it for it in rows if not split.held_out(it.name, spec.test_share)]
        test = [it for it in rows if split.held_out(it.name, spec.test_share)]
    if not test:
        raise DataError("there are no sounds to test with: set data.test, or give data.train more of them")
    seen = {it.content for it in test}
    kept = [it for it in train if it.content not in seen]
    leaked = len(train) - len(kept)
    _require_one_rate([*kept, *test])
    learnt, held = labels.classes([it.groups["label"] for it in kept], [it.groups["label"] for it in test])
    notes = (f"{leaked} training sounds are also in the test part and were left out",) if leaked else ()
    return Rows(_examples(kept, learnt), _examples(test, held), notes)


def _read(folder: Path, pattern: re.Pattern[str]) -> list[Row]:
    files = sorted(folder.rglob("*.wav"))
    if not files:
        raise DataError(f"{folder} has no file *.wav")
    return [_row(file, file.relative_to(folder).with_suffix("").as_posix(), pattern) for file in files]


def _row(file: Path, name: str, pattern: re.Pattern[str]) -> Row:
    fits = pattern.fullmatch(name)
    if fits is None or None in fits.groupdict().values():
        raise DataError(f"{file}: {name!r} does not fit data.pattern, {pattern.pattern}")
    try:
        content = file.read_bytes()
        wav.read(content, rate_hz=wav.rate_hz(content), samples_max=_SAMPLES_MAX)
    except (OSError, ValueError) as error:
        raise DataError(f"{file} {error}") from error
    return Row(name, content, fits.groupdict())


def _require_one_rate(rows: Sequence[Row]) -> None:
    wanted = wav.rate_hz(rows[0].content)
    for row in rows:
        if (found := wav.rate_hz(row.content)) != wanted:
            raise DataError(f"{row.name}.wav has {found} samples a second, {rows[0].name}.wav {wanted}: resample some")


def _examples(rows: Sequence[Row], targets: Classes) -> Examples:
    columns = [it for it in rows[0].groups if it != "label"]
    slices = {column: strings([row.groups[column] for row in rows]) for column in columns}
    content = strings([])
    content.resize(len(rows), refcheck=False)
    content[:] = [row.content for row in rows]
    return Examples({"audio": content}, targets, slices)
