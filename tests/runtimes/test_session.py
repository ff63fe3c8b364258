"""Any graph: what it takes, what it refuses, what it answers."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from runtimes.artifact import Artifact, Shelf, open_folder, seal
from runtimes.contract import InferReply, InferRequest, Invalid, Site, Tensor
from runtimes.graph import DATATYPES, Graph
from runtimes.integrity import Rejected
from runtimes.onnx import Onnx
from runtimes.session import Session
from runtimes.tensors import NUMPY
from tests import tiny
from tests.fakes import FakeClock

DEADLINE_S = 1_060.0


def artifact(folder: Path, content: bytes, *, tokenizer: bool = False, **card: Any) -> Artifact:
    folder.mkdir(exist_ok=True)
    (folder / "model.onnx").write_bytes(content)
    if tokenizer:
        (folder / "tokenizer.json").write_bytes(msgspec.json.encode(tiny.tokenizer()))
    changes = {"task": "predict", "labels": (), **card}
    seal(folder, msgspec.structs.replace(tiny.card("classify"), **changes), created_s=0)
    found = open_folder(folder)
    assert isinstance(found, Artifact)
    return found


def opened(folder: Path, content: bytes, **card: Any) -> Session:
    return Session(artifact(folder, content, **card), threads=1, provider="cpu")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Session:
    return opened(tmp_path_factory.mktemp("images"), tiny.images())


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Session:
    return opened(tmp_path_factory.mktemp("words"), tiny.words())


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Session:
    folder = tmp_path_factory.mktemp("classifier")
    return opened(folder, tiny.graph("classify"), tokenizer=True, task="classify", labels=tiny.LABELS, truncate=False)


def infer(session: Session, inputs: dict[str, Any]) -> InferReply:
    """One row after the other."""
    session.check(inputs)
    rows = [row for piece, _ in session.reading.pieces(inputs, 3) for row in session.reading.rows(piece)]
    parts = [session.run([content]) for content, _, _ in rows]
    outputs = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return InferReply(outputs, sum(cost for _, cost, _ in rows) if session.reading.counts_tokens else 0)


def pixels(*sums: float, side: int = 2) -> dict[str, Any]:
    image = np.zeros((len(sums), side, side, 2), np.float32)
    image[:, 0, 0, 0] = sums
    return {"pixels": image, "gain": np.full((len(sums), 1), 2, np.float32)}


def test_a_graph_says_itself_what_it_takes_and_gives(images: Session, words: Session) -> None:
    assert images.task == "predict"
    assert images.inputs == (Tensor("pixels", "FP32", (-1, -1, -1, 2)), Tensor("gain", "FP32", (-1, 1)))
    assert images.outputs == (Tensor("brightness", "FP32", (-1, 1)),)
    assert words.inputs == (Tensor("ids", "INT64", (-1, -1)), Tensor("names", "BYTES", (-1,), column=True))


def test_images_are_answered_and_cost_no_tokens(images: Session) -> None:
    reply = infer(images, pixels(1, 2, 3))
    assert reply.outputs["brightness"].tolist() == [[2], [4], [6]]
    assert reply.tokens_in == 0


def test_strings_go_in_and_out_as_they_are(words: Session) -> None:
    ids, names = np.array([[1, 2], [3, 0]]), np.array(["zwölf", ""], object)
    assert infer(words, {"ids": ids, "names": names}).outputs["echo"].tolist() == ["zwölf", ""]


@pytest.mark.parametrize(
    ("inputs", "param"),
    [
        ({"pixels": pixels(1)["pixels"]}, "gain"),
        (pixels(1) | {"mood": np.zeros(1)}, "mood"),
        (pixels(1) | {"gain": np.ones((1, 1))}, "gain"),
        (pixels(1) | {"gain": np.ones((1, 1), np.int64)}, "gain"),
        (pixels(1) | {"gain": np.array([[None]], object)}, "gain"),
        (pixels(1) | {"gain": np.ones((1, 2), np.float32)}, "gain"),
        (pixels(1) | {"gain": np.ones(1, np.float32)}, "gain"),
        (pixels(1) | {"gain": np.ones((2, 1), np.float32)}, "gain"),
        (pixels(1) | {"pixels": np.ones((1, 2, 3, 2), np.float32)}, "pixels"),
        (pixels(), "pixels"),
        (pixels(1) | {"pixels": np.ones((1, 0, 0, 2), np.float32)}, "pixels"),
        ({}, "gain"),
    ],
    ids=str,
)
def test_what_does_not_fit_a_graph_is_refused_by_name(images: Session, inputs: dict[str, Any], param: str) -> None:
    with pytest.raises(Invalid) as refused:
        images.check(inputs)
    assert refused.value.param == param
    assert f"`{param}`" in str(refused.value)


@pytest.mark.parametrize(
    ("inputs", "param"),
    [
        ({"ids": np.array([[1.0]]), "names": np.array(["a"], object)}, "ids"),
        ({"ids": np.array([[np.nan]]), "names": np.array(["a"], object)}, "ids"),
        ({"ids": np.array([[1]], np.int32), "names": np.array(["a"], object)}, "ids"),
        ({"ids": np.array([[1]]), "names": np.array([b"a"], object)}, "names"),
        ({"ids": np.array([[1]]), "names": np.array(["a"])}, "names"),
        ({"ids": np.array([[1]]), "names": np.array([1])}, "names"),
    ],
    ids=str,
)
def test_ids_and_strings_must_be_that(words: Session, inputs: dict[str, Any], param: str) -> None:
    with pytest.raises(Invalid) as refused:
        words.check(inputs)
    assert refused.value.param == param


def test_an_id_that_the_graph_does_not_have_is_the_caller_s_fault_and_is_not_quoted(words: Session) -> None:
    inputs = {"ids": np.array([[7777]]), "names": np.array(["secret"], object)}
    with pytest.raises(Invalid) as refused:
        infer(words, inputs)
    assert "7777" not in str(refused.value)
    assert "secret" not in str(refused.value)


async def test_a_call_that_cannot_be_computed_harms_none_in_its_batch(tmp_path: Path) -> None:
    folder = artifact(tmp_path / "words", tiny.words()).path
    site = Site(model="words", replica="words-0", state=tmp_path, shelf=Shelf(tmp_path / "shelf"))
    runtime = Onnx(artifact=str(folder), batches=1).build(site, clock=FakeClock())
    await runtime.open()

    async def ask(id: int) -> list[Any]:
        inputs = {"ids": np.array([[id]]), "names": np.array([str(id)], object)}
        reply = await runtime.infer(InferRequest(inputs, DEADLINE_S))
        return [reply.outputs["vector"][0, 0, 0], reply.outputs["echo"][0]]

    found = await asyncio.gather(*(ask(id) for id in (0, 1, 99, 2, -99, 3)), return_exceptions=True)
    await runtime.aclose()
    assert [it for it in found if not isinstance(it, Exception)] == [[0, "0"], [3, "1"], [6, "2"], [9, "3"]]
    assert [type(it) for it in found if isinstance(it, Exception)] == [Invalid, Invalid]


async def test_rows_of_one_shape_share_a_batch_and_others_have_their_own(tmp_path: Path) -> None:
    folder = artifact(tmp_path / "images", tiny.images()).path
    site = Site(model="images", replica="images-0", state=tmp_path, shelf=Shelf(tmp_path / "shelf"))
    runtime = Onnx(artifact=str(folder), batches=1).build(site, clock=FakeClock())
    await runtime.open()
    calls = [InferRequest(pixels(at, at + 1, side=1 + at % 2), DEADLINE_S) for at in range(6)]
    found = await asyncio.gather(*map(runtime.infer, calls))
    await runtime.aclose()
    assert [it.outputs["brightness"].tolist() for it in found] == [[[2 * at], [2 * at + 2]] for at in range(6)]


async def test_a_graph_whose_first_axis_is_fixed_gets_each_call_whole(tmp_path: Path) -> None:
    folder = artifact(tmp_path / "images", tiny.images(first=2)).path
    site = Site(model="images", replica="images-0", state=tmp_path, shelf=Shelf(tmp_path / "shelf"))
    runtime = Onnx(artifact=str(folder), batch_max=8).build(site, clock=FakeClock())
    await runtime.open()
    calls = [InferRequest(pixels(at, at + 1), DEADLINE_S) for at in range(6)]
    found = await asyncio.gather(*map(runtime.infer, calls))
    with pytest.raises(Invalid, match=r"`pixels` must have the shape \[2, side, side, 2\]"):
        await runtime.infer(InferRequest(pixels(1), DEADLINE_S))
    await runtime.aclose()
    assert [it.outputs["brightness"].tolist() for it in found] == [[[2 * at], [2 * at + 2]] for at in range(6)]
    assert {it.batch_rows_max for it in found} == {1}


def test_one_call_s_rows_are_not_copied(images: Session) -> None:
    inputs = pixels(1, 2, 3, 4)
    rows = [content for content, _, _ in images.reading.rows(inputs)]
    assert np.shares_memory(images.reading.feed(rows[1:3])["pixels"], inputs["pixels"])
    others = [content for content, _, _ in images.reading.rows(pixels(5))]
    assert images.reading.feed([*rows[:2], *others, rows[3]])["pixels"][:, 0, 0, 0].tolist() == [1, 2, 5, 4]


def test_only_the_outputs_that_are_asked_for_need_to_be_there(images: Session) -> None:
    images.check(pixels(1), ["brightness"])
    with pytest.raises(Invalid, match="`mood` is no output"):
        images.check(pixels(1), ["brightness", "mood"])


def test_what_is_bound_to_a_device_answers_the_same(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(tiny.images())
    graph = Graph(tmp_path / "model.onnx", who="images", threads=1, provider="cpu")
    plain = graph.run(["brightness"], pixels(1, 2))
    graph.cuda = True
    np.testing.assert_array_equal(graph.run(["brightness"], pixels(1, 2))["brightness"], plain["brightness"])


def test_a_long_text_is_refused_with_the_limit_unless_the_manifest_lets_it_be_cut(
    classifier: Session, tmp_path: Path
) -> None:
    for row in ("card " * tiny.TOKENS_MAX, " " * 1_000_000):
        with pytest.raises(Invalid, match=f"more than {tiny.TOKENS_MAX} tokens") as refused:
            infer(classifier, {"text": np.array(["card", row], object)})
        assert refused.value.param == "text"
    assert infer(classifier, {"text": np.array(["card " * (tiny.TOKENS_MAX - 2)], object)}).tokens_in == tiny.TOKENS_MAX
    card = {"task": "classify", "labels": tiny.LABELS, "truncate": True}
    cut = opened(tmp_path / "cut", tiny.graph("classify"), tokenizer=True, **card)
    assert infer(cut, {"text": np.array(["card " * tiny.TOKENS_MAX], object)}).tokens_in == tiny.TOKENS_MAX


def test_how_many_rows_go_together_follows_from_graph_and_manifest(tmp_path: Path) -> None:
    assert opened(tmp_path / "plain", tiny.images()).batch_max == 16
    assert opened(tmp_path / "fixed", tiny.images(first=2)).batch_max == 1
    quantized = tiny.quantized()
    assert opened(tmp_path / "int8", quantized).batch_max == 1
    assert opened(tmp_path / "stated", quantized, tolerance=0.01).batch_max == 16


@pytest.mark.parametrize(
    ("content", "card", "complaint"),
    [
        (tiny.images(), {"task": "generate"}, "made to generate"),
        (tiny.images(), {"task": "classify", "labels": ("a",)}, "no output 'scores'"),
        (tiny.images().replace(b"brightness", b"embeddings"), {"task": "embed"}, "no output 'embedding'"),
        (tiny.images().replace(b"brightness", b"embeddings"), {"task": "classify"}, "no output 'scores'"),
        (tiny.graph("classify"), {"task": "classify"}, "without labels"),
        (tiny.graph("classify"), {"task": "classify", "labels": ("a", "b")}, "scores 3 labels"),
        (tiny.images(), {"tokenizer": True}, "must take `input_ids`"),
    ],
)
def test_a_graph_that_cannot_do_its_task_is_rejected(
    tmp_path: Path, content: bytes, card: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(Rejected, match=complaint):
        opened(tmp_path / "it", content, **card)


ANY = st.one_of(
    arrays.arrays(
        st.sampled_from([np.int8, np.int64, np.uint64, np.float16, np.float32, np.float64, np.bool_]),
        arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=3),
    ),
    arrays.arrays(
        np.object_,
        arrays.array_shapes(min_dims=0, max_dims=2, min_side=0, max_side=3),
        elements=st.one_of(st.text(max_size=5), st.binary(max_size=5), st.none(), st.integers(-5, 50)),
    ),
)


GOOD: dict[tuple[str, int], list[dict[str, Any]]] = {
    ("predict", 2): [{}, pixels(1, 2), {"ids": np.array([[1, 2]]), "names": np.array(["a"], object)}],
    ("classify", 3): [
        {},
        {"text": np.array(["my card", "", "?"], object)},
        {"input_ids": np.array([[1, 2], [3, 0]]), "attention_mask": np.array([[1, 1], [1, 0]])},
    ],
}
"""What one kind of model or another takes, by task and number of inputs; then some of it is replaced."""


@settings(max_examples=500, deadline=None)
@given(data=st.data())
def test_whatever_is_sent_is_answered_or_invalid(
    data: st.DataObject, images: Session, words: Session, classifier: Session
) -> None:
    session = data.draw(st.sampled_from([images, words, classifier]))
    names = st.sampled_from([*(it.name for it in session.inputs), "mood"])
    good = data.draw(st.sampled_from(GOOD[session.task, len(session.inputs)]))
    inputs = {**good, **data.draw(st.dictionaries(names, ANY, max_size=2))}
    try:
        reply = infer(session, inputs)
    except Invalid:
        return
    rows = len(next(iter(inputs.values())))
    assert {name: len(array) for name, array in reply.outputs.items()} == dict.fromkeys(reply.outputs, rows)


def test_every_datatype_has_its_array() -> None:
    assert set(DATATYPES.values()) == NUMPY.keys()


def test_a_model_that_runs_says_nothing_to_anybody_about_it(tmp_path: Path) -> None:
    home, shelf, made = (tmp_path / it for it in ("home", "shelf", "made"))
    home.mkdir()
    made.mkdir()
    tiny.publish(Shelf(shelf), made)
    code = (
        "import sys; from pathlib import Path; "
        "from runtimes.artifact import Shelf; from runtimes.session import Session; "
        "Session(Shelf(Path(sys.argv[1])).resolve('tiny@stable'), threads=1, provider='cpu')"
    )
    # Where it does tell its makers, ONNX Runtime keeps an id of the machine in the user's home; in CI it never does.
    env = {name: value for name, value in os.environ.items() if name not in ("CI", "ORT_DISABLE_TELEMETRY")}
    subprocess.run([sys.executable, "-c", code, str(shelf)], check=True, env=env | {"HOME": str(home)})
    assert list(home.rglob("*")) == []
