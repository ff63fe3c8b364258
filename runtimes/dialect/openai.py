"""OpenAI-shaped JSON ⇄ named arrays, for the models that speak tensors. Pure: no I/O, no clock.

Embeddings answer as OpenAI does (https://platform.openai.com/docs/api-reference/embeddings), classifications as
vLLM's `/v1/classify` does, with the score of every label by name beside it.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import msgspec
import numpy as np

from runtimes.contract import InferReply, InferRequest, Invalid, Predictor
from runtimes.dialect import TextOrTokens, Translation, decoded, rows

if TYPE_CHECKING:
    from runtimes.contract import Array

ROWS_MAX = 2048
"""Inputs per request, as OpenAI has it."""
CELLS_MAX = 1 << 20
"""Token ids per request once padded to the longest input: a short body must not become a large array."""


class Embeddings(msgspec.Struct, frozen=True):
    """`POST /v1/embeddings`."""

    request: InferRequest
    encoding: Literal["float", "base64"]
    dimensions: int | None

    tasks: ClassVar[frozenset[str]] = frozenset({"embed"})

    @classmethod
    def parse(cls, body: bytes, *, predictor: Predictor, deadline_s: float, flow: str) -> Self:
        asked = decoded(_EMBEDDINGS, body)
        return cls(_infer(asked.input, deadline_s, flow), asked.encoding_format or "float", asked.dimensions)

    def answer(self, reply: InferReply, *, model: str, predictor: Predictor, id: str, created_s: int) -> bytes:
        """Raises Invalid if other `dimensions` were asked for than the model has: cut vectors mean nothing unless the
        model was trained to be cut."""
        vectors = reply.outputs["embedding"].astype("<f4", copy=False)
        width = vectors.shape[1]
        if self.dimensions not in (None, width):
            raise Invalid(f"{model} has {width} dimensions and cannot be cut; leave it out.", param="dimensions")
        data = [
            {"object": "embedding", "index": index, "embedding": self._encoded(vector)}
            for index, vector in enumerate(vectors)
        ]
        usage = {"prompt_tokens": reply.tokens_in, "total_tokens": reply.tokens_in}
        return msgspec.json.encode({"object": "list", "data": data, "model": model, "usage": usage})

    def _encoded(self, vector: Array) -> Any:
        return base64.b64encode(vector.tobytes()).decode() if self.encoding == "base64" else vector.tolist()


class Classification(msgspec.Struct, frozen=True):
    """`POST /v1/classify`."""

    request: InferRequest

    tasks: ClassVar[frozenset[str]] = frozenset({"classify"})

    @classmethod
    def parse(cls, body: bytes, *, predictor: Predictor, deadline_s: float, flow: str) -> Self:
        return cls(_infer(decoded(_CLASSIFY, body).input, deadline_s, flow))

    def answer(self, reply: InferReply, *, model: str, predictor: Predictor, id: str, created_s: int) -> bytes:
        data, labels = [], predictor.labels
        for index, row in enumerate(reply.outputs["scores"]):
            probs = row.tolist()
            data.append(
                {
                    "index": index,
                    "label": labels[int(row.argmax())],
                    "probs": probs,
                    "num_classes": len(probs),
                    "scores": dict(zip(labels, probs, strict=True)),
                }
            )
        usage = {"prompt_tokens": reply.tokens_in, "total_tokens": reply.tokens_in, "completion_tokens": 0}
        head = {"id": id, "object": "list", "created": created_s, "model": model}
        return msgspec.json.encode(head | {"data": data, "usage": usage})


TRANSLATIONS: Mapping[str, Translation] = MappingProxyType(
    {"/v1/embeddings": Embeddings, "/v1/classify": Classification}
)
"""Path → how it is translated."""


class _Request(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What both take. There is no engine to forward an unknown field to, so it is refused by name."""

    model: str
    input: TextOrTokens
    user: str | None = None
    priority: int | None = None


class _EmbeddingsRequest(_Request, kw_only=True):
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None


_EMBEDDINGS = msgspec.json.Decoder(_EmbeddingsRequest)
_CLASSIFY = msgspec.json.Decoder(_Request)


def _infer(given: TextOrTokens, deadline_s: float, flow: str) -> InferRequest:
    found = rows(given, param="input", rows_max=ROWS_MAX)
    if isinstance(found[0], str):
        text = np.empty(len(found), object)
        text[:] = found
        return InferRequest({"text": text}, deadline_s, flow)
    width = max(len(row) for row in found)
    if len(found) * width > CELLS_MAX:
        raise Invalid(
            f"`input` holds {len(found)} lists of up to {width} token ids, more than {CELLS_MAX} once padded; "
            "send fewer at once, or lists of similar length.",
            param="input",
        )
    ids = np.zeros((len(found), width), np.int64)
    mask = np.zeros_like(ids)
    for index, row in enumerate(found):
        ids[index, : len(row)] = row
        mask[index, : len(row)] = 1
    return InferRequest({"input_ids": ids, "attention_mask": mask}, deadline_s, flow)
