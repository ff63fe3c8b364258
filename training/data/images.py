"""Images with one label each: IDX files, folders of PNG and JPEG files, scikit-learn's digits."""

from __future__ import annotations

import gzip
import hashlib
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from msgspec import Struct

from training.contract import Array, Examples, Rows
from training.data import labels, split
from training.errors import DataError
from training.spec.data import Images

_SUFFIXES = frozenset({".png", ".jpg", ".jpeg"})


class Read(Struct, frozen=True):
    """One part's images, uint8 [n, height, width] or [n, height, width, 3], and the label of each."""

    pixels: Array
    labels: list[str]

    def take(self, chosen: Sequence[int]) -> Read:
        return Read(self.pixels[list(chosen)], [self.labels[at] for at in chosen])


def load(spec: Images) -> Rows:
    """Read what the recipe names. An image that is in both parts stays in the test part only."""
    train = _read(spec.train, spec)
    keys = _keys(train)
    if spec.test is not None:
        test = _read(spec.test, spec)
        if train.pixels.shape[1:] != test.pixels.shape[1:]:
            raise DataError(
                f"{spec.train} has images of {_size(train.pixels[0])}, {spec.test} of {_size(test.pixels[0])}; "
                "set data.side_px"
            )
        seen = set(_keys(test))
        kept = [at for at, key in enumerate(keys) if key not in seen]
    else:
        kept = [at for at, key in enumerate(keys) if not split.held_out(key, spec.test_share)]
        test = train.take([at for at, key in enumerate(keys) if split.held_out(key, spec.test_share)])
    if not test.labels:
        raise DataError("there are no images to test with: set data.test, or give data.train more of them")
    leaked = len(keys) - len(kept) if spec.test is not None else 0
    train = train.take(kept)
    learnt, held = labels.classes(train.labels, test.labels)
    notes = (f"{leaked} training images are also in the test part and were left out",) if leaked else ()
    return Rows(Examples({"image": train.pixels}, learnt), Examples({"image": test.pixels}, held), notes)


def _read(source: str, spec: Images) -> Read:
    if source == "sklearn:digits":
        return _digits()
    names = Images.labels_of(source)
    if names is not None:
        return _idx(Path(source), Path(names))
    if Path(source).is_dir():
        return _folder(Path(source), spec)
    raise DataError(
        f"{source} holds no images: name a file `…images-idx3…`, a folder with one for each label, or sklearn:digits"
    )


def _keys(read: Read) -> list[str]:
    return [hashlib.sha256(image.tobytes()).hexdigest() for image in read.pixels]


def _size(image: Array) -> str:
    return "×".join(map(str, image.shape))


# ---- IDX ---------------------------------------------------------------------------------------------------


def _idx(images: Path, names: Path) -> Read:
    """The format of MNIST: a zero, the type and the number of axes, their sizes big-endian, and the bytes."""
    pixels, found = _array(images, axes=3), _array(names, axes=1)
    if len(pixels) != len(found):
        raise DataError(f"{images} has {len(pixels)} images, {names} {len(found)} labels")
    return Read(pixels, [str(it) for it in found.tolist()])


def _array(file: Path, *, axes: int) -> Array:
    try:
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file} cannot be read: {error}") from error
    head = 4 + 4 * axes
    if content[:4] != bytes((0, 0, 8, axes)) or len(content) < head:
        raise DataError(f"{file} is no IDX file of bytes in {axes} axes")
    sizes = np.frombuffer(content[4:head], ">u4").tolist()
    row = int(np.prod(sizes[1:], dtype=object))
    if not sizes[0] or not row:
        raise DataError(f"{file} is empty: its sizes are {sizes}")
    if len(content) - head != sizes[0] * row:
        raise DataError(
            f"{file} promises {sizes[0]} rows of {row} bytes and ends in row {(len(content) - head) // row + 1}"
        )
    return np.frombuffer(content, np.uint8, offset=head).reshape(sizes)


# ---- files -------------------------------------------------------------------------------------------------


def _folder(folder: Path, spec: Images) -> Read:
    files = sorted(it for it in folder.glob("*/*") if it.suffix.lower() in _SUFFIXES)
    if not files:
        raise DataError(f"{folder} has no PNG or JPEG file in a folder for its label")
    images = [_image(file, spec) for file in files]
    for file, image in zip(files, images, strict=True):
        if image.shape != images[0].shape:
            raise DataError(
                f"{file} is of {_size(image)}, {files[0].name} of {_size(images[0])}: set data.side_px, "
                "which resizes all of them"
            )
    return Read(np.stack(images), [file.parent.name for file in files])


def _image(file: Path, spec: Images) -> Array:
    from PIL import Image

    try:
        with Image.open(file, formats=("PNG", "JPEG")) as opened:
            found = opened.convert("RGB" if spec.colour else "L")
        if spec.side_px is not None:
            found = found.resize((spec.side_px, spec.side_px), Image.Resampling.BILINEAR)
    except (OSError, SyntaxError, ValueError, zlib.error, Image.DecompressionBombError) as error:
        raise DataError(f"{file} cannot be read as an image: {error}") from error
    return np.asarray(found, np.uint8)


def _digits() -> Read:
    """1,797 of 8×8, with 17 shades."""
    from sklearn.datasets import load_digits

    found = load_digits()
    return Read((found.images * (255 / 16)).round().astype(np.uint8), [str(it) for it in found.target.tolist()])
