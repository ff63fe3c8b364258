"""The load harness's engine emulator as an upstream, in a process of its own that keeps the truth of what it made."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec

from loadtests.emulator import Emulator, Entry, Pace, serving
from tests.e2e.servers import REPOSITORY

STOP_S_MAX = 10.0


class Emulation:
    """See `emulating`."""

    def __init__(self, url: str, log: Path) -> None:
        self.url = url
        self.log = log

    @property
    def running(self) -> int:
        """Calls it is at now."""
        text = httpx.get(f"{self.url}/metrics", trust_env=False).text
        return sum(
            int(float(it)) for it in re.findall(r"^vllm:num_requests_running(?:{.*})? (\S+)$", text, re.MULTILINE)
        )

    def entries(self) -> list[Entry]:
        """What it has logged, which is what ended more than a moment ago."""
        lines = self.log.read_bytes()
        return ENTRIES.decode_lines(lines[: lines.rfind(b"\n") + 1])


ENTRIES = msgspec.json.Decoder(Entry)


@contextmanager
def emulating(folder: Path, *options: str) -> Iterator[Emulation]:
    """`headrace-load emulate` with these options, running while inside; afterwards its log is whole."""
    log = folder / "emulated.jsonl"
    with subprocess.Popen(
        [sys.executable, "-m", "loadtests", "emulate", "--listen", "127.0.0.1:0", "--log", log, *options],
        cwd=REPOSITORY,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        try:
            said = process.stderr.readline()
            assert said.startswith("emulating on "), said + process.stderr.read()
            yield Emulation(said.removeprefix("emulating on ").strip(), log)
        finally:
            process.terminate()
            try:
                process.communicate(timeout=STOP_S_MAX)
            except subprocess.TimeoutExpired:
                process.kill()
                raise


@contextmanager
def steady(pace: Pace, word: str) -> Iterator[str]:
    """The address of an emulator that meets no fault, whatever it is asked, and says another word than the others: a
    replica that can still answer. It runs in a thread."""
    started: Future[tuple[str, asyncio.AbstractEventLoop, asyncio.Event]] = Future()

    async def serve() -> None:
        stop = asyncio.Event()
        async with serving(Steady(pace, word), "127.0.0.1:0") as url:
            started.set_result((url, asyncio.get_running_loop(), stop))
            await stop.wait()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    url, loop, stop = started.result(STOP_S_MAX)
    try:
        yield url
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(STOP_S_MAX)


class Steady(Emulator):
    """See `steady`."""

    def __init__(self, pace: Pace, word: str) -> None:
        super().__init__(pace)
        self._word = word

    def _know(self, path: bytes, body: bytes, id_length: int) -> Any:
        if b'"emulate"' in body:
            body = msgspec.json.encode(msgspec.json.decode(body) | {"emulate": {"word": self._word}})
        return super()._know(path, body, id_length)
