"""What a language model makes of answers that others gave."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from training.contract import Answers, Array, Examples
from training.data import conversations
from training.data.spool import Stored
from training.llm import render
from training.llm.conversation import Message
from training.llm.likelihood import Asked, Likelihood, likelihoods
from training.progress import progress


def outputs(network: Any, tokenizer: Any, examples: Examples) -> dict[str, Array]:
    """Of answers, `nll`, in nats, and `tokens`, the end of the turn included and what precedes it not. Of choices,
    `chosen` and `rejected`, the logarithms of their probabilities; and of a network that wears an adapter, the same
    without it, as `chosen_base` and `rejected_base`."""
    if isinstance(examples.targets, Answers):
        found = _likelihoods(network, (render.last_answer(tokenizer, it) for it in conversations.decoded(examples)))
        return {"nll": -_logs(found), "tokens": np.array([it.tokens for it in found])}
    made = _choices(network, tokenizer, examples)
    if hasattr(network, "disable_adapter"):
        with network.disable_adapter():
            made |= {f"{name}_base": array for name, array in _choices(network, tokenizer, examples).items()}
    return made


def _choices(network: Any, tokenizer: Any, examples: Examples) -> dict[str, Array]:
    def asked() -> Iterator[Asked]:
        for row in conversations.preferences(examples):
            for said in (row.chosen, row.rejected):
                messages = (*row.prompt.messages, Message("assistant", said))
                yield render.last_answer(tokenizer, row.prompt.__class__(messages, row.prompt.tools))

    logs = _logs(_likelihoods(network, asked()))
    return {"chosen": logs[::2], "rejected": logs[1::2]}


def _likelihoods(network: Any, asked: Iterable[Asked]) -> list[Likelihood]:
    stored = Stored(asked, Asked)
    with progress("evaluate", len(stored), "answers") as advance:
        return likelihoods(network, stored, advance=advance)


def _logs(found: list[Likelihood]) -> Array:
    return np.array([it.log for it in found])
