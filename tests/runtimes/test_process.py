import asyncio
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from runtimes import keeper
from runtimes.clock import SystemClock
from runtimes.contract import Unavailable
from runtimes.pids import PidFile, Session, boot_id, lives, members, start_ticks, youngest
from runtimes.process import Command, Dead, Limits, Process, backoff_s, environment

FAST = Limits(probe_start_s=0.01, probe_s=0.01, restart_s=0.0, stop_s_max=5.0)
SERVES = "import time; print('up', flush=True); time.sleep(1000)"
ENDS = "print('no such model'); raise SystemExit(3)"


class Engine:
    """A fake engine: a small program, ready as soon as it has said `up`."""

    def __init__(self, state: Path, code: str, *, name: str = "chat-0", limits: Limits = FAST) -> None:
        self.fault: Unavailable | None = None
        self.process = Process(
            name=name,
            state=state,
            command=Command((sys.executable, "-c", code), environment({"STATE": str(state)})),
            probe=self.probe,
            clock=SystemClock(),
            limits=limits,
        )

    async def probe(self) -> None:
        log = self.process.log
        if not log.exists() or b"up" not in log.read_bytes().rpartition(b"headrace started")[2]:
            raise Unavailable("not up")
        if self.fault is not None:
            raise self.fault

    def session(self) -> Session:
        session = self.process.session()
        assert session is not None
        return session


@asynccontextmanager
async def running(engine: Engine) -> AsyncIterator[Engine]:
    try:
        await engine.process.open()
        yield engine
    finally:
        await engine.process.aclose()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)


async def test_open_returns_when_the_engine_answers(tmp_path: Path) -> None:
    async with running(Engine(tmp_path, SERVES)) as engine:
        snapshot = engine.process.snapshot()
        assert (snapshot.phase, snapshot.attempt, snapshot.reason) == ("ready", 1, "")
        engine.process.check()


async def test_an_engine_that_cannot_start_says_why_in_its_own_words(tmp_path: Path) -> None:
    engine = Engine(tmp_path, ENDS, limits=msgspec.structs.replace(FAST, failures_max=1))
    with pytest.raises(Unavailable, match=r"exited with 3; its last line: no such model.*chat-0\.log"):
        await engine.process.open()
    await engine.process.aclose()


async def test_its_last_error_says_more_than_what_it_prints_behind_it(tmp_path: Path) -> None:
    ends = "print('error: no such model\\n\\nAt:\\n  model.py(5)\\n;'); raise SystemExit(1)"
    engine = Engine(tmp_path, ends, limits=msgspec.structs.replace(FAST, failures_max=1))
    with pytest.raises(Unavailable, match="exited with 1; its last line: error: no such model"):
        await engine.process.open()
    await engine.process.aclose()


