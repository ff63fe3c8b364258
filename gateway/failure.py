"""An engine's error, in whatever shape it came, as one of ours: one object, its `code` a short name, nothing lost that
it said, and nothing of the prompt where others could read it."""

from __future__ import annotations

import re
from typing import Any

import msgspec

from gateway.call import NULL
from gateway.errors import BadRequest, EngineFailed, GatewayError, NotFound, QuotaExceeded, TooLarge
from runtimes.contract import Reply

LEFT_OUT = msgspec.Raw(b"")
PLAIN_ERROR_BYTES_MAX = 1024
"""Longest error in plain text that is handed on."""
#: What a decoder may raise: JSON that is not UTF-8, or nested beyond the interpreter's depth, is as unreadable as none.
UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)


def given(field: msgspec.Raw) -> bool:
    """Neither left out nor null."""
    return field != LEFT_OUT and field != NULL


class Failure(msgspec.Struct):
    """An error body: OpenAI's, or one of those that servers without an opinion send (FastAPI's `detail`)."""

    error: msgspec.Raw = LEFT_OUT
    detail: msgspec.Raw = LEFT_OUT


class Said(msgspec.Struct):
    """What an engine says of its error. Nothing is relied upon: a field of another type counts as left out."""

    message: Any = None
    type: Any = None
    param: Any = None
    code: Any = None


class Complaint(msgspec.Struct):
    """An item of FastAPI's `detail`; the rest of it would echo the request."""

    loc: list[str | int]
    msg: str


FAILURE = msgspec.json.Decoder(Failure)
SAID = msgspec.json.Decoder(Said | str)
DETAIL = msgspec.json.Decoder(list[Complaint] | str)


def refusal(reply: Reply, body: bytes) -> GatewayError:
    """An engine's error body in OpenAI's shape: one object, `code` a short name, else nothing lost that it said."""
    try:
        failure = FAILURE.decode(body)
    except UNREADABLE:
        failure = Failure()
        body = msgspec.json.encode(_plain(body))
    if given(failure.detail) and not given(failure.error):
        fault = fault_of(msgspec.json.encode(_detail(failure.detail)), reply.status)
    else:
        fault = fault_of(failure.error if given(failure.error) else body, reply.status)
    after_s = header(reply, b"retry-after")
    if RETRY_AFTER_S.fullmatch(after_s):
        fault.retry_after_s = float(after_s)
    return fault


def fault_of(error: bytes | msgspec.Raw, status: int | None) -> GatewayError:
    """`status` is the engine's; None amid a stream, where the error's own code may say it."""
    try:
        said = SAID.decode(error)
    except UNREADABLE:
        said = Said()
    if isinstance(said, str):
        said = Said(message=said)
    if status is None:
        status = said.code if isinstance(said.code, int) and 400 <= said.code < 600 else EngineFailed.status
    # A log says the status alone: the engine's words, which the client gets, may quote its prompt.
    fault: GatewayError = (BadRequest if status < 500 else EngineFailed)(f"the engine answered {status}")
    fault.status = status
    fault.grpc = GRPC.get(status, fault.grpc)
    if status == QuotaExceeded.status:
        fault.type = QuotaExceeded.type
    fault.retryable = status in RETRYABLE
    message = QUOTED.sub("…", _text(said.message))
    fault.message = message or f"The engine answered {status} without saying why."
    fault.type = _text(said.type) if _text(said.type) not in ("", "error") else fault.type
    fault.param = _text(said.param) or None
    # The code alone is recorded and traced. What is no name, or a very long one, could be a prompt.
    code = _text(said.code)
    fault.code = code if CODE.fullmatch(code) else fault.code
    return fault


#: Validators built on pydantic (vLLM's, FastAPI's) quote the offending input, maybe a prompt. The client knows it;
#: whoever else gets to read the error must not.
QUOTED = re.compile(r",? ?['\"]?input['\"]?: .*", re.DOTALL)
CODE = re.compile(r"[A-Za-z0-9_.-]{1,64}")
#: Whole seconds, up to some eleven days; anything else is no advice.
RETRY_AFTER_S = re.compile(rb"[0-9]{1,6}")
GRPC = {refused.status: refused.grpc for refused in (NotFound, TooLarge, QuotaExceeded)}
#: Statuses after which the same call may well succeed.
RETRYABLE = frozenset({408, 409, 429, 500, 502, 503, 504})


def _text(value: Any) -> str:
    return str(value) if isinstance(value, str | int) else ""


def _plain(body: bytes) -> str:
    text = body[:PLAIN_ERROR_BYTES_MAX].decode("utf-8", "replace").strip()
    return "" if text.startswith("<") else text  # a web page explains nothing to a program


def _detail(detail: msgspec.Raw) -> Said:
    try:
        said = DETAIL.decode(detail)
    except UNREADABLE:
        return Said()
    if isinstance(said, str):
        return Said(message=said)
    fields = [".".join(str(step) for step in item.loc if step != "body") for item in said]
    message = "; ".join(f"{field}: {item.msg}" for field, item in zip(fields, said, strict=True))
    return Said(message=message, param=fields[0] if fields else None)


def header(reply: Reply, wanted: bytes) -> bytes:
    for name, value in reply.headers:
        if name == wanted:
            return value
    return b""
