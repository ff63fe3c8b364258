"""What layouts are made of: files, and facts that the files do not say themselves."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, TypeVar

import msgspec

from runtimes.artifact import MANIFEST, Manifest
from runtimes.integrity import SUFFIXES, ShelfFault

T = TypeVar("T")

Task = Literal["generate", "classify", "embed", "predict"]

KEY = "headrace"
"""Names the facts where others look for nothing."""


class Facts(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """See `runtimes.artifact.Card`. None, or empty: not known."""

    task: Task | None = None
    labels: tuple[str, ...] = ()
    thresholds: dict[str, float] = {}
    tokens_max: int | None = None
    pooling: Literal["mean"] | None = None
    truncate: bool = False
    tolerance: float | None = None

    def over(self, other: Facts) -> Facts:
        """These, and where they say nothing, the other's."""
        said = {name: value for name in self.__struct_fields__ if (value := getattr(self, name))}
        return msgspec.structs.replace(other, **said)


class Found(msgspec.Struct, frozen=True):
    """What a folder holds, to make an artifact of."""

    files: dict[str, Path]
    """Name in the artifact → where it is now."""
    facts: Facts
    read: frozenset[Path] = frozenset()
    """Files that the facts are from; they are not taken along."""


def facts_of(manifest: Manifest) -> Facts:
    """But for the labels, which every layout has a place of its own for."""
    known = Facts(**{name: getattr(manifest, name) for name in Facts.__struct_fields__})
    return msgspec.structs.replace(known, labels=())


def decoded(content: bytes | str, kind: type[T], where: object) -> T:
    """JSON of that shape. Raises ShelfFault, which names where it is from."""
    try:
        return msgspec.json.decode(content, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ShelfFault(f"{where} cannot be read ({error})") from error


def encoded(value: object) -> str:
    """JSON for people."""
    return msgspec.json.format(msgspec.json.encode(value), indent=2).decode() + "\n"


def together(own: dict[str, Path], written: dict[str, str]) -> dict[str, Path | str]:
    """The artifact's own files, and those that the layout writes. No place is for two of them."""
    if clash := sorted(own.keys() & written.keys()):
        raise ShelfFault(f"the artifact has a file {clash[0]!r} of its own, where this layout writes another")
    return {**own, **written}


def inert(folder: Path, *, besides: Iterable[str] = ()) -> dict[str, Path]:
    """Files right in this folder that an artifact may hold, without graphs and those named."""
    skipped = {MANIFEST, *besides}
    return {
        it.name: it
        for it in sorted(folder.iterdir())
        if it.is_file() and it.suffix.lower() in SUFFIXES - {".onnx"} and it.name not in skipped
    }


def confine(folder: Path) -> None:
    """Raise ShelfFault for a link that leads out of a stranger's folder: what lies there is not theirs to publish.
    Hugging Face's cache is refused too, whose snapshots are links to blobs beside them."""
    inside = os.path.realpath(folder)
    for place, folders, files in os.walk(folder):
        for link in (Path(place, it) for it in sorted(folders + files)):
            if link.is_symlink() and not Path(os.path.realpath(link)).is_relative_to(inside):
                raise ShelfFault(
                    f"{link} is a link that leads out of {folder}, to {os.path.realpath(link)}; if that is to be "
                    f"published too (a snapshot in Hugging Face's cache is made of such links), copy it with "
                    f"`cp -rL {folder} NEW` and import the copy"
                )
