"""Artifacts in others' shapes: what goes out is complete and readable without us, and what comes in is proven first."""

import json
import random
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import numpy as np
import onnxruntime
import pytest
import tokenizers

from runtimes.artifact import Artifact, Manifest, Shelf
from runtimes.integrity import Rejected, ShelfFault, digest
from runtimes.session import Session
from tests import lora, tiny
from training.__main__ import app
from training.layouts import LAYOUTS, export
from training.layouts.intake import Origin, take_in
from training.layouts.parts import Facts

ORIGIN = Origin("somewhere", "MIT")


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path / "shelf")


@pytest.fixture
def artifact(shelf: Shelf, tmp_path: Path) -> Artifact:
    (tmp_path / "source").mkdir()
    tiny.publish(shelf, tmp_path / "source", thresholds={"card": 0.5})
    return shelf.resolve("tiny")


@pytest.fixture
def taken(shelf: Shelf, tmp_path: Path) -> Callable[..., tuple[Manifest, list[str]]]:
    def take(folder: Path, name: str = "taken", **said: Any) -> tuple[Manifest, list[str]]:
        scratch = tmp_path / f"scratch-{len(list(tmp_path.iterdir()))}"
        scratch.mkdir()
        return take_in(folder, name, Facts(**said), ORIGIN, shelf, scratch)

    return take


def generator(folder: Path) -> Path:
    folder.mkdir()
    config = {"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 2048}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(json.dumps(tiny.tokenizer()))
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 1000000000000000019884624838656}')
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


@pytest.mark.parametrize("to", LAYOUTS)
def test_every_file_of_the_artifact_is_in_the_export(artifact: Artifact, to: Any, tmp_path: Path) -> None:
    written = export(artifact, to, tmp_path / "out")
    found = {digest(tmp_path / "out" / it) for it in written}
    assert set(artifact.manifest.files.values()) <= found
    assert {it.relative_to(tmp_path / "out") for it in (tmp_path / "out").rglob("*") if it.is_file()} == set(written)
    assert Path("README.md") in written


@pytest.mark.parametrize("to", LAYOUTS)
def test_what_was_exported_comes_back_with_the_same_files_and_facts(
    artifact: Artifact, to: Any, tmp_path: Path, taken: Any, shelf: Shelf
) -> None:
    export(artifact, to, tmp_path / "out")
    manifest, left = taken(tmp_path / "out")
    assert left == ["README.md"]
    for field in ("files", "task", "labels", "thresholds", "tokens_max", "pooling", "truncate", "tolerance"):
        assert getattr(manifest, field) == getattr(artifact.manifest, field), field
    assert (manifest.lineage.base, manifest.after) == ("somewhere", {})
    assert shelf.aliases("taken") == {}


