"""Multiple choice by likelihood, as lm-evaluation-harness does it, for PIQA: which of two solutions fits a goal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from training.contract import Array
from training.errors import DataError
from training.llm.likelihood import Asked, likelihoods
from training.progress import Advance

NAMES = ("acc", "acc_norm")
"""As tables of published models print them."""

_AT_ONCE = 64


class Question(msgspec.Struct, frozen=True):
    """One row of PIQA."""

    goal: str
    sol1: str
    sol2: str


def read(questions: str, labels: str) -> tuple[list[Question], list[int]]:
    """PIQA's two files, line by line the same rows. Raises DataError naming the row at fault."""
    try:
        lines = [line for line in Path(questions).read_text("utf-8").splitlines() if line.strip()]
        answers = Path(labels).read_text("utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"PIQA cannot be read: {error}") from error
    if len(lines) != len(answers) or not lines:
        raise DataError(f"{questions} has {len(lines)} rows and {labels} {len(answers)}; they belong together")
    decoder = msgspec.json.Decoder(Question)
    rows = []
    for number, (line, answer) in enumerate(zip(lines, answers, strict=True), 1):
        try:
            rows.append(decoder.decode(line))
        except msgspec.DecodeError as error:
            raise DataError(f"{questions}, row {number}: {error}") from error
        if answer not in {"0", "1"}:
            raise DataError(f"{labels}, row {number}: {answer!r} is neither 0 nor 1")
    return rows, [int(answer) for answer in answers]


def judge(
    network: Any,
    tokenizer: Any,
    questions: Sequence[Question],
    labels: Sequence[int],
    *,
    advance: Advance = lambda _: None,
) -> dict[str, Array]:
    """Of each question, whether the right solution was found the likelier one: `acc` by its probability, `acc_norm` by
    that per character; bool [n]."""
    right: list[tuple[bool, bool]] = []
    for start in range(0, len(questions), _AT_ONCE):
        part = questions[start : start + _AT_ONCE]
        asked = []
        for question in part:
            prompt = _ids(tokenizer, f"Question: {question.goal}\nAnswer:")
            asked += [Asked(prompt, _ids(tokenizer, f" {it}")) for it in (question.sol1, question.sol2)]
        found = [it.log for it in likelihoods(network, asked)]
        for at, (question, label) in enumerate(zip(part, labels[start:], strict=False)):
            first, second = found[2 * at : 2 * at + 2]
            longer = second / len(question.sol2) > first / len(question.sol1)
            right.append(((second > first) == bool(label), longer == bool(label)))
        advance(len(part))
    return {name: np.array([it[at] for it in right]) for at, name in enumerate(NAMES)}


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return ids
