"""INT8 for ONNX graphs whose activations are measured while they run."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.shape_inference import quant_pre_process

from training.contract import Graph

_INT8_MAX = 127
_OPERATORS = ["MatMul", "Gather"]
"""Products with weights, Gemm among them, and tables. Not Conv: a filter reads more than one token at a time."""


def quantize(graph: Graph) -> Graph:
    """INT8 weights per channel, the embedding table among them: it is half of the file. Signed weights: unsigned ones
    are slower than fp32 on CPUs with VNNI. Activations are scaled token by token; see `scale_by_token`."""
    with tempfile.TemporaryDirectory(prefix="headrace-int8-") as folder:
        whole, shaped, small = (Path(folder) / name for name in ("whole.onnx", "shaped.onnx", "small.onnx"))
        whole.write_bytes(graph.content)
        # Symbolic shapes cannot be inferred through BERT's slice of its positions.
        quant_pre_process(whole, shaped, skip_symbolic_shape=True)
        quantize_dynamic(shaped, small, op_types_to_quantize=_OPERATORS, per_channel=True, weight_type=QuantType.QInt8)
        proto = onnx.load(small)
        scale_by_token(proto.graph)
        onnx.checker.check_model(proto)
        return msgspec.structs.replace(graph, content=proto.SerializeToString(deterministic=True))


def scale_by_token(graph: onnx.GraphProto) -> None:
    """Let each token's activations be scaled by their own largest, where the quantizer lets all of a batch share one
    scale: an answer must not depend on what else is in the batch, nor on padding."""
    graph.initializer.extend(
        onnx.numpy_helper.from_array(np.array(value, np.float32), name)
        for name, value in (("int8_max", _INT8_MAX), ("int8_least", 1e-12), ("int8_one", 1.0))
    )
    scales = {node.output[1] for node in graph.node if node.op_type == "DynamicQuantizeLinear"}
    products = {node.output[0]: node.input for node in graph.node if node.op_type == "Mul" and node.input[0] in scales}
    whole_of = {node.output[0]: node for node in graph.node if node.op_type == "MatMulInteger"}
    cast_of = {node.output[0]: node for node in graph.node if node.op_type == "Cast" and node.input[0] in whole_of}
    constants = {it.name: it for it in graph.initializer}
    gone = {*products, *whole_of, *cast_of}
    nodes = []
    for node in graph.node:
        if node.op_type == "DynamicQuantizeLinear":
            [given], [whole, scale, zero] = node.input, node.output
            graph.initializer.append(onnx.numpy_helper.from_array(np.array(128, np.uint8), zero))
            nodes += [
                _node("Abs", [given], f"{scale}_abs"),
                _node("ReduceMax", [f"{scale}_abs"], f"{scale}_max", axes=[-1], keepdims=1),
                _node("Max", [f"{scale}_max", "int8_least"], f"{scale}_widest"),
                _node("Div", [f"{scale}_widest", "int8_max"], scale),
                _node("Div", [given, scale], f"{scale}_steps"),
                _node("QuantizeLinear", [f"{scale}_steps", "int8_one", zero], whole),
            ]
        elif node.op_type == "Mul" and node.input[1] in products:
            # The weights' scale within ONNX Runtime's own product, and the tokens' behind it: there it would take the
            # first token's for all.
            scale, weight_scale = products[node.input[1]]
            given, weight, zero, weight_zero = whole_of[cast_of[node.input[0]].input[0]].input
            for name in (weight_scale, weight_zero):
                _spread(constants[name], constants[weight].dims)
            by_weight = f"{node.output[0]}_by_weight"
            nodes += [
                _node(
                    "MatMulIntegerToFloat",
                    [given, weight, "int8_one", weight_scale, zero, weight_zero],
                    by_weight,
                    domain="com.microsoft",
                ),
                _node("Mul", [by_weight, scale], node.output[0]),
            ]
        elif node.output[0] not in gone:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)


def _spread(columns: onnx.TensorProto, weight: Sequence[int]) -> None:
    """What the quantizer says of each column, for each matrix of a weight that is several: ONNX Runtime wants it as
    [..., 1, columns]."""
    if len(weight) > 2 and len(columns.dims) == 1:
        values = np.broadcast_to(onnx.numpy_helper.to_array(columns), (*weight[:-2], 1, columns.dims[0]))
        columns.CopyFrom(onnx.numpy_helper.from_array(values, columns.name))


def _node(operator: str, inputs: list[str], output: str, **attributes: Any) -> onnx.NodeProto:
    return onnx.helper.make_node(operator, inputs, [output], name=output, **attributes)
