"""What is wrong with rows, though each can be read: repeated, contradicting each other, in both parts.

Of each row only hashes and numbers are looked at, some thirty bytes, so that the texts need not be in memory. Two texts
of one 64-bit hash are taken for the same: among ten million, one time in 300,000.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
from msgspec import Struct

from training.contract import Array, Examples, pieces
from training.errors import DataError
from training.spec.data import Conflicts

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_SHOWN = 5
"""Places that a message names, of any number."""


class Marks(Struct, frozen=True):
    """What is known of rows of a text and a label each, [n]."""

    same: Array
    """uint64: hash of the text, case and white space aside."""
    bare: Array
    """uint64: hash of its letters and digits."""
    label: Array
    """int32: number of its label."""
    number: Array
    """int64: of the row in its file, from one."""
    broken: Array
    """bool: it holds U+FFFD."""

    def take(self, chosen: Array) -> Marks:
        return Marks(*(getattr(self, name)[chosen] for name in self.__struct_fields__))


def plain(text: str) -> str:
    """Composed (Unicode's NFC), and without control characters; tabs and line ends stay. Tokenizers do the same."""
    return unicodedata.normalize("NFC", _CONTROL.sub("", text))


def same(text: str) -> str:
    """Equal for texts that differ in nothing but case and white space: they are taken for the same."""
    return " ".join(text.casefold().split())


def bare(text: str) -> str:
    """Letters and digits."""
    return re.sub(r"[\W_]+", "", text.casefold())


def hashed(content: str | bytes) -> int:
    """64 bits."""
    known = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    return int.from_bytes(hashlib.blake2b(known, digest_size=8).digest())


def among(values: Array, others: Array) -> Array:
    """Whether each of the values is one of the others, bool [n]. numpy's own `isin` wants five times the memory."""
    if not len(others):
        return np.zeros(len(values), bool)
    known = np.unique(others)
    found: Array = known[np.searchsorted(known, values).clip(max=len(known) - 1)] == values
    return found


def without(examples: Examples, others: Examples) -> Examples:
    """Those that a caller would not ask as one of the others is asked: inputs are compared, of texts as `same` does."""
    return examples.take(np.flatnonzero(~among(_asked(examples), _asked(others))))


def _asked(examples: Examples) -> Array:
    """uint64: hash of the inputs of each row, whatever they are, [n]."""
    digests = [hashlib.blake2b(digest_size=8) for _ in range(len(examples))]
    for name, column in sorted(examples.inputs.items()):
        rows = column if column.dtype == object else (row for piece in pieces(column) for row in piece)
        for digest, row in zip(digests, rows, strict=True):
            content = _content(row)
            digest.update(f"{name}\0{len(content)}\0".encode())
            digest.update(content)
    return np.array([int.from_bytes(it.digest()) for it in digests], np.uint64)


def _content(value: Any) -> bytes:
    if isinstance(value, str):
        return same(value).encode("utf-8", "surrogatepass")
    return value if isinstance(value, bytes) else value.tobytes()


def once(rows: Marks, conflicts: Conflicts, *, file: str) -> tuple[Array, list[str]]:
    """Which rows to learn from, none of them twice, and what was done. Raises DataError for texts of several labels, if
    that is what to do about them."""
    notes = []
    kept = _firsts(rows)
    if repeated := len(rows.same) - len(kept):
        notes.append(f"{repeated} training rows repeat another and were left out")
    torn = _contradicting(rows.take(kept))
    if torn.any():
        says = _texts_of_several(rows.take(kept[torn]), file, "training")
        if conflicts == "refuse":
            raise DataError(f"{says}; correct them, or set data.conflicts to 'keep' or 'drop'")
        if conflicts == "drop":
            kept = kept[~torn]
        notes.append(f"{says} and were {'kept' if conflicts == 'keep' else 'left out'}")
    return kept, notes


def about(train: Marks, test: Marks, labels: Sequence[str], *, file: str) -> list[str]:
    """What to know of the parts; `labels` by their numbers. The rows to test with stay as they are, or a figure would
    fit no published one."""
    notes = []
    if repeated := len(test.same) - len(_firsts(test)):
        notes.append(f"{repeated} test rows repeat another and were kept")
    torn = _contradicting(test)
    if torn.any():
        notes.append(f"{_texts_of_several(test.take(torn), file, 'test')} and were kept")
    tested = test.bare[test.bare != hashed("")]
    if near := int(among(train.bare, tested).sum()):
        notes.append(f"{near} training rows differ from a test row in punctuation only")
    if broken := int(train.broken.sum() + test.broken.sum()):
        notes.append(f"{broken} texts hold U+FFFD: they were decoded wrongly before they came here")
    found, first, counts = np.unique(train.label, return_index=True, return_counts=True)
    order = np.lexsort((first, -counts))
    if len(found):
        (most, highest), (least, lowest) = ((labels[found[at]], counts[at]) for at in order[[0, -1]])
        some = f"{lowest} ({least}) to {highest} ({most})" if lowest < highest else f"{lowest}"
        notes.append(f"{len(found)} labels of {some} training rows each")
    if untested := len(found) - len(np.unique(test.label)):
        notes.append(f"{untested} labels have no row to test with")
    return notes


def _firsts(rows: Marks) -> Array:
    """Of rows that are the same in text and label, the first one; int64, in order."""
    order = np.lexsort((rows.label, rows.same))
    text, label = rows.same[order], rows.label[order]
    new = np.ones(len(order), bool)
    new[1:] = (text[1:] != text[:-1]) | (label[1:] != label[:-1])
    return np.sort(order[new])


def _contradicting(rows: Marks) -> Array:
    """Whether the row's text has several labels, bool [n]."""
    texts, labels = np.unique(rows.same[_firsts(rows)], return_counts=True)
    return among(rows.same, texts[labels > 1])


def _texts_of_several(rows: Marks, file: str, part: str) -> str:
    texts, first = np.unique(rows.same, return_index=True)
    shown = [rows.number[rows.same == rows.same[at]] for at in np.sort(first)[:_SHOWN]]
    places = "; ".join(" and ".join(map(str, its)) for its in shown)
    more = "; …" if len(texts) > _SHOWN else ""
    return f"{len(texts)} {part} texts have more than one label ({file}, rows {places}{more})"
