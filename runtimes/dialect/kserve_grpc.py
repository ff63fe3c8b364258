"""The Open Inference Protocol's gRPC wire: protobuf, with tensors as raw bytes or as typed lists. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from google.protobuf.message import DecodeError

from runtimes.contract import Invalid
from runtimes.dialect.elements import (
    NAMED_MAX,
    Encoded,
    Message,
    Part,
    Wanted,
    classes,
    require_datatype,
    require_few,
    shaped,
)
from runtimes.dialect.kserve_rest import ELSEWHERE
from runtimes.dialect.messages import ModelInferRequest, ModelInferResponse

#: Where each datatype's elements are, if they come as a typed list. FP16 has none.
CONTENTS: Mapping[str, str] = MappingProxyType(
    {
        "BOOL": "bool_contents",
        **dict.fromkeys(("INT8", "INT16", "INT32"), "int_contents"),
        "INT64": "int64_contents",
        **dict.fromkeys(("UINT8", "UINT16", "UINT32"), "uint_contents"),
        "UINT64": "uint64_contents",
        "FP32": "fp32_contents",
        "FP64": "fp64_contents",
        "BYTES": "bytes_contents",
    }
)


#: Of protobuf's encoding: what precedes bytes and messages, and, with that, the field that tensors come in.
LENGTH_DELIMITED = 2
RAW_INPUT_CONTENTS = 7 << 3 | LENGTH_DELIMITED
VARINT_BYTES = 10


class Asked(NamedTuple):
    """A request, and whom it is for."""

    model: str
    version: str
    message: Message
    size: int
    """Bytes that it came in."""


def read(body: bytes | bytearray) -> Asked:
    """Raises Invalid."""
    rest, raws = cut(body)
    try:
        asked = ModelInferRequest.FromString(rest)
    except DecodeError:
        raise Invalid("The message is no inference.ModelInferRequest.") from None
    return Asked(asked.model_name, asked.model_version, _message(asked, raws), len(body))


def write(outputs: Sequence[Encoded], *, id: str, model: str, version: str, final: bool | None = None) -> bytes:
    """A ModelInferResponse. `final` is for streams: whether another one follows for the same request."""
    told = [
        {"name": name, "datatype": datatype, "shape": [*map(int, shape)]} for name, datatype, shape, _data in outputs
    ]
    answer = ModelInferResponse(
        model_name=model,
        model_version=version,
        id=id,
        outputs=told,
        raw_output_contents=[data for *_, data in outputs],
        parameters={} if final is None else {"triton_final_response": {"bool_param": final}},
    )
    body: bytes = answer.SerializeToString()
    return body


def cut(body: bytes | bytearray) -> tuple[bytes, list[memoryview]]:
    """A ModelInferRequest without its raw_input_contents, and those, where they lie: protobuf would copy them twice,
    and they may be long. From what no sender writes on, and after very many, it stays whole, for protobuf to judge."""
    view, kept, raws, at = memoryview(body), list[memoryview](), list[memoryview](), 0
    while at < len(body):
        tag, begin = _varint(body, at)
        size, begin = _varint(body, begin)
        end = begin + size
        if tag & 7 != LENGTH_DELIMITED or end > len(body) or len(kept) + len(raws) > 4 * NAMED_MAX:
            kept.append(view[at:])
            break
        if tag == RAW_INPUT_CONTENTS:
            raws.append(view[begin:end])
        else:
            kept.append(view[at:end])
        at = end
    return b"".join(kept), raws


def _varint(body: bytes | bytearray, at: int) -> tuple[int, int]:
    """The number there, and where the next byte is; one beyond the body if it does not end in time."""
    number = 0
    for index, byte in enumerate(body[at : at + VARINT_BYTES]):
        number |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            return number, at + index + 1
    return 0, len(body) + 1


def _message(asked: Any, raws: list[memoryview]) -> Message:
    """`raws` are those that were cut out."""
    require_few("inputs", asked.inputs)
    require_few("outputs", asked.outputs)
    number = len(raws) + len(asked.raw_input_contents)
    if number not in (0, len(asked.inputs)):
        raise Invalid(f"{number} raw_input_contents were sent for {len(asked.inputs)} inputs; send one for each.")
    contents = [*raws, *asked.raw_input_contents]
    parts = tuple(_part(given, contents[index] if contents else None) for index, given in enumerate(asked.inputs))
    outputs = tuple(_wanted(output) for output in asked.outputs)
    return Message(asked.id, parts, outputs, _plain(asked.parameters), binary=True)


def _part(given: Any, raw: bytes | memoryview | None) -> Part:
    name = given.name
    for parameter in ELSEWHERE:
        if parameter in given.parameters:
            raise Invalid(f"input `{name}`: `{parameter}` is not served; send the tensor itself.", param=name)
    part = Part(name, given.datatype, shaped(name, given.shape))
    listed = {field.name: values for field, values in given.contents.ListFields()}
    if raw is not None:
        if listed:
            raise Invalid(f"input `{name}` brings contents beside raw_input_contents; send one of them.", param=name)
        return part._replace(raw=raw)
    datatype = require_datatype(part)
    expected = CONTENTS.get(datatype)
    if expected is None:
        raise Invalid(f"input `{name}` is {datatype}, which goes as raw_input_contents only.", param=name)
    if listed.keys() - {expected}:
        raise Invalid(f"input `{name}` is {datatype}, whose elements go as {expected}.", param=name)
    return part._replace(values=listed.get(expected, ()))


def _wanted(output: Any) -> Wanted:
    name = output.name
    for parameter in ELSEWHERE:
        if parameter in output.parameters:
            raise Invalid(f"output `{name}`: `{parameter}` is not served; leave it out.", param=name)
    return Wanted(name, binary=True, classes=classes(name, _plain(output.parameters)))


def _plain(parameters: Any) -> dict[str, Any]:
    require_few("parameters", parameters)
    found = {}
    for name, value in parameters.items():
        kind = value.WhichOneof("parameter_choice")
        if kind is not None:
            found[name] = getattr(value, kind)
    return found
