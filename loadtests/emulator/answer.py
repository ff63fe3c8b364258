"""One call under way: tokens are made when its engine makes them, and written as the client reads them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from loadtests.emulator.dialect import LAST_CHUNK, STREAM_HEAD, Shape, body, pieces, response
from loadtests.emulator.fault import Fault
from loadtests.emulator.log import Ended
from loadtests.emulator.request import Ask
from loadtests.emulator.strike import strike, surplus

if TYPE_CHECKING:
    from loadtests.emulator.connection import Connection


class Answer:
    """To one request, on its connection. What has been made and what has been written differ while the client does not
    read: like a real engine, this one does not wait for its readers."""

    def __init__(self, connection: Connection, ask: Ask, id: bytes, shape: Shape, fault: Fault | None) -> None:
        self.connection = connection
        self.ask = ask
        self.id = id
        self.shape = shape
        self.fault = fault
        self.place = -1 if fault is None else connection.emulator.faults.place(fault, shape.tokens)
        """After how many tokens the fault strikes; -1 is before any byte."""
        self.coming = fault is not None
        """It has not struck yet."""
        self.made = 0
        """Tokens of each choice."""
        self.written = 0
        """Tokens of each choice."""
        self.begun = False
        """The header is written."""
        self.held = False
        """A fault has taken over."""
        self.over = False
        self.left = False
        """By its client."""
        self.asked_s = time.time()
        self.wrote_s: float | None = None
        """When any of it was last written, by `time.perf_counter`."""
        self._pieces: Iterator[bytes] | None = None

    def start(self) -> None:
        """Before an engine is told of it: some faults strike at once."""
        if self.fault is not None:
            self.go_on()

    def find(self, cached_tokens: int) -> None:
        """The engine has found so many of the prompt's in its cache, as it says before the first token it makes."""
        if not (self.made or self.begun):
            self.shape = self.shape._replace(cached_tokens=cached_tokens)

    def make(self, tokens: int) -> None:
        """The engine has made so many more of each choice."""
        if tokens:
            self.made += tokens
            self.connection.emulator.made += tokens * self.shape.choices
            self.go_on()

    def go_on(self) -> None:
        """Write what has been made, unless the client does not read."""
        shape = self.shape
        while not (self.connection.paused or self.held or self.over):
            if self.coming and self._due():
                self.coming, self.held = False, True
                strike(self)
            elif self.written == shape.tokens:
                self.end(Ended.finished)
            elif shape.stream and self.written < self.made:
                self.write_piece(self.next_piece())
            elif not shape.stream and self.made == shape.tokens:
                self.write_whole(response(body(shape, self.id)))
            else:
                return

    def end(self, ended: Ended) -> None:
        """No more of it will be written."""
        self.over = True
        self.connection.emulator.end(self, Ended.faulted if self.fault is not None else ended)
        self.connection.free()

    @property
    def taken(self) -> int:
        """Tokens of each choice that the kernel took whole. What is unsent is one piece: it was not written before the
        one before it was gone."""
        if not self.connection.paused:
            return self.written
        return max(self.written - 1, 0) if self.shape.stream else 0

    # ---- for faults as well

    def release(self) -> None:
        """The fault has done what it does, and the answer goes on."""
        self.held = False
        self.go_on()

    def write_head(self) -> None:
        """Of a stream, once."""
        if not self.begun:
            self.begun = True
            self.write(STREAM_HEAD)

    def write_piece(self, piece: bytes) -> None:
        """Of a stream, with what belongs before and behind it."""
        self.written += 1
        if not self.begun:
            self.begun = True
            piece = STREAM_HEAD + piece
        if self.written == self.shape.tokens:
            piece += LAST_CHUNK + surplus(self)
        self.write(piece)

    def write_whole(self, answer: bytes) -> None:
        """All of it in one piece, less the header if that is written."""
        self.written = self.shape.tokens
        self.write((answer.partition(b"\r\n\r\n")[2] if self.begun else answer) + surplus(self))

    def next_piece(self) -> bytes:
        """Of a stream."""
        if self._pieces is None:
            self._pieces = pieces(self.shape, self.id)
        return next(self._pieces)

    def write(self, data: bytes) -> None:
        self.wrote_s = time.perf_counter()
        self.connection.write(data)

    def _due(self) -> bool:
        """Whether it is time for the fault."""
        if self.place < 0 or self.shape.stream:
            return self.place <= self.written
        # What comes in one piece waits until all of it is made; only what comes behind it, until it is written.
        return self.made == self.shape.tokens and (self.place < self.made or self.written == self.made)
