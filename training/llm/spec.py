"""What a recipe may say of fine-tuning a language model. Light: reading a recipe imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

_Rate = Annotated[float, Meta(gt=0, le=1)]
_Count = Annotated[int, Meta(ge=1)]


class Lora(Struct, frozen=True, forbid_unknown_fields=True):
    """Low-rank adapters on every linear layer of the decoder; the weights themselves stay as they are."""

    rank: Annotated[int, Meta(ge=1, le=512)] = 16
    alpha: Annotated[float, Meta(gt=0)] = 32
    """What they add is scaled by alpha / rank."""
    dropout: Annotated[float, Meta(ge=0, lt=1)] = 0.0


class Sft(Struct, frozen=True, forbid_unknown_fields=True, tag="sft", tag_field="kind"):
    """Supervised fine-tuning: the likelihood of the assistant's turns, given what comes before them."""

    lora: Lora = Lora()
    epochs: Annotated[float, Meta(gt=0)] = 1.0
    learning_rate: _Rate = 4e-4
    warmup: Annotated[float, Meta(ge=0, lt=1)] = 0.05
    """Share of the steps in which the rate rises; then it falls to nothing along a cosine."""
    tokens_max: Annotated[int, Meta(ge=16)] = 512
    """Of a line of the batch. Short conversations share one, each blind to the others; the end of a longer one is cut
    off."""
    batch: _Count = 2
    """Lines that go through the model together."""
    checkpoint_steps: _Count = 25


class Dpo(Struct, frozen=True, forbid_unknown_fields=True, tag="dpo", tag_field="kind"):
    """Direct preference optimisation: the chosen answer likelier than the rejected one, by more than the model that
    one starts from finds it."""

    lora: Lora = Lora()
    epochs: Annotated[float, Meta(gt=0)] = 1.0
    learning_rate: _Rate = 5e-5
    warmup: Annotated[float, Meta(ge=0, lt=1)] = 0.1
    beta: Annotated[float, Meta(gt=0)] = 0.1
    """How dearly leaving the first model is paid for."""
    tokens_max: Annotated[int, Meta(ge=16)] = 512
    """Of prompt and answer; the end is cut off, and a pair whose prompt alone is longer is left out."""
    batch: _Count = 4
    """Pairs a step."""
    checkpoint_steps: _Count = 10


class Gptq(Struct, frozen=True, forbid_unknown_fields=True, tag="gptq", tag_field="kind"):
    """Weights rounded one after the other, each making up for those before it on rows of the training set, by
    llm-compressor. Every linear layer but lm_head; embeddings and norms stay bfloat16."""

    scheme: Literal["w8a8", "w4a16"] = "w8a8"
    """INT8 weights and activations, after SmoothQuant; or INT4 weights in groups, smaller, and slower on a CPU."""
    group: Literal[32, 64, 128] = 64
    """INT4: weights that share a scale. SmolLM2's width of 576 is no multiple of 128."""
    smoothing: Annotated[float, Meta(ge=0, le=1)] = 0.8
    """INT8: how much of the activations' outliers is left to the weights."""
    rows: _Count = 24
    """Of the training set, to calibrate with: the longest."""
    tokens_max: Annotated[int, Meta(ge=16)] = 256
    """Of each of them."""
    s_max: Annotated[float, Meta(gt=0)] = 1800.0
    """It is stopped then."""
