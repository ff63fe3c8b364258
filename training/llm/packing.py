"""Short conversations in one line of a batch, so that no work is spent on padding.

None sees another: positions start again with each, and from that transformers makes the mask (its masking_utils say
`find_packed_sequence_indices`), as long as it is given none of ours. A test compares the loss with that of each alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from training.llm.render import IGNORED, Rendered

Line = list[Rendered]


def pack(rows: Sequence[Rendered], *, tokens_max: int) -> list[Line]:
    """Lines of at most `tokens_max` tokens: longest row first, each into the fullest line that still has room. Rows are
    cut to that length; one that has nothing left to learn is left out."""
    cut = [Rendered(row.ids[:tokens_max], row.labels[:tokens_max]) for row in rows]
    kept = [row for row in cut if any(label != IGNORED for label in row.labels[1:])]
    lines: list[Line] = []
    room: dict[int, list[int]] = {}  # tokens free → the lines that have so many, oldest last
    for row in sorted(kept, key=lambda it: -len(it.ids)):
        need = len(row.ids)
        free = next((it for it in range(need, tokens_max + 1) if room.get(it)), None)
        if free is None:
            at, free = len(lines), tokens_max
            lines.append([])
        else:
            at = room[free].pop()
        lines[at].append(row)
        room.setdefault(free - need, []).append(at)
    return lines


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
