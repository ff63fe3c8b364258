"""`POST /v1/moderations`, as OpenAI answers it: https://platform.openai.com/docs/api-reference/moderations.

A category is a label that the artifact's manifest has a threshold for, and what reaches it is flagged. Labels without
one (`harmless`) are no categories.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Self

import msgspec

from runtimes.contract import InferReply, Invalid, Predictor
from runtimes.dialect import Series, Steps, decoded
from runtimes.dialect.entries import Entries, requests, split
from runtimes.dialect.rows import listed


class Moderation(Series):
    """See the module."""

    param = "input"
    tasks: ClassVar[frozenset[str]] = frozenset({"classify"})

    def __init__(self, asked: Request, deadline_s: float, flow: str) -> None:
        self.input = _texts(asked.input)
        self.deadline_s = deadline_s
        self.flow = flow

    @classmethod
    def parse(cls, body: bytes, *, predictor: Predictor, deadline_s: float, flow: str) -> Self:
        """Raises Invalid too for a model that has no category."""
        asked = decoded(_REQUEST, body)
        if not predictor.thresholds:
            raise Invalid(
                f"{asked.model} has no thresholds in its manifest, so nothing says what to flag; ask /v1/classify for "
                "its scores, or publish it with thresholds.",
                param="model",
            )
        return cls(asked, deadline_s, flow)

    def steps(self, *, model: str, predictor: Predictor, id: str, created_s: int) -> Steps:
        columns = [
            (label, column, predictor.thresholds[label])
            for column, label in enumerate(predictor.labels)
            if label in predictor.thresholds
        ]

        def each(reply: InferReply, first: int) -> Iterator[dict[str, Any]]:
            for row in reply.outputs["scores"]:
                scores = {label: float(row[column]) for label, column, _ in columns}
                found = {label: scores[label] >= threshold for label, _, threshold in columns}
                yield {
                    "flagged": any(found.values()),
                    "categories": found,
                    "category_scores": scores,
                    "category_applied_input_types": {label: ["text"] for label in found},
                }

        asked = requests(self.input, self.deadline_s, self.flow)
        return listed("results", asked, each, head={"id": id, "model": model}, tail=lambda tokens_in: {})


class Request(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """There is no engine to forward an unknown field to, so it is refused by name."""

    model: str
    input: msgspec.Raw
    user: str | None = None
    priority: int | None = None


class Part(msgspec.Struct, forbid_unknown_fields=True):
    type: str
    text: str = ""
    image_url: msgspec.Raw = msgspec.Raw(b"null")


def _texts(given: msgspec.Raw) -> Entries:
    """Texts, each to be judged; or parts of a single one."""
    rows = split(given, param="input")
    if rows and bytes(rows[0])[:1] == b"{":
        rows = [msgspec.Raw(msgspec.json.encode("\n".join(map(_part, rows))))]
    found = Entries(rows, param="input")
    if not found.are_texts:
        raise Invalid("`input` must be a text, texts, or parts of the type text.", param="input")
    return found


def _part(row: msgspec.Raw) -> str:
    try:
        part = _PART.decode(row)
    except msgspec.ValidationError as error:
        raise Invalid(f"`input` holds a part that is none: {error}.", param="input") from None
    if part.type != "text":
        kind = part.type if part.type == "image_url" else "other"
        raise Invalid(f"`input` holds a part of the type {kind}; this model reads text only.", param="input")
    return part.text


_REQUEST = msgspec.json.Decoder(Request)
_PART = msgspec.json.Decoder(Part)
