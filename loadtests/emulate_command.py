"""`headrace-load emulate`, `faults`, `record`: an engine that computes nothing, and how it learns a real one's pace."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Annotated

import msgspec
import uvloop
from cyclopts import Parameter
from cyclopts.validators import Number
from rich.table import Table

from loadtests.console import Flag, Key, fail, show
from loadtests.emulator import Emulator, Faults, Kind, Log, engine, rates, serving
from loadtests.emulator.recorder import record as recorded
from loadtests.emulator.recording import write
from loadtests.target import chosen

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

Seconds = Annotated[float, Parameter(validator=Number(gte=0, lte=3_600))]
Tokens = Annotated[int, Parameter(validator=Number(gte=1, lte=1_000_000))]


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
        fail(2, f"engine {kind} has times of its own; leave it away, or {', '.join(paced)}")
    chosen = msgspec.convert(paced, engine.Pace) if kind is None else engine.load(kind)
    chances = Faults(rates(faults), seed=seed)
    with _opened(log) as truth, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        try:
            runner.run(_emulate(Emulator(chosen, faults=chances, log=truth), listen))
        except (OSError, ValueError) as error:
            fail(1, f"cannot listen on {listen}: {error}")


def faults() -> None:
    """List the faults that `emulate` knows."""
    table = Table("name", "strikes", "what happens")
    for kind in Kind:
        table.add_row(kind, kind.when.name, kind.about)
    show("Faults", table)


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
    engine = chosen(target, key=key, anywhere=yes_not_loopback)
    made = recorded(engine, model=model, key=key, calls=calls, concurrent=concurrent, tokens=tokens)
    write(out, asyncio.run(made))


@contextmanager
def _opened(log: Path | None) -> Iterator[Log | None]:
    if log is None:
        yield None
        return
    try:
        opened = Log(log)
    except OSError as error:
        fail(1, f"cannot write the log: {error}")
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
