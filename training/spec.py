"""What a recipe file may say: one frozen Struct per stage. Light, so that asking for a recipe imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

Task = Literal["generate", "classify", "embed"]


class Data(Struct, frozen=True, forbid_unknown_fields=True):
    """Files of rows, CSV or JSON Lines. Paths are relative to the recipe, in `--set` to the working folder."""

    test: str | None = None
    """Without it, `train`'s own `split` column decides, or the hash of each text."""
    train: str | None = None
    text: str = "text"
    label: str = "label"
    test_share: Annotated[float, Meta(gt=0, lt=1)] = 0.3
    """How much of `train` is held out when nothing else decides."""


class Base(Struct, frozen=True, forbid_unknown_fields=True):
    """The model to start from, inside an installed Python package, so that it arrives like any dependency."""

    package: str
    licence: str
    tokens_max: Annotated[int, Meta(ge=8)]


class Probe(Struct, frozen=True, forbid_unknown_fields=True, tag="probe", tag_field="kind"):
    """Encoder frozen, multinomial logistic regression on its mean-pooled output. Seconds, and on short texts within
    a point of fine-tuning."""

    c: Annotated[float, Meta(gt=0)] = 20.0
    """Inverse strength of the L2 penalty, as in scikit-learn."""
    steps_max: Annotated[int, Meta(ge=1)] = 500


class DynamicInt8(Struct, frozen=True, forbid_unknown_fields=True, tag="int8-dynamic", tag_field="kind"):
    """ONNX: INT8 weights per channel, activations measured while running, each token's by themselves. No calibration,
    and the best of the ways tried on text encoders."""


class W8A8(Struct, frozen=True, forbid_unknown_fields=True, tag="w8a8", tag_field="kind"):
    """safetensors in compressed-tensors' layout: INT8 weights per output channel, INT8 activations per token. Every
    linear layer but lm_head; embeddings and norms stay bfloat16."""


Quantization = DynamicInt8 | W8A8


class Recipe(Struct, frozen=True, forbid_unknown_fields=True):
    """How one artifact is made."""

    name: str
    """Its name on the shelf."""
    about: str
    task: Task
    data: Data
    base: Base
    quantization: Quantization
    gate: dict[str, float]
    """`<measure>_min`, `<measure>_max`, `<measure>_drop_max` or `<measure>_increase_max` → bound; the last two
    compare with the fp32 model. All must hold, or nothing is published."""
    truncate: bool = False
    """A text longer than `base.tokens_max` is answered by its beginning; else it is refused."""
    trainer: Probe | None = None
    """None: the base model as it is."""
    seed: int = 0
