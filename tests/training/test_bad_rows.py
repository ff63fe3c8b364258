"""Rows that are compressed, packed, or wrong: read alike, cleaned and said so, or refused with their place."""

import gzip
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from training.contract import Classes, Rows
from training.data import cleaning
from training.errors import DataError
from training.spec.data import Text

RECORDS = [
    {"text": "x", "label": "a", "split": "train"},
    {"text": "y", "label": "b", "split": "train"},
    {"text": "z", "label": "a", "split": "test"},
]
CSV = "text,label,split\nx,a,train\ny,b,train\nz,a,test\n"


def load(tmp_path: Path, content: str | bytes, name: str = "rows.csv", **fields: str) -> Rows:
    file = tmp_path / name
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return Text(train=str(file), **fields).load()  # type: ignore[arg-type]


def plain_rows(tmp_path: Path) -> Rows:
    return load(tmp_path, CSV)


def test_gzip_parquet_and_saved_data_sets_hold_the_same_rows(tmp_path: Path) -> None:
    wanted = plain_rows(tmp_path).fingerprint
    assert load(tmp_path, gzip.compress(CSV.encode()), "rows.csv.gz").fingerprint == wanted
    lines = "".join(f'{{"text":"{it["text"]}","label":"{it["label"]}","split":"{it["split"]}"}}\n' for it in RECORDS)
    assert load(tmp_path, gzip.compress(lines.encode()), "rows.jsonl.gz").fingerprint == wanted
    pq.write_table(pa.Table.from_pylist(RECORDS), tmp_path / "rows.parquet")
    assert Text(train=str(tmp_path / "rows.parquet")).load().fingerprint == wanted
    datasets.Dataset.from_list(RECORDS).save_to_disk(str(tmp_path / "saved"))
    assert Text(train=str(tmp_path / "saved")).load().fingerprint == wanted


def test_a_cached_data_set_is_found_by_its_name_and_its_labels_by_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    cached(tmp_path / "cache" / "somebody___questions" / "default" / "0.0.0" / "0123456789abcdef")
    rows = Text(train="hf:somebody/questions#train", test="hf:somebody/questions:default#test").load()
    assert isinstance(rows.train.targets, Classes)
    assert ([*rows.train.inputs["text"]], rows.train.targets.labels) == (["x", "y"], ("no", "yes"))
    assert [*rows.test.inputs["text"]] == ["z"]
    with pytest.raises(DataError, match="name one of its splits, hf:somebody/questions#train or"):
        Text(train="hf:somebody/questions").load()
    with pytest.raises(DataError, match="hf:somebody/answers is not on this disk"):
        Text(train="hf:somebody/answers").load()


def cached(folder: Path) -> None:
    """What `load_dataset` leaves after a download."""
    features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=["no", "yes"]))
    folder.mkdir(parents=True)
    splits = datasets.SplitDict(dataset_name="questions")
    for name, texts, labels in (("train", ["x", "y"], [1, 0]), ("test", ["z"], [1])):
        part = datasets.Dataset.from_dict({"text": texts, "label": labels}, features=features)
        with datasets.arrow_writer.ArrowWriter(
            path=str(folder / f"questions-{name}.arrow"), features=features
        ) as writer:
            writer.write_table(part.data.table)
            writer.finalize()
        splits.add(datasets.SplitInfo(name=name, num_examples=len(texts), dataset_name="questions"))
    info = datasets.DatasetInfo(
        features=features, splits=splits, builder_name="parquet", dataset_name="questions", config_name="default",
        version="0.0.0",
    )  # fmt: skip
    info.write_to_directory(str(folder))


def test_several_splits_in_a_folder_are_named(tmp_path: Path) -> None:
    both = datasets.DatasetDict(train=datasets.Dataset.from_list(RECORDS), test=datasets.Dataset.from_list(RECORDS))
    both.save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(DataError, match=r"several splits: name one, .*saved/train or .*saved/test"):
        Text(train=str(tmp_path / "saved")).load()
    assert len(Text(train=str(tmp_path / "saved" / "train")).load().train) == 2


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("rows.csv.gz", gzip.compress(CSV.encode())[:-9], "cannot be read"),
        ("rows.csv.gz", b"text,label", "cannot be read"),
        ("rows.parquet", b"PAR1 and no more", "cannot be read"),
        ("rows.csv", 'text,label\n"x,a\n', "cannot be read: line 2"),
        ("rows.csv", "text,label\nx,a\ny,b,c\n", r"row 2 \(line 3\): .* 3 for 2"),
        ("rows.csv", "text,text\nx,a\n", "two columns have the name 'text'"),
        ("rows.jsonl", '{"text":"x","label":"a"}\n\n[1]\n', "line 3: Expected `object`"),
        ("rows.jsonl", '{"text":"x","label":"a"}\n{"text":"y","label":"a","label": "b"}\n', "line 2: .* 'label' twice"),
        ("rows.json", '[{"text":"x","label":"a"},{"text":"y","label":"a","label":"b"}]', "the key 'label' twice"),
        ("rows.jsonl", '{"text":"x","label":"a"}\n{"text":["y"],"label":"b"}\n', "row 2: 'text' is list"),
        ("rows.jsonl", '{"text":"x","label":"a"}\n{"label":"b"}\n', "row 2: 'text' is empty"),
        ("rows.csv", "text,label\nx,a\n\x00\x07,b\n", "row 2: 'text' is empty"),
        ("rows.csv", "text,label,split\nx,a,train\ny,b,dev\n", "row 2: .* not 'dev'"),
        ("rows.csv", CSV.replace("z,a,", "z,c,"), "row 3: the label 'c' is in the test rows only"),
        ("rows.csv", "text,label,split\nx,a,train\nX ,a,test\n", "no rows to train with"),
    ],
)
def test_what_is_broken_is_refused_with_its_place(tmp_path: Path, name: str, content: str | bytes, says: str) -> None:
    with pytest.raises(DataError, match=says):
        load(tmp_path, content, name)


