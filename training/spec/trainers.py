"""How a model learns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from msgspec import Meta, Struct

from training.spec.llm import Dpo, Sft

if TYPE_CHECKING:
    from training.contract import Array, Examples, Targets
    from training.model import Model
    from training.run import Run

Positive = Annotated[float, Meta(gt=0)]
NotNegative = Annotated[float, Meta(ge=0)]
Share = Annotated[float, Meta(ge=0, lt=1)]
Count = Annotated[int, Meta(ge=1)]


class Frozen(Struct, frozen=True):
    """Learns from what a frozen model puts out, so that rows go through that part once, however often they are learnt
    from."""

    def fit(self, model: Any, examples: Examples, run: Run) -> Model:
        return self.learn(model, model.frozen(examples.inputs), examples.targets)

    def learn(self, model: Any, features: Mapping[str, Array], targets: Targets) -> Model:
        raise NotImplementedError


class Probe(Frozen, frozen=True, forbid_unknown_fields=True, tag="probe", tag_field="kind"):
    """Everything but the head frozen, and the head the multinomial logistic regression on what comes out of it.
    Seconds, and on short texts within a point of fine-tuning."""

    c: Positive = 20.0
    """Inverse strength of the L2 penalty, as in scikit-learn."""
    steps_max: Count = 500

    def learn(self, model: Any, features: Mapping[str, Array], targets: Targets) -> Model:
        from training.trainers import probe

        return probe.learn(self, model, features, targets)


class Reject(Frozen, frozen=True, forbid_unknown_fields=True, tag="reject", tag_field="kind"):
    """A Probe over the labels that are inside, and beside it a logistic regression of how sure it is that one of them
    fits. All of that on rows held out in turn, so that the threshold is that of new rows."""

    c: Positive = 20.0
    """As of a Probe."""
    steps_max: Count = 100
    folds: Annotated[int, Meta(ge=2)] = 3

    def learn(self, model: Any, features: Mapping[str, Array], targets: Targets) -> Model:
        from training.trainers import reject

        return reject.learn(self, model, features, targets)


class Blend(Frozen, frozen=True, forbid_unknown_fields=True, tag="blend", tag_field="kind"):
    """For the model `blended-encoder`: for each flag a logistic regression on what is meant, one on how it is put, and
    one that weighs the two by what they say of rows held out in turn. The threshold is the highest one whose F1, on
    those rows, cannot be told from the best."""

    meaning_c: Positive = 5.0
    """Inverse strength of the L2 penalty, as in scikit-learn."""
    wording_c: Positive = 10.0
    folds: Annotated[int, Meta(ge=2)] = 4
    false_alarms_max: Share = 0.02
    """Of the training rows known to be without a flag, held out in turn, those that get it all the same: at most."""

    def learn(self, model: Any, features: Mapping[str, Array], targets: Targets) -> Model:
        from training.trainers import blend

        return blend.learn(self, model, features, targets)


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


Trainer = Probe | Logistic | Reject | Blend | Gradient | Sft | Dpo
