"""Images: how they are read, moved, learnt, made small and served."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from runtimes.artifact import Shelf, verify
from training import catalogue, contract
from training import recipe as recipes
from training.compression import static_int8
from training.contract import Classes, Examples, Graph, Rows
from training.errors import DataError, RecipeError
from training.evaluation.scoring import served
from training.export import export
from training.model import predict
from training.models import cnn, warp
from training.spec import Recipe
from training.spec.compression import StaticInt8
from training.spec.data import Images
from training.spec.models import Cnn, Warp

CHANCE = np.random.default_rng(0)


def idx(folder: Path, part: str, pixels: Any, index: Any, *, packed: bool = True) -> str:
    """A pair of files; the name of the images'."""
    end = ".gz" if packed else ""
    arrays = (("images-idx3", pixels), ("labels-idx1", index))
    for name, array in arrays:
        content = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
        (folder / f"{part}-{name}-ubyte{end}").write_bytes(gzip.compress(content) if packed else content)
    return str(folder / f"{part}-images-idx3-ubyte{end}")


def some(rows: int, side: int = 8) -> tuple[Any, Any]:
    """Bright above or below the middle, and which."""
    index = np.arange(rows, dtype=np.uint8) % 2
    pixels = CHANCE.integers(0, 60, (rows, side, side), np.uint8)
    for image, label in zip(pixels, index, strict=True):
        image[: side // 2] += np.uint8(150 * (1 - label))
        image[side // 2 :] += np.uint8(150 * label)
    return pixels, index


def pictures(folder: Path, rows: int = 12) -> Path:
    pixels, index = some(rows)
    for at, (image, label) in enumerate(zip(pixels, index, strict=True)):
        (folder / "ab"[label]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / "ab"[label] / f"{at:02}.png")
    return folder


# ---- how they are read -------------------------------------------------------------------------------------


def test_images_that_are_all_test_images_too_are_said_to_be(tmp_path: Path) -> None:
    file = idx(tmp_path, "train", *some(6))
    with pytest.raises(DataError, match=r"each of .*train-images-idx3-ubyte.gz is also in the test part"):
        Images(train=file, test=file).load()


@pytest.mark.parametrize("packed", [True, False])
def test_a_pair_of_idx_files_is_read_as_it_is(tmp_path: Path, packed: bool) -> None:
    pixels, index = some(10)
    train = idx(tmp_path, "train", pixels[:6], index[:6], packed=packed)
    rows = Images(train=train, test=idx(tmp_path, "t10k", pixels[6:], index[6:], packed=packed)).load()
    np.testing.assert_array_equal(rows.train.inputs["image"], pixels[:6])
    np.testing.assert_array_equal(rows.test.inputs["image"], pixels[6:])
    assert isinstance(rows.test.targets, Classes)
    assert (rows.test.targets.labels, rows.test.targets.index.tolist()) == (("0", "1"), index[6:].tolist())


def test_an_image_in_both_parts_is_in_the_test_part_only(tmp_path: Path) -> None:
    pixels, index = some(8)
    rows = Images(train=idx(tmp_path, "a", pixels, index), test=idx(tmp_path, "b", pixels[:2], index[:2])).load()
    assert (len(rows.train), len(rows.test)) == (6, 2)
    assert "2 training images" in rows.notes[0]


def test_a_folder_for_each_label_is_read_with_its_name(tmp_path: Path) -> None:
    rows = Images(train=str(pictures(tmp_path, 40)), test_share=0.5).load()
    assert rows.train.inputs["image"].shape[1:] == (8, 8)
    assert len(rows.both) == 40
    assert isinstance(rows.train.targets, Classes)
    assert rows.train.targets.labels == ("a", "b")


def test_pictures_of_any_size_become_squares_with_their_colours(tmp_path: Path) -> None:
    pictures(tmp_path)
    Image.fromarray(np.full((20, 30, 3), (255, 0, 0), np.uint8)).save(tmp_path / "a" / "red.jpg")
    with pytest.raises(DataError, match=r"red\.jpg is of 20×30.*data\.side_px"):
        Images(train=str(tmp_path)).load()
    whole = Images(train=str(tmp_path), side_px=6, colour=True).load().both.inputs["image"]
    assert whole.shape == (13, 6, 6, 3)
    red = whole[(whole[:, 0, 0, 0] > 200) & (whole[:, 0, 0, 1] < 50)]
    assert len(red) == 1


def test_scikit_learn_s_digits_need_no_file() -> None:
    rows = Images(train="sklearn:digits").load()
    assert rows.both.inputs["image"].shape[1:] == (8, 8)
    assert rows.both.inputs["image"].max() == 255
    assert 0.25 < len(rows.test) / len(rows.both) < 0.35


def broken(file: str, change: Any) -> None:
    path = Path(file)
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda it: it[:-5], "promises 6 rows of 64 bytes and ends in row 6"),
        (lambda it: it[:10], "no IDX file"),
        (lambda it: it + b"x", "ends in row 7"),
        (lambda it: b"\0\0\x0d" + it[3:], "no IDX file of bytes in 3 axes"),
        (lambda it: it[:4] + bytes(12), "is empty"),
    ],
)
def test_a_damaged_idx_file_is_named_with_its_row(tmp_path: Path, change: Any, says: str) -> None:
    file = idx(tmp_path, "train", *some(6), packed=False)
    broken(file, change)
    with pytest.raises(DataError, match=rf"train-images-idx3-ubyte .*{says}"):
        Images(train=file).load()


