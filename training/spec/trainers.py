"""How a model learns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from msgspec import Meta, Struct

if TYPE_CHECKING:
    from training.contract import Examples
    from training.model import Model
    from training.run import Run

Positive = Annotated[float, Meta(gt=0)]
NotNegative = Annotated[float, Meta(ge=0)]
Share = Annotated[float, Meta(ge=0, lt=1)]
Count = Annotated[int, Meta(ge=1)]


class Probe(Struct, frozen=True, forbid_unknown_fields=True, tag="probe", tag_field="kind"):
    """Everything but the head frozen, and the head the multinomial logistic regression on what comes out of it.
    Seconds, and on short texts within a point of fine-tuning."""

    c: Positive = 20.0
    """Inverse strength of the L2 penalty, as in scikit-learn."""
    steps_max: Count = 500

    def fit(self, model: Any, examples: Examples, run: Run) -> Model:
        from training.trainers import probe

        return probe.fit(self, model, examples)


class Logistic(Struct, frozen=True, forbid_unknown_fields=True, tag="logistic", tag_field="kind"):
    """For the model `ngrams`: its linear layer the multinomial logistic regression on weighed n-grams."""

    c: Positive = 10.0
    """Inverse strength of the L2 penalty, as in scikit-learn."""
    balanced: bool = False
    """Rows of rare classes count more, so that all classes count the same."""

    def fit(self, model: Any, examples: Examples, run: Run) -> Model:
        from training.trainers import logistic

        return logistic.fit(self, model, examples)


class Lora(Struct, frozen=True, forbid_unknown_fields=True):
    """Low-rank updates beside frozen weights; merged into them at the end. https://arxiv.org/abs/2106.09685"""

    rank: Count = 8
    alpha: Positive = 16.0
    dropout: Share = 0.0
    targets: tuple[str, ...] = ("query", "key", "value", "dense")
    """Endings of the names of the linear layers that get one."""


class Gradient(Struct, frozen=True, forbid_unknown_fields=True, tag="gradient", tag_field="kind"):
    """Stochastic gradient descent by one of its names."""

    epochs: Positive
    rate: Positive
    """Learning rate at its highest."""
    batch: Count = 32
    optimizer: Literal["adamw", "sgd"] = "adamw"
    momentum: Share = 0.0
    """For `sgd`."""
    schedule: Literal["constant", "linear", "cosine", "onecycle"] = "linear"
    """After warming up: as it is, down to zero in a line or half a cosine, or up and down as in
    https://arxiv.org/abs/1708.07120."""
    warmup: Share = 0.1
    """Share of all steps during which the rate rises."""
    decay: NotNegative = 0.01
    """Weight decay, of matrices only."""
    head_rate: Positive | None = None
    """Learning rate of what is new; None: as the rest."""
    probe: Probe | None = None
    """Start the head as a Probe leaves it."""
    lora: Lora | None = None
    """Learn these instead of the weights themselves."""
    clip: Positive | None = 1.0
    """Longest gradient, as a norm over all parameters."""
    smoothing: Share = 0.0
    """Label smoothing, of classes."""
    balanced: bool = False
    """Rows of rare classes count more, so that all classes count the same."""
    validation: Share = 0.0
    """Part of the training rows that is not learnt from, but measured after each epoch."""
    keep: Literal["last", "best"] = "last"
    """Which epoch's weights: with `validation`, those with the least loss there may be better."""
    patience: Count | None = None
    """Epochs without a lesser loss in validation after which it is over."""
    checkpoint_s: Positive = 60.0

    def fit(self, model: Any, examples: Examples, run: Run) -> Model:
        from training.trainers import gradient

        return gradient.fit(self, model, examples, run)


Trainer = Probe | Logistic | Gradient
