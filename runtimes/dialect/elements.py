"""What an inference request of the Open Inference Protocol says, whichever wire it came by, and its elements as plain
values. Imports no numpy: a gateway whose models all generate text has no use for it.

Datatypes and the framing of BYTES are the protocol's (https://kserve.github.io/website/latest/modelserving/data_plane/v2_protocol/):
little-endian, row by row, each string behind its length in four bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence, Sized
from types import MappingProxyType
from typing import Any, get_args

import msgspec

from runtimes.contract import Datatype, Invalid
from runtimes.dialect.bounded import census

WIDTHS: Mapping[str, int] = MappingProxyType(
    {
        **{"BOOL": 1, "UINT8": 1, "UINT16": 2, "UINT32": 4, "UINT64": 8, "INT8": 1, "INT16": 2, "INT32": 4, "INT64": 8},
        **{"FP16": 2, "FP32": 4, "FP64": 8},
    }
)
"""Bytes of an element, of the datatypes that have a fixed one."""
NAMED_MAX = 256
"""Inputs of one message; its outputs; the parameters of either, or of all of it."""
RANK_MAX = 16
"""Axes of a tensor."""
NAME_CHARS_MAX = 256
"""Of an input or an output."""
QUOTED_CHARS_MAX = 100
"""Of whatever else was sent and an error repeats."""
SIZE_MAX = 1 << 63
"""Along one axis; whatever is beyond is not even told."""
ELEMENTS_MAX = 1 << 31
"""Elements of a tensor, an empty axis counted as one."""
VALUES_MAX = 1 << 20
"""Elements of a tensor that come one by one, as JSON or protobuf's lists; as bytes they come all at once."""
LISTS_MAX = 1 << 17
"""Lists in which the elements of a tensor come in JSON, if they are nested."""
STRINGS_MAX = 1 << 16
"""Elements of a tensor of BYTES."""


class Part(msgspec.Struct, frozen=True, gc=False):
    """One input as it came: either `raw` bytes, or `values` one by one, in JSON or already decoded."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    raw: bytes | memoryview | None = None
    values: msgspec.Raw | Sequence[Any] = ()


class Wanted(msgspec.Struct, frozen=True, gc=False):
    """One output that is asked for."""

    name: str
    binary: bool = False
    """As bytes behind the JSON; gRPC's are bytes always."""
    classes: int = 0
    """How many of each row's best columns are told in place of all its numbers; 0 for the numbers."""


class Message(msgspec.Struct, frozen=True, gc=False):
    """One request."""

    id: str
    parts: tuple[Part, ...]
    outputs: tuple[Wanted, ...]
    """Empty for all."""
    parameters: Mapping[str, Any]
    binary: bool = False
    """Outputs that are not listed go as bytes."""

    @property
    def rows(self) -> int:
        """Of the first input; a tensor without axes is one."""
        return self.parts[0].shape[0] if self.parts and self.parts[0].shape else 1


class Encoded(msgspec.Struct, frozen=True, gc=False):
    """One output, ready for the wire: its bytes, or a list for JSON."""

    name: str
    datatype: Datatype
    shape: tuple[int, ...]
    data: bytes | list[Any]


def require_few(what: str, given: Sized) -> None:
    """Before they are looked at one by one. Raises Invalid."""
    if len(given) > NAMED_MAX:
        raise Invalid(f"{len(given)} {what} are given; at most {NAMED_MAX} are taken.", param=what)


def require_name(what: str, name: str) -> str:
    """The name of an input or an output, which errors quote. Raises Invalid."""
    if len(name) > NAME_CHARS_MAX:
        raise Invalid(
            f"{what} `{quoted(name)}` is none of the model's: no name is longer than {NAME_CHARS_MAX} characters."
        )
    return name


def quoted(said: object) -> str:
    """What a client sent, as much of it as an error repeats."""
    text = str(said)
    return text if len(text) <= QUOTED_CHARS_MAX else f"{text[: QUOTED_CHARS_MAX - 1]}…"


def shaped(name: str, sizes: Sequence[int]) -> tuple[int, ...]:
    """An input's shape, by which a call is reckoned before anything else of it is looked at. Raises Invalid for one
    that can't be."""
    sizes = tuple(sizes)
    least, most = min(sizes, default=1), max(sizes, default=1)
    # Before they are told: Python writes out no integer of thousands of digits.
    if least < -SIZE_MAX or most > SIZE_MAX:
        raise Invalid(f"input `{name}`: a size in its shape is beyond ±2^63.", param=name)
    if len(sizes) > RANK_MAX:
        raise Invalid(f"input `{name}` has {len(sizes)} axes; at most {RANK_MAX} are taken.", param=name)
    if least < 0:
        raise Invalid(f"input `{name}` has the shape {quoted(list(sizes))}; no size is negative.", param=name)
    if math.prod(sizes if least else [max(size, 1) for size in sizes]) > ELEMENTS_MAX:
        raise Invalid(
            f"input `{name}` has the shape {quoted(list(sizes))}, of more than {ELEMENTS_MAX} elements.", param=name
        )
    return sizes


def classes(name: str, found: object) -> int:
    """Of an output: what its parameter `classification` says. Raises Invalid."""
    if not isinstance(found, int) or isinstance(found, bool) or not 0 <= found <= ELEMENTS_MAX:
        raise Invalid(f"output `{name}`: `classification` must be a number of classes.", param=name)
    return found


