"""Conversations, and preferences between answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import msgspec

from training.contract import Answers, Array, Examples, Preferred, Rows, strings
from training.data import split, tables
from training.errors import DataError
from training.llm.conversation import Conversation, Preference, Unreadable, conversation, preference
from training.spec.llm import Conversations, Preferences

T = TypeVar("T")

_DECODER = msgspec.json.Decoder(Conversation)


def load(spec: Conversations) -> Rows:
    """Read the files that the recipe names. What precedes an answer in both parts stays in the test part only."""
    return _rows(spec, conversation, lambda it: _key(before_answer(it)), _examples)


def load_preferences(spec: Preferences) -> Rows:
    """The same of preferences."""
    return _rows(spec, preference, lambda it: _key(it.prompt), _pairs)


def before_answer(it: Conversation) -> Conversation:
    """All that precedes its last answer."""
    last = max(at for at, message in enumerate(it.messages) if message.role == "assistant")
    return msgspec.structs.replace(it, messages=it.messages[:last])


def decoded(examples: Examples) -> list[Conversation]:
    """The conversations that examples hold."""
    return [_DECODER.decode(it) for it in examples.inputs["conversation"]]


def preferences(examples: Examples) -> list[Preference]:
    """Each conversation with its two answers."""
    assert isinstance(examples.targets, Preferred)
    return [
        Preference(prompt, chosen, rejected)
        for prompt, chosen, rejected in zip(
            decoded(examples), examples.targets.chosen, examples.targets.rejected, strict=True
        )
    ]


def _rows(
    spec: Conversations | Preferences,
    read: Callable[..., T],
    key: Callable[[T], str],
    examples: Callable[[Sequence[T]], Examples],
) -> Rows:
    train = _read(spec.train, spec.fill, read) if spec.train else []
    test = _read(spec.test, spec.fill, read) if spec.test else []
    if train and not test:
        test = [it for it in train if split.held_out(key(it), spec.test_share)]
    if not test:
        raise DataError("there are no rows to test with: set data.test, or give data.train more rows")
    train, leaked = split.apart(train, test, key)
    notes = (f"{leaked} training rows are also in the test part and were left out",) if leaked and spec.test else ()
    return Rows(examples(train), examples(test), notes)


def _read(file: str, fill: Mapping[str, str], read: Callable[..., T]) -> list[T]:
    found = []
    for number, record in enumerate(tables.read(file), 1):
        try:
            found.append(read(record, fill=fill))
        except Unreadable as error:
            raise DataError(f"{file}, row {number}: {error}") from error
    return found


def _key(it: Conversation) -> str:
    return "\n".join(message.content for message in it.messages)


def _examples(rows: Sequence[Conversation]) -> Examples:
    last = [it.messages[len(before_answer(it).messages)] for it in rows]
    said = [it.content or msgspec.json.encode(it.tool_calls).decode() for it in last]
    return Examples({"conversation": _encoded(rows)}, Answers(strings(said)))


def _pairs(rows: Sequence[Preference]) -> Examples:
    targets = Preferred(strings([it.chosen for it in rows]), strings([it.rejected for it in rows]))
    return Examples({"conversation": _encoded([it.prompt for it in rows])}, targets)


def _encoded(rows: Sequence[Any]) -> Array:
    return strings([msgspec.json.encode(it).decode() for it in rows])
