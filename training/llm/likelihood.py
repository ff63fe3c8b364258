"""How likely a model finds given answers: the one measure behind held-out loss and multiple choice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import torch

from training.progress import Advance

_TOKENS_AT_ONCE = 2048


class Asked(msgspec.Struct, frozen=True):
    """Token ids of a prompt, and of the answer whose likelihood is wanted."""

    prompt: list[int]
    answer: list[int]


class Likelihood(msgspec.Struct, frozen=True):
    """Natural logarithm of an answer's probability, and the tokens it is the sum over."""

    log: float
    tokens: int


def likelihoods(
    network: Any,
    asked: Sequence[Asked],
    *,
    tokens_at_once: int = _TOKENS_AT_ONCE,
    advance: Advance = lambda _: None,
) -> list[Likelihood]:
    """The likelihood of each answer after its prompt, in the order asked.

    Rows of like length go through the network together. They are padded on the right, where a causal model's earlier
    positions can't see it, and logits are computed of the answers' tokens only: a fifth of a small model's work is its
    vocabulary.
    """
    found: dict[int, Likelihood] = {}
    with torch.inference_mode():
        network(torch.zeros(1, 1, dtype=torch.long))  # one that is compressed unpacks itself when called as a whole
        for batch in _batches(asked, tokens_at_once):
            rows = [asked[at] for at in batch]
            longest = max(len(row.prompt) + len(row.answer) for row in rows) - 1
            ids = torch.zeros(len(rows), longest, dtype=torch.long)
            there = torch.zeros_like(ids)
            for place, row in enumerate(rows):
                # The last token predicts nothing that is asked.
                whole = torch.tensor((row.prompt + row.answer)[:-1])
                ids[place, : len(whole)] = whole
                there[place, : len(whole)] = 1
            hidden = network.get_decoder()(input_ids=ids, attention_mask=there).last_hidden_state
            for place, (at, row) in enumerate(zip(batch, rows, strict=True)):
                start = len(row.prompt) - 1
                logits = network.get_output_embeddings()(hidden[place, start : start + len(row.answer)]).float()
                loss = torch.nn.functional.cross_entropy(logits, torch.tensor(row.answer), reduction="sum")
                found[at] = Likelihood(-float(loss), len(row.answer))
            advance(len(batch))
    return [found[at] for at in range(len(asked))]


def _batches(asked: Sequence[Asked], tokens_at_once: int) -> Iterator[list[int]]:
    """Indices, longest rows first, so that memory runs out at the start or never."""
    lengths = [len(it.prompt) + len(it.answer) for it in asked]
    order = sorted(range(len(asked)), key=lambda at: -lengths[at])
    start = 0
    while start < len(order):
        count = max(1, tokens_at_once // lengths[order[start]])
        yield order[start : start + count]
        start += count
