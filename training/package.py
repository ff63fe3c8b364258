"""A bundle: the folder that will be published, complete with its manifest, so that it is measured as it is served."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
from pathlib import Path

import msgspec
from safetensors.torch import save_file

from runtimes.artifact import Artifact, Card, Lineage, Manifest, seal
from runtimes.clock import SystemClock
from training.contract import Graph, Rows, Scores, Weights
from training.models.generator import Generator
from training.spec import Recipe

TEMPLATE = Path(__file__).parent / "recipes" / "chatml.jinja"

_PACKAGES = ("torch", "transformers", "tokenizers", "onnx", "onnxruntime", "safetensors", "gguf")


def build(
    recipe: Recipe, recipe_hash: str, rows: Rows, product: Graph | Weights, origin: object, folder: Path
) -> Artifact:
    """Write what is served into the empty `folder`, and its manifest. `origin` is the model that it was made of."""
    if isinstance(product, Graph):
        (folder / "model.onnx").write_bytes(product.content)
        for name, content in product.beside.items():
            (folder / name).write_bytes(content)
        fields = dict(product.card)
    else:
        assert isinstance(origin, Generator)
        _write_generator(origin, product, folder)
        fields = {"task": "generate", "tokens_max": origin.tokens_max}
    base, licence = recipe.model.origin
    card = Card(
        name=recipe.name,
        format="onnx" if isinstance(product, Graph) else "safetensors",
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
    """The bundle's card with its scores on it."""
    fields = {name: getattr(draft, name) for name in Card.__struct_fields__}
    return Card(**fields | {"before": before, "after": after})


def _write_generator(origin: Generator, small: Weights, folder: Path) -> None:
    """Hugging Face's layout, by its own writers where they are right."""
    origin.network.config.save_pretrained(folder)
    origin.network.generation_config.save_pretrained(folder)
    # A GGUF names no limit, and transformers then saves 10^30, which engines believe.
    origin.tokenizer.model_max_length = origin.tokens_max
    origin.tokenizer.save_pretrained(folder)
    shutil.copyfile(TEMPLATE, folder / "chat_template.jinja")
    _update_json(folder / "config.json", small.config)
    save_file(small.tensors, folder / "model.safetensors", metadata={"format": "pt"})


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
