"""RIFF/WAVE files, as bytes from a stranger: read into samples, or refused with the reason."""

from __future__ import annotations

import struct
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

    from runtimes.contract import Array

CHUNKS_MAX = 64
"""Of a file, before its samples: recorders write a handful."""
CHANNELS_MAX = 2


def read(content: bytes | memoryview, *, rate_hz: int, samples_max: int, truncate: bool = False) -> Array:
    """One sound as float32 [length] from -1 to 1, 1 ≤ length ≤ `samples_max`; of two channels the mean. PCM of 8, 16,
    24 and 32 bits, and floats of 32 and 64. Raises ValueError, saying what is wrong with the file; with `truncate` a
    longer one is read as far as allowed."""
    form, data = _chunks(memoryview(content))
    if form.rate_hz != rate_hz:
        raise ValueError(f"has {form.rate_hz} samples a second; {rate_hz} are read: resample it first")
    if len(data) % form.frame_bytes:
        raise ValueError("ends within a sample")
    length = len(data) // form.frame_bytes
    if not length:
        raise ValueError("has no samples")
    if length > samples_max and not truncate:
        raise ValueError(f"lasts {length / rate_hz:.2f} s; at most {samples_max / rate_hz:g} s are read")
    samples = _samples(data[: samples_max * form.frame_bytes], form)
    found: Array = samples if form.channels == 1 else samples.reshape(-1, form.channels).mean(axis=1)
    return found


def rate_hz(content: bytes | memoryview) -> int:
    """Samples a second. Raises ValueError."""
    return _chunks(memoryview(content))[0].rate_hz


class Format(NamedTuple):
    """How samples are written."""

    kind: str
    """A key of SCALES."""
    channels: int
    rate_hz: int

    @property
    def frame_bytes(self) -> int:
        """One sample of each channel."""
        return self.channels * int(self.kind[1:]) // 8


_PCM, _FLOAT, _EXTENSIBLE = 1, 3, 0xFFFE
SCALES: Mapping[str, float] = MappingProxyType(
    {"u8": 2.0**7, "i16": 2.0**15, "i24": 2.0**31, "i32": 2.0**31, "f32": 1.0, "f64": 1.0}
)
"""Kind of number and its bits → what is one. Of 24 bits, once they are the upper ones of 32."""


def _chunks(content: memoryview) -> tuple[Format, memoryview]:
    """What the chunk `fmt ` says, and what is in `data`. How long the whole file claims to be matters to nobody."""
    if (bytes(content[:4]), bytes(content[8:12])) != (b"RIFF", b"WAVE"):
        raise ValueError("is no RIFF/WAVE file")
    form: Format | None = None
    at = 12
    for _ in range(CHUNKS_MAX):
        head = bytes(content[at : at + 8])
        if len(head) < 8:
            raise ValueError("ends before its samples")
        size = int.from_bytes(head[4:], "little")
        body = content[at + 8 : at + 8 + size]
        if len(body) < size:
            raise ValueError(f"is cut off: a part of it promises {size} bytes and has {len(body)}")
        if head[:4] == b"fmt ":
            form = _format(bytes(body))
        elif head[:4] == b"data":
            if form is None:
                raise ValueError("has samples before it says what they are")
            return form, body
        at += 8 + size + size % 2
    raise ValueError(f"has more than {CHUNKS_MAX} parts before its samples")


def _format(body: bytes) -> Format:
    if len(body) < 16:
        raise ValueError("does not say what its samples are")
    tag, channels, rate_hz, _, frame_bytes, bits = struct.unpack_from("<HHIIHH", body)
    if tag == _EXTENSIBLE and len(body) >= 40:
        (tag,) = struct.unpack_from("<H", body, 24)
    kind = {_PCM: "u" if bits == 8 else "i", _FLOAT: "f"}.get(tag, "?") + str(bits)
    if kind not in SCALES:
        raise ValueError(
            f"has samples of format {tag} with {bits} bits; PCM of 8 to 32 and floats of 32 and 64 are read"
        )
    if not 1 <= channels <= CHANNELS_MAX:
        raise ValueError(f"has {channels} channels; one or two are read")
    found = Format(kind, channels, rate_hz)
    if frame_bytes != found.frame_bytes:
        raise ValueError(f"says that a frame takes {frame_bytes} bytes; {channels} of {bits} bits do not")
    return found


def _samples(data: memoryview, form: Format) -> Array:
    if form.kind == "i24":
        wide = np.zeros((len(data) // 3, 4), np.uint8)
        wide[:, 1:] = np.frombuffer(data, np.uint8).reshape(-1, 3)
        found: Array = wide.view("<i4").ravel()
    else:
        found = np.frombuffer(data, f"<{form.kind[0]}{int(form.kind[1:]) // 8}")
    if form.kind[0] == "f" and not np.isfinite(found).all():
        raise ValueError("has a sample that is no number")
    if form.kind == "u8":
        found = found.astype(np.float32) - 128
    # Louder than one is distortion wherever it is played.
    return np.clip(found / SCALES[form.kind], -1, 1).astype(np.float32)
