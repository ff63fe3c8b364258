"""How the command writes."""

import pytest

from gateway.console import print_table


def test_what_a_stranger_named_does_nothing_to_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(["model"], [["\x1b[31mred\x1b]0;pwn\x07\r\0"], ["café"]])
    shown = capsys.readouterr().out
    assert "\x1b" not in shown and "\0" not in shown
    assert "\\x1b[31mred" in shown
    assert "café" in shown
