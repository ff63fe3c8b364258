"""What is served of a model that is not made small: of most, one ONNX file."""

from __future__ import annotations

import io
import warnings
from typing import Any

import torch

from training.contract import Beside, Graph, Weights
from training.errors import RecipeError
from training.model import Model
from training.models.generator import Generator, product

_OPSET = 17


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
    return Graph(content.getvalue(), model.beside(), model.card())
