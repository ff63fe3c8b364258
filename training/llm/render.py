"""Conversations as a model reads them: token ids by its chat template, and which of them are to be learnt."""

from __future__ import annotations

from typing import Any

import msgspec

from training.llm.conversation import Conversation, Message, Unreadable
from training.llm.likelihood import Asked

IGNORED = -100
"""The label of a token that no loss is computed of."""


class Rendered(msgspec.Struct, frozen=True):
    """`labels` are `ids` where the assistant speaks, its end of turn included, and IGNORED elsewhere."""

    ids: list[int]
    labels: list[int]


def render(tokenizer: Any, it: Conversation) -> Rendered:
    """The whole conversation. Each turn is tokenized by itself, as it is when a model answers: what it is given ends
    where its own turn begins."""
    ids: list[int] = []
    labels: list[int] = []
    done = ""
    for at, message in enumerate(it.messages):
        if message.role != "assistant":
            continue
        given = text(tokenizer, it.messages[:at], it, answer_next=True)
        through = text(tokenizer, it.messages[: at + 1], it)
        if not (given.startswith(done) and through.startswith(given)):
            raise Unreadable("the model's chat template changes earlier turns, so none can be learnt by itself")
        cut = _end_of_turn(tokenizer, through, len(given))
        given_ids, said_ids = _ids(tokenizer, given[len(done) :]), _ids(tokenizer, through[len(given) : cut])
        ids += given_ids + said_ids
        labels += [IGNORED] * len(given_ids) + said_ids
        done = through[:cut]
    return Rendered(ids, labels)


def last_answer(tokenizer: Any, it: Conversation) -> Asked:
    """The conversation up to its last answer, and that."""
    whole = render(tokenizer, it)
    start = next(at for at in range(len(whole.labels), 0, -1) if whole.labels[at - 1] == IGNORED)
    return Asked(whole.ids[:start], whole.ids[start:])


def text(tokenizer: Any, messages: tuple[Message, ...], whole: Conversation, *, answer_next: bool = False) -> str:
    """Some of a conversation's turns, in the template's words."""
    rendered: str = tokenizer.apply_chat_template(
        [msgspec.to_builtins(it) for it in messages],
        tools=list(whole.tools) or None,
        tokenize=False,
        add_generation_prompt=answer_next,
    )
    return rendered


def _end_of_turn(tokenizer: Any, through: str, start: int) -> int:
    """Where the assistant's turn is over: after the token by which a model says so, if the template writes it. What the
    template puts behind that, the model never says."""
    found = through.rfind(tokenizer.eos_token, start)
    return len(through) if found < 0 else found + len(tokenizer.eos_token)


def _ids(tokenizer: Any, part: str) -> list[int]:
    ids: list[int] = tokenizer(part, add_special_tokens=False).input_ids
    return ids
