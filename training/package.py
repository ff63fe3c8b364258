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
from training import data, model
from training.quantization import Graph, Weights
from training.spec import Recipe

TEMPLATE = Path(__file__).parent / "recipes" / "chatml.jinja"

_PACKAGES = ("torch", "transformers", "tokenizers", "onnx", "onnxruntime", "safetensors", "gguf")


def build(
    recipe: Recipe,
    recipe_hash: str,
    rows: data.Rows,
    trained: model.Model,
    small: Graph | Weights,
    folder: Path,
) -> Artifact:
    """Write weights, tokenizer, configuration and manifest into the empty `folder`."""
    if isinstance(small, Graph):
        assert isinstance(trained, model.Embedder | model.Classifier)
        (folder / "model.onnx").write_bytes(small.content)
        trained.tokenizer.save(str(folder / "tokenizer.json"))
    else:
        assert isinstance(trained, model.Generator)
        _write_generator(trained, small, folder)
    card = Card(
        name=recipe.name,
        task=recipe.task,
        format="onnx" if isinstance(small, Graph) else "safetensors",
        tokens_max=recipe.base.tokens_max,
        lineage=Lineage(
            recipe=recipe.name,
            recipe_hash=recipe_hash,
            base=model.describe(recipe.base),
            base_licence=recipe.base.licence,
            data=rows.fingerprint,
            rows_train=len(rows.train),
            rows_test=len(rows.test),
            seed=recipe.seed,
            packages={name: importlib.metadata.version(name) for name in _PACKAGES},
            commit=_commit(),
        ),
        labels=data.labels(rows.train),
        pooling="mean" if isinstance(small, Graph) else None,
        truncate=recipe.truncate,
        tolerance=recipe.gate.get("batch_drift_max"),
    )
    return Artifact(folder, seal(folder, card, created_s=SystemClock().wall_s()))


def card(draft: Manifest, before: dict[str, float], after: dict[str, float]) -> Card:
    """The bundle's card with its scores on it."""
    fields = {name: getattr(draft, name) for name in Card.__struct_fields__}
    return Card(**fields | {"before": before, "after": after})


def _write_generator(trained: model.Generator, small: Weights, folder: Path) -> None:
    """Hugging Face's layout, by its own writers where they are right."""
    trained.network.config.save_pretrained(folder)
    trained.network.generation_config.save_pretrained(folder)
    # A GGUF names no limit, and transformers then saves 10^30, which engines believe.
    trained.tokenizer.model_max_length = trained.tokens_max
    trained.tokenizer.save_pretrained(folder)
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
