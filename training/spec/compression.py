"""How a model is made small."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from msgspec import Meta, Struct

from training.spec.llm import Gptq

if TYPE_CHECKING:
    from training.contract import Graph, Rows, Weights
    from training.run import Run


class DynamicInt8(Struct, frozen=True, forbid_unknown_fields=True, tag="int8-dynamic", tag_field="kind"):
    """ONNX: INT8 weights per channel, activations measured while running, each token's by themselves. No calibration,
    and the best of the ways tried on text encoders."""

    def apply(self, model: Any, rows: Rows, run: Run) -> Graph:
        from training.compression import dynamic_int8
        from training.export import export

        return dynamic_int8.quantize(export(model))


class StaticInt8(Struct, frozen=True, forbid_unknown_fields=True, tag="int8-static", tag_field="kind"):
    """ONNX: INT8 weights per channel, and activations in ranges that are measured beforehand with training rows, as
    QuantizeLinear and DequantizeLinear around each operator. The best for convolutions."""

    rows: Annotated[int, Meta(ge=1)] = 512
    """To measure with."""
    ranges: Literal["minmax", "percentile"] = "minmax"
    """Of what was seen of each activation, all, or but for the farthest."""
    percentile: Annotated[float, Meta(gt=50, le=100)] = 99.99

    def apply(self, model: Any, rows: Rows, run: Run) -> Graph:
        from training.compression import static_int8

        return static_int8.quantize(self, model, rows.train, seed=run.derived("calibration"))


class W8A8(Struct, frozen=True, forbid_unknown_fields=True, tag="w8a8", tag_field="kind"):
    """safetensors in compressed-tensors' layout: INT8 weights per output channel, INT8 activations per token. Every
    linear layer but lm_head; embeddings and norms stay bfloat16."""

    def apply(self, model: Any, rows: Rows, run: Run) -> Weights:
        from training.compression import w8a8

        return w8a8.quantize(model)


Compression = DynamicInt8 | StaticInt8 | W8A8 | Gptq
