"""The `headrace-train` command: nothing but argument reading and what is printed."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import msgspec
from cyclopts import App, Parameter

from runtimes.artifact import Manifest, Shelf
from runtimes.integrity import ShelfFault
from training import catalogue
from training.errors import TrainingError

app = App(name="headrace-train", help="Make the artifacts that Headrace serves, measure them, promote them.")

Where = Annotated[Path | None, Parameter(name="--shelf", help="Default: shelf/ in $HEADRACE_STATE, or in .headrace.")]
AsJson = Annotated[bool, Parameter(name="--json", negative="", help="Print JSON.")]


@app.command
def run(
    recipe: str,
    /,
    *,
    set_: Annotated[
        tuple[str, ...],
        Parameter(name="--set", negative="", show_default=False, help="section.field=value, any number of times."),
    ] = (),
    shelf: Where = None,
    json_: AsJson = False,
    if_missing: Annotated[bool, Parameter(negative="", help="Do nothing if this recipe's artifact is there.")] = False,
    resume: Annotated[bool, Parameter(negative="", help="Go on where this recipe was stopped or killed.")] = False,
    from_: Annotated[str | None, Parameter(name="--from", help="Keep what was made before this stage.")] = None,
) -> None:
    """Make an artifact: train, quantize, measure, and if the gate holds publish and promote it.

    RECIPE is a shipped recipe's name (see `recipes`) or the path of a TOML file.
    """
    wanted = catalogue.read(recipe, set_)
    place = Shelf(_shelf(shelf))
    manifest = catalogue.made(wanted, place) if if_missing else None
    if manifest is None:
        if importlib.util.find_spec("torch") is None:
            _elsewhere()
        # Everything is on this disk already; nothing may go and look for it on a hub.
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")  # its bars tear our lines apart
        logging.getLogger("training").setLevel(logging.INFO)
        from training.recipe import run as carry_out

        manifest = carry_out(wanted, place, _state() / "runs", resume=resume, start=from_)
    _print_manifest(manifest, place, as_json=json_)


@app.command
def recipes(*, json_: AsJson = False) -> None:
    """List the recipes that come with the package."""
    found = [catalogue.read(name) for name in catalogue.shipped()]
    if json_:
        print(json.dumps([{"name": it.name, "about": it.about} for it in found]))
        return
    for it in found:
        print(f"{it.name:<22}{it.about}")


@app.command
def show(name: str | None = None, /, *, shelf: Where = None, json_: AsJson = False) -> None:
    """Show what is on the shelf: every version, or one (NAME, NAME@alias or NAME@version) in full."""
    place = Shelf(_shelf(shelf))
    if name is not None:
        _print_manifest(place.resolve(name).manifest, place, as_json=json_)
        return
    found = [it.manifest for it in place.list()]
    if json_:
        print(json.dumps([msgspec.to_builtins(it) for it in found]))
        return
    for it in found:
        print(_line(it, place))


@app.command
def promote(name: str, version: str, /, *, alias: str = "stable", shelf: Where = None) -> None:
    """Let NAME@alias mean VERSION from now on."""
    Shelf(_shelf(shelf)).promote(name, version, alias)
    print(f"{name}@{alias} is {version}")


@app.command
def rollback(name: str, /, *, alias: str = "stable", shelf: Where = None) -> None:
    """Undo the latest promotion of NAME@alias."""
    print(f"{name}@{alias} is {Shelf(_shelf(shelf)).rollback(name, alias)}")


def main() -> None:
    logging.basicConfig(stream=sys.stderr, format="%(relativeCreated)7.0f ms  %(message)s", level=logging.WARNING)
    try:
        app()
    except (TrainingError, ShelfFault) as error:
        sys.exit(f"headrace-train: {error}")


def _shelf(given: Path | None) -> Path:
    return given or _state() / "shelf"


def _state() -> Path:
    return Path(os.environ.get("HEADRACE_STATE") or ".headrace")


def _elsewhere() -> NoReturn:
    """Start over in the managed training environment, which has torch."""
    from runtimes.environment import EnvironmentFault, Environments

    try:
        python = Environments(_state()).python("train")
    except EnvironmentFault as error:
        sys.exit(f"headrace-train: {error}")
    # -P: a file that happens to lie in the working folder must not stand in for a package.
    os.execv(python, [str(python), "-P", "-m", "training", *sys.argv[1:]])  # noqa: S606 - no shell is what is meant


def _print_manifest(manifest: Manifest, shelf: Shelf, *, as_json: bool) -> None:
    if as_json:
        print(msgspec.json.encode(manifest).decode())
        return
    print(_line(manifest, shelf))
    for title, scores in (("before", manifest.before), ("after", manifest.after)):
        print(f"  {title:<7}", "  ".join(f"{name} {value:.4g}" for name, value in scores.items()))
    made = manifest.lineage
    print(f"  made    from {made.base}, trained on {made.rows_train} rows, tested on {made.rows_test}")


def _line(manifest: Manifest, shelf: Shelf) -> str:
    aliases = [f"@{alias}" for alias, it in shelf.aliases(manifest.name).items() if it == manifest.version]
    size = f"{manifest.size_bytes / 1e6:.1f} MB"
    return (
        f"{manifest.name}@{manifest.version}  {manifest.task}  {manifest.format}  {size}  {' '.join(aliases)}".rstrip()
    )


if __name__ == "__main__":
    main()
