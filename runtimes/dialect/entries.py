"""What a body lists as its `input`, or by another name: texts, or lists of token ids, of which only a window is ever
decoded. The rest stays as it came, 64 bytes of memory an entry beside the body's own."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from runtimes.contract import InferRequest, Invalid
from runtimes.dialect import TokenId

if TYPE_CHECKING:
    from runtimes.contract import Array

ROWS_MAX = 65_536
"""Entries per request."""
IDS_MAX = 131_072
"""Token ids per entry: no model reads more, and each takes ten times the memory of its text."""
WINDOW_ROWS, WINDOW_BYTES = 256, 256 * 1024
"""What is decoded, and goes to the model, at once; padded to its longest entry. A longer one goes alone."""


class Entries:
    """Raises Invalid, naming `param`, for what is neither a text nor texts nor one or more lists of token ids, for an
    empty entry, and for too many. `given` must be valid JSON in UTF-8."""

    def __init__(self, given: msgspec.Raw | Sequence[msgspec.Raw], *, param: str) -> None:
        self.param = param
        self.rows = split(given, param=param) if isinstance(given, msgspec.Raw) else given
        if len(self.rows) > ROWS_MAX:
            raise too_many(len(self.rows), param=param)
        self.size = 0
        """Of all entries together, in bytes."""
        kinds, whole = set(), True
        for row in self.rows:
            text = bytes(row)
            self.size += len(text)
            kinds.add(text[:1])
            whole = whole and (text != b'""' if text[:1] == b'"' else self._ids(text))
        if not whole or not self.rows:
            raise Invalid(f"`{param}` is empty or holds an empty entry. Leave empty ones out.", param=param)
        self.are_texts = kinds == {b'"'}
        if len(kinds) > 1:
            raise Invalid(f"`{param}` mixes texts and token ids. Send one kind per request.", param=param)

    def __len__(self) -> int:
        return len(self.rows)

    def texts(self, window: slice) -> list[str]:
        return _TEXTS.decode(_joined(self.rows[window]))

    def inputs(self, window: slice) -> dict[str, Array]:
        """Of an InferRequest."""
        if self.are_texts:
            return {"text": text_tensor(self.texts(window))}
        rows = _LISTS.decode(_joined(self.rows[window]))
        ids = np.zeros((len(rows), max(map(len, rows))), np.int64)
        mask = np.zeros_like(ids)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = row
            mask[index, : len(row)] = 1
        return {"input_ids": ids, "attention_mask": mask}

    def _ids(self, text: bytes) -> bool:
        """Whether it holds any; that they are token ids is checked."""
        if text.count(b",") >= IDS_MAX:
            raise Invalid(f"`{self.param}` holds an entry of more than {IDS_MAX} token ids.", param=self.param)
        try:
            return bool(_IDS.decode(text))
        except msgspec.ValidationError:
            raise Invalid(
                f"`{self.param}` must be a text, texts, token ids from 0 to 2^31-1, or lists of those; it is something "
                "else, or mixes them.",
                param=self.param,
            ) from None


def windows(*columns: Entries) -> Iterator[slice]:
    """How entries go together that are as many in each column."""
    start, widest, rows = 0, 0, len(columns[0])
    if rows <= WINDOW_ROWS and rows * sum(column.size for column in columns) <= WINDOW_BYTES:  # as most are
        yield slice(0, rows)
        return
    for index in range(rows):
        width = sum(len(bytes(column.rows[index])) for column in columns)
        widest = max(widest, width)
        if index > start and (index - start == WINDOW_ROWS or (index - start + 1) * widest > WINDOW_BYTES):
            yield slice(start, index)
            start, widest = index, width
    yield slice(start, rows)


def requests(entries: Entries, deadline_s: float, flow: str) -> Iterator[InferRequest]:
    """One for each window."""
    for window in windows(entries):
        yield InferRequest(entries.inputs(window), deadline_s, flow)


def text_tensor(texts: Sequence[str]) -> Array:
    tensor = np.empty(len(texts), object)
    tensor[:] = texts
    return tensor


def split(given: msgspec.Raw, *, param: str) -> Sequence[msgspec.Raw]:
    """The elements of an array of texts, lists or objects; anything else is one entry."""
    found = _ARRAY.match(given)
    if found is None:
        return [given]
    if memoryview(given).nbytes > 3 * ROWS_MAX:  # else there can't be too many
        _require_few(bytes(given), found[1], param=param)
    return _ROWS.decode(given)


def _require_few(text: bytes, opening: bytes, *, param: str) -> None:
    """Before it is taken apart: an array of nothing but empty texts would become twenty times as large."""
    if text.count(opening) > ROWS_MAX:  # what the texts hold is counted too
        count = _TEXT.sub(b'"', text).count(opening) - (opening == b"[")
        if count > ROWS_MAX:
            raise too_many(count, param=param)


def too_many(count: int, *, param: str) -> Invalid:
    return Invalid(f"`{param}` holds {count} entries; at most {ROWS_MAX} go at once.", param=param)


def _joined(rows: Sequence[msgspec.Raw]) -> bytes:
    return b"[%b]" % b",".join(rows)


_ARRAY = re.compile(rb'\[\s*(["\[{\]])')
_TEXT = re.compile(rb'"(?:[^"\\]|\\.)*+"', re.DOTALL)
_ROWS = msgspec.json.Decoder(list[msgspec.Raw])
_TEXTS = msgspec.json.Decoder(list[str])
_IDS = msgspec.json.Decoder(list[TokenId])
_LISTS = msgspec.json.Decoder(list[list[int]])
