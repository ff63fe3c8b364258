"""Conversations, and preferences between answers."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import msgspec
import numpy as np
from msgspec import Struct

from training.contract import Answers, Array, Examples, Preferred, Rows, Targets
from training.data import cleaning, split, tables
from training.data.spool import spooled
from training.errors import DataError
from training.llm.conversation import Conversation, Preference, Unreadable, conversation, preference
from training.spec.llm import Conversations, Preferences

Read = Callable[[tables.Record, Mapping[str, str]], tuple[Conversation, tuple[str, ...]]]
"""Of a record: what precedes the answer; and, to be kept, the conversation and what is wanted, as targets have it."""

_DECODER = msgspec.json.Decoder(Conversation)


def load(spec: Conversations) -> Rows:
    """Read the files that the recipe names. What precedes an answer in both parts stays in the test part only."""
    return _rows(spec, _conversation, Answers)


def load_preferences(spec: Preferences) -> Rows:
    """The same of preferences."""
    return _rows(spec, _preference, Preferred)


def before_answer(it: Conversation) -> Conversation:
    """All that precedes its last answer."""
    last = max(at for at, message in enumerate(it.messages) if message.role == "assistant")
    return msgspec.structs.replace(it, messages=it.messages[:last])


def decoded(examples: Examples) -> Iterator[Conversation]:
    """The conversations that examples hold, one after the other."""
    return map(_DECODER.decode, examples.inputs["conversation"])


def preferences(examples: Examples) -> Iterator[Preference]:
    """Each conversation with its two answers."""
    assert isinstance(examples.targets, Preferred)
    return map(Preference, decoded(examples), examples.targets.chosen, examples.targets.rejected)


class _Part(Struct, frozen=True):
    """Rows as one pass over their file leaves them: what was said on disk, and how they are told apart in memory."""

    examples: Examples
    same: Array
    """uint64: hash of what precedes the answer, case and white space aside."""
    held: Array
    """bool: it is to test with, if there is no other file."""

    def take(self, chosen: Array) -> _Part:
        return _Part(self.examples.take(chosen), self.same[chosen], self.held[chosen])


def _rows(spec: Conversations | Preferences, read: Read, targets: type[Targets]) -> Rows:
    train, test = (_part(file, spec, read, targets) for file in (spec.train, spec.test))
    if spec.test is None:
        test = train.take(np.flatnonzero(train.held))
    if not len(test.examples):
        raise DataError("there are no rows to test with: set data.test, or give data.train more rows")
    leaked = cleaning.among(train.same, test.same)
    train = train.take(np.flatnonzero(~leaked))
    said = leaked.any() and spec.test is not None
    notes = (f"{leaked.sum()} training rows are also in the test part and were left out",) if said else ()
    return Rows(train.examples, test.examples, notes)


def _part(file: str | None, spec: Conversations | Preferences, read: Read, targets: type[Targets]) -> _Part:
    """The rows of that file, or none."""
    same, held = array("Q"), array("b")

    def texts() -> Iterator[str]:
        for number, record in enumerate(tables.stream(file) if file else (), 1):
            try:
                before, kept = read(record, spec.fill)
            except Unreadable as error:
                raise DataError(f"{file}, row {number}: {error}") from error
            key = "\n".join(message.content for message in before.messages)
            same.append(cleaning.hashed(cleaning.same(key)))
            held.append(split.held_out(key, spec.test_share))
            yield from kept

    spool, width = spooled(texts()), 1 + len(targets.__struct_fields__)
    said, *answers = (spool[at::width].column() for at in range(width))
    examples = Examples({"conversation": said}, targets(*answers))
    return _Part(examples, np.frombuffer(same, np.uint64), np.frombuffer(held, np.bool_))


def _conversation(record: tables.Record, fill: Mapping[str, str]) -> tuple[Conversation, tuple[str, ...]]:
    found = conversation(record, fill=fill)
    before = before_answer(found)
    last = found.messages[len(before.messages)]
    return before, (_json(found), last.content or _json(last.tool_calls))


def _preference(record: tables.Record, fill: Mapping[str, str]) -> tuple[Conversation, tuple[str, ...]]:
    found = preference(record, fill=fill)
    return found.prompt, (_json(found.prompt), found.chosen, found.rejected)


def _json(it: Any) -> str:
    return msgspec.json.encode(it).decode()
