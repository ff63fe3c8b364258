"""The `headrace-load` command: run · compare · emulate · faults · record.

`run` loads a server that speaks OpenAI's chat API and says what its answers cost; `compare` sets two such results side
by side; `emulate` is an engine that computes nothing, to stand behind the gateway.
"""

from __future__ import annotations

import asyncio
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Annotated, NoReturn

import msgspec
import uvloop
from cyclopts import App, CycloptsError, Parameter
from cyclopts.validators import Number
from rich.console import Console
from rich.table import Table
from rich.text import Text

from loadtests.emulator import Emulator, EngineFault, FaultError, Faults, Kind, Log, engine, rates, serving
from loadtests.emulator.recorder import record as recorded
from loadtests.emulator.recording import RecordingFault, write
from loadtests.process import NoProcess
from loadtests.report import Report, ReportFault, Results, comparison, heading, read, table
from loadtests.scenario import Scenario, ScenarioFault, load, shipped
from loadtests.target import Target, TargetFault, parse, require_loopback
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
RECORD_EXAMPLES = """
Examples:

    headrace-load record --target unix:/run/engine.sock --model smollm2 --out mine.jsonl
"""
EMULATE_EXAMPLES = """
Examples:

    headrace-load emulate --listen 127.0.0.1:9100 --token-s 0.01 --tokens 128
    headrace-load emulate smollm2-cpu
    headrace-load emulate --fault rst=0.05 --fault stall@3=0.01 --log generated.jsonl
"""

Flag = Annotated[bool, Parameter(negative="", show_default=False)]
Key = Annotated[str | None, Parameter(env_var="HEADRACE_KEY", show_default=False)]
AgainstKey = Annotated[str | None, Parameter(env_var="HEADRACE_AGAINST_KEY", show_default=False)]
Repeat = Annotated[int, Parameter(validator=Number(gte=1, lte=1_000))]
Seconds = Annotated[float, Parameter(validator=Number(gte=0, lte=3_600))]
Tokens = Annotated[int, Parameter(validator=Number(gte=1, lte=1_000_000))]

APP = App(
    name="headrace-load",
    help="Load for servers that speak OpenAI's chat API, and what it cost them.",
    help_format="plaintext",
    version_flags=[],
)


def main() -> None:
    """Run one command; a user's mistake is one line on stderr and status 1, or 2 if the command line is wrong."""
    try:
        APP(print_error=False, exit_on_error=False, result_action="return_value")
    except CycloptsError as error:
        _fail(2, f"{str(error).rstrip('.')}; `--help` shows what there is")
    except (ScenarioFault, TargetFault, ReportFault, NoProcess, FaultError, EngineFault, RecordingFault) as error:
        _fail(1, str(error))
    except KeyboardInterrupt:
        sys.exit(130)


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
    settings: Annotated[tuple[str, ...], Parameter(name="--set", negative="", show_default=False)] = (),
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
    sides = [_side(target, key, pid, yes_not_loopback)]
    if against is not None:
        sides.append(_side(against, against_key, against_pid, yes_not_loopback))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        lots = runner.run(_trials(plan, name=scenario, sides=sides, repeat=repeat))
    results = Results(runs=tuple(lots[0]), against=tuple(lots[1]) if against is not None else ())
    if json:
        sys.stdout.write(msgspec.json.encode(results).decode() + "\n")
    else:
        for lot in lots:
            _show(heading(lot), table(lot))
        if against is not None:
            _show(f"A {lots[0][0].target}\nB {lots[1][0].target}", comparison(*lots))
    if not any(report.served for lot in lots for report in lot):
        _fail(1, "no call was served; the outcomes above say why")


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
    ours, theirs = read(a).runs, read(b).runs
    shown = comparison(ours, theirs)
    _show(f"A {heading(ours)}\n\nB {heading(theirs)}", shown)


