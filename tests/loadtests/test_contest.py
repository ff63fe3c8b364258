"""Peers side by side, with peers that are quickly there: the emulator, which needs no engine, and nginx."""

import asyncio
import shutil
import sys
from pathlib import Path

import pytest

from loadtests.contest import contest
from loadtests.field import Cores
from loadtests.install import Own, Program
from loadtests.peer import ALL, Peer, Site, Start
from loadtests.report import Results
from loadtests.scenario import Scenario
from loadtests.standings import CALL, SERVED, cross, ratios, standings

PLAIN = Scenario(about="few calls", model="m", connections=2, warmup_s=0.0, calls_max=20)


async def test_every_peer_is_loaded_alike_and_measured(tmp_path: Path) -> None:
    results = await run({"plain": PLAIN}, quick("a"), quick("b"), state=tmp_path)
    assert [side.name for side in results.sides] == ["direct", "a", "b"]
    for side in results.sides:
        assert [report.outcomes for report in side.of("plain")] == [{"served": 20}] * 2
        assert all(report.cost is not None and report.cost.cpu_us_per_call > 0 for report in side.runs)


async def test_the_order_turns_over_from_one_repetition_to_the_next(tmp_path: Path) -> None:
    said: list[str] = []
    await contest({"plain": PLAIN}, (quick("a"), quick("b")), state=tmp_path, repeat=3, say=said.append)
    turns = [line.partition(": ")[2] for line in said if line.startswith("plain")]
    assert turns == ["direct", "a", "b", "b", "a", "direct", "direct", "a", "b"]


async def test_a_peer_that_does_not_start_is_in_the_results_with_its_last_words(tmp_path: Path) -> None:
    dying = (sys.executable, "-c", "import sys; sys.exit('the cable is out')")
    results = await run({"plain": PLAIN}, quick("a", command=dying), quick("b"), state=tmp_path)
    dead, well = results.sides[1:]
    assert (dead.runs, "the cable is out" in dead.fault) == ((), True)
    assert len(well.runs) == 2
    assert "the cable is out" in text(results)


async def test_a_peer_whose_program_is_missing_says_what_to_install(tmp_path: Path) -> None:
    missing = Peer("c", "", Program("no-such-program", hint="get it from a friend"), quick("c").start)
    results = await run({"plain": PLAIN}, missing, state=tmp_path)
    assert "get it from a friend" in results.sides[1].fault


async def test_a_peer_gets_nothing_of_the_environment_but_where_programs_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_TOKEN", "secret")
    telling = (sys.executable, "-c", "import os, sys; sys.exit(' '.join(sorted(os.environ)))")
    results = await run({"plain": PLAIN}, quick("a", command=telling), state=tmp_path)
    assert "PATH" in results.sides[1].fault
    assert "SOME_TOKEN" not in results.sides[1].fault


async def test_a_run_that_is_ended_ends_what_it_started() -> None:
    asked = ("peers", "run", "plain", "--only", "headrace", "--set", "duration_s=60")
    run = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "loadtests", *asked, stderr=asyncio.subprocess.PIPE
    )
    assert run.stderr is not None
    while b"1 of 2: direct" not in (line := await run.stderr.readline()):
        assert line, "it ended by itself"
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    run.terminate()
    assert await run.wait() == 143
    assert len(children) == 2
    assert [child for child in children if Path(f"/proc/{child}").exists()] == []


async def test_nothing_is_left_running(tmp_path: Path) -> None:
    ports: list[int] = []

    def start(site: Site) -> Start:
        ports.append(site.port)
        return quick("a").start(site)

    await run({"plain": PLAIN}, Peer("a", "", Own("headrace"), start), state=tmp_path)
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", ports[0])


@pytest.mark.skipif(shutil.which("nginx") is None, reason="there is no nginx here")
async def test_nginx_relays_whole_answers_and_streams(tmp_path: Path) -> None:
    nginx = next(peer for peer in ALL if peer.name == "nginx")
    stream = Scenario(about="", model="m", stream=True, connections=2, warmup_s=0.0, calls_max=10)
    results = await run({"plain": PLAIN, "stream": stream}, nginx, state=tmp_path)
    assert [report.outcomes for report in results.sides[1].runs] == [{"served": 20}] * 2 + [{"served": 10}] * 2


async def test_headrace_is_served_with_all_policy_on(tmp_path: Path) -> None:
    headrace = tuple(peer for peer in ALL if peer.name.startswith("headrace"))
    results = await run({"plain": PLAIN}, *headrace, state=tmp_path)
    assert [side.fault for side in results.sides] == ["", "", ""]
    assert [report.outcomes for side in results.sides for report in side.runs] == [{"served": 20}] * 6


async def test_ratios_are_taken_repetition_by_repetition(tmp_path: Path) -> None:
    results = await run({"plain": PLAIN}, quick("headrace"), quick("other"), state=tmp_path)
    _, ours, other = results.sides
    costs = [[run.cost.cpu_us_per_call for run in side.runs if run.cost] for side in (ours, other)]
    expected = [mine / theirs for mine, theirs in zip(*costs, strict=True)]
    assert ratios(results, "plain", ours, other, CALL) == expected
    assert ratios(results, "plain", ours, ours, SERVED) == [1.0, 1.0]
    assert cross(results, "plain").row_count == 1


@pytest.mark.parametrize(
    ("usable", "cores"),
    [({3}, (3, 3, 3)), ({0, 1}, (0, 1, 1)), ({0, 1, 2, 3}, (0, 3, 1))],
)
def test_a_peer_has_a_core_to_itself_where_there_are_two(usable: set[int], cores: tuple[int, int, int]) -> None:
    found = Cores.of(usable)
    assert (found.peer, found.engine, found.client) == cores


def quick(name: str, *, command: tuple[str, ...] = ()) -> Peer:
    """A peer that is an emulator itself, unless told to be something else."""

    def start(site: Site) -> Start:
        emulate = (sys.executable, "-m", "loadtests", "emulate", "--listen", f"127.0.0.1:{site.port}")
        return Start(command=command or emulate, ready="/health", ready_port=site.port)

    return Peer(name=name, about="quick", package=Own("headrace"), start=start)


async def run(scenarios: dict[str, Scenario], *peers: Peer, state: Path) -> Results:
    return await contest(scenarios, peers, state=state, repeat=2, say=lambda _: None)


def text(results: Results) -> str:
    return " ".join(str(it) for column in standings(results, "plain").columns for it in column.cells)
