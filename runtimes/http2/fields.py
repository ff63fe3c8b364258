"""Header fields on the wire: HPACK (RFC 7541), and which of them may stand where (RFC 9113 §8.2 and §8.3).

The library decodes. Clients say the same with each call, in the same few bytes once their table knows it, so a block
that was read and has changed nothing is not read again until something does. What we write changes no table at all.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from hpack import Decoder as Hpack
from hpack import HPACKError, OversizedHeaderListError
from hpack.table import HeaderTable

from runtimes.http2.frames import Code, ConnectionFault

#: Blocks that are remembered of one connection.
KNOWN_MAX = 32
TABLE_BYTES = 4_096
"""Of the table, which is what both sides begin with and nobody here changes."""

#: A block that begins with a byte from here to there resizes the table, RFC 7541 §6.3.
RESIZES = b"\x20", b"\x40"

NAME = re.compile(rb"[!#$%&'*+.^_`|~0-9a-z-]+")
VALUE = re.compile(rb"(?:[\x21-\x7e\x80-\xff](?:[\t\x20-\x7e\x80-\xff]*[\x21-\x7e\x80-\xff])?)?")
CONNECTION_SPECIFIC = frozenset({b"connection", b"proxy-connection", b"keep-alive", b"transfer-encoding", b"upgrade"})
REQUEST = frozenset({b":method", b":scheme", b":path"})
RESPONSE = frozenset({b":status"})


class Fields(NamedTuple):
    """One block. Of a name that is given twice, the last value is kept."""

    pseudo: Mapping[bytes, bytes]
    regular: Mapping[bytes, bytes]
    size: int
    """As RFC 9113 §6.5.2 counts it, with 32 for each field."""
    number: int
    fault: str
    """Why no message may have such fields; empty if one may."""

    @property
    def is_request(self) -> bool:
        return not self.fault and self.pseudo.keys() - {b":authority"} == REQUEST and bool(self.pseudo[b":path"])

    @property
    def is_response(self) -> bool:
        return not self.fault and self.pseudo.keys() == RESPONSE

    @property
    def is_interim(self) -> bool:
        return self.pseudo.get(b":status", b"")[:1] == b"1"


class Decoder:
    """What the peer's blocks say. They must all come by here, in their order, for each may change the next."""

    def __init__(self, *, bytes_max: int) -> None:
        self._hpack = Hpack(max_header_list_size=bytes_max)
        self._table = self._hpack.header_table = _Table()
        self._hpack.max_allowed_table_size = TABLE_BYTES
        self._known: dict[bytes, Fields] = {}
        self._changes = 0

    def read(self, block: bytes) -> Fields:
        found = self._known.get(block)
        if found is not None:
            return found
        try:
            pairs = self._hpack.decode(block, raw=True)
        except OversizedHeaderListError:
            raise ConnectionFault(Code.ENHANCE_YOUR_CALM, "the header is too large") from None
        except (HPACKError, IndexError, ValueError, UnicodeError):
            raise ConnectionFault(Code.COMPRESSION_ERROR, "the header cannot be read") from None
        found = _fields(pairs)
        if self._changes != self._table.changes or RESIZES[0] <= block[:1] < RESIZES[1]:
            self._changes = self._table.changes
            self._known.clear()
        elif len(self._known) < KNOWN_MAX:
            self._known[block] = found
        return found


class _Table(HeaderTable):
    """One that counts what was added to it."""

    def __init__(self) -> None:
        super().__init__()
        self.changes = 0

    def add(self, name: bytes, value: bytes) -> None:
        self.changes += 1
        super().add(name, value)


def _fields(pairs: Iterable[tuple[bytes, bytes]]) -> Fields:
    pseudo: dict[bytes, bytes] = {}
    regular: dict[bytes, bytes] = {}
    size = number = 0
    fault = ""
    for name, value in pairs:
        number += 1
        size += len(name) + len(value) + 32
        if name[:1] == b":":
            if regular or name in pseudo:
                fault = "a pseudo-header field behind others, or twice"
            pseudo[name] = value
        elif not NAME.fullmatch(name) or name in CONNECTION_SPECIFIC or (name == b"te" and value != b"trailers"):
            fault = "a field that HTTP/2 does not have"
        else:
            # gRPC's own libraries let blanks through at a value's ends; gRPC's PROTOCOL-HTTP2.md has them taken off.
            regular[name] = value = value.strip(b" \t")
        if not VALUE.fullmatch(value):
            fault = "a value with characters that none may have"
    return Fields(pseudo, regular, size, number, fault)


def encoded(fields: Iterable[tuple[bytes, bytes]]) -> bytes:
    """A block, or a part of one: literals that are not indexed (RFC 7541 §6.2.2), and not Huffman-coded either."""
    return b"".join([b"\0%b%b%b%b" % (_length(name), name, _length(value), value) for name, value in fields])


def _length(text: bytes) -> bytes:
    """RFC 7541 §5.1, with a prefix of seven bits."""
    size = len(text)
    if size < 0x7F:
        return bytes((size,))
    size -= 0x7F
    found = bytearray((0x7F,))
    while size > 0x7F:
        found.append(size & 0x7F | 0x80)
        size >>= 7
    return bytes((*found, size))
