"""The Open Inference Protocol's REST wire: JSON, with tensors as bytes behind it where they are asked for (Triton's
binary tensor data extension). Pure."""

from __future__ import annotations

import binascii
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from runtimes.contract import Invalid
from runtimes.dialect import decoded
from runtimes.dialect.bounded import few, listed, require_values
from runtimes.dialect.elements import (
    NAMED_MAX,
    RANK_MAX,
    Encoded,
    Message,
    Part,
    Wanted,
    classes,
    quoted,
    require_few,
    require_name,
    shaped,
    values,
)

NOTHING = msgspec.Raw(b"")


# What nobody reads is skipped, not decoded, and what may be long is decoded once it has been counted.


class Elsewhere(msgspec.Struct, frozen=True):
    """What the gateway could do only by reading its clients' memory, or the engine's."""

    shared_memory_region: msgspec.Raw = NOTHING
    shared_memory_offset: msgspec.Raw = NOTHING
    shared_memory_byte_size: msgspec.Raw = NOTHING


class InputParameters(Elsewhere, frozen=True):
    binary_data_size: msgspec.Raw = NOTHING
    content_type: msgspec.Raw = NOTHING


class OutputParameters(Elsewhere, frozen=True):
    binary_data: msgspec.Raw = NOTHING
    classification: msgspec.Raw = NOTHING


class Input(msgspec.Struct):
    name: str
    datatype: str
    shape: msgspec.Raw
    data: msgspec.Raw = NOTHING
    parameters: InputParameters = InputParameters()


class Output(msgspec.Struct):
    name: str
    parameters: OutputParameters = OutputParameters()


INPUTS, OUTPUTS = few(Input, NAMED_MAX), few(Output, NAMED_MAX)


class Inference(msgspec.Struct):
    inputs: INPUTS  # type: ignore[valid-type]
    id: str = ""
    outputs: OUTPUTS = OUTPUTS()  # type: ignore[valid-type]
    parameters: msgspec.Raw = msgspec.Raw(b"{}")


INFERENCE = msgspec.json.Decoder(Inference)
SHAPE = msgspec.json.Decoder(list[int])
NUMBER = msgspec.json.Decoder(int)
PARAMETERS = msgspec.json.Decoder(dict[str, Any])
ELSEWHERE = Elsewhere.__struct_fields__
TRUE, FALSE, BASE64 = msgspec.Raw(b"true"), msgspec.Raw(b"false"), msgspec.Raw(b'"base64"')


def read(body: bytes, json_bytes: int | None) -> Message:
    """`json_bytes` is what `Inference-Header-Content-Length` says, None if it was left out. Raises Invalid."""
    if json_bytes is not None and json_bytes > len(body):
        raise Invalid(
            f"Inference-Header-Content-Length says {json_bytes} bytes of JSON; the whole body has {len(body)}."
        )
    if json_bytes == 0:
        raise Invalid(
            "Inference-Header-Content-Length is 0: a body of one input's bytes alone is not served. Send JSON that "
            "describes the input, `binary_data_size` included, then the bytes, and the JSON's length in that header."
        )
    if json_bytes is None:
        asked, at = decoded(INFERENCE, body), len(body)
    else:
        what = f"The body up to byte {json_bytes}, where Inference-Header-Content-Length has its JSON end,"
        asked, at = decoded(INFERENCE, body[:json_bytes], what=what), json_bytes
    require_values("parameters", asked.parameters, param="parameters")
    parameters = decoded(PARAMETERS, bytes(asked.parameters), what="`parameters`", param="parameters")
    require_few("parameters", parameters)
    for name, value in parameters.items():
        if not isinstance(value, str | int | float):  # booleans are int
            name = quoted(name)
            raise Invalid(f"`parameters`: `{name}` must be a string, a number or a boolean.", param=name)
    binary = parameters.get("binary_data_output", False)
    if not isinstance(binary, bool):
        raise Invalid("`parameters`: `binary_data_output` must be true or false.", param="binary_data_output")
    parts = []
    for it in listed("inputs", asked.inputs):
        part, at = _part(it, body, at)
        parts.append(_from_base64(part) if it.parameters.content_type == BASE64 else part)
    if at != len(body):
        raise Invalid(f"The body has {len(body) - at} bytes behind its JSON that are none of its inputs'.")
    outputs = tuple(_wanted(output, binary) for output in listed("outputs", asked.outputs))
    return Message(asked.id, tuple(parts), outputs, parameters, binary)