def test_what_is_not_gzipped_or_has_other_labels_is_named(tmp_path: Path) -> None:
    pixels, index = some(6)
    file = idx(tmp_path, "train", pixels, index[:5])
    with pytest.raises(DataError, match=r"6 images.*5 labels"):
        Images(train=file).load()
    broken(file, lambda it: it[:40])
    with pytest.raises(DataError, match=r"images-idx3-ubyte\.gz cannot be read"):
        Images(train=file).load()


@pytest.mark.parametrize("content", [b"", b"no picture", None], ids=["empty", "text", "cut off"])
def test_a_picture_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None) -> None:
    file = pictures(tmp_path) / "a" / "00.png"
    file.write_bytes(file.read_bytes()[:60] if content is None else content)
    with pytest.raises(DataError, match=r"a/00\.png cannot be read as an image"):
        Images(train=str(tmp_path)).load()


@pytest.mark.parametrize("colour", [False, True])
def test_pictures_of_16_bits_are_those_of_8_bits_made_finer(tmp_path: Path, colour: bool) -> None:
    image = np.arange(256, dtype=np.uint16).reshape(16, 16)
    for name, pixels in (("fine", image * 257), ("plain", image.astype(np.uint8))):
        for label in "ab":
            (tmp_path / name / label).mkdir(parents=True)
            for at in range(9):
                Image.fromarray(np.roll(pixels, at + 10 * ord(label))).save(tmp_path / name / label / f"{at}.png")
    fine, plain = (
        Images(train=str(tmp_path / name), test_share=0.5, colour=colour).load() for name in ("fine", "plain")
    )
    assert fine.fingerprint == plain.fingerprint


def test_the_fingerprint_follows_the_labels_too(tmp_path: Path) -> None:
    pixels, index = some(6)
    recipe = msgspec.convert(
        {"name": "x", "about": "", "gate": {}, "model": {"kind": "cnn"},
         "data": {"kind": "images", "train": idx(tmp_path, "train", pixels, index)}}, Recipe
    )  # fmt: skip
    before = catalogue.fingerprint(recipe)
    idx(tmp_path, "train", pixels, 1 - index)
    assert catalogue.fingerprint(recipe) != before


# ---- how they are moved ------------------------------------------------------------------------------------


def dot(row: int, column: int, side: int = 9) -> Any:
    image = np.zeros((1, side, side), np.uint8)
    image[0, row, column] = 200
    return image


def centre(image: Any) -> tuple[float, float]:
    rows, columns = np.indices(image.shape)
    return float((rows * image).sum() / image.sum()), float((columns * image).sum() / image.sum())


def test_an_image_that_is_not_moved_is_as_it_was() -> None:
    pixels, _ = some(3)
    np.testing.assert_allclose(warp.warped(Warp(), pixels, CHANCE), pixels, atol=1e-3)


@pytest.mark.parametrize(
    ("spec", "farthest"),
    [(Warp(shift_px=2), 2.1), (Warp(rotate_degrees=30), 1.6), (Warp(scale=0.3), 1.4), (Warp(shear=0.3), 1.0)],
    ids=str,
)
def test_each_movement_moves_within_its_bounds(spec: Warp, farthest: float) -> None:
    # A dot three pixels above and left of the middle.
    images = np.repeat(dot(2, 2), 50, 0)
    centres = np.array([centre(it) for it in warp.warped(spec, images, np.random.default_rng(1))])
    away = np.abs(centres - 2)
    assert away.max() > 0.3
    assert away.max() < farthest


def test_colours_move_together() -> None:
    images = np.repeat(dot(4, 4)[..., None], 3, 3) // np.array([1, 2, 4], np.uint8)
    moved = warp.warped(Warp(shift_px=2, rotate_degrees=20), images, CHANCE)
    assert moved.shape == images.shape
    np.testing.assert_allclose(moved[..., 0], 4 * moved[..., 2], atol=1e-3)


# ---- what is made of them ----------------------------------------------------------------------------------

