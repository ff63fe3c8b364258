"""Learning on from a published artifact: with new rows, new labels, and without forgetting."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from runtimes.artifact import Shelf
from training import recipe as recipes
from training.errors import GateFailed, RecipeError
from training.spec import Recipe

Make = Callable[..., Recipe]
ON = {"kind": "gradient", "epochs": 20, "rate": 3e-3, "head_rate": 3e-2, "batch": 4}


@pytest.fixture
def new(tmp_path: Path) -> str:
    file = tmp_path / "new.csv"
    rows = [
        f"help please help {word},help"
        for word in ("pay", "card", "is", "my", "the", "not", "has", "yet", "was", "order")
    ]
    rows += [f"where is my parcel please {word},delivery" for word in ("pay", "help", "twice")]
    file.write_text("text,label\n" + "\n".join(rows))
    return str(file)


def test_new_rows_and_labels_are_learnt_and_old_ones_kept(classify: Make, new: str, tmp_path: Path) -> None:
    shelf, runs = Shelf(tmp_path / "shelf"), tmp_path / "runs"
    first = recipes.run(classify(), shelf, runs)
    gate = {
        "accuracy[rows=new]_min": 0.6,
        "accuracy[rows=old]_over_stable_min": -0.35,
        "accuracy[rows=new]_over_stable_min": 0.0,
    }
    on = {"base": f"tiny@{first.version}", "replay": 2.0}
    second = recipes.run(classify(trainer=ON, data={"train": new}, continual=on, gate=gate), shelf, runs)
    assert second.labels == ("delivery", "payment", "help")
    assert second.after["accuracy[rows=new]"] >= 0.6
    assert shelf.resolve("tiny").manifest.version == second.version
    [log] = runs.glob(f"tiny-{second.lineage.recipe_hash[:12]}/log.txt")
    assert "old rows are learnt from again" in log.read_text()


def test_forgetting_is_what_the_gate_sees(classify: Make, new: str, tmp_path: Path) -> None:
    shelf, runs = Shelf(tmp_path / "shelf"), tmp_path / "runs"
    first = recipes.run(classify(), shelf, runs)
    on = {"base": f"tiny@{first.version}", "replay": 0.0}
    gate = {"accuracy[rows=old]_over_stable_min": 0.0}
    reckless = ON | {"rate": 3e-2, "epochs": 40}
    with pytest.raises(GateFailed, match=r"accuracy\[rows=old\]_over_stable_min"):
        recipes.run(classify(trainer=reckless, data={"train": new}, continual=on, gate=gate), shelf, runs)
    assert shelf.resolve("tiny").manifest == first


def test_without_the_run_that_made_it_nothing_can_be_gone_on_from(classify: Make, new: str, tmp_path: Path) -> None:
    shelf = Shelf(tmp_path / "shelf")
    first = recipes.run(classify(), shelf, tmp_path / "runs")
    recipe = classify(data={"train": new}, continual={"base": f"tiny@{first.version}"})
    with pytest.raises(RecipeError, match="only its run has the weights"):
        recipes.run(recipe, shelf, tmp_path / "others")
