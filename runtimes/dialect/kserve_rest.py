"""The Open Inference Protocol's REST wire: JSON, with tensors as bytes behind it where they are asked for (Triton's
binary tensor data extension). Pure."""

from __future__ import annotations

import binascii
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from runtimes.contract import Invalid
from runtimes.dialect import decoded
from runtimes.dialect.elements import Encoded, Message, Part, Wanted, classes, require_few, shaped, values

NOTHING = msgspec.Raw(b"")


class Input(msgspec.Struct):
    name: str
    datatype: str
    shape: list[int]
    data: msgspec.Raw = NOTHING
    parameters: dict[str, Any] = {}


class Output(msgspec.Struct):
    name: str
    parameters: dict[str, Any] = {}


class Inference(msgspec.Struct):
    inputs: list[Input]
    id: str = ""
    outputs: list[Output] = []
    parameters: dict[str, Any] = {}


INFERENCE = msgspec.json.Decoder(Inference)
#: What the gateway could do only by reading its clients' memory, or the engine's.
ELSEWHERE = ("shared_memory_region", "shared_memory_offset", "shared_memory_byte_size")


def read(body: bytes, json_bytes: int | None) -> Message:
    """`json_bytes` is what `Inference-Header-Content-Length` says, None if it was left out. Raises Invalid."""
    if json_bytes is not None and json_bytes > len(body):
        raise Invalid(
            f"Inference-Header-Content-Length says {json_bytes} bytes of JSON; the whole body has {len(body)}."
        )
    asked = decoded(INFERENCE, body if json_bytes is None else body[:json_bytes])
    for what, given in ("inputs", asked.inputs), ("outputs", asked.outputs), ("parameters", asked.parameters):
        require_few(what, given)
    at = len(body) if json_bytes is None else json_bytes
    parts = []
    for it in asked.inputs:
        part, at = _part(it, body, at)
        parts.append(_from_base64(part) if it.parameters.get("content_type") == "base64" else part)
    if at != len(body):
        raise Invalid(f"The body has {len(body) - at} bytes behind its JSON that are none of its inputs'.")
    binary = asked.parameters.get("binary_data_output") is True
    outputs = tuple(_wanted(output, binary) for output in asked.outputs)
    return Message(asked.id, tuple(parts), outputs, asked.parameters, binary)


class Answer(NamedTuple):
    body: bytes
    json_bytes: int | None
    """For `Inference-Header-Content-Length`; None if all of it is JSON."""


def write(outputs: Sequence[Encoded], *, id: str, model: str, version: str) -> Answer:
    """The body of a 200."""
    told: list[dict[str, Any]] = []
    tails: list[bytes] = []
    for name, datatype, shape, data in outputs:
        output = {"name": name, "datatype": datatype, "shape": shape}
        if isinstance(data, bytes):
            tails.append(data)
            told.append(output | {"parameters": {"binary_data_size": len(data)}})
        else:
            told.append(output | {"data": data})
    head = {"id": id} if id else {}
    json = msgspec.json.encode(head | {"model_name": model, "model_version": version, "outputs": told})
    return Answer(b"".join((json, *tails)), len(json)) if tails else Answer(json, None)


def _part(given: Input, body: bytes, at: int) -> tuple[Part, int]:
    """The input, and where the next one's bytes begin."""
    name, parameters = given.name, given.parameters
    for parameter in ELSEWHERE:
        if parameter in parameters:
            raise Invalid(f"input `{name}`: `{parameter}` is not served; send the tensor itself.", param=name)
    size = parameters.get("binary_data_size")
    if size is None:
        if given.data == NOTHING:
            raise Invalid(f"input `{name}` brings neither `data` nor `binary_data_size`.", param=name)
        return Part(name, given.datatype, shaped(name, given.shape), values=given.data), at
    if given.data != NOTHING:
        raise Invalid(f"input `{name}` brings both `data` and `binary_data_size`; send one of them.", param=name)
    if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= len(body) - at:
        raise Invalid(
            f"input `{name}`: `binary_data_size` must be a number of bytes that follow the JSON; {len(body) - at} are "
            "left of them.",
            param=name,
        )
    return Part(name, given.datatype, shaped(name, given.shape), raw=memoryview(body)[at : at + size]), at + size


def _from_base64(part: Part) -> Part:
    """BYTES that are no text, as JSON can carry them: MLServer's content type for that."""
    if part.datatype != "BYTES":
        raise Invalid(f"input `{part.name}` is {part.datatype}; `content_type` base64 is for BYTES.", param=part.name)
    found = []
    for index, text in enumerate(values(part)):
        try:
            found.append(binascii.a2b_base64(text, strict_mode=True))
        except ValueError:
            raise Invalid(f"input `{part.name}`: entry {index} is not base64.", param=part.name) from None
    return Part(part.name, part.datatype, part.shape, values=found)


def _wanted(output: Output, binary: bool) -> Wanted:
    name, parameters = output.name, output.parameters
    for parameter in ELSEWHERE:
        if parameter in parameters:
            raise Invalid(f"output `{name}`: `{parameter}` is not served; leave it out.", param=name)
    return Wanted(name, parameters.get("binary_data", binary) is True, classes(name, parameters))
