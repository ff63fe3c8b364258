"""One side of an HTTP/2 connection (RFC 9113), without I/O: what was read goes in, what is to be written comes out.

Priorities (§5.3) and promises (§8.4) are not used. The bounds are for strangers, §10.5: a peer has as many streams as
it was promised, and what costs it nothing costs it the connection once there is too much of it, be it streams that it
resets (CVE-2023-44487) or frames that bring nothing. Headers that do not end are the Reader's (CVE-2024-27316).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from runtimes.http2.budget import Budget
from runtimes.http2.fields import Decoder, Fields
from runtimes.http2.frames import (
    ACK,
    DATA,
    ENABLE_PUSH,
    END_STREAM,
    FRAME_BYTES_MAX,
    FRAME_BYTES_MOST,
    GOAWAY,
    HEADERS,
    INITIAL_WINDOW_SIZE,
    MAX_CONCURRENT_STREAMS,
    MAX_FRAME_SIZE,
    MAX_HEADER_LIST_SIZE,
    PING,
    PREFACE,
    PRIORITY,
    PRIORITY_BYTES,
    PUSH_PROMISE,
    RST_STREAM,
    SETTING,
    SETTINGS,
    STREAM_MOST,
    WINDOW_BYTES,
    WINDOW_BYTES_MOST,
    WINDOW_UPDATE,
    Code,
    ConnectionFault,
    StreamFault,
    frame,
    goaway,
    rst_stream,
    settings,
    window_update,
)
from runtimes.http2.reader import Frame, Reader
from runtimes.http2.sender import Sender
from runtimes.http2.stream import AHEAD_BYTES_MAX, Stream

#: What the peer may send ahead on all streams together. It gets that back at once: what holds back who sends more than
#: is used are the streams' own windows.
AHEAD_OF_ALL_BYTES = 4 << 20
#: Frames that bring nothing: at once, and a second; and how many more each one is good for that brings something.
IDLE_FRAMES_MAX, IDLE_FRAMES_PER_S, IDLE_FRAMES_EACH = 1_000, 20, 4
#: The same of a server: at once, and for each call, of which much may be on its way when it is left or too late.
SERVER_IDLE_FRAMES_MAX, SERVER_IDLE_FRAMES_EACH = 65_536, 32
#: Streams that the peer may reset before they end, likewise.
RESETS_MAX, RESETS_PER_S = 1_000, 100
#: Streams that have ended here early, of which something may still be on its way; and the frames of data of each that
#: cost nothing, for what was sent ahead may be as many, and some that are not full.
LEFT_MAX, LATE_FRAMES_MAX = 1_000, AHEAD_BYTES_MAX // FRAME_BYTES_MAX + 4


class Connection:
    """Opens streams with `add` if it is a client's, and has them opened by `opened` if it is a server's."""

    def __init__(
        self,
        *,
        opened: Callable[[Connection, int], Stream] | None,
        write: Callable[[bytes], object],
        now_s: Callable[[], float],
        streams_max: int,
        header_bytes_max: int,
    ) -> None:
        self._opened = opened
        self._client = opened is None
        self._now_s = now_s
        self._streams_max = streams_max
        self._header_bytes_max = header_bytes_max
        # Twice as much is read, so that a header that is too long can be refused without ending the connection.
        self._decoder = Decoder(bytes_max=2 * header_bytes_max)
        self.reader = Reader(greeting=b"" if self._client else PREFACE, block_bytes_max=2 * header_bytes_max)
        self.out = Sender(write)
        idle_frames_max = SERVER_IDLE_FRAMES_MAX if self._client else IDLE_FRAMES_MAX
        self._idle_frames = Budget(burst=idle_frames_max, per_s=IDLE_FRAMES_PER_S)
        self._resets = Budget(burst=RESETS_MAX, per_s=RESETS_PER_S)
        self._ahead_bytes = 0
        """Received, and not given back to the peer's window."""
        self._left: dict[int, int] = {}
        """How many frames of data may still come for nothing."""
        self._taken_until = STREAM_MOST
        """Streams beyond this are not taken."""
        self.streams: dict[int, Stream] = {}
        self.last_stream = 0
        """That was opened."""
        self.stream_window = WINDOW_BYTES
        """What the peer takes on a new stream."""
        self.streams_max = STREAM_MOST
        """What it takes of them at once."""
        self.greeted = False
        """Its settings have come."""
        self.pinged = False
        """An answer to `ping` is due."""
        self.leaving = False
        """One of the sides has said that it means to go: streams are to be opened elsewhere."""
        self.fault = ""
        """Why the connection is over; empty while it isn't."""

    # ---- for its owner

    def begin(self) -> None:
        """Say what must come first, §3.4."""
        said = {INITIAL_WINDOW_SIZE: AHEAD_BYTES_MAX, MAX_HEADER_LIST_SIZE: self._header_bytes_max}
        if self._client:
            self.out.put(PREFACE)
            said[ENABLE_PUSH] = 0
        else:
            said[MAX_CONCURRENT_STREAMS] = self._streams_max
        self.out.put(settings(said))
        self.out.put(window_update(0, AHEAD_OF_ALL_BYTES - WINDOW_BYTES))
        self.out.flush()

    def receive(self, data: bytes) -> None:
        """What was read. Afterwards `fault` may be set."""
        if self.fault:
            return
        try:
            for found in self.reader.read(data):
                self._take(found)
        except ConnectionFault as fault:
            self.end(fault.code, str(fault))
        self.out.flush()

    def add(self, stream: Stream) -> None:
        """A client's, that it has made for `next_stream`."""
        self.last_stream = stream.id
        self.streams[stream.id] = stream
        self._idle_frames.give(SERVER_IDLE_FRAMES_EACH)

    @property
    def next_stream(self) -> int:
        return self.last_stream + 2 if self.last_stream else 1

    def ping(self) -> None:
        self.pinged = True
        self.out.put(frame(PING, 0, 0, b"headrace"))
        self.out.flush()

    def retire(self) -> None:
        """Say that this side means to go; streams that are opened by who has not heard it yet are taken, §6.8."""
        self.leaving = True
        self.out.put(goaway(STREAM_MOST, Code.NO_ERROR))
        self.out.flush()

    def refuse_more(self) -> None:
        """Take no more streams, and say which was the last."""
        self.leaving = True
        self._taken_until = self.last_stream
        self.out.put(goaway(self.last_stream, Code.NO_ERROR))
        self.out.flush()

    def end(self, code: Code, why: str) -> None:
        """Say why it is over, and end everything."""
        self.out.put(goaway(0 if self._client else self.last_stream, code, why))
        self.out.flush()
        self.lost(why)

    def lost(self, why: str) -> None:
        """It is over, whatever has been said."""
        self.fault = self.fault or why
        for stream in tuple(self.streams.values()):
            self._cut(stream, Code.INTERNAL_ERROR, why)
        self.out.close()

    def resume(self) -> None:
        """The transport, which was full, takes more."""
        self.out.full = False
        self.out.go_on()

    # ---- for its streams

    def sends(self) -> None:
        """Data: it may be answered by frames that bring nothing."""
        self._idle_frames.give(IDLE_FRAMES_EACH)

    def settle(self, stream: Stream) -> None:
        """It has ended here. If it has not ended there, a client waits, and a server needs no more of it, §8.1."""
        if stream.ended_there:
            self.streams.pop(stream.id, None)
        elif not self._client:
            self.leave(stream, Code.NO_ERROR)

    def leave(self, stream: Stream, code: Code) -> None:
        if self.streams.pop(stream.id, None) is not None:
            self._leave(stream.id, code)

    # ---- frames

    def _take(self, found: Frame) -> None:
        kind, flags, id = found.kind, found.flags, found.stream
        try:
            if kind == DATA:
                self._data(flags, id, found.payload, found.size)
            elif kind == HEADERS:
                self._headers(flags, id, found.payload)
            else:
                self._count_idle()
                if kind in OTHERS:
                    OTHERS[kind](self, flags, id, found.payload)
        except StreamFault as fault:
            self._count_idle()
            self._leave(id, fault.code)
            if id in self.streams:
                self._broken_off(self.streams[id], fault.code, str(fault))

    def _data(self, flags: int, id: int, payload: bytes, size: int) -> None:
        self._ahead_bytes += size
        if self._ahead_bytes > AHEAD_OF_ALL_BYTES // 2:
            self.out.put(window_update(0, self._ahead_bytes))
            self._ahead_bytes = 0
        ended = flags & END_STREAM != 0
        if not payload:
            self._count_idle()
        stream = self.streams.get(id)
        if stream is None:
            if self._left.get(id):
                self._left[id] -= 1
            else:
                self._late(id)
        elif stream.ended_there:
            raise StreamFault(Code.STREAM_CLOSED, "data behind the end of a stream")
        elif not stream.begun:
            raise StreamFault(Code.PROTOCOL_ERROR, "data before a header")
        else:
            if payload:
                self._idle_frames.give(IDLE_FRAMES_EACH)
            stream.receive(payload, size, ended=ended)
            self._forget_if_over(stream)

    def _headers(self, flags: int, id: int, block: bytes) -> None:
        """A header, or trailers."""
        fields = self._decoder.read(block)  # whatever comes of it: the blocks behind it depend on it
        ended = flags & END_STREAM != 0
        stream = self.streams.get(id)
        if stream is None:
            if self._client or id <= self.last_stream:
                self._late(id, opens=b":method" in fields.pseudo)
                return
            stream = self._open(id, fields)
            if stream is None:
                return
        if stream.ended_there:
            raise StreamFault(Code.STREAM_CLOSED, "a header behind the end of a stream")
        if stream.begun:
            if fields.pseudo or fields.fault or not ended:
                raise StreamFault(Code.PROTOCOL_ERROR, fields.fault or "trailers that are none")
        elif not (fields.is_response if self._client else fields.is_request):
            raise StreamFault(Code.PROTOCOL_ERROR, fields.fault or "a header that is none")
        elif fields.is_interim:
            self._count_idle()
            return  # the answer's own header comes behind it, §8.1
        else:
            stream.begin(fields)
        if ended:
            stream.end_there()
        stream.take_fields(fields, ended=ended)
        self._forget_if_over(stream)

    def _open(self, id: int, fields: Fields) -> Stream | None:
        """None if it was told that no more are taken."""
        assert self._opened is not None
        if not id & 1:
            raise ConnectionFault(Code.PROTOCOL_ERROR, "a client's streams have odd numbers")
        self.last_stream = id
        if id > self._taken_until:
            self._count_idle()
            return None
        if len(self.streams) >= self._streams_max:
            raise StreamFault(Code.REFUSED_STREAM, "more streams at once than were promised")
        self._idle_frames.give(IDLE_FRAMES_EACH)
        stream = self.streams[id] = self._opened(self, id)
        return stream

    def _priority(self, flags: int, id: int, payload: bytes) -> None:
        if len(payload) != PRIORITY_BYTES:
            fault = ConnectionFault if id > self.last_stream else StreamFault  # what is idle cannot be reset
            raise fault(Code.FRAME_SIZE_ERROR, "a priority of another size")

    def _rst_stream(self, flags: int, id: int, payload: bytes) -> None:
        self._require_opened(id)
        if id in self.streams:
            self._broken_off(self.streams[id], int.from_bytes(payload, "big"), "it was reset")

    def _settings(self, flags: int, id: int, payload: bytes) -> None:
        if flags & ACK:
            if payload:
                raise ConnectionFault(Code.FRAME_SIZE_ERROR, "settings are confirmed with nothing")
            return
        for name, value in SETTING.iter_unpack(payload):
            if name == INITIAL_WINDOW_SIZE:
                if value > WINDOW_BYTES_MOST:
                    raise ConnectionFault(Code.FLOW_CONTROL_ERROR, "a window that is too large")
                self._resize(value)
            elif name == MAX_FRAME_SIZE:
                if not FRAME_BYTES_MAX <= value <= FRAME_BYTES_MOST:
                    raise ConnectionFault(Code.PROTOCOL_ERROR, "a frame size that none may be")
                self.out.frame_bytes_max = min(value, FRAME_BYTES_USED)
            elif name == MAX_CONCURRENT_STREAMS:
                self.streams_max = value
            elif name == ENABLE_PUSH and value > (not self._client):
                raise ConnectionFault(Code.PROTOCOL_ERROR, "promises can be asked for or not, and only by a client")
        self.greeted = True
        self.out.put(frame(SETTINGS, ACK, 0))
        self.out.go_on()

    def _resize(self, window: int) -> None:
        more, self.stream_window = window - self.stream_window, window
        try:
            for stream in self.streams.values():
                stream.widen(more)
        except StreamFault as fault:  # not the fault of that stream, §6.9.2
            raise ConnectionFault(fault.code, str(fault)) from None

    def _push_promise(self, flags: int, id: int, payload: bytes) -> None:
        raise ConnectionFault(Code.PROTOCOL_ERROR, "a promise, which nobody asked for")

    def _ping(self, flags: int, id: int, payload: bytes) -> None:
        if flags & ACK:
            self.pinged = False
        else:
            self.out.put(frame(PING, ACK, 0, payload))

    def _goaway(self, flags: int, id: int, payload: bytes) -> None:
        self.leaving = True
        last = int.from_bytes(payload[:4], "big") & STREAM_MOST
        if self._client:
            for stream in [it for it in self.streams.values() if it.id > last]:
                self._cut(stream, Code.REFUSED_STREAM, "it came too late to be taken")

    def _window_update(self, flags: int, id: int, payload: bytes) -> None:
        more = int.from_bytes(payload, "big") & WINDOW_BYTES_MOST
        if not id:
            if not more or self.out.window + more > WINDOW_BYTES_MOST:
                code = Code.FLOW_CONTROL_ERROR if more else Code.PROTOCOL_ERROR
                raise ConnectionFault(code, "a window that is widened by nothing, or too far")
            self.out.window += more
        else:
            self._require_opened(id)
            stream = self.streams.get(id)
            if stream is None:
                return
            if not more:
                raise StreamFault(Code.PROTOCOL_ERROR, "a window that is widened by nothing")
            stream.widen(more)
        self.out.go_on()

    # ---- what they have in common

    def _late(self, id: int, *, opens: bool = False) -> None:
        """A frame for a stream that is over: it may have been on its way, and is paid for. Servers send some behind a
        reset of their own (gRPC's C core does once a deadline has passed), and the other streams are not to blame."""
        self._require_opened(id)
        if self._client or id in self._left:
            self._count_idle()
        elif opens:
            raise ConnectionFault(Code.STREAM_CLOSED, "a stream that was opened before")
        else:
            raise StreamFault(Code.STREAM_CLOSED, "a frame behind the end of a stream")

    def _require_opened(self, id: int) -> None:
        """What nobody has opened is idle, §5.1; and only clients open any."""
        if id > self.last_stream or not id & 1:
            raise ConnectionFault(Code.PROTOCOL_ERROR, "a frame for a stream that nobody has opened")

    def _count_idle(self) -> None:
        if not self._idle_frames.take(self._now_s()):
            raise ConnectionFault(Code.ENHANCE_YOUR_CALM, "too many frames that bring nothing")

    def _forget_if_over(self, stream: Stream) -> None:
        if stream.ended_there and stream.ended_here and not stream.unsent:
            self.streams.pop(stream.id, None)

    def _leave(self, id: int, code: Code) -> None:
        self._left[id] = LATE_FRAMES_MAX
        if len(self._left) > LEFT_MAX:
            del self._left[next(iter(self._left))]
        self.out.put(rst_stream(id, code))

    def _broken_off(self, stream: Stream, code: int, why: str) -> None:
        """By the peer, or so that it had to be (CVE-2025-8671), which is the same to whoever began to work on it."""
        self._cut(stream, code, why)
        if not self._client and not self._resets.take(self._now_s()):
            raise ConnectionFault(Code.ENHANCE_YOUR_CALM, "too many streams were broken off")

    def _cut(self, stream: Stream, code: int, why: str) -> None:
        self.streams.pop(stream.id, None)
        stream.drop_unsent()
        stream.ended_here = stream.ended_there = True
        stream.cut(code, why)


#: Larger frames would let one stream hold up the others.
FRAME_BYTES_USED = 65_536
OTHERS: Mapping[int, Callable[[Connection, int, int, bytes], None]] = MappingProxyType(
    {
        PRIORITY: Connection._priority,
        RST_STREAM: Connection._rst_stream,
        SETTINGS: Connection._settings,
        PUSH_PROMISE: Connection._push_promise,
        PING: Connection._ping,
        GOAWAY: Connection._goaway,
        WINDOW_UPDATE: Connection._window_update,
    }
)
