"""`POST /v1/score` and `/v1/rerank` for an embedder, in the shapes of vLLM, the latter also Jina's and Cohere's: how
alike two texts are is the cosine of the angle between their embeddings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

import msgspec
import numpy as np
from msgspec import Meta

from runtimes.contract import InferReply, InferRequest, Invalid, Predictor
from runtimes.dialect import Series, Steps, decoded
from runtimes.dialect.entries import Entries, split, text_tensor, windows
from runtimes.dialect.rows import PIECE_ROWS, listed

if TYPE_CHECKING:
    from runtimes.contract import Array

LEFT_OUT = msgspec.Raw(b"null")


class Pairs:
    """Texts to be compared: one with each of many, or each with the one beside it."""

    def __init__(self, first: Entries, second: Entries, deadline_s: float, flow: str) -> None:
        for side in (first, second):
            if not side.are_texts:
                raise Invalid(f"`{side.param}` must be a text or texts.", param=side.param)
        if len(first) not in (1, len(second)):
            raise Invalid(
                f"`{first.param}` holds {len(first)} texts and `{second.param}` {len(second)}; give one and any "
                "number, or as many of both.",
                param=first.param,
            )
        self.first = first
        self.second = second
        self.deadline_s = deadline_s
        self.flow = flow
        self._one: Array | None = None
        """The vector of the one that is compared with all; known from the first reply on."""

    def requests(self) -> Iterator[InferRequest]:
        if len(self.first) > 1:
            for window in windows(self.first, self.second):
                yield self._request(self.first.texts(window) + self.second.texts(window))
            return
        ahead = self.first.texts(slice(0, 1))
        for window in windows(self.second):
            yield self._request(ahead + self.second.texts(window))
            ahead = []

    def scores(self, reply: InferReply) -> Array:
        """What the reply to the newest request says, a score for each of its pairs."""
        vectors = reply.outputs["embedding"].astype(np.float32, copy=False)
        lengths = np.sqrt(np.square(vectors).sum(axis=1, keepdims=True))
        vectors = vectors / np.maximum(lengths, LENGTH_MIN)
        if len(self.first) > 1:
            first, second = np.split(vectors, 2)
        else:
            if self._one is None:
                self._one, vectors = vectors[:1], vectors[1:]
            first, second = self._one, vectors
        # Not a matrix product, whose last bits depend on how many rows there are.
        found: Array = (first * second).sum(axis=1)
        return found.clip(-1, 1)  # rounding may carry equal texts a little beyond what a cosine can be

    def _request(self, texts: list[str]) -> InferRequest:
        return InferRequest({"text": text_tensor(texts)}, self.deadline_s, self.flow)


LENGTH_MIN = 1e-12
"""A vector of no length is like no other."""


class Score(Series):
    """`POST /v1/score`."""

    tasks: ClassVar[frozenset[str]] = frozenset({"embed"})

    def __init__(self, pairs: Pairs) -> None:
        self.pairs = pairs
        self.param = pairs.second.param

    @classmethod
    def parse(cls, body: bytes, *, predictor: Predictor, deadline_s: float, flow: str) -> Self:
        asked = decoded(_SCORE, body)
        names = ("queries", "documents") if asked.text_1 == asked.text_2 == LEFT_OUT else ("text_1", "text_2")
        for name, other in (("text_1", names[0]), ("text_2", names[1]), ("queries", names[0]), ("documents", names[1])):
            given = getattr(asked, name) != LEFT_OUT
            if name in names and not given:
                raise Invalid(
                    f"`{name}` is missing; give `text_1` and `text_2`, or `queries` and `documents`.", param=name
                )
            if name not in names and given:
                raise Invalid(f"`{name}` is given beside `{other}`, which says the same; leave it out.", param=name)
        first, second = (Entries(getattr(asked, name), param=name) for name in names)
        return cls(Pairs(first, second, deadline_s, flow))

    def steps(self, *, model: str, predictor: Predictor, id: str, created_s: int) -> Steps:
        def each(reply: InferReply, first: int) -> Iterator[dict[str, Any]]:
            for index, score in enumerate(self.pairs.scores(reply).tolist(), first):
                yield {"index": index, "object": "score", "score": score}

        head = {"id": id, "object": "list", "created": created_s, "model": model}
        return listed("data", self.pairs.requests(), each, head=head, tail=_usage)


class Rerank(Series):
    """`POST /v1/rerank`."""

    tasks: ClassVar[frozenset[str]] = frozenset({"embed"})

    def __init__(self, pairs: Pairs, top_n: int, *, texts: bool) -> None:
        self.pairs = pairs
        self.param = pairs.second.param
        self.top_n = top_n
        self.texts = texts
        """Each document is in its result."""

    @classmethod
    def parse(cls, body: bytes, *, predictor: Predictor, deadline_s: float, flow: str) -> Self:
        asked = decoded(_RERANK, body)
        query = Entries(asked.query, param="query")
        if len(query) > 1:
            raise Invalid("`query` must be one text.", param="query")
        documents = Entries([_text(row) for row in split(asked.documents, param="documents")], param="documents")
        pairs = Pairs(query, documents, deadline_s, flow)
        return cls(pairs, asked.top_n or len(documents), texts=asked.return_documents is not False)

    def steps(self, *, model: str, predictor: Predictor, id: str, created_s: int) -> Steps:
        found, tokens_in = [], 0
        for request in self.pairs.requests():
            reply = yield request
            tokens_in += reply.tokens_in
            found.append(self.pairs.scores(reply))
        scores = np.concatenate(found)
        best = np.argsort(-scores, kind="stable")[: self.top_n]
        head = {"id": id, "model": model, **_usage(tokens_in)}
        before = msgspec.json.encode(head)[:-1] + b',"results":['
        for start in range(0, len(best), PIECE_ROWS):
            piece = [self._result(int(index), float(scores[index])) for index in best[start : start + PIECE_ROWS]]
            yield before + msgspec.json.encode(piece)[1:-1]
            before = b","
        yield b"]}"

    def _result(self, index: int, score: float) -> dict[str, Any]:
        document = {"document": {"text": self.pairs.second.rows[index]}} if self.texts else {}
        return {"index": index, **document, "relevance_score": score}


class ScoreRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """There is no engine to forward an unknown field to, so it is refused by name."""

    model: str
    text_1: msgspec.Raw = LEFT_OUT
    text_2: msgspec.Raw = LEFT_OUT
    queries: msgspec.Raw = LEFT_OUT
    documents: msgspec.Raw = LEFT_OUT
    user: str | None = None
    priority: int | None = None


class RerankRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """The same."""

    model: str
    query: msgspec.Raw
    documents: msgspec.Raw
    top_n: Annotated[int, Meta(ge=0)] | None = None
    """0 and None are all."""
    return_documents: bool | None = None
    user: str | None = None
    priority: int | None = None


class Document(msgspec.Struct, forbid_unknown_fields=True):
    """One that is not just a text."""

    text: msgspec.Raw


def _text(row: msgspec.Raw) -> msgspec.Raw:
    if bytes(row)[:1] != b"{":
        return row
    try:
        return _DOCUMENT.decode(row).text
    except msgspec.ValidationError as error:
        raise Invalid(
            f"`documents` holds one that is neither a text nor has one: {error}.", param="documents"
        ) from None


def _usage(tokens_in: int) -> dict[str, Any]:
    return {"usage": {"prompt_tokens": tokens_in, "total_tokens": tokens_in}}


_SCORE = msgspec.json.Decoder(ScoreRequest)
_RERANK = msgspec.json.Decoder(RerankRequest)
_DOCUMENT = msgspec.json.Decoder(Document)
