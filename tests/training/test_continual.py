"""Learning on from a published artifact: with new rows, new labels, and without forgetting."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from runtimes.artifact import Shelf
from training import recipe as recipes
from training.continual import Base, mixed
from training.contract import Classes, Examples, strings
from training.data import cleaning
from training.errors import DataError, GateFailed, RecipeError
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


def texts(part: Examples) -> list[str]:
    return [*part.inputs["text"]]


def wrote(tmp_path: Path, name: str, *rows: str) -> str:
    (tmp_path / name).write_text("\n".join(["text,label", *rows]))
    return str(tmp_path / name)


def test_what_either_test_part_holds_is_learnt_from_by_nobody(classify: Make, tmp_path: Path) -> None:
    """Also by another case, and where the base has learnt it already."""
    first = wrote(tmp_path, "a.csv", "my card,payment", "my parcel,delivery", "old card,payment")
    asked = wrote(tmp_path, "b.csv", "pay twice,payment", "the order,delivery")
    base = Base(classify(data={"train": first, "test": asked}), None)
    learnt = wrote(tmp_path, "c.csv", "PAY  twice,payment", "help,delivery", "please,payment")
    held = wrote(tmp_path, "d.csv", "My Parcel,delivery", "yet,payment")
    new = classify(data={"train": learnt, "test": held}).data.load()
    rows = mixed(new, base, replay=9.0, seed=0)
    assert sorted(texts(rows.train)) == ["help", "my card", "my parcel", "old card", "please"]
    assert texts(rows.test) == ["pay twice", "the order", "yet"]
    assert "1 new training rows are also in the base's test part and were left out" in rows.notes
    assert "1 new test rows were learnt from by the base and were left out" in rows.notes


def test_learning_on_from_nothing_but_the_test_rows_of_the_base_is_refused(classify: Make, tmp_path: Path) -> None:
    first = wrote(tmp_path, "a.csv", "my card,payment", "my parcel,delivery")
    asked = wrote(tmp_path, "b.csv", "pay twice,payment", "the order,delivery")
    held = wrote(tmp_path, "c.csv", "yet,payment")
    new = classify(data={"train": asked, "test": held}).data.load()
    base = Base(classify(data={"train": first, "test": asked}), None)
    with pytest.raises(DataError, match="no new rows to train with: 2 new training rows are also in the base's test"):
        mixed(new, base, replay=1.0, seed=0)


def test_rows_of_numbers_are_told_apart_by_every_column() -> None:
    def rows(*values: tuple[float, str]) -> Examples:
        numbers, names = zip(*values, strict=True)
        targets = Classes(np.zeros(len(values), np.int64), ("a", "b"))
        return Examples({"x": np.array(numbers, np.float32), "city": strings(names)}, targets)

    kept = cleaning.without(rows((1, "Bern"), (2, "Bern"), (1, "Basel")), rows((1, "Basel"), (3, "Bern")))
    assert [*zip(kept.inputs["x"], kept.inputs["city"], strict=True)] == [(1, "Bern"), (2, "Bern")]


def test_without_the_run_that_made_it_nothing_can_be_gone_on_from(classify: Make, new: str, tmp_path: Path) -> None:
    shelf = Shelf(tmp_path / "shelf")
    first = recipes.run(classify(), shelf, tmp_path / "runs")
    recipe = classify(data={"train": new}, continual={"base": f"tiny@{first.version}"})
    with pytest.raises(RecipeError, match="only its run has the weights"):
        recipes.run(recipe, shelf, tmp_path / "others")


def test_what_is_gone_on_from_is_of_the_same_kind_and_the_same_model(classify: Make, new: str, tmp_path: Path) -> None:
    shelf, runs = Shelf(tmp_path / "shelf"), tmp_path / "runs"
    first = recipes.run(classify(), shelf, runs)
    on = {"base": f"tiny@{first.version}"}
    longer = classify(data={"train": new}, model={"kind": "encoder", "tokens_max": 12}, continual=on)
    with pytest.raises(RecipeError, match=r"model.tokens_max is 12, and 16 in tiny@"):
        recipes.run(longer, shelf, runs)
    bag = classify(data={"train": new}, model={"kind": "ngrams"}, trainer={"kind": "logistic"}, continual=on)
    with pytest.raises(RecipeError, match=r"model.kind is 'ngrams', and 'encoder' in tiny@"):
        recipes.run(bag, shelf, runs)
    table = classify(data={"kind": "table", "train": new}, model={"kind": "mlp"}, trainer=ON, continual=on)
    with pytest.raises(RecipeError, match=r"learnt from 'text', and data.kind is 'table'"):
        recipes.run(table, shelf, runs)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("a,c,label\n1,2,p\n2,3,q\n", "'b' as float32, the new ones as nothing"),
        ("a,b,label\n1,x,p\n2,y,q\n", "'b' as float32, the new ones as object"),
    ],
)
def test_tables_of_other_columns_are_not_gone_on_from(classify: Make, tmp_path: Path, content: str, says: str) -> None:
    def table(name: str, content: str) -> Recipe:
        (tmp_path / name).write_text(content)
        data = {"kind": "table", "train": str(tmp_path / name), "test_share": 0.5}
        return classify(data=data, model={"kind": "mlp"})

    known = "a,b,label\n" + "".join(f"{at},{at},{'pq'[at % 2]}\n" for at in range(20))
    base = Base(table("known.csv", known), None)
    more = content + "".join(f"{at},{at % 2 or 'x'},{'pq'[at % 2]}\n" for at in range(20))
    with pytest.raises(DataError, match=says):
        mixed(table("more.csv", more).data.load(), base, replay=1.0, seed=0)
