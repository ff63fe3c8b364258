"""Records in Arrow's formats: Parquet files, and Hugging Face's data sets that are on this disk."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from training.errors import DataError

HUB = "hf:"
"""Begins the name of a data set: `hf:NAME`, `hf:NAME:CONFIG#SPLIT`."""

Record = dict[str, Any]

_ROWS_AT_ONCE = 1024


def parquet(path: Path) -> Iterator[Record]:
    """Every row of the file, some at a time. Raises DataError."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(_ROWS_AT_ONCE):
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def saved(folder: Path) -> Iterator[Record]:
    """Every row of what `save_to_disk` has left there. Raises DataError."""
    import datasets

    try:
        found = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{folder} cannot be read as a data set of save_to_disk: {_first_line(error)}") from error
    if isinstance(found, datasets.DatasetDict):
        raise DataError(f"{folder} has several splits: name one, {' or '.join(str(folder / it) for it in found)}")
    return _records(found)


def hub(reference: str) -> Iterator[Record]:
    """Every row of the data set of that name, as it lies in Hugging Face's cache; the command lets nothing be
    downloaded. Raises DataError."""
    import datasets

    name, _, split = reference.removeprefix(HUB).partition("#")
    name, _, config = name.partition(":")
    logging.getLogger("datasets").setLevel(logging.ERROR)  # that it looks in its cache is what we want
    try:
        found = datasets.load_dataset(name, config or None)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{reference} is not on this disk, or cannot be read: {_first_line(error)}; download it first, with "
            f"datasets.load_dataset({name!r})"
        ) from error
    if (not split and len(found) > 1) or (split and split not in found):
        raise DataError(f"{reference}: name one of its splits, {' or '.join(f'{HUB}{name}#{it}' for it in found)}")
    return _records(found[split] if split else next(iter(found.values())))


def _records(found: Any) -> Iterator[Record]:
    """Rows, which Arrow maps from disk; labels as they are called and not as they are counted."""
    import datasets

    names = {column: it for column, it in found.features.items() if isinstance(it, datasets.ClassLabel)}
    # A label of -1 is one that nobody knows, as in the test parts of competitions.
    for record in found:
        yield record | {
            column: it.int2str(record[column]) if record[column] is not None and record[column] >= 0 else None
            for column, it in names.items()
        }


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
