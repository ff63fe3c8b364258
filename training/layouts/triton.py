"""A Triton model repository, for a stock Triton.

NAME/config.pbtxt, labels.txt, 1/model.onnx       the graph, in the onnxruntime backend
NAME-text/config.pbtxt, 1/model.py, tokenizer.json  for what reads text: the same asked with text, in the Python
                                                  backend, whose Python needs the package `tokenizers`
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec

from runtimes.artifact import Artifact
from runtimes.contract import Tensor
from runtimes.integrity import ShelfFault
from training.layouts.parts import KEY, Facts, Found, confine, decoded, facts_of, inert, together

CONFIG, LABELS, TOKENIZER = "config.pbtxt", "labels.txt", "tokenizer.json"
CODE = Path(__file__).parent / "triton_text.py"

_TEXT = "-text"
_BATCH_MAX = 64


def files(artifact: Artifact) -> dict[str, Path | str]:
    """What goes where: a file to copy, or a text. Loads the graph to see what goes in and out."""
    manifest = artifact.manifest
    if manifest.format != "onnx":
        raise ShelfFault(
            f"{manifest.name} generates, which Triton's vLLM backend does: export it --to huggingface, and name that "
            "folder in the backend's model.json"
        )
    from runtimes.session import Session

    session = Session(artifact, threads=1, provider="cpu")
    batched = session.reading.batched
    # Not more at once than is answered as one by one.
    rows_max = min(_BATCH_MAX, session.batch_max) if batched else 0
    name, labelled = manifest.name, bool(manifest.labels)
    own = {f"{name}/1/{it}": artifact.path / it for it in manifest.files}
    [graph] = [it for it in own if it.endswith(".onnx")]
    own[f"{name}/1/model.onnx"] = own.pop(graph)
    outputs = [it for it in session.graph.outputs if not batched or it.shape[:1] == (-1,)]
    facts = msgspec.json.encode(facts_of(manifest)).decode()
    written = {
        f"{name}/{CONFIG}": _config(
            name,
            "onnxruntime",
            session.graph.inputs,
            outputs,
            rows_max=rows_max,
            labelled=labelled,
            parameters={KEY: facts},
        )
    }
    if f"{name}/1/{TOKENIZER}" in own:
        own[f"{name}{_TEXT}/1/{TOKENIZER}"] = own.pop(f"{name}/1/{TOKENIZER}")
        own[f"{name}{_TEXT}/1/model.py"] = CODE
        answered = [it for it in outputs if it in session.reading.outputs]
        parameters = {
            "graph": name,
            "inputs": " ".join(it.name for it in session.graph.inputs),
            "tokens_max": str(manifest.tokens_max),
            "truncate": str(manifest.truncate).lower(),
        }
        text = (Tensor("text", "BYTES", (-1,)),)
        written[f"{name}{_TEXT}/{CONFIG}"] = _config(
            name + _TEXT, "python", text, answered, rows_max=rows_max, labelled=labelled, parameters=parameters
        )
    if labelled:
        for folder in {it.partition("/")[0] for it in written}:
            written[f"{folder}/{LABELS}"] = _lines(manifest.labels)
    return together(own, written)


def found(folder: Path) -> Found | None:
    """What is there, if this is the layout: a model's folder, or a repository with one graph."""
    models = [folder] if (folder / CONFIG).is_file() else sorted(it.parent for it in folder.glob(f"*/{CONFIG}"))
    if not models:
        return None
    graphs = {it: versions[-1] for it in models if (versions := _versions(it))}
    if len(graphs) != 1:
        have = ", ".join(it.name for it in graphs) or "none"
        raise ShelfFault(f"{folder} must hold one model of the onnxruntime backend; it holds {have}: name its folder")
    [(model, version)] = graphs.items()
    config = model / CONFIG
    said = config.read_text("utf-8")
    files = {**inert(version), "model.onnx": version / "model.onnx"}
    read = {config}
    text = model.with_name(model.name + _TEXT)
    confine(text)  # it is beside the folder, if a model's own was named
    if _versions(text, TOKENIZER):
        files[TOKENIZER] = _versions(text, TOKENIZER)[-1] / TOKENIZER
        read |= {text / CONFIG, text / LABELS, files[TOKENIZER].with_name("model.py")}
    parameter = re.search(rf'key:\s*"{KEY}"\s*value:?\s*{{\s*string_value:\s*"((?:[^"\\]|\\.)*)"', said)
    facts = decoded(re.sub(r"\\(.)", r"\1", parameter[1]), Facts, config) if parameter else Facts()
    if named := re.search(r'label_filename:\s*"([^"/]+)"', said):
        labels = model / named[1]
        read.add(labels)
        facts = Facts(labels=tuple(labels.read_text("utf-8").splitlines())).over(facts)
    return Found(files, facts, frozenset(read))


def _versions(model: Path, file: str = "model.onnx") -> list[Path]:
    """Of a model that has this file, oldest first."""
    return sorted((it.parent for it in model.glob(f"[0-9]*/{file}")), key=lambda it: (len(it.name), it.name))


def _config(
    name: str,
    backend: str,
    inputs: Iterable[Tensor],
    outputs: Iterable[Tensor],
    *,
    rows_max: int,
    labelled: bool,
    parameters: Mapping[str, str],
) -> str:
    lines = [f'name: "{name}"', f'backend: "{backend}"', f"max_batch_size: {rows_max}"]
    for side, tensors in (("input", inputs), ("output", outputs)):
        lines += [
            f"{side} [",
            ",\n".join(f"  {{ {_tensor(it, batched=rows_max > 0, labelled=labelled)} }}" for it in tensors),
            "]",
        ]
    if rows_max > 1:
        lines.append("dynamic_batching { }")
    lines += [
        f'parameters {{ key: "{key}" value {{ string_value: {_quoted(it)} }} }}' for key, it in parameters.items()
    ]
    return "\n".join(lines) + "\n"


def _tensor(tensor: Tensor, *, batched: bool, labelled: bool) -> str:
    """The first axis of what is batched goes without saying, and every tensor has another one."""
    dims = tensor.shape[1:] if batched else tensor.shape
    kind = tensor.datatype.replace("BYTES", "STRING")
    shape = f"dims: [ {', '.join(map(str, dims))} ]" if dims else "dims: [ 1 ] reshape { shape: [ ] }"
    labels = f' label_filename: "{LABELS}"' if labelled and tensor.name == "scores" else ""
    return f'name: "{tensor.name}" data_type: TYPE_{kind} {shape}{labels}'


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _lines(labels: tuple[str, ...]) -> str:
    for label in labels:
        if len(label.splitlines()) != 1:
            raise ShelfFault(f"the label {label!r} is no line of text, which Triton's file of labels needs")
    return "".join(f"{it}\n" for it in labels)
