"""A bundle: the folder that will be published, complete with its manifest, so that it is measured as it is served."""

from __future__ import annotations

import importlib.metadata
import math
import shutil
import subprocess
from pathlib import Path

import msgspec
from safetensors.torch import save_file

from runtimes import adapter
from runtimes.artifact import Artifact, Card, Lineage, Manifest, seal
from runtimes.clock import SystemClock
from training.contract import Beside, Graph, Rows, Scores, Weights
from training.models.generator import Generator
from training.spec import Recipe

_PACKAGES = ("torch", "transformers", "tokenizers", "onnx", "onnxruntime", "safetensors", "gguf", "peft", "trl")


def build(
    recipe: Recipe, recipe_hash: str, rows: Rows, product: Graph | Weights | Beside, origin: object, folder: Path
) -> Artifact:
    """Write what is served into the empty `folder`, and its manifest. `origin` is the model that it was made of."""
    base, licence = recipe.model.origin
    if isinstance(product, Graph):
        (folder / "model.onnx").write_bytes(product.content)
        for name, content in product.beside.items():
            (folder / name).write_bytes(content)
        fields = {"format": "onnx"} | dict(product.card)
    else:
        assert isinstance(origin, Generator)
        fields = {"format": "safetensors", "task": "generate", "tokens_max": origin.tokens_max}
        if isinstance(product, Beside):
            _write_adapter(product, base, folder)
            fields |= {"format": "adapter", "fits": base}
        else:
            _write_generator(origin, product, folder)
    card = Card(
        name=recipe.name,
        lineage=Lineage(
            recipe=recipe.name,
            recipe_hash=recipe_hash,
            base=base,
            base_licence=licence,
            data=rows.fingerprint,
            rows_train=len(rows.train),
            rows_test=len(rows.test),
            seed=recipe.seed,
            packages={name: importlib.metadata.version(name) for name in _PACKAGES},
            commit=_commit(),
        ),
        tolerance=recipe.gate.get("batch_drift_max"),
        gate=recipe.gate,
        **fields,
    )
    return Artifact(folder, seal(folder, card, created_s=SystemClock().wall_s()))


def card(draft: Manifest, before: Scores, after: Scores) -> Card:
    """The bundle's card and its scores, but for those that its rows cannot tell: AUC, if they have one label."""
    fields = {name: getattr(draft, name) for name in Card.__struct_fields__}
    return Card(**fields | {"before": _told(before), "after": _told(after)})


def _told(scores: Scores) -> Scores:
    return {name: it for name, it in scores.items() if math.isfinite(it)}


def _write_generator(origin: Generator, small: Weights, folder: Path) -> None:
    """Hugging Face's layout, by its own writers where they are right."""
    origin.network.config.save_pretrained(folder)
    origin.network.generation_config.save_pretrained(folder)
    origin.tokenizer.save_pretrained(folder)
    _update_json(folder / "config.json", small.config)
    save_file(small.tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _write_adapter(product: Beside, base: str, folder: Path) -> None:
    """What peft's own loader takes, and the name of the base in words that people know."""
    for name, content in product.files.items():
        (folder / name).write_bytes(content)
    _update_json(folder / adapter.CONFIG, {"base_model_name_or_path": base})


def _update_json(file: Path, changes: dict[str, object]) -> None:
    content = msgspec.json.decode(file.read_bytes()) | changes
    file.write_bytes(msgspec.json.format(msgspec.json.encode(content), indent=2))


def _commit() -> str | None:
    """The commit of the code that made this, if it lies in a git repository that has one."""
    here = str(Path(__file__).parent)
    git = shutil.which("git")
    if git is None:
        return None
    asked = subprocess.run(  # noqa: S603 - fixed arguments
        [git, "-C", here, "rev-parse", "--verify", "--quiet", "HEAD"], capture_output=True, text=True, check=False
    )
    return asked.stdout.strip() or None
