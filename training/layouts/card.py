"""A model card in Markdown: what the manifest says, for people and for model hubs.

Written with an export and never kept on the shelf: there the manifest is the one place that says it, and scores may be
told of the same version anew.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from runtimes.artifact import Manifest

_PIPELINES = {"classify": "text-classification", "embed": "feature-extraction", "generate": "text-generation"}
_KINDS = {"classify": "a classifier", "embed": "an embedder", "generate": "a language model", "predict": "a model"}
_USES = {
    "triton": "A Triton model repository. What is named `…-text` needs the package `tokenizers` in Triton's Python.",
    "plain": "The files as published; `labels.json` names the columns of `scores`, `model.json` says the rest.",
    "huggingface": "For `transformers`; a graph is for `optimum.onnxruntime`, an adapter for `peft`.",
}


def markdown(manifest: Manifest, layout: str) -> str:
    return "\n".join(
        [*_front(manifest), *_about(manifest, layout), *_scores(manifest), *_origin(manifest), *_files(manifest)]
    )


def _front(it: Manifest) -> Iterator[str]:
    """What hubs read."""
    yield "---"
    yield f"license: {msgspec.json.encode(it.lineage.base_licence.lower() or 'unknown').decode()}"
    if it.task in _PIPELINES and (it.tokens_max is not None or it.task == "generate"):
        yield f"pipeline_tag: {_PIPELINES[it.task]}"
    if it.format == "adapter":
        yield "library_name: peft"
    yield from ("tags:", "- headrace", "---", "")


def _about(it: Manifest, layout: str) -> Iterator[str]:
    yield f"# {it.name}"
    yield ""
    kind = f"a LoRA adapter for {it.fits}" if it.format == "adapter" else _KINDS[it.task]
    yield f"`{it.name}@{it.version}`: {kind}, {it.format}, {it.size_bytes / 1e6:.1f} MB. {_USES[layout]}"
    yield ""
    if it.tokens_max is not None:
        longer = "a longer text is answered by its beginning" if it.truncate else "a longer text is refused"
        yield f"Reads up to {it.tokens_max} tokens; {longer}."
        yield ""
    if it.labels:
        named = [f"`{it}`" for it in it.labels]
        yield f"Labels, in order: {', '.join(named)}."
        yield ""
    if it.thresholds:
        least = [f"`{label}` {value:g}" for label, value in it.thresholds.items()]
        yield f"Least score at which a label may be believed: {', '.join(least)}."
        yield ""


def _scores(it: Manifest) -> Iterator[str]:
    yield from ("## Scores", "")
    names = dict.fromkeys([*it.before, *it.after])
    if not names:
        yield from ("None were measured.", "")
        return
    yield from ("| measure | as trained, fp32 | these files, as served |", "|---|---|---|")
    for name in names:
        cells = [f"{scores[name]:.4g}" if name in scores else "" for scores in (it.before, it.after)]
        yield f"| `{name}` | {' | '.join(cells)} |"
    yield ""
    if it.gate:
        rules = [f"`{rule}` {value:g}" for rule, value in it.gate.items()]
        yield f"It was published because these held: {', '.join(rules)}."
        yield ""


def _origin(it: Manifest) -> Iterator[str]:
    made = it.lineage
    yield from ("## Where it comes from", "")
    if made.base:
        yield f"- Made from {made.base}, licence {made.base_licence or 'unknown'}."
    if made.rows_train or made.rows_test:
        yield f"- Trained on {made.rows_train} rows, tested on {made.rows_test}; fingerprint of the rows `{made.data}`."
    yield f"- Recipe `{made.recipe}`, hash `{made.recipe_hash}`, seed {made.seed}, commit `{made.commit or 'unknown'}`."
    if made.packages:
        yield f"- With {', '.join(f'{name} {version}' for name, version in made.packages.items())}."
    yield ""


def _files(it: Manifest) -> Iterator[str]:
    yield from ("## Files as published", "", "| file | digest |", "|---|---|")
    for name, digest in it.files.items():
        yield f"| `{name}` | `{digest}` |"
    yield ""
