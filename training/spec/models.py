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


ModelSpec = Encoder | CausalLM
