"""Images with one label each: IDX files, folders of PNG and JPEG files, scikit-learn's digits.

Their pixels lie on disk from then on: an IDX file's where they are, all others' in a file without a name.
"""

from __future__ import annotations

import gzip
import hashlib
import mmap
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from msgspec import Struct

from training.contract import Array, Examples, Rows, strings
from training.data import cleaning, labels, split
from training.data.pixels import Pixels
from training.data.spool import mapped, unnamed
from training.errors import DataError
from training.spec.data import Images

_SUFFIXES = frozenset({".png", ".jpg", ".jpeg"})


class Read(Struct, frozen=True):
    """One part's images, and the label of each."""

    pixels: Pixels
    labels: Array

    def take(self, chosen: Array) -> Read:
        return Read(self.pixels[chosen], self.labels[chosen])


def load(spec: Images) -> Rows:
    """Read what the recipe names. An image that is in both parts stays in the test part only."""
    train = _read(spec.train, spec)
    notes: tuple[str, ...] = ()
    if spec.test is not None:
        test = _read(spec.test, spec)
        one, other = (it.pixels.shape[1:] for it in (train, test))
        if one != other:
            raise DataError(f"{spec.train} has images of {_size(one)}, {spec.test} of {_size(other)}; set data.side_px")
        leaked = cleaning.among(_hashes(train), _hashes(test))
        if leaked.any():
            if leaked.all():
                raise DataError(f"there are no images to train with: each of {spec.train} is also in the test part")
            notes = (f"{leaked.sum()} training images are also in the test part and were left out",)
        train = train.take(np.flatnonzero(~leaked))
    else:
        keys = (hashlib.sha256(it.tobytes()).hexdigest() for it in train.pixels)
        tested = np.fromiter((split.held_out(it, spec.test_share) for it in keys), np.bool_)
        train, test = (train.take(np.flatnonzero(it)) for it in (~tested, tested))
    if not len(test.labels):
        raise DataError("there are no images to test with: set data.test, or give data.train more of them")
    learnt, held = labels.classes(train.labels, test.labels)
    return Rows(
        Examples({"image": train.pixels.column()}, learnt), Examples({"image": test.pixels.column()}, held), notes
    )


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


def _hashes(read: Read) -> Array:
    return np.fromiter((cleaning.hashed(it.tobytes()) for it in read.pixels), np.uint64)


def _size(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))


# ---- IDX ---------------------------------------------------------------------------------------------------


def _idx(images: Path, names: Path) -> Read:
    """The format of MNIST: a zero, the type and the number of axes, their sizes big-endian, and the bytes."""
    pixels, found = _array(images, axes=3), _array(names, axes=1)
    if len(pixels) != len(found):
        raise DataError(f"{images} has {len(pixels)} images, {names} {len(found)} labels")
    return _whole(pixels, strings([str(it) for it in range(256)])[found])


def _array(file: Path, *, axes: int) -> Array:
    content = _content(file)
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


def _content(file: Path) -> mmap.mmap | bytes:
    """Mapped where it lies if it is not compressed."""
    if file.suffix == ".gz":
        with unnamed() as plain:
            plain.writelines(_unpacked(file))
            return mapped(plain)
    try:
        with file.open("rb") as opened:
            return mapped(opened)
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error}") from error


def _unpacked(file: Path) -> Iterator[bytes]:
    try:
        with gzip.open(file) as packed:
            while piece := packed.read(1 << 20):
                yield piece
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file} cannot be read: {error}") from error


# ---- files -------------------------------------------------------------------------------------------------


def _folder(folder: Path, spec: Images) -> Read:
    names: list[str] = []
    with unnamed() as spool:
        for label, file in _files(folder):
            image = _image(file, spec)
            if not names:
                first, shape = file.name, image.shape
            if image.shape != shape:
                raise DataError(
                    f"{file} is of {_size(image.shape)}, {first} of {_size(shape)}: set data.side_px, "
                    "which resizes all of them"
                )
            spool.write(image.tobytes())
            names.append(label)
        if not names:
            raise DataError(f"{folder} has no PNG or JPEG file in a folder for its label")
        return _whole(np.frombuffer(mapped(spool), np.uint8).reshape(len(names), *shape), strings(names))


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Label and file, in order."""
    for labelled in sorted(it for it in folder.iterdir() if it.is_dir()):
        label = labelled.name
        yield from ((label, it) for it in sorted(labelled.iterdir()) if it.suffix.lower() in _SUFFIXES)


def _image(file: Path, spec: Images) -> Array:
    from PIL import Image

    try:
        with Image.open(file, formats=("PNG", "JPEG")) as opened:
            # Of grey with 16 bits Pillow would keep what is below 256 and make all else white.
            plain = Image.fromarray(np.uint8(np.asarray(opened) >> 8)) if opened.mode.startswith("I") else opened
            found = plain.convert("RGB" if spec.colour else "L")
        if spec.side_px is not None:
            found = found.resize((spec.side_px, spec.side_px), Image.Resampling.BILINEAR)
    except (OSError, SyntaxError, ValueError, zlib.error, Image.DecompressionBombError) as error:
        raise DataError(f"{file} cannot be read as an image: {error}") from error
    return np.asarray(found, np.uint8)


def _digits() -> Read:
    """1,797 of 8×8, with 17 shades."""
    from sklearn.datasets import load_digits

    found = load_digits()
    pixels = (found.images * (255 / 16)).round().astype(np.uint8)
    return _whole(pixels, strings([str(it) for it in found.target.tolist()]))


def _whole(pixels: Array, names: Array) -> Read:
    return Read(Pixels(pixels, np.arange(len(pixels))), names)