def test_other_encodings_are_read_if_named_and_refused_with_their_place_if_not(tmp_path: Path) -> None:
    text = CSV.replace("y,", "caf\xe9,")
    wanted = load(tmp_path, text).fingerprint
    assert load(tmp_path, text.encode("utf-8-sig")).fingerprint == wanted
    assert load(tmp_path, text.encode("utf-16"), encoding="utf-16").fingerprint == wanted
    assert load(tmp_path, text.encode("latin-1"), encoding="latin-1").fingerprint == wanted
    with pytest.raises(DataError, match="line 1, byte 1: this is UTF-16"):
        load(tmp_path, text.encode("utf-16"))
    with pytest.raises(DataError, match="line 3, byte 31 of the file: 0xe9 is not UTF-8"):
        load(tmp_path, text.encode("latin-1"))
    with pytest.raises(DataError, match="no encoding 'klingon'"):
        load(tmp_path, text, encoding="klingon")


def test_texts_are_composed_and_rid_of_control_characters(tmp_path: Path) -> None:
    rows = load(tmp_path, CSV.replace("x,", "cafe\u0301\x00 \ttwo,"))
    assert [*rows.train.inputs["text"]] == ["caf\xe9 \ttwo", "y"]
    assert "1 texts were composed (NFC) or rid of control characters" in rows.notes


def test_a_training_row_is_learnt_from_once_and_test_rows_stay_as_they_are(tmp_path: Path) -> None:
    rows = load(tmp_path, CSV + "x,a,train\nX  ,a,train\nz,a,test\n")
    assert ([*rows.train.inputs["text"]], [*rows.test.inputs["text"]]) == (["x", "y"], ["z", "z"])
    assert "2 training rows repeat another and were left out" in rows.notes
    assert "1 test rows repeat another and were kept" in rows.notes


@pytest.mark.parametrize(("conflicts", "left"), [("keep", ["x", "y", "w", "X"]), ("drop", ["y", "w"])])
def test_a_text_of_two_labels_is_said_with_its_rows_and_kept_or_not(
    tmp_path: Path, conflicts: str, left: list[str]
) -> None:
    rows = load(tmp_path, CSV + "w,a,train\nX,b,train\n", conflicts=conflicts)
    assert [*rows.train.inputs["text"]] == left
    assert any("1 training texts have more than one label" in it and "rows 1 and 5)" in it for it in rows.notes)


def test_texts_of_two_labels_can_be_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows 1 and 4\); correct them, or set data\.conflicts"):
        load(tmp_path, CSV + "x,b,train\n", conflicts="refuse")


def test_what_the_test_part_gives_away_is_left_out_or_said(tmp_path: Path) -> None:
    rows = load(tmp_path, CSV + " Z ,a,train\nz!,a,train\n")
    assert [*rows.train.inputs["text"]] == ["x", "y", "z!"]
    assert "1 training rows are also in the test part and were left out" in rows.notes
    assert "1 training rows differ from a test row in punctuation only" in rows.notes


def test_the_balance_of_the_labels_and_broken_texts_are_said(tmp_path: Path) -> None:
    rows = load(tmp_path, CSV + "w\ufffd,a,train\n")
    assert "2 labels of 1 (b) to 2 (a) training rows each" in rows.notes
    assert "2 labels of 1 training rows each" in plain_rows(tmp_path).notes
    assert "1 labels have no row to test with" in rows.notes
    assert "1 texts hold U+FFFD: they were decoded wrongly before they came here" in rows.notes


@pytest.mark.parametrize(("text", "same"), [(" A\tb\n", "a b"), ("STRASSE", "strasse"), ("\xdf", "ss")])
def test_texts_are_the_same_but_for_case_and_white_space(text: str, same: str) -> None:
    assert cleaning.same(text) == same
