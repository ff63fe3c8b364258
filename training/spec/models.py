"""What a recipe starts from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from msgspec import Meta, Struct

if TYPE_CHECKING:
    from training.contract import Rows
    from training.model import Model
    from training.models.generator import Generator

Count = Annotated[int, Meta(ge=1)]


class Encoder(Struct, frozen=True, forbid_unknown_fields=True, tag="encoder", tag_field="kind"):
    """A BERT encoder, mean over its tokens, length one. With labelled rows a linear layer on top, else an embedder."""

    package: str
    """An installed Python package with its files, so that it arrives like any dependency."""
    licence: str
    tokens_max: Annotated[int, Meta(ge=8)]
    truncate: bool = False
    """A longer text is answered by its beginning; else it is refused."""

    def build(self, rows: Rows) -> Model:
        from training.models import encoder

        return encoder.build(self, rows)

    @property
    def origin(self) -> tuple[str, str]:
        """What it starts from, and under which licence."""
        from training.models import package

        return package.describe(self.package), self.licence


class Ngrams(Struct, frozen=True, forbid_unknown_fields=True, tag="ngrams", tag_field="kind"):
    """TF-IDF of the n-grams of the training rows and a linear layer: small, quick, of any language, and knows nothing
    that is not in the rows."""

    unit: Literal["word", "char"] = "word"
    least: Annotated[int, Meta(ge=1)] = 1
    most: Annotated[int, Meta(ge=1)] = 2
    rows_min: Annotated[int, Meta(ge=1)] = 1
    """Training rows that an n-gram must be in."""
    tokens_max: Annotated[int, Meta(ge=8)] = 512
    """Words or characters that are read."""
    truncate: bool = False
    """A longer text is answered by its beginning; else it is refused."""
    origin: ClassVar[tuple[str, str]] = ("", "")

    def build(self, rows: Rows) -> Model:
        from training.models import bag

        return bag.build(self, rows)


class CausalLM(Struct, frozen=True, forbid_unknown_fields=True, tag="generator", tag_field="kind"):
    """A causal language model with its tokenizer, from a GGUF file or in Hugging Face's layout."""

    package: str
    licence: str
    tokens_max: Annotated[int, Meta(ge=8)]

    def build(self, rows: Rows) -> Generator:
        from training.models import generator

        return generator.build(self)

    @property
    def origin(self) -> tuple[str, str]:
        """What it starts from, and under which licence."""
        from training.models import package

        return package.describe(self.package), self.licence


class Mlp(Struct, frozen=True, forbid_unknown_fields=True, tag="mlp", tag_field="kind"):
    """Dense layers over the columns of a table, their preparation in the graph."""

    layers: tuple[Count, ...] = (64, 32)
    """Widths of the hidden ones."""
    dropout: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    """After each of them."""
    networks: Count = 1
    """Mean of so many, that differ in where they start."""
    log: bool = False
    """Numbers by sign and logarithm: for amounts, few of which are large."""
    ratios: tuple[tuple[str, str], ...] = ()
    """Pairs of columns, the first of which is also given as a multiple of the second."""
    origin: ClassVar[tuple[str, str]] = ("", "")

    def build(self, rows: Rows) -> Model:
        from training.models import mlp

        return mlp.build(self, rows)


class Factors(Struct, frozen=True, forbid_unknown_fields=True, tag="factors", tag_field="kind"):
    """User and item → rating: biases, and factors of what they leave. Solved as it is built, without a trainer."""

    width: Count = 24
    rounds: Count = 12
    noise: Annotated[float, Meta(gt=0)] = 0.75
    """Variance of a rating around what is right for it."""
    spread: Annotated[float, Meta(gt=0)] = 0.05
    """Variance of an item's factors before anything is known of it; of a user's it is 1."""
    shrink: Annotated[float, Meta(ge=0)] = 3.0
    """Ratings at the mean that every user and item is taken to have had."""
    origin: ClassVar[tuple[str, str]] = ("", "")

    def build(self, rows: Rows) -> Model:
        from training.models import factors

        return factors.build(self, rows)


class Ease(Struct, frozen=True, forbid_unknown_fields=True, tag="ease", tag_field="kind"):
    """User → items, from what goes together with what they liked. Solved as it is built, without a trainer."""

    penalty: Annotated[float, Meta(gt=0)] = 100.0
    """Of the squared weights."""
    top: Count = 50
    """Items that it answers."""
    origin: ClassVar[tuple[str, str]] = ("", "")

    def build(self, rows: Rows) -> Model:
        from training.models import ease

        return ease.build(self, rows)


class TwoTower(Struct, frozen=True, forbid_unknown_fields=True, tag="two-tower", tag_field="kind"):
    """User → items, by the product of a vector of what the user liked and a vector of each item."""

    width: Count = 128
    hidden: Annotated[float, Meta(ge=0, lt=1)] = 0.7
    """Share of what a user liked that is hidden while learning, so that it is guessed from the rest."""
    dropout: Annotated[float, Meta(ge=0, lt=1)] = 0.5
    top: Count = 50
    """Items that it answers."""
    origin: ClassVar[tuple[str, str]] = ("", "")

    def build(self, rows: Rows) -> Model:
        from training.models import towers

        return towers.build(self, rows)


ModelSpec = Encoder | Ngrams | CausalLM | Mlp | Factors | Ease | TwoTower
