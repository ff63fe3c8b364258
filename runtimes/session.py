"""A loaded ONNX graph and its tokenizer: text or token ids in, named arrays out. Blocking; owned by one thread.

The graph's contract: inputs `input_ids` and `attention_mask`, int64 [n, length]; an output `embedding` [n, width]
for the task `embed`, or `scores` [n, labels] for `classify`. Whatever else it answers (`logits`) is passed on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

import numpy as np
import onnxruntime
from tokenizers import Encoding, Tokenizer

from runtimes.artifact import Artifact
from runtimes.contract import Datatype, Invalid, Tensor, Unavailable
from runtimes.integrity import Rejected

if TYPE_CHECKING:
    from runtimes.contract import Array

Provider = Literal["auto", "cpu", "cuda"]

PIECE_CHARS = 16_384
"""Text that is tokenized at once: about as long on a CPU as a batch takes, so that calls can take turns."""
CHARS_PER_TOKEN = 8
"""What is read of a text at first. Prose has fewer characters per token, so it is seldom too little."""
CHARS_PER_TOKEN_MAX = 128
"""What is ever read of a text. WordPiece takes no word of more than 100 characters apart, so only long runs of blanks,
or of longer words, are cut before they fill `tokens_max`."""
WORDS_UNSETTLED = 16
"""Words before a cut that it may have changed: its last one, or a special token (`[MASK]`) that it went through."""


class Session:
    """Loads what it is given: the artifact must have been verified. Raises Rejected or Unavailable."""

    def __init__(self, artifact: Artifact, *, threads: int, provider: Provider) -> None:
        manifest = artifact.manifest
        self.task = manifest.task
        self.labels = manifest.labels
        self.thresholds = manifest.thresholds
        self.version = manifest.version
        self.tokens_max = manifest.tokens_max
        self._who = f"{manifest.name}@{manifest.version}"
        self._tokenizer = _tokenizer(artifact, self._who)
        self._vocabulary = self._tokenizer.get_vocab_size()
        self._graph = _graph(artifact, self._who, threads=threads, provider=provider)
        self._outputs = [output.name for output in self._graph.get_outputs()]
        self._inspect()
        self.inputs = (Tensor("text", "BYTES", (-1,)), *map(_tensor, self._graph.get_inputs()))
        self.outputs = tuple(map(_tensor, self._graph.get_outputs()))
        if self.task == "classify":
            self.outputs += (Tensor("label", "BYTES", (-1,)),)
            self._names = np.array(self.labels, object)

    def check(self, inputs: Mapping[str, Array]) -> None:
        """Raise Invalid, naming the input, unless `tokens` can work on these. Cheap: reads shapes, types and ids."""
        if inputs.keys() == {"text"}:
            self._check_text(inputs["text"])
        elif inputs.keys() == {"input_ids", "attention_mask"}:
            self._check_tokens(inputs["input_ids"], inputs["attention_mask"])
        else:
            raise Invalid(f"{self._who} takes either `text`, or `input_ids` and `attention_mask`; got {sorted(inputs)}")

    def tokens(self, inputs: Mapping[str, Array]) -> list[Array]:
        """One row of token ids per entry: text is tokenized and truncated, ids lose their padding. See `pieces`."""
        if "text" in inputs:
            found = [self._ids(text) for text in inputs["text"]]
            if not all(map(len, found)):
                raise Invalid("`text` has a row without a single token; leave it out", param="text")
            return found
        lengths = inputs["attention_mask"].sum(axis=1)
        return [row[:length] for row, length in zip(inputs["input_ids"], lengths, strict=True)]

    def run(self, rows: Sequence[Array]) -> dict[str, Array]:
        """One batch through the graph, padded to its longest row."""
        ids = np.zeros((len(rows), max(len(row) for row in rows)), np.int64)
        mask = np.zeros_like(ids)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = row
            mask[index, : len(row)] = 1
        try:
            found = self._graph.run(self._outputs, {"input_ids": ids, "attention_mask": mask})
        except Exception as error:  # noqa: BLE001 - the library's errors have no common class
            # What the library says may quote the ids, so only its kind is passed on.
            raise Unavailable(f"{self._who} failed on a batch of {ids.shape}: {type(error).__name__}") from None
        outputs = dict(zip(self._outputs, found, strict=True))
        if self.task == "classify":
            outputs["label"] = self._names[outputs["scores"].argmax(axis=1)]
        return outputs

    def _ids(self, text: str) -> Array:
        """The first `tokens_max` ids. Of a long text, no more is read than settles them: the library tokenizes all
        that it is given before it truncates, and keeps what it cut off."""
        # One text at a time, because a batch would spread over all cores, whatever `threads` says; as batches of one,
        # because only the batch call lets other threads run meanwhile.
        chars = CHARS_PER_TOKEN * self.tokens_max
        chars_max = min(len(text), CHARS_PER_TOKEN_MAX * self.tokens_max)
        while chars < chars_max:
            encoding = self._tokenizer.encode_batch([text[:chars]])[0]
            if _settled(encoding):
                return np.asarray(encoding.ids, np.int64)
            chars *= 4
        return np.asarray(self._tokenizer.encode_batch_fast([text[:chars_max]])[0].ids, np.int64)

    def _check_text(self, text: Array) -> None:
        if text.dtype != object or not all(isinstance(row, str) for row in text.flat):
            raise Invalid(f"`text` must hold strings; got {text.dtype}", param="text")
        if text.ndim != 1 or not len(text):
            raise Invalid(f"`text` must have the shape [n], n ≥ 1; got {list(text.shape)}", param="text")

    def _check_tokens(self, ids: Array, mask: Array) -> None:
        for name, array in (("input_ids", ids), ("attention_mask", mask)):
            if array.dtype.kind not in "iu":
                raise Invalid(f"`{name}` must hold integers; got {array.dtype}", param=name)
            if array.ndim != 2 or not array.size:
                raise Invalid(
                    f"`{name}` must have the shape [n, length], both ≥ 1; got {list(array.shape)}", param=name
                )
        if ids.shape != mask.shape:
            raise Invalid(
                f"`attention_mask` must have the shape of `input_ids`, {list(ids.shape)}; got {list(mask.shape)}",
                param="attention_mask",
            )
        lengths = mask.sum(axis=1)
        if not np.array_equal(mask, np.arange(mask.shape[1]) < lengths[:, None]) or lengths.min() < 1:
            raise Invalid(
                "`attention_mask` must hold at least a one per row, ones first, then zeros only",
                param="attention_mask",
            )
        if lengths.max() > self.tokens_max:
            raise Invalid(
                f"`input_ids` has a row of {lengths.max()} tokens; {self._who} reads at most {self.tokens_max}",
                param="input_ids",
            )
        if ids.min() < 0 or ids.max() >= self._vocabulary:
            raise Invalid(
                f"`input_ids` must be from 0 to {self._vocabulary - 1}, the vocabulary of {self._who}",
                param="input_ids",
            )

    def _inspect(self) -> None:
        """Reject a graph that does not keep the contract above, before anyone calls it."""
        inputs = {it.name: (it.type, len(it.shape)) for it in self._graph.get_inputs()}
        if inputs != dict.fromkeys(("input_ids", "attention_mask"), ("tensor(int64)", 2)):
            raise Rejected(
                f"{self._who}: the graph takes {inputs}; it must take `input_ids` and `attention_mask`, both "
                "tensor(int64) [n, length]"
            )
        needed = {"embed": "embedding", "classify": "scores"}.get(self.task)
        if needed is None:
            raise Rejected(f"{self._who} is made to {self.task}; this runtime can embed and classify")
        if needed not in self._outputs:
            raise Rejected(f"{self._who}: the graph has no output {needed!r}, only {self._outputs}")
        width = self._graph.get_outputs()[self._outputs.index(needed)].shape[-1]
        if self.task == "classify" and not self.labels:
            raise Rejected(f"{self._who} is a classifier without labels; name them in its manifest")
        if self.task == "classify" and isinstance(width, int) and width != len(self.labels):
            raise Rejected(f"{self._who}: the graph scores {width} labels, the manifest has {len(self.labels)}")


def _tensor(it: onnxruntime.NodeArg) -> Tensor:
    kind = it.type.removeprefix("tensor(").removesuffix(")")
    return Tensor(it.name, DATATYPES[kind], tuple(axis if isinstance(axis, int) else -1 for axis in it.shape))


DATATYPES: Mapping[str, Datatype] = MappingProxyType(
    {
        "bool": "BOOL",
        "uint8": "UINT8",
        "uint16": "UINT16",
        "uint32": "UINT32",
        "uint64": "UINT64",
        "int8": "INT8",
        "int16": "INT16",
        "int32": "INT32",
        "int64": "INT64",
        "float16": "FP16",
        "float": "FP32",
        "double": "FP64",
        "string": "BYTES",
    }
)
"""ONNX's name → the protocol's."""


def pieces(inputs: Mapping[str, Array]) -> list[Mapping[str, Array]]:
    """The same rows in the same order, a few at a time: what `tokens` can work on without keeping others waiting."""
    if "text" not in inputs:
        return [inputs]  # nothing to tokenize
    starts, chars = [0], 0
    for index, text in enumerate(inputs["text"]):
        chars += len(text)
        if chars > PIECE_CHARS and index > starts[-1]:
            starts.append(index)
            chars = len(text)
    return [{"text": rows} for rows in np.split(inputs["text"], starts[1:])]


def batches(rows: Sequence[Array], *, rows_max: int) -> list[list[int]]:
    """Indices of rows that go together: similar in length, so that little of a batch is padding.

    A batch never mixes rows whose lengths, rounded up to a power of two (16 at least), differ.
    """
    found: list[list[int]] = []
    bucket = 0
    for index in sorted(range(len(rows)), key=lambda it: len(rows[it])):
        size = max(16, 1 << (len(rows[index]) - 1).bit_length())
        if size != bucket or len(found[-1]) == rows_max:
            found.append([])
            bucket = size
        found[-1].append(index)
    return found


def merged(plan: Sequence[Sequence[int]], parts: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
    """The answers of all batches as one, in the order in which the rows were given."""
    order = np.argsort(np.concatenate(plan))
    return {name: np.concatenate([part[name] for part in parts])[order] for name in parts[0]}


def _settled(encoding: Encoding) -> bool:
    """Whether more text after that of this truncated encoding would leave its ids as they are."""
    kept = [word for word in encoding.word_ids if word is not None]
    beyond = [word for part in encoding.overflowing for word in part.word_ids if word is not None]
    return bool(kept and beyond) and max(beyond) - max(kept) > WORDS_UNSETTLED


def _tokenizer(artifact: Artifact, who: str) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_file(str(artifact.path / "tokenizer.json"))
    except Exception as error:  # the library raises nothing narrower
        raise Rejected(f"{who}: tokenizer.json cannot be loaded ({error}); publish the artifact again") from error
    tokenizer.no_padding()
    tokenizer.enable_truncation(artifact.manifest.tokens_max)
    return tokenizer


def _graph(artifact: Artifact, who: str, *, threads: int, provider: Provider) -> onnxruntime.InferenceSession:
    files = [name for name in artifact.manifest.files if name.endswith(".onnx")]
    if len(files) != 1:
        raise Rejected(f"{who} holds {len(files)} ONNX files; it must hold one")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # lesser messages may quote inputs
    # Waiting threads would otherwise spin, which costs the rest of the machine more than it gains.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    providers = _providers(provider)
    try:
        graph = onnxruntime.InferenceSession(artifact.path / files[0], options, providers=providers)
    except Exception as error:  # the library's errors have no common class
        raise Rejected(f"{who}: {files[0]} cannot be loaded ({error})") from error
    if provider == "cuda" and graph.get_providers()[0] != _CUDA:
        raise Unavailable(f"{who}: CUDA was asked for and could not be initialised; check driver and libraries")
    return graph


_CUDA = "CUDAExecutionProvider"
_CPU = "CPUExecutionProvider"


def _providers(provider: Provider) -> list[str]:
    has_cuda = _CUDA in onnxruntime.get_available_providers()
    if provider == "cuda" and not has_cuda:
        raise Unavailable("CUDA was asked for, but this onnxruntime has none; install headrace[cuda]")
    return [_CUDA, _CPU] if has_cuda and provider != "cpu" else [_CPU]