def test_an_export_overwrites_nothing(artifact: Artifact, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(ShelfFault, match="overwrites nothing"):
        export(artifact, "plain", tmp_path / "out")
    assert [it.name for it in (tmp_path / "out").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("thresholds", "says"),
    [
        ({"zzz": 0.5}, "threshold for 'zzz'; the labels are "),
        ({"card": 1.5}, "threshold for 'card' is 1.5"),
        ({"card": -0.1}, "from 0 to 1"),
        ({"card": float("nan")}, "is nan"),
    ],
    ids=str,
)
def test_a_threshold_that_no_score_can_meet_is_refused(
    artifact: Artifact, tmp_path: Path, taken: Any, thresholds: dict[str, float], says: str
) -> None:
    export(artifact, "plain", tmp_path / "out")
    with pytest.raises(ShelfFault, match=says):
        taken(tmp_path / "out", thresholds=thresholds)


def test_where_nothing_can_be_written_an_export_says_so(artifact: Artifact, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for folder in (Path("/proc/out"), tmp_path / "file" / "out"):
        with pytest.raises(ShelfFault, match=rf"{folder} cannot be written \(.*name another folder"):
            export(artifact, "plain", folder)


def test_an_export_that_fails_leaves_nothing(artifact: Artifact, shelf: Shelf, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "model.onnx").write_bytes(tiny.images())
    tensors = shelf.publish(tmp_path / "images", tiny.card("predict", name="images", tokens_max=None))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ShelfFault, match="reads no text"):
        export(shelf.resolve(f"images@{tensors.version}"), "huggingface", tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_the_plain_folder_answers_without_us(artifact: Artifact, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    export(artifact, "plain", folder)
    encoded = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).encode("my card")
    feed = {"input_ids": np.array([encoded.ids]), "attention_mask": np.array([encoded.attention_mask])}
    [scores] = onnxruntime.InferenceSession(folder / "model.onnx").run(["scores"], feed)
    assert json.loads((folder / "labels.json").read_text())[scores.argmax()] == "card"


def test_hugging_face_s_labels_are_numbered(artifact: Artifact, tmp_path: Path) -> None:
    export(artifact, "huggingface", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["id2label"] == {"0": "refund", "1": "card", "2": "login"}
    reading = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert (reading["pad_token"], reading["model_max_length"]) == ("[PAD]", tiny.TOKENS_MAX)
    assert (tmp_path / "out" / "onnx" / "model.onnx").is_file()


def test_triton_is_told_what_goes_in_and_out(artifact: Artifact, tmp_path: Path) -> None:
    export(artifact, "triton", tmp_path / "out")
    config = (tmp_path / "out" / "tiny" / "config.pbtxt").read_text()
    assert 'backend: "onnxruntime"' in config
    assert '{ name: "input_ids" data_type: TYPE_INT64 dims: [ -1 ] }' in config
    assert '{ name: "scores" data_type: TYPE_FP32 dims: [ 3 ] label_filename: "labels.txt" }' in config
    assert (tmp_path / "out" / "tiny" / "labels.txt").read_text() == "refund\ncard\nlogin\n"


def test_a_graph_that_scales_by_the_batch_gets_one_row_at_a_time(shelf: Shelf, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "model.onnx").write_bytes(tiny.quantized())
    manifest = shelf.publish(tmp_path / "source", tiny.card("predict", name="q", tokens_max=None))
    export(shelf.resolve(f"q@{manifest.version}"), "triton", tmp_path / "out")
    config = (tmp_path / "out" / "q" / "config.pbtxt").read_text()
    assert "max_batch_size: 1\n" in config
    assert "dynamic_batching" not in config


class FakeTensor:
    def __init__(self, name: str, array: Any) -> None:
        self.name = lambda: name
        self.as_numpy = lambda: array


class FakeAnswer:
    def __init__(self, tensors: Any = (), error: Any = None) -> None:
        self.tensors, self.error = {it.name(): it for it in tensors}, lambda: error
        self.has_error = lambda: error is not None


class FakeRequest:
    """Asks the graph of the repository, as Triton's onnxruntime backend would."""

    graphs: Path

    def __init__(self, model_name: str, inputs: list[FakeTensor], requested_output_names: list[str]) -> None:
        self.graph = onnxruntime.InferenceSession(self.graphs / model_name / "1" / "model.onnx")
        self.feed = {it.name(): it.as_numpy() for it in inputs}
        self.outputs = requested_output_names

    def exec(self) -> FakeAnswer:
        found = zip(self.outputs, self.graph.run(self.outputs, self.feed), strict=True)
        return FakeAnswer([FakeTensor(name, array) for name, array in found])


class FakeTritonError(Exception):
    INVALID_ARG = 3


def text_model(repository: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What Triton's Python backend loads of an export, in its interface."""
    utils = ModuleType("triton_python_backend_utils")
    request = type("Request", (FakeRequest,), {"graphs": repository})
    utils.__dict__.update(
        Tensor=FakeTensor, InferenceRequest=request, InferenceResponse=FakeAnswer,
        TritonError=lambda said, code: FakeTritonError(said), get_input_tensor_by_name=lambda it, _: it,
        get_output_tensor_by_name=lambda it, name: it.tensors[name],
    )  # fmt: skip
    utils.TritonError.INVALID_ARG = 3  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, utils.__name__, utils)
    code: dict[str, Any] = {}
    exec((repository / name / "1" / "model.py").read_text(), code)
    config = (repository / name / "config.pbtxt").read_text()
    said = dict(re.findall(r'key: "(\w+)" value { string_value: "([^"]*)"', config))
    outputs = re.findall(r'name: "(\w+)"', config.partition("output [")[2])
    known = {
        "parameters": {key: {"string_value": it} for key, it in said.items()},
        "output": [{"name": it} for it in outputs],
    }
    model = code["TritonPythonModel"]()
    place = {"model_repository": str(repository / name), "model_version": "1"}
    model.initialize({"model_config": json.dumps(known), **place})
    return model


def test_triton_s_text_model_answers_as_our_own_runtime_does(
    artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(artifact, "triton", tmp_path / "out")
    model = text_model(tmp_path / "out", "tiny-text", monkeypatch)
    texts = ["my card", "login please", "card " * 100]
    asked = FakeTensor("text", np.array([[it.encode()] for it in texts], object))
    [answer] = model.execute([asked])
    session = Session(artifact, threads=1, provider="cpu")
    rows = session.reading.rows({"text": np.array(texts, object)})
    expected = session.run([content for content, _, _ in rows])
    np.testing.assert_allclose(answer.tensors["scores"].as_numpy(), expected["scores"], atol=1e-6)
    [refused] = model.execute([FakeTensor("text", np.array([b"\xff"], object))])
    assert "UTF-8" in str(refused.error())


def test_the_card_tells_scores_origin_and_gate(shelf: Shelf, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "model.onnx").write_bytes(tiny.graph("classify"))
    (tmp_path / "source" / "tokenizer.json").write_text(json.dumps(tiny.tokenizer()))
    scored = tiny.card("classify", before={"accuracy": 0.91}, after={"accuracy": 0.9}, gate={"accuracy_min": 0.85})
    manifest = shelf.publish(tmp_path / "source", scored)
    export(shelf.resolve(f"tiny@{manifest.version}"), "plain", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| `accuracy` | 0.91 | 0.9 |" in card
    assert "`accuracy_min` 0.85" in card
    assert card.startswith('---\nlicense: "apache-2.0"\n')
    assert all(it in card for it in manifest.files.values())


@pytest.mark.parametrize("to", ["plain", "huggingface"])
def test_a_generator_is_taken_as_it_is_and_goes_out_as_it_was(
    to: Any, tmp_path: Path, taken: Any, shelf: Shelf
) -> None:
    (generator(tmp_path / "chat") / "pytorch_model.bin").write_bytes(b"pickle")
    manifest, left = taken(tmp_path / "chat", "chat")
    assert (manifest.task, manifest.format, manifest.tokens_max) == ("generate", "safetensors", 2048)
    assert left == ["pytorch_model.bin"]
    export(shelf.resolve(f"chat@{manifest.version}"), to, tmp_path / "out")
    again, left = taken(tmp_path / "out", "chat")
    assert (again.version, left) == (manifest.version, ["README.md"])


BASE = "tiny 1.0"
LAYERS = {"model.layers.0.q_proj.weight": (8, 8)}


@pytest.fixture
def persona(shelf: Shelf, tmp_path: Path) -> Artifact:
    """A LoRA adapter."""
    folder = lora.adapter(tmp_path / "persona", LAYERS, rank=2, chance=random.Random(1))
    lora.change(folder, base_model_name_or_path=BASE, task_type="CAUSAL_LM")
    lora.published(shelf, folder, name="persona", format="adapter", fits=BASE)
    return shelf.resolve("persona")


def test_an_adapter_comes_back_with_the_same_files_and_fits_the_same_base(
    persona: Artifact, tmp_path: Path, shelf: Shelf
) -> None:
    for to, tokens_max in (("plain", 64), ("huggingface", None)):  # for which peft has no place
        export(persona, to, tmp_path / to)  # type: ignore[arg-type]
        (tmp_path / f"scratch-{to}").mkdir()
        manifest, left = take_in(tmp_path / to, to, Facts(), Origin(None, "MIT"), shelf, tmp_path / f"scratch-{to}")
        assert left == ["README.md"]
        assert manifest.files == persona.manifest.files
        assert (manifest.format, manifest.task, manifest.tokens_max) == ("adapter", "generate", tokens_max)
        assert manifest.fits == manifest.lineage.base == BASE


def test_an_adapter_s_card_says_what_it_is_for(persona: Artifact, tmp_path: Path) -> None:
    export(persona, "huggingface", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "a LoRA adapter for tiny 1.0" in card
    assert "library_name: peft" in card


def test_a_stranger_s_adapter_is_taken_without_what_its_trainer_left(persona: Artifact, tmp_path: Path) -> None:
    folder = tmp_path / "persona"
    (folder / "optimizer.pt").write_bytes(b"pickle")
    (folder / "tokenizer.json").write_text(json.dumps(tiny.tokenizer()))
    (tmp_path / "scratch").mkdir()
    shelf = Shelf(tmp_path / "other")
    manifest, left = take_in(folder, "mine", Facts(), Origin("their/model", "MIT"), shelf, tmp_path / "scratch")
    assert set(manifest.files) == {"adapter_config.json", "adapter_model.safetensors"}
    assert left == ["optimizer.pt", "tokenizer.json"]
    assert manifest.fits == "their/model", "what is given goes before what it says"


def _pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


@pytest.mark.parametrize(
    ("spoil", "said", "why"),
    [
        (_pickled, {}, "has no adapter_model.safetensors"),
        (lambda folder: lora.change(folder, base_model_name_or_path=None), {}, "trained on; give --base"),
        (lambda folder: lora.change(folder, task_type="SEQ_CLS"), {}, "task_type SEQ_CLS are not served"),
        (lambda folder: lora.change(folder, use_dora=True), {}, "DoRA"),
        (lambda folder: None, {"task": "classify"}, "leave --task out"),
    ],
)
def test_an_adapter_that_no_engine_could_use_is_not_taken_in(
    persona: Artifact, tmp_path: Path, spoil: Callable[[Path], None], said: dict[str, Any], why: str
) -> None:
    spoil(tmp_path / "persona")
    (tmp_path / "scratch").mkdir()
    shelf = Shelf(tmp_path / "other")
    with pytest.raises(ShelfFault, match=why):
        take_in(tmp_path / "persona", "mine", Facts(**said), Origin(None, "MIT"), shelf, tmp_path / "scratch")
    assert shelf.names() == []


def test_a_stranger_s_classifier_is_read_from_its_config(artifact: Artifact, tmp_path: Path, taken: Any) -> None:
    export(artifact, "huggingface", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    del config["headrace"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    manifest, _ = taken(tmp_path / "out", thresholds={"login": 0.9})
    assert (manifest.task, manifest.labels, manifest.tokens_max) == ("classify", tiny.LABELS, tiny.TOKENS_MAX)
    assert manifest.thresholds == {"login": 0.9}


def bare(folder: Path, graph: bytes) -> Path:
    folder.mkdir()
    (folder / "net.onnx").write_bytes(graph)
    return folder


@pytest.mark.parametrize(
    ("graph", "said", "why"),
    [
        (tiny.images(), {}, "--task"),
        (tiny.images(), {"task": "classify"}, "scores"),
        (tiny.graph("classify"), {"task": "classify"}, "without labels"),
        (tiny.graph("classify"), {"task": "classify", "labels": ("one", "two")}, "scores 3 labels"),
        (b"not a graph", {"task": "predict"}, "cannot be loaded"),
        (tiny.images(), {"task": "generate"}, "config.json"),
    ],
)
def test_what_no_runtime_would_load_is_not_taken_in(
    graph: bytes, said: dict[str, Any], why: str, tmp_path: Path, taken: Any, shelf: Shelf
) -> None:
    with pytest.raises(ShelfFault, match=why):
        taken(bare(tmp_path / "own", graph), **said)
    assert shelf.names() == []


def _linked(at: Path, target: Path) -> None:
    at.unlink(missing_ok=True)
    at.symlink_to(target)


LINKS: dict[str, tuple[str, Callable[[Path, Path], None]]] = {
    "a further file": ("plain", lambda at, out: _linked(at / "extra.txt", out / "secret.txt")),
    "the graph": ("plain", lambda at, out: _linked(at / "model.onnx", out / "secret.txt")),
    "labels": ("plain", lambda at, out: _linked(at / "labels.json", out / "secret.txt")),
    "a folder": ("plain", lambda at, out: _linked(at / "more", out)),
    "a relative link": ("plain", lambda at, _: _linked(at / "extra.txt", Path("../outside/secret.txt"))),
    "a link to a link": (
        "plain",
        lambda at, out: (_linked(at / "one.txt", out / "secret.txt"), _linked(at / "two.txt", at / "one.txt"))[0],
    ),
    "a folder of onnx": (
        "huggingface",
        lambda at, out: ((at / "onnx").rename(at / "old"), _linked(at / "onnx", out))[1],
    ),
    "a tokenizer": ("huggingface", lambda at, out: _linked(at / "tokenizer.json", out / "secret.txt")),
    "a version": ("triton", lambda at, out: _linked(at / "tiny" / "2", out)),
    "a model": ("triton", lambda at, out: _linked(at / "other", out)),
}


@pytest.mark.parametrize("where", LINKS)
def test_a_link_out_of_the_folder_publishes_nothing_and_is_named(
    artifact: Artifact, where: str, tmp_path: Path, taken: Any, shelf: Shelf
) -> None:
    to, link = LINKS[where]
    export(artifact, to, tmp_path / "out")  # type: ignore[arg-type]
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret.txt").write_text("secret")
    link(tmp_path / "out", tmp_path / "outside")
    with pytest.raises(ShelfFault, match=r"is a link that leads out of .*/out, to .*/outside.*cp -rL"):
        taken(tmp_path / "out")
    assert not shelf.has("taken")


def test_the_tokenizer_beside_a_triton_model_may_not_be_a_link_out_either(
    artifact: Artifact, tmp_path: Path, taken: Any, shelf: Shelf
) -> None:
    export(artifact, "triton", tmp_path / "out")
    (tmp_path / "secret.txt").write_text("secret")
    _linked(tmp_path / "out" / "tiny-text" / "1" / "tokenizer.json", tmp_path / "secret.txt")
    with pytest.raises(ShelfFault, match=r"tokenizer\.json is a link that leads out"):
        taken(tmp_path / "out" / "tiny")
    assert not shelf.has("taken")


def test_an_adapter_s_link_out_of_its_folder_is_refused(
    persona: Artifact, tmp_path: Path, taken: Any, shelf: Shelf
) -> None:
    export(persona, "huggingface", tmp_path / "out")
    (tmp_path / "out" / "adapter_model.safetensors").rename(tmp_path / "weights")
    _linked(tmp_path / "out" / "adapter_model.safetensors", tmp_path / "weights")
    with pytest.raises(ShelfFault, match="is a link that leads out"):
        taken(tmp_path / "out")
    assert not shelf.has("taken")


def test_a_snapshot_of_hugging_face_s_cache_is_refused_and_its_copy_taken(
    tmp_path: Path, taken: Any, shelf: Shelf
) -> None:
    snapshot = generator(tmp_path / "snapshot")
    (tmp_path / "blobs").mkdir()
    for file in [*snapshot.iterdir()]:
        file.rename(tmp_path / "blobs" / file.name)
        file.symlink_to(Path("../blobs") / file.name)
    with pytest.raises(ShelfFault, match=rf"cp -rL {snapshot} NEW"):
        taken(snapshot)
    shutil.copytree(snapshot, tmp_path / "copy")
    manifest, _ = taken(tmp_path / "copy")
    assert "model.safetensors" in manifest.files


def test_a_link_that_stays_in_the_folder_is_followed(artifact: Artifact, tmp_path: Path, taken: Any) -> None:
    export(artifact, "plain", tmp_path / "out")
    (tmp_path / "out" / "model.onnx").rename(tmp_path / "out" / "graph")
    (tmp_path / "out" / "model.onnx").symlink_to("graph")
    (tmp_path / "link").symlink_to(tmp_path / "out")
    manifest, _ = taken(tmp_path / "link")
    assert manifest.files == artifact.manifest.files


def test_a_config_that_imports_code_is_not_taken_in(tmp_path: Path, taken: Any, shelf: Shelf) -> None:
    folder = generator(tmp_path / "chat")
    (folder / "config.json").write_text('{"architectures": ["XForCausalLM"], "auto_map": {"AutoModel": "evil.Model"}}')
    with pytest.raises(Rejected, match="auto_map"):
        taken(folder)
    assert shelf.names() == []


def test_the_command_takes_a_folder_out_and_in_again(
    artifact: Artifact,
    tmp_path: Path,
    shelf: Shelf,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HEADRACE_STATE", str(tmp_path))
    out = str(tmp_path / "out")
    app(["export", "tiny", out, "--to", "plain", "--json"], result_action="return_value")
    assert "model.onnx" in json.loads(capsys.readouterr().out)["files"]
    said = ["--labels", "a", "b", "c", "--threshold.a", "0.25", "--licence", "MIT", "--as", "canary"]
    app(["import", out, "--name", "again", *said], result_action="return_value")
    manifest = shelf.describe("again@canary")
    assert (manifest.labels, manifest.thresholds, manifest.lineage.base) == (("a", "b", "c"), {"a": 0.25}, "out")
    assert not list(tmp_path.glob(".import-*"))
    assert set(shelf.aliases("again")) == {"canary"}


def test_what_is_no_layout_is_said_to_be_none(tmp_path: Path, taken: Any) -> None:
    (tmp_path / "own").mkdir()
    with pytest.raises(ShelfFault, match="none of the layouts"):
        taken(tmp_path / "own")
    with pytest.raises(ShelfFault, match="not a folder"):
        taken(tmp_path / "nowhere")


def test_what_would_stop_a_promotion_stops_an_import_before_it_publishes(
    artifact: Artifact, shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEADRACE_STATE", str(tmp_path / "state"))
    export(artifact, "plain", tmp_path / "out")
    import_ = ["import", str(tmp_path / "out"), "--shelf", str(shelf.root), "--name"]
    with pytest.raises(ShelfFault, match="cannot be an alias"):
        app([*import_, "taken", "--as", "Not One"])
    assert not shelf.has("taken")
    (shelf.root / "tiny" / "aliases.json").write_text("{")
    with pytest.raises(ShelfFault, match="is damaged"):
        app([*import_, "tiny", "--licence", "MIT", "--as", "stable"])
    assert shelf.versions("tiny") == [artifact.manifest.version]


def test_damaged_aliases_hide_nothing_else_and_can_be_begun_anew(
    artifact: Artifact, shelf: Shelf, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    version = artifact.manifest.version
    shelf.publish(tmp_path / "source", msgspec.structs.replace(tiny.card("classify"), name="another"))
    (shelf.root / "tiny" / "aliases.json").write_text("{")
    at = ["--shelf", str(shelf.root)]
    with pytest.raises(ShelfFault, match=r"tiny/aliases\.json is damaged"):
        app(["show", *at])
    assert [it.partition("@")[0] for it in capsys.readouterr().out.splitlines()] == ["another", "tiny"]
    with pytest.raises(SystemExit, match="0"):
        app(["promote", f"tiny@{version}", "--as", "canary", *at])
    shown = capsys.readouterr()
    assert shown.out == f"tiny@canary is {version}\n"
    assert "begun anew" in shown.err
    with pytest.raises(SystemExit, match="0"):
        app(["show", *at])
    assert "@canary" in capsys.readouterr().out
