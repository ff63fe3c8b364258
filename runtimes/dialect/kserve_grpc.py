"""The Open Inference Protocol's gRPC wire: protobuf, with tensors as raw bytes or as typed lists. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import msgspec
from google.protobuf.message import DecodeError
from msgspec.structs import replace

from runtimes.contract import Datatype, Invalid
from runtimes.dialect.elements import (
    Encoded,
    Message,
    Part,
    Wanted,
    classes,
    require_datatype,
    require_few,
    require_name,
    shaped,
)
from runtimes.dialect.kserve_rest import ELSEWHERE
from runtimes.dialect.messages import ModelInferRequest, ModelInferResponse
from runtimes.dialect.protobuf import (
    FIELDS_MAX,
    ID,
    RAW_INPUT_CONTENTS,
    RAW_OUTPUT_CONTENTS,
    UNCOUNTED_BYTES_MAX,
    field,
    fields,
    require_modest,
    too_many,
)

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


class Asked(msgspec.Struct, frozen=True, gc=False):
    """A request, and whom it is for."""

    model: str
    version: str
    message: Message
    size: int
    """Bytes that it came in."""


def read(body: bytes | bytearray) -> Asked:
    """Raises Invalid."""
    rest, raws = cut(body)
    is_known = raws and len(rest) <= KNOWN_BYTES_MAX
    model, version, message = (_known if is_known else _told)(rest, len(raws))
    if raws:
        parts = tuple([Part(it.name, it.datatype, it.shape, raw) for it, raw in zip(message.parts, raws, strict=True)])
        message = Message(message.id, parts, message.outputs, message.parameters, binary=True)
    return Asked(model, version, message, len(body))


def write(outputs: Sequence[Encoded], *, id: str, model: str, version: str, final: bool | None = None) -> bytes:
    """A ModelInferResponse. `final` is for streams: whether another one follows for the same request."""
    told = tuple([(it.name, it.datatype, it.shape) for it in outputs])
    parts = [_head(told, model, version, final)]
    if id:
        parts += field(ID, id.encode())
    for it in outputs:
        assert isinstance(it.data, bytes)
        parts += field(RAW_OUTPUT_CONTENTS, it.data)
    return b"".join(parts)


#: What requests and answers say beside their elements, and that is much the same with each call, is made once: so many
#: of either, of requests that say no more than so much.
KNOWN_MAX, KNOWN_BYTES_MAX = 256, 512


@lru_cache(KNOWN_MAX)
def _head(
    told: tuple[tuple[str, Datatype, tuple[int, ...]], ...], model: str, version: str, final: bool | None
) -> bytes:
    """A ModelInferResponse but for its id and elements."""
    answer = ModelInferResponse(
        model_name=model,
        model_version=version,
        outputs=[{"name": name, "datatype": datatype, "shape": [*map(int, shape)]} for name, datatype, shape in told],
        parameters={} if final is None else {"triton_final_response": {"bool_param": final}},
    )
    head: bytes = answer.SerializeToString()
    return head


def cut(body: bytes | bytearray) -> tuple[bytes, list[memoryview]]:
    """A ModelInferRequest without its raw_input_contents, and those, where they lie: protobuf would copy them twice,
    and they may be long. Raises Invalid."""
    view = memoryview(body)
    kept: list[memoryview] = []
    raws: list[memoryview] = []
    for tag, start, begin, end in fields(body, 0, len(body)):
        if tag == RAW_INPUT_CONTENTS:
            raws.append(view[begin:end])
        else:
            kept.append(view[start:end])
        if len(raws) + len(kept) > FIELDS_MAX:
            raise too_many(FIELDS_MAX)
    return b"".join(kept), raws


def _told(rest: bytes, raws: int) -> tuple[str, str, Message]:
    """Model, version and the rest of what `cut` left of a request with so many raw_input_contents. Raises Invalid."""
    if len(rest) > UNCOUNTED_BYTES_MAX:
        require_modest(rest)
    try:
        asked = ModelInferRequest.FromString(rest)
    except DecodeError:
        raise Invalid("The message is no inference.ModelInferRequest.") from None
    require_few("inputs", asked.inputs)
    require_few("outputs", asked.outputs)
    if raws not in (0, len(asked.inputs)):
        raise Invalid(f"{raws} raw_input_contents were sent for {len(asked.inputs)} inputs; send one for each.")
    # Slices, here and below: protobuf's lists end with an exception whenever they are gone through.
    parts = tuple([_part(given, is_raw=raws > 0) for given in asked.inputs[:]])
    outputs = tuple([_wanted(output) for output in asked.outputs[:]])
    message = Message(asked.id, parts, outputs, _plain(asked.parameters), binary=True)
    return asked.model_name, asked.model_version, message


_known = lru_cache(KNOWN_MAX)(_told)


def _part(given: Any, *, is_raw: bool) -> Part:
    name = require_name("input", given.name)
    for parameter in ELSEWHERE:
        if parameter in given.parameters:
            raise Invalid(f"input `{name}`: `{parameter}` is not served; send the tensor itself.", param=name)
    part = Part(name, given.datatype, shaped(name, given.shape[:]))
    listed = given.contents.ListFields()
    if is_raw:
        if listed:
            raise Invalid(f"input `{name}` brings contents beside raw_input_contents; send one of them.", param=name)
        return part
    listed = {field.name: values for field, values in listed}
    datatype = require_datatype(part)
    expected = CONTENTS.get(datatype)
    if expected is None:
        raise Invalid(f"input `{name}` is {datatype}, which goes as raw_input_contents only.", param=name)
    if listed.keys() - {expected}:
        raise Invalid(f"input `{name}` is {datatype}, whose elements go as {expected}.", param=name)
    return replace(part, values=listed.get(expected, ()))


def _wanted(output: Any) -> Wanted:
    name = require_name("output", output.name)
    for parameter in ELSEWHERE:
        if parameter in output.parameters:
            raise Invalid(f"output `{name}`: `{parameter}` is not served; leave it out.", param=name)
    return Wanted(name, binary=True, classes=classes(name, _plain(output.parameters).get("classification", 0)))


def _plain(parameters: Any) -> dict[str, Any]:
    if not parameters:
        return {}
    require_few("parameters", parameters)
    found = {}
    for name, value in parameters.items():
        kind = value.WhichOneof("parameter_choice")
        if kind is not None:
            found[name] = getattr(value, kind)
    return found
