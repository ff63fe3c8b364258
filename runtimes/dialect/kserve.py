"""Requests of the Open Inference Protocol for models that speak tensors: what they give held against what the model
takes, and its answer. Pure; the two wires are `kserve_rest` and `kserve_grpc`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from runtimes.contract import InferReply, InferRequest, Invalid, Predictor, Tensor
from runtimes.dialect.elements import Encoded, Message, Part, Wanted, quoted, require_datatype
from runtimes.dialect.tensors import array, listed, raw, texts

if TYPE_CHECKING:
    from runtimes.contract import Array

Write = Callable[[list[Encoded], str, str], bytes]
"""Puts outputs, and the model's name and version, on the wire."""


class Tensors:
    """The Translation of one call, whose message has been read from its wire already."""

    tasks: ClassVar[frozenset[str]] = frozenset({"classify", "embed", "predict"})

    def __init__(self, message: Message, write: Write, version: str = "") -> None:
        self.message = message
        self.write = write
        self.version = version

    def parse(self, body: bytes, *, predictor: Predictor, deadline_s: float, flow: str) -> Asked:
        message = self.message
        declared = {tensor.name: tensor for tensor in predictor.inputs}
        inputs: dict[str, Array] = {}
        for part in message.parts:
            if part.name in inputs:
                raise Invalid(f"input `{part.name}` is given twice.", param=part.name)
            inputs[part.name] = _admitted(part, declared)
        if not inputs and not all(tensor.optional for tensor in predictor.inputs):
            raise Invalid(f"no inputs are given; the model takes {_names(predictor.inputs)}.", param="inputs")
        outputs = message.outputs
        names = tuple([wanted.name for wanted in outputs])
        if len({*names}) != len(names):
            raise Invalid("an output is asked for twice.", param="outputs")
        given = {tensor.name: tensor for tensor in predictor.outputs}
        # A server elsewhere has labels of its own, unless the configuration says which they are.
        theirs = bool(predictor.versions) and not predictor.labels
        for wanted in outputs:
            tensor = given.get(wanted.name)
            if tensor is None:
                raise Invalid(
                    f"output `{wanted.name}` is none of the model's; it gives {_names(predictor.outputs)}.",
                    param=wanted.name,
                )
            # Of strings no server can rank any, and a Triton that is asked to ends.
            if wanted.classes and (tensor.datatype == "BYTES" or not (theirs or len(tensor.shape) == 2)):
                raise Invalid(
                    f"output `{wanted.name}`: `classification` is of numbers in rows and columns; this is "
                    f"{tensor.datatype} {list(tensor.shape)}.",
                    param=wanted.name,
                )
        classes = {wanted.name: wanted.classes for wanted in outputs if wanted.classes} if theirs else {}
        request = InferRequest(inputs, deadline_s, flow, names, classes, self.version, message.id, message.parameters)
        told = outputs or [Wanted(tensor.name, message.binary) for tensor in predictor.outputs]
        return Asked(request, told, self.write)


class Asked:
    """See runtimes.dialect.Asked."""

    def __init__(self, request: InferRequest, outputs: Sequence[Wanted], write: Write) -> None:
        self.request = request
        self.outputs = outputs
        self.write = write

    def answer(self, reply: InferReply, *, model: str, predictor: Predictor, id: str, created_s: int) -> bytes:
        given = {tensor.name: tensor for tensor in predictor.outputs}
        outputs = []
        for wanted in self.outputs:
            name = wanted.name
            if name not in reply.outputs:  # a model need not give all that it declares
                continue
            found, datatype = reply.outputs[name], given[name].datatype
            if given[name].column:
                found = found[:, np.newaxis]
            if name in self.request.classes:
                datatype = "BYTES"
            elif wanted.classes:
                found, datatype = _best(found, wanted.classes, predictor.labels), "BYTES"
            outputs.append(Encoded(name, datatype, found.shape, (raw if wanted.binary else listed)(found, datatype)))
        return self.write(outputs, model, reply.version or predictor.version)


def _admitted(part: Part, declared: dict[str, Tensor]) -> Array:
    tensor = declared.get(part.name)
    if tensor is None:
        raise Invalid(
            f"input `{part.name}` is none of the model's; it takes {_names(declared.values())}.", param=part.name
        )
    datatype = require_datatype(part)
    if datatype != tensor.datatype:
        raise Invalid(f"input `{part.name}` is {datatype}; the model takes {tensor.datatype}.", param=part.name)
    shape = part.shape
    if tensor.column and shape[-1:] == (1,) and len(shape) == len(tensor.told):
        shape = shape[:-1]
    if len(shape) != len(tensor.shape) or any(
        size not in (-1, given) for size, given in zip(tensor.shape, shape, strict=True)
    ):
        raise Invalid(
            f"input `{part.name}` has the shape {quoted(list(part.shape))}; the model takes {list(tensor.told)}, "
            "-1 being any size.",
            param=part.name,
        )
    found = array(part).reshape(shape)
    return texts(part.name, found) if datatype == "BYTES" else found


def _best(found: Array, classes: int, labels: Sequence[str]) -> Array:
    """Each row's best columns, as Triton's classification extension has them: `value:column`, and `:label` if the
    columns have labels."""
    rows, columns = found.shape
    # Twice the other way round: of equals, the first column comes first.
    order = columns - 1 - np.argsort(found[:, ::-1], axis=1, kind="stable")[:, : -classes - 1 : -1]
    texts = np.empty(order.shape, object)
    for row in range(rows):
        for place, column in enumerate(order[row].tolist()):
            value = found[row, column].item()
            text = f"{value:f}:{column}" if isinstance(value, float) else f"{int(value)}:{column}"
            texts[row, place] = f"{text}:{labels[column]}" if len(labels) == columns else text
    return texts


def _names(tensors: Iterable[Tensor]) -> str:
    return ", ".join(f"`{tensor.name}`" for tensor in tensors)
