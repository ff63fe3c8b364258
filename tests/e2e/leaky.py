"""A gateway with a defect, for tests that must find it: a call that is cancelled never gives back its place at the
runtime, nor its connection."""

from __future__ import annotations

import asyncio
from types import TracebackType

import runtimes.wire
from gateway.__main__ import main

leave = runtimes.wire._Exchange.__aexit__


async def leak(
    self: runtimes.wire._Exchange,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
) -> None:
    if not isinstance(error, asyncio.CancelledError):
        await leave(self, kind, error, trace)


if __name__ == "__main__":
    runtimes.wire._Exchange.__aexit__ = leak  # type: ignore[method-assign]
    main()
