"""Answers that list something for every row: written as the rows come back, a piece of JSON at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import msgspec

from runtimes.contract import InferReply, InferRequest
from runtimes.dialect import Steps

PIECE_ROWS = 16
"""Encoded at once: so few take less than a millisecond, in which no other call goes on."""


def listed(
    name: str,
    requests: Iterable[InferRequest],
    each: Callable[[InferReply, int], Iterator[Mapping[str, Any]]],
    *,
    head: Mapping[str, Any],
    tail: Callable[[int], Mapping[str, Any]],
) -> Steps:
    """An object with the fields of `head`, an array of that name, and the fields of `tail`, which is told the tokens
    that were read. `each` gives the elements for a reply, the first of which has that index."""
    before = _open(head) + b'"%b":[' % name.encode()
    tokens_in = index = 0
    for request in requests:
        reply = yield request
        tokens_in += reply.tokens_in
        rows = each(reply, index)
        while piece := list(islice(rows, PIECE_ROWS)):
            yield before + msgspec.json.encode(piece)[1:-1]
            before = b","
            index += len(piece)
    yield b"]" + _close(tail(tokens_in))


def _open(fields: Mapping[str, Any]) -> bytes:
    return msgspec.json.encode(fields)[:-1] + (b"," if fields else b"")


def _close(fields: Mapping[str, Any]) -> bytes:
    return (b"," if fields else b"") + msgspec.json.encode(fields)[1:]
