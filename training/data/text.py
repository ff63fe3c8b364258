"""Texts with one label each."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Set

import numpy as np
from msgspec import Struct

from training.contract import Array, Classes, Examples, Rows, Scoped, strings
from training.data import cleaning, split, tables
from training.data.spool import Texts, spooled
from training.errors import DataError
from training.spec.data import Text


class Part(Struct, frozen=True):
    """Rows as one pass over their file leaves them: the texts on disk, and what is known of each in memory."""

    texts: Texts
    marks: cleaning.Marks
    slices: dict[str, Array]
    changed: Array
    """bool: the file has the text in another form."""

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, chosen: Array) -> Part:
        slices = {name: it[chosen] for name, it in self.slices.items()}
        return Part(self.texts[chosen], self.marks.take(chosen), slices, self.changed[chosen])


def load(spec: Text) -> Rows:
    """Read the files that the recipe names. A text that is in both parts stays in the test part only, which nothing
    else is done to; rows to learn from are there once."""
    numbers: dict[str, int] = {}
    train, test, columns = _parts(spec, numbers)
    if not len(test):
        raise DataError("there are no rows to test with: set data.test, or give data.train more rows")
    notes = []
    if unused := sorted(columns - {spec.text, _label(columns, spec), "split", *spec.slices}):
        notes.append(f"columns that nothing is made of: {', '.join(unused)}")
    if changed := int(train.changed.sum() + test.changed.sum()):
        notes.append(f"{changed} texts were composed (NFC) or rid of control characters")
    leaked = cleaning.among(train.marks.same, test.marks.same)
    if leaked.any():
        notes.append(f"{leaked.sum()} training rows are also in the test part and were left out")
        train = train.take(np.flatnonzero(~leaked))
    kept, repeated = cleaning.once(train.marks, spec.conflicts, file=spec.train)
    if repeated:
        train = train.take(kept)
    notes += repeated
    if not len(train):
        raise DataError("there are no rows to train with: each is also in the test part, or it is the only part")
    names = [*numbers]
    labels = _labels(train, test, names, spec)
    notes += cleaning.about(train.marks, test.marks, names, file=spec.test or spec.train)
    place = np.array([labels.index(it) if it in labels else -1 for it in names], np.int64)
    return Rows(_examples(train, place, labels, spec), _examples(test, place, labels, spec), tuple(notes))


def _parts(spec: Text, numbers: dict[str, int]) -> tuple[Part, Part, Set[str]]:
    """Rows to train and to test with as the files have them, and the columns of the first one. `numbers` gets every
    label and its number."""
    reading = _Reading(spec, spec.train, numbers)
    rows = reading.all()
    if spec.test is not None:
        return rows, _Reading(spec, spec.test, numbers).all(), reading.columns
    tested = reading.tested()
    return rows.take(np.flatnonzero(~tested)), rows.take(np.flatnonzero(tested)), reading.columns


class _Reading:
    """One pass over a file: its texts go to disk, what is known of each row stays."""

    def __init__(self, spec: Text, file: str, numbers: dict[str, int]) -> None:
        self.spec = spec
        self.file = file
        self.numbers = numbers
        """Label → its number, of all files."""
        self.columns: Set[str] = frozenset()
        self.same, self.bare, self.label = array("Q"), array("Q"), array("i")
        self.broken, self.changed, self.held = array("b"), array("b"), array("b")
        self.says: list[str] = []
        self.slices: dict[str, list[str]] = {column: [] for column in spec.slices}

    def all(self) -> Part:
        """The rows of the whole file."""
        texts = spooled(self._texts())
        marks = cleaning.Marks(
            np.frombuffer(self.same, np.uint64),
            np.frombuffer(self.bare, np.uint64),
            np.frombuffer(self.label, np.int32),
            np.arange(1, len(texts) + 1),
            np.frombuffer(self.broken, np.bool_),
        )
        slices = {column: strings(values) for column, values in self.slices.items()}
        return Part(texts, marks, slices, np.frombuffer(self.changed, np.bool_))

    def tested(self) -> Array:
        """Which of them are to test with, if there is no other file; bool [n]."""
        return split.tested(self.says, np.frombuffer(self.held, np.bool_))

    def _texts(self) -> Iterator[str]:
        spec, file = self.spec, self.file
        label, shared = "", dict[str, str]()
        for number, record in enumerate(tables.stream(file, spec.header, encoding=spec.encoding), 1):
            if not self.columns:
                self.columns = frozenset(record)
                label = _label(self.columns, spec)
                tables.columns([record], [spec.text, label, *spec.slices], file=file)
            text = tables.text(record, spec.text, file=file, number=number)
            name = _named(tables.text(record, label, file=file, number=number), spec)
            self.label.append(self.numbers.setdefault(name, len(self.numbers)))
            self.same.append(cleaning.hashed(cleaning.same(text)))
            self.bare.append(cleaning.hashed(cleaning.bare(text)))
            self.broken.append("\ufffd" in text)
            self.changed.append(text != str(record[spec.text]))
            self.held.append(split.held_out(str(record[spec.text]), spec.test_share))
            self.says.append(split.said(record))
            for column, values in self.slices.items():
                value = str(record.get(column, ""))
                values.append(shared.setdefault(value, value))
            yield text


def _labels(train: Part, test: Part, names: list[str], spec: Text) -> tuple[str, ...]:
    """In alphabetical order, the one outside last. Raises DataError unless they can be learnt."""
    learnt, asked = ({names[at] for at in np.unique(it.marks.label)} for it in (train, test))
    labels = tuple(sorted(learnt - {spec.outside}))
    tested = spec.test or spec.train
    if spec.outside is not None:
        labels += (spec.outside,)
        for part, there, file in (("train", learnt, spec.train), ("test", asked, tested)):
            if spec.outside not in there:
                raise DataError(f"{file} has no row to {part} with that has the label {spec.outside!r} (data.outside)")
    if len(labels) < 2:
        raise DataError(f"the training rows have {len(labels)} labels; a classifier needs two or more")
    if asked - {*labels}:
        unknown = np.array([it not in labels for it in names])[test.marks.label]
        first = test.marks.take(np.flatnonzero(unknown)[:1])
        raise DataError(
            f"{tested}, row {first.number[0]}: the label {names[first.label[0]]!r} is in the test rows only: there is "
            "nothing to learn it from"
        )
    return labels


def _named(label: str, spec: Text) -> str:
    return spec.names.get(label, label)


def _label(columns: Set[str], spec: Text) -> str:
    """The column with the labels: as the recipe says, or what such files usually call it."""
    if spec.label in columns or spec.text not in columns:
        return spec.label
    usual = [it for it in ("category", "intent") if it in columns]
    others = sorted(columns - {spec.text})
    if len(usual) == 1:
        return usual[0]
    return others[0] if len(others) == 1 else spec.label


def _examples(part: Part, place: Array, labels: tuple[str, ...], spec: Text) -> Examples:
    """`place`: of each label's number, where it stands in `labels`."""
    index = place[part.marks.label]
    return Examples(
        {"text": part.texts.column()},
        Classes(index, labels)
        if spec.outside is None
        else Scoped(index, labels, outside=spec.outside, recall=spec.outside_recall),
        part.slices,
    )
