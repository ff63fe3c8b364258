"""Multiple choice by likelihood, as lm-evaluation-harness does it, for PIQA: which of two solutions fits a goal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from training.llm.likelihood import Asked, likelihoods
from training.recipe import RecipeError

_AT_ONCE = 64


class Question(msgspec.Struct, frozen=True):
    """One row of PIQA."""

    goal: str
    sol1: str
    sol2: str


class Verdict(msgspec.Struct, frozen=True):
    """Whether the right solution was found the likelier one: by its probability, and by that per character."""

    hit: bool
    hit_norm: bool


def read(questions: Path, labels: Path) -> tuple[list[Question], list[int]]:
    """PIQA's two files, line by line the same rows. Raises RecipeError naming the row at fault."""
    try:
        lines = [line for line in questions.read_text("utf-8").splitlines() if line.strip()]
        answers = labels.read_text("utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"PIQA cannot be read: {error}") from error
    if len(lines) != len(answers) or not lines:
        raise RecipeError(f"{questions} has {len(lines)} rows and {labels} {len(answers)}; they belong together")
    decoder = msgspec.json.Decoder(Question)
    rows = []
    for number, (line, answer) in enumerate(zip(lines, answers, strict=True), 1):
        try:
            rows.append(decoder.decode(line))
        except msgspec.DecodeError as error:
            raise RecipeError(f"{questions}, row {number}: {error}") from error
        if answer not in {"0", "1"}:
            raise RecipeError(f"{labels}, row {number}: {answer!r} is neither 0 nor 1")
    return rows, [int(answer) for answer in answers]


def judge(
    network: Any,
    tokenizer: Any,
    questions: Sequence[Question],
    labels: Sequence[int],
    *,
    say: Callable[[int, int], None] = lambda done, of: None,
) -> list[Verdict]:
    """A verdict on each question. `say` hears how many are done."""
    verdicts: list[Verdict] = []
    for start in range(0, len(questions), _AT_ONCE):
        part = questions[start : start + _AT_ONCE]
        asked = []
        for question in part:
            prompt = _ids(tokenizer, f"Question: {question.goal}\nAnswer:")
            asked += [Asked(prompt, _ids(tokenizer, f" {it}")) for it in (question.sol1, question.sol2)]
        found = [it.log for it in likelihoods(network, asked)]
        for at, (question, label) in enumerate(zip(part, labels[start:], strict=False)):
            first, second = found[2 * at : 2 * at + 2]
            per_character = (first / len(question.sol1), second / len(question.sol2))
            verdicts.append(
                Verdict((second > first) == bool(label), (per_character[1] > per_character[0]) == bool(label))
            )
        say(len(verdicts), len(questions))
    return verdicts


def scores(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """acc and acc_norm, as tables of published models print them."""
    return {
        "acc": sum(it.hit for it in verdicts) / len(verdicts),
        "acc_norm": sum(it.hit_norm for it in verdicts) / len(verdicts),
    }


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return ids
