"""What a recipe learns from. Paths are relative to the recipe, in `--set` to the working folder; `$HEADRACE_DATA/…` is
below that folder, and `hf:NAME`, `hf:NAME:CONFIG#SPLIT` a Hugging Face data set that is on this disk. `encoding` is
that of text files, as Python calls it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from msgspec import Meta, Struct

from training.spec.llm import Conversations, Preferences

if TYPE_CHECKING:
    from training.contract import Rows

Share = Annotated[float, Meta(gt=0, lt=1)]
Conflicts = Literal["keep", "drop", "refuse"]


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
    outside: str | None = None
    """The label of rows that no other label fits: a model should answer with it instead of guessing."""
    outside_recall: Share = 0.8
    """How much of what is outside has to be noticed; a model sets its threshold by that."""
    conflicts: Conflicts = "keep"
    """What becomes of training rows of the same text and different labels; the log names them."""
    encoding: str = "utf-8"

    def load(self) -> Rows:
        from training.data import text

        return text.load(self)


class Source(Struct, frozen=True, forbid_unknown_fields=True):
    """A file of texts, and what it says about them."""

    name: str
    """Also a slice: `source=NAME`."""
    file: str
    text: str = "text"
    """The column; where it holds several texts, turns of a conversation, the first one counts."""
    flags: dict[str, str] = {}
    """Label → the column that says 1 or 0, or nothing where nobody knows; or `COLUMN=VALUE`, yes where it says that."""
    without: tuple[str, ...] = ()
    """Labels that no row has. What is neither here nor in `flags` is unknown."""
    part: Literal["both", "train", "test"] = "both"
    """`both`: as the hash of each text says."""
    rows: Annotated[int, Meta(ge=1)] | None = None
    """Only as many, the first ones."""


class Flagged(Struct, frozen=True, forbid_unknown_fields=True, tag="flags", tag_field="kind"):
    """Texts with any number of labels each, from files that know about some of them."""

    sources: Annotated[tuple[Source, ...], Meta(min_length=1)]
    test_share: Share = 0.2

    def load(self) -> Rows:
        from training.data import flags

        return flags.load(self)


class Pairs(Struct, frozen=True, forbid_unknown_fields=True, tag="pairs", tag_field="kind"):
    """Pairs of texts and how alike they are: columns `left`, `right`, `similarity`. To measure with only."""

    files: ClassVar[tuple[str, ...]] = ("test",)

    test: str
    encoding: str = "utf-8"

    def load(self) -> Rows:
        from training.data import pairs

        return pairs.load(self)


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


class Images(Struct, frozen=True, forbid_unknown_fields=True, tag="images", tag_field="kind"):
    """Images of one size, one label each. `train` and `test` are IDX files, gzipped or not (`…images-idx3…`, the labels
    beside it in `…labels-idx1…`), folders with a folder of PNG and JPEG files for each label, or `sklearn:digits`."""

    train: str
    test: str | None = None
    """Without it, the hash of each image decides."""
    test_share: Share = 0.3
    side_px: Annotated[int, Meta(ge=1)] | None = None
    """PNG and JPEG files are resized to this square; None: they are of one size."""
    colour: bool = False
    """Of PNG and JPEG files; else they become grey."""

    def load(self) -> Rows:
        from training.data import images

        return images.load(self)

    @staticmethod
    def labels_of(file: str) -> str | None:
        """The file with the labels of an IDX file."""
        folder, slash, name = file.rpartition("/")
        return folder + slash + name.replace("images-idx3", "labels-idx1") if "images-idx3" in name else None


class Audio(Struct, frozen=True, forbid_unknown_fields=True, tag="audio", tag_field="kind"):
    """Sounds, one label each: folders of WAV files of one sample rate, whose names say what is in them."""

    train: str
    test: str | None = None
    """Without it, the hash of each file's name decides."""
    pattern: str = r"(?P<label>[^/]+)/.*"
    """Regular expression that all of a file's path below the folder, without `.wav`, fits: its group `label` is the
    label, and each other named one a slice, by whose values is also measured (`speaker`)."""
    test_share: Share = 0.3

    def load(self) -> Rows:
        from training.data import audio

        return audio.load(self)


Data = Text | Flagged | Pairs | Conversations | Preferences | Table | Ratings | Images | Audio
