"""Tables: what is read, what is refused, and a network that takes each column by its name."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

from runtimes.artifact import Shelf, open_folder
from training import recipe as recipes
from training.contract import Classes, Examples, Rows, strings
from training.errors import DataError, GateFailed, RecipeError
from training.evaluation import measures, scoring
from training.model import predict
from training.models import features, mlp
from training.spec import Recipe
from training.spec.data import Table
from training.spec.floors import Boosting, Logistic
from training.spec.models import Mlp

HEADER = "age,city,amount,label\n"


def load(tmp_path: Path, content: str, name: str = "rows.csv", **fields: object) -> Rows:
    (tmp_path / name).write_text(content)
    return msgspec.convert({"kind": "table", "train": str(tmp_path / name)} | fields, Table).load()


def many(rows: int = 120) -> str:
    """Old people of Bern pay; some ages are unknown."""
    lines = []
    for at in range(rows):
        age, city = 20 + at * 7 % 50, "Bern" if at % 3 else "Basel"
        lines.append(f"{age if at % 11 else ''},{city},{at * 10},{'yes' if age > 45 and at % 3 else 'no'}")
    return HEADER + "\n".join(lines)


def column(part: Examples, name: str) -> list[object]:
    found: list[object] = part.inputs[name].tolist()
    return found


def test_a_column_of_numbers_is_numbers_unless_the_recipe_says_otherwise(tmp_path: Path) -> None:
    content = "a,b,code,label,split\n1,x,7,p,train\n2.5,y,8,q,train\n-3,x,7,p,test\n"
    rows = load(tmp_path, content, categories=["code"])
    assert [*rows.train.inputs] == ["a", "b", "code"]
    assert rows.train.inputs["a"].dtype == np.float32
    assert column(rows.train, "a") == [1, 2.5]
    assert column(rows.train, "code") == ["7", "8"]
    assert column(rows.test, "b") == ["x"]


def test_a_missing_number_is_nan_and_a_missing_category_is_empty(tmp_path: Path) -> None:
    rows = load(tmp_path, "a,b,label,split\n1,?,p,train\nNA,y,q,train\n,x,p,test\n")
    assert np.isnan(rows.train.inputs["a"]).tolist() == [False, True]
    assert column(rows.train, "b") == ["", "y"]
    assert "3 values are missing" in rows.notes


@pytest.mark.parametrize("wrong", ["inf", "1O"])
def test_the_row_that_makes_categories_of_numbers_is_said(tmp_path: Path, wrong: str) -> None:
    content = f"a,b,label,split\n1,x,p,train\n{wrong},3,q,train\n,z,q,train\n4,y,p,test\n"
    rows = load(tmp_path, content)
    assert column(rows.train, "a") == ["1", wrong, ""]
    says = [it for it in rows.notes if "because of row" in it]
    assert says == ["column 'a' is taken as categories because of row 2: 2 of its 3 values are numbers"]
    assert "because of row" not in str(load(tmp_path, content, categories=["a"]).notes)


def test_a_file_without_header_and_with_blanks_between_columns_is_read(tmp_path: Path) -> None:
    content = "".join(f"A11  6 {number} 1\nA12 48 {number} 2\n" for number in range(40))
    rows = load(
        tmp_path, content, "rows.txt", header=["status", "months", "number", "label"], labels={"2": "bad", "1": "good"}
    )
    both = rows.both
    assert isinstance(both.targets, Classes)
    assert both.targets.labels == ("bad", "good")
    assert set(column(both, "status")) == {"A11", "A12"}
    assert set(column(both, "months")) == {6, 48}


def test_equal_rows_are_in_the_same_part(tmp_path: Path) -> None:
    rows = load(tmp_path, many() + "\n" + many().removeprefix(HEADER))
    train, test = (
        set(zip(*(column(it, name) for name in ("city", "amount")), strict=True)) for it in (rows.train, rows.test)
    )
    assert not train & test
    assert len(train) + len(test) == 120
    assert "120 rows repeat another" in rows.notes


def test_a_training_row_that_is_also_a_test_row_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "test.csv").write_text("a,label\n2,q\n")
    rows = load(tmp_path, "a,label\n1,p\n2,q\n3,q\n", test=str(tmp_path / "test.csv"))
    assert column(rows.train, "a") == [1, 3]
    assert "1 training rows are also in the test part and were left out" in rows.notes


def test_rows_are_the_same_in_any_order_of_columns_and_whatever_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "test.csv").write_text("label,a,more,b,\nq,2,7,y,0\n")
    content = "id,a,b,label\n1,1,x,p\n2,2,y,q\n3,3,x,q\n"
    rows = load(tmp_path, content, test=str(tmp_path / "test.csv"), ignore=["id"])
    assert column(rows.train, "a") == [1, 3]


def test_a_row_that_the_split_has_in_both_parts_is_only_tested_with(tmp_path: Path) -> None:
    rows = load(tmp_path, "a,label,split\n1,p,train\n2,q,train\n3,q,train\n2,q,test\n")
    assert (column(rows.train, "a"), column(rows.test, "a")) == ([1, 3], [2])


def test_what_the_recipe_ignores_does_not_move_rows_between_parts(tmp_path: Path) -> None:
    whole = load(tmp_path, many(40))
    less = load(tmp_path, many(40), ignore=["city"])
    assert column(less.test, "amount") == column(whole.test, "amount")


def test_repetitions_that_differ_in_what_is_ignored_are_only_tested_with(tmp_path: Path) -> None:
    content = "id,a,label\n" + "".join(f"{at},{at % 20},{'pq'[at % 2]}\n" for at in range(40))
    rows = load(tmp_path, content, ignore=["id"], test_share=0.2)
    assert not set(column(rows.test, "a")) & set(column(rows.train, "a"))
    assert f"{40 - len(rows.both)} training rows are also in the test part and were left out" in rows.notes


def test_rows_of_one_file_that_differ_in_how_a_value_is_missing_are_the_same(tmp_path: Path) -> None:
    lines = [f"{at},{missing},{'pq'[at % 2]}\n" for at in range(20) for missing in ("", "?", "NA", "1")]
    rows = load(tmp_path, "a,b,label\n" + "".join(lines))
    known = [{*zip(column(it, "a"), np.isnan(it.inputs["b"]), strict=True)} for it in (rows.train, rows.test)]
    assert not known[0] & known[1]


def test_training_rows_that_are_all_test_rows_too_are_said_to_be(tmp_path: Path) -> None:
    (tmp_path / "test.csv").write_text("a,label\n1,p\n2,q\n")
    with pytest.raises(DataError, match=r"each of .*rows.csv is also in the test part"):
        load(tmp_path, "a,label\n1,p\n2,q\n", test=str(tmp_path / "test.csv"))


@pytest.mark.parametrize(
    ("content", "fields", "says"),
    [
        ("a,label\n1,p\n2\n", {}, "row 2"),
        ("a,label\n1,p\n2,q,r\n", {}, "row 2"),
        ("a,label\n1,p\n2,\n", {}, "row 2: 'label' is empty"),
        ("a,label\n1,p\n2,q\n", {"ignore": ["b"]}, "no column 'b'"),
        ("label\np\nq\n", {}, "no column but the label"),
        (",a,label\n0,1,p\n1,2,q\n", {}, "column 1 has no name"),
        ("a, ,label\n0,1,p\n1,2,q\n", {}, "column 2 has no name"),
        ("a,label,split\n1,p,train\n-1e39,q,train\n2,q,test\n", {}, "row 2: 'a' is '-1e39', more than float32"),
        ("a,label,split\n1,p,train\n2,p,test\n", {}, "1 labels"),
        ("a,label,split\n1,p,train\n2,q,train\n2,r,test\n", {}, "'r' is in the test rows only"),
        ("a,label,split\n1,p,train\n2,q,train\n", {}, "no rows to test"),
        ("a,label,split\n,p,train\nNA,q,train\n2,q,test\n", {}, "'a' is empty in every training row"),
        ("a,label,split\n1,p,train\n2,q,train\n3,q,test\n", {"costs": {"r": 1}}, "data.costs names 'r'"),
    ],
)
def test_a_table_that_cannot_be_used_is_refused_with_its_place(
    tmp_path: Path, content: str, fields: dict[str, object], says: str
) -> None:
    with pytest.raises(DataError, match=says):
        load(tmp_path, content, **fields)


def test_a_word_in_a_column_of_numbers_of_the_test_file_is_named_by_row(tmp_path: Path) -> None:
    (tmp_path / "test.csv").write_text("a,label\n2,q\nmany,q\n")
    with pytest.raises(DataError, match="row 2: 'a' is 'many', not a number"):
        load(tmp_path, "a,label\n1,p\n2,q\n", test=str(tmp_path / "test.csv"))


def test_a_number_that_is_too_large_is_named_in_the_test_file_too_and_may_be_a_code(tmp_path: Path) -> None:
    (tmp_path / "test.csv").write_text("a,label\n2,q\n1e39,q\n")
    fields = {"test": str(tmp_path / "test.csv")}
    with pytest.raises(DataError, match=r"test.csv, row 2: 'a' is '1e39', more than float32 holds"):
        load(tmp_path, "a,label\n1,p\n2,q\n3,q\n", **fields)
    assert column(load(tmp_path, "a,label\n1,p\n3,q\n", categories=["a"], **fields).test, "a") == ["2", "1e39"]


def recipe(tmp_path: Path, **changes: object) -> Recipe:
    file = tmp_path / "many.csv"
    file.write_text(many())
    fields: dict[str, object] = {
        "name": "tiny",
        "about": "for tests",
        "data": {"kind": "table", "train": str(file), "costs": {"yes": 5}},
        "model": {"kind": "mlp", "layers": [8], "networks": 2, "dropout": 0.1, "log": True,
                  "ratios": [["amount", "age"]]},
        "trainer": {"kind": "gradient", "epochs": 12, "rate": 0.05, "batch": 16, "validation": 0.1, "keep": "best"},
        "floor": {"kind": "logistic"},
        "gate": {"auc_min": 0.8, "batch_drift_max": 1e-5},
    }  # fmt: skip
    return msgspec.convert(fields | changes, Recipe)


def test_a_run_ends_with_a_classifier_that_takes_each_column_by_its_name(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path / "shelf")
    manifest = recipes.run(recipe(tmp_path, folds=2), shelf, tmp_path / "runs")
    assert (manifest.task, manifest.labels) == ("classify", ("no", "yes"))
    assert {"auc", "cost", "folds_auc"} <= manifest.after.keys()
    asked = {
        "age": np.array([60, 25, np.nan], np.float32),
        "city": strings(["Bern", "Bern", "Atlantis"]),
        "amount": np.array([10, 10, 1e9], np.float32),
    }
    answer = scoring.served(shelf.resolve("tiny"), asked)
    assert answer["label"][:2].tolist() == ["yes", "no"]
    assert np.isfinite(answer["scores"]).all()
    np.testing.assert_allclose(answer["scores"].sum(1), 1, atol=1e-5)


def test_what_test_rows_of_one_label_cannot_say_is_not_in_the_manifest(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path / "shelf")
    made = recipe(tmp_path, gate={})
    head, *lines = many().splitlines()
    label = head.split(",").index("label")
    said = ["test" if it.split(",")[label] == "yes" and at % 5 == 0 else "train" for at, it in enumerate(lines)]
    rows = [f"{line},{part}" for line, part in zip(lines, said, strict=True)]
    (tmp_path / "many.csv").write_text("\n".join([f"{head},split", *rows]) + "\n")
    manifest = recipes.run(made, shelf, tmp_path / "runs")
    assert "accuracy" in manifest.after
    assert "auc" not in {*manifest.before, *manifest.after}
    assert shelf.describe("tiny") == manifest
    with pytest.raises(GateFailed, match=r"auc_min is 0\.8, measured nan"):
        recipes.run(msgspec.structs.replace(made, gate={"auc_min": 0.8}), shelf, tmp_path / "runs")


def test_the_graph_answers_as_torch_also_to_what_it_has_never_seen(tmp_path: Path) -> None:
    made = recipe(tmp_path, trainer=None, gate={}, floor=None)
    shelf = Shelf(tmp_path / "shelf")
    recipes.run(made, shelf, tmp_path / "runs")
    [run] = (tmp_path / "runs").iterdir()
    import torch

    model = torch.load(run / "stages" / "train.pt", weights_only=False)
    asked = {
        "age": np.array([np.nan, 30, -1e20], np.float32),
        "city": strings(["", "Basel", "Bern "]),
        "amount": np.array([np.nan, 7, 8], np.float32),
    }
    wanted, found = predict(model, asked), scoring.served(shelf.resolve("tiny"), asked)
    for name in ("scores", "logits"):
        np.testing.assert_allclose(found[name], wanted[name], atol=1e-5)


@pytest.mark.parametrize("name", ["scores", "logits", "12"])
def test_a_column_that_no_graph_could_take_is_refused_by_its_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(RecipeError, match=f"can have the name '{name}'"):
        mlp.build(Mlp(), load(tmp_path, f"{name},label,split\n0,p,train\n2,q,train\n3,q,test\n"))


def test_columns_whose_names_differ_in_a_dot_are_two(tmp_path: Path) -> None:
    content = "a.b,a b,label,split\nx,u,p,train\ny,v,q,train\nz,w,q,train\nx,u,q,test\n"
    made = mlp.build(Mlp(), load(tmp_path, content)).features
    assert len([*made.buffers()]) == 2


@pytest.mark.parametrize("networks", [1, 3])
@pytest.mark.parametrize("layers", [[], [8, 4]], ids=["linear", "deep"])
def test_its_networks_answer_in_int8_as_they_do_in_fp32(tmp_path: Path, networks: int, layers: list[int]) -> None:
    model = {"kind": "mlp", "layers": layers, "networks": networks}
    gate = {"auc_min": 0.8, "batch_drift_max": 1e-5}
    made = recipe(tmp_path, model=model, compress=[{"kind": "int8-dynamic"}], gate=gate, floor=None)
    manifest = recipes.run(made, Shelf(tmp_path / "shelf"), tmp_path / "runs")
    assert manifest.after["auc"] == pytest.approx(manifest.before["auc"], abs=0.02)
    [run] = (tmp_path / "runs").iterdir()
    rows = made.data.load().test.inputs
    whole, small = (scoring.served(open_folder(run / it), rows)["scores"] for it in ("whole", "bundle"))
    np.testing.assert_allclose(small, whole, atol=0.02)


def test_numbers_are_scaled_by_the_training_rows_alone(tmp_path: Path) -> None:
    rows = load(tmp_path, "a,label,split\n0,p,train\n2,q,train\n1000,q,test\n")
    features = mlp.build(Mlp(), rows).features
    assert (features.mean.tolist(), features.deviation.tolist()) == ([1], [1])


def test_numbers_are_scaled_alike_however_many_are_looked_at_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, spec = load(tmp_path, many()), Mlp(log=True, ratios=(("amount", "age"),))
    whole = mlp.build(spec, rows).features
    monkeypatch.setattr(features, "_ROWS_AT_ONCE", 7)
    some = mlp.build(spec, rows).features
    for name in ("median", "gaps", "mean", "deviation"):
        np.testing.assert_allclose(getattr(some, name), getattr(whole, name), rtol=1e-6)
    amounts = np.log1p(rows.train.inputs["amount"])
    np.testing.assert_allclose((whole.mean[1], whole.deviation[1]), (amounts.mean(), amounts.std()), rtol=1e-5)


def test_equal_categories_are_one_string_in_memory(tmp_path: Path) -> None:
    cities = load(tmp_path, many()).train.inputs["city"]
    assert len({id(it) for it in cities}) == 2


def test_a_ratio_of_what_is_no_number_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"model\.ratios names 'city'"):
        mlp.build(Mlp(ratios=(("age", "city"),)), load(tmp_path, many()))


@pytest.mark.parametrize("floor", [Logistic(), Boosting()], ids=["logistic", "boosting"])
def test_floors_take_missing_numbers_and_unknown_categories(tmp_path: Path, floor: Logistic | Boosting) -> None:
    rows = load(tmp_path, many())
    strange = rows.test.inputs | {"city": strings(["Atlantis"] * len(rows.test))}
    found = floor.predict(rows.train, Examples(strange, rows.test.targets), model=None, seed=0)["scores"]
    np.testing.assert_allclose(found.sum(1), 1)


def test_the_cost_is_that_of_the_cheapest_answer_by_the_scores() -> None:
    targets = Classes(np.array([0, 1, 0, 1]), ("good", "bad"), (1.0, 5.0))
    scores = np.array([[0.9, 0.1], [0.9, 0.1], [0.8, 0.2], [0.5, 0.5]])
    # From 1/6 on it is cheaper to say bad: rows 1 and 2 are answered right and wrong, at 0; 5; 1 and 0.
    assert measures.measure(targets, {"scores": scores})["cost"] == pytest.approx((0 + 5 + 1 + 0) / 4)
