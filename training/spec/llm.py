"""What a recipe may say of language models: what they learn from, how they learn, how they are made small by rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from msgspec import Meta, Struct

if TYPE_CHECKING:
    from training.contract import Examples, Rows, Weights
    from training.models.generator import Generator
    from training.run import Run

Positive = Annotated[float, Meta(gt=0)]
Rate = Annotated[float, Meta(gt=0, le=1)]
Share = Annotated[float, Meta(ge=0, lt=1)]
Count = Annotated[int, Meta(ge=1)]
Tokens = Annotated[int, Meta(ge=16)]


class Conversations(Struct, frozen=True, forbid_unknown_fields=True, tag="conversations", tag_field="kind"):
    """What was said, of which the assistant's turns are learnt and the last one is measured. In any of these layouts:
    `messages`, `conversations`, `instruction` and `output`, `prompt` and `answer`; see `training.llm.conversation`."""

    files: ClassVar[tuple[str, ...]] = ("train", "test")

    train: str | None = None
    test: str | None = None
    """Without it, the hash of what comes before the last answer decides."""
    test_share: Annotated[float, Meta(gt=0, lt=1)] = 0.1
    fill: dict[str, str] = {}
    """What stands for each `{{name}}` in the texts."""

    def load(self) -> Rows:
        from training.data import conversations

        return conversations.load(self)


class Preferences(Struct, frozen=True, forbid_unknown_fields=True, tag="preferences", tag_field="kind"):
    """Two answers each to the same conversation, `chosen` and `rejected`; the rest as in `conversations`."""

    files: ClassVar[tuple[str, ...]] = ("train", "test")

    train: str
    test: str | None = None
    test_share: Annotated[float, Meta(gt=0, lt=1)] = 0.1
    fill: dict[str, str] = {}

    def load(self) -> Rows:
        from training.data import conversations

        return conversations.load_preferences(self)


class Adapter(Struct, frozen=True, forbid_unknown_fields=True):
    """Low-rank updates beside every linear layer of the decoder. https://arxiv.org/abs/2106.09685"""

    rank: Annotated[int, Meta(ge=1, le=512)] = 16
    alpha: Positive = 32.0
    """What they add is scaled by alpha / rank."""
    dropout: Share = 0.0
    merge: bool = False
    """Add them to the weights at the end, and make a whole model; else the adapter alone is the artifact."""


class Sft(Struct, frozen=True, forbid_unknown_fields=True, tag="sft", tag_field="kind"):
    """Supervised fine-tuning: the likelihood of the assistant's turns, given what comes before them."""

    adapter: Adapter = Adapter()
    epochs: Positive = 1.0
    rate: Rate = 4e-4
    """Learning rate at its highest."""
    warmup: Share = 0.05
    """Share of the steps in which the rate rises; then it falls to nothing along half a cosine."""
    tokens_max: Tokens = 512
    """Of a line of the batch. Short conversations share one, each blind to the others; the end of a longer one is cut
    off."""
    batch: Count = 2
    """Lines that go through the model together."""
    checkpoint_steps: Count = 25

    def fit(self, model: Any, examples: Examples, run: Run) -> Generator:
        from training.llm import fit

        return fit.sft(self, model, examples, run)


class Dpo(Struct, frozen=True, forbid_unknown_fields=True, tag="dpo", tag_field="kind"):
    """Direct preference optimisation: the chosen answer likelier than the rejected one, by more than the model that
    one starts from finds it. https://arxiv.org/abs/2305.18290"""

    adapter: Adapter = Adapter()
    epochs: Positive = 1.0
    rate: Rate = 5e-5
    warmup: Share = 0.1
    beta: Positive = 0.1
    """How dearly leaving the first model is paid for."""
    tokens_max: Tokens = 512
    """Of prompt and answer; the end is cut off, and a pair whose prompt alone is longer is left out."""
    batch: Count = 4
    """Pairs a step."""
    checkpoint_steps: Count = 10

    def fit(self, model: Any, examples: Examples, run: Run) -> Generator:
        from training.llm import fit

        return fit.dpo(self, model, examples, run)


class Gptq(Struct, frozen=True, forbid_unknown_fields=True, tag="gptq", tag_field="kind"):
    """Weights rounded one after the other, each making up for those before it on rows of the training set, by
    llm-compressor (`headrace engine install compress`). Every linear layer but lm_head; embeddings and norms stay
    bfloat16."""

    scheme: Literal["w8a8", "w4a16"] = "w8a8"
    """INT8 weights and activations, after SmoothQuant; or INT4 weights in groups, smaller, and slower on a CPU."""
    group: Literal[32, 64, 128] = 64
    """INT4: weights that share a scale. SmolLM2's width of 576 is no multiple of 128."""
    smoothing: Annotated[float, Meta(ge=0, le=1)] = 0.8
    """INT8: how much of the activations' outliers is left to the weights."""
    rows: Count = 24
    """Of the training set, to calibrate with: the longest."""
    tokens_max: Tokens = 256
    """Of each of them."""
    s_max: Positive = 1800.0
    """It is stopped then."""

    def apply(self, model: Any, rows: Rows, run: Run) -> Weights:
        from training.compression import gptq

        return gptq.quantize(self, model, rows, run)
