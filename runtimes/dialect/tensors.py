"""Tensors of the Open Inference Protocol ⇄ numpy arrays."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from runtimes.contract import Datatype, Invalid
from runtimes.dialect.elements import WIDTHS, Part, count, joined, require_datatype, require_size, too_large, values

if TYPE_CHECKING:
    from runtimes.contract import Array

DTYPES: Mapping[str, np.dtype[Any]] = MappingProxyType(
    {
        "BOOL": np.dtype(np.bool_),
        **{f"UINT{8 * width}": np.dtype(f"<u{width}") for width in (1, 2, 4, 8)},
        **{f"INT{8 * width}": np.dtype(f"<i{width}") for width in (1, 2, 4, 8)},
        **{f"FP{8 * width}": np.dtype(f"<f{width}") for width in (2, 4, 8)},
        "BYTES": np.dtype(object),
    }
)


def array(part: Part) -> Array:
    """The input as an array of its own shape; BYTES as objects, `bytes` or `str` as they came. Raises Invalid, naming
    the input."""
    datatype = require_datatype(part)
    if part.raw is not None and datatype not in ("BOOL", "BYTES"):
        raw = require_size(part, count(part) * WIDTHS[datatype])
        found = np.frombuffer(raw, DTYPES[datatype]).reshape(part.shape)
        return found if found.flags.aligned else found.copy()
    elements = values(part)
    if datatype == "BYTES":
        strings = np.empty(len(elements), object)
        strings[:] = elements
        return strings.reshape(part.shape)
    try:
        with np.errstate(over="ignore"):
            numbers = np.array(elements, DTYPES[datatype])
    except OverflowError:
        raise too_large(part) from None
    if datatype.startswith("FP") and isinstance(part.values, msgspec.Raw) and not np.isfinite(numbers).all():
        raise too_large(part)
    return numbers.reshape(part.shape)


def texts(name: str, found: Array) -> Array:
    """BYTES as `str` if all of them are text, which the input `text` must be. Raises Invalid."""
    # Its own array where nothing else needs it: a text goes as its bytes become one.
    decoded = found if name == "text" else np.empty_like(found)
    for index, element in enumerate(found.flat):
        try:
            decoded.flat[index] = element.decode() if isinstance(element, bytes) else element
        except UnicodeDecodeError:
            if name == "text":
                raise Invalid(f"input `{name}`: entry {index} is not valid UTF-8.", param=name) from None
            return found
    return decoded


def raw(found: Array, datatype: Datatype) -> bytes:
    """An output as its bytes, row by row."""
    if datatype == "BYTES":
        return joined(found.ravel().tolist())
    return found.astype(DTYPES[datatype], copy=False).tobytes()


def listed(found: Array, datatype: Datatype) -> list[Any]:
    """An output for JSON. Raises Invalid if it holds what JSON can't say: bytes that are no text, numbers that are not
    finite."""
    if datatype.startswith("FP") and not np.isfinite(found).all():
        raise Invalid("an output holds NaN or infinity, which JSON has no number for; ask for it as binary data.")
    flat: list[Any] = found.ravel().tolist()
    if datatype != "BYTES":
        return flat
    try:
        return [element.decode() if isinstance(element, bytes) else element for element in flat]
    except UnicodeDecodeError:
        raise Invalid("an output holds bytes that are not UTF-8; ask for it as binary data.") from None
