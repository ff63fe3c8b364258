"""How our own Triton is started: one server with one model, from files that are made of an artifact at each start.

    <scratch>/models/model/config.pbtxt, 1/model.py   what Triton calls a model repository
    <scratch>/backends/python/                        links: its Python backend, and the stub for our Python
    <scratch>/lib/runtimes                            a link: nothing else of the gateway's is importable there
    <scratch>/grpc:1                                  the socket, which Triton names after an address and a port

Only gRPC is served, and only on that socket, in a folder that is closed to others. Batches are made by Triton as calls
come in. Deadlines, priorities and the queue's length are the gateway's: any of them in `config.pbtxt` makes this
version stall for half a second at a time.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import msgspec

from runtimes.artifact import Artifact
from runtimes.process import Command, environment

MODEL = "model"
"""What each server calls its only model. Names that clients use may hold what a folder's name may not."""
PARAMETER = "headrace"
"""Of `config.pbtxt`: holds a Served as JSON, by which the model knows what to load and the runtime what it is."""
TOKENS = "headrace_tokens"
"""An output beside the artifact's own: how many tokens the model read of each row."""
REFUSAL = "headrace:"
"""Begins what our own model says is wrong with a call; the name of the input at fault, a blank and the words follow."""
ROWS_MAX = 8
"""Rows that may reach a model together that takes fewer at once: more would only wait for each other's answers."""

STUB = "triton_python_backend_stub"
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - where the Python backend and its stub exchange tensors


class Served(msgspec.Struct, frozen=True):
    """An artifact as Triton's model repository carries it."""

    artifact: str
    """Its folder."""
    version: str
    task: str
    threads: int
    batch_max: int | None
    labels: tuple[str, ...] = ()
    thresholds: Mapping[str, float] = {}


def command(served: Served, engine: Path, scratch: Path) -> Command:
    """How to start Triton, installed in `engine`, for this. A pure function, but for what it inherits of the
    environment; what it returns fills the scratch folder."""
    packages = next(engine.glob("lib/python3*/site-packages"))
    server = packages / "pytriton" / "tritonserver"
    options = {
        "--model-repository": str(scratch / "models"),
        "--backend-directory": str(scratch / "backends"),
        "--model-control-mode": "explicit",
        "--load-model": MODEL,
        "--backend-config": f"python,shm-region-prefix-name={memory_prefix(scratch)}",
        "--allow-http": "false",
        "--allow-metrics": "false",
        "--grpc-address": f"unix:{scratch / 'grpc'}",
        "--grpc-port": "1",
        # Calls have ended by then, or are given up.
        "--exit-timeout-secs": "5",
    }
    env = {
        # The stub takes its packages from the first Python on it.
        "PATH": f"{engine / 'bin'}:{os.environ.get('PATH', os.defpath)}",
        "PYTHONNOUSERSITE": "1",
        "TMPDIR": str(scratch),
    }

    def fill(folder: Path) -> None:
        for left in SHARED_MEMORY.glob(f"{memory_prefix(scratch)}*"):  # by one that was killed
            left.unlink(missing_ok=True)
        write(served, folder)
        backend = folder / "backends" / "python"
        backend.mkdir(parents=True)
        for part in (*(server / "backends" / "python").iterdir(), stub(server, packages)):
            (backend / part.name).symlink_to(part)

    argv = (str(server / "bin" / "tritonserver"), *(f"{name}={value}" for name, value in options.items()))
    # The stub imports whatever lies where it was started before what is installed.
    return Command(argv, environment(env), scratch, fill, folder=scratch)


def memory_prefix(scratch: Path) -> str:
    """Of the names of this server's files in SHARED_MEMORY."""
    return f"headrace_{hashlib.sha256(os.fsencode(scratch)).hexdigest()[:16]}_"


def stub(server: Path, packages: Path) -> Path:
    """What runs the model: a program that embeds the environment's version of Python."""
    version = packages.parent.name.removeprefix("python")
    return server / "python_backend_stubs" / version / STUB


def served(artifact: Artifact, *, threads: int, batch_max: int | None) -> Served:
    manifest = artifact.manifest
    return Served(
        artifact=str(artifact.path),
        version=manifest.version,
        task=manifest.task,
        threads=threads,
        batch_max=batch_max,
        labels=manifest.labels,
        thresholds=manifest.thresholds,
    )


def write(served: Served, folder: Path) -> None:
    """The model repository, and the code it needs."""
    model = folder / "models" / MODEL
    (model / "1").mkdir(parents=True)
    (model / "config.pbtxt").write_text(config(served))
    (model / "1" / "model.py").write_text(CODE.format(lib=str(folder / "lib")))
    (folder / "lib").mkdir()
    (folder / "lib" / "runtimes").symlink_to(Path(__file__).parent)


def config(served: Served) -> str:
    """`config.pbtxt`. What goes in and out, and how many rows at once, the model itself says when it is loaded."""
    value = msgspec.json.encode(served).decode().replace("\\", "\\\\").replace('"', '\\"')
    return CONFIG.format(name=PARAMETER, value=value)


CONFIG = """\
backend: "python"
instance_group [ {{ kind: KIND_CPU count: 1 }} ]
parameters {{ key: "{name}" value: {{ string_value: "{value}" }} }}
"""

CODE = """\
import sys

sys.path.insert(0, {lib!r})

from runtimes.triton_model import TritonPythonModel  # noqa: E402, F401
"""
