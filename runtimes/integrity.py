"""What may lie in an artifact's folder: plain files of types that cannot execute and cannot lead outside.

Rejected are links of either kind, devices and pipes; every type that is not known to be inert (pickles and
code among them); `auto_map` in any JSON, by which a loader would import code; ONNX tensors in other files, and
operators from libraries other than ONNX Runtime.
"""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

SUFFIXES = frozenset({".safetensors", ".onnx", ".json", ".jinja", ".txt", ".model"})

_FILES_MAX = 1000
_JSON_BYTES_MAX = 64 << 20

# An entry of ONNX `external_data` with the key "location", in every way protobuf allows to write it.
_EXTERNAL_DATA = re.compile(rb"(?:\n|\x8a\x80*\x00)(?:\x08|\x88\x80*\x00)location")


class ShelfFault(Exception):
    """Something is wrong with an artifact. The message names it and says what to do."""


class Rejected(ShelfFault):
    """The artifact must not be loaded: changed, incomplete, or able to execute or to reach outside."""


def files(folder: Path) -> Iterator[Path]:
    """Every file below `folder`; whatever is not simply a file or a folder is rejected without opening it."""
    count = 0
    pending = [folder]
    while pending:
        for path in sorted(pending.pop().iterdir()):
            count += 1
            if count > _FILES_MAX:
                raise Rejected(f"{folder} holds more than {_FILES_MAX} files")
            status = path.lstat()
            if stat.S_ISDIR(status.st_mode):
                pending.append(path)
            elif not stat.S_ISREG(status.st_mode):
                raise Rejected(f"{path} is a link or a special file; an artifact holds plain files only")
            elif status.st_nlink > 1:
                raise Rejected(f"{path} is hard-linked, so it could be changed from elsewhere; copy it instead")
            else:
                yield path


def inspect(file: Path) -> None:
    """Reject what can execute or lead outside, by type and by content."""
    suffix = file.suffix.lower()
    if suffix not in SUFFIXES:
        allowed = " ".join(sorted(SUFFIXES))
        raise Rejected(f"{file} is of a type that could execute code; an artifact may hold {allowed}")
    if suffix == ".json":
        _inspect_json(file)
    elif suffix == ".onnx":
        _inspect_onnx(file)


def digest(file: Path) -> str:
    """`sha256:` and 64 hex digits."""
    with file.open("rb") as opened:
        return "sha256:" + hashlib.file_digest(opened, "sha256").hexdigest()


def read(file: Path, *, bytes_max: int) -> bytes:
    """A small plain file's content; a link is not followed and a pipe not waited for."""
    try:
        opened = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise Rejected(f"{file} cannot be read ({error.strerror})") from error
    with os.fdopen(opened, "rb") as stream:
        if not stat.S_ISREG(os.fstat(opened).st_mode):
            raise Rejected(f"{file} is not a plain file")
        content = stream.read(bytes_max + 1)
    if len(content) > bytes_max:
        raise Rejected(f"{file} is larger than {bytes_max} bytes")
    return content


@contextmanager
def writing(file: Path) -> Iterator[None]:
    """Let a disk that fails meanwhile be known by this file: a write that fails names none, and a copy its source."""
    try:
        yield
    except OSError as error:
        if error.filename is None or (error.filename2 is not None and error.errno != errno.EIO):
            error.filename, error.filename2 = str(file), None
        raise


def _inspect_json(file: Path) -> None:
    try:
        value = msgspec.json.decode(read(file, bytes_max=_JSON_BYTES_MAX))
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise Rejected(f"{file} is not JSON ({error})") from error
    if _has_key(value, "auto_map"):
        raise Rejected(f"{file} has an `auto_map`, by which a loader would import code; remove it")


def _has_key(value: Any, key: str) -> bool:
    pending = [value]
    while pending:
        match pending.pop():
            case dict() as table:
                if key in table:
                    return True
                pending.extend(table.values())
            case list() as items:
                pending.extend(items)
    return False


def _inspect_onnx(file: Path) -> None:
    if not file.stat().st_size:
        raise Rejected(f"{file} is empty")
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if _EXTERNAL_DATA.search(content):
            raise Rejected(f"{file} keeps tensors in other files (external_data); save it as one file")
        for domain in _domains(content):
            if domain not in DOMAINS:
                raise Rejected(
                    f"{file} has operators of the domain {domain!r}, which come from a library of their own; export it "
                    "with ONNX's own operators"
                )


#: Where ONNX Runtime's own operators are from.
DOMAINS = frozenset(
    {
        "", "ai.onnx", "ai.onnx.ml", "ai.onnx.preview", "ai.onnx.preview.training", "ai.onnx.training", "com.microsoft",
        "com.microsoft.experimental", "com.microsoft.nchwc", "com.ms.internal.nhwc", "org.pytorch.aten",
    }
)  # fmt: skip

_OPSET_IMPORT = 8
_LOCAL_FUNCTION = 25


def _domains(model: mmap.mmap) -> set[str]:
    """The domains that a ModelProto names, without those whose functions it holds itself. None of what is no protobuf:
    ONNX Runtime rejects that."""
    named: set[str] = set()
    own: set[str] = set()
    try:
        for number, start, stop in _fields(model, 0, len(model)):
            if number == _OPSET_IMPORT:
                named.add(_text(model, start, stop, field=1))
            elif number == _LOCAL_FUNCTION:
                own.add(_text(model, start, stop, field=10))
    except (ValueError, IndexError):
        return set()
    return named - own


def _text(model: mmap.mmap, start: int, stop: int, *, field: int) -> str:
    """The last such field of a message, as protobuf reads it; empty without one."""
    found = [model[first:last] for number, first, last in _fields(model, start, stop) if number == field]
    return found[-1].decode() if found else ""


def _fields(model: mmap.mmap, at: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Number, start and end of each field of a message that is not a number. ValueError or IndexError if it is none."""
    while at < stop:
        key, at = _varint(model, at)
        match key & 7:
            case 0:
                _, at = _varint(model, at)
            case 1:
                at += 8
            case 2:
                length, at = _varint(model, at)
                if at + length > stop:
                    raise ValueError("cut short")
                yield key >> 3, at, at + length
                at += length
            case 5:
                at += 4
            case _:
                raise ValueError("no such wire type")


def _varint(model: mmap.mmap, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = model[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise ValueError("no such number")
