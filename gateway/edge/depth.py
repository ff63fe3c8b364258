"""JSON that nests too deeply is refused before anything walks it."""

from __future__ import annotations

import asyncio
from itertools import accumulate

from gateway.errors import BadRequest
from runtimes.dialect.bounded import unquoted


async def require_depth(body: bytes, depth_max: int) -> None:
    """Raises BadRequest if `body`, which must be well-formed JSON, nests deeper than `depth_max`.

    Most bodies have too few brackets for that. A large one with many is looked at piece by piece, so that none holds
    up the other calls for more than a few milliseconds.
    """
    if body.count(b"[") + body.count(b"{") <= depth_max:
        return
    depth = 0
    for index, outside in enumerate(unquoted(memoryview(body))):
        if index:
            await asyncio.sleep(0)
        brackets = outside.translate(STEPS, NOT_BRACKETS)
        depths = list(accumulate(memoryview(brackets).cast("b"), initial=depth))
        if max(depths) > depth_max:
            raise BadRequest(f"The request's JSON nests deeper than {depth_max} levels.")
        depth = depths[-1]


NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
#: One level down is +1, one level up is -1, as signed bytes.
STEPS = bytes.maketrans(b"[{]}", b"\x01\x01\xff\xff")
