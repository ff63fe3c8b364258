"""What is read becomes frames: whole, of a size that they may have, and header blocks in one piece. RFC 9113 §4, §6."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple

import msgspec

from runtimes.http2.frames import (
    ACK,
    CONTINUATION,
    DATA,
    END_HEADERS,
    FRAME_BYTES_MAX,
    GOAWAY,
    HEAD,
    HEAD_BYTES,
    HEADERS,
    PADDED,
    PING,
    PRIORITISED,
    PRIORITY,
    PRIORITY_BYTES,
    PUSH_PROMISE,
    RST_STREAM,
    SETTING,
    SETTINGS,
    STREAM_MOST,
    WINDOW_UPDATE,
    Code,
    ConnectionFault,
)


class Frame(msgspec.Struct, gc=False):
    kind: int
    flags: int
    stream: int
    payload: bytes
    """Without padding and priority, and of a header all of it, continuations included."""
    size: int
    """What flow control counts."""


class Rule(NamedTuple):
    """What a kind of frame must be like."""

    of_stream: bool | None
    """On a stream, on none, or either."""
    size: int | None = None
    least: int = 0
    unit: int = 1


RULES: Mapping[int, Rule] = MappingProxyType(
    {
        DATA: Rule(True),
        HEADERS: Rule(True),
        PRIORITY: Rule(True),
        RST_STREAM: Rule(True, size=4),
        SETTINGS: Rule(False, unit=SETTING.size),
        PUSH_PROMISE: Rule(True),
        PING: Rule(False, size=8),
        GOAWAY: Rule(False, least=8),
        WINDOW_UPDATE: Rule(None, size=4),
        CONTINUATION: Rule(True),
    }
)
ANY = Rule(None)


class Reader:
    """`greeting` is what must come before any frame. A header block may take `block_bytes_max`, as it is on the wire,
    and as many frames as those would need: one that never ends would be read for ever."""

    def __init__(self, *, greeting: bytes, block_bytes_max: int) -> None:
        self._greeting = greeting
        self._block_bytes_max = block_bytes_max
        self._rest = b""
        """Read, and no whole frame yet."""
        self._begun: Frame | None = None
        """A header whose end has not come, and its block so far."""
        self._block = bytearray()
        self._parts = 0
        self._settled = False
        """Settings, which come first, have come."""

    @property
    def amid_header(self) -> bool:
        return self._begun is not None or self._rest[KIND : KIND + 1] == HEADERS.to_bytes()

    def read(self, data: bytes) -> Iterator[Frame]:
        """Raises ConnectionFault, perhaps behind some frames that were right."""
        if self._rest:
            data = self._rest + data
        at, end = 0, len(data)
        if self._greeting:
            if not self._greeting.startswith(data[: len(self._greeting)]):
                raise ConnectionFault(Code.PROTOCOL_ERROR, "this port speaks HTTP/2 from the first byte")
            if end < len(self._greeting):
                self._rest = data
                return
            at, self._greeting = len(self._greeting), b""
        while end - at >= HEAD_BYTES:
            high, low, kind, flags, stream = HEAD.unpack_from(data, at)
            size = high << 8 | low
            if size > FRAME_BYTES_MAX:
                raise ConnectionFault(Code.FRAME_SIZE_ERROR, "a frame that is too large")
            begin = at + HEAD_BYTES
            if end - begin < size:
                break
            at = begin + size
            self._rest = b""
            frame = self._framed(kind, flags, stream & STREAM_MOST, data[begin:at], size)
            if frame is not None:
                yield frame
        self._rest = data[at:]

    def _framed(self, kind: int, flags: int, stream: int, payload: bytes, size: int) -> Frame | None:
        rule = RULES.get(kind, ANY)
        if rule.of_stream is not None and rule.of_stream != (stream > 0):
            raise ConnectionFault(Code.PROTOCOL_ERROR, f"a frame of type {kind} on stream {stream}")
        if size % rule.unit or size < rule.least or size != (rule.size or size):
            raise ConnectionFault(Code.FRAME_SIZE_ERROR, f"a frame of type {kind} with {size} bytes")
        if (self._begun is not None) != (kind == CONTINUATION):
            raise ConnectionFault(Code.PROTOCOL_ERROR, "a header in pieces that do not follow each other")
        if not self._settled:
            if kind != SETTINGS or flags & ACK:
                raise ConnectionFault(Code.PROTOCOL_ERROR, "the settings did not come first")
            self._settled = True
        if kind == CONTINUATION:
            return self._continued(flags, stream, payload)
        if kind in (DATA, HEADERS) and flags & PADDED:
            payload = _unpadded(payload)
        if kind == HEADERS:
            if flags & PRIORITISED:
                if len(payload) < PRIORITY_BYTES:
                    raise ConnectionFault(Code.FRAME_SIZE_ERROR, "a header without the priority that it announces")
                payload = payload[PRIORITY_BYTES:]
            if not flags & END_HEADERS:
                self._begun = Frame(kind, flags, stream, b"", 0)
                self._block, self._parts = bytearray(payload), 1
                return None
        return Frame(kind, flags, stream, payload, size)

    def _continued(self, flags: int, stream: int, payload: bytes) -> Frame | None:
        begun = self._begun
        if begun is None or stream != begun.stream:
            raise ConnectionFault(Code.PROTOCOL_ERROR, "a header in pieces that do not follow each other")
        self._block += payload
        self._parts += 1
        if (
            len(self._block) > self._block_bytes_max
            or self._parts > PARTS_MORE_MAX + self._block_bytes_max // FRAME_BYTES_MAX
        ):
            raise ConnectionFault(Code.ENHANCE_YOUR_CALM, "a header that does not end")
        if not flags & END_HEADERS:
            return None
        self._begun = None
        begun.payload = bytes(self._block)
        return begun


#: Where a frame says what it is.
KIND = 3
#: Frames that a header may come in beyond those that it would fill.
PARTS_MORE_MAX = 8


def _unpadded(payload: bytes) -> bytes:
    """§6.1; padding may take all that is left, and no more."""
    if not payload or payload[0] >= len(payload):
        raise ConnectionFault(Code.PROTOCOL_ERROR, "more padding than payload")
    return payload[1 : len(payload) - payload[0]]
