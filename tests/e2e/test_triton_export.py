"""An exported model repository in a Triton that knows nothing of us.

The Triton that can be installed as a package has no onnxruntime backend, so a Python model of a few lines stands in for
it, under the configuration that was exported; what tokenizes is run as it is.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as client

from runtimes.artifact import Artifact, Shelf
from runtimes.session import Session
from runtimes.triton_command import memory_prefix, stub
from tests import tiny
from training.layouts import export

pytestmark = pytest.mark.engine

START_S_MAX = 120.0
STAND_IN = """
from pathlib import Path
import onnxruntime
import triton_python_backend_utils as triton

class TritonPythonModel:
    def initialize(self, args):
        self.session = onnxruntime.InferenceSession(Path(args["model_repository"], args["model_version"], "model.onnx"))

    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        names = request.requested_output_names()
        found = self.session.run(names, {it.name(): it.as_numpy() for it in request.inputs()})
        return triton.InferenceResponse([triton.Tensor(name, it) for name, it in zip(names, found)])
"""


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    shelf = Shelf(tmp_path / "shelf")
    (tmp_path / "made").mkdir()
    tiny.publish(shelf, tmp_path / "made")
    return shelf.resolve("tiny")


@pytest.fixture
def server(engine_state: Path, artifact: Artifact) -> Iterator[client.InferenceServerClient]:
    engine = max(it.parent for it in engine_state.glob("engines/triton-*/.ready"))
    packages = next(engine.glob("lib/python3*/site-packages"))
    triton = packages / "pytriton" / "tritonserver"
    # A socket's path must be short.
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        export(artifact, "triton", folder / "models")
        config = folder / "models" / "tiny" / "config.pbtxt"
        config.write_text(config.read_text().replace('backend: "onnxruntime"', 'backend: "python"'))
        (folder / "models" / "tiny" / "1" / "model.py").write_text(STAND_IN)
        backend = folder / "backends" / "python"
        backend.mkdir(parents=True)
        for part in (*(triton / "backends" / "python").iterdir(), stub(triton, packages)):
            (backend / part.name).symlink_to(part)
        options = {
            "--model-repository": folder / "models",
            "--backend-directory": folder / "backends",
            "--backend-config": f"python,shm-region-prefix-name={memory_prefix(folder)}",
            "--allow-http": "false",
            "--allow-metrics": "false",
            "--grpc-address": f"unix:{folder}/grpc",
            "--grpc-port": "1",
        }
        argv = [triton / "bin" / "tritonserver", *(f"{option}={value}" for option, value in options.items())]
        env = {"PATH": f"{engine / 'bin'}:{os.environ['PATH']}", "PYTHONNOUSERSITE": "1", "TMPDIR": name}
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(argv, cwd=folder, env=env, stdout=log, stderr=log)
        try:
            yield ready(f"unix:{folder}/grpc:1", process, folder / "log")
        finally:
            process.terminate()
            process.wait(timeout=60)


def ready(address: str, process: subprocess.Popen[bytes], log: Path) -> client.InferenceServerClient:
    found = client.InferenceServerClient(address)
    give_up_s = time.monotonic() + START_S_MAX
    while time.monotonic() < give_up_s and process.poll() is None:
        try:
            if found.is_model_ready("tiny-text") and found.is_model_ready("tiny"):
                return found
        except client.InferenceServerException:
            pass
        time.sleep(0.2)
    raise AssertionError(log.read_text())


def test_a_stock_triton_answers_texts_and_tokens_as_we_do(
    server: client.InferenceServerClient, artifact: Artifact
) -> None:
    texts = ["my card", "login please", "the money"]
    text = client.InferInput("text", [3, 1], "BYTES")
    text.set_data_from_numpy(np.array([[it.encode()] for it in texts], object))
    session = Session(artifact, threads=1, provider="cpu")
    expected = session.run([row for row, _, _ in session.reading.rows({"text": np.array(texts, object)})])
    scores = server.infer("tiny-text", [text]).as_numpy("scores")
    np.testing.assert_allclose(scores, expected["scores"], atol=1e-6)

    fed = session.reading.feed([row for row, _, _ in session.reading.rows({"text": np.array(texts, object)})])
    tokens = [client.InferInput(name, array.shape, "INT64") for name, array in fed.items()]
    for it, array in zip(tokens, fed.values(), strict=True):
        it.set_data_from_numpy(array)
    classes = server.infer("tiny", tokens, outputs=[client.InferRequestedOutput("scores", class_count=1)])
    named = [it.decode().split(":")[2] for it in classes.as_numpy("scores").flat]
    assert named == expected["label"].tolist() == ["card", "login", "refund"]
