"""The plainest things that could work, to be measured beside what a recipe makes. Never served."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from msgspec import Meta, Struct

if TYPE_CHECKING:
    from training.contract import Array, Examples
    from training.spec.models import ModelSpec


class Ngrams(Struct, frozen=True, forbid_unknown_fields=True, tag="ngrams", tag_field="kind"):
    """TF-IDF of n-grams, logistic regression; for flags, one each."""

    unit: Literal["word", "char", "both"] = "word"
    """`both`: words, and 2 to 5 characters inside them."""
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


class Logistic(Struct, frozen=True, forbid_unknown_fields=True, tag="logistic", tag_field="kind"):
    """Of a table: logistic regression on standardised numbers and one-hot categories."""

    c: Annotated[float, Meta(gt=0)] = 0.1

    def predict(self, train: Examples, test: Examples, *, model: ModelSpec, seed: int) -> dict[str, Array]:
        from training.evaluation import floors

        return floors.logistic(self, train, test, seed=seed)


class Boosting(Struct, frozen=True, forbid_unknown_fields=True, tag="boosting", tag_field="kind"):
    """Of a table: gradient-boosted trees, with scikit-learn's settings."""

    def predict(self, train: Examples, test: Examples, *, model: ModelSpec, seed: int) -> dict[str, Array]:
        from training.evaluation import floors

        return floors.boosting(train, test, seed=seed)


class Biases(Struct, frozen=True, forbid_unknown_fields=True, tag="biases", tag_field="kind"):
    """Of ratings: the mean, and what each user and each item is above it."""

    shrink: Annotated[float, Meta(ge=0)] = 3.0
    """Ratings that every user and item is taken to have had at the mean."""

    def predict(self, train: Examples, test: Examples, *, model: ModelSpec, seed: int) -> dict[str, Array]:
        from training.evaluation import baselines

        return baselines.biases(self, train, test)


class Popularity(Struct, frozen=True, forbid_unknown_fields=True, tag="popularity", tag_field="kind"):
    """Of ratings: for everyone the items that most users liked, but those they have had."""

    def predict(self, train: Examples, test: Examples, *, model: ModelSpec, seed: int) -> dict[str, Array]:
        from training.evaluation import baselines

        return baselines.popularity(train, test)


class Pixels(Struct, frozen=True, forbid_unknown_fields=True, tag="pixels", tag_field="kind"):
    """Images: logistic regression on their pixels."""

    c: Annotated[float, Meta(gt=0)] = 0.1

    def predict(self, train: Examples, test: Examples, *, model: ModelSpec, seed: int) -> dict[str, Array]:
        """Outputs for `test`, as a model's."""
        from training.evaluation import floors

        return floors.pixels(self, train, test, seed=seed)


class Spectrum(Struct, frozen=True, forbid_unknown_fields=True, tag="spectrum", tag_field="kind"):
    """Sounds: logistic regression on the mean and the spread of each mel band, and on the length."""

    mels: Annotated[int, Meta(ge=8)] = 40
    c: Annotated[float, Meta(gt=0)] = 1.0

    def predict(self, train: Examples, test: Examples, *, model: ModelSpec, seed: int) -> dict[str, Array]:
        """Outputs for `test`, as a model's."""
        from training.evaluation import floors

        return floors.spectrum(self, train, test, seed=seed)


Floor = Ngrams | Logistic | Boosting | Biases | Popularity | Base | Pixels | Spectrum