@APP.command(help_epilogue=EMULATE_EXAMPLES)
def emulate(
    kind: Annotated[str | None, Parameter(help=f"{', '.join(engine.shipped())}; or a .toml file of your own.")] = None,
    /,
    *,
    listen: str = "127.0.0.1:9100",
    first_token_s: Seconds | None = None,
    token_s: Seconds | None = None,
    tokens: Tokens | None = None,
    faults: Annotated[tuple[str, ...], Parameter(name="--fault", negative="", show_default=False)] = (),
    seed: int = 1,
    log: Path | None = None,
) -> None:
    """Serve as an engine that computes nothing, until SIGTERM. Without a kind, answers are as quick as they can be
    written, or paced as the first three options say.

    Parameters
    ----------
    listen
        host:port or unix:/path.
    first_token_s
        Wait before the first token.
    token_s
        Wait before every further one.
    tokens
        How many an answer has, unless its request's max_tokens is less: 16.
    faults
        NAME=RATE, the share of calls that meet it; can be given several times. `headrace-load faults` lists them.
    seed
        Of the chance by which calls meet faults.
    log
        Write what was generated, call by call, to this file as JSON lines.
    """
    pace = {"first_token_s": first_token_s, "token_s": token_s, "tokens": tokens}
    paced = {field: value for field, value in pace.items() if value is not None}
    if kind is not None and paced:
        _fail(2, f"engine {kind} has times of its own; leave it away, or {', '.join(paced)}")
    chosen = msgspec.convert(paced, engine.Pace) if kind is None else engine.load(kind)
    chances = Faults(rates(faults), seed=seed)
    with _opened(log) as truth, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        try:
            runner.run(_emulate(Emulator(chosen, faults=chances, log=truth), listen))
        except (OSError, ValueError) as error:
            _fail(1, f"cannot listen on {listen}: {error}")


@APP.command
def faults() -> None:
    """List the faults that `emulate` knows."""
    table = Table("name", "strikes", "what happens")
    for kind in Kind:
        table.add_row(kind, kind.when.name, kind.about)
    _show("Faults", table)


@APP.command(help_epilogue=RECORD_EXAMPLES)
def record(
    *,
    target: str,
    model: str,
    out: Path,
    key: Key = None,
    calls: Annotated[int, Parameter(validator=Number(gte=1, lte=100_000))] = 64,
    concurrent: Annotated[int, Parameter(validator=Number(gte=1, lte=1_000))] = 4,
    tokens: Annotated[int, Parameter(validator=Number(gte=1, lte=100_000))] = 64,
    yes_not_loopback: Flag = False,
) -> None:
    """Record an engine's times, for `emulate` to replay. Nothing that is said is kept.

    Parameters
    ----------
    target
        The engine: http://host:port or unix:/path.
    model
        The model's name there.
    out
        The file: a JSON line a call.
    key
        Its API key; better in the environment, where `ps` does not show it.
    calls
        How many streamed chats, with prompts of 8 to 256 words.
    concurrent
        How many of them at once.
    tokens
        How long an answer may be.
    yes_not_loopback
        Ask an engine on another machine; it had better be yours.
    """
    side = _side(target, key, None, yes_not_loopback)
    made = recorded(side.target, model=model, key=key, calls=calls, concurrent=concurrent, tokens=tokens)
    write(out, asyncio.run(made))


class _Side(msgspec.Struct, frozen=True):
    """One of the servers to be loaded."""

    target: Target
    key: str | None
    pid: int | None


def _side(text: str, key: str | None, pid: int | None, anywhere: bool) -> _Side:
    target = parse(text)
    if not anywhere:
        require_loopback(target)
    if key is not None and not re.fullmatch(r"[!-~]+", key):
        raise TargetFault(f"the key for {text} is empty or has blanks or line ends in it; a header can't carry those")
    return _Side(target, key, pid)


async def _trials(plan: Scenario, *, name: str, sides: Sequence[_Side], repeat: int) -> list[list[Report]]:
    """Trials by side. The sides take turns, the order turning over each time: what drifts meets them alike."""
    lots: list[list[Report]] = [[] for _ in sides]
    for number in range(repeat):
        turns = list(zip(lots, sides, strict=True))
        for lot, side in turns if number % 2 == 0 else reversed(turns):
            sys.stderr.write(f"trial {number + 1} of {repeat}: {side.target.text}\n")
            lot.append(await trial(plan, name=name, target=side.target, key=side.key, pid=side.pid))
    return lots


@contextmanager
def _opened(log: Path | None) -> Iterator[Log | None]:
    if log is None:
        yield None
        return
    try:
        opened = Log(log)
    except OSError as error:
        _fail(1, f"cannot write the log: {error}")
    with closing(opened):
        yield opened


async def _emulate(emulator: Emulator, listen: str) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with serving(emulator, listen) as where:
        sys.stderr.write(f"emulating on {where}\n")
        await stop.wait()
    sys.stderr.write(f"answered {emulator.calls} calls with {emulator.tokens} tokens\n")


def _show(title: str, figures: Table) -> None:
    # Into a pipe or a file a line is as long as it needs to be.
    console = Console(width=None if sys.stdout.isatty() else 1_000, highlight=False)
    console.print(Text(title, style="bold"))
    console.print(figures, end="\n\n")


def _fail(status: int, what: str) -> NoReturn:
    sys.stderr.write(f"headrace-load: {' '.join(what.split()).rstrip('.')}.\n")
    sys.exit(status)


if __name__ == "__main__":
    main()
