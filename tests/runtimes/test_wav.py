"""WAV files: every way to write a sample, and everything that a file can lie about."""

import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtimes import wav
from tests.sounds import form, pcm, riff

SAMPLES_MAX = 16


def read(content: bytes, **changes: Any) -> list[float]:
    found = wav.read(content, **{"rate_hz": 8000, "samples_max": SAMPLES_MAX} | changes)
    assert found.dtype == np.float32
    listed: list[float] = found.tolist()
    return listed


@pytest.mark.parametrize("bits", [16, 24, 32])
def test_pcm_goes_from_minus_one_to_just_below_one(bits: int) -> None:
    one = 1 << (bits - 1)
    assert read(pcm([0, one // 2, -one, one - 1], bits=bits)) == pytest.approx([0, 0.5, -1, 1 - 1 / one])


def test_pcm_of_eight_bits_has_its_zero_in_the_middle() -> None:
    assert read(pcm([128, 192, 0, 255], bits=8)) == [0, 0.5, -1, 127 / 128]


@pytest.mark.parametrize(("bits", "letter"), [(32, "f"), (64, "d")])
def test_floats_are_as_they_are_up_to_one(bits: int, letter: str) -> None:
    data = struct.pack(f"<4{letter}", 0.25, -0.5, 1e30, -2)
    assert read(riff(form(3, bits=bits), (b"data", data))) == [0.25, -0.5, 1, -1]


def test_two_channels_become_their_mean() -> None:
    assert read(pcm([16384, 0, -32768, -32768], channels=2)) == [0.25, -1]


def test_an_extensible_header_says_further_behind_what_the_samples_are() -> None:
    name, body = form(0xFFFE, bits=32)
    guid = struct.pack("<H", 3) + bytes.fromhex("000000001000800000aa00389b71")
    extended = body + struct.pack("<HHI", 22, 32, 0) + guid
    assert read(riff((name, extended), (b"data", struct.pack("<f", 0.5)))) == [0.5]


def test_what_else_is_in_the_file_is_passed_over_with_its_padding() -> None:
    odd = (b"LIST", b"INFO and more."[:13])
    assert read(riff(odd, form(), odd, (b"data", struct.pack("<h", 16384)), odd)) == [0.5]


def test_a_longer_sound_is_refused_or_read_as_far_as_allowed() -> None:
    long = pcm([16384] * (SAMPLES_MAX + 1))
    assert read(pcm([16384] * SAMPLES_MAX)) == [0.5] * SAMPLES_MAX
    with pytest.raises(ValueError, match=r"lasts 0\.00 s; at most 0\.002 s"):
        read(long)
    assert read(long, truncate=True) == [0.5] * SAMPLES_MAX


SOUND = pcm([1, 2, 3, 4])
DATA = (b"data", b"\0\0")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "no RIFF"),
        (b"OggS" + SOUND[4:], "no RIFF"),
        (b"RIFX" + SOUND[4:], "no RIFF"),
        (SOUND[:11], "no RIFF"),
        (SOUND[:20], "cut off"),
        (SOUND[:36], "ends before its samples"),
        (SOUND[:40], "ends before its samples"),
        (SOUND[:-1], "promises 8 bytes and has 7"),
        (SOUND[:40] + b"\xff\xff\xff\xff" + SOUND[44:], "promises 4294967295 bytes"),
        (pcm([]), "has no samples"),
        (riff(DATA), "before it says what they are"),
        (riff(form()), "ends before its samples"),
        (riff((b"fmt ", b"\1\0"), DATA), "does not say"),
        (riff(form(bits=16, frame_bytes=4), DATA), "takes 4 bytes"),
        (riff(form(bits=12), DATA), "with 12 bits"),
        (riff(form(6, bits=8), DATA), "format 6"),
        (riff(form(3, bits=16), DATA), "format 3"),
        (riff(form(0xFFFE), DATA), "format 65534"),
        (riff(form(channels=0), DATA), "0 channels"),
        (riff(form(channels=6), DATA), "6 channels"),
        (riff(form(channels=2), DATA), "ends within a sample"),
        (pcm([0], rate_hz=16000), "16000 samples a second; 8000 are read"),
        (riff(form(3, bits=32), (b"data", struct.pack("<f", float("nan")))), "no number"),
        (riff(*[(b"junk", b"")] * wav.CHUNKS_MAX, form(), DATA), "more than 64 parts"),
    ],
    ids=str,
)
def test_what_cannot_be_read_is_refused_with_the_reason(content: bytes, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        read(content)


FILES = st.sampled_from(
    [SOUND, pcm([0, 255], bits=8), pcm([1, 2], bits=24, channels=2), riff(form(3, bits=32), (b"data", bytes(8)))]
)


@given(FILES, st.lists(st.tuples(st.integers(0, 60), st.integers(0, 255)), max_size=4), st.integers(0, 60))
def test_a_file_that_was_tampered_with_is_sound_or_refused(
    content: bytes, changes: list[tuple[int, int]], length: int
) -> None:
    tampered = bytearray(content[:length] if length < 40 else content)
    for at, byte in changes:
        if at < len(tampered):
            tampered[at] = byte
    try:
        found = wav.read(bytes(tampered), rate_hz=8000, samples_max=SAMPLES_MAX)
    except ValueError:
        return
    assert 1 <= len(found) <= SAMPLES_MAX
    assert np.isfinite(found).all()
    assert np.abs(found).max() <= 1


@given(st.binary(max_size=200))
def test_anything_after_a_sound_beginning_is_sound_or_refused(rest: bytes) -> None:
    try:
        wav.read(b"RIFF\0\0\0\0WAVE" + rest, rate_hz=8000, samples_max=SAMPLES_MAX)
    except ValueError as error:
        assert str(error)
