"""`headrace-train show`, `compare`, `promote` and `rollback`: what is on the shelf, and what its aliases mean."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import msgspec
from cyclopts import Parameter

from runtimes.artifact import Manifest, Shelf
from runtimes.integrity import Rejected, ShelfFault
from training.console import AsJson, Where, line_of, shelf_at, table


def show(name: str | None = None, /, *, shelf: Where = None, json_: AsJson = False) -> None:
    """Show what is on the shelf: every version, or one (NAME, NAME@alias or NAME@version) in full."""
    place = shelf_at(shelf)
    if name is not None:
        print_manifest(place.describe(name), place, as_json=json_)
        return
    found: list[Manifest] = []
    aliases: dict[str, dict[str, str]] = {}
    faults: list[str] = []
    for it in place.names():
        with noted(faults):
            aliases[it] = place.aliases(it)
        for version in place.versions(it):
            with noted(faults):
                found.append(place.describe(f"{it}@{version}"))
    found.sort(key=lambda it: (it.name, it.created_s))
    if json_:
        print(json.dumps([msgspec.to_builtins(it) for it in found]))
    else:
        for manifest in found:
            print(line_of(manifest, aliases.get(manifest.name, {})))
    if faults:
        raise ShelfFault("\n".join(faults))


@contextmanager
def noted(faults: list[str]) -> Iterator[None]:
    """What is damaged is said, and hides nothing else."""
    try:
        yield
    except Rejected as fault:
        faults.append(str(fault))


def compare(one: str, other: str, /, *, shelf: Where = None, json_: AsJson = False) -> None:
    """Compare two artifacts (NAME, NAME@alias or NAME@version), measure by measure, as served."""
    place = shelf_at(shelf)
    first, second = (place.describe(it) for it in (one, other))
    names = [name for name in first.after if name in second.after]
    if json_:
        measures = {name: [first.after[name], second.after[name]] for name in names}
        same = first.lineage.data == second.lineage.data
        print(json.dumps({"versions": [first.version, second.version], "same_data": same, "measures": measures}))
        return
    lines = [
        (
            name,
            f"{first.after[name]:.5g}",
            f"{second.after[name]:.5g}",
            f"{second.after[name] - first.after[name]:+.5g}",
        )
        for name in names
    ]
    print(table(("", f"{first.name}@{first.version}", f"{second.name}@{second.version}", "difference"), lines))
    if first.lineage.data != second.lineage.data:
        print("They were measured with different rows, so a difference may be the rows'.")


def promote(
    reference: str,
    /,
    *,
    as_: Annotated[str, Parameter(name="--as", help="The alias.")] = "stable",
    shelf: Where = None,
) -> None:
    """Let an alias of NAME mean another version from now on: NAME@VERSION, or NAME@ALIAS for what that means now."""
    place = shelf_at(shelf)
    name, _, which = reference.partition("@")
    if not which:
        raise ShelfFault(f"say which version of {name} is to be promoted: {name}@VERSION; `show` lists them")
    version = place.describe(reference).version
    lost: list[str] = []
    with noted(lost):
        place.check(name, as_)
    place.promote(name, version, as_)
    if lost:
        note = f"the file of {name}'s aliases was damaged and is begun anew: what they meant before is lost"
        print(f"headrace-train: {note}", file=sys.stderr)
    print(f"{name}@{as_} is {version}")


def rollback(
    name: str,
    /,
    *,
    as_: Annotated[str, Parameter(name="--as", help="The alias.")] = "stable",
    shelf: Where = None,
) -> None:
    """Undo the latest promotion of an alias of NAME."""
    print(f"{name}@{as_} is {shelf_at(shelf).rollback(name, as_)}")


def print_manifest(manifest: Manifest, shelf: Shelf, *, as_json: bool) -> None:
    if as_json:
        print(msgspec.json.encode(manifest).decode())
        return
    print(line_of(manifest, shelf.aliases(manifest.name)))
    names = dict.fromkeys([*manifest.before, *manifest.after])
    cells = [[f"{it[name]:.4g}" if name in it else "" for it in (manifest.before, manifest.after)] for name in names]
    print(
        table(("  measure", "before", "after"), [(f"  {name}", *row) for name, row in zip(names, cells, strict=True)])
    )
    made = manifest.lineage
    origin = f"made from {made.base}, " if made.base else ""
    rows = f"trained on {made.rows_train} rows, tested on {made.rows_test}"
    print(f"  {origin}{rows if made.rows_train or made.rows_test else 'imported, not measured'}")