async def test_an_engine_finds_what_it_is_given_where_it_is_started(tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    engine = Engine(tmp_path, SERVES)
    engine.process._command = Command(
        (sys.executable, "-c", f"print(open('given').read(), flush=True); {SERVES}"),
        environment({}),
        scratch,
        fill=lambda folder: (folder / "given").write_text("something"),
        folder=scratch,
    )
    for _ in range(2):  # the folder is made anew
        async with running(engine):
            assert b"something" in engine.process.log.read_bytes()
        assert not scratch.exists()


async def test_the_youngest_process_of_a_program_is_found_and_its_death_seen(tmp_path: Path) -> None:
    async with running(Engine(tmp_path, SERVES)) as engine:
        session = engine.session()
        program = Path(sys.executable).name
        found = youngest(session, program)
        assert found is not None
        assert found != session.pid, "its keeper, which is older, runs the same program"
        assert lives(session, found)
        assert youngest(session, "another") is None
        os.kill(found, signal.SIGKILL)
        await until(lambda: not lives(session, found))


async def test_what_is_not_there_cannot_be_started(tmp_path: Path) -> None:
    engine = Engine(tmp_path, SERVES)
    engine.process._command = Command(("/nowhere/python",), {})
    with pytest.raises(Unavailable, match="cannot start /nowhere/python: No such file"):
        await engine.process.open()
    await engine.process.aclose()


async def test_an_engine_that_is_never_ready_is_given_up_after_its_time(tmp_path: Path) -> None:
    limits = msgspec.structs.replace(FAST, start_s_max=0.0)
    engine = Engine(tmp_path, "import time; time.sleep(1000)", limits=limits)
    with pytest.raises(Unavailable, match="not ready within 0 s"):
        await engine.process.open()
    await engine.process.aclose()


async def test_a_killed_engine_is_started_again(tmp_path: Path) -> None:
    async with running(Engine(tmp_path, SERVES)) as engine:
        session = engine.session()
        worker = next(pid for pid in members(session) if pid != session.pid)
        os.kill(worker, signal.SIGKILL)
        await until(lambda: engine.process.snapshot().attempt == 2)
        await until(lambda: engine.process.snapshot().phase == "ready")
        assert "killed by signal 9" in engine.process.snapshot().reason
        assert members(session) == []


@pytest.mark.parametrize("fault", [Dead("its core has died"), Unavailable("no answer")], ids=["dead", "hung"])
async def test_an_engine_that_no_longer_answers_is_started_again(tmp_path: Path, fault: Unavailable) -> None:
    async with running(Engine(tmp_path, SERVES, limits=msgspec.structs.replace(FAST, hung_s_max=0.0))) as engine:
        session = engine.session()
        engine.fault = fault
        await until(lambda: engine.process.snapshot().phase != "ready")
        engine.fault = None
        await until(lambda: engine.process.snapshot().phase == "ready")
        assert str(fault) in engine.process.snapshot().reason
        assert members(session) == []


async def test_while_it_waits_to_be_restarted_it_says_so(tmp_path: Path) -> None:
    engine = Engine(tmp_path, ENDS, limits=msgspec.structs.replace(FAST, restart_s=30.0))
    with pytest.raises(Unavailable):
        await engine.process.open()
    with pytest.raises(Unavailable, match=r"chat-0 is restarting, attempt 2, next try in \d+ s$"):
        engine.process.check()
    await engine.process.aclose()


async def test_after_too_many_failures_it_is_left_alone_and_then_tried_again(tmp_path: Path) -> None:
    code = f"""
        import os, pathlib
        if (pathlib.Path(os.environ["STATE"]) / "repaired").exists():
            {SERVES}
        print("broken"); raise SystemExit(1)
    """
    limits = msgspec.structs.replace(FAST, failures_max=1, failures_s=1.0)
    engine = Engine(tmp_path, textwrap.dedent(code), limits=limits)
    with pytest.raises(Unavailable):
        await engine.process.open()
    assert engine.process.snapshot().phase == "failed"
    with pytest.raises(Unavailable, match=r"down: it failed 1 times, next try in \d s; see its log"):
        engine.process.check()
    (tmp_path / "repaired").touch()
    await until(lambda: engine.process.snapshot().phase == "ready")
    await engine.process.aclose()


def test_pauses_double_up_to_their_bound() -> None:
    limits = Limits(restart_s=1.0, restart_s_max=10.0)
    assert [backoff_s(failures, limits) for failures in range(1, 7)] == [1, 2, 4, 8, 10, 10]


async def test_closing_leaves_nobody_behind_not_even_the_stubborn(tmp_path: Path) -> None:
    code = """
        import signal, subprocess, sys, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
        print("up", flush=True)
        time.sleep(1000)
    """
    limits = msgspec.structs.replace(FAST, stop_s_max=0.1)
    engine = Engine(tmp_path, textwrap.dedent(code), limits=limits)
    await engine.process.open()
    session = engine.session()
    assert len(members(session)) == 3
    await engine.process.aclose()
    assert members(session) == []
    assert engine.process.snapshot().phase == "stopped"
    await engine.process.aclose()


async def test_a_polite_engine_is_asked_to_stop_before_it_is_made_to(tmp_path: Path) -> None:
    code = """
        import os, pathlib, signal, sys, time
        def leave(*_):
            (pathlib.Path(os.environ["STATE"]) / "goodbye").touch()
            sys.exit()
        signal.signal(signal.SIGTERM, leave)
        print("up", flush=True)
        time.sleep(1000)
    """
    async with running(Engine(tmp_path, textwrap.dedent(code))):
        pass
    assert (tmp_path / "goodbye").exists()


GATEWAY = """
    import asyncio, sys
    from pathlib import Path
    from runtimes.clock import SystemClock
    from runtimes.contract import Unavailable
    from runtimes.process import Command, Process, environment

    async def probe():
        log = Path(sys.argv[1]) / "logs" / "chat-0.log"
        if not log.exists() or "up" not in log.read_text():
            raise Unavailable("not up")

    async def main():
        code = "import time; print('up', flush=True); time.sleep(1000)"
        command = Command((sys.executable, "-c", code), environment({}))
        process = Process(name="chat-0", state=Path(sys.argv[1]), command=command, probe=probe, clock=SystemClock())
        await process.open()
        print(process.snapshot().pid, flush=True)
        await asyncio.sleep(1000)

    asyncio.run(main())
"""


@asynccontextmanager
async def gateway(state: Path) -> AsyncIterator[tuple[asyncio.subprocess.Process, Session]]:
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", textwrap.dedent(GATEWAY), str(state), stdout=subprocess.PIPE
    )
    assert child.stdout is not None
    pid = int(await child.stdout.readline())
    ticks = start_ticks(pid)
    assert ticks is not None
    try:
        yield child, Session(pid, ticks, boot_id())
    finally:
        if child.returncode is None:
            child.kill()
        await child.wait()


