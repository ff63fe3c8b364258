"""What a recipe learns from. Paths are relative to the recipe, in `--set` to the working folder; `$HEADRACE_DATA/…` is
below that folder, and `hf:NAME` a Hugging Face data set that is on this disk."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

from msgspec import Meta, Struct

from training.spec.llm import Conversations, Preferences

if TYPE_CHECKING:
    from training.contract import Rows

Share = Annotated[float, Meta(gt=0, lt=1)]


class Text(Struct, frozen=True, forbid_unknown_fields=True, tag="text", tag_field="kind"):
    """Texts, one label each."""

    files: ClassVar[tuple[str, ...]] = ("train", "test")

    train: str
    test: str | None = None
    """Without it, the `split` column of `train` decides, or the hash of each text."""
    text: str = "text"
    label: str = "label"
    """In files without that column: `category`, `intent`, or the only other one there is."""
    test_share: Share = 0.3
    """How much of `train` is held out when nothing else decides."""
    slices: tuple[str, ...] = ()
    """Columns whose every value is also measured by itself."""

    def load(self) -> Rows:
        from training.data import text

        return text.load(self)


class Pairs(Struct, frozen=True, forbid_unknown_fields=True, tag="pairs", tag_field="kind"):
    """Pairs of texts and how alike they are: columns `left`, `right`, `similarity`. To measure with only."""

    files: ClassVar[tuple[str, ...]] = ("test",)

    test: str

    def load(self) -> Rows:
        from training.data import pairs

        return pairs.load(self)


Data = Text | Pairs | Conversations | Preferences
