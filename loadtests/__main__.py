"""The `headrace-load` command: run · compare · peers · classifiers · gate · page · emulate · faults · record.

`run` loads a server that speaks OpenAI's chat API and says what its answers cost; `compare` sets two such results side
by side; `peers` measures gateways in one run; `gate` holds its ratios; `page` draws results; `emulate` is an engine
that computes nothing, to stand behind them.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import msgspec
import uvloop
from cyclopts import App, CycloptsError, Parameter

from loadtests import gate
from loadtests.child import ChildFault
from loadtests.classifiers_command import EXAMPLES, classifiers_
from loadtests.console import Flag, Key, Repeat, Settings, fail, say, show
from loadtests.emulate_command import EMULATE_EXAMPLES, RECORD_EXAMPLES, emulate, faults, record
from loadtests.emulator import EngineFault, FaultError
from loadtests.emulator.recording import RecordingFault
from loadtests.install import PeerFault
from loadtests.page import page
from loadtests.peers_command import PEERS
from loadtests.process import NoProcess
from loadtests.report import Report, ReportFault, Results, Side, comparison, heading, read, table, tenants
from loadtests.scenario import Scenario, ScenarioFault, load, shipped
from loadtests.standings import OWN
from loadtests.target import Access, Target, TargetFault, chosen
from loadtests.trial import trial

RUN_EXAMPLES = """
Examples:

    headrace-load run echo --target http://127.0.0.1:8000 --key "$(cat demo.key)" --pid 4711
    headrace-load run stream --target http://127.0.0.1:8000 --set arrivals.kind=poisson --set arrivals.rate_per_s=50
    headrace-load run vllm4 --target unix:/run/engine.sock --against http://127.0.0.1:8000 --repeat 5
"""
COMPARE_EXAMPLES = """
Examples:

    headrace-load run echo --target http://127.0.0.1:8000 --repeat 5 --json > before.json
    headrace-load compare before.json after.json
"""
GATE_EXAMPLES = """
Examples:

    headrace-load peers run plain stream --only nginx,sglang,headrace --repeat 5 --json peers.json
    headrace-load gate peers.json
"""
PAGE_EXAMPLES = """
Examples:

    headrace-load run tenants --target http://127.0.0.1:8000 --json > tenants.json
    headrace-load page tenants.json tenants.html
"""

AgainstKey = Annotated[str | None, Parameter(env_var="HEADRACE_AGAINST_KEY", show_default=False)]

APP = App(
    name="headrace-load",
    help="Load for servers that speak OpenAI's chat API, and what it cost them.",
    help_format="plaintext",
    version_flags=[],
)
APP.command(PEERS)
APP.command(classifiers_, name="classifiers", help_epilogue=EXAMPLES)
APP.command(emulate, help_epilogue=EMULATE_EXAMPLES)
APP.command(faults)
APP.command(record, help_epilogue=RECORD_EXAMPLES)


FAULTS = (
    *(ChildFault, EngineFault, FaultError, NoProcess, PeerFault, RecordingFault, ReportFault, ScenarioFault),
    TargetFault,
)
"""What a user, or a machine, can have got wrong: each says so itself."""


def main() -> None:
    """Run one command; a user's mistake is one line on stderr and status 1, or 2 if the command line is wrong."""
    try:
        APP(print_error=False, exit_on_error=False, result_action="return_value")
    except CycloptsError as error:
        fail(2, f"{str(error).rstrip('.')}; `--help` shows what there is")
    except FAULTS as error:
        fail(1, str(error))
    except KeyboardInterrupt:
        sys.exit(130)
    except asyncio.CancelledError:
        sys.exit(143)  # SIGTERM