async def test_a_killed_gateway_takes_its_engine_with_it(tmp_path: Path) -> None:
    async with gateway(tmp_path) as (child, session):
        assert members(session)
        child.kill()
        await until(lambda: not members(session))


async def test_an_orphan_of_a_killed_gateway_is_ended_at_the_next_start(tmp_path: Path) -> None:
    async with gateway(tmp_path) as (child, session):
        child.send_signal(signal.SIGSTOP)  # it must not see its keeper die, and clean up itself
        os.kill(session.pid, signal.SIGKILL)
        child.kill()
        await child.wait()
        await until(lambda: session.pid not in members(session))
        assert members(session)
        async with running(Engine(tmp_path, SERVES)):
            assert members(session) == []


async def test_two_gateways_cannot_run_one_replica(tmp_path: Path) -> None:
    async with gateway(tmp_path) as (_, session):
        second = Engine(tmp_path, SERVES)
        with pytest.raises(Unavailable, match=r"another gateway uses the state folder .*state\.path"):
            await second.process.open()
        await second.process.aclose()
        assert members(session)


async def test_a_process_that_only_has_the_number_of_an_orphan_is_left_alone(tmp_path: Path) -> None:
    stranger = await asyncio.create_subprocess_exec("sleep", "1000", start_new_session=True)
    ticks = start_ticks(stranger.pid)
    assert ticks is not None
    file = PidFile(tmp_path / "run" / "chat-0.pid")
    assert file.lock()
    file.write(Session(stranger.pid, ticks - 1, boot_id()))
    file.unlock()
    async with running(Engine(tmp_path, SERVES)):
        assert stranger.returncode is None
        assert members(Session(stranger.pid, ticks, boot_id())) == [stranger.pid]
    assert members(Session(stranger.pid, ticks, "another boot")) == []
    stranger.kill()
    await stranger.wait()


async def test_the_log_has_a_bound_and_keeps_the_end(tmp_path: Path) -> None:
    code = "for n in range(20_000): print('line', n)\nprint('up', flush=True); import time; time.sleep(1000)"
    limits = msgspec.structs.replace(FAST, log_bytes_max=65_536)
    async with running(Engine(tmp_path, code, limits=limits)) as engine:
        log = engine.process.log
        older = log.with_name(log.name + ".1")
        assert log.stat().st_size + older.stat().st_size <= 65_536
        assert log.read_text().endswith("line 19999\nup\n")


def test_the_bound_holds_for_an_engine_that_says_more_at_once(tmp_path: Path) -> None:
    path = tmp_path / "x.log"
    log = keeper.Log(path, 1_000)
    for _ in range(3):
        log.write(b"x" * 5_000 + b"end\n")
    log.close()
    assert path.stat().st_size + path.with_name("x.log.1").stat().st_size == 1_000
    assert path.read_bytes().endswith(b"xend\n")


def test_an_engine_sees_nothing_of_our_environment_but_what_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROVIDER_API_KEY", "secret")
    monkeypatch.setenv("LANG", "C.UTF-8")
    seen = environment({"EXTRA": "1"})
    assert "PROVIDER_API_KEY" not in seen
    assert (seen["LANG"], seen["EXTRA"]) == ("C.UTF-8", "1")
