"""What engine is emulated: how long its answers are, and when each token is due."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Annotated, NamedTuple

import msgspec
from msgspec import Meta

Seconds = Annotated[float, Meta(ge=0, le=3_600)]
Tokens = Annotated[int, Meta(ge=1, le=1_000_000)]


class Plan(NamedTuple):
    """What one call gets."""

    tokens: int
    """Of each choice, unless the request says otherwise."""
    waits_s: Iterator[float]
    """Before the first token, and before every further one; never ends."""


class Pace(msgspec.Struct, tag="pace", tag_field="kind", frozen=True, forbid_unknown_fields=True):
    """The same for every call; zeros are as fast as it can be written."""

    first_token_s: Seconds = 0.0
    """From the request to the first token; of an answer that is not streamed, the others' time is waited as well."""
    token_s: Seconds = 0.0
    """From each token to the next."""
    tokens: Tokens = 16

    @property
    def instant(self) -> bool:
        return self.first_token_s == self.token_s == 0

    def plan(self) -> Plan:
        return Plan(self.tokens, itertools.chain((self.first_token_s,), itertools.repeat(self.token_s)))
