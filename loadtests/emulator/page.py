"""What is answered beside generating: the routes that tell of the engine, and embeddings."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from loadtests.emulator.dialect import CREATED_S, error, response
from loadtests.emulator.metrics import metrics
from loadtests.emulator.request import BYTES_A_TOKEN, Refused

if TYPE_CHECKING:
    from loadtests.emulator.server import Emulator


def page(emulator: Emulator, path: bytes, body: bytes) -> bytes:
    """A whole response. Raises Refused."""
    match path:
        case b"/health" | b"/ping":
            return response(b"")
        case b"/v1/models":
            return response(MODELS)
        case b"/metrics":
            return response(metrics(emulator), content_type="text/plain; version=0.0.4; charset=utf-8")
        case b"/v1/embeddings":
            return response(_embeddings(body))
        case _:
            return response(error("The emulator has no such path.", kind="NotFoundError", code=404), "404 Not Found")


class _Embed(msgspec.Struct):
    model: str
    input: str | list[str | int | list[int]]


EMBED = msgspec.json.Decoder(_Embed)
MODEL = {
    "id": "emulated",
    "object": "model",
    "created": CREATED_S,
    "owned_by": "headrace-load",
    "max_model_len": 131_072,
}
MODELS = msgspec.json.encode({"object": "list", "data": [MODEL]})
VECTOR = [0.5, -0.5, 0.5, 0.5]


def _embeddings(body: bytes) -> bytes:
    try:
        asked = EMBED.decode(body)
    except (msgspec.DecodeError, RecursionError) as fault:
        raise Refused(f"the body can't be taken: {fault}") from None
    texts = asked.input if isinstance(asked.input, list) and not isinstance(asked.input[:1], int) else [asked.input]
    tokens = len(body) // BYTES_A_TOKEN + 1
    return msgspec.json.encode(
        {
            "id": "embd-emulated",
            "object": "list",
            "created": CREATED_S,
            "model": asked.model,
            "data": [{"index": number, "object": "embedding", "embedding": VECTOR} for number in range(len(texts))],
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0},
        }
    )
