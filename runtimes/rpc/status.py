"""How a call of gRPC ends, and by when it must: what its header fields say."""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping
from types import MappingProxyType
from urllib.parse import quote_from_bytes, unquote

CONTENT_TYPE = b"application/grpc"
_GRPC = re.compile(rb"application/grpc(?:\+proto)?(?:[\t ]*;.*)?", re.IGNORECASE)


class Status(enum.IntEnum):
    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


#: What an answer means that does not come from gRPC, by its HTTP status.
OF_HTTP: Mapping[bytes, Status] = MappingProxyType(
    {
        b"400": Status.INTERNAL,
        b"401": Status.UNAUTHENTICATED,
        b"403": Status.PERMISSION_DENIED,
        b"404": Status.UNIMPLEMENTED,
        **dict.fromkeys((b"429", b"502", b"503", b"504"), Status.UNAVAILABLE),
    }
)


def is_grpc(content_type: bytes) -> bool:
    """With protobuf inside, and not what only has the same beginning, such as gRPC-Web."""
    return _GRPC.fullmatch(content_type) is not None


_TIMEOUT = re.compile(rb"([0-9]{1,8})([HMSmun])")
_UNIT_S: Mapping[bytes, float] = MappingProxyType(
    {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}
)


def timeout_s(field: bytes) -> float:
    """What `grpc-timeout` says. Raises ValueError."""
    found = _TIMEOUT.fullmatch(field)
    if found is None:
        raise ValueError("grpc-timeout must be up to eight digits and a unit")
    return int(found[1]) * _UNIT_S[found[2]]


def timeout(left_s: float) -> bytes:
    """The same the other way, rounded up: in microseconds up to a hundred seconds, else in milliseconds or seconds."""
    for unit, per_s in ((b"u", 1e6), (b"m", 1e3), (b"S", 1.0)):
        number = int(left_s * per_s) + 1
        if number < 10**8:
            return b"%d%b" % (number, unit)
    return b"99999999S"


def message(text: str) -> bytes:
    """As it may stand in `grpc-message`: percent-encoded where it is not plain ASCII."""
    return quote_from_bytes(text.encode(errors="replace"), safe=_PLAIN).encode()


_PLAIN = "".join(map(chr, range(0x20, 0x7F))).replace("%", "")


def said(field: bytes) -> str:
    """What `grpc-message` says."""
    return unquote(field.decode("latin-1"), errors="replace")
