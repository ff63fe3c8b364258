"""Protobuf's encoding (https://protobuf.dev/programming-guides/encoding/), as far as a ModelInferRequest is counted
before anything is made of it, since two bytes of it can become an object of a hundred, and elements are put into an
answer without a copy more. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from runtimes.contract import Invalid
from runtimes.dialect.elements import NAMED_MAX, STRINGS_MAX, VALUES_MAX

VARINT, LENGTH_DELIMITED = 0, 2
#: The bytes of numbers that always have as many; what stays, groups, has been out of use for very long.
FIXED: Mapping[int, int] = MappingProxyType({1: 8, 5: 4})
VARINT_BYTES = 10


def _field(number: int) -> int:
    """How a field's bytes begin, if a message, a string or a list of numbers is in it."""
    return number << 3 | LENGTH_DELIMITED


ID, RAW_OUTPUT_CONTENTS = _field(3), _field(6)
"""Of a ModelInferResponse."""
RAW_INPUT_CONTENTS = _field(7)
"""Of a ModelInferRequest."""
INFER_RESPONSE = _field(2)
"""Of a ModelStreamInferResponse."""
FIELDS_MAX = 4 * NAMED_MAX
"""Of a message itself, one for each element of its lists."""
NESTED_FIELDS_MAX = STRINGS_MAX + FIELDS_MAX
"""Those of its tensors included."""
UNCOUNTED_BYTES_MAX = 64 * 1024
"""A message as short as this can't become long."""

#: Fields of messages whose own fields are counted, and of lists of numbers: those are None.
_CONTENTS = MappingProxyType({_field(number): None for number in range(1, 6)})
_TENSOR = MappingProxyType({_field(3): None, _field(5): _CONTENTS})
_REQUEST: Mapping[int, Any] = MappingProxyType({_field(5): _TENSOR, _field(6): MappingProxyType({})})


def fields(body: bytes | bytearray, at: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
    """Of the message there, each field: how it begins, where, and where what is in it begins and ends. Raises Invalid
    for what is no message."""
    while at < stop:
        start = at
        # Nearly all of these numbers are one byte, which is not worth a call.
        tag, begin = (body[at], at + 1) if body[at] < 0x80 else _varint(body, at)
        kind = tag & 7
        if kind == LENGTH_DELIMITED:
            short = begin < stop and body[begin] < 0x80
            size, begin = (body[begin], begin + 1) if short else _varint(body, begin)
            at = begin + size
        elif kind == VARINT:
            _, at = _varint(body, begin)
        else:
            at = begin + FIXED.get(kind, stop)
        if at > stop:
            raise Invalid("The message is no inference.ModelInferRequest.")
        yield tag, start, begin, at


def field(tag: int, content: bytes) -> tuple[bytes, bytes]:
    """How one begins in a message, by its tag and length, and what is in it."""
    size = len(content)
    if size < 0x80:
        return bytes((tag, size)), content
    head = bytearray((tag,))
    while size >= 0x80:
        head.append(size & 0x7F | 0x80)
        size >>= 7
    head.append(size)
    return bytes(head), content


def too_many(fields_max: int) -> Invalid:
    return Invalid(
        f"The message has more than {fields_max} inputs, outputs, parameters and elements that come one by one; send "
        "fewer, and tensors as raw_input_contents."
    )


def require_modest(message: bytes) -> None:
    """Raises Invalid for a ModelInferRequest of more fields, or numbers in lists, than are taken."""
    count = numbers = 0
    unseen: list[tuple[int, int, Mapping[int, Any]]] = [(0, len(message), _REQUEST)]
    while unseen:
        at, stop, inner = unseen.pop()
        for tag, _, begin, end in fields(message, at, stop):
            count += 1
            if count > NESTED_FIELDS_MAX:
                raise too_many(NESTED_FIELDS_MAX)
            if tag not in inner:
                continue
            if inner[tag] is not None:
                unseen.append((begin, end, inner[tag]))
                continue
            # Each ends with its only byte below 128.
            numbers += len(message[begin:end].translate(None, CONTINUED))
            if numbers > VALUES_MAX:
                raise Invalid(
                    f"The message has more than {VALUES_MAX} numbers in lists; send tensors as raw_input_contents."
                )


CONTINUED = bytes(range(128, 256))


def _varint(body: bytes | bytearray, at: int) -> tuple[int, int]:
    """The number there, and where the next byte is; one beyond the body if it does not end in time."""
    number = 0
    for index, byte in enumerate(body[at : at + VARINT_BYTES]):
        number |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            return number, at + index + 1
    return 0, len(body) + 1