PLAIN = Cnn(channels=(4, 8), pool_after=(1, 2), dense=(16,), norm=True, warp=Warp(shift_px=0.5))


def rows_of(pixels: Any, index: Any) -> Rows:
    part = Examples({"image": pixels}, Classes(index.astype(np.int64), ("up", "down")))
    return Rows(part, part)


@pytest.fixture
def model() -> cnn.ImageClassifier:
    torch.manual_seed(0)
    model = cnn.build(PLAIN, rows_of(*some(64)))
    for module in model.modules():  # as if it had learnt
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model


@pytest.mark.parametrize("shape", [(50, 8, 8), (50, 8, 8, 3)], ids=["grey", "colours"])
def test_pixels_are_scaled_as_all_of_them_are_spread(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.random.default_rng(0).integers(0, 200, shape, np.uint8)
    monkeypatch.setattr(contract, "_PIECE_BYTES", 1000)
    made = cnn.build(PLAIN, rows_of(pixels, np.arange(50) % 2))
    np.testing.assert_allclose(made.mean, pixels.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(made.std, pixels.std((0, 1, 2)), rtol=1e-6)
    flat = cnn.build(PLAIN, rows_of(np.full_like(pixels, 77), np.arange(50) % 2))
    assert set(flat.std.flatten().tolist()) == {1}


def operators(graph: Graph) -> list[str]:
    return [node.op_type for node in onnx.load_from_string(graph.content).graph.node]


def test_normalisation_is_folded_into_the_graph(model: cnn.ImageClassifier) -> None:
    assert "BatchNormalization" not in operators(export(model))


def test_int8_holds_the_weights_of_every_layer_and_stays_close(model: cnn.ImageClassifier, tmp_path: Path) -> None:
    pixels, index = some(64)
    small = static_int8.quantize(StaticInt8(rows=40), model, rows_of(pixels, index).train, seed=0)
    found = onnx.load_from_string(small.content)
    kept = {it.name: it.data_type for it in found.graph.initializer if len(it.dims) > 1}
    assert kept and set(kept.values()) == {onnx.TensorProto.INT8}
    assert operators(small).count("QuantizeLinear") >= 3
    assert not any("Dynamic" in it for it in operators(small))
    from tests.training.test_compression import session

    scores = session(small).run(["scores"], {"image": pixels})[0]
    np.testing.assert_allclose(scores, predict(model, {"image": pixels})["scores"], atol=0.05)


def test_percentiles_are_measured_with_batches_of_one_size(model: cnn.ImageClassifier) -> None:
    small = static_int8.quantize(StaticInt8(rows=70, ranges="percentile"), model, rows_of(*some(100)).train, seed=0)
    assert "QuantizeLinear" in operators(small)


def test_int8_needs_the_model_itself(model: cnn.ImageClassifier) -> None:
    with pytest.raises(RecipeError, match="the model itself"):
        static_int8.quantize(StaticInt8(), export(model), rows_of(*some(4)).train, seed=0)


@pytest.mark.parametrize(
    ("spec", "says"),
    [(Cnn(channels=(4,), pool_after=(2,)), "names convolution 2"), (Cnn((1,) * 4, (1, 2, 3, 4)), "nothing is left")],
    ids=["no such layer", "too small"],
)
def test_layers_that_do_not_fit_are_refused(spec: Cnn, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        cnn.build(spec, rows_of(*some(4)))


def test_a_run_ends_with_a_small_graph_that_takes_pixels(tmp_path: Path) -> None:
    pixels, index = some(240)
    data = {
        "kind": "images",
        "train": idx(tmp_path, "train", pixels[:200], index[:200]),
        "test": idx(tmp_path, "test", pixels[200:], index[200:]),
    }
    recipe = msgspec.convert(
        {
            "name": "halves",
            "about": "for tests",
            "data": data,
            "model": {
                "kind": "cnn",
                "channels": [4],
                "pool_after": [1],
                "dense": [256],
                "norm": True,
                "warp": {"shift_px": 0.5},
            },
            "trainer": {"kind": "gradient", "epochs": 3, "rate": 0.02},
            "compress": [{"kind": "int8-static", "rows": 64}],
            "floor": {"kind": "pixels"},
            "gate": {"accuracy_min": 0.95, "accuracy_drop_max": 0.05},
        },
        Recipe,
    )
    shelf = Shelf(tmp_path / "shelf")
    manifest = recipes.run(recipe, shelf, tmp_path / "runs")
    assert (manifest.task, manifest.labels) == ("classify", ("0", "1"))
    assert manifest.after["size_ratio"] < 0.6
    found = shelf.resolve("halves")
    verify(found)
    answers = served(found, {"image": pixels[200:]})
    assert answers["label"].tolist() == [str(it) for it in index[200:].tolist()]
