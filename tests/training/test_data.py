"""Rows: what files may look like, how they are split, and what is refused."""

from pathlib import Path

import pytest

from training import data
from training.data import Labelled
from training.recipe import RecipeError
from training.spec import Data


def write(file: Path, content: str) -> str:
    file.write_text(content, "utf-8")
    return str(file)


def spec(tmp_path: Path, content: str, name: str = "rows.csv", **fields: str) -> Data:
    return Data(train=write(tmp_path / name, content), **fields)


MANY = "text,label\n" + "\n".join(f"text {number},{'ab'[number % 2]}" for number in range(200))


def test_the_file_s_own_split_is_followed(tmp_path: Path) -> None:
    rows = data.load(spec(tmp_path, "text,label,split\nx,a,train\ny,b,train\nz,a,test\n"), "classify")
    assert rows.train == [Labelled("x", "a"), Labelled("y", "b")]
    assert rows.test == [Labelled("z", "a")]


def test_json_lines_and_csv_read_alike(tmp_path: Path) -> None:
    csv = data.load(spec(tmp_path, 'text,label,split\n"x, ""y""",a,train\ny,b,train\nz,a,test\n'), "classify")
    lines = (
        '{"text": "x, \\"y\\"", "label": "a", "split": "train"}\n\n'
        '{"text": "y", "label": "b", "split": "train"}\n{"text": "z", "label": "a", "split": "test"}\n'
    )
    assert data.load(spec(tmp_path, lines, "rows.jsonl"), "classify") == csv


def test_the_hash_of_a_text_decides_where_nothing_else_does(tmp_path: Path) -> None:
    rows = data.load(spec(tmp_path, MANY), "classify")
    assert all(data.held_out(row.text, 0.3) for row in rows.test if isinstance(row, Labelled))
    assert 40 <= len(rows.test) <= 80
    assert len(rows.train) + len(rows.test) == 200


def test_adding_rows_moves_no_old_row_to_the_other_part(tmp_path: Path) -> None:
    before = data.load(spec(tmp_path, MANY), "classify")
    after = data.load(spec(tmp_path, MANY + "\nmore,a\nand more,b\n"), "classify")
    assert set(before.train) <= set(after.train)
    assert set(before.test) <= set(after.test)


def test_no_text_is_in_both_parts(tmp_path: Path) -> None:
    test = write(tmp_path / "test.csv", "text,label\nZ,a\n")
    rows = data.load(spec(tmp_path, "text,label\nx,a\ny,b\nz,a\n", test=test), "classify")
    assert [row.text for row in rows.train if isinstance(row, Labelled)] == ["x", "y"]
    assert rows.test == [Labelled("Z", "a")]


def test_the_fingerprint_changes_with_any_row_and_with_nothing_else(tmp_path: Path) -> None:
    text = "text,label,split\nx,a,train\ny,b,train\nz,a,test\n"
    first = data.load(spec(tmp_path, text), "classify").fingerprint
    assert data.load(spec(tmp_path, text.replace("\n", "\r\n"), "other.csv"), "classify").fingerprint == first
    assert data.load(spec(tmp_path, text.replace("y,b", "y!,b")), "classify").fingerprint != first
    assert data.load(spec(tmp_path, text.replace("z,a,test", "z,b,test")), "classify").fingerprint != first


def test_the_other_of_two_columns_is_the_label(tmp_path: Path) -> None:
    rows = data.load(spec(tmp_path, MANY.replace("text,label", "text,category", 1)), "classify")
    assert data.labels(rows.train) == ("a", "b")


def test_columns_can_be_named(tmp_path: Path) -> None:
    content = "id,utterance,intent,split\n1,x,a,train\n2,y,b,train\n3,z,a,test\n"
    rows = data.load(spec(tmp_path, content, text="utterance", label="intent"), "classify")
    assert rows.test == [Labelled("z", "a")]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "has no rows"),
        ("text,label\n", "has no rows"),
        ("a,b,c\n1,2,3\n", "no column 'label'"),
        ("text,label\nx,a\n,b\n", "row 2: 'text' is empty"),
        ("text,label\nx,a\ny\n", "row 2"),
        ("text,label,split\nx,a,train\ny,b,dev\n", "not 'dev'"),
        ("text,label,split\nx,a,train\ny,a,test\n", "1 labels"),
        ("text,label,split\nx,a,train\ny,b,train\nz,c,test\n", "'c' is in the test rows only"),
        ("text,label,split\nx,a,train\ny,b,train\n", "no rows to test"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_with_its_place(tmp_path: Path, content: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        data.load(spec(tmp_path, content), "classify")


def test_other_kinds_of_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"\.csv and \.jsonl"):
        data.load(spec(tmp_path, "x", "rows.pkl"), "classify")
    with pytest.raises(RecipeError, match="cannot be read"):
        data.load(spec(tmp_path, "{broken", "rows.jsonl"), "classify")
    (tmp_path / "latin.csv").write_bytes(b"text,label\n\xe9,a\n")
    with pytest.raises(RecipeError, match="cannot be read"):
        data.load(Data(train=str(tmp_path / "latin.csv")), "classify")
    with pytest.raises(RecipeError, match="cannot be read"):
        data.load(Data(train=str(tmp_path / "none.csv")), "classify")


def test_pairs_and_turns_are_typed(tmp_path: Path) -> None:
    pairs = write(tmp_path / "pairs.csv", "left,right,similarity\na,b,2.5\n")
    assert data.load(Data(test=pairs), "embed").test == [data.Pair("a", "b", 2.5)]
    turns = write(tmp_path / "turns.csv", "prompt,answer\na,b\n")
    assert data.load(Data(test=turns), "generate").test == [data.Turn("a", "b")]
    wrong = write(tmp_path / "wrong.csv", "left,right,similarity\na,b,much\n")
    with pytest.raises(RecipeError, match="row 1"):
        data.load(Data(test=wrong), "embed")
