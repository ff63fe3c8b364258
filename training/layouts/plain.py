"""One folder: the files as they were published, and what to know of them.

model.onnx  tokenizer.json …   or whatever the artifact consists of
labels.json                    what the columns of `scores` mean, in order
model.json                     task, longest input, thresholds
"""

from __future__ import annotations

from pathlib import Path

from runtimes.artifact import Artifact
from runtimes.integrity import ShelfFault
from training.layouts.parts import Facts, Found, decoded, encoded, facts_of, inert, together

LABELS, FACTS = "labels.json", "model.json"


def files(artifact: Artifact) -> dict[str, Path | str]:
    """What goes where: a file to copy, or a text."""
    manifest = artifact.manifest
    written = {FACTS: encoded(facts_of(manifest))}
    if manifest.labels:
        written[LABELS] = encoded(manifest.labels)
    return together({name: artifact.path / name for name in manifest.files}, written)


def found(folder: Path) -> Found | None:
    """What is there, if this is the layout: as `files` wrote it, or one graph at the top, and no config.json that would
    say more of it."""
    said, labels = folder / FACTS, folder / LABELS
    graphs = sorted(folder.glob("*.onnx"))
    if not said.is_file() and (not graphs or (folder / "config.json").is_file()):
        return None
    if len(graphs) > 1:
        raise ShelfFault(f"{folder} holds {len(graphs)} graphs; leave the one that is meant")
    facts = decoded(said.read_bytes(), Facts, said) if said.is_file() else Facts()
    if labels.is_file():
        facts = Facts(labels=decoded(labels.read_bytes(), tuple[str, ...], labels)).over(facts)
    own = inert(folder, besides={FACTS, LABELS})
    if graphs:
        own["model.onnx"] = graphs[0]
    return Found(own, facts, frozenset({said, labels}))
