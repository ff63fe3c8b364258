"""Time, asked of one object so that tests can advance it."""

import asyncio
import time
from typing import Protocol


class Clock(Protocol):
    """The only source of time in the tree.

    `now_s` never goes backwards and is in the event loop's time base, so it can be compared with
    deadlines; `wall_s` is Unix time, for records and expiry dates only.
    """

    def now_s(self) -> float: ...
    def wall_s(self) -> float: ...
    async def sleep(self, duration_s: float) -> None: ...


class SystemClock:
    """The machine's own clocks. asyncio and uvloop both run on `time.monotonic`."""

    # Not wrapped: a call is timed a dozen times.
    now_s = staticmethod(time.monotonic)
    wall_s = staticmethod(time.time)

    async def sleep(self, duration_s: float) -> None:
        await asyncio.sleep(duration_s)
