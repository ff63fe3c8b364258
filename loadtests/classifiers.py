"""What serving takes from a text classifier: the same artifact behind each door, beside its bare runtime and beside
Triton, in turn and in one run.

All may use every core, as on a machine of their own, but the client, which keeps to one. Only who is loaded works: a
server without calls waits.
"""

from __future__ import annotations

import asyncio
import math
import os
import re
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import httpx
import msgspec
from msgspec.structs import asdict, replace

from loadtests.child import ChildFault, running
from loadtests.client import Answer
from loadtests.contest import turns
from loadtests.field import Cores, free_ports, pinned
from loadtests.install import Own
from loadtests.peer import FAR_LIMITS, bare_env, issued
from loadtests.raw import Done
from loadtests.report import Batches, Cost, Report, Results, Side, machine
from loadtests.scenario import TENANT, Scenario
from loadtests.tally import Tally
from loadtests.target import Access, Target, parse
from loadtests.trial import trial

LAPS = 4
"""By all doors, of one repetition."""
BATCH_ROWS = 8
CONFIG = """
[server]
listen = "127.0.0.1:{port}"
grpc = "127.0.0.1:{grpc_port}"
admin = "127.0.0.1:{admin_port}"
[state]
path = "{state}"
[[models]]
name = "onnx"
replicas = [{{ kind = "onnx", artifact = "{artifact}", batches = 1, batch_max = {rows} }}]
[[models]]
name = "onnx-one"
replicas = [{{ kind = "onnx", artifact = "{artifact}", batches = 1, batch_max = 1 }}]
[[models]]
name = "triton"
replicas = [{{ kind = "triton", artifact = "{artifact}", batch_max = {rows} }}]
"""
SOCKET = "run/triton-0/grpc:1"
"""Of the Triton that the gateway looks after, below the state folder."""


class Door(msgspec.Struct, frozen=True):
    """A way to the classifier, and what its calls name it."""

    name: str
    about: str
    target: Target
    model: str
    access: Access = Access()
    metrics: str = ""
    """Where the server tells how it made batches, if it does."""


class Raw(msgspec.Struct, frozen=True):
    """No way at all."""

    name: str
    about: str
    rows: int


async def classifiers(
    scenario: Scenario, *, name: str, artifact: Path, state: Path, repeat: int, say: Callable[[str], None]
) -> Results:
    """Every door with each number of callers. Raises ChildFault or PeerFault if the gateway does not start.

    Each repetition has servers of its own: where a process finds its memory makes it a few hundredths faster or slower
    for as long as it lives, Triton's as ours. It goes by the doors several times, so that what is compared was
    measured close together.
    """
    steps = scenario.steps(name)
    runs: dict[str, list[Report]] = {}
    cores = Cores.of(os.sched_getaffinity(0))
    for number in range(1, repeat + 1):
        async with doors(artifact, state=state) as ways:
            with pinned(cores.client):
                for step, lap, way in turns(steps, ways, LAPS):
                    say(f"{step}, {number} of {repeat}, lap {lap} of {LAPS}: {way.name}")
                    plan = steps[step]
                    measuring = _raw(way, plan, step, artifact) if isinstance(way, Raw) else _through(way, plan, step)
                    runs.setdefault(way.name, []).append(await measuring)
    version = Own("headrace").version()
    return Results(sides=tuple(Side(it.name, version, it.about, runs=tuple(runs[it.name])) for it in ways))


