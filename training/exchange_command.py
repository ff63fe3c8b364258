"""`headrace-train export`, `import` and `gc`: artifacts out, in, and away."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter, validators

from runtimes.artifact import Manifest
from runtimes.integrity import ShelfFault
from training import layouts, leftovers
from training.console import AsJson, Where, line_of, shelf_at, state
from training.layouts.intake import Origin, take_in
from training.layouts.parts import Facts, Task
from training.shelf_command import noted


def export(
    name: str,
    folder: Path,
    /,
    *,
    to: Annotated[layouts.Layout, Parameter(help="A Triton repository, a plain folder, or Hugging Face's layout.")],
    shelf: Where = None,
    json_: AsJson = False,
) -> None:
    """Write an artifact (NAME, NAME@alias or NAME@version) and its model card into a new FOLDER, for others to read."""
    artifact = shelf_at(shelf).resolve(name)
    written = layouts.export(artifact, to, folder)
    if json_:
        print(json.dumps({"version": artifact.manifest.version, "files": [str(it) for it in written]}))
        return
    for it in written:
        print(folder / it)


def import_(
    folder: Path,
    /,
    *,
    name: Annotated[str, Parameter(help="What to call it on the shelf.")],
    task: Task | None = None,
    labels: Annotated[tuple[str, ...], Parameter(negative="", consume_multiple=True, help="In order.")] = (),
    threshold: Annotated[
        dict[str, float] | None, Parameter(negative="", help="--threshold.LABEL: least score to believe it.")
    ] = None,
    tokens_max: Annotated[int | None, Parameter(validator=validators.Number(gte=1))] = None,
    base: Annotated[
        str | None,
        Parameter(
            help="Where it comes from; what an adapter was trained on. Default: what it says, or the folder's name."
        ),
    ] = None,
    licence: Annotated[str, Parameter(help="Of it.")] = "unknown",
    as_: Annotated[str | None, Parameter(name="--as", help="Promote it to this alias.")] = None,
    shelf: Where = None,
    json_: AsJson = False,
) -> None:
    """Publish a FOLDER in Triton's, Hugging Face's (an adapter: peft's) or the plain layout, as `export` writes them.

    What the folder itself does not say (task, labels, thresholds, longest input) is given here. It is promoted only
    with --as: nothing here has measured it.
    """
    place = shelf_at(shelf)
    if as_ is not None:
        place.check(name, as_)
    said = Facts(task=task, labels=labels, thresholds=threshold or {}, tokens_max=tokens_max)
    state().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=state(), prefix=".import-") as scratch:
        origin = Origin(base, licence)
        manifest, left = take_in(folder, name, said, origin, place, Path(scratch))
    if as_ is not None:
        place.promote(manifest.name, manifest.version, as_)
    if json_:
        print(json.dumps({"version": manifest.version, "left": left}))
        return
    print(line_of(manifest, place.aliases(manifest.name)))
    for it in left:
        print(f"  not taken: {it}")


def gc(
    *,
    keep: Annotated[int, Parameter(validator=validators.Number(gte=0), help="Promotions to be able to go back.")] = 3,
    yes: Annotated[bool, Parameter(negative="", help="Remove it; else only say what would be.")] = False,
    shelf: Where = None,
    json_: AsJson = False,
) -> None:
    """Remove versions that no alias means or meant lately, and folders of runs that led to none that is left.

    "Left" is on this shelf: name the one that you publish to. Nothing that is younger than an hour is removed. A
    version that a configuration names by its hash needs an alias to stay. Of a name that is damaged all stays.
    """
    place = shelf_at(shelf)
    select = place.sweep if yes else place.unused
    versions: list[Manifest] = []
    left: list[Manifest] = []
    faults: list[str] = []
    damaged = set(place.names())  # until they have been gone through
    for name in sorted(damaged):
        with noted(faults):
            before = place.list(name)
            gone = select(name, keep=keep)
            versions += gone
            left += [it for it in before if it not in gone]
            damaged.remove(name)
    runs = leftovers.find(state() / "runs", left, now_s=place.clock.wall_s())
    runs = [it for it in runs if it.name not in damaged]
    if yes:
        runs = [it for it in runs if leftovers.remove(it)]
    _print_gone(versions, runs, done=yes, as_json=json_)
    if faults:
        raise ShelfFault("\n".join(faults))


def _print_gone(versions: list[Manifest], runs: list[leftovers.Leftover], *, done: bool, as_json: bool) -> None:
    lines = [(f"{it.name}@{it.version}", it.size_bytes) for it in versions]
    lines += [(str(it.path), it.size_bytes) for it in runs]
    if as_json:
        print(json.dumps({"removed": done, "what": dict(lines)}))
        return
    for what, size_bytes in lines:
        print(f"{what}  {size_bytes:,} bytes")
    total = sum(size_bytes for _, size_bytes in lines)
    end = "removed" if done else "would be removed; --yes does it"
    print(f"{len(versions)} versions and {len(runs)} runs, {total:,} bytes, {end}")
