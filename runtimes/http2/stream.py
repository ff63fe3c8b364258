"""One stream of a connection: a request and its answer, seen from either side. RFC 9113 §5."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from runtimes.http2.fields import Fields
from runtimes.http2.frames import WINDOW_BYTES_MOST, Code, StreamFault, window_update

if TYPE_CHECKING:
    from runtimes.http2.connection import Connection

#: What the peer may send ahead on one stream before any of it is used.
AHEAD_BYTES_MAX = 262_144
#: What is unsent is written in parts of this size, between which other streams have their turn.
PART_BYTES = 65_536


class Stream:
    """What becomes of what arrives, its users say: `take_fields`, `take_data`, `cut`, `sent`. What the peer has no room
    for yet is kept here, and goes out as it makes some."""

    __slots__ = (
        "_ahead_bytes",
        "_due_bytes",
        "_trailers",
        "_unsent",
        "begun",
        "connection",
        "ended_here",
        "ended_there",
        "id",
        "window",
    )

    def __init__(self, connection: Connection, id: int) -> None:
        self.connection = connection
        self.id = id
        self.window = connection.stream_window
        """What the peer takes; below zero if it has changed its mind, §6.9.2."""
        self._ahead_bytes = 0
        """Received, and not given back to the peer's window."""
        self._due_bytes: int | None = None
        """Of data, what must come still, if that was said."""
        self._unsent: deque[memoryview] = deque()
        self._trailers: bytes | None = None
        """What goes out behind that."""
        self.begun = False
        """The header of what arrives is here."""
        self.ended_here = False
        """Nothing is added any more; some may be unsent."""
        self.ended_there = False

    # ---- what arrives

    def take_fields(self, fields: Fields, *, ended: bool) -> None:
        """The header of the message, or its trailers; `ended` says that nothing follows."""
        raise NotImplementedError

    def take_data(self, data: bytes, *, ended: bool) -> bool:
        """True if more is wanted at once; else `refill` says so later."""
        raise NotImplementedError

    def cut(self, code: int, why: str) -> None:
        """The stream is over before its end: reset by the peer, for a fault of it, or with its connection."""
        raise NotImplementedError

    def sent(self) -> None:
        """Nothing is unsent any more."""

    def refill(self) -> None:
        """What came is used: let the peer send as much again."""
        if self._ahead_bytes > AHEAD_BYTES_MAX // 2 and not self.ended_there:
            self.connection.out.put(window_update(self.id, self._ahead_bytes))
            self._ahead_bytes = 0

    # ---- what goes out, once the connection is flushed

    def send_fields(self, block: bytes, *, end: bool = False) -> None:
        """The header of the message, or, with `end` and behind its data, its trailers."""
        if self.ended_here:
            return
        self.ended_here = end
        if self._unsent:
            self._trailers = block
        else:
            self.connection.out.put_fields(self.id, block, end=end)
            self._settle()

    def send_data(self, data: bytes, *, end: bool = False) -> None:
        if self.ended_here:
            return
        self.ended_here = end
        out = self.connection.out
        if not self._unsent and len(data) <= self._room() and not out.full:
            self._put(data, end=end)
            self._settle()
            return
        waits = bool(self._unsent)
        self._unsent.append(memoryview(data))
        if self.window > 0 and not waits:
            out.add(self)
        out.go_on()

    def send_part(self) -> None:
        """Some of what is unsent, as far as the windows let it. For the connection."""
        left = PART_BYTES
        while self._unsent and left > 0:
            data, room = self._unsent[0], self._room()
            if room <= 0:
                return
            if len(data) <= room:
                self._unsent.popleft()
            else:
                self._unsent[0] = data[room:]
            left -= min(room, len(data))
            self._put(bytes(data[:room]), end=self.ended_here and self._trailers is None and not self._unsent)
        if not self._unsent:
            if self._trailers is not None:
                self.connection.out.put_fields(self.id, self._trailers, end=True)
            self._settle()
            self.sent()

    @property
    def unsent(self) -> bool:
        return bool(self._unsent)

    def drop_unsent(self) -> None:
        """What the peer has not taken by now it will not get."""
        self._unsent.clear()

    def reset(self, code: Code) -> None:
        """End it both ways; nothing of it arrives any more."""
        self.drop_unsent()
        self.ended_here = True
        self.connection.leave(self, code)

    def _room(self) -> int:
        out = self.connection.out
        return min(self.window, out.window, out.frame_bytes_max)

    def _put(self, data: bytes, *, end: bool) -> None:
        self.window -= len(data)
        self.connection.sends()
        self.connection.out.put_data(self.id, data, end=end)

    def _settle(self) -> None:
        if self.ended_here:
            self.connection.settle(self)

    # ---- for the connection

    def begin(self, fields: Fields) -> None:
        """What `content-length` says is kept to, §8.1.1."""
        self.begun = True
        length = fields.regular.get(b"content-length")
        if length is not None:
            if not length.isdigit() or len(length) > LENGTH_DIGITS_MAX:
                raise StreamFault(Code.PROTOCOL_ERROR, "a content-length that is none")
            self._due_bytes = int(length)

    def receive(self, data: bytes, size: int, *, ended: bool) -> None:
        """`size` is what flow control counts."""
        self._ahead_bytes += size
        if self._ahead_bytes > AHEAD_BYTES_MAX:
            raise StreamFault(Code.FLOW_CONTROL_ERROR, "more data than the window has room for")
        if self._due_bytes is not None:
            self._due_bytes -= len(data)
            if self._due_bytes < 0:
                raise StreamFault(Code.PROTOCOL_ERROR, "more data than content-length says")
        if ended:
            self.end_there()
        if self.take_data(data, ended=ended):
            self.refill()

    def end_there(self) -> None:
        if self._due_bytes:
            raise StreamFault(Code.PROTOCOL_ERROR, "less data than content-length says")
        self.ended_there = True

    def widen(self, more: int) -> None:
        """The peer takes so much more, or less."""
        before = self.window
        self.window += more
        if self.window > WINDOW_BYTES_MOST:
            raise StreamFault(Code.FLOW_CONTROL_ERROR, "a window that is too large")
        if self._unsent and before <= 0 < self.window:
            self.connection.out.add(self)


LENGTH_DIGITS_MAX = 15
