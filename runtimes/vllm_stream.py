"""What vLLM's answers look like when its engine dies amid them."""

from __future__ import annotations

from runtimes.contract import Broken, Reply, Sink

FAILED = (b'data: {"error"', b"event: error")
"""How vLLM says amid a stream that its engine is dead. It then ends the stream as if all were well."""


class Watched:
    """The frames of a reply, of which none pretends that an answer cut short is whole."""

    __slots__ = ("_failed", "_next", "_pour", "_replica")

    def __init__(self, reply: Reply, replica: str) -> None:
        self._next = reply.frames.__anext__
        self._pour = reply.pour
        self._replica = replica
        self._failed = False

    def __aiter__(self) -> Watched:
        return self

    async def __anext__(self) -> bytes:
        while True:
            if self._failed:
                raise self._fault()
            if frame := self._sound(await self._next()):
                return frame

    async def pour(self, sink: Sink) -> None:
        assert self._pour is not None
        await self._pour(WatchedSink(self, sink))

    def _sound(self, frame: bytes) -> bytes:
        """The part of it before the engine said that it has failed."""
        for mark in FAILED:
            at = frame.find(mark)
            if at == 0 or (at > 0 and frame[at - 1] == 10):  # at the start of a line
                self._failed = True
                return frame[:at]
        return frame

    def _fault(self) -> Broken:
        return Broken(f"{self._replica}: the engine failed amid the answer")


class WatchedSink:
    """See Watched."""

    __slots__ = ("_sink", "_watched", "drained")

    def __init__(self, watched: Watched, sink: Sink) -> None:
        self._watched = watched
        self._sink = sink
        self.drained = sink.drained

    @property
    def done(self) -> bool:
        return self._sink.done

    def take(self, part: bytes) -> bool:
        go_on = self._sink.take(self._watched._sound(part))
        if self._watched._failed:
            raise self._watched._fault()
        return go_on