@asynccontextmanager
async def doors(artifact: Path, *, state: Path) -> AsyncIterator[tuple[Raw | Door, ...]]:
    """All of them, open."""
    with tempfile.TemporaryDirectory(prefix="headrace-load-") as made:
        folder = Path(made)
        port, grpc_port, admin_port = free_ports(3)
        own = folder / "state"
        own.mkdir()
        (own / "engines").symlink_to(state / "engines")
        config = folder / "headrace.toml"
        config.write_text(
            CONFIG.format(
                port=port, grpc_port=grpc_port, admin_port=admin_port, state=own, artifact=artifact, rows=BATCH_ROWS
            )
        )
        command = str(Path(sys.executable).with_name("headrace"))
        access = Access(keys={TENANT: issued(command, TENANT, FAR_LIMITS, config)})
        ready, metrics = (f"http://127.0.0.1:{admin_port}/{it}" for it in ("readyz", "metrics"))
        http, grpc = parse(f"http://127.0.0.1:{port}"), parse(f"grpc://127.0.0.1:{grpc_port}")
        serve = (command, "serve", "--config", str(config))
        async with running("headrace", serve, folder=folder, env=bare_env(), core=None, ready=ready):
            yield (
                Raw("raw batch 8", "ONNX Runtime in a loop, 8 rows at a time", BATCH_ROWS),
                Raw("raw batch 1", "ONNX Runtime in a loop, a row at a time", 1),
                Door(
                    "headrace HTTP",
                    "POST /v1/classify; ONNX Runtime in the gateway's process",
                    http,
                    "onnx",
                    access,
                    metrics,
                ),
                Door("headrace gRPC", "ModelInfer; the same", grpc, "onnx", access, metrics),
                Door("headrace unbatched", "POST /v1/classify, a row at a time", http, "onnx-one", access, metrics),
                Door("triton gRPC", "ModelInfer at Triton's own socket", parse(f"grpc+unix:{own / SOCKET}"), "model"),
                Door("headrace to triton", "ModelInfer through the gateway to that Triton", grpc, "triton", access),
            )


async def _through(way: Door, plan: Scenario, step: str) -> Report:
    before = await _batches(way)
    made = await trial(replace(plan, model=way.model), name=step, target=way.target, access=way.access, pid=None)
    after = await _batches(way)
    rows, queue_s = (
        tuple(_shares({le: after[name][le] - before[name].get(le, 0) for le in after[name]})) for name in HISTOGRAMS
    )
    return replace(made, batches=Batches(rows, queue_s)) if rows else made


async def _batches(way: Door) -> dict[str, dict[float, float]]:
    """The model's histograms so far, by what Prometheus calls them: how many were at most so much."""
    found: dict[str, dict[float, float]] = {name: {} for name in HISTOGRAMS}
    if way.metrics:
        async with httpx.AsyncClient(trust_env=False) as client:
            text = (await client.get(way.metrics)).text
        for name, labels, count in re.findall(r"^(\w+)_bucket\{(.*)\} (\S+)$", text, re.MULTILINE):
            of = dict(re.findall(r'(\w+)="([^"]*)"', labels))
            if name in found and of["model"] == way.model:
                found[name][float(of["le"])] = float(count)
    return found


HISTOGRAMS = ("headrace_batch_rows", "headrace_batch_queue_seconds")


def _shares(counts: Mapping[float, float]) -> Iterator[tuple[float, float]]:
    most = max(counts.values(), default=0)
    return ((le, count / most) for le, count in sorted(counts.items()) if most and math.isfinite(le))


async def _raw(way: Raw, plan: Scenario, step: str, artifact: Path) -> Report:
    """As if each row had been a call."""
    with tempfile.NamedTemporaryFile(suffix=".json") as texts:
        texts.write(msgspec.json.encode(plan.texts))
        texts.flush()
        options = ("--texts", texts.name, "--rows", str(way.rows), "--duration-s", str(plan.duration_s))
        child = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "loadtests.raw", str(artifact), *options, "--warmup-s", str(plan.warmup_s)),
            stdout=asyncio.subprocess.PIPE,
            preexec_fn=partial(os.sched_setaffinity, 0, range(os.cpu_count() or 1)),
        )
        try:
            out, _ = await child.communicate()
        finally:
            if child.returncode is None:
                child.kill()
                await child.wait()
    if child.returncode:
        raise ChildFault(f"{way.name} ended with status {child.returncode}; its words are above")
    done = msgspec.json.decode(out, type=Done)
    tally, now_s = Tally(None), done.start_s
    for batch_s in done.batch_s:
        now_s += batch_s
        answer = Answer(tally.gaps_s)
        answer.status, answer.complete, answer.end_s = 200, True, now_s
        for _ in range(way.rows):
            tally.count(answer, since_s=now_s - batch_s, start_s=done.start_s)
    elapsed_s = now_s - done.start_s
    return Report(
        **asdict(tally.service(elapsed_s)),
        scenario=step,
        settings=plan,
        target="in its process",
        at=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=machine(),
        load_average=os.getloadavg()[0],
        elapsed_s=elapsed_s,
        client_cores=0.0,
        tenants={},
        cost=Cost(
            cpu_us_per_call=done.cpu_s * 1e6 / done.rows,
            cpu_us_per_chunk=None,
            cores=done.cpu_s / elapsed_s,
            rss_bytes_max=0,
        ),
    )
