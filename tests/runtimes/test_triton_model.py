"""What runs inside Triton's Python backend, without Triton: its interface, as far as it is used, is faked."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

from runtimes.artifact import Artifact, Shelf, open_folder, seal
from runtimes.contract import Invalid, Unavailable
from runtimes.triton_command import ROWS_MAX, TOKENS, served
from tests import tiny
from tests.sounds import pcm


class FakeTensor:
    def __init__(self, name: str, array: Any) -> None:
        self.name = lambda: name
        self.as_numpy = lambda: array


class FakeError(Exception):
    INVALID_ARG, UNAVAILABLE = 3, 14

    def __init__(self, said: str, code: int) -> None:
        super().__init__(said)
        self.code = code


class FakeResponse:
    def __init__(self, tensors: Any = (), error: FakeError | None = None) -> None:
        self.outputs = {it.name(): it.as_numpy() for it in tensors}
        self.error = error


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    utils = ModuleType("triton_python_backend_utils")
    utils.__dict__.update(Tensor=FakeTensor, TritonError=FakeError, InferenceResponse=FakeResponse)
    monkeypatch.setitem(sys.modules, utils.__name__, utils)
    import runtimes.triton_model

    yield runtimes.triton_model
    del sys.modules["runtimes.triton_model"]


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "folder").mkdir()
    shelf = Shelf(tmp_path / "shelf")
    tiny.publish(shelf, tmp_path / "folder")
    value = msgspec.json.encode(served(shelf.resolve("tiny"), threads=1, batch_max=2)).decode()
    return {"parameters": {"headrace": {"string_value": value}}, "input": [], "output": []}


@pytest.fixture
def model(module: Any, config: dict[str, Any]) -> Any:
    model = module.TritonPythonModel()
    model.initialize({"model_config": json.dumps(config)})
    return model


def asked(*texts: bytes | str) -> Any:
    rows = np.array([it.encode() if isinstance(it, str) else it for it in texts], object)
    return SimpleNamespace(inputs=lambda: [FakeTensor("text", rows)])


class FakeConfig:
    def __init__(self, known: dict[str, Any]) -> None:
        self.as_dict = lambda: known
        self.rows_max = 0
        self.dynamic = False

    def set_max_batch_size(self, rows: int) -> None:
        self.rows_max = rows

    def set_dynamic_batching(self) -> None:
        self.dynamic = True


def test_it_says_what_goes_in_and_out(module: Any, config: dict[str, Any]) -> None:
    told = FakeConfig(config)
    assert module.TritonPythonModel.auto_complete_config(told) is told
    inputs, outputs = ({it["name"]: it for it in config[side]} for side in ("input", "output"))
    assert all(it["optional"] for it in inputs.values()), "text or token ids, never both"
    assert (inputs["text"]["data_type"], inputs["text"]["dims"]) == ("TYPE_STRING", [1])
    assert inputs["text"]["reshape"] == {"shape": []}
    assert (inputs["input_ids"]["data_type"], inputs["input_ids"]["dims"]) == ("TYPE_INT64", [-1])
    assert outputs["scores"]["dims"] == [len(tiny.LABELS)]
    assert outputs.keys() == {"logits", "scores", "label", TOKENS}
    assert (told.rows_max, told.dynamic) == (ROWS_MAX, True)


def test_calls_together_get_their_own_answers(model: Any) -> None:
    words = ["refund", "login", "card"]
    answers = model.execute([asked(words[0]), asked(words[1], words[2], "the money"), asked(words[2])])
    found = [[tiny.LABELS[row.argmax()] for row in it.outputs["scores"]] for it in answers]
    assert found == [["refund"], ["login", "card", "refund"], ["card"]]
    assert [it.outputs["label"].tolist() for it in answers] == found
    assert [it.outputs[TOKENS].tolist() for it in answers] == [[3], [3, 3, 4], [3]]


@pytest.mark.parametrize(
    "wrong", [asked(b"\xff"), asked(), SimpleNamespace(inputs=lambda: [])], ids=["not UTF-8", "no row", "no input"]
)
def test_one_that_is_refused_harms_none_of_the_others(model: Any, wrong: Any) -> None:
    first, refused, last = model.execute([asked("card"), wrong, asked("login")])
    assert refused.error.code == FakeError.INVALID_ARG
    assert "text" in str(refused.error)
    assert [it.outputs["label"].tolist() for it in (first, last)] == [["card"], ["login"]]


def test_calls_that_are_all_refused_are_all_answered(model: Any) -> None:
    assert [it.error.code for it in model.execute([asked(b"\xff")] * 3)] == [FakeError.INVALID_ARG] * 3


def test_a_batch_that_cannot_be_computed_is_tried_call_by_call(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = model._session.run

    def failing(contents: Any) -> Any:
        if any(tiny.WORDS.index("login") in ids for ids in contents):
            raise Invalid("inputs like these cannot be computed")
        return run(contents)

    monkeypatch.setattr(model._session, "run", failing)
    first, failed, last = model.execute([asked("card"), asked("login"), asked("refund")])
    assert failed.error.code == FakeError.INVALID_ARG
    assert [it.outputs["label"].tolist() for it in (first, last)] == [["card"], ["refund"]]


def test_a_failure_of_the_model_is_no_fault_of_the_calls(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(_: Any) -> Any:
        raise Unavailable("no memory")

    monkeypatch.setattr(model._session, "run", failing)
    assert [it.error.code for it in model.execute([asked("card")])] == [FakeError.UNAVAILABLE]


def test_sound_goes_in_as_the_bytes_of_its_file(module: Any, tmp_path: Path) -> None:
    folder = tmp_path / "sound"
    folder.mkdir()
    (folder / "model.onnx").write_bytes(tiny.sounds())
    card = msgspec.structs.replace(tiny.card("classify"), labels=("quiet", "loud"), sample_rate_hz=8000)
    seal(folder, card, created_s=0)
    found = open_folder(folder)
    assert isinstance(found, Artifact)
    value = msgspec.json.encode(served(found, threads=1, batch_max=None)).decode()
    model = module.TritonPythonModel()
    model.initialize({"model_config": json.dumps({"parameters": {"headrace": {"string_value": value}}})})

    def files(*contents: bytes) -> Any:
        return SimpleNamespace(inputs=lambda: [FakeTensor("audio", np.array(contents, object))])

    answered, refused = model.execute([files(pcm([0]), pcm([24576])), files(pcm([0])[:-1])])
    assert answered.outputs["label"].tolist() == ["quiet", "loud"]
    assert "entry 0 is cut off" in str(refused.error)
