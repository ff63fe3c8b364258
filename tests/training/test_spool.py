"""What lies on disk, texts, files, structs, images: it is what an array of it would be, and takes no memory; and what
tables and ratings take."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.sounds import pcm
from tests.training.test_images import idx
from training import contract
from training.contract import Answers, Array, Classes, Examples, Preferred, Rows, strings
from training.data import tables
from training.data.categories import Named
from training.data.pixels import Pixels
from training.data.spool import Stored, spooled, spooled_bytes
from training.llm.conversation import Message
from training.llm.packing import pack
from training.llm.render import Rendered
from training.models import cnn
from training.models.encoder import TextModel
from training.spec import Recipe
from training.spec.data import Audio, Images, Ratings, Table, Text
from training.spec.llm import Conversations, Preferences
from training.spec.models import Cnn

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


def test_spooled_files_are_bytes() -> None:
    contents = [b"RIFF", b"", b"\xff\n"]
    spooled = spooled_bytes(contents)
    assert ([*spooled], spooled[-1], spooled[1:].tolist()) == (contents, b"\xff\n", contents[1:])
    np.testing.assert_array_equal(np.asarray(spooled), np.array(contents, object))


@pytest.mark.parametrize("shape", [(7, 4, 5), (7, 4, 5, 3)], ids=["grey", "colours"])
def test_chosen_pixels_are_what_an_array_of_them_would_be(shape: tuple[int, ...]) -> None:
    whole = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    pixels = Pixels(whole, np.arange(7))
    assert (len(pixels), pixels.shape, pixels.dtype) == (7, whole.shape, whole.dtype)
    np.testing.assert_array_equal([*pixels], whole)
    for chosen in (np.array([4, 0, 0]), np.array([], np.int64), slice(2, 5), 3, np.int64(-1)):
        np.testing.assert_array_equal(np.asarray(pixels[chosen]), whole[chosen])
    np.testing.assert_array_equal(np.asarray(pixels[::-1][np.array([0, 2])]), whole[[6, 4]])
    np.testing.assert_array_equal(np.concatenate([pixels[:2], pixels[5:]]), whole[[0, 1, 5, 6]])


def test_targets_may_lie_on_disk_as_inputs_do() -> None:
    one, other = (Preferred(make(TEXTS), make(TEXTS[::-1])) for make in (lambda it: spooled(it).column(), strings))
    chosen = np.array([4, 0])
    for found, wanted in ((one, other), (one.take(chosen), other.take(chosen)), (one.joined(one), other.joined(other))):
        assert len(found) == len(wanted)
        assert (found.chosen.tolist(), found.rejected.tolist()) == (wanted.chosen.tolist(), wanted.rejected.tolist())
    texts = TEXTS[:4]
    whole, spool = (Examples({}, Answers(it)) for it in (strings(texts), spooled(texts).column()))
    assert Rows(whole, whole).fingerprint == Rows(spool, spool).fingerprint


@pytest.mark.parametrize("count", [0, 1, 5])
def test_stored_structs_are_what_a_list_of_them_would_be(count: int) -> None:
    messages = [Message("user", text) for text in TEXTS if text != "a\ud800b"][:count]
    stored = Stored(iter(messages), Message)
    assert (len(stored), [*stored]) == (count, messages)
    assert [stored[at] for at in reversed(range(count))] == messages[::-1]


def test_no_texts_are_none() -> None:
    texts = spooled([])
    assert (len(texts), [*texts], np.asarray(texts).tolist()) == (0, [], [])


@pytest.mark.parametrize("count", [0, 1, 15, 16, 70_000])
def test_the_fingerprint_is_that_of_the_same_rows_in_memory(count: int) -> None:
    texts = [f"text {at}" for at in range(count)]
    targets = Classes(np.zeros(count, np.int64), ("a", "b"))
    one, other = (Examples({"text": it}, targets) for it in (spooled(texts).column(), strings(texts)))
    assert Rows(one, one).fingerprint == Rows(other, other).fingerprint


def test_the_fingerprint_of_images_is_that_of_the_same_pixels_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = np.random.default_rng(0).integers(0, 256, (50, 6, 6), np.uint8)
    targets = Classes(np.zeros(50, np.int64), ("a", "b"))
    known = Examples({"image": whole}, targets)
    wanted = Rows(known, known).fingerprint
    monkeypatch.setattr(contract, "_PIECE_BYTES", 200)
    mapped = Examples({"image": Pixels(whole, np.arange(50)).column()}, targets)
    assert Rows(mapped, mapped).fingerprint == wanted


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


def most_bytes(load: Callable[[], object]) -> int:
    """That numpy and Python had of memory at once, beyond what they had before."""
    load()  # once, for what is imported on the way
    tracemalloc.start()
    try:
        load()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.fixture
def whole() -> Array:
    """Images of 32 MB that differ and are soon packed."""
    pixels = np.zeros((8000, 64, 64), np.uint8)
    pixels[:, :8, 0] = np.random.default_rng(0).integers(0, 256, (8000, 8), np.uint8)
    return pixels


@pytest.mark.parametrize("packed", [True, False], ids=["gzip", "plain"])
def test_images_are_read_measured_and_scaled_in_less_memory_than_they_fill(
    tmp_path: Path, whole: Array, packed: bool
) -> None:
    spec = Images(train=idx(tmp_path, "train", whole, np.arange(8000, dtype=np.uint8) % 2, packed=packed))

    def load() -> None:
        rows = spec.load()
        assert len(rows.train) + len(rows.test) == len(whole)
        assert rows.fingerprint
        cnn.build(Cnn(channels=(), pool_after=(), dense=()), rows)

    assert most_bytes(load) < whole.nbytes / 2


def test_pictures_are_read_in_less_memory_than_they_fill(tmp_path: Path) -> None:
    for at in range(48):
        (tmp_path / "ab"[at % 2]).mkdir(exist_ok=True)
        Image.new("RGB", (256, 256), (at, 2 * at, 3 * at)).save(tmp_path / "ab"[at % 2] / f"{at}.png")
    spec = Images(train=str(tmp_path), colour=True)
    assert most_bytes(spec.load) < 48 * 256 * 256 * 3 / 4


def test_sounds_are_read_in_less_memory_than_they_fill(tmp_path: Path) -> None:
    for at in range(64):
        (tmp_path / "ab"[at % 2]).mkdir(exist_ok=True)
        (tmp_path / "ab"[at % 2] / f"{at}.wav").write_bytes(pcm([at] * 50_000, rate_hz=4000))
    spec = Audio(train=str(tmp_path))
    assert most_bytes(spec.load) < 64 * 100_000 / 4


def test_a_table_is_read_in_less_memory_than_its_columns_fill(tmp_path: Path) -> None:
    rows, numbers, categories = 2000, 60, 40
    chance = np.random.default_rng(0)
    names = [f"column {at}" for at in range(numbers + categories)]
    with (tmp_path / "rows.csv").open("w") as file:
        file.write(",".join([*names, "label"]) + "\n")
        for values in chance.normal(size=(rows, numbers)).tolist():
            words = [f"a city of {it}" for it in chance.integers(0, 9, categories).tolist()]
            file.write(",".join([*map(str, values), *words, "yes" if values[0] > 0 else "no"]) + "\n")
    spec = Table(train=str(tmp_path / "rows.csv"))

    def load() -> None:
        found = spec.load()
        assert len(found.train) + len(found.test) == rows
        assert found.fingerprint

    assert most_bytes(load) < rows * 4 * (numbers + categories) / 2


def test_named_values_are_what_an_array_of_them_would_be() -> None:
    places = np.array([2, 0, 0, 1, 2], np.int32)
    named, whole = Named(["a", "", "三"], places), strings(["三", "a", "a", "", "三"])
    assert (len(named), named.shape, named.dtype, [*named]) == (5, whole.shape, whole.dtype, whole.tolist())
    for chosen in (np.array([4, 0, 0]), np.array([], np.int64), slice(2, 5), whole == "a"):
        assert named[chosen].tolist() == np.asarray(named[chosen]).tolist() == whole[chosen].tolist()
    assert (named[3], named[np.int64(-1)]) == ("", "三")
    np.testing.assert_array_equal(np.concatenate([named[:2], named[4:]]), ["三", "a", "三"])


def test_a_rating_is_read_in_a_few_times_what_its_numbers_take(tmp_path: Path) -> None:
    rows = 10_000
    lines = (f"{at * 7919 % 400},{at % 300},{at % 5},{at}\n" for at in range(rows))
    (tmp_path / "ratings.csv").write_text("user,item,rating,timestamp\n" + "".join(lines))
    spec = Ratings(train=str(tmp_path / "ratings.csv"))
    assert most_bytes(spec.load) < 4 * rows * (8 + 8 + 4 + 8)


SAID = "where is my parcel " * 100


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (Conversations, {"prompt": SAID, "answer": "yes"}),
        (Preferences, {"prompt": "where", "chosen": f"yes {SAID}", "rejected": "no"}),
    ],
)
def test_conversations_are_read_in_less_memory_than_they_fill(
    tmp_path: Path, spec: type[Conversations], said: dict[str, str]
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(said | {"prompt": f"{at} {said['prompt']}"}) for at in range(3000)))
    assert most_bytes(spec(train=str(file)).load) < 3000 * len(SAID) / 4


def test_lines_of_packed_rows_take_less_memory_than_their_tokens() -> None:
    ids = [50_000] * 500

    def load() -> None:
        assert len(pack((Rendered([*ids], [*ids]) for _ in range(2000)), tokens_max=512)) == 2000

    assert most_bytes(load) < 2000 * 500 * 8 / 4


class Record(dict[str, str]):
    """One that can be watched."""


@pytest.mark.parametrize("spec", [Text, Conversations, Preferences])
def test_a_file_is_gone_through_once_and_no_record_is_kept(
    spec: Callable[..., Text], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    def records(file: str, *_: object, **__: object) -> Iterator[tables.Record]:
        read.append(file)
        given: list[weakref.ref[Record]] = []
        for at in range(40):
            record = Record(prompt=f"where {at}", answer="yes", text=f"where {at}", label="ab"[at % 2])
            if spec is Preferences:
                record |= {"chosen": "yes", "rejected": "no"}
            given.append(weakref.ref(record))
            yield record
            assert sum(it() is not None for it in given) <= 2, "this one, and the one that is being read"

    monkeypatch.setattr(tables, "stream", records)
    rows = spec(train="a file", test_share=0.3).load()
    assert (len(rows.train) + len(rows.test), read) == (40, ["a file"])


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
