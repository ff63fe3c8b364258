"""How far something has come: on stderr only, a line now and then, a bar on a terminal."""

import logging
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from training import progress as module
from training.progress import progress

ROOT = Path(module.__file__).parents[1]
PROGRAM = """
import logging
from training.progress import StderrHandler, progress
logging.basicConfig(handlers=[StderrHandler()], level="INFO", format="%(message)s")
with progress("train", 4) as advance:
    advance(2)
    logging.info("a line amid it")
    advance(2)
print("the answer")
"""


def test_a_line_comes_now_and_then_with_rate_and_time_left(caplog: pytest.LogCaptureFixture) -> None:
    now_s = [0.0]
    with caplog.at_level(logging.INFO, "training"), progress("train", 100, now_s=lambda: now_s[0]) as advance:
        for _ in range(5):
            now_s[0] += 20
            advance(20)
    assert caplog.messages == [
        "train: 40 of 100 rows, 1 rows/s, 60 s left",
        "train: 80 of 100 rows, 1 rows/s, 20 s left",
    ]


def test_a_rate_below_one_is_told_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    now_s = [0.0]
    with caplog.at_level(logging.INFO, "training"), progress("ask", 9, "answers", now_s=lambda: now_s[0]) as advance:
        now_s[0] += 40
        advance(6)
    assert caplog.messages == ["ask: 6 of 9 answers, 0.15 answers/s, 20 s left"]


def test_where_nobody_wants_to_be_told_nothing_is_shown(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with caplog.at_level(logging.WARNING, "training"), progress("train", 2) as advance:
        advance(2)
    assert capsys.readouterr().err == ""


def test_a_terminal_has_a_bar_that_keeps_out_of_lines_and_of_stdout() -> None:
    ours, theirs = pty.openpty()
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, stdout=subprocess.PIPE, stderr=theirs, text=True, check=True,
        timeout=60, env=os.environ | {"TERM": "xterm", "COLUMNS": "100"},
    )  # fmt: skip
    os.close(theirs)
    shown = os.read(ours, 65536).decode()
    os.close(ours)
    assert done.stdout == "the answer\n"
    assert "train" in shown
    assert "4/4" in shown
    assert any(line.endswith("a line amid it") for line in shown.splitlines())
