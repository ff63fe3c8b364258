"""Texts that lie on disk: they are what an array of them would be, and take no memory."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from training.contract import Array, Classes, Examples, Rows, strings
from training.data.spool import spooled
from training.models.encoder import TextModel
from training.spec import Recipe
from training.spec.data import Text

TEXTS = ["one", "zwei\n", "三", "\U0001f4e6", "a\ud800b", "one", "last"]


def test_spooled_texts_are_what_an_array_of_them_would_be() -> None:
    texts, array = spooled(TEXTS), strings(TEXTS)
    assert (len(texts), texts.shape, texts.dtype) == (7, array.shape, array.dtype)
    assert [*texts] == texts.tolist() == TEXTS
    assert (texts[2], texts[np.int64(-1)]) == ("三", "last")
    for chosen in (np.array([4, 0, 0]), np.array([], np.int64), slice(2, 5), array == "one"):
        assert texts[chosen].tolist() == array[chosen].tolist()
        assert texts[chosen][::-1].tolist() == array[chosen][::-1].tolist()
    np.testing.assert_array_equal(np.asarray(texts), array)
    np.testing.assert_array_equal(np.concatenate([texts[:2], texts[5:]]), ["one", "zwei\n", "one", "last"])


def test_no_texts_are_none() -> None:
    texts = spooled([])
    assert (len(texts), [*texts], np.asarray(texts).tolist()) == (0, [], [])


@pytest.mark.parametrize("count", [0, 1, 15, 16, 70_000])
def test_the_fingerprint_is_that_of_the_same_rows_in_memory(count: int) -> None:
    texts = [f"text {at}" for at in range(count)]
    targets = Classes(np.zeros(count, np.int64), ("a", "b"))
    one, other = (Examples({"text": it}, targets) for it in (spooled(texts).column(), strings(texts)))
    assert Rows(one, one).fingerprint == Rows(other, other).fingerprint


def test_nothing_is_left_on_disk_when_reading_ends_or_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))

    def broken() -> Iterator[str]:
        yield "one"
        raise ValueError("row 2")

    kept = spooled(TEXTS)
    with pytest.raises(ValueError, match="row 2"):
        spooled(broken())
    assert ([*tmp_path.iterdir()], [*kept]) == ([], TEXTS)


def test_a_set_takes_less_memory_than_its_texts(tmp_path: Path) -> None:
    rows, width = 20_000, 2_000
    file = tmp_path / "rows.csv"
    with file.open("w") as opened:
        opened.write("text,label\n")
        opened.writelines(f"{at} {'where is my parcel ' * (width // 19)},{'ab'[at % 2]}\n" for at in range(rows))
    program = (
        "import resource, sys, training.data.text\n"
        "from training.spec.data import Text\n"
        "def most_kb():\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = most_kb()\n"
        "rows = Text(train=sys.argv[1]).load()\n"
        "print(len(rows.train) + len(rows.test), most_kb() - before)\n"
    )
    asked = [sys.executable, "-c", program, str(file)]
    done = subprocess.run(asked, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    found, taken_kb = map(int, done.stdout.split())
    assert found == rows
    assert taken_kb < rows * width / 1024 / 4


def test_rows_of_a_part_are_in_the_order_of_their_file(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("text,label\n" + "".join(f"text {at},{'ab'[at % 2]}\n" for at in range(500)))
    rows = Text(train=str(file)).load()
    for part in (rows.train, rows.test):
        numbers = [int(it.split()[1]) for it in part.inputs["text"]]
        assert numbers == sorted(numbers)
        assert isinstance(part.targets, Classes)
        assert part.targets.index.tolist() == [it % 2 for it in numbers]


def test_tokens_of_many_texts_are_counted_some_at_a_time(
    classify: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = classify()
    model = recipe.model.build(recipe.data.load())
    assert isinstance(model, TextModel)
    encoded: list[int] = []
    encode = TextModel._encode

    def counted(model: TextModel, texts: Array) -> list[list[int]]:
        encoded.append(len(texts))
        return encode(model, texts)

    monkeypatch.setattr(TextModel, "_encode", counted)
    texts = spooled("help " * (at % 7 + 1) for at in range(3000))
    assert model.costs({"text": texts.column()}).tolist() == [at % 7 + 3 for at in range(3000)]
    assert (sum(encoded), max(encoded)) == (3000, 1024)
