"""Bodies that are compressed on their way (RFC 9110 §8.4.1): `gzip` and `deflate`, in both directions.

A short body can become a very long one, so what it becomes is bounded as a plain one is. The work is done on a thread:
it may take as long as a hundred calls do.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Mapping
from types import MappingProxyType

from gateway.errors import BadRequest, TooLarge

#: Of `wbits` (https://docs.python.org/3/library/zlib.html): gzip's framing, and zlib's, which is what `deflate` means.
FRAMINGS: Mapping[str, int] = MappingProxyType({"gzip": 31, "deflate": 15})
#: Names of old that mean the same (RFC 9110 §8.4.1.3).
ALIASES: Mapping[str, str] = MappingProxyType({"x-gzip": "gzip"})
#: Of one gzip body (RFC 1952 §2.2), as from `cat` of several files, or from those who compress block by block.
MEMBERS_MAX = 256
#: Numbers hardly get smaller, and JSON does so at once.
LEVEL = 1
#: Answers shorter than this go as they are.
COMPRESSED_BYTES_MIN = 1024


async def decompressed(body: bytes, coding: bytes | None, *, bytes_max: int) -> bytes:
    """`coding` is the request's `content-encoding`. Raises BadRequest, TooLarge."""
    name = (coding or b"identity").decode("latin-1").strip().lower()
    name = ALIASES.get(name, name)
    if name == "identity":
        return body
    if name not in FRAMINGS:
        raise BadRequest(f"The content-encoding {name[:32]!r} is not taken; send gzip, deflate or none.")
    return await asyncio.to_thread(_decompress, body, name, bytes_max)


async def compressed(body: bytes, accepted: bytes | None) -> tuple[bytes, bytes]:
    """The body as one who sent this `accept-encoding` may get it, and the header line that says so."""
    name = _accepted((accepted or b"").decode("latin-1"))
    if name is None or len(body) < COMPRESSED_BYTES_MIN:
        return body, b""
    return await asyncio.to_thread(_compress, body, name), b"content-encoding: %b\r\n" % name.encode()


def _decompress(body: bytes, name: str, bytes_max: int) -> bytes:
    found: list[bytes] = []
    left, rest = bytes_max, body
    for _ in range(MEMBERS_MAX if name == "gzip" else 1):
        stream = zlib.decompressobj(FRAMINGS[name])
        try:
            found.append(stream.decompress(rest, left + 1))
        except zlib.error:
            raise BadRequest(f"The request's body is not valid {name}.") from None
        left, rest = left - len(found[-1]), stream.unused_data
        if left < 0:
            raise TooLarge(f"The request's body is larger than {bytes_max} bytes once decompressed.")
        if not stream.eof:
            raise BadRequest(f"The request's body is not one whole {name} stream.")
        if not rest:
            return b"".join(found)
    raise BadRequest(f"The request's body is not one whole {name} stream, or has more than {MEMBERS_MAX} members.")


def _compress(body: bytes, name: str) -> bytes:
    stream = zlib.compressobj(LEVEL, wbits=FRAMINGS[name])
    return stream.compress(body) + stream.flush()


def _accepted(header: str) -> str | None:
    """The first of ours that is acceptable, gzip before deflate."""
    offered = dict(_weighted(item) for item in header.lower().split(",") if item.strip())
    return next((name for name in FRAMINGS if offered.get(name, 0.0) > 0), None)


def _weighted(item: str) -> tuple[str, float]:
    name, _, parameters = item.partition(";")
    _, _, weight = parameters.partition("q=")
    try:
        return ALIASES.get(name.strip(), name.strip()), float(weight) if weight else 1.0
    except ValueError:
        return name.strip(), 0.0
