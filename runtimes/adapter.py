"""LoRA adapters in peft's layout: does one fit the model it is to be put on?

Asked before an engine opens a file of it, from headers and JSON alone: an adapter for another model of the same family
has the right names and the wrong numbers in it, and an engine would either say so in words of its own or not at all.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from runtimes import integrity
from runtimes.artifact import Artifact, Folder, Hub, Shelf, locate, verify
from runtimes.integrity import Rejected, ShelfFault

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

Shapes = dict[str, tuple[int, ...]]

_HEADER_BYTES_MAX = 64 << 20
_CONFIG_BYTES_MAX = 1 << 20
_TENSOR = re.compile(r"base_model\.model\.(?P<layer>.+)\.lora_(?P<half>[AB])\.weight")


class Adapter(msgspec.Struct, frozen=True):
    """An adapter that may be loaded."""

    path: Path
    version: str
    """Of the artifact; `0` of a folder without one."""


class Settings(msgspec.Struct, frozen=True):
    """Of adapter_config.json, what decides whether an engine can use it, and on what."""

    peft_type: str
    r: int
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    bias: str = "none"
    use_dora: bool = False
    modules_to_save: list[str] | None = None
    rank_pattern: dict[str, int] = {}


def find(reference: str, shelf: Shelf, *, base: Artifact | Folder | Hub, rank_max: int) -> Adapter:
    """The adapter that a configuration means by `reference`, proven to be what was published and to fit `base`. Raises
    ShelfFault saying what does not fit, of which, and what to do."""
    found = locate(reference, shelf)
    if isinstance(found, Hub):
        raise ShelfFault(f"{reference} is a Hugging Face id; fetch the adapter, and name its folder")
    if isinstance(found, Artifact):
        if found.manifest.format != "adapter":
            raise ShelfFault(
                f"{reference} is a model in {found.manifest.format} format and no adapter; serve it as an `artifact`"
            )
        _check_lineage(reference, found, base)
    check(found.path, base=base, rank_max=rank_max)
    if isinstance(found, Artifact):
        verify(found)  # last: it reads every byte
    return Adapter(found.path, found.manifest.version if isinstance(found, Artifact) else "0")


def _check_lineage(reference: str, adapter: Artifact, base: Artifact | Folder | Hub) -> None:
    fits = adapter.manifest.fits
    if not isinstance(base, Artifact) or fits in identities(base):
        return
    raise Rejected(
        f"{reference} was trained on {fits}, and {base.manifest.name}@{base.manifest.version} is "
        f"{' or '.join(identities(base))}: train it on that, or serve it on its own base"
    )


def identities(base: Artifact) -> tuple[str, ...]:
    """What an adapter may call this model: by name and version, and by what it was made of if nothing was learnt since
    (the same weights, perhaps smaller)."""
    manifest = base.manifest
    itself = f"{manifest.name}@{manifest.version}"
    return (itself,) if manifest.lineage.rows_train else (manifest.lineage.base, itself)


def check(folder: Path, *, base: Artifact | Folder | Hub, rank_max: int) -> None:
    """Whether an engine that holds `base` and has room for ranks up to `rank_max` can use the adapter. Of a base that
    is still to be fetched, shapes are not known. Raises Rejected."""
    settings, shapes = read(folder)
    if settings.r > rank_max:
        raise Rejected(
            f"{folder} has rank {settings.r}, and the engine was started for {rank_max} at most: raise "
            "`adapter_rank_max`, or train it with a lower rank"
        )
    if not isinstance(base, Hub):
        _check_shapes(folder, shapes, settings.r, base)


def read(folder: Path) -> tuple[Settings, Shapes]:
    """What an adapter says of itself, and the shapes of its weights, if some engine could use it on some base. Raises
    Rejected."""
    for file in integrity.files(folder):
        integrity.inspect(file)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise Rejected(f"{folder} has no {name}; an adapter is saved by peft's save_pretrained, in safetensors")
    settings = _settings(folder / CONFIG)
    shapes = dict(tensors(folder / WEIGHTS))
    for name, shape in shapes.items():
        if not _TENSOR.fullmatch(name) or len(shape) != 2:
            raise Rejected(f"{folder} holds {name!r}, which is no low-rank weight of a linear layer")
    return settings, shapes


def _check_shapes(folder: Path, shapes: Shapes, rank: int, base: Artifact | Folder) -> None:
    layers = _layers(base.path)
    for name, shape in shapes.items():
        tensor = _TENSOR.fullmatch(name)
        assert tensor is not None
        layer, half = tensor["layer"], tensor["half"]
        if layer not in layers:
            raise Rejected(f"{folder} changes {layer}, which {base.path.name} does not have: it is of another model")
        wide = layers[layer][half == "A"]
        if not wide:
            continue
        wanted = (rank, wide) if half == "A" else (wide, rank)
        if shape != wanted:
            raise Rejected(
                f"{folder}: {name} is {_by(shape)}, and on {base.path.name} at rank {rank} it must be "
                f"{_by(wanted)}: it is of another model, or damaged"
            )


def tensors(file: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes in a safetensors file, from its header; no weight is read. Raises Rejected."""
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if not 2 <= length <= min(_HEADER_BYTES_MAX, file.stat().st_size):
                raise Rejected(f"{file} is not a safetensors file")
            header = msgspec.json.decode(opened.read(length), type=dict[str, dict[str, Any]])
            for name, entry in header.items():
                if name != "__metadata__":
                    yield name, msgspec.convert(entry.get("shape"), tuple[int, ...])
    except (OSError, msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError) as error:
        raise Rejected(f"{file} is not a safetensors file ({error})") from error


def _settings(file: Path) -> Settings:
    try:
        settings = msgspec.json.decode(integrity.read(file, bytes_max=_CONFIG_BYTES_MAX), type=Settings)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Rejected(f"{file} is not an adapter's configuration ({error})") from error
    alien = {
        f"peft_type {settings.peft_type}": settings.peft_type != "LORA",
        f"task_type {settings.task_type}": settings.task_type not in (None, "CAUSAL_LM"),
        "DoRA": settings.use_dora,
        "biases": settings.bias != "none",
        "whole layers (modules_to_save)": bool(settings.modules_to_save),
        "ranks that differ (rank_pattern)": bool(settings.rank_pattern),
    }
    if found := [name for name, has in alien.items() if has]:
        raise Rejected(
            f"{file}: adapters with {found[0]} are not served; train a plain LoRA, or merge it into its base"
        )
    return settings


def _layers(base: Path) -> dict[str, tuple[int, int]]:
    """The base's matrices: layer → outputs, inputs; 0 where it can't be told, because several share a word."""
    found: dict[str, tuple[int, int]] = {}
    for file in sorted(base.glob("*.safetensors")):
        for name, shape in tensors(file):
            layer, _, kind = name.rpartition(".")
            if kind == "weight" and len(shape) == 2:
                found[layer] = (shape[0], shape[1])
            elif kind == "weight_packed":
                found[layer] = (shape[0], 0)
    return found


def _by(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))
