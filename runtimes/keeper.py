"""Keeps one engine on a leash: no engine outlives its gateway, and no log outgrows its bound.

    python -I -S keeper.py LOG LOG_BYTES_MAX STOP_S_MAX COMMAND…

The supervisor (`runtimes.process`) starts this small program in a session of its own, and it starts the
engine in a process group of that session. Its stdin is a pipe that only the supervisor holds: when that ends,
because the supervisor closed it or was killed, the engine is stopped with everything it started. A parent-death
signal would not do: it follows the parent's *thread*, and reaches the engine's first process only, not
the ones that hold the memory. Needs nothing but the standard library, so it is up within 20 ms and costs 10 MB.

Leaves with the engine's own exit status; 128 + n if signal n ended it, 127 if it could not be started.
"""

import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

START = b"--- headrace started "
"""Begins the line that parts one start from the next in a log."""


def main(log: Path, log_bytes_max: int, stop_s_max: float, command: list[str]) -> int:
    # A handler, not SIG_IGN: an ignored signal would stay ignored in the engine.
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.signal(signal.SIGINT, lambda *_: None)
    asked, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    book = Log(log, log_bytes_max)
    book.write(START + f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())}\n".encode())
    try:
        engine = subprocess.Popen(  # noqa: S603 - the command is the supervisor's own
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            process_group=0,
        )
    except OSError as error:
        book.write(f"cannot start {command[0]}: {error.strerror}\n".encode())
        return 127
    assert engine.stdout is not None
    if not follow(engine, book, until=[0, asked], for_s=None):
        signal_group(engine.pid, signal.SIGTERM)
        follow(engine, book, until=[], for_s=stop_s_max)
    # Whatever the reason, nobody of the group stays: an engine's worker holds gigabytes.
    signal_group(engine.pid, signal.SIGKILL)
    follow(engine, book, until=[], for_s=stop_s_max)
    status = engine.wait()
    return status if status >= 0 else 128 - status


def follow(engine: "subprocess.Popen[bytes]", book: "Log", *, until: list[int], for_s: float | None) -> bool:
    """Copy the engine's output into the log until it exits (True), one of `until` becomes readable or the
    time is up (False)."""
    assert engine.stdout is not None
    output = engine.stdout.fileno()
    ends_at = None if for_s is None else time.monotonic() + for_s
    exited = os.pidfd_open(engine.pid)
    try:
        watched = [output, exited, *until]
        while True:
            left_s = None if ends_at is None else max(0.0, ends_at - time.monotonic())
            readable, _, _ = select.select(watched, [], [], left_s)
            if output in readable:
                if chunk := os.read(output, 1 << 16):
                    book.write(chunk)
                else:
                    watched.remove(output)
            elif exited in readable:
                return True
            elif readable or left_s == 0.0:
                return False
    finally:
        os.close(exited)


def signal_group(group: int, number: signal.Signals) -> None:
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return


class Log:
    """Two files, `x.log` and the older `x.log.1`, together at most `bytes_max`."""

    def __init__(self, path: Path, bytes_max: int) -> None:
        self._path = path
        self._bytes_max = bytes_max // 2
        self._file = path.open("ab", buffering=0)

    def write(self, chunk: bytes) -> None:
        chunk = chunk[-self._bytes_max :]  # of one larger than a file, the end
        if self._file.tell() + len(chunk) > self._bytes_max and self._file.tell():
            self._file.close()
            self._path.replace(self._path.with_name(self._path.name + ".1"))
            self._file = self._path.open("ab", buffering=0)
        try:
            self._file.write(chunk)
        except OSError:
            # A full disk must not stop the engine; what it said meanwhile is lost.
            return

    def close(self) -> None:
        self._file.close()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), sys.argv[4:]))
