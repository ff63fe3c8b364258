"""`POST /v1/embeddings`, as OpenAI answers it: https://platform.openai.com/docs/api-reference/embeddings."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import msgspec

from runtimes.contract import InferReply, Invalid, Predictor
from runtimes.dialect import Series, Steps, decoded
from runtimes.dialect.entries import Entries, requests
from runtimes.dialect.rows import listed

if TYPE_CHECKING:
    from runtimes.contract import Array


class Embeddings(Series):
    """See the module."""

    param = "input"
    tasks: ClassVar[frozenset[str]] = frozenset({"embed"})

    def __init__(self, asked: Request, deadline_s: float, flow: str) -> None:
        self.input = Entries(asked.input, param="input")
        self.encoding = asked.encoding_format or "float"
        self.dimensions = asked.dimensions
        self.deadline_s = deadline_s
        self.flow = flow

    @classmethod
    def parse(cls, body: bytes, *, predictor: Predictor, deadline_s: float, flow: str) -> Self:
        return cls(decoded(_REQUEST, body), deadline_s, flow)

    def steps(self, *, model: str, predictor: Predictor, id: str, created_s: int) -> Steps:
        """Raises Invalid if other `dimensions` were asked for than the model has: cut vectors mean nothing unless the
        model was trained to be cut."""

        def each(reply: InferReply, first: int) -> Iterator[dict[str, Any]]:
            vectors = reply.outputs["embedding"].astype("<f4", copy=False)
            width = vectors.shape[1]
            if self.dimensions not in (None, width):
                raise Invalid(f"{model} has {width} dimensions and cannot be cut; leave it out.", param="dimensions")
            for index, vector in enumerate(vectors, first):
                yield {"object": "embedding", "index": index, "embedding": self._encoded(vector)}

        def tail(tokens_in: int) -> dict[str, Any]:
            return {"model": model, "usage": {"prompt_tokens": tokens_in, "total_tokens": tokens_in}}

        asked = requests(self.input, self.deadline_s, self.flow)
        return listed("data", asked, each, head={"object": "list"}, tail=tail)

    def _encoded(self, vector: Array) -> Any:
        return base64.b64encode(vector.tobytes()).decode() if self.encoding == "base64" else vector.tolist()


class Request(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """There is no engine to forward an unknown field to, so it is refused by name."""

    model: str
    input: msgspec.Raw
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    user: str | None = None
    priority: int | None = None


_REQUEST = msgspec.json.Decoder(Request)
