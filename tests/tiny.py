"""Tiny artifacts that really run: a graph of a few nodes over a vocabulary of a few words, written as protobuf by hand
(onnx.proto of ONNX 1.17), so that tests need neither torch nor the onnx package.

A token's vector is one-hot over LABELS for the words below and even for all others; a text is their masked mean.
`embed` answers it at length 1; `classify` answers `logits`, ten times it, and `scores`, their softmax.
"""

import json
import struct
from pathlib import Path
from typing import Literal

import msgspec

from runtimes.artifact import Card, Lineage, Manifest, Shelf

LABELS = ("refund", "card", "login")
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "refund", "card", "login", "please", "my", "the", "money", "password")
TOKENS_MAX = 64

_CLASS = {"refund": 0, "money": 0, "card": 1, "login": 2, "password": 2}
_FLOAT, _UINT8, _INT64, _STRING = 1, 2, 7, 8


def publish(
    shelf: Shelf,
    folder: Path,
    *,
    task: Literal["embed", "classify"] = "classify",
    thresholds: dict[str, float] | None = None,
) -> Manifest:
    """Put `tiny@stable` on the shelf, made in `folder`. With other thresholds it is another version."""
    (folder / "model.onnx").write_bytes(graph(task))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer()))
    manifest = shelf.publish(folder, msgspec.structs.replace(card(task), thresholds=thresholds or {}))
    shelf.promote(manifest.name, manifest.version)
    return manifest


def card(task: Literal["embed", "classify", "predict"], **changes: object) -> Card:
    lineage = Lineage(
        recipe="tiny",
        recipe_hash="0" * 64,
        base="none",
        base_licence="Apache-2.0",
        data="none",
        rows_train=0,
        rows_test=0,
        seed=0,
        packages={},
    )
    plain = Card(
        name="tiny",
        task=task,
        format="onnx",
        tokens_max=TOKENS_MAX,
        lineage=lineage,
        labels=LABELS if task == "classify" else (),
        pooling="mean",
        truncate=True,
    )
    return msgspec.structs.replace(plain, **changes)


def tokenizer() -> object:
    special = [{"Sequence": {"id": "A", "type_id": 0}}]
    ends = [{"SpecialToken": {"id": word, "type_id": 0}} for word in ("[CLS]", "[SEP]")]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": {
            "strategy": {"Fixed": 8},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "[PAD]",
        },
        "added_tokens": [],
        "normalizer": {"type": "Lowercase"},
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [ends[0], *special, ends[1]],
            "pair": [ends[0], *special, ends[1]],
            "special_tokens": {
                word: {"id": word, "ids": [WORDS.index(word)], "tokens": [word]} for word in ("[CLS]", "[SEP]")
            },
        },
        "decoder": None,
        "model": {
            "type": "WordLevel",
            "vocab": {word: index for index, word in enumerate(WORDS)},
            "unk_token": "[UNK]",
        },
    }


def graph(task: Literal["embed", "classify"]) -> bytes:
    nodes = [
        _node("Gather", ["vectors", "input_ids"], "tokens"),
        _node("Cast", ["attention_mask"], "mask", _whole("to", _FLOAT)),
        _node("Unsqueeze", ["mask", "last"], "weights"),
        _node("Mul", ["tokens", "weights"], "kept"),
        _node("ReduceSum", ["kept", "length"], "sum", _whole("keepdims", 0)),
        _node("ReduceSum", ["weights", "length"], "count", _whole("keepdims", 0)),
        _node("Div", ["sum", "count"], "mean"),
    ]
    width = len(LABELS)
    if task == "embed":
        nodes.append(_node("LpNormalization", ["mean"], "embedding", _whole("axis", 1), _whole("p", 2)))
        outputs = [_value("embedding", _FLOAT, ["n", width])]
    else:
        nodes.append(_node("Mul", ["mean", "ten"], "logits"))
        nodes.append(_node("Softmax", ["logits"], "scores", _whole("axis", 1)))
        outputs = [_value("logits", _FLOAT, ["n", width]), _value("scores", _FLOAT, ["n", width])]
    vectors = [
        float(_CLASS[word] == column) if word in _CLASS else 1 / width for word in WORDS for column in range(width)
    ]
    constants = [
        _tensor("vectors", _FLOAT, [len(WORDS), width], struct.pack(f"<{len(vectors)}f", *vectors)),
        _tensor("last", _INT64, [1], struct.pack("<q", 2)),
        _tensor("length", _INT64, [1], struct.pack("<q", 1)),
        _tensor("ten", _FLOAT, [1], struct.pack("<f", 10)),
    ]
    inputs = [_value(name, _INT64, ["n", "length"]) for name in ("input_ids", "attention_mask")]
    return model(nodes, constants, inputs, outputs)


