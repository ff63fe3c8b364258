"""Adapters of a few numbers, written by hand, so that tests need neither torch nor peft."""

import array
import json
import math
import random
from collections.abc import Mapping
from pathlib import Path

import msgspec

from runtimes.artifact import Card, Lineage, Manifest, Shelf


def adapter(
    folder: Path, layers: Mapping[str, tuple[int, int]], *, rank: int, chance: random.Random | None = None
) -> Path:
    """A LoRA adapter in peft's layout for a model with these matrices, [outputs, inputs]: of zeros, which change
    nothing, or of chance's numbers."""
    folder.mkdir()
    shapes = {}
    for name, (wide_out, wide_in) in layers.items():
        layer = "base_model.model." + name.removesuffix(".weight")
        shapes |= {f"{layer}.lora_A.weight": (rank, wide_in), f"{layer}.lora_B.weight": (wide_out, rank)}
    safetensors(folder / "adapter_model.safetensors", shapes, chance=chance)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": sorted(layers)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def change(folder: Path, **changes: object) -> None:
    """Of its configuration."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def safetensors(file: Path, shapes: Mapping[str, tuple[int, ...]], *, chance: random.Random | None = None) -> None:
    """A file of zeros in fp32, or of chance's numbers."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    numbers = (
        array.array("f", bytes(end)) if chance is None else array.array("f", (chance.gauss() for _ in range(end // 4)))
    )
    file.write_bytes(len(text).to_bytes(8, "little") + text + numbers.tobytes())


def published(shelf: Shelf, folder: Path, **fields: object) -> Manifest:
    """Any folder, put on the shelf and promoted under a card with these fields."""
    lineage = Lineage(
        recipe="r", recipe_hash="0" * 64, base="tiny 1.0", base_licence="none", data="0", rows_train=0, rows_test=0,
        seed=0, packages={},
    )  # fmt: skip
    card = Card(name="it", task="generate", format="safetensors", tokens_max=64, lineage=lineage)
    manifest = shelf.publish(folder, msgspec.structs.replace(card, **fields))
    shelf.promote(manifest.name, manifest.version)
    return manifest
