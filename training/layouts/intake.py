"""An artifact made of a folder in one of the layouts, which nobody here has trained or measured."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec

from runtimes.artifact import Artifact, Card, Lineage, Manifest, Shelf, seal, verify
from runtimes.integrity import ShelfFault
from training.layouts import huggingface, plain, triton
from training.layouts.parts import Facts, Found

_FINDERS: tuple[Callable[[Path], Found | None], ...] = (triton.found, huggingface.found, plain.found)


class Origin(msgspec.Struct, frozen=True):
    """What whoever imports it says of where it is from."""

    base: str
    licence: str


def take_in(
    folder: Path, name: str, said: Facts, origin: Origin, shelf: Shelf, scratch: Path
) -> tuple[Manifest, list[str]]:
    """Publish what is in `folder`, and promote nothing; return also the names of the files that were not needed.
    `said` goes before what the folder says. `scratch` is an empty folder. Raises ShelfFault, and then publishes
    nothing, for what a runtime would not load."""
    found = _found(folder)
    facts = said.over(found.facts)
    if facts.task is None:
        raise ShelfFault(f"{folder} does not say what it is for; give --task generate, classify, embed or predict")
    for own, path in found.files.items():
        shutil.copyfile(path, scratch / own)
    generates = facts.task == "generate"
    fields = {it: getattr(facts, it) for it in Facts.__struct_fields__}
    card = Card(name=name, format="safetensors" if generates else "onnx", lineage=_lineage(origin), **fields)
    bundle = Artifact(scratch, seal(scratch, card, created_s=shelf.clock.wall_s()))
    verify(bundle)
    if generates:
        _require_generator(found, folder)
    else:
        from runtimes.session import Session

        Session(bundle, threads=1, provider="cpu")
    there = {it for it in folder.rglob("*") if it.is_file()}
    left = sorted(it.relative_to(folder).as_posix() for it in there - {*found.files.values()} - found.read)
    return shelf.publish(scratch, card), left


def _found(folder: Path) -> Found:
    if not folder.is_dir():
        raise ShelfFault(f"{folder} is not a folder")
    for finder in _FINDERS:
        found = finder(folder)
        if found is not None:
            return found
    raise ShelfFault(
        f"{folder} is none of the layouts that can be taken in: a Triton repository (config.pbtxt), Hugging Face's "
        "(config.json), or a folder with one ONNX file"
    )


def _require_generator(found: Found, folder: Path) -> None:
    for name in ("config.json", "tokenizer.json"):
        if name not in found.files:
            raise ShelfFault(f"{folder} has no {name}, which an engine needs to generate")
    if not any(name.endswith(".safetensors") for name in found.files):
        raise ShelfFault(f"{folder} has no *.safetensors; a graph cannot be served to generate")


def _lineage(origin: Origin) -> Lineage:
    return Lineage(
        recipe="import",
        recipe_hash=hashlib.sha256(b"import").hexdigest(),
        base=origin.base,
        base_licence=origin.licence,
        data="",
        rows_train=0,
        rows_test=0,
        seed=0,
        packages={},
    )
