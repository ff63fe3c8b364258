"""JSON that nests too deeply is refused before anything walks it."""

import json

import pytest

from gateway.edge.depth import require_depth
from gateway.errors import BadRequest

DEPTH_MAX = 100


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100 + b"]" * 100,
        b'{"a":' * 100 + b"1" + b"}" * 100,
        b"[" + b"[{}]," * 50_000 + b"1]",
        b'["' + b"[" * 500_000 + b'"]',
        b'["\\"' + b"[" * 500 + b'\\\\"]',
        b"[" + b'"[\\\\",' * 40_000 + b"1]",
        b'["' + b'\\"[' * 100_000 + b'"]',
    ],
)
async def test_wide_but_shallow_json_passes(body: bytes) -> None:
    json.loads(body)
    await require_depth(body, DEPTH_MAX)


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 101 + b"]" * 101,
        b'{"a":' * 101 + b"1" + b"}" * 101,
        b"[" * 50 + b'{"a":' * 51 + b"1" + b"}" * 51 + b"]" * 50,
        b"[" * 2_000 + b"]" * 2_000,
        b"[" * 100_000 + b"]" * 100_000,
        b"[" + b'"' + b"x" * 200_000 + b'",' + b"[" * 100 + b"]" * 101,
        b'["\\\\",' + b"[" * 100 + b"]" * 101,
        b"[" + b"[]," * 100_000 + b"[" * 100 + b"]" * 101,
    ],
)
async def test_deep_json_is_refused(body: bytes) -> None:
    with pytest.raises(BadRequest):
        await require_depth(body, DEPTH_MAX)


@pytest.mark.parametrize("shift", range(0, 8))
async def test_strings_are_told_from_brackets_across_pieces(shift: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtimes.dialect.bounded.PIECE_BYTES", 8)
    shallow = b" " * shift + b"[" + b'"\\\\\\"[[[", "\\\\", {"\\"]": "["}, ' * 30 + b"1]"
    json.loads(shallow)
    await require_depth(shallow, 2)
    with pytest.raises(BadRequest):
        await require_depth(shallow, 1)
