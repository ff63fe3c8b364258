"""The `headrace-load` command, as people run it."""

import asyncio
import json
import sys
from pathlib import Path

import pytest

from loadtests.emulator import Emulator, Kind, Pace, serving
from loadtests.emulator.recording import read as read_recording


async def test_a_run_prints_json_that_compare_reads(tmp_path: Path) -> None:
    emulator = Emulator(Pace(tokens=3))
    async with serving(emulator, "127.0.0.1:0") as address:
        asked = ["echo", "--target", address, "--against", address, "--repeat", "3", "--json"]
        bounds = ["--set", "calls_max=10", "--set", "warmup_s=0"]
        status, out, _ = await command("run", *asked, *bounds)
    results = json.loads(out)
    assert status == 0
    assert [run["calls"] for side in results["sides"] for run in side["runs"]] == [10] * 6
    assert emulator.calls == 60
    (tmp_path / "a.json").write_text(out)
    status, out, _ = await command("compare", str(tmp_path / "a.json"), str(tmp_path / "a.json"))
    assert status == 0
    assert row(out, "tokens/s")[-3:] == ["1.000", "1.000", "1.000"]


async def test_a_run_shows_a_table_and_never_the_key() -> None:
    async with serving(Emulator(Pace(tokens=3)), "127.0.0.1:0") as address:
        asked = ["stream", "--target", address, "--key", "hr_secret", "--set", "calls_max=10", "--set", "warmup_s=0"]
        status, out, errors = await command("run", *asked)
    assert status == 0
    assert row(out, "served") == ["served", "10"]
    assert "hr_secret" not in out + errors


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["run", "echo", "--target", "http://192.0.2.1:80"], 1, "not on this machine's loopback"),
        (["run", "echo", "--target", "unix:/nobody/here"], 1, "cannot connect"),
        (["run", "echo", "--target", "http://localhost", "--key", "a b"], 1, "has blanks or line ends"),
        (["run", "echo"], 2, "--target"),
        (["peers", "run", "plain", "--only", "nobody"], 2, "there is no peer 'nobody'"),
        (["peers", "run", "plain", "--json", "/no/such/folder/a.json"], 1, "there is no folder /no/such/folder"),
        (["run", "echo", "--target", "http://localhost", "--repeat", "0"], 2, "--repeat"),
        (["compare", "/nobody/a", "/nobody/b"], 1, "can't be read"),
        (["emulate", "--listen", "here"], 1, "write host:port"),
        (["emulate", "--fault", "smoke=0.1"], 1, "there is no fault 'smoke'"),
        (["emulate", "--log", "/nobody/log"], 1, "cannot write the log"),
        (["emulate", "steam"], 1, "there is no engine 'steam'"),
        (["emulate", "smollm2-cpu", "--tokens", "3"], 2, "has times of its own"),
        (["record", "--target", "unix:/nobody/here", "--model", "m", "--out", "/nobody/f"], 1, "unix:/nobody/here"),
    ],
)
async def test_a_mistake_is_one_line(arguments: list[str], status: int, said: str) -> None:
    ended, _, errors = await command(*arguments)
    *_, last = errors.splitlines()
    assert (ended, said in last, "Traceback" in errors) == (status, True, False)


async def test_a_run_in_which_nothing_was_served_fails() -> None:
    async with serving(Emulator(Pace()), "127.0.0.1:0") as address:
        asked = ["--target", address, "--set", "calls_max=3", "--set", "body.max_tokens=-1", "--set", "warmup_s=0"]
        status, out, errors = await command("run", "echo", *asked)
    assert status == 1
    assert "no call was served" in errors
    assert row(out, "not served: 400") == ["not", "served:", "400", "3"]


async def test_what_was_recorded_is_in_the_file(tmp_path: Path) -> None:
    async with serving(Emulator(Pace(tokens=3)), "127.0.0.1:0") as address:
        asked = ["record", "--target", address, "--model", "m", "--calls", "2", "--out", str(tmp_path / "r")]
        status, _, errors = await command(*asked)
    assert (status, errors) == (0, "")
    assert [len(call.gaps_s) for call in read_recording(tmp_path / "r")] == [2, 2]


async def test_every_fault_is_listed() -> None:
    status, out, _ = await command("faults")
    assert status == 0
    assert all(f" {kind} " in out and kind.about in out for kind in Kind)


async def command(*arguments: str) -> tuple[int, str, str]:
    """Status, standard output and errors."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "loadtests", *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, errors = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), errors.decode()


def row(text: str, name: str) -> list[str]:
    """The words of a table's row."""
    return next(line.split() for line in text.splitlines() if line.startswith(name + " "))
