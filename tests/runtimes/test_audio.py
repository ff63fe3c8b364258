"""A graph that reads sound: WAV files in, answers out, and a row named where one cannot be read."""

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from runtimes.artifact import Artifact, Shelf, open_folder, seal
from runtimes.contract import InferReply, InferRequest, Invalid, Site, Tensor
from runtimes.integrity import Rejected
from runtimes.onnx import Onnx
from runtimes.session import Session
from tests import tiny
from tests.fakes import FakeClock
from tests.sounds import pcm

QUIET, LOUD = pcm([0] * 40), pcm([16384, -16384] * 10)
WIDTH = 80


def artifact(folder: Path, content: bytes | None = None, **changes: Any) -> Artifact:
    folder.mkdir(exist_ok=True)
    (folder / "model.onnx").write_bytes(content or tiny.sounds(WIDTH))
    known: dict[str, Any] = {"labels": ("quiet", "loud"), "sample_rate_hz": 8000, "truncate": False}
    seal(folder, msgspec.structs.replace(tiny.card("classify"), **known | changes), created_s=0)
    found = open_folder(folder)
    assert isinstance(found, Artifact)
    return found


def opened(folder: Path, **changes: Any) -> Session:
    return Session(artifact(folder, **changes), threads=1, provider="cpu")


def column(*files: object) -> Any:
    found = np.empty(len(files), object)
    found[:] = files
    return {"audio": found}


def infer(folder: Path, inputs: Any, **changes: Any) -> InferReply:
    """As a gateway does."""
    site = Site(model="m", replica="m-0", state=folder, shelf=Shelf(folder))
    spec = Onnx(artifact=str(artifact(folder / "it", **changes).path), batches=1)

    async def ask() -> InferReply:
        runtime = spec.build(site, clock=FakeClock())
        await runtime.open()
        try:
            return await runtime.infer(InferRequest(inputs, deadline_s=1e9))
        finally:
            await runtime.aclose()

    return asyncio.run(ask())


def test_it_says_that_it_takes_files(tmp_path: Path) -> None:
    session = opened(tmp_path)
    assert session.inputs == (Tensor("audio", "BYTES", (-1,), column=True),)
    assert [it.name for it in session.outputs] == ["scores", "label"]


def test_each_file_is_answered_by_its_own_length(tmp_path: Path) -> None:
    reply = infer(tmp_path, column(LOUD, QUIET, pcm([16384])))

    assert reply.outputs["scores"].tolist() == [[0.5, 0.5], [1, 0], [0.5, 0.5]]
    assert reply.tokens_in == 0


def test_more_files_than_go_together_keep_their_order(tmp_path: Path) -> None:
    files = [pcm([320 * number] * 20) for number in range(100)]
    found = infer(tmp_path, column(*files)).outputs["scores"][:, 1]
    np.testing.assert_allclose(found, [320 * number / 32768 for number in range(100)], rtol=1e-5)


def test_bytes_that_happen_to_be_text_are_the_same_file(tmp_path: Path) -> None:
    text = QUIET.replace(b"\x80\x3e\0\0", bytes(4)).decode()  # bytes a second, which nobody reads
    assert infer(tmp_path, column(text)).outputs["scores"].tolist() == [[1, 0]]


def test_a_longer_sound_is_cut_if_the_manifest_says_so(tmp_path: Path) -> None:
    long = pcm([16384] * WIDTH + [0] * WIDTH)
    assert infer(tmp_path, column(long), truncate=True).outputs["scores"].tolist() == [[0.5, 0.5]]
    with pytest.raises(Invalid, match="entry 0 lasts"):
        infer(tmp_path, column(long))


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ((QUIET, QUIET[:-1]), "entry 1 is cut off"),
        ((*[QUIET] * 70, b""), "entry 70 is no RIFF/WAVE file; in JSON a file goes as base64"),
        ((pcm([0], rate_hz=44100), QUIET), "entry 0 has 44100 samples a second"),
        ((QUIET, pcm([])), "entry 1 has no samples"),
        ((), "n ≥ 1"),
        ((5,), "as bytes"),
    ],
    ids=str,
)
def test_what_is_no_such_file_is_refused_with_its_row(tmp_path: Path, files: tuple[object, ...], says: str) -> None:
    with pytest.raises(Invalid, match=says) as refused:
        infer(tmp_path, column(*files))
    assert refused.value.param == "audio"


@pytest.mark.parametrize(
    ("inputs", "param"),
    [({}, "audio"), ({"text": column("x")["audio"]}, "audio"), ({"audio": np.zeros((1, 2), object)}, "audio")],
)
def test_other_inputs_are_refused_by_name(tmp_path: Path, inputs: Any, param: str) -> None:
    with pytest.raises(Invalid) as refused:
        opened(tmp_path).check(inputs)
    assert refused.value.param == param


@pytest.mark.parametrize("content", [tiny.images(), tiny.quantized()], ids=["images", "quantized"])
def test_a_graph_that_takes_no_samples_is_rejected(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(Rejected, match="samples"):
        opened(tmp_path, content=content)


def test_the_sample_rate_is_part_of_the_version(tmp_path: Path) -> None:
    one, other = artifact(tmp_path / "one"), artifact(tmp_path / "other", sample_rate_hz=16000)
    assert one.manifest.version != other.manifest.version
