"""Making models small."""

from __future__ import annotations

import io
import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor

from training import model
from training.recipe import RecipeError
from training.spec import W8A8, DynamicInt8, Quantization

LOG = logging.getLogger(__name__)

_OPSET = 17
_INT8_MAX = 127


class Graph(msgspec.Struct, frozen=True):
    """A whole model as one ONNX file."""

    content: bytes


class Weights(msgspec.Struct, frozen=True):
    """Tensors, and what config.json has to say about them."""

    tensors: dict[str, Any]
    config: dict[str, Any]


def quantize(spec: Quantization, trained: model.Model) -> Graph | Weights:
    """The model in INT8, in the form that its runtime reads."""
    match spec, trained:
        case DynamicInt8(), model.Embedder() | model.Classifier():
            small = dynamic_int8(export(trained))
            LOG.info("quantization: INT8 ONNX, %.1f MB", len(small.content) / 1e6)
            return small
        case W8A8(), model.Generator():
            LOG.info("quantization: W8A8, round to nearest")
            return w8a8(trained.network)
    kind = type(trained).__name__.lower()
    raise RecipeError(f"quantization {type(spec).__name__} does not fit a model of kind {kind}")


def export(trained: model.Embedder | model.Classifier) -> Graph:
    """The fp32 model as ONNX: `input_ids` and `attention_mask`, int64 [n, tokens], to `embedding` or to `scores` and
    `logits`."""
    names = ["scores", "logits"] if isinstance(trained, model.Classifier) else ["embedding"]
    dynamic = {name: {0: "n", 1: "tokens"} for name in ("input_ids", "attention_mask")}
    ids, mask = model.tokenize(trained.tokenizer, ["one", "two or three"], tokens_max=trained.tokens_max)
    content = io.BytesIO()
    with warnings.catch_warnings():
        # The tracing exporter is deprecated, and the tracer notes every shape that it reads; but the graphs of the new
        # exporter do not pass onnxruntime's quantizer, and a test compares this graph with torch at other shapes.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            trained,
            (torch.from_numpy(ids), torch.from_numpy(mask)),
            content,
            input_names=["input_ids", "attention_mask"],
            output_names=names,
            dynamic_axes=dynamic | {name: {0: "n"} for name in names},
            opset_version=_OPSET,
            dynamo=False,
        )
    return Graph(content.getvalue())


def dynamic_int8(graph: Graph) -> Graph:
    """INT8 weights per channel, the embedding table among them: it is half of the file. Signed weights: unsigned ones
    are slower than fp32 on CPUs with VNNI. Activations are scaled token by token; see `scale_by_token`."""
    with tempfile.TemporaryDirectory(prefix="headrace-int8-") as folder:
        whole, shaped, small = (Path(folder) / name for name in ("whole.onnx", "shaped.onnx", "small.onnx"))
        whole.write_bytes(graph.content)
        # Symbolic shapes cannot be inferred through BERT's slice of its positions.
        quant_pre_process(whole, shaped, skip_symbolic_shape=True)
        quantize_dynamic(shaped, small, per_channel=True, weight_type=QuantType.QInt8)
        proto = onnx.load(small)
        scale_by_token(proto.graph)
        onnx.checker.check_model(proto)
        return Graph(proto.SerializeToString(deterministic=True))


def scale_by_token(graph: onnx.GraphProto) -> None:
    """Let each token's activations be scaled by their own largest, where the quantizer lets all of a batch share one
    scale: an answer must not depend on what else is in the batch, nor on padding."""
    graph.initializer.extend(
        onnx.numpy_helper.from_array(np.array(value, np.float32), name)
        for name, value in (("int8_max", _INT8_MAX), ("int8_least", 1e-12), ("int8_one", 1.0))
    )
    scales = {node.output[1] for node in graph.node if node.op_type == "DynamicQuantizeLinear"}
    products = {node.output[0]: node.input for node in graph.node if node.op_type == "Mul" and node.input[0] in scales}
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
            # One after the other: ONNX Runtime would fuse their product with the MatMulInteger, and then take the first
            # token's scale for all.
            scale, weight = products[node.input[1]]
            by_weight = f"{node.output[0]}_by_weight"
            nodes += [
                _node("Mul", [node.input[0], weight], by_weight),
                _node("Mul", [by_weight, scale], node.output[0]),
            ]
        elif node.output[0] not in products:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)


def _node(operator: str, inputs: list[str], output: str, **attributes: object) -> onnx.NodeProto:
    return onnx.helper.make_node(operator, inputs, [output], name=output, **attributes)


def w8a8(network: Any) -> Weights:
    """Every linear layer but lm_head to INT8, the rest to bfloat16, in the layout that compressed-tensors calls
    `int-quantized` (vLLM and transformers read it)."""
    linear = {name for name, part in network.named_modules() if isinstance(part, torch.nn.Linear)} - {"lm_head"}
    tied = network.config.tie_word_embeddings
    tensors: dict[str, Tensor] = {}
    for name, tensor in network.state_dict().items():
        layer = name.removesuffix(".weight")
        if layer in linear:
            tensors[name], tensors[f"{layer}.weight_scale"] = round_to_nearest(tensor)
        elif not (tied and name == "lm_head.weight"):
            tensors[name] = tensor.to(torch.bfloat16).contiguous()
    return Weights(tensors, {"dtype": "bfloat16", "quantization_config": _W8A8_CONFIG})


def round_to_nearest(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[out, in] → INT8 of the same shape, and fp32 scales [out, 1]; symmetric. Of a row's candidate scales, from the
    one that just holds its largest weight down to 0.7 of that, the one with the least squared error is taken: cutting
    off an outlier often costs less than coarser steps for all the others."""
    widest = weight.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / _INT8_MAX
    best, least = widest, torch.full_like(widest, torch.inf)
    for share in torch.linspace(1.0, 0.7, 31):
        scale = widest * share
        error = (_rounded(weight, scale) * scale - weight).square().sum(1, keepdim=True)
        best = torch.where(error < least, scale, best)
        least = torch.minimum(error, least)
    return _rounded(weight, best).to(torch.int8), best


def _rounded(weight: Tensor, scale: Tensor) -> Tensor:
    return (weight / scale).round().clamp(-_INT8_MAX, _INT8_MAX)


_W8A8_CONFIG = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False},
            "input_activations": {
                "num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True,
            },
        }
    },
}  # fmt: skip
