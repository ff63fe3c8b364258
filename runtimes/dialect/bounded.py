"""JSON that is counted before anything is made of it: two bytes of a body can become a list of a hundred."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import msgspec

from runtimes.contract import Invalid

JSON_VALUES_MAX = 4096
"""Lists, objects and what stands in them, where no tensor's elements are: the parameters of a message, say."""
PIECE_BYTES = 64 * 1024


class Census(NamedTuple):
    """What is in some JSON."""

    lists: int
    """And objects."""
    commas: int


def census(json: msgspec.Raw | bytes, *, most: int) -> Census:
    """Of well-formed JSON, but not much further than `most` of both together; what stands within its strings is not
    counted."""
    view, lists, commas = memoryview(json), 0, 0
    for piece in unquoted(view):
        lists += piece.count(b"[") + piece.count(b"{")
        commas += piece.count(b",")
        if lists + commas > most:
            break
    return Census(lists, commas)


def unquoted(json: memoryview) -> Iterator[bytes]:
    """What stands outside of the strings of well-formed JSON, from one piece of it after the other, so that none takes
    long and none takes much memory."""
    start = in_string = 0
    while start < len(json):
        piece = bytes(json[start : start + PIECE_BYTES])
        if (len(piece) - len(piece.rstrip(b"\\"))) % 2:  # never between a backslash and what it escapes
            piece = bytes(json[start : start + PIECE_BYTES + 1])
        start += len(piece)
        texts = piece.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')
        yield b"".join(texts[in_string::2])
        in_string = (in_string + len(texts) - 1) % 2


def require_values(what: str, json: msgspec.Raw | bytes, *, param: str | None = None) -> None:
    """Raises Invalid if so much is in it that it must not be decoded."""
    if len(memoryview(json)) <= JSON_VALUES_MAX:
        return
    if sum(census(json, most=JSON_VALUES_MAX)) > JSON_VALUES_MAX:
        raise Invalid(f"{what}: more than {JSON_VALUES_MAX} values are not taken.", param=param)


def few(element: Any, count_max: int) -> Any:
    """The type of a list of `element` that decodes no more of them than one too many. See `listed`."""
    fields = [(f"at_{index}", element | msgspec.UnsetType, msgspec.UNSET) for index in range(count_max + 1)]
    return msgspec.defstruct("Few", fields, array_like=True, frozen=True, gc=False)


def listed(what: str, found: Any) -> list[Any]:
    """What is in such a list. Raises Invalid if there is too much."""
    elements: list[Any] = []
    for name in found.__struct_fields__:
        element = getattr(found, name)
        if element is msgspec.UNSET:
            return elements
        elements.append(element)
    raise Invalid(f"at most {len(elements) - 1} {what} are taken; more are given.", param=what)
