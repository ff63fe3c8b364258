"""Short conversations in one line of a batch, so that no work is spent on padding.

None sees another: positions start again with each, and from that transformers makes the mask (its masking_utils say
`find_packed_sequence_indices`), as long as it is given none of ours. A test compares the loss with that of each alone.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from training.contract import Array
from training.data.spool import Stored
from training.llm.render import IGNORED, Rendered

Line = list[Rendered]


class Lines(Sequence[Line]):
    """Rows that lie on disk, read as lines of them are asked for."""

    def __init__(self, rows: Sequence[Rendered], order: Array, line: Array) -> None:
        """`order`: the rows as lines take them up, int64 [n]; `line`: which one each of these is in, int64 [n]."""
        self._rows = rows
        self._places = order[np.argsort(line, kind="stable")]
        self._ends = np.cumsum(np.bincount(line))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, at: Any) -> Any:
        end = self._ends[at]
        start = self._ends[at - 1] if at else 0
        return [self._rows[place] for place in self._places[start:end]]


def pack(rows: Iterable[Rendered], *, tokens_max: int) -> Lines:
    """Lines of at most `tokens_max` tokens: longest row first, each into the fullest line that still has room. Rows are
    cut to that length; one that has nothing left to learn is left out."""
    lengths = array("q")

    def kept() -> Iterator[Rendered]:
        for row in rows:
            cut = Rendered(row.ids[:tokens_max], row.labels[:tokens_max])
            if any(label != IGNORED for label in cut.labels[1:]):
                lengths.append(len(cut.ids))
                yield cut

    stored = Stored(kept(), Rendered)
    order = np.argsort(-np.frombuffer(lengths, np.int64), kind="stable")
    return Lines(stored, order, _filled((lengths[it] for it in order), tokens_max))


def _filled(lengths: Iterable[int], tokens_max: int) -> Array:
    """Of each row, the line that takes it; int64 [n]."""
    taken = array("q")
    count = 0
    room = [array("q") for _ in range(tokens_max + 1)]  # tokens free → the lines that have so many, newest last
    roomy = 0  # the bit of every number of tokens that some line has free
    for need in lengths:
        if enough := roomy >> need:
            free = need + (enough & -enough).bit_length() - 1
            line = room[free].pop()
            if not room[free]:
                roomy ^= 1 << free
        else:
            free, line, count = tokens_max, count, count + 1
        taken.append(line)
        room[free - need].append(line)
        roomy |= 1 << free - need
    return np.frombuffer(taken, np.int64)


def collate(lines: Sequence[Line]) -> dict[str, Tensor]:
    """Lines as a model takes them: `input_ids`, `labels` and `position_ids`, [lines, tokens of the longest]. Padding is
    one more row of its own, of which nothing is learnt; so is the first token of each row."""
    longest = max(sum(len(row.ids) for row in line) for line in lines)
    ids, labels, positions = [], [], []
    for line in lines:
        pad = longest - sum(len(row.ids) for row in line)
        ids.append([it for row in line for it in row.ids] + [0] * pad)
        labels.append([it for row in line for it in (IGNORED, *row.labels[1:])] + [IGNORED] * pad)
        positions.append([at for row in line for at in range(len(row.ids))] + list(range(pad)))
    return {
        "input_ids": torch.tensor(ids),
        "labels": torch.tensor(labels),
        "position_ids": torch.tensor(positions),
    }
