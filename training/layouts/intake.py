"""An artifact made of a folder in one of the layouts, which nobody here has trained or measured."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec

from runtimes import adapter
from runtimes.artifact import Artifact, Card, Lineage, Manifest, Shelf, seal, verify
from runtimes.integrity import ShelfFault
from training.layouts import huggingface, plain, triton
from training.layouts.parts import Facts, Found, confine

_FINDERS: tuple[Callable[[Path], Found | None], ...] = (triton.found, plain.found, huggingface.found)


class Origin(msgspec.Struct, frozen=True):
    """What whoever imports it says of where it is from."""

    base: str | None
    """None: an adapter names its own, and what else it is has its folder's name."""
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
    _check_thresholds(facts)
    for own, path in found.files.items():
        shutil.copyfile(path, scratch / own)
    fields = {it: getattr(facts, it) for it in Facts.__struct_fields__}
    if adapter.CONFIG in found.files:
        base = _base(origin, folder, scratch)
        fields |= {"format": "adapter", "fits": base}
    else:
        base = origin.base or folder.resolve().name
        fields |= {"format": "safetensors" if facts.task == "generate" else "onnx"}
    card = Card(name=name, lineage=_lineage(base, origin.licence), **fields)
    bundle = Artifact(scratch, seal(scratch, card, created_s=shelf.clock.wall_s()))
    verify(bundle)
    _prove(bundle, found, folder)
    there = {it for it in folder.rglob("*") if it.is_file()}
    left = sorted(it.relative_to(folder).as_posix() for it in there - {*found.files.values()} - found.read)
    return shelf.publish(scratch, card), left


def _found(folder: Path) -> Found:
    if not folder.is_dir():
        raise ShelfFault(f"{folder} is not a folder")
    confine(folder)
    for finder in _FINDERS:
        found = finder(folder)
        if found is not None:
            return found
    raise ShelfFault(
        f"{folder} is none of the layouts that can be taken in: a Triton repository (config.pbtxt), Hugging Face's "
        "(config.json), peft's (adapter_config.json), or a folder with one ONNX file"
    )


def _check_thresholds(facts: Facts) -> None:
    for label, score in facts.thresholds.items():
        if label not in facts.labels:
            raise ShelfFault(f"there is a threshold for {label!r}; the labels are {', '.join(facts.labels) or 'none'}")
        if not 0 <= score <= 1:
            raise ShelfFault(f"the threshold for {label!r} is {score:g}; scores are from 0 to 1")


def _base(origin: Origin, folder: Path, scratch: Path) -> str:
    """The model that an adapter was trained on."""
    settings, _ = adapter.read(scratch)
    base = origin.base or settings.base_model_name_or_path
    if not base:
        raise ShelfFault(f"{folder} does not say which model it was trained on; give --base, as that model's own says")
    return base


def _prove(bundle: Artifact, found: Found, folder: Path) -> None:
    """Open it as its runtime would. An adapter has been looked into already, and the rest depends on its base."""
    manifest = bundle.manifest
    if manifest.format == "adapter" and manifest.task != "generate":
        raise ShelfFault(f"{folder} is an adapter, and they are put on models that generate; leave --task out")
    if manifest.format == "safetensors":
        _require_generator(found, folder)
    if manifest.format == "onnx":
        from runtimes.session import Session

        Session(bundle, threads=1, provider="cpu")


def _require_generator(found: Found, folder: Path) -> None:
    for name in ("config.json", "tokenizer.json"):
        if name not in found.files:
            raise ShelfFault(f"{folder} has no {name}, which an engine needs to generate")
    if not any(name.endswith(".safetensors") for name in found.files):
        raise ShelfFault(f"{folder} has no *.safetensors; a graph cannot be served to generate")


def _lineage(base: str, licence: str) -> Lineage:
    return Lineage(
        recipe="import",
        recipe_hash=hashlib.sha256(b"import").hexdigest(),
        base=base,
        base_licence=licence,
        data="",
        rows_train=0,
        rows_test=0,
        seed=0,
        packages={},
    )
