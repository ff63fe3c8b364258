"""What is wrong with rows, though each can be read: repeated, contradicting each other, in both parts."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Protocol, TypeVar

from training.errors import DataError
from training.spec.data import Conflicts

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_SHOWN = 5
"""Places that a message names, of any number."""


class Labelled(Protocol):
    """A row of a text and its label."""

    @property
    def text(self) -> str: ...
    @property
    def label(self) -> str: ...
    @property
    def number(self) -> int:
        """Of the row in its file, from one."""
        ...


T = TypeVar("T", bound=Labelled)


def plain(text: str) -> str:
    """Composed (Unicode's NFC), and without control characters; tabs and line ends stay. Tokenizers do the same."""
    return unicodedata.normalize("NFC", _CONTROL.sub("", text))


def same(text: str) -> str:
    """Equal for texts that differ in nothing but case and white space: they are taken for the same."""
    return " ".join(text.casefold().split())


def once(rows: Sequence[T], conflicts: Conflicts, *, file: str) -> tuple[list[T], list[str]]:
    """Rows to learn from, none of them twice, and what was done. Raises DataError for texts of several labels, if that
    is what to do about them."""
    notes = []
    first: dict[tuple[str, str], T] = {}
    for row in rows:
        first.setdefault((same(row.text), row.label), row)
    kept = [*first.values()]
    if len(kept) < len(rows):
        notes.append(f"{len(rows) - len(kept)} training rows repeat another and were left out")
    split = _contradicting(kept)
    if split:
        says = f"{len(split)} training texts have more than one label ({_places(split.values(), file)})"
        if conflicts == "refuse":
            raise DataError(f"{says}; correct them, or set data.conflicts to 'keep' or 'drop'")
        if conflicts == "drop":
            kept = [it for it in kept if same(it.text) not in split]
        notes.append(f"{says} and were {'kept' if conflicts == 'keep' else 'left out'}")
    return kept, notes


def about(train: Sequence[Labelled], test: Sequence[Labelled], *, file: str) -> list[str]:
    """What to know of the parts. The rows to test with stay as they are, or a figure would fit no published one."""
    notes = []
    if repeated := len(test) - len({(same(it.text), it.label) for it in test}):
        notes.append(f"{repeated} test rows repeat another and were kept")
    if split := _contradicting(test):
        notes.append(
            f"{len(split)} test texts have more than one label ({_places(split.values(), file)}) and were kept"
        )
    tested = {_bare(it.text) for it in test} - {""}
    if near := sum(_bare(it.text) in tested for it in train):
        notes.append(f"{near} training rows differ from a test row in punctuation only")
    if broken := sum("\ufffd" in it.text for it in (*train, *test)):
        notes.append(f"{broken} texts hold U+FFFD: they were decoded wrongly before they came here")
    counts = Counter(it.label for it in train).most_common()
    if counts:
        (most, highest), (least, lowest) = counts[0], counts[-1]
        some = f"{lowest} ({least}) to {highest} ({most})" if lowest < highest else f"{lowest}"
        notes.append(f"{len(counts)} labels of {some} training rows each")
    if untested := len(counts) - len({it.label for it in test}):
        notes.append(f"{untested} labels have no row to test with")
    return notes


def _contradicting(rows: Iterable[T]) -> dict[str, list[T]]:
    """Text → its rows, where they have several labels."""
    found: dict[str, list[T]] = defaultdict(list)
    for row in rows:
        found[same(row.text)].append(row)
    return {text: its for text, its in found.items() if len({it.label for it in its}) > 1}


def _places(groups: Iterable[Sequence[Labelled]], file: str) -> str:
    shown = [" and ".join(str(it.number) for it in its) for its in groups]
    return f"{file}, rows {'; '.join(shown[:_SHOWN])}{'; …' if len(shown) > _SHOWN else ''}"


def _bare(text: str) -> str:
    """Letters and digits."""
    return re.sub(r"[\W_]+", "", text.casefold())
