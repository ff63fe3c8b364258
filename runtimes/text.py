"""Text, or the ids of its tokens, as a graph reads it: `input_ids` and `attention_mask`, int64 [n, length]."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import msgspec
import numpy as np
from tokenizers import Encoding, Tokenizer

from runtimes.artifact import Artifact
from runtimes.contract import Invalid, Tensor
from runtimes.graph import Graph
from runtimes.integrity import Rejected
from runtimes.words import words_of

if TYPE_CHECKING:
    from runtimes.contract import Array

PIECE_CHARS = 16_384
"""Text that is tokenized at once: about as long on a CPU as a batch takes, so that calls can take turns."""
CHARS_PER_TOKEN = 8
"""What is read of a text at first. Prose has fewer characters per token, so it is seldom too little."""
CHARS_PER_TOKEN_MAX = 128
"""What is ever read of a text. WordPiece takes no word of more than 100 characters apart, so only long runs of blanks,
or of longer words, are cut before they fill `tokens_max`."""
WORDS_UNSETTLED = 16
"""Words before a cut that it may have changed: its last one, or a special token (`[MASK]`) that it went through."""

NAMES = frozenset({"input_ids", "attention_mask"})


class Text:
    """What is read as text. Safe for threads."""

    batched = True
    counts_tokens = True

    def __init__(self, artifact: Artifact, graph: Graph, *, who: str) -> None:
        if artifact.manifest.tokens_max is None:
            raise Rejected(f"{who} has a tokenizer, and its manifest no `tokens_max`; publish it again")
        self.tokens_max = artifact.manifest.tokens_max
        self._who = who
        self._truncate = artifact.manifest.truncate
        self._tokenizer = _tokenizer(artifact, who, self.tokens_max)
        self._words = words_of(self._tokenizer)
        self._vocabulary = self._tokenizer.get_vocab_size()
        self._typed = "token_type_ids" in graph.axes
        kinds = {it.name: (it.datatype, it.shape) for it in graph.inputs if it.name != "token_type_ids"}
        if kinds != dict.fromkeys(NAMES, ("INT64", (-1, -1))):
            raise Rejected(
                f"{who} has a tokenizer and its graph takes {sorted(graph.axes.keys() & {*kinds})}; it must take "
                "`input_ids` and `attention_mask`, both tensor(int64) [n, length]"
            )
        self.inputs = (
            Tensor("text", "BYTES", (-1,), optional=True),
            *(msgspec.structs.replace(it, optional=True) for it in graph.inputs if it.name in NAMES),
        )
        self.outputs = tuple(it for it in graph.outputs if _is_of_rows(it, graph))

    def check(self, inputs: Mapping[str, Array]) -> None:
        """Raise Invalid, naming the input, unless `rows` can work on these. Cheap: reads shapes, types and ids."""
        if inputs.keys() == {"text"}:
            self._check_text(inputs["text"])
        elif inputs.keys() == NAMES:
            self._check_tokens(inputs["input_ids"], inputs["attention_mask"])
        else:
            unknown, missing = inputs.keys() - NAMES - {"text"}, NAMES - inputs.keys() if inputs else ()
            raise Invalid(
                f"{self._who} takes either `text`, or `input_ids` and `attention_mask`; got {sorted(inputs)}",
                param=min(unknown or missing, default=None),
            )

    def count(self, inputs: Mapping[str, Array]) -> int:
        return len(next(iter(inputs.values())))

    def pieces(self, inputs: Mapping[str, Array], rows_max: int) -> Iterator[tuple[Mapping[str, Array], bool]]:
        """The same rows in the same order, a few at a time, and whether `rows` takes long with them."""
        if "text" not in inputs:
            for start in range(0, self.count(inputs), rows_max):
                yield {name: array[start : start + rows_max] for name, array in inputs.items()}, False
            return
        texts = inputs["text"]
        start = chars = 0
        for index, text in enumerate(texts.tolist()):  # numpy's arrays end with an exception when they are gone through
            if index > start and (chars + len(text) > PIECE_CHARS or index - start == rows_max):
                yield {"text": texts[start:index]}, chars > QUICK_CHARS
                start, chars = index, 0
            chars += len(text)
        yield {"text": texts[start:]}, chars > QUICK_CHARS

    def rows(self, piece: Mapping[str, Array]) -> list[tuple[Array, int, Hashable]]:
        """Each one's ids, how many they are, and what it goes together with: text is tokenized, ids lose their padding.
        Raises Invalid for a text that is empty or too long."""
        if "text" in piece:
            found = [self._ids(text) for text in piece["text"].tolist()]
        else:
            ids, lengths = piece["input_ids"], piece["attention_mask"].sum(axis=1)
            found = [ids[index, :length] for index, length in enumerate(lengths.tolist())]
        return [(ids, len(ids), None) for ids in found]

    def feed(self, contents: Sequence[Array]) -> dict[str, Array]:
        """What the graph reads of one batch: padded to its longest row."""
        ids = np.zeros((len(contents), max(map(len, contents))), np.int64)
        mask = np.zeros(ids.shape, np.int64)
        for index, row in enumerate(contents):
            ids[index, : len(row)] = row
            mask[index, : len(row)] = 1
        feed = {"input_ids": ids, "attention_mask": mask}
        return feed | {"token_type_ids": np.zeros(ids.shape, np.int64)} if self._typed else feed

    def _ids(self, text: str) -> Array:
        if self._words is not None and len(text) <= QUICK_CHARS:
            ids = self._words.ids(text)
            if ids and len(ids) <= self.tokens_max:
                return np.array(ids, np.int64)
        # One text at a time, because a batch would spread over all cores, whatever `threads` says; as batches of one,
        # because only the batch call lets other threads run meanwhile.
        chars_max = min(len(text), CHARS_PER_TOKEN_MAX * self.tokens_max)
        if self._truncate:
            ids = self._first_ids(text, chars_max)
        else:
            [encoding] = self._tokenizer.encode_batch_fast([text[:chars_max]])
            if chars_max < len(text) or encoding.overflowing:
                raise Invalid(
                    f"`text` has a row of more than {self.tokens_max} tokens, which is all that {self._who} reads; "
                    "shorten it",
                    param="text",
                )
            ids = encoding.ids
        if not ids:
            raise Invalid("`text` has a row without a single token; leave it out", param="text")
        return np.asarray(ids, np.int64)

    def _first_ids(self, text: str, chars_max: int) -> list[int]:
        """The first `tokens_max` ids. Of a long text, no more is read than settles them: the library tokenizes all
        that it is given before it truncates, and keeps what it cut off."""
        chars = CHARS_PER_TOKEN * self.tokens_max
        while chars < chars_max:
            [encoding] = self._tokenizer.encode_batch([text[:chars]])
            if _settled(encoding):
                return list(encoding.ids)
            chars *= 4
        return list(self._tokenizer.encode_batch_fast([text[:chars_max]])[0].ids)

    def _check_text(self, text: Array) -> None:
        if text.ndim != 1 or not len(text):
            raise Invalid(f"`text` must have the shape [n], n ≥ 1; got {list(text.shape)}", param="text")
        if text.dtype != object or set(map(type, text.tolist())) != {str}:
            raise Invalid(f"`text` must hold strings; got {text.dtype}", param="text")

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


QUICK_CHARS = 512
"""Text that is tokenized before another thread could begin with it."""


def _is_of_rows(it: Tensor, graph: Graph) -> bool:
    """Not of tokens: how long such an answer is would depend on the rows beside."""
    length = graph.axes["input_ids"][1]
    return it.shape[:1] == (-1,) and (len(it.shape) <= 2 if length is None else length not in graph.axes[it.name][1:])


def _settled(encoding: Encoding) -> bool:
    """Whether more text after that of this truncated encoding would leave its ids as they are."""
    kept = [word for word in encoding.word_ids if word is not None]
    beyond = [word for part in encoding.overflowing for word in part.word_ids if word is not None]
    return bool(kept and beyond) and max(beyond) - max(kept) > WORDS_UNSETTLED


def _tokenizer(artifact: Artifact, who: str, tokens_max: int) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_file(str(artifact.path / "tokenizer.json"))
    except Exception as error:  # the library raises nothing narrower
        raise Rejected(f"{who}: tokenizer.json cannot be loaded ({error}); publish the artifact again") from error
    tokenizer.no_padding()
    tokenizer.enable_truncation(tokens_max)
    return tokenizer
