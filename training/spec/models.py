"""What a recipe starts from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from msgspec import Meta, Struct

if TYPE_CHECKING:
    from training.contract import Rows
    from training.model import Model
    from training.models.generator import Generator


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


class ScopedEncoder(Encoder, frozen=True, forbid_unknown_fields=True, tag="scoped-encoder", tag_field="kind"):
    """An encoder whose classifier answers with the label `data.outside` where it is not sure that another one fits."""

    def build(self, rows: Rows) -> Model:
        from training.models import scoped

        return scoped.build(self, rows)


class BlendedEncoder(Encoder, frozen=True, forbid_unknown_fields=True, tag="blended-encoder", tag_field="kind"):
    """An encoder and, beside it, TF-IDF of n-grams of its tokens: what is meant, and how it is put. For flags."""

    ngram: Annotated[int, Meta(ge=1, le=3)] = 2
    """Tokens of the longest n-gram."""
    ngrams_max: Annotated[int, Meta(ge=1)] = 30_000
    """The most frequent ones."""

    def build(self, rows: Rows) -> Model:
        from training.models import blended

        return blended.build(self, rows)


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


ModelSpec = Encoder | ScopedEncoder | BlendedEncoder | CausalLM
