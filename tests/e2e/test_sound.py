"""Sound through a real gateway: WAV files in JSON, as bytes, and over gRPC; and what is no such file."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
import pytest
import tritonclient.grpc

from runtimes.artifact import Shelf
from runtimes.dialect.elements import joined
from tests import tiny
from tests.conftest import LISTEN
from tests.e2e.servers import ENGINE_START_S_MAX, GatewayProcess, Key
from tests.sounds import pcm

FILES = pcm([0] * 40), pcm([24576] * 20, bits=16)
SCORES = [1, 0, 0.25, 0.75]
WHERE = "/v2/models/loudness/infer"


@pytest.fixture(scope="module", params=["onnx", pytest.param("triton", marks=pytest.mark.engine)])
def gateway(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    folder = tmp_path_factory.mktemp("a")
    (folder / "artifact").mkdir()
    (folder / "artifact" / "model.onnx").write_bytes(tiny.sounds())
    model = (
        f'[[models]]\nname = "loudness"\nreplicas = [{{ kind = "{request.param}", artifact = "loudness@stable" }}]\n'
    )
    gateway = GatewayProcess(folder, LISTEN + model)
    gateway.state.mkdir(mode=0o700)
    if request.param == "triton":
        (gateway.state / "engines").symlink_to(request.getfixturevalue("engine_state") / "engines")
    shelf = Shelf(gateway.state / "shelf")
    changes = {"name": "loudness", "labels": ("quiet", "loud"), "sample_rate_hz": 8000, "truncate": False}
    card = msgspec.structs.replace(tiny.card("classify"), **changes)
    shelf.promote("loudness", shelf.publish(folder / "artifact", card).version)
    gateway.start(start_s_max=ENGINE_START_S_MAX)
    yield gateway
    assert gateway.stop() == 0, gateway.text


@pytest.fixture(scope="module")
def key(gateway: GatewayProcess) -> Key:
    return gateway.issue()


async def ask(gateway: GatewayProcess, key: Key, content: bytes, **headers: str) -> tuple[int, Any]:
    async with gateway.client(key.text) as client:
        answer = await client.post(WHERE, content=content, headers=headers)
    return answer.status_code, answer.json()


def given(*files: str, **parameters: object) -> dict[str, Any]:
    return {"name": "audio", "datatype": "BYTES", "shape": [len(files)], "data": files, "parameters": parameters}


def coded(*files: bytes) -> bytes:
    """In JSON."""
    texts = [base64.b64encode(it).decode() for it in files]
    return json.dumps({"inputs": [given(*texts, content_type="base64")]}).encode()


def scores(told: Any) -> list[float]:
    (found,) = (it["data"] for it in told["outputs"] if it["name"] == "scores")
    return list(found)


async def test_files_go_as_base64_in_json(gateway: GatewayProcess, key: Key) -> None:
    status, told = await ask(gateway, key, coded(*FILES))
    assert status == 200, told
    assert scores(told) == SCORES
    (labels,) = (it["data"] for it in told["outputs"] if it["name"] == "label")
    assert labels == ["quiet", "loud"]


async def test_files_go_as_bytes_behind_the_json(gateway: GatewayProcess, key: Key) -> None:
    tail = joined(FILES)
    head = {"name": "audio", "datatype": "BYTES", "shape": [2], "parameters": {"binary_data_size": len(tail)}}
    body = json.dumps({"inputs": [head]}).encode()
    status, told = await ask(gateway, key, body + tail, **{"inference-header-content-length": str(len(body))})
    assert status == 200, told
    assert scores(told) == SCORES


def test_files_go_over_grpc(gateway: GatewayProcess, key: Key) -> None:
    files = tritonclient.grpc.InferInput("audio", [2], "BYTES")
    files.set_data_from_numpy(np.array(FILES, object))
    with tritonclient.grpc.InferenceServerClient(gateway.grpc) as client:
        found = client.infer("loudness", [files], headers={"authorization": f"Bearer {key.text}"})
    assert found.as_numpy("scores").ravel().tolist() == SCORES


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (coded(FILES[0], b""), "entry 1 is no RIFF/WAVE file"),
        (coded(FILES[0], FILES[1][:-3]), "entry 1 is cut off"),
        (coded(pcm([0], rate_hz=44100)), "entry 0 has 44100 samples a second"),
        (coded(pcm([])), "entry 0 has no samples"),
        (coded(pcm([0] * 81)), "entry 0 lasts"),
        (json.dumps({"inputs": [given("UklGR!", content_type="base64")]}).encode(), "entry 0 is not base64"),
        (json.dumps({"inputs": [given("UklGRg==")]}).encode(), "in JSON a file goes as base64"),
    ],
    ids=str,
)
async def test_what_is_no_such_file_is_a_400_that_names_it(
    gateway: GatewayProcess, key: Key, body: bytes, says: str
) -> None:
    status, told = await ask(gateway, key, body)
    assert status == 400
    assert says in told["error"]
