"""Text files, gzipped or not; a byte that cannot be decoded is named by its place."""

from __future__ import annotations

import codecs
import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TextIO

from training.errors import DataError

UTF_8 = "utf-8"
_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def suffix(path: Path) -> str:
    """What kind of file it is, compressed or not: `.csv` of `rows.csv.gz`."""
    return Path(path.stem).suffix if path.suffix == ".gz" else path.suffix


@contextmanager
def opened(path: Path, encoding: str = UTF_8) -> Iterator[TextIO]:
    """Its characters, line ends as they are. Raises DataError, also for what is found while the block reads on."""
    known = "utf-8-sig" if encoding == UTF_8 else encoding  # a byte order mark is no character
    try:
        with _bytes(path) as raw, io.TextIOWrapper(raw, known, newline="") as text:
            yield text
    except LookupError:
        raise DataError(f"data.encoding: Python knows no encoding {encoding!r}") from None
    except UnicodeError as error:
        raise DataError(_undecodable(path, encoding)) from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _bytes(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def _undecodable(path: Path, encoding: str) -> str:
    """Where the first byte is that does not fit, and what may help."""
    with _bytes(path) as raw:
        start = raw.read(2)
    if encoding == UTF_8 and start in _UTF_16:
        return f"{path}, line 1, byte 1: this is UTF-16, not UTF-8: set data.encoding to 'utf-16'"
    with _bytes(path) as raw:
        before = 0
        for number, line in enumerate(raw, 1):
            try:
                line.decode(encoding)
            except UnicodeDecodeError as error:
                byte, at = line[error.start], before + error.start + 1
                return (
                    f"{path}, line {number}, byte {at} of the file: {byte:#04x} is not {encoding.upper()}; set "
                    "data.encoding to what it is ('latin-1', 'cp1252', 'gb18030'…)"
                )
            before += len(line)
    return f"{path} is not {encoding.upper()} to its end; set data.encoding to what it is"
