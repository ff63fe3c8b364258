"""The peers: gateways measured side by side, each as its public package has it, started as its own manual says.

Each is set up to do nothing but pass calls on, which is the least it can cost; what Headrace does beside that is
in its two entries.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from loadtests.install import Npm, Own, Package, PeerFault, Program, Venv, node

PEERS = Path(__file__).parent / "peers"


class Site(msgspec.Struct, frozen=True):
    """Where a peer is to run, and in front of what."""

    home: Path | None
    """What its package installed, if that is in a folder."""
    folder: Path
    """Its own, and empty."""
    port: int
    """On loopback, for calls."""
    other_port: int
    third_port: int
    """On loopback, for whatever else it serves."""
    upstream: str
    """http://host:port of the engine, /v1 not included."""
    spans: str
    """Takes OTLP over HTTP."""
    models: tuple[str, ...]
    """The names calls use, all for that one engine."""
    tenants: tuple[str, ...]


class Start(msgspec.Struct, frozen=True):
    """A peer ready to be started: what was to be written is written."""

    command: tuple[str, ...]
    ready: str
    """The path that answers 200 once calls are taken."""
    ready_port: int
    env: dict[str, str] = {}
    keys: dict[str, str] = {}
    """By tenant; a tenant that is not in it calls without one."""
    headers: dict[str, str] = {}
    """Of every call."""


class Peer(msgspec.Struct, frozen=True):
    """A gateway that can be measured."""

    name: str
    about: str
    """What it was told to do, and what it does not do."""
    package: Package
    start: Callable[[Site], Start]
    slow: bool = False
    """So far from the others that one trial says as much as several, and takes longer."""


def _nginx(site: Site) -> Start:
    config = site.folder / "nginx.conf"
    config.write_text(NGINX.format(port=site.port, upstream=site.upstream.removeprefix("http://")))
    # -e: else it first tries the log it was built to write, which is root's.
    command = ("nginx", "-p", str(site.folder), "-e", "error.log", "-c", str(config))
    return Start(command=command, ready="/v1/models", ready_port=site.port)


NGINX = """
daemon off;
worker_processes 1;
pid nginx.pid;
events {{ worker_connections 8192; }}
http {{
    access_log off;
    client_body_temp_path body; proxy_temp_path proxy; fastcgi_temp_path fastcgi; uwsgi_temp_path uwsgi;
    scgi_temp_path scgi;
    client_max_body_size 10m;
    keepalive_requests 100000000;
    upstream engine {{ server {upstream}; keepalive 1024; keepalive_requests 100000000; }}
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        location / {{
            proxy_pass http://engine;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_buffering off;
            proxy_read_timeout 600s;
        }}
    }}
}}
"""


def _sglang(site: Site) -> Start:
    command = (
        *(str(_home(site) / "bin/smg"), "launch", "--host", "127.0.0.1", "--port", str(site.port)),
        *("--worker-urls", site.upstream, "--policy", "round_robin", "--log-level", "warn"),
        *("--prometheus-host", "127.0.0.1", "--prometheus-port", str(site.other_port)),
    )
    return Start(command=command, ready="/readiness", ready_port=site.port)


