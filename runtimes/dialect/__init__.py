"""Pure translations between the wire dialects, and what all of them share. Imports no numpy."""

import re
from collections.abc import Generator
from typing import Annotated, Protocol, TypeAlias, TypeVar

import msgspec

from runtimes.contract import InferReply, InferRequest, Invalid, Predictor

T = TypeVar("T")

TokenId = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
TextOrTokens = str | list[str | TokenId | list[TokenId]]
"""What OpenAI calls `input` or `prompt`: a text, texts, token ids, or lists of token ids; never mixed."""


class Asked(Protocol):
    """One call, understood."""

    @property
    def request(self) -> InferRequest: ...

    def answer(self, reply: InferReply, *, model: str, predictor: Predictor, id: str, created_s: int) -> bytes:
        """The body of the 200. `model` is the name that the client called, `created_s` is Unix time."""


Steps: TypeAlias = Generator[InferRequest | bytes, InferReply, None]
"""An answer in the making: yields what to ask of the model, and is sent the reply to that; yields what to write, and is
sent nothing. Ends with something to write."""


class Series:
    """One call, understood, that may have very many rows: a window of them goes to the model at a time, and its part
    of the answer is written before the next one does, so that neither rows nor answer are ever all at hand."""

    param: str
    """The body's field that the rows are from; it is at fault for what the runtime finds Invalid."""

    def steps(self, *, model: str, predictor: Predictor, id: str, created_s: int) -> Steps:
        """The bytes in them are the body of the 200, however many windows it took. Raises Invalid, if at all, at the
        first reply. See Asked.answer for what is given."""
        raise NotImplementedError


class Translation(Protocol):
    """How a dialect's body becomes tensors and back. `parse` raises Invalid, whose `param` is the field at fault. An
    Invalid that the runtime then raises is about the input tensor it names."""

    @property
    def tasks(self) -> frozenset[str]:
        """What a Predictor must be able to do to answer: one of these must be its `task`."""

    def parse(self, body: bytes, *, predictor: Predictor, deadline_s: float, flow: str) -> Asked | Series: ...


def decoded(decoder: msgspec.json.Decoder[T], body: bytes, *, what: str = "The body", param: str | None = None) -> T:
    """The body, or `what` else it is, as the decoder's type. Raises Invalid that names the parameter and quotes no
    value of it."""
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        said = f"{error}." if param is None else f"{what}: {error}."
        raise Invalid(said, param=param or _parameter(str(error))) from None
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise Invalid(f"{what} is not valid JSON in UTF-8. Send one JSON object.", param=param) from None
    except RecursionError:
        raise Invalid(f"{what} is nested too deeply. Send flatter JSON.", param=param) from None


def rows(given: TextOrTokens, *, param: str, rows_max: int) -> list[str] | list[list[int]]:
    """One entry per input. Raises Invalid if kinds are mixed, an entry is empty or there are too many."""
    if isinstance(given, str):
        texts: list[str] | list[list[int]] = [given]
    elif given and all(isinstance(row, int) for row in given):
        texts = [[row for row in given if isinstance(row, int)]]
    else:
        texts = _uniform(given, param=param)
    if len(texts) > rows_max:
        raise Invalid(f"`{param}` holds {len(texts)} entries; at most {rows_max} go at once.", param=param)
    if not texts or not all(texts):
        raise Invalid(f"`{param}` is empty or holds an empty entry. Leave empty ones out.", param=param)
    return texts


def _uniform(given: list[str | int | list[int]], *, param: str) -> list[str] | list[list[int]]:
    strings = [row for row in given if isinstance(row, str)]
    lists = [row for row in given if isinstance(row, list)]
    if len(strings) == len(given):
        return strings
    if len(lists) == len(given):
        return lists
    raise Invalid(f"`{param}` mixes texts and token ids. Send one kind per request.", param=param)


_PATH = re.compile(r"at `\$\.([^.\[`]+)[^`]*`$")
_FIELD = re.compile(r"field `([^`]+)`$")


def _parameter(complaint: str) -> str | None:
    """The top-level field that a msgspec message is about."""
    found = _PATH.search(complaint) or _FIELD.search(complaint)
    return found.group(1) if found else None
