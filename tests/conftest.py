"""What tests share: one fast gateway, and one with the real engines. Each is started once, when first asked for."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtimes.artifact import Shelf
from tests import tiny
from tests.e2e.servers import ENGINE_START_S_MAX, REPOSITORY, GatewayProcess, Key, processes_of
from tests.e2e.upstream import KEY, MODEL, Upstream, upstream

LISTEN = """
[server]
listen = "127.0.0.1:0"
grpc = "127.0.0.1:0"
admin = "127.0.0.1:0"
"""

#: Weightless models and a provider that obeys; limits so low that tests reach them.
FAST = """
[server.bounds]
body_bytes_max = 65536
body_s_max = 3
header_s_max = 3

[[models]]
name = "echo"
replicas = [{{ kind = "echo" }}]
[[models]]
name = "slow"
replicas = [{{ kind = "echo", token_s = 0.05 }}]
[[models]]
name = "late"
replicas = [{{ kind = "echo", first_token_s = 60 }}]
[[models]]
name = "relay"
replicas = [{{ kind = "remote", url = "{url}", model = "{model}", key_env = "PROVIDER_KEY", idle_s_max = 1 }}]
[[models]]
name = "pair"
replicas = [{{ kind = "remote", url = "{broken_url}" }}, {{ kind = "remote", url = "{url}" }}]
[[models]]
name = "narrow"
waiting_max = 1
wait_s_max = 1
replicas = [{{ kind = "remote", url = "{url}", connections_max = 1, idle_s_max = 30 }}]
"""

ENGINES = """
[[models]]
name = "smollm2"
replicas = [{ kind = "vllm", artifact = "smollm2@stable" }]
[[models]]
name = "minilm"
replicas = [{ kind = "onnx", artifact = "minilm@stable" }]
[[models]]
name = "support-intent"
replicas = [{ kind = "onnx", artifact = "support-intent@stable" }]
"""

#: A server beside the others, because tests end it, and because starting it takes three seconds only.
TRITON = """
[[models]]
name = "tiny"
replicas = [{ kind = "triton", artifact = "tiny@stable" }]
"""

PREPARED = ("engines/vllm-*/.ready", "engines/triton-*/.ready", "shelf/smollm2", "shelf/minilm", "shelf/support-intent")


@pytest.fixture(scope="session")
def provider() -> Iterator[Upstream]:
    """The hostile server behind the model `relay`."""
    with upstream() as server:
        yield server


@pytest.fixture(scope="session")
def gateway(provider: Upstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    """A gateway with echo models and the hostile provider: no engine, up within a second."""
    models = FAST.format(url=provider.url, broken_url=provider.broken_url, model=MODEL)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PROVIDER_KEY", KEY)
        yield from _running(GatewayProcess(tmp_path_factory.mktemp("g"), LISTEN + models))


@pytest.fixture(scope="session")
def key(gateway: GatewayProcess) -> Key:
    """A key of a tenant without limits."""
    return gateway.issue()


@pytest.fixture(scope="session")
def engine_state() -> Path:
    """The state folder that `make test` prepares: engines installed, default models on the shelf."""
    state = Path(os.environ.get("HEADRACE_STATE") or REPOSITORY / ".headrace").absolute()
    missing = [pattern for pattern in PREPARED if not any(state.glob(pattern))]
    if missing:
        if platform.system() != "Linux" or platform.machine() not in ("x86_64", "aarch64"):
            pytest.skip("there are no engines for this platform")
        pytest.fail(f"{state} has no {', '.join(missing)}: `make test` prepares it")
    return state


@pytest.fixture(scope="session")
def engine_gateway(engine_state: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    """A gateway with the default models on their real engines. It takes half a minute to start: there is only one."""
    gateway = GatewayProcess(tmp_path_factory.mktemp("e"), LISTEN + ENGINES)
    gateway.state.mkdir(mode=0o700)
    for shared in ("engines", "shelf", "cache"):
        (engine_state / shared).mkdir(exist_ok=True)
        (gateway.state / shared).symlink_to(engine_state / shared)
    yield from _running(gateway, start_s_max=ENGINE_START_S_MAX)


@pytest.fixture(scope="session")
def triton_gateway(engine_state: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    """A gateway with a tiny classifier on a real Triton, which its two workers share."""
    gateway = GatewayProcess(tmp_path_factory.mktemp("t"), LISTEN + "workers = 2\n" + TRITON)
    gateway.state.mkdir(mode=0o700)
    (gateway.state / "engines").symlink_to(engine_state / "engines")
    tiny.publish(Shelf(gateway.state / "shelf"), tmp_path_factory.mktemp("tiny"))
    yield from _running(gateway, start_s_max=ENGINE_START_S_MAX)


@pytest.fixture(scope="session")
def engine_key(engine_gateway: GatewayProcess) -> Key:
    return engine_gateway.issue()


def _running(gateway: GatewayProcess, *, start_s_max: float = 30.0) -> Iterator[GatewayProcess]:
    gateway.start(start_s_max=start_s_max)
    yield gateway
    sessions = gateway.sessions()
    assert gateway.stop() == 0, gateway.text
    assert processes_of(sessions) == {}, "a stopped gateway left processes behind"
    shutil.rmtree(gateway.state)
