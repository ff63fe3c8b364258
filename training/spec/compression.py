"""How a model is made small."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from msgspec import Meta, Struct

from training.spec.llm import Gptq
from training.spec.trainers import Gradient, Positive, Share

if TYPE_CHECKING:
    from training.contract import Graph, Rows, Weights
    from training.model import Model
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


class Distill(Struct, frozen=True, forbid_unknown_fields=True, tag="distill", tag_field="kind"):
    """A student with some of an encoder's layers learns from all of it: its embeddings, its scores, and the labels."""

    trainer: Gradient
    layers: Annotated[tuple[Annotated[int, Meta(ge=0)], ...], Meta(min_length=1)] = (1, 3, 5)
    """That the student begins with, counted from zero."""
    temperature: Positive = 2.0
    """Logits are divided by it before they are compared, so that also unlikely labels tell something."""

    def apply(self, model: Any, rows: Rows, run: Run) -> Model:
        from training.compression import distill

        return distill.distill(self, model, rows, run)


class PruneWeights(Struct, frozen=True, forbid_unknown_fields=True, tag="prune-weights", tag_field="kind"):
    """The smallest weights of each of an encoder's linear layers zero, the others trained on. For what makes use of
    zeros; ONNX Runtime does not, so its graph is neither smaller nor faster."""

    trainer: Gradient
    share: Share = 0.5

    def apply(self, model: Any, rows: Rows, run: Run) -> Model:
        from training.compression import prune

        return prune.weights(self, model, rows, run)


class PruneStructure(Struct, frozen=True, forbid_unknown_fields=True, tag="prune-structure", tag_field="kind"):
    """An encoder without those of its heads and feed-forward columns that matter least, the others trained on."""

    trainer: Gradient
    heads: Share = 0.25
    """How many of each layer's are taken out."""
    columns: Share = 0.5

    def apply(self, model: Any, rows: Rows, run: Run) -> Model:
        from training.compression import prune

        return prune.structure(self, model, rows, run)


Compression = DynamicInt8 | StaticInt8 | W8A8 | Gptq | Distill | PruneWeights | PruneStructure
