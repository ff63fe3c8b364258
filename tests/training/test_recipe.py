"""Whole runs on a tiny model, and what surrounds them: settings, fingerprints, the gate, the command."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest

from runtimes.artifact import Card, Lineage, Shelf, verify
from training import catalogue
from training import recipe as recipes
from training.contract import Array, Classes, Inputs
from training.errors import GateFailed, RecipeError
from training.spec import Recipe
from training.spec.data import Flagged, Pairs
from training.spec.floors import Ngrams

ROOT = Path(recipes.__file__).parents[1]
Make = Callable[..., Recipe]


def test_a_run_ends_with_a_verified_and_promoted_artifact(classify: Make, tmp_path: Path) -> None:
    shelf = Shelf(tmp_path / "shelf")
    manifest = recipes.run(classify(), shelf, tmp_path / "runs")
    found = shelf.resolve("tiny@stable")
    verify(found)
    assert found.manifest == manifest
    assert manifest.labels == ("delivery", "payment")
    assert set(manifest.files) == {"model.onnx", "tokenizer.json"}
    quality = {"accuracy", "macro_f1", "log_loss", "ece", "auc"}
    assert manifest.before.keys() == quality | {"size_bytes", "batch_drift"}
    assert manifest.after.keys() == manifest.before.keys() | {"size_ratio", "speedup_1", "speedup_8", "latency_ms"}
    assert 0 < manifest.after["size_ratio"] < 1
    assert (manifest.truncate, manifest.tolerance) == (False, None)
    assert manifest.lineage.base == "tiny-base 1.5 (PyPI)"
    assert manifest.lineage.rows_train + manifest.lineage.rows_test == 20


def test_the_same_recipe_makes_the_same_version(classify: Make, tmp_path: Path) -> None:
    first = recipes.run(classify(), Shelf(tmp_path / "one"), tmp_path / "runs")
    assert recipes.run(classify(), Shelf(tmp_path / "two"), tmp_path / "runs").version == first.version


def test_running_a_recipe_again_puts_its_damaged_artifact_right(classify: Make, tmp_path: Path) -> None:
    shelf = Shelf(tmp_path / "shelf")
    made = classify(gate={"accuracy_over_stable_min": -0.5})
    first = recipes.run(made, shelf, tmp_path / "runs")
    graph = shelf.resolve("tiny").path / "model.onnx"
    graph.unlink()
    assert recipes.run(made, shelf, tmp_path / "runs").version == first.version
    verify(shelf.resolve("tiny"))


def test_what_the_gate_allows_batches_to_do_is_in_the_manifest(classify: Make, tmp_path: Path) -> None:
    recipe = classify(gate={"batch_drift_max": 1e-5}, model={"truncate": True})
    manifest = recipes.run(recipe, Shelf(tmp_path / "shelf"), tmp_path / "runs")
    assert (manifest.truncate, manifest.tolerance) == (True, 1e-5)
    assert manifest.after["batch_drift"] <= 1e-5


def test_a_failed_gate_publishes_nothing(classify: Make, tmp_path: Path) -> None:
    shelf = Shelf(tmp_path / "shelf")
    with pytest.raises(GateFailed, match=r"accuracy_min is 1\.01"):
        recipes.run(classify(gate={"accuracy_min": 1.01}), shelf, tmp_path / "runs")
    assert shelf.names() == []


def test_a_failed_gate_leaves_the_promoted_one_in_place(classify: Make, tmp_path: Path) -> None:
    shelf = Shelf(tmp_path / "shelf")
    good = recipes.run(classify(), shelf, tmp_path / "runs")
    with pytest.raises(GateFailed):
        recipes.run(classify(gate={"accuracy_min": 1.01}), shelf, tmp_path / "runs")
    assert shelf.resolve("tiny").manifest == good
    assert shelf.versions("tiny") == [good.version]


def test_an_embedder_is_compared_with_fp32(base: str, tmp_path: Path, classify: Make) -> None:
    pairs = tmp_path / "pairs.csv"
    pairs.write_text("left,right,similarity\nmy parcel,the order,3\nmy card,my card,5\npay,parcel is not yet,0\n")
    recipe = classify(trainer=None, gate={"cosine_to_fp32_least_min": 0.95}, name="embedder")
    recipe = msgspec.structs.replace(recipe, data=Pairs(test=str(pairs)))
    manifest = recipes.run(recipe, Shelf(tmp_path / "shelf"), tmp_path / "runs")
    assert (manifest.task, manifest.labels, manifest.pooling) == ("embed", (), "mean")
    assert 0.95 <= manifest.after["cosine_to_fp32_least"] <= manifest.after["cosine_to_fp32"] <= 1.0001


@pytest.mark.parametrize(
    ("folds", "says"),
    [({"folds": 21}, "folds is 21, and there are 20 rows"), ({"folds_by": "speaker"}, "folds_by is 'speaker'")],
)
def test_folds_that_the_rows_do_not_have_are_refused_before_anything_is_learnt(
    classify: Make, tmp_path: Path, folds: dict[str, object], says: str
) -> None:
    with pytest.raises(RecipeError, match=says):
        recipes.run(classify(**folds), Shelf(tmp_path / "shelf"), tmp_path / "runs")
    [record] = (tmp_path / "runs").glob("*/run.json")
    assert '"train"' not in record.read_text()


def test_folds_of_a_frozen_model_go_through_it_once(
    classify: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from training.models import encoder

    asked, plain = [], encoder.Classifier.frozen

    def counted(model: encoder.Classifier, inputs: Inputs) -> dict[str, Array]:
        asked.append(len(inputs["text"]))
        return plain(model, inputs)

    monkeypatch.setattr(encoder.Classifier, "frozen", counted)
    recipe = classify(folds=2, gate={"pooled_accuracy_min": 0.9, "folds_accuracy_over_floor_min": -1})
    recipe = msgspec.structs.replace(recipe, floor=Ngrams())
    manifest = recipes.run(recipe, Shelf(tmp_path / "shelf"), tmp_path / "runs")
    assert asked == [20]
    assert manifest.after["pooled_accuracy"] == pytest.approx(manifest.after["folds_accuracy"])


def test_a_bound_on_what_is_not_measured_is_refused_before_training(classify: Make, tmp_path: Path) -> None:
    for gate in ({"nll_max": 1.0}, {"accuracy": 0.9}, {"acuracy_min": 0.9}):
        with pytest.raises(RecipeError, match="bound"):
            recipes.run(classify(gate=gate, model={"package": "never-read"}), Shelf(tmp_path / "shelf"), tmp_path)


def test_a_base_that_is_not_installed_is_named(classify: Make, tmp_path: Path) -> None:
    recipe = classify(model={"package": "no-such-model"})
    with pytest.raises(RecipeError, match="no-such-model"):
        recipes.run(recipe, Shelf(tmp_path / "shelf"), tmp_path / "runs")


@pytest.mark.parametrize("name", catalogue.shipped())
def test_every_shipped_recipe_reads_and_has_its_data(name: str) -> None:
    from training.evaluation import exams, gate, measures

    recipe = catalogue.read(name)
    assert recipe.name == name
    try:
        rows = catalogue.with_files(recipe).data.load()
    except RecipeError as error:
        pytest.skip(str(error))  # real data, which is not shipped
    examined = {it for exam in recipe.exams for it in exams.measures(exam)}
    gate.check(recipe.gate, measures.names(rows.test) | examined)
    assert len(rows.test) >= 40


def test_the_starter_set_keeps_its_promise() -> None:
    rows = catalogue.read("support-intent").data.load()
    every = rows.both
    assert isinstance(every.targets, Classes)
    counts = np.bincount(every.targets.index)
    assert len(counts) >= 8
    assert counts.min() >= 30
    assert len({text.casefold() for text in every.inputs["text"]}) == len(every)
    assert 0.25 < len(rows.test) / len(every) < 0.35


def test_settings_change_fields_and_paths_follow_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = catalogue.read("support-intent", ("name=mine", "seed=7", "gate.accuracy_min=0.5", "data.train=own.csv"))
    assert (recipe.name, recipe.seed, recipe.gate["accuracy_min"]) == ("mine", 7, 0.5)
    assert recipe.data.train == str(tmp_path / "own.csv")


def test_settings_reach_into_lists_of_tables() -> None:
    recipe = catalogue.read("guard", ("data.sources.1.file=/own.csv", "data.sources.1.text=comment"))
    assert isinstance(recipe.data, Flagged)
    assert (recipe.data.sources[1].file, recipe.data.sources[1].text) == ("/own.csv", "comment")
    for setting in ("data.sources.9.file=x", "data.sources.file=x", "data.sources=x"):
        with pytest.raises(RecipeError, match="sources"):
            catalogue.read("guard", (setting,))


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("seed", "section.field=value"),
        ("=1", "section.field=value"),
        ("seed=many", r"\$\.seed"),
        ("data.column=x", "column"),
        ("name.first=x", "not a section"),
        ("trainer.kind=magic", "magic"),
        ("name=../../evil", r"name: '\.\./\.\./evil' cannot name an artifact"),
        ("name=/tmp/x", "name: '/tmp/x' cannot name an artifact"),
        ("name=A", "name: 'A' cannot name an artifact"),
        ('name=""', "name: '' cannot name an artifact"),
        ("gate.accuracy_min=nan", "gate.accuracy_min is nan"),
        ("gate.accuracy_min=-inf", "gate.accuracy_min is -inf"),
        ("trainer.c=inf", "trainer.c is inf"),
        (
            'compress=[{kind="distill", temperature=inf, trainer={kind="gradient", rate=1e-3, epochs=1, batch=8}}]',
            "compress.0.temperature is inf",
        ),
    ],
)
def test_a_wrong_setting_is_refused_with_its_place(setting: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        catalogue.read("support-intent", (setting,))


def test_tuning_tries_no_number_without_a_value() -> None:
    with pytest.raises(RecipeError, match=r"trainer\.c is inf"):
        catalogue.changed(catalogue.read("support-intent"), {"trainer.c": float("inf")})


def test_an_unknown_recipe_is_answered_with_those_there_are() -> None:
    with pytest.raises(RecipeError, match=r"shipped are .*minilm, .*support-intent"):
        catalogue.read("nothing")


def test_the_fingerprint_follows_the_content_not_the_place(classify: Make, tmp_path: Path) -> None:
    here = classify()
    copy = tmp_path / "elsewhere.csv"
    assert here.data.train
    copy.write_bytes(Path(here.data.train).read_bytes())
    assert catalogue.fingerprint(classify(data={"train": str(copy)})) == catalogue.fingerprint(here)
    copy.write_text("text,label\na,b\n")
    assert catalogue.fingerprint(classify(data={"train": str(copy)})) != catalogue.fingerprint(here)
    assert catalogue.fingerprint(classify(seed=1)) != catalogue.fingerprint(here)


def publish_as_made(recipe: Recipe, shelf: Shelf, folder: Path) -> str:
    """What a run of the recipe would have left, without running it."""
    folder.mkdir()
    (folder / "note.txt").write_text("in place of a model")
    lineage = Lineage(
        recipe=recipe.name, recipe_hash=catalogue.fingerprint(recipe), base="", base_licence="", data="", rows_train=0,
        rows_test=0, seed=0, packages={},
    )  # fmt: skip
    return shelf.publish(
        folder, Card(name=recipe.name, task="embed", format="onnx", tokens_max=8, lineage=lineage)
    ).version


def test_if_missing_returns_what_is_promoted_without_importing_torch(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path / "shelf")
    version = publish_as_made(catalogue.read("minilm"), shelf, tmp_path / "source")
    shelf.promote("minilm", version)
    arguments = ["headrace-train", "run", "minilm", "--if-missing", "--json", "--shelf", str(shelf.root)]
    # None in sys.modules makes any import of torch an ImportError.
    code = (
        f"import sys; sys.modules['torch'] = None; sys.argv = {arguments!r}; from training.__main__ import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert json.loads(done.stdout)["version"] == version


def test_a_recipe_that_is_published_but_not_promoted_is_missing(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path / "shelf")
    recipe = catalogue.read("minilm")
    version = publish_as_made(recipe, shelf, tmp_path / "source")
    assert catalogue.made(recipe, shelf) is None
    shelf.promote("minilm", version)
    assert catalogue.made(recipe, shelf) == shelf.resolve("minilm").manifest
    assert catalogue.made(catalogue.read("minilm", ("seed=1",)), shelf) is None


def test_the_command_answers_mistakes_in_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "training", "run", "nothing"],
        cwd=ROOT, capture_output=True, text=True, check=False, env=os.environ | {"HEADRACE_STATE": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("headrace-train: there is no recipe 'nothing'")
    assert len(done.stderr.splitlines()) == 1


def test_the_command_ends_quietly_when_nobody_reads_it_any_more(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as unread:
        done = subprocess.run(
            [sys.executable, "-m", "training", "recipes"],
            cwd=ROOT, stdout=unread, stderr=subprocess.PIPE, check=False,
            env=os.environ | {"HEADRACE_STATE": str(tmp_path)},
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (1, b"")
