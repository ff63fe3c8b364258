"""What one side writes: frames are put down here and written together. RFC 9113 §5.2 says how much data may go."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from runtimes.http2.frames import (
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    FRAME_BYTES_MAX,
    HEAD,
    HEADERS,
    WINDOW_BYTES,
    frame,
)

if TYPE_CHECKING:
    from runtimes.http2.stream import Stream


class Sender:
    def __init__(self, write: Callable[[bytes], object]) -> None:
        self._write = write
        self._out: list[bytes] = []
        self._waiting: deque[Stream] = deque()
        """Those with something unsent and a window for it."""
        self.window = WINDOW_BYTES
        """What the peer takes on all streams together."""
        self.frame_bytes_max = FRAME_BYTES_MAX
        """What it takes in one frame."""
        self.full = False
        """The transport takes no more data for now."""

    def put(self, frame: bytes) -> None:
        self._out.append(frame)

    def put_data(self, stream: int, data: bytes, *, end: bool) -> None:
        """Data that the windows have room for."""
        size = len(data)
        self.window -= size
        self._out.append(HEAD.pack(size >> 8, size & 0xFF, DATA, END_STREAM if end else 0, stream))
        self._out.append(data)

    def put_fields(self, stream: int, block: bytes, *, end: bool) -> None:
        size, flags = len(block), END_STREAM if end else 0
        if size <= self.frame_bytes_max:
            self._out.append(HEAD.pack(size >> 8, size & 0xFF, HEADERS, flags | END_HEADERS, stream))
            self._out.append(block)
            return
        kind = HEADERS
        for at in range(0, size, self.frame_bytes_max):
            end_headers = END_HEADERS if at + self.frame_bytes_max >= size else 0
            self._out.append(frame(kind, flags | end_headers, stream, block[at : at + self.frame_bytes_max]))
            kind, flags = CONTINUATION, 0

    def flush(self) -> None:
        out = self._out
        if out:
            self._out = []
            self._write(out[0] if len(out) == 1 else b"".join(out))

    def close(self) -> None:
        """Write nothing any more, and know nobody: a cycle would lie about until somebody looks for garbage."""
        self._write = bool
        self._waiting.clear()

    def add(self, stream: Stream) -> None:
        """It has something to send, and its own window lets it."""
        self._waiting.append(stream)

    def go_on(self) -> None:
        """Send a part of each stream in turn, as long as there is room."""
        while self._waiting and self.window > 0 and not self.full:
            stream = self._waiting.popleft()
            if not stream.unsent:
                continue  # it was dropped
            stream.send_part()
            self.flush()  # after which the transport may be full
            if stream.unsent and stream.window > 0:
                self._waiting.append(stream)
