"""What a recipe learns from. Paths are relative to the recipe, in `--set` to the working folder; `$HEADRACE_DATA/…` is
below that folder, and `hf:NAME` a Hugging Face data set that is on this disk."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from msgspec import Meta, Struct

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
    header: tuple[str, ...] = ()
    """Names of the columns, for files without a line that names them."""
    names: dict[str, str] = {}
    """Label in the file → what it means, and will be called."""
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


class Turns(Struct, frozen=True, forbid_unknown_fields=True, tag="turns", tag_field="kind"):
    """Questions and the answers hoped for: columns `prompt`, `answer`."""

    files: ClassVar[tuple[str, ...]] = ("train", "test")

    train: str | None = None
    test: str | None = None
    test_share: Share = 0.1

    def load(self) -> Rows:
        from training.data import turns

        return turns.load(self)


class Table(Struct, frozen=True, forbid_unknown_fields=True, tag="table", tag_field="kind"):
    """Rows of numbers and categories with one label each. A caller sends each column by its name."""

    files: ClassVar[tuple[str, ...]] = ("train", "test")

    train: str
    test: str | None = None
    """Without it, the `split` column of `train` decides, or the hash of each row."""
    label: str = "label"
    header: tuple[str, ...] = ()
    """Names of the columns, for files without a line that names them."""
    categories: tuple[str, ...] = ()
    """Columns whose numbers are codes. A column that holds anything but numbers is one anyway."""
    ignore: tuple[str, ...] = ()
    """Columns that are left out."""
    labels: dict[str, str] = {}
    """What the file calls a label → its name; in this order."""
    costs: dict[str, Annotated[float, Meta(ge=0)]] = {}
    """Label → what it costs to answer a row of it wrong, 1 for one that is not here. Measured as `cost`."""
    test_share: Share = 0.2

    def load(self) -> Rows:
        from training.data import table

        return table.load(self)


class Ratings(Struct, frozen=True, forbid_unknown_fields=True, tag="ratings", tag_field="kind"):
    """What users thought of items, and when."""

    files: ClassVar[tuple[str, ...]] = ("train", "test")

    train: str
    test: str | None = None
    """Without it, `split` decides."""
    user: str = "user"
    item: str = "item"
    rating: str = "rating"
    time: str = "timestamp"
    wanted: Literal["rating", "top"] = "rating"
    """A caller asks what a user would think of an item, or for the items that a user would like most."""
    split: Literal["random", "last"] = "random"
    """Tested with: rows by the hash of user and item, or the last ones of each user."""
    test_share: Share = 0.2
    liked_min: float = 4.0
    """The rating from which on an item was worth recommending."""

    def load(self) -> Rows:
        from training.data import ratings

        return ratings.load(self)


Data = Text | Pairs | Turns | Table | Ratings
