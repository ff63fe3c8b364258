"""CPU time of a process tree."""

import subprocess
import sys

import pytest

from loadtests.process import TICKS_PER_S, NoProcess, usage

CHILD = """
import sys, time
while time.process_time() < 0.3: pass
print(time.process_time(), flush=True)
"""
UNTIL_TOLD = "sys.stdin.read()\n"


def test_a_living_child_is_counted() -> None:
    with parent_of(CHILD + UNTIL_TOLD, then="") as parent:
        child_s = float(line_of(parent))
        found = usage(parent.pid)
        assert found.cpu_s >= child_s
        # Two interpreters, none of which fits into less.
        assert found.rss_bytes > 8_000_000


def test_a_child_that_has_ended_is_counted_still() -> None:
    with parent_of(CHILD, then="print('ended', flush=True)\n" + UNTIL_TOLD) as parent:
        child_s = float(line_of(parent))
        assert line_of(parent) == "ended"
        assert usage(parent.pid).cpu_s >= child_s - 2 / TICKS_PER_S


def test_a_process_that_is_not_there_is_named() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        ended.wait()
    with pytest.raises(NoProcess, match=f"there is no process {ended.pid}"):
        usage(ended.pid)


def parent_of(child: str, *, then: str) -> subprocess.Popen[str]:
    """A process that starts a child, waits for it, and goes on. Both end when its standard input does."""
    program = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {child!r}])\n{then}"
    return subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()
