"""Peers side by side: the same load on each in turn, in front of the same engine, on the same core, in one run.

The order turns over from one repetition to the next (A B C, C B A, …), so that what drifts on the machine meets all
alike; `direct` is the engine without any gateway, against which what they add is counted.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from loadtests.field import Cores, Entrant, field, pinned
from loadtests.install import Own, PeerFault
from loadtests.peer import Peer
from loadtests.process import NoProcess
from loadtests.report import Report, Results, Side
from loadtests.scenario import Scenario
from loadtests.standings import DIRECT
from loadtests.target import TargetFault
from loadtests.trial import trial

T = TypeVar("T")

EMULATOR = "the engine emulator, no gateway"


async def contest(
    scenarios: Mapping[str, Scenario],
    peers: Sequence[Peer],
    *,
    state: Path,
    repeat: int,
    say: Callable[[str], None],
) -> Results:
    """Every peer under every scenario. One that fails takes no further part, and the results say why."""
    cores = Cores.of(os.sched_getaffinity(0))
    runs: dict[str, list[Report]] = {name: [] for name in (DIRECT, *(peer.name for peer in peers))}
    faults: dict[str, str] = {}
    with pinned(cores.client):
        for alike in _by_needs(scenarios):
            scenario = next(iter(alike.values()))
            async with field(scenario, peers, state=state, cores=cores, faults=faults, say=say) as entrants:
                for name, number, entrant in turns(alike, entrants, repeat):
                    # Who failed once is out, so that trials stay paired with the others', repetition by repetition.
                    if entrant.name in faults or (number > 1 and entrant.slow):
                        continue
                    say(f"{name}, {number} of {repeat}: {entrant.name}")
                    try:
                        runs[entrant.name].append(await _trial(alike[name], name, entrant))
                    except (TargetFault, NoProcess) as fault:
                        faults[entrant.name] = str(fault)
    who = [(DIRECT, Own("headrace").version(), EMULATOR)]
    who += [(peer.name, _version(peer), peer.about) for peer in peers]
    return Results(
        sides=tuple(
            Side(name=name, version=version, about=about, fault=faults.get(name, ""), runs=tuple(runs[name]))
            for name, version, about in who
        )
    )


def _by_needs(scenarios: Mapping[str, Scenario]) -> Iterator[dict[str, Scenario]]:
    """Scenarios that need the same engine and the same peers, one after the other, share them: some take long to
    start."""

    def needs(item: tuple[str, Scenario]) -> tuple[object, ...]:
        scenario = item[1]
        return scenario.emulate, scenario.models, tuple(tenant.name for tenant in scenario.callers)

    for _, alike in itertools.groupby(scenarios.items(), key=needs):
        yield dict(alike)


def turns(names: Iterable[str], entrants: Sequence[T], repeat: int) -> Iterator[tuple[str, int, T]]:
    """Who is next, under which scenario, for the how manieth time."""
    for name in names:
        for number in range(1, repeat + 1):
            for entrant in entrants if number % 2 else reversed(entrants):
                yield name, number, entrant


async def _trial(scenario: Scenario, name: str, entrant: Entrant) -> Report:
    return await trial(scenario, name=name, target=entrant.target, access=entrant.access, pid=entrant.pid)


def _version(peer: Peer) -> str:
    try:
        return peer.package.version()
    except PeerFault:
        return "none"
