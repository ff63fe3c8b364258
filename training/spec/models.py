"""What a recipe starts from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from msgspec import Meta, Struct

if TYPE_CHECKING:
    from training.contract import Rows
    from training.model import Model
    from training.models.generator import Generator

Count = Annotated[int, Meta(ge=1)]
NotNegative = Annotated[float, Meta(ge=0)]
Share = Annotated[float, Meta(ge=0, lt=1)]


class Noise(Struct, frozen=True, forbid_unknown_fields=True):
    """What may happen to a text while it is learnt from, each by chance; a label must bear it."""

    share: Annotated[float, Meta(ge=0, le=1)] = 1.0
    """Of the texts to which it happens; the others are learnt as they are."""
    typos: Share = 0.0
    """Of the letters: doubled, left out, exchanged with the next, or a neighbour of it on an English keyboard."""
    words_dropped: Share = 0.0
    """Of the words. Without blanks between them, a text is one word."""
    words_swapped: Share = 0.0
    """The same: exchanged with the next."""
    punctuation: Share = 0.0
    """Of the marks: left out."""
    case: Annotated[float, Meta(ge=0, le=1)] = 0.0
    """Of the texts: in capitals, or without any. An uncased tokenizer does not see it."""


class Pretrained(Struct, frozen=True):
    """A BERT encoder that somebody has published."""

    package: str
    """An installed Python package with its files, so that it arrives like any dependency."""
    licence: str
    tokens_max: Annotated[int, Meta(ge=8)]
    truncate: bool = False
    """A longer text is answered by its beginning; else it is refused."""

    @property
    def origin(self) -> tuple[str, str]:
        """What it starts from, and under which licence."""
        from training.models import package

        return package.describe(self.package), self.licence


class Encoder(Pretrained, frozen=True, forbid_unknown_fields=True, tag="encoder", tag_field="kind"):
    """Mean over its tokens, length one. With labelled rows a linear layer on top, else an embedder."""

    noise: Noise | None = None

    def build(self, rows: Rows) -> Model:
        from training.models import encoder

        return encoder.build(self, rows)


class ScopedEncoder(Pretrained, frozen=True, forbid_unknown_fields=True, tag="scoped-encoder", tag_field="kind"):
    """An encoder whose classifier answers with the label `data.outside` where it is not sure that another one fits."""

    def build(self, rows: Rows) -> Model:
        from training.models import scoped

        return scoped.build(self, rows)


class BlendedEncoder(Pretrained, frozen=True, forbid_unknown_fields=True, tag="blended-encoder", tag_field="kind"):
    """An encoder and, beside it, TF-IDF of n-grams of its tokens: what is meant, and how it is put. For flags."""

    ngram: Annotated[int, Meta(ge=1, le=3)] = 2
    """Tokens of the longest n-gram."""
    ngrams_max: Annotated[int, Meta(ge=1)] = 30_000
    """The most frequent ones."""

    def build(self, rows: Rows) -> Model:
        from training.models import blended

        return blended.build(self, rows)


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


class Warp(Struct, frozen=True, forbid_unknown_fields=True):
    """How far an image may be moved while it is learnt from: each drawn evenly between that and its opposite."""

    shift_px: NotNegative = 0.0
    """Across, and down."""
    rotate_degrees: NotNegative = 0.0
    scale: Share = 0.0
    """Larger or smaller by so much of itself."""
    shear: NotNegative = 0.0
    """Sideways, as a share of the height."""


class Cnn(Struct, frozen=True, forbid_unknown_fields=True, tag="cnn", tag_field="kind"):
    """Convolutions of 3×3, then dense layers; without convolutions it is an MLP on pixels. From scratch."""

    origin: ClassVar[tuple[str, str]] = ("", "")

    channels: tuple[Count, ...] = ()
    """Of each convolution."""
    pool_after: tuple[Count, ...] = ()
    """Which of them, counted from one, the largest of each 2×2 follows."""
    dense: tuple[Count, ...] = ()
    """Counts of the layers before the last one, which is as wide as there are labels."""
    norm: bool = False
    """Batch normalisation after each convolution; folded into it when it is served."""
    dropout: Share = 0.0
    """Before each dense layer."""
    warp: Warp | None = None

    def build(self, rows: Rows) -> Model:
        from training.models import cnn

        return cnn.build(self, rows)


class Disturbance(Struct, frozen=True, forbid_unknown_fields=True):
    """What may happen to a sound while it is learnt from, each by chance."""

    share: Annotated[float, Meta(ge=0, le=1)] = 1.0
    """Of the sounds to which it happens; the others are learnt as they are."""
    speed: Share = 0.0
    """Faster and higher, or slower and lower, by so much."""
    shift_s: NotNegative = 0.0
    """Silence before it."""
    gain_db: NotNegative = 0.0
    """Louder or softer."""
    noise_db: float | None = None
    """White noise, at the loudest so far below the sound."""
    warp_bands: NotNegative = 0.0
    """All frequencies moved up or down by so many mel bands, as other vocal tracts do."""
    hidden_bands: Annotated[int, Meta(ge=0)] = 0
    """Mel bands next to each other that are blanked, at most; https://arxiv.org/abs/1904.08779."""
    hidden_frames: Annotated[int, Meta(ge=0)] = 0
    """The same in time."""


class Speech(Struct, frozen=True, forbid_unknown_fields=True, tag="speech", tag_field="kind"):
    """Log-mel spectrum, two convolutions, a bidirectional GRU, the largest over time. Takes WAV files of the sample
    rate of its training rows. From scratch."""

    origin: ClassVar[tuple[str, str]] = ("", "")

    seconds_max: Annotated[float, Meta(ge=0.1, le=60)]
    """Every sound is computed at this length."""
    truncate: bool = False
    """A longer sound is answered by its beginning; else it is refused."""
    mels: Annotated[int, Meta(ge=8)] = 40
    channels: Count = 64
    hidden: Count = 64
    """Of the GRU, in each direction."""
    dropout: Share = 0.0
    disturb: Disturbance = Disturbance()

    def build(self, rows: Rows) -> Model:
        from training.models import speech

        return speech.build(self, rows)


ModelSpec = (
    Encoder | Ngrams | ScopedEncoder | BlendedEncoder | CausalLM | Mlp | Factors | Ease | TwoTower | Cnn | Speech
)
