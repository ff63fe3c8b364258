"""Faults: what can go wrong with an answer, by name, and which call meets which.

A call asks for one in its body, in a field that gateways relay as they do any they don't know,
`"emulate": {"fault": "rst@3"}`; or the emulator is given rates, `rst=0.05`.
"""

from __future__ import annotations

import enum
import random
import re
from collections.abc import Mapping

import msgspec


class FaultError(Exception):
    """What was asked for is no fault; the message says what there is."""


class When(enum.Enum):
    """In relation to an answer."""

    before = enum.auto()
    """Any byte of it."""
    amid = enum.auto()
    """After N of its tokens, 0 being right after the header; without N anywhere, but always before the last."""
    after = enum.auto()


class Kind(enum.StrEnum):
    """Each with a sentence about it, and when it strikes."""

    about: str
    when: When

    def __new__(cls, name: str, about: str, when: When) -> Kind:
        kind = str.__new__(cls, name)
        kind._value_ = name
        kind.about = about
        kind.when = when
        return kind

    close = "close", "The connection is closed (FIN) before any byte of the answer.", When.before
    reset = "reset", "The connection is reset (RST) before any byte of the answer.", When.before
    hang = "hang", "Nothing is ever answered, while /health says all is well.", When.before
    status = "status", "An error answer instead: 500, or the status that N says.", When.before
    not_http = "not-http", "The answer is not HTTP.", When.before
    slow_head = (
        "slow-head",
        "The header comes a byte at a time, 20 a second; then the answer as it should be.",
        When.before,
    )
    endless_head = "endless-head", "The header never ends: field follows field.", When.before
    cut_head = "cut-head", "The connection is closed in the midst of the header.", When.before
    long_length = (
        "long-length",
        "The content-length is 100 more than the body, then the connection is closed.",
        When.before,
    )
    open_end = (
        "open-end",
        "All of the answer comes, but HTTP's end never does, and the connection stays.",
        When.before,
    )
    not_streamed = "not-streamed", "A stream was asked for, and the answer comes in one piece.", When.before
    surplus = "surplus", "Behind a whole answer comes the beginning of another one, that nobody asked for.", When.after
    rst = "rst", "The connection is reset (RST) amid the answer.", When.amid
    fin = "fin", "The connection is closed (FIN) amid the answer: no closing event, no last chunk.", When.amid
    undone = (
        "undone",
        "The answer ends early but, as HTTP, properly: the last chunk is there, the closing event is not.",
        When.amid,
    )
    stall = "stall", "Amid the answer nothing more comes, and the connection stays.", When.amid
    second_head = "second-head", "Amid the answer a second header comes, of a 500.", When.amid
    not_sse = "not-sse", "A page of HTML comes instead of the rest; HTTP is kept to.", When.amid
    not_json = "not-json", "An event, or the body, is not JSON; the rest is as it should be.", When.amid
    not_utf8 = "not-utf8", "A token's text ends within a character; the rest is as it should be.", When.amid
    error_event = (
        "error-event",
        "An error event, then the closing one, as vLLM does; unstreamed, a 200 with an error in it.",
        When.amid,
    )
    huge_event = "huge-event", "An event of 16 MiB, or a body of 80; the rest is as it should be.", When.amid


KINDS = {kind.value: kind for kind in Kind}


class Fault(msgspec.Struct, frozen=True):
    """One, as a call meets it."""

    kind: Kind
    number: int | None = None
    """N; None if it was not said."""

    def __str__(self) -> str:
        return self.kind if self.number is None else f"{self.kind}@{self.number}"


def parse(text: str) -> Fault:
    """`rst` or `rst@3`. Raises FaultError."""
    name, separator, number = text.partition("@")
    kind = KINDS.get(name)
    if kind is None or (separator and not re.fullmatch("[0-9]{1,6}", number)):
        raise FaultError(f"there is no fault {text!r}; write one of {', '.join(Kind)}, or NAME@N")
    if separator and kind.when is not When.amid and kind is not Kind.status:
        raise FaultError(f"fault {name!r} takes no number: it does not strike amid an answer")
    if kind is Kind.status and separator and not 400 <= int(number) <= 599:
        raise FaultError(f"fault {text!r}: an error's status is from 400 to 599")
    return Fault(kind, int(number) if separator else None)


class Faults:
    """Faults by rate: each call meets one of them or none, the same ones for the same seed and the same calls."""

    def __init__(self, rates: Mapping[Fault, float], *, seed: int = 1) -> None:
        """Raises FaultError if the rates are no shares of one whole."""
        if any(not 0 <= rate <= 1 for rate in rates.values()) or sum(rates.values()) > 1:
            raise FaultError("rates of faults are from 0 to 1, and 1 at most together")
        self.rates = dict(rates)
        self.chance = random.Random(seed)  # noqa: S311 - repeatable is what it must be

    def draw(self) -> Fault | None:
        """The next call's."""
        if not self.rates:
            return None
        left = self.chance.random()
        for fault, rate in self.rates.items():
            left -= rate
            if left < 0:
                return fault
        return None

    def place(self, fault: Fault, tokens: int) -> int:
        """After how many of an answer's tokens it strikes; -1 is before any byte."""
        if fault.kind.when is not When.amid:
            return -1 if fault.kind.when is When.before else tokens
        if fault.number is None:
            return self.chance.randrange(tokens)
        return min(fault.number, tokens - 1)


def rates(texts: tuple[str, ...]) -> dict[Fault, float]:
    """`rst=0.05`, `stall@3=0.01`. Raises FaultError."""
    found: dict[Fault, float] = {}
    for text in texts:
        name, _, rate = text.partition("=")
        try:
            found[parse(name)] = float(rate)
        except ValueError:
            raise FaultError(f"--fault {text!r}: write NAME=RATE, e.g. rst=0.05") from None
    return found
