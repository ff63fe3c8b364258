"""What is served of a model that is not made small: of most, one ONNX file."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping
from typing import Any

import onnx
import torch

from training.contract import Beside, Graph, Weights
from training.errors import RecipeError
from training.model import Model
from training.models.generator import Generator, product
from training.vocabulary import Vocabulary

_OPSET = 17
_ML_OPSET = 2


def served(made: Any) -> Graph | Weights | Beside:
    """In fp32; what a compression made of it, as it is."""
    if isinstance(made, Graph | Weights | Beside):
        return made
    if isinstance(made, Generator):
        return product(made)
    return export(made)


def export(model: Model | Graph) -> Graph:
    """As ONNX, with the model's names of inputs and outputs; a graph as it is."""
    if isinstance(model, Graph):
        return model
    if not isinstance(model, Model):
        raise RecipeError(f"a {type(model).__name__.lower()} cannot be made an ONNX graph; see compress = 'w8a8'")
    content = io.BytesIO()
    with warnings.catch_warnings():
        # The tracing exporter is deprecated, and the tracer notes every shape that it reads; but the graphs of the new
        # exporter do not pass onnxruntime's quantizer, and a test compares this graph with torch at other shapes.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model.eval(),
            model.feed(model.sample),
            content,
            input_names=[*model.names_in],
            output_names=[*model.names_out],
            dynamic_axes={name: dict(axes) for name, axes in model.axes().items()},
            opset_version=_OPSET,
            dynamo=False,
        )
    whole = _named(content.getvalue(), model.vocabularies) if model.vocabularies else content.getvalue()
    return Graph(whole, model.beside(), model.card())


def _named(content: bytes, vocabularies: Mapping[str, Vocabulary]) -> bytes:
    """The graph with these inputs and outputs as values instead of numbers: a LabelEncoder at either end."""
    proto = onnx.load_from_string(content)
    graph = proto.graph
    before, after = [], []
    for name, vocabulary in vocabularies.items():
        number = f"{name}/number"
        for node in graph.node:
            node.input[:] = [number if it == name else it for it in node.input]
            node.output[:] = [number if it == name else it for it in node.output]
        text = vocabulary.values.dtype == object
        values = {"strings" if text else "int64s": vocabulary.values.tolist()}
        numbers = {"int64s": range(1, len(vocabulary) + 1)}
        if tensor := next((it for it in graph.input if it.name == name), None):
            before.append(_encoder(name, values, number, numbers, default_int64=0))
        else:
            tensor = next(it for it in graph.output if it.name == name)
            nothing = {"default_string": ""} if text else {"default_int64": -1}
            after.append(_encoder(number, numbers, name, values, **nothing))
        tensor.type.tensor_type.elem_type = onnx.TensorProto.STRING if text else onnx.TensorProto.INT64
    nodes = [*before, *graph.node, *after]
    del graph.node[:]
    graph.node.extend(nodes)
    proto.opset_import.append(onnx.helper.make_opsetid("ai.onnx.ml", _ML_OPSET))
    onnx.checker.check_model(proto)
    found: bytes = proto.SerializeToString(deterministic=True)
    return found


def _encoder(
    given: str, keys: Mapping[str, object], found: str, values: Mapping[str, object], **default: int | str
) -> onnx.NodeProto:
    lists = {f"keys_{kind}": it for kind, it in keys.items()} | {f"values_{kind}": it for kind, it in values.items()}
    return onnx.helper.make_node("LabelEncoder", [given], [found], name=found, domain="ai.onnx.ml", **lists, **default)
