"""Folders of runs that led to nothing that is on the shelf. (For versions nobody uses see `Shelf.sweep`.)"""

from __future__ import annotations

import fcntl
import re
import shutil
from collections.abc import Collection
from pathlib import Path

import msgspec

from runtimes.artifact import Manifest

AGE_S_MIN = 3600.0
"""One that was written to since is perhaps still wanted: with --resume."""

_RUN = re.compile(r"(.+)-([0-9a-f]{12})")


class Leftover(msgspec.Struct, frozen=True):
    path: Path
    name: str
    """The recipe's."""
    size_bytes: int


def find(runs: Path, published: Collection[Manifest], *, now_s: float) -> list[Leftover]:
    """Runs of no recipe that made one of these, and that nobody has touched for AGE_S_MIN."""
    made = {(it.name, it.lineage.recipe_hash[:12]) for it in published}
    found = []
    for folder in sorted(runs.iterdir()) if runs.is_dir() else []:
        name = _RUN.fullmatch(folder.name)
        if name is None or name.groups() in made or not folder.is_dir():
            continue
        stats = [it.stat() for it in folder.rglob("*") if it.is_file()]
        if max((it.st_mtime for it in stats), default=0.0) < now_s - AGE_S_MIN:
            found.append(Leftover(folder, name[1], sum(it.st_size for it in stats)))
    return found


def remove(leftover: Leftover) -> bool:
    """Whether it could be: not while it is run."""
    with (leftover.path / ".lock").open("wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        # First of all: what is half removed must not be gone on with.
        (leftover.path / "run.json").unlink(missing_ok=True)
        shutil.rmtree(leftover.path)
    return True