@APP.command(help_epilogue=RUN_EXAMPLES)
def run(
    scenario: Annotated[str, Parameter(help=f"{', '.join(shipped())}; or a .toml file of your own.")],
    /,
    *,
    target: str,
    key: Key = None,
    pid: int | None = None,
    against: str | None = None,
    against_key: AgainstKey = None,
    against_pid: int | None = None,
    repeat: Repeat = 1,
    settings: Settings = (),
    json: Flag = False,
    yes_not_loopback: Flag = False,
) -> None:
    """Load a server as a scenario says, and report.

    Parameters
    ----------
    target
        The server: http://host:port or unix:/path.
    key
        Its API key; better in the environment, where `ps` does not show it.
    pid
        Its process: also report CPU time and memory, of it and its descendants.
    against
        A second server, loaded in turn with the first; their ratios are reported too.
    against_key
        The second one's API key.
    against_pid
        The second one's process.
    repeat
        How many trials of each.
    settings
        Change a field of the scenario, e.g. connections=8; can be given several times.
    json
        Print JSON on stdout, and nothing else.
    yes_not_loopback
        Load a server on another machine; it had better be yours.
    """
    plan = load(scenario, settings)
    sides = [_side(plan, target, key, pid, yes_not_loopback)]
    if against is not None:
        sides.append(_side(plan, against, against_key, against_pid, yes_not_loopback))
    steps = plan.steps(Path(scenario).stem)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        lots = runner.run(_trials(steps, sides=sides, repeat=repeat))
    results = Results(sides=tuple(Side(name=lot[0].target, runs=tuple(lot)) for lot in lots))
    if json:
        sys.stdout.write(msgspec.json.encode(results).decode() + "\n")
    else:
        for step in steps:
            _show([side.of(step) for side in results.sides])
    if not any(report.served for lot in lots for report in lot):
        fail(1, "no call was served; the outcomes above say why")


def _show(lots: Sequence[Sequence[Report]]) -> None:
    for lot in lots:
        show(heading(lot), table(lot))
        if len(lot[0].tenants) > 1:
            show("By tenant", tenants(lot))
    if len(lots) > 1:
        show(f"A {lots[0][0].target}\nB {lots[1][0].target}", comparison(*lots))


@APP.command(help_epilogue=COMPARE_EXAMPLES)
def compare(a: Path, b: Path, /) -> None:
    """Set two results side by side, trial by trial.

    Parameters
    ----------
    a
        What `run --json` printed.
    b
        The same, of the other one; ratios are b/a. Trials that alternated (`run --against`) compare best.
    """
    ours, theirs = (read(it).sides[0].runs for it in (a, b))
    shown = comparison(ours, theirs)
    show(f"A {heading(ours)}\n\nB {heading(theirs)}", shown)


@APP.command(name="gate", help_epilogue=GATE_EXAMPLES)
def gate_(results: Path, /, *, baseline: Path = gate.BASELINE, save: Flag = False) -> None:
    """Fail if a call or a chunk has become dearer, as a multiple of SGLang's gateway's and of nginx's in the same run.

    Parameters
    ----------
    results
        What `peers run --json` wrote.
    baseline
        The multiples to hold.
    save
        Hold these results from now on.
    """
    found = read(results)
    if save:
        ratios = tuple(gate.measured(found))
        if not ratios:
            fail(1, f"{results} has no closed scenario with {OWN} beside {' or '.join(gate.NEIGHBOURS)}")
        baseline.write_text(gate.written(ratios))
    verdicts = gate.judge(found, gate.load(baseline))
    for verdict in verdicts:
        sys.stdout.write(f"{verdict}\n")
    if not all(verdict.passed for verdict in verdicts):
        fail(1, "the gate does not hold; the lines above say where")


@APP.command(name="page", help_epilogue=PAGE_EXAMPLES)
def page_(results: Path, html: Path, /) -> None:
    """Draw results as an HTML page, which opens without a network.

    Parameters
    ----------
    results
        What `run --json` printed, or `peers run --json` wrote.
    html
        The file to write.
    """
    html.write_text(page(read(results)))


class _Side(msgspec.Struct, frozen=True):
    """One of the servers to be loaded."""

    target: Target
    access: Access
    pid: int | None


def _side(plan: Scenario, text: str, key: str | None, pid: int | None, anywhere: bool) -> _Side:
    return _Side(chosen(text, key=key, anywhere=anywhere), Access(keys=plan.keys(key)), pid)


async def _trials(steps: Mapping[str, Scenario], *, sides: Sequence[_Side], repeat: int) -> list[list[Report]]:
    """Trials by side. The sides take turns, the order turning over each time: what drifts meets them alike."""
    lots: list[list[Report]] = [[] for _ in sides]
    for name, plan in steps.items():
        for number in range(repeat):
            turns = list(zip(lots, sides, strict=True))
            for lot, side in turns if number % 2 == 0 else reversed(turns):
                say(f"{name}, {number + 1} of {repeat}: {side.target.text}")
                lot.append(await trial(plan, name=name, target=side.target, access=side.access, pid=side.pid))
    return lots


if __name__ == "__main__":
    main()
