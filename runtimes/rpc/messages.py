"""gRPC's messages on their way: each behind a byte that says whether it is compressed, and its length in four."""

from __future__ import annotations

from struct import Struct

PREFIX = Struct(">BL")


Body = bytes | bytearray
Piece = tuple[bool, Body]
"""Whether it is compressed, and the message."""


class TooLong(Exception):
    """A message is longer than what is taken."""


class Messages:
    """Cuts what arrives on a stream into messages of at most `bytes_max`. A long one is put together where it grows,
    for two copies of it would be one too many."""

    __slots__ = ("_begun", "_compressed", "_missing_bytes", "bytes_max")

    def __init__(self, *, bytes_max: int) -> None:
        self.bytes_max = bytes_max
        self._begun = bytearray()
        """Of a prefix, and once that is whole, of a message."""
        self._missing_bytes = 0
        """Of the message, if there is a prefix."""
        self._compressed = False

    @property
    def torn(self) -> bool:
        """A message has begun and is not whole."""
        return bool(self._begun or self._missing_bytes)

    def feed(self, data: bytes) -> list[Piece]:
        """What is whole by now. Raises TooLong at the prefix of a message that would be."""
        found: list[Piece] = []
        at, end = 0, len(data)
        while at < end:
            if not self._missing_bytes:
                if self._begun or end - at < PREFIX.size:
                    wanted = PREFIX.size - len(self._begun)
                    self._begun += data[at : at + wanted]
                    at += wanted
                    if len(self._begun) < PREFIX.size:
                        break
                    compressed, size = PREFIX.unpack(self._begun)
                    self._begun = bytearray()
                else:
                    compressed, size = PREFIX.unpack_from(data, at)
                    at += PREFIX.size
                if size > self.bytes_max:
                    raise TooLong(f"a message of {size} bytes")
                if size <= end - at:
                    found.append((compressed != 0, data[at : at + size]))
                    at += size
                    continue
                self._compressed, self._missing_bytes = compressed != 0, size
            part = data[at : at + self._missing_bytes]
            self._begun += part
            at += len(part)
            self._missing_bytes -= len(part)
            if not self._missing_bytes:
                found.append((self._compressed, self._begun))
                self._begun = bytearray()
        return found


def framed(message: bytes) -> bytes:
    """As it goes out."""
    return PREFIX.pack(0, len(message)) + message