def require_datatype(part: Part) -> Datatype:
    """Raises Invalid for one that nothing here can hold."""
    for datatype in DATATYPES:
        if datatype == part.datatype:
            return datatype
    if part.datatype == "BF16":
        raise Invalid(f"input `{part.name}` is BF16, which is not served; send FP32.", param=part.name)
    known = ", ".join(DATATYPES)
    raise Invalid(
        f"input `{part.name}` has an unknown datatype, {quoted(part.datatype)}; known are {known}.", param=part.name
    )


DATATYPES: tuple[Datatype, ...] = get_args(Datatype)


def count(part: Part) -> int:
    """Elements that its shape promises."""
    return math.prod(part.shape)


def require_size(part: Part, expected: int) -> bytes | memoryview:
    """Its bytes. Raises Invalid unless there are so many."""
    assert part.raw is not None
    if len(part.raw) != expected:
        raise Invalid(
            f"input `{part.name}` brings {len(part.raw)} bytes; {part.datatype} of the shape "
            f"{quoted(list(part.shape))} takes {expected}.",
            param=part.name,
        )
    return part.raw


def values(part: Part) -> Sequence[Any]:
    """Its elements, row by row: `bytes` or `str` of BYTES. Of raw bytes only BYTES and BOOL are read here."""
    elements = count(part)
    most = STRINGS_MAX if part.datatype == "BYTES" else VALUES_MAX
    if elements > most:
        hint = "" if part.datatype == "BYTES" else "; send them as binary data"
        raise Invalid(f"input `{part.name}` has {elements} elements; at most {most} are taken{hint}.", param=part.name)
    if part.raw is not None:
        return _strings(part, elements) if part.datatype == "BYTES" else _flags(part, elements)
    found = _decoded(part, part.values) if isinstance(part.values, msgspec.Raw) else part.values
    if len(found) != elements:
        raise Invalid(
            f"input `{part.name}` brings {len(found)} elements; the shape {quoted(list(part.shape))} has {elements}.",
            param=part.name,
        )
    return found


def joined(strings: Iterable[bytes | str]) -> bytes:
    """A tensor of BYTES as its bytes."""
    parts: list[bytes] = []
    for string in strings:
        text = string.encode() if isinstance(string, str) else string
        parts += (len(text).to_bytes(4, "little"), text)
    return b"".join(parts)


def too_large(part: Part) -> Invalid:
    return Invalid(f"input `{part.name}` holds a number that {part.datatype} can't.", param=part.name)


def _strings(part: Part, elements: int) -> list[bytes]:
    raw, found, at = part.raw or b"", [], 0
    for _ in range(elements):
        start = at + 4
        at = start + int.from_bytes(raw[at:start], "little")
        if at > len(raw) or start > len(raw):
            raise Invalid(
                f"input `{part.name}` ends within one of its {elements} strings; each stands behind its length in four "
                "bytes, little-endian.",
                param=part.name,
            )
        found.append(bytes(raw[start:at]))
    if at != len(raw):
        raise Invalid(
            f"input `{part.name}` brings {len(raw) - at} bytes more than its {elements} strings.", param=part.name
        )
    return found


def _flags(part: Part, elements: int) -> list[bool]:
    raw = bytes(require_size(part, elements))
    if raw.translate(None, b"\0\1"):
        raise Invalid(f"input `{part.name}` is BOOL; each of its bytes must be 0 or 1.", param=part.name)
    return [byte == 1 for byte in raw]


# ---- values in JSON ----------------------------------------------------------------------------------------

_NESTED = msgspec.json.Decoder(list[Any])
_FLAT: Mapping[str, msgspec.json.Decoder[Any]] = MappingProxyType(
    {
        **{name: msgspec.json.Decoder(list[int]) for name in WIDTHS if "INT" in name},
        **{name: msgspec.json.Decoder(list[float]) for name in WIDTHS if "FP" in name},
        "BOOL": msgspec.json.Decoder(list[bool]),
        "BYTES": msgspec.json.Decoder(list[str]),
    }
)


def _decoded(part: Part, data: msgspec.Raw) -> list[Any]:
    """Flat, or nested as the shape is."""
    datatype = require_datatype(part)
    most = STRINGS_MAX if datatype == "BYTES" else VALUES_MAX
    if len(memoryview(data)) > STRINGS_MAX:
        lists, commas = census(data, most=most + LISTS_MAX)
        if commas >= most or lists > LISTS_MAX:
            raise Invalid(
                f"input `{part.name}` brings more than {most} elements, or more than {LISTS_MAX} lists of them; send "
                "them as binary data.",
                param=part.name,
            )
    flat = _FLAT[datatype]
    try:
        try:
            found: list[Any] = flat.decode(data)
        except msgspec.ValidationError:
            nested = _NESTED.decode(data)
            is_nested = any(isinstance(row, list) for row in nested)
            found = msgspec.convert(_flattened(part, nested) if is_nested else nested, flat.type)
    except UnicodeDecodeError:
        raise Invalid(f"input `{part.name}` is not valid UTF-8.", param=part.name) from None
    except (msgspec.MsgspecError, RecursionError) as error:
        if "out of range" in str(error):
            raise too_large(part) from None
        raise Invalid(
            f"input `{part.name}` must bring a list of {part.datatype} elements, flat or nested as its shape.",
            param=part.name,
        ) from None
    return found


def _flattened(part: Part, nested: list[Any]) -> list[Any]:
    rows: list[Any] = [nested]
    for size in part.shape:
        if not all(isinstance(row, list) and len(row) == size for row in rows):
            raise Invalid(
                f"input `{part.name}` is ragged, or not of the shape {quoted(list(part.shape))}; rows of an axis "
                "have one length.",
                param=part.name,
            )
        rows = [element for row in rows for element in row]
    return rows