def images(first: str | int = "n") -> bytes:
    """`brightness` [n, 1] of `pixels` [n, side, side, 2] float, times `gain` [n, 1] float."""
    axes = struct.pack("<3q", 1, 2, 3)
    return model(
        [
            _node("ReduceSum", ["pixels", "axes"], "sum", _whole("keepdims", 0)),
            _node("Unsqueeze", ["sum", "last"], "column"),
            _node("Mul", ["column", "gain"], "brightness"),
        ],
        [_tensor("axes", _INT64, [3], axes), _tensor("last", _INT64, [1], struct.pack("<q", 1))],
        [_value("pixels", _FLOAT, [first, "side", "side", 2]), _value("gain", _FLOAT, [first, 1])],
        [_value("brightness", _FLOAT, [first, 1])],
    )


def words() -> bytes:
    """`vector` [n, length, 3] of `ids` [n, length] int64, of which there are four, and `echo` of `names` [n] string."""
    table = [float(it) for it in range(12)]
    return model(
        [_node("Gather", ["table", "ids"], "vector"), _node("Identity", ["names"], "echo")],
        [_tensor("table", _FLOAT, [4, 3], struct.pack("<12f", *table))],
        [_value("ids", _INT64, ["n", "length"]), _value("names", _STRING, ["n"])],
        [_value("vector", _FLOAT, ["n", "length", 3]), _value("echo", _STRING, ["n"])],
    )


def sounds(width: int = 80) -> bytes:
    """`scores` [n, 2] of `samples` [n, width]: one less their mean loudness over `lengths` [n], and that loudness."""
    return model(
        [
            _node("Abs", ["samples"], "loud"),
            _node("ReduceSum", ["loud", "one"], "sum", _whole("keepdims", 1)),
            _node("Cast", ["lengths"], "count", _whole("to", _FLOAT)),
            _node("Unsqueeze", ["count", "one"], "column"),
            _node("Div", ["sum", "column"], "mean"),
            _node("Sub", ["whole", "mean"], "rest"),
            _node("Concat", ["rest", "mean"], "scores", _whole("axis", 1)),
        ],
        [
            _tensor("one", _INT64, [1], struct.pack("<q", 1)),
            _tensor("whole", _FLOAT, [1], struct.pack("<f", 1)),
        ],
        [_value("samples", _FLOAT, ["n", width]), _value("lengths", _INT64, ["n"])],
        [_value("scores", _FLOAT, ["n", 2])],
    )


def quantized() -> bytes:
    """`whole` [n, 2] of `given` [n, 2] float, scaled by the largest of all of it."""
    node = b"".join(_field(2, it) for it in (b"whole", b"scale", b"zero"))
    return model(
        [_field(1, b"given") + node + _field(4, b"DynamicQuantizeLinear")],
        [],
        [_value("given", _FLOAT, ["n", 2])],
        [_value("whole", _UINT8, ["n", 2])],
    )


def model(nodes: list[bytes], constants: list[bytes], inputs: list[bytes], outputs: list[bytes]) -> bytes:
    """A ModelProto."""
    body = b"".join(
        [
            *(_field(1, node) for node in nodes),
            _field(2, b"tiny"),
            *(_field(5, constant) for constant in constants),
            *(_field(11, value) for value in inputs),
            *(_field(12, value) for value in outputs),
        ]
    )
    return _field(1, 8) + _field(7, body) + _field(8, _field(2, 17))  # IR version 8, opset 17


def _node(operator: str, inputs: list[str], output: str, *attributes: bytes) -> bytes:
    names = b"".join(_field(1, name.encode()) for name in inputs)
    return names + _field(2, output.encode()) + _field(4, operator.encode()) + b"".join(attributes)


def _whole(name: str, value: int) -> bytes:
    """An attribute of type INT."""
    return _field(5, _field(1, name.encode()) + _field(3, value) + _field(20, 2))


def _tensor(name: str, kind: int, shape: list[int], content: bytes) -> bytes:
    return b"".join(_field(1, size) for size in shape) + _field(2, kind) + _field(8, name.encode()) + _field(9, content)


def _value(name: str, kind: int, shape: list[str | int]) -> bytes:
    sizes = [_field(1, it) if isinstance(it, int) else _field(2, it.encode()) for it in shape]
    dimensions = b"".join(_field(1, size) for size in sizes)
    return _field(1, name.encode()) + _field(2, _field(1, _field(1, kind) + _field(2, dimensions)))


def _field(number: int, value: int | bytes) -> bytes:
    """One protobuf field: a varint, or bytes after their length."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    found.append(value)
    return bytes(found)
