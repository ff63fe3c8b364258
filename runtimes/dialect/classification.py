"""`POST /v1/classify`, as vLLM answers its `/classify`, with the score of every label by name beside it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Self

import msgspec

from runtimes.contract import InferReply, Predictor
from runtimes.dialect import Series, Steps, decoded
from runtimes.dialect.entries import Entries, requests
from runtimes.dialect.rows import listed


class Classification(Series):
    """See the module."""

    param = "input"
    tasks: ClassVar[frozenset[str]] = frozenset({"classify"})

    def __init__(self, asked: Request, deadline_s: float, flow: str) -> None:
        self.input = Entries(asked.input, param="input")
        self.deadline_s = deadline_s
        self.flow = flow

    @classmethod
    def parse(cls, body: bytes, *, predictor: Predictor, deadline_s: float, flow: str) -> Self:
        return cls(decoded(_REQUEST, body), deadline_s, flow)

    def steps(self, *, model: str, predictor: Predictor, id: str, created_s: int) -> Steps:
        labels = predictor.labels

        def each(reply: InferReply, first: int) -> Iterator[dict[str, Any]]:
            for index, row in enumerate(reply.outputs["scores"], first):
                probs = row.tolist()
                yield {
                    "index": index,
                    "label": labels[int(row.argmax())],
                    "probs": probs,
                    "num_classes": len(probs),
                    "scores": dict(zip(labels, probs, strict=True)),
                }

        def tail(tokens_in: int) -> dict[str, Any]:
            return {"usage": {"prompt_tokens": tokens_in, "total_tokens": tokens_in, "completion_tokens": 0}}

        asked = requests(self.input, self.deadline_s, self.flow)
        head = {"id": id, "object": "list", "created": created_s, "model": model}
        return listed("data", asked, each, head=head, tail=tail)


class Request(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """There is no engine to forward an unknown field to, so it is refused by name."""

    model: str
    input: msgspec.Raw
    user: str | None = None
    priority: int | None = None


_REQUEST = msgspec.json.Decoder(Request)
