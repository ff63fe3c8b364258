"""What batching gains a small model, beside what is in it: `python -m tests.profile.batch ARTIFACT`.

ONNX Runtime is called in this process, by hand at batches of 1 and 8 from as many threads as the runtime has workers,
and through OnnxRuntime by 1, 8 and 32 callers with one text each, batching and one row at a time. All take turns, round
by round; figures are medians. The rest of the machine shows in those of the clock, less so in CPU time and ratios.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import statistics
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import uvloop

from runtimes.artifact import Artifact, Shelf, open_folder
from runtimes.contract import InferRequest, Site
from runtimes.onnx import Onnx, OnnxRuntime
from runtimes.session import Session

ROUNDS, ROUND_S = 7, 0.5
CALLERS = (1, 8, 32)
RAW_BATCH = 8
SHORT = (
    "where is my order",
    "my card was charged twice for one purchase",
    "I forgot my password and the reset mail never comes",
    "can I speak with a real person please",
    "please stop the order I placed ten minutes ago",
    "the app crashes each time I open it",
    "does the lamp come with a bulb",
    "I moved house, ship it to my new flat instead",
)
WORDS = 30
"""Of a text that is 32 tokens long with its two special ones."""


def main() -> None:
    artifact = open_folder(Path(sys.argv[1]))
    assert isinstance(artifact, Artifact)
    options: dict[str, Any] = json.loads(sys.argv[2]) if len(sys.argv) > 2 else {}
    long = [" ".join([word] * WORDS) for word in ("where", "is", "my", "order", "card", "was", "the", "it")]
    for name, texts in (("short texts", SHORT), (f"{WORDS + 2} tokens", long)):
        sides = asyncio.run(_measured(artifact, texts, options))
        print(f"{name:24}{'rows/s':>10}{'CPU us/row':>12}{'call ms':>10}")
        for what, side in sides.items():
            figures = [statistics.median(them) for them in (side.rows_per_s, side.cpu_us, side.call_ms)]
            print(f"{what:24}{figures[0]:10.0f}{figures[1]:12.0f}{figures[2]:10.2f}")
        ours, lone = sides[f"runtime, {CALLERS[-1]} callers"], sides[f"runtime, {CALLERS[0]} callers"]
        for other in (sides[f"raw, {RAW_BATCH} at once"], sides[f"serially, {CALLERS[-1]} callers"]):
            rate, cpu = _ratio(ours.rows_per_s, other.rows_per_s), _ratio(other.cpu_us, ours.cpu_us)
            which = next(it for it, side in sides.items() if side is other)
            print(f"{CALLERS[-1]} callers, of {which}: {rate:.2f} by the clock, {cpu:.2f} by CPU")
        added = statistics.median(
            our - raw for our, raw in zip(lone.call_ms, sides["raw, 1 at once"].call_ms, strict=True)
        )
        print(f"a lone call, beyond raw: {added:.2f} ms\n")


class Side(msgspec.Struct):
    """What was measured of one of them, round by round."""

    rows_per_s: list[float] = msgspec.field(default_factory=list)
    cpu_us: list[float] = msgspec.field(default_factory=list)
    """A row, all threads together."""
    call_ms: list[float] = msgspec.field(default_factory=list)
    """Median."""

    def add(self, took_s: Sequence[float], rows: int, wall_s: float, cpu_s: float) -> None:
        done = rows * len(took_s)
        self.rows_per_s.append(done / wall_s)
        self.cpu_us.append(1e6 * cpu_s / done)
        self.call_ms.append(1e3 * statistics.median(took_s))


async def _measured(artifact: Artifact, texts: Sequence[str], options: dict[str, Any]) -> dict[str, Side]:
    spec = Onnx(artifact=str(artifact.path), **options)
    serial = Onnx(artifact=str(artifact.path), **options | {"batch_max": 1, "batches": 1})
    session = Session(artifact, threads=spec.threads, provider="cpu")
    sides: dict[str, Side] = defaultdict(Side)
    with tempfile.TemporaryDirectory() as state:
        site = Site(model="it", replica="it-0", state=Path(state), shelf=Shelf(Path(state)))
        runtimes = {"runtime": spec.build(site), "serially": serial.build(site)}
        for runtime in runtimes.values():
            await runtime.open()
        for _ in range(ROUNDS):
            for rows, threads in ((1, 1), (RAW_BATCH, spec.workers)):
                _raw(sides[f"raw, {rows} at once"], session, texts, rows, threads)
            for callers, (name, runtime) in itertools.product(CALLERS, runtimes.items()):
                await _served(sides[f"{name}, {callers} callers"], runtime, texts, callers)
        for runtime in runtimes.values():
            await runtime.aclose()
    return sides


def _ratio(ours: list[float], theirs: list[float]) -> float:
    return statistics.median(our / their for our, their in zip(ours, theirs, strict=True))


def _raw(side: Side, session: Session, texts: Sequence[str], size: int, threads: int) -> None:
    """ONNX Runtime by hand, on texts that have been tokenized and padded beforehand."""
    rows = [content for content, _, _ in session.reading.rows({"text": np.array(texts, object)})]
    feeds = [session.reading.feed([rows[(at + it) % len(rows)] for it in range(size)]) for at in range(len(rows))]
    graph, names = session._graph, session._computed
    took: list[float] = []
    since_s, since_cpu_s = time.perf_counter(), time.process_time()

    def run() -> None:
        at = 0
        while (begun_s := time.perf_counter()) < since_s + ROUND_S:
            graph.run(names, feeds[at % len(feeds)])
            took.append(time.perf_counter() - begun_s)
            at += 1

    _in_threads(run, threads)
    side.add(took, size, time.perf_counter() - since_s, time.process_time() - since_cpu_s)


def _in_threads(run: Callable[[], None], count: int) -> None:
    threads = [threading.Thread(target=run) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


async def _served(side: Side, runtime: OnnxRuntime, texts: Sequence[str], callers: int) -> None:
    took: list[float] = []
    since_s, since_cpu_s = time.perf_counter(), time.process_time()

    async def call(at: int) -> None:
        while (begun_s := time.perf_counter()) < since_s + ROUND_S:
            text = np.array([texts[at % len(texts)]], object)
            await runtime.infer(InferRequest({"text": text}, math.inf))
            took.append(time.perf_counter() - begun_s)
            at += 1

    await asyncio.gather(*(call(at) for at in range(callers)))
    side.add(took, 1, time.perf_counter() - since_s, time.process_time() - since_cpu_s)


if __name__ == "__main__":
    uvloop.install()
    main()
