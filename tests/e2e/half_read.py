"""A gateway with a defect, for tests that must find it: its pool keeps connections whose answers were not read to their
end, so that the rest of one answer is the beginning of another's."""

from __future__ import annotations

import runtimes.connection
from gateway.__main__ import main


def leave(self: runtimes.connection.Connection) -> bool:
    return not self.stopped


if __name__ == "__main__":
    runtimes.connection.Connection.leave = leave  # type: ignore[method-assign]
    main()
