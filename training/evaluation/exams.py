"""Tests that many models have sat, so that what a recipe makes can be compared with what others published; and with
what it started from, because a model that learns one thing may forget another."""

from __future__ import annotations

import logging
from typing import Any

from training.catalogue import expanded
from training.contract import Array, Scores
from training.evaluation import bootstrap
from training.llm import choice
from training.progress import progress
from training.spec.exams import Exam

LOG = logging.getLogger("training")


def measures(exam: Exam) -> tuple[str, ...]:
    """What `take` measures."""
    return tuple(f"{exam.__struct_config__.tag}_{name}{end}" for name in choice.NAMES for end in ("", "_gain_low"))


def take(exam: Exam, network: Any, tokenizer: Any) -> dict[str, Array]:
    """Measure → whether each row was right."""
    questions, labels = choice.read(expanded(exam.questions, "exams"), expanded(exam.labels, "exams"))
    questions, labels = questions[: exam.rows_max], labels[: exam.rows_max]
    with progress("exams", len(questions), "questions") as advance:
        return choice.judge(network, tokenizer, questions, labels, advance=advance)


def compare(exam: Exam, made: dict[str, Array], base: dict[str, Array], *, seed: int) -> Scores:
    """The marks, those of the base, and what was gained at least."""
    name = exam.__struct_config__.tag
    scores: Scores = {}
    for mark, right in made.items():
        value, low, high = bootstrap.gain(right, base[mark], seed=seed)
        scores |= {f"{name}_{mark}": float(right.mean()), f"{name}_{mark}_gain_low": low}
        LOG.info(
            "exams: %s %s %.4f, %+.4f on what it started from, 95 %% interval %+.4f to %+.4f (%d rows)",
            name, mark, right.mean(), value, low, high, len(right),
        )  # fmt: skip
    return scores
