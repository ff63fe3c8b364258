"""HTTP/2's frames: what they are called, and how one is written. RFC 9113 §4, §6 and §7."""

from __future__ import annotations

import enum
from struct import Struct

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
"""What a client says first, §3.4."""

#: Length (in two parts), type, flags, stream.
HEAD = Struct(">HBBBL")
HEAD_BYTES = HEAD.size
#: What a frame's payload may have if nobody has said otherwise, which we never do; and the most that can be said.
FRAME_BYTES_MAX, FRAME_BYTES_MOST = 16_384, 0xFF_FFFF
#: Of either window at first; and the most it may ever be.
WINDOW_BYTES, WINDOW_BYTES_MOST = 65_535, 0x7FFF_FFFF
STREAM_MOST = 0x7FFF_FFFF

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)

#: Flags. The first is ACK on SETTINGS and PING.
END_STREAM = ACK = 0x1
END_HEADERS = 0x4
PADDED = 0x8
PRIORITISED = 0x20

#: Settings, §6.5.2.
HEADER_TABLE_SIZE, ENABLE_PUSH, MAX_CONCURRENT_STREAMS, INITIAL_WINDOW_SIZE, MAX_FRAME_SIZE, MAX_HEADER_LIST_SIZE = (
    range(1, 7)
)
SETTING = Struct(">HL")
#: What a prioritised header has before its block.
PRIORITY_BYTES = 5


class Code(enum.IntEnum):
    """Why a stream or a connection ends, §7."""

    NO_ERROR = 0
    PROTOCOL_ERROR = 1
    INTERNAL_ERROR = 2
    FLOW_CONTROL_ERROR = 3
    SETTINGS_TIMEOUT = 4
    STREAM_CLOSED = 5
    FRAME_SIZE_ERROR = 6
    REFUSED_STREAM = 7
    CANCEL = 8
    COMPRESSION_ERROR = 9
    CONNECT_ERROR = 10
    ENHANCE_YOUR_CALM = 11
    INADEQUATE_SECURITY = 12
    HTTP_1_1_REQUIRED = 13


class ConnectionFault(Exception):
    """The peer broke the rules in a way that ends the connection, §5.4.1."""

    def __init__(self, code: Code, why: str) -> None:
        super().__init__(why)
        self.code = code


class StreamFault(Exception):
    """The same, of one stream only, §5.4.2."""

    def __init__(self, code: Code, why: str) -> None:
        super().__init__(why)
        self.code = code


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    size = len(payload)
    return HEAD.pack(size >> 8, size & 0xFF, kind, flags, stream) + payload


def settings(given: dict[int, int]) -> bytes:
    return frame(SETTINGS, 0, 0, b"".join([SETTING.pack(*it) for it in given.items()]))


def window_update(stream: int, more_bytes: int) -> bytes:
    return frame(WINDOW_UPDATE, 0, stream, more_bytes.to_bytes(4, "big"))


def rst_stream(stream: int, code: int) -> bytes:
    return frame(RST_STREAM, 0, stream, code.to_bytes(4, "big"))


def goaway(last_stream: int, code: int, why: str = "") -> bytes:
    return frame(GOAWAY, 0, 0, last_stream.to_bytes(4, "big") + code.to_bytes(4, "big") + why.encode())
