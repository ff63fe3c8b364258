"""WAV files, sound and broken."""

from __future__ import annotations

import io
import struct
import wave
from collections.abc import Sequence


def pcm(samples: Sequence[int], *, bits: int = 16, channels: int = 1, rate_hz: int = 8000) -> bytes:
    """As Python's own `wave` writes it; of 8 bits, from 0 to 255."""
    file = io.BytesIO()
    with wave.open(file, "wb") as opened:
        opened.setnchannels(channels)
        opened.setsampwidth(bits // 8)
        opened.setframerate(rate_hz)
        opened.writeframes(b"".join(it.to_bytes(bits // 8, "little", signed=bits > 8) for it in samples))
    return file.getvalue()


def riff(*chunks: tuple[bytes, bytes]) -> bytes:
    """A file of these chunks, each padded to an even length."""
    body = b"".join(name + struct.pack("<I", len(it)) + it + b"\0" * (len(it) % 2) for name, it in chunks)
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WAVE" + body


def form(
    tag: int = 1, channels: int = 1, rate_hz: int = 8000, bits: int = 16, frame_bytes: int | None = None
) -> tuple[bytes, bytes]:
    """A chunk `fmt `."""
    frame_bytes = channels * bits // 8 if frame_bytes is None else frame_bytes
    return b"fmt ", struct.pack("<HHIIHH", tag, channels, rate_hz, rate_hz * frame_bytes, frame_bytes, bits)
