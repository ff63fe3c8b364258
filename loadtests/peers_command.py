"""`headrace-load peers`: gateways installed from their public packages, and measured side by side."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated, Any

import msgspec
import uvloop
from cyclopts import App, Parameter

from loadtests.arrivals import Closed
from loadtests.console import Repeat, Settings, fail, require_folder, say, show, state
from loadtests.contest import contest
from loadtests.install import PeerFault, install, installed
from loadtests.page import page
from loadtests.peer import ALL, Peer
from loadtests.report import Results
from loadtests.scenario import Scenario, load, shipped
from loadtests.standings import cross, standings

RUN_EXAMPLES = """
Examples:

    headrace-load peers run plain --only nginx,sglang,headrace --repeat 3
    headrace-load peers run plain stream --json peers.json
"""
Only = Annotated[str | None, Parameter(metavar="NAME,NAME", show_default=False)]

PEERS = App(name="peers", help="Gateways side by side: install, run, list.", help_format="plaintext", version_flags=[])


@PEERS.command(name="list")
def list_() -> None:
    """Say which gateways there are, at which version, and which are installed."""
    for peer in ALL:
        try:
            installed(peer.package, state())
            found = peer.package.version()
        except PeerFault as fault:
            found = str(fault)
        sys.stdout.write(f"{peer.name:<14} {found}\n{'':<14} {peer.about}\n")


@PEERS.command(name="install")
def install_(*, only: Only = None) -> None:
    """Install the gateways, from PyPI and npm, below the state folder. Those that are there stay as they are.

    Parameters
    ----------
    only
        Some of them, e.g. nginx,sglang.
    """
    faults = []
    for peer in _chosen(only):
        try:
            say(f"{peer.name} {peer.package.version()}")
            install(peer.package, state())
        except PeerFault as fault:
            say(f"{peer.name}: {fault}")
            faults.append(peer.name)
    if faults:
        fail(1, f"not installed: {', '.join(faults)}; the lines above say why")


@PEERS.command(name="run", help_epilogue=RUN_EXAMPLES)
def run(
    scenarios: Annotated[
        tuple[str, ...], Parameter(name="SCENARIO", help=f"{', '.join(shipped())}; or .toml files of your own.")
    ],
    /,
    *,
    only: Only = None,
    repeat: Repeat = 2,
    settings: Settings = (),
    json: Path | None = None,
    html: Path | None = None,
) -> None:
    """Load the gateways in turn, each alone on its core, and compare what they cost.

    Parameters
    ----------
    only
        Some of them, e.g. nginx,sglang,headrace.
    repeat
        How many trials of each; their order turns over each time.
    settings
        Change a field of the scenarios, e.g. duration_s=20; can be given several times.
    json
        Also write everything that was measured into this file.
    html
        Also write it as a page with plots.
    """
    for file in (json, html):
        require_folder(file)  # better now than in four minutes
    plans: dict[str, Scenario] = {}
    for name in scenarios:
        plans |= load(name, settings).steps(Path(name).stem)
    carry_out(contest(plans, _chosen(only), state=state(), repeat=repeat, say=say), json=json, html=html)


def carry_out(measuring: Coroutine[Any, Any, Results], *, json: Path | None, html: Path | None) -> None:
    """Measure, write down, show."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        results = runner.run(_until_sigterm(measuring))
    if json is not None:
        json.write_bytes(msgspec.json.encode(results))
    if html is not None:
        html.write_text(page(results))
    _show(results)


async def _until_sigterm(made: Coroutine[Any, Any, Results]) -> Results:
    """Being ended ends all that was started, too."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await made


def _show(results: Results) -> None:
    for scenario in results.scenarios:
        some = next(run for side in results.sides for run in side.of(scenario))
        show(f"{scenario}: {some.settings.about}", standings(results, scenario))
        if isinstance(some.settings.arrivals, Closed):
            show("Ours, as a multiple", cross(results, scenario))
    for side in results.sides:
        sys.stdout.write(f"{side.name} {side.version}: {side.about}{f'; {side.fault}' if side.fault else ''}\n")
    sys.stdout.write(f"{next(run.machine for side in results.sides for run in side.runs)}\n")


def _chosen(only: str | None) -> tuple[Peer, ...]:
    if only is None:
        return ALL
    known = {peer.name: peer for peer in ALL}
    names = [name.strip() for name in only.split(",")]
    for name in names:
        if name not in known:
            fail(2, f"there is no peer {name!r}; there are {', '.join(known)}")
    return tuple(known[name] for name in names)
