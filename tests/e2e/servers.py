"""The gateway as its users run it: the command, a configuration file, a state folder; real processes, real sockets."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import re
import signal
import ssl
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx

REPOSITORY = Path(__file__).parents[2]
START_S_MAX = 30.0
"""From start to the line that names the addresses."""
ENGINE_START_S_MAX = 240.0
STOP_S_MAX = 60.0

#: Everything here is on loopback; a default context would read all of the system's authorities for each client.
NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)

_ADDRESSES = re.compile(r"http://([\w.:\[\]-]+)/v1 and grpc://([\w.:\[\]-]+).*admin on http://([\w.:\[\]-]+)")


class GatewayProcess:
    """One gateway in a folder of its own. `start` and `stop` may be called again and again, on the same state."""

    def __init__(self, folder: Path, config: str, *, module: str = "gateway") -> None:
        """`module` is what is run: the gateway, or one that a test has broken on purpose."""
        self.module = module
        self.state = folder / "s"
        self.config = folder / "headrace.toml"
        self.config.write_text(f'[state]\npath = "{self.state}"\n{config}')
        self.address = ""
        self.grpc = ""
        self.admin = ""
        self.log: list[str] = []
        """What it said on stderr, over all its starts."""
        self._said = threading.Condition()
        self._process: subprocess.Popen[str] | None = None
        self._reader: threading.Thread | None = None
        self._serial = itertools.count(1)

    @property
    def url(self) -> str:
        return f"http://{self.address}/v1"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def workers(self) -> list[int]:
        """The processes that serve, where there are several."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text()
        return [int(pid) for pid in children.split()]

    @property
    def runs(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def host(self) -> tuple[str, int]:
        name, _, port = self.address.rpartition(":")
        return name, int(port)

    @property
    def text(self) -> str:
        with self._said:
            return "".join(self.log)

    # -- its life

    def start(self, until: str = "ready in", *options: str, start_s_max: float = START_S_MAX) -> GatewayProcess:
        """Return once it has logged `until`: by default, that every model can answer."""
        begin = len(self.log)
        self._process = subprocess.Popen(
            [sys.executable, "-m", self.module, "serve", "--config", str(self.config), *options],
            cwd=REPOSITORY,
            env=_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        try:
            line = self.wait_for(until, start_s_max=start_s_max, begin=begin)
        except BaseException:
            self.kill()
            raise
        found = _ADDRESSES.search(line)
        assert found, f"the gateway's line {line!r} names no addresses"
        self.address, self.grpc, self.admin = found.groups()
        return self

    def wait_for(self, text: str, *, start_s_max: float = START_S_MAX, begin: int = 0) -> str:
        """The first line from `begin` on with `text` in it. Fails if the gateway ends, or takes too long."""

        def line() -> str | None:
            return next((line for line in self.log[begin:] if text in line), None)

        with self._said:
            self._said.wait_for(lambda: line() or self._ended(), timeout=start_s_max)
            found = line()
        assert found, f"the gateway did not say {text!r} within {start_s_max} s:\n{self.text}"
        return found

    def stop(self) -> int:
        """SIGTERM, and its exit status."""
        self.terminate()
        return self.wait()

    def terminate(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL: no drain, no clean-up."""
        assert self._process is not None
        self._process.kill()
        self.wait()

    def wait(self) -> int:
        assert self._process is not None and self._reader is not None
        try:
            status = self._process.wait(STOP_S_MAX)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise AssertionError(f"the gateway did not end within {STOP_S_MAX} s:\n{self.text}") from None
        self._reader.join()
        return status

    def sessions(self) -> set[int]:
        """The process sessions that are its own: the gateway's, and one for each engine it has running."""
        found = {self.pid}
        for file in (self.state / "run").glob("*.pid"):
            if text := file.read_text().strip():
                found.add(json.loads(text)["pid"])
        return found

    def _ended(self) -> bool:
        return self._reader is not None and not self._reader.is_alive()

    def _read(self) -> None:
        assert self._process is not None and self._process.stderr is not None
        with self._process.stderr as lines:
            for line in lines:
                with self._said:
                    self.log.append(line)
                    self._said.notify_all()
        with self._said:
            self._said.notify_all()

    # -- its commands and its admin API

    def command(self, *arguments: str) -> Any:
        """What `headrace ARGUMENTS --json` prints."""
        done = headrace(*arguments, "--config", str(self.config), "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def issue(
        self, *, limits: dict[str, int] | None = None, key_limits: dict[str, int] | None = None, **scopes: Any
    ) -> Key:
        """A fresh tenant with one key that the gateway already knows."""
        name = f"tenant-{os.getpid()}-{next(self._serial)}"
        with self.admin_client() as admin:
            _ok(admin.post("/tenants", json={"name": name, "limits": limits or {}}))
            made = _ok(admin.post("/keys", json={"tenant": name, "limits": key_limits or {}, **scopes}))
        key = Key(tenant=name, id=made["id"], text=made["key"])
        self.until_known(key.text)
        return key

    def until_known(self, key: str) -> None:
        """What the admin API adds, the process that serves it knows at once; others look at the store."""
        give_up_s = time.monotonic() + 10
        with self.admin_client() as admin:
            several = "headrace_workers_up" in admin.get("/metrics").text
        if several:
            self.until_looked()
        headers = {"authorization": f"Bearer {key}"}
        with httpx.Client(headers=headers, trust_env=False, verify=NO_TLS) as client:
            while client.get(f"{self.url}/models").status_code == 401:
                assert time.monotonic() < give_up_s, "the gateway does not take the new key"
                time.sleep(0.05)

    def until_looked(self) -> None:
        """Until each of its processes has looked at the store for what a command wrote; each does every half second."""
        asked_s, give_up_s = time.monotonic(), time.monotonic() + 10
        with self.admin_client() as admin:
            while True:
                text = admin.get("/metrics").text
                found = re.search(r"^headrace_tenants_age_seconds (\S+)", text, re.MULTILINE)
                # A look that was under way when it was written may have come too early.
                if found and float(found[1]) < time.monotonic() - asked_s - 0.1:
                    return
                assert time.monotonic() < give_up_s, "a process does not look at the store"
                time.sleep(0.05)

    def admin_client(self) -> httpx.Client:
        headers = {"authorization": f"Bearer {(self.state / 'admin.token').read_text().strip()}"}
        return httpx.Client(
            base_url=f"http://{self.admin}", headers=headers, trust_env=False, verify=NO_TLS, timeout=20
        )

    def client(self, key: str | None = None) -> httpx.AsyncClient:
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        address = f"http://{self.address}"
        return httpx.AsyncClient(base_url=address, headers=headers, trust_env=False, verify=NO_TLS, timeout=120)

    def records(self, tenant: str) -> dict[str, Any]:
        """Every call's record by its id, as `headrace usage` has it. Fails if a call has two."""
        rows = self.command("usage", "--tenant", tenant, "--records", "--limit", "100000")
        found = {row["id"]: row for row in rows}
        assert len(found) == len(rows), "a call has more than one record"
        return found

    async def record(self, key: Key, id: str | None = None) -> Any:
        """The record of one call, or the only one of the key, once it has reached the store."""
        with self.admin_client() as admin:
            async with asyncio.timeout(10):
                while True:
                    rows = _ok(admin.get("/usage/records", params={"key": key.id, "limit": 1000}))
                    found = [row for row in rows if id in (None, row["id"])]
                    if found:
                        assert len(found) == 1, "a call has more than one record"
                        return found[0]
                    await asyncio.sleep(0.05)

    async def running(self, model: str) -> int:
        """Calls that hold a place of this model now."""
        with self.admin_client() as admin:
            return int(next(it["queue"]["running"] for it in _ok(admin.get("/models")) if it["name"] == model))


class Key:
    """A key, its id and whose it is."""

    def __init__(self, *, tenant: str, id: str, text: str) -> None:
        self.tenant = tenant
        self.id = id
        self.text = text


def headrace(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The `headrace` command."""
    return subprocess.run(
        [sys.executable, "-m", "gateway", *arguments],
        cwd=REPOSITORY,
        env=_environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def processes_of(sessions: set[int]) -> dict[int, int]:
    """Live processes of these sessions: number → session. See proc_pid_stat(5)."""
    found = {}
    for folder in Path("/proc").iterdir():
        try:
            text = (folder / "stat").read_text() if folder.name.isdecimal() else ""
        except (FileNotFoundError, ProcessLookupError):
            continue
        _, _, rest = text.rpartition(") ")
        if rest and rest[0] not in "ZX" and int(rest.split()[3]) in sessions:
            found[int(folder.name)] = int(rest.split()[3])
    return found


def _environment() -> dict[str, str]:
    """Ours without the state folder, which would be every gateway's."""
    return {name: value for name, value in os.environ.items() if name != "HEADRACE_STATE"}


def _ok(answer: httpx.Response) -> Any:
    assert answer.is_success, answer.text
    return answer.json()
