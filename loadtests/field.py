"""Where peers meet: an emulated engine and all of them in front of it, running, each on the core it is to have."""

from __future__ import annotations

import os
import random
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path

import msgspec

from loadtests.child import ChildFault, running
from loadtests.install import PeerFault, installed
from loadtests.peer import Peer, Site, bare_env
from loadtests.scenario import Scenario
from loadtests.sink import sink
from loadtests.standings import DIRECT
from loadtests.target import Access, Target, parse


class Cores(msgspec.Struct, frozen=True):
    """Who runs where: a peer has a core to itself, as far as there are enough."""

    peer: int
    engine: int
    client: int

    @classmethod
    def of(cls, usable: set[int]) -> Cores:
        first, *others = sorted(usable)
        return cls(peer=first, engine=others[-1] if others else first, client=others[0] if others else first)


class Entrant(msgspec.Struct, frozen=True):
    """A peer, running, or the engine itself."""

    name: str
    target: Target
    access: Access
    pid: int
    slow: bool = False


@asynccontextmanager
async def field(
    scenario: Scenario,
    peers: Sequence[Peer],
    *,
    state: Path,
    cores: Cores,
    faults: dict[str, str],
    say: Callable[[str], None],
) -> AsyncIterator[list[Entrant]]:
    """The engine and the peers, running; why one is not goes into `faults`. Raises ChildFault without an engine."""
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="headrace-load-")))
        spans = await stack.enter_async_context(sink())
        ports = free_ports(1 + 3 * len(peers))
        port = next(ports)
        engine = (sys.executable, "-m", "loadtests", "emulate", "--listen", f"127.0.0.1:{port}", *scenario.emulate)
        upstream = f"http://127.0.0.1:{port}"
        pid = await stack.enter_async_context(
            running(DIRECT, engine, folder=folder, env=bare_env(), core=cores.engine, ready=f"{upstream}/health")
        )
        entrants = [Entrant(DIRECT, parse(upstream), Access(), pid)]
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
                    third_port=next(ports),
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
            target = parse(f"http://127.0.0.1:{site.port}")
            entrants.append(Entrant(peer.name, target, access, pid, slow=peer.slow))
        yield entrants


def free_ports(count: int) -> Iterator[int]:
    """Nobody's at this moment, all different; and none that the system gives to whoever connects, which under load
    would soon be taken."""
    least = int(PORTS.read_text().split()[0])
    with ExitStack() as stack:
        found: list[int] = []
        for port in random.sample(range(least // 2, least), least // 2):
            if len(found) == count:
                break
            with suppress(OSError):
                stack.enter_context(socket.create_server(("127.0.0.1", port)))
                found.append(port)
        return iter(found)


PORTS = Path("/proc/sys/net/ipv4/ip_local_port_range")


@contextmanager
def pinned(core: int) -> Iterator[None]:
    """This process stays on one core while inside."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