class Answer(NamedTuple):
    body: bytes
    json_bytes: int | None
    """For `Inference-Header-Content-Length`; None if all of it is JSON."""


def write(outputs: Sequence[Encoded], *, id: str, model: str, version: str) -> Answer:
    """The body of a 200."""
    told: list[dict[str, Any]] = []
    tails: list[bytes] = []
    for it in outputs:
        output = {"name": it.name, "datatype": it.datatype, "shape": it.shape}
        if isinstance(it.data, bytes):
            tails.append(it.data)
            told.append(output | {"parameters": {"binary_data_size": len(it.data)}})
        else:
            told.append(output | {"data": it.data})
    head = {"id": id} if id else {}
    json = msgspec.json.encode(head | {"model_name": model, "model_version": version, "outputs": told})
    return Answer(b"".join((json, *tails)), len(json)) if tails else Answer(json, None)


def _part(given: Input, body: bytes, at: int) -> tuple[Part, int]:
    """The input, and where the next one's bytes begin."""
    name, parameters = require_name("input", given.name), given.parameters
    if parameter := _elsewhere(parameters):
        raise Invalid(f"input `{name}`: `{parameter}` is not served; send the tensor itself.", param=name)
    shape = shaped(name, _sizes(name, given.shape))
    if parameters.binary_data_size == NOTHING:
        if given.data == NOTHING:
            raise Invalid(f"input `{name}` brings neither `data` nor `binary_data_size`.", param=name)
        return Part(name, given.datatype, shape, values=given.data), at
    if given.data != NOTHING:
        raise Invalid(f"input `{name}` brings both `data` and `binary_data_size`; send one of them.", param=name)
    size = _number(parameters.binary_data_size)
    if not 0 <= size <= len(body) - at:
        raise Invalid(
            f"input `{name}`: `binary_data_size` must be a number of bytes that follow the JSON; {len(body) - at} are "
            "left of them.",
            param=name,
        )
    return Part(name, given.datatype, shape, raw=memoryview(body)[at : at + size]), at + size


def _elsewhere(parameters: Elsewhere) -> str | None:
    """What it names that is not here."""
    return next((name for name in ELSEWHERE if getattr(parameters, name) != NOTHING), None)


def _sizes(name: str, shape: msgspec.Raw) -> list[int]:
    if bytes(shape).count(b",") >= RANK_MAX:
        raise Invalid(f"input `{name}` has more than {RANK_MAX} axes.", param=name)
    try:
        return SHAPE.decode(shape)
    except msgspec.MsgspecError:
        raise Invalid(f"input `{name}`: `shape` must be a list of whole numbers.", param=name) from None


def _number(json: msgspec.Raw) -> int:
    """-1 for what is no whole number."""
    try:
        return NUMBER.decode(json)
    except msgspec.MsgspecError:
        return -1


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
    name, parameters = require_name("output", output.name), output.parameters
    if parameter := _elsewhere(parameters):
        raise Invalid(f"output `{name}`: `{parameter}` is not served; leave it out.", param=name)
    if parameters.binary_data != NOTHING:
        if parameters.binary_data not in (TRUE, FALSE):
            raise Invalid(f"output `{name}`: `binary_data` must be true or false.", param=name)
        binary = parameters.binary_data == TRUE
    best = 0 if parameters.classification == NOTHING else _number(parameters.classification)
    return Wanted(name, binary, classes(name, best))