def _litellm(site: Site) -> Start:
    config, key = site.folder / "litellm.json", "sk-a-key-of-nobody-for-loading-0123456789"
    engine = {"api_base": f"{site.upstream}/v1", "api_key": "none"}
    models = [{"model_name": it, "litellm_params": engine | {"model": f"openai/{it}"}} for it in site.models]
    config.write_bytes(msgspec.json.encode({"model_list": models, "general_settings": {"master_key": key}}))
    command = (
        *(str(_home(site) / "bin/litellm"), "--config", str(config), "--host", "127.0.0.1", "--port", str(site.port)),
        *("--num_workers", "1", "--telemetry", "False"),
    )
    # Production mode and few logs, as its manual advises; prices from the package and not from the network. It ends a
    # stream that says the same word a hundred times over, which the emulator does.
    env = {"LITELLM_MODE": "PRODUCTION", "LITELLM_LOG": "ERROR", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    env["REPEATED_STREAMING_CHUNK_LIMIT"] = "1000000000"
    keys = dict.fromkeys(site.tenants, key)
    return Start(command=command, ready="/health/readiness", ready_port=site.port, env=env, keys=keys)


def _portkey(site: Site) -> Start:
    server = _home(site) / "node_modules/@portkey-ai/gateway/build/start-server.js"
    command = (
        *(str(node()), "--require", str(PEERS / "loopback.cjs"), str(server), f"--port={site.port}", "--headless"),
    )
    headers = {"x-portkey-provider": "openai", "x-portkey-custom-host": f"{site.upstream}/v1"}
    keys = dict.fromkeys(site.tenants, "none")
    env = {"NODE_ENV": "production"}
    return Start(command=command, ready="/", ready_port=site.port, env=env, keys=keys, headers=headers)


def _headrace(*, limits: Sequence[str], trace: str) -> Callable[[Site], Start]:
    def start(site: Site) -> Start:
        command = str(Path(sys.executable).with_name("headrace"))
        config, state = site.folder / "headrace.toml", site.folder / "state"
        server = HEADRACE.format(port=site.port, other_port=site.other_port, third_port=site.third_port, state=state)
        models = (HEADRACE_MODEL.format(model=model, upstream=site.upstream) for model in site.models)
        config.write_text(server + "".join(models) + trace.format(spans=site.spans))
        keys = {tenant: issued(command, tenant, limits, config) for tenant in site.tenants}
        serve = (command, "serve", "--config", str(config))
        return Start(command=serve, ready="/readyz", ready_port=site.other_port, keys=keys)

    return start


def issued(command: str, tenant: str, limits: Sequence[str], config: Path) -> str:
    """The key of a new tenant. Raises PeerFault."""
    file = config.with_name(f"{tenant}.key")
    _run(command, "tenant", "add", tenant, *limits, "--config", str(config))
    _run(command, "key", "add", "--tenant", tenant, "--save", str(file), "--config", str(config))
    return file.read_text().strip()


HEADRACE = """
[server]
listen = "127.0.0.1:{port}"
grpc = "127.0.0.1:{third_port}"
admin = "127.0.0.1:{other_port}"
[state]
path = "{state}"
"""
HEADRACE_MODEL = """
[[models]]
name = "{model}"
waiting_max = 100000
[[models.replicas]]
kind = "remote"
url = "{upstream}/v1"
connections_max = 2048
"""
TRACED = """
[trace]
otlp = "{spans}"
sample = 0.01
"""
FAR_LIMITS = ("--rpm", "100000000", "--tpm", "2000000000", "--concurrent", "100000")


def _home(site: Site) -> Path:
    assert site.home is not None
    return site.home


def _run(*command: str) -> None:
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=bare_env())  # noqa: S603 - our own
    if done.returncode:
        raise PeerFault(f"`{Path(command[0]).name} {' '.join(command[1:3])}` failed: {done.stderr.strip()}")


def bare_env() -> dict[str, str]:
    """All of the environment that a peer gets: other people's code has no business with the rest."""
    return {"PATH": os.environ["PATH"], "LANG": "C.UTF-8"}


ALL = (
    Peer(
        name="nginx",
        about="reverse proxy, kept-alive connections, no buffering, no access log; the floor: it reads no body",
        package=Program("nginx", hint="install it, e.g. Debian's nginx-light"),
        start=_nginx,
    ),
    Peer(
        name="sglang",
        about="SGLang model gateway, Rust: one worker, round robin, metrics on; no keys, no limits, no accounts",
        package=Venv("sglang-router", lock=PEERS / "sglang.txt"),
        start=_sglang,
    ),
    Peer(
        name="litellm",
        about="LiteLLM proxy: one worker process, a master key, no database; no limits, no accounts",
        package=Venv("litellm", lock=PEERS / "litellm.txt"),
        start=_litellm,
        slow=True,
    ),
    Peer(
        name="portkey",
        about="Portkey gateway on Node: provider and host by header; no keys of its own, no limits, no accounts",
        package=Npm("@portkey-ai/gateway", lock=PEERS / "portkey/package-lock.json"),
        start=_portkey,
        slow=True,
    ),
    Peer(
        name="headrace-off",
        about="Headrace with a key and nothing limited or traced; it still counts, bills and meters every call",
        package=Own("headrace"),
        start=_headrace(limits=(), trace=""),
    ),
    Peer(
        name="headrace",
        about="Headrace with all policy on: key, three limits, fairness, journal, metrics, 1 % of calls traced",
        package=Own("headrace"),
        start=_headrace(limits=FAR_LIMITS, trace=TRACED),
    ),
)
