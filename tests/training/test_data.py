"""Rows: what files may look like, how they are split, and what is refused."""

from pathlib import Path

import pytest

from training.contract import Answers, Classes, Examples, Rows, Values
from training.data import split
from training.errors import DataError
from training.spec.data import Conversations, Pairs, Text


def write(file: Path, content: str) -> str:
    file.write_text(content, "utf-8")
    return str(file)


def load(tmp_path: Path, content: str, name: str = "rows.csv", **fields: str) -> Rows:
    return Text(train=write(tmp_path / name, content), **fields).load()


def listed(part: Examples) -> list[tuple[str, str]]:
    """Text and label of each row."""
    assert isinstance(part.targets, Classes)
    return [(text, part.targets.labels[at]) for text, at in zip(part.inputs["text"], part.targets.index, strict=True)]


MANY = "text,label\n" + "\n".join(f"text {number},{'ab'[number % 2]}" for number in range(200))


def test_the_file_s_own_split_is_followed(tmp_path: Path) -> None:
    rows = load(tmp_path, "text,label,split\nx,a,train\ny,b,train\nz,a,test\n")
    assert listed(rows.train) == [("x", "a"), ("y", "b")]
    assert listed(rows.test) == [("z", "a")]


def test_json_lines_and_csv_read_alike(tmp_path: Path) -> None:
    csv = load(tmp_path, 'text,label,split\n"x, ""y""",a,train\ny,b,train\nz,a,test\n')
    lines = (
        '{"text": "x, \\"y\\"", "label": "a", "split": "train"}\n\n'
        '{"text": "y", "label": "b", "split": "train"}\n{"text": "z", "label": "a", "split": "test"}\n'
    )
    again = load(tmp_path, lines, "rows.jsonl")
    assert (listed(again.train), listed(again.test)) == (listed(csv.train), listed(csv.test))


def test_the_hash_of_a_text_decides_where_nothing_else_does(tmp_path: Path) -> None:
    rows = load(tmp_path, MANY)
    assert all(split.held_out(text, 0.3) for text in rows.test.inputs["text"])
    assert 40 <= len(rows.test) <= 80
    assert len(rows.train) + len(rows.test) == 200


def test_adding_rows_moves_no_old_row_to_the_other_part(tmp_path: Path) -> None:
    before = load(tmp_path, MANY)
    after = load(tmp_path, MANY + "\nmore,a\nand more,b\n")
    assert set(listed(before.train)) <= set(listed(after.train))
    assert set(listed(before.test)) <= set(listed(after.test))


def test_no_text_is_in_both_parts(tmp_path: Path) -> None:
    test = write(tmp_path / "test.csv", "text,label\nZ,a\n")
    rows = load(tmp_path, "text,label\nx,a\ny,b\nz,a\n", test=test)
    assert [*rows.train.inputs["text"]] == ["x", "y"]
    assert listed(rows.test) == [("Z", "a")]


def test_the_fingerprint_changes_with_any_row_and_with_nothing_else(tmp_path: Path) -> None:
    text = "text,label,split\nx,a,train\ny,b,train\nz,a,test\n"
    first = load(tmp_path, text).fingerprint
    assert load(tmp_path, text.replace("\n", "\r\n"), "other.csv").fingerprint == first
    assert load(tmp_path, text.replace("y,b", "y!,b")).fingerprint != first
    assert load(tmp_path, text.replace("z,a,test", "z,b,test")).fingerprint != first


def test_the_other_of_two_columns_is_the_label(tmp_path: Path) -> None:
    rows = load(tmp_path, MANY.replace("text,label", "text,category", 1))
    assert isinstance(rows.train.targets, Classes)
    assert rows.train.targets.labels == ("a", "b")


def test_columns_can_be_named(tmp_path: Path) -> None:
    content = "id,utterance,intent,split\n1,x,a,train\n2,y,b,train\n3,z,a,test\n"
    rows = load(tmp_path, content, text="utterance", label="intent")
    assert listed(rows.test) == [("z", "a")]
    assert "columns that nothing is made of: id" in rows.notes


def test_a_file_without_a_header_is_read_by_the_columns_that_the_recipe_names(tmp_path: Path) -> None:
    train = write(tmp_path / "train.tsv", "a fine film\t1\na dull one\t0\n")
    test = write(tmp_path / "dev.tsv", "not bad\t1\n")
    rows = Text(train=train, test=test, header=("text", "label"), names={"0": "negative", "1": "positive"}).load()
    assert listed(rows.train) == [("a fine film", "positive"), ("a dull one", "negative")]
    assert listed(rows.test) == [("not bad", "positive")]


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
    with pytest.raises(DataError, match=says):
        load(tmp_path, content)


def test_other_kinds_of_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"\.csv, \.tsv, \.txt, \.json and \.jsonl"):
        load(tmp_path, "x", "rows.pkl")
    with pytest.raises(DataError, match="cannot be read"):
        load(tmp_path, "{broken", "rows.jsonl")
    (tmp_path / "latin.csv").write_bytes(b"text,label\n\xe9,a\n")
    with pytest.raises(DataError, match="is not UTF-8"):
        Text(train=str(tmp_path / "latin.csv")).load()
    with pytest.raises(DataError, match="cannot be read"):
        Text(train=str(tmp_path / "none.csv")).load()


def test_pairs_are_to_measure_with_and_conversations_are_split(tmp_path: Path) -> None:
    pairs = Pairs(test=write(tmp_path / "pairs.csv", "left,right,similarity\na,b,2.5\n")).load()
    assert (len(pairs.train), [*pairs.test.inputs["left"]], [*pairs.test.inputs["right"]]) == (0, ["a"], ["b"])
    assert isinstance(pairs.test.targets, Values)
    assert pairs.test.targets.values.tolist() == [2.5]
    turns = Conversations(test=write(tmp_path / "turns.csv", "prompt,answer\na,b\n")).load()
    assert isinstance(turns.test.targets, Answers)
    assert (len(turns.train), [*turns.test.targets.texts]) == (0, ["b"])
    with pytest.raises(DataError, match="row 1: 'similarity' is 'much'"):
        Pairs(test=write(tmp_path / "wrong.csv", "left,right,similarity\na,b,much\n")).load()
