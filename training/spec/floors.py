"""The plainest things that could work, to be measured beside what a recipe makes. By scikit-learn, and never served."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from msgspec import Meta, Struct

if TYPE_CHECKING:
    from training.contract import Array, Examples
    from training.spec.models import ModelSpec


class Ngrams(Struct, frozen=True, forbid_unknown_fields=True, tag="ngrams", tag_field="kind"):
    """TF-IDF of n-grams, logistic regression."""

    unit: Literal["word", "char"] = "word"
    least: Annotated[int, Meta(ge=1)] = 1
    most: Annotated[int, Meta(ge=1)] = 2
    c: Annotated[float, Meta(gt=0)] = 10.0

    def predict(self, train: Examples, test: Examples, *, model: ModelSpec, seed: int) -> dict[str, Array]:
        """Outputs for `test`, as a model's; `model` is what the recipe starts from."""
        from training.evaluation import floors

        return floors.ngrams(self, train, test, seed=seed)


class Base(Struct, frozen=True, forbid_unknown_fields=True, tag="base", tag_field="kind"):
    """The model that the recipe starts from, before it has learnt anything. For language models."""

    def predict(self, train: Examples, test: Examples, *, model: ModelSpec, seed: int) -> dict[str, Array]:
        """The same."""
        from training.evaluation import floors

        return floors.base(model, train, test)


Floor = Ngrams | Base
