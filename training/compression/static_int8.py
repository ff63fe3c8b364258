"""INT8 for ONNX graphs whose activations keep to ranges that are measured beforehand."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process

from training.contract import Array, Examples, Graph
from training.errors import RecipeError
from training.export import export
from training.model import Model
from training.spec.compression import StaticInt8

LOG = logging.getLogger("training")

_OPERATORS = ("Conv", "Gemm", "MatMul", "Relu", "MaxPool", "Flatten", "Reshape")
"""What is computed in INT8. Scaling what comes in, and softmax, are cheap and want their precision."""
_BATCH = 64


def quantize(spec: StaticInt8, model: Any, examples: Examples, *, seed: int) -> Graph:
    """Unsigned activations and signed weights, per channel: the pair for which CPUs with VNNI have an instruction."""
    if not isinstance(model, Model):
        raise RecipeError("compress 'int8-static' needs the model itself: name it before what makes a graph")
    graph = export(model)
    rows = Rows(model, examples, min(spec.rows, len(examples)), seed=seed)
    method = CalibrationMethod.MinMax if spec.ranges == "minmax" else CalibrationMethod.Percentile
    LOG.info("int8-static: measuring activations with %d rows", rows.count)
    with tempfile.TemporaryDirectory(prefix="headrace-int8-") as folder:
        whole, shaped, small = (Path(folder) / name for name in ("whole.onnx", "shaped.onnx", "small.onnx"))
        whole.write_bytes(graph.content)
        quant_pre_process(whole, shaped)
        quantize_static(
            shaped,
            small,
            rows,
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=[*_OPERATORS],
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=method,
            extra_options={"CalibPercentile": spec.percentile} if spec.ranges == "percentile" else {},
        )
        proto = onnx.load(small)
        onnx.checker.check_model(proto)
        return msgspec.structs.replace(graph, content=proto.SerializeToString(deterministic=True))


class Rows(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime is untyped here
    """Training rows as the graph reads them, in batches of one size, which percentiles need."""

    def __init__(self, model: Model, examples: Examples, count: int, *, seed: int) -> None:
        batch = min(_BATCH, count)
        self.count = count // batch * batch
        chosen = np.random.default_rng(seed).permutation(len(examples))[: self.count]
        self._fed = self._feed(model, examples, np.split(chosen, self.count // batch))

    def get_next(self) -> dict[str, Array] | None:
        """As onnxruntime wants it: None at the end."""
        return next(self._fed, None)

    def _feed(self, model: Model, examples: Examples, batches: list[Array]) -> Iterator[dict[str, Array]]:
        for chosen in batches:
            fed = model.feed(examples.take(chosen).inputs)
            yield {name: it.numpy() for name, it in zip(model.names_in, fed, strict=True)}
