"""Hugging Face's layout, for what reads text. A generator is in it already, and an adapter in that of their peft, so
these files stay as they are; peft's has no place for the longest input. A graph is put where optimum looks for it:

    config.json            id2label, and of which family the tokenizer is
    onnx/model.onnx        its output `logits` is what optimum's classifiers read
    tokenizer.json, tokenizer_config.json
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from runtimes import adapter
from runtimes.artifact import Artifact, Manifest
from runtimes.integrity import ShelfFault
from training.layouts.parts import KEY, Facts, Found, Task, decoded, encoded, facts_of, inert, together

CONFIG, TOKENIZER, TOKENIZER_CONFIG = "config.json", "tokenizer.json", "tokenizer_config.json"

_FAMILIES = {"WordPiece": "bert", "WordLevel": "bert", "BPE": "roberta", "Unigram": "xlm-roberta"}
_CLASSES = {"bert": "Bert", "roberta": "Roberta", "xlm-roberta": "XLMRoberta"}
_SPECIAL = {
    "pad_token": ("[PAD]", "<pad>"),
    "unk_token": ("[UNK]", "<unk>"),
    "cls_token": ("[CLS]", "<s>"),
    "sep_token": ("[SEP]", "</s>"),
    "mask_token": ("[MASK]", "<mask>"),
}
_TASKS: Mapping[str, Task] = {
    "ForSequenceClassification": "classify",
    "ForCausalLM": "generate",
    "LMHeadModel": "generate",
}
_TOKENS_MAX = 1 << 20
"""What is more is transformers' way to say that it does not know."""


def files(artifact: Artifact) -> dict[str, Path | str]:
    """What goes where: a file to copy, or a text."""
    manifest = artifact.manifest
    own = {name: artifact.path / name for name in manifest.files}
    if manifest.format != "onnx":
        return {**own}
    if TOKENIZER not in own:
        raise ShelfFault(
            f"{manifest.name} reads no text, and this layout has no place for it; --to plain or triton has"
        )
    [graph] = [name for name in own if name.endswith(".onnx")]
    own["onnx/model.onnx"] = own.pop(graph)
    tokenizer = decoded(own[TOKENIZER].read_bytes(), dict[str, Any], own[TOKENIZER])
    written = {CONFIG: encoded(_config(manifest, tokenizer)), TOKENIZER_CONFIG: encoded(_reading(manifest, tokenizer))}
    return together(own, written)


def found(folder: Path) -> Found | None:
    """What is there, if this is the layout: config.json, and a graph or safetensors; or an adapter, without what its
    trainer left beside it."""
    config = folder / CONFIG
    if not config.is_file() and (folder / adapter.CONFIG).is_file():
        own = {name: folder / name for name in (adapter.CONFIG, adapter.WEIGHTS) if (folder / name).is_file()}
        return Found(own, Facts(task="generate"))
    if not config.is_file():
        return None
    said = decoded(config.read_bytes(), dict[str, Any], config)
    reading = folder / TOKENIZER_CONFIG
    facts = _known(said, decoded(reading.read_bytes(), dict[str, Any], reading) if reading.is_file() else {}, config)
    graphs = sorted([*folder.glob("*.onnx"), *folder.glob("onnx/*.onnx")])
    if not graphs:
        if not any(folder.glob("*.safetensors")):
            raise ShelfFault(f"{folder} has neither a graph (onnx/model.onnx) nor safetensors; convert its weights")
        return Found(inert(folder), facts)
    chosen = [it for it in graphs if it.name == "model.onnx"] or graphs
    if len(chosen) > 1:
        raise ShelfFault(
            f"{folder} holds {len(chosen)} graphs, of which none is model.onnx; leave the one that is meant"
        )
    beside = inert(folder, besides={CONFIG, TOKENIZER_CONFIG})
    others = {name: path for name, path in beside.items() if path.suffix != ".safetensors"}
    return Found({**others, "model.onnx": chosen[0]}, facts, frozenset({config, reading}))


def _config(manifest: Manifest, tokenizer: Mapping[str, Any]) -> dict[str, Any]:
    family = _FAMILIES.get(tokenizer["model"]["type"], "bert")
    kind = "ForSequenceClassification" if manifest.task == "classify" else "Model"
    return {
        "model_type": family,
        "architectures": [_CLASSES[family] + kind],
        "max_position_embeddings": manifest.tokens_max,
        "id2label": {str(number): label for number, label in enumerate(manifest.labels)},
        "label2id": {label: number for number, label in enumerate(manifest.labels)},
        KEY: facts_of(manifest),
    }


def _reading(manifest: Manifest, tokenizer: Mapping[str, Any]) -> dict[str, Any]:
    vocabulary = tokenizer["model"].get("vocab", ())
    known = (
        {*(it["content"] for it in tokenizer.get("added_tokens", ())), *vocabulary}
        if isinstance(vocabulary, dict)
        else {it[0] for it in vocabulary}
    )
    special = {role: name for role, names in _SPECIAL.items() for name in names if name in known}
    return {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": manifest.tokens_max, **special}


def _known(config: Mapping[str, Any], reading: Mapping[str, Any], where: Path) -> Facts:
    """What a stranger's files say of the model, under what our own export says."""
    own = msgspec.convert(config.get(KEY, {}), Facts)
    kind = next(
        (task for name in config.get("architectures") or () for end, task in _TASKS.items() if name.endswith(end)), None
    )
    labels = config.get("id2label") or {}
    lengths = [reading.get("model_max_length"), config.get("max_position_embeddings")]
    length = next((int(it) for it in lengths if isinstance(it, int | float) and 0 < it < _TOKENS_MAX), None)
    try:
        named = tuple(str(labels[key]) for key in sorted(labels, key=int))
    except ValueError:
        raise ShelfFault(f"{where}: id2label must number the labels from 0") from None
    return own.over(Facts(task=kind, labels=named, tokens_max=length))
