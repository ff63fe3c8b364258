"""Peers side by side: the same load on each in turn, in front of the same engine, on the same core, in one run.

The order turns over from one repetition to the next (A B C, C B A, …), so that what drifts on the machine meets all
alike; `direct` is the engine without any gateway, against which what they add is counted.
"""

from __future__ import annotations

import itertools
import os
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from pathlib import Path

import msgspec

from loadtests.child import ChildFault, running
from loadtests.install import Own, PeerFault, installed
from loadtests.peer import Peer, Site, bare_env
from loadtests.process import NoProcess
from loadtests.report import Report, Results, Side
from loadtests.scenario import Scenario
from loadtests.sink import sink
from loadtests.standings import DIRECT
from loadtests.target import Access, Target, TargetFault, parse
from loadtests.trial import trial

EMULATOR = "the engine emulator, no gateway"


class Cores(msgspec.Struct, frozen=True):
    """Who runs where: a peer has a core to itself, as far as there are enough."""

    peer: int
    engine: int
    client: int

    @classmethod
    def of(cls, usable: set[int]) -> Cores:
        first, *others = sorted(usable)
        return cls(peer=first, engine=others[-1] if others else first, client=others[0] if others else first)


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
    slow = {peer.name for peer in peers if peer.slow}
    with pinned(cores.client):
        # Scenarios that need the same field, one after the other, share it: some peers take long to start.
        for _, group in itertools.groupby(scenarios.items(), key=lambda it: _needs(it[1])):
            alike = dict(group)
            async with _field(
                next(iter(alike.values())), peers, state=state, cores=cores, faults=faults, say=say
            ) as field:
                for name, scenario in alike.items():
                    for number in range(repeat):
                        for entrant in field if number % 2 == 0 else reversed(field):
                            if entrant.name in faults or (number and entrant.name in slow):
                                continue  # its trials stay paired with the others', repetition by repetition
                            say(f"{name}, {number + 1} of {repeat}: {entrant.name}")
                            try:
                                runs[entrant.name].append(await _trial(scenario, name, entrant))
                            except (TargetFault, NoProcess) as fault:
                                faults[entrant.name] = str(fault)
    direct = Side(name=DIRECT, version=Own("headrace").version(), about=EMULATOR)
    sides = (direct, *(Side(name=peer.name, version=_version(peer), about=peer.about) for peer in peers))
    return Results(
        sides=tuple(
            msgspec.structs.replace(side, runs=tuple(runs[side.name]), fault=faults.get(side.name, ""))
            for side in sides
        )
    )


class _Entrant(msgspec.Struct, frozen=True):
    """A peer, running."""

    name: str
    target: Target
    access: Access
    pid: int


async def _trial(scenario: Scenario, name: str, entrant: _Entrant) -> Report:
    return await trial(scenario, name=name, target=entrant.target, access=entrant.access, pid=entrant.pid)


def _needs(scenario: Scenario) -> tuple[object, ...]:
    """Of the engine and the peers."""
    return scenario.emulate, scenario.models, tuple(tenant.name for tenant in scenario.callers)


def _version(peer: Peer) -> str:
    try:
        return peer.package.version()
    except PeerFault:
        return "none"


@asynccontextmanager
async def _field(
    scenario: Scenario,
    peers: Sequence[Peer],
    *,
    state: Path,
    cores: Cores,
    faults: dict[str, str],
    say: Callable[[str], None],
) -> AsyncIterator[list[_Entrant]]:
    """The engine and the peers, running; why one is not goes into `faults`. Raises ChildFault without an engine."""
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="headrace-load-")))
        spans = await stack.enter_async_context(sink())
        ports = _free_ports(1 + 2 * len(peers))
        port = next(ports)
        engine = (sys.executable, "-m", "loadtests", "emulate", "--listen", f"127.0.0.1:{port}", *scenario.emulate)
        upstream = f"http://127.0.0.1:{port}"
        pid = await stack.enter_async_context(
            running(DIRECT, engine, folder=folder, env=bare_env(), core=cores.engine, ready=f"{upstream}/health")
        )
        field = [_Entrant(DIRECT, parse(upstream), Access(), pid)]
        for peer in (it for it in peers if it.name not in faults):
            say(f"starting {peer.name}")
            own = folder / peer.name
            own.mkdir()
            try:
                site = Site(
                    home=installed(peer.package, state),
                    folder=own,
                    port=next(ports),
                    other_port=next(ports),
                    upstream=upstream,
                    spans=spans,
                    models=scenario.models,
                    tenants=tuple(it.name for it in scenario.callers),
                )
                start = peer.start(site)
                env = bare_env() | start.env
                url = f"http://127.0.0.1:{start.ready_port}{start.ready}"
                pid = await stack.enter_async_context(
                    running(peer.name, start.command, folder=own, env=env, core=cores.peer, ready=url)
                )
            except (PeerFault, ChildFault) as fault:
                say(f"{peer.name}: {fault}")
                faults[peer.name] = str(fault)
                continue
            access = Access(keys=start.keys, headers=start.headers)
            field.append(_Entrant(peer.name, parse(f"http://127.0.0.1:{site.port}"), access, pid))
        yield field


def _free_ports(count: int) -> Iterator[int]:
    """Nobody's at this moment, all different."""
    with ExitStack() as stack:
        held = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return iter([it.getsockname()[1] for it in held])


@contextmanager
def pinned(core: int) -> Iterator[None]:
    """This process stays on one core while inside."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
