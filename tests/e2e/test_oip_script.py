"""One program of stock clients, unedited, against a real Triton and the gateway: it must not see a difference."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from runtimes.artifact import Artifact, Shelf, locate
from runtimes.environment import Environments
from runtimes.triton_command import MODEL, SHARED_MEMORY, command, memory_prefix, served
from tests import tiny
from tests.conftest import LISTEN
from tests.e2e import oip_script
from tests.e2e.servers import ENGINE_START_S_MAX, NO_TLS, GatewayProcess, processes_of

pytestmark = pytest.mark.engine

KINDS = ("onnx", "triton")
MODELS = LISTEN + "".join(
    f'[[models]]\nname = "{kind}"\nreplicas = [{{ kind = "{kind}", artifact = "tiny@stable" }}]\n' for kind in KINDS
)
SCRIPT_S_MAX = 120
DRIFT_MAX = 1e-5


@pytest.fixture(scope="module")
def gateway(engine_state: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    gateway = GatewayProcess(tmp_path_factory.mktemp("h"), MODELS)
    gateway.state.mkdir(mode=0o700)
    (gateway.state / "engines").symlink_to(engine_state / "engines")
    tiny.publish(Shelf(gateway.state / "shelf"), tmp_path_factory.mktemp("tiny"))
    gateway.start(start_s_max=ENGINE_START_S_MAX)
    yield gateway
    assert gateway.stop() == 0, gateway.text


@pytest.fixture(scope="module")
def by_triton(
    engine_state: Path, gateway: GatewayProcess, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Any]]:
    """What the script says of a Triton, which serves the gateway's model repository on addresses of its own."""
    folder = tmp_path_factory.mktemp("t")
    environments = Environments(engine_state)
    artifact = locate("tiny@stable", Shelf(gateway.state / "shelf"))
    assert isinstance(artifact, Artifact)
    what = command(
        served(artifact, threads=1, batch_max=None), environments.folder(environments.find("triton")), folder
    )
    what.fill(folder)
    http, rpc = free_port(), free_port()
    options = {
        "--allow-http": "true",
        "--http-address": "127.0.0.1",
        "--http-port": str(http),
        "--grpc-address": "127.0.0.1",
        "--grpc-port": str(rpc),
    }
    argv = [it for it in what.argv if it.partition("=")[0] not in options]
    argv += [f"{name}={value}" for name, value in options.items()]
    with (
        (folder / "log").open("w") as log,
        subprocess.Popen(
            argv, env=what.env, cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        ) as server,
    ):
        try:
            until_ready(f"http://127.0.0.1:{http}/v2/health/ready", server)
            yield report(f"127.0.0.1:{http}", f"127.0.0.1:{rpc}", MODEL)
        except BaseException:
            print((folder / "log").read_text())
            raise
        finally:
            server.terminate()
            try:
                server.wait(30)
            finally:
                for pid in processes_of({server.pid}):
                    os.kill(pid, signal.SIGKILL)
                for left in SHARED_MEMORY.glob(f"{memory_prefix(folder)}*"):
                    left.unlink()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def until_ready(url: str, server: subprocess.Popen[bytes]) -> None:
    give_up_s = time.monotonic() + ENGINE_START_S_MAX
    with httpx.Client(trust_env=False, verify=NO_TLS) as client:
        while True:
            assert server.poll() is None, "Triton has ended"
            assert time.monotonic() < give_up_s, "Triton does not become ready"
            try:
                if client.get(url).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.1)


def report(http: str, rpc: str, model: str, *headers: str) -> dict[str, Any]:
    """What the script prints."""
    done = subprocess.run(
        [sys.executable, oip_script.__file__, http, rpc, model, *headers],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SCRIPT_S_MAX,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def alike(here: Any, there: Any) -> bool:
    if isinstance(here, float) and isinstance(there, float):
        return math.isclose(here, there, rel_tol=0, abs_tol=DRIFT_MAX)
    if isinstance(here, list) and isinstance(there, list):
        return len(here) == len(there) and all(map(alike, here, there))
    if isinstance(here, dict) and isinstance(there, dict):
        return here.keys() == there.keys() and all(alike(here[name], there[name]) for name in here)
    return bool(here == there)


@pytest.mark.parametrize("kind", KINDS)
def test_a_program_does_not_see_that_it_talks_to_the_gateway(
    kind: str, gateway: GatewayProcess, by_triton: dict[str, Any]
) -> None:
    key = gateway.issue()
    by_headrace = report(gateway.address, gateway.grpc, kind, f"authorization:Bearer {key.text}")
    assert by_headrace.keys() == by_triton.keys()
    differing = {
        step: (found, by_headrace[step]) for step, found in by_triton.items() if not alike(by_headrace[step], found)
    }
    assert not differing


def test_what_the_program_sees_is_not_nothing(by_triton: dict[str, Any]) -> None:
    """Two servers that refuse everything would be alike too."""
    assert by_triton["health"] == [1, 1]
    refused = {step for step, found in by_triton.items() if isinstance(found, dict) and "fault" in found}
    wrong = {"no_such_model", "no_such_version", "no_such_output", "no_such_input", "no_metadata"}
    wrong |= {"missing", "ragged", "wrong_shape", "wrong_datatype"}
    assert {step.split(": ")[1] for step in refused} == wrong
    assert by_triton["grpc: late"][0] == "StatusCode.DEADLINE_EXCEEDED"
    assert by_triton["http: late"][0] == "late"
    assert by_triton["grpc: cancelled"][0] == "StatusCode.CANCELLED"
    assert by_triton["grpc.aio: cancelled"][0] == "CancelledError"
    for form in oip_script.FORMS:
        assert by_triton[f"{form}: infer"]["labels"] == ["refund", "login", "card", "refund", "refund"]
        assert by_triton[f"{form}: statistics"] == {"inferences": 6, "calls": 2}
