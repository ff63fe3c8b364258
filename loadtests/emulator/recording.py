"""Recordings of a real engine's times: one JSON line a call. Of what was said, nothing is in them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

Seconds = Annotated[float, Meta(ge=0, le=3_600)]


class RecordingFault(Exception):
    """The recording can't be used; the message names the file."""


class Recorded(msgspec.Struct, frozen=True):
    """One streamed call."""

    prompt_tokens: int
    first_token_s: Seconds
    """From the request to the first event with text."""
    gaps_s: tuple[Seconds, ...]
    """From each such event to the next: one less than there were."""


def read(path: Path) -> list[Recorded]:
    """Raises RecordingFault if there is no call in it."""
    try:
        calls = LINES.decode_lines(path.read_bytes())
    except (OSError, msgspec.DecodeError) as error:
        raise RecordingFault(f"recording {path} can't be read: {error}") from None
    if not calls:
        raise RecordingFault(f"recording {path} has no calls in it")
    return calls


def write(path: Path, calls: Iterable[Recorded]) -> None:
    """Raises RecordingFault if it can't be written."""
    try:
        path.write_bytes(msgspec.json.Encoder().encode_lines(calls))
    except OSError as error:
        raise RecordingFault(f"recording {path} can't be written: {error}") from None


LINES = msgspec.json.Decoder(Recorded)
