"""`headrace-load classifiers`: what each door to a text classifier takes from it."""

from __future__ import annotations

from pathlib import Path

import msgspec

from loadtests.classifiers import classifiers
from loadtests.console import Repeat, Settings, fail, home, require_folder, say
from loadtests.peers_command import carry_out
from loadtests.scenario import load

EXAMPLES = """
Examples:

    headrace-load classifiers --repeat 3 --html classifiers.html
    headrace-load classifiers --artifact .headrace/shelf/minilm/0123456789ab --set callers_each=[32]
"""
NAME = "support-intent"


def classifiers_(
    *,
    artifact: Path | None = None,
    repeat: Repeat = 2,
    settings: Settings = (),
    json: Path | None = None,
    html: Path | None = None,
) -> None:
    """Load a classifier through each of its doors, beside ONNX Runtime alone and beside Triton.

    Parameters
    ----------
    artifact
        Its folder, with a manifest; by default what `support-intent@stable` is on the shelf.
    repeat
        How many times the servers are started anew; each time goes several times by all doors, there and back.
    settings
        Change a field of the scenario `classify`, e.g. duration_s=20; can be given several times.
    json
        Also write everything that was measured into this file.
    html
        Also write it as a page with plots.
    """
    for file in (json, html):
        require_folder(file)
    scenario = load("classify", settings)
    if not scenario.texts:
        fail(2, "the scenario has no texts to classify")
    folder = (artifact or _promoted(home() / "shelf" / NAME)).absolute()
    if not (folder / "model.onnx").is_file():
        fail(1, f"{folder} is no folder with a model.onnx; name an artifact's with --artifact")
    measuring = classifiers(scenario, name="classify", artifact=folder, state=home(), repeat=repeat, say=say)
    carry_out(measuring, json=json, html=html)


def _promoted(home: Path) -> Path:
    try:
        moves = msgspec.json.decode((home / "aliases.json").read_bytes())["stable"]
        return home / str(moves[-1]["version"])
    except (OSError, msgspec.DecodeError, LookupError):
        fail(1, f"there is no {home.name}@stable in {home.parent}; `make serve` makes it, or name another --artifact")
