"""Model files that arrive inside Python packages."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path

from training.errors import RecipeError


def find(package: str) -> Path:
    """The folder of model files inside an installed package, which is not imported."""
    spec = importlib.util.find_spec(package.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise RecipeError(
            f"the package {package!r} is not installed in this environment; install it with --no-deps "
            "(only its model files are needed)"
        )
    root = Path(spec.origin).parent
    return root / "model" if (root / "model").is_dir() else root


def describe(package: str) -> str:
    """Name, version and where it is from, for the manifest."""
    return f"{package} {importlib.metadata.version(package)} (PyPI)"
