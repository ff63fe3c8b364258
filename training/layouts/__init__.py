"""Artifacts in the shapes that others read, and back: nobody is locked in.

`export` writes one, `intake.take_in` makes an artifact of one. Each layout is a module that says which file goes where;
the rules they have in common are here: nothing is overwritten, no file of the artifact is left out, all of it or
nothing.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Literal

from runtimes.artifact import Artifact, verify
from runtimes.integrity import ShelfFault
from training.layouts import huggingface, plain, triton
from training.layouts.card import markdown

Layout = Literal["triton", "plain", "huggingface"]

LAYOUTS: Mapping[Layout, ModuleType] = {"triton": triton, "plain": plain, "huggingface": huggingface}


def export(artifact: Artifact, to: Layout, folder: Path) -> list[Path]:
    """Write the artifact into `folder`, which is new or empty; return what was written, relative to it."""
    verify(artifact)
    try:
        _write(artifact, to, folder)
    except OSError as error:
        raise ShelfFault(
            f"{folder} cannot be written ({error.strerror or error}): make room there, or it writable, or name "
            "another folder"
        ) from error
    return sorted(it.relative_to(folder) for it in folder.rglob("*") if it.is_file())


def _write(artifact: Artifact, to: Layout, folder: Path) -> None:
    """All of it or nothing."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ShelfFault(f"{folder} is there already, and an export overwrites nothing; name a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = folder.with_name(f".{folder.name}-{secrets.token_hex(4)}")
    try:
        for name, content in {**LAYOUTS[to].files(artifact), "README.md": markdown(artifact.manifest, to)}.items():
            place = draft / name
            place.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, Path):
                shutil.copyfile(content, place)
            else:
                place.write_text(content, encoding="utf-8")
        draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
